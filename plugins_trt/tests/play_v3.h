// play_v3.h: the part of TensorRT 10 and later that a V3 plugin meets, played by hand: a builder and a runtime for one node.
//
// What TensorRT itself would do beyond this (choose formats, plan memory, insert copies) is not played.
#pragma once

#include <NvInferRuntime.h>
#include <NvInferRuntimePlugin.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace play {

using namespace nvinfer1;

inline int failures = 0;

#define WANT(condition, ...)                                              \
  do {                                                                    \
    if (!(condition)) {                                                   \
      ++play::failures;                                                   \
      printf("  FAILED %s:%d: %s: ", __FILE__, __LINE__, #condition);     \
      printf(__VA_ARGS__);                                                \
      printf("\n");                                                       \
    }                                                                     \
  } while (0)

inline void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  printf("%s: %s\n", what, cudaGetErrorString(error));
  exit(2);
}

struct Logger : ILogger {
  std::string last;
  void log(Severity severity, const char* text) noexcept override {
    if (severity <= Severity::kWARNING) last = text;
  }
};

struct Finder : ILoggerFinder {
  Logger* logger;
  explicit Finder(Logger* l) : logger(l) {}
  ILogger* findLogger() override { return logger; }
};

// Expressions of extents: a number, or a name with the value that it will have.
struct Expression : IDimensionExpr, apiv::VDimensionExpr {
  bool known;
  int64_t value;
  Expression(bool k, int64_t v) : known(k), value(v) { IDimensionExpr::mImpl = this; }
  bool isConstant() const override { return known; }
  int64_t getConstantValue() const override { return known ? value : -1; }
  bool isSizeTensor() const override { return false; }
};

struct Expressions : IExprBuilder, apiv::VExprBuilder {
  std::vector<std::unique_ptr<Expression>> made;
  Expressions() { IExprBuilder::mImpl = this; }
  Expression* make(bool known, int64_t value) {
    made.push_back(std::make_unique<Expression>(known, value));
    return made.back().get();
  }
  const IDimensionExpr* constant(int64_t value) override { return make(true, value); }
  const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& a, const IDimensionExpr& b) override {
    const auto& x = static_cast<const Expression&>(a);
    const auto& y = static_cast<const Expression&>(b);
    const bool known = x.known && y.known;
    switch (op) {
      case DimensionOperation::kSUM: return make(known, x.value + y.value);
      case DimensionOperation::kPROD: return make(known, x.value * y.value);
      case DimensionOperation::kFLOOR_DIV: return make(known, x.value / y.value);
      default: return nullptr;
    }
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override { return nullptr; }
};

// The library under test, loaded by hand, or by a runtime's registry where one is given (TensorRT's lean runtime).
struct Library {
  void* handle = nullptr;
  Logger logger;
  Finder finder{&logger};
  std::vector<IPluginCreatorV3One*> creators;
  IPluginRegistry* registry = nullptr;

  template <class F>
  F symbol(const char* name) {
    void* found = dlsym(handle, name);
    if (!found) printf("%s: %s\n", name, dlerror()), exit(2);
    return reinterpret_cast<F>(found);
  }
  const char* last_error() { return symbol<const char* (*)()>("flashhead_last_error")(); }
  long long device_bytes() { return symbol<long long (*)()>("flashhead_device_bytes")(); }

  void open(const char* path, const char* runtime) {
    if (runtime) {
      void* lean = dlopen(runtime, RTLD_NOW | RTLD_GLOBAL);
      if (!lean) printf("%s\n", dlerror()), exit(2);
      const auto version = reinterpret_cast<int (*)()>(dlsym(lean, "getInferLibVersion"))();
      auto make = reinterpret_cast<void* (*)(void*, int)>(dlsym(lean, "createInferRuntime_INTERNAL"));
      registry = &static_cast<IRuntime*>(make(&logger, version))->getPluginRegistry();
      printf("runtime %d\n", version);
      if (!registry->loadLibrary(path)) printf("the registry refuses %s\n", path), exit(2);
    }
    handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) printf("%s\n", dlerror()), exit(2);
    printf("%s\n", symbol<const char* (*)()>("flashhead_plugin_version")());
    if (!runtime) symbol<void (*)(ILoggerFinder*)>("setLoggerFinder")(&finder);
    int32_t count = 0;
    auto* const* list = symbol<IPluginCreatorInterface* const* (*)(int32_t&)>("getCreators")(count);
    for (int i = 0; i < count; ++i) {
      auto* creator = static_cast<IPluginCreatorV3One*>(list[i]);
      if (registry) creator = static_cast<IPluginCreatorV3One*>(registry->getCreator(creator->getPluginName(), "1", "flashhead"));
      WANT(creator, "creator %d is not in the registry", i);
      if (creator) creators.push_back(creator);
    }
  }
  IPluginCreatorV3One* creator(const char* name) {
    for (auto* c : creators) {
      if (!strcmp(c->getPluginName(), name)) return c;
    }
    printf("there is no creator %s\n", name);
    exit(2);
  }
};

