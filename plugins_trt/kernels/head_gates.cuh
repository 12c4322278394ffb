// head_gates.cuh: which items pass a gate: those within its margin, and of these the nearest where its cap cuts.
#pragma once
#include "head_exchange.cuh"

// A gate's keys: those within the margin order by gap, then number; key 0 is outside.
__device__ __forceinline__ u64 gate_key(float gap, float margin, unsigned number) {
    if (!(gap <= margin)) return 0;
    const unsigned near = __float_as_uint(margin) - __float_as_uint(fmaxf(gap, 0.f));
    return ((u64)near << FLASHHEAD_MAX_NUMBER | ((1u << FLASHHEAD_MAX_NUMBER) - 1 - number)) + 1;
}

// The smallest key that a cap lets through: a radix search that counts keys in 2,048 bins a pass and narrows the interval.
// The first interval covers gaps down to a quarter of the margin, where a cap's threshold nearly always lies.
// With `histograms`, all blocks of the row search their items together, one barrier a pass; without, the block is alone.
template <class Keys>
static __device__ u64 threshold(Keys key_of, int n, unsigned cap, unsigned* bins, unsigned* scratch, unsigned* histograms, RowState* state, unsigned& target,
                         unsigned blocks, int& passes) {
    u64 low = 1;
    int width = 24 + FLASHHEAD_MAX_NUMBER;
    unsigned remaining = cap;
#pragma unroll 1
    for (passes = 0; passes < FLASHHEAD_PASSES;) {
        const int shift = width > 11 ? width - 11 : 0;
#pragma unroll 1
        for (int i = threadIdx.x; i <= FLASHHEAD_BINS; i += FLASHHEAD_THREADS) bins[i] = 0;
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < n; i += FLASHHEAD_THREADS) {
            const u64 key = key_of(i);
            if (key < low) continue;
            const u64 bin = (key - low) >> shift;
            if (bin < FLASHHEAD_BINS) atomicAdd(&bins[bin], 1u);
            else if (passes == 0) atomicAdd(&bins[FLASHHEAD_BINS], 1u);
        }
        __syncthreads();
        if (histograms) {
            unsigned* shared_bins = histograms + passes * FLASHHEAD_HISTOGRAM;
#pragma unroll 1
            for (int i = threadIdx.x; i <= FLASHHEAD_BINS; i += FLASHHEAD_THREADS)
                if (bins[i]) atomicAdd(&shared_bins[i], bins[i]);
            arrive(&state->counter);
            wait(&state->counter, target += blocks);
#pragma unroll 1
            for (int i = threadIdx.x; i <= FLASHHEAD_BINS; i += FLASHHEAD_THREADS) bins[i] = __ldcg(&shared_bins[i]);
            __syncthreads();
        }
        // each thread sums four bins, the highest first; a scan over the threads finds where `remaining` falls
        const int top = FLASHHEAD_BINS - 1 - 4 * threadIdx.x;
        unsigned own = 0, before = 0;
        for (int i = 0; i < 4; i++) own += bins[top - i];
        before = own;
        for (int step = 1; step < 32; step <<= 1) {
            const unsigned other = __shfl_up_sync(~0u, before, step);
            if ((threadIdx.x & 31) >= step) before += other;
        }
        if ((threadIdx.x & 31) == 31) scratch[threadIdx.x >> 5] = before;
        __syncthreads();
        before -= own;
        unsigned total = 0;
#pragma unroll 1
        for (int i = 0; i < FLASHHEAD_THREADS / 32; i++) {
            if (i < (threadIdx.x >> 5)) before += scratch[i];
            total += scratch[i];
        }
        const unsigned above = passes == 0 ? bins[FLASHHEAD_BINS] : 0;
        __syncthreads();
        if (passes++ == 0) {
            if (total + above <= cap) return 0;
            if (above >= remaining) {
                width = 31 + FLASHHEAD_MAX_NUMBER;
                continue;
            }
            remaining -= above;
        }
        if (before < remaining && remaining <= before + own) {
            int bin = top;
            while (before + bins[bin] < remaining) before += bins[bin--];
            scratch[0] = bin, scratch[1] = before, scratch[2] = bins[bin];
        }
        __syncthreads();
        low += (u64)scratch[0] << shift;
        remaining -= scratch[1];
        const bool done = scratch[2] == remaining;
        width = shift;
        __syncthreads();
        if (done) break;
    }
    return low;
}

