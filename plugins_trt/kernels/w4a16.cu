// w4a16.cu: y[M, N] = x[M, K] W^T, W in groups of 4-bit codes (layouts: w4a16.h).
//
// Determinism. An output is summed by one block in an order that the matrix's size alone fixes: within a chunk of 64 by the tensor core, over a warp's
// chunks in ascending order, over warps in ascending order. Prefill walks K in ascending order, or every third (wide: second) chunk apart and then their
// sum: that is the plan's tile. No atomics. So for one tile neither the grid, nor the device, nor M, nor a row's neighbours change a bit of a row on one
// architecture's tensor cores; decode has one order for all plans.
//
// decode  (M <= 8). The weights are the A operand (16 outputs), the activations the B operand (8 columns, so M up to 8 costs what 1 does).
//   Codes minus zero point are exact in fp16 and bf16, so the scale is applied in float32 once a group: no rounding but float32 sums.
// prefill (M > 8). The same fragments from shared memory; code times scale is rounded to x's type, as every such kernel does. By mma.sync, and on
//   Hopper by wgmma (w4a16_wide.cuh), whose code must be compiled for sm_90a.
//
// Floor of decode: N K / 2 + 2 N K / group bytes. Measured on an H100 at 3.01 TB/s of copy, groups of 128, bf16, M = 1, in a graph of overlapping
// launches (an empty one: 0.64 us; predicted for gate and up 7.3 us):
//   Llama-3.2-1B gate and up 16,384 x 2,048   17.3 MB   floor 5.8 us   7.5 us (fp16 7.0)   torch's int4 kernel 11.5 us
//   Llama-3.2-1B down         2,048 x 8,192    8.7 MB         2.9      5.0                                      8.1
//   Llama-3.2-1B o            2,048 x 2,048    2.2 MB         0.7      2.2                                      3.8
// Without overlap each costs 1.0 to 1.5 us more. Verdict: kept.
// Prefill, M = 512, fp16, on an H100, by wgmma (before: by mma.sync), against cuBLAS fp16 in the same run: gate and up 67 us (105), 1.1 times its time;
// down 51 (63), 1.6; q, k and v 18 (35), 1.5; o 14 (18), 1.4. Verdict: kept. Up to 515 TFLOP/s. A chunk's time hardly depends on its tokens, nor on the
// fence or on who copies: reckoned, not traced, it is the latency of codes, products with scales and wgmma in a row. Worst where M is small and K long:
// 2.9 at M = 64, down.
#include "w4a16_decode.cuh"
#include "w4a16_wide.cuh"

namespace fh {

constexpr int kTeamThreads = 128;  // two warps along the outputs, two along the tokens
[[maybe_unused]] constexpr int kWarpTiles = 4;
[[maybe_unused]] constexpr int kPrefillRows = 128;

// Two shapes: 128 tokens where that fills the device with two blocks a multiprocessor; else 64 tokens and three teams of warps that take every third
// chunk of K, so that few blocks still give each scheduler three warps. A warp takes 64 outputs by half of the tokens.
// Half of that (32 outputs, twice the warps) was slower by a tenth to a quarter on an H100: it reads the activations twice as often.
__host__ __device__ constexpr int prefill_teams(int tokens) { return tokens == 128 ? 1 : 3; }
__host__ __device__ constexpr int prefill_stages(int tokens) { return tokens == 128 ? 3 : 2; }
__host__ __device__ constexpr int prefill_threads(int tokens) { return kTeamThreads * prefill_teams(tokens); }

template <class T, int GROUP, bool ASYMMETRIC, int PAIRS>
__global__ void w4a16_decode(const uint4* codes, const u16* scales, const u8* zeros, const u16* x, u16* y, int M, int N, int K);
template <class T, int GROUP, bool ASYMMETRIC, int TOKENS>
__global__ void w4a16_prefill(const uint4* codes, const u16* scales, const u8* zeros, const u16* x, u16* y, int M, int N, int K);
__global__ void w4a16_repack_codes(const u32* neutral, u32* packed, int N, int K);
template <class V>
__global__ void w4a16_repack_groups(const V* neutral, V* packed, int N, int groups);

#ifdef __CUDACC__
// Dynamic shared memory: 2 * warps * 128 floats.
template <class T, int GROUP, bool ASYMMETRIC, int PAIRS>
__global__ void __launch_bounds__(512, 1)
    w4a16_decode(const uint4* codes, const u16* scales, const u8* zeros, const u16* x, u16* y, int M, int N, int K) {
  extern __shared__ uint4 raw[];
  decode_block<T, GROUP, ASYMMETRIC, false, false, false, PAIRS, false>(reinterpret_cast<float*>(raw), codes, scales, zeros, x, y, M, N, K, {});
}

// What a team of warps reads for one chunk of K: ROWS outputs and TOKENS tokens.
template <int GROUP, int ROWS, int TOKENS>
struct PrefillStage {
  static constexpr int kGroups = GROUP == 32 ? 2 : 1;  // groups that one chunk touches
  uint4 codes[ROWS / kTileRows][32];
  uint4 x[TOKENS][8];  // segment s of token m lies at s ^ (m % 2 * 4): a warp's 16-byte reads then meet each bank once
  u16 scales[ROWS / kTileRows][kGroups][kTileRows];
  u8 zeros[ROWS / kTileRows][kGroups][kTileRows];
};

template <int ID>
__device__ void team_barrier() {
  asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(kTeamThreads) : "memory");
}

