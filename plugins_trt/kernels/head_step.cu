// head_step.cu: one decode step of a FlashHead: rotate, probe, gate, cascade of row codes, exact rows, greedy token.
//
//   hidden   in   [N, d] fp16 or bf16, 16-byte aligned, d % 8 == 0
//   weight   in   [V or more, d] fp16 or bf16, 16-byte aligned: the model's own matrix; bias [V or more] or null
//   image    in   the packed index (head_step.h)
//   token    out  [N] int64: largest exact logit, the smaller id on ties
//   counts   out  [N, 2 + stages] int64: clusters opened, slots scored by each code, rows scored exactly
//   capped   out  [N] uint8; ids [N, C] int64 and logits [N, C] fp32: the rows scored exactly, in no order
//
// Judge: flashhead_edge/reference.py. Launch: grid = (groups * layout.blocks), 512 threads, every block resident at once
// (cooperative); group g takes the rows g, g + groups, ...; a row never looks at its neighbours.
//
// Contract. For equal hidden states the token, the counts and the set of candidates do not depend on the grid, the
// batch or its order. A coordinate is summed by one block in a tree fixed by d. Sums of products with codebooks are
// added as 64-bit whole numbers, whose order is free. An item is summed by a number of lanes fixed by its code. Ties go
// to the smaller number; a cap keeps the items of largest (gap, number) key, found by counting, never by arrival.
// Rounding. Sums are float32 of exact products: with u = 2^-24, a coordinate of d terms is wrong by at most
// (d/32 + 12) u sum|terms|, an item's score by (bits/lanes + 16) u sum|terms| beside what its coordinates carry over, an
// exact logit by (d/32 + 7) u sum|terms|; a gap by 4 u more, relatively, and the state's unit by 16 u. The token is the
// reference's where neither the winner's lead nor its distance to a margin is within that.
//
// One kernel, because at these sizes launches and grid barriers are the cost. After the rotation no block needs another's
// data but the best score so far and a few counts: they travel in one message of 16 bytes a block and phase, tagged with
// the step, without fences or atomics (`post`, `collect`). A block owns every blocks-th cluster and keeps its items to the
// end. A message also says how many items at most will pass, so a cap costs nothing until it may cut.
// Floor: 4.39 MB at V 128,256, d 2,048, clusters of 32: 1.8 us at 2.43 TB/s (H100). Aimed at 12 us, measured 37.6 (batch 1):
// an exchange between all blocks takes 1.7 us where 0.7 was predicted, and there are seven. Verdict: 5.9x the dense head, not
// the 13x that was wanted; docs/kernels.md says where the time goes. Without codes (the published head) 2.0x the floor.
#include "head_codes.cuh"
#include "head_gates.cuh"
#include "head_rotate.cuh"

// Loops are unrolled only where it pays: a step runs most instructions once.

extern "C" __global__ void __launch_bounds__(FLASHHEAD_THREADS, 1) flashhead_step(const __grid_constant__ FlashHeadArguments a) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ u64 keys[16];
    __shared__ Collected collected[16];
    __shared__ unsigned numbers[32];
    __shared__ unsigned count, within;
    const FlashHeadLayout& L = a.layout;
    const int blocks = L.blocks, block = blockIdx.x % blocks, groups = gridDim.x / blocks;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, octets = L.hidden_size / 8, size = L.cluster_size;
    const int owned = (L.clusters - block + blocks - 1) / blocks;  // clusters block, block + blocks, ...
    const unsigned char* filled = a.image + L.filled_at;
    float* z = (float*)(shared + L.shared_z);
    float* gaps = (float*)(shared + L.shared_clusters);
    unsigned* bins = (unsigned*)(shared + L.shared_work);
    const float4* state_low = (const float4*)(shared + L.shared_state);
    const float* inverse = (const float*)(shared + L.shared_small);  // [1 + stages][256] 1 / own error in logits: of the clusters, then of each code

    // the parameters lie in memory that no cache holds yet: ask for all of their lines at once, not one by one as they are met
#pragma unroll
    for (unsigned i = 0; i < sizeof(a) / 4; i += 16) asm volatile("" ::"r"(((const unsigned*)&a)[i]));
    // what every step reads, small and scattered, likewise
#pragma unroll 1
    for (unsigned i = (block * FLASHHEAD_THREADS + threadIdx.x) * 128; i < L.prefetch_bytes; i += blocks * FLASHHEAD_THREADS * 128)
        prefetch(a.image + L.prefetch_at + i);

