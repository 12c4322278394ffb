// drive_v3.cpp: all six V3 plugins, driven as TensorRT drives them (play_v3.h) and compared with the host (references.h).
//
//   drive_v3 LIBRARY [--runtime libnvinfer_lean.so.11] [--heads FOLDER] [--build-only]
//
// FOLDER is what made_heads.py wrote. --build-only asks what a builder asks and runs nothing: it needs no GPU. Exit code 0: all is right.
#include <dirent.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <set>

#include "../plugins/fields.h"
#include "play_v3.h"
#include "references.h"

using namespace play;
using reference::Element;
using reference::u16;

namespace {

bool build_only = false;
std::string folder;  // of this run's weights

DataType type_of(Element e) { return e.bf16 ? DataType::kBF16 : DataType::kHALF; }

Array filled(DataType type, std::vector<int64_t> shape, const void* data) {
  Array a(type, std::move(shape));
  memcpy(a.bytes.data(), data, a.bytes.size());
  return a;
}

Array floats(std::vector<float> values) { return filled(DataType::kFLOAT, {int64_t(values.size())}, values.data()); }
Array wholes(std::vector<int> values) { return filled(DataType::kINT32, {int64_t(values.size())}, values.data()); }

Fields source_of(const reference::Weights& w) {
  Fields f;
  f.add("file", std::string("weights.safetensors")).add("folder", folder).add("fingerprint", w.fingerprint());
  return f;
}

// Builds and, unless only that is asked, runs; true where there is something to compare.
bool drive(Library& library, Node& node, bool in_place = true) {
  printf("%s\n", node.name);
  size_t scratch = 0;
  Fields stored = build(library, node, scratch);
  WANT(library.device_bytes() == 0, "%lld bytes of weights after building", library.device_bytes());
  if (build_only || !run(library, node, stored, scratch, in_place)) return false;
  WANT(library.device_bytes() == 0, "%lld bytes of weights are left", library.device_bytes());
  return true;
}

// Every value within `bound` of what is wanted; NaN is never within.
template <class Want, class Bound>
void compare(const char* what, Element e, Array& got, Want want, Bound bound) {
  double worst = 0;
  int64_t at = -1;
  for (int64_t i = 0; i < got.count(); ++i) {
    const double w = want(i), error = std::fabs(double(e.get(got.as<u16>()[i])) - w) / bound(i, w);
    if (!(error <= worst)) worst = error, at = i;
  }
  WANT(worst <= 1, "%s: value %lld is %g, expected %g, %g times the bound", what, (long long)(at), double(e.get(got.as<u16>()[at])), want(at), worst);
}

void embedding(Library& library, Element e) {
  const int vocab = 100, d = 576;
  reference::Weights w;
  const auto rows = reference::normal(e, size_t(vocab) * d);
  w.add("rows", rows);
  w.write(folder);
  const std::vector<int> ids = {0, 99, 7, -1, 100, 50};
  for (const float scale : {1.f, 24.f}) {
    Node node{"TokenEmbedding", source_of(w), {filled(DataType::kINT32, {2, 3}, ids.data())}, {Array(type_of(e), {2, 3, d})}};
    node.fields.add("rows", w.place("rows")).add("vocab", vocab).add("d", d).add("bf16", int(e.bf16)).add("scale", scale);
    if (!drive(library, node)) continue;
    for (size_t i = 0; i < ids.size(); ++i) {
      bool right = true;
      for (int c = 0; c < d; ++c) {
        const u16 got = node.out[0].as<u16>()[i * d + c];
        right = right && (ids[i] < 0 || ids[i] >= vocab ? std::isnan(e.get(got)) : got == e.put(e.get(rows[size_t(ids[i]) * d + c]) * scale));
      }
      WANT(right, "row of id %d", ids[i]);
    }
  }
}

void norm(Library& library, Element e) {
  const int d = 576, tokens = 6;
  reference::Weights w;
  const auto weight = reference::normal(e, d), x = reference::normal(e, size_t(tokens) * d), residual = reference::normal(e, size_t(tokens) * d, 3);
  w.add("weight", weight);
  w.write(folder);
  for (const int sums : {0, 1}) {
    const float offset = float(sums), epsilon = 1e-5f;
    Node node{"RmsNorm", source_of(w), {filled(type_of(e), {2, 3, d}, x.data())}, {Array(type_of(e), {2, 3, d})}};
    if (sums) node.in.push_back(filled(type_of(e), {2, 3, d}, residual.data())), node.out.push_back(Array(type_of(e), {2, 3, d}));
    node.fields.add("weight", w.place("weight")).add("d", d).add("offset", offset).add("epsilon", epsilon).add("bf16", int(e.bf16));
    if (!drive(library, node)) continue;
    std::vector<double> h(x.size()), factor(tokens);
    for (size_t i = 0; i < x.size(); ++i) h[i] = e.get(sums ? e.put(e.get(x[i]) + e.get(residual[i])) : x[i]);
    for (int t = 0; t < tokens; ++t) {
      double squares = 0;
      for (int c = 0; c < d; ++c) squares += h[size_t(t * d + c)] * h[size_t(t * d + c)];
      factor[size_t(t)] = 1 / std::sqrt(squares / d + epsilon);
    }
    const auto want = [&](int64_t i) { return h[size_t(i)] * factor[size_t(i / d)] * (offset + e.get(weight[size_t(i % d)])); };
    compare("y", e, node.out[0], want, [&](int64_t, double v) { return (e.unit() + 0x1p-20) * std::fabs(v) + 0x1p-25; });
    if (sums) compare("sum", e, node.out[1], [&](int64_t i) { return h[size_t(i)]; }, [](int64_t, double) { return 1e-300; });
  }
}

void gated(Library& library, Element e) {
  const int f = 136, tokens = 6;
  const auto x = reference::normal(e, size_t(tokens) * 2 * f, 2);
  for (const int activation : {0, 1}) {
    Node node{"GatedProduct", {}, {filled(type_of(e), {2, 3, 2 * f}, x.data())}, {Array(type_of(e), {2, 3, f})}};
    node.fields.add("activation", activation).add("bf16", int(e.bf16));
    if (!drive(library, node)) continue;
    const auto want = [&](int64_t i) {
      const double g = e.get(x[size_t(i / f * 2 * f + i % f)]), up = e.get(x[size_t(i / f * 2 * f + f + i % f)]);
      return up * (activation ? 0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g))) : g / (1 + std::exp(-g)));
    };
    compare("y", e, node.out[0], want, [&](int64_t, double v) { return (e.unit() + 0x1p-16) * std::fabs(v) + 0x1p-16; });
  }
}