// Grid: (tokens / TOKENS, N / 128), rounded up. Dynamic shared memory: the stages of each team.
template <class T, int GROUP, bool ASYMMETRIC, int TOKENS>
__global__ void __launch_bounds__(prefill_threads(TOKENS), TOKENS == 128 ? 2 : 1)
    w4a16_prefill(const uint4* codes, const u16* scales, const u8* zeros, const u16* x, u16* y, int M, int N, int K) {
  using Stage = PrefillStage<GROUP, kPrefillRows, TOKENS>;
  constexpr int kTeams = prefill_teams(TOKENS), kStages = prefill_stages(TOKENS);
  constexpr int kWarpTokens = TOKENS / 2, kBlockTiles = kPrefillRows / kTileRows, kColumns = kWarpTokens / 8;
  extern __shared__ uint4 raw[];
  const int thread = threadIdx.x % kTeamThreads, team = threadIdx.x / kTeamThreads, lane = thread % 32, warp = thread / 32;
  Stage* stages = reinterpret_cast<Stage*>(raw) + team * kStages;
  const int first_tile = blockIdx.y * kBlockTiles, first_token = blockIdx.x * TOKENS;
  const int tiles = N / kTileRows, count = K / kChunk, groups = K / GROUP;
  const int warp_tile = warp % 2 * kWarpTiles, warp_token = warp / 2 * kWarpTokens;
  const int steps = (count + kTeams - 1) / kTeams;

  auto load = [&](int step) {
    Stage& s = stages[step % kStages];
    const int chunk = step * kTeams + team;
    if (step < steps) {
      const bool exists = chunk < count;  // the last step of the last team may lie past K: zeros
#pragma unroll
      for (int i = thread; i < kBlockTiles * 32; i += kTeamThreads) {
        const int tile = first_tile + i / 32;
        const bool inside = exists && tile < tiles;
        copy_async(&s.codes[i / 32][i % 32], codes + (inside ? (size_t(tile) * count + chunk) * 32 + i % 32 : 0), inside);
      }
#pragma unroll
      for (int i = thread; i < TOKENS * 8; i += kTeamThreads) {
        const int row = i / 8, segment = i % 8;
        const bool inside = exists && first_token + row < M;
        copy_async(&s.x[row][segment ^ row % 2 * 4], x + (inside ? size_t(first_token + row) * K + chunk * kChunk + segment * 8 : 0), inside);
      }
      constexpr int kScaleParts = Stage::kGroups * 2;  // 16-byte parts of a tile's scales
      if (thread < kBlockTiles * kScaleParts) {
        const int tile = first_tile + thread / kScaleParts, part = thread % kScaleParts;
        const bool inside = exists && tile < tiles;
        const size_t at = inside ? (size_t(tile) * groups + chunk * kChunk / GROUP) * kTileRows : 0;
        copy_async(reinterpret_cast<uint4*>(s.scales[thread / kScaleParts]) + part, scales + (inside ? at + part * 8 : 0), inside);
        if (ASYMMETRIC && part < Stage::kGroups) {
          copy_async(reinterpret_cast<uint4*>(s.zeros[thread / kScaleParts]) + part, zeros + (inside ? at + part * 16 : 0), inside);
        }
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  wait_for_previous();
  release_next();
  float sum[kWarpTiles][kColumns][4] = {};
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(i);

  for (int step = 0; step < steps; ++step) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    team == 0 ? team_barrier<1>() : team == 1 ? team_barrier<2>() : team_barrier<3>();
    load(step + kStages - 1);
    const Stage& s = stages[step % kStages];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = GROUP == 32 ? half : 0;
      uint4 b[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int row = warp_token + c * 8 + lane / 4;
        b[c] = s.x[row][(half * 4 + lane % 4) ^ row % 2 * 4];
      }
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) {
        const uint2 code = reinterpret_cast<const uint2*>(&s.codes[warp_tile + i][lane])[half];
        const u32 zero = ASYMMETRIC ? *reinterpret_cast<const u16*>(&s.zeros[warp_tile + i][j][lane / 4 * 2]) : 0x0808u;
        const u32 scale = *reinterpret_cast<const u32*>(&s.scales[warp_tile + i][j][lane / 4 * 2]);
        const u32 even_scale = __byte_perm(scale, 0, 0x1010), odd_scale = __byte_perm(scale, 0, 0x3232);
        u32 even[4], odd[4];
        Codes<T>::template decode<ASYMMETRIC>(even, code.x, Codes<T>::template offset<ASYMMETRIC>(zero & 0xffu));
        Codes<T>::template decode<ASYMMETRIC>(odd, code.y, Codes<T>::template offset<ASYMMETRIC>(zero >> 8));
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          even[p] = T::fma2(even[p], even_scale, 0x80008000u);  // minus zero: a product, with the sign of a zero kept
          odd[p] = T::fma2(odd[p], odd_scale, 0x80008000u);
        }
        // All columns before the second half of k: products of one accumulator in a row would wait for each other.
#pragma unroll
        for (int c = 0; c < kColumns; ++c) T::mma(sum[i][c], even[0], odd[0], even[1], odd[1], b[c].x, b[c].y);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) T::mma(sum[i][c], even[2], odd[2], even[3], odd[3], b[c].z, b[c].w);
      }
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");

  if (kTeams > 1) {
    float* others = reinterpret_cast<float*>(raw) + thread;  // the stages are free: all teams are past the barrier below
    constexpr int kSums = kWarpTiles * kColumns * 4 * kTeamThreads;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kWarpTiles * kColumns * 4; ++i) {
      if (team > 0) others[(team - 1) * kSums + i * kTeamThreads] = sum[i / kColumns / 4][i / 4 % kColumns][i % 4];
    }
    __syncthreads();
    if (team > 0) return;
#pragma unroll
    for (int i = 0; i < kWarpTiles * kColumns * 4; ++i) {
#pragma unroll
      for (int other = 0; other < kTeams - 1; ++other) sum[i / kColumns / 4][i / 4 % kColumns][i % 4] += others[other * kSums + i * kTeamThreads];
    }
  }

