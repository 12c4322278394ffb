// w4a16_wide.cuh: the prefill of w4a16.cu on Hopper, by wgmma, whose 64 rows are four tiles of outputs, a warp's own fragment of each. Needs sm_90a.
#pragma once
#include "w4a16_codes.cuh"

namespace fh {

// A block computes OUTPUTS by TOKENS: 256 x 128, which reads least from L2 (OUTPUTS / 2 + 2 TOKENS bytes for each input), or 128 x 128 or 128 x 64,
// of which more multiprocessors get one where N is small. Teams of OUTPUTS / 64 warpgroups take every wide_teams-th chunk of K; further warps copy.
__host__ __device__ constexpr int wide_teams(int tokens) { return tokens == 128 ? 1 : 2; }
__host__ __device__ constexpr int wide_copiers(int outputs) { return outputs == 256 ? 128 : 256; }  // registers are left for no more
__host__ __device__ constexpr int wide_stages(int tokens) { return tokens == 128 ? 6 : 8; }
__host__ __device__ constexpr int wide_threads(int outputs, int tokens) { return 2 * outputs * wide_teams(tokens) + wide_copiers(outputs); }
__host__ __device__ constexpr int wide_stage_bytes(int outputs, int tokens, int groups) {  // wgmma's swizzle repeats every 1024 bytes
  return (tokens * 128 + outputs * 32 + outputs * groups * 3 + 1023) / 1024 * 1024;
}
__host__ __device__ constexpr int wide_shared_bytes(int outputs, int tokens, int groups) {
  return wide_stages(tokens) * wide_stage_bytes(outputs, tokens, groups) + 1024;
}

template <class T, int GROUP, bool ASYMMETRIC, int OUTPUTS, int TOKENS>
__global__ void w4a16_prefill_wide(const uint4* codes, const u16* scales, const u8* zeros, const u16* x, u16* y, int M, int N, int K);

#ifdef __CUDACC__
template <int GROUP, int OUTPUTS, int TOKENS>
struct WideStage {
  static constexpr int kGroups = GROUP == 32 ? 2 : 1;
  uint4 x[TOKENS][8];  // segment s of token m lies at s ^ m % 8
  uint4 codes[OUTPUTS / kTileRows][32];
  u16 scales[OUTPUTS / kTileRows][kGroups][kTileRows];
  u8 zeros[OUTPUTS / kTileRows][kGroups][kTileRows];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <class T>
__device__ void wide_mma(float (&d)[32], const u32 (&a)[4], unsigned long long b);
template <class T>
__device__ void wide_mma(float (&d)[64], const u32 (&a)[4], unsigned long long b);

#define FH_SUMS(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FH_WIDE_MMA(T, TYPE)                                                                                                                        \
  template <>                                                                                                                                       \
  __device__ inline void wide_mma<T>(float (&d)[32], const u32 (&a)[4], unsigned long long b) {                                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                                                        \
                 " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"        \
                 " {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"                                                                                             \
                 : FH_SUMS(0), FH_SUMS(8), FH_SUMS(16), FH_SUMS(24)                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                                             \
  }                                                                                                                                                 \
  template <>                                                                                                                                       \
  __device__ inline void wide_mma<T>(float (&d)[64], const u32 (&a)[4], unsigned long long b) {                                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                                                       \
                 " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"         \
                 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}," \
                 " {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"                                                                                             \
                 : FH_SUMS(0), FH_SUMS(8), FH_SUMS(16), FH_SUMS(24), FH_SUMS(32), FH_SUMS(40), FH_SUMS(48), FH_SUMS(56)                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                                             \
  }
FH_WIDE_MMA(Fp16, "f16")
FH_WIDE_MMA(Bf16, "bf16")
#undef FH_WIDE_MMA
#undef FH_SUMS

__device__ inline void barrier_init(u32 barrier, u32 arrivals) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory"); }
__device__ inline void barrier_arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory"); }
__device__ inline void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@done bra finished;\nbra again;\nfinished:\n}" ::"r"(barrier), "r"(parity)
      : "memory");
}
#endif