void linear(Library& library, Element e) {
  const int n = 272, k = 320;
  for (const int group : {32, 64}) {
    const bool symmetric = group == 32;
    const reference::Matrix m(e, n, k, group, symmetric);
    reference::Weights w;
    w.add("codes", m.codes);
    w.add("scales", m.scales);
    if (!symmetric) w.add("zeros", m.zeros);
    w.write(folder);
    for (const int tokens : {1, 5, 8, 9, 70, 300}) {  // decode, the edge between the two, and a prefill's tiles
      const auto x = reference::normal(e, size_t(tokens) * k);
      Node node{"W4A16Linear", source_of(w), {filled(type_of(e), {1, tokens, k}, x.data())}, {Array(type_of(e), {1, tokens, n})}};
      node.fields.add("codes", w.place("codes")).add("scales", w.place("scales")).add("zeros", symmetric ? std::string() : w.place("zeros"));
      node.fields.add("n", n).add("k", k).add("group", group).add("bf16", int(e.bf16));
      if (!drive(library, node)) continue;
      const auto sum = [&](int64_t i, bool sizes) {
        double total = 0;
        for (int c = 0; c < k; ++c) {
          const double product = m.values[size_t(i % n) * k + size_t(c)] * e.get(x[size_t(i / n) * k + size_t(c)]);
          total += sizes ? std::fabs(product) : product;
        }
        return total;
      };
      // a prefill may round a weight to the type before it multiplies
      compare("y", e, node.out[0], [&](int64_t i) { return sum(i, false); },
              [&](int64_t i, double v) { return e.unit() * std::fabs(v) + (e.unit() + k * 0x1p-24) * sum(i, true) + 0x1p-25; });
    }
  }
}

