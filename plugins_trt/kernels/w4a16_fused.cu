// w4a16_fused.cu: a decoder layer's products for up to eight rows with the steps around them in one launch (w4a16_fused.h).
//
// Same bits as the launches that they replace: rms_norm and gated_product are the same text (rows.cuh), sums are shared among as many threads, in the same
// order, and what those launches would write is rounded to x's type here too.
//
// Every block normalises all rows itself while its first weights are on their way: the rows are in the L2 cache, a second exchange between the blocks
// would cost more than reading them 264 times. Block 0 writes the sum with the residual.
//
// Measured on an H100 in a body of Llama-3.2-1B's shape, what a layer takes longer with the launch than without: q, k, v 4.5 us, o 3.3, gate and up 10.8,
// down 5.9 (bytes: 1.1, 0.7, 5.8, 2.9), predicted 1.8, 1.6, 4.5, 3.3, when all layers took 435 us; they take 339 now (docs/kernels.md). Verdict: kept,
// not there: behind the wait a launch is a chain of latencies.
#include "w4a16_decode.cuh"

namespace fh {

template <class T, int GROUP, bool ASYMMETRIC, bool NORM, bool GATED, bool PAIRED, int PAIRS>
__global__ void w4a16_fused(const uint4* codes, const u16* scales, const u8* zeros, const u16* x, u16* y, int M, int N, int K, const u16* residual,
                            u16* sum, const u16* first_norm, const u16* norm, float weight_offset, float epsilon, int gelu);

#ifdef __CUDACC__
// Dynamic shared memory: that of fh_w4a16_make_fused_plan.
template <class T, int GROUP, bool ASYMMETRIC, bool NORM, bool GATED, bool PAIRED, int PAIRS>
__global__ void __launch_bounds__(512, 1)
    w4a16_fused(const uint4* codes, const u16* scales, const u8* zeros, const u16* x, u16* y, int M, int N, int K, const u16* residual, u16* sum,
                const u16* first_norm, const u16* norm, float weight_offset, float epsilon, int gelu) {
  extern __shared__ float4 raw[];
  const Surroundings s{residual, first_norm, norm, sum, weight_offset, epsilon, gelu};
  decode_block<T, GROUP, ASYMMETRIC, NORM, GATED, PAIRED, PAIRS, true>(reinterpret_cast<float*>(raw), codes, scales, zeros, x, y, M, N, K, s);
}
#endif

}  // namespace fh

#ifndef __CUDACC_RTC__
#include "launch.h"
#include "w4a16_fused.h"

