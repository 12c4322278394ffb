/* What a decoder's layers do between their products: norms, activations, attention. Rows of float32.
 *
 * Sums are made in eight lanes and added in one order, with nothing fused, so that every vector unit gives the same bits. They
 * are written with GCC's vectors, which Clang has too; other compilers make a library without `DecoderStep`.
 */
#ifndef FLASHHEAD_LAYERS_H
#define FLASHHEAD_LAYERS_H

#include <stddef.h>

enum activation { SILU, GELU_TANH, GELU_ERF, ACTIVATIONS };
enum { QUERIES = 4, POSITIONS = 16 }; /* queries that share a pass over the keys; positions of transposed keys stand in blocks of it */

struct attention { /* of one head */
    const float *keys;       /* [positions, size]; for `attend_tile` [size, stride]: transposed */
    const float *values;     /* [positions, size] */
    size_t size, stride;     /* of a head, a multiple of 16; floats from one place of transposed keys to the next */
    float scale, softcap;    /* softcap 0: none */
};

struct queries { /* up to QUERIES of one head, one token after the other: query i sees positions low[i] to high[i], which grow from query to query */
    const float *query;
    float *scores, *out;     /* scores [QUERIES, stride] is memory */
    size_t n, apart, out_apart; /* floats from one token's query, or result, to the next */
    size_t low[QUERIES], high[QUERIES];
};

struct layers {
    void (*rms_norm)(const float *x, const float *weight, size_t n, float epsilon, float *out);
    void (*layer_norm)(const float *x, const float *weight, const float *bias, size_t n, float epsilon, float *out);
    /* out = activation(x), times `by` where it is there */
    void (*activate)(enum activation kind, const float *x, const float *by, size_t n, float *out);
    /* One query over `positions` positions: the sum of weights, by which `out` is not divided yet, and the score that weighs 1.
     * scores [positions] is memory. */
    float (*attend)(const struct attention *a, const float *query, size_t positions, float *scores, float *out, float *best);
    void (*attend_tile)(const struct attention *a, const struct queries *q);
};

extern struct layers layers; /* of the plain unit, until another is chosen */

void choose_layers(void);

#endif