// A product with what stands around it gives the bits of the plugins one after the other: up to eight rows in one launch, more in several.
void around(Library& library, Element e) {
  const int n = 288, k = 320, group = 64;
  const float offset = 1, epsilon = 1e-5f;
  const reference::Matrix m(e, n, k, group, false);
  reference::Weights w;
  w.add("codes", m.codes);
  w.add("scales", m.scales);
  w.add("zeros", m.zeros);
  w.add("first", reference::normal(e, k, 0.1));
  w.add("norm", reference::normal(e, k, 0.1));
  w.write(folder);
  const auto product = [&](Array x, int tokens, int columns) {
    Node node{"W4A16Linear", source_of(w), {std::move(x)}, {Array(type_of(e), {1, tokens, columns})}};
    node.fields.add("codes", w.place("codes")).add("scales", w.place("scales")).add("zeros", w.place("zeros"));
    node.fields.add("n", n).add("k", k).add("group", group).add("bf16", int(e.bf16));
    return node;
  };
  for (const int tokens : {1, 5, 8, 9, 70}) {
    const auto x = reference::normal(e, size_t(tokens) * k), residual = reference::normal(e, size_t(tokens) * k, 3);
    const Array rows = filled(type_of(e), {1, tokens, k}, x.data()), skipped = filled(type_of(e), {1, tokens, k}, residual.data());
    const auto normed = [&](Node& node, const char* weight) {
      node.fields.add("weight", w.place(weight)).add("d", k).add("offset", offset).add("epsilon", epsilon).add("bf16", int(e.bf16));
      return drive(library, node);
    };
    for (const int parts : {0, 1, 3, 7, 15, 9}) {  // 1: a norm; 2: with residual; 4: behind a norm of its own; 8: gated. 0: early alone
      const bool norm = parts & 1, sums = parts & 2, twice = parts & 4, gate = parts & 8;
      Node whole = product(rows, tokens, gate ? n / 2 : n);
      if (norm) whole.fields.add("norm", w.place("norm")).add("offset", offset).add("epsilon", epsilon);
      if (twice) whole.fields.add("first_norm", w.place("first"));
      if (sums) whole.fields.add("residual", 1), whole.in.push_back(skipped), whole.out.push_back(rows);
      if (gate) whole.fields.add("gated", 1).add("activation", 1);
      if (!norm) whole.fields.add("early", 1);
      printf("parts %d of %d rows: ", parts, tokens);
      if (!drive(library, whole)) continue;

      Array at = rows, sum = rows;
      if (twice) {
        Node first{"RmsNorm", source_of(w), {at}, {at}};
        if (!normed(first, "first")) continue;
        at = first.out[0];
      }
      if (norm) {
        Node second{"RmsNorm", source_of(w), {at}, {at}};
        if (sums) second.in.push_back(skipped), second.out.push_back(at);
        if (!normed(second, "norm")) continue;
        at = second.out[0], sum = second.out.back();
      }
      Node linear = product(at, tokens, n);
      if (!drive(library, linear)) continue;
      Array y = linear.out[0];
      if (gate) {
        Node last{"GatedProduct", {}, {y}, {Array(type_of(e), {1, tokens, n / 2})}};
        last.fields.add("activation", 1).add("bf16", int(e.bf16));
        if (!drive(library, last)) continue;
        y = last.out[0];
      }
      WANT(whole.out[0].bytes == y.bytes, "other bits than one after the other");
      if (sums) WANT(whole.out[1].bytes == sum.bytes, "another sum than one after the other");
    }
  }
}

