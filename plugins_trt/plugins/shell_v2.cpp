// shell_v2.cpp: the plugins for TensorRT 8.6 (JetPack 6.0), as IPluginV2DynamicExt.
//
// What TensorRT does with an instance: at build it clones, asks for shapes and types, configures, initialises and times it; from an engine it makes one by
// deserializePlugin and initialises it; for an execution context it clones that one, which must then be ready, and attaches it. All of them share their
// weights on the device; own memory is each one's. `terminate` and `destroy` give back what is held, in any order.
#include "shell.h"

#if NV_TENSORRT_MAJOR == 8

#include <cstring>
#include <new>

#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // of IPluginV2, which 8.6 has nothing better for

using namespace nvinfer1;

namespace flashhead {
namespace {

class PluginV2 final : public IPluginV2DynamicExt {
 public:
  explicit PluginV2(std::unique_ptr<Operation> operation) : operation_(std::move(operation)) {}

  IPluginV2DynamicExt* clone() const noexcept override {
    return guarded(name(), static_cast<PluginV2*>(nullptr), [&]() -> PluginV2* {
      std::unique_ptr<Operation> twin;
      if (!fine(name(), operation_->clone(twin))) return nullptr;
      auto* made = new PluginV2(std::move(twin));
      made->wrong_ = wrong_, made->namespace_ = namespace_;
      return made;
    });
  }
  DimsExprs getOutputDimensions(int32_t output, const DimsExprs* inputs, int32_t count, IExprBuilder& builder) noexcept override {
    DimsExprs none{};
    none.nbDims = -1;
    return guarded(name(), none, [&] {
      DimsExprs shape{};
      return shape_of(*operation_, output, inputs, count, builder, shape) ? shape : none;
    });
  }
  bool supportsFormatCombination(int32_t position, const PluginTensorDesc* all, int32_t inputs, int32_t) noexcept override {
    operation_->see(inputs);
    const PluginTensorDesc& t = all[position];
    return t.format == TensorFormat::kLINEAR && type_of(t.type) == operation_->type(position);
  }
  void configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*, int32_t) noexcept override {
    wrong_ = guarded(name(), true, [&] {
      operation_->see(inputs);
      const std::vector<Tensor> largest = largest_of(in, inputs);
      return !fine(name(), operation_->types(largest.data(), inputs)) || !fine(name(), operation_->fits(largest.data(), inputs));
    });
  }
  size_t getWorkspaceSize(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc*, int32_t) const noexcept override {
    return guarded(name(), size_t(0), [&] { return operation_->scratch_bytes(tensors_of(in, inputs).data()); });
  }
  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* x, void* const* y, void* scratch,
                  cudaStream_t stream) noexcept override {
    return guarded(name(), 1, [&] {
      const std::vector<Tensor> tensors = tensors_of(in, operation_->inputs());
      return fine(name(), operation_->run({tensors.data(), x, y, scratch, stream})) ? 0 : 1;
    });
  }

  DataType getOutputDataType(int32_t output, const DataType* types, int32_t inputs) const noexcept override {
    // The sentence for what TensorRT itself only calls "no supported formats"; it may still convert, so it is no error yet.
    guarded(name(), false, [&] {
      operation_->see(inputs);
      return output != 0 || fine(name(), operation_->types(tensors_of(types, inputs).data(), inputs), Severity::warning);
    });
    return type_of(operation_->type(inputs + output));
  }
  void attachToContext(cudnnContext*, cublasContext*, IGpuAllocator*) noexcept override {
    guarded(name(), false, [&] { return fine(name(), operation_->prepare()); });  // what failed fails again, aloud, when it is run
  }

  int32_t initialize() noexcept override {
    return guarded(name(), 1, [&] { return !wrong_ && fine(name(), operation_->prepare()) ? 0 : 1; });
  }
  void terminate() noexcept override { operation_->release(); }
  void destroy() noexcept override { delete this; }

  size_t getSerializationSize() const noexcept override {
    return guarded(name(), size_t(0), [&] { return to_bytes(operation_->write()).size(); });
  }
  void serialize(void* buffer) const noexcept override {
    guarded(name(), false, [&] {
      const std::string bytes = to_bytes(operation_->write());
      memcpy(buffer, bytes.data(), bytes.size());
      return true;
    });
  }

  int32_t getNbOutputs() const noexcept override { return operation_->outputs(); }
  const char* getPluginType() const noexcept override { return name(); }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  void setPluginNamespace(const char* space) noexcept override {
    guarded(name(), false, [&] { return namespace_ = space ? space : "", true; });
  }
  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

 private:
  const char* name() const { return operation_->name(); }

  std::unique_ptr<Operation> operation_;
  bool wrong_ = false;  // what it was configured for; TensorRT asks no answer there, so initialize gives it
  std::string namespace_ = kNamespace;
};

class CreatorV2 final : public IPluginCreator {
 public:
  explicit CreatorV2(const Made& made) : made_(made), blank_(made.make()), names_(*blank_) {}

  const char* getPluginName() const noexcept override { return made_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const PluginFieldCollection* getFieldNames() noexcept override { return &names_.collection; }
  IPluginV2* createPlugin(const char*, const PluginFieldCollection* fields) noexcept override {
    return guarded(made_.name, static_cast<IPluginV2*>(nullptr), [&] { return make(fields_of(fields)); });
  }
  IPluginV2* deserializePlugin(const char*, const void* data, size_t size) noexcept override {
    return guarded(made_.name, static_cast<IPluginV2*>(nullptr), [&]() -> IPluginV2* {
      std::vector<Field> fields;
      return fine(made_.name, from_bytes(data, size, fields)) ? make(fields) : nullptr;
    });
  }
  void setPluginNamespace(const char* space) noexcept override {
    guarded(made_.name, false, [&] { return namespace_ = space ? space : "", true; });
  }
  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

 private:
  IPluginV2* make(const std::vector<Field>& fields) const {
    std::unique_ptr<Operation> operation = made_.make();
    Sentence wrong = operation->read(fields);
    if (wrong.empty() && operation->type(operation->inputs()) == Type::bf16) {
      wrong = "bfloat16 is asked for, expected float16 under TensorRT 8; export again with --precision float16";
    }
    if (!fine(made_.name, wrong)) return nullptr;
    auto* plugin = new PluginV2(std::move(operation));
    plugin->setPluginNamespace(namespace_.c_str());
    return plugin;
  }

  const Made& made_;
  std::unique_ptr<Operation> blank_;
  FieldNames names_;
  std::string namespace_ = kNamespace;
};

}  // namespace
}  // namespace flashhead

FLASHHEAD_EXPORT IPluginCreator* const* getPluginCreators(int32_t& count) {
  // Never destroyed: the registry keeps them to the end of the process.
  static const auto* list = [] {
    auto* made = new std::vector<IPluginCreator*>;
    for (const flashhead::Made& m : flashhead::operations()) made->push_back(new flashhead::CreatorV2(m));
    return made;
  }();
  count = int32_t(list->size());
  return list->data();
}

#endif
