// combine.cu: activations plus or times a row or others like them (combine.h). A launch moves a few kilobytes: it costs what a launch costs.
#include "element.cuh"

namespace fh {

template <class T, bool MULTIPLY>
__global__ void combine(const u16* x, const u16* other, u16* y, int d, int one_row);

#ifdef __CUDACC__
// Grid: (ceil(d / 1024), M); 128 threads, eight elements each.
template <class T, bool MULTIPLY>
__global__ void __launch_bounds__(128) combine(const u16* x, const u16* other, u16* y, int d, int one_row) {
  const int i = (blockIdx.x * 128 + threadIdx.x) * 8;
  const bool inside = i < d;
  uint4 b = make_uint4(0, 0, 0, 0);
  if (one_row && inside) b = __ldg(reinterpret_cast<const uint4*>(other + i));
  wait_for_previous();
  release_next();
  if (!inside) return;
  const size_t at = size_t(blockIdx.y) * d + i;
  if (!one_row) b = load_if(true, other + at);
  const uint4 a = load_if(true, x + at);
  const u32 left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
  u32 words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 u = T::to_float2(left[j]), v = T::to_float2(right[j]);
    words[j] = MULTIPLY ? T::from_float2(u.x * v.x, u.y * v.y) : T::from_float2(u.x + v.x, u.y + v.y);
  }
  *reinterpret_cast<uint4*>(y + at) = make_uint4(words[0], words[1], words[2], words[3]);
}
#endif

}  // namespace fh

#ifndef __CUDACC_RTC__
#include "combine.h"
#include "launch.h"

const char* fh_combine(const void* x, const void* other, int one_row, fh_combination combination, void* y, int M, int d, fh_dtype dtype,
                       const fh_device* device, cudaStream_t stream) {
  using namespace fh;
  if (M < 1 || M > 65535 || d < 8 || d % 8) return failure("combine: y is [%d, %d], expected 1 <= M <= 65535 and d %% 8 == 0", M, d);
  auto kernel = dtype == FH_FP16 ? (combination == FH_ADD ? combine<Fp16, false> : combine<Fp16, true>)
                                 : (combination == FH_ADD ? combine<Bf16, false> : combine<Bf16, true>);
  return launch("combine", *device, stream, {dim3((d + 1023) / 1024, M), 128}, kernel, static_cast<const u16*>(x), static_cast<const u16*>(other),
                static_cast<u16*>(y), d, one_row);
}
#endif
