// settings.cu: an engine's 32-bit tensors to and from the numbers of the head step and the draw (settings.h), a launch before the draw and one behind it all.
#include "element.cuh"
#include "settings.h"

extern "C" __global__ void flashhead_draw_settings(FlashHeadSettings a);
extern "C" __global__ void flashhead_narrow(FlashHeadNarrow a);

#ifdef __CUDACC__
namespace {

__device__ double temperature_of(float t) { return t > 0 ? double(fmaxf(t, 0.001f)) : 0; }
__device__ double top_p_of(float p) { return p < 1 ? double(fmaxf(p, 1e-30f)) : 1; }
__device__ double min_p_of(float p) { return p > 0 ? double(fminf(p, 1.f)) : 0; }

}  // namespace

// Grid: rows.
extern "C" __global__ void __launch_bounds__(FH_SETTINGS_THREADS) flashhead_draw_settings(const FlashHeadSettings a) {
  const int row = blockIdx.x;
  fh::wait_for_previous();
  fh::release_next();
  if (threadIdx.x == 0) {
    a.wide_temperature[row] = temperature_of(a.temperature[row]), a.wide_top_p[row] = top_p_of(a.top_p[row]), a.wide_min_p[row] = min_p_of(a.min_p[row]);
    a.wide_top_k[row] = max(a.top_k[row], 0), a.wide_step[row] = (unsigned)(a.step[row]);
  }
  if (!a.logits) return;
  const long long count = min(a.count[size_t(row) * a.count_stride], (long long)(a.width));
  for (int i = threadIdx.x; i < count; i += FH_SETTINGS_THREADS) {
    const size_t at = size_t(row) * a.width + i;
    const double x = a.scale * a.logits[at];
    a.final_logits[at] = float(a.softcap > 0 ? a.softcap * tanh(x / a.softcap) : x);
  }
}

// Grid: rows.
extern "C" __global__ void __launch_bounds__(FH_SETTINGS_THREADS) flashhead_narrow(const FlashHeadNarrow a) {
  const int row = blockIdx.x;
  fh::wait_for_previous();
  fh::release_next();
  const long long* counts = a.counts + size_t(row) * a.counted;
  const long long count = min(counts[a.counted - 1], (long long)(a.candidates));
  if (threadIdx.x == 0) a.narrow_token[row] = int(a.token[row]), a.narrow_capped[row] = a.capped[row];
  if (threadIdx.x < a.counted) a.narrow_counts[row * a.counted + threadIdx.x] = int(counts[threadIdx.x]);
  for (int i = threadIdx.x; i < count; i += FH_SETTINGS_THREADS) {
    const size_t at = size_t(row) * a.candidates + i;
    a.narrow_ids[at] = int(a.ids[at]);
  }
}
#endif

#ifndef __CUDACC_RTC__
#include "launch.h"

const char* fh_draw_settings(const FlashHeadSettings* arguments, const fh_device* device, cudaStream_t stream) {
  if (arguments->rows < 1) return fh::failure("draw_settings: %d rows, expected at least 1", arguments->rows);
  return fh::launch("draw_settings", *device, stream, {dim3(arguments->rows), FH_SETTINGS_THREADS}, flashhead_draw_settings, *arguments);
}

const char* fh_narrow(const FlashHeadNarrow* arguments, const fh_device* device, cudaStream_t stream) {
  if (arguments->rows < 1 || arguments->counted < 1 || arguments->counted > FH_SETTINGS_THREADS) {
    return fh::failure("narrow: %d rows of %d counts, expected at least 1 and 1 to %d", arguments->rows, arguments->counted, FH_SETTINGS_THREADS);
  }
  return fh::launch("narrow", *device, stream, {dim3(arguments->rows), FH_SETTINGS_THREADS}, flashhead_narrow, *arguments);
}
#endif
