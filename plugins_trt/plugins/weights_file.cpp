#include "weights_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

namespace flashhead {
namespace {

constexpr uint64_t kMostHeader = 100u << 20;  // of JSON: safetensors' own limit

std::mutex guard;
std::vector<std::string> folders;  // newest first

bool digits(const std::string& text, size_t first, size_t end) {
  return first < end && std::all_of(text.begin() + long(first), text.begin() + long(end), [](char c) { return c >= '0' && c <= '9'; });
}

}  // namespace

Sentence read_range(const char* field, const std::string& text, Range& range) {
  range = {};
  if (text.empty()) return {};
  const size_t space = text.find(' ');
  const bool right = space != std::string::npos && text.size() < 42 && digits(text, 0, space) && digits(text, space + 1, text.size());
  if (right) range.offset = strtoull(text.c_str(), nullptr, 10), range.bytes = strtoull(text.c_str() + space + 1, nullptr, 10);
  if (right && range.bytes && range.offset <= UINT64_MAX / 2 && range.bytes <= UINT64_MAX / 2) return {};
  range = {};
  return format("field %s is \"%s\", expected where a tensor lies as \"offset bytes\", or nothing; export the model again", field, text.c_str());
}

WeightsFile& WeightsFile::operator=(WeightsFile&& other) noexcept {
  std::swap(path, other.path), std::swap(size, other.size), std::swap(handle_, other.handle_);
  return *this;
}

WeightsFile::~WeightsFile() {
  if (handle_ >= 0) ::close(handle_);
}

Sentence WeightsFile::open(const std::string& where) {
  *this = WeightsFile();
  handle_ = ::open(where.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat facts {};
  if (handle_ < 0 || ::fstat(handle_, &facts)) return format("%s cannot be opened (%s)", where.c_str(), strerror(errno));
  if (!S_ISREG(facts.st_mode)) return format("%s is no file", where.c_str());
  path = where, size = uint64_t(facts.st_size);
  return {};
}

Sentence WeightsFile::read(uint64_t offset, void* to, size_t bytes) const {
  char* at = static_cast<char*>(to);
  while (bytes) {
    const ssize_t got = ::pread(handle_, at, bytes, off_t(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return format("%s cannot be read (%s); copy the file again", path.c_str(), strerror(errno));
    if (got == 0) return format("%s ends at byte %llu, expected more; copy the file again", path.c_str(), (unsigned long long)(offset));
    at += got, offset += uint64_t(got), bytes -= size_t(got);
  }
  return {};
}

Sentence WeightsFile::fingerprint(std::string& found) const {
  unsigned char head[8];
  Sentence wrong = size < sizeof head ? format("%s has %llu bytes", path.c_str(), (unsigned long long)(size)) : read(0, head, sizeof head);
  if (!wrong.empty()) return wrong;
  uint64_t length = 0, hash = 0xcbf29ce484222325ull;
  for (int i = 7; i >= 0; --i) length = length << 8 | head[i];
  if (length > kMostHeader || length > size - sizeof head) return format("%s is no whole safetensors file", path.c_str());
  std::vector<unsigned char> bytes(sizeof head + size_t(length));
  wrong = read(0, bytes.data(), bytes.size());
  if (!wrong.empty()) return wrong;
  for (const unsigned char byte : bytes) hash = (hash ^ byte) * 0x100000001b3ull;
  found = format("%016llx", (unsigned long long)(hash));
  return {};
}

Sentence add_folder(const std::string& folder) {
  struct stat facts {};
  const char* instead = "give the folder that holds the engine and its weights";
  if (::stat(folder.c_str(), &facts)) return format("folder %s cannot be read (%s); %s", folder.c_str(), strerror(errno), instead);
  if (!S_ISDIR(facts.st_mode)) return format("%s is no folder; %s", folder.c_str(), instead);
  const std::lock_guard<std::mutex> lock(guard);
  folders.erase(std::remove(folders.begin(), folders.end(), folder), folders.end());
  folders.insert(folders.begin(), folder);
  return {};
}

Sentence find_file(const Source& source, WeightsFile& file) {
  std::vector<std::string> searched;
  {
    const std::lock_guard<std::mutex> lock(guard);
    searched = folders;
  }
  if (std::find(searched.begin(), searched.end(), source.folder) == searched.end()) searched.push_back(source.folder);
  std::string found;
  for (const std::string& folder : searched) {
    const std::string path = folder.empty() ? source.file : folder + "/" + source.file;
    std::string digits;
    Sentence wrong = file.open(path);
    if (wrong.empty()) wrong = file.fingerprint(digits);
    if (wrong.empty() && digits == source.fingerprint) return {};
    found += (found.empty() ? "" : ", ") + (wrong.empty() ? path + " has " + digits : wrong);
  }
  file = WeightsFile();
  return format("the weights of this engine, %s of fingerprint %s, exported to %s, were not found: %s; call flashhead_add_folder with their folder, or export "
                "again",
                source.file.c_str(), source.fingerprint.c_str(), source.folder.c_str(), found.c_str());
}

}  // namespace flashhead
