// host_core.cpp: the plugins' core as a library for tests/plugins, with a made device: no GPU, no CUDA runtime and no kernels.
//
// The made device's memory is the host's. Launchers write all that the real ones write and note themselves in `core_notes`; the made attention is cut
// into as many parts as the most that scratch memory must hold. core_* answer with a sentence, "" where nothing is wrong.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "attention.h"
#include "decode.h"
#include "elementwise.h"
#include "embedding.h"
#include "head_step.h"
#include "operation.h"
#include "settings.h"
#include "w4a16_fused.h"

namespace {

std::mutex guard;
std::map<void*, size_t> blocks;  // the made device's memory
size_t most_bytes = size_t(1) << 40;
int current = 0, multiprocessors = 132, shared_bytes = 232448, major = 9;
std::string notes;

__attribute__((format(printf, 1, 2))) const char* note(const char* pattern, ...) {
  char text[300];
  va_list values;
  va_start(values, pattern);
  vsnprintf(text, sizeof text, pattern, values);
  va_end(values);
  notes += (notes.empty() ? "" : "; ") + std::string(text);
  return nullptr;
}

void fill(void* to, size_t bytes) { memset(to, 1, bytes); }

struct Handle {
  std::unique_ptr<flashhead::Operation> operation;
};

std::vector<flashhead::Tensor> tensors(const int* types, const int* ranks, const long long* dims, int count) {
  std::vector<flashhead::Tensor> all;
  for (int i = 0; i < count; ++i) {
    flashhead::Tensor t;
    t.type = flashhead::Type(types[i]), t.rank = ranks[i];
    for (int k = 0; k < t.rank; ++k) t.dims[k] = *dims++;
    all.push_back(t);
  }
  return all;
}

const char* keep(const std::string& text) {
  thread_local std::string kept;
  kept = text;
  return kept.c_str();
}

}  // namespace

// CUDA's runtime

