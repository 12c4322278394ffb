/* The loops of linear.h, plain and by vector unit.
 *
 * Bytes of a step: n * k / 2 of codes and 4 * n * k / group of scales, read once. SmolLM2-135M in groups of 32: 66 MB.
 */
#include "linear.h"

#include <math.h>
#include <string.h>

#include "vector.h"

enum { TILE = 4 };     /* tokens that share an unpacked row */
enum { STRIP = 16 };   /* rows that stay in the cache for all tokens */
enum { EIGHT = 8 };    /* rows whose lanes are added together */
enum { AHEAD = 2048 }; /* bytes that are asked of memory before a single token needs them */

static const float TINY = 1e-30f; /* a block of nothing larger is zeros: 127 over it would be infinite */

static void round_plain(const float *x, size_t k, const struct rounded *to, size_t t) {
    const size_t quads = quads_of(k);
    int8_t *whole = to->whole + t * quads * QUAD;
    float *scale = to->scale + t * quads * 4, *offset = to->offset + t * quads * 4;
    for (size_t b = 0; b < quads * 4; b++) {
        const size_t from = b * CODED, n = from >= k ? 0 : k - from < CODED ? k - from : CODED;
        int8_t *even = whole + b / 4 * QUAD + b % 4 * (CODED / 2), *odd = even + QUAD / 2;
        int32_t *eight = to->eight + (t * quads * 4 + b) * 4;
        float most = 0;
        for (size_t l = 0; l < 4; l++) eight[l] = 0;
        for (size_t i = 0; i < n; i++) most = fabsf(x[from + i]) > most ? fabsf(x[from + i]) : most;
        const float by = most > TINY ? 127 / most : 0;
        int32_t sum = 0;
        int whole_numbers = 1;
        for (size_t i = 0; i < CODED; i++) {
            const float near = i < n ? (x[from + i] * by + 12582912.0f) - 12582912.0f : 0; /* to the nearest, halves to even */
            whole_numbers &= near >= -127 && near <= 127;
            const int32_t value = whole_numbers ? (int32_t)near : 0;
            sum += value;
            eight[i / 8] -= 8 * value;
            (i & 1 ? odd : even)[i / 2] = (int8_t)value;
        }
        scale[b] = whole_numbers ? most / 127 : NAN; /* what is no number stays none */
        offset[b] = -((float)sum * scale[b]);
    }
}

/* A quad's four scales, from a row's: a group is one, two or four blocks. */
static inline void four_scales(const float *row, size_t quad, size_t groups, size_t group, float *out) {
    for (size_t b = 0; b < 4; b++) {
        const size_t g = (4 * quad + b) * CODED / group;
        out[b] = g < groups ? row[g] : 0;
    }
}

static float sum_of(const float *lane, const float *offset) { /* the one order in which partial sums are added */
    float a[8];
    for (int l = 0; l < 8; l++) a[l] = lane[l] + lane[l + 8];
    for (int l = 0; l < 4; l++) a[l] += offset[l];
    return ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7]));
}

static void rows_plain(const struct coded *m, size_t first, size_t n, const struct rounded *x, size_t tokens, float *out, size_t stride) {
    const size_t quads = quads_of(m->k), bytes = m->groups * m->group / 2;
    for (size_t r = first; r < first + n; r++)
        for (size_t t = 0; t < tokens; t++) {
            float lane[16] = {0}, offset[4] = {0};
            for (size_t q = 0; q < quads; q++) {
                const uint8_t *codes = m->codes + r * bytes + q * QUAD / 2;
                const size_t left = bytes - q * QUAD / 2, some = left < QUAD / 2 ? left : QUAD / 2, at = t * quads + q;
                const int8_t *even = x->whole + at * QUAD, *odd = even + QUAD / 2;
                float s[4], o[4];
                four_scales(m->scales + r * m->groups, q, m->groups, m->group, s);
                if (m->offsets) {
                    four_scales(m->offsets + r * m->groups, q, m->groups, m->group, o);
                    for (size_t b = 0; b < 4; b++) offset[b] = fmaf(o[b], x->offset[at * 4 + b], offset[b]);
                }
                for (size_t l = 0; l < some / 4; l++) {
                    int32_t sum = m->offsets ? 0 : x->eight[at * 16 + l];
                    for (size_t i = 4 * l; i < 4 * l + 4; i++) sum += (codes[i] & 15) * even[i] + (codes[i] >> 4) * odd[i];
                    lane[l] = fmaf((float)sum, s[l / 4] * x->scale[at * 4 + l / 4], lane[l]);
                }
            }
            out[t * stride + r] = sum_of(lane, offset);
        }
}

