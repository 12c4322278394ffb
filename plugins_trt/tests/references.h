// references.h: what the plugins compute, once more on the host in float64, for the harness; and a file of weights for them to read.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace reference {

using u16 = uint16_t;

struct Element {  // float16 or bfloat16
  bool bf16;
  double unit() const { return bf16 ? 0x1p-8 : 0x1p-11; }  // of one rounding, relative
  float get(u16 bits) const {
    if (bf16) {
      __nv_bfloat16_raw r;
      r.x = bits;
      return __bfloat162float(__nv_bfloat16(r));
    }
    __half_raw r;
    r.x = bits;
    return __half2float(__half(r));
  }
  u16 put(double value) const {
    return bf16 ? static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(float(value))).x : static_cast<__half_raw>(__float2half_rn(float(value))).x;
  }
};

inline std::mt19937& random() {
  static std::mt19937 generator(17);
  return generator;
}

inline std::vector<u16> normal(Element e, size_t count, double spread = 1) {
  std::normal_distribution<double> d(0, spread);
  std::vector<u16> all(count);
  for (u16& v : all) v = e.put(d(random()));
  return all;
}

inline std::vector<uint8_t> whole(size_t count, int most) {
  std::uniform_int_distribution<int> d(0, most);
  std::vector<uint8_t> all(count);
  for (uint8_t& v : all) v = uint8_t(d(random()));
  return all;
}

// A safetensors file of bytes; the plugins look at places only.
class Weights {
 public:
  template <class T>
  void add(const std::string& name, const std::vector<T>& values) {
    const char* at = reinterpret_cast<const char*>(values.data());
    places_[name] = {bytes_.size(), values.size() * sizeof(T)};
    bytes_.insert(bytes_.end(), at, at + values.size() * sizeof(T));
    bytes_.resize((bytes_.size() + 15) / 16 * 16);
  }
  void write(const std::string& folder) {
    std::string json = "{";
    for (const auto& [name, place] : places_) {
      json += (json.size() > 1 ? ",\"" : "\"") + name + "\":{\"dtype\":\"U8\",\"shape\":[" + std::to_string(place.second) + "],\"data_offsets\":[" +
              std::to_string(place.first) + "," + std::to_string(place.first + place.second) + "]}";
    }
    json += "}";
    json.resize((json.size() + 15) / 16 * 16 + 8, ' ');
    head_.clear();
    for (int i = 0; i < 8; ++i) head_ += char(json.size() >> (8 * i) & 255);
    head_ += json;
    FILE* file = fopen((folder + "/weights.safetensors").c_str(), "wb");
    fwrite(head_.data(), 1, head_.size(), file);
    fwrite(bytes_.data(), 1, bytes_.size(), file);
    fclose(file);
  }
  std::string place(const std::string& name) const {
    const auto& p = places_.at(name);
    return std::to_string(head_.size() + p.first) + " " + std::to_string(p.second);
  }
  std::string fingerprint() const {
    uint64_t hash = 0xcbf29ce484222325ull;
    for (const char c : head_) hash = (hash ^ uint8_t(c)) * 0x100000001b3ull;
    char text[17];
    snprintf(text, sizeof text, "%016llx", (unsigned long long)(hash));
    return text;
  }

 private:
  std::map<std::string, std::pair<size_t, size_t>> places_;
  std::vector<char> bytes_;
  std::string head_;
};

// A matrix of 4-bit weights in the packed layout, written from the text of kernels/w4a16.h, and its values.
struct Matrix {
  int n, k, group;
  std::vector<uint8_t> codes, zeros;
  std::vector<u16> scales;
  std::vector<double> values;  // [n, k]

  Matrix(Element e, int n_, int k_, int group_, bool symmetric) : n(n_), k(k_), group(group_) {
    const int groups = k / group;
    const auto neutral = whole(size_t(n) * size_t(k), 15), zero = whole(size_t(n) * size_t(groups), 15);
    const auto scale = normal(e, size_t(n) * size_t(groups), 0.05);
    codes.assign(size_t(n) * size_t(k) / 2, 0), scales.assign(scale.size(), 0), values.resize(size_t(n) * size_t(k));
    if (!symmetric) zeros.assign(zero.size(), 0);
    for (int r = 0; r < n; ++r) {
      for (int g = 0; g < groups; ++g) {
        const size_t from = size_t(r) * groups + g, to = (size_t(r / 16) * groups + g) * 16 + r % 16;
        scales[to] = scale[from];
        if (!symmetric) zeros[to] = zero[from];
      }
      for (int c = 0; c < k; ++c) {
        const size_t at = size_t(r) * k + c, in_groups = size_t(r) * groups + c / group;
        values[at] = (int(neutral[at]) - (symmetric ? 8 : int(zero[in_groups]))) * double(e.get(scale[in_groups]));
        // lane 4 g + t: words {row 2g, row 2g + 1} of k 0..31, then of 32..63; k = 8 t .. 8 t + 7, even ones in nibbles 0 to 3, odd ones in 4 to 7
        const int row = r % 16, column = c % 64, t = column % 32 / 8, j = column % 8;
        const int lane = 4 * (row / 2) + t, word = column / 32 * 2 + row % 2, nibble = j % 2 * 4 + j / 2;
        const size_t byte = (size_t(r / 16) * (k / 64) + c / 64) * 512 + size_t(lane) * 16 + size_t(word) * 4 + size_t(nibble / 2);
        codes[byte] = uint8_t(codes[byte] | neutral[at] << (nibble % 2 * 4));
      }
    }
  }
};

// Standard Gumbel noise of a token, as flashhead_edge.decoding defines it.
inline double gumbel(uint64_t seed, uint32_t step, uint32_t id) {
  uint32_t c0 = id, c1 = step, c2 = 0, c3 = 0, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0, c1 = uint32_t(b), c2 = uint32_t(a >> 32) ^ c3 ^ k1, c3 = uint32_t(a);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const uint64_t x = (uint64_t(c0 >> 6) << 26) | (c1 >> 6);
  return -std::log(-std::log((double(x) + 0.5) * 0x1p-52));
}

}  // namespace reference
