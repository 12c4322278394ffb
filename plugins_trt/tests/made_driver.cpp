// made_driver.cpp: a libcuda.so.1 without a GPU, for tests/jetson: what nvrtc/runtime.cpp and jetson/driver.py ask of the driver, noted in made_notes.
//
// Contexts are numbers: 1 is the primary one of device 0; made_context makes another one current. Device memory is the host's. Code is taken as it is; a
// kernel is found where its name stands in the code. A graph counts what was put into the stream while it was captured, which is not done; made_left says
// how much of all this is still there. made_fail lets one function fail, with a number of the driver's errors.
#include <cuda.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "../kernels/advance.h"

#undef cuEventElapsedTime  // which newer headers rename
#define MADE extern "C" __attribute__((visibility("default")))

namespace {

std::mutex guard;
std::string notes, kept, failing;
int failure = 0;
thread_local uintptr_t context = 0;
std::map<uintptr_t, std::string> kernels;  // name by handle
std::map<uintptr_t, const char*> modules;
long long left[8];  // references to the primary context, pieces of device memory, pinned ones, streams, graphs; reserved ranges, pieces in them, events
enum { CONTEXT, DEVICE, PINNED, STREAM, GRAPH, RESERVED, MAPPED, EVENT };
int captured = -1;  // calls of the capture that is under way; -1: none is
int cuda_version = 12060;
int virtual_memory = 0;  // whether the device has it: made_virtual
int countdown = 0;       // calls of `failing` that still succeed: made_fail_after
std::vector<FlashHeadAdvance> steps;                      // of the capture that is under way
std::map<uintptr_t, std::vector<FlashHeadAdvance>> held;  // of graphs that can be launched
uintptr_t graphs = 1;

__attribute__((format(printf, 1, 2))) void note(const char* pattern, ...) {
  const std::lock_guard<std::mutex> lock(guard);
  char text[400];
  va_list values;
  va_start(values, pattern);
  vsnprintf(text, sizeof text, pattern, values);
  va_end(values);
  notes += (notes.empty() ? "" : "; ") + std::string(text);
}

CUresult answer(const char* function) {
  if (failing != function) return CUDA_SUCCESS;
  return countdown > 0 ? (--countdown, CUDA_SUCCESS) : CUresult(failure);
}

// The one kernel that is done here: the host waits for what it writes. The next token is one more than the token that was fed.
void advance(const FlashHeadAdvance& a) {
  const unsigned number = ++*a.number;
  unsigned* slot = a.mail + size_t(number % unsigned(a.slots)) * a.slot_words;
  for (int row = 0; row < a.rows; ++row) {
    unsigned* mine = slot + FH_MAIL_HEAD + row * (FH_MAIL_ROW + a.counted);
    mine[0] = unsigned(++a.ids[row]), mine[1] = 0, mine[2] = 0;
    for (int i = 0; i < a.counted; ++i) mine[FH_MAIL_ROW + i] = unsigned(a.lengths[row]);
    ++a.lengths[row], ++a.step[row];
  }
  slot[0] = number;
}

bool now() {  // whether work is done at once, and not captured
  if (captured >= 0) ++captured;
  return captured < 0;
}

bool stands_in(const char* code, const char* name) {  // an ELF file of 64 bits: somewhere before the end of its section headers
  unsigned long long sections = 0;
  unsigned short count = 0;
  memcpy(&sections, code + 40, 8);
  memcpy(&count, code + 60, 2);
  const size_t size = size_t(sections) + 64u * count, length = strlen(name) + 1;
  for (size_t i = 0; i + length <= size; ++i) {
    if (!memcmp(code + i, name, length)) return true;
  }
  return false;
}

}  // namespace

MADE const char* made_notes() {
  const std::lock_guard<std::mutex> lock(guard);
  kept.swap(notes);
  notes.clear();
  return kept.c_str();
}
MADE void made_context(unsigned long long number) { context = uintptr_t(number); }
MADE const long long* made_left() { return left; }
MADE void made_fail(const char* function, int code) { failing = function, failure = code, countdown = 0; }
MADE void made_fail_after(const char* function, int code, int calls) { failing = function, failure = code, countdown = calls; }
MADE void made_cuda(int version) { cuda_version = version; }
MADE void made_virtual(int on) { virtual_memory = on; }

