// operation.h: one plugin without TensorRT: its fields, the types and shapes it takes, what it needs and what it launches.
//
// A shell (shell_v2.cpp, shell_v3.cpp) turns TensorRT's calls into these. Nothing here knows TensorRT; the host headers of CUDA's runtime are all it takes.
//
// Life of an instance: made, `read`; asked for types and shapes; `prepare` (weights and own memory are on the device that is current); `run`, as often as
// wanted; `release`. A clone of a prepared instance is prepared. `run` neither allocates nor waits. One instance runs on one stream at a time: every
// execution context has its own.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "fields.h"
#include "sentence.h"
#include "store.h"

namespace flashhead {

enum class Type { fp16, bf16, fp32, int32, other };
const char* name_of(Type type);

constexpr int kMostDims = 8;

struct Tensor {
  Type type = Type::other;
  int rank = 0;
  int64_t dims[kMostDims] = {};  // -1: not known yet

  int64_t last() const { return rank ? dims[rank - 1] : 1; }
  int64_t rows() const {  // product of all but the last
    int64_t n = 1;
    for (int i = 0; i + 1 < rank; ++i) n *= dims[i];
    return n;
  }
  std::string text() const;
};

// One extent of an output's shape: a number, or an input's extent over a divisor.
struct Extent {
  int input;  // -1: a number
  int axis;
  int64_t value;
  int divisor;

  static Extent number(int64_t value) { return {-1, 0, value, 1}; }
  static Extent of(int input, int axis, int divisor = 1) { return {input, axis, 0, divisor}; }
};

struct Call {
  const Tensor* in;
  const void* const* x;
  void* const* y;
  void* scratch;  // `scratch_bytes` of device memory that holds anything
  cudaStream_t stream;
};

class Operation {
 public:
  virtual ~Operation() = default;

  virtual const char* name() const = 0;
  virtual std::vector<Binding> fields() = 0;

  // Positions count the inputs, then the outputs.
  virtual int inputs() const = 0;
  virtual int outputs() const = 0;
  virtual bool takes(int input_count) const { return input_count == inputs(); }
  virtual void see(int /*input_count*/) {}  // told before shapes are asked for and before a run, once it is known
  virtual const char* label(int position) const = 0;
  virtual Type type(int position) const = 0;
  virtual std::vector<Extent> shape(int output, const Tensor* in) const = 0;
  virtual Sentence fits(const Tensor* in, int count) const = 0;  // shapes alone; an extent of -1 fits
  virtual int aliased(int /*output*/) const { return -1; }       // input in whose memory this output may lie
  virtual size_t scratch_bytes(const Tensor* /*in*/) const { return 0; }  // for these shapes and all smaller ones

  Sentence read(const std::vector<Field>& values);  // and checks them
  std::vector<Field> write() const;
  Sentence types(const Tensor* in, int count) const;  // a sentence where an input has another type

  Sentence prepare();
  void release();
  bool prepared() const { return prepared_; }
  Sentence clone(std::unique_ptr<Operation>& twin) const;
  Sentence run(const Call& call);

 protected:
  virtual Sentence check() const = 0;  // of the fields
  virtual Sentence load() = 0;         // weights and own memory; facts_ are there
  virtual void unload() = 0;
  virtual Sentence launch(const Call& call) = 0;
  virtual std::unique_ptr<Operation> copy() const = 0;

  fh_device facts_{};

 private:
  bool prepared_ = false;
};

// What operations that read weights have in common.
struct Weights {
  Source source;

  void bind_to(std::vector<Binding>& fields);
  // Checks that the text names a tensor of so many bytes (at least 0 where `optional`); `more`: or of more.
  Sentence check(const char* field, const std::string& text, uint64_t bytes, bool optional = false, bool more = false) const;
  Sentence load(const std::string& text, Weight& weight) const;  // nothing where the text is empty
};

// Compares shapes with what is wanted: extents of `want` are numbers, kAny, or a letter that stands for the same number wherever it comes.
constexpr int64_t kAny = -100;
constexpr int64_t letter(char c) { return -1000 - c; }

class Shapes {
 public:
  Shapes(const Operation& operation, const Tensor* in) : operation_(operation), in_(in) {}
  void want(int input, const std::vector<int64_t>& extents);
  void want_last(int input, int64_t last);  // [.., last]
  Sentence wrong;                           // of the first that differs

 private:
  const Operation& operation_;
  const Tensor* in_;
  int64_t letters_[128] = {};
};

// Cuts scratch memory into arrays; with a base of nullptr it only counts.
class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(size_t count) {
    T* at = base_ ? reinterpret_cast<T*>(base_ + used) : nullptr;
    used += (count * sizeof(T) + 255) / 256 * 256;
    return at;
  }
  size_t used = 0;

 private:
  char* base_;
};

inline fh_dtype element(int bf16) { return bf16 ? FH_BF16 : FH_FP16; }
inline Type activation_type(int bf16) { return bf16 ? Type::bf16 : Type::fp16; }

// The plugins that there are.
struct Made {
  const char* name;
  std::unique_ptr<Operation> (*make)();
};
const std::vector<Made>& operations();

std::unique_ptr<Operation> make_token_embedding();
std::unique_ptr<Operation> make_rms_norm();
std::unique_ptr<Operation> make_w4a16_linear();
std::unique_ptr<Operation> make_gated_product();
std::unique_ptr<Operation> make_decode_attention();
std::unique_ptr<Operation> make_flash_head();

}  // namespace flashhead
