// w4a16_decode.cuh: the product of up to eight rows with a W4A16 matrix, one block's part: of w4a16.cu alone, and of w4a16_fused.cu with the steps around.
#pragma once
#include "rows.cuh"
#include "w4a16_codes.cuh"

namespace fh {

constexpr int kChunksAhead = 4;  // a warp's loads in flight for each step

// What surrounds a product in a decoder layer; pointers as in w4a16_fused.h.
struct Surroundings {
  const u16 *residual, *first_norm, *norm;
  u16* sum;
  float weight_offset, epsilon;
  int gelu;
};

// A row of normalised activations in shared memory: the 64 bytes more put neighbouring tokens' reads on other banks.
__host__ __device__ constexpr int row_stride(int K) { return K + 32; }

#ifdef __CUDACC__
// A lane's part of kChunksAhead chunks: codes, and for each group in a chunk the two rows' scales and zero points.
template <int GROUP, bool ASYMMETRIC>
struct Chunks {
  static constexpr int kGroups = GROUP == 32 ? 2 : 1;
  uint4 codes[kChunksAhead];
  u32 scales[kChunksAhead][kGroups];
  u16 zeros[kChunksAhead][ASYMMETRIC ? kGroups : 1];

  // Chunks first, first + stride, ... of one tile; those from count on contribute zero.
  __device__ void load(const uint4* code, const u16* scale, const u8* zero, int tile, int first, int stride, int count, int lane) {
    const int groups = count * kChunk / GROUP;
#pragma unroll
    for (int i = 0; i < kChunksAhead; ++i) {
      const int chunk = first + i * stride;
      const bool inside = chunk < count;
      codes[i] = inside ? load_once(code + (size_t(tile) * count + chunk) * 32 + lane) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        const size_t at = (size_t(tile) * groups + chunk * kChunk / GROUP + j) * kTileRows + lane / 4 * 2;
        scales[i][j] = inside ? __ldg(reinterpret_cast<const u32*>(scale + at)) : 0;
        if (ASYMMETRIC) zeros[i][j] = inside ? __ldg(reinterpret_cast<const u16*>(zero + at)) : 0;
      }
    }
  }
};

constexpr int kRowsAtOnce = 4;  // whose loads are in flight together

// rows[M][row_stride(d)] = what rms_norm makes of x, or of its sum with the residual, which block 0 writes; first_norm: x is normalised by it before.
// Warps take the parts of rms_norm's warps warp, warp + warps, ...: sums have its order. gain, first_gain: of the first vector of this thread.
// sums: floats [2][M][warps of norm_threads(d)], free again when the barrier at the end is passed.
// Loops are not unrolled where that only repeats code: it runs once, and a cold fetch of its instructions costs more than a jump.
template <class T>
__device__ void normalise_rows(const u16* x, const Surroundings& s, int M, int d, u16* rows, float* sums, uint4 first_gain, uint4 gain) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int threads = norm_threads(d), parts = threads / 32, stride = row_stride(d), held = threadIdx.x * 8;

#pragma unroll 1
  for (int part = warp; part < parts; part += warps) {
#pragma unroll 1
    for (int first = 0; first < M; first += kRowsAtOnce) {
      float squares[kRowsAtOnce] = {};
#pragma unroll 1
      for (int i = (part * 32 + lane) * 8; i < d; i += threads * 8) {
        uint4 h[kRowsAtOnce], other[kRowsAtOnce];
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          const size_t at = size_t(first + r) * d + i;
          h[r] = load_if(first + r < M, x + at);
          other[r] = load_if(s.residual && first + r < M, s.residual + at);  // behind a first norm: for the L1 cache
        }
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          if (first + r >= M) break;
          if (s.residual && !s.first_norm) {
            h[r] = add_rounded<T>(h[r], other[r]);
            if (blockIdx.x == 0) *reinterpret_cast<uint4*>(s.sum + size_t(first + r) * d + i) = h[r];
          }
          *reinterpret_cast<uint4*>(rows + (first + r) * stride + i) = h[r];
          squares[r] = add_squares<T>(h[r], squares[r]);
        }
      }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        if (first + r >= M) break;
        const float total = add_lanes(squares[r]);
        if (lane == 0) sums[(first + r) * parts + part] = total;
      }
    }
  }
  __syncthreads();

