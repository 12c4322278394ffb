// advance.cu: the last launch of a decode step (advance.h). One block: it costs what a launch costs, and 3 to 5 us of a write over the bus, which the next
// step's first launch waits for (H100).
#include "advance.h"
#include "element.cuh"

extern "C" __global__ void flashhead_advance(FlashHeadAdvance a);

#ifdef __CUDACC__
// Grid: 1.
extern "C" __global__ void __launch_bounds__(FH_ADVANCE_THREADS) flashhead_advance(const FlashHeadAdvance a) {
  const int row = threadIdx.x;
  fh::wait_for_previous();
  fh::release_next();
  const unsigned number = *a.number + 1;
  unsigned* slot = a.mail + size_t(number % unsigned(a.slots)) * a.slot_words;
  if (row < a.rows) {
    const int token = int(a.token[row]);
    unsigned* mine = slot + FH_MAIL_HEAD + row * (FH_MAIL_ROW + a.counted);
    mine[0] = unsigned(token), mine[1] = a.capped[row], mine[2] = __float_as_uint(a.logprob ? a.logprob[row] : 0.f);
    for (int i = 0; i < a.counted; ++i) mine[FH_MAIL_ROW + i] = unsigned(a.counts[size_t(row) * a.counted + i]);
    a.ids[row] = token, a.lengths[row] += 1, a.step[row] += 1;
  }
  __threadfence_system();  // each thread's words before the number
  __syncthreads();         // behind it everybody has read the number
  if (row == 0) {
    *a.number = number;
    *reinterpret_cast<volatile unsigned*>(slot) = number;
  }
}
#endif

#ifndef __CUDACC_RTC__
#include "launch.h"

const char* fh_advance(const FlashHeadAdvance* a, const fh_device* device, cudaStream_t stream) {
  if (a->rows < 1 || a->rows > FH_ADVANCE_THREADS || a->slots < 1 || a->slot_words < FH_MAIL_HEAD + a->rows * (FH_MAIL_ROW + a->counted)) {
    return fh::failure("advance: %d rows in %d slots of %d words, expected 1 to %d rows that fit a slot; give larger slots", a->rows, a->slots, a->slot_words, FH_ADVANCE_THREADS);
  }
  return fh::launch("advance", *device, stream, {dim3(1), FH_ADVANCE_THREADS}, flashhead_advance, *a);
}
#endif
