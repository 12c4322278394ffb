/* settings.h: what stands between an engine's tensors of 32 bits and the 64-bit numbers that the head step and the draw read and write.
 * NVRTC, nvcc and a C compiler all read it; NVRTC, which has no host functions, without an include.
 */
#ifndef FLASHHEAD_SETTINGS_H
#define FLASHHEAD_SETTINGS_H

#define FH_SETTINGS_THREADS 256

/* Before a draw. Device pointers; a row each. What lies outside of a setting's range is taken for the nearest in it, NaN for "off": nothing that lies in
 * these tensors leads the draw out of bounds.
 */
struct FlashHeadSettings {
  const float* temperature; /* 0 or less: greedy; else at least 0.001 */
  const float* top_p;       /* above 0, at most 1: off */
  const float* min_p;       /* 0 (off) to 1 */
  const int* top_k;         /* 0 or less: off */
  const int* step;          /* read as unsigned */
  double* wide_temperature; /* out, as decode.h wants them */
  double* wide_top_p;
  double* wide_min_p;
  long long* wide_top_k;
  long long* wide_step;
  const float* logits;      /* [rows, width]; NULL: only settings */
  const long long* count;   /* logits of row n: count[n * count_stride] */
  float* final_logits;      /* out [rows, width]: scale * logit, then softcap * tanh(that / softcap); in float64, rounded once (decoding.model_logits) */
  double scale, softcap;    /* softcap 0: none */
  int rows, width, count_stride;
};

/* Behind a step. Device pointers. */
struct FlashHeadNarrow {
  const long long* token;       /* [rows] */
  const long long* counts;      /* [rows, counted], the last is the number of ids */
  const long long* ids;         /* [rows, candidates] */
  const unsigned char* capped;  /* [rows] */
  int* narrow_token;            /* out */
  int* narrow_counts;
  int* narrow_ids;              /* out, the counted ones only */
  int* narrow_capped;
  int rows, counted, candidates;
};

#ifndef __CUDACC_RTC__
#include "device.h"
struct CUstream_st; /* what cudaStream_t points to */

#ifdef __cplusplus
extern "C" {
#endif

const char* fh_draw_settings(const struct FlashHeadSettings* arguments, const fh_device* device, struct CUstream_st* stream);
const char* fh_narrow(const struct FlashHeadNarrow* arguments, const fh_device* device, struct CUstream_st* stream);

#ifdef __cplusplus
}
#endif
#endif
#endif