#pragma unroll
  for (int i = 0; i < kWarpTiles; ++i) {
    const int tile = first_tile + warp_tile + i;
    if (tile >= tiles) continue;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int token = first_token + warp_token + c * 8 + lane % 4 * 2 + odd;
        if (token < M) {
          *reinterpret_cast<u32*>(y + size_t(token) * N + tile * kTileRows + lane / 4 * 2) = T::from_float2(sum[i][c][odd], sum[i][c][2 + odd]);
        }
      }
    }
  }
}

// One thread a word of eight codes. No release_next: what follows a repack may read the weights at once.
__global__ void w4a16_repack_codes(const u32* neutral, u32* packed, int N, int K) {
  const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int words = K / 8;
  wait_for_previous();
  if (i >= size_t(N) * words) return;
  const int n = int(i / words), word = int(i % words);
  const u32 in = neutral[i];
  u32 out = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) out |= (in >> 4 * k & 15u) << 4 * (k / 2 + k % 2 * 4);
  const int lane = n % kTileRows / 2 * 4 + word % 4, slot = word / 4 % 2 * 2 + n % 2;
  packed[((size_t(n / kTileRows) * (K / kChunk) + word / 8) * 32 + lane) * 4 + slot] = out;
}

// Scales (V of 2 bytes) and zero points (V of 1 byte): [N, groups] to [N / 16, groups, 16].
template <class V>
__global__ void w4a16_repack_groups(const V* neutral, V* packed, int N, int groups) {
  const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  wait_for_previous();
  if (i >= size_t(N) * groups) return;
  const int n = int(i / groups), group = int(i % groups);
  packed[(size_t(n / kTileRows) * groups + group) * kTileRows + n % kTileRows] = neutral[i];
}
#endif

}  // namespace fh

