/* All rows of a matrix for all tokens, included once for each vector unit: NAME(x) is x of that unit, UNIT its attribute.
 * NAME(row) leaves the eight lanes of a row for each token of a tile.
 */

/* Rows first to end for a tile of tokens, eight at a time. How many tokens, the blocks of a group and whether there are zero points
 * are known when this is compiled. */
UNIT INLINE void NAME(tile)(
    const struct coded *m, size_t first, size_t end, const struct tokens *x, int tokens, int blocks, int offsets, float *out, size_t stride
) {
    for (size_t r = first; r < end; r += EIGHT) {
        const size_t some = end - r < EIGHT ? end - r : EIGHT;
        __m256 lanes[TILE * EIGHT];
        for (size_t i = 0; i < some; i++) NAME(row)(m, r + i, x, tokens, blocks, offsets, lanes + i);
        for (size_t t = 0; t < (size_t)tokens; t++) {
            float sums[EIGHT];
            for (size_t i = some; i < EIGHT; i++) lanes[t * EIGHT + i] = _mm256_setzero_ps();
            _mm256_storeu_ps(sums, eight_sums(lanes + t * EIGHT));
            memcpy(out + t * stride + r, sums, some * sizeof *sums);
        }
    }
}

static inline struct tokens NAME(tokens_from)(const struct rounded *x, size_t t, size_t quads) {
    const struct tokens some = {x->whole + t * quads * QUAD, x->scale + t * quads * 4, x->offset + t * quads * 4, x->eight + t * quads * 16, quads};
    return some;
}

/* A strip of rows at a time, for all tokens: tiles of them, then single ones. */
UNIT INLINE void NAME(strips)(
    const struct coded *m, size_t first, size_t n, const struct rounded *x, size_t tokens, int blocks, int offsets, float *out, size_t stride
) {
    const size_t quads = quads_of(m->k);
    for (size_t strip = first; strip < first + n; strip += STRIP) {
        const size_t end = strip + STRIP < first + n ? strip + STRIP : first + n;
        size_t t = 0;
        for (; t + TILE <= tokens; t += TILE) {
            const struct tokens some = NAME(tokens_from)(x, t, quads);
            NAME(tile)(m, strip, end, &some, TILE, blocks, offsets, out + t * stride, stride);
        }
        for (; t < tokens; t++) {
            const struct tokens one = NAME(tokens_from)(x, t, quads);
            NAME(tile)(m, strip, end, &one, 1, blocks, offsets, out + t * stride, stride);
        }
    }
}

UNIT static void NAME(rows)(const struct coded *m, size_t first, size_t n, const struct rounded *x, size_t tokens, float *out, size_t stride) {
    const size_t blocks = m->group / CODED;
    if (m->offsets) {
        if (blocks == 1) NAME(strips)(m, first, n, x, tokens, 1, 1, out, stride);
        else if (blocks == 2) NAME(strips)(m, first, n, x, tokens, 2, 1, out, stride);
        else NAME(strips)(m, first, n, x, tokens, 4, 1, out, stride);
    } else if (blocks == 1) NAME(strips)(m, first, n, x, tokens, 1, 0, out, stride);
    else if (blocks == 2) NAME(strips)(m, first, n, x, tokens, 2, 0, out, stride);
    else NAME(strips)(m, first, n, x, tokens, 4, 0, out, stride);
}
