// attention_exchange.cuh: how the blocks of a cluster hand each other their results in shared memory (capability 9.0 and up).
//
// A block's barrier counts the bytes that arrive. So results need no fence, and nobody waits for a block that has nothing to send: against a barrier of all
// blocks behind the stores this took 2 to 5 % off a body of five launches a layer on an H100 (docs/kernels.md).
#pragma once
#include "element.cuh"

namespace fh {

using u64 = unsigned long long;

#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
// Nothing is released: what that costs (a fence for the whole device) is saved where a barrier in shared memory counts what arrives.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// What lies at this block's shared address p, in the cluster's block `rank`.
__device__ inline u32 address_in_rank(const void* p, int rank) {
  u32 at;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(u32(__cvta_generic_to_shared(p))), "r"(rank));
  return at;
}

// Stores into the cluster's block `rank`, whose barrier counts the bytes when they are there.
__device__ inline void send_to_rank(float2* p, u64* barrier, int rank, float2 v) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(address_in_rank(p, rank)), "f"(v.x), "f"(v.y),
               "r"(address_in_rank(barrier, rank))
               : "memory");
}

__device__ inline void send_to_rank(float4* p, u64* barrier, int rank, float4 v) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address_in_rank(p, rank)), "f"(v.x),
               "f"(v.y), "f"(v.z), "f"(v.w), "r"(address_in_rank(barrier, rank))
               : "memory");
}

// One thread's, before it arrives at the cluster's barrier.
__device__ inline void barrier_begin(u64* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(u32(__cvta_generic_to_shared(barrier))) : "memory");
}

// The same thread's: the barrier opens when so many bytes have arrived.
__device__ inline void barrier_expect(u64* barrier, int bytes) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(u32(__cvta_generic_to_shared(barrier))), "r"(bytes)
               : "memory");
}

// Until what was expected is there. It cannot take longer than the slowest of the cluster's blocks: those of a cluster run at the same time, each of them
// sends before it waits, and all reckon what each sends from the same numbers. One of these lies in device memory, a sequence's length. Were it written
// while the launch runs, which attention.h forbids, blocks could expect what nobody sends: that ends as a launch that fails, not as one that never ends.
__device__ inline void barrier_wait(u64* barrier) {
  constexpr u32 kTries = 1u << 22, kRest = 20000;  // of at most so many ns: from a tenth of a second to 84, as long as the hardware rests each time
  u32 there = 0;
#pragma unroll 1
  for (u32 tries = 0; !there; ++tries) {
    asm volatile(
        "{\n.reg .pred there;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 there, [%1], 0, %2;\nselp.u32 %0, 1, 0, there;\n}"
        : "=r"(there)
        : "r"(u32(__cvta_generic_to_shared(barrier))), "r"(kRest)
        : "memory");
    if (tries == kTries) __trap();
  }
}
#endif

}  // namespace fh