#ifndef __CUDACC_RTC__
#include "launch.h"
#include "w4a16.h"

namespace fh {

static const char* check(const fh_w4a16_weight& w) {
  if (w.group_size != 32 && w.group_size != 64 && w.group_size != 128) {
    return failure("w4a16: group_size is %d, expected 32, 64 or 128; quantise the matrix anew", w.group_size);
  }
  if (w.N < 16 || w.N % 16 || w.K < 64 || w.K % 64 || w.K % w.group_size) {
    return failure("w4a16: the matrix is [%d, %d] in groups of %d, expected N %% 16 == 0, K %% 64 == 0, K %% group_size == 0; leave it unquantised", w.N, w.K,
                   w.group_size);
  }
  if (w.dtype != FH_FP16 && w.dtype != FH_BF16) return failure("w4a16: dtype is %d, expected FH_FP16 or FH_BF16", int(w.dtype));
  return nullptr;
}

template <class T, int GROUP, bool ASYMMETRIC>
const char* linear(const fh_w4a16_weight& w, const void* x, void* y, int M, const fh_device& device, cudaStream_t stream) {
  fh_w4a16_plan plan;
  fh_w4a16_make_plan(&w, M, &device, &plan);
  auto kernel = decode_pairs(w.N, w.K) == 1 ? w4a16_decode<T, GROUP, ASYMMETRIC, 1> : w4a16_decode<T, GROUP, ASYMMETRIC, 2>;
  if (plan.wide) {
    kernel = plan.tile_outputs == 256  ? w4a16_prefill_wide<T, GROUP, ASYMMETRIC, 256, 128>
             : plan.tile_tokens == 128 ? w4a16_prefill_wide<T, GROUP, ASYMMETRIC, 128, 128>
                                       : w4a16_prefill_wide<T, GROUP, ASYMMETRIC, 128, 64>;
    cudaFuncAttributes found;  // compiled for another target the kernel is empty, and declares no barriers
    static const bool built = cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(kernel)) == cudaSuccess && found.sharedSizeBytes > 0;
    if (!built) return failure("w4a16: this build has no code of sm_90a for capability 90; compile w4a16.cu with -gencode arch=compute_90a,code=sm_90a");
  } else if (!plan.decode) {
    kernel = plan.tile_tokens == 128 ? w4a16_prefill<T, GROUP, ASYMMETRIC, 128> : w4a16_prefill<T, GROUP, ASYMMETRIC, 64>;
  }
  const char* name = plan.decode ? "w4a16_decode" : plan.wide ? "w4a16_prefill_wide" : "w4a16_prefill";
  return launch(name, device, stream, {dim3(plan.grid_x, plan.grid_y), plan.threads, plan.shared_bytes}, kernel, static_cast<const uint4*>(w.codes),
                static_cast<const u16*>(w.scales), static_cast<const u8*>(w.zeros), static_cast<const u16*>(x), static_cast<u16*>(y), M, w.N, w.K);
}

template <class T, int GROUP>
const char* linear(const fh_w4a16_weight& w, const void* x, void* y, int M, const fh_device& device, cudaStream_t stream) {
  return w.zeros ? linear<T, GROUP, true>(w, x, y, M, device, stream) : linear<T, GROUP, false>(w, x, y, M, device, stream);
}

template <class T>
const char* linear(const fh_w4a16_weight& w, const void* x, void* y, int M, const fh_device& device, cudaStream_t stream) {
  switch (w.group_size) {
    case 32: return linear<T, 32>(w, x, y, M, device, stream);
    case 64: return linear<T, 64>(w, x, y, M, device, stream);
    default: return linear<T, 128>(w, x, y, M, device, stream);
  }
}

}  // namespace fh

