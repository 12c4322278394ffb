/* Phases, their pieces, and who takes them: see threads.h. */
#if defined(__linux__)
#define _GNU_SOURCE /* affinities */
#endif
#include "threads.h"

#include <string.h>

#include "vector.h"

#if defined(__GNUC__)
#include <sched.h>
#define TAKE(counter) __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL)
#define READ(counter) __atomic_load_n(counter, __ATOMIC_ACQUIRE)
#define SET(counter, value) __atomic_store_n(counter, value, __ATOMIC_RELEASE)
#else
#define TAKE(counter) ((*(counter))++)
#define READ(counter) (*(counter))
#define SET(counter, value) (*(counter) = (value))
#endif

static _Thread_local char own; /* its place tells threads apart */

enum { SPINS = 1000 }; /* looks at a counter before the processor is offered to others */

static void rest(size_t looks) { /* between two looks at a counter that another thread counts up */
#if defined(__GNUC__)
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (looks % SPINS == SPINS - 1) sched_yield();
#endif
    (void)looks;
}

static void take_pieces(struct team *t, struct phase *p) {
    for (size_t piece; READ(&p->taken) < p->pieces && (piece = TAKE(&p->taken)) < p->pieces; TAKE(&p->done)) p->work(t->data, piece);
}

void team_spread(struct team *t, void (*work)(void *, size_t), size_t n, size_t bytes, size_t together) {
    const size_t pieces = t->shared ? n * bytes / PIECE_BYTES : 1;
    t->pieces = pieces < 1 ? 1 : pieces > MOST_PIECES ? MOST_PIECES : pieces;
    t->piece = padded((n + t->pieces - 1) / t->pieces, together);
    if (t->pieces == 1) {
        work(t->data, 0);
        return;
    }
    struct phase *p = &t->phases[t->begun];
    p->work = work;
    p->pieces = t->pieces;
    SET(&t->begun, t->begun + 1);
    take_pieces(t, p);
    for (size_t looks = 0; READ(&p->done) < p->pieces; looks++) rest(looks);
}

/* Another thread's part of a step: pieces of whatever phase runs, until the step is made. It may come late or never. */
static void help(struct team *t) {
    for (size_t looks = 0; !READ(&t->ended); looks++) {
        const size_t begun = READ(&t->begun);
        if (begun) take_pieces(t, &t->phases[begun - 1]);
        rest(looks);
    }
}

/* Linux may wake a thread on the processor of the one that woke it, which then makes the step, and leave another one idle: on a virtual
 * machine of two processors a helper came 2.8 ms late, at the end of a step of 4. So a helper that finds itself there leaves that
 * processor alone from now on. The thread that called us is not ours to move. */
static int processor(void) {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

static void keep_apart(const struct team *t) {
#if defined(__linux__)
    static _Thread_local int left = -1; /* the processor that was left alone before */
    const int here = processor();
    cpu_set_t set;
    if (t->caller == &own || here < 0 || here != t->processor || sched_getaffinity(0, sizeof set, &set)) return;
    if (left >= 0) CPU_SET(left, &set);
    CPU_CLR(here, &set);
    if (CPU_COUNT(&set) && !sched_setaffinity(0, sizeof set, &set)) left = here;
#else
    (void)t;
#endif
}

static void one_thread(void *team, size_t number) {
    struct team *t = team;
    (void)number;
    keep_apart(t);
    if (TAKE(&t->came)) {
        help(t);
        return;
    }
    t->step(t->of_step);
    SET(&t->ended, 1);
}

ort_status *team_step(struct team *t, ort_api api, const ort_context *context, void (*step)(void *), void *of_step) {
    memset(t->phases, 0, t->room * sizeof *t->phases);
    t->came = t->begun = t->ended = 0;
    t->caller = &own;
    t->processor = processor();
    t->step = step;
    t->of_step = of_step;
    if (t->shared) return ORT(api, parallel_for)(context, one_thread, THREADS, 0, t);
    one_thread(t, 0);
    return NULL;
}
