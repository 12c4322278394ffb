// log.h: where the plugins' sentences go: to the host's logger, and kept for flashhead_last_error.
#pragma once

#include <string>

#include "sentence.h"

namespace flashhead {

enum class Severity { error, warning };
using Sink = void (*)(Severity, const char* text);

// Called from the thread in which the host called a plugin: TensorRT finds the logger by the thread.
void set_sink(Sink sink);

// True where nothing went wrong; else the sentence is logged and kept, with `who` before it.
bool fine(const char* who, const Sentence& wrong, Severity severity = Severity::error);

// The last sentence of this process, "" where there is none; valid until the same thread's next call.
const char* last_sentence();

}  // namespace flashhead
