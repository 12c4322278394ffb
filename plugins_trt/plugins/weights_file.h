// weights_file.h: the file that the plugins read, found by what it is and not by where it lies.
//
// It is a safetensors file: 8 bytes little-endian N, N bytes of JSON, the tensors' bytes. Its fingerprint is FNV-1a 64 (offset basis 0xcbf29ce484222325,
// prime 0x100000001b3) over these first 8 + N bytes, as 16 lower-case hexadecimal digits: names, types, shapes and places of all tensors, and the
// checksum of their bytes that the exporter writes into the JSON. So another model, another size and another layout are another file; damage of the
// tensors' bytes alone is not seen here (the runtime's full check sees it).
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "sentence.h"

namespace flashhead {

// What an engine stores about the file.
struct Source {
  std::string file;         // name in its folder
  std::string folder;       // at export
  std::string fingerprint;  // 16 digits
};

// A tensor of the file: where its bytes begin, and how many they are; 0: there is none.
struct Range {
  uint64_t offset = 0, bytes = 0;
};

// From "offset bytes", both decimal; "" is none.
Sentence read_range(const char* field, const std::string& text, Range& range);

// An open file, closed at the end of its scope.
class WeightsFile {
 public:
  WeightsFile() = default;
  WeightsFile(WeightsFile&& other) noexcept : path(std::move(other.path)), size(other.size), handle_(other.handle_) { other.handle_ = -1; }
  WeightsFile& operator=(WeightsFile&& other) noexcept;
  ~WeightsFile();

  Sentence open(const std::string& path);
  Sentence read(uint64_t offset, void* to, size_t bytes) const;  // all of them, or a sentence
  Sentence fingerprint(std::string& digits) const;

  std::string path;
  uint64_t size = 0;

 private:
  int handle_ = -1;
};

// Folders are searched newest first, then the one at export. Thread safe.
Sentence add_folder(const std::string& folder);

// The first file of the name whose fingerprint is the stored one; else a sentence that names all that was found.
Sentence find_file(const Source& source, WeightsFile& file);

}  // namespace flashhead
