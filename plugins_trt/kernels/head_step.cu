// head_step.cu: one decode step of a FlashHead: rotate, probe, gate, cascade of row codes, exact rows, greedy token.
//
//   hidden   in   [N, d] fp16 or bf16, 16-byte aligned, d % 8 == 0
//   weight   in   [V or more, d] fp16 or bf16, 16-byte aligned: the model's own matrix; bias [V or more] or null
//   image    in   the packed index (head_step.h)
//   token    out  [N] int64: largest exact logit, the smaller id on ties
//   counts   out  [N, 2 + stages] int64: clusters opened, slots scored by each code, rows scored exactly
//   capped   out  [N] uint8; ids [N, C] int64 and logits [N, C] fp32: the rows scored exactly, in no order
//   wide     out  [N, V] fp32 or null: full-width logits, once flashhead_widen has been over them
//   totals   in, out  [4] uint64 or null: counters that outlive the step
//
// Judge: flashhead_edge/reference.py. Launch: grid = (groups * layout.blocks), 512 threads, every block resident at once
// (cooperative); group g takes the rows g, g + groups, ...; a row never looks at its neighbours.
//
// Contract. For equal hidden states the token, the counts and the set of candidates do not depend on the grid, the
// batch or its order. A coordinate is summed by one block in a tree fixed by d. Sums of products with codebooks are
// added as 64-bit whole numbers, whose order is free. An item is summed by a number of lanes fixed by its code. Ties go
// to the smaller number; a cap keeps the items of largest (gap, number) key, found by counting, never by arrival. Exact
// rows that a block scored before it knew that they pass count only if they do.
// Formally, blocks also rely on this: the sums of codebooks are cleared once a block's message of the next phase has come, which it sends after it has used
// what it read of them; and a tag of 24 bits tells a step's messages from those of 2^24 steps before.
// Rounding. Sums are float32 of exact products: with u = 2^-24, a coordinate of d terms is wrong by at most
// (d/32 + 12) u sum|terms|, an item's score by (bits/lanes + 16) u sum|terms| beside what its coordinates carry over, an
// exact logit by (d/32 + 7) u sum|terms|; a gap by 4 u more, relatively, and the state's unit by 16 u. The token is the
// reference's where neither the winner's lead nor its distance to a margin is within that.
//
// One kernel, because at these sizes launches and grid barriers are the cost. What blocks tell each other travels without
// fences or atomics: coordinates and cluster scores in words tagged with the step (`post_float`), then for each code one
// message of 16 bytes a block, the best score and two counts (`post`, `collect`). Only product codes need a barrier, behind
// the sums of their codebooks, and caps that cut, one a pass of their counting. Every block sees all clusters' scores and takes
// an equal share of the open ones; it keeps its items to the end. A message also says how many items at most will pass, so a
// cap costs nothing until it may cut.
// What a step costs is the number of its phases and of the instructions that a warp goes through, not its bytes: the same
// head takes as long when all of it lies in the L2 cache. docs/kernels.md has the figures.
#include "head_step.h"

extern "C" __global__ void flashhead_widen(const __grid_constant__ FlashHeadWiden a);
extern "C" __global__ void flashhead_step(const __grid_constant__ FlashHeadArguments a);

#ifdef __CUDACC__
#include "head_gates.cuh"
#include "head_probe.cuh"
#include "head_rotate.cuh"
#include "head_wide.cuh"

// Loops are unrolled only where it pays: a step runs most instructions once.