cudaError_t cudaGetDevice(int* device) { return *device = current, current < 0 ? cudaErrorNoDevice : cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return current = device, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorMemoryAllocation ? "out of memory" : "an error"; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared_bytes; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, size_t bytes) {
  const std::lock_guard<std::mutex> lock(guard);
  size_t used = 0;
  for (const auto& [at, size] : blocks) used += size;
  if (used + bytes > most_bytes) return cudaErrorMemoryAllocation;
  *data = malloc(bytes);
  memset(*data, 0xa5, bytes);
  blocks[*data] = bytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* data) {
  const std::lock_guard<std::mutex> lock(guard);
  if (data && !blocks.erase(data)) abort();  // freed twice
  free(data);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) { return *free_bytes = *total = most_bytes, cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  memcpy(to, from, bytes);
  if (kind == cudaMemcpyDeviceToDevice) note("copy %zu", bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t pitch, const void* from, size_t stride, size_t width, size_t height, cudaMemcpyKind, cudaStream_t) {
  for (size_t i = 0; i < height; ++i) memcpy(static_cast<char*>(to) + i * pitch, static_cast<const char*>(from) + i * stride, width);
  note("copy %zu rows of %zu, %zu apart", height, width, stride);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}

// The launchers

const char* fh_embedding(const int*, const void* rows, float scale, void* y, int N, int V, int d, fh_dtype, const fh_device*, cudaStream_t) {
  fill(y, size_t(N) * size_t(d) * 2);
  return note("embedding %d of [%d, %d] times %g, first byte %d", N, V, d, double(scale), *static_cast<const unsigned char*>(rows));
}
const char* fh_rms_norm(const void*, const void* residual, void* sum, const void*, float, float, void* y, int M, int d, fh_dtype, const fh_device* device,
                        cudaStream_t) {
  fill(y, size_t(M) * size_t(d) * 2);
  if (sum) fill(sum, size_t(M) * size_t(d) * 2);
  return note("rms_norm [%d, %d]%s%s", M, d, residual && sum ? " with residual" : "", device->overlap ? "" : ", alone");
}
const char* fh_gated_product(const void*, void* y, int M, int f, fh_activation activation, fh_dtype, const fh_device*, cudaStream_t) {
  fill(y, size_t(M) * size_t(f) * 2);
  return note("gated_product [%d, %d] of %d", M, f, int(activation));
}
const char* fh_w4a16_linear(const fh_w4a16_weight* w, const void*, void* y, int M, const fh_device*, cudaStream_t) {
  fill(y, size_t(M) * size_t(w->N) * 2);
  return note("w4a16_linear %d x [%d, %d]%s", M, w->N, w->K, w->zeros ? "" : ", symmetric");
}
// The real plan's bytes of rows, beside as many as the product takes.
void fh_w4a16_make_fused_plan(const fh_w4a16_weight* w, const fh_w4a16_fusion* f, int M, const fh_device*, fh_w4a16_plan* plan) {
  *plan = {};
  plan->shared_bytes = 32768 * (f->gated ? 2 : 1) + (f->norm ? M * (w->K + 32) * 2 : 0);
}
const char* fh_w4a16_fused(const fh_w4a16_weight* w, const fh_w4a16_fusion* f, const void*, void* y, int M, const fh_device*, cudaStream_t) {
  fill(y, size_t(M) * size_t(f->gated ? w->N / 2 : w->N) * 2);
  if (f->sum) fill(f->sum, size_t(M) * size_t(w->K) * 2);
  const bool residual = f->residual && f->sum;
  return note("w4a16_fused %d x [%d, %d]%s%s%s%s", M, w->N, w->K, f->first_norm ? ", first norm" : "", f->norm ? ", norm" : "", residual ? ", residual" : "",
              f->gated ? f->activation == FH_SILU ? ", silu" : ", gelu" : "");
}
const char* fh_attention_make_plan(const fh_attention_shape* s, const fh_device* device, fh_attention_plan* plan) {
  const int count = s->queries * (s->q_heads / s->kv_heads);
  plan->rows = count < 8 ? count : 8, plan->row_blocks = (count + plan->rows - 1) / plan->rows;
  plan->items = s->batch * s->kv_heads * plan->row_blocks;
  plan->splits = device->multiprocessors > plan->items ? device->multiprocessors / plan->items : 1, plan->cluster = 1, plan->threads = 256;
  plan->workspace_bytes = (size_t(plan->items) * size_t(plan->splits) * size_t(plan->rows) * size_t(s->head_size + 2) + size_t(plan->items)) * 4;
  return nullptr;
}
const char* fh_attention_rope_decode(const fh_attention_shape* s, const fh_attention_plan* plan, const fh_attention_fusion* fusion, void*, void*,
                                     const int* lengths, void* out, void* workspace, unsigned* arrivals, const fh_device* device, cudaStream_t stream) {
  note("rope%s%s in", fusion->q_norm && fusion->k_norm ? " with norms" : "", device->overlap ? "" : ", alone,");
  return fh_attention_decode(s, plan, nullptr, nullptr, nullptr, lengths, out, workspace, arrivals, device, stream);
}
const char* fh_attention_rope_write(const fh_attention_shape* s, const void*, const float*, const void* q_norm, const void* k_norm, float, float, const int*,
                                    void* q, void*, void*, const fh_device*, cudaStream_t) {
  fill(q, size_t(s->batch) * size_t(s->queries) * size_t(s->q_heads) * size_t(s->head_size) * 2);
  return note("rope_write%s", q_norm && k_norm ? " with norms" : "");
}
const char* fh_attention_decode(const fh_attention_shape* s, const fh_attention_plan* plan, const void*, const void*, const void*, const int*, void* out,
                                void* workspace, unsigned* arrivals, const fh_device*, cudaStream_t) {
  const bool behind = reinterpret_cast<char*>(arrivals) == static_cast<char*>(workspace) + plan->workspace_bytes - size_t(plan->items) * 4;
  bool zero = true;
  for (int i = 0; i < plan->items; ++i) zero = zero && arrivals[i] == 0;
  fill(workspace, plan->workspace_bytes - size_t(plan->items) * 4);
  fill(out, size_t(s->batch) * size_t(s->queries) * size_t(s->q_heads) * size_t(s->head_size) * 2);
  return note("attention_decode, %d arrivals %s, %s", plan->items, behind ? "in scratch" : "apart", zero ? "zero" : "NOT ZERO");
}
const char* fh_head_step(const FlashHeadArguments* a, const fh_device*, cudaStream_t) {
  const size_t rows = size_t(a->rows), width = size_t(a->layout.candidates), counted = size_t(2 + a->layout.stages);
  bool zero = true;
  for (size_t i = 0; i < rows * a->layout.row_bytes; ++i) zero = zero && a->workspace[i] == 0;
  for (size_t r = 0; r < rows; ++r) {
    a->token[r] = (long long)(r) + 7, a->capped[r] = r & 1;
    for (size_t i = 0; i < counted; ++i) a->counts[r * counted + i] = (long long)(width);
    for (size_t i = 0; i < width; ++i) a->ids[r * width + i] = (long long)(i) + 100, a->logits[r * width + i] = float(i);
  }
  if (a->wide) fill(a->wide, rows * size_t(a->wide_stride) * 4);
  return note("head_step %d, first state %d, workspace %s%s", a->rows, *static_cast<const unsigned short*>(a->hidden), zero ? "zero" : "NOT ZERO",
              a->bias ? ", bias" : "");
}
const char* fh_head_widen(const FlashHeadWiden* a, const fh_device*, cudaStream_t) {
  fill(a->wide, size_t(a->rows) * size_t(a->wide_stride) * 4);
  return note("widen %d of %d", a->rows, a->vocab_size);
}
const char* fh_draw_settings(const FlashHeadSettings* a, const fh_device*, cudaStream_t) {
  for (int r = 0; r < a->rows; ++r) {
    a->wide_temperature[r] = double(a->temperature[r]), a->wide_top_p[r] = double(a->top_p[r]), a->wide_min_p[r] = double(a->min_p[r]);
    a->wide_top_k[r] = a->top_k[r], a->wide_step[r] = a->step[r];
  }
  if (a->logits) fill(a->final_logits, size_t(a->rows) * size_t(a->width) * 4);
  return note("settings%s", a->logits ? " and logits" : "");
}
const char* fh_decode(const FlashHeadDecode* a, const fh_device*, cudaStream_t) {
  for (int r = 0; r < a->rows; ++r) a->token[r] = 40 + r, a->logprob[r] = -1, a->best_ids[r * a->best] = 0, a->best_logprobs[r * a->best] = 0;
  return note("decode temperature %g, top-k %lld, seed %llu, step %lld", a->temperature[0], a->top_k[0], a->seed[0], a->step[0]);
}
const char* fh_narrow(const FlashHeadNarrow* a, const fh_device*, cudaStream_t) {
  for (int r = 0; r < a->rows; ++r) {
    a->narrow_token[r] = int(a->token[r]), a->narrow_capped[r] = a->capped[r];
    for (int i = 0; i < a->counted; ++i) a->narrow_counts[r * a->counted + i] = int(a->counts[r * a->counted + i]);
    for (int i = 0; i < a->candidates; ++i) a->narrow_ids[r * a->candidates + i] = int(a->ids[r * a->candidates + i]);
  }
  return note("narrow");
}

// What Python calls

extern "C" {

void core_device(int number, int processors, int shared, int capability_major) {
  current = number, multiprocessors = processors, shared_bytes = shared, major = capability_major;
}
void core_memory(long long bytes) { most_bytes = size_t(bytes); }
const char* core_notes() {
  const std::string said = notes;
  notes.clear();
  return keep(said);
}
long long core_blocks() { return (long long)(blocks.size()); }
long long core_device_bytes() { return flashhead::device_bytes(); }
const char* core_add_folder(const char* folder) { return keep(flashhead::add_folder(folder)); }
int core_plan_words() { return int(sizeof(FlashHeadLayout) / 4); }

Handle* core_make(const char* name) {
  for (const flashhead::Made& m : flashhead::operations()) {
    if (!strcmp(m.name, name)) return new Handle{m.make()};
  }
  return nullptr;
}
void core_destroy(Handle* h) { delete h; }
const char* core_read(Handle* h, const void* data, size_t size) {
  std::vector<flashhead::Field> fields;
  const flashhead::Sentence wrong = flashhead::from_bytes(data, size, fields);
  return keep(wrong.empty() ? h->operation->read(fields) : wrong);
}
size_t core_write(Handle* h, void* to, size_t room) {
  const std::string bytes = flashhead::to_bytes(h->operation->write());
  if (bytes.size() <= room) memcpy(to, bytes.data(), bytes.size());
  return bytes.size();
}
int core_outputs(Handle* h) { return h->operation->outputs(); }
const char* core_prepare(Handle* h) { return keep(h->operation->prepare()); }
void core_release(Handle* h) { h->operation->release(); }
Handle* core_clone(Handle* h) {
  auto* twin = new Handle;
  if (h->operation->clone(twin->operation).empty()) return twin;
  delete twin;
  return nullptr;
}
// Of inputs of these types (0 float16, 1 bfloat16, 2 float32, 3 int32) and shapes, the extents of all one after the other.
const char* core_fits(Handle* h, const int* types, const int* ranks, const long long* dims, int count) {
  const auto in = tensors(types, ranks, dims, count);
  h->operation->see(count);
  const flashhead::Sentence wrong = h->operation->types(in.data(), count);
  return keep(wrong.empty() ? h->operation->fits(in.data(), count) : wrong);
}
// The shape of an output, as "[2, 3]"; in[0][1] / 2 and the like are computed.
const char* core_shape(Handle* h, int output, const int* types, const int* ranks, const long long* dims, int count) {
  const auto in = tensors(types, ranks, dims, count);
  h->operation->see(count);
  flashhead::Tensor out;
  for (const flashhead::Extent& e : h->operation->shape(output, in.data())) {
    out.dims[out.rank++] = e.input < 0 ? e.value : in[size_t(e.input)].dims[e.axis] / e.divisor;
  }
  out.type = h->operation->type(count + output);
  return keep(std::string(flashhead::name_of(out.type)) + " " + out.text());
}
size_t core_scratch(Handle* h, const int* types, const int* ranks, const long long* dims, int count) {
  return h->operation->scratch_bytes(tensors(types, ranks, dims, count).data());
}
const char* core_run(Handle* h, const int* types, const int* ranks, const long long* dims, int count, const void* const* x, void* const* y, void* scratch) {
  const auto in = tensors(types, ranks, dims, count);
  h->operation->see(count);
  return keep(h->operation->run({in.data(), x, y, scratch, nullptr}));
}

}  // extern "C"