struct Attention {
  int batch, queries, q_heads, kv_heads, head_size, length, window;
  bool norms;
  std::vector<int> lengths;
};

void attention(Library& library, Element e, const Attention& a) {
  const int heads = a.q_heads + 2 * a.kv_heads, hs = a.head_size, half = hs / 2;
  const float scale = 1 / std::sqrt(float(hs)), epsilon = 1e-6f;
  std::vector<float> rotations(size_t(a.length) * hs);
  for (int p = 0; p < a.length; ++p) {
    for (int i = 0; i < half; ++i) {
      const double angle = p * std::pow(1e4, -2.0 * i / hs);
      rotations[size_t(p * half + i) * 2] = float(std::cos(angle)), rotations[size_t(p * half + i) * 2 + 1] = float(std::sin(angle));
    }
  }
  reference::Weights w;
  const auto q_norm = reference::normal(e, size_t(hs)), k_norm = reference::normal(e, size_t(hs));
  w.add("rotations", rotations);
  w.add("q", q_norm);
  w.add("k", k_norm);
  w.write(folder);
  const std::vector<int64_t> cache = {a.batch, a.kv_heads, a.length, hs};
  const auto qkv = reference::normal(e, size_t(a.batch) * size_t(a.queries) * size_t(heads) * size_t(hs));
  const size_t cached = size_t(a.batch) * size_t(a.kv_heads) * size_t(a.length) * size_t(hs);
  const auto past_k = reference::normal(e, cached), past_v = reference::normal(e, cached);
  std::vector<char> in_place;
  for (const bool same : {true, false}) {
    const DataType type = type_of(e);
    Node node{"DecodeAttention",
              source_of(w),
              {filled(type, {a.batch, a.queries, heads * hs}, qkv.data()), filled(type, cache, past_k.data()), filled(type, cache, past_v.data()),
               wholes(a.lengths)},
              {Array(type, {a.batch, a.queries, a.q_heads * hs}), Array(type, cache), Array(type, cache)}};
    node.out[1].alias = 1, node.out[2].alias = 2;
    node.fields.add("q_heads", a.q_heads).add("kv_heads", a.kv_heads).add("head_size", hs).add("max_length", a.length).add("window", a.window);
    node.fields.add("scale", scale).add("rotations", w.place("rotations")).add("q_norm", a.norms ? w.place("q") : std::string());
    node.fields.add("k_norm", a.norms ? w.place("k") : std::string()).add("norm_offset", 0.f).add("epsilon", epsilon).add("bf16", int(e.bf16));
    if (!drive(library, node, same)) continue;
    std::vector<char> all;
    for (const Array& out : node.out) all.insert(all.end(), out.bytes.begin(), out.bytes.end());
    if (!same) {
      WANT(all == in_place, "a copied cache gives other bits than one written in place");
      continue;
    }
    in_place = all;
    bool within = true;
    for (const int length : a.lengths) within = within && length >= a.queries && length <= a.length;
    if (!within) continue;  // that it ends is all that is asked

    const auto turned = [&](int b, int token, int head, const std::vector<u16>& gain, int position) {  // one head's values
      const u16* from = &qkv[((size_t(b) * size_t(a.queries) + size_t(token)) * size_t(heads) + size_t(head)) * size_t(hs)];
      double squares = 0;
      for (int i = 0; i < hs; ++i) squares += double(e.get(from[i])) * e.get(from[i]);
      const double factor = 1 / std::sqrt(squares / hs + epsilon);
      std::vector<double> x(static_cast<size_t>(hs)), y(x.size());
      for (int i = 0; i < hs; ++i) x[size_t(i)] = e.get(from[i]) * (a.norms ? factor * e.get(gain[size_t(i)]) : 1);
      for (int i = 0; i < half; ++i) {
        const double c = rotations[size_t(position * half + i) * 2], s = rotations[size_t(position * half + i) * 2 + 1];
        y[size_t(i)] = x[size_t(i)] * c - x[size_t(i + half)] * s, y[size_t(i + half)] = x[size_t(i + half)] * c + x[size_t(i)] * s;
      }
      return y;
    };
    auto keys = past_k, values = past_v;
    for (int b = 0; b < a.batch; ++b) {
      for (int t = 0; t < a.queries; ++t) {
        const int position = a.lengths[size_t(b)] - a.queries + t;
        for (int h = 0; h < a.kv_heads; ++h) {
          const size_t at = ((size_t(b) * size_t(a.kv_heads) + size_t(h)) * size_t(a.length) + size_t(position)) * size_t(hs);
          const auto key = turned(b, t, a.q_heads + h, k_norm, position);
          for (int i = 0; i < hs; ++i) keys[at + size_t(i)] = e.put(key[size_t(i)]);
          const size_t from = (size_t(b) * size_t(a.queries) + size_t(t)) * size_t(heads) + size_t(a.q_heads + a.kv_heads + h);
          memcpy(&values[at], &qkv[from * size_t(hs)], size_t(hs) * 2);
        }
      }
    }
    compare("present_k", e, node.out[1], [&](int64_t i) { return double(e.get(keys[size_t(i)])); },
            [&](int64_t i, double v) { return keys[size_t(i)] == past_k[size_t(i)] ? 1e-300 : 4 * e.unit() * std::fabs(v) + 0x1p-18; });
    WANT(!memcmp(values.data(), node.out[2].bytes.data(), node.out[2].bytes.size()), "present_v");
    memcpy(keys.data(), node.out[1].bytes.data(), node.out[1].bytes.size());  // what is read from here on is what was written

    std::vector<double> want(size_t(node.out[0].count())), largest(want.size());
    for (int b = 0; b < a.batch; ++b) {
      for (int t = 0; t < a.queries; ++t) {
        const int position = a.lengths[size_t(b)] - a.queries + t, first = a.window ? std::max(0, position + 1 - a.window) : 0;
        for (int h = 0; h < a.q_heads; ++h) {
          const auto query = turned(b, t, h, q_norm, position);
          const size_t head_at = (size_t(b) * size_t(a.kv_heads) + size_t(h / (a.q_heads / a.kv_heads))) * size_t(a.length) * size_t(hs);
          std::vector<double> score;
          double highest = -1e300, total = 0;
          for (int p = first; p <= position; ++p) {
            double s = 0;
            for (int i = 0; i < hs; ++i) s += double(e.get(e.put(query[size_t(i)]))) * e.get(keys[head_at + size_t(p) * size_t(hs) + size_t(i)]);
            score.push_back(s * scale), highest = std::max(highest, s * scale);
          }
          for (double& s : score) s = std::exp(s - highest), total += s;
          const size_t out = ((size_t(b) * size_t(a.queries) + size_t(t)) * size_t(a.q_heads) + size_t(h)) * size_t(hs);
          for (int i = 0; i < hs; ++i) {
            for (int p = first; p <= position; ++p) {
              const double v = e.get(values[head_at + size_t(p) * size_t(hs) + size_t(i)]);
              want[out + size_t(i)] += score[size_t(p - first)] / total * v;
              largest[out + size_t(i)] = std::max(largest[out + size_t(i)], std::fabs(v));
            }
          }
        }
      }
    }
    // A query may be rounded the other way: its scores move by u sum |q k| scale, some 10 u; weights are rounded to the type.
    compare("out", e, node.out[0], [&](int64_t i) { return want[size_t(i)]; },
            [&](int64_t i, double v) { return e.unit() * std::fabs(v) + 24 * e.unit() * largest[size_t(i)]; });
  }
}

