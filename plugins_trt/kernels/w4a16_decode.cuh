// w4a16_decode.cuh: the product of up to eight rows with a W4A16 matrix, one block's part: of w4a16.cu alone, and of w4a16_fused.cu with the steps around.
#pragma once
#include "rows.cuh"
#include "w4a16_codes.cuh"

namespace fh {

// Chunks are taken in pairs, neighbours in memory: one address and, in groups of 128, one scale for both. Warp w takes the pairs w, w + warps, ..., one or
// two of them in a panel, whose codes are on their way together; a pair's registers are filled anew as soon as it is decoded, and one pair is decoded ahead,
// before the activations are there. Small matrices have one pair a warp: their launches are chains of latencies, which more warps shorten. On an H100, us a
// body of Gemma-3-270M 242 instead of 248, of SmolLM2-135M 286 instead of 301.
__host__ __device__ constexpr int decode_pairs(int N, int K) { return K <= 2048 && (long long)N * K < (1 << 21) ? 1 : 2; }

// Warps that split K: at most 16, a warp's panels nearly full. The matrix alone decides: the split is the order of the sums.
__host__ __device__ constexpr int decode_warps(int N, int K) {
  const int chunks = K / 64, panel = 2 * decode_pairs(N, K), panels = (chunks + 16 * panel - 1) / (16 * panel);
  return (chunks + panel * panels - 1) / (panel * panels);
}

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
// Loads that leave v as it is where `inside` is false. A predicate instead of a branch around them, which the compiler makes of an if.
__device__ inline void refill_once(uint4& v, bool inside, const uint4* p) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %4, 0;\n@p ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%5];\n}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
               : "r"(u32(inside)), "l"(p));
}

__device__ inline void refill_once(u32& v, bool inside, const u32* p) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p ld.global.nc.u32 %0, [%2];\n}" : "+r"(v) : "r"(u32(inside)), "l"(p));
}

__device__ inline void refill_shared(uint4& v, bool inside, u32 address) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %4, 0;\n@p ld.shared.v4.u32 {%0,%1,%2,%3}, [%5];\n}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
               : "r"(u32(inside)), "r"(address)
               : "memory");
}

__device__ inline void refill(uint4& v, bool inside, const u16* p) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %4, 0;\n@p ld.global.v4.u32 {%0,%1,%2,%3}, [%5];\n}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
               : "r"(u32(inside)), "l"(p)
               : "memory");
}

// A lane's part of PAIRS pairs of chunks: codes, and for each of their groups the two rows' scales and zero points.
template <int GROUP, bool ASYMMETRIC, int PAIRS>
struct Pairs {
  static constexpr int kGroups = 2 * kChunk / GROUP;
  uint4 codes[PAIRS][2];
  u32 scales[PAIRS][kGroups];
  u16 zeros[PAIRS][ASYMMETRIC ? kGroups : 1];

  // The chunks `chunk` and `chunk` + 1 of a tile to place i; those that are not below `count` get scales of zero, and keep what codes there are. Offsets of
  // 32 bits: instructions count here as much as bytes do.
  __device__ void load(int i, bool exists, const uint4* code, const u16* scale, const u8* zero, u32 tile, int chunk, int count, int lane) {
    const int left = exists ? count - chunk : 0;
    const uint4* from = code + ((tile * count + chunk) * 32 + lane);
#pragma unroll
    for (int c = 0; c < 2; ++c) refill_once(codes[i][c], left > c, from + c * 32);
    const u32 at = (tile * (u32(count) * kChunk / GROUP) + u32(chunk) / 2 * kGroups) * (kTileRows / 2) + lane / 4;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const bool inside = left > j * GROUP / kChunk;
      scales[i][j] = 0;
      refill_once(scales[i][j], inside, reinterpret_cast<const u32*>(scale) + at + j * (kTileRows / 2));
      if (ASYMMETRIC && inside) zeros[i][j] = __ldg(reinterpret_cast<const u16*>(zero) + at + j * (kTileRows / 2));
    }
  }
};

