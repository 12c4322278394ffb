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

struct layers {
    void (*rms_norm)(const float *x, const float *weight, size_t n, float epsilon, float *out);
    void (*layer_norm)(const float *x, const float *weight, const float *bias, size_t n, float epsilon, float *out);
    /* out = activation(x), times `by` where it is there */
    void (*activate)(enum activation kind, const float *x, const float *by, size_t n, float *out);
    /* One query over `positions` positions: the sum of weights, by which `out` is not divided yet, and the score that weighs 1. scores [positions] is memory. */
    float (*attend)(const struct attention *a, const float *query, size_t positions, float *scores, float *out, float *best);
    /* Up to QUERIES queries, `apart` floats from one to the next, query i over positions low[i] to high[i]: scores [QUERIES, stride] is memory. */
    void (*attend_tile)(const struct attention *a, const float *query, size_t apart, size_t n, const size_t *low, const size_t *high, float *scores, float *out, size_t out_apart);
};

extern struct layers layers; /* of the plain unit, until another is chosen */

void choose_layers(void);

#endif
