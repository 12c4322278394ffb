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

static size_t parts_of(size_t positions) { return (positions + PART - 1) / PART; }

int pass_open(struct pass *p, const struct decoder *d, const struct text *texts, size_t n_texts, int shared) {
    const struct coded *widest = largest_matrix(d);
    const size_t quads = widest ? quads_of(widest->k) : 0;
    size_t at[MOST_SLOTS + 16], total = LINE, n = 0, heads = 0, keys = 0, size = 0, attentions = 0, longest = 0, tokens = 0;
    for (size_t i = 0; i < d->n_instructions; i++) {
        const struct instruction *one = &d->instructions[i];
        if (one->operation != ATTEND) continue;
        attentions++;
        heads = one->heads > heads ? one->heads : heads;
        size = one->n > size ? one->n : size;
        keys = one->kv_heads * one->n > keys ? one->kv_heads * one->n : keys;
    }
    memset(p, 0, sizeof *p);
    for (size_t t = 0; t < n_texts; t++) {
        const size_t end = texts[t].past + texts[t].tokens;
        tokens += texts[t].tokens;
        if (texts[t].tokens == 1) p->singles++, p->parts += parts_of(end);
        else if (end > longest) longest = end;
    }
    const size_t positions = longest ? padded(longest, POSITIONS) + POSITIONS : 0, several = n_texts - p->singles;
    p->score_room = QUERIES * positions;
#define ROOM(bytes) (at[n++] = total, total += padded(bytes, LINE))
    for (size_t s = 0; s < d->n_slots; s++) ROOM(d->widths[s] * tokens * sizeof(float));
    ROOM(tokens * quads * QUAD);
    ROOM(tokens * quads * 4 * sizeof(float));
    ROOM(tokens * quads * 4 * sizeof(float));
    ROOM(tokens * quads * 16 * sizeof(int32_t));
    ROOM(MOST_PIECES * p->score_room * sizeof(float));
    ROOM(heads * p->parts * PART * sizeof(float));
    ROOM(heads * p->parts * sizeof(struct partial));
    ROOM(heads * p->parts * size * sizeof(float));
    ROOM(keys * positions * sizeof(float));
    ROOM(d->n_layers * sizeof(struct cache));
    ROOM(n_texts * sizeof(struct text));
    ROOM(tokens * sizeof(size_t));
    ROOM(tokens * sizeof(size_t));
    ROOM((4 * d->n_instructions + 2 * several * attentions) * sizeof(struct phase));
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
    p->part_scores = (float *)(base + at[n + 5]);
    p->partials = (struct partial *)(base + at[n + 6]);
    p->sums = (float *)(base + at[n + 7]);
    p->turned_keys = (float *)(base + at[n + 8]);
    p->caches = (struct cache *)(base + at[n + 9]);
    p->texts = (struct text *)(base + at[n + 10]);
    p->positions = (size_t *)(base + at[n + 11]);
    p->rows = (size_t *)(base + at[n + 12]);
    p->team.phases = (struct phase *)(base + at[n + 13]);
    p->team.room = 4 * d->n_instructions + 2 * several * attentions;
    p->team.data = p;
    p->team.shared = shared;
    p->d = d;
    p->tokens = tokens;
    p->n_texts = n_texts;
    for (size_t t = 0, first = 0, part = 0; t < n_texts; t++) {
        struct text *text = &p->texts[t];
        *text = texts[t], text->first = first, text->parts = part;
        for (size_t i = 0; i < text->tokens; i++) p->positions[first + i] = text->past + i, p->rows[first + i] = text->start + text->past + i;
        first += text->tokens;
        if (text->tokens == 1) part += parts_of(text->past + 1);
    }
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
        float *queries = place_of(p, i->a, t), *keys = place_of(p, i->b, t);
        const float *values = place_of(p, i->c, t);
        for (size_t h = 0; i->turned && h < i->heads; h++) turn(i, queries + h * i->n, p->positions[t]);
        for (size_t h = 0; h < i->kv_heads; h++) {
            const size_t at = (h * cache->capacity + p->rows[t]) * i->n;
            if (i->turned) turn(i, keys + h * i->n, p->positions[t]);
            memcpy(cache->keys + at, keys + h * i->n, i->n * sizeof(float));
            memcpy(cache->values + at, values + h * i->n, i->n * sizeof(float));
        }
    }
}

static size_t parts_seen(const struct instruction *i, const struct text *text) { return parts_of(text->past + 1 - first_seen(i, text->past)); }

