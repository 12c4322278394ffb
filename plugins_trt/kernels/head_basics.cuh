// head_basics.cuh: what every part of the head step is written in: 16-bit floats, ordered keys, loads and copies, sums over a block.
#pragma once
#include "head_step.h"

typedef unsigned long long u64;

__device__ __forceinline__ float from16(unsigned bits, bool bf16) {
    if (bf16) return __uint_as_float(bits << 16);
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)bits));
    return value;
}

// Where launches overlap, all that the launch before this one writes is there afterwards.
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Floats as unsigned numbers of the same order.
__device__ __forceinline__ unsigned ordered(float value) {
    const unsigned bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float unordered(unsigned key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

__device__ __forceinline__ u64 load_relaxed(const u64* address) {
    u64 value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

// A float and the step that it belongs to, in one word: whoever waits for it needs no fence.
__device__ __forceinline__ void post_float(u64* place, unsigned epoch, float value) {
    const u64 both = (u64)epoch << 32 | __float_as_uint(value);
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(place), "l"(both) : "memory");
}

// Waits for n posted floats and takes each, in a thread fixed by its number. A warp waits for all of its words at once: lanes
// that wait each for themselves would go on one by one.
template <class Take>
__device__ __forceinline__ void collect_floats(const u64* posted, int n, unsigned epoch, Take take) {
    constexpr int AHEAD = 8;
#pragma unroll 1
    for (int base = threadIdx.x & ~31; base < n; base += AHEAD * FLASHHEAD_THREADS) {
        const int first = base + (threadIdx.x & 31);
        u64 both[AHEAD];
        bool there;
        do {
            there = true;
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
                if (first + j * FLASHHEAD_THREADS < n) both[j] = load_relaxed(posted + first + j * FLASHHEAD_THREADS);
#pragma unroll
            for (int j = 0; j < AHEAD; j++) there &= first + j * FLASHHEAD_THREADS >= n || (unsigned)(both[j] >> 32) == epoch;
        } while (!__all_sync(~0u, there));
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (first + j * FLASHHEAD_THREADS < n) take(first + j * FLASHHEAD_THREADS, __uint_as_float((unsigned)both[j]));
    }
}

// 16 bytes from global to shared memory, past the L1 cache, without waiting.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}

// Waits for the thread's own copies; a block's barrier must follow before others read them.
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The block's sum, in a tree fixed by the block's size; `scratch` [16] float.
static __device__ float block_sum(float value, float* scratch) {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = value;
    __syncthreads();
    float total = scratch[threadIdx.x & 15];
    for (int step = 8; step; step >>= 1) total += __shfl_xor_sync(~0u, total, step);
    return total;
}

// The warp's largest key, in every lane.
__device__ __forceinline__ u64 warp_max(u64 key) {
    const unsigned high = __reduce_max_sync(~0u, (unsigned)(key >> 32));
    const unsigned low = __reduce_max_sync(~0u, (unsigned)(key >> 32) == high ? (unsigned)key : 0u);
    return (u64)high << 32 | low;
}

__device__ __forceinline__ u64 block_max(u64 key, u64* scratch) {
    key = warp_max(key);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = key;
    __syncthreads();
    return warp_max(scratch[threadIdx.x & 15]);
}

// Items compare by score, then by the smaller number.
__device__ __forceinline__ u64 item_key(float score, unsigned number) { return (u64)ordered(score) << 32 | (0xffffffffu - number); }
