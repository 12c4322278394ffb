// element.cuh: fp16 and bf16 as 16-bit words, and the few PTX instructions that the kernels share.
//
// No CUDA header is included: NVRTC compiles these sources on a machine that has the driver and nothing else, and faster for it.
// Everything here runs from sm_80 on; what only newer devices have is guarded by __CUDA_ARCH__ and has a twin.
//
// Kernels are declared before `#ifdef __CUDACC__` and defined behind it: a C++ compiler alone reads the launchers of these sources, not the device's
// code (flashhead plugin build, which has that from NVRTC).
#pragma once

namespace fh {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;

struct Fp16;  // element types
struct Bf16;

#ifdef __CUDACC__
constexpr u32 kAllLanes = 0xffffffffu;

struct Fp16 {
  static __device__ float to_float(u16 v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
  }
  static __device__ float2 to_float2(u32 v) { return make_float2(to_float(u16(v)), to_float(u16(v >> 16))); }
  static __device__ u32 from_float2(float lo, float hi) {
    u32 v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));
    return v;
  }
  static __device__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  static __device__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

struct Bf16 {
  static __device__ float to_float(u16 v) { return __uint_as_float(u32(v) << 16); }
  static __device__ float2 to_float2(u32 v) { return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)); }
  static __device__ u32 from_float2(float lo, float hi) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));
    return v;
  }
  static __device__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  static __device__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

template <class T>
__device__ u16 from_float(float f) {
  return u16(T::from_float2(f, 0.f));
}

// Loads of bytes that this launch reads once: they pass by L1.
__device__ inline uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// 16 bytes, or zeros. Volatile, and not through the read-only path: it must stay on its side of wait_for_previous.
__device__ inline uint4 load_if(bool inside, const u16* p) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (inside) asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

// The previous launch may still run until wait_for_previous returns: before it, only bytes that it does not write may be read.
// release_next stands after it, so that whatever runs ahead of us overlaps with this launch alone, not with a chain of them (w4a16_fused.h says where not).
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void release_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

}  // namespace fh
