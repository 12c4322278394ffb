// shell_v3.cpp: the plugins for TensorRT 10 and 11 (JetPack 6.1 and later), as IPluginV3.
//
// What TensorRT does with an instance: at build it creates and clones it, asks for types and shapes, configures it and, where it times it, tells it the
// shapes and runs it; it stores what getFieldsToSerialize gives and makes an instance of that at run time, which attachToContext clones for each execution
// context. So an instance is made ready by attachToContext, or, where nothing was attached, by onShapeChange; building alone puts no weights on the device.
#include "shell.h"

#if NV_TENSORRT_MAJOR >= 10

#include <NvInferRuntimePlugin.h>

#include <new>

using namespace nvinfer1;

// Outputs in the memory of an input: since 10.3.
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 3
#define FLASHHEAD_ALIASES 1
#else
#define FLASHHEAD_ALIASES 0
#endif

namespace flashhead {
namespace {

#if FLASHHEAD_ALIASES
using Build = IPluginV3OneBuildV2;
#else
using Build = IPluginV3OneBuild;
#endif

// An instance's fields in TensorRT's form, with the memory that they point to.
struct Stored {
  std::vector<Field> values;
  std::vector<PluginField> fields;
  PluginFieldCollection collection{};

  void fill(const Operation& operation) {
    values = operation.write();
    Field format;
    format.name = "format", format.whole = {kFormat};
    values.push_back(format);
    fields.clear();
    for (const Field& f : values) {
      if (f.kind == Kind::whole) {
        fields.emplace_back(f.name.c_str(), f.whole.data(), PluginFieldType::kINT32, int32_t(f.whole.size()));
      } else if (f.kind == Kind::real) {
        fields.emplace_back(f.name.c_str(), f.real.data(), PluginFieldType::kFLOAT32, int32_t(f.real.size()));
      } else {
        fields.emplace_back(f.name.c_str(), f.text.c_str(), PluginFieldType::kCHAR, int32_t(f.text.size() + 1));  // with its zero: no field is empty
      }
    }
    collection = {int32_t(fields.size()), fields.data()};
  }
};

class PluginV3 final : public IPluginV3, public IPluginV3OneCore, public Build, public IPluginV3OneRuntime {
 public:
  explicit PluginV3(std::unique_ptr<Operation> operation) : operation_(std::move(operation)) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD: return static_cast<Build*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  IPluginV3* clone() noexcept override { return twin(false); }
  const char* getPluginName() const noexcept override { return name(); }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return operation_->outputs(); }
  int32_t getOutputDataTypes(DataType* types, int32_t outputs, const DataType* input_types, int32_t inputs) const noexcept override {
    return guarded(name(), 1, [&] {
      operation_->see(inputs);
      if (!fine(name(), operation_->types(tensors_of(input_types, inputs).data(), inputs))) return 1;
      for (int i = 0; i < outputs; ++i) types[i] = type_of(operation_->type(inputs + i));
      return 0;
    });
  }
  int32_t getOutputShapes(const DimsExprs* inputs, int32_t count, const DimsExprs*, int32_t, DimsExprs* shapes, int32_t outputs,
                          IExprBuilder& builder) noexcept override {
    return guarded(name(), 1, [&] {
      for (int i = 0; i < outputs; ++i) {
        if (!shape_of(*operation_, i, inputs, count, builder, shapes[i])) return 1;
      }
      return 0;
    });
  }
  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* all, int32_t inputs, int32_t) noexcept override {
    operation_->see(inputs);
    const PluginTensorDesc& t = all[position].desc;
    return t.format == TensorFormat::kLINEAR && type_of(t.type) == operation_->type(position);
  }
  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*, int32_t) noexcept override {
    return guarded(name(), 1, [&] { return suits(largest_of(in, inputs)) ? 0 : 1; });
  }
  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*, int32_t) const noexcept override {
    return guarded(name(), size_t(0), [&] { return operation_->scratch_bytes(largest_of(in, inputs).data()); });
  }
#if FLASHHEAD_ALIASES
  int32_t getAliasedInput(int32_t output) noexcept override { return operation_->aliased(output); }
#endif

  int32_t onShapeChange(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc*, int32_t) noexcept override {
    return guarded(name(), 1, [&] { return suits(tensors_of(in, inputs)) && fine(name(), operation_->prepare()) ? 0 : 1; });
  }
  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* x, void* const* y, void* scratch,
                  cudaStream_t stream) noexcept override {
    return guarded(name(), 1, [&] {
      const std::vector<Tensor> tensors = tensors_of(in, operation_->inputs());
      return fine(name(), operation_->run({tensors.data(), x, y, scratch, stream})) ? 0 : 1;
    });
  }
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return twin(true); }
  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    return guarded(name(), static_cast<const PluginFieldCollection*>(nullptr), [&]() -> const PluginFieldCollection* {
      stored_.fill(*operation_);
      return &stored_.collection;
    });
  }

 private:
  const char* name() const { return operation_->name(); }

  bool suits(const std::vector<Tensor>& in) {
    const int count = int(in.size());
    operation_->see(count);
    return fine(name(), operation_->types(in.data(), count)) && fine(name(), operation_->fits(in.data(), count));
  }
  PluginV3* twin(bool ready) noexcept {
    return guarded(name(), static_cast<PluginV3*>(nullptr), [&]() -> PluginV3* {
      std::unique_ptr<Operation> other;
      Sentence wrong = operation_->clone(other);
      if (wrong.empty() && ready) wrong = other->prepare();
      return fine(name(), wrong) ? new PluginV3(std::move(other)) : nullptr;
    });
  }

  std::unique_ptr<Operation> operation_;
  Stored stored_;
};

class CreatorV3 final : public IPluginCreatorV3One {
 public:
  explicit CreatorV3(const Made& made) : made_(made), blank_(made.make()), names_(*blank_) {}

  const char* getPluginName() const noexcept override { return made_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  const PluginFieldCollection* getFieldNames() noexcept override { return &names_.collection; }
  IPluginV3* createPlugin(const char*, const PluginFieldCollection* fields, TensorRTPhase) noexcept override {
    return guarded(made_.name, static_cast<IPluginV3*>(nullptr), [&]() -> IPluginV3* {
      std::unique_ptr<Operation> operation = made_.make();
      return fine(made_.name, operation->read(fields_of(fields))) ? new PluginV3(std::move(operation)) : nullptr;
    });
  }

 private:
  const Made& made_;
  std::unique_ptr<Operation> blank_;
  FieldNames names_;
};

}  // namespace
}  // namespace flashhead

FLASHHEAD_EXPORT IPluginCreatorInterface* const* getCreators(int32_t& count) {
  // Never destroyed: the registry keeps them to the end of the process.
  static const auto* list = [] {
    auto* made = new std::vector<IPluginCreatorInterface*>;
    for (const flashhead::Made& m : flashhead::operations()) made->push_back(new flashhead::CreatorV3(m));
    return made;
  }();
  count = int32_t(list->size());
  return list->data();
}

#endif
