/* A matrix of a head, a pointer into the session's own weights, times one state.
 *
 * Coded rows: the state is rounded to 16 bits (symmetric, by its own largest value), products with 8-bit codes are summed
 * in 32 bits. The rounding unit is made so large that no sum can overflow.
 */
#ifndef FLASHHEAD_MATRIX_H
#define FLASHHEAD_MATRIX_H

#include "ort_abi.h"
#include "vector.h"

enum { BLOCK = 64 };    /* rows whose sums are made at a time */
enum { STREAM = 2048 }; /* rows that lie side by side are asked of memory so many bytes before they are multiplied */

struct matrix { /* [n, columns], row after row; of int8 a row has zeros behind it, up to `padded` columns */
    const char *data;
    const float *steps; /* [columns]; NULL: ones */
    const float *scale; /* [n]; NULL: ones */
    size_t n, columns, padded;
    size_t row, tail; /* bytes from row to row; where a row's own numbers begin (rows of a code) */
    float half;
    int type; /* ORT_INT8, ORT_FLOAT16, ORT_BFLOAT16, ORT_FLOAT */
};

struct tail { /* behind each row of a code, so that a cluster is one stretch of memory: apart they would be three misses */
    float scale, nearness;
    int32_t token, none;
};

/* A state as a matrix's rows want it: whole numbers or floats, zeros behind them. */
struct state {
    const int16_t *whole;
    const float *real;
    float unit, half; /* a row's sum is unit * sum of whole numbers + half */
};

/* Round x [columns] for a matrix of whole numbers: to 16 bits, and so that 128 * sum |whole| stays below 2^31. 0: x is not finite. */
int rounded(const struct matrix *m, const float *x, int16_t *whole, struct state *s);

/* Rows first to first + n of a matrix times a state: out [n]. */
void products_of(const struct matrix *m, const struct state *s, size_t first, size_t n, float *out);

/* At most BLOCK rows from `first` on times a state, without their scales: out [n]. */
static inline void sums_of(const struct matrix *m, const struct state *s, size_t first, size_t n, float *out) {
    const char *rows = m->data + first * m->row;
    int32_t sums[BLOCK];
    if (m->type != ORT_INT8) {
        vector.real_sums(rows, m->type, m->row, n, m->columns, s->real, out);
        return;
    }
    vector.whole_sums((const int8_t *)rows, m->row, n, m->padded, m->tail < m->row ? 0 : STREAM, s->whole, sums);
    for (size_t i = 0; i < n; i++) out[i] = (float)sums[i] * s->unit + s->half;
}

static inline const struct tail *tail_of(const struct matrix *m, size_t slot) { return (const struct tail *)(m->data + slot * m->row + m->tail); }

#endif
