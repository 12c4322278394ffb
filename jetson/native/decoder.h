/* A decoder's body as a list of instructions over rows of floats: what `DecoderStep` runs for some tokens of one text or of several.
 *
 * Instructions are made from the graph of the standard body (export/decoder.py), so that a family is data here, not code.
 */
#ifndef FLASHHEAD_DECODER_H
#define FLASHHEAD_DECODER_H

#include "layers.h"
#include "linear.h"
#include "threads.h"

enum operation { EMBED, RMS_NORM, LAYER_NORM, LINEAR, ADD, MULTIPLY, ADD_ROW, MULTIPLY_ROW, SCALE, ACTIVATE, ATTEND, OPERATIONS };

struct place { /* columns of a slot: floats of each token */
    int slot; /* -1: none */
    size_t offset;
};

struct instruction {
    enum operation operation;
    size_t n, repeat;         /* floats of a piece; pieces of a token side by side (norms of heads) */
    struct place out, a, b, c; /* ATTEND: queries, keys, values; ACTIVATE: b is what its result is multiplied with */
    const void *rows;         /* EMBED: [vocab, n] of `type`; norms: weight [n]; ADD_ROW, MULTIPLY_ROW: [n] */
    const float *bias;        /* LAYER_NORM */
    float number, softcap;    /* norms: epsilon; SCALE, EMBED: the factor; ATTEND: scale and soft-cap */
    int type;
    size_t vocab;
    enum activation activation;
    struct coded matrix;      /* LINEAR */
    size_t layer, heads, kv_heads, window, turned, turns; /* ATTEND: window 0: none; floats of a head that are turned; rows of the tables */
    const float *cosine, *sine; /* [turns, turned / 2] */
};

struct decoder {
    size_t n_instructions, n_slots, n_layers, hidden;
    size_t widths[64];        /* of slots, floats a token */
    struct instruction *instructions;
    struct place result;
};

enum { MOST_SLOTS = 64 };

struct cache { /* of a layer: [kv_heads, capacity, size] */
    float *keys, *values;
    size_t capacity;
};

struct partial { /* of a head's attention, over some positions */
    float sum, best;
};

struct text { /* of a pass */
    size_t tokens, past, start; /* now fed; positions before them; where in the cache its first position is */
    size_t first;   /* of its tokens among the pass's */
    size_t parts;   /* of one token: the first of its places among the parts */
};

struct pass { /* some tokens' way through the decoder, and its memory */
    struct team team;
    const struct decoder *d;
    const struct instruction *now;
    const int64_t *ids;
    size_t tokens, n_texts, singles; /* now fed, of all texts; texts with one token */
    struct text *texts;              /* [n_texts] */
    const struct text *text;         /* of several tokens, whose attention is made */
    size_t *positions, *rows;        /* [tokens]: in their texts and in the cache */
    struct cache *caches; /* [n_layers] */
    float *slots[MOST_SLOTS];
    struct rounded rounded;
    float *scores, *part_scores, *turned_keys; /* part_scores [heads, parts, PART] */
    size_t score_room;    /* of several tokens: floats that a piece's scores have */
    size_t parts;         /* of texts with one token: parts of a head's positions, all texts side by side */
    struct partial *partials; /* [heads, parts] */
    float *sums;          /* [heads, parts, size] */
    void *memory;
};

/* Memory for some texts, of which tokens, past and start are read. 0: there is not enough. */
int pass_open(struct pass *p, const struct decoder *d, const struct text *texts, size_t n_texts, int shared);
void pass_run(void *pass);
void pass_close(struct pass *p);

static inline float *place_of(const struct pass *p, struct place at, size_t token) {
    return p->slots[at.slot] + token * p->d->widths[at.slot] + at.offset;
}

#endif
