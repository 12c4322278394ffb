// store.h: weights on devices: one copy for a process, device and tensor, which lives as long as somebody holds it.
#pragma once

#include <cstddef>
#include <memory>

#include "sentence.h"
#include "weights_file.h"

namespace flashhead {

using Weight = std::shared_ptr<const void>;  // device memory, 256-byte aligned

// A copy of the tensor on the device that is current, made where there is none; waits until its bytes are there. Thread safe.
Sentence hold(const Source& source, Range range, Weight& weight);

// Bytes of weights on all devices.
long long device_bytes();

// Device memory of one plugin instance alone, zero at first. A copy of it is empty: each instance asks for its own.
class Own {
 public:
  Own() = default;
  Own(const Own&) {}
  Own& operator=(const Own&) = delete;
  ~Own() { release(); }

  Sentence allocate(size_t bytes);  // on the device that is current; waits until it is zero
  void release();
  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
  int device_ = 0;
};

}  // namespace flashhead