std::vector<char> file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return std::vector<char>(std::istreambuf_iterator<char>(in), {});
}

// A head of made_heads.py: `batch` states, each the last of `queries`; a row greedy, one that keeps the best only, the others drawn.
void head(Library& library, const std::string& at, int batch, int queries) {
  std::vector<flashhead::Field> fields;
  const auto bytes = file(at + "/fields.bin"), states = file(at + "/hidden.bin"), tokens = file(at + "/tokens.bin");
  const auto weights = file(at + "/weights.safetensors");
  const std::string wrong = flashhead::from_bytes(bytes.data(), bytes.size(), fields);
  WANT(wrong.empty(), "%s", wrong.c_str());
  Node node{"FlashHead", {}, {}, {}};
  std::map<std::string, int> n;
  std::map<std::string, std::string> text;
  float scale = 1, softcap = 0;
  for (const flashhead::Field& f : fields) {
    if (f.kind == flashhead::Kind::text) node.fields.add(f.name.c_str(), f.text), text[f.name] = f.text;
    if (f.kind == flashhead::Kind::whole) node.fields.add(f.name.c_str(), f.whole), n[f.name] = f.whole[0];
    if (f.kind == flashhead::Kind::real) node.fields.add(f.name.c_str(), f.real[0]), (f.name == "softcap" ? softcap : scale) = f.real[0];
  }
  const int d = n["hidden"], width = n["candidates"], vocab = n["vocab"], counted = 2 + n["stages"];
  batch = batch ? batch : n["max_rows"];
  printf("%s, %d states, the last of %d\n", at.c_str(), batch, queries);
  const Element e{n["bf16"] != 0};
  const u16* hidden = reinterpret_cast<const u16*>(states.data());
  const u16* rows = reinterpret_cast<const u16*>(weights.data() + strtoull(text["rows"].c_str(), nullptr, 10));
  const char* refused = library.symbol<const char* (*)(const char*)>("flashhead_add_folder")(at.c_str());
  WANT(!refused, "%s", refused);

  Array in(type_of(e), queries > 1 ? std::vector<int64_t>{batch, queries, d} : std::vector<int64_t>{batch, d});
  for (int b = 0; b < batch; ++b) {
    for (int q = 0; q < queries; ++q) {  // states before the last are others
      const int state = q + 1 == queries ? b : 31 - b % 16;
      memcpy(in.as<u16>() + (size_t(b) * size_t(queries) + size_t(q)) * size_t(d), hidden + size_t(state) * size_t(d), size_t(d) * 2);
    }
  }
  std::vector<float> temperature(size_t(batch), 0.8f), top_p(size_t(batch), 1.f), min_p(size_t(batch), 0.f);
  std::vector<int> top_k(size_t(batch), 0), step(size_t(batch), 3), seed(size_t(batch) * 2);
  for (int b = 0; b < batch; ++b) seed[size_t(b) * 2] = -1000 - b, seed[size_t(b) * 2 + 1] = b;
  temperature[0] = 0;
  if (batch > 1) top_k[1] = 1;
  node.in = {in, floats(temperature), floats(top_p), floats(min_p), wholes(top_k), filled(DataType::kINT32, {batch, 2}, seed.data()), wholes(step)};
  node.out = {Array(DataType::kINT32, {batch}), Array(DataType::kINT32, {batch, width}), Array(DataType::kFLOAT, {batch, width}),
              Array(DataType::kINT32, {batch, counted}), Array(DataType::kINT32, {batch}), Array(DataType::kFLOAT, {batch, vocab}),
              Array(DataType::kFLOAT, {batch})};
  node.out[1].ordered = node.out[2].ordered = false;  // candidates come in no order
  size_t scratch = 0;
  Fields stored = build(library, node, scratch);
  WANT(library.device_bytes() == 0, "%lld bytes of weights after building", library.device_bytes());
  if (build_only || !run(library, node, stored, scratch)) return;

  int equal = 0;
  for (int b = 0; b < batch; ++b) {
    const int token = node.out[0].as<int>()[b], count = node.out[3].as<int>()[(b + 1) * counted - 1], capped = node.out[4].as<int>()[b];
    const int* ids = node.out[1].as<int>() + size_t(b) * size_t(width);
    const float* logits = node.out[2].as<float>() + size_t(b) * size_t(width);
    const float* wide = node.out[5].as<float>() + size_t(b) * size_t(vocab);
    WANT(count >= 1 && count <= width && (capped == 0 || capped == 1), "row %d: %d candidates, capped %d", b, count, capped);
    std::set<int> once(ids, ids + count);
    WANT(int(once.size()) == count && *once.begin() >= 0 && *once.rbegin() < vocab, "row %d: ids", b);
    int greedy = 0, drawn = 0;
    double most = -1e300, total = 0, chosen = 0;
    std::vector<double> final_logits(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) {
      double dot = 0, sizes = 0;
      for (int c = 0; c < d; ++c) {
        const double product = double(e.get(hidden[size_t(b) * size_t(d) + size_t(c)])) * e.get(rows[size_t(ids[i]) * size_t(d) + size_t(c)]);
        dot += product, sizes += std::fabs(product);
      }
      WANT(std::fabs(logits[i] - dot) <= d * 0x1p-24 * sizes, "row %d: logit of %d is %g, expected %g", b, ids[i], double(logits[i]), dot);
      WANT(wide[ids[i]] == logits[i], "row %d: full-width logit of %d is %g, expected %g", b, ids[i], double(wide[ids[i]]), double(logits[i]));
      const double scaled = double(scale) * logits[i];
      final_logits[size_t(i)] = float(softcap > 0 ? softcap * std::tanh(scaled / softcap) : scaled);
      if (logits[i] > logits[greedy] || (logits[i] == logits[greedy] && ids[i] < ids[greedy])) greedy = i;
      const uint64_t key = uint64_t(uint32_t(seed[size_t(b) * 2])) | uint64_t(b) << 32;
      const double noisy = final_logits[size_t(i)] / double(0.8f) + reference::gumbel(key, 3, uint32_t(ids[i]));
      if (noisy > most) most = noisy, drawn = i;
    }
    for (const double l : final_logits) total += std::exp(l - final_logits[size_t(greedy)]);
    const int want = b < 2 ? greedy : drawn;
    WANT(token == ids[want], "row %d: token %d, expected %d", b, token, ids[want]);
    chosen = final_logits[size_t(want)] - final_logits[size_t(greedy)] - std::log(total);
    WANT(std::fabs(node.out[6].as<float>()[b] - chosen) < 1e-5, "row %d: log-probability %g, expected %g", b, double(node.out[6].as<float>()[b]), chosen);
    equal += ids[greedy] == reinterpret_cast<const int*>(tokens.data())[b];
  }
  printf("  %d of %d greedy tokens are the PyTorch reference's\n", equal, batch);
  WANT(equal * 10 >= batch * 9, "another head");  // float32 decides a few otherwise where a candidate lies at a margin
}

