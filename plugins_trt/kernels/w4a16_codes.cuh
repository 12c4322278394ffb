// w4a16_codes.cuh: what the kernels of w4a16.cu share: the packed layout's units, codes as numbers, a copy into shared memory.
#pragma once
#include "element.cuh"

namespace fh {

constexpr int kTileRows = 16;    // outputs of one fragment
constexpr int kChunk = 64;       // inputs of one fragment of 16 bytes a lane

#ifdef __CUDACC__
// word & MASK | MAGIC in one instruction. Written as C, it becomes two: an instruction takes one constant, and the compiler does not keep the other in a
// register. They run at half of the issue rate, and are most of what decoding costs.
template <u32 MASK, u32 MAGIC>
__device__ u32 within(u32 word) {
  u32 out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(word), "n"(MASK), "n"(MAGIC));
  return out;
}

// The eight codes of one word minus their zero point, exact, as four pairs of T. ASYMMETRIC: the zero point is a byte of w4a16.h, whole in its low
// nibble and sixteenths in its high one; else it is 8. A code minus it has 8 bits at most, which both types hold.
template <class T>
struct Codes;

template <>
struct Codes<Fp16> {
  // 0x6400 | q is 1024 + q, and with the code four bits higher 1024 + 16 q: a sixteenth of that is 64 + q, near which steps are sixteenths.
  template <bool ASYMMETRIC>
  static __device__ u32 offset(u32 zero) {
    if (ASYMMETRIC) return 0xd400d400u | ((zero & 15u) << 4 | zero >> 4) * 0x00010001u;  // -(64 + zero)
    return 0xe408e408u;  // -(1024 + 8)
  }
  template <bool ASYMMETRIC>
  static __device__ void decode(u32 (&pairs)[4], u32 word, u32 offset) {
    if (ASYMMETRIC) {
      pairs[0] = high(word << 4, offset);
      pairs[1] = high(word, offset);
      pairs[2] = high(word >> 4, offset);
      pairs[3] = high(word >> 8, offset);
      return;
    }
    const u32 high_offset = 0xd480d480u;  // -(64 + 8)
    pairs[0] = pair<false>(word, offset);
    pairs[1] = high(word, high_offset);
    word >>= 8;
    pairs[2] = pair<false>(word, offset);
    pairs[3] = high(word, high_offset);
  }
  // The pair in bits 0 to 3 and 16 to 19.
  template <bool ASYMMETRIC>
  static __device__ u32 pair(u32 word, u32 offset) {
    return ASYMMETRIC ? high(word << 4, offset) : Fp16::fma2(within<0x000f000fu, 0x64006400u>(word), 0x3c003c00u, offset);
  }
  // The pair four bits higher.
  static __device__ u32 high(u32 word, u32 offset) { return Fp16::fma2(within<0x00f000f0u, 0x64006400u>(word), 0x2c002c00u, offset); }
};

template <>
struct Codes<Bf16> {
  // 0x4300 | q is 128 + q; seven bits of mantissa leave no room for the higher position, and near 128 none for sixteenths.
  template <bool ASYMMETRIC>
  static __device__ u32 offset(u32 zero) {
    if (!ASYMMETRIC) return 0xc308c308u;  // -(128 + 8)
    const u32 whole = 0xc300c300u | (zero & 15u) * 0x00010001u, part = 0x41004100u | (zero >> 4) * 0x00010001u;  // -(128 + whole), 8 + part
    return Bf16::fma2(part, 0xbf80bf80u, Bf16::fma2(whole, 0x3f803f80u, 0x43084308u));                          // 136 - 128 - whole - 8 - part
  }
  template <bool ASYMMETRIC>
  static __device__ void decode(u32 (&pairs)[4], u32 word, u32 offset) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = pair<ASYMMETRIC>(word >> 4 * i, offset);
  }
  template <bool ASYMMETRIC>
  static __device__ u32 pair(u32 word, u32 offset) {
    const u32 code = within<0x000f000fu, 0x43004300u>(word);
    return ASYMMETRIC ? Bf16::fma2(Bf16::fma2(code, 0x3f803f80u, 0xc300c300u), 0x3f803f80u, offset) : Bf16::fma2(code, 0x3f803f80u, offset);
  }
};

__device__ inline void copy_async(void* shared, const void* global, bool inside) {
  const u32 to = u32(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(inside ? 16 : 0) : "memory");
}
#endif

}  // namespace fh
