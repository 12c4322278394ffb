// library.cpp: what a program may call beside TensorRT, in C:
//   const char* flashhead_plugin_version(void)               "0.1.0 tensorrt 8.6.0": of flashhead-edge, and of the headers that this was built with
//   const char* flashhead_plugin_capabilities(void)          "87", or "80 86 87 89 90": of the GPUs that its kernels were compiled for
//   const char* flashhead_add_folder(const char* folder)     NULL, or a sentence: weights are looked for there first
//   const char* flashhead_last_error(void)                   the last sentence of any plugin in this process, "" where there was none
//   long long flashhead_device_bytes(void)                   weights on all devices now; 0 when all engines are gone
// Any thread may call them. A sentence is valid until the same thread's next call of the same function.
#include <NvInferVersion.h>

#include "export.h"
#include "log.h"
#include "store.h"

#ifndef FLASHHEAD_VERSION
#error "flashhead plugins: define FLASHHEAD_VERSION as the version of flashhead-edge, such as \"0.1.0\""
#endif

#ifndef FLASHHEAD_CAPABILITIES
#error "flashhead plugins: define FLASHHEAD_CAPABILITIES as what the kernels are compiled for, such as \"80 86 87\""
#endif

#define FLASHHEAD_TEXT_OF(x) #x
#define FLASHHEAD_TEXT(x) FLASHHEAD_TEXT_OF(x)

FLASHHEAD_EXPORT const char* flashhead_plugin_version() {
  return FLASHHEAD_VERSION " tensorrt " FLASHHEAD_TEXT(NV_TENSORRT_MAJOR) "." FLASHHEAD_TEXT(NV_TENSORRT_MINOR) "." FLASHHEAD_TEXT(NV_TENSORRT_PATCH);
}

FLASHHEAD_EXPORT const char* flashhead_plugin_capabilities() { return FLASHHEAD_CAPABILITIES; }

FLASHHEAD_EXPORT const char* flashhead_add_folder(const char* folder) {
  thread_local std::string kept;
  try {
    kept = folder ? flashhead::add_folder(folder) : "no folder is given, expected the one that holds the engine and its weights";
    return kept.empty() ? nullptr : kept.c_str();
  } catch (...) {
    return "an allocation on the host failed; free memory";
  }
}

FLASHHEAD_EXPORT const char* flashhead_last_error() {
  try {
    return flashhead::last_sentence();
  } catch (...) {
    return "an allocation on the host failed; free memory";
  }
}

FLASHHEAD_EXPORT long long flashhead_device_bytes() { return flashhead::device_bytes(); }
