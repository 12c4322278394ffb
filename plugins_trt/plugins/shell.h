// shell.h: TensorRT's types in ours, what both shells share. Compiled against the headers of the TensorRT that the library is for.
#pragma once

#include <NvInferRuntime.h>

#include <vector>

#include "export.h"
#include "log.h"
#include "operation.h"

#if !defined(NV_TENSORRT_MAJOR) || NV_TENSORRT_MAJOR < 8 || NV_TENSORRT_MAJOR == 9
#error "flashhead plugins: expected the headers of TensorRT 8.6, 10 or 11; give the folder that holds NvInferRuntime.h of one of them"
#endif

namespace flashhead {

constexpr const char* kVersion = "1";  // of all plugins, to TensorRT
constexpr const char* kNamespace = "flashhead";

inline Type type_of(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kHALF: return Type::fp16;
    case nvinfer1::DataType::kFLOAT: return Type::fp32;
    case nvinfer1::DataType::kINT32: return Type::int32;
#if NV_TENSORRT_MAJOR >= 10
    case nvinfer1::DataType::kBF16: return Type::bf16;
#endif
    default: return Type::other;
  }
}

// bfloat16 has no name before TensorRT 10: float32 stands for it there, and no input of float32 is taken for it.
inline nvinfer1::DataType type_of(Type type) {
  switch (type) {
    case Type::fp16: return nvinfer1::DataType::kHALF;
    case Type::int32: return nvinfer1::DataType::kINT32;
#if NV_TENSORRT_MAJOR >= 10
    case Type::bf16: return nvinfer1::DataType::kBF16;
#endif
    default: return nvinfer1::DataType::kFLOAT;
  }
}

inline Tensor tensor_of(nvinfer1::DataType type, const nvinfer1::Dims& dims) {
  Tensor t;
  t.type = type_of(type), t.rank = dims.nbDims;
  for (int i = 0; i < dims.nbDims; ++i) t.dims[i] = dims.d[i];
  return t;
}

inline std::vector<Tensor> tensors_of(const nvinfer1::PluginTensorDesc* in, int count) {
  std::vector<Tensor> all;
  for (int i = 0; i < count; ++i) all.push_back(tensor_of(in[i].type, in[i].dims));
  return all;
}

inline std::vector<Tensor> tensors_of(const nvinfer1::DataType* types, int count) {  // of which only the types are known
  std::vector<Tensor> all;
  for (int i = 0; i < count; ++i) all.push_back(tensor_of(types[i], {}));
  return all;
}

inline std::vector<Tensor> largest_of(const nvinfer1::DynamicPluginTensorDesc* in, int count) {
  std::vector<Tensor> all;
  for (int i = 0; i < count; ++i) all.push_back(tensor_of(in[i].desc.type, in[i].max));
  return all;
}

// Fields as TensorRT's parsers and callers give them; a type that no field of ours has becomes a field that fits nowhere.
std::vector<Field> fields_of(const nvinfer1::PluginFieldCollection* collection);

// The names of a plugin's fields and their types, as a parser asks for them.
struct FieldNames {
  explicit FieldNames(Operation& operation);
  std::vector<nvinfer1::PluginField> fields;
  nvinfer1::PluginFieldCollection collection;
};

// Output `output` of an operation in TensorRT's expressions. False where it cannot be said, which is logged.
bool shape_of(Operation& operation, int output, const nvinfer1::DimsExprs* inputs, int count, nvinfer1::IExprBuilder& builder, nvinfer1::DimsExprs& shape);

// Runs body; what it throws, which can only be that the host's memory is full, becomes `otherwise`.
template <class Body, class Result>
Result guarded(const char* who, Result otherwise, Body body) noexcept {
  try {
    return body();
  } catch (...) {
    try {
      fine(who, "an allocation on the host failed; free memory");
    } catch (...) {
    }
    return otherwise;
  }
}

}  // namespace flashhead
