// head_exchange.cuh: what the blocks of a row tell each other: a barrier, and one message of 16 bytes a block and phase.
#pragma once
#include "head_basics.cuh"

// What a row's blocks share.
struct RowState {
    unsigned counter, epoch;  // arrivals of this step; steps made
    unsigned candidates[2];   // rows scored exactly so far, of odd and of even steps: each is cleared while the other is in use
};

// One row's barrier among its blocks: a counter that only grows until the last block of the step clears it.
__device__ __forceinline__ void arrive(unsigned* counter) {
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ __forceinline__ void wait(const unsigned* counter, unsigned target) {
    if (threadIdx.x == 0) {
        unsigned seen;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        } while (seen < target);
    }
    __syncthreads();
}

// What a block tells the others at the end of a phase, in one store of 16 bytes: nothing else must be visible with it, so
// no fence is needed. A message is there when its tag is that of the step.
struct Message {
    u64 best;   // ordered score << 32 | ~number
    u64 items;  // tag << 40 (the low 24 bits of the step's epoch) | count of 20 bits | count of 20 bits
};

__device__ __forceinline__ void post(Message* place, u64 best, unsigned first, unsigned second, unsigned tag) {
    const u64 items = (u64)tag << 40 | (u64)first << 20 | second;
    asm volatile("{ .reg .b128 both; mov.b128 both, {%1, %2}; st.relaxed.gpu.global.b128 [%0], both; }" ::"l"(place), "l"(best), "l"(items) : "memory");
}

struct Collected {
    u64 best;
    unsigned first, second;
};

// Waits for a phase's message of every block: the largest key and the sums of both counts, in every thread.
__device__ __forceinline__ Collected collect(const Message* places, int blocks, unsigned tag, Collected* scratch) {
    Collected mine = {0, 0, 0};
    const int warps = (min(blocks, FLASHHEAD_THREADS) + 31) / 32;
#pragma unroll 1
    for (int i = threadIdx.x; i < blocks; i += FLASHHEAD_THREADS) {
        u64 best, items;
        do {
            asm volatile("{ .reg .b128 both; ld.relaxed.gpu.global.b128 both, [%2]; mov.b128 {%0, %1}, both; }"
                         : "=l"(best), "=l"(items)
                         : "l"(places + i)
                         : "memory");
        } while ((unsigned)(items >> 40) != tag);
        mine.best = best > mine.best ? best : mine.best;
        mine.first += (unsigned)(items >> 20) & 0xfffff, mine.second += (unsigned)items & 0xfffff;
    }
    if ((threadIdx.x >> 5) < warps) {
        mine.best = warp_max(mine.best);
        mine.first = __reduce_add_sync(~0u, mine.first), mine.second = __reduce_add_sync(~0u, mine.second);
        if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = mine;
    }
    __syncthreads();
    Collected all = {0, 0, 0};
#pragma unroll 1
    for (int w = 0; w < warps; w++) {
        all.best = scratch[w].best > all.best ? scratch[w].best : all.best;
        all.first += scratch[w].first, all.second += scratch[w].second;
    }
    __syncthreads();
    return all;
}