// Fields as a parser would hand them over.
class Fields {
 public:
  Fields& add(const char* name, int value) { return add(name, std::vector<int>{value}); }
  Fields& add(const char* name, const std::vector<int>& values) {
    return keep(name, PluginFieldType::kINT32, values.data(), values.size() * 4, values.size());
  }
  Fields& add(const char* name, float value) { return keep(name, PluginFieldType::kFLOAT32, &value, 4, 1); }
  Fields& add(const char* name, const std::string& text) { return keep(name, PluginFieldType::kCHAR, text.data(), text.size(), text.size()); }
  void take(const PluginFieldCollection* from) {  // a deep copy: an engine holds bytes, not pointers
    static const int kSize[] = {2, 4, 8, 1, 2, 4, 1, 0, 1, 2, 8};
    for (int i = 0; i < from->nbFields; ++i) {
      const PluginField& f = from->fields[i];
      keep(f.name, f.type, f.data, size_t(f.length) * size_t(kSize[int(f.type)]), size_t(f.length));
    }
  }
  PluginFieldCollection* collection() {
    fields_.clear();
    for (const Kept& k : kept_) fields_.emplace_back(k.name.c_str(), k.bytes.data(), k.type, int32_t(k.length));
    all_ = {int32_t(fields_.size()), fields_.data()};
    return &all_;
  }

 private:
  struct Kept {
    std::string name;
    PluginFieldType type;
    std::vector<char> bytes;
    size_t length;
  };
  Fields& keep(const char* name, PluginFieldType type, const void* data, size_t bytes, size_t length) {
    const char* at = static_cast<const char*>(data);
    kept_.push_back({name, type, std::vector<char>(at, at + bytes), length});
    return *this;
  }
  std::vector<Kept> kept_;
  std::vector<PluginField> fields_;
  PluginFieldCollection all_{};
};

inline size_t bytes_of(DataType type) { return type == DataType::kHALF || type == DataType::kBF16 ? 2 : 4; }

struct Array {
  DataType type;
  std::vector<int64_t> shape;
  std::vector<char> bytes;
  int alias = -1;       // of an output: it lies in the memory of this input
  bool ordered = true;  // of an output: every run gives the same bytes

  Array(DataType t, std::vector<int64_t> s) : type(t), shape(std::move(s)), bytes(size_t(count()) * bytes_of(t)) {}
  int64_t count() const {
    int64_t n = 1;
    for (const int64_t d : shape) n *= d;
    return n;
  }
  template <class T>
  T* as() { return reinterpret_cast<T*>(bytes.data()); }
  Dims dims() const {
    Dims d{};
    d.nbDims = int(shape.size());
    for (size_t i = 0; i < shape.size(); ++i) d.d[i] = shape[i];
    return d;
  }
};

struct Node {
  const char* name;
  Fields fields;
  std::vector<Array> in, out;  // out: types and shapes that are expected; filled by `run`
};

inline PluginTensorDesc desc_of(const Array& a) {
  PluginTensorDesc d{};
  d.dims = a.dims(), d.type = a.type, d.format = TensorFormat::kLINEAR;
  return d;
}

inline std::vector<PluginTensorDesc> descs_of(const std::vector<Array>& arrays) {
  std::vector<PluginTensorDesc> all;
  for (const Array& a : arrays) all.push_back(desc_of(a));
  return all;
}

