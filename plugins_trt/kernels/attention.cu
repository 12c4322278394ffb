// attention.cu: attention over a key-value cache for decoding, and the rotary embedding that writes the cache (layouts: attention.h).
//
// Determinism. A plan's `splits` cuts the visible positions of a sequence by their count alone; within a block positions go to warps, and in a warp to
// groups of lanes, by position. Partial results are merged in ascending order of lane group, warp and split, by whichever block finishes last: the
// atomic counts arrivals, it adds no floats. So for one plan a row's bits depend on its sequence only, not on batch, timing or device.
//
// One pass over keys and values, each lane 16 bytes of a row, all loads of a step in flight before the first is used; a block serves the query heads
// that share a key-value head, so each cached byte is read once (more than 4 query rows a key-value head: again, mostly from L2).
//
// Floor: 2 * kv_heads * positions * head_size * 2 bytes. Llama-3.2-1B at 4,096 positions: 8.4 MB, 2.8 us at 3.0 TB/s.
#include "element.cuh"

namespace fh {

constexpr int kStep = 4;  // rows of keys, and of values, that a lane loads before it uses them

constexpr float kNothing = -3.402823466e38f;  // the maximum of no scores

// Lanes that share a row of the cache, 16 bytes each.
__host__ __device__ constexpr int lanes_of(int head_size) { return head_size <= 64 ? 8 : head_size <= 128 ? 16 : 32; }
// Merging takes warps * rows * head_size floats of shared memory.
__host__ __device__ constexpr int attention_threads(int head_size) { return head_size == 256 ? 256 : 512; }

// What was summed under its own maximum counts this much under the common one.
__device__ inline float merge_weight(float own, float common) { return own == kNothing ? 0.f : exp2f(own - common); }

// Grid: (splits, kv_heads * row_blocks, batch). Dynamic shared memory: warps * ROWS * (HEAD + 2) floats.
// workspace: partial sums float [batch * kv_heads * row_blocks, splits, ROWS, HEAD], then maxima and weights float2 [..., splits, ROWS],
// then arrivals uint32 [batch * kv_heads * row_blocks], zero between launches.
template <class T, int HEAD, int ROWS>
__global__ void __launch_bounds__(attention_threads(HEAD), 1)
    attention_decode(const u16* q, const u16* cache_k, const u16* cache_v, const int* lengths, u16* out, float* workspace, int queries, int q_heads,
                     int kv_heads, int row_blocks, int max_length, int window, float scale) {
  constexpr int kLanes = lanes_of(HEAD), kTokens = 32 / kLanes, kUnit = kTokens * kStep;  // a warp reads kUnit positions a step
  constexpr int kWarps = attention_threads(HEAD) / 32, kThreads = kWarps * 32;
  extern __shared__ float shared[];
  float* merged = shared;                                                               // [kWarps][ROWS][HEAD]
  float2* merged_stats = reinterpret_cast<float2*>(shared + kWarps * ROWS * HEAD);      // [kWarps][ROWS]: maximum, sum of weights
  __shared__ bool last;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int splits = gridDim.x, split = blockIdx.x, kv_head = blockIdx.y / row_blocks, batch = blockIdx.z;
  const int heads = q_heads / kv_heads, first_row = blockIdx.y % row_blocks * ROWS, row_count = queries * heads;
  const int element = lane % kLanes * 8;
  const bool owns = HEAD == kLanes * 8 || element < HEAD;  // heads of 96: the last 4 of 16 lanes have nothing to load

  wait_for_previous();
  release_next();
  const int length = lengths[batch];
  const int begin = window > 0 ? max(0, length - queries + 1 - window) : 0;
  const int units = (length - begin + kUnit - 1) / kUnit;
  const int first_unit = int((long long)units * split / splits), end_unit = int((long long)units * (split + 1) / splits);
  const u16* keys = cache_k + (size_t(batch) * kv_heads + kv_head) * max_length * HEAD + element;
  const u16* values = cache_v + (size_t(batch) * kv_heads + kv_head) * max_length * HEAD + element;

  float query[ROWS][8], sum[ROWS][8], maximum[ROWS], weight[ROWS];
  int position[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int row = first_row + r, token = row / heads, head = kv_head * heads + row % heads;
    position[r] = row < row_count ? length - queries + token : -1;
    uint4 packed = make_uint4(0, 0, 0, 0);
    if (row < row_count && owns) {
      packed = __ldg(reinterpret_cast<const uint4*>(q + ((size_t(batch) * queries + token) * q_heads + head) * HEAD + element));
    }
    const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = T::to_float2(words[i]);
      query[r][2 * i] = pair.x * scale, query[r][2 * i + 1] = pair.y * scale;  // scale holds log2(e): weights are powers of two
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[r][i] = 0.f;
    maximum[r] = kNothing, weight[r] = 0.f;
  }

  for (int unit = first_unit + warp; unit < end_unit; unit += kWarps) {
    const int first = begin + unit * kUnit + lane / kLanes;
    uint4 key[kStep], value[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const int at = first + i * kTokens;
      key[i] = owns && at < length ? load_once(reinterpret_cast<const uint4*>(keys + size_t(at) * HEAD)) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const int at = first + i * kTokens;
      value[i] = owns && at < length ? load_once(reinterpret_cast<const uint4*>(values + size_t(at) * HEAD)) : make_uint4(0, 0, 0, 0);
    }

    float score[kStep][ROWS];
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const u32 words[4] = {key[i].x, key[i].y, key[i].z, key[i].w};
#pragma unroll
      for (int r = 0; r < ROWS; ++r) score[i][r] = 0.f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = T::to_float2(words[j]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) score[i][r] = fmaf(query[r][2 * j + 1], pair.y, fmaf(query[r][2 * j], pair.x, score[i][r]));
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) score[i][r] += __shfl_xor_sync(kAllLanes, score[i][r], step);
        const int at = first + i * kTokens;
        if (at > position[r] || (window > 0 && at <= position[r] - window)) score[i][r] = kNothing;
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float highest = maximum[r];
#pragma unroll
      for (int i = 0; i < kStep; ++i) highest = fmaxf(highest, score[i][r]);
      const float keep = merge_weight(maximum[r], highest);
      maximum[r] = highest;
      weight[r] *= keep;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[r][i] *= keep;
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        score[i][r] = merge_weight(score[i][r], highest);
        weight[r] += score[i][r];
      }
    }
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const u32 words[4] = {value[i].x, value[i].y, value[i].z, value[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = T::to_float2(words[j]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          sum[r][2 * j] = fmaf(score[i][r], pair.x, sum[r][2 * j]);
          sum[r][2 * j + 1] = fmaf(score[i][r], pair.y, sum[r][2 * j + 1]);
        }
      }
    }
  }

  // Merge the lane groups of a warp, then the warps of the block.
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    float highest = maximum[r];
#pragma unroll
    for (int step = kLanes; step < 32; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, step));
    const float keep = merge_weight(maximum[r], highest);
    weight[r] *= keep;