// What a user meets: a sentence, and nothing that runs.
void bad_input(Library& library) {
  reference::Weights w;
  w.add("weight", reference::normal({false}, 64));
  w.write(folder);
  const auto refused = [&](Fields fields, const char* part, bool at_creation) {
    std::unique_ptr<IPluginV3> plugin(library.creator("RmsNorm")->createPlugin("node", fields.collection(), TensorRTPhase::kRUNTIME));
    bool stopped = !plugin;
    if (plugin) {
      auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
      std::unique_ptr<IPluginV3> context(runtime->attachToContext(nullptr));
      stopped = !context;
    }
    WANT(stopped && at_creation == !plugin && strstr(library.last_error(), part), "expected \"%s\", found: %s", part, library.last_error());
  };
  const auto fields = [&](const std::string& place, const std::string& digits) {
    Fields f;
    f.add("weight", place).add("d", 64).add("epsilon", 1e-5f).add("residual", 0);
    f.add("file", std::string("weights.safetensors")).add("folder", folder).add("fingerprint", digits);
    return f;
  };
  refused(fields("17", w.fingerprint()), "offset bytes", true);
  refused(fields("0 126", w.fingerprint()), "expected 128", true);
  Fields other = fields(w.place("weight"), w.fingerprint());
  refused(other.add("format", 1), "in format 1, this library reads 3", true);
  if (build_only) return;  // the others are found when weights go to a device
  refused(fields(w.place("weight"), "0123456789abcdef"), w.fingerprint().c_str(), false);
  refused(fields("1000000 128", w.fingerprint()), "copy the file again", false);
}

}  // namespace

