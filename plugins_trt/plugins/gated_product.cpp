// GatedProduct: x [.., 2f] -> y [.., f], activation(x[.., :f]) * x[.., f:] (kernels/elementwise.h).
//   fields: activation (0 silu, 1 gelu with tanh), bf16
#include "elementwise.h"
#include "operation.h"

namespace flashhead {
namespace {

class GatedProduct final : public Operation {
 public:
  const char* name() const override { return "GatedProduct"; }
  std::vector<Binding> fields() override { return {bind("activation", activation_), bind("bf16", bf16_, true)}; }
  int inputs() const override { return 1; }
  int outputs() const override { return 1; }
  const char* label(int position) const override { return position ? "y" : "x"; }
  Type type(int) const override { return activation_type(bf16_); }
  std::vector<Extent> shape(int, const Tensor* in) const override {
    std::vector<Extent> all;
    for (int i = 0; i + 1 < in[0].rank; ++i) all.push_back(Extent::of(0, i));
    all.push_back(Extent::of(0, in[0].rank - 1, 2));
    return all;
  }
  Sentence fits(const Tensor* in, int) const override {
    if (in[0].rank >= 1 && (in[0].last() < 0 || in[0].last() % 16 == 0)) return {};
    return format("input x is %s, expected [.., 2 f] with f a multiple of 8; use TensorRT's own operators for this model", in[0].text().c_str());
  }

 protected:
  Sentence check() const override {
    if (activation_ == FH_SILU || activation_ == FH_GELU_TANH) return {};
    return format("activation is %d, expected 0 (silu) or 1 (gelu with tanh); see docs/tensorrt.md for the fields", activation_);
  }
  Sentence load() override { return {}; }
  void unload() override {}
  Sentence launch(const Call& c) override {
    return said(fh_gated_product(c.x[0], c.y[0], int(c.in[0].rows()), int(c.in[0].last() / 2), fh_activation(activation_), element(bf16_), &facts_, c.stream));
  }
  std::unique_ptr<Operation> copy() const override { return std::make_unique<GatedProduct>(*this); }

 private:
  int32_t activation_ = 0, bf16_ = 0;
};

}  // namespace

std::unique_ptr<Operation> make_gated_product() { return std::make_unique<GatedProduct>(); }

}  // namespace flashhead
