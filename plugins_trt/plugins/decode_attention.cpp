// DecodeAttention: qkv [B, S, (q_heads + 2 kv_heads) head_size], cache_k, cache_v [B, kv_heads, max_length, head_size], lengths int32 [B]
//   -> out [B, S, q_heads head_size], present_k, present_v like the caches (kernels/attention.h: up to eight new tokens of a sequence in
//   one launch, rope_decode; more by rope_write, then attention_decode; with the same bits).
//   fields: q_heads, kv_heads, head_size, max_length, window (0), scale, rotations (place of float32 [max_length or more, head_size / 2, 2]),
//   q_norm, k_norm (places of [head_size], or ""), norm_offset (0), epsilon (0), bf16
//
// The cache is meant to be written in place: present bound to the memory of past (declared as an alias where TensorRT knows that, 10.3 and later).
// Where the addresses differ, as under trtexec, all of it is copied first: right, and slow.
//
// TensorRT's scratch memory holds anything, and is shared between layers. The queries of many tokens and the partial sums lie there; the arrivals, which must be zero at
// first and are left zero, lie in memory of this instance's own, enough for kArrivals of them: 512 sequences of 8 key-value heads, or 1,024 new tokens of
// 32 heads over 8. A larger launch counts in scratch memory, made zero in the stream.
#include "attention.h"
#include "facts.h"
#include "operation.h"

namespace flashhead {
namespace {

constexpr int kArrivals = 4096;

class DecodeAttention final : public Operation {
 public:
  const char* name() const override { return "DecodeAttention"; }
  std::vector<Binding> fields() override {
    std::vector<Binding> all = {bind("q_heads", q_heads_),
                                bind("kv_heads", kv_heads_),
                                bind("head_size", head_size_),
                                bind("max_length", max_length_),
                                bind("window", window_, true),
                                bind("scale", scale_),
                                bind("rotations", rotations_),
                                bind("q_norm", q_norm_, true),
                                bind("k_norm", k_norm_, true),
                                bind("norm_offset", norm_offset_, true),
                                bind("epsilon", epsilon_, true),
                                bind("bf16", bf16_, true)};
    weights_.bind_to(all);
    return all;
  }
  int inputs() const override { return 4; }
  int outputs() const override { return 3; }
  const char* label(int position) const override {
    static const char* const kLabels[] = {"qkv", "cache_k", "cache_v", "lengths", "out", "present_k", "present_v"};
    return kLabels[position];
  }
  Type type(int position) const override { return position == 3 ? Type::int32 : activation_type(bf16_); }
  std::vector<Extent> shape(int output, const Tensor*) const override {
    if (output == 0) return {Extent::of(0, 0), Extent::of(0, 1), Extent::number(int64_t(q_heads_) * head_size_)};
    return {Extent::of(output, 0), Extent::of(output, 1), Extent::of(output, 2), Extent::of(output, 3)};
  }
  Sentence fits(const Tensor* in, int) const override {
    Shapes shapes(*this, in);
    shapes.want(0, {letter('B'), letter('S'), int64_t(q_heads_ + 2 * kv_heads_) * head_size_});
    shapes.want(1, {letter('B'), kv_heads_, max_length_, head_size_});
    shapes.want(2, {letter('B'), kv_heads_, max_length_, head_size_});
    shapes.want(3, {letter('B')});
    return shapes.wrong;
  }
  int aliased(int output) const override { return output ? output : -1; }

  size_t scratch_bytes(const Tensor* in) const override {
    fh_device facts{};
    if (!device_facts(facts).empty()) return 0;  // preparing says it aloud
    // A smaller launch may be cut into more parts: no plan has more of them than multiprocessors, or than items where these are more.
    const int64_t batch = in[0].dims[0], queries = in[0].dims[1], rows = queries * (q_heads_ / kv_heads_), most_rows = rows < 8 ? rows : 8;
    const int64_t items = batch * kv_heads_ * ((rows + most_rows - 1) / most_rows), parts = items > facts.multiprocessors ? items : facts.multiprocessors;
    return query_bytes(batch, queries) + size_t(parts * most_rows * (head_size_ + 2) + items) * sizeof(float);
  }

