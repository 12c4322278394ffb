// ahead.cuh: asking for bytes that later launches read.
#pragma once
#include "element.cuh"

namespace fh {

#ifdef __CUDACC__
// Brings [at, at + bytes) into the L2 cache, all blocks of a launch together in ascending order; nothing waits for it. at and bytes are multiples of 16.
// While a launch waits for latency the memory would stand idle: this is how a decode step reads its weights all the time.
__device__ inline void prefetch_ahead(const u8* at, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  constexpr u32 kPiece = 16384;
  if (threadIdx.x >= 32) return;
  const u32 blocks = gridDim.x * gridDim.y * gridDim.z, block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  for (u32 i = (block + threadIdx.x * blocks) * kPiece; i < bytes; i += 32 * blocks * kPiece) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at + i), "r"(min(kPiece, bytes - i)) : "memory");
  }
#endif
}
#endif

}  // namespace fh
