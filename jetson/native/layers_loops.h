/* The loops of layers.h, included once for each vector unit: NAME(x) is x of that unit, UNIT its attribute.
 * Every sum and every product stands alone: see layers.h.
 */

UNIT static inline float NAME(sum)(v8 a) { return ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7])); }

/* Sums of eight vectors, each in that order. */
UNIT static inline v8 NAME(eight_sums)(const v8 *a) {
#ifdef ADJACENT /* of two vectors: sums of neighbours, within halves */
    const v8 low = ADJACENT(ADJACENT(a[0], a[1]), ADJACENT(a[2], a[3])), high = ADJACENT(ADJACENT(a[4], a[5]), ADJACENT(a[6], a[7]));
    return HALVES(low, high, 0x20) + HALVES(low, high, 0x31);
#else
    return (v8){NAME(sum)(a[0]), NAME(sum)(a[1]), NAME(sum)(a[2]), NAME(sum)(a[3]), NAME(sum)(a[4]), NAME(sum)(a[5]), NAME(sum)(a[6]), NAME(sum)(a[7])};
#endif
}

/* e to the power of x: to some 2 ulp, after Cephes' expf; ends at e^-87 and e^88. */
UNIT static inline v8 NAME(exp)(v8 x) {
    const v8 low = SAME(-87.3f), high = SAME(88.3f), magic = SAME(12582912.0f);
    x = CHOOSE(x < low, low, x);
    x = CHOOSE(x > high, high, x);
    const v8 shifted = x * 1.44269504088896341f + magic;
    const v8 whole = shifted - magic;
    v8 r = x - whole * 0.693359375f;
    r = r - whole * -2.12194440e-4f;
    v8 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (v8)(((i8)shifted - 0x4B400000 + 127) << 23);
}

UNIT static void NAME(rms_norm)(const float *x, const float *weight, size_t n, float epsilon, float *out) {
    v8 sums = SAME(0.0f);
    size_t j = 0;
    for (; j + 8 <= n; j += 8) sums += LOAD(x + j) * LOAD(x + j);
    float sum = NAME(sum)(sums);
    for (; j < n; j++) sum += x[j] * x[j];
    const float by = 1.0f / sqrtf(sum / (float)n + epsilon);
    for (j = 0; j + 8 <= n; j += 8) STORE(out + j, LOAD(x + j) * by * LOAD(weight + j));
    for (; j < n; j++) out[j] = x[j] * by * weight[j];
}

UNIT static void NAME(layer_norm)(const float *x, const float *weight, const float *bias, size_t n, float epsilon, float *out) {
    v8 sums = SAME(0.0f), squares = SAME(0.0f);
    size_t j = 0;
    for (; j + 8 <= n; j += 8) sums += LOAD(x + j);
    float mean = NAME(sum)(sums);
    for (; j < n; j++) mean += x[j];
    mean /= (float)n;
    for (j = 0; j + 8 <= n; j += 8) squares += (LOAD(x + j) - mean) * (LOAD(x + j) - mean);
    float square = NAME(sum)(squares);
    for (; j < n; j++) square += (x[j] - mean) * (x[j] - mean);
    const float by = 1.0f / sqrtf(square / (float)n + epsilon);
    for (j = 0; j < n; j++) out[j] = (x[j] - mean) * by * weight[j] + (bias ? bias[j] : 0.0f);
}

UNIT static inline v8 NAME(activated)(enum activation kind, v8 x) {
    if (kind == SILU) return x / (1.0f + NAME(exp)(-x));
    if (kind == GELU_TANH) { /* x / 2 * (1 + tanh(u)) = x * sigmoid(2 u) */
        const v8 u = (x + x * x * x * 0.044715f) * 1.5957691216057308f;
        return x / (1.0f + NAME(exp)(-u));
    }
    v8 out = x;
    for (int l = 0; l < 8; l++) out[l] = 0.5f * x[l] * (1.0f + erff(x[l] * 0.70710678118654752f));
    return out;
}

UNIT static void NAME(activate)(enum activation kind, const float *x, const float *by, size_t n, float *out) {
    size_t j = 0;
    for (; j + 8 <= n; j += 8) {
        const v8 a = NAME(activated)(kind, LOAD(x + j));
        STORE(out + j, by ? a * LOAD(by + j) : a);
    }
    if (j == n) return;
    float last[8] = {0};
    memcpy(last, x + j, (n - j) * sizeof *x);
    STORE(last, NAME(activated)(kind, LOAD(last)));
    for (size_t l = 0; j < n; j++, l++) out[j] = by ? last[l] * by[j] : last[l];
}

/* Scores [n] in place to weights that are not yet divided: their sum, and the score that weighs 1. */
UNIT static float NAME(weights)(const struct attention *a, float *scores, size_t n, float *best) {
    const v8 lowest = SAME(-INFINITY);
    v8 most = lowest, sums = SAME(0.0f);
    size_t t = 0;
    for (; t + 8 <= n; t += 8) {
        v8 s = LOAD(scores + t) * a->scale;
        if (a->softcap > 0) { /* tanh(u) = 2 / (1 + exp(-2 u)) - 1 */
            s = (2.0f / (1.0f + NAME(exp)(s * (-2.0f / a->softcap))) - 1.0f) * a->softcap;
        }
        STORE(scores + t, s);
        most = CHOOSE(s > most, s, most);
    }
    float top = -INFINITY;
    for (int l = 0; l < 8; l++) top = most[l] > top ? most[l] : top;
    for (; t < n; t++) {
        v8 s = SAME(scores[t] * a->scale);
        if (a->softcap > 0) s = (2.0f / (1.0f + NAME(exp)(s * (-2.0f / a->softcap))) - 1.0f) * a->softcap;
        scores[t] = s[0];
        top = scores[t] > top ? scores[t] : top;
    }
    *best = top;
    for (t = 0; t + 8 <= n; t += 8) {
        const v8 e = NAME(exp)(LOAD(scores + t) - top);
        STORE(scores + t, e);
        sums += e;
    }
    float sum = NAME(sum)(sums);
    for (; t < n; t++) {
        const v8 e = NAME(exp)(SAME(scores[t] - top));
        scores[t] = e[0];
        sum += e[0];
    }
    return sum;
}

