/* advance.h: the end of a decode step that needs no host: the token becomes the next step's input, counters grow, and the host finds the step's results in
 * pinned memory while the next one runs.
 * NVRTC, nvcc and a C compiler all read it; NVRTC, which has no host functions, without an include.
 */
#ifndef FLASHHEAD_ADVANCE_H
#define FLASHHEAD_ADVANCE_H

#define FH_ADVANCE_THREADS 32 /* rows of a step, at most */
#define FH_MAIL_HEAD 4        /* words before the rows of a slot: its step's number, then none */
#define FH_MAIL_ROW 3         /* words of a row before its counts: token, capped, log-probability */

/* Device pointers; a row each. The slot of step s is s % slots; its number is written last, behind all else in the slot as the whole system sees it. */
struct FlashHeadAdvance {
  const long long* token;      /* [rows] */
  const long long* counts;     /* [rows, counted] */
  const unsigned char* capped; /* [rows] */
  const float* logprob;        /* [rows], or NULL: 0 is mailed */
  int* ids;                    /* out [rows]: what the next step reads */
  int* lengths;                /* [rows], each grows by one */
  int* step;                   /* [rows], each grows by one: of draws */
  unsigned* number;            /* grows by one: steps so far */
  unsigned* mail;              /* out [slots, slot_words] in pinned memory of the host */
  int rows, counted, slots, slot_words;
};

#ifndef __CUDACC_RTC__
#include "device.h"
struct CUstream_st; /* what cudaStream_t points to */

#ifdef __cplusplus
extern "C" {
#endif

/* 1 <= rows <= FH_ADVANCE_THREADS; slot_words at least FH_MAIL_HEAD + rows * (FH_MAIL_ROW + counted). */
const char* fh_advance(const struct FlashHeadAdvance* arguments, const fh_device* device, struct CUstream_st* stream);

#ifdef __cplusplus
}
#endif
#endif
#endif