#pragma unroll 1
    // and a line of every page of the image, so that a page's address is looked up before it is needed
    for (u64 i = threadIdx.x * (2ull << 20); i < L.image_bytes; i += FLASHHEAD_THREADS * (2ull << 20)) prefetch(a.image + i);

    for (int row = blockIdx.x / blocks; row < a.rows; row += groups) {
        unsigned char* work = a.workspace + (size_t)row * L.row_bytes;
        RowState* state = (RowState*)work;
        Message* messages = (Message*)(work + L.row_messages);
        long long* sums = (long long*)(work + L.row_tables);
        float* z_all = (float*)(work + L.row_z);
        u64* scores = (u64*)(work + L.row_scores);
        unsigned* histograms = (unsigned*)(work + L.row_histograms);
        uint2* items = L.row_items ? (uint2*)(work + L.row_items) + (size_t)block * 2 * L.capacity : (uint2*)(shared + L.shared_items);
        uint2* others = items + L.capacity;
        const unsigned epoch = __ldcg(&state->epoch) + 1, tag = epoch & 0xffffff;
        unsigned target = 0, passes_used = 0, opened = 0, scored_first = 0;
        bool cut = false;
        float inverse_unit = 1;

        // probe: {cluster | own error << 24, score} of the block's own clusters in `others`; every score is posted with the step's epoch
        const auto post_score = [&](int i, int k, unsigned error, float score) {
            others[i] = make_uint2(k | error << 24, __float_as_uint(score));
            const u64 both = (u64)epoch << 32 | __float_as_uint(score);
            asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(scores + k), "l"(both) : "memory");
        };
        u64 best = 0;
        if (L.chunks) {
            const float unscale = ldexpf(1.f, -rotate(a, row, block, shared, sums, z_all));
            arrive(&state->counter);
            const FlashHeadTable& made = L.table[0];
            const unsigned char* bytes = a.image + made.bytes_at;
            const int part = threadIdx.x & 15;
            const int first = block + (threadIdx.x >> 4) * blocks;
            unsigned code[3], error = 0;  // of the first round's cluster, before the sums are there
            if ((threadIdx.x >> 4) < owned) error = __ldg(a.image + L.cluster_error_at + first);
#pragma unroll
            for (int j = 0; j < 3; j++)
                if ((threadIdx.x >> 4) < owned && part + 16 * j < made.parts)
                    code[j] = __ldg(a.image + L.centroids_at + (size_t)first * L.centroid_stride + __ldg(bytes + part + 16 * j));
            // half of each bit's weight and its coordinate, and the errors
#pragma unroll 1
            for (int i = threadIdx.x; i < L.small_bytes / 16; i += FLASHHEAD_THREADS)
                copy_async(shared + L.shared_small + 16 * i, a.image + L.small_at + 16 * i);
            wait(&state->counter, target += blocks);
#pragma unroll 1
            for (int i = threadIdx.x; 4 * i < L.coordinates; i += FLASHHEAD_THREADS) copy_async(z + 4 * i, z_all + 4 * i);
#pragma unroll 1
            for (int base = 0; base < owned; base += FLASHHEAD_THREADS / 16) {
                const int i = base + (threadIdx.x >> 4), k = block + i * blocks;
                long long sum = 0;
                if (base == 0 && made.parts <= 48) {
#pragma unroll
                    for (int j = 0; j < 3; j++)
                        if (i < owned && part + 16 * j < made.parts) sum += sums[(part + 16 * j) * 256 + code[j]];
                } else if (i < owned) {
#pragma unroll 1
                    for (int p = part; p < made.parts; p += 16)
                        sum += sums[p * 256 + __ldg(a.image + L.centroids_at + (size_t)k * L.centroid_stride + __ldg(bytes + p))];
                }
                for (int step = 8; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
                if (i < owned && part == 0) {
                    const float score = (float)sum * unscale;
                    if (base) error = __ldg(a.image + L.cluster_error_at + k);
                    post_score(i, k, error, score);
                    const u64 key = item_key(score, k);
                    best = key > best ? key : best;
                }
            }
            if (L.stages) {
                best = block_max(best, keys);
                if (threadIdx.x == 0) post(messages + block, best, 0, 0, tag);
            }
            // while the others arrive: the state's unit, the tables of the row codes
            float square = 0;
            wait_copies();
            __syncthreads();
#pragma unroll 1
            for (int i = threadIdx.x; i < L.coordinates; i += FLASHHEAD_THREADS)
                if (i) square = fmaf(z[i], z[i], square);
            square = block_sum(square, (float*)numbers);
            if (L.state_power != 0) inverse_unit = exp2f(-0.5f * L.state_power * log2f(square / (L.coordinates - 1)));
            float* products = (float*)(shared + L.shared_products);
            const int2* weights = (const int2*)(inverse + 256 * (1 + L.stages));
#pragma unroll 1
            for (int i = threadIdx.x; i < L.bits; i += FLASHHEAD_THREADS) products[i] = __int_as_float(weights[i].x) * z[weights[i].y];
            __syncthreads();
            make_tables(a, sums, unscale, (const float4*)products, shared);
        } else {
            load_state(a, row, shared);
            __syncthreads();
#pragma unroll 1
            for (int i = warp; i < owned; i += 16) {
                const int k = block + i * blocks;
                const uint4* centroid = (const uint4*)(a.image + L.centroids_at) + (size_t)k * octets;
                if (i + 16 < owned)
#pragma unroll 1
                    for (int line = lane * 8; line < octets; line += 256) prefetch(centroid + (size_t)16 * blocks * octets + line);
                const float score = product<false>(centroid, state_low, state_low + octets, octets);
                if (lane == 0) post_score(i, k, 0, score);
            }
        }
        if (threadIdx.x == 0) count = within = 0;
        __syncthreads();

        // the probe's gate: a block keeps the slots of its own clusters. Where codes follow, the cap is looked at after the first
        // of them is scored: by then the number of opened clusters has come with the messages at no cost.
        const unsigned first_always = threadIdx.x < L.always ? __ldg((const unsigned*)(a.image + L.always_at) + threadIdx.x) : 0;
        u64 least = 1;
        float top = 0;
        if (L.stages) top = unordered((unsigned)(collect(messages, blocks, tag, collected).best >> 32));
        else least = select_clusters(a, scores, epoch, inverse_unit, gaps, bins, numbers, keys, opened, cut);
        const auto append = [&](uint2* list, bool wanted, uint2 item) {  // all lanes of a warp together
            const unsigned ballot = __ballot_sync(~0u, wanted);
            unsigned start = 0;
            if (lane == 0 && ballot) start = atomicAdd(&count, (unsigned)__popc(ballot));
            start = __shfl_sync(~0u, start, 0);
            if (wanted) list[start + __popc(ballot & ((1u << lane) - 1))] = item;
        };
        const auto is_open = [&](uint2 cluster) {
            if (L.stages == 0) return gate_key(gaps[cluster.x & 0xffffff], L.probe_margin, cluster.x & 0xffffff) >= least;
            return (top - __uint_as_float(cluster.y)) * (inverse[cluster.x >> 24] * inverse_unit) <= L.probe_margin;
        };
        int listed = owned;
        if (L.stages == 0) {  // every block knows all opened clusters: each takes every blocks-th of them
            const int span = (L.clusters + FLASHHEAD_THREADS - 1) / FLASHHEAD_THREADS * 32;
            const auto passed = [&](int j) {
                return warp * span + j < L.clusters && gate_key(gaps[warp * span + j], L.probe_margin, warp * span + j) >= least;
            };
            unsigned own = 0, before = 0;
#pragma unroll 1
            for (int j = lane; j < span; j += 32) own += __popc(__ballot_sync(~0u, passed(j)));
            if (lane == 0) numbers[warp] = own;
            __syncthreads();
#pragma unroll 1
            for (int w = 0; w < warp; w++) before += numbers[w];
#pragma unroll 1
            for (int j = lane; j < span; j += 32) {
                const unsigned ballot = __ballot_sync(~0u, passed(j)), ordinal = before + __popc(ballot & ((1u << lane) - 1));
                before += __popc(ballot);
                if ((ballot >> lane & 1) && ordinal % blocks == block) others[ordinal / blocks] = make_uint2(warp * span + j, 0);
            }
            listed = (opened + blocks - 1 - block) / blocks;
            __syncthreads();
        }
#pragma unroll 1
        for (int i = warp; i < listed; i += 16) {
            const uint2 cluster = others[i];
            if (!is_open(cluster)) continue;
            const unsigned k = cluster.x & 0xffffff, tokens = L.least_filled == size ? size : __ldg(filled + k);
            unsigned start = 0;
            if (lane == 0) start = atomicAdd(&count, tokens), atomicAdd(&within, 1u);
            start = __shfl_sync(~0u, start, 0);
#pragma unroll 1
            for (unsigned place = lane; place < tokens; place += 32) items[start + place] = make_uint2(k * size + place, cluster.y);
        }
#pragma unroll 1
        for (int base = 0; base < L.always; base += FLASHHEAD_THREADS) {
            const int i = base + threadIdx.x;
            const unsigned slot = base == 0 ? first_always : i < L.always ? __ldg((const unsigned*)(a.image + L.always_at) + i) : 0, k = slot / size;
            const bool mine = i < L.always && k % blocks == block;
            const uint2 cluster = mine ? (L.stages ? others[k / blocks] : make_uint2(k, 0)) : make_uint2(0, 0);
            append(items, mine && !is_open(cluster), make_uint2(slot, cluster.y));
        }
        __syncthreads();
        unsigned n = count;
        const unsigned opened_here = within;
        Collected all = {0, 0, 0};

        // the cascade: a block keeps its items to the end
#pragma unroll 1
        for (int s = 0; s < L.stages; s++) {
            const FlashHeadStage& stage = L.stage[s];
            const bool scout = s > 0;  // the best item so far, scored in every block: it makes the first count of who passes a sharp one
            if (scout && threadIdx.x == 0) items[n] = make_uint2(0xffffffffu - (unsigned)all.best, __float_as_uint(unordered((unsigned)(all.best >> 32))));
            __syncthreads();
            best = score_items(a, stage, items, n + scout, shared);
            const auto gap_of = [&](uint2 item, float limit) {
                return (limit - __uint_as_float(item.y)) * (inverse[256 * (s + 1) + (item.x >> 24)] * inverse_unit);
            };
#pragma unroll 1
            for (int again = 0;; again++) {
                best = block_max(best, keys);
                if (threadIdx.x == 0) within = count = 0;
                __syncthreads();
                const float nearly = unordered((unsigned)(best >> 32));
#pragma unroll 1
                for (unsigned base = 0; base < n; base += FLASHHEAD_THREADS) {
                    const unsigned i = base + threadIdx.x;
                    const bool passes = i < n && gap_of(items[i], nearly) <= stage.margin;
                    if (passes) {  // it will most likely be scored next: its row may come while the messages travel
                        const unsigned slot = items[i].x & 0xffffff;
                        if (s + 1 < L.stages) {
                            const FlashHeadStage& next = L.stage[s + 1];
                            const unsigned char* record = a.image + next.rows_at + (size_t)slot * next.stride;
                            prefetch(record);
                            if (next.stride > 32) prefetch(record + next.stride - 4);
                            if (next.error_stride == 1) prefetch(a.image + next.error_at + slot);
                        } else {
                            prefetch(a.image + L.token_table_at + 4 * (size_t)slot);
                        }
                    }
                    const unsigned ballot = __ballot_sync(~0u, passes);
                    if (lane == 0 && ballot) atomicAdd(&within, (unsigned)__popc(ballot));
                }
                __syncthreads();
                Message* phase = messages + (again ? L.stages + 1 : s + 1) * blocks;
                if (threadIdx.x == 0) post(phase + block, best, within, s ? n : opened_here, tag);
                all = collect(phase, blocks, tag, collected);
                if (s && threadIdx.x == 0 && block == 0) a.counts[(size_t)row * (2 + L.stages) + 1 + s] = all.second;
                if (s || again) break;
                opened = all.second;
                if (opened <= (unsigned)L.probe_cap) break;
                // the probe's cap cuts: items of the clusters beyond it go, and the first code's best is found again
                least = select_clusters(a, scores, epoch, inverse_unit, gaps, bins, numbers, keys, opened, cut);
                best = 0;
#pragma unroll 1
                for (unsigned base = 0; base < n; base += FLASHHEAD_THREADS) {
                    const unsigned i = base + threadIdx.x;
                    const uint2 item = i < n ? items[i] : make_uint2(0, 0);
                    const unsigned slot = item.x & 0xffffff, k = slot / size;
                    bool stays = i < n && gate_key(gaps[k], L.probe_margin, k) >= least;
#pragma unroll 1
                    for (int j = 0; i < n && !stays && j < L.always; j++) stays = __ldg((const unsigned*)(a.image + L.always_at) + j) == slot;
                    append(others, stays, item);
                    if (stays) {
                        const u64 key = item_key(__uint_as_float(item.y), slot);
                        best = key > best ? key : best;
                    }
                }
                __syncthreads();
                n = count;
                uint2* swap = items;
                items = others, others = swap;
            }
            if (s == 0) scored_first = n;
            if (s == 0)  // all blocks have made their tables of these
#pragma unroll 1
                for (int i = block * FLASHHEAD_THREADS + threadIdx.x; i < L.parts * 256; i += blocks * FLASHHEAD_THREADS) sums[i] = 0;
            const float limit = unordered((unsigned)(all.best >> 32));
            const auto key_of = [&](int i) { return gate_key(gap_of(items[i], limit), stage.margin, items[i].x & 0xffffff); };
            if (threadIdx.x == 0) count = 0;
            least = 1;
            if (all.first > (unsigned)stage.cap) {
                int passes;
                least = threshold(key_of, n, stage.cap, bins, numbers, histograms + s * FLASHHEAD_PASSES * FLASHHEAD_HISTOGRAM, state, target, blocks, passes);
                passes_used |= (unsigned)passes << 4 * s;
                if (least) cut = true;
                else least = 1;
            }
            __syncthreads();
#pragma unroll 1
            for (unsigned base = 0; base < n; base += FLASHHEAD_THREADS) {
                const unsigned i = base + threadIdx.x;
                const uint2 item = i < n ? items[i] : make_uint2(0, 0);
                append(others, i < n && key_of(i) >= least, make_uint2(item.x & 0xffffff, item.y));
            }
            __syncthreads();
            n = count;
            uint2* swap = items;
            items = others, others = swap;
        }
        if (L.stages == 0)
#pragma unroll 1
            for (int i = block * FLASHHEAD_THREADS + threadIdx.x; i < L.parts * 256; i += blocks * FLASHHEAD_THREADS) sums[i] = 0;

        // exact rows, a warp each
        unsigned start = 0;
        if (threadIdx.x == 0 && n) start = atomicAdd(&state->candidates, n);
        best = 0;
#pragma unroll 1
        for (unsigned i = warp; i < n; i += 16) {
            const unsigned* tokens = (const unsigned*)(a.image + L.token_table_at);
            const unsigned token = __ldg(tokens + items[i].x);
            if (i + 16 < n) {
                const uint4* next = (const uint4*)a.weight + (size_t)__ldg(tokens + items[i + 16].x) * octets;
#pragma unroll 1
                for (int line = lane * 8; line < octets; line += 256) prefetch(next + line);
            }
            const uint4* weight = (const uint4*)a.weight + (size_t)token * octets;
            float logit = a.weight_bf16 ? product<true>(weight, state_low, state_low + octets, octets)
                                        : product<false>(weight, state_low, state_low + octets, octets);
            if (a.bias) logit += from16(((const unsigned short*)a.bias)[token], a.weight_bf16);
            logit += 0.f;  // -0 becomes 0
            if (lane == 0) others[i] = make_uint2(token, __float_as_uint(logit));
            const u64 key = item_key(logit, token);
            best = key > best ? key : best;
        }
        best = block_max(best, keys);
        Message* phase = messages + (L.stages + 2) * blocks;
        if (threadIdx.x == 0) {
            post(phase + block, best, scored_first, n, tag);
            numbers[0] = start;
        }
        __syncthreads();
#pragma unroll 1
        for (unsigned i = threadIdx.x; i < n; i += FLASHHEAD_THREADS) {
            const size_t place = (size_t)row * L.candidates + numbers[0] + i;
            a.ids[place] = others[i].x, a.logits[place] = __uint_as_float(others[i].y);
        }
        if (block) continue;
        // the row's first block writes the result, and leaves the workspace ready for the next step
        all = collect(phase, blocks, tag, collected);
        if (threadIdx.x == 0) {
            long long* counts = a.counts + (size_t)row * (2 + L.stages);
            a.token[row] = 0xffffffffu - (unsigned)all.best;
            counts[0] = opened, counts[1 + L.stages] = all.second;
            if (L.stages) counts[1] = all.first;
            a.capped[row] = cut;
            state->counter = state->candidates = 0;
            state->epoch = epoch;
        }
#pragma unroll 1
        for (int s = 0; s < L.stages; s++)
#pragma unroll 1
            for (int i = threadIdx.x; i < (int)(passes_used >> 4 * s & 15) * FLASHHEAD_HISTOGRAM; i += FLASHHEAD_THREADS)
                histograms[s * FLASHHEAD_PASSES * FLASHHEAD_HISTOGRAM + i] = 0;
    }
}