#pragma unroll
    for (int step = kLanes; step < 32; step *= 2) weight[r] += __shfl_xor_sync(kAllLanes, weight[r], step);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sum[r][i] *= keep;
#pragma unroll
      for (int step = kLanes; step < 32; step *= 2) sum[r][i] += __shfl_xor_sync(kAllLanes, sum[r][i], step);
    }
    if (lane < kLanes && owns) {
      float4* to = reinterpret_cast<float4*>(merged + (warp * ROWS + r) * HEAD + element);
      to[0] = make_float4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
      to[1] = make_float4(sum[r][4], sum[r][5], sum[r][6], sum[r][7]);
    }
    if (lane == 0) merged_stats[warp * ROWS + r] = make_float2(highest, weight[r]);
  }
  __syncthreads();

  const size_t item = size_t(batch) * gridDim.y + blockIdx.y, items = size_t(gridDim.z) * gridDim.y;
  float* partials = workspace + item * splits * ROWS * HEAD;
  float2* stats = reinterpret_cast<float2*>(workspace + items * splits * ROWS * HEAD) + item * splits * ROWS;
  u32* arrivals = reinterpret_cast<u32*>(workspace + items * splits * ROWS * (HEAD + 2)) + item;
  for (int i = threadIdx.x; i < ROWS * HEAD; i += kThreads) {
    const int r = i / HEAD;
    float highest = kNothing, total = 0.f, total_weight = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) highest = fmaxf(highest, merged_stats[w * ROWS + r].x);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 own = merged_stats[w * ROWS + r];
      const float keep = merge_weight(own.x, highest);
      total = fmaf(keep, merged[w * ROWS * HEAD + i], total);
      total_weight = fmaf(keep, own.y, total_weight);
    }
    partials[split * ROWS * HEAD + i] = total;
    if (i % HEAD == 0) stats[split * ROWS + r] = make_float2(highest, total_weight);
  }

  // The last of the splits to arrive merges them all.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(arrivals, 1u) == u32(splits - 1);
    if (last) *arrivals = 0;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();

  // kThreads / (outputs / 4) parts of the splits side by side, merged in order.
  constexpr int kQuads = ROWS * HEAD / 4, kParts = kThreads / kQuads > 0 ? kThreads / kQuads : 1;
  static_assert(kQuads <= kThreads, "a thread holds four outputs");
  const int part = threadIdx.x / kQuads, quad = threadIdx.x % kQuads, r = quad * 4 / HEAD;
  float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
  float highest = kNothing, total_weight = 0.f;
  if (part < kParts) {
#pragma unroll 8
    for (int s = part; s < splits; s += kParts) {
      const float2 own = __ldcg(stats + s * ROWS + r);
      const float4 v = __ldcg(reinterpret_cast<const float4*>(partials + s * ROWS * HEAD) + quad);
      const float common = fmaxf(highest, own.x);
      const float keep = merge_weight(highest, common), gain = merge_weight(own.x, common);
      total.x = total.x * keep + v.x * gain, total.y = total.y * keep + v.y * gain;
      total.z = total.z * keep + v.z * gain, total.w = total.w * keep + v.w * gain;
      total_weight = total_weight * keep + own.y * gain;
      highest = common;
    }
    reinterpret_cast<float4*>(merged)[threadIdx.x] = total;
    if (quad * 4 % HEAD == 0) merged_stats[part * ROWS + r] = make_float2(highest, total_weight);
  }
  __syncthreads();
  if (part > 0) return;
  for (int p = 1; p < kParts; ++p) {
    const float2 own = merged_stats[p * ROWS + r];
    const float4 v = reinterpret_cast<const float4*>(merged)[p * kQuads + quad];
    const float common = fmaxf(highest, own.x);
    const float keep = merge_weight(highest, common), gain = merge_weight(own.x, common);
    total.x = total.x * keep + v.x * gain, total.y = total.y * keep + v.y * gain;
    total.z = total.z * keep + v.z * gain, total.w = total.w * keep + v.w * gain;
    total_weight = total_weight * keep + own.y * gain;
    highest = common;
  }
  const int row = first_row + r;
  if (row >= row_count) return;
  const int token = row / heads, head = kv_head * heads + row % heads;
  const float inverse = 1.f / total_weight;
  uint2 packed;
  packed.x = T::from_float2(total.x * inverse, total.y * inverse);
  packed.y = T::from_float2(total.z * inverse, total.w * inverse);
  *reinterpret_cast<uint2*>(out + ((size_t(batch) * queries + token) * q_heads + head) * HEAD + quad * 4 % HEAD) = packed;
}

