/* Whole matrices times a state, and a state in whole numbers: see matrix.h. */
#include "matrix.h"

#include <math.h>
#include <string.h>

void products_of(const struct matrix *m, const struct state *s, size_t first, size_t n, float *out) {
    for (size_t i = 0; i < n; i += BLOCK) sums_of(m, s, first + i, n - i < BLOCK ? n - i : BLOCK, out + i);
    if (m->scale)
        for (size_t i = 0; i < n; i++) out[i] *= m->scale[first + i];
}

int rounded(const struct matrix *m, const float *x, int16_t *whole, struct state *s) {
    float most = 0;
    double size = 0, sum = 0;
    for (size_t j = 0; j < m->columns; j++) {
        float a = fabsf(x[j]);
        most = a > most ? a : most;
        size += a;
        sum += x[j];
    }
    if (!(size <= 3e38)) return 0; /* NaN or infinite: the sum of sizes is, too */
    float by = 0;
    if (most > 1e-30f) { /* a state of zeros stays one */
        double widest = 32767.0 / most, summed = ((double)(1 << 24) - 1 - (double)m->columns) / size;
        by = (float)(widest < summed ? widest : summed * (1 - 1e-6));
    }
    for (size_t j = 0; j < m->columns; j++) {
        float t = x[j] * by;
        t = t > 32767 ? 32767 : t < -32767 ? -32767 : t;
        whole[j] = (int16_t)(t + (t < 0 ? -0.5f : 0.5f));
    }
    memset(whole + m->columns, 0, (m->padded - m->columns) * sizeof *whole);
    s->whole = whole;
    s->unit = by > 0 ? 1 / by : 0;
    s->half = (float)(sum * m->half);
    return 1;
}