// The probe's gate, as every block sees it: all scores, and what passes.
struct ProbeGate {
    const float* scores;          // [clusters]
    const unsigned char* errors;  // [clusters] coded
    const float* inverse;         // [256] 1 / own error, by coded error
    float top, inverse_unit, margin;
    u64 least;  // smallest key that passes; 1: all within the margin
};

__device__ __forceinline__ float cluster_gap(const ProbeGate& g, int k) { return (g.top - g.scores[k]) * (g.inverse[g.errors[k]] * g.inverse_unit); }

__device__ __forceinline__ bool is_open(const ProbeGate& g, int k) { return gate_key(cluster_gap(g, k), g.margin, k) >= g.least; }

// Waits for all clusters' scores; returns the best key.
static __device__ u64 collect_scores(const FlashHeadLayout& L, const u64* posted, unsigned epoch, float* scores, u64* keys) {
    u64 best = 0;
    collect_floats(posted, L.clusters, epoch, [&](int k, float score) {
        scores[k] = score;
        const u64 key = item_key(score, k);
        best = key > best ? key : best;
    });
    return block_max(best, keys);
}

// Which clusters are open. A thread looks at threadIdx.x, threadIdx.x + FLASHHEAD_THREADS, ...: 32 of them at most.
struct Open {
    unsigned bits;    // bit j: the j-th of these is open
    unsigned before;  // open clusters of the threads before this one
};

// Returns how many are open in all.
static __device__ unsigned count_open(const FlashHeadLayout& L, const ProbeGate& g, unsigned* numbers, Open& own) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, first = (int)threadIdx.x;
    own.bits = 0;
#pragma unroll 1
    for (int base = 0; first + base * FLASHHEAD_THREADS < L.clusters; base += 8) {
        float gap[8];
#pragma unroll
        for (int j = 0; j < 8; j++) gap[j] = cluster_gap(g, min(first + (base + j) * FLASHHEAD_THREADS, L.clusters - 1));
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int k = first + (base + j) * FLASHHEAD_THREADS;
            own.bits |= (unsigned)(k < L.clusters && (g.least == 1 ? gap[j] <= g.margin : gate_key(gap[j], g.margin, k) >= g.least)) << (base + j);
        }
    }
    const unsigned count = __popc(own.bits);
    unsigned before = count;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
        const unsigned other = __shfl_up_sync(~0u, before, step);
        if (lane >= step) before += other;
    }
    __syncthreads();
    if (lane == 31) numbers[warp] = before;
    __syncthreads();
    unsigned all = 0;
    before -= count;
#pragma unroll
    for (int w = 0; w < FLASHHEAD_THREADS / 32; w++) {
        const unsigned n = numbers[w];
        all += n;
        if (w < warp) before += n;
    }
    own.before = before;
    return all;
}

// The open clusters [first, first + count) into a list, in an order that all blocks share: {cluster, score}.
__device__ __forceinline__ void list_open(const ProbeGate& g, Open own, int first, int count, uint2* list) {
    int place = (int)own.before - first;
    for (unsigned bits = own.bits; bits && place < count; bits &= bits - 1, place++) {
        const int k = threadIdx.x + (__ffs(bits) - 1) * FLASHHEAD_THREADS;
        if (place >= 0) list[place] = make_uint2(k, __float_as_uint(g.scores[k]));
    }
}