// A warp takes one head of one new token. Grid: (ceil((q_heads + 2 kv_heads) / 4), queries, batch); 128 threads.
template <class T>
__global__ void __launch_bounds__(128)
    attention_rope_write(const u16* qkv, const float2* rotations, const u16* q_norm, const u16* k_norm, float norm_offset, float epsilon,
                         const int* lengths, u16* q, u16* cache_k, u16* cache_v, int q_heads, int kv_heads, int head_size, int max_length) {
  const int lane = threadIdx.x % 32, head = blockIdx.x * 4 + threadIdx.x / 32, token = blockIdx.y, queries = gridDim.y, batch = blockIdx.z;
  const int heads = q_heads + 2 * kv_heads, half = head_size / 2;
  wait_for_previous();
  release_next();
  if (head >= heads) return;
  const int position = lengths[batch] - queries + token;
  const u16* in = qkv + ((size_t(batch) * queries + token) * heads + head) * head_size;

  const bool is_query = head < q_heads, is_value = head >= q_heads + kv_heads;
  u16* to = q + ((size_t(batch) * queries + token) * q_heads + head) * head_size;
  if (!is_query) {
    const int kv_head = head - q_heads - (is_value ? kv_heads : 0);
    to = (is_value ? cache_v : cache_k) + ((size_t(batch) * kv_heads + kv_head) * max_length + position) * head_size;
  }
  if (is_value) {
    for (int i = lane * 2; i < head_size; i += 64) *reinterpret_cast<u32*>(to + i) = *reinterpret_cast<const u32*>(in + i);
    return;
  }
  const u16* norm = is_query ? q_norm : k_norm;
  float factor = 1.f;
  if (norm) {
    float squares = 0.f;
    for (int i = lane * 2; i < head_size; i += 64) {
      const float2 pair = T::to_float2(*reinterpret_cast<const u32*>(in + i));
      squares = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, squares));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(kAllLanes, squares, step);
    factor = rsqrtf(squares / head_size + epsilon);
  }
  for (int i = lane; i < half; i += 32) {
    const float2 rotation = rotations[size_t(position) * half + i];
    float a = T::to_float(in[i]), b = T::to_float(in[i + half]);
    if (norm) a *= factor * (norm_offset + T::to_float(norm[i])), b *= factor * (norm_offset + T::to_float(norm[i + half]));
    to[i] = from_float<T>(a * rotation.x - b * rotation.y);
    to[i + half] = from_float<T>(b * rotation.x + a * rotation.y);
  }
}

}  // namespace fh