extern "C" __global__ void __launch_bounds__(FLASHHEAD_THREADS, 1) flashhead_step(const __grid_constant__ FlashHeadArguments a) {
    extern __shared__ __align__(64) unsigned char shared[];
    __shared__ u64 keys[16];
    __shared__ Collected collected[16];
    __shared__ unsigned numbers[32];
    __shared__ unsigned count, kept_count;
    const FlashHeadLayout& L = a.layout;
    const int blocks = L.blocks, block = blockIdx.x % blocks, groups = gridDim.x / blocks;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, size = L.cluster_size;
    const int owned = max(0, min(L.clusters_a_block, L.clusters - block * L.clusters_a_block));
    const unsigned char* filled = a.image + L.filled_at;
    float* z = (float*)(shared + L.shared_z);
    unsigned char* cluster_errors = shared + L.shared_errors;
    unsigned* bins = (unsigned*)(shared + L.shared_work);
    const float4* state_low = (const float4*)(shared + L.shared_state);
    const float* inverse = (const float*)(shared + L.shared_small);  // [1 + stages][256] 1 / own error in logits: of the clusters, then of each code
    const float4* weights = (const float4*)(inverse + 256 * (1 + L.stages));  // [bits / 2] of two bits: half weight, coordinate

    // what every step reads, small and scattered
#pragma unroll 1
    for (unsigned i = (block * FLASHHEAD_THREADS + threadIdx.x) * 128; i < L.prefetch_bytes; i += blocks * FLASHHEAD_THREADS * 128)
        prefetch(a.image + L.prefetch_at + i);

#pragma unroll 1
    for (int i = threadIdx.x; i < L.small_bytes / 16; i += FLASHHEAD_THREADS) copy_async(shared + L.shared_small + 16 * i, a.image + L.small_at + 16 * i);
#pragma unroll 1
    for (int i = threadIdx.x; 16 * i < L.clusters; i += FLASHHEAD_THREADS) copy_async(cluster_errors + 16 * i, a.image + L.centroid.error_at + 16 * i);

    for (int row = blockIdx.x / blocks; row < a.rows; row += groups) {
        unsigned char* work = a.workspace + (size_t)row * L.row_bytes;
        RowState* state = (RowState*)work;
        Message* messages = (Message*)(work + L.row_messages);
        long long* sums = (long long*)(work + L.row_tables);
        u64* z_all = (u64*)(work + L.row_z);
        u64* scores = (u64*)(work + L.row_scores);
        unsigned* opened_in = (unsigned*)(work + L.row_opened);  // [clusters] the last step that opened it, of those that want full-width logits
        unsigned* histograms = (unsigned*)(work + L.row_histograms);
        uint2* items = L.row_items ? (uint2*)(work + L.row_items) + (size_t)block * 2 * L.capacity : (uint2*)(shared + L.shared_items);
        uint2* others = items + L.capacity;
        float* cluster_scores = L.row_clusters ? (float*)(work + L.row_clusters) + (size_t)block * L.clusters : (float*)(shared + L.shared_clusters);
        if (row >= groups) __syncthreads();  // of the row before nothing is read any more: the rotation's input takes the place of its tables
        const unsigned epoch = __ldcg(&state->epoch) + 1, tag = epoch & 0xffffff;
        unsigned target = 0, passes_used = 0;
        bool cut = false;
        float inverse_unit = 1;

        const Probe probe = {others, scores, epoch, block * L.clusters_a_block, owned};
        if (L.chunks) {
            const int shift = rotate(a, row, block, shared, sums, z_all, epoch);
            const float unscale = ldexpf(1.f, -shift);
            const auto coordinates = [&] {
                const float square = collect_coordinates(L, z_all, epoch, z, (float*)numbers);
                if (L.state_power != 0) inverse_unit = exp2f(-0.5f * L.state_power * log2f(square));
            };
            const bool bits = L.centroid.table < 0;
            if (L.tables) arrive(&state->counter), target += blocks;
            if (bits) {
                probe_bits(a, probe, weights, z, shared, coordinates);
                if (L.tables) wait(&state->counter, target);
            } else {
                probe_products(a, probe, sums, unscale, &state->counter, target);
            }
            // while the others' scores travel: the tables of the row codes
            if (!bits) coordinates();
            make_tables(a, sums, unscale, weights + (bits ? 2 * bit_tables(L.centroid) : 0), z, shared);
        } else {
            load_state(a, row, shared);
            wait_copies();
            __syncthreads();
            probe_rows(a, probe, state_low);
        }

        // the probe's gate: every block sees all scores, and takes an equal share of the open clusters
        if (threadIdx.x == 0) count = kept_count = 0;
        u64 best = collect_scores(L, scores, epoch, cluster_scores, keys);
        ProbeGate gate = {cluster_scores, cluster_errors, inverse, unordered((unsigned)(best >> 32)), inverse_unit, L.probe_margin, 1};
        Open own;
        unsigned opened = count_open(L, gate, numbers, own);
        if (opened > (unsigned)L.probe_cap) {
            cut = true;
            gate.least = cut_clusters(L, gate, bins, numbers, keys);
            opened = count_open(L, gate, numbers, own);
        }
        const int first = opened * block / blocks, listed = opened * (block + 1) / blocks - first;
        list_open(gate, own, first, listed, others);
        __syncthreads();
        const auto append = [&](uint2* list, bool wanted, uint2 item) {  // all lanes of a warp together
            const unsigned ballot = __ballot_sync(~0u, wanted);
            unsigned start = 0;
            if (lane == 0 && ballot) start = atomicAdd(&count, (unsigned)__popc(ballot));
            start = __shfl_sync(~0u, start, 0);
            if (wanted) list[start + __popc(ballot & ((1u << lane) - 1))] = item;
        };
#pragma unroll 1
        for (int i = warp; i < listed; i += 16) {
            const unsigned k = others[i].x, tokens = L.least_filled == size ? size : __ldg(filled + k);
            if (L.stages) prefetch_cluster(a, k);
            if (a.wide && lane == 0) opened_in[k] = epoch;
            unsigned start = 0;
            if (lane == 0) start = atomicAdd(&count, tokens);
            start = __shfl_sync(~0u, start, 0);
#pragma unroll 1
            for (unsigned place = lane; place < tokens; place += 32) items[start + place] = make_uint2(k * size + place, others[i].y);
        }
#pragma unroll 1
        for (int base = block; base < L.always; base += FLASHHEAD_THREADS * blocks) {  // of these too every block takes its share
            const int i = base + threadIdx.x * blocks;
            const bool mine = i < L.always;
            const unsigned slot = mine ? __ldg((const unsigned*)(a.image + L.always_at) + i) : 0, k = slot / size;
            append(items, mine && !is_open(gate, k), make_uint2(slot, __float_as_uint(cluster_scores[k])));
        }
        __syncthreads();
        unsigned n = count;
        Collected all = {best, 0, 0};
        const auto gap_of = [&](int s, uint2 item, float limit) {
            return (limit - __uint_as_float(item.y)) * (inverse[256 * (s + 1) + (item.x >> 24)] * inverse_unit);
        };
        bool early = false;  // the exact rows are scored before all blocks have said how good theirs are
        float limit = 0;
        u64 least = 1;
        const auto passes = [&](int s, uint2 item) { return gate_key(gap_of(s, item, limit), L.stage[s].margin, item.x & 0xffffff) >= least; };

        // the cascade: a block keeps its items to the end
#pragma unroll 1
        for (int s = 0; s < L.stages; s++) {
            const FlashHeadStage& stage = L.stage[s];
            // the best so far, scored in every block (the best cluster's rows, later one row), make the first count of who passes a sharp one
            const unsigned leader = 0xffffffffu - (unsigned)all.best, scouts = s ? 1 : __ldg(filled + leader);
            if (threadIdx.x < scouts)
                items[n + threadIdx.x] = make_uint2(s ? leader : leader * size + threadIdx.x, __float_as_uint(unordered((unsigned)(all.best >> 32))));
            __syncthreads();
            best = block_max(score_items(a, stage, items, n + scouts, shared), keys);
            if (threadIdx.x == 0) count = 0;
            __syncthreads();
            const float nearly = unordered((unsigned)(best >> 32));
#pragma unroll 1
            for (unsigned base = 0; base < n; base += FLASHHEAD_THREADS) {
                const unsigned i = base + threadIdx.x;
                const uint2 item = i < n ? items[i] : make_uint2(0, 0);
                append(others, i < n && gap_of(s, item, nearly) <= stage.margin, item);
            }
            __syncthreads();
            const unsigned near = count;
            if (threadIdx.x == 0) post(messages + s * blocks + block, best, near, n, tag);
            // while the messages travel: what passes so far will most likely be read next
            prefetch_next(a, s, others, near);
            if (a.wide) {
                write_scores(a, items, n, row);
                __syncthreads();  // exact rows are scored into `items`
            }
            early = s + 1 == L.stages && near <= FLASHHEAD_EARLY;
            if (early) score_exactly(a, others, near, items, state_low, false);
            all = collect(messages + s * blocks, blocks, tag, collected);
            if (block == 0 && threadIdx.x == 0) a.counts[(size_t)row * (2 + L.stages) + 1 + s] = all.second;
            if (s == 0)  // all blocks have made their tables of these
#pragma unroll 1
                for (int i = block * FLASHHEAD_THREADS + threadIdx.x; i < L.parts * 256; i += blocks * FLASHHEAD_THREADS) sums[i] = 0;
            limit = unordered((unsigned)(all.best >> 32));
            least = 1;
            if (threadIdx.x == 0) count = 0;
            if (all.first > (unsigned)stage.cap) {
                int used;
                const auto key_of = [&](int i) { return gate_key(gap_of(s, others[i], limit), stage.margin, others[i].x & 0xffffff); };
                least = threshold(key_of, near, stage.cap, bins, numbers, histograms + s * FLASHHEAD_PASSES * FLASHHEAD_HISTOGRAM, state, target, blocks, used);
                passes_used |= (unsigned)used << 4 * s;
                if (least) cut = true;
                else least = 1;
            }
            __syncthreads();
            n = near;
            if (early) break;
#pragma unroll 1
            for (unsigned base = 0; base < near; base += FLASHHEAD_THREADS) {
                const unsigned i = base + threadIdx.x;
                append(items, i < near && passes(s, others[i < near ? i : 0]), i < near ? make_uint2(others[i].x & 0xffffff, others[i].y) : make_uint2(0, 0));
            }
            __syncthreads();
            n = count;
        }
        if (L.stages == 0)
#pragma unroll 1
            for (int i = block * FLASHHEAD_THREADS + threadIdx.x; i < L.parts * 256; i += blocks * FLASHHEAD_THREADS) sums[i] = 0;

        // exact rows; of those that were scored early, some do not pass
        if (!early) score_exactly(a, items, n, others, state_low, L.stages == 0);
        __syncthreads();
        const uint2* found = early ? items : others;
        const auto kept = [&](unsigned i) { return i < n && (!early || passes(L.stages - 1, others[i])); };
        best = 0;
#pragma unroll 1
        for (unsigned base = 0; base < n; base += FLASHHEAD_THREADS) {
            const unsigned i = base + threadIdx.x;
            const bool keep = kept(i);
            const unsigned ballot = __ballot_sync(~0u, keep);
            if (lane == 0 && ballot) atomicAdd(&kept_count, (unsigned)__popc(ballot));
            const u64 key = keep ? item_key(__uint_as_float(found[i].y), found[i].x) : 0;
            best = key > best ? key : best;
        }
        best = block_max(best, keys);
        Message* last = messages + L.stages * blocks;
        if (threadIdx.x == 0) post(last + block, best, 0, kept_count, tag);
#pragma unroll 1
        for (unsigned base = 0; base < n; base += FLASHHEAD_THREADS) {
            const unsigned i = base + threadIdx.x;
            const bool keep = kept(i);
            const unsigned ballot = __ballot_sync(~0u, keep);
            unsigned start = 0;
            if (lane == 0 && ballot) start = atomicAdd(&state->candidates[epoch & 1], (unsigned)__popc(ballot));
            const size_t place = (size_t)row * L.candidates + __shfl_sync(~0u, start, 0) + __popc(ballot & ((1u << lane) - 1));
            if (keep) a.ids[place] = found[i].x, a.logits[place] = __uint_as_float(found[i].y);
        }
        if (block) continue;
        // the row's first block writes the result, and leaves the workspace ready for the next step
        all = collect(last, blocks, tag, collected);
        if (threadIdx.x == 0) {
            long long* counts = a.counts + (size_t)row * (2 + L.stages);
            a.token[row] = all.best ? 0xffffffffu - (unsigned)all.best : 0;  // of a state that is not finite nothing passes
            counts[0] = opened, counts[1 + L.stages] = all.second;
            a.capped[row] = cut;
            if (a.totals) {
                atomicAdd(a.totals, 1ull), atomicAdd(a.totals + 1, (u64)opened), atomicAdd(a.totals + 2, (u64)all.second);
                if (cut) atomicAdd(a.totals + 3, 1ull);
            }
            state->counter = state->candidates[~epoch & 1] = 0;
            state->epoch = epoch;
        }
#pragma unroll 1
        for (int s = 0; s < L.stages; s++)
#pragma unroll 1
            for (int i = threadIdx.x; i < (int)(passes_used >> 4 * s & 15) * FLASHHEAD_HISTOGRAM; i += FLASHHEAD_THREADS)
                histograms[s * FLASHHEAD_PASSES * FLASHHEAD_HISTOGRAM + i] = 0;
    }
}
#endif

