/* The variants of vector.h: plain loops, AVX2, and the choice among them. */
#include "vector.h"

#include <math.h>
#include <string.h>

#include "ort_abi.h"

#if defined(__GNUC__) && defined(__x86_64__) && !defined(FLASHHEAD_PLAIN)
#define HAS_AVX2 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#else
#define HAS_AVX2 0
#endif

static uint32_t bits_of_half(uint16_t h) { /* float16 to float32, exact */
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 31) return sign | 0x7f800000u | (fraction << 13);
    if (exponent == 0) {
        if (fraction == 0) return sign;
        exponent = 1;
        while (!(fraction & 1024)) { fraction <<= 1; exponent--; }
        fraction &= 1023;
    }
    return sign | ((exponent + 112) << 23) | (fraction << 13);
}

static float float_of_bits(uint32_t bits) {
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

void widen(const void *row, int type, size_t first, size_t n, float *out) {
    if (type == ORT_FLOAT) memcpy(out, (const float *)row + first, n * sizeof(float));
    else if (type == ORT_FLOAT16)
        for (size_t j = 0; j < n; j++) out[j] = float_of_bits(bits_of_half(((const uint16_t *)row)[first + j]));
    else
        for (size_t j = 0; j < n; j++) out[j] = float_of_bits((uint32_t)((const uint16_t *)row)[first + j] << 16);
}

static float sum_lanes(const float *lane) { /* the one order in which 32 partial sums are added */
    float a[8];
    for (int l = 0; l < 8; l++) a[l] = (lane[l] + lane[l + 8]) + (lane[l + 16] + lane[l + 24]);
    for (int l = 0; l < 4; l++) a[l] += a[l + 4];
    return (a[0] + a[2]) + (a[1] + a[3]);
}

static void real_sums_plain(const void *rows, int type, size_t bytes, size_t n, size_t columns, const float *x, float *out) {
    for (size_t i = 0; i < n; i++) {
        const char *row = (const char *)rows + i * bytes;
        float lane[LANES] = {0};
        for (size_t j = 0; j < columns; j += LANES) {
            float w[LANES] = {0};
            widen(row, type, j, columns - j < LANES ? columns - j : LANES, w);
            for (int l = 0; l < LANES; l++) lane[l] = fmaf(w[l], x[j + l], lane[l]);
        }
        out[i] = sum_lanes(lane);
    }
}

static void whole_sums_plain(const int8_t *rows, size_t bytes, size_t n, size_t columns, size_t ahead, const int16_t *x, int32_t *out) {
    (void)ahead;
    for (size_t i = 0; i < n; i++) {
        const int8_t *row = rows + i * bytes;
        int32_t sum = 0;
        for (size_t j = 0; j < columns; j++) sum += row[j] * x[j];
        out[i] = sum;
    }
}

#if HAS_AVX2
AVX2 static inline __m256i eight_products(__m256i sum, const int8_t *row, __m256i x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)row)), x));
}

AVX2 static void whole_sums_avx2(const int8_t *rows, size_t bytes, size_t n, size_t columns, size_t ahead, const int16_t *x, int32_t *out) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4) { /* four rows share the loads of x and one reduction */
        const int8_t *r = rows + i * bytes;
        __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
        for (size_t j = 0; j < columns; j += PAD) {
            __m256i v = _mm256_loadu_si256((const __m256i *)(x + j));
            if (ahead) PREFETCH(r + 4 * j + ahead); /* a line: 16 columns of four rows */
            a = eight_products(a, r + j, v);
            b = eight_products(b, r + bytes + j, v);
            c = eight_products(c, r + 2 * bytes + j, v);
            d = eight_products(d, r + 3 * bytes + j, v);
        }
        __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
        _mm_storeu_si128((__m128i *)(out + i), _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
    }
    for (; i < n; i++) {
        __m256i a = _mm256_setzero_si256();
        for (size_t j = 0; j < columns; j += PAD) a = eight_products(a, rows + i * bytes + j, _mm256_loadu_si256((const __m256i *)(x + j)));
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        s = _mm_hadd_epi32(s, s);
        out[i] = _mm_cvtsi128_si32(_mm_hadd_epi32(s, s));
    }
}

AVX2 static inline __m256 eight_values(const char *p, int type) {
    if (type == ORT_FLOAT16) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
    if (type == ORT_BFLOAT16) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
    return _mm256_loadu_ps((const float *)p);
}

AVX2 static inline void real_sums_of(const void *rows, int type, size_t bytes, size_t n, size_t columns, const float *x, float *out) {
    const size_t eight = type == ORT_FLOAT ? 32 : 16, whole = columns / LANES * LANES;
    for (size_t i = 0; i < n; i++) {
        const char *row = (const char *)rows + i * bytes;
        __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
        for (size_t j = 0; j < whole; j += LANES, row += 4 * eight) {
            a = _mm256_fmadd_ps(eight_values(row, type), _mm256_loadu_ps(x + j), a);
            b = _mm256_fmadd_ps(eight_values(row + eight, type), _mm256_loadu_ps(x + j + 8), b);
            c = _mm256_fmadd_ps(eight_values(row + 2 * eight, type), _mm256_loadu_ps(x + j + 16), c);
            d = _mm256_fmadd_ps(eight_values(row + 3 * eight, type), _mm256_loadu_ps(x + j + 24), d);
        }
        if (whole < columns) {
            float w[LANES] = {0};
            widen(row, type, 0, columns - whole, w);
            a = _mm256_fmadd_ps(_mm256_loadu_ps(w), _mm256_loadu_ps(x + whole), a);
            b = _mm256_fmadd_ps(_mm256_loadu_ps(w + 8), _mm256_loadu_ps(x + whole + 8), b);
            c = _mm256_fmadd_ps(_mm256_loadu_ps(w + 16), _mm256_loadu_ps(x + whole + 16), c);
            d = _mm256_fmadd_ps(_mm256_loadu_ps(w + 24), _mm256_loadu_ps(x + whole + 24), d);
        }
        __m256 all = _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
        __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        out[i] = _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
}

AVX2 static void real_sums_avx2(const void *rows, int type, size_t bytes, size_t n, size_t columns, const float *x, float *out) {
    if (type == ORT_FLOAT16) real_sums_of(rows, ORT_FLOAT16, bytes, n, columns, x, out); /* a loop for each type */
    else if (type == ORT_BFLOAT16) real_sums_of(rows, ORT_BFLOAT16, bytes, n, columns, x, out);
    else real_sums_of(rows, ORT_FLOAT, bytes, n, columns, x, out);
}
#endif

struct products vector = {whole_sums_plain, real_sums_plain};

void choose_products(void) { /* from narrow to wide: the last that is there stays */
#if HAS_AVX2
    static const struct products avx2 = {whole_sums_avx2, real_sums_avx2};
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) vector = avx2; /* what has both has F16C */
#endif
}

float largest(const float *x, size_t n) {
    float most[8], out = -INFINITY;
    size_t i = 0;
    for (int l = 0; l < 8; l++) most[l] = -INFINITY;
    for (; i + 8 <= n; i += 8)
        for (int l = 0; l < 8; l++) most[l] = x[i + l] > most[l] ? x[i + l] : most[l];
    for (; i < n; i++) out = x[i] > out ? x[i] : out;
    for (int l = 0; l < 8; l++) out = most[l] > out ? most[l] : out;
    return out;
}
