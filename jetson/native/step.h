/* One state's way through a head: rotate, probe, gates, codes, exact rows, token.
 *
 * Bytes of a step (SmolLM2-135M at 99.5 %, the mean of its counts): rotation 512 x 576, centroids 3,072 x 384, rows
 * 6,638 x 208, exact rows 551 x 1,152: 3.5 MB. Floor on a 2-core EPYC that others used too, one thread: 100 us where the
 * last-level cache holds them (34 GB/s), 410 us from memory (8.5 GB/s). Predicted 170 to 250 us in the cache; measured 300
 * to 430, and 540 to 750 from memory (median over states, of the fastest of each): rows that lie apart come at 3 to 5 GB/s.
 * Prefetching further ahead changed nothing, huge pages gave a tenth at most; prefetching them to the second cache took a code's
 * rows from 260 to 180 us and the exact ones from 140 to 110 (another EPYC, with AVX-512). Asking for spans 2 KB ahead and not a whole
 * span at once: 42 % less time for a step of 6,000 to 25,000 rows, beside neighbours that emptied the last cache. The standard operators: 1,600 to 2,300.
 * What no row is read for (quantising, gates, lists) is 25 us.
 */
#ifndef FLASHHEAD_STEP_H
#define FLASHHEAD_STEP_H

#include "gate.h"
#include "matrix.h"
#include "threads.h"

enum { MOST_STAGES = 16 };

struct kernel { /* what the operator holds of a head: sizes, and pointers into the session's own weights */
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

struct item { /* a slot that was opened for the state or is always scored */
    int32_t slot;
    float score, nearness;
    int32_t token;
};

struct span { /* slots side by side: those of a cluster, or an always-scored one alone */
    int32_t slot;
    uint32_t at; /* how many slots stand before them */
};

enum { MOST_PHASES = 3 + MOST_STAGES }; /* rotation, centroids, codes and exact rows */

struct run { /* one state's way through the stages, and its memory */
    struct team team;
    struct phase phases[MOST_PHASES];
    const struct kernel *k;
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
    size_t n_opened, n_spans, n_items;
};

int run_open(struct run *r, const struct kernel *k, int shared); /* 0: no memory */
void run_close(struct run *r);

/* One state: ids and logits in r, n_items of them; counts [2 + stages]. 0: the head's arrays name tokens that it does not have. */
int run_step(struct run *r, const float *hidden, int64_t *counts, unsigned char *capped, int64_t *token);

#endif
