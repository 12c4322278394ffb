/* Which gaps pass a gate: those up to its margin, and of these under its cap the smallest, of equals the first. */
#ifndef FLASHHEAD_GATE_H
#define FLASHHEAD_GATE_H

#include <stddef.h>

struct gate {
    const float *nearness; /* of the probe: one over the clusters' own errors; a code's stand with its rows */
    float margin;
    size_t cap;
};

/* The largest gap that passes, in a state's own unit. An infinite margin is 1e30: as in the standard operators, no sum becomes NaN. */
static inline float gate_bound(const struct gate *gate, float unit) { return gate->margin < 1e30f ? gate->margin * unit : 1e30f; }

struct edge { /* what stays under a cap: gaps below this one, and of equals to it so many */
    float gap;
    size_t equal;
};

/* Of `n` passed gaps, more than `cap`. They are reordered in `copy`. */
struct edge gate_edge(const float *gap, float *copy, size_t n, size_t cap);

static inline int gate_stays(struct edge *edge, float gap) { /* asked of each gap in its order */
    return gap < edge->gap || (gap == edge->gap && edge->equal > 0 && edge->equal--);
}

#endif
