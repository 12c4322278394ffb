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

struct Grid {
  dim3 blocks;
  int threads;
  int shared = 0;   // dynamic shared memory, bytes
  int cluster = 1;  // blocks along x that form a thread block cluster, at most 8 (capability 90 and up)
  bool cooperative = false;  // every block is resident, or the launch fails
};

// Launches kernel with the arguments given; what names it in an error.
template <class... Parameters, class... Arguments>
const char* launch(const char* what, const fh_device& device, cudaStream_t stream, const Grid& grid, void (*kernel)(Parameters...), Arguments... arguments) {
  if (grid.shared > device.shared_bytes) {
    return failure("%s needs %d bytes of shared memory a block, the device has %d; use a smaller shape or another device", what, grid.shared,
                   device.shared_bytes);
  }
  cudaError_t error = cudaSuccess;
  if (grid.shared > 48 * 1024) error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared);
  cudaLaunchAttribute attributes[3]{};
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared;
  config.stream = stream;
  config.attrs = attributes;
  if (device.overlap) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = grid.cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  if (grid.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // ours to report, not that of the next call
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    return failure("%s could not be launched: %s; build it for capability %d", what, cudaGetErrorString(error), device.capability);
  }
  return failure("%s could not be launched in %u x %u blocks of %d threads: %s; look that the plan is made for this device, and that nothing failed before",
                 what, grid.blocks.x, grid.blocks.y, grid.threads, cudaGetErrorString(error));
}

}  // namespace fh
