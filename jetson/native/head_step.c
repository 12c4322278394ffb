/* The step of a head as one operator of ONNX Runtime on the CPU: hidden states in, `head.Step` out.
 *
 *   domain flashhead.native, operator HeadStep, inputs and attributes as `export/native.py` writes them
 *   hidden_states      in   [N, d] float32
 *   token              out  [N] int64, -1 where a state is not finite
 *   candidate_ids      out  [N, C] int64, ascending, then -1
 *   candidate_logits   out  [N, C] float32, -inf where the id is -1
 *   counts             out  [N, 2 + stages] int64: clusters opened, slots scored by each code, rows scored exactly
 *   capped             out  [N] bool
 *
 * Judge: flashhead_edge/reference.py.
 *
 * What a state gets depends on that state alone, not on the batch, the threads or the width of the vector unit:
 *  - coded rows: the state is rounded to 16 bits (symmetric, by its own largest value), products with 8-bit codes are
 *    summed in 32 bits, exactly. The rounding unit is made so large that no sum can overflow.
 *  - rows of floats: 32 partial sums, lane l of columns l, l + 32, ..., with fused multiply-adds, added in one fixed
 *    tree. `sum_lanes` and the AVX2 code do the same operations in the same order.
 *  The compiler must not fuse or reorder anything else: -ffp-contract=off.
 *
 * Bytes of a step (SmolLM2-135M at 99.5 %, the mean of its counts): rotation 512 x 576, centroids 3,072 x 384, rows
 * 6,638 x 208, exact rows 551 x 1,152: 3.5 MB. Floor on a 2-core EPYC that others used too, one thread: 100 us where the
 * last-level cache holds them (34 GB/s), 410 us from memory (8.5 GB/s). Predicted 170 to 250 us in the cache; measured 300
 * to 430, and 540 to 750 from memory (median over states, of the fastest of each): rows that lie apart come at 3 to 5 GB/s.
 * Prefetching further ahead changed nothing, huge pages gave a tenth at most. The standard operators: 1,600 to 2,300.
 * What no row is read for (quantising, gates, lists) is 25 us.
 *
 * Threads: whoever comes first makes the step, others take pieces of the phase that runs. One parallel section a step:
 * a thread is woken once, not once a phase. Llama-3.2-1B's shape: 2,425 us with one thread, 1,476 with two (means).
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "ort_abi.h"

#if defined(__GNUC__) && defined(__x86_64__) && !defined(FLASHHEAD_PLAIN)
#define HAS_AVX2 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define PREFETCH(p) _mm_prefetch((const char *)(p), _MM_HINT_T0)
#elif defined(__GNUC__)
#define HAS_AVX2 0
#define PREFETCH(p) __builtin_prefetch(p)
#else
#define HAS_AVX2 0
#define PREFETCH(p) ((void)(p))
#endif

#if defined(__GNUC__)
#include <sched.h>
#define TAKE(counter) __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL)
#define READ(counter) __atomic_load_n(counter, __ATOMIC_ACQUIRE)
#define SET(counter, value) __atomic_store_n(counter, value, __ATOMIC_RELEASE)
#define THREADS 8 /* that share a step, at most */
#else /* one thread makes a step */
#define TAKE(counter) ((*(counter))++)
#define READ(counter) (*(counter))
#define SET(counter, value) (*(counter) = (value))
#define THREADS 1
#endif

enum { LANES = 32, PAD = 16, MOST_STAGES = 16, LINE = 64 };
enum { STREAM = 2048, AHEAD = 8 }; /* rows that lie apart are asked of memory so many before they are multiplied */
enum { PIECE_BYTES = 1 << 15, MOST_PIECES = 16 }; /* a phase is cut into pieces of that size, at most so many */
enum { SHARED_BYTES = 1 << 18 }; /* rotation and centroids together: below that no thread is woken */
enum { SPINS = 1000 }; /* looks at a counter before the processor is offered to others */

static const float NO_BOUND = 1e30f; /* an infinite margin: as in the standard operators, no sum becomes NaN */

/* ---- what the kernel holds: pointers into the session's own weights ---- */

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

struct gate {
    const float *nearness; /* of the probe: one over the clusters' own errors; a code's stand with its rows */
    float margin;
    size_t cap;
};

struct kernel {
    ort_api api;
    size_t hidden, vocab, cluster_size, clusters, coordinates, stages, always;
    const int32_t *token;        /* [slots], -1: empty */
    int32_t *filled;             /* [clusters], slots with a token */
    const int32_t *always_slots; /* [always], ascending */
    const float *mean, *turn_scale; /* [hidden]; mean NULL: no rotation */
    const float *bias;
    float state_power;
    struct matrix rows, turn, centroids, stage_rows[MOST_STAGES];
    struct gate probe, gates[MOST_STAGES];
};

/* ---- products ---- */

/* A state as a matrix's rows want it: whole numbers or floats, zeros behind them. */
struct state {
    const int16_t *whole;
    const float *real;
    float unit, half; /* a row's sum is unit * sum of whole numbers + half */
};

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

