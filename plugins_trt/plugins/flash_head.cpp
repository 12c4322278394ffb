// FlashHead: hidden [B, d] or [B, S, d], of the latter the last state of each -> token int32 [B], candidate_ids int32 [B, C], candidate_logits float32
//   [B, C], counts int32 [B, 2 + stages] (clusters opened, slots that each code let through, rows scored exactly: the candidates), capped int32 [B];
//   with logits=1 then logits float32 [B, vocab]; with sampling=1 six more inputs, temperature, top_p, min_p float32 [B], top_k int32 [B], seed int32
//   [B, 2] (halves of 64 bits, the low one first), step int32 [B], and a last output, logprob float32 [B] (kernels/head_step.h, decode.h, settings.h).
//   fields: rows (place of [vocab or more, hidden]), image, bias (places; bias may be ""), bf16, vocab, hidden, candidates, stages, logits (0),
//   sampling (0), logit_scale (1), softcap (0: none), plans (the launches of 1, 2, .. max_rows states, one after the other), plan_words (of one), max_rows
//
// candidate_ids and candidate_logits behind a row's number of candidates are left as they are. candidate_logits are the raw ones; scale and soft-cap are
// applied to a copy that the draw reads. B is at most max_rows. The plans are for one device; another one is refused.
#include <cstring>

#include "decode.h"
#include "head_step.h"
#include "operation.h"
#include "settings.h"

namespace flashhead {
namespace {

constexpr int kFloats = 3;  // settings of a row: temperature, top_p, min_p; then top_k, seed, step
constexpr int kSettings = 6;

class FlashHead final : public Operation {
 public:
  const char* name() const override { return "FlashHead"; }
  std::vector<Binding> fields() override {
    std::vector<Binding> all = {bind("rows", rows_),
                                bind("image", image_),
                                bind("bias", bias_, true),
                                bind("bf16", bf16_, true),
                                bind("vocab", vocab_),
                                bind("hidden", hidden_),
                                bind("candidates", candidates_),
                                bind("stages", stages_),
                                bind("logits", logits_, true),
                                bind("sampling", sampling_, true),
                                bind("logit_scale", logit_scale_, true),
                                bind("softcap", softcap_, true),
                                bind("plans", plans_),
                                bind("plan_words", plan_words_),
                                bind("max_rows", max_rows_)};
    weights_.bind_to(all);
    return all;
  }
  int inputs() const override { return sampling_ ? 1 + kSettings : 1; }
  int outputs() const override { return 5 + logits_ + sampling_; }
  const char* label(int position) const override {
    static const char* const kInputs[] = {"hidden", "temperature", "top_p", "min_p", "top_k", "seed", "step"};
    static const char* const kOutputs[] = {"token", "candidate_ids", "candidate_logits", "counts", "capped"};
    if (position < inputs()) return kInputs[position];
    const int output = position - inputs();
    return output < 5 ? kOutputs[output] : output == logits_at() ? "logits" : "logprob";
  }
  Type type(int position) const override {
    if (position == 0) return activation_type(bf16_);
    if (position < inputs()) return position <= kFloats ? Type::fp32 : Type::int32;
    const int output = position - inputs();
    return output == 2 || output >= 5 ? Type::fp32 : Type::int32;
  }
  std::vector<Extent> shape(int output, const Tensor*) const override {
    const Extent batch = Extent::of(0, 0);
    if (output == 1 || output == 2) return {batch, Extent::number(candidates_)};
    if (output == 3) return {batch, Extent::number(2 + stages_)};
    if (output == logits_at()) return {batch, Extent::number(vocab_)};
    return {batch};
  }
  Sentence fits(const Tensor* in, int count) const override {
    Shapes shapes(*this, in);
    if (in[0].rank == 2) {
      shapes.want(0, {letter('B'), hidden_});
    } else {
      shapes.want(0, {letter('B'), letter('S'), hidden_});
    }
    for (int i = 1; i < count; ++i) shapes.want(i, i == 5 ? std::vector<int64_t>{letter('B'), 2} : std::vector<int64_t>{letter('B')});
    if (shapes.wrong.empty() && in[0].dims[0] > max_rows_) {
      return format("%lld states at once, expected at most %d, which the head was exported for; lower the batch, or export again with a larger one",
                    (long long)(in[0].dims[0]), max_rows_);
    }
    return shapes.wrong;
  }
  size_t scratch_bytes(const Tensor* in) const override {
    Scratch scratch(nullptr);
    lay_out(scratch, int(in[0].dims[0]), in[0].rank == 3 && in[0].dims[1] != 1);
    return scratch.used;
  }