MADE CUresult cuInit(unsigned) { return answer("cuInit"); }
MADE CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : error == CUDA_ERROR_NO_BINARY_FOR_GPU ? "no binary for this GPU" : "an error";
  return CUDA_SUCCESS;
}
MADE CUresult cuGetErrorName(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == CUDA_ERROR_NO_DEVICE ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_UNKNOWN";
  return CUDA_SUCCESS;
}
MADE CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
MADE CUresult cuDeviceGetName(char* name, int room, CUdevice) { return snprintf(name, size_t(room), "Made Orin"), CUDA_SUCCESS; }
MADE CUresult cuDriverGetVersion(int* version) { return *version = cuda_version, CUDA_SUCCESS; }
MADE CUresult cuDeviceGet(CUdevice* device, int number) { return *device = number, CUDA_SUCCESS; }
MADE CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 16; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 8; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 7; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 163 << 10; break;
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: *value = virtual_memory; break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
MADE CUresult cuDevicePrimaryCtxRetain(CUcontext* made, CUdevice device) {
  note("retain %d", device);
  ++left[CONTEXT];
  *made = reinterpret_cast<CUcontext>(uintptr_t(device) + 1);
  return CUDA_SUCCESS;
}
MADE CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return --left[CONTEXT], CUDA_SUCCESS; }
MADE CUresult cuCtxGetCurrent(CUcontext* found) { return *found = reinterpret_cast<CUcontext>(context), CUDA_SUCCESS; }
MADE CUresult cuCtxSetCurrent(CUcontext to) { return context = reinterpret_cast<uintptr_t>(to), CUDA_SUCCESS; }
MADE CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
MADE CUresult cuCtxGetId(CUcontext of, unsigned long long* number) { return *number = reinterpret_cast<uintptr_t>(of), CUDA_SUCCESS; }
MADE CUresult cuMemAlloc_v2(CUdeviceptr* data, size_t bytes) {
  note("alloc %zu", bytes);
  const CUresult error = answer("cuMemAlloc_v2");
  if (error == CUDA_SUCCESS) *data = reinterpret_cast<CUdeviceptr>(malloc(bytes)), ++left[DEVICE];
  return error;
}
MADE CUresult cuMemFree_v2(CUdeviceptr data) {
  note("free in %llu", (unsigned long long)(context));
  free(reinterpret_cast<void*>(data)), --left[DEVICE];
  return CUDA_SUCCESS;
}
MADE CUresult cuMemAllocHost_v2(void** data, size_t bytes) {
  const CUresult error = answer("cuMemAllocHost_v2");
  if (error == CUDA_SUCCESS) *data = malloc(bytes), ++left[PINNED];
  return error;
}
MADE CUresult cuMemHostAlloc(void** data, size_t bytes, unsigned) {
  const CUresult error = answer("cuMemHostAlloc");
  if (error == CUDA_SUCCESS) *data = malloc(bytes), ++left[PINNED];
  return error;
}
MADE CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* there, void* here, unsigned) {
  *there = reinterpret_cast<CUdeviceptr>(here);
  return answer("cuMemHostGetDevicePointer_v2");
}
MADE CUresult cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp* kind, CUmemAllocationGranularity_flags) {
  *bytes = 1 << 16;
  return kind->type == CU_MEM_ALLOCATION_TYPE_PINNED && kind->location.type == CU_MEM_LOCATION_TYPE_DEVICE ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
MADE CUresult cuMemAddressReserve(CUdeviceptr* data, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
  note("reserve %zu", bytes);
  const CUresult error = answer("cuMemAddressReserve");
  if (error == CUDA_SUCCESS) *data = reinterpret_cast<CUdeviceptr>(malloc(bytes)), ++left[RESERVED];
  return error;
}
MADE CUresult cuMemAddressFree(CUdeviceptr data, size_t) { return free(reinterpret_cast<void*>(data)), --left[RESERVED], CUDA_SUCCESS; }
MADE CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t bytes, const CUmemAllocationProp*, unsigned long long) {
  note("piece %zu", bytes);
  const CUresult error = answer("cuMemCreate");
  if (error == CUDA_SUCCESS) *handle = 7000 + (unsigned long long)(left[DEVICE]++);
  return error;
}
MADE CUresult cuMemRelease(CUmemGenericAllocationHandle) { return --left[DEVICE], CUDA_SUCCESS; }
MADE CUresult cuMemMap(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long) {
  const CUresult error = answer("cuMemMap");
  if (error == CUDA_SUCCESS) ++left[MAPPED];
  return error;
}
MADE CUresult cuMemUnmap(CUdeviceptr, size_t) { return --left[MAPPED], CUDA_SUCCESS; }
MADE CUresult cuMemSetAccess(CUdeviceptr, size_t bytes, const CUmemAccessDesc* access, size_t count) {
  note("access to %zu", bytes);
  const bool whole = access->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE && access->location.type == CU_MEM_LOCATION_TYPE_DEVICE && count == 1;
  return whole ? answer("cuMemSetAccess") : CUDA_ERROR_INVALID_VALUE;
}
MADE CUresult cuEventCreate(CUevent* event, unsigned) { return *event = reinterpret_cast<CUevent>(uintptr_t(900)), ++left[EVENT], CUDA_SUCCESS; }
MADE CUresult cuEventRecord(CUevent, CUstream) { return CUDA_SUCCESS; }
MADE CUresult cuEventSynchronize(CUevent) { return CUDA_SUCCESS; }
MADE CUresult cuEventElapsedTime(float* milliseconds, CUevent, CUevent) { return *milliseconds = 1, CUDA_SUCCESS; }
MADE CUresult cuEventDestroy_v2(CUevent) { return --left[EVENT], CUDA_SUCCESS; }
MADE CUresult cuStreamQuery(CUstream) { return answer("cuStreamQuery"); }
MADE CUresult cuMemFreeHost(void* data) { return free(data), --left[PINNED], CUDA_SUCCESS; }
MADE CUresult cuMemGetInfo_v2(size_t* free, size_t* total) { return *free = 6000000000, *total = 8000000000, CUDA_SUCCESS; }
MADE CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream) {
  note("in %zu", bytes);
  if (now()) memcpy(reinterpret_cast<void*>(to), from, bytes);
  return CUDA_SUCCESS;
}
MADE CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream) {
  note("out %zu", bytes);
  if (now()) memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return CUDA_SUCCESS;
}
MADE CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream) {
  note("across %zu", bytes);
  if (now()) memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
  return CUDA_SUCCESS;
}
MADE CUresult cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D* c, CUstream) {
  note("%zu rows of %zu, %zu to %zu apart", c->Height, c->WidthInBytes, c->srcPitch, c->dstPitch);
  return CUDA_SUCCESS;
}
MADE CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes) { return memset(reinterpret_cast<void*>(to), value, bytes), CUDA_SUCCESS; }
MADE CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream) {
  note("set %zu to %d", bytes, value);
  if (now()) memset(reinterpret_cast<void*>(to), value, bytes);
  return CUDA_SUCCESS;
}
MADE CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
  note("stream %u", flags);
  *stream = reinterpret_cast<CUstream>(uintptr_t(500 + left[STREAM]++));
  return CUDA_SUCCESS;
}
MADE CUresult cuStreamDestroy_v2(CUstream) { return --left[STREAM], CUDA_SUCCESS; }
MADE CUresult cuStreamSynchronize(CUstream) { return answer("cuStreamSynchronize"); }
MADE CUresult cuStreamBeginCapture_v2(CUstream, CUstreamCaptureMode mode) { return note("begin %d", int(mode)), captured = 0, steps.clear(), CUDA_SUCCESS; }
MADE CUresult cuStreamEndCapture(CUstream, CUgraph* graph) {
  const CUresult error = answer("cuStreamEndCapture");
  *graph = error == CUDA_SUCCESS ? reinterpret_cast<CUgraph>(uintptr_t(captured + 1)) : nullptr;
  if (*graph) ++left[GRAPH];
  captured = -1;
  return error;
}
MADE CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode*, size_t* count) { return *count = reinterpret_cast<uintptr_t>(graph) - 1, CUDA_SUCCESS; }
MADE CUresult cuGraphInstantiateWithFlags(CUgraphExec* made, CUgraph, unsigned long long) {
  const CUresult error = answer("cuGraphInstantiateWithFlags");
  if (error == CUDA_SUCCESS) *made = reinterpret_cast<CUgraphExec>(++graphs), held[graphs] = steps, ++left[GRAPH];
  return error;
}
MADE CUresult cuGraphLaunch(CUgraphExec graph, CUstream stream) {
  note("graph in %llu", (unsigned long long)(reinterpret_cast<uintptr_t>(stream)));
  for (const FlashHeadAdvance& a : held.at(reinterpret_cast<uintptr_t>(graph))) advance(a);
  return answer("cuGraphLaunch");
}
MADE CUresult cuGraphDestroy(CUgraph) { return --left[GRAPH], CUDA_SUCCESS; }
MADE CUresult cuGraphExecDestroy(CUgraphExec) { return --left[GRAPH], CUDA_SUCCESS; }
MADE CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  static thread_local CUstreamCaptureMode current = CU_STREAM_CAPTURE_MODE_GLOBAL;
  std::swap(current, *mode);
  return CUDA_SUCCESS;
}
MADE CUresult cuModuleLoadData(CUmodule* module, const void* code) {
  note("load in %llu", (unsigned long long)(context));
  const CUresult error = answer("cuModuleLoadData");
  if (error != CUDA_SUCCESS) return error;
  if (memcmp(code, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
  const uintptr_t handle = 100 + modules.size();
  modules[handle] = static_cast<const char*>(code);
  *module = reinterpret_cast<CUmodule>(handle);
  return CUDA_SUCCESS;
}
MADE CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  if (!stands_in(modules.at(reinterpret_cast<uintptr_t>(module)), name)) return CUDA_ERROR_NOT_FOUND;
  const uintptr_t handle = 1000 + kernels.size();
  kernels[handle] = name;
  *function = reinterpret_cast<CUfunction>(handle);
  return CUDA_SUCCESS;
}
MADE CUresult cuFuncGetAttribute(int* value, CUfunction_attribute, CUfunction) { return *value = 64, CUDA_SUCCESS; }  // of a kernel that is not empty
MADE CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute attribute, int value) { return note("attribute %d = %d", int(attribute), value), CUDA_SUCCESS; }
MADE CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** arguments, void**) {
  std::string attributes;
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    const CUlaunchAttribute& a = c->attrs[i];
    char text[80];
    if (a.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
      snprintf(text, sizeof text, " cluster %u %u %u", a.value.clusterDim.x, a.value.clusterDim.y, a.value.clusterDim.z);
    } else if (a.id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) {
      snprintf(text, sizeof text, " cooperative %d", a.value.cooperative);
    } else {
      snprintf(text, sizeof text, " overlap %d", a.id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION ? a.value.programmaticStreamSerializationAllowed : -1);
    }
    attributes += text;
  }
  unsigned long long first = 0;
  memcpy(&first, arguments[0], sizeof first);
  note("%s %u %u %u by %u, %u shared, first %llu, stream %llu%s", kernels.at(reinterpret_cast<uintptr_t>(function)).c_str(), c->gridDimX, c->gridDimY,
       c->gridDimZ, c->blockDimX, c->sharedMemBytes, first, (unsigned long long)(reinterpret_cast<uintptr_t>(c->hStream)), attributes.c_str());
  if (kernels.at(reinterpret_cast<uintptr_t>(function)) == "flashhead_advance") {
    FlashHeadAdvance a;
    memcpy(&a, arguments[0], sizeof a);
    if (captured >= 0) steps.push_back(a);
    if (captured < 0) advance(a);
  }
  if (captured >= 0) ++captured;
  return answer("cuLaunchKernelEx");
}