struct linear linear = {round_plain, rows_plain};

#if defined(__GNUC__) && defined(__x86_64__) && !defined(FLASHHEAD_PLAIN)
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define AVX2 __attribute__((target("avx2,fma")))
#define VNNI __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

AVX2 static void round_avx2(const float *x, size_t k, const struct rounded *to, size_t t) {
    const size_t quads = quads_of(k);
    int8_t *whole = to->whole + t * quads * QUAD;
    float *scale = to->scale + t * quads * 4, *offset = to->offset + t * quads * 4;
    const __m256 sign = _mm256_set1_ps(-0.0f), magic = _mm256_set1_ps(12582912.0f);
    /* packs works within halves of a register: these put the 32 values in order, even places first */
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i parts = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    for (size_t b = 0; b < quads * 4; b++) {
        float padded_block[CODED];
        const float *from = x + b * CODED;
        int8_t *even = whole + b / 4 * QUAD + b % 4 * (CODED / 2);
        if ((b + 1) * CODED > k) {
            memset(padded_block, 0, sizeof padded_block);
            if (b * CODED < k) memcpy(padded_block, from, (k - b * CODED) * sizeof(float));
            from = padded_block;
        }
        const __m256 v0 = _mm256_loadu_ps(from), v1 = _mm256_loadu_ps(from + 8), v2 = _mm256_loadu_ps(from + 16), v3 = _mm256_loadu_ps(from + 24);
        const __m256 top01 = _mm256_max_ps(_mm256_andnot_ps(sign, v0), _mm256_andnot_ps(sign, v1));
        const __m256 top = _mm256_max_ps(top01, _mm256_max_ps(_mm256_andnot_ps(sign, v2), _mm256_andnot_ps(sign, v3)));
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        const float most = _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
        const __m256 by = _mm256_set1_ps(most > TINY ? 127 / most : 0);
#define WHOLE(v) _mm256_cvttps_epi32(_mm256_sub_ps(_mm256_add_ps(_mm256_mul_ps(v, by), magic), magic))
        const __m256i a = WHOLE(v0), c = WHOLE(v1), d = WHOLE(v2), e = WHOLE(v3);
        const __m256i total = _mm256_add_epi32(_mm256_add_epi32(a, c), _mm256_add_epi32(d, e));
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(_mm256_packs_epi32(a, c), _mm256_packs_epi32(d, e)), order); /* in order */
        const __m256i split = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, parts), 0xd8);
        _mm_storeu_si128((__m128i *)even, _mm256_castsi256_si128(split));
        _mm_storeu_si128((__m128i *)(even + QUAD / 2), _mm256_extracti128_si256(split, 1));
        /* four neighbours among the even places, and among the odd ones, are eight in a row: a register's half of a, c, d or e each */
        const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(a, c), _mm256_hadd_epi32(d, e)); /* halves of a, c, d, e; then the others */
        const __m128i eights = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        _mm_storeu_si128((__m128i *)(to->eight + (t * quads * 4 + b) * 4), _mm_sub_epi32(_mm_setzero_si128(), _mm_slli_epi32(eights, 3)));
        /* what is no number, or infinite, becomes the least integer, and -128 here */
        scale[b] = _mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_set1_epi8(-128))) ? NAN : most / 127;
        offset[b] = -((float)_mm_cvtsi128_si32(s) * scale[b]);
    }
}

/* A quad's scales; `blocks` that a group has is known when this is compiled. */
AVX2 INLINE __m128 quad_scales(const float *row, size_t quad, int blocks) {
    if (blocks == 1) return _mm_loadu_ps(row + 4 * quad);
    if (blocks == 4) return _mm_set1_ps(row[quad]);
    const __m128 two = _mm_castpd_ps(_mm_load_sd((const double *)(const void *)(row + 2 * quad)));
    return _mm_unpacklo_ps(two, two);
}

