// dense_rows.cu: the greedy token of a dense head in 16 bits: what the clustered head is measured against. Part of the bench, not of the product.
//
//   rows    in  [V, d] fp16 (BF16 0) or bf16 (BF16 1), d % 8 == 0; hidden [N, d] of the same type; both 16-byte aligned
//   best    [N] 64-bit keys, zero before the launch; dense_token leaves them zero
//   token   out [N] int64, of the largest logit, the smaller id on ties
//
// A warp takes four rows at a time, so that a state read from shared memory serves four; 16 bytes a lane and load. Floor: the rows, once.
typedef unsigned int u32;
typedef unsigned long long u64;

static const int kRows = 4;  // of a warp at once

__device__ __forceinline__ float2 pair(u32 word, bool bf16) {
  float2 out;
  if (bf16) {
    out.x = __uint_as_float(word << 16), out.y = __uint_as_float(word & 0xFFFF0000u);
  } else {
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(out.x), "=f"(out.y) : "r"(word));
  }
  return out;
}

// A key that grows with the logit, then with smaller ids.
__device__ __forceinline__ u64 key(float logit, int token) {
  const u32 bits = __float_as_uint(logit);
  return u64(bits & 0x80000000u ? ~bits : bits | 0x80000000u) << 32 | u32(~token);
}

template <int N, bool BF16>
__device__ void rows_of(const uint4* rows, const uint4* hidden, u64* best, int d, int V) {
  extern __shared__ float4 states[];  // [N][d / 8][2 halves]: a lane's halves lie apart, so that no two lanes meet in a bank
  const int chunks = d / 8, lane = threadIdx.x % 32, warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, warps = gridDim.x * blockDim.x / 32;
  for (int i = threadIdx.x; i < N * chunks; i += blockDim.x) {
    const uint4 w = hidden[i];
    const float2 a = pair(w.x, BF16), b = pair(w.y, BF16), c = pair(w.z, BF16), e = pair(w.w, BF16);
    const int n = i / chunks, at = i % chunks;
    states[2 * n * chunks + at] = make_float4(a.x, a.y, b.x, b.y);
    states[(2 * n + 1) * chunks + at] = make_float4(c.x, c.y, e.x, e.y);
  }
  __syncthreads();
  u64 mine[N];
  for (int n = 0; n < N; ++n) mine[n] = 0;
  for (int first = warp * kRows; first < V; first += warps * kRows) {
    float sums[kRows][N];
    for (int r = 0; r < kRows; ++r)
      for (int n = 0; n < N; ++n) sums[r][n] = 0;
#pragma unroll 2
    for (int at = lane; at < chunks; at += 32) {
      uint4 w[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) w[r] = __ldcs(rows + size_t(min(first + r, V - 1)) * chunks + at);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float4 x = states[2 * n * chunks + at], y = states[(2 * n + 1) * chunks + at];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float2 a = pair(w[r].x, BF16), b = pair(w[r].y, BF16), c = pair(w[r].z, BF16), e = pair(w[r].w, BF16);
          sums[r][n] += a.x * x.x + a.y * x.y + b.x * x.z + b.y * x.w + c.x * y.x + c.y * y.y + e.x * y.z + e.y * y.w;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float sum = sums[r][n];
        for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
        const u64 found = first + r < V ? key(sum, first + r) : 0;
        mine[n] = found > mine[n] ? found : mine[n];
      }
  }
  if (lane == 0)
    for (int n = 0; n < N; ++n) atomicMax(best + n, mine[n]);
}

#define DENSE(N)                                                                                                                       \
  extern "C" __global__ void __launch_bounds__(256) dense_fp16_##N(const uint4* rows, const uint4* hidden, u64* best, int d, int V) {    \
    rows_of<N, false>(rows, hidden, best, d, V);                                                                                         \
  }                                                                                                                                      \
  extern "C" __global__ void __launch_bounds__(256) dense_bf16_##N(const uint4* rows, const uint4* hidden, u64* best, int d, int V) {    \
    rows_of<N, true>(rows, hidden, best, d, V);                                                                                          \
  }
DENSE(1)
DENSE(2)
DENSE(4)
DENSE(8)

extern "C" __global__ void dense_token(u64* best, long long* token, int N) {
  const int n = threadIdx.x;
  if (n >= N) return;
  token[n] = int(~u32(best[n]));
  best[n] = 0;
}