 protected:
  Sentence check() const override {
    if (head_size_ != 64 && head_size_ != 96 && head_size_ != 128 && head_size_ != 256) {
      return format("head_size is %d, expected 64, 96, 128 or 256; export with --layers native", head_size_);
    }
    if (kv_heads_ < 1 || q_heads_ < 1 || q_heads_ % kv_heads_ || max_length_ < 1 || window_ < 0) {
      return format("%d heads over %d, max_length %d, window %d: expected at least 1 of each, whole groups of heads and a window of 0 or more; export again",
                    q_heads_, kv_heads_, max_length_, window_);
    }
    const uint64_t head = uint64_t(head_size_) * 2;
    Sentence wrong = weights_.check("rotations", rotations_, uint64_t(max_length_) * uint64_t(head_size_) * 4, false, true);
    if (wrong.empty()) wrong = weights_.check("q_norm", q_norm_, head, true);
    if (wrong.empty()) wrong = weights_.check("k_norm", k_norm_, head, true);
    return wrong;
  }
  Sentence load() override {
    Sentence wrong = weights_.load(rotations_, held_[0]);
    if (wrong.empty()) wrong = weights_.load(q_norm_, held_[1]);
    if (wrong.empty()) wrong = weights_.load(k_norm_, held_[2]);
    if (wrong.empty()) wrong = arrivals_.allocate(kArrivals * sizeof(unsigned));
    return wrong;
  }
  void unload() override {
    for (Weight& w : held_) w.reset();
    arrivals_.release();
  }

  Sentence launch(const Call& c) override {
    const int batch = int(c.in[0].dims[0]), queries = int(c.in[0].dims[1]);
    const fh_attention_shape shape = {batch, queries, q_heads_, kv_heads_, head_size_, max_length_, window_, scale_, element(bf16_)};
    fh_attention_plan plan;
    Sentence wrong = said(fh_attention_make_plan(&shape, &facts_, &plan));
    if (!wrong.empty()) return wrong;

    char* partials = static_cast<char*>(c.scratch) + query_bytes(batch, queries);
    unsigned* arrivals = reinterpret_cast<unsigned*>(arrivals_.data());
    cudaError_t error = cudaSuccess;
    fh_device facts = facts_;
    const size_t cache = size_t(batch) * size_t(kv_heads_) * size_t(max_length_) * size_t(head_size_) * 2;
    for (int i = 1; i <= 2; ++i) {
      if (error != cudaSuccess || c.y[i] == c.x[i]) continue;
      error = cudaMemcpyAsync(c.y[i], c.x[i], cache, cudaMemcpyDeviceToDevice, c.stream);
      facts.overlap = 0;  // the copy writes older positions, which an overlapping launch reads at once
    }
    if (error == cudaSuccess && plan.items > kArrivals && plan.workspace_bytes) {
      const size_t bytes = size_t(plan.items) * sizeof(unsigned);
      arrivals = reinterpret_cast<unsigned*>(partials + plan.workspace_bytes - bytes);
      error = cudaMemsetAsync(arrivals, 0, bytes, c.stream);
      facts.overlap = 0;
    }
    if (error != cudaSuccess) {
      cudaGetLastError();
      return format("the cache could not be copied: CUDA says \"%s\"; look that present and past are whole caches", cudaGetErrorString(error));
    }
    const int* lengths = static_cast<const int*>(c.x[3]);
    const fh_attention_fusion rope = {c.x[0], static_cast<const float*>(held_[0].get()), held_[1].get(), held_[2].get(), norm_offset_, epsilon_};
    if (queries <= FH_ATTENTION_FUSED_QUERIES) {
      return said(fh_attention_rope_decode(&shape, &plan, &rope, c.y[1], c.y[2], lengths, c.y[0], partials, arrivals, &facts, c.stream));
    }
    wrong = said(fh_attention_rope_write(&shape, rope.qkv, rope.rotations, rope.q_norm, rope.k_norm, norm_offset_, epsilon_, lengths, c.scratch, c.y[1], c.y[2],
                                         &facts, c.stream));
    if (!wrong.empty()) return wrong;
    return said(fh_attention_decode(&shape, &plan, c.scratch, c.y[1], c.y[2], lengths, c.y[0], partials, arrivals, &facts_, c.stream));
  }
  std::unique_ptr<Operation> copy() const override { return std::make_unique<DecodeAttention>(*this); }

 private:
  // Where a launch of its own writes them.
  size_t query_bytes(int64_t batch, int64_t queries) const {
    if (queries <= FH_ATTENTION_FUSED_QUERIES) return 0;
    return (size_t(batch * queries) * size_t(q_heads_) * size_t(head_size_) * 2 + 255) / 256 * 256;
  }

  Weights weights_;
  std::string rotations_, q_norm_, k_norm_;
  int32_t q_heads_ = 0, kv_heads_ = 0, head_size_ = 0, max_length_ = 0, window_ = 0, bf16_ = 0;
  float scale_ = 0, norm_offset_ = 0, epsilon_ = 0;
  Weight held_[3];  // rotations, q_norm, k_norm
  Own arrivals_;
};

}  // namespace

std::unique_ptr<Operation> make_decode_attention() { return std::make_unique<DecodeAttention>(); }

}  // namespace flashhead
