// head_probe.cuh: scores of a block's own clusters, by each kind of centroids, posted with the step's epoch.
#pragma once
#include "head_codes.cuh"
#include "head_exchange.cuh"

struct Probe {
    uint2* items;  // room for `owned`
    u64* scores;  // [clusters], of all blocks
    unsigned epoch;
    int first, owned;  // clusters from first on: so many
};

// Product codes: `sums` are complete once the row's counter reaches `target`; 16 lanes a cluster.
static __device__ void probe_products(const FlashHeadArguments& a, const Probe& p, const long long* sums, float unscale, const unsigned* counter, unsigned target) {
    const FlashHeadTable& made = a.layout.table[a.layout.centroid.table];
    const FlashHeadStage& centroid = a.layout.centroid;
    const unsigned char *bytes = a.image + made.bytes_at, *codes = a.image + centroid.rows_at;
    const int part = threadIdx.x & 15, first = p.first + (threadIdx.x >> 4);
    unsigned code[3];  // of the first round's cluster, before the sums are there
#pragma unroll
    for (int j = 0; j < 3; j++)
        if ((threadIdx.x >> 4) < p.owned && part + 16 * j < made.parts) code[j] = __ldg(codes + (size_t)first * centroid.stride + __ldg(bytes + part + 16 * j));
    wait(counter, target);
#pragma unroll 1
    for (int base = 0; base < p.owned; base += FLASHHEAD_THREADS / 16) {
        const int i = base + (threadIdx.x >> 4), k = p.first + i;
        long long sum = 0;
        if (base == 0 && made.parts <= 48) {
#pragma unroll
            for (int j = 0; j < 3; j++)
                if (i < p.owned && part + 16 * j < made.parts) sum += sums[(part + 16 * j) * 256 + code[j]];
        } else if (i < p.owned) {
#pragma unroll 1
            for (int q = part; q < made.parts; q += 16) sum += sums[q * 256 + __ldg(codes + (size_t)k * centroid.stride + __ldg(bytes + q))];
        }
        for (int step = 8; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
        if (i < p.owned && part == 0) post_float(p.scores + k, p.epoch, (float)sum * unscale);
    }
}

// Bits: `coordinates` waits for them; the tables are made from them.
template <class Coordinates>
static __device__ void probe_bits(const FlashHeadArguments& a, const Probe& p, const float4* weights, const float* z, unsigned char* shared, Coordinates coordinates) {
    const FlashHeadStage& centroid = a.layout.centroid;
#pragma unroll 1
    for (int i = threadIdx.x; i < p.owned; i += FLASHHEAD_THREADS) p.items[i] = make_uint2(p.first + i, 0);
    __syncthreads();
    score_wide_rows(a, centroid, p.items, p.owned, shared, [&] {
        coordinates();
        make_bit_tables(weights, bit_tables(centroid), z, (float*)(shared + centroid.shared_table));
        __syncthreads();
    });
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < p.owned; i += FLASHHEAD_THREADS) post_float(p.scores + (p.items[i].x & 0xffffff), p.epoch, __uint_as_float(p.items[i].y));
}

// Rows of float16, without a rotation: a warp a cluster.
static __device__ void probe_rows(const FlashHeadArguments& a, const Probe& p, const float4* state_low) {
    const int octets = a.layout.hidden_size / 8, lane = threadIdx.x & 31;
#pragma unroll 1
    for (int i = threadIdx.x >> 5; i < p.owned; i += 16) {
        const int k = p.first + i;
        const uint4* centroid = (const uint4*)(a.image + a.layout.centroid.rows_at) + (size_t)k * octets;
        if (i + 16 < p.owned)
#pragma unroll 1
            for (int line = lane * 8; line < octets; line += 256) prefetch(centroid + (size_t)16 * octets + line);
        const float score = product<false>(centroid, state_low, state_low + octets, octets);
        if (lane == 0) post_float(p.scores + k, p.epoch, score);
    }
}