#ifndef __CUDACC_RTC__
#include "attention.h"
#include "launch.h"

namespace fh {

static const char* check(const fh_attention_shape& s) {
  if (s.head_size != 64 && s.head_size != 96 && s.head_size != 128 && s.head_size != 256) {
    return failure("attention: head_size is %d, expected 64, 96, 128 or 256; use another attention for this model", s.head_size);
  }
  if (s.batch < 1 || s.queries < 1 || s.kv_heads < 1 || s.q_heads < 1 || s.q_heads % s.kv_heads) {
    return failure("attention: batch %d, queries %d, heads %d over %d, expected at least 1 each and heads a multiple of key-value heads", s.batch, s.queries,
                   s.q_heads, s.kv_heads);
  }
  if (s.max_length < s.queries || s.window < 0) {
    return failure("attention: max_length is %d and window %d, expected at least %d queries and 0 or more", s.max_length, s.window, s.queries);
  }
  if (s.dtype != FH_FP16 && s.dtype != FH_BF16) return failure("attention: dtype is %d, expected FH_FP16 or FH_BF16", int(s.dtype));
  return nullptr;
}

using Arguments = struct {
  const u16 *q, *k, *v;
  const int* lengths;
  u16* out;
  float* workspace;
};

template <class T, int HEAD, int ROWS>
const char* decode(const fh_attention_shape& s, const fh_attention_plan& plan, const Arguments& a, const fh_device& device, cudaStream_t stream) {
  const int shared = plan.threads / 32 * ROWS * (HEAD + 2) * int(sizeof(float));
  const float log2e = 1.4426950408889634f;
  return launch("attention_decode", device, stream, dim3(plan.splits, s.kv_heads * plan.row_blocks, s.batch), plan.threads, shared,
                attention_decode<T, HEAD, ROWS>, a.q, a.k, a.v, a.lengths, a.out, a.workspace, s.queries, s.q_heads, s.kv_heads, plan.row_blocks,
                s.max_length, s.window, s.scale * log2e);
}

template <class T, int HEAD>
const char* decode(const fh_attention_shape& s, const fh_attention_plan& plan, const Arguments& a, const fh_device& device, cudaStream_t stream) {
  switch (plan.rows) {
    case 1: return decode<T, HEAD, 1>(s, plan, a, device, stream);
    case 2: return decode<T, HEAD, 2>(s, plan, a, device, stream);
    default: return decode<T, HEAD, 4>(s, plan, a, device, stream);
  }
}

template <class T>
const char* decode(const fh_attention_shape& s, const fh_attention_plan& plan, const Arguments& a, const fh_device& device, cudaStream_t stream) {
  switch (s.head_size) {
    case 64: return decode<T, 64>(s, plan, a, device, stream);
    case 96: return decode<T, 96>(s, plan, a, device, stream);
    case 128: return decode<T, 128>(s, plan, a, device, stream);
    default: return decode<T, 256>(s, plan, a, device, stream);
  }
}

}  // namespace fh

