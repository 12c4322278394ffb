// W4A16Linear: x [.., k] -> y [.., n], a product with 4-bit weights in the packed layout of kernels/w4a16.h.
//   fields: codes, scales, zeros (places; zeros may be "": symmetric), n, k, group, bf16
#include "operation.h"
#include "w4a16.h"

namespace flashhead {
namespace {

class W4A16Linear final : public Operation {
 public:
  const char* name() const override { return "W4A16Linear"; }
  std::vector<Binding> fields() override {
    std::vector<Binding> all = {bind("codes", codes_), bind("scales", scales_), bind("zeros", zeros_, true), bind("n", n_),
                                bind("k", k_),         bind("group", group_),   bind("bf16", bf16_, true)};
    weights_.bind_to(all);
    return all;
  }
  int inputs() const override { return 1; }
  int outputs() const override { return 1; }
  const char* label(int position) const override { return position ? "y" : "x"; }
  Type type(int) const override { return activation_type(bf16_); }
  std::vector<Extent> shape(int, const Tensor* in) const override {
    std::vector<Extent> all;
    for (int i = 0; i + 1 < in[0].rank; ++i) all.push_back(Extent::of(0, i));
    all.push_back(Extent::number(n_));
    return all;
  }
  Sentence fits(const Tensor* in, int) const override {
    Shapes shapes(*this, in);
    shapes.want_last(0, k_);
    return shapes.wrong;
  }

 protected:
  Sentence check() const override {
    const bool cut = n_ >= 16 && n_ % 16 == 0 && k_ >= 64 && k_ % 64 == 0 && (group_ == 32 || group_ == 64 || group_ == 128) && k_ % group_ == 0;
    if (!cut) {
      return format("the matrix is [%d, %d] in groups of %d, expected n %% 16 == 0, k %% 64 == 0, groups of 32, 64 or 128; export with --layers native", n_, k_,
                    group_);
    }
    const uint64_t codes = uint64_t(n_) * uint64_t(k_) / 2, groups = uint64_t(n_) * uint64_t(k_ / group_);
    Sentence wrong = weights_.check("codes", codes_, codes);
    if (wrong.empty()) wrong = weights_.check("scales", scales_, groups * 2);
    if (wrong.empty()) wrong = weights_.check("zeros", zeros_, groups, true);
    return wrong;
  }
  Sentence load() override {
    Sentence wrong = weights_.load(codes_, held_[0]);
    if (wrong.empty()) wrong = weights_.load(scales_, held_[1]);
    if (wrong.empty()) wrong = weights_.load(zeros_, held_[2]);
    return wrong;
  }
  void unload() override {
    for (Weight& w : held_) w.reset();
  }
  Sentence launch(const Call& c) override {
    const fh_w4a16_weight weight = {held_[0].get(), held_[1].get(), held_[2].get(), n_, k_, group_, element(bf16_)};
    return said(fh_w4a16_linear(&weight, c.x[0], c.y[0], int(c.in[0].rows()), &facts_, c.stream));
  }
  std::unique_ptr<Operation> copy() const override { return std::make_unique<W4A16Linear>(*this); }

 private:
  Weights weights_;
  std::string codes_, scales_, zeros_;
  int32_t n_ = 0, k_ = 0, group_ = 0, bf16_ = 0;
  Weight held_[3];  // codes, scales, zeros
};

}  // namespace

std::unique_ptr<Operation> make_w4a16_linear() { return std::make_unique<W4A16Linear>(); }

}  // namespace flashhead
