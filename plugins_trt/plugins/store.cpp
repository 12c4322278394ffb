// A copy is found by (fingerprint, device, offset): two engines of one file share it, wherever the file lies. The map holds no copy alive, so the last
// plugin that goes frees it. The file is read in pieces, each sent on before the next is read: a copy costs the host four megabytes, whatever its size.
#include "store.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace flashhead {
namespace {

constexpr size_t kPiece = 4u << 20;

using Key = std::tuple<std::string, int, uint64_t, uint64_t>;  // fingerprint, device, offset, bytes

std::mutex guard;
std::atomic<long long> held{0};

// Never destroyed: an engine may outlive the library's static objects.
std::map<Key, std::weak_ptr<const void>>& copies() {
  static auto* map = new std::map<Key, std::weak_ptr<const void>>;
  return *map;
}

// Allocations here disturb no capture of a CUDA graph that another thread makes meanwhile.
class Apart {
 public:
  Apart() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Apart() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

Sentence failed(const char* what, cudaError_t error) {
  cudaGetLastError();  // ours to report, not that of the next call
  return format("%s: CUDA says \"%s\", expected success; look that a GPU is there and has room", what, cudaGetErrorString(error));
}

void free_on(int device, void* data) {
  const Apart apart;
  int current = device;
  cudaGetDevice(&current);
  if (current != device) cudaSetDevice(device);
  cudaFree(data);
  if (current != device) cudaSetDevice(current);
  cudaGetLastError();  // at the end of a process the driver may have gone first
}

Sentence fill(const WeightsFile& file, Range range, char* data, cudaStream_t stream) {
  std::vector<char> piece(size_t(std::min<uint64_t>(kPiece, range.bytes)));
  for (uint64_t done = 0; done < range.bytes; done += piece.size()) {
    const size_t bytes = size_t(std::min<uint64_t>(piece.size(), range.bytes - done));
    const Sentence wrong = file.read(range.offset + done, piece.data(), bytes);
    if (!wrong.empty()) return wrong;
    cudaError_t error = cudaMemcpyAsync(data + done, piece.data(), bytes, cudaMemcpyHostToDevice, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    if (error != cudaSuccess) return failed("weights could not be copied to the device", error);
  }
  return {};
}

Sentence allocate(size_t bytes, const char* what, char** data) {
  const cudaError_t error = cudaMalloc(reinterpret_cast<void**>(data), bytes);
  if (error == cudaSuccess) return {};
  size_t free = 0, total = 0;
  cudaMemGetInfo(&free, &total);
  return failed(format("%zu bytes of device memory for %s, of %zu that are free", bytes, what, free).c_str(), error);
}

// Runs body with a stream that waits for no other.
template <class Body>
Sentence on_stream(Body body) {
  cudaStream_t stream = nullptr;
  const cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return failed("a stream could not be made", error);
  const Sentence wrong = body(stream);
  cudaStreamDestroy(stream);
  return wrong;
}

}  // namespace

Sentence hold(const Source& source, Range range, Weight& weight) {
  int device = 0;
  const Apart apart;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return failed("there is no device", error);
  const std::lock_guard<std::mutex> lock(guard);
  for (auto it = copies().begin(); it != copies().end();) it = it->second.expired() ? copies().erase(it) : std::next(it);
  const Key key(source.fingerprint, device, range.offset, range.bytes);
  const auto known = copies().find(key);
  if (known != copies().end() && (weight = known->second.lock())) return {};

  WeightsFile file;
  Sentence wrong = find_file(source, file);
  if (!wrong.empty()) return wrong;
  if (file.size < range.offset + range.bytes) {
    return format("%s has %llu bytes, expected %llu or more; copy the file again", file.path.c_str(), (unsigned long long)(file.size),
                  (unsigned long long)(range.offset + range.bytes));
  }
  char* data = nullptr;
  wrong = allocate(size_t(range.bytes), "weights", &data);
  if (!wrong.empty()) return wrong;
  const long long bytes = (long long)(range.bytes);
  held += bytes;
  weight = Weight(data, [device, bytes](const void* p) {
    free_on(device, const_cast<void*>(p));
    held -= bytes;
  });
  wrong = on_stream([&](cudaStream_t stream) { return fill(file, range, data, stream); });
  if (wrong.empty()) {
    copies()[key] = weight;
  } else {
    weight.reset();
  }
  return wrong;
}

long long device_bytes() { return held; }

Sentence Own::allocate(size_t bytes) {
  release();
  const Apart apart;
  const cudaError_t error = cudaGetDevice(&device_);
  if (error != cudaSuccess) return failed("there is no device", error);
  Sentence wrong = flashhead::allocate(bytes, "a workspace", &data_);
  if (!wrong.empty()) return wrong;
  wrong = on_stream([&](cudaStream_t stream) {
    cudaError_t zero = cudaMemsetAsync(data_, 0, bytes, stream);
    if (zero == cudaSuccess) zero = cudaStreamSynchronize(stream);
    return zero == cudaSuccess ? Sentence() : failed("a workspace could not be made zero", zero);
  });
  if (!wrong.empty()) release();
  return wrong;
}

void Own::release() {
  if (data_) free_on(device_, data_);
  data_ = nullptr;
}

}  // namespace flashhead
