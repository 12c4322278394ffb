/* Instructions, one after the other: see decoder.h.
 *
 * What a step of one token reads is the codes and scales of all matrices (linear.c) and the cache of what each layer sees.
 * Everything else is rows of floats that stay in the first caches: one thread does it while others wait for the next product.
 */
#include "decoder.h"

#if defined(__GNUC__)

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "vector.h"

enum { ROWS_TOGETHER = 16, PART = 256 }; /* a strip of linear.c; positions of a cache that are read at once: 128 KB of keys and values for heads of 64 */

static const struct coded *largest_matrix(const struct decoder *d) { /* by activations */
    const struct coded *most = NULL;
    for (size_t i = 0; i < d->n_instructions; i++)
        if (d->instructions[i].operation == LINEAR && (!most || d->instructions[i].matrix.k > most->k)) most = &d->instructions[i].matrix;
    return most;
}

static size_t first_seen(const struct instruction *i, size_t position) { return i->window && position + 1 > i->window ? position + 1 - i->window : 0; }

int pass_open(struct pass *p, const struct decoder *d, size_t tokens, size_t past, int shared) {
    const struct coded *widest = largest_matrix(d);
    const size_t quads = widest ? quads_of(widest->k) : 0, positions = padded(past + tokens, POSITIONS) + POSITIONS;
    size_t at[MOST_SLOTS + 10], total = LINE, n = 0, heads = 0, keys = 0, size = 0;
    for (size_t i = 0; i < d->n_instructions; i++) {
        const struct instruction *one = &d->instructions[i];
        if (one->operation != ATTEND) continue;
        heads = one->heads > heads ? one->heads : heads;
        size = one->n > size ? one->n : size;
        keys = one->kv_heads * one->n > keys ? one->kv_heads * one->n : keys;
    }
    memset(p, 0, sizeof *p);
    p->score_room = QUERIES * positions;
    p->parts = tokens == 1 ? (positions + PART - 1) / PART : 0;
#define ROOM(bytes) (at[n++] = total, total += padded(bytes, LINE))
    for (size_t s = 0; s < d->n_slots; s++) ROOM(d->widths[s] * tokens * sizeof(float));
    ROOM(tokens * quads * QUAD);
    ROOM(tokens * quads * 4 * sizeof(float));
    ROOM(tokens * quads * 4 * sizeof(float));
    ROOM(tokens * quads * 16 * sizeof(int32_t));
    ROOM((tokens == 1 ? heads * p->parts * PART : MOST_PIECES * p->score_room) * sizeof(float));
    ROOM(heads * p->parts * sizeof(struct partial));
    ROOM(heads * p->parts * size * sizeof(float));
    ROOM(tokens == 1 ? 0 : keys * positions * sizeof(float));
    ROOM(d->n_layers * sizeof(struct cache));
    ROOM(d->phases * sizeof(struct phase));
#undef ROOM
    p->memory = malloc(total);
    if (!p->memory) return 0;
    char *base = (char *)((uintptr_t)p->memory / LINE * LINE);
    for (size_t s = 0; s < d->n_slots; s++) p->slots[s] = (float *)(base + at[s]);
    n = d->n_slots;
    p->rounded.whole = (int8_t *)(base + at[n]);
    p->rounded.scale = (float *)(base + at[n + 1]);
    p->rounded.offset = (float *)(base + at[n + 2]);
    p->rounded.eight = (int32_t *)(base + at[n + 3]);
    p->scores = (float *)(base + at[n + 4]);
    p->partials = (struct partial *)(base + at[n + 5]);
    p->sums = (float *)(base + at[n + 6]);
    p->turned_keys = (float *)(base + at[n + 7]);
    p->caches = (struct cache *)(base + at[n + 8]);
    p->team.phases = (struct phase *)(base + at[n + 9]);
    p->team.room = d->phases;
    p->team.data = p;
    p->team.shared = shared;
    p->d = d;
    p->tokens = tokens;
    p->past = past;
    return 1;
}

void pass_close(struct pass *p) { free(p->memory); }

/* ---- rows of floats: pieces are tokens ---- */

static void embed(const struct instruction *i, int64_t id, float *out) {
    const char *row = (const char *)i->rows + (size_t)id * i->n * (i->type == ORT_FLOAT ? 4 : 2);
    widen(row, i->type, 0, i->n, out);
    if (i->number != 1)
        for (size_t j = 0; j < i->n; j++) out[j] *= i->number;
}

