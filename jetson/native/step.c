/* The stages of a state's way, and their lists: see step.h. */
#include "step.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { AHEAD = 8, TOGETHER = 4 };        /* rows that lie apart are asked of memory so many before they are multiplied; rows that are multiplied together */
enum { SPAN_ROWS = 16, SPAN_BYTES = 2048 }; /* rows of spans that are multiplied at a time; bytes of them that are asked of memory before */

static size_t most_items(const struct kernel *k) { return k->probe.cap * k->cluster_size + k->always; }

int run_open(struct run *r, const struct kernel *k, int shared) {
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
    r->team.data = r;
    r->team.shared = shared;
    r->team.phases = r->phases;
    r->team.room = MOST_PHASES;
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

void run_close(struct run *r) { free(r->memory); }

static void rotate_piece(void *run, size_t piece) {
    struct run *r = run;
    size_t first, end;
    if (team_piece(&r->team, piece, r->k->turn.n, &first, &end)) products_of(&r->k->turn, &r->state, first, end - first, r->z + 1 + first);
}

static void probe_piece(void *run, size_t piece) {
    struct run *r = run;
    size_t first, end;
    r->best[piece] = -INFINITY;
    if (!team_piece(&r->team, piece, r->k->clusters, &first, &end)) return;
    products_of(&r->k->centroids, &r->state, first, end - first, r->clusters + first);
    r->best[piece] = largest(r->clusters + first, end - first);
}

struct asked { /* how far memory was asked for rows of spans: steadily, since a whole span at once is more than a processor waits for */
    const struct span *span, *end;
    size_t at; /* bytes of the span */
};

static void ask(const struct matrix *m, struct asked *a, size_t bytes) {
    while (bytes && a->span < a->end) {
        const size_t size = (a->span[1].at - a->span->at) * m->row, some = size - a->at < bytes ? size - a->at : bytes;
        prefetch(m->data + (size_t)a->span->slot * m->row + a->at, some);
        a->at += some, bytes -= some;
        if (a->at == size) a->span++, a->at = 0;
    }
}

/* The first code: a span's rows are multiplied together. Kept are items that may pass the gate: their gap to the best so far,
 * which is not above the best of all, passes. They stand from where the piece's first slot would. */
static void span_piece(void *run, size_t piece) {
    struct run *r = run;
    const struct matrix *m = r->matrix;
    size_t first, end, kept = 0;
    float sums[BLOCK], best = r->floor;
    r->kept[piece] = 0;
    r->best[piece] = best;
    if (!team_piece(&r->team, piece, r->n_spans, &first, &end)) return;
    struct item *out = r->items + r->spans[first].at;
    struct asked asked = {&r->spans[first], &r->spans[end], 0};
    ask(m, &asked, SPAN_BYTES);
    for (size_t o = first; o < end; o++) {
        const struct span *span = &r->spans[o];
        const float cluster = r->clusters[(size_t)span->slot / r->k->cluster_size];
        const size_t n = span[1].at - span->at;
        for (size_t i = 0; i < n; i += SPAN_ROWS) {
            const size_t some = n - i < SPAN_ROWS ? n - i : SPAN_ROWS, slot = (size_t)span->slot + i;
            ask(m, &asked, some * m->row);
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

static void item_piece(void *run, size_t piece) { /* a later code: rows that lie apart */
    struct run *r = run;
    const struct matrix *m = r->matrix;
    size_t first, end;
    if (!team_piece(&r->team, piece, r->n_items, &first, &end)) return;
    for (size_t i = first; i < end; i++) {
        if (i + AHEAD < end) prefetch(m->data + (size_t)r->items[i + AHEAD].slot * m->row, m->row);
        float sum;
        const size_t slot = (size_t)r->items[i].slot;
        sums_of(m, &r->state, slot, 1, &sum);
        r->items[i].score += sum * tail_of(m, slot)->scale;
        r->items[i].nearness = tail_of(m, slot)->nearness;
    }
}

static void exact_piece(void *run, size_t piece) {
    struct run *r = run;
    const struct kernel *k = r->k;
    const struct matrix *m = &k->rows;
    size_t first, end;
    if (!team_piece(&r->team, piece, r->n_items, &first, &end)) return;
    for (size_t i = first; i < end; i++) {
        if (i + AHEAD < end) prefetch(m->data + (size_t)r->ids[i + AHEAD] * m->row, m->row);
        vector.real_sums(m->data + (size_t)r->ids[i] * m->row, m->type, m->row, 1, k->hidden, r->hidden, r->logits + i);
        if (k->bias) r->logits[i] += k->bias[r->ids[i]];
    }
}

/* Clusters that open, ascending: r->opened, r->n_opened. */
static int open_clusters(struct run *r, float bound) {
    const struct kernel *k = r->k;
    const float best = largest(r->best, r->team.pieces);
    size_t n = 0;
    for (size_t i = 0; i < k->clusters; i++) {
        const float gap = (best - r->clusters[i]) * k->probe.nearness[i];
        r->opened[n] = (int32_t)i;
        r->gap[n] = gap;
        n += gap <= bound;
    }
    const int capped = n > k->probe.cap;
    if (capped) {
        struct edge edge = gate_edge(r->gap, r->gap_copy, n, k->probe.cap);
        size_t left = 0;
        for (size_t i = 0; i < n; i++) {
            const int stays = gate_stays(&edge, r->gap[i]);
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
    team_spread(&r->team, span_piece, r->n_spans, k->cluster_size * r->matrix->row, TOGETHER);
    for (size_t p = 0; p < r->team.pieces; p++) {
        const size_t first = p * r->team.piece;
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
        struct edge edge = gate_edge(r->gap, r->gap_copy, n, gate->cap);
        size_t left = 0;
        for (size_t i = 0; i < n; i++) {
            const int stays = gate_stays(&edge, r->gap[i]);
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

int run_step(struct run *r, const float *hidden, int64_t *counts, unsigned char *capped, int64_t *token) {
    const struct kernel *k = r->k;
    float unit = 1;
    memset(counts, 0, (2 + k->stages) * sizeof *counts);
    *capped = 0;
    *token = -1;
    r->n_items = 0;
    double size = 0;
    for (size_t i = 0; i < k->hidden; i++) size += fabsf(hidden[i]);
    if (!(size <= 3e38)) return 1;
    memcpy(r->hidden, hidden, k->hidden * sizeof *hidden);
    if (k->mean) {
        for (size_t i = 0; i < k->hidden; i++) r->x[i] = (hidden[i] - k->mean[i]) * (k->turn_scale ? k->turn_scale[i] : 1);
        if (!(k->turn.type == ORT_INT8 ? rounded(&k->turn, r->x, r->whole, &r->state) : real_state(r, k->hidden))) return 1;
        team_spread(&r->team, rotate_piece, k->turn.n, k->turn.row, TOGETHER);
        r->z[0] = 1;
        double square = 0;
        for (size_t i = 0; i < k->turn.n; i++) square += (double)r->z[1 + i] * r->z[1 + i];
        if (k->state_power != 0) unit = (float)pow(square / (double)k->turn.n, k->state_power / 2);
    } else memcpy(r->z, hidden, k->hidden * sizeof *hidden);
    if (!prepare(r, &k->centroids)) return 1;
    team_spread(&r->team, probe_piece, k->clusters, k->centroids.row, TOGETHER);
    *capped |= (unsigned char)open_clusters(r, gate_bound(&k->probe, unit));
    counts[0] = (int64_t)r->n_opened;
    if (!r->n_opened) return 1; /* no score can be compared */
    list_spans(r);
    if (!r->n_spans) return 1; /* what opened holds no token */
    for (size_t i = 0; i < k->stages; i++) {
        counts[1 + i] = (int64_t)r->n_items;
        r->matrix = &k->stage_rows[i];
        if (!prepare(r, r->matrix)) {
            r->n_items = 0;
            return 1;
        }
        r->bound = gate_bound(&k->gates[i], unit);
        if (i) team_spread(&r->team, item_piece, r->n_items, r->matrix->row, TOGETHER);
        else score_spans(r);
        *capped |= (unsigned char)pass(r, &k->gates[i], r->bound);
    }
    if (!k->stages) list_items(r);
    counts[1 + k->stages] = (int64_t)r->n_items;
    if (!r->n_items) return 1;
    if (!tokens_in_order(r)) return 0;
    team_spread(&r->team, exact_piece, r->n_items, k->rows.row, TOGETHER);
    size_t best = 0;
    for (size_t i = 1; i < r->n_items; i++)
        if (r->logits[i] > r->logits[best]) best = i;
    *token = r->ids[best];
    return 1;
}