// The smallest key that passes where the cap cuts: found by every block alone.
static __device__ __noinline__ u64 cut_clusters(const FlashHeadLayout& L, const ProbeGate& g, unsigned* bins, unsigned* numbers, u64* keys) {
    float widest = 0;
#pragma unroll 1
    for (int k = threadIdx.x; k < L.clusters; k += FLASHHEAD_THREADS) {
        const float gap = cluster_gap(g, k);
        if (gap <= g.margin) widest = fmaxf(widest, gap);
    }
    const unsigned wide = __reduce_max_sync(~0u, __float_as_uint(widest));
    __syncthreads();
    if ((threadIdx.x & 31) == 0) numbers[threadIdx.x >> 5] = wide;
    __syncthreads();
    for (int w = 0; w < 16; w++) widest = fmaxf(widest, __uint_as_float(numbers[w]));
    // bins of equal width in the gap, nearest first, then the few clusters of the bin in which the cap falls by rank
    const float per_bin = FLASHHEAD_BINS / fmaxf(widest, 1e-30f) * 0.9999f;
#pragma unroll 1
    for (int i = threadIdx.x; i <= FLASHHEAD_BINS; i += FLASHHEAD_THREADS) bins[i] = 0;
    __syncthreads();
    const auto bin_of = [&](float gap) { return min((int)(gap * per_bin), FLASHHEAD_BINS - 1); };
#pragma unroll 1
    for (int k = threadIdx.x; k < L.clusters; k += FLASHHEAD_THREADS) {
        const float gap = cluster_gap(g, k);
        if (gap <= g.margin) atomicAdd(&bins[bin_of(gap)], 1u);
    }
    __syncthreads();
    unsigned four = 0;
    for (int i = 0; i < 4; i++) four += bins[4 * threadIdx.x + i];
    unsigned before = four;
    for (int step = 1; step < 32; step <<= 1) {
        const unsigned other = __shfl_up_sync(~0u, before, step);
        if ((threadIdx.x & 31) >= step) before += other;
    }
    if ((threadIdx.x & 31) == 31) numbers[threadIdx.x >> 5] = before;
    __syncthreads();
    before -= four;
#pragma unroll 1
    for (int w = 0; w < (threadIdx.x >> 5); w++) before += numbers[w];
    __syncthreads();
    const unsigned cap = L.probe_cap;
    if (before < cap && cap <= before + four) {
        int bin = 4 * threadIdx.x;
        while (before + bins[bin] < cap) before += bins[bin++];
        numbers[0] = bin, numbers[1] = cap - before, numbers[2] = 0, numbers[3] = bins[bin];
    }
    __syncthreads();
    const int bin = numbers[0];
    const unsigned wanted = numbers[1], members = numbers[3];
    u64* list = (u64*)bins;  // the bins are done with; 2,052 counters hold 1,026 keys
    __syncthreads();
    const auto key_of = [&](int k) { return gate_key(cluster_gap(g, k), g.margin, k); };
    if (members > 1024) {  // many equal gaps
        int passes;
        unsigned unused = 0;
        return threshold(key_of, L.clusters, cap, bins, numbers, nullptr, nullptr, unused, 0, passes);
    }
#pragma unroll 1
    for (int k = threadIdx.x; k < L.clusters; k += FLASHHEAD_THREADS) {
        const float gap = cluster_gap(g, k);
        if (gap <= g.margin && bin_of(gap) == bin) list[atomicAdd(&numbers[2], 1u)] = key_of(k);
    }
    __syncthreads();
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < members; i += FLASHHEAD_THREADS) {
        unsigned rank = 0;
#pragma unroll 1
        for (unsigned j = 0; j < members; j++) rank += list[j] > list[i];
        if (rank + 1 == wanted) keys[0] = list[i];
    }
    __syncthreads();
    const u64 least = keys[0];
    __syncthreads();
    return least;
}