// Plays the builder: everything it asks is answered right. Gives the fields that the engine would hold, and the scratch memory.
inline Fields build(Library& library, Node& node, size_t& scratch) {
  Fields stored;
  IPluginCreatorV3One* creator = library.creator(node.name);
  std::unique_ptr<IPluginV3> first(creator->createPlugin("node", node.fields.collection(), TensorRTPhase::kBUILD));
  WANT(first, "%s: %s", node.name, library.last_error());
  if (!first) return stored;
  std::unique_ptr<IPluginV3> plugin(first->clone());
  first.reset();
  auto* core = static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
  auto* build = static_cast<IPluginV3OneBuildV2*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
  auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  WANT(core && build && runtime, "a capability is missing");
  WANT(!strcmp(core->getPluginName(), node.name) && !strcmp(core->getPluginVersion(), "1") && !strcmp(core->getPluginNamespace(), "flashhead"), "core");
  WANT(!strcmp(build->getInterfaceInfo().kind, "PLUGIN_V3ONE_BUILD") && build->getInterfaceInfo().major == 2, "build interface");
  const int inputs = int(node.in.size()), outputs = int(node.out.size());
  WANT(build->getNbOutputs() >= outputs, "%d outputs, expected %d", build->getNbOutputs(), outputs);
  for (int i = 0; i < outputs; ++i) WANT(build->getAliasedInput(i) == node.out[size_t(i)].alias || node.out[size_t(i)].alias < 0, "alias of output %d", i);

  std::vector<DataType> types, found(size_t(build->getNbOutputs()));
  for (const Array& a : node.in) types.push_back(a.type);
  WANT(build->getOutputDataTypes(found.data(), int(found.size()), types.data(), inputs) == 0, "%s", library.last_error());
  for (int i = 0; i < outputs; ++i) WANT(found[size_t(i)] == node.out[size_t(i)].type, "type of output %d is %d", i, int(found[size_t(i)]));
  for (int i = 0; i < inputs; ++i) {
    auto wrong = types;
    wrong[size_t(i)] = DataType::kINT8;
    library.logger.last.clear();
    WANT(build->getOutputDataTypes(found.data(), int(found.size()), wrong.data(), inputs) != 0, "input %d of int8 is taken", i);
    WANT(strstr(library.last_error(), "expected") != nullptr, "no sentence: %s", library.last_error());
    if (!library.registry) WANT(library.logger.last == library.last_error(), "logged: %s", library.logger.last.c_str());
  }

  Expressions expressions;
  std::vector<DimsExprs> shapes(static_cast<size_t>(inputs)), results(found.size());
  for (int i = 0; i < inputs; ++i) {
    const Array& a = node.in[size_t(i)];
    shapes[size_t(i)].nbDims = int(a.shape.size());
    // what may differ from step to step is not known at build: the first extents, but for the last one of a matrix of a node's own width
    for (size_t k = 0; k < a.shape.size(); ++k) shapes[size_t(i)].d[k] = expressions.make(k >= 2 || (k == 1 && a.shape.size() == 2), a.shape[k]);
  }
  WANT(build->getOutputShapes(shapes.data(), inputs, nullptr, 0, results.data(), int(results.size()), expressions) == 0, "%s", library.last_error());
  for (int i = 0; i < outputs; ++i) {
    const Array& want = node.out[size_t(i)];
    bool same = results[size_t(i)].nbDims == int(want.shape.size());
    for (size_t k = 0; same && k < want.shape.size(); ++k) same = static_cast<const Expression*>(results[size_t(i)].d[k])->value == want.shape[k];
    WANT(same, "shape of output %d", i);
  }

  std::vector<DynamicPluginTensorDesc> all;
  for (const auto* side : {&node.in, &node.out}) {
    for (const Array& a : *side) {
      DynamicPluginTensorDesc d{};
      d.desc = desc_of(a), d.min = d.max = d.opt = a.dims();
      all.push_back(d);
    }
  }
  for (size_t i = 0; i < all.size(); ++i) {
    auto asked = all;
    WANT(build->supportsFormatCombination(int(i), asked.data(), inputs, outputs), "format of tensor %zu", i);
    asked[i].desc.format = TensorFormat::kCHW32;
    WANT(!build->supportsFormatCombination(int(i), asked.data(), inputs, outputs), "another format of tensor %zu", i);
    asked[i].desc.format = TensorFormat::kLINEAR, asked[i].desc.type = DataType::kINT8;
    WANT(!build->supportsFormatCombination(int(i), asked.data(), inputs, outputs), "int8 of tensor %zu", i);
  }
  WANT(build->configurePlugin(all.data(), inputs, all.data() + inputs, outputs) == 0, "%s", library.last_error());
  scratch = build->getWorkspaceSize(all.data(), inputs, all.data() + inputs, outputs);
  stored.take(runtime->getFieldsToSerialize());
  return stored;
}

// Device memory for one execution context.
struct Memory {
  std::vector<void*> in, out;
  void* scratch = nullptr;
  std::vector<bool> owned;

