/* Sums of products of rows and one vector, the loops that a step's time is spent in, by the widest vector unit that is there.
 *
 * What a state gets depends on that state alone, not on the batch, the threads or the width of the vector unit. So each variant
 * gives the same bits:
 *  - whole numbers, 8 bits times 16, are summed in 32 bits, exactly, in any order. That no sum overflows is the caller's part
 *    (`rounded` in matrix.h).
 *  - rows of floats: 32 partial sums, lane l of columns l, l + 32, ..., with fused multiply-adds, added in one fixed tree.
 *    `sum_lanes` and the AVX2 code do the same operations in the same order.
 * The compiler must not fuse or reorder anything else: -ffp-contract=off.
 */
#ifndef FLASHHEAD_VECTOR_H
#define FLASHHEAD_VECTOR_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define PREFETCH(p) __builtin_prefetch(p)         /* of a stream: to the first cache */
#define PREFETCH_APART(p) __builtin_prefetch(p, 0, 2) /* of rows that lie apart: to the second, which waits for more lines at once */
#else
#define PREFETCH(p) ((void)(p))
#define PREFETCH_APART(p) ((void)(p))
#endif

enum { LANES = 32, PAD = 16, LINE = 64 }; /* floats, whole numbers: columns that are multiplied at a time; bytes of a cache line */

struct products { /* what one unit does: a variant is one of these */
    /* n rows, `bytes` apart, of `columns` (a multiple of PAD) times x. `ahead`: bytes by which memory is asked for, 0: not; processors
     * look ahead by themselves, but not beyond a page. */
    void (*whole_sums)(const int8_t *rows, size_t bytes, size_t n, size_t columns, size_t ahead, const int16_t *x, int32_t *out);
    /* n rows of float16, bfloat16 or float32 (type: of ort_abi.h) times x, which has zeros up to a multiple of LANES. */
    void (*real_sums)(const void *rows, int type, size_t bytes, size_t n, size_t columns, const float *x, float *out);
};

extern struct products vector; /* the plain loops, until another is chosen */

/* Take the widest variant that this processor has, once the library is loaded. */
void choose_products(void);

float largest(const float *x, size_t n);

/* n values of a row of float16, bfloat16 or float32 as floats. */
void widen(const void *row, int type, size_t first, size_t n, float *out);

static inline size_t padded(size_t n, size_t to) { return (n + to - 1) / to * to; }

static inline void prefetch(const char *from, size_t bytes) {
    for (size_t b = 0; b < bytes; b += LINE) PREFETCH_APART(from + b);
}

#endif
