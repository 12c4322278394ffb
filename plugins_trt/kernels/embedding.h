/* embedding.h: rows of a matrix by their numbers, what a decoder begins with. */
#ifndef FLASHHEAD_EMBEDDING_H
#define FLASHHEAD_EMBEDDING_H

#include <cuda_runtime_api.h>

#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y[n] = scale * rows[ids[n]], the product in float32 rounded once.
 *   ids    int32 [N]; one outside of 0 to V - 1 gives a row of NaN: whatever reads it shows it, where the row of another token would not
 *   rows   fp16|bf16 [V, d], 16-byte aligned, d % 8 == 0
 *   scale  1 for most models, about sqrt(d) for Gemma
 *   y      [N, d] of the type of rows, N >= 1
 */
const char* fh_embedding(const int* ids, const void* rows, float scale, void* y, int N, int V, int d, fh_dtype dtype, const fh_device* device,
                         cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