  Memory(Node& node, size_t bytes, bool in_place) {
    for (Array& a : node.in) {
      void* p;
      must(cudaMalloc(&p, a.bytes.size() + 16), "cudaMalloc");
      must(cudaMemcpy(p, a.bytes.data(), a.bytes.size(), cudaMemcpyHostToDevice), "copy");
      in.push_back(p);
    }
    for (Array& a : node.out) {
      void* p;
      const bool shared = in_place && a.alias >= 0;
      if (shared) {
        p = in[size_t(a.alias)];
      } else {
        must(cudaMalloc(&p, a.bytes.size() + 16), "cudaMalloc");
        must(cudaMemset(p, 0xff, a.bytes.size()), "fill");
      }
      out.push_back(p), owned.push_back(!shared);
    }
    must(cudaMalloc(&scratch, bytes + 16), "cudaMalloc");
    must(cudaMemset(scratch, 0xa5, bytes + 16), "fill");  // TensorRT's scratch memory holds anything
  }
  ~Memory() {
    for (void* p : in) cudaFree(p);
    for (size_t i = 0; i < out.size(); ++i) owned[i] ? void(cudaFree(out[i])) : void();
    cudaFree(scratch);
  }
};

// Plays the runtime: an instance from the stored fields, two execution contexts of it, each captured in a CUDA graph of its own and replayed `times`
// times on its own stream, side by side. The outputs of both must be equal where they are ordered; the first one's are left in the node.
inline bool run(Library& library, Node& node, Fields stored, size_t scratch, bool in_place = true, int times = 3) {
  std::unique_ptr<IPluginV3> engine(library.creator(node.name)->createPlugin("node", stored.collection(), TensorRTPhase::kRUNTIME));
  WANT(engine, "%s: %s", node.name, library.last_error());
  if (!engine) return false;
  auto* of_engine = static_cast<IPluginV3OneRuntime*>(engine->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  const auto in = descs_of(node.in), out = descs_of(node.out);
  std::vector<std::vector<char>> results[2];
  std::unique_ptr<IPluginV3> contexts[2];
  std::unique_ptr<Memory> memory[2];
  cudaStream_t streams[2];
  cudaGraphExec_t graphs[2];
  for (int k = 0; k < 2; ++k) {
    contexts[k].reset(of_engine->attachToContext(nullptr));
    WANT(contexts[k], "%s: %s", node.name, library.last_error());
    if (!contexts[k]) return false;
    auto* runtime = static_cast<IPluginV3OneRuntime*>(contexts[k]->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    WANT(runtime->onShapeChange(in.data(), int(in.size()), out.data(), int(out.size())) == 0, "%s", library.last_error());
    memory[k] = std::make_unique<Memory>(node, scratch, in_place);
    must(cudaStreamCreateWithFlags(&streams[k], cudaStreamNonBlocking), "stream");
    must(cudaDeviceSynchronize(), "before the capture");
    cudaGraph_t graph;
    must(cudaStreamBeginCapture(streams[k], cudaStreamCaptureModeThreadLocal), "capture");
    const int refused = runtime->enqueue(in.data(), out.data(), memory[k]->in.data(), memory[k]->out.data(), memory[k]->scratch, streams[k]);
    WANT(refused == 0, "%s: %s", node.name, library.last_error());
    must(cudaStreamEndCapture(streams[k], &graph), "end of the capture");
    if (refused) return false;
    must(cudaGraphInstantiate(&graphs[k], graph, 0), "graph");
    cudaGraphDestroy(graph);
  }
  engine.reset();  // contexts hold what they need
  for (int i = 0; i < times; ++i) {
    for (int k = 0; k < 2; ++k) must(cudaGraphLaunch(graphs[k], streams[k]), "launch");
  }
  for (int k = 0; k < 2; ++k) {
    must(cudaStreamSynchronize(streams[k]), node.name);
    for (size_t i = 0; i < node.out.size(); ++i) {
      results[k].emplace_back(node.out[i].bytes.size());
      must(cudaMemcpy(results[k][i].data(), memory[k]->out[i], results[k][i].size(), cudaMemcpyDeviceToHost), "copy");
    }
    cudaGraphExecDestroy(graphs[k]);
    cudaStreamDestroy(streams[k]);
  }
  for (size_t i = 0; i < node.out.size(); ++i) {
    WANT(!node.out[i].ordered || results[0][i] == results[1][i], "%s: output %zu differs between two contexts", node.name, i);
    node.out[i].bytes = results[0][i];
  }
  return true;
}

}  // namespace play