// A pair's codes as numbers, in the order of the tensor core's A operand, with their scales.
template <class T, int GROUP>
struct Numbers {
  static constexpr int kGroups = 2 * kChunk / GROUP;
  u32 even[2][2][4], odd[2][2][4];  // [chunk][half]: of outputs 2g and 2g + 1
  u32 scales[kGroups];

  template <bool ASYMMETRIC, int PAIRS>
  __device__ void decode(const Pairs<GROUP, ASYMMETRIC, PAIRS>& from, int i) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint4 code = from.codes[i][c];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u32 zero = ASYMMETRIC ? from.zeros[i][(c * 2 + half) * 32 / GROUP] : 0x0808u;
        Codes<T>::template decode<ASYMMETRIC>(even[c][half], half ? code.z : code.x, Codes<T>::template offset<ASYMMETRIC>(zero & 0xffu));
        Codes<T>::template decode<ASYMMETRIC>(odd[c][half], half ? code.w : code.y, Codes<T>::template offset<ASYMMETRIC>(zero >> 8));
      }
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) scales[j] = from.scales[i][j];
  }

  // sum += the product with a token's activations [chunk][half].
  __device__ void multiply(float (&sum)[4], const uint4 (&activations)[2][2]) const {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float group[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u32(&a)[4] = even[c][half], (&b)[4] = odd[c][half];
        const uint4 x = activations[c][half];
        T::mma(group, a[0], b[0], a[1], b[1], x.x, x.y);
        T::mma(group, a[2], b[2], a[3], b[3], x.z, x.w);
        if (GROUP == 32 || half == 1) {
          const float2 scale = T::to_float2(scales[(c * 2 + half) * 32 / GROUP]);
          sum[0] = fmaf(scale.x, group[0], sum[0]);
          sum[1] = fmaf(scale.x, group[1], sum[1]);
          sum[2] = fmaf(scale.y, group[2], sum[2]);
          sum[3] = fmaf(scale.y, group[3], sum[3]);
          group[0] = group[1] = group[2] = group[3] = 0.f;
        }
      }
    }
  }
};

// A panel of a tile; part: with a gate 1 for the partner's tile. base: its first chunk.
struct Place {
  int unit, part, base;
};

constexpr int kRowsAtOnce = 4;  // whose loads are in flight together

// rows[M][row_stride(d)] = what rms_norm makes of x, or of its sum with the residual, which block 0 writes; first_norm: x is normalised by it before.
// A row has the parts of rms_norm's warps, so sums have its order. gain, first_gain: of the first vector of this thread.
// sums: floats [2][M][warps of norm_threads(d)], free again when the barrier at the end is passed.
// Loops are not unrolled where that only repeats code: it runs once.
template <class T>
__device__ void normalise_rows(const u16* x, const Surroundings& s, int M, int d, u16* rows, float* sums, uint4 first_gain, uint4 gain) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int threads = norm_threads(d), parts = threads / 32, stride = row_stride(d), held = threadIdx.x * 8;

  // Rows and parts are shared out among the warps.
  int first = 0, part = warp;
  const auto fold = [&](int& row, int step) {
    while (part >= parts) part -= parts, row += step;
  };
