// head_wide.cuh: full-width logits (reference.full_logits): every token has one.
//
// While it goes on, a step writes each code's scores over those of the code before, and marks the clusters that it opens. A second
// kernel presses these below the best exact logit, gives the tokens of all other clusters the tail of their cluster's score, below
// the smallest exact logit, and puts the exact ones in their places.
#pragma once
#include "head_gates.cuh"

// What a code has made of items [0, n).
static __device__ __noinline__ void write_scores(const FlashHeadArguments& a, const uint2* items, int n, int row) {
    const unsigned* tokens = (const unsigned*)(a.image + a.layout.token_table_at);
    float* wide = a.wide + (size_t)row * a.wide_stride;
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += FLASHHEAD_THREADS) wide[__ldg(tokens + (items[i].x & 0xffffff))] = __uint_as_float(items[i].y);
}

// Those near or above `exact` are pressed together below it, in their order (reference.below).
__device__ __forceinline__ float below(float x, float exact) {
    const float ceiling = exact - FLASHHEAD_BELOW * (1 + fabsf(exact));
    return x > ceiling - 1 ? ceiling - __expf(ceiling - 1 - x) : x;
}

// Grid: (blocks that share a row, rows). Each fills its share of the row, then puts the exact logits that belong there.
extern "C" __global__ void __launch_bounds__(FLASHHEAD_THREADS) flashhead_widen(const __grid_constant__ FlashHeadWiden a) {
    __shared__ u64 keys[16];
    constexpr int AHEAD = 4;
    const int row = blockIdx.y, share = (a.wide_stride + gridDim.x - 1) / gridDim.x, first = blockIdx.x * share, end = min(first + share, a.wide_stride);
    const unsigned short* cluster_of = (const unsigned short*)(a.image + a.cluster_of_at);
    unsigned cluster[AHEAD];
    const auto name_clusters = [&](int base) {
#pragma unroll
        for (int j = 0; j < AHEAD; j++) cluster[j] = __ldg(cluster_of + min(base + j * FLASHHEAD_THREADS, a.vocab_size - 1));
    };
    name_clusters(first + threadIdx.x);  // does not wait for the step
    wait_for_launch_before();
    const unsigned char* work = a.workspace + (size_t)row * a.row_bytes;
    const unsigned epoch = ((const RowState*)work)->epoch;
    const u64* scores = (const u64*)(work + a.row_scores);
    const unsigned* opened = (const unsigned*)(work + a.row_opened);
    const long long *counts = a.counts + (size_t)row * a.counted, *ids = a.ids + (size_t)row * a.candidates;
    const float* logits = a.logits + (size_t)row * a.candidates;
    float* wide = a.wide + (size_t)row * a.wide_stride;
    // all loads first, none waits for another; the candidates are fewer than so many, mostly
    const int count = (int)counts[a.counted - 1];
    float exact[AHEAD];
    int id[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
        const int i = min((int)threadIdx.x + j * FLASHHEAD_THREADS, a.candidates - 1);
        exact[j] = logits[i], id[j] = (int)ids[i];
    }
    // a token's value, and whether it is a tail; where no code scores rows, that of an open cluster's token is replaced by an exact one
    float value[AHEAD];
    bool tail[AHEAD];
    const auto load = [&](int base) {
        float score[AHEAD];
        unsigned when[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const unsigned k = cluster[j] & ~FLASHHEAD_ALWAYS;
            value[j] = wide[min(base + j * FLASHHEAD_THREADS, a.wide_stride - 1)], score[j] = __uint_as_float((unsigned)scores[k]), when[j] = opened[k];
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            tail[j] = !(cluster[j] & FLASHHEAD_ALWAYS) && when[j] != epoch;
            if (base + j * FLASHHEAD_THREADS >= a.vocab_size) value[j] = FLASHHEAD_PADDING;
            else if (tail[j]) value[j] = fmaf(score[j], a.tail_scale, a.tail_offset);
        }
    };
    load(first + threadIdx.x);
    unsigned least = 0, most = 0;  // the largest of turned keys, and of keys
    const auto take = [&](float logit) { least = max(least, ~ordered(logit)), most = max(most, ordered(logit)); };
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
        if (threadIdx.x + j * FLASHHEAD_THREADS < count) take(exact[j]);
#pragma unroll 1
    for (int i = threadIdx.x + AHEAD * FLASHHEAD_THREADS; i < count; i += FLASHHEAD_THREADS) take(logits[i]);
    const float lowest = unordered(~(unsigned)block_max(least, keys)), best = unordered((unsigned)block_max(most, keys));
#pragma unroll 1
    for (int base = first + threadIdx.x;;) {
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (base + j * FLASHHEAD_THREADS < end) wide[base + j * FLASHHEAD_THREADS] = below(value[j], tail[j] ? lowest : best);
        base += AHEAD * FLASHHEAD_THREADS;
        if (base >= end) break;
        name_clusters(base);
        load(base);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
        if (threadIdx.x + j * FLASHHEAD_THREADS < count && id[j] >= first && id[j] < end) wide[id[j]] = exact[j];
#pragma unroll 1
    for (int i = threadIdx.x + AHEAD * FLASHHEAD_THREADS; i < count; i += FLASHHEAD_THREADS)
        if (ids[i] >= first && ids[i] < end) wide[ids[i]] = logits[i];
}
