/* decode.h: from the candidates of a step to the next token: temperature, min-p, top-k, top-p and a seeded draw, and the best candidates' log-probabilities.
 * The definition is flashhead_edge/decoding.py; scale and soft-cap, masks, bias and penalties are applied to the logits before.
 * NVRTC, nvcc and a C compiler all read it; NVRTC, which has no host functions, without an include.
 */
#ifndef FLASHHEAD_DECODE_H
#define FLASHHEAD_DECODE_H

#define FH_DECODE_THREADS 256
#define FH_DECODE_CANDIDATES 8192 /* of a row, at most */

/* Device pointers. The settings are arrays, so that a captured graph follows what is written into them; a row each. */
struct FlashHeadDecode {
  const long long* ids;              /* [rows, width], distinct below 2^31; the first count of a row are read, in any order */
  const float* logits;               /* [rows, width]; -inf may not be chosen, never NaN */
  const long long* count;            /* of row n at count[n * count_stride]; at most width */
  const double* temperature;         /* 0: greedy, the smaller id on ties; else at least 0.001 */
  const double* top_p;               /* above 0; 1: off */
  const double* min_p;               /* 0: off */
  const long long* top_k;            /* 0: off */
  const unsigned long long* seed;
  const long long* step;             /* 0 to 2^32 - 1: of the sequence, half of the noise's key */
  long long* token;                  /* out [rows]; -1 where no candidate may be chosen */
  float* logprob;                    /* out [rows], the token's; written where best > 0 */
  long long* best_ids;               /* out [rows, best], largest logit first, the smaller id on ties; then -1 */
  float* best_logprobs;              /* out [rows, best], log softmax of the logits over the candidates, at temperature 1 and before any cut; then -inf */
  int rows, width, count_stride, best;
};

#ifndef __CUDACC_RTC__
#include "device.h"
struct CUstream_st; /* what cudaStream_t points to */

#ifdef __cplusplus
extern "C" {
#endif

/* Tokens of rows >= 1 rows; width from 1 to FH_DECODE_CANDIDATES. */
const char* fh_decode(const struct FlashHeadDecode* arguments, const fh_device* device, struct CUstream_st* stream);

#ifdef __cplusplus
}
#endif
#endif
#endif