 protected:
  Sentence check() const override {
    if (logits_ < 0 || logits_ > 1 || sampling_ < 0 || sampling_ > 1) return format("logits is %d and sampling %d, expected 0 or 1", logits_, sampling_);
    if (max_rows_ < 1 || max_rows_ > FLASHHEAD_MAX_ROWS) return format("max_rows is %d, expected 1 to %d; export again", max_rows_, FLASHHEAD_MAX_ROWS);
    const size_t words = sizeof(FlashHeadLayout) / 4;
    if (size_t(plan_words_) != words || plans_.size() != words * size_t(max_rows_)) {
      return format("there are %zu words of plans, %d each, expected %d times %zu; export again with the flashhead-edge of this library", plans_.size(),
                    plan_words_, max_rows_, words);
    }
    if (vocab_ < 1 || hidden_ < 8 || hidden_ % 8) {
      return format("the rows are [%d, %d], expected at least one and a multiple of 8; export again", vocab_, hidden_);
    }
    for (int rows = 1; rows <= max_rows_; ++rows) {
      const FlashHeadLayout plan = plan_of(rows);
      if (plan.vocab_size != vocab_ || plan.hidden_size != hidden_ || plan.candidates != candidates_ || plan.stages != stages_ || plan.row_bytes < 256 ||
          plan.row_bytes != plan_of(1).row_bytes || plan.multiprocessors != plan_of(1).multiprocessors) {
        return format("the plan of %d states is of another head than the fields; export again", rows);
      }
    }
    if (sampling_ && candidates_ > FH_DECODE_CANDIDATES) {
      return format("%d candidates, expected at most %d to draw from; convert the head with lower caps, or set sampling to 0", candidates_,
                    FH_DECODE_CANDIDATES);
    }
    if (!(logit_scale_ > 0) || !(softcap_ >= 0)) {
      return format("logit_scale is %g and softcap %g, expected above 0, and 0 or more", double(logit_scale_), double(softcap_));
    }
    Sentence wrong = weights_.check("rows", rows_, uint64_t(vocab_) * uint64_t(hidden_) * 2, false, true);
    if (wrong.empty()) wrong = weights_.check("image", image_, plan_of(1).image_bytes);
    if (wrong.empty()) wrong = weights_.check("bias", bias_, uint64_t(vocab_) * 2, true, true);
    return wrong;
  }
  Sentence load() override {
    const FlashHeadLayout plan = plan_of(1);
    if (plan.multiprocessors != facts_.multiprocessors || most_shared_bytes() > facts_.shared_bytes) {
      return format("the head's launches are planned for a GPU of %d multiprocessors and %d bytes of shared memory a block or more, this one has %d and %d; "
                    "export on this device",
                    plan.multiprocessors, most_shared_bytes(), facts_.multiprocessors, facts_.shared_bytes);
    }
    Sentence wrong = weights_.load(rows_, held_[0]);
    if (wrong.empty()) wrong = weights_.load(image_, held_[1]);
    if (wrong.empty()) wrong = weights_.load(bias_, held_[2]);
    if (wrong.empty()) wrong = workspace_.allocate(size_t(max_rows_) * plan.row_bytes);
    return wrong;
  }
  void unload() override {
    for (Weight& w : held_) w.reset();
    workspace_.release();
  }

  Sentence launch(const Call& c) override {
    const int rows = int(c.in[0].dims[0]);
    const int64_t queries = c.in[0].rank == 3 ? c.in[0].dims[1] : 1;
    if (rows < 1 || rows > max_rows_ || queries < 1) return format("hidden is %s, expected 1 to %d states", c.in[0].text().c_str(), max_rows_);
    Scratch scratch(c.scratch);
    const Arrays a = lay_out(scratch, rows, queries > 1);

    // The last state of each sequence; a single one is where it is.
    const size_t state = size_t(hidden_) * 2;
    const char* hidden = static_cast<const char*>(c.x[0]);
    if (queries > 1 && rows == 1) hidden += size_t(queries - 1) * state;
    if (queries > 1 && rows > 1) {
      const cudaError_t error = cudaMemcpy2DAsync(a.hidden, state, hidden + size_t(queries - 1) * state, size_t(queries) * state, state, size_t(rows),
                                                  cudaMemcpyDeviceToDevice, c.stream);
      if (error != cudaSuccess) {
        cudaGetLastError();
        return format("the last states could not be copied: CUDA says \"%s\"; look at what ran before", cudaGetErrorString(error));
      }
      hidden = a.hidden;
    }

    float* logits = static_cast<float*>(c.y[2]);
    float* wide = logits_ ? static_cast<float*>(c.y[logits_at()]) : nullptr;
    const int counted = 2 + stages_;
    FlashHeadArguments step{};
    step.layout = plan_of(rows);
    step.hidden = hidden, step.weight = held_[0].get(), step.bias = held_[2].get();
    step.image = static_cast<const unsigned char*>(held_[1].get()), step.workspace = reinterpret_cast<unsigned char*>(workspace_.data());
    step.token = a.token, step.counts = a.counts, step.capped = a.capped, step.ids = a.ids, step.logits = logits, step.wide = wide;
    step.rows = rows, step.hidden_bf16 = bf16_, step.weight_bf16 = bf16_, step.wide_stride = vocab_;
    Sentence wrong = said(fh_head_step(&step, &facts_, c.stream));
    if (wrong.empty() && wide) {
      const FlashHeadLayout& l = step.layout;
      const FlashHeadWiden widen = {a.ids,   logits,      a.counts,         step.image,   step.workspace, wide,         rows,        vocab_,
                                    vocab_,  candidates_, counted,          l.cluster_of_at, l.row_bytes, l.row_scores, l.row_opened, l.tail_scale,
                                    l.tail_offset};
      wrong = said(fh_head_widen(&widen, &facts_, c.stream));
    }
    if (wrong.empty() && sampling_) wrong = draw(c, a, logits, rows);
    if (!wrong.empty()) return wrong;

    const FlashHeadNarrow narrow = {a.token,
                                    a.counts,
                                    a.ids,
                                    a.capped,
                                    static_cast<int*>(c.y[0]),
                                    static_cast<int*>(c.y[3]),
                                    static_cast<int*>(c.y[1]),
                                    static_cast<int*>(c.y[4]),
                                    rows,
                                    counted,
                                    candidates_};
    return said(fh_narrow(&narrow, &facts_, c.stream));
  }
  std::unique_ptr<Operation> copy() const override { return std::make_unique<FlashHead>(*this); }

