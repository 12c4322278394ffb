// dense_head.cu: greedy tokens of an int8 or int4 dense head, product and argmax in one launch (dense_head.h): the rival that a clustered head must beat.
//
// Memory-bound at these batches: every byte is read once, 16 at a time, four chunks of a warp in flight; the products run on the tensor cores, whose eight
// columns are the batch.
//
// Determinism. A logit is summed by one warp in an order that d and the form fix; the winner is a maximum of keys (logit, then the smaller id), which no
// order of arrival changes. The grid, the batch and the neighbours in it never change a token or a bit of its logit.
//
// Rounding. Whole numbers of up to 8 bits are exact in fp16. A hidden state is multiplied by a power of two that brings its largest value to 2^14, which is
// exact in fp16 but for values below 2^-30 of that. Products are exact, sums are in float32: the error of a logit is at most d * 2^-23 * sum |scale q h|
// (tensor cores truncate), and for groups one rounding more for each.
#include "dense_head.h"
#include "element.cuh"

namespace fh {

constexpr int kWarps = FH_DENSE_HEAD_THREADS / 32;

template <int BITS, int GROUP>
struct Form {
  static constexpr int kChunk = BITS == 8 ? 64 : 128;                               // columns
  static constexpr int kScales = GROUP == 32 ? kChunk / 32 : 1;                     // of a row in a block of scales
  static constexpr int kBlockChunks = GROUP == 0 ? 0 : GROUP > kChunk ? 2 : 1;      // chunks of a block of scales; 0: all
};

// A lane's part of one chunk: 16 bytes of rows g and g + 8 each, and these rows' scales, two a word.
template <int BITS, int GROUP>
struct Piece {
  uint4 codes[2];
  u32 scales[2][(Form<BITS, GROUP>::kScales + 1) / 2];
};

template <int COUNT>
__device__ void load_scales(u32 (&to)[(COUNT + 1) / 2], const u16* from) {
  if constexpr (COUNT == 1) {
    to[0] = __ldg(from);
  } else if constexpr (COUNT == 2) {
    to[0] = __ldg(reinterpret_cast<const u32*>(from));
  } else {
    const uint2 four = __ldg(reinterpret_cast<const uint2*>(from));
    to[0] = four.x, to[1] = four.y;
  }
}

// Eight columns of one row as four pairs of fp16. An unsigned field under the exponent of 1,024 reads as 1,024 + field; one operation takes that off again.
__device__ inline void decode8(u32 (&pairs)[4], u32 low, u32 high) {
  const u32 one = 0x3c003c00u, offset = 0xe480e480u;  // -(1024 + 128)
  pairs[0] = Fp16::fma2(__byte_perm(low, 0x64646464u, 0x4140), one, offset);
  pairs[1] = Fp16::fma2(__byte_perm(low, 0x64646464u, 0x4342), one, offset);
  pairs[2] = Fp16::fma2(__byte_perm(high, 0x64646464u, 0x4140), one, offset);
  pairs[3] = Fp16::fma2(__byte_perm(high, 0x64646464u, 0x4342), one, offset);
}

__device__ inline void decode4(u32 (&pairs)[4], u32 word) {  // columns (0, 4), (1, 5), (2, 6), (3, 7)
  const u32 one = 0x3c003c00u, offset = 0xe408e408u;         // -(1024 + 8)
  const u32 sixteenth = 0x2c002c00u, shifted = 0xd480d480u;  // -(64 + 8)
  const u32 later = word >> 8;
  pairs[0] = Fp16::fma2((word & 0x000f000fu) | 0x64006400u, one, offset);
  pairs[1] = Fp16::fma2((word & 0x00f000f0u) | 0x64006400u, sixteenth, shifted);
  pairs[2] = Fp16::fma2((later & 0x000f000fu) | 0x64006400u, one, offset);
  pairs[3] = Fp16::fma2((later & 0x00f000f0u) | 0x64006400u, sixteenth, shifted);
}

__device__ inline u32 component(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Larger logit first, then the smaller id. No number has the key 0, which stands for "none".
__device__ inline unsigned long long key_of(float logit, int id) {
  const u32 bits = __float_as_uint(logit + 0.f);  // -0 and 0 are equal
  const u32 rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (static_cast<unsigned long long>(rising) << 32) | (0xffffffffu - u32(id));
}

__device__ inline float logit_of(unsigned long long key) {
  const u32 rising = u32(key >> 32);
  return __uint_as_float(rising & 0x80000000u ? rising & 0x7fffffffu : ~rising);
}

__device__ inline float element(const u16* hidden, size_t i, bool bf16) { return bf16 ? Bf16::to_float(hidden[i]) : Fp16::to_float(hidden[i]); }

// Hidden states as fp16 in shared memory, [ROWS, columns + 32] in the order of decode's pairs, each multiplied by its power of two; back holds the inverses.
template <int BITS, int ROWS>
__device__ void stage_states(u16* states, float* back, u32* largest, const u16* hidden, int N, int d, int columns, bool bf16) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x < ROWS) largest[threadIdx.x] = 0;
  __syncthreads();
  const int parts = (d / 8 + 31) / 32;  // of a state: a warp reads 32 vectors of eight elements
#pragma unroll 4
  for (int i = warp; i < N * parts; i += kWarps) {
    const int n = i / parts, vector = i % parts * 32 + lane;
    u32 most = 0;
    if (vector < d / 8) {
      const uint4 v = *reinterpret_cast<const uint4*>(hidden + size_t(n) * d + vector * 8);
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // magnitudes of either type are in the order of their bits
        const u32 two = component(v, j) & 0x7fff7fffu;
        most = max(most, max(two & 0xffffu, two >> 16));
      }
    }
    most = __reduce_max_sync(kAllLanes, most);
    if (lane == 0) atomicMax(&largest[n], most);
  }
  __syncthreads();
  if (threadIdx.x < ROWS) {
    const float most = bf16 ? Bf16::to_float(u16(largest[threadIdx.x])) : Fp16::to_float(u16(largest[threadIdx.x]));
    const int exponent = min(max(int(__float_as_uint(most) >> 23) - 127, -100), 127);
    back[threadIdx.x] = __uint_as_float(u32(exponent - 14 + 127) << 23);
    largest[threadIdx.x] = u32(14 - exponent + 127) << 23;  // the power itself, as bits
  }
  __syncthreads();
  const int pitch = columns + 32, vectors = columns / 8;
