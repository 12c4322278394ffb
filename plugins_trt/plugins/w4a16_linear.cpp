// W4A16Linear: x [.., k] -> y [.., n], a product with 4-bit weights in the packed layout of kernels/w4a16.h, and what stands around it in a decoder layer.
//   fields: codes, scales, zeros (places; zeros may be "": symmetric), n, k, group, bf16
//   around it, nothing where left out (kernels/w4a16_fused.h):
//     norm (place of [k]), offset (0), epsilon (0): of RmsNorm(x) instead of x
//     first_norm (place of [k]): and of RmsNorm(RmsNorm(x, first_norm), norm), with the same offset and epsilon
//     residual (0): 1: x, residual -> y, sum: the norm is of the sum of x, or of its first norm, with residual
//     gated (0), activation (0 silu, 1 gelu with tanh): 1: y [.., n / 2] is GatedProduct of the product
//     early (0): 1: where up to eight rows have no norm, what stands behind may begin before this is done. Behind it, and behind `gated`, belongs what reads
//       weights alone until it waits: any plugin of ours but DecodeAttention, any layer of TensorRT's own.
//
// Up to eight rows are one launch where its shared memory fits the device, more of them a launch for each step. The bits are the same.
#include "elementwise.h"
#include "operation.h"
#include "w4a16_fused.h"

namespace flashhead {
namespace {

constexpr int kMostNormed = 16384;  // elementwise.h

class W4A16Linear final : public Operation {
 public:
  const char* name() const override { return "W4A16Linear"; }
  std::vector<Binding> fields() override {
    std::vector<Binding> all = {bind("codes", codes_),
                                bind("scales", scales_),
                                bind("zeros", zeros_, true),
                                bind("n", n_),
                                bind("k", k_),
                                bind("group", group_),
                                bind("bf16", bf16_, true),
                                bind("norm", norm_, true),
                                bind("first_norm", first_norm_, true),
                                bind("offset", offset_, true),
                                bind("epsilon", epsilon_, true),
                                bind("residual", residual_, true),
                                bind("gated", gated_, true),
                                bind("activation", activation_, true),
                                bind("early", early_, true)};
    weights_.bind_to(all);
    return all;
  }
  int inputs() const override { return 1 + residual_; }
  int outputs() const override { return 1 + residual_; }
  const char* label(int position) const override {
    static const char* const kWithout[] = {"x", "y"};
    static const char* const kWith[] = {"x", "residual", "y", "sum"};
    return residual_ ? kWith[position] : kWithout[position];
  }
  Type type(int) const override { return activation_type(bf16_); }
  std::vector<Extent> shape(int output, const Tensor* in) const override {
    std::vector<Extent> all;
    for (int i = 0; i + 1 < in[0].rank; ++i) all.push_back(Extent::of(0, i));
    all.push_back(Extent::number(output ? k_ : width()));
    return all;
  }
  Sentence fits(const Tensor* in, int count) const override {
    Shapes shapes(*this, in);
    for (int i = 0; i < count; ++i) shapes.want_last(i, k_);
    if (!shapes.wrong.empty() || count == 1) return shapes.wrong;
    std::vector<int64_t> same(in[0].dims, in[0].dims + in[0].rank);
    for (int64_t& extent : same) extent = extent < 0 ? kAny : extent;
    shapes.want(1, same);
    return shapes.wrong;
  }
  size_t scratch_bytes(const Tensor* in) const override {
    Scratch scratch(nullptr);
    cut(scratch, size_t(in[0].rows()));
    return scratch.used;
  }