 private:
  struct Arrays {  // in scratch memory
    char* hidden;
    long long *token, *counts, *ids;
    unsigned char* capped;
    double* settings[kFloats];
    long long *top_k, *step, *best_ids;
    float *final_logits, *best_logprobs;
  };

  int logits_at() const { return logits_ ? 5 : -1; }
  bool scales() const { return logit_scale_ != 1 || softcap_ != 0; }

  FlashHeadLayout plan_of(int rows) const {
    FlashHeadLayout plan;
    memcpy(&plan, plans_.data() + size_t(rows - 1) * (sizeof plan / 4), sizeof plan);
    return plan;
  }
  int most_shared_bytes() const {
    int most = 0;
    for (int rows = 1; rows <= max_rows_; ++rows) most = plan_of(rows).shared_bytes > most ? plan_of(rows).shared_bytes : most;
    return most;
  }

  Arrays lay_out(Scratch& s, int rows, bool gathers) const {
    const size_t n = size_t(rows), width = size_t(candidates_);
    Arrays a{};
    if (gathers) a.hidden = s.take<char>(n * size_t(hidden_) * 2);
    a.token = s.take<long long>(n), a.counts = s.take<long long>(n * size_t(2 + stages_)), a.ids = s.take<long long>(n * width);
    a.capped = s.take<unsigned char>(n);
    if (!sampling_) return a;
    for (double*& setting : a.settings) setting = s.take<double>(n);
    a.top_k = s.take<long long>(n), a.step = s.take<long long>(n), a.best_ids = s.take<long long>(n), a.best_logprobs = s.take<float>(n);
    if (scales()) a.final_logits = s.take<float>(n * width);
    return a;
  }

  // From the step's candidates to a drawn token.
  Sentence draw(const Call& c, const Arrays& a, const float* logits, int rows) {
    const int counted = 2 + stages_;
    const long long* count = a.counts + counted - 1;
    FlashHeadSettings s{};
    s.temperature = static_cast<const float*>(c.x[1]), s.top_p = static_cast<const float*>(c.x[2]), s.min_p = static_cast<const float*>(c.x[3]);
    s.top_k = static_cast<const int*>(c.x[4]), s.step = static_cast<const int*>(c.x[6]);
    s.wide_temperature = a.settings[0], s.wide_top_p = a.settings[1], s.wide_min_p = a.settings[2], s.wide_top_k = a.top_k, s.wide_step = a.step;
    if (scales()) s.logits = logits, s.final_logits = a.final_logits, s.count = count;
    s.scale = double(logit_scale_), s.softcap = double(softcap_), s.rows = rows, s.width = candidates_, s.count_stride = counted;
    const Sentence wrong = said(fh_draw_settings(&s, &facts_, c.stream));
    if (!wrong.empty()) return wrong;

    FlashHeadDecode d{};
    d.ids = a.ids, d.logits = scales() ? a.final_logits : logits, d.count = count, d.count_stride = counted;
    d.temperature = a.settings[0], d.top_p = a.settings[1], d.min_p = a.settings[2], d.top_k = a.top_k, d.step = a.step;
    d.seed = static_cast<const unsigned long long*>(c.x[5]);  // two halves, the low one first: it is the number itself
    d.token = a.token, d.logprob = static_cast<float*>(c.y[outputs() - 1]), d.best_ids = a.best_ids, d.best_logprobs = a.best_logprobs;
    d.rows = rows, d.width = candidates_, d.best = 1;  // the log-probability is made where the best is asked for
    return said(fh_decode(&d, &facts_, c.stream));
  }

  Weights weights_;
  std::string rows_, image_, bias_;
  int32_t bf16_ = 0, vocab_ = 0, hidden_ = 0, candidates_ = 0, stages_ = 0, logits_ = 0, sampling_ = 0, plan_words_ = 0, max_rows_ = 0;
  float logit_scale_ = 1, softcap_ = 0;
  std::vector<int32_t> plans_;
  Weight held_[3];  // rows, image, bias
  Own workspace_;   // a row's part for each of max_rows states
};

}  // namespace

std::unique_ptr<Operation> make_flash_head() { return std::make_unique<FlashHead>(); }

}  // namespace flashhead