#pragma unroll 4
  for (int i = threadIdx.x; i < ROWS * vectors; i += FH_DENSE_HEAD_THREADS) {
    const int n = i / vectors, at = i % vectors * 8;
    uint4 packed = make_uint4(0, 0, 0, 0);
    if (n < N && at < d) {
      const uint4 v = *reinterpret_cast<const uint4*>(hidden + size_t(n) * d + at);
      const float power = __uint_as_float(largest[n]);
      float f[8];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const u32 two = component(v, j);
        const float2 both = bf16 ? Bf16::to_float2(two) : Fp16::to_float2(two);
        f[2 * j] = both.x * power, f[2 * j + 1] = both.y * power;
      }
      packed = BITS == 8 ? make_uint4(Fp16::from_float2(f[0], f[1]), Fp16::from_float2(f[2], f[3]), Fp16::from_float2(f[4], f[5]), Fp16::from_float2(f[6], f[7]))
                         : make_uint4(Fp16::from_float2(f[0], f[4]), Fp16::from_float2(f[1], f[5]), Fp16::from_float2(f[2], f[6]), Fp16::from_float2(f[3], f[7]));
    }
    *reinterpret_cast<uint4*>(states + n * pitch + at) = packed;
  }
  __syncthreads();
}

// Grid: any. Dynamic shared memory: ROWS * (columns + 32) elements.
template <int BITS, int GROUP, int ROWS>
__device__ void dense_head(const uint4* codes, const u16* scales, const u16* hidden, unsigned long long* best, long long* token, float* logit, int N, int d,
                           int V, bool bf16) {
  using F = Form<BITS, GROUP>;
  constexpr int kTiles = ROWS / 8;                 // of eight states
  constexpr int kAhead = ROWS <= 16 ? 3 : 2;  // chunks of a warp in flight, 1 KB each
  extern __shared__ uint4 dynamic[];
  u16* states = reinterpret_cast<u16*>(dynamic);
  __shared__ float back[ROWS];
  __shared__ u32 largest[ROWS];
  __shared__ unsigned long long warp_best[kWarps][ROWS];

  constexpr int kUnit = GROUP > F::kChunk ? GROUP : F::kChunk;
  const int columns = (d + kUnit - 1) / kUnit * kUnit, chunks = columns / F::kChunk;
  const int blocks = F::kBlockChunks == 0 ? 1 : chunks / max(F::kBlockChunks, 1);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int tiles = (V + 15) / 16, stride = gridDim.x * kWarps, first = warp * gridDim.x + blockIdx.x;
  const int pitch = columns + 32;

  Piece<BITS, GROUP> ahead[kAhead];
  int load_tile = first, load_chunk = 0;  // what the next load reads
  auto load = [&](Piece<BITS, GROUP>& to) {
    if (load_tile < tiles) {
      const uint4* from = codes + (size_t(load_tile) * chunks + load_chunk) * 64 + lane;
      to.codes[0] = load_once(from);
      to.codes[1] = load_once(from + 32);
      const int block = F::kBlockChunks == 0 ? 0 : load_chunk / max(F::kBlockChunks, 1);
      const u16* scale = scales + ((size_t(load_tile) * blocks + block) * 16 + g) * F::kScales;
      load_scales<F::kScales>(to.scales[0], scale);
      load_scales<F::kScales>(to.scales[1], scale + 8 * F::kScales);
      if (++load_chunk == chunks) load_chunk = 0, load_tile += stride;
    }
  };
#pragma unroll
  for (int u = 0; u < kAhead; ++u) load(ahead[u]);  // the head's arrays: no launch before this one writes them
  wait_for_previous();
  release_next();
  stage_states<BITS, ROWS>(states, back, largest, hidden, N, d, columns, bf16);

  float winner[kTiles][2];
  int winner_id[kTiles][2];
  float sum[kTiles][4], part[kTiles][4];  // rows g and g + 8 by states 2t and 2t + 1
#pragma unroll
  for (int c = 0; c < kTiles; ++c) {
    winner[c][0] = winner[c][1] = __uint_as_float(0xff800000u);  // minus infinity
    winner_id[c][0] = winner_id[c][1] = -1;
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[c][j] = part[c][j] = 0.f;
  }

  int tile = first, chunk = 0;
  while (tile < tiles) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (tile >= tiles) break;
      const Piece<BITS, GROUP> now = ahead[u];
      load(ahead[u]);
#pragma unroll
      for (int j = 0; j < F::kChunk / 32; ++j) {
        u32 low[4], high[4];
        if constexpr (BITS == 8) {
          decode8(low, component(now.codes[0], 2 * j), component(now.codes[0], 2 * j + 1));
          decode8(high, component(now.codes[1], 2 * j), component(now.codes[1], 2 * j + 1));
        } else {
          decode4(low, component(now.codes[0], j));
          decode4(high, component(now.codes[1], j));
        }
#pragma unroll
        for (int c = 0; c < kTiles; ++c) {
          const uint4 b = *reinterpret_cast<const uint4*>(states + (8 * c + g) * pitch + chunk * F::kChunk + j * 32 + t * 8);
          Fp16::mma(part[c], low[0], high[0], low[1], high[1], b.x, b.y);
          Fp16::mma(part[c], low[2], high[2], low[3], high[3], b.z, b.w);
        }
        if (GROUP > 0) {  // also within a wider group: short chains of products on one accumulator
          const int s = GROUP == 32 ? j : 0;
          const float scale[2] = {Fp16::to_float(u16(now.scales[0][s / 2] >> s % 2 * 16)), Fp16::to_float(u16(now.scales[1][s / 2] >> s % 2 * 16))};
#pragma unroll
          for (int c = 0; c < kTiles; ++c) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sum[c][i] = fmaf(scale[i / 2], part[c][i], sum[c][i]);
              part[c][i] = 0.f;
            }
          }
        }
      }
      if (++chunk < chunks) continue;
      const float scale[2] = {Fp16::to_float(u16(now.scales[0][0])), Fp16::to_float(u16(now.scales[1][0]))};
