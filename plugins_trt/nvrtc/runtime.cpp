// runtime.cpp: what plugins and launchers call of CUDA's runtime, over the driver alone, for the libraries that g++ makes: the plugins' (`flashhead plugin
// build`), and the launchers' of the torch-free backend (setup.py).
//
// A kernel is no function of the host here. `flashhead_kernels`, which the build writes, has for each of them the address that stands for it on the host,
// its name in a cubin, and that cubin, which is loaded into a context when the first of its kernels is asked for there. Errors of the driver are the
// runtime's by number. Nothing is kept for cudaGetLastError: every call here answers for itself.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <mutex>

#include "kernels.h"

bool (*flashhead_asked)(const FlashHeadKernel&) = nullptr;

namespace {

struct Driver {
  CUresult wrong = CUDA_SUCCESS;  // what stops every call: no library, an old one, or no device
  bool loaded = false;
#define FH_DRIVER(NAME) decltype(&::NAME) NAME = nullptr;
#define FH_FUNCTIONS(X)                                                                                                                                     \
  X(cuInit) X(cuGetErrorString) X(cuDeviceGet) X(cuDeviceGetAttribute) X(cuDevicePrimaryCtxRetain) X(cuCtxGetCurrent) X(cuCtxSetCurrent)                    \
  X(cuCtxGetDevice) X(cuCtxGetId) X(cuMemAlloc_v2) X(cuMemFree_v2) X(cuMemGetInfo_v2) X(cuMemcpyHtoDAsync_v2) X(cuMemcpyDtoDAsync_v2) X(cuMemcpy2DAsync_v2) \
  X(cuMemsetD8Async) X(cuStreamCreate) X(cuStreamDestroy_v2) X(cuStreamSynchronize) X(cuThreadExchangeStreamCaptureMode) X(cuModuleLoadData)                \
  X(cuModuleGetFunction) X(cuFuncGetAttribute) X(cuFuncSetAttribute) X(cuLaunchKernelEx)
  FH_FUNCTIONS(FH_DRIVER)
#undef FH_DRIVER

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      wrong = CUresult(cudaErrorInsufficientDriver);
      return;
    }
#define FH_DRIVER(NAME)                                                  \
  NAME = reinterpret_cast<decltype(NAME)>(dlsym(library, #NAME));        \
  if (!NAME) {                                                           \
    wrong = CUresult(cudaErrorInsufficientDriver);                       \
    return;                                                              \
  }
    FH_FUNCTIONS(FH_DRIVER)
#undef FH_DRIVER
    loaded = true;
    wrong = cuInit(0);
  }
};

const Driver& driver() {
  static const Driver* found = new Driver;  // never destroyed: an engine may outlive the library's static objects
  return *found;
}

thread_local int chosen = 0;  // the device of a thread that has no context yet
std::mutex guard;

struct Held {
  std::map<int, CUcontext> primary;  // of each device that was asked for, retained for good, as the runtime does
  // By a context's number, which no later context gets, and the cubin or the host address.
  std::map<std::pair<unsigned long long, const void*>, CUmodule> modules;
  std::map<std::pair<unsigned long long, const void*>, CUfunction> functions;
};

Held& held() {
  static Held* all = new Held;
  return *all;
}

CUresult primary(int device, CUcontext* context) {
  const std::lock_guard<std::mutex> lock(guard);
  const auto known = held().primary.find(device);
  if (known != held().primary.end()) return *context = known->second, CUDA_SUCCESS;
  CUdevice handle = 0;
  CUresult error = driver().cuDeviceGet(&handle, device);
  if (error == CUDA_SUCCESS) error = driver().cuDevicePrimaryCtxRetain(context, handle);
  if (error == CUDA_SUCCESS) held().primary[device] = *context;
  return error;
}

// The current context; where a thread has none, the primary one of its device becomes it.
CUresult current(CUcontext* context) {
  const Driver& d = driver();
  if (d.wrong != CUDA_SUCCESS) return d.wrong;
  CUresult error = d.cuCtxGetCurrent(context);
  if (error != CUDA_SUCCESS || *context) return error;
  error = primary(chosen, context);
  return error == CUDA_SUCCESS ? d.cuCtxSetCurrent(*context) : error;
}

// Runs body(driver) in the current context.
template <class Body>
cudaError_t in_context(Body body) {
  CUcontext context = nullptr;
  const CUresult error = current(&context);
  return cudaError_t(error == CUDA_SUCCESS ? body(driver()) : error);
}

const FlashHeadKernel* entry(const void* host) {
  const FlashHeadKernel* kernel = flashhead_kernels;
  while (kernel->host && kernel->host != host) ++kernel;
  return kernel->host ? kernel : nullptr;
}

bool taken(const void* host) {
  const FlashHeadKernel* kernel = flashhead_asked ? entry(host) : nullptr;
  return kernel && flashhead_asked(*kernel);
}

CUresult find(const void* host, CUfunction* function) {
  const Driver& d = driver();
  CUcontext context = nullptr;
  unsigned long long number = 0;
  CUresult error = current(&context);
  if (error == CUDA_SUCCESS) error = d.cuCtxGetId(context, &number);
  if (error != CUDA_SUCCESS) return error;
  const std::lock_guard<std::mutex> lock(guard);
  const auto known = held().functions.find({number, host});
  if (known != held().functions.end()) return *function = known->second, CUDA_SUCCESS;
  const FlashHeadKernel* kernel = entry(host);
  if (!kernel || !kernel->code) return CUresult(cudaErrorInvalidDeviceFunction);
  CUmodule& module = held().modules[{number, kernel->code}];
  if (!module) {
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;  // loading code is no part of a graph that may be captured meanwhile
    d.cuThreadExchangeStreamCaptureMode(&mode);
    error = d.cuModuleLoadData(&module, kernel->code);
    d.cuThreadExchangeStreamCaptureMode(&mode);
    if (error != CUDA_SUCCESS) return module = nullptr, error;
  }
  error = d.cuModuleGetFunction(function, module, kernel->name);
  if (error == CUDA_SUCCESS) held().functions[{number, host}] = *function;
  return error;
}

CUdeviceptr at(const void* p) { return CUdeviceptr(reinterpret_cast<uintptr_t>(p)); }

static_assert(int(cudaErrorMemoryAllocation) == int(CUDA_ERROR_OUT_OF_MEMORY) && int(cudaErrorNoDevice) == int(CUDA_ERROR_NO_DEVICE) &&
                  int(cudaErrorNoKernelImageForDevice) == int(CUDA_ERROR_NO_BINARY_FOR_GPU),
              "errors have one number on both sides");
static_assert(int(cudaDevAttrMultiProcessorCount) == int(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT) &&
                  int(cudaDevAttrComputeCapabilityMajor) == int(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) &&
                  int(cudaDevAttrComputeCapabilityMinor) == int(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR) &&
                  int(cudaDevAttrMaxSharedMemoryPerBlockOptin) == int(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
              "attributes have one number on both sides");

}  // namespace

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  const char* text = nullptr;
  if (!driver().loaded) return "libcuda.so.1 is missing, or older than CUDA 12";
  if (error == cudaErrorInvalidDeviceFunction) return "this library has no such kernel";
  return driver().cuGetErrorString(CUresult(error), &text) == CUDA_SUCCESS && text ? text : "an error without a name";
}

