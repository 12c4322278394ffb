/* A step of an operator that threads share: whoever comes first makes it, others take pieces of the phase that runs.
 *
 * One parallel section a step: a thread is woken once, not once a phase. Nobody waits for a thread that does not come.
 * HeadStep of Llama-3.2-1B's shape: 2,425 us with one thread, 1,476 with two (means).
 */
#ifndef FLASHHEAD_THREADS_H
#define FLASHHEAD_THREADS_H

#include "ort_abi.h"

#if defined(__GNUC__)
#define THREADS 8 /* that share a step, at most */
#else /* one thread makes a step: no atomic operations are spelled out for other compilers */
#define THREADS 1
#endif

enum { PIECE_BYTES = 1 << 15, MOST_PIECES = 16 }; /* a phase is cut into pieces of that size, at most so many */

struct phase { /* work in pieces, which threads take one after the other */
    void (*work)(void *, size_t);
    size_t pieces, taken, done;
};

struct team { /* the threads of one step */
    void *data;           /* what work gets */
    int shared;           /* threads help */
    size_t pieces, piece; /* of the phase that runs: how many, and how many things are in one */
    void (*step)(void *);
    void *of_step; /* what the step gets */
    size_t came;   /* threads: the first makes the step, whichever it is */
    const void *caller;  /* the thread that called us, and the processor that it was on, -1: not known */
    int processor;
    size_t begun, ended; /* phases that were begun; 1: the step is made */
    struct phase *phases; /* [room]: a place for each that is cut */
    size_t room;
};

/* Make a step with the threads that come; without, where nothing is shared. */
ort_status *team_step(struct team *t, ort_api api, const ort_context *context, void (*step)(void *), void *of_step);

/* Within a step: do `work` for pieces of n things that read `bytes` each, with the threads that help. A piece is a multiple of `together` things. */
void team_spread(struct team *t, void (*work)(void *data, size_t piece), size_t n, size_t bytes, size_t together);

/* Within work: which of the n things a piece is, first to end. 0: none. */
static inline int team_piece(const struct team *t, size_t piece, size_t n, size_t *first, size_t *end) {
    *first = piece * t->piece;
    *end = *first + t->piece < n ? *first + t->piece : n;
    return *first < n;
}

#endif