int main(int count, char** values) {
  setvbuf(stdout, nullptr, _IONBF, 0);
  const char *runtime = nullptr, *heads = nullptr;
  for (int i = 2; i < count; ++i) {
    const std::string option = values[i];
    if (option == "--build-only") build_only = true;
    if (option == "--runtime" && i + 1 < count) runtime = values[++i];
    if (option == "--heads" && i + 1 < count) heads = values[++i];
  }
  if (count < 2) return printf("usage: drive_v3 LIBRARY [--runtime LIBNVINFER] [--heads FOLDER] [--build-only]\n"), 2;
  char pattern[] = "/tmp/drive_v3.XXXXXX";
  folder = mkdtemp(pattern);
  Library library;
  library.open(values[1], runtime);
  for (const bool bf16 : {false, true}) {
    const Element e{bf16};
    printf("-- %s\n", bf16 ? "bfloat16" : "float16");
    embedding(library, e);
    norm(library, e);
    gated(library, e);
    linear(library, e);
    around(library, e);
    attention(library, e, {2, 1, 4, 2, 64, 300, 0, false, {5, 300}});
    attention(library, e, {3, 1, 6, 2, 128, 96, 16, true, {1, 17, 96}});
    attention(library, e, {1, 7, 9, 3, 64, 64, 0, false, {40}});
    attention(library, e, {2, 8, 4, 2, 64, 64, 0, true, {8, 64}});  // the most of one launch
    attention(library, e, {2, 9, 4, 2, 64, 64, 0, true, {9, 64}});
    attention(library, e, {40, 1, 8, 8, 64, 32, 0, false, std::vector<int>(40, 20)});  // more items than multiprocessors: no cluster
    attention(library, e, {3, 1, 4, 2, 64, 32, 0, false, {0, 1 << 30, -7}});         // no lengths at all
  }
  attention(library, {false}, {1, 520, 64, 8, 64, 520, 0, false, {520}});  // more arrivals than an instance keeps
  bad_input(library);
  if (heads) {
    std::vector<std::string> names;
    DIR* all = opendir(heads);
    while (const dirent* entry = all ? readdir(all) : nullptr) {
      if (entry->d_name[0] != '.') names.push_back(std::string(heads) + "/" + entry->d_name);
    }
    if (all) closedir(all);
    std::sort(names.begin(), names.end());
    for (const std::string& name : names) {
      head(library, name, 1, 1);
      head(library, name, 0, 1);
      head(library, name, 1, 5);
      head(library, name, 3, 5);
    }
  }
  WANT(library.device_bytes() == 0, "%lld bytes of weights are left", library.device_bytes());
  unlink((folder + "/weights.safetensors").c_str());
  rmdir(folder.c_str());
  printf("%s\n", failures ? "FAILED" : "all right");
  return failures != 0;
}
