// dense_rows.cu: all logits of a head by its own rows (dense_rows.h).
//
// A warp takes four rows at a time, so that a state read from shared memory serves four; 16 bytes a lane and load. Determinism: a logit is summed by one
// warp, in an order that d alone fixes: neither the grid nor the other states change a bit.
//
// Floor: the rows, once: 525 MB for Llama-3.2-1B, 175 us at 3.0 TB/s (H100). The bench's rival, which keeps the greedy token alone (bench/dense_rows.cu), reads
// as this does and takes 178 us there.
#include "element.cuh"

namespace fh {

[[maybe_unused]] constexpr int kRowsOfWarp = 4;
constexpr int kDenseThreads = 256;

template <class T, int N>
__global__ void dense_rows(const u16* rows, const u16* bias, const u16* hidden, float* logits, int count, int d, int V);

#ifdef __CUDACC__
// Dynamic shared memory: 4 * count * d bytes. N: 1, or up to 8 states.
template <class T, int N>
__global__ void __launch_bounds__(kDenseThreads)
    dense_rows(const u16* rows, const u16* bias, const u16* hidden, float* logits, int count, int d, int V) {
  extern __shared__ float4 states[];  // [count][2 halves of eight elements][d / 8]: a lane's halves lie apart, so that no two lanes meet in a bank
  const int chunks = d / 8, lane = threadIdx.x % 32, warp = (blockIdx.x * kDenseThreads + threadIdx.x) / 32, warps = gridDim.x * (kDenseThreads / 32);
  wait_for_previous();
  release_next();
  for (int i = threadIdx.x; i < count * chunks; i += kDenseThreads) {
    const uint4 w = load_if(true, hidden + size_t(i) * 8);
    const float2 a = T::to_float2(w.x), b = T::to_float2(w.y), c = T::to_float2(w.z), e = T::to_float2(w.w);
    const int n = i / chunks, at = i - n * chunks;
    states[2 * n * chunks + at] = make_float4(a.x, a.y, b.x, b.y);
    states[(2 * n + 1) * chunks + at] = make_float4(c.x, c.y, e.x, e.y);
  }
  __syncthreads();
  for (int first = warp * kRowsOfWarp; first < V; first += warps * kRowsOfWarp) {
    float sums[kRowsOfWarp][N] = {};
#pragma unroll 2
    for (int at = lane; at < chunks; at += 32) {
      uint4 w[kRowsOfWarp];
#pragma unroll
      for (int r = 0; r < kRowsOfWarp; ++r) w[r] = __ldcs(reinterpret_cast<const uint4*>(rows) + size_t(min(first + r, V - 1)) * chunks + at);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (n >= count) break;
        const float4 x = states[2 * n * chunks + at], y = states[(2 * n + 1) * chunks + at];
#pragma unroll
        for (int r = 0; r < kRowsOfWarp; ++r) {
          const float2 a = T::to_float2(w[r].x), b = T::to_float2(w[r].y), c = T::to_float2(w[r].z), e = T::to_float2(w[r].w);
          float sum = sums[r][n];
          sum = fmaf(a.x, x.x, sum), sum = fmaf(a.y, x.y, sum), sum = fmaf(b.x, x.z, sum), sum = fmaf(b.y, x.w, sum);
          sum = fmaf(c.x, y.x, sum), sum = fmaf(c.y, y.y, sum), sum = fmaf(e.x, y.z, sum), sum = fmaf(e.y, y.w, sum);
          sums[r][n] = sum;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (n >= count) break;
        float sum = sums[r][n];
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
        if (lane == 0 && first + r < V) logits[size_t(n) * V + first + r] = bias ? sum + T::to_float(bias[first + r]) : sum;
      }
    }
  }
}
#endif

}  // namespace fh

#ifndef __CUDACC_RTC__
#include "dense_rows.h"
#include "launch.h"

const char* fh_dense_rows(const void* rows, const void* bias, const void* hidden, float* logits, int N, int d, int V, fh_dtype dtype, const fh_device* device,
                          cudaStream_t stream) {
  using namespace fh;
  if (N < 1 || N > FH_DENSE_ROWS_STATES || d < 8 || d % 8 || V < 1) {
    return failure("dense_rows: %d states of %d over %d rows, expected 1 to %d states and d %% 8 == 0", N, d, V, FH_DENSE_ROWS_STATES);
  }
  const int shared = 4 * N * d, blocks = device->shared_bytes / (shared + 1024);
  auto kernel = dtype == FH_FP16 ? (N == 1 ? dense_rows<Fp16, 1> : dense_rows<Fp16, 8>) : (N == 1 ? dense_rows<Bf16, 1> : dense_rows<Bf16, 8>);
  return launch("dense_rows", *device, stream, {dim3(device->multiprocessors * (blocks < 1 ? 1 : blocks > 4 ? 4 : blocks)), kDenseThreads, shared}, kernel,
                static_cast<const u16*>(rows), static_cast<const u16*>(bias), static_cast<const u16*>(hidden), logits, N, d, V);
}
#endif
