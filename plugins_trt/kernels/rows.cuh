// rows.cuh: the arithmetic of elementwise.cu on eight elements, for its kernels and for those that a product's prologue or epilogue runs: one text, so
// that fused and unfused results have the same bits.
#pragma once
#include "element.cuh"

namespace fh {

constexpr int kNormVectors = 2;  // of eight elements, held by a thread of rms_norm: d up to 1,024 threads * 16

// Threads that a row's sum of squares is shared among, whoever computes it: they set its order.
__host__ __device__ constexpr int norm_threads(int d) { return (d / 8 + 31) / 32 * 32 <= 1024 ? (d / 8 + 31) / 32 * 32 : (d / 16 + 31) / 32 * 32; }

#ifdef __CUDACC__
__device__ inline void unpack(uint4 v, u32 (&words)[4]) { words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w; }
__device__ inline uint4 pack(const u32 (&words)[4]) { return make_uint4(words[0], words[1], words[2], words[3]); }

template <class T>
__device__ uint4 add_rounded(uint4 x, uint4 y) {
  u32 words[4], others[4];
  unpack(x, words);
  unpack(y, others);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 a = T::to_float2(words[j]), b = T::to_float2(others[j]);
    words[j] = T::from_float2(a.x + b.x, a.y + b.y);
  }
  return pack(words);
}

template <class T>
__device__ float add_squares(uint4 h, float squares) {
  u32 words[4];
  unpack(h, words);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 a = T::to_float2(words[j]);
    squares = fmaf(a.y, a.y, fmaf(a.x, a.x, squares));
  }
  return squares;
}

// The sum over a warp's lanes, the same in each.
__device__ inline float add_lanes(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

// What a row of d elements is multiplied by: 1 / sqrt(mean square + epsilon), of its warps' sums of squares.
__device__ inline float norm_factor(const float* warp_sums, int warps, int d, float epsilon) {
  float total = 0.f;
#pragma unroll 4
  for (int w = 0; w < warps; ++w) total += warp_sums[w];
  return rsqrtf(fmaf(total, __fdividef(1.f, float(d)), epsilon));
}

template <class T>
__device__ uint4 normalised(uint4 h, uint4 gain, float factor, float weight_offset) {
  u32 words[4], weights[4];
  unpack(h, words);
  unpack(gain, weights);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 a = T::to_float2(words[j]), w = T::to_float2(weights[j]);
    words[j] = T::from_float2(a.x * factor * (weight_offset + w.x), a.y * factor * (weight_offset + w.y));
  }
  return pack(words);
}

// The divisions here and above are approximate, by 2 ulp of float32: that moves a rounding to 16 bits rarely, and alike in fused and single launches.
template <bool GELU>
__device__ float activate(float v) {
  if (!GELU) return __fdividef(v, 1.f + __expf(-v));
  const float inner = 0.7978845608028654f * fmaf(0.044715f * v * v, v, v);  // sqrt(2 / pi)
  return __fdividef(v, 1.f + __expf(-2.f * inner));  // 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u))
}
#endif

}  // namespace fh