#pragma unroll
      for (int c = 0; c < kTiles; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int v = tile * 16 + g + i / 2 * 8;
          const float value = (GROUP == 0 ? part[c][i] * scale[i / 2] : sum[c][i]) * back[8 * c + 2 * t + i % 2];
          if (v < V && value > winner[c][i % 2]) winner[c][i % 2] = value, winner_id[c][i % 2] = v;  // ids rise: a tie keeps the smaller
          sum[c][i] = part[c][i] = 0.f;
        }
      }
      chunk = 0, tile += stride;
    }
  }

#pragma unroll
  for (int c = 0; c < kTiles; ++c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned long long key = winner_id[c][i] < 0 ? 0 : key_of(winner[c][i], winner_id[c][i]);
#pragma unroll
      for (int step = 16; step >= 4; step /= 2) key = max(key, __shfl_xor_sync(kAllLanes, key, step));
      if (g == 0) warp_best[warp][8 * c + 2 * t + i] = key;
    }
  }
  __syncthreads();
  if (warp > 0) return;
  if (lane < N) {
    unsigned long long key = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) key = max(key, warp_best[w][lane]);
    atomicMax(&best[lane], key);
    __threadfence();
  }
  __syncwarp();
  u32* arrived = reinterpret_cast<u32*>(best + FH_DENSE_HEAD_ROWS);
  bool last = false;
  if (lane == 0) last = atomicAdd(arrived, 1u) + 1 == gridDim.x;
  if (!__shfl_sync(kAllLanes, int(last), 0)) return;
  __threadfence();
  if (lane < N) {
    const unsigned long long key = atomicExch(&best[lane], 0ull);  // ready for the next launch
    token[lane] = key ? 0xffffffffu - u32(key) : 0;
    logit[lane] = key ? logit_of(key) : __uint_as_float(0x7fc00000u);
  }
  if (lane == 0) *arrived = 0;
}

}  // namespace fh