/* Texts with one token: pieces are parts of a cache's head, of PART positions, for all heads that read it while it is in the processor's own cache. */
static void part_piece(void *pass, size_t piece) {
    struct pass *p = pass;
    const struct instruction *i = p->now;
    const struct cache *cache = &p->caches[i->layer];
    const size_t group = i->heads / i->kv_heads;
    size_t first, end, items = 0, before = 0;
    for (size_t t = 0; t < p->n_texts; t++) items += p->texts[t].tokens == 1 ? i->kv_heads * parts_seen(i, &p->texts[t]) : 0;
    if (!team_piece(&p->team, piece, items, &first, &end)) return;
    for (const struct text *text = p->texts; text < p->texts + p->n_texts && before < end; text++) {
        if (text->tokens != 1) continue;
        const size_t from = first_seen(i, text->past), n = text->past + 1 - from, parts = parts_of(n), its = before + i->kv_heads * parts;
        for (size_t item = first > before ? first : before; item < end && item < its; item++) {
            const size_t kv = (item - before) / parts, part = (item - before) % parts, some = n - part * PART < PART ? n - part * PART : PART;
            const size_t at = (kv * cache->capacity + text->start + from + part * PART) * i->n;
            const struct attention a = {cache->keys + at, cache->values + at, i->n, 0, i->number, i->softcap};
            for (size_t h = kv * group; h < (kv + 1) * group; h++) {
                const size_t place = h * p->parts + text->parts + part;
                struct partial *found = &p->partials[place];
                float *out = parts == 1 ? place_of(p, i->out, text->first) + h * i->n : p->sums + place * i->n;
                found->sum = layers.attend(&a, place_of(p, i->a, text->first) + h * i->n, some, p->part_scores + place * PART, out, &found->best);
                if (parts > 1) continue;
                for (size_t j = 0; j < i->n; j++) out[j] *= 1 / found->sum;
            }
        }
        before = its;
    }
}

static void join_parts(struct pass *p, const struct text *text) { /* of each head, weighed by their best scores */
    const struct instruction *i = p->now;
    const size_t parts = parts_seen(i, text);
    for (size_t h = 0; parts > 1 && h < i->heads; h++) {
        const size_t place = h * p->parts + text->parts;
        const struct partial *found = p->partials + place;
        float *out = place_of(p, i->out, text->first) + h * i->n, best = found->best, sum = 0;
        for (size_t part = 1; part < parts; part++) best = found[part].best > best ? found[part].best : best;
        memset(out, 0, i->n * sizeof *out);
        for (size_t part = 0; part < parts; part++) {
            const float by = expf(found[part].best - best), *from = p->sums + (place + part) * i->n;
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
    const size_t from = first_seen(i, p->text->past), n = p->text->past + p->text->tokens - from, stride = stride_of(p);
    size_t first, end;
    if (!team_piece(&p->team, piece, i->kv_heads, &first, &end)) return;
    for (size_t h = first; h < end; h++) {
        const float *keys = cache->keys + (h * cache->capacity + p->text->start + from) * i->n;
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
    const struct text *text = p->text;
    const size_t from = first_seen(i, text->past), tiles = (text->tokens + QUERIES - 1) / QUERIES;
    size_t first, end;
    if (!team_piece(&p->team, piece, i->heads * tiles, &first, &end)) return;
    for (size_t tile = first; tile < end; tile++) {
        const size_t h = tile / tiles, kv = h / (i->heads / i->kv_heads), t = tile % tiles * QUERIES;
        const size_t n = text->tokens - t < QUERIES ? text->tokens - t : QUERIES;
        const struct attention a = {
            p->turned_keys + kv * i->n * stride_of(p), cache->values + (kv * cache->capacity + text->start + from) * i->n, i->n, stride_of(p), i->number,
            i->softcap,
        };
        struct queries q = {
            .query = place_of(p, i->a, text->first + t) + h * i->n, .scores = p->scores + piece * p->score_room,
            .out = place_of(p, i->out, text->first + t) + h * i->n, .n = n, .apart = p->d->widths[i->a.slot], .out_apart = p->d->widths[i->out.slot],
        };
        for (size_t one = 0; one < n; one++) {
            q.low[one] = first_seen(i, text->past + t + one) - from;
            q.high[one] = text->past + t + one + 1 - from;
        }
        layers.attend_tile(&a, &q);
    }
}

static void attend(struct pass *p) {
    const struct instruction *i = p->now;
    const size_t row = i->n * sizeof(float);
    team_spread(&p->team, store_piece, p->tokens, p->tokens == 1 ? 1 : (i->heads + i->kv_heads) * row, 1);
    size_t items = 0, most = 0;
    for (const struct text *text = p->texts; text < p->texts + p->n_texts; text++) {
        if (text->tokens != 1) continue;
        const size_t seen = text->past + 1 - first_seen(i, text->past);
        items += i->kv_heads * parts_of(seen);
        most = seen > most ? seen : most;
    }
    if (items) {
        team_spread(&p->team, part_piece, items, 2 * (most < PART ? most : PART) * row, 1);
        for (size_t t = 0; t < p->n_texts; t++)
            if (p->texts[t].tokens == 1) join_parts(p, &p->texts[t]);
    }
    for (size_t t = 0; t < p->n_texts; t++) {
        const struct text *text = p->text = &p->texts[t];
        if (text->tokens < 2) continue;
        const size_t seen = text->past + text->tokens - first_seen(i, text->past);
        team_spread(&p->team, keys_piece, i->kv_heads, seen * row, 1);
        team_spread(&p->team, tile_piece, i->heads * ((text->tokens + QUERIES - 1) / QUERIES), 2 * seen * row, 1);
    }
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