static void rows_piece(void *pass, size_t piece) {
    struct pass *p = pass;
    const struct instruction *i = p->now;
    size_t first, end;
    if (!team_piece(&p->team, piece, p->tokens, &first, &end)) return;
    for (size_t t = first; t < end; t++) {
        float *out = place_of(p, i->out, t);
        const float *a = i->a.slot < 0 ? NULL : place_of(p, i->a, t), *b = i->b.slot < 0 ? NULL : place_of(p, i->b, t), *row = i->rows;
        switch (i->operation) {
        case EMBED: embed(i, p->ids[t], out); break;
        case RMS_NORM:
            for (size_t r = 0; r < i->repeat; r++) layers.rms_norm(a + r * i->n, row, i->n, i->number, out + r * i->n);
            break;
        case LAYER_NORM:
            for (size_t r = 0; r < i->repeat; r++) layers.layer_norm(a + r * i->n, row, i->bias, i->n, i->number, out + r * i->n);
            break;
        case ADD: for (size_t j = 0; j < i->n; j++) out[j] = a[j] + b[j]; break;
        case MULTIPLY: for (size_t j = 0; j < i->n; j++) out[j] = a[j] * b[j]; break;
        case ADD_ROW: for (size_t j = 0; j < i->n; j++) out[j] = a[j] + row[j]; break;
        case MULTIPLY_ROW: for (size_t j = 0; j < i->n; j++) out[j] = a[j] * row[j]; break;
        case SCALE: for (size_t j = 0; j < i->n; j++) out[j] = a[j] * i->number; break;
        case ACTIVATE: layers.activate(i->activation, a, b, i->n, out); break;
        default: break;
        }
    }
}

/* ---- products ---- */

static void round_piece(void *pass, size_t piece) {
    struct pass *p = pass;
    const struct coded *m = &p->now->matrix;
    size_t first, end;
    if (!team_piece(&p->team, piece, p->tokens, &first, &end)) return;
    for (size_t t = first; t < end; t++) linear.round(place_of(p, p->now->a, t), m->k, &p->rounded, t);
}

static void linear_piece(void *pass, size_t piece) {
    struct pass *p = pass;
    const struct instruction *i = p->now;
    size_t first, end;
    if (team_piece(&p->team, piece, i->matrix.n, &first, &end))
        linear.rows(&i->matrix, first, end - first, &p->rounded, p->tokens, place_of(p, i->out, 0), p->d->widths[i->out.slot]);
}

/* ---- attention ---- */

static void turn(const struct instruction *i, float *head, size_t position) { /* rotary positions: halves of what is turned are pairs */
    const size_t half = i->turned / 2;
    const float *c = i->cosine + position * half, *s = i->sine + position * half;
    for (size_t j = 0; j < half; j++) {
        const float one = head[j], two = head[j + half];
        head[j] = one * c[j] - two * s[j];
        head[j + half] = one * s[j] + two * c[j];
    }
}

static void store_piece(void *pass, size_t piece) { /* pieces are tokens: their keys and values to the cache, their queries turned in place */
    struct pass *p = pass;
    const struct instruction *i = p->now;
    const struct cache *cache = &p->caches[i->layer];
    size_t first, end;
    if (!team_piece(&p->team, piece, p->tokens, &first, &end)) return;
    for (size_t t = first; t < end; t++) {
        const size_t position = p->past + t;
        float *queries = place_of(p, i->a, t), *keys = place_of(p, i->b, t);
        const float *values = place_of(p, i->c, t);
        for (size_t h = 0; i->turned && h < i->heads; h++) turn(i, queries + h * i->n, position);
        for (size_t h = 0; h < i->kv_heads; h++) {
            const size_t at = (h * cache->capacity + position) * i->n;
            if (i->turned) turn(i, keys + h * i->n, position);
            memcpy(cache->keys + at, keys + h * i->n, i->n * sizeof(float));
            memcpy(cache->values + at, values + h * i->n, i->n * sizeof(float));
        }
    }
}

/* One token: pieces are parts of a cache's head, of PART positions, for all heads that read it while it is in the processor's own cache. */
static void part_piece(void *pass, size_t piece) {
    struct pass *p = pass;
    const struct instruction *i = p->now;
    const struct cache *cache = &p->caches[i->layer];
    const size_t from = first_seen(i, p->past), n = p->past + 1 - from, parts = (n + PART - 1) / PART, group = i->heads / i->kv_heads;
    size_t first, end;
    if (!team_piece(&p->team, piece, i->kv_heads * parts, &first, &end)) return;
    for (size_t item = first; item < end; item++) {
        const size_t kv = item / parts, part = item % parts, some = n - part * PART < PART ? n - part * PART : PART;
        const size_t at = (kv * cache->capacity + from + part * PART) * i->n;
        const struct attention a = {cache->keys + at, cache->values + at, i->n, 0, i->number, i->softcap};
        for (size_t h = kv * group; h < (kv + 1) * group; h++) {
            struct partial *found = &p->partials[h * p->parts + part];
            float *out = parts == 1 ? place_of(p, i->out, 0) + h * i->n : p->sums + (h * p->parts + part) * i->n;
            found->sum = layers.attend(&a, place_of(p, i->a, 0) + h * i->n, some, p->scores + (h * p->parts + part) * PART, out, &found->best);
            if (parts > 1) continue;
            for (size_t j = 0; j < i->n; j++) out[j] *= 1 / found->sum;
        }
    }
}

