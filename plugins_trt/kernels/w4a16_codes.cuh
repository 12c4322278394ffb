// w4a16_codes.cuh: what the kernels of w4a16.cu share: the packed layout's units, codes as numbers, a copy into shared memory.
#pragma once
#include "element.cuh"

namespace fh {

constexpr int kTileRows = 16;    // outputs of one fragment
constexpr int kChunk = 64;       // inputs of one fragment of 16 bytes a lane

#ifdef __CUDACC__
// The eight codes of one word minus their zero point, exact, as four pairs of T.
template <class T>
struct Codes;

template <>
struct Codes<Fp16> {
  // 0x6400 | q is 1024 + q, and with the code four bits higher 1024 + 16 q.
  static __device__ u32 offset(u32 zero) { return 0xe400e400u | zero * 0x00010001u; }  // -(1024 + zero)
  static __device__ void decode(u32 (&pairs)[4], u32 word, u32 offset) {
    const u32 one = 0x3c003c00u, sixteenth = 0x2c002c00u, base = 0x64006400u, magnitude = 0x54005400u;  // 1, 1/16, 1024, 64
    // -(64 + zero): exact, since 1024 + zero - 960 is.
    const u32 high_offset = Fp16::fma2(magnitude, 0x4b804b80u, offset);
    u32 low = word & 0x000f000fu | base, high = word & 0x00f000f0u | base;
    pairs[0] = Fp16::fma2(low, one, offset);
    pairs[1] = Fp16::fma2(high, sixteenth, high_offset);
    word >>= 8;
    low = word & 0x000f000fu | base, high = word & 0x00f000f0u | base;
    pairs[2] = Fp16::fma2(low, one, offset);
    pairs[3] = Fp16::fma2(high, sixteenth, high_offset);
  }
  // The pair in bits 0 to 3 and 16 to 19.
  static __device__ u32 pair(u32 word, u32 offset) { return Fp16::fma2(word & 0x000f000fu | 0x64006400u, 0x3c003c00u, offset); }
};

template <>
struct Codes<Bf16> {
  // 0x4300 | q is 128 + q; seven bits of mantissa leave no room for the higher position.
  static __device__ u32 offset(u32 zero) { return 0xc300c300u | zero * 0x00010001u; }  // -(128 + zero)
  static __device__ void decode(u32 (&pairs)[4], u32 word, u32 offset) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = pair(word >> 4 * i, offset);
  }
  static __device__ u32 pair(u32 word, u32 offset) { return Bf16::fma2(word & 0x000f000fu | 0x43004300u, 0x3f803f80u, offset); }
};

__device__ inline void copy_async(void* shared, const void* global, bool inside) {
  const u32 to = u32(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(inside ? 16 : 0) : "memory");
}
#endif

}  // namespace fh
