// FlashHead in a TensorRT network of your own, in C++: here behind one product, in a decoder behind its last norm.
//
//   g++ -std=c++17 examples/tensorrt_head.cpp -ITENSORRT/include -I/usr/local/cuda/include -lnvinfer -lnvonnxparser -ldl -o tensorrt_head
//   ./tensorrt_head OUT LIBRARY WIDTH        OUT: a folder of `flashhead export tensorrt`; WIDTH: its hidden size
//
// The ONNX parser makes the plugin from OUT/head.onnx; its input is then our own tensor. What follows `own` is all that a network needs.
#include <NvInfer.h>
#include <NvOnnxParser.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

class Logger : public ILogger {
  void log(Severity severity, const char* text) noexcept override {
    if (severity <= Severity::kWARNING) fprintf(stderr, "%s\n", text);
  }
} logger;

static bool own(INetworkDefinition& network, const std::string& folder, int width) {
  auto parser = std::unique_ptr<nvonnxparser::IParser>(nvonnxparser::createParser(network, logger));
  if (!parser->parseFromFile((folder + "/head.onnx").c_str(), int(ILogger::Severity::kWARNING))) return false;
  static std::vector<std::uint16_t> identity(size_t(width) * width);  // float16: 0x3c00 is 1
  for (int i = 0; i < width; ++i) identity[size_t(i) * (width + 1)] = 0x3c00;
  ITensor* x = network.addInput("x", DataType::kHALF, Dims2{1, width});
  ITensor* matrix = network.addConstant(Dims2{width, width}, Weights{DataType::kHALF, identity.data(), int64_t(identity.size())})->getOutput(0);
  ITensor* hidden = network.addMatrixMultiply(*x, MatrixOperation::kNONE, *matrix, MatrixOperation::kNONE)->getOutput(0);
  for (int i = 0; i < network.getNbLayers(); ++i) {
    ILayer* layer = network.getLayer(i);
    if (layer->getType() != LayerType::kPLUGIN_V2 && std::string(layer->getName()).find("FlashHead") == std::string::npos) continue;
    ITensor* old = layer->getInput(0);
    layer->setInput(0, *hidden);
    network.removeTensor(*old);
    return true;
  }
  return false;
}

int main(int count, char** arguments) {
  if (count != 4) return fprintf(stderr, "usage: tensorrt_head OUT LIBRARY WIDTH\n"), 2;
  if (!getPluginRegistry()->loadLibrary(arguments[2])) return fprintf(stderr, "%s does not load\n", arguments[2]), 1;
  auto add = reinterpret_cast<const char* (*)(const char*)>(dlsym(dlopen(arguments[2], RTLD_NOW), "flashhead_add_folder"));
  if (const char* wrong = add(arguments[1])) return fprintf(stderr, "%s\n", wrong), 1;
  auto builder = std::unique_ptr<IBuilder>(createInferBuilder(logger));
#if NV_TENSORRT_MAJOR >= 10
  auto network = std::unique_ptr<INetworkDefinition>(builder->createNetworkV2(1U << int(NetworkDefinitionCreationFlag::kSTRONGLY_TYPED)));
#else
  auto network = std::unique_ptr<INetworkDefinition>(builder->createNetworkV2(1U << int(NetworkDefinitionCreationFlag::kEXPLICIT_BATCH)));
#endif
  if (!own(*network, arguments[1], atoi(arguments[3]))) return 1;
  auto config = std::unique_ptr<IBuilderConfig>(builder->createBuilderConfig());
#if NV_TENSORRT_MAJOR < 10
  config->setFlag(BuilderFlag::kFP16);
  config->setTacticSources(0);
#endif
  auto engine = std::unique_ptr<IHostMemory>(builder->buildSerializedNetwork(*network, *config));
  return engine ? (printf("an engine of %zu bytes\n", engine->size()), 0) : 1;
}