#pragma unroll 1
  for (bool last = !s.first_norm;; last = true, sums += M * parts) {
#pragma unroll 1
    for (int r = 0; r < M; ++r) {
      const float factor = norm_factor(sums + r * parts, parts, d, s.epsilon);
#pragma unroll 1
      for (int part = warp; part < parts; part += warps) {
        float squares = 0.f;
#pragma unroll 1
        for (int i = (part * 32 + lane) * 8; i < d; i += threads * 8) {
          uint4* at = reinterpret_cast<uint4*>(rows + r * stride + i);
          const uint4* weights = reinterpret_cast<const uint4*>((last ? s.norm : s.first_norm) + i);
          uint4 h = normalised<T>(*at, i != held ? __ldg(weights) : last ? gain : first_gain, factor, s.weight_offset);
          if (!last) {
            if (s.residual) {
              h = add_rounded<T>(h, load_if(true, s.residual + size_t(r) * d + i));
              if (blockIdx.x == 0) *reinterpret_cast<uint4*>(s.sum + size_t(r) * d + i) = h;
            }
            squares = add_squares<T>(h, squares);
          }
          *at = h;
        }
        if (!last) squares = add_lanes(squares);
        if (!last && lane == 0) sums[(M + r) * parts + part] = squares;
      }
    }
    __syncthreads();
    if (last) break;
  }
}

// blockDim.x / 32 warps split K; a block takes tiles blockIdx.x, blockIdx.x + gridDim.x, ... of 16 outputs each, with GATED pairs of them: a gate's and,
// half of the matrix on, its partner's. shared: floats [2, with GATED 4][warps][128], with NORM then u16 [M][row_stride(K)].
// EARLY: the next launch may begin before the one before this has ended, when this one's blocks have all begun: only where what the next one reads before it
// waits was written two launches ago or earlier.
template <class T, int GROUP, bool ASYMMETRIC, bool NORM, bool GATED, bool EARLY>
__device__ void decode_block(float* shared, const uint4* codes, const u16* scales, const u8* zeros, const u16* x, u16* y, int M, int N, int K,
                             const Surroundings& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int token = lane / 4;
  const int count = K / kChunk, panel_chunks = warps * kChunksAhead;
  const int panels = (count + panel_chunks - 1) / panel_chunks;
  constexpr int kParts = GATED ? 2 : 1;  // tiles whose outputs are written together
  const int units = N / kTileRows / kParts;
  const int items = blockIdx.x < units ? ((units - 1 - int(blockIdx.x)) / int(gridDim.x) + 1) * kParts : 0;
  float* partial = shared;  // [2 * kParts][warps][8 tokens][16 outputs]
  u16* rows = reinterpret_cast<u16*>(shared + 2 * kParts * warps * 128);

  auto load = [&](Chunks<GROUP, ASYMMETRIC>& to, int item, int panel) {
    const int tile = blockIdx.x + item / kParts * gridDim.x + (GATED ? item % 2 * units : 0);
    if (item < items) to.load(codes, scales, zeros, tile, panel * panel_chunks + warp, warps, count, lane);
  };
  Chunks<GROUP, ASYMMETRIC> now, next;
  uint4 activations[kChunksAhead][2];
  auto load_activations = [&](int i, int panel) {
    const int chunk = panel * panel_chunks + i * warps + warp;
    const bool inside = chunk < count && token < M;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = chunk * kChunk + half * 32 + lane % 4 * 8;
      if (NORM) {
        activations[i][half] = inside ? *reinterpret_cast<const uint4*>(rows + token * row_stride(K) + at) : make_uint4(0, 0, 0, 0);
      } else {
        activations[i][half] = load_if(inside, x + size_t(token) * K + at);
      }
    }
  };

  // Weights: no launch before this one writes them.
  load(now, 0, 0);
  int ahead_item = panels == 1 ? 1 : 0, ahead_panel = panels == 1 ? 0 : 1;
  load(next, ahead_item, ahead_panel);
  uint4 gain = make_uint4(0, 0, 0, 0), first_gain = gain;
  if (NORM) {
    const int held = threadIdx.x * 8;
    if (held < K) gain = __ldg(reinterpret_cast<const uint4*>(s.norm + held));
    if (held < K && s.first_norm) first_gain = __ldg(reinterpret_cast<const uint4*>(s.first_norm + held));
  }
  if (EARLY) release_next();
  wait_for_previous();
  if (!EARLY) release_next();
  if (NORM) normalise_rows<T>(x, s, M, K, rows, partial, first_gain, gain);
