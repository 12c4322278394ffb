#include "operation.h"

#include "facts.h"

namespace flashhead {
namespace {

constexpr const char* kApart = "the network and the export do not belong together, export again";

}  // namespace

const char* name_of(Type type) {
  switch (type) {
    case Type::fp16: return "float16";
    case Type::bf16: return "bfloat16";
    case Type::fp32: return "float32";
    case Type::int32: return "int32";
    default: return "another type";
  }
}

std::string Tensor::text() const {
  std::string out = "[";
  for (int i = 0; i < rank; ++i) out += (i ? ", " : "") + (dims[i] < 0 ? std::string("?") : std::to_string(dims[i]));
  return out + "]";
}

Sentence Operation::read(const std::vector<Field>& values) {
  const Sentence wrong = read_fields(values, fields());
  return wrong.empty() ? check() : wrong;
}

std::vector<Field> Operation::write() const {
  return write_fields(const_cast<Operation*>(this)->fields());  // bindings point to values that may be written; here they are only read
}

Sentence Operation::types(const Tensor* in, int count) const {
  if (!takes(count)) return format("%d inputs, expected %d; %s", count, inputs(), kApart);
  for (int i = 0; i < count; ++i) {
    if (in[i].type != type(i)) {
      return format("input %s is %s, expected %s; cast it in the network, or export with that precision", label(i), name_of(in[i].type), name_of(type(i)));
    }
  }
  return {};
}

Sentence Operation::prepare() {
  if (prepared_) return {};
  Sentence wrong = device_facts(facts_);
  if (wrong.empty()) wrong = load();
  if (wrong.empty()) {
    prepared_ = true;
  } else {
    unload();
  }
  return wrong;
}

void Operation::release() {
  unload();
  prepared_ = false;
}

Sentence Operation::clone(std::unique_ptr<Operation>& twin) const {
  twin = copy();
  twin->prepared_ = false;  // weights are shared, own memory is not
  return prepared_ ? twin->prepare() : Sentence();
}

Sentence Operation::run(const Call& call) {
  if (!prepared_) return "it is run before it was made ready; create an execution context of the engine first";
  return launch(call);
}

void Weights::bind_to(std::vector<Binding>& fields) {
  fields.push_back(bind("file", source.file));
  fields.push_back(bind("folder", source.folder));
  fields.push_back(bind("fingerprint", source.fingerprint));
}

Sentence Weights::check(const char* field, const std::string& text, uint64_t bytes, bool optional, bool more) const {
  if (source.file.empty() || source.file.find('/') != std::string::npos) {
    return format("field file is \"%s\", expected a file's name; the folder is apart", source.file.c_str());
  }
  if (source.fingerprint.size() != 16) return format("field fingerprint is \"%s\", expected 16 hexadecimal digits; export again", source.fingerprint.c_str());
  if (text.empty() && optional) return {};
  Range range;
  const Sentence wrong = read_range(field, text, range);
  if (!wrong.empty()) return wrong;
  if (range.bytes == bytes || (more && range.bytes > bytes)) return {};
  return format("field %s names a tensor of %llu bytes, expected %llu%s; export the model again", field, (unsigned long long)(range.bytes),
                (unsigned long long)(bytes), more ? " or more" : "");
}

Sentence Weights::load(const std::string& text, Weight& weight) const {
  weight.reset();
  Range range;
  const Sentence wrong = read_range("of a tensor", text, range);
  return wrong.empty() && range.bytes ? hold(source, range, weight) : wrong;
}

void Shapes::want(int input, const std::vector<int64_t>& extents) {
  if (!wrong.empty()) return;
  const Tensor& t = in_[input];
  bool same = t.rank == int(extents.size());
  std::string expected = "[";
  for (size_t i = 0; i < extents.size(); ++i) {
    int64_t wanted = extents[i];
    std::string text = std::to_string(wanted);
    if (wanted == kAny) text = "any";
    if (wanted <= letter(0)) {
      int64_t& known = letters_[letter(0) - wanted];
      text = known ? std::to_string(known) : std::string(1, char(letter(0) - wanted));
      if (same && !known && t.dims[i] >= 0) known = t.dims[i];
      wanted = known ? known : kAny;
    }
    expected += (i ? ", " : "") + text;
    if (same && wanted != kAny && t.dims[i] >= 0 && t.dims[i] != wanted) same = false;
  }
  if (!same) wrong = format("input %s is %s, expected %s]; %s", operation_.label(input), t.text().c_str(), expected.c_str(), kApart);
}

void Shapes::want_last(int input, int64_t last) {
  if (!wrong.empty()) return;
  const Tensor& t = in_[input];
  if (t.rank >= 1 && (t.last() < 0 || t.last() == last)) return;
  wrong = format("input %s is %s, expected [.., %lld]; %s", operation_.label(input), t.text().c_str(), (long long)(last), kApart);
}

const std::vector<Made>& operations() {
  static const std::vector<Made> all = {{"TokenEmbedding", make_token_embedding},   {"RmsNorm", make_rms_norm},
                                        {"W4A16Linear", make_w4a16_linear},         {"GatedProduct", make_gated_product},
                                        {"DecodeAttention", make_decode_attention}, {"FlashHead", make_flash_head}};
  return all;
}

}  // namespace flashhead
