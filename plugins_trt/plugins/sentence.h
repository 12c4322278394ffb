// sentence.h: what went wrong, in one sentence that says what to do; empty: nothing did.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <string>

namespace flashhead {

using Sentence = std::string;

__attribute__((format(printf, 1, 2))) inline std::string format(const char* pattern, ...) {
  va_list values, again;
  va_start(values, pattern);
  va_copy(again, values);
  std::string text(size_t(vsnprintf(nullptr, 0, pattern, values)), '\0');
  vsnprintf(&text[0], text.size() + 1, pattern, again);
  va_end(values);
  va_end(again);
  return text;
}

// A launcher's answer (device.h), which lives until the thread's next call.
inline Sentence said(const char* answer) { return answer ? answer : ""; }

}  // namespace flashhead
