// head_wide.cuh: full-width logits: every token has one, and those without an exact row stay below those with one.
//
// While it goes on, a step writes the tail of every token that nothing scores, and the scores of each code over those of the
// code before. A second kernel lowers them below the smallest exact logit and puts the exact ones in their places.
#pragma once
#include "head_gates.cuh"

// Tails: of a cluster's score, for tokens of clusters that are not open. The tokens of open ones, and those always scored, are
// written by the block that scores them: none is written by two.
static __device__ __noinline__ void write_tails(const FlashHeadArguments& a, const ProbeGate& gate, int row, int block) {
    const FlashHeadLayout& L = a.layout;
    const unsigned short* cluster_of = (const unsigned short*)(a.image + L.cluster_of_at);
    float* wide = a.wide + (size_t)row * a.wide_stride;
#pragma unroll 4
    for (int v = block * FLASHHEAD_THREADS + threadIdx.x; v < L.vocab_size; v += L.blocks * FLASHHEAD_THREADS) {
        const unsigned k = __ldg(cluster_of + v);
        if (!(k & FLASHHEAD_ALWAYS) && !is_open(gate, k)) wide[v] = fmaf(gate.scores[k], L.tail_scale, L.tail_offset);
    }
}

// What a code has made of items [0, n).
static __device__ __noinline__ void write_scores(const FlashHeadArguments& a, const uint2* items, int n, int row) {
    const unsigned* tokens = (const unsigned*)(a.image + a.layout.token_table_at);
    float* wide = a.wide + (size_t)row * a.wide_stride;
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += FLASHHEAD_THREADS) wide[__ldg(tokens + (items[i].x & 0xffffff))] = __uint_as_float(items[i].y);
}

// Grid: (blocks that share a row, rows). Each lowers its share of the row, then puts the exact logits that belong there.
extern "C" __global__ void __launch_bounds__(FLASHHEAD_THREADS) flashhead_widen(const FlashHeadWiden a) {
    __shared__ u64 keys[16];
    wait_for_launch_before();
    const long long* counts = a.counts + (size_t)blockIdx.y * a.counted;
    const int count = (int)counts[a.counted - 1];
    const long long* ids = a.ids + (size_t)blockIdx.y * a.candidates;
    const float* logits = a.logits + (size_t)blockIdx.y * a.candidates;
    float* wide = a.wide + (size_t)blockIdx.y * a.wide_stride;
    const int share = (a.wide_stride + gridDim.x - 1) / gridDim.x, first = blockIdx.x * share, end = min(first + share, a.wide_stride);
    u64 least = 0;  // the largest of turned keys
    for (int i = threadIdx.x; i < count; i += FLASHHEAD_THREADS) {
        const u64 key = ~ordered(logits[i]);
        least = key > least ? key : least;
    }
    const float lowest = unordered(~(unsigned)block_max(least, keys));
    const float ceiling = lowest - FLASHHEAD_BELOW * (1 + fabsf(lowest));
#pragma unroll 4
    for (int v = first + threadIdx.x; v < end; v += FLASHHEAD_THREADS) wide[v] = v < a.vocab_size ? fminf(wide[v], ceiling) : FLASHHEAD_PADDING;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += FLASHHEAD_THREADS) {
        const long long id = ids[i];
        if (id >= first && id < end) wide[id] = logits[i];
    }
    if (a.totals && blockIdx.x == 0 && threadIdx.x == 0) {
        atomicAdd(a.totals, 1ull), atomicAdd(a.totals + 1, (u64)counts[0]), atomicAdd(a.totals + 2, (u64)count);
        if (a.capped[blockIdx.y]) atomicAdd(a.totals + 3, 1ull);
    }
}
