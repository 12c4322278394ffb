/* attention.h: attention of one or a few new tokens over a key-value cache, and what writes that cache.
 *
 *   cache_k, cache_v   fp16|bf16 [batch, kv_heads, max_length, head_size]
 *   lengths            int32 [batch] in device memory: tokens in the cache, the new ones included; so a captured graph serves every step
 *
 * Query i of a sequence's `queries` new tokens stands at position lengths - queries + i and sees positions up to its own,
 * of those the last `window` if window > 0. A length below `queries` or above max_length is taken for the nearer of the two: nothing outside of the
 * cache is touched, whatever is in `lengths` (a builder of engines times kernels on what lies in memory).
 */
#ifndef FLASHHEAD_ATTENTION_H
#define FLASHHEAD_ATTENTION_H

#include <cuda_runtime_api.h>
#include <stddef.h>

#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int batch;
  int queries;    /* new tokens of each sequence, at least 1; every sequence holds at least that many */
  int q_heads;    /* a multiple of kv_heads */
  int kv_heads;
  int head_size;  /* 64, 96, 128 or 256 */
  int max_length; /* positions the cache holds */
  int window;     /* 0: none */
  float scale;    /* of the scores, usually head_size^-1/2 */
  fh_dtype dtype;
} fh_attention_shape;

typedef struct {
  int splits;     /* blocks that share a sequence's cache; part of the result's rounding, so part of the plan */
  int cluster;    /* 1, or splits: the blocks of a sequence's head form one thread block cluster and merge in shared memory (capability 90 and up) */
  int rows;       /* query rows a block computes, 1 to 8 */
  int row_blocks; /* ceil(queries * q_heads / kv_heads / rows) */
  int threads;
  size_t workspace_bytes; /* zeroed once by the caller, then handed to every launch of this plan, one at a time; of these the last 4 * `items` count arrivals */
  int items;              /* batch * kv_heads * row_blocks: what is merged on its own */
} fh_attention_plan;

const char* fh_attention_make_plan(const fh_attention_shape* shape, const fh_device* device, fh_attention_plan* plan);

/* out[batch, queries, q_heads, head_size] = softmax(scale q k^T) v; q like out. Scores and sums in float32; weights are rounded to the cache's type.
 * With device->overlap, loads begin while the launch before this one runs: that one may write q and the new tokens' positions of the cache, as
 * fh_attention_rope_write does, but neither lengths nor older positions.
 * arrivals: NULL: at the end of workspace; or at least plan->items apart, zero before the first launch and left zero by each: then workspace may hold
 * anything, and launches of different plans may share both, one at a time.
 */
const char* fh_attention_decode(const fh_attention_shape* shape, const fh_attention_plan* plan, const void* q, const void* cache_k, const void* cache_v,
                                const int* lengths, void* out, void* workspace, unsigned* arrivals, const fh_device* device, cudaStream_t stream);

/* Takes the fused projection of the new tokens apart: normalises queries and keys a head at a time (Qwen3, Gemma 3; NULL: not), rotates them, and
 * writes queries to q, keys and values to the cache at their positions.
 *   qkv             fp16|bf16 [batch, queries, q_heads + 2 kv_heads, head_size]
 *   rotations       float32 [max_length, head_size / 2, 2]: cosine and sine of element i, which turns with element i + head_size / 2
 *   q_norm, k_norm  fp16|bf16 [head_size] or NULL; a head is multiplied by (norm_offset + weight) / sqrt(mean square + epsilon)
 */
const char* fh_attention_rope_write(const fh_attention_shape* shape, const void* qkv, const float* rotations, const void* q_norm, const void* k_norm,
                                    float norm_offset, float epsilon, const int* lengths, void* q, void* cache_k, void* cache_v, const fh_device* device,
                                    cudaStream_t stream);

enum { FH_ATTENTION_FUSED_QUERIES = 8 };

/* What fh_attention_rope_decode has besides fh_attention_decode: the arguments of fh_attention_rope_write. */
typedef struct {
  const void* qkv;
  const float* rotations;
  const void* q_norm;
  const void* k_norm;
  float norm_offset;
  float epsilon;
} fh_attention_fusion;

/* fh_attention_rope_write and fh_attention_decode in one launch, with their bits, out and cache alike; queries at most 8. plan, workspace and arrivals as in
 * fh_attention_decode. With device->overlap the launch before this one may write qkv, and nothing else that this one reads; behind fh_w4a16_fused its
 * header says what several before may not write. Where blocks form clusters, lengths that change while a launch runs end it with an error.
 */
const char* fh_attention_rope_decode(const fh_attention_shape* shape, const fh_attention_plan* plan, const fh_attention_fusion* fusion, void* cache_k,
                                     void* cache_v, const int* lengths, void* out, void* workspace, unsigned* arrivals, const fh_device* device,
                                     cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