// Grid: (tokens / TOKENS, N / OUTPUTS), rounded up. Dynamic shared memory: the stages, and 1024 bytes to align them.
template <class T, int GROUP, bool ASYMMETRIC, int OUTPUTS, int TOKENS>
__global__ void __launch_bounds__(wide_threads(OUTPUTS, TOKENS), 1)
    w4a16_prefill_wide(const uint4* codes, const u16* scales, const u8* zeros, const u16* x, u16* y, int M, int N, int K) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Stage = WideStage<GROUP, OUTPUTS, TOKENS>;
  constexpr int kTeams = wide_teams(TOKENS), kCopiers = wide_copiers(OUTPUTS), kStages = wide_stages(TOKENS), kThreads = wide_threads(OUTPUTS, TOKENS);
  constexpr int kStageBytes = wide_stage_bytes(OUTPUTS, TOKENS, Stage::kGroups), kBlockTiles = OUTPUTS / kTileRows, kSums = TOKENS / 2;
  constexpr int kTeamThreads = 2 * OUTPUTS, kWorkers = kTeamThreads * kTeams;
  static_assert(sizeof(Stage) <= kStageBytes && kStages % kTeams == 0, "a stage holds a chunk and belongs to one team");
  // A block starts with as many registers a thread as fit; the copying warps give of theirs to the others, where those need more.
  constexpr int kStart = 65536 / kThreads / 8 * 8, kNeed = TOKENS == 128 ? 112 : 80, kWorkerRegisters = kStart > kNeed ? kStart : kNeed;
  constexpr int kLeft = (kStart * kThreads - kWorkerRegisters * kWorkers) / kCopiers / 8 * 8, kCopierRegisters = kStart < kLeft ? kStart : kLeft;
  extern __shared__ uint4 raw[];
  __shared__ unsigned long long barriers[2 * kStages];  // a stage is full; a stage is free
  const u32 full = u32(__cvta_generic_to_shared(barriers)), free = full + 8 * kStages;
  unsigned char* const stages = reinterpret_cast<unsigned char*>(raw) + (0u - u32(__cvta_generic_to_shared(raw)) & 1023u);
  auto stage = [&](int slot) -> Stage& { return *reinterpret_cast<Stage*>(stages + slot * kStageBytes); };
  const int first_tile = blockIdx.y * kBlockTiles, first_token = blockIdx.x * TOKENS, lane = threadIdx.x % 32;
  const int tiles = N / kTileRows, count = K / kChunk;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) barrier_init(full + 8 * i, kCopiers), barrier_init(free + 8 * i, kTeamThreads);
  }
  __syncthreads();
  wait_for_previous();
  release_next();

  // What lies past M or N is not copied: it reaches only sums that are not stored.
  if (threadIdx.x >= kWorkers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCopierRegisters));
    constexpr int kRows = kCopiers / 8, kScaleParts = Stage::kGroups * 2;  // 16-byte parts of a tile's scales
    const int thread = threadIdx.x - kWorkers, row = thread / 8, segment = thread % 8, rows = M - first_token - row;
    const int tile = thread / kScaleParts, part = thread % kScaleParts;
    const bool has_scale = tile < kBlockTiles && first_tile + tile < tiles;
    const size_t scale_at = size_t(first_tile + tile) * (K / GROUP) * kTileRows;
    const u16* from = x + size_t(first_token + row) * K + segment * 8;
    int slot = 0, parity = 1;
    for (int chunk = 0; chunk < count; ++chunk, from += kChunk) {
      Stage& s = stage(slot);
      barrier_wait(free + 8 * slot, parity);
#pragma unroll
      for (int i = 0; i < TOKENS; i += kRows) {
        if (i < rows) copy_async(&s.x[row + i][segment ^ row % 8], from + size_t(i) * K, true);
      }
      if (has_scale) {
        const size_t at = scale_at + chunk * kChunk / GROUP * kTileRows;
        copy_async(reinterpret_cast<uint4*>(s.scales[tile]) + part, scales + at + part * 8, true);
        if (ASYMMETRIC && part < Stage::kGroups) copy_async(reinterpret_cast<uint4*>(s.zeros[tile]) + part, zeros + at + part * 16, true);
      }
      asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(full + 8 * slot) : "memory");
      if (++slot == kStages) slot = 0, parity ^= 1;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kWorkerRegisters));
    const int team = threadIdx.x / kTeamThreads, thread = threadIdx.x % kTeamThreads, warp = thread / 32, tile = first_tile + warp;
    float sum[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] = 0.f;

    // A warp copies the codes of its tile itself, as far ahead as its team has stages.
    constexpr int kAhead = kStages / kTeams - 1;
    const uint4* code = codes + (size_t(min(tile, tiles - 1)) * count + team) * 32 + lane;
    auto copy_codes = [&](int chunk, int slot) {
      if (chunk < count) copy_async(&stage(slot).codes[warp][lane], code, true);
      code += kTeams * 32;
      asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) copy_codes(team + i * kTeams, team + i * kTeams);

    u32 a[4][4];
    int slot = team, before = -1, parity = 0;
    for (int chunk = team; chunk < count; chunk += kTeams) {
      const Stage& s = stage(slot);
      __syncwarp();  // all lanes have read the codes that these replace
      copy_codes(chunk + kAhead * kTeams, slot >= kTeams ? slot - kTeams : slot - kTeams + kStages);
      asm volatile("cp.async.wait_group %0;" ::"n"(kAhead) : "memory");
      barrier_wait(full + 8 * slot, parity);
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // what cp.async wrote, wgmma reads
      __syncwarp();                                                 // and the other lanes' codes
      // Rows of 128 bytes, swizzled; eight rows are 1024 bytes.
      const unsigned long long matrix = u32(__cvta_generic_to_shared(&s)) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
      // Lane t of four has eight inputs in a row of each 32, wgmma wants two of each eight: lane t takes pair t of all four lanes' words.
      uint4 words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = s.codes[warp][lane / 4 * 4 + i];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = GROUP == 32 ? half : 0;
        const u32 zero = ASYMMETRIC ? *reinterpret_cast<const u16*>(&s.zeros[warp][j][lane / 4 * 2]) : 0x0808u;
        const u32 scale = *reinterpret_cast<const u32*>(&s.scales[warp][j][lane / 4 * 2]);
        const u32 even_scale = __byte_perm(scale, 0, 0x1010), odd_scale = __byte_perm(scale, 0, 0x3232);
        const u32 even_offset = Codes<T>::template offset<ASYMMETRIC>(zero & 0xffu), odd_offset = Codes<T>::template offset<ASYMMETRIC>(zero >> 8);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const u32 even = (half ? words[p].z : words[p].x) >> lane % 4 * 4, odd = (half ? words[p].w : words[p].y) >> lane % 4 * 4;
          a[half * 2 + p / 2][p % 2 * 2] = T::fma2(Codes<T>::template pair<ASYMMETRIC>(even, even_offset), even_scale, 0x80008000u);  // minus zero: a product
          a[half * 2 + p / 2][p % 2 * 2 + 1] = T::fma2(Codes<T>::template pair<ASYMMETRIC>(odd, odd_offset), odd_scale, 0x80008000u);
        }
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        wide_mma<T>(sum, a[half * 2], matrix + half * 4);
        wide_mma<T>(sum, a[half * 2 + 1], matrix + half * 4 + 2);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");  // the half before this one: its registers are free
        // Every lane arrives: one for its warp would do, and is no faster, but compute-sanitizer then sees a race.
        if (half == 0 && before >= 0) barrier_arrive(free + 8 * before);
      }
      before = slot;
      if ((slot += kTeams) >= kStages) slot -= kStages, parity ^= 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    asm volatile("cp.async.wait_all;" ::: "memory");

    if (kTeams > 1) {
      float* others = reinterpret_cast<float*>(stages) + thread;
      asm volatile("bar.sync 1, %0;" ::"n"(kWorkers) : "memory");  // every stage has been read
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        if (team > 0) others[((team - 1) * kSums + i) * kTeamThreads] = sum[i];
      }
      asm volatile("bar.sync 1, %0;" ::"n"(kWorkers) : "memory");
      if (team > 0) return;
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
#pragma unroll
        for (int other = 0; other < kTeams - 1; ++other) sum[i] += others[(other * kSums + i) * kTeamThreads];
      }
    }

    if (tile >= tiles) return;
#pragma unroll
    for (int c = 0; c < TOKENS / 8; ++c) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int token = first_token + c * 8 + lane % 4 * 2 + odd;
        if (token < M) {
          *reinterpret_cast<u32*>(y + size_t(token) * N + tile * kTileRows + lane / 4 * 2) = T::from_float2(sum[c * 4 + odd], sum[c * 4 + 2 + odd]);
        }
      }
    }
  }
#else
  asm volatile("trap;");  // the launcher takes this kernel for capability 90 alone: compile for sm_90a
#endif
}
#endif

}  // namespace fh
