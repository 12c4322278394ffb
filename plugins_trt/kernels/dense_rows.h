/* dense_rows.h: all logits of a head by its own rows in 16 bits: what a fast head is compared with, and what its text is verified with. */
#ifndef FLASHHEAD_DENSE_ROWS_H
#define FLASHHEAD_DENSE_ROWS_H

#include <cuda_runtime_api.h>

#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { FH_DENSE_ROWS_STATES = 8 }; /* hidden states of one launch, at most */

/* logits[N, V] = hidden[N, d] rows[V, d]^T + bias, in float32; rows, hidden and bias [V] of dtype, bias may be NULL. 16-byte aligned, d % 8 == 0,
 * 1 <= N <= 8; shared memory for 4 N d bytes. With device->overlap nothing is read while the launch before this one runs.
 */
const char* fh_dense_rows(const void* rows, const void* bias, const void* hidden, float* logits, int N, int d, int V, fh_dtype dtype, const fh_device* device,
                          cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
