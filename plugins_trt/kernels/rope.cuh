// rope.cuh: the rotary embedding of new tokens, with the norm of their heads: as a launch that writes the cache, and inside attention's. Layouts: attention.h.
#pragma once
#include "element.cuh"

namespace fh {

template <class T>
__global__ void attention_rope_write(const u16* qkv, const float2* rotations, const u16* q_norm, const u16* k_norm, float norm_offset, float epsilon,
                                     const int* lengths, u16* q, u16* cache_k, u16* cache_v, int q_heads, int kv_heads, int head_size, int max_length);

#ifdef __CUDACC__
// What a lane turns its pairs of a head with: no launch writes it.
template <int PAIRS>
struct Rotation {
  float2 turn[PAIRS];
  u16 first_gain[PAIRS], second_gain[PAIRS];

  __device__ void load(const float2* rotation, const u16* norm, int head_size) {
    const int half = head_size / 2;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
      const int i = threadIdx.x % 32 + p * 32;
      const bool inside = i < half;
      turn[p] = inside ? __ldg(rotation + i) : make_float2(0.f, 0.f);
      first_gain[p] = inside && norm ? __ldg(norm + i) : u16(0), second_gain[p] = inside && norm ? __ldg(norm + i + half) : u16(0);
    }
  }
};

// One head of a new token by a warp: normalised where that is wanted, rotated, rounded; written to `to` and, where given, `also`.
// PAIRS: of elements that turn together, at most, for each lane. head_size is even.
template <class T, int PAIRS>
__device__ void rope_head(const u16* in, const Rotation<PAIRS>& rotation, bool norm, float norm_offset, float epsilon, int head_size, u16* to, u16* also) {
  const int lane = threadIdx.x % 32, half = head_size / 2;
  u16 first[PAIRS], second[PAIRS];
  u32 neighbours[PAIRS];
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    const int i = lane + p * 32;
    const bool inside = i < half;
    first[p] = inside ? in[i] : u16(0), second[p] = inside ? in[i + half] : u16(0);
    if (norm) neighbours[p] = inside ? reinterpret_cast<const u32*>(in)[i] : 0;
  }
  float factor = 1.f;
  if (norm) {
    float squares = 0.f;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
      const float2 pair = T::to_float2(neighbours[p]);
      squares = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, squares));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(kAllLanes, squares, step);
    factor = rsqrtf(squares / head_size + epsilon);
  }
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    const int i = lane + p * 32;
    if (i >= half) continue;
    const float2 turn = rotation.turn[p];
    float a = T::to_float(first[p]), b = T::to_float(second[p]);
    if (norm) a *= factor * (norm_offset + T::to_float(rotation.first_gain[p])), b *= factor * (norm_offset + T::to_float(rotation.second_gain[p]));
    const u16 low = from_float<T>(fmaf(a, turn.x, -(b * turn.y))), high = from_float<T>(fmaf(b, turn.x, a * turn.y));
    to[i] = low, to[i + half] = high;
    if (also) also[i] = low, also[i + half] = high;
  }
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
  const int position = min(max(lengths[batch], queries), max_length) - queries + token;
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
  constexpr int kPairs = 4;  // heads of 256
  const u16* norm = is_query ? q_norm : k_norm;
  Rotation<kPairs> rotation;
  rotation.load(rotations + size_t(position) * half, norm, head_size);
  rope_head<T, kPairs>(in, rotation, norm != nullptr, norm_offset, epsilon, head_size, to, nullptr);
}
#endif

}  // namespace fh