/* Those of `left` blocks behind a row's last whole quad, then zeros. */
AVX2 INLINE __m128 last_scales(const float *row, size_t quad, size_t left, int blocks) {
    if (blocks == 2) return _mm_setr_ps(row[2 * quad], row[2 * quad], 0, 0);
    return _mm_maskload_ps(row + 4 * quad, _mm_cmpgt_epi32(_mm_set1_epi32((int)left), _mm_setr_epi32(0, 1, 2, 3)));
}

/* Sums of eight rows' eight lanes, each in the order of sum_of. */
AVX2 INLINE __m256 eight_sums(const __m256 *a) {
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

AVX2 INLINE __m256 with_offset(__m256 a, __m128 offset) { return _mm256_add_ps(a, _mm256_insertf128_ps(_mm256_setzero_ps(), offset, 0)); }

struct tokens { /* of a tile */
    const int8_t *whole;
    const float *scale, *offset;
    const int32_t *eight;
    size_t quads;
};

AVX2 INLINE __m256i sums_avx2(__m256i even, __m256i odd, const __m256i *whole) { /* eight sums of eight products; whole[2]: of the odd places */
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(even, _mm256_loadu_si256(whole)), _mm256_maddubs_epi16(odd, _mm256_loadu_si256(whole + 2)));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

AVX2 INLINE void quad_avx2(
    __m256i first, __m256i second, __m128 s, __m128 o, const struct tokens *x, size_t q, int tokens, int offsets, __m256 *low, __m256 *high, __m128 *offset
) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i e0 = _mm256_and_si256(first, mask), o0 = _mm256_and_si256(_mm256_srli_epi16(first, 4), mask);
    const __m256i e1 = _mm256_and_si256(second, mask), o1 = _mm256_and_si256(_mm256_srli_epi16(second, 4), mask);
    for (int t = 0; t < tokens; t++) {
        const size_t at = (size_t)t * x->quads + q;
        const __m256i *w = (const __m256i *)(x->whole + at * QUAD);
        __m256i a = sums_avx2(e0, o0, w), b = sums_avx2(e1, o1, w + 1);
        if (!offsets) {
            a = _mm256_add_epi32(a, _mm256_loadu_si256((const __m256i *)(x->eight + 16 * at)));
            b = _mm256_add_epi32(b, _mm256_loadu_si256((const __m256i *)(x->eight + 16 * at + 8)));
        }
        const __m256 by = _mm256_castps128_ps256(_mm_mul_ps(s, _mm_loadu_ps(x->scale + 4 * at)));
        low[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(a), _mm256_permutevar8x32_ps(by, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)), low[t]);
        high[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(b), _mm256_permutevar8x32_ps(by, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3)), high[t]);
        if (offsets) offset[t] = _mm_fmadd_ps(o, _mm_loadu_ps(x->offset + 4 * at), offset[t]);
    }
}

AVX2 INLINE void row_avx2(const struct coded *m, size_t row, const struct tokens *x, int tokens, int blocks, int offsets_too, __m256 *out) {
    const size_t bytes = m->groups * m->group / 2, whole = bytes / (QUAD / 2);
    const uint8_t *codes = m->codes + row * bytes;
    const float *scales = m->scales + row * m->groups, *offsets = offsets_too ? m->offsets + row * m->groups : scales;
    __m256 low[TILE], high[TILE];
    __m128 offset[TILE];
    for (int t = 0; t < tokens; t++) { low[t] = high[t] = _mm256_setzero_ps(); offset[t] = _mm_setzero_ps(); }
    for (size_t q = 0; q < whole; q++) {
        if (tokens == 1) PREFETCH(codes + q * QUAD / 2 + AHEAD);
        const __m256i *at = (const __m256i *)(codes + q * QUAD / 2);
        const __m128 s = quad_scales(scales, q, blocks), o = quad_scales(offsets, q, blocks);
        quad_avx2(_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1), s, o, x, q, tokens, offsets_too, low, high, offset);
    }
    const size_t left = blocks == 4 ? 0 : bytes / (CODED / 2) % 4; /* blocks behind the last whole quad */
    if (left) {
        const uint8_t *at = codes + whole * QUAD / 2;
        const __m256i none = _mm256_setzero_si256();
        const __m256i first = left == 1 ? _mm256_inserti128_si256(none, _mm_loadu_si128((const __m128i *)at), 0) : _mm256_loadu_si256((const __m256i *)at);
        const __m256i second = left == 3 ? _mm256_inserti128_si256(none, _mm_loadu_si128((const __m128i *)(at + CODED)), 0) : none;
        const __m128 s = last_scales(scales, whole, left, blocks), o = last_scales(offsets, whole, left, blocks);
        quad_avx2(first, second, s, o, x, whole, tokens, offsets_too, low, high, offset);
    }
    for (int t = 0; t < tokens; t++) out[t * EIGHT] = offsets_too ? with_offset(_mm256_add_ps(low[t], high[t]), offset[t]) : _mm256_add_ps(low[t], high[t]);
}