void fh_w4a16_make_plan(const fh_w4a16_weight* w, int M, const fh_device* device, fh_w4a16_plan* plan) {
  *plan = {};
  const int tiles = w->N / fh::kTileRows;
  if (M <= FH_W4A16_DECODE_ROWS) {
    const int warps = fh::decode_warps(w->N, w->K);
    const int resident = device->multiprocessors * (warps > 8 ? 1 : 16 / warps);
    *plan = {1, 0, 0, 0, tiles < resident ? tiles : resident, 1, warps * 32, 2 * warps * 128 * int(sizeof(float))};
    return;
  }
  const int groups = w->group_size == 32 ? 2 : 1;
  if (device->capability == 90) {
    // Outputs and tokens of a block, and the time of a chunk in one, in 10 ns on an H100: the least product with the blocks that a multiprocessor runs.
    static constexpr int kForms[3][3] = {{256, 128, 83}, {128, 128, 50}, {128, 64, 41}};
    int least = 0;
    for (const auto& form : kForms) {
      const int outputs = form[0], tokens = form[1], x = (M + tokens - 1) / tokens, y = (w->N + outputs - 1) / outputs;
      const int time = (x * y + device->multiprocessors - 1) / device->multiprocessors * form[2];
      if (least && time >= least) continue;
      least = time;
      *plan = {0, 1, outputs, tokens, x, y, fh::wide_threads(outputs, tokens), fh::wide_shared_bytes(outputs, tokens, groups)};
    }
    return;
  }
  const int rows = (w->N + fh::kPrefillRows - 1) / fh::kPrefillRows;
  const bool large = rows * ((M + 127) / 128) >= 2 * device->multiprocessors;  // two blocks fit a multiprocessor: fewer would leave it half empty
  const int tokens = large ? 128 : 64;
  const int stage = fh::kPrefillRows / fh::kTileRows * 512 + tokens * 128 + fh::kPrefillRows * groups * 3;
  *plan = {0, 0, fh::kPrefillRows, tokens, (M + tokens - 1) / tokens, rows, fh::prefill_threads(tokens),
           fh::prefill_stages(tokens) * fh::prefill_teams(tokens) * stage};
}

const char* fh_w4a16_repack(const void* codes, const void* scales, const void* zeros, const fh_w4a16_weight* packed, const fh_device* device,
                            cudaStream_t stream) {
  using namespace fh;
  if (const char* wrong = check(*packed)) return wrong;
  if ((zeros == nullptr) != (packed->zeros == nullptr)) return failure("w4a16: zeros are given on one side only; give both or neither");
  const int N = packed->N, K = packed->K, groups = K / packed->group_size;
  auto blocks = [](size_t n) { return Grid{dim3(unsigned((n + 255) / 256)), 256}; };
  const char* wrong = launch("w4a16_repack_codes", *device, stream, blocks(size_t(N) * K / 8), w4a16_repack_codes, static_cast<const u32*>(codes),
                             static_cast<u32*>(const_cast<void*>(packed->codes)), N, K);
  if (!wrong) {
    wrong = launch("w4a16_repack_groups", *device, stream, blocks(size_t(N) * groups), w4a16_repack_groups<u16>, static_cast<const u16*>(scales),
                   static_cast<u16*>(const_cast<void*>(packed->scales)), N, groups);
  }
  if (!wrong && zeros) {
    wrong = launch("w4a16_repack_groups", *device, stream, blocks(size_t(N) * groups), w4a16_repack_groups<u8>, static_cast<const u8*>(zeros),
                   static_cast<u8*>(const_cast<void*>(packed->zeros)), N, groups);
  }
  return wrong;
}

const char* fh_w4a16_linear(const fh_w4a16_weight* weight, const void* x, void* y, int M, const fh_device* device, cudaStream_t stream) {
  using namespace fh;
  if (const char* wrong = check(*weight)) return wrong;
  if (M < 1) return failure("w4a16: M is %d, expected at least 1", M);
  return weight->dtype == FH_FP16 ? linear<Fp16>(*weight, x, y, M, *device, stream) : linear<Bf16>(*weight, x, y, M, *device, stream);
}
#endif
