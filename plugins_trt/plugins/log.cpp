#include "log.h"

#include <mutex>

namespace flashhead {
namespace {

std::mutex guard;
Sink current = nullptr;
std::string last;

}  // namespace

void set_sink(Sink sink) {
  const std::lock_guard<std::mutex> lock(guard);
  current = sink;
}

bool fine(const char* who, const Sentence& wrong, Severity severity) {
  if (wrong.empty()) return true;
  const std::string text = format("flashhead %s: %s", who, wrong.c_str());
  Sink sink;
  {
    const std::lock_guard<std::mutex> lock(guard);
    last = text;
    sink = current;
  }
  if (sink) sink(severity, text.c_str());  // without the lock: a logger may ask for the last sentence
  return false;
}

const char* last_sentence() {
  thread_local std::string copy;
  const std::lock_guard<std::mutex> lock(guard);
  copy = last;
  return copy.c_str();
}

}  // namespace flashhead
