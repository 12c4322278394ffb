// empty.cu: the kernel that does nothing, so that a measurement can say what a launch in a graph costs.
#include "../kernels/element.cuh"
#include "../kernels/launch.h"

__global__ void empty() {
  fh::wait_for_previous();
  fh::release_next();
}

extern "C" const char* fh_test_empty(const fh_device* device, cudaStream_t stream) {
  return fh::launch("empty", *device, stream, {dim3(device->multiprocessors), 256}, empty);
}
