// export.h: marks a function that the library shows (exports.map names them all).
#pragma once

#define FLASHHEAD_EXPORT extern "C" __attribute__((visibility("default")))
