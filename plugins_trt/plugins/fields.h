// fields.h: a plugin's settings by name, as every TensorRT hands them over, and as one string of bytes.
//
// The string of bytes is what a V2 plugin leaves in an engine. Little-endian:
//   uint32 "FHPL" (0x4c504846), uint32 format, uint32 bytes in all, uint32 number of fields; then of each field
//   uint32 kind (0 whole numbers, 1 real numbers, 2 text), uint32 length of the name, uint32 number of values; the name; the values:
//   int32, float32 or characters. Nothing is padded, nothing ends with a zero.
// A V3 plugin leaves the same fields in TensorRT's own form, and among them `format`, the same number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "sentence.h"

namespace flashhead {

// Rises when a reader of the old one would read something else out of it, or want more scratch memory than an engine has for it. 2: products have what
// stands around them; 3: other blocks share a sequence's attention.
constexpr int kFormat = 3;

enum class Kind : uint32_t { whole, real, text };

struct Field {
  std::string name;
  Kind kind = Kind::whole;
  std::vector<int32_t> whole;
  std::vector<float> real;
  std::string text;
};

// A field of a plugin, and where its value lives.
struct Binding {
  const char* name;
  Kind kind;
  bool optional;
  bool list;
  void* value;  // int32_t, float, std::string; a list: std::vector<int32_t>
};

inline Binding bind(const char* name, int32_t& value, bool optional = false) { return {name, Kind::whole, optional, false, &value}; }
inline Binding bind(const char* name, float& value, bool optional = false) { return {name, Kind::real, optional, false, &value}; }
inline Binding bind(const char* name, std::string& value, bool optional = false) { return {name, Kind::text, optional, false, &value}; }
inline Binding bind(const char* name, std::vector<int32_t>& value, bool optional = false) { return {name, Kind::whole, optional, true, &value}; }

// Fills the bindings. A field may be missing where it is optional; `format` is checked; ONNX's plugin_version and plugin_namespace are passed over.
Sentence read_fields(const std::vector<Field>& fields, const std::vector<Binding>& bindings);

std::vector<Field> write_fields(const std::vector<Binding>& bindings);

std::string to_bytes(const std::vector<Field>& fields);
Sentence from_bytes(const void* data, size_t size, std::vector<Field>& fields);

}  // namespace flashhead
