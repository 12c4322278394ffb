// launch.h: the host side that the launchers share (C++, not for NVRTC).
#pragma once

#include <cuda_runtime.h>

#include <cstdarg>
#include <cstdio>

#include "device.h"

namespace fh {

__attribute__((format(printf, 1, 2))) inline const char* failure(const char* format, ...) {
  thread_local char text[320];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  return text;
}

// Launches kernel with the arguments given; what names it in an error.
template <class... Parameters, class... Arguments>
const char* launch(const char* what, const fh_device& device, cudaStream_t stream, dim3 grid, int threads, int shared, void (*kernel)(Parameters...),
                   Arguments... arguments) {
  if (shared > device.shared_bytes) {
    return failure("%s needs %d bytes of shared memory a block, the device has %d; use a smaller shape or another device", what, shared,
                   device.shared_bytes);
  }
  cudaError_t error = cudaSuccess;
  if (shared > 48 * 1024) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = device.overlap ? 1 : 0;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error == cudaSuccess) return nullptr;
  return failure("%s could not be launched: %s; check that the build holds code for capability %d", what, cudaGetErrorString(error), device.capability);
}

}  // namespace fh
