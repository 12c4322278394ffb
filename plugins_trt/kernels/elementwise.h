/* elementwise.h: the small steps between the products: RMSNorm and the gated activation.
 * Tensors are fp16|bf16, contiguous, 16-byte aligned; arithmetic in float32, one rounding at the end of each named result.
 */
#ifndef FLASHHEAD_ELEMENTWISE_H
#define FLASHHEAD_ELEMENTWISE_H

#include <cuda_runtime_api.h>

#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* h = x + residual, rounded, written to sum (both NULL: h = x); y[M, d] = h / sqrt(mean(h^2) + epsilon) * (weight_offset + weight[d]).
 * d % 8 == 0, d <= 16384. weight_offset is 1 for Gemma, else 0. y may be x, sum may be residual.
 */
const char* fh_rms_norm(const void* x, const void* residual, void* sum, const void* weight, float weight_offset, float epsilon, void* y, int M, int d,
                        fh_dtype dtype, const fh_device* device, cudaStream_t stream);

typedef enum { FH_SILU = 0, FH_GELU_TANH = 1 } fh_activation;

/* y[M, f] = activation(x[:, :f]) * x[:, f:], x[M, 2f] the fused gate and up projection. f % 8 == 0. */
const char* fh_gated_product(const void* x, void* y, int M, int f, fh_activation activation, fh_dtype dtype, const fh_device* device, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
