#include "facts.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>

namespace flashhead {
namespace {

Sentence failed(cudaError_t error) {
  cudaGetLastError();
  return format("the GPU's facts: CUDA says \"%s\", expected a device; look that nvidia-smi (tegrastats on a Jetson) sees one", cudaGetErrorString(error));
}

}  // namespace

Sentence device_facts(fh_device& facts) {
  static std::mutex guard;
  static std::map<int, fh_device> known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return failed(error);
  const std::lock_guard<std::mutex> lock(guard);
  const auto it = known.find(device);
  if (it != known.end()) {
    facts = it->second;
    return {};
  }
  int major = 0, minor = 0;
  fh_device found{};
  const std::pair<cudaDeviceAttr, int*> wanted[] = {{cudaDevAttrComputeCapabilityMajor, &major},
                                                    {cudaDevAttrComputeCapabilityMinor, &minor},
                                                    {cudaDevAttrMultiProcessorCount, &found.multiprocessors},
                                                    {cudaDevAttrMaxSharedMemoryPerBlockOptin, &found.shared_bytes}};
  for (const auto& [attribute, value] : wanted) {
    error = cudaDeviceGetAttribute(value, attribute, device);
    if (error != cudaSuccess) return failed(error);
  }
  found.capability = 10 * major + minor;
  found.overlap = found.capability >= 90;
  if (found.capability < 80) return format("the GPU has capability %d.%d, expected 8.0 or more; use another backend on this device", major, minor);
  facts = known[device] = found;
  return {};
}

}  // namespace flashhead
