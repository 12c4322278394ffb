// embedding.cu: rows of a matrix by their numbers (embedding.h).
//
// A token's row is read once by its own block: 4 KB of Llama-3.2-1B, so that a launch of one token costs a launch and one round trip to memory.
#include "element.cuh"

namespace fh {

template <class T>
__global__ void embedding(const int* ids, const u16* rows, float scale, u16* y, int vocab_size, int d);

#ifdef __CUDACC__
constexpr u32 kNotANumbers = 0x7fff7fffu;  // two of them, of either type

// Grid: N. Threads: d / 8 rounded up to whole warps, at most 256; eight elements each at a time.
template <class T>
__global__ void __launch_bounds__(256) embedding(const int* ids, const u16* rows, float scale, u16* y, int vocab_size, int d) {
  wait_for_previous();  // the launch before this one may write ids
  release_next();
  const int id = ids[blockIdx.x];
  const bool known = u32(id) < u32(vocab_size);
  const u16* from = rows + (known ? size_t(id) * d : 0);
  u16* to = y + size_t(blockIdx.x) * d;
  for (int i = threadIdx.x * 8; i < d; i += blockDim.x * 8) {
    u32 words[4] = {kNotANumbers, kNotANumbers, kNotANumbers, kNotANumbers};
    if (known) {
      const uint4 v = load_once(reinterpret_cast<const uint4*>(from + i));
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = T::to_float2(words[j]);
        words[j] = T::from_float2(pair.x * scale, pair.y * scale);
      }
    }
    *reinterpret_cast<uint4*>(to + i) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}
#endif

}  // namespace fh

#ifndef __CUDACC_RTC__
#include "embedding.h"
#include "launch.h"

const char* fh_embedding(const int* ids, const void* rows, float scale, void* y, int N, int V, int d, fh_dtype dtype, const fh_device* device,
                         cudaStream_t stream) {
  using namespace fh;
  if (N < 1 || V < 1 || d < 8 || d % 8) return failure("embedding: %d rows of [%d, %d], expected at least one of each and d %% 8 == 0", N, V, d);
  const int vectors = d / 8, threads = vectors < 256 ? (vectors + 31) / 32 * 32 : 256;
  return launch("embedding", *device, stream, {dim3(N), threads}, dtype == FH_FP16 ? embedding<Fp16> : embedding<Bf16>, ids,
                static_cast<const u16*>(rows), scale, static_cast<u16*>(y), V, d);
}
#endif
