// TokenEmbedding: ids int32 [..] -> x [.., d], rows of a matrix (kernels/embedding.h).
//   fields: rows (place of [vocab, d]), vocab, d, bf16, scale (1)
#include "embedding.h"
#include "operation.h"

namespace flashhead {
namespace {

class TokenEmbedding final : public Operation {
 public:
  const char* name() const override { return "TokenEmbedding"; }
  std::vector<Binding> fields() override {
    std::vector<Binding> all = {bind("rows", rows_), bind("vocab", vocab_), bind("d", d_), bind("bf16", bf16_, true), bind("scale", scale_, true)};
    weights_.bind_to(all);
    return all;
  }
  int inputs() const override { return 1; }
  int outputs() const override { return 1; }
  const char* label(int position) const override { return position ? "x" : "ids"; }
  Type type(int position) const override { return position ? activation_type(bf16_) : Type::int32; }
  std::vector<Extent> shape(int, const Tensor* in) const override {
    std::vector<Extent> all;
    for (int i = 0; i < in[0].rank; ++i) all.push_back(Extent::of(0, i));
    all.push_back(Extent::number(d_));
    return all;
  }
  Sentence fits(const Tensor* in, int) const override {
    if (in[0].rank < kMostDims) return {};
    return format("input ids is %s, expected fewer than %d dimensions; flatten it", in[0].text().c_str(), kMostDims);
  }

 protected:
  Sentence check() const override {
    if (vocab_ < 1 || d_ < 8 || d_ % 8) return format("the rows are [%d, %d], expected at least one and a multiple of 8; export again", vocab_, d_);
    return weights_.check("rows", rows_, uint64_t(vocab_) * uint64_t(d_) * 2, false, true);
  }
  Sentence load() override { return weights_.load(rows_, matrix_); }
  void unload() override { matrix_.reset(); }
  Sentence launch(const Call& c) override {
    const int count = int(c.in[0].rows() * c.in[0].last());
    return said(fh_embedding(static_cast<const int*>(c.x[0]), matrix_.get(), scale_, c.y[0], count, vocab_, d_, element(bf16_), &facts_, c.stream));
  }
  std::unique_ptr<Operation> copy() const override { return std::make_unique<TokenEmbedding>(*this); }

 private:
  Weights weights_;
  std::string rows_;
  int32_t vocab_ = 0, d_ = 0, bf16_ = 0;
  float scale_ = 1;
  Weight matrix_;
};

}  // namespace

std::unique_ptr<Operation> make_token_embedding() { return std::make_unique<TokenEmbedding>(); }

}  // namespace flashhead
