/* w4a16.h: y = x W^T with W in 4 bits and fp16 or bf16 activations.
 *
 * Neutral layout (what checkpoints are read into):
 *   codes   uint8 [N, K / 2]           two codes a byte along K, the low nibble first; unsigned, 0 to 15
 *   scales  fp16|bf16 [N, K / group]
 *   zeros   uint8 [N, K / group]       whole in the low nibble, sixteenths in the high one, 0 to 15 15/16; absent when symmetric: the zero point is then 8
 *   W[n, k] = (codes[n, k] - zeros[n, k / group]) * scales[n, k / group]
 * Checkpoints with zero points have whole ones: bytes of 0 to 15. Those with a minimum for each group (GGUF, MLX) need the sixteenths.
 *
 * Packed layout (what the kernels read; the same number of bytes; the same on every device):
 *   codes   [N / 16, K / 64] tiles of 512 bytes; lane 4 g + t of a warp owns 16 bytes, its fragments of the tensor cores' A operand:
 *           words {row 2g, row 2g + 1} of k = 0..31, then of k = 32..63; a word holds k = 8t .. 8t + 7, even ones in nibbles 0 to 3, odd ones in 4 to 7
 *   scales, zeros   [N / 16, K / group, 16]
 */
#ifndef FLASHHEAD_W4A16_H
#define FLASHHEAD_W4A16_H

#include <cuda_runtime_api.h>

#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One packed matrix. N % 16 == 0, K % 64 == 0, K % group_size == 0; pointers 16-byte aligned. */
typedef struct {
  const void* codes;
  const void* scales; /* of the same dtype as x and y */
  const void* zeros;  /* NULL: symmetric */
  int N;              /* outputs */
  int K;              /* inputs */
  int group_size;     /* 32, 64 or 128 */
  fh_dtype dtype;
} fh_w4a16_weight;

enum { FH_W4A16_DECODE_ROWS = 8 }; /* up to this M the decode kernel runs, above it the tensor-core tiles */

/* How a launch of M rows is cut; read by every caller that launches the kernels itself. */
typedef struct {
  int decode;       /* 1: w4a16_decode; 0: a prefill */
  int wide;         /* prefill: 1: w4a16_prefill_wide, compiled for sm_90a (capability 90); 0: w4a16_prefill */
  int tile_outputs; /* prefill: outputs a block computes, 128, or with wide 256 */
  int tile_tokens;  /* prefill: tokens a block computes, 64 or 128 */
  int grid_x, grid_y;
  int threads;
  int shared_bytes; /* dynamic shared memory */
} fh_w4a16_plan;

/* Fills plan for M rows. The sums' order depends on the matrix's N and K alone: no plan changes a bit of decode's result. */
void fh_w4a16_make_plan(const fh_w4a16_weight* weight, int M, const fh_device* device, fh_w4a16_plan* plan);

/* Neutral to packed, out of place, in device memory: codes in [N, K/2] to packed.codes, and so on; zeros only if packed.zeros is set. */
const char* fh_w4a16_repack(const void* codes, const void* scales, const void* zeros, const fh_w4a16_weight* packed, const fh_device* device,
                            cudaStream_t stream);

/* y[M, N] = x[M, K] W^T; x, y of weight->dtype, contiguous, 16-byte aligned, M >= 1. float32 sums.
 * With device->overlap the weights are read while the launch before this one runs: it must not write them. After fh_w4a16_repack synchronise once.
 */
const char* fh_w4a16_linear(const fh_w4a16_weight* weight, const void* x, void* y, int M, const fh_device* device, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