cudaError_t cudaGetDevice(int* device) {
  return in_context([&](const Driver& d) { return d.cuCtxGetDevice(device); });
}

cudaError_t cudaSetDevice(int device) {
  const Driver& d = driver();
  CUcontext context = nullptr;
  CUresult error = d.wrong;
  if (error == CUDA_SUCCESS) error = primary(device, &context);
  if (error == CUDA_SUCCESS) error = d.cuCtxSetCurrent(context);
  if (error == CUDA_SUCCESS) chosen = device;
  return cudaError_t(error);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return in_context([&](const Driver& d) { return d.cuDeviceGetAttribute(value, CUdevice_attribute(attribute), device); });
}

cudaError_t cudaMalloc(void** data, size_t bytes) {
  return in_context([&](const Driver& d) {
    CUdeviceptr found = 0;
    const CUresult error = d.cuMemAlloc_v2(&found, bytes);
    *data = reinterpret_cast<void*>(uintptr_t(found));
    return error;
  });
}

cudaError_t cudaFree(void* data) {
  if (!data) return cudaSuccess;
  return in_context([&](const Driver& d) { return d.cuMemFree_v2(at(data)); });
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return in_context([&](const Driver& d) { return d.cuMemGetInfo_v2(free, total); });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return in_context([&](const Driver& d) {
    if (kind == cudaMemcpyHostToDevice) return d.cuMemcpyHtoDAsync_v2(at(to), from, bytes, stream);
    if (kind == cudaMemcpyDeviceToDevice) return d.cuMemcpyDtoDAsync_v2(at(to), at(from), bytes, stream);
    return CUresult(cudaErrorInvalidMemcpyDirection);
  });
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t pitch, const void* from, size_t stride, size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  return in_context([&](const Driver& d) {
    if (kind != cudaMemcpyDeviceToDevice) return CUresult(cudaErrorInvalidMemcpyDirection);
    CUDA_MEMCPY2D copy{};
    copy.srcMemoryType = copy.dstMemoryType = CU_MEMORYTYPE_DEVICE;
    copy.srcDevice = at(from), copy.srcPitch = stride, copy.dstDevice = at(to), copy.dstPitch = pitch;
    copy.WidthInBytes = width, copy.Height = height;
    return d.cuMemcpy2DAsync_v2(&copy, stream);
  });
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return in_context([&](const Driver& d) { return d.cuMemsetD8Async(at(to), static_cast<unsigned char>(value), bytes, stream); });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return in_context([&](const Driver& d) { return d.cuStreamCreate(stream, flags == cudaStreamNonBlocking ? CU_STREAM_NON_BLOCKING : CU_STREAM_DEFAULT); });
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return in_context([&](const Driver& d) { return d.cuStreamDestroy_v2(stream); });
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return in_context([&](const Driver& d) { return d.cuStreamSynchronize(stream); });
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  if (driver().wrong != CUDA_SUCCESS) return cudaError_t(driver().wrong);
  CUstreamCaptureMode theirs = CUstreamCaptureMode(*mode);
  const CUresult error = driver().cuThreadExchangeStreamCaptureMode(&theirs);
  *mode = cudaStreamCaptureMode(theirs);
  return cudaError_t(error);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  memset(attributes, 0, sizeof *attributes);
  if (taken(kernel)) return attributes->sharedSizeBytes = 1, cudaSuccess;  // of a kernel that is not empty
  CUfunction function = nullptr;
  CUresult error = find(kernel, &function);
  int bytes = 0;
  if (error == CUDA_SUCCESS) error = driver().cuFuncGetAttribute(&bytes, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function);
  attributes->sharedSizeBytes = size_t(bytes);
  return cudaError_t(error);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
  if (taken(kernel)) return cudaSuccess;
  CUfunction function = nullptr;
  const CUresult error = find(kernel, &function);
  return cudaError_t(error == CUDA_SUCCESS ? driver().cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, value) : error);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* grid, const void* kernel, void** arguments) {
  if (taken(kernel)) return cudaSuccess;
  CUfunction function = nullptr;
  const CUresult error = find(kernel, &function);
  if (error != CUDA_SUCCESS) return cudaError_t(error);
  CUlaunchAttribute attributes[3]{};
  CUlaunchConfig config{};
  config.gridDimX = grid->gridDim.x, config.gridDimY = grid->gridDim.y, config.gridDimZ = grid->gridDim.z;
  config.blockDimX = grid->blockDim.x, config.blockDimY = grid->blockDim.y, config.blockDimZ = grid->blockDim.z;
  config.sharedMemBytes = unsigned(grid->dynamicSmemBytes), config.hStream = grid->stream, config.attrs = attributes;
  for (unsigned i = 0; i < grid->numAttrs; ++i) {
    const cudaLaunchAttribute& from = grid->attrs[i];
    if (config.numAttrs == 3) return cudaErrorInvalidValue;
    CUlaunchAttribute& to = attributes[config.numAttrs++];
    switch (from.id) {
      case cudaLaunchAttributeCooperative:
        to.id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE, to.value.cooperative = from.val.cooperative;
        break;
      case cudaLaunchAttributeClusterDimension:
        to.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        to.value.clusterDim.x = from.val.clusterDim.x, to.value.clusterDim.y = from.val.clusterDim.y, to.value.clusterDim.z = from.val.clusterDim.z;
        break;
      case cudaLaunchAttributeProgrammaticStreamSerialization:
        to.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        to.value.programmaticStreamSerializationAllowed = from.val.programmaticStreamSerializationAllowed;
        break;
      default:
        return cudaErrorInvalidValue;
    }
  }
  return cudaError_t(driver().cuLaunchKernelEx(&config, function, arguments, nullptr));
}