VNNI INLINE void quad_vnni(__m512i codes, __m128 s, __m128 o, const struct tokens *x, size_t q, int tokens, int offsets, __m512 *sum, __m128 *offset) {
    const __m512i mask = _mm512_set1_epi8(15), each = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i even = _mm512_and_si512(codes, mask), odd = _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask);
    for (int t = 0; t < tokens; t++) {
        const size_t at = (size_t)t * x->quads + q;
        const __m512i from = offsets ? _mm512_setzero_si512() : _mm512_loadu_si512(x->eight + 16 * at);
        __m512i a = _mm512_dpbusd_epi32(from, even, _mm512_loadu_si512(x->whole + at * QUAD));
        a = _mm512_dpbusd_epi32(a, odd, _mm512_loadu_si512(x->whole + at * QUAD + QUAD / 2));
        const __m512 by = _mm512_permutexvar_ps(each, _mm512_castps128_ps512(_mm_mul_ps(s, _mm_loadu_ps(x->scale + 4 * at))));
        sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), by, sum[t]);
        if (offsets) offset[t] = _mm_fmadd_ps(o, _mm_loadu_ps(x->offset + 4 * at), offset[t]);
    }
}

VNNI INLINE void row_vnni(const struct coded *m, size_t row, const struct tokens *x, int tokens, int blocks, int offsets_too, __m256 *out) {
    const size_t bytes = m->groups * m->group / 2, whole = bytes / (QUAD / 2);
    const uint8_t *codes = m->codes + row * bytes;
    const float *scales = m->scales + row * m->groups, *offsets = offsets_too ? m->offsets + row * m->groups : scales;
    __m512 sum[TILE];
    __m128 offset[TILE];
    for (int t = 0; t < tokens; t++) { sum[t] = _mm512_setzero_ps(); offset[t] = _mm_setzero_ps(); }
    for (size_t q = 0; q < whole; q++) {
        if (tokens == 1) PREFETCH(codes + q * QUAD / 2 + AHEAD);
        const __m128 s = quad_scales(scales, q, blocks), o = quad_scales(offsets, q, blocks);
        quad_vnni(_mm512_loadu_si512(codes + q * QUAD / 2), s, o, x, q, tokens, offsets_too, sum, offset);
    }
    const size_t left = blocks == 4 ? 0 : bytes / (CODED / 2) % 4;
    if (left) {
        const __m512i last = _mm512_maskz_loadu_epi32((__mmask16)((1u << 4 * left) - 1), codes + whole * QUAD / 2);
        quad_vnni(last, last_scales(scales, whole, left, blocks), last_scales(offsets, whole, left, blocks), x, whole, tokens, offsets_too, sum, offset);
    }
    for (int t = 0; t < tokens; t++) {
        const __m256 lanes = _mm256_add_ps(_mm512_castps512_ps256(sum[t]), _mm512_extractf32x8_ps(sum[t], 1));
        out[t * EIGHT] = offsets_too ? with_offset(lanes, offset[t]) : lanes;
    }
}

#define UNIT AVX2
#define NAME(x) x##_avx2
#include "linear_loops.h"
#undef UNIT
#undef NAME

#define UNIT VNNI
#define NAME(x) x##_vnni
#include "linear_loops.h"
#undef UNIT
#undef NAME

const char *vector_unit(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return "plain";
#if !defined(FLASHHEAD_NARROW)
    const int wide = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (wide && __builtin_cpu_supports("avx512vnni")) return "avx512vnni";
#endif
    return "avx2";
}

void choose_linear(void) {
    const struct linear avx2 = {round_avx2, rows_avx2}, vnni = {round_avx2, rows_vnni};
    const char *unit = vector_unit();
    if (strcmp(unit, "plain") != 0) linear = strcmp(unit, "avx2") == 0 ? avx2 : vnni;
}
#else
const char *vector_unit(void) { return "plain"; }

void choose_linear(void) {}
#endif
