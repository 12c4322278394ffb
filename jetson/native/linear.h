/* Products with matrices of 4-bit codes, in the layout of com.microsoft.MatMulNBits, which they share with the standard operators.
 *
 * Activations are rounded to 8 bits, in blocks of 32 that each have a scale of their own; codes times whole numbers are summed
 * exactly in 32 bits, four neighbours at a time, and those sums are added as floats in 16 lanes, in one fixed order. So what a row
 * of a matrix gives for a token depends on that token alone: not on how many tokens there are, on threads or on the vector unit.
 */
#ifndef FLASHHEAD_LINEAR_H
#define FLASHHEAD_LINEAR_H

#include <stddef.h>
#include <stdint.h>

enum { CODED = 32, QUAD = 4 * CODED }; /* activations of a block; four blocks are multiplied at a time */

struct coded { /* [n, k]: a row is groups of `group` codes, two in a byte, the first in its low half */
    const uint8_t *codes;
    const float *scales;  /* [n, groups] */
    const float *offsets; /* [n, groups], scale times zero point; NULL: the zero point is 8 */
    size_t n, k, groups, group;
};

struct rounded { /* activations of some tokens, as products take them */
    int8_t *whole; /* [tokens, quads, QUAD]: even places of four blocks, then odd ones; zeros behind k */
    float *scale;  /* [tokens, quads, 4] */
    float *offset; /* [tokens, quads, 4]: minus the sum of a block's values */
    int32_t *eight; /* [tokens, quads, 16]: -8 times the sum of the four even and the four odd places that are multiplied together */
};

static inline size_t quads_of(size_t k) { return (k + QUAD - 1) / QUAD; }

struct linear { /* what one vector unit does */
    /* Round x [k] to token `t` of `to`. */
    void (*round)(const float *x, size_t k, const struct rounded *to, size_t t);
    /* Rows first to first + n of a matrix times `tokens` tokens: out[t * stride + row]. */
    void (*rows)(const struct coded *m, size_t first, size_t n, const struct rounded *x, size_t tokens, float *out, size_t stride);
};

extern struct linear linear; /* the plain loops, until another is chosen */

void choose_linear(void);

/* What choose_linear takes: plain, avx2 or avx512vnni. */
const char *vector_unit(void);

#endif