#pragma unroll 1
  for (fold(first, kRowsAtOnce); first < M; part += warps, fold(first, kRowsAtOnce)) {
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
  __syncthreads();

#pragma unroll 1
  for (bool last = !s.first_norm;; last = true, sums += M * parts) {
    int r = 0;
    part = warp;
#pragma unroll 1
    for (fold(r, 1); r < M; part += warps, fold(r, 1)) {
      const float factor = norm_factor(sums + r * parts, parts, d, s.epsilon);
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
    __syncthreads();
    if (last) break;
  }
}

// normalise_rows for one row, of which no thread has more than one vector: h of x, other of the residual. sums: floats [2][blockDim.x / 32].
template <class T>
__device__ void normalise_row(uint4 h, uint4 other, const Surroundings& s, int d, u16* row, float* sums, uint4 first_gain, uint4 gain) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = norm_threads(d) / 32, i = threadIdx.x * 8;
  const bool inside = i < d;
  auto factor_of = [&](float* sums) {
    const float total = add_lanes(inside ? add_squares<T>(h, 0.f) : 0.f);
    if (lane == 0) sums[warp] = total;
    __syncthreads();
    return norm_factor(sums, warps, d, s.epsilon);
  };
  if (s.first_norm) h = normalised<T>(h, first_gain, factor_of(sums + blockDim.x / 32), s.weight_offset);
  if (s.residual) {
    h = add_rounded<T>(h, other);
    if (blockIdx.x == 0 && inside) *reinterpret_cast<uint4*>(s.sum + i) = h;
  }
  h = normalised<T>(h, gain, factor_of(sums), s.weight_offset);
  if (inside) *reinterpret_cast<uint4*>(row + i) = h;
  __syncthreads();
}