#define FH_DENSE_HEAD_KERNEL(NAME, BITS, GROUP, ROWS)                                                                                                     \
  extern "C" __global__ void __launch_bounds__(FH_DENSE_HEAD_THREADS, 1)                                                                                  \
      flashhead_dense_##NAME##_##ROWS(const uint4* codes, const fh::u16* scales, const fh::u16* hidden, unsigned long long* workspace, long long* token,  \
                                      float* logit, int N, int d, int V, int bf16) {                                                                      \
    fh::dense_head<BITS, GROUP, ROWS>(codes, scales, hidden, workspace, token, logit, N, d, V, bf16 != 0);                                                \
  }
#define FH_DENSE_HEAD_FORM(NAME, BITS, GROUP)  \
  FH_DENSE_HEAD_KERNEL(NAME, BITS, GROUP, 8)   \
  FH_DENSE_HEAD_KERNEL(NAME, BITS, GROUP, 16)  \
  FH_DENSE_HEAD_KERNEL(NAME, BITS, GROUP, 32)

FH_DENSE_HEAD_FORM(int8_row, 8, 0)
FH_DENSE_HEAD_FORM(int8_32, 8, 32)
FH_DENSE_HEAD_FORM(int8_128, 8, 128)
FH_DENSE_HEAD_FORM(int4_32, 4, 32)
FH_DENSE_HEAD_FORM(int4_128, 4, 128)

#ifndef __CUDACC_RTC__
#include "launch.h"

const char* fh_dense_head(const fh_dense_head_weight* weight, const void* hidden, void* workspace, long long* token, float* logit, int N, fh_dtype dtype,
                          const fh_device* device, cudaStream_t stream) {
  using namespace fh;
  static void (*const kernels[5][3])(const uint4*, const u16*, const u16*, unsigned long long*, long long*, float*, int, int, int, int) = {
      {flashhead_dense_int8_row_8, flashhead_dense_int8_row_16, flashhead_dense_int8_row_32},
      {flashhead_dense_int8_32_8, flashhead_dense_int8_32_16, flashhead_dense_int8_32_32},
      {flashhead_dense_int8_128_8, flashhead_dense_int8_128_16, flashhead_dense_int8_128_32},
      {flashhead_dense_int4_32_8, flashhead_dense_int4_32_16, flashhead_dense_int4_32_32},
      {flashhead_dense_int4_128_8, flashhead_dense_int4_128_16, flashhead_dense_int4_128_32}};
  const int group = weight->group_size, form = (weight->bits == 8 ? 0 : 2) + (group == 32 ? 1 : group == 128 ? 2 : 0);
  if ((weight->bits != 8 && weight->bits != 4) || (group != 32 && group != 128 && !(group == 0 && weight->bits == 8))) {
    return failure("dense_head: codes of %d bits in groups of %d, expected 8 or 4 bits in groups of 32 or 128, or 8 bits and 0 (one scale a row)",
                   weight->bits, group);
  }
  if (N < 1 || N > FH_DENSE_HEAD_ROWS || weight->vocab_size < 1 || weight->hidden_size < 8 || weight->hidden_size % 8) {
    return failure("dense_head: hidden is [%d, %d] and the head has %d rows, expected 1 to %d states, d %% 8 == 0 and at least one row", N,
                   weight->hidden_size, weight->vocab_size, FH_DENSE_HEAD_ROWS);
  }
  const fh_dense_head_plan plan = fh_dense_head_make_plan(weight, N, device);
  const Grid grid = {dim3(plan.grid), FH_DENSE_HEAD_THREADS, plan.shared_bytes};
  return launch("dense_head", *device, stream, grid, kernels[form][plan.rows == 8 ? 0 : plan.rows == 16 ? 1 : 2], static_cast<const uint4*>(weight->codes),
                static_cast<const u16*>(weight->scales), static_cast<const u16*>(hidden), static_cast<unsigned long long*>(workspace), token, logit, N,
                weight->hidden_size, weight->vocab_size, int(dtype == FH_BF16));
}
#endif