const char* fh_attention_make_plan(const fh_attention_shape* s, const fh_device* device, fh_attention_plan* plan) {
  if (const char* wrong = fh::check(*s)) return wrong;
  const int row_count = s->queries * (s->q_heads / s->kv_heads);
  plan->rows = row_count >= 3 ? 4 : row_count;
  plan->row_blocks = (row_count + plan->rows - 1) / plan->rows;
  plan->threads = fh::attention_threads(s->head_size);
  const int items = s->batch * s->kv_heads * plan->row_blocks;
  // Blocks for every multiprocessor once; no more splits than blocks can find positions.
  const int positions = plan->threads / fh::lanes_of(s->head_size) * fh::kStep;
  const int visible = s->window > 0 && s->window + s->queries < s->max_length ? s->window + s->queries : s->max_length;
  const int useful = (visible + positions - 1) / positions, wanted = device->multiprocessors / items;
  plan->splits = wanted < 1 ? 1 : wanted < useful ? wanted : useful;
  plan->workspace_bytes = (size_t(items) * plan->splits * plan->rows * (s->head_size + 2) + items) * sizeof(float);
  return nullptr;
}

const char* fh_attention_decode(const fh_attention_shape* shape, const fh_attention_plan* plan, const void* q, const void* cache_k, const void* cache_v,
                                const int* lengths, void* out, void* workspace, const fh_device* device, cudaStream_t stream) {
  using namespace fh;
  if (const char* wrong = check(*shape)) return wrong;
  const Arguments a{static_cast<const u16*>(q),   static_cast<const u16*>(cache_k), static_cast<const u16*>(cache_v), lengths,
                    static_cast<u16*>(out), static_cast<float*>(workspace)};
  return shape->dtype == FH_FP16 ? decode<Fp16>(*shape, *plan, a, *device, stream) : decode<Bf16>(*shape, *plan, a, *device, stream);
}

const char* fh_attention_rope_write(const fh_attention_shape* shape, const void* qkv, const float* rotations, const void* q_norm, const void* k_norm,
                                    float norm_offset, float epsilon, const int* lengths, void* q, void* cache_k, void* cache_v, const fh_device* device,
                                    cudaStream_t stream) {
  using namespace fh;
  if (const char* wrong = check(*shape)) return wrong;
  const dim3 grid((shape->q_heads + 2 * shape->kv_heads + 3) / 4, shape->queries, shape->batch);
  return launch("attention_rope_write", *device, stream, grid, 128, 0, shape->dtype == FH_FP16 ? attention_rope_write<Fp16> : attention_rope_write<Bf16>,
                static_cast<const u16*>(qkv), reinterpret_cast<const float2*>(rotations), static_cast<const u16*>(q_norm),
                static_cast<const u16*>(k_norm), norm_offset, epsilon, lengths, static_cast<u16*>(q), static_cast<u16*>(cache_k),
                static_cast<u16*>(cache_v), shape->q_heads, shape->kv_heads, shape->head_size, shape->max_length);
}
#endif