static void join_parts(struct pass *p, size_t parts) { /* of each head, weighed by their best scores */
    const struct instruction *i = p->now;
    for (size_t h = 0; h < i->heads; h++) {
        const struct partial *found = p->partials + h * p->parts;
        float *out = place_of(p, i->out, 0) + h * i->n, best = found->best, sum = 0;
        for (size_t part = 1; part < parts; part++) best = found[part].best > best ? found[part].best : best;
        memset(out, 0, i->n * sizeof *out);
        for (size_t part = 0; part < parts; part++) {
            const float by = expf(found[part].best - best), *from = p->sums + (h * p->parts + part) * i->n;
            sum += by * found[part].sum;
            for (size_t j = 0; j < i->n; j++) out[j] += by * from[j];
        }
        for (size_t j = 0; j < i->n; j++) out[j] *= 1 / sum;
    }
}

static size_t stride_of(const struct pass *p) { return p->score_room / QUERIES; }

static void keys_piece(void *pass, size_t piece) { /* several tokens: pieces are heads of the cache, whose keys are transposed, from the first that is seen */
    struct pass *p = pass;
    const struct instruction *i = p->now;
    const struct cache *cache = &p->caches[i->layer];
    const size_t from = first_seen(i, p->past), n = p->past + p->tokens - from, stride = stride_of(p);
    size_t first, end;
    if (!team_piece(&p->team, piece, i->kv_heads, &first, &end)) return;
    for (size_t h = first; h < end; h++) {
        const float *keys = cache->keys + (h * cache->capacity + from) * i->n;
        float *to = p->turned_keys + h * i->n * stride;
        for (size_t t = 0; t < n; t += POSITIONS)
            for (size_t j = 0; j < i->n; j++)
                for (size_t l = t; l < t + POSITIONS; l++) to[j * stride + l] = l < n ? keys[l * i->n + j] : 0;
    }
}

static void tile_piece(void *pass, size_t piece) { /* several tokens: pieces are tiles of queries of one head */
    struct pass *p = pass;
    const struct instruction *i = p->now;
    const struct cache *cache = &p->caches[i->layer];
    const size_t from = first_seen(i, p->past), tiles = (p->tokens + QUERIES - 1) / QUERIES;
    size_t first, end;
    if (!team_piece(&p->team, piece, i->heads * tiles, &first, &end)) return;
    for (size_t tile = first; tile < end; tile++) {
        const size_t h = tile / tiles, kv = h / (i->heads / i->kv_heads), t = tile % tiles * QUERIES;
        const size_t n = p->tokens - t < QUERIES ? p->tokens - t : QUERIES;
        const struct attention a = {
            p->turned_keys + kv * i->n * stride_of(p), cache->values + (kv * cache->capacity + from) * i->n, i->n, stride_of(p), i->number, i->softcap,
        };
        struct queries q = {
            .query = place_of(p, i->a, t) + h * i->n, .scores = p->scores + piece * p->score_room, .out = place_of(p, i->out, t) + h * i->n,
            .n = n, .apart = p->d->widths[i->a.slot], .out_apart = p->d->widths[i->out.slot],
        };
        for (size_t one = 0; one < n; one++) {
            q.low[one] = first_seen(i, p->past + t + one) - from;
            q.high[one] = p->past + t + one + 1 - from;
        }
        layers.attend_tile(&a, &q);
    }
}

static void attend(struct pass *p) {
    const struct instruction *i = p->now;
    const size_t seen = p->past + p->tokens - first_seen(i, p->past), row = i->n * sizeof(float);
    team_spread(&p->team, store_piece, p->tokens, p->tokens == 1 ? 1 : (i->heads + i->kv_heads) * row, 1);
    if (p->tokens == 1) {
        const size_t parts = (seen + PART - 1) / PART;
        team_spread(&p->team, part_piece, i->kv_heads * parts, 2 * (seen < PART ? seen : PART) * row, 1);
        if (parts > 1) join_parts(p, parts);
        return;
    }
    team_spread(&p->team, keys_piece, i->kv_heads, seen * row, 1);
    team_spread(&p->team, tile_piece, i->heads * ((p->tokens + QUERIES - 1) / QUERIES), 2 * seen * row, 1);
}

void pass_run(void *pass) {
    struct pass *p = pass;
    for (size_t at = 0; at < p->d->n_instructions; at++) {
        const struct instruction *i = p->now = &p->d->instructions[at];
        const size_t alone = p->tokens == 1; /* a row of floats is no work to share */
        if (i->operation == ATTEND) attend(p);
        else if (i->operation == LINEAR) {
            const size_t row = i->matrix.groups * (i->matrix.group / 2 + sizeof(float));
            team_spread(&p->team, round_piece, p->tokens, alone ? 1 : i->matrix.k * sizeof(float), 1);
            team_spread(&p->team, linear_piece, i->matrix.n, row * p->tokens, ROWS_TOGETHER);
        } else team_spread(&p->team, rows_piece, p->tokens, alone ? 1 : i->n * i->repeat * sizeof(float), 1);
    }
}

#else
typedef int no_decoder; /* a file is not empty */
#endif
