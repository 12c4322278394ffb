// kernels.h: the table between launchers and the code of their kernels, which a build writes.
#pragma once

extern "C" {
struct FlashHeadKernel {
  const void* host;  // the address that stands for it on the host; NULL behind the last
  const char* name;  // in its cubin
  const void* code;  // that cubin; NULL: not there yet
};
extern FlashHeadKernel flashhead_kernels[];

// Where it is set it is asked at each use of a kernel; what it takes (true) is not done. NULL in a library that has all of its code.
extern bool (*flashhead_asked)(const FlashHeadKernel&);
}
