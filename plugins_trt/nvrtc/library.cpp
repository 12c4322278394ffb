// library.cpp: what the torch-free backend asks of the launchers' library beside the launchers: its kernels by name, their code, and what a pass would launch.
//
// Code comes at run time: NVRTC makes it on the user's machine (jetson/cuda_kernels.py) of the kernels that a dry pass named, and fh_set_code hands it in.
#include <cxxabi.h>
#include <sched.h>
#include <time.h>

#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

#include "advance.h"
#include "attention.h"
#include "combine.h"
#include "decode.h"
#include "dense_rows.h"
#include "head_step.h"
#include "kernels.h"
#include "settings.h"
#include "w4a16.h"
#include "w4a16_fused.h"

extern "C" {
extern const char* const flashhead_sources[];  // of each kernel of the table: its CUDA source
}

namespace {

thread_local bool dry = false;
thread_local std::set<const char*> seen;

bool note(const FlashHeadKernel& kernel) {
  if (dry) seen.insert(kernel.name);
  return dry;
}

void pause_a_moment() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

double now() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

}  // namespace

extern "C" {

// Kernel number i of the table: its name in a cubin and its source; NULL behind the last.
const char* fh_kernel(int i, const char** source) {
  *source = flashhead_sources[i];
  return flashhead_kernels[i].name;
}

// The same as C++ writes it, with its parameters; to be freed with fh_free.
char* fh_expression(const char* name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  return status == 0 ? text : strdup(name);
}
void fh_free(char* text) { free(text); }

// The cubin of a kernel, which must stay where it is. 0: there is no such kernel.
int fh_set_code(const char* name, const void* code) {
  for (FlashHeadKernel* kernel = flashhead_kernels; kernel->host; ++kernel) {
    if (!strcmp(kernel->name, name)) return kernel->code = code, 1;
  }
  return 0;
}

// From fh_dry(1) to fh_dry(0) this thread's launches are noted and not done; then fh_seen(i) names their kernels, NULL behind the last.
void fh_dry(int on) {
  flashhead_asked = note;
  if (on) seen.clear();
  dry = on != 0;
}
const char* fh_seen(int i) {
  auto at = seen.begin();
  for (; i > 0 && at != seen.end(); --i) ++at;
  return at == seen.end() ? nullptr : *at;
}

// Waits until *word is value; 1, or 0 after so many seconds. It spins for a fifth of a millisecond, then lets others run in between.
int fh_wait(const unsigned* word, unsigned value, double seconds) {
  const double start = now();
  for (unsigned long tries = 0; __atomic_load_n(word, __ATOMIC_ACQUIRE) != value; ++tries) {
    if (tries % 64) {
      pause_a_moment();
      continue;
    }
    const double waited = now() - start;
    if (waited > seconds) return 0;
    if (waited > 2e-4) sched_yield();
  }
  return 1;
}

// Sizes of the structures that callers in other languages lay out themselves, in the order of their names.
void fh_sizes(int sizes[11]) {
  const size_t all[11] = {sizeof(FlashHeadAdvance), sizeof(FlashHeadArguments), sizeof(FlashHeadDecode),    sizeof(FlashHeadSettings), sizeof(FlashHeadWiden),
                         sizeof(fh_attention_fusion), sizeof(fh_attention_plan), sizeof(fh_attention_shape), sizeof(fh_device), sizeof(fh_w4a16_fusion), sizeof(fh_w4a16_weight)};
  for (int i = 0; i < 11; ++i) sizes[i] = int(all[i]);
}
}