#ifndef __CUDACC_RTC__
#include <algorithm>

#include "launch.h"

const char* fh_head_step(const FlashHeadArguments* arguments, const fh_device* device, cudaStream_t stream) {
    const FlashHeadLayout& plan = arguments->layout;
    if (arguments->rows < 1 || arguments->rows > FLASHHEAD_MAX_ROWS)
        return fh::failure("head_step: %d states, expected 1 to %d; split the batch", arguments->rows, FLASHHEAD_MAX_ROWS);
    if (plan.blocks < 1 || plan.multiprocessors > device->multiprocessors)
        return fh::failure("head_step: the plan is for %d multiprocessors, the device has %d; plan for this device", plan.multiprocessors,
                           device->multiprocessors);
    const int groups = std::max(1, std::min(arguments->rows, plan.multiprocessors / plan.blocks));
    fh_device apart = *device;
    apart.overlap = 0;  // a step does not wait by itself for the launch before it
    fh::Grid grid = {dim3(groups * plan.blocks), FLASHHEAD_THREADS, plan.shared_bytes};
    grid.cooperative = true;
    return fh::launch("head_step", apart, stream, grid, flashhead_step, *arguments);
}

const char* fh_head_widen(const FlashHeadWiden* arguments, const fh_device* device, cudaStream_t stream) {
    if (arguments->rows < 1 || arguments->rows > FLASHHEAD_MAX_ROWS)
        return fh::failure("head_widen: %d states, expected 1 to %d; split the batch", arguments->rows, FLASHHEAD_MAX_ROWS);
    const int most = (arguments->wide_stride + FLASHHEAD_THREADS - 1) / FLASHHEAD_THREADS;
    const fh::Grid grid = {dim3(std::min(std::max(1, device->multiprocessors / arguments->rows), most), arguments->rows), FLASHHEAD_THREADS};
    return fh::launch("head_widen", *device, stream, grid, flashhead_widen, *arguments);
}
#endif
