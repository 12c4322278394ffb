#include "fields.h"

#include <cstring>

namespace flashhead {
namespace {

constexpr uint32_t kMagic = 0x4c504846;
constexpr const char* kAgain = "build the engine again with this library, or load the library that built it";

const char* name_of(Kind kind) { return kind == Kind::whole ? "whole numbers" : kind == Kind::real ? "real numbers" : "text"; }

size_t count_of(const Field& f) { return f.kind == Kind::whole ? f.whole.size() : f.kind == Kind::real ? f.real.size() : f.text.size(); }

Sentence wrong_format(int found) { return format("the engine holds this plugin in format %d, this library reads %d; %s", found, kFormat, kAgain); }

Sentence read_one(const Field& f, const Binding& b) {
  // An exporter writes 1.0 as 1 now and then; the other way round something would be lost.
  const bool fits = f.kind == b.kind || (f.kind == Kind::whole && b.kind == Kind::real);
  if (!fits) return format("field %s holds %s, expected %s; see docs/tensorrt.md for the fields", b.name, name_of(f.kind), name_of(b.kind));
  if (b.kind == Kind::text) {
    *static_cast<std::string*>(b.value) = f.text;
    return {};
  }
  if (b.list) {
    *static_cast<std::vector<int32_t>*>(b.value) = f.whole;
    return {};
  }
  if (count_of(f) != 1) return format("field %s holds %zu values, expected one; see docs/tensorrt.md for the fields", b.name, count_of(f));
  if (b.kind == Kind::whole) {
    *static_cast<int32_t*>(b.value) = f.whole[0];
  } else {
    *static_cast<float*>(b.value) = f.kind == Kind::real ? f.real[0] : float(f.whole[0]);
  }
  return {};
}

template <class T>
void put(std::string& out, const T* values, size_t count) {
  if (count) out.append(reinterpret_cast<const char*>(values), count * sizeof(T));
}

void put(std::string& out, uint32_t value) { put(out, &value, 1); }

// Takes values off the front; false at the end of the bytes.
struct Bytes {
  const char* at;
  size_t left;

  template <class T>
  bool take(T* values, size_t count) {
    if (count > left / sizeof(T)) return false;
    if (count) memcpy(values, at, count * sizeof(T));
    at += count * sizeof(T), left -= count * sizeof(T);
    return true;
  }
};

template <class V>
bool take_all(Bytes& bytes, V& values, uint32_t count) {
  if (count > bytes.left / sizeof(values[0])) return false;  // before anything of that size is allocated
  values.resize(count);
  return count == 0 || bytes.take(&values[0], count);
}

bool take_field(Bytes& bytes, Field& f) {
  uint32_t head[3];
  if (!bytes.take(head, 3) || head[0] > uint32_t(Kind::text) || !take_all(bytes, f.name, head[1])) return false;
  f.kind = Kind(head[0]);
  return f.kind == Kind::whole ? take_all(bytes, f.whole, head[2]) : f.kind == Kind::real ? take_all(bytes, f.real, head[2]) : take_all(bytes, f.text, head[2]);
}

}  // namespace

Sentence read_fields(const std::vector<Field>& fields, const std::vector<Binding>& bindings) {
  std::vector<bool> found(bindings.size());
  for (const Field& f : fields) {
    if (f.name == "plugin_version" || f.name == "plugin_namespace") continue;
    if (f.name == "format") {
      const int number = f.kind == Kind::whole && f.whole.size() == 1 ? f.whole[0] : -1;
      if (number != kFormat) return wrong_format(number);
      continue;
    }
    size_t i = 0;
    while (i < bindings.size() && f.name != bindings[i].name) ++i;
    if (i == bindings.size()) return format("there is no field %s; see docs/tensorrt.md for the fields", f.name.c_str());
    const Sentence wrong = read_one(f, bindings[i]);
    if (!wrong.empty()) return wrong;
    found[i] = true;
  }
  for (size_t i = 0; i < bindings.size(); ++i) {
    if (!found[i] && !bindings[i].optional) return format("field %s is missing; see docs/tensorrt.md for the fields", bindings[i].name);
  }
  return {};
}

std::vector<Field> write_fields(const std::vector<Binding>& bindings) {
  std::vector<Field> fields;
  for (const Binding& b : bindings) {
    Field f;
    f.name = b.name, f.kind = b.kind;
    if (b.kind == Kind::text) {
      f.text = *static_cast<const std::string*>(b.value);
    } else if (b.list) {
      f.whole = *static_cast<const std::vector<int32_t>*>(b.value);
    } else if (b.kind == Kind::whole) {
      f.whole = {*static_cast<const int32_t*>(b.value)};
    } else {
      f.real = {*static_cast<const float*>(b.value)};
    }
    fields.push_back(std::move(f));
  }
  return fields;
}

std::string to_bytes(const std::vector<Field>& fields) {
  std::string out;
  put(out, kMagic), put(out, uint32_t(kFormat)), put(out, uint32_t(0)), put(out, uint32_t(fields.size()));
  for (const Field& f : fields) {
    put(out, uint32_t(f.kind)), put(out, uint32_t(f.name.size())), put(out, uint32_t(count_of(f)));
    put(out, f.name.data(), f.name.size());
    put(out, f.whole.data(), f.whole.size()), put(out, f.real.data(), f.real.size()), put(out, f.text.data(), f.text.size());
  }
  const uint32_t size = uint32_t(out.size());
  memcpy(&out[8], &size, sizeof size);
  return out;
}

Sentence from_bytes(const void* data, size_t size, std::vector<Field>& fields) {
  Bytes bytes{static_cast<const char*>(data), size};
  uint32_t head[4];
  if (!bytes.take(head, 4) || head[0] != kMagic) return format("%zu bytes in the engine are no plugin of ours; %s", size, kAgain);
  if (head[1] != uint32_t(kFormat)) return wrong_format(int(head[1]));
  if (head[2] != size) return format("the engine holds %zu bytes of this plugin, expected %u; the engine is damaged, copy or build it again", size, head[2]);
  fields.clear();
  for (uint32_t i = 0; i < head[3]; ++i) {
    Field f;
    if (!take_field(bytes, f)) {
      return format("field %u of %u ends outside of the plugin's %zu bytes; the engine is damaged, copy or build it again", i, head[3], size);
    }
    fields.push_back(std::move(f));
  }
  if (bytes.left) return format("%zu bytes follow the plugin's last field, expected none; the engine is damaged, copy or build it again", bytes.left);
  return {};
}

}  // namespace flashhead