UNIT static float NAME(attend)(const struct attention *a, const float *query, size_t positions, float *scores, float *out, float *best) {
    size_t t = 0;
    for (; t + 8 <= positions; t += 8) {
        const float *key = a->keys + t * a->size;
        v8 sums[8];
        for (int l = 0; l < 8; l++) sums[l] = LOAD(query) * LOAD(key + (size_t)l * a->size);
        for (size_t j = 8; j < a->size; j += 8) {
            const v8 q = LOAD(query + j);
            for (int l = 0; l < 8; l++) sums[l] += q * LOAD(key + (size_t)l * a->size + j);
        }
        STORE(scores + t, NAME(eight_sums)(sums));
    }
    for (; t < positions; t++) {
        v8 sums = LOAD(query) * LOAD(a->keys + t * a->size);
        for (size_t j = 8; j < a->size; j += 8) sums += LOAD(query + j) * LOAD(a->keys + t * a->size + j);
        scores[t] = NAME(sum)(sums);
    }
    const float sum = NAME(weights)(a, scores, positions, best);
    size_t j = 0;
    for (; j + 32 <= a->size; j += 32) {
        v8 o0 = SAME(0.0f), o1 = o0, o2 = o0, o3 = o0;
        const float *value = a->values + j;
        for (t = 0; t < positions; t++, value += a->size) {
            o0 += LOAD(value) * scores[t];
            o1 += LOAD(value + 8) * scores[t];
            o2 += LOAD(value + 16) * scores[t];
            o3 += LOAD(value + 24) * scores[t];
        }
        STORE(out + j, o0);
        STORE(out + j + 8, o1);
        STORE(out + j + 16, o2);
        STORE(out + j + 24, o3);
    }
    for (; j < a->size; j += 8) {
        v8 o = SAME(0.0f);
        for (t = 0; t < positions; t++) o += LOAD(a->values + t * a->size + j) * scores[t];
        STORE(out + j, o);
    }
    return sum;
}

/* Scores of `n` queries (a constant) in positions first to end, both multiples of POSITIONS. */
UNIT EACH void NAME(tile_scores)(const struct attention *a, const struct queries *q, int n, size_t first, size_t end) {
    for (size_t t = first; t < end; t += POSITIONS) {
        v8 one[QUERIES], two[QUERIES];
        for (int i = 0; i < n; i++) one[i] = two[i] = SAME(0.0f);
        const float *key = a->keys + t;
        for (size_t j = 0; j < a->size; j++, key += a->stride) {
            const v8 k0 = LOAD(key), k1 = LOAD(key + 8);
            for (int i = 0; i < n; i++) {
                const float by = q->query[(size_t)i * q->apart + j];
                one[i] += k0 * by;
                two[i] += k1 * by;
            }
        }
        for (int i = 0; i < n; i++) {
            STORE(q->scores + (size_t)i * a->stride + t, one[i]);
            STORE(q->scores + (size_t)i * a->stride + t + 8, two[i]);
        }
    }
}

UNIT EACH void NAME(tile)(const struct attention *a, const struct queries *q, int n) {
    const size_t first = q->low[0], end = q->high[n - 1];
    float by[QUERIES], best;
    NAME(tile_scores)(a, q, n, first / POSITIONS * POSITIONS, (end + POSITIONS - 1) / POSITIONS * POSITIONS);
    for (int i = 0; i < n; i++) {
        float *s = q->scores + (size_t)i * a->stride;
        by[i] = 1.0f / NAME(weights)(a, s + q->low[i], q->high[i] - q->low[i], &best);
        for (size_t t = first; t < q->low[i]; t++) s[t] = 0; /* a sum is not changed by what is not seen */
        for (size_t t = q->high[i]; t < end; t++) s[t] = 0;
    }
    for (size_t j = 0; j < a->size; j += 16) {
        v8 one[QUERIES], two[QUERIES];
        for (int i = 0; i < n; i++) one[i] = two[i] = SAME(0.0f);
        const float *value = a->values + first * a->size + j;
        for (size_t t = first; t < end; t++, value += a->size) {
            const v8 v0 = LOAD(value), v1 = LOAD(value + 8);
            for (int i = 0; i < n; i++) {
                const float s = q->scores[(size_t)i * a->stride + t];
                one[i] += v0 * s;
                two[i] += v1 * s;
            }
        }
        for (int i = 0; i < n; i++) {
            STORE(q->out + (size_t)i * q->out_apart + j, one[i] * by[i]);
            STORE(q->out + (size_t)i * q->out_apart + j + 8, two[i] * by[i]);
        }
    }
}

UNIT static void NAME(attend_tile)(const struct attention *a, const struct queries *q) {
    if (q->n == QUERIES) {
        NAME(tile)(a, q, QUERIES);
        return;
    }
    for (size_t i = 0; i < q->n; i++) { /* the last of a prompt */
        const struct queries one = {
            .query = q->query + i * q->apart, .scores = q->scores, .out = q->out + i * q->out_apart, .n = 1, .low = {q->low[i]}, .high = {q->high[i]},
        };
        NAME(tile)(a, &one, 1);
    }
}
