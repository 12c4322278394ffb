/* device.h: what every launcher here asks of its caller: the element type, and the facts of the device.
 *
 * Launchers return NULL when the work is in the stream, or one sentence that says what is wrong and what to do;
 * it stays valid until the same thread's next call. They allocate nothing and never wait, so a CUDA graph can capture them.
 */
#ifndef FLASHHEAD_DEVICE_H
#define FLASHHEAD_DEVICE_H

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { FH_FP16 = 0, FH_BF16 = 1 } fh_dtype;

/* Read once by the caller (cudaDeviceGetAttribute), never in a launcher: a plan for another board can be run and tested on this one. */
typedef struct {
  int capability;      /* 10 * major + minor of the code that runs, at least 80: less than the device's where that runs an older architecture's code */
  int multiprocessors; /* at least 1 */
  int shared_bytes;    /* shared memory a block may have, opt-in limit */
  int overlap;         /* 1: launches may begin while the one before them ends (programmatic dependent launch; capability 90 and up, else 0) */
} fh_device;

#ifdef __cplusplus
}
#endif
#endif