namespace fh {

// Whether gate and partner are multiplied side by side, by a block of twice the threads. A block then takes half as long, but a multiprocessor holds half as
// many: that pays where fewer places stay empty so, counted over all turns of the grid. Bits are the same. On an H100, us a body (docs/kernels.md):
// Qwen3-1.7B, 384 pairs on three times 132 places instead of twice 264, 635 for 659; Llama-3.2-1B, 512 on as many places either way, 392 for 385.
static bool paired(const fh_w4a16_weight& w, const fh_device& device) {
  const int warps = decode_warps(w.N, w.K), pairs = w.N / kTileRows / 2;
  if (warps > 8) return false;
  const int alone = device.multiprocessors * (16 / warps), both = device.multiprocessors * (8 / warps);
  return (pairs + both - 1) / both * both < (pairs + alone - 1) / alone * alone;
}

static const char* check(const fh_w4a16_weight& w, const fh_w4a16_fusion& f, const void* x, int M) {
  if (M < 1 || M > FH_W4A16_DECODE_ROWS) return failure("w4a16_fused: M is %d, expected 1 to %d; launch the steps one by one", M, FH_W4A16_DECODE_ROWS);
  if (w.group_size != 32 && w.group_size != 64 && w.group_size != 128) {
    return failure("w4a16_fused: group_size is %d, expected 32, 64 or 128; quantise the matrix anew", w.group_size);
  }
  const int outputs = f.gated ? 32 : 16;
  if (w.N < outputs || w.N % outputs || w.K < 64 || w.K % 64 || w.K % w.group_size || (f.norm && w.K > 16384)) {
    return failure("w4a16_fused: the matrix is [%d, %d] in groups of %d, expected N %% %d == 0, K %% 64 == 0, K %% group_size == 0%s; launch the steps one "
                   "by one", w.N, w.K, w.group_size, outputs, f.norm ? ", K <= 16384" : "");
  }
  if (w.dtype != FH_FP16 && w.dtype != FH_BF16) return failure("w4a16_fused: dtype is %d, expected FH_FP16 or FH_BF16; convert scales and activations", int(w.dtype));
  if (!f.norm && (f.residual || f.first_norm || f.gated)) {
    return failure("w4a16_fused: norm is NULL beside a residual, a first norm or a gate, expected a norm with each of them; launch the steps one by one");
  }
  if ((f.residual == nullptr) != (f.sum == nullptr)) return failure("w4a16_fused: one of residual and sum is NULL, expected both or neither; give the other one");
  if (f.sum && (f.sum == f.residual || f.sum == x)) return failure("w4a16_fused: sum is x or residual, which other blocks still read; give a third buffer");
  return nullptr;
}

template <class T, int GROUP, bool ASYMMETRIC, int PAIRS>
const char* fused(const fh_w4a16_weight& w, const fh_w4a16_fusion& f, const void* x, void* y, int M, const fh_device& device, cudaStream_t stream) {
  fh_w4a16_plan plan;
  fh_w4a16_make_fused_plan(&w, &f, M, &device, &plan);
  auto kernel = f.gated ? paired(w, device) ? w4a16_fused<T, GROUP, ASYMMETRIC, true, true, true, PAIRS>
                                            : w4a16_fused<T, GROUP, ASYMMETRIC, true, true, false, PAIRS>
                : f.norm ? w4a16_fused<T, GROUP, ASYMMETRIC, true, false, false, PAIRS> : w4a16_fused<T, GROUP, ASYMMETRIC, false, false, false, PAIRS>;
  return launch("w4a16_fused", device, stream, {dim3(plan.grid_x), plan.threads, plan.shared_bytes}, kernel, static_cast<const uint4*>(w.codes),
                static_cast<const u16*>(w.scales), static_cast<const u8*>(w.zeros), static_cast<const u16*>(x), static_cast<u16*>(y), M, w.N, w.K,
                static_cast<const u16*>(f.residual), static_cast<u16*>(f.sum), static_cast<const u16*>(f.first_norm), static_cast<const u16*>(f.norm),
                f.weight_offset, f.epsilon, int(f.activation == FH_GELU_TANH));
}

template <class T, int GROUP, bool ASYMMETRIC>
const char* fused(const fh_w4a16_weight& w, const fh_w4a16_fusion& f, const void* x, void* y, int M, const fh_device& device, cudaStream_t stream) {
  return decode_pairs(w.N, w.K) == 1 ? fused<T, GROUP, ASYMMETRIC, 1>(w, f, x, y, M, device, stream)
                                     : fused<T, GROUP, ASYMMETRIC, 2>(w, f, x, y, M, device, stream);
}

template <class T, int GROUP>
const char* fused(const fh_w4a16_weight& w, const fh_w4a16_fusion& f, const void* x, void* y, int M, const fh_device& device, cudaStream_t stream) {
  return w.zeros ? fused<T, GROUP, true>(w, f, x, y, M, device, stream) : fused<T, GROUP, false>(w, f, x, y, M, device, stream);
}

template <class T>
const char* fused(const fh_w4a16_weight& w, const fh_w4a16_fusion& f, const void* x, void* y, int M, const fh_device& device, cudaStream_t stream) {
  switch (w.group_size) {
    case 32: return fused<T, 32>(w, f, x, y, M, device, stream);
    case 64: return fused<T, 64>(w, f, x, y, M, device, stream);
    default: return fused<T, 128>(w, f, x, y, M, device, stream);
  }
}

}  // namespace fh

void fh_w4a16_make_fused_plan(const fh_w4a16_weight* w, const fh_w4a16_fusion* f, int M, const fh_device* device, fh_w4a16_plan* plan) {
  fh_w4a16_make_plan(w, M, device, plan);
  if (f->gated) {
    const int pairs = w->N / fh::kTileRows / 2;
    if (fh::paired(*w, *device)) {
      plan->grid_x = device->multiprocessors * (256 / plan->threads);
      plan->threads *= 2;
    }
    if (plan->grid_x > pairs) plan->grid_x = pairs;
  }
  plan->shared_bytes *= f->gated ? 2 : 1;
  if (f->norm) plan->shared_bytes += M * fh::row_stride(w->K) * 2;
}

const char* fh_w4a16_fused(const fh_w4a16_weight* weight, const fh_w4a16_fusion* fusion, const void* x, void* y, int M, const fh_device* device,
                           cudaStream_t stream) {
  using namespace fh;
  if (const char* wrong = check(*weight, *fusion, x, M)) return wrong;
  return weight->dtype == FH_FP16 ? fused<Fp16>(*weight, *fusion, x, y, M, *device, stream) : fused<Bf16>(*weight, *fusion, x, y, M, *device, stream);
}
#endif