#pragma unroll
  for (int i = 0; i < kChunksAhead; ++i) load_activations(i, 0);

  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  int item = 0, panel = 0;
  while (item < items) {
#pragma unroll
    for (int i = 0; i < kChunksAhead; ++i) {
      float group[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = GROUP == 32 ? half : 0;
        const u32 zero = ASYMMETRIC ? now.zeros[i][j] : 0x0808u;
        u32 even[4], odd[4];  // the codes of outputs 2g and 2g + 1
        Codes<T>::template decode<ASYMMETRIC>(even, half ? now.codes[i].z : now.codes[i].x, Codes<T>::template offset<ASYMMETRIC>(zero & 0xffu));
        Codes<T>::template decode<ASYMMETRIC>(odd, half ? now.codes[i].w : now.codes[i].y, Codes<T>::template offset<ASYMMETRIC>(zero >> 8));
        const uint4 b = activations[i][half];
        T::mma(group, even[0], odd[0], even[1], odd[1], b.x, b.y);
        T::mma(group, even[2], odd[2], even[3], odd[3], b.z, b.w);
        if (GROUP == 32 || half == 1) {
          const float2 scale = T::to_float2(now.scales[i][j]);
          sum[0] = fmaf(scale.x, group[0], sum[0]);
          sum[1] = fmaf(scale.x, group[1], sum[1]);
          sum[2] = fmaf(scale.y, group[2], sum[2]);
          sum[3] = fmaf(scale.y, group[3], sum[3]);
          group[0] = group[1] = group[2] = group[3] = 0.f;
        }
      }
      if (panels > 1 && ahead_item < items) load_activations(i, ahead_panel);
    }

    if (panel + 1 == panels) {
      const int buffer = item % (2 * kParts);  // free: whoever read it has passed a barrier since
      float* mine = partial + (buffer * warps + warp) * 128 + lane % 4 * 2 * kTileRows + lane / 4 * 2;
      *reinterpret_cast<float2*>(mine) = make_float2(sum[0], sum[2]);
      *reinterpret_cast<float2*>(mine + kTileRows) = make_float2(sum[1], sum[3]);
      sum[0] = sum[1] = sum[2] = sum[3] = 0.f;
      if (!GATED || item % 2) {
        __syncthreads();
        auto total = [&](int buffer, int i) {
          float total = 0.f;
#pragma unroll 4
          for (int w = 0; w < warps; ++w) total += partial[(buffer * warps + w) * 128 + i];
          return from_float<T>(total);
        };
        const int unit = blockIdx.x + item / kParts * gridDim.x;
        for (int i = threadIdx.x; i < M * kTileRows; i += blockDim.x) {
          u16 value = total(buffer, i);
          if (GATED) {
            const float gate = T::to_float(total(buffer - 1, i)), up = T::to_float(value);
            value = from_float<T>((s.gelu ? activate<true>(gate) : activate<false>(gate)) * up);
          }
          y[size_t(i / kTileRows) * units * kTileRows + unit * kTileRows + i % kTileRows] = value;
        }
      }
    }
    item = ahead_item, panel = ahead_panel;
    if (item >= items) break;
    now = next;
    ahead_panel = panel + 1 == panels ? 0 : panel + 1;
    ahead_item = item + (ahead_panel == 0);
    load(next, ahead_item, ahead_panel);
  }
}
#endif

}  // namespace fh