// blockDim.x / 32 warps split K, or half as many where the block is PAIRED: half of its warps take the gate's tile and half its partner's, side by side
// instead of in turn. A block takes tiles blockIdx.x, blockIdx.x + gridDim.x, ... of 16 outputs each, with GATED pairs of them: a gate's and,
// half of the matrix on, its partner's. shared: floats [2, with GATED 4][warps][128], with NORM then u16 [M][row_stride(K)].
// EARLY: the next launch may begin when this one's blocks have all begun, before the one before this has ended (w4a16_fused.h says what follows).
template <class T, int GROUP, bool ASYMMETRIC, bool NORM, bool GATED, bool PAIRED, int PAIRS, bool EARLY>
__device__ void decode_block(float* shared, const uint4* codes, const u16* scales, const u8* zeros, const u16* x, u16* y, int M, int N, int K,
                             const Surroundings& s) {
  const int lane = threadIdx.x % 32, token = lane / 4, warps = blockDim.x / (PAIRED ? 64 : 32);
  const int own_part = PAIRED && int(threadIdx.x / 32) >= warps ? 1 : 0, warp = threadIdx.x / 32 - own_part * warps;
  const int count = K / kChunk, panel_chunks = warps * PAIRS * 2;
  constexpr int kParts = GATED ? 2 : 1;  // tiles whose outputs are written together
  const int units = N / kTileRows / kParts;
  float* partial = shared;  // [2 * kParts][warps][8 tokens][16 outputs]
  u16* rows = reinterpret_cast<u16*>(shared + 2 * kParts * warps * 128);

  auto next_of = [&](Place p) {
    p.base += panel_chunks;
    if (p.base < count) return p;
    p.base = 0;
    if (GATED && !PAIRED) p.part ^= 1;
    if (!GATED || PAIRED || p.part == 0) p.unit += gridDim.x;
    return p;
  };
  auto chunk_of = [&](int base, int i) { return base + (i * warps + warp) * 2; };
  Pairs<GROUP, ASYMMETRIC, PAIRS> held = {};
  auto load = [&](int i, const Place& p) {
    held.load(i, p.unit < units, codes, scales, zeros, p.unit + (GATED ? p.part * units : 0), chunk_of(p.base, i), count, lane);
  };
  // Tokens from M on read another's activations: nobody reads their columns of the product.
  const u16* own = (NORM ? rows + (token < M ? token : 0) * row_stride(K) : x + size_t(token < M ? token : 0) * K) + lane % 4 * 8;
  const u32 own_shared = NORM ? u32(__cvta_generic_to_shared(own)) : 0;
  uint4 activations[NORM ? 1 : PAIRS][2][2] = {};  // behind a norm they come from shared memory when they are needed: one pair is enough, and two spill more
  auto load_activations = [&](int i, int base, bool wanted) {
    const int chunk = chunk_of(base, i), left = wanted ? count - chunk : 0;  // what stands where there is none counts nothing: its scale is zero
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = chunk * kChunk + c * kChunk + half * 32;
        if (NORM) {
          refill_shared(activations[NORM ? 0 : i][c][half], left > c, own_shared + at * 2);
        } else {
          refill(activations[NORM ? 0 : i][c][half], left > c, own + at);
        }
      }
    }
  };

  // Weights: no launch before this one writes them.
  Place now{int(blockIdx.x), own_part, 0};
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) load(i, now);
  uint4 gain = make_uint4(0, 0, 0, 0), first_gain = gain;
  if (NORM) {
    const int held_at = threadIdx.x * 8;
    if (held_at < K) gain = __ldg(reinterpret_cast<const uint4*>(s.norm + held_at));
    if (held_at < K && s.first_norm) first_gain = __ldg(reinterpret_cast<const uint4*>(s.first_norm + held_at));
  }
  const bool single = NORM && M == 1 && norm_threads(K) <= int(blockDim.x) && K <= norm_threads(K) * 8;
  if (EARLY) release_next();
  wait_for_previous();
  if (!EARLY) release_next();
  uint4 h = make_uint4(0, 0, 0, 0), other = h;
  if (single) {
    const int at = threadIdx.x * 8;
    h = load_if(at < K, x + at);
    if (s.residual) other = load_if(at < K, s.residual + at);
  }
  if (!NORM) {
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) load_activations(i, 0, true);
  }
  // While activations are on their way: the first pair is decoded, and always one pair ahead from here on.
  Place next = next_of(now);
  Numbers<T, GROUP> first;
  first.decode(held, 0);
  load(0, next);
  if (NORM) {
    if (single) {
      normalise_row<T>(h, other, s, K, rows, partial, first_gain, gain);
    } else {
      normalise_rows<T>(x, s, M, K, rows, partial, first_gain, gain);
    }
  }

  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  int buffer = 0;  // free: whoever read it has passed a barrier since
  while (true) {
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      if (NORM) load_activations(i, now.base, true);
      if (i == 0) {
        first.multiply(sum, activations[0]);
      } else {
        Numbers<T, GROUP> numbers;
        numbers.decode(held, i);
        load(i, next);
        numbers.multiply(sum, activations[NORM ? 0 : i]);
      }
      if (!NORM) load_activations(i, next.base, panel_chunks < count && next.unit < units);
    }

    if (next.base == 0) {
      float* mine = partial + ((PAIRED ? buffer + own_part : buffer) * warps + warp) * 128 + lane % 4 * 2 * kTileRows + lane / 4 * 2;
      *reinterpret_cast<float2*>(mine) = make_float2(sum[0], sum[2]);
      *reinterpret_cast<float2*>(mine + kTileRows) = make_float2(sum[1], sum[3]);
      sum[0] = sum[1] = sum[2] = sum[3] = 0.f;
      if (!GATED || PAIRED || now.part == 1) {
        __syncthreads();
        auto total = [&](int buffer, int i) {
          float total = 0.f;
#pragma unroll 4
          for (int w = 0; w < warps; ++w) total += partial[(buffer * warps + w) * 128 + i];
          return from_float<T>(total);
        };
#pragma unroll 1
        for (int i = threadIdx.x; i < M * kTileRows; i += blockDim.x) {
          u16 value = total(PAIRED ? buffer + 1 : buffer, i);
          if (GATED) {
            const float gate = T::to_float(total(PAIRED ? buffer : buffer - 1, i)), up = T::to_float(value);
            value = from_float<T>((s.gelu ? activate<true>(gate) : activate<false>(gate)) * up);
          }
          y[size_t(i / kTileRows) * units * kTileRows + now.unit * kTileRows + i % kTileRows] = value;
        }
      }
      buffer = (buffer + (PAIRED ? 2 : 1)) % (2 * kParts);
    }
    now = next;
    if (now.unit >= units) break;
    next = next_of(now);
    first.decode(held, 0);
    load(0, next);
  }
}
#endif

}  // namespace fh
