/* The edge of a cap: see gate.h. */
#include "gate.h"

#include <string.h>

/* The gap below which lie at most `nth` of n gaps, and with which more than `nth`: quickselect, which reorders them. */
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

struct edge gate_edge(const float *gap, float *copy, size_t n, size_t cap) {
    memcpy(copy, gap, n * sizeof *gap);
    const float last = nth_gap(copy, n, cap - 1);
    size_t below = 0;
    for (size_t i = 0; i < n; i++) below += gap[i] < last;
    const struct edge edge = {last, cap - below};
    return edge;
}
