#include "shell.h"

#include <cstring>

using namespace nvinfer1;

namespace flashhead {
namespace {

template <class T, class V>
void copy(const PluginField& from, std::vector<V>& to) {
  const T* values = static_cast<const T*>(from.data);
  for (int i = 0; i < from.length; ++i) to.push_back(V(values[i]));
}

ILoggerFinder* finder = nullptr;

void to_tensorrt(Severity severity, const char* text) {
  ILogger* logger = finder ? finder->findLogger() : nullptr;
  if (logger) logger->log(severity == Severity::error ? ILogger::Severity::kERROR : ILogger::Severity::kWARNING, text);
}

PluginFieldType type_of(Kind kind) {
  return kind == Kind::whole ? PluginFieldType::kINT32 : kind == Kind::real ? PluginFieldType::kFLOAT32 : PluginFieldType::kCHAR;
}

}  // namespace

std::vector<Field> fields_of(const PluginFieldCollection* collection) {
  std::vector<Field> all;
  for (int i = 0; collection && i < collection->nbFields; ++i) {
    const PluginField& from = collection->fields[i];
    if (!from.name) continue;
    Field f;
    f.name = from.name;
    if (!from.data && from.length) continue;  // only announced, as getFieldNames does it
    switch (from.type) {
      case PluginFieldType::kINT8: copy<int8_t>(from, f.whole); break;
      case PluginFieldType::kINT16: copy<int16_t>(from, f.whole); break;
      case PluginFieldType::kINT32: copy<int32_t>(from, f.whole); break;
#if NV_TENSORRT_MAJOR >= 10
      case PluginFieldType::kINT64: copy<int64_t>(from, f.whole); break;
#endif
      case PluginFieldType::kFLOAT32: f.kind = Kind::real, copy<float>(from, f.real); break;
      case PluginFieldType::kFLOAT64: f.kind = Kind::real, copy<double>(from, f.real); break;
      case PluginFieldType::kCHAR:
      case PluginFieldType::kUNKNOWN:
        f.kind = Kind::text;
        if (from.length > 0) f.text.assign(static_cast<const char*>(from.data), size_t(from.length));
        f.text.resize(strnlen(f.text.data(), f.text.size()));  // some callers count the zero at the end
        break;
      default: f.kind = Kind::text, f.text = "a type that no field has"; break;
    }
    all.push_back(std::move(f));
  }
  return all;
}

FieldNames::FieldNames(Operation& operation) {
  for (const Binding& b : operation.fields()) fields.emplace_back(b.name, nullptr, type_of(b.kind), 1);
  collection.nbFields = int32_t(fields.size());
  collection.fields = fields.data();
}

bool shape_of(Operation& operation, int output, const DimsExprs* inputs, int count, IExprBuilder& builder, DimsExprs& shape) {
  std::vector<Tensor> in;
  for (int i = 0; i < count; ++i) {
    Tensor t;
    t.rank = inputs[i].nbDims;
    for (int k = 0; k < t.rank; ++k) t.dims[k] = inputs[i].d[k]->isConstant() ? inputs[i].d[k]->getConstantValue() : -1;
    in.push_back(t);
  }
  operation.see(count);
  if (!operation.takes(count)) return fine(operation.name(), operation.types(in.data(), count));
  if (!fine(operation.name(), operation.fits(in.data(), count))) return false;
  const std::vector<Extent> extents = operation.shape(output, in.data());
  shape.nbDims = int32_t(extents.size());
  for (size_t i = 0; i < extents.size(); ++i) {
    const Extent& e = extents[i];
    const IDimensionExpr* d = e.input < 0 ? builder.constant(int32_t(e.value)) : inputs[e.input].d[e.axis];
    shape.d[i] = e.divisor == 1 ? d : builder.operation(DimensionOperation::kFLOOR_DIV, *d, *builder.constant(e.divisor));
  }
  return true;
}

}  // namespace flashhead

FLASHHEAD_EXPORT void setLoggerFinder(ILoggerFinder* given) {
  flashhead::finder = given;
  flashhead::set_sink(flashhead::to_tensorrt);
}
