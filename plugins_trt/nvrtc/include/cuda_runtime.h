// cuda_runtime.h: the runtime as a C++ compiler alone reads it: the words of device code mean nothing, and a launch takes its arguments' addresses.
#ifndef FLASHHEAD_CUDA_RUNTIME_H
#define FLASHHEAD_CUDA_RUNTIME_H

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* grid, void (*kernel)(Parameters...), Arguments&&... arguments) {
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return cudaLaunchKernelExC(grid, reinterpret_cast<const void*>(kernel), addresses);
}
#endif
