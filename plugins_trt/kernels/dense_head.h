/* dense_head.h: the greedy token of a dense head whose rows are whole numbers of 8 or 4 bits, without a matrix of logits.
 *
 * logit[n, v] = sum over k of (codes[v, k] - 2^(bits - 1)) * scales[v, k / group_size] * hidden[n, k];  token[n] = the v of the largest, the smaller on ties.
 *
 * Neutral layout (what a head is coded into): codes uint8 [V, d * bits / 8], unsigned fields packed from the lowest bit up; scales fp16 [V, d / group_size].
 *
 * Packed layout (what the kernel reads; the same on every device). V is filled up to tiles of 16 rows, d to whole chunks of 64 bytes a row and to whole groups,
 * both with zeros:
 *   codes   [V / 16, chunks] pieces of 1,024 bytes: rows 0 to 7, then 8 to 15; in each half lane 4 g + t of a warp owns 16 bytes, which are of row g:
 *           for each 32 columns of the chunk (two such parts in 8 bits, four in 4 bits) the fields of columns 8 t to 8 t + 7, in their neutral order
 *   scales  fp16 [V / 16, blocks, 16, scales of a row in a block]; a block is a chunk, a group where that is wider, or the whole row
 */
#ifndef FLASHHEAD_DENSE_HEAD_H
#define FLASHHEAD_DENSE_HEAD_H

#include "device.h"

#define FH_DENSE_HEAD_THREADS 512
#define FH_DENSE_HEAD_ROWS 32 /* hidden states of one launch, at most */

#ifndef __CUDACC_RTC__ /* NVRTC reads the two numbers above and refuses host functions */
struct CUstream_st; /* what cudaStream_t points to */

#ifdef __cplusplus
extern "C" {
#endif

/* One packed head. Pointers 16-byte aligned. */
typedef struct {
  const void* codes;
  const void* scales;
  int vocab_size;  /* V: padding rows beyond it never win */
  int hidden_size; /* d % 8 == 0 */
  int bits;        /* 8 or 4 */
  int group_size;  /* 32 or 128; 0: one scale a row (8 bits only) */
} fh_dense_head_weight;

/* How a launch is cut; read by every caller that launches the kernel itself. No plan changes a token or a bit of a logit. */
typedef struct {
  int rows;         /* of the kernel: 8, 16 or 32, at least the hidden states of the launch */
  int grid;         /* blocks of FH_DENSE_HEAD_THREADS threads */
  int shared_bytes; /* dynamic shared memory */
} fh_dense_head_plan;

static inline int fh_dense_head_columns(int hidden_size, int bits, int group_size) { /* d, filled up */
  const int chunk = bits == 8 ? 64 : 128, unit = group_size > chunk ? group_size : chunk;
  return (hidden_size + unit - 1) / unit * unit;
}

static inline fh_dense_head_plan fh_dense_head_make_plan(const fh_dense_head_weight* weight, int N, const fh_device* device) {
  fh_dense_head_plan plan;
  plan.rows = N <= 8 ? 8 : N <= 16 ? 16 : 32;
  plan.grid = device->multiprocessors;
  plan.shared_bytes = plan.rows * 2 * (fh_dense_head_columns(weight->hidden_size, weight->bits, weight->group_size) + 32);
  return plan;
}

enum { FH_DENSE_HEAD_WORKSPACE = 8 * (FH_DENSE_HEAD_ROWS + 1) }; /* bytes; zero before the first launch, every launch leaves it zero */

/* Greedy tokens of hidden [N, d] of dtype, contiguous, 16-byte aligned, 1 <= N <= 32.
 * token out int64 [N]; logit out float32 [N], the winner's. One stream at a time a workspace. NaN never wins; where every logit is NaN the token is 0.
 * With device->overlap the head's arrays are read while the launch before this one runs: it must not write them.
 */
const char* fh_dense_head(const fh_dense_head_weight* weight, const void* hidden, void* workspace, long long* token, float* logit, int N, fh_dtype dtype,
                          const fh_device* device, struct CUstream_st* stream);

#ifdef __cplusplus
}
#endif
#endif
#endif
