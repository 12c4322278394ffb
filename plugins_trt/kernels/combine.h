/* combine.h: sums and products of activations with a row of constants or with other activations: biases, scales. */
#ifndef FLASHHEAD_COMBINE_H
#define FLASHHEAD_COMBINE_H

#include <cuda_runtime_api.h>

#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { FH_ADD = 0, FH_MULTIPLY = 1 } fh_combination;

/* y[M, d] = x[M, d] + other, or times it, in float32 and rounded once; other [M, d], or with one_row [d]. fp16|bf16, 16-byte aligned, d % 8 == 0.
 * y may be x or other. With device->overlap a single row is read while the launch before this one runs: it must not write it.
 */
const char* fh_combine(const void* x, const void* other, int one_row, fh_combination combination, void* y, int M, int d, fh_dtype dtype,
                       const fh_device* device, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