 protected:
  Sentence check() const override {
    const bool whole = n_ >= 16 && n_ % 16 == 0 && k_ >= 64 && k_ % 64 == 0 && (group_ == 32 || group_ == 64 || group_ == 128) && k_ % group_ == 0;
    if (!whole) {
      return format("the matrix is [%d, %d] in groups of %d, expected n %% 16 == 0, k %% 64 == 0, groups of 32, 64 or 128; export with --layers native", n_, k_,
                    group_);
    }
    const uint64_t codes = uint64_t(n_) * uint64_t(k_) / 2, groups = uint64_t(n_) * uint64_t(k_ / group_);
    Sentence wrong = weights_.check("codes", codes_, codes);
    if (wrong.empty()) wrong = weights_.check("scales", scales_, groups * 2);
    if (wrong.empty()) wrong = weights_.check("zeros", zeros_, groups, true);
    if (wrong.empty()) wrong = check_around();
    if (wrong.empty()) wrong = weights_.check("norm", norm_, uint64_t(k_) * 2, true);
    if (wrong.empty()) wrong = weights_.check("first_norm", first_norm_, uint64_t(k_) * 2, true);
    return wrong;
  }
  Sentence load() override {
    Sentence wrong = weights_.load(codes_, held_[0]);
    if (wrong.empty()) wrong = weights_.load(scales_, held_[1]);
    if (wrong.empty()) wrong = weights_.load(zeros_, held_[2]);
    if (wrong.empty()) wrong = weights_.load(norm_, held_[3]);
    if (wrong.empty()) wrong = weights_.load(first_norm_, held_[4]);
    return wrong;
  }
  void unload() override {
    for (Weight& w : held_) w.reset();
  }
  Sentence launch(const Call& c) override {
    const fh_w4a16_weight weight = {held_[0].get(), held_[1].get(), held_[2].get(), n_, k_, group_, element(bf16_)};
    const void* residual = residual_ ? c.x[1] : nullptr;
    void* sum = residual_ ? c.y[1] : nullptr;
    const fh_w4a16_fusion around = {residual, sum, held_[4].get(), held_[3].get(), offset_, epsilon_, gated_, fh_activation(activation_)};
    const int rows = int(c.in[0].rows());
    if ((held_[3] || early_) && rows <= FH_W4A16_DECODE_ROWS) {
      fh_w4a16_plan plan;
      fh_w4a16_make_fused_plan(&weight, &around, rows, &facts_, &plan);
      if (plan.shared_bytes <= facts_.shared_bytes) return said(fh_w4a16_fused(&weight, &around, c.x[0], c.y[0], rows, &facts_, c.stream));
    }

    Scratch scratch(c.scratch);
    const Parts parts = cut(scratch, size_t(rows));
    const void* x = c.x[0];
    Sentence wrong;
    if (held_[4]) {
      wrong = said(fh_rms_norm(x, nullptr, nullptr, held_[4].get(), offset_, epsilon_, parts.normed, rows, k_, element(bf16_), &facts_, c.stream));
      x = parts.normed;
    }
    if (wrong.empty() && held_[3]) {
      wrong = said(fh_rms_norm(x, residual, sum, held_[3].get(), offset_, epsilon_, parts.normed, rows, k_, element(bf16_), &facts_, c.stream));
      x = parts.normed;
    }
    if (wrong.empty()) wrong = said(fh_w4a16_linear(&weight, x, gated_ ? parts.product : c.y[0], rows, &facts_, c.stream));
    if (!wrong.empty() || !gated_) return wrong;
    return said(fh_gated_product(parts.product, c.y[0], rows, n_ / 2, fh_activation(activation_), element(bf16_), &facts_, c.stream));
  }
  std::unique_ptr<Operation> copy() const override { return std::make_unique<W4A16Linear>(*this); }

 private:
  struct Parts {
    uint16_t *normed, *product;
  };

  int width() const { return gated_ ? n_ / 2 : n_; }

  // What launches one after the other hand on.
  Parts cut(Scratch& scratch, size_t rows) const {
    Parts parts{};
    if (!norm_.empty()) parts.normed = scratch.take<uint16_t>(rows * size_t(k_));
    if (gated_) parts.product = scratch.take<uint16_t>(rows * size_t(n_));
    return parts;
  }

  Sentence check_around() const {
    for (const int flag : {residual_, gated_, early_}) {
      if (flag != 0 && flag != 1) return format("residual, gated and early are %d, %d and %d, expected 0 or 1; see docs/tensorrt.md", residual_, gated_, early_);
    }
    if (activation_ != FH_SILU && activation_ != FH_GELU_TANH) {
      return format("activation is %d, expected 0 (silu) or 1 (gelu with tanh); see docs/tensorrt.md for the fields", activation_);
    }
    if (norm_.empty() && (residual_ || gated_ || !first_norm_.empty())) {
      return "a residual, a gate or first_norm stands beside no norm, expected the place of one in field norm; use RmsNorm and GatedProduct apart";
    }
    if (!norm_.empty() && k_ > kMostNormed) return format("k is %d beside a norm, expected at most %d; use TensorRT's own norm for this model", k_, kMostNormed);
    if (gated_ && n_ % 32) return format("n is %d beside a gate, expected a multiple of 32; use GatedProduct apart", n_);
    return {};
  }

  Weights weights_;
  std::string codes_, scales_, zeros_, norm_, first_norm_;
  int32_t n_ = 0, k_ = 0, group_ = 0, bf16_ = 0, residual_ = 0, gated_ = 0, activation_ = 0, early_ = 0;
  float offset_ = 0, epsilon_ = 0;
  Weight held_[5];  // codes, scales, zeros, norm, first_norm
};

}  // namespace

std::unique_ptr<Operation> make_w4a16_linear() { return std::make_unique<W4A16Linear>(); }

}  // namespace flashhead
