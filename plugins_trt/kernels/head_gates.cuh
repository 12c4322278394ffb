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
__device__ u64 threshold(Keys key_of, int n, unsigned cap, unsigned* bins, unsigned* scratch, unsigned* histograms, RowState* state, unsigned& target,
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

// The probe's gate seen as a whole, by every block alone: waits for all clusters' scores, leaves their gaps in `gaps` and
// returns the smallest key that passes, under the cap. `opened` and `cut` say how many pass and whether the cap cut.
__device__ __noinline__ u64 select_clusters(const FlashHeadArguments& a, const u64* scores, unsigned epoch, float inverse_unit, float* gaps, unsigned* bins,
                                            unsigned* numbers, u64* keys, unsigned& opened, bool& cut) {
    const FlashHeadLayout& L = a.layout;
    const float* inverse = (const float*)(a.image + L.small_at);
    u64 best = 0;
#pragma unroll 1
    for (int base = threadIdx.x; base < L.clusters; base += 8 * FLASHHEAD_THREADS) {
        u64 both[8];
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (base + j * FLASHHEAD_THREADS < L.clusters) both[j] = load_relaxed(scores + base + j * FLASHHEAD_THREADS);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int k = base + j * FLASHHEAD_THREADS;
            if (k >= L.clusters) continue;
            while ((unsigned)(both[j] >> 32) != epoch) both[j] = load_relaxed(scores + k);
            const float score = __uint_as_float((unsigned)both[j]);
            gaps[k] = score;
            const u64 key = item_key(score, k);
            best = key > best ? key : best;
        }
    }
    const float top = unordered((unsigned)(block_max(best, keys) >> 32));
    float widest = 0;
    unsigned own = 0;
#pragma unroll 8
    for (int k = threadIdx.x; k < L.clusters; k += FLASHHEAD_THREADS) {
        const float gap = (top - gaps[k]) * (__ldg(inverse + __ldg(a.image + L.cluster_error_at + k)) * inverse_unit);
        gaps[k] = gap;
        if (gap <= L.probe_margin) own++, widest = fmaxf(widest, gap);
    }
    own = __reduce_add_sync(~0u, own);
    const unsigned wide = __reduce_max_sync(~0u, __float_as_uint(widest));
    if ((threadIdx.x & 31) == 0) numbers[threadIdx.x >> 5] = own, numbers[16 + (threadIdx.x >> 5)] = wide;
    __syncthreads();
    opened = 0, widest = 0;
    for (int w = 0; w < 16; w++) opened += numbers[w], widest = fmaxf(widest, __uint_as_float(numbers[16 + w]));
    __syncthreads();  // all have read the numbers, which are written again from here on, by the caller too
    cut = opened > (unsigned)L.probe_cap;
    if (!cut) return 1;
    opened = L.probe_cap;
    // bins of equal width in the gap, nearest first, then the few clusters of the bin in which the cap falls by rank
    const float per_bin = FLASHHEAD_BINS / fmaxf(widest, 1e-30f) * 0.9999f;
#pragma unroll 1
    for (int i = threadIdx.x; i <= FLASHHEAD_BINS; i += FLASHHEAD_THREADS) bins[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (int k = threadIdx.x; k < L.clusters; k += FLASHHEAD_THREADS)
        if (gaps[k] <= L.probe_margin) atomicAdd(&bins[min((int)(gaps[k] * per_bin), FLASHHEAD_BINS - 1)], 1u);
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
    const auto cluster_key = [&](int k) { return gate_key(gaps[k], L.probe_margin, k); };
    if (members > 1024) {  // many equal gaps
        int passes;
        unsigned unused = 0;
        return threshold(cluster_key, L.clusters, cap, bins, numbers, nullptr, nullptr, unused, 0, passes);
    }
#pragma unroll 1
    for (int k = threadIdx.x; k < L.clusters; k += FLASHHEAD_THREADS)
        if (gaps[k] <= L.probe_margin && min((int)(gaps[k] * per_bin), FLASHHEAD_BINS - 1) == bin) list[atomicAdd(&numbers[2], 1u)] = cluster_key(k);
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
