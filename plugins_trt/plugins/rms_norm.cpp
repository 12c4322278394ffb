// RmsNorm: x [.., d] -> y; or x, residual -> y, sum (kernels/elementwise.h).
//   fields: weight (place of [d]), d, offset (0), epsilon, bf16, residual (1: with one, 0: without; -1 or left out: the number of inputs says it)
//
// TensorRT asks for the number of outputs before it says how many inputs there are. Where `residual` is left out the answer is two, and without a
// residual the second is never written: nothing may read it. What was seen at build goes into the engine as the field `seen`.
#include "elementwise.h"
#include "operation.h"

namespace flashhead {
namespace {

class RmsNorm final : public Operation {
 public:
  const char* name() const override { return "RmsNorm"; }
  std::vector<Binding> fields() override {
    std::vector<Binding> all = {bind("weight", weight_),       bind("d", d_),          bind("offset", offset_, true),
                                bind("epsilon", epsilon_),     bind("bf16", bf16_, true), bind("residual", residual_, true),
                                bind("seen", seen_, true)};
    weights_.bind_to(all);
    return all;
  }
  int inputs() const override { return 1 + (with() == 1); }
  int outputs() const override { return residual_ == 0 ? 1 : 2; }
  bool takes(int count) const override { return residual_ < 0 ? count == 1 || count == 2 : count == 1 + residual_; }
  void see(int count) override {
    if (takes(count)) seen_ = count - 1;
  }
  const char* label(int position) const override {
    static const char* const kWithout[] = {"x", "y", "sum"};
    static const char* const kWith[] = {"x", "residual", "y", "sum"};
    return with() == 0 ? kWithout[position < 3 ? position : 2] : kWith[position < 4 ? position : 3];
  }
  Type type(int) const override { return activation_type(bf16_); }
  std::vector<Extent> shape(int, const Tensor* in) const override {
    std::vector<Extent> all;
    for (int i = 0; i < in[0].rank; ++i) all.push_back(Extent::of(0, i));
    return all;
  }
  Sentence fits(const Tensor* in, int count) const override {
    Shapes shapes(*this, in);
    for (int i = 0; i < count; ++i) shapes.want_last(i, d_);
    if (!shapes.wrong.empty() || count == 1) return shapes.wrong;
    std::vector<int64_t> same(in[0].dims, in[0].dims + in[0].rank);
    for (int64_t& extent : same) extent = extent < 0 ? kAny : extent;
    shapes.want(1, same);
    return shapes.wrong;
  }

 protected:
  Sentence check() const override {
    if (d_ < 8 || d_ % 8 || d_ > 16384) return format("d is %d, expected a multiple of 8 up to 16384; use TensorRT's own norm for this model", d_);
    if (residual_ < -1 || residual_ > 1) return format("residual is %d, expected 0 or 1; see docs/tensorrt.md for the fields", residual_);
    return weights_.check("weight", weight_, uint64_t(d_) * 2);
  }
  Sentence load() override { return weights_.load(weight_, gain_); }
  void unload() override { gain_.reset(); }
  Sentence launch(const Call& c) override {
    if (with() < 0) return "the number of inputs is not known; set the field residual to 0 or 1";
    const bool sums = with() == 1;
    return said(fh_rms_norm(c.x[0], sums ? c.x[1] : nullptr, sums ? c.y[1] : nullptr, gain_.get(), offset_, epsilon_, c.y[0], int(c.in[0].rows()), d_,
                            element(bf16_), &facts_, c.stream));
  }
  std::unique_ptr<Operation> copy() const override { return std::make_unique<RmsNorm>(*this); }

 private:
  int with() const { return residual_ < 0 ? seen_ : residual_; }  // -1: not known yet

  Weights weights_;
  std::string weight_;
  int32_t d_ = 0, bf16_ = 0, residual_ = -1, seen_ = -1;
  float offset_ = 0, epsilon_ = 0;
  Weight gain_;
};

}  // namespace

std::unique_ptr<Operation> make_rms_norm() { return std::make_unique<RmsNorm>(); }

}  // namespace flashhead