static void widen(const void *row, int type, size_t first, size_t n, float *out) { /* n values of a row as floats */
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

/* `ahead`: bytes by which memory is asked for, 0: not; processors look ahead by themselves, but not beyond a page. */
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

static void (*whole_sums)(const int8_t *rows, size_t bytes, size_t n, size_t columns, size_t ahead, const int16_t *x, int32_t *out) = whole_sums_plain;
static void (*real_sums)(const void *rows, int type, size_t bytes, size_t n, size_t columns, const float *x, float *out) = real_sums_plain;

enum { BLOCK = 64 }; /* rows whose sums are made at a time */

/* At most BLOCK rows from `first` on times a state, without their scales: out [n]. */
static void sums_of(const struct matrix *m, const struct state *s, size_t first, size_t n, float *out) {
    const char *rows = m->data + first * m->row;
    int32_t sums[BLOCK];
    if (m->type != ORT_INT8) {
        real_sums(rows, m->type, m->row, n, m->columns, s->real, out);
        return;
    }
    whole_sums((const int8_t *)rows, m->row, n, m->padded, m->tail < m->row ? 0 : STREAM, s->whole, sums);
    for (size_t i = 0; i < n; i++) out[i] = (float)sums[i] * s->unit + s->half;
}

/* Rows first to first + n of a matrix times a state: out [n]. */
static void products(const struct matrix *m, const struct state *s, size_t first, size_t n, float *out) {
    for (size_t i = 0; i < n; i += BLOCK) sums_of(m, s, first + i, n - i < BLOCK ? n - i : BLOCK, out + i);
    if (m->scale)
        for (size_t i = 0; i < n; i++) out[i] *= m->scale[first + i];
}

/* Round x [columns] for a matrix of whole numbers: to 16 bits, and so that 128 * sum |whole| stays below 2^31. 0: x is not finite. */
static int rounded(const struct matrix *m, const float *x, int16_t *whole, struct state *s) {
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

/* ---- one state ---- */

struct run;

struct item { /* a slot that was opened for the state or is always scored */
    int32_t slot;
    float score, nearness;
    int32_t token;
};

struct span { /* slots side by side: those of a cluster, or an always-scored one alone */
    int32_t slot;
    uint32_t at; /* how many slots stand before them */
};

struct phase { /* work in pieces, which threads take one after the other */
    void (*work)(struct run *, size_t);
    size_t pieces, taken, done;
};

struct run { /* one state's way through the stages, and its memory */
    const struct kernel *k;
    int shared; /* threads help */
    struct phase phases[3 + MOST_STAGES];
    size_t begun, ended; /* phases that were begun; 1: the step is made */
    float best[MOST_PIECES];
    size_t kept[MOST_PIECES];
    float floor, bound;
    void *memory;
    float *hidden, *z, *x, *clusters, *gap, *gap_copy, *logits;
    int16_t *whole;
    int32_t *opened, *ids;
    struct item *items;
    struct span *spans; /* [n_spans + 1] */
    uint64_t *marks;  /* a bit a token */
    struct state state;
    const struct matrix *matrix; /* of the phase that runs */
    size_t n_opened, n_spans, n_items, pieces, piece;
};

static size_t padded(size_t n, size_t to) { return (n + to - 1) / to * to; }

static size_t most_items(const struct kernel *k) { return k->probe.cap * k->cluster_size + k->always; }

static int open_run(struct run *r, const struct kernel *k, int shared) { /* 0: no memory */
    size_t items = most_items(k), wide = k->clusters > items ? k->clusters : items;
    size_t d = padded(k->hidden, LANES), c = padded(k->coordinates + LANES, LANES);
    size_t x = d > c ? d : c, words = (k->vocab + 63) / 64;
    const size_t sizes[] = {
        4 * d, 4 * c, 4 * x, 4 * k->clusters, 4 * wide, 4 * wide, 4 * items, 2 * x,
        4 * k->clusters, 4 * items, sizeof(struct item) * items, sizeof(struct span) * (k->probe.cap + k->always + 1), 8 * words,
    };
    size_t at[sizeof sizes / sizeof *sizes], total = LINE;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) { at[i] = total; total += padded(sizes[i], LINE); }
    memset(r, 0, sizeof *r);
    r->memory = malloc(total);
    if (!r->memory) return 0;
    char *base = (char *)((uintptr_t)r->memory / LINE * LINE);
    r->k = k;
    r->shared = shared;
    r->hidden = (float *)(base + at[0]);
    r->z = (float *)(base + at[1]);
    r->x = (float *)(base + at[2]);
    r->clusters = (float *)(base + at[3]);
    r->gap = (float *)(base + at[4]);
    r->gap_copy = (float *)(base + at[5]);
    r->logits = (float *)(base + at[6]);
    r->whole = (int16_t *)(base + at[7]);
    r->opened = (int32_t *)(base + at[8]);
    r->ids = (int32_t *)(base + at[9]);
    r->items = (struct item *)(base + at[10]);
    r->spans = (struct span *)(base + at[11]);
    r->marks = (uint64_t *)(base + at[12]);
    memset(r->hidden, 0, 4 * d);
    memset(r->z, 0, 4 * c);
    memset(r->x, 0, 4 * x);
    memset(r->marks, 0, 8 * words);
    return 1;
}

static void rest(size_t looks) { /* between two looks at a counter that another thread counts up */
#if defined(__GNUC__)
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (looks % SPINS == SPINS - 1) sched_yield();
#endif
    (void)looks;
}

static void take_pieces(struct run *r, struct phase *p) {
    for (size_t piece; READ(&p->taken) < p->pieces && (piece = TAKE(&p->taken)) < p->pieces; TAKE(&p->done)) p->work(r, piece);
}

/* Do `work` for pieces of n things that read `bytes` each, with the threads that help. */
static void spread(struct run *r, void (*work)(struct run *, size_t), size_t n, size_t bytes) {
    const size_t pieces = r->shared ? n * bytes / PIECE_BYTES : 1;
    r->pieces = pieces < 1 ? 1 : pieces > MOST_PIECES ? MOST_PIECES : pieces;
    r->piece = padded((n + r->pieces - 1) / r->pieces, 4); /* rows are multiplied four at a time */
    if (r->pieces == 1) {
        work(r, 0);
        return;
    }
    struct phase *p = &r->phases[r->begun];
    p->work = work;
    p->pieces = r->pieces;
    SET(&r->begun, r->begun + 1);
    take_pieces(r, p);
    for (size_t looks = 0; READ(&p->done) < p->pieces; looks++) rest(looks);
}

/* Another thread's part of a step: pieces of whatever phase runs, until the step is made. It may come late or never. */
static void help(struct run *r) {
    for (size_t looks = 0; !READ(&r->ended); looks++) {
        const size_t begun = READ(&r->begun);
        if (begun) take_pieces(r, &r->phases[begun - 1]);
        rest(looks);
    }
}

static float largest(const float *x, size_t n) {
    float most[8], out = -INFINITY;
    size_t i = 0;
    for (int l = 0; l < 8; l++) most[l] = -INFINITY;
    for (; i + 8 <= n; i += 8)
        for (int l = 0; l < 8; l++) most[l] = x[i + l] > most[l] ? x[i + l] : most[l];
    for (; i < n; i++) out = x[i] > out ? x[i] : out;
    for (int l = 0; l < 8; l++) out = most[l] > out ? most[l] : out;
    return out;
}

static int piece_of(const struct run *r, size_t piece, size_t n, size_t *first, size_t *end) {
    *first = piece * r->piece;
    *end = *first + r->piece < n ? *first + r->piece : n;
    return *first < n;
}

static void rotate_piece(struct run *r, size_t piece) {
    size_t first, end;
    if (piece_of(r, piece, r->k->turn.n, &first, &end)) products(&r->k->turn, &r->state, first, end - first, r->z + 1 + first);
}

static void probe_piece(struct run *r, size_t piece) {
    size_t first, end;
    r->best[piece] = -INFINITY;
    if (!piece_of(r, piece, r->k->clusters, &first, &end)) return;
    products(&r->k->centroids, &r->state, first, end - first, r->clusters + first);
    r->best[piece] = largest(r->clusters + first, end - first);
}

static void prefetch(const char *from, size_t bytes) {
    for (size_t b = 0; b < bytes; b += LINE) PREFETCH(from + b);
}

static const struct tail *tail_of(const struct matrix *m, size_t slot) { return (const struct tail *)(m->data + slot * m->row + m->tail); }

/* The first code: a span's rows are multiplied together. Kept are items that may pass the gate: their gap to the best so far,
 * which is not above the best of all, passes. They stand from where the piece's first slot would. */
static void span_piece(struct run *r, size_t piece) {
    const struct matrix *m = r->matrix;
    size_t first, end, kept = 0;
    float sums[BLOCK], best = r->floor;
    r->kept[piece] = 0;
    r->best[piece] = best;
    if (!piece_of(r, piece, r->n_spans, &first, &end)) return;
    struct item *out = r->items + r->spans[first].at;
    for (size_t o = first; o < end; o++) {
        const struct span *span = &r->spans[o];
        if (o + 1 < end) prefetch(m->data + (size_t)span[1].slot * m->row, (span[2].at - span[1].at) * m->row);
        const float cluster = r->clusters[(size_t)span->slot / r->k->cluster_size];
        const size_t n = span[1].at - span->at;
        for (size_t i = 0; i < n; i += BLOCK) {
            const size_t some = n - i < BLOCK ? n - i : BLOCK, slot = (size_t)span->slot + i;
            sums_of(m, &r->state, slot, some, sums);
            for (size_t j = 0; j < some; j++) {
                const struct tail *tail = tail_of(m, slot + j);
                const float score = cluster + sums[j] * tail->scale;
                best = score > best ? score : best;
                const struct item item = {(int32_t)(slot + j), score, tail->nearness, tail->token};
                out[kept] = item;
                kept += (best - score) * tail->nearness <= r->bound;
            }
        }
    }
    r->kept[piece] = kept;
    r->best[piece] = best;
}

static void item_piece(struct run *r, size_t piece) { /* a later code: rows that lie apart */
    const struct matrix *m = r->matrix;
    size_t first, end;
    if (!piece_of(r, piece, r->n_items, &first, &end)) return;
    for (size_t i = first; i < end; i++) {
        if (i + AHEAD < end) prefetch(m->data + (size_t)r->items[i + AHEAD].slot * m->row, m->row);
        float sum;
        const size_t slot = (size_t)r->items[i].slot;
        sums_of(m, &r->state, slot, 1, &sum);
        r->items[i].score += sum * tail_of(m, slot)->scale;
        r->items[i].nearness = tail_of(m, slot)->nearness;
    }
}

static void exact_piece(struct run *r, size_t piece) {
    const struct kernel *k = r->k;
    const struct matrix *m = &k->rows;
    size_t first, end;
    if (!piece_of(r, piece, r->n_items, &first, &end)) return;
    for (size_t i = first; i < end; i++) {
        if (i + AHEAD < end) prefetch(m->data + (size_t)r->ids[i + AHEAD] * m->row, m->row);
        real_sums(m->data + (size_t)r->ids[i] * m->row, m->type, m->row, 1, k->hidden, r->hidden, r->logits + i);
        if (k->bias) r->logits[i] += k->bias[r->ids[i]];
    }
}

/* The gap below which lie fewer than `cap` of n gaps, and with which at least `cap`: quickselect, which reorders them. */
static float nth_gap(float *gap, size_t n, size_t nth) {
    size_t low = 0, high = n - 1;
    while (low < high) {
        const float pivot = gap[low + (high - low) / 2];
        size_t i = low, j = high;
        for (;;) { /* Hoare's partition */
            while (gap[i] < pivot) i++;
            while (gap[j] > pivot) j--;
            if (i >= j) break;
            const float t = gap[i];
            gap[i++] = gap[j];
            gap[j--] = t;
        }
        if (nth <= j) high = j;
        else low = j + 1;
    }
    return gap[nth];
}

/* Which of `n` passed gaps stay under a cap: those up to `*edge`, and of equals to it the first `*equal`. */
static void cut(const float *gap, float *copy, size_t n, size_t cap, float *edge, size_t *equal) {
    memcpy(copy, gap, n * sizeof *gap);
    *edge = nth_gap(copy, n, cap - 1);
    size_t below = 0;
    for (size_t i = 0; i < n; i++) below += gap[i] < *edge;
    *equal = cap - below;
}

/* Clusters that open, ascending: r->opened, r->n_opened. */
static int open_clusters(struct run *r, float bound) {
    const struct kernel *k = r->k;
    const float best = largest(r->best, r->pieces);
    size_t n = 0;
    for (size_t i = 0; i < k->clusters; i++) {
        const float gap = (best - r->clusters[i]) * k->probe.nearness[i];
        r->opened[n] = (int32_t)i;
        r->gap[n] = gap;
        n += gap <= bound;
    }
    const int capped = n > k->probe.cap;
    if (capped) {
        float edge;
        size_t equal, left = 0;
        cut(r->gap, r->gap_copy, n, k->probe.cap, &edge, &equal);
        for (size_t i = 0; i < n; i++) {
            const int stays = r->gap[i] < edge || (r->gap[i] == edge && equal > 0 && equal--);
            r->opened[left] = r->opened[i];
            left += (size_t)stays;
        }
        n = left;
    }
    r->n_opened = n;
    return capped;
}

/* The slots of opened clusters and those always scored, ascending, no slot twice: r->spans. */
static void list_spans(struct run *r) {
    const struct kernel *k = r->k;
    const size_t size = k->cluster_size;
    size_t n = 0, spans = 0, a = 0;
    for (size_t o = 0; o <= r->n_opened; o++) {
        const size_t first = o < r->n_opened ? (size_t)r->opened[o] * size : SIZE_MAX; /* of the next cluster */
        for (; a < k->always && (size_t)k->always_slots[a] < first; a++) {
            const struct span alone = {k->always_slots[a], (uint32_t)n++};
            r->spans[spans++] = alone;
        }
        if (o == r->n_opened) break;
        while (a < k->always && (size_t)k->always_slots[a] < first + size) a++; /* the cluster has them anyway */
        const struct span cluster = {(int32_t)first, (uint32_t)n};
        r->spans[spans] = cluster;
        spans += k->filled[r->opened[o]] > 0;
        n += (size_t)k->filled[r->opened[o]]; /* empty slots stand at a cluster's end */
    }
    r->spans[spans].at = (uint32_t)n;
    r->n_spans = spans;
    r->n_items = n;
}

static void score_spans(struct run *r) { /* items behind the first code; some that will not pass are left out */
    const struct kernel *k = r->k;
    struct item *to = r->items;
    /* the best cluster first: with its best slot few others need be kept */
    size_t best = 0;
    for (size_t i = 1; i < r->n_spans; i++)
        if (r->clusters[(size_t)r->spans[i].slot / k->cluster_size] > r->clusters[(size_t)r->spans[best].slot / k->cluster_size]) best = i;
    const struct span *span = &r->spans[best];
    const size_t n = span[1].at - span->at < BLOCK ? span[1].at - span->at : BLOCK;
    float sums[BLOCK];
    r->floor = -INFINITY;
    sums_of(r->matrix, &r->state, (size_t)span->slot, n, sums);
    for (size_t i = 0; i < n; i++) {
        const float score = r->clusters[(size_t)span->slot / k->cluster_size] + sums[i] * tail_of(r->matrix, (size_t)span->slot + i)->scale;
        r->floor = score > r->floor ? score : r->floor;
    }
    spread(r, span_piece, r->n_spans, k->cluster_size * r->matrix->row);
    for (size_t p = 0; p < r->pieces; p++) {
        const size_t first = p * r->piece;
        if (!r->kept[p]) continue;
        memmove(to, r->items + r->spans[first].at, r->kept[p] * sizeof *to);
        to += r->kept[p];
    }
    r->n_items = (size_t)(to - r->items);
}

static void list_items(struct run *r) { /* where there is no code: an item for each slot */
    for (size_t o = 0; o < r->n_spans; o++)
        for (uint32_t i = r->spans[o].at; i < r->spans[o + 1].at; i++) {
            const int32_t slot = r->spans[o].slot + (int32_t)(i - r->spans[o].at);
            const struct item item = {slot, 0, 0, r->k->token[slot]};
            r->items[i] = item;
        }
}

static int pass(struct run *r, const struct gate *gate, float bound) { /* items that stay behind a code, in their order */
    float best = -INFINITY;
    for (size_t i = 0; i < r->n_items; i++) best = r->items[i].score > best ? r->items[i].score : best;
    size_t n = 0;
    for (size_t i = 0; i < r->n_items; i++) {
        const struct item x = r->items[i];
        const float gap = (best - x.score) * x.nearness;
        r->items[n] = x;
        r->gap[n] = gap;
        n += gap <= bound;
    }
    const int capped = n > gate->cap;
    if (capped) {
        float edge;
        size_t equal, left = 0;
        cut(r->gap, r->gap_copy, n, gate->cap, &edge, &equal);
        for (size_t i = 0; i < n; i++) {
            const int stays = r->gap[i] < edge || (r->gap[i] == edge && equal > 0 && equal--);
            r->items[left] = r->items[i];
            left += (size_t)stays;
        }
        n = left;
    }
    r->n_items = n;
    return capped;
}

static int tokens_in_order(struct run *r) { /* the items' tokens, ascending: a bit for each, read in order. 0: one is none of the vocabulary */
    const struct kernel *k = r->k;
    size_t n = 0, words = (k->vocab + 63) / 64;
    for (size_t i = 0; i < r->n_items; i++) {
        const int32_t token = r->items[i].token;
        if ((uint32_t)token >= k->vocab) return 0;
        r->marks[token >> 6] |= (uint64_t)1 << (token & 63);
    }
    for (size_t w = 0; w < words; w++) {
        uint64_t bits = r->marks[w];
        r->marks[w] = 0;
        for (; bits; bits &= bits - 1) {
#if defined(__GNUC__)
            const int bit = __builtin_ctzll(bits);
#else
            int bit = 0;
            while (!(bits >> bit & 1)) bit++;
#endif
            r->ids[n++] = (int32_t)(64 * w) + bit;
        }
    }
    return n == r->n_items;
}

static int real_state(struct run *r, size_t columns) { /* r->x as it is, zeros behind it */
    memset(r->x + columns, 0, (padded(columns, LANES) - columns) * sizeof(float));
    r->state.real = r->x;
    return 1;
}

/* The state for a matrix over z: its columns times their steps. 0: not finite. */
static int prepare(struct run *r, const struct matrix *m) {
    if (m->type != ORT_INT8) {
        memcpy(r->x, r->z, m->columns * sizeof(float));
        return real_state(r, m->columns);
    }
    for (size_t j = 0; j < m->columns; j++) r->x[j] = r->z[j] * m->steps[j];
    return rounded(m, r->x, r->whole, &r->state);
}

static float bound_of(const struct gate *gate, float unit) { return gate->margin < NO_BOUND ? gate->margin * unit : NO_BOUND; }

static void begin(struct run *r) { /* a new state */
    memset(r->phases, 0, sizeof r->phases);
    r->begun = r->ended = 0;
}

/* One state: ids and logits in r, n_items of them; counts [2 + stages]. */
static ort_status *step(struct run *r, const float *hidden, int64_t *counts, unsigned char *capped, int64_t *token) {
    const struct kernel *k = r->k;
    float unit = 1;
    memset(counts, 0, (2 + k->stages) * sizeof *counts);
    *capped = 0;
    *token = -1;
    r->n_items = 0;
    double size = 0;
    for (size_t i = 0; i < k->hidden; i++) size += fabsf(hidden[i]);
    if (!(size <= 3e38)) return NULL;
    memcpy(r->hidden, hidden, k->hidden * sizeof *hidden);
    if (k->mean) {
        for (size_t i = 0; i < k->hidden; i++) r->x[i] = (hidden[i] - k->mean[i]) * (k->turn_scale ? k->turn_scale[i] : 1);
        if (!(k->turn.type == ORT_INT8 ? rounded(&k->turn, r->x, r->whole, &r->state) : real_state(r, k->hidden))) return NULL;
        spread(r, rotate_piece, k->turn.n, k->turn.row);
        r->z[0] = 1;
        double square = 0;
        for (size_t i = 0; i < k->turn.n; i++) square += (double)r->z[1 + i] * r->z[1 + i];
        if (k->state_power != 0) unit = (float)pow(square / (double)k->turn.n, k->state_power / 2);
    } else memcpy(r->z, hidden, k->hidden * sizeof *hidden);
    if (!prepare(r, &k->centroids)) return NULL;
    spread(r, probe_piece, k->clusters, k->centroids.row);
    *capped |= (unsigned char)open_clusters(r, bound_of(&k->probe, unit));
    counts[0] = (int64_t)r->n_opened;
    if (!r->n_opened) return NULL; /* no score can be compared */
    list_spans(r);
    for (size_t i = 0; i < k->stages; i++) {
        counts[1 + i] = (int64_t)r->n_items;
        r->matrix = &k->stage_rows[i];
        if (!prepare(r, r->matrix)) {
            r->n_items = 0;
            return NULL;
        }
        r->bound = bound_of(&k->gates[i], unit);
        if (i) spread(r, item_piece, r->n_items, r->matrix->row);
        else score_spans(r);
        *capped |= (unsigned char)pass(r, &k->gates[i], r->bound);
    }
    if (!k->stages) list_items(r);
    counts[1 + k->stages] = (int64_t)r->n_items;
    if (!r->n_items) return NULL;
    if (!tokens_in_order(r))
        return ORT(k->api, create_status)(ORT_ERROR_FAIL, "HeadStep: the head's arrays name tokens that it does not have; export it again");
    spread(r, exact_piece, r->n_items, k->rows.row);
    size_t best = 0;
    for (size_t i = 1; i < r->n_items; i++)
        if (r->logits[i] > r->logits[best]) best = i;
    *token = r->ids[best];
    return NULL;
}

/* ---- a batch ---- */

struct found { /* of one state */
    int32_t *ids;
    float *logits;
    size_t n;
};

struct batch { /* states that threads share out among them */
    const struct kernel *k;
    const float *hidden;
    size_t n, piece;
    struct found *found;
    int64_t *counts, *token;
    unsigned char *capped;
    volatile int failed;
};

static void batch_piece(void *batch, size_t piece) {
    struct batch *b = batch;
    const size_t columns = 2 + b->k->stages;
    struct run r;
    if (!open_run(&r, b->k, 0)) { b->failed = 1; return; }
    for (size_t i = piece * b->piece; i < b->n && i < (piece + 1) * b->piece; i++) {
        struct found *f = &b->found[i];
        begin(&r);
        ort_status *status = step(&r, b->hidden + i * b->k->hidden, b->counts + i * columns, b->capped + i, b->token + i);
        if (status) {
            b->failed = 1;
            ORT(b->k->api, release_status)(status);
            break;
        }
        f->n = r.n_items;
        f->ids = malloc(f->n ? f->n * (sizeof *f->ids + sizeof *f->logits) : 1);
        if (!f->ids) { b->failed = 1; break; }
        f->logits = (float *)(f->ids + f->n);
        memcpy(f->ids, r.ids, f->n * sizeof *f->ids);
        memcpy(f->logits, r.logits, f->n * sizeof *f->logits);
    }
    free(r.memory);
}

static void write_row(const int32_t *ids, const float *logits, size_t n, size_t width, int64_t *out_ids, float *out_logits) {
    for (size_t i = 0; i < n; i++) out_ids[i] = ids[i];
    if (n) memcpy(out_logits, logits, n * sizeof *logits);
    for (size_t i = n; i < width; i++) { out_ids[i] = -1; out_logits[i] = -INFINITY; }
}

#define TRY(call) do { ort_status *status_ = (call); if (status_) return status_; } while (0)

static ort_status *output(const struct kernel *k, ort_context *context, size_t index, const int64_t *dimensions, size_t rank, void **out) {
    ort_value *value;
    TRY(ORT(k->api, output)(context, index, dimensions, rank, &value));
    return ORT(k->api, data)(value, out);
}

static ort_status *no_memory(const struct kernel *k) { return ORT(k->api, create_status)(ORT_ERROR_FAIL, "HeadStep: not enough memory for a step"); }

static ort_status *compute_batch(struct batch *b, ort_context *context) {
    const struct kernel *k = b->k;
    const int64_t shape[] = {(int64_t)b->n, (int64_t)(2 + k->stages)};
    void *counts, *token, *capped, *ids, *logits;
    TRY(output(k, context, 0, shape, 1, &token));
    TRY(output(k, context, 3, shape, 2, &counts));
    TRY(output(k, context, 4, shape, 1, &capped));
    b->counts = counts, b->token = token, b->capped = capped;
    const size_t pieces = b->n < MOST_PIECES ? b->n : MOST_PIECES;
    if (b->n) {
        b->piece = (b->n + pieces - 1) / pieces;
        TRY(ORT(k->api, parallel_for)(context, batch_piece, pieces, 0, b));
    }
    if (b->failed) return ORT(k->api, create_status)(ORT_ERROR_FAIL, "HeadStep: not enough memory, or a damaged head");
    size_t width = 1;
    for (size_t i = 0; i < b->n; i++) width = b->found[i].n > width ? b->found[i].n : width;
    const int64_t wide[] = {(int64_t)b->n, (int64_t)width};
    TRY(output(k, context, 1, wide, 2, &ids));
    TRY(output(k, context, 2, wide, 2, &logits));
    for (size_t i = 0; i < b->n; i++)
        write_row(b->found[i].ids, b->found[i].logits, b->found[i].n, width, (int64_t *)ids + i * width, (float *)logits + i * width);
    return NULL;
}

struct one { /* a step that threads share */
    struct run *r;
    const float *hidden;
    int64_t *counts, *token;
    unsigned char *capped;
    size_t came; /* threads: the first makes the step, whichever it is, so that nobody waits for one that does not come */
    ort_status *status;
};

static void one_thread(void *one, size_t number) {
    struct one *o = one;
    (void)number;
    if (TAKE(&o->came)) {
        help(o->r);
        return;
    }
    o->status = step(o->r, o->hidden, o->counts, o->capped, o->token);
    SET(&o->r->ended, 1);
}

static ort_status *compute_one(struct run *r, const float *hidden, ort_context *context) {
    const struct kernel *k = r->k;
    const int64_t shape[] = {1, (int64_t)(2 + k->stages)};
    void *counts, *token, *capped, *ids, *logits;
    TRY(output(k, context, 0, shape, 1, &token));
    TRY(output(k, context, 3, shape, 2, &counts));
    TRY(output(k, context, 4, shape, 1, &capped));
    struct one one = {r, hidden, counts, token, capped, 0, NULL};
    begin(r);
    if (r->shared) TRY(ORT(k->api, parallel_for)(context, one_thread, THREADS, 0, &one));
    else one_thread(&one, 0);
    if (one.status) return one.status;
    const size_t width = r->n_items ? r->n_items : 1;
    const int64_t wide[] = {1, (int64_t)width};
    TRY(output(k, context, 1, wide, 2, &ids));
    TRY(output(k, context, 2, wide, 2, &logits));
    write_row(r->ids, r->logits, r->n_items, width, ids, logits);
    return NULL;
}

static ort_status *ORT_CALL compute(void *op_kernel, ort_context *context) {
    const struct kernel *k = op_kernel;
    const ort_value *value;
    ort_shape *shape;
    void *hidden;
    size_t rank = 0;
    int64_t dimensions[2] = {0, 0};
    TRY(ORT(k->api, input)(context, 0, &value));
    TRY(ORT(k->api, shape)(value, &shape));
    ort_status *status = ORT(k->api, rank)(shape, &rank);
    if (!status && rank == 2) status = ORT(k->api, dimensions)(shape, dimensions, 2);
    ORT(k->api, release_shape)(shape);
    if (status) return status;
    if (rank != 2 || dimensions[1] != (int64_t)k->hidden)
        return ORT(k->api, create_status)(ORT_ERROR_ARGUMENT, "HeadStep: hidden_states do not have the shape [N, hidden size] that the head was made for");
    TRY(ORT(k->api, data)((ort_value *)value, &hidden));
    if (dimensions[0] == 1) { /* one state: threads share its rows */
        struct run r;
        const int shared = THREADS > 1 && k->turn.n * k->turn.row + k->clusters * k->centroids.row >= SHARED_BYTES;
        if (!open_run(&r, k, shared)) return no_memory(k);
        status = compute_one(&r, hidden, context);
        free(r.memory);
        return status;
    }
    struct batch b = {.k = k, .hidden = hidden, .n = (size_t)dimensions[0]};
    b.found = calloc(b.n ? b.n : 1, sizeof *b.found);
    if (!b.found) return no_memory(k);
    status = compute_batch(&b, context);
    for (size_t i = 0; i < b.n; i++) free(b.found[i].ids);
    free(b.found);
    return status;
}

/* ---- the kernel from its node ---- */

struct tensor {
    const void *data;
    int64_t dimensions[2];
    size_t rank, n;
    int type;
};

static ort_status *refused(ort_api api, const char *why) { return ORT(api, create_status)(ORT_ERROR_ARGUMENT, why); }

static ort_status *tensor_of(ort_api api, const ort_info *info, size_t index, struct tensor *out) {
    const ort_value *value = NULL;
    ort_shape *shape;
    int constant = 0;
    void *data = NULL;
    memset(out, 0, sizeof *out);
    TRY(ORT(api, constant_input)(info, index, &constant, &value));
    if (!constant) return refused(api, "HeadStep: an array of the head is not an initializer, expected all inputs but the first to be");
    TRY(ORT(api, shape)(value, &shape));
    ort_status *status = ORT(api, rank)(shape, &out->rank);
    if (!status) status = ORT(api, element_type)(shape, &out->type);
    if (!status && out->rank <= 2) status = ORT(api, dimensions)(shape, out->dimensions, out->rank);
    ORT(api, release_shape)(shape);
    if (status) return status;
    if (out->rank < 1 || out->rank > 2) return refused(api, "HeadStep: an array of the head has neither one nor two dimensions");
    out->n = (size_t)out->dimensions[0] * (out->rank == 2 ? (size_t)out->dimensions[1] : 1);
    if (out->n) TRY(ORT(api, data)((ort_value *)value, &data));
    out->data = data;
    return NULL;
}

/* The next input as an array of n elements of a type; where it may be absent, an empty one gives NULL. */
static ort_status *array_of(ort_api api, const ort_info *info, size_t *index, int type, size_t n, int may_be_absent, const void **out) {
    struct tensor t;
    TRY(tensor_of(api, info, (*index)++, &t));
    *out = t.data;
    if (t.n == 0 && (may_be_absent || n == 0)) { *out = NULL; return NULL; }
    if (t.type != type || t.n < n) return refused(api, "HeadStep: an array of the head has another type or fewer elements than its sizes say");
    return NULL;
}

/* The next input as a matrix of n rows (0: as many as there are) of `columns`; of a code: bytes, a `struct tail` behind each row. */
static ort_status *matrix_of(ort_api api, const ort_info *info, size_t *index, size_t n, size_t columns, int64_t type, int code, float half, struct matrix *m) {
    struct tensor t;
    TRY(tensor_of(api, info, (*index)++, &t));
    memset(m, 0, sizeof *m);
    const size_t size = type == ORT_INT8 ? 1 : type == ORT_FLOAT ? 4 : 2;
    m->data = t.data, m->type = (int)type, m->half = half, m->columns = columns, m->n = (size_t)t.dimensions[0];
    m->padded = type == ORT_INT8 ? padded(columns, PAD) : columns;
    m->tail = padded(m->padded * size, PAD);
    m->row = code ? m->tail + sizeof(struct tail) : m->padded * size;
    const int known = type == ORT_INT8 || type == ORT_FLOAT || type == ORT_FLOAT16 || type == ORT_BFLOAT16;
    const int fits = t.rank == 2 && t.type == (code ? ORT_INT8 : type) && (size_t)t.dimensions[1] == (code ? m->row : m->padded);
    if (!fits || !known || columns < 1 || (n && m->n != n))
        return refused(api, "HeadStep: a matrix of the head has another type or shape than its sizes say");
    return NULL;
}

static ort_status *fill(struct kernel *k, const ort_info *info) {
    ort_api api = k->api;
    int64_t vocab, size, columns[2 + MOST_STAGES], types[2 + MOST_STAGES], caps[1 + MOST_STAGES];
    float margins[1 + MOST_STAGES], halves[2 + MOST_STAGES];
    size_t inputs, at = 1, n = 1 + MOST_STAGES, margin_count = n, column_count = n + 1, type_count = n + 1, half_count = n + 1;
    TRY(ORT(api, int_attribute)(info, "vocab_size", &vocab));
    TRY(ORT(api, int_attribute)(info, "cluster_size", &size));
    TRY(ORT(api, float_attribute)(info, "state_power", &k->state_power));
    TRY(ORT(api, int_attributes)(info, "columns", columns, &column_count)); /* of the rotation, the centroids and each code */
    TRY(ORT(api, int_attributes)(info, "types", types, &type_count));
    TRY(ORT(api, float_attributes)(info, "halves", halves, &half_count));
    TRY(ORT(api, int_attributes)(info, "caps", caps, &n));
    TRY(ORT(api, float_attributes)(info, "margins", margins, &margin_count));
    TRY(ORT(api, input_count)(info, &inputs));
    if (n < 1 || margin_count != n || column_count != n + 1 || type_count != n + 1 || half_count != n + 1 || vocab < 1 || size < 1)
        return refused(api, "HeadStep: attributes of the head do not fit each other");
    k->vocab = (size_t)vocab, k->cluster_size = (size_t)size, k->stages = n - 1;
    if (inputs != 13 + 2 * k->stages) return refused(api, "HeadStep: the node has another number of inputs than its stages need");
    struct tensor t;
    TRY(tensor_of(api, info, at, &t));
    TRY(matrix_of(api, info, &at, 0, (size_t)t.dimensions[1], t.type, 0, 0, &k->rows));
    if (k->rows.type == ORT_INT8 || k->rows.n < k->vocab) return refused(api, "HeadStep: the exact rows are not floats, or fewer than the vocabulary");
    k->hidden = k->rows.columns;
    TRY(array_of(api, info, &at, ORT_FLOAT, k->vocab, 1, (const void **)&k->bias));
    TRY(tensor_of(api, info, at, &t));
    const size_t slots = t.n;
    k->clusters = slots / k->cluster_size;
    if (!k->clusters || slots % k->cluster_size || slots > INT32_MAX) return refused(api, "HeadStep: the token table is not of whole clusters");
    TRY(array_of(api, info, &at, ORT_INT32, slots, 0, (const void **)&k->token));
    TRY(tensor_of(api, info, at, &t));
    k->always = t.n;
    TRY(array_of(api, info, &at, ORT_INT32, k->always, 1, (const void **)&k->always_slots));
    TRY(array_of(api, info, &at, ORT_FLOAT, k->hidden, 1, (const void **)&k->mean));
    k->coordinates = k->hidden;
    if (k->mean) {
        TRY(matrix_of(api, info, &at, 0, k->hidden, types[0], 0, halves[0], &k->turn));
        TRY(array_of(api, info, &at, ORT_FLOAT, k->hidden, 1, (const void **)&k->turn_scale));
        TRY(array_of(api, info, &at, ORT_FLOAT, k->turn.n, 1, (const void **)&k->turn.scale)); /* a step a coordinate: its row's scale */
        k->coordinates = k->turn.n + 1;
    } else at += 3;
    for (size_t i = 0; i <= k->stages; i++) {
        struct matrix *m = i ? &k->stage_rows[i - 1] : &k->centroids;
        struct gate *gate = i ? &k->gates[i - 1] : &k->probe;
        const size_t items = i ? slots : k->clusters;
        if (columns[1 + i] < 1 || (size_t)columns[1 + i] > k->coordinates || caps[i] < 1 || (size_t)caps[i] > items)
            return refused(api, "HeadStep: columns or caps of a stage are out of range");
        TRY(matrix_of(api, info, &at, items, (size_t)columns[1 + i], types[1 + i], i > 0, halves[1 + i], m));
        TRY(array_of(api, info, &at, ORT_FLOAT, m->columns, m->type != ORT_INT8, (const void **)&m->steps));
        if (!i) {
            TRY(array_of(api, info, &at, ORT_FLOAT, items, 1, (const void **)&m->scale));
            TRY(array_of(api, info, &at, ORT_FLOAT, items, 0, (const void **)&gate->nearness));
        }
        gate->margin = margins[i];
        gate->cap = (size_t)caps[i];
    }
    k->filled = calloc(k->clusters, sizeof *k->filled);
    if (!k->filled) return ORT(api, create_status)(ORT_ERROR_FAIL, "HeadStep: not enough memory for the operator");
    for (size_t i = 0; i < slots; i++) k->filled[i / k->cluster_size] += k->token[i] >= 0;
    for (size_t a = 0; a < k->always; a++)
        if (k->always_slots[a] < (a ? k->always_slots[a - 1] + 1 : 0) || (size_t)k->always_slots[a] >= slots || k->token[k->always_slots[a]] < 0)
            return refused(api, "HeadStep: always-scored slots are not ascending slots with a token");
    return NULL;
}

static void ORT_CALL destroy(void *kernel) {
    free(((struct kernel *)kernel)->filled);
    free(kernel);
}

static ort_status *ORT_CALL create(const struct ort_op *op, ort_api api, const ort_info *info, void **out) {
    (void)op;
    struct kernel *k = calloc(1, sizeof *k);
    if (!k) return ORT(api, create_status)(ORT_ERROR_FAIL, "HeadStep: not enough memory for the operator");
    k->api = api;
    ort_status *status = fill(k, info);
    if (status) destroy(k);
    else *out = k;
    return status;
}

/* ---- the operator ---- */

static const char *ORT_CALL op_name(const struct ort_op *op) { (void)op; return "HeadStep"; }
static const char *ORT_CALL op_provider(const struct ort_op *op) { (void)op; return NULL; }
static size_t ORT_CALL op_inputs(const struct ort_op *op) { (void)op; return 2; }
static size_t ORT_CALL op_outputs(const struct ort_op *op) { (void)op; return 5; }
static int ORT_CALL op_input_type(const struct ort_op *op, size_t i) { (void)op; return i ? ORT_ANY : ORT_FLOAT; }
static int ORT_CALL op_input_kind(const struct ort_op *op, size_t i) { (void)op; return i ? ORT_VARIADIC : ORT_REQUIRED; }
static int ORT_CALL op_output_kind(const struct ort_op *op, size_t i) { (void)op; (void)i; return ORT_REQUIRED; }
static int ORT_CALL op_memory(const struct ort_op *op, size_t i) { (void)op; (void)i; return 0; }
static int ORT_CALL op_one(const struct ort_op *op) { (void)op; return 1; }
static int ORT_CALL op_zero(const struct ort_op *op) { (void)op; return 0; }
static int ORT_CALL op_latest(const struct ort_op *op) { (void)op; return INT32_MAX; }

static int ORT_CALL op_output_type(const struct ort_op *op, size_t i) {
    static const int types[] = {ORT_INT64, ORT_INT64, ORT_FLOAT, ORT_INT64, ORT_BOOL};
    (void)op;
    return types[i];
}

static const struct ort_op head_step = {
    .version = ORT_VERSION, .name = op_name, .provider = op_provider, .input_type = op_input_type, .inputs = op_inputs,
    .output_type = op_output_type, .outputs = op_outputs, .destroy = destroy, .input_kind = op_input_kind, .output_kind = op_output_kind,
    .input_memory = op_memory, .variadic_input_least = op_one, .variadic_input_of_one_type = op_zero, .variadic_output_least = op_one,
    .variadic_output_of_one_type = op_zero, .create = create, .compute = compute, .first_version = op_one, .last_version = op_latest,
};

/* Called by ONNX Runtime when the library is registered with a session's options. */
ORT_EXPORT ort_status *ORT_CALL RegisterCustomOps(ort_options *options, const struct ort_base *base) {
    ort_api api = base->api(ORT_VERSION);
    ort_domain *domain;
    if (!api) { /* the first place of every table is the same function */
        api = base->api(1);
        return ORT(api, create_status)(ORT_ERROR_FAIL, "HeadStep: this ONNX Runtime is older than 1.17");
    }
#if HAS_AVX2
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) { /* what has both has F16C */
        whole_sums = whole_sums_avx2;
        real_sums = real_sums_avx2;
    }
#endif
    TRY(ORT(api, create_domain)("flashhead.native", &domain)); /* lives as long as the process, as sessions may */
    TRY(ORT(api, add_op)(domain, &head_step));
    return ORT(api, add_domain)(options, domain);
}
