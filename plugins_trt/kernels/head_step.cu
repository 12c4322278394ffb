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
#include "head_step.h"

// Loops are unrolled only where it pays: a step runs most instructions once.

typedef unsigned long long u64;

__device__ __forceinline__ float from16(unsigned bits, bool bf16) {
    if (bf16) return __uint_as_float(bits << 16);
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)bits));
    return value;
}

// Floats as unsigned numbers of the same order.
__device__ __forceinline__ unsigned ordered(float value) {
    const unsigned bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float unordered(unsigned key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

__device__ __forceinline__ u64 load_relaxed(const u64* address) {
    u64 value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

// 16 bytes from global to shared memory, past the L1 cache, without waiting.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}

// Waits for the thread's own copies; a block's barrier must follow before others read them.
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// One row's barrier among its blocks: a counter that only grows until the last block of the step clears it.
__device__ __forceinline__ void arrive(unsigned* counter) {
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ __forceinline__ void wait(const unsigned* counter, unsigned target) {
    if (threadIdx.x == 0) {
        unsigned seen;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        } while (seen < target);
    }
    __syncthreads();
}

// The block's sum, in a tree fixed by the block's size; `scratch` [16] float.
__device__ float block_sum(float value, float* scratch) {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = value;
    __syncthreads();
    float total = 0;
#pragma unroll 1
    for (int i = 0; i < FLASHHEAD_THREADS / 32; i++) total += scratch[i];
    return total;
}

// The warp's largest key, in every lane.
__device__ __forceinline__ u64 warp_max(u64 key) {
    const unsigned high = __reduce_max_sync(~0u, (unsigned)(key >> 32));
    const unsigned low = __reduce_max_sync(~0u, (unsigned)(key >> 32) == high ? (unsigned)key : 0u);
    return (u64)high << 32 | low;
}

__device__ __forceinline__ u64 block_max(u64 key, u64* scratch) {
    key = warp_max(key);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = key;
    __syncthreads();
    return warp_max(scratch[threadIdx.x & 15]);
}

// What a row's blocks share.
struct RowState {
    unsigned counter, candidates, epoch;  // arrivals of this step; rows scored exactly so far; steps made
};

// What a block tells the others at the end of a phase, in one store of 16 bytes: nothing else must be visible with it, so
// no fence is needed. A message is there when its tag is that of the step.
struct Message {
    u64 best;   // ordered score << 32 | ~number
    u64 items;  // tag << 40 (the low 24 bits of the step's epoch) | count of 20 bits | count of 20 bits
                // only the message after a cap is not written at every step; it would be taken for a new one 2^24 steps later
};

__device__ __forceinline__ void post(Message* place, u64 best, unsigned first, unsigned second, unsigned tag) {
    const u64 items = (u64)tag << 40 | (u64)first << 20 | second;
    asm volatile("{ .reg .b128 both; mov.b128 both, {%1, %2}; st.relaxed.gpu.global.b128 [%0], both; }" ::"l"(place), "l"(best), "l"(items) : "memory");
}

struct Collected {
    u64 best;
    unsigned first, second;
};

// Waits for a phase's message of every block: the largest key and the sums of both counts, in every thread.
__device__ __forceinline__ Collected collect(const Message* places, int blocks, unsigned tag, Collected* scratch) {
    Collected mine = {0, 0, 0};
    const int warps = (min(blocks, FLASHHEAD_THREADS) + 31) / 32;
#pragma unroll 1
    for (int i = threadIdx.x; i < blocks; i += FLASHHEAD_THREADS) {
        u64 best, items;
        do {
            asm volatile("{ .reg .b128 both; ld.relaxed.gpu.global.b128 both, [%2]; mov.b128 {%0, %1}, both; }"
                         : "=l"(best), "=l"(items)
                         : "l"(places + i)
                         : "memory");
        } while ((unsigned)(items >> 40) != tag);
        mine.best = best > mine.best ? best : mine.best;
        mine.first += (unsigned)(items >> 20) & 0xfffff, mine.second += (unsigned)items & 0xfffff;
    }
    if ((threadIdx.x >> 5) < warps) {
        mine.best = warp_max(mine.best);
        mine.first = __reduce_add_sync(~0u, mine.first), mine.second = __reduce_add_sync(~0u, mine.second);
        if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = mine;
    }
    __syncthreads();
    Collected all = {0, 0, 0};
#pragma unroll 1
    for (int w = 0; w < warps; w++) {
        all.best = scratch[w].best > all.best ? scratch[w].best : all.best;
        all.first += scratch[w].first, all.second += scratch[w].second;
    }
    __syncthreads();
    return all;
}

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

// Eight fields of four bits times x, centred: a field is put into the mantissa of 2^23 at its own place, which takes three
// operations a weight; x carries the place's power of two (see `rotate`).
__device__ __forceinline__ float field(unsigned word, unsigned mask, float centre, float x, float sum) {
    return fmaf(__uint_as_float(0x4b000000u | (word & mask)) - centre, x, sum);
}

__device__ __forceinline__ float eight_fields(unsigned word, const float4& low, const float4& high, float sum) {
    const unsigned up = word << 4, down = word >> 16;
    sum = field(up, 0xf0u, 8388608.f + 7.5f * 16, low.x, sum);
    sum = field(word, 0xf0u, 8388608.f + 7.5f * 16, low.y, sum);
    sum = field(word, 0xf00u, 8388608.f + 7.5f * 256, low.z, sum);
    sum = field(word, 0xf000u, 8388608.f + 7.5f * 4096, low.w, sum);
    sum = field(word, 0xf0000u, 8388608.f + 7.5f * 65536, high.x, sum);
    sum = field(down, 0xf0u, 8388608.f + 7.5f * 16, high.y, sum);
    sum = field(down, 0xf00u, 8388608.f + 7.5f * 256, high.z, sum);
    return field(down, 0xf000u, 8388608.f + 7.5f * 4096, high.w, sum);
}

// z of the block's chunks of rotated coordinates, and what they add to the tables of every product code; returns the
// power of two by which the tables' whole numbers are scaled, the same in every block.
__device__ int rotate(const FlashHeadArguments& a, int row, int block, unsigned char* shared, long long* tables, float* z_out) {
    const FlashHeadLayout& L = a.layout;
    const int octets = L.hidden_size / 8, segments = (octets + 31) / 32, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int first = L.chunks * block / L.blocks, end = L.chunks * (block + 1) / L.blocks;
    const uint4* rotation = (const uint4*)(a.image + L.rotation_at);
    float4* x_low = (float4*)(shared + L.shared_x);
    float4* x_high = x_low + octets;
    float4* state = (float4*)(shared + L.shared_state);
    float4* partial = (float4*)(shared + L.shared_work);                                   // [batch chunks][segments]
    float* z_own = (float*)(partial + FLASHHEAD_BATCH_CHUNKS * segments);                   // [batch chunks * 4]
    float4* columns = (float4*)(z_own + 4 * FLASHHEAD_BATCH_CHUNKS);                         // [tables][batch chunks * 4]
    uint4* books = (uint4*)(columns + FLASHHEAD_MAX_TABLES * 4 * FLASHHEAD_BATCH_CHUNKS);    // [tables][batch chunks * 64]
    __shared__ float scratch[16];
    float scale = 0;
    int shift = 0;

    int begin = first;
    do {
        const int chunks = max(0, min(FLASHHEAD_BATCH_CHUNKS, end - begin)), tasks = chunks * segments;
        // all loads first, none waits for another: two tasks' fields of the rotation, the codebooks' columns, the state
        uint4 fields[2];
        for (int i = 0; i < 2; i++) {
            const int task = warp + 16 * i, octet = task % segments * 32 + lane;
            if (task < tasks && octet < octets) fields[i] = __ldcs(&rotation[(size_t)(begin + task / segments) * octets + octet]);
        }
        int2 column = {-1, 0};
        if (threadIdx.x < 4 * chunks) column = __ldg((const int2*)(a.image + L.virtual_at) + 4 * begin + threadIdx.x);
#pragma unroll 1
        for (int t = 0; t < L.tables; t++) {
            const FlashHeadTable& table = L.table[t];
            const int c = begin + (threadIdx.x >> 6), i = threadIdx.x & 63;  // 64 threads a chunk: 16 bytes each, in wide chunks
            const bool wide = c < table.wide_chunks;
            if (c < min(begin + chunks, table.chunks) && i < (wide ? 64 : 32))
                copy_async(books + (t * FLASHHEAD_BATCH_CHUNKS + (threadIdx.x >> 6)) * 64 + i,
                           (const uint4*)(a.image + table.book_at) + (c + min(c, table.wide_chunks)) * 32 + i);
            if (threadIdx.x >= 480 && threadIdx.x - 480 < 4 * chunks)
                copy_async(columns + t * 4 * FLASHHEAD_BATCH_CHUNKS + threadIdx.x - 480,
                           (const float4*)(a.image + table.columns_at) + 4 * begin + threadIdx.x - 480);
        }
        if (begin == first) {
            const unsigned short* hidden = (const unsigned short*)a.hidden + (size_t)row * L.hidden_size;
            const unsigned short* row_scale = (const unsigned short*)(a.image + L.row_scale_at);
            const float* mean = (const float*)(a.image + L.mean_at);
            float size = 0;
#pragma unroll 1
            for (int i = threadIdx.x; i < octets * 2; i += FLASHHEAD_THREADS) {
                const uint2 h = __ldg((const uint2*)hidden + i), s = __ldg((const uint2*)row_scale + i);
                const float4 m = __ldg((const float4*)mean + i);
                const float4 raw = {from16(h.x & 0xffff, a.hidden_bf16), from16(h.x >> 16, a.hidden_bf16), from16(h.y & 0xffff, a.hidden_bf16),
                                    from16(h.y >> 16, a.hidden_bf16)};
                state[(i & 1) * octets + (i >> 1)] = raw;
                float4 x;
                x.x = from16(s.x & 0xffff, false) * (raw.x - m.x), x.y = from16(s.x >> 16, false) * (raw.y - m.y);
                x.z = from16(s.y & 0xffff, false) * (raw.z - m.z), x.w = from16(s.y >> 16, false) * (raw.w - m.w);
                size += fabsf(x.x) + fabsf(x.y) + fabsf(x.z) + fabsf(x.w);
                // the places of eight_fields: 1 1 2 3 and 4 1 2 3 fields of four bits
                const bool upper = i & 1;
                x.x *= upper ? 1.f / 65536 : 1.f / 16, x.y *= 1.f / 16, x.z *= 1.f / 256, x.w *= 1.f / 4096;
                (upper ? x_high : x_low)[i >> 1] = x;
            }
            size = block_sum(size, scratch);
            // sums stay whole numbers from here on: their scale is a power of two that no sum can overflow
            shift = min(120, 60 - ilogbf(fmaxf(size * L.bound_slope + L.bound_base, 1e-30f)));
            scale = ldexpf(1.f, shift);
        }
        wait_copies();
        __syncthreads();
#pragma unroll 1
        for (int task = warp, i = 0; task < tasks; task += 16, i++) {
            const int octet = task % segments * 32 + lane;
            float4 sum = {0, 0, 0, 0};
            if (octet < octets) {
                const uint4 w = i == 0 ? fields[0] : i == 1 ? fields[1] : __ldcs(&rotation[(size_t)(begin + task / segments) * octets + octet]);
                const float4 low = x_low[octet], high = x_high[octet];
                sum.x = eight_fields(w.x, low, high, sum.x), sum.y = eight_fields(w.y, low, high, sum.y);
                sum.z = eight_fields(w.z, low, high, sum.z), sum.w = eight_fields(w.w, low, high, sum.w);
            }
            // four sums over the warp in six exchanges: every lane keeps the half that its number names, then the rest is summed
            const bool second = lane & 16, odd = lane & 8;
            const float keep_a = (second ? sum.z : sum.x) + __shfl_xor_sync(~0u, second ? sum.x : sum.z, 16);
            const float keep_b = (second ? sum.w : sum.y) + __shfl_xor_sync(~0u, second ? sum.y : sum.w, 16);
            float kept = (odd ? keep_b : keep_a) + __shfl_xor_sync(~0u, odd ? keep_a : keep_b, 8);
            for (int step = 4; step; step >>= 1) kept += __shfl_xor_sync(~0u, kept, step);
            if ((lane & 7) == 0) ((float*)&partial[task])[(second ? 2 : 0) + odd] = kept;
        }
        __syncthreads();
        if (threadIdx.x < 4 * FLASHHEAD_BATCH_CHUNKS) {
            const int v = threadIdx.x;
            float value = 0;
            if (v < 4 * chunks)
#pragma unroll 1
                for (int s = 0; s < segments; s++) value += ((const float*)&partial[v / 4 * segments + s])[v & 3];
            value *= __int_as_float(column.y);
            // a column of more than four bits is two virtual ones, side by side in one chunk
            const int next = __shfl_down_sync(0xffffu, column.x, 1), last = __shfl_up_sync(0xffffu, column.x, 1);
            const float upper = __shfl_down_sync(0xffffu, value, 1);
            if ((v & 3) < 3 && next == column.x) value += upper;
            if (column.x == 0) value = 1;
            z_own[v] = value;
            if (column.x >= 0 && ((v & 3) == 0 || last != column.x)) __stcg(&z_out[column.x], value);
        }
        __syncthreads();
        const int entry = threadIdx.x & 255, half = threadIdx.x >> 8, middle = (chunks + 1) / 2;
#pragma unroll 1
        for (int t = 0; t < L.tables; t++) {
            const FlashHeadTable& table = L.table[t];
            const int stop = min(half ? chunks : middle, table.chunks - begin);
            long long sum = 0;
            int part = -1;
#pragma unroll 1
            for (int c = half ? middle : 0; c < stop; c++) {
                const unsigned char* book = (const unsigned char*)&books[(t * FLASHHEAD_BATCH_CHUNKS + c) * 64];
                const bool wide = begin + c < table.wide_chunks;
                float run = 0;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float4 info = columns[t * 4 * FLASHHEAD_BATCH_CHUNKS + 4 * c + i];  // {step, centre, part}
                    const int own = __float_as_int(info.z);
                    if (own < 0) continue;
                    if (own != part) {
                        if (part >= 0) atomicAdd((u64*)&tables[(table.first_part + part) * 256 + entry], (u64)(sum + __float2ll_rn(run * scale)));
                        sum = 0, run = 0, part = own;
                    }
                    const unsigned field = wide ? book[256 * i + entry] : book[128 * i + (entry >> 1)] >> (4 * (entry & 1)) & 15;
                    run = fmaf(((float)field - info.y) * info.x, z_own[4 * c + i], run);
                }
                sum += __float2ll_rn(run * scale);
            }
            if (part >= 0) atomicAdd((u64*)&tables[(table.first_part + part) * 256 + entry], (u64)sum);
        }
        __syncthreads();
        begin += FLASHHEAD_BATCH_CHUNKS;
    } while (begin < end);
    return shift;
}

// A row of 16-bit numbers times the state in shared memory (two planes of float4), summed by a warp in a tree fixed by d.
template <bool bf16>
__device__ __forceinline__ float product(const uint4* row, const float4* low, const float4* high, int octets) {
    float sum = 0;
#pragma unroll 4
    for (int i = threadIdx.x & 31; i < octets; i += 32) {
        const uint4 w = __ldcs(row + i);
        const float4 x = low[i], y = high[i];
        sum = fmaf(from16(w.x & 0xffff, bf16), x.x, sum), sum = fmaf(from16(w.x >> 16, bf16), x.y, sum);
        sum = fmaf(from16(w.y & 0xffff, bf16), x.z, sum), sum = fmaf(from16(w.y >> 16, bf16), x.w, sum);
        sum = fmaf(from16(w.z & 0xffff, bf16), y.x, sum), sum = fmaf(from16(w.z >> 16, bf16), y.y, sum);
        sum = fmaf(from16(w.w & 0xffff, bf16), y.z, sum), sum = fmaf(from16(w.w >> 16, bf16), y.w, sum);
    }
    for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
}

// The state itself, as float, where `product` reads it.
__device__ void load_state(const FlashHeadArguments& a, int row, unsigned char* shared) {
    const int octets = a.layout.hidden_size / 8;
    float4* low = (float4*)(shared + a.layout.shared_state);
    const uint4* hidden = (const uint4*)((const unsigned short*)a.hidden + (size_t)row * a.layout.hidden_size);
#pragma unroll 1
    for (int i = threadIdx.x; i < octets; i += FLASHHEAD_THREADS) {
        const uint4 h = hidden[i];
        const bool bf16 = a.hidden_bf16;
        low[i] = {from16(h.x & 0xffff, bf16), from16(h.x >> 16, bf16), from16(h.y & 0xffff, bf16), from16(h.y >> 16, bf16)};
        low[octets + i] = {from16(h.z & 0xffff, bf16), from16(h.z >> 16, bf16), from16(h.w & 0xffff, bf16), from16(h.w >> 16, bf16)};
    }
}

// The tables of the row codes for this state: of a product code the sums that `rotate` made, of a bits code the sums of
// every four of the weighed bits. A table of 16 floats has no bank conflicts, whatever entries a warp looks up.
__device__ void make_tables(const FlashHeadArguments& a, const long long* sums, float unscale, const float4* weighed, unsigned char* shared) {
#pragma unroll 1
    for (int s = 0; s < a.layout.stages; s++) {
        const FlashHeadStage& stage = a.layout.stage[s];
        float* table = (float*)(shared + stage.shared_table);
        if (stage.table < 0) {
#pragma unroll 2
            for (int i = threadIdx.x; i < stage.words * 128; i += FLASHHEAD_THREADS) {
                const float4 bits = weighed[i >> 4];
                table[i] = ((i & 1 ? bits.x : -bits.x) + (i & 2 ? bits.y : -bits.y)) + ((i & 4 ? bits.z : -bits.z) + (i & 8 ? bits.w : -bits.w));
            }
            weighed += stage.words * 8;
            continue;
        }
        const FlashHeadTable& made = a.layout.table[stage.table];
        const unsigned char* bytes = a.image + made.bytes_at;
        const bool whole = made.parts == stage.bytes;  // no group is in several parts
#pragma unroll 4
        for (int i = threadIdx.x; i < made.parts * 256; i += FLASHHEAD_THREADS) {
            const int part = i >> 8, byte = whole ? part : __ldg(bytes + part);
            if (!whole && part && __ldg(bytes + part - 1) == byte) continue;  // summed with the first part of its byte
            long long sum = sums[made.first_part * 256 + i];
#pragma unroll 1
            for (int p = part + 1; !whole && p < made.parts && __ldg(bytes + p) == byte; p++) sum += sums[(made.first_part + p) * 256 + (i & 255)];
            table[byte * 256 + (i & 255)] = (float)sum * unscale;
        }
    }
}

__device__ __forceinline__ u64 item_key(float score, unsigned number) { return (u64)ordered(score) << 32 | (0xffffffffu - number); }

// Adds a code's score to items [0, n), with their own errors in the upper eight bits of the slot; returns the thread's best key.
__device__ u64 score_items(const FlashHeadArguments& a, const FlashHeadStage& stage, uint2* items, int n, unsigned char* shared) {
    const float* table = (const float*)(shared + stage.shared_table);
    const int lanes = stage.lanes, own = threadIdx.x & (lanes - 1), step = FLASHHEAD_THREADS / lanes;
    constexpr int WORDS = 4;  // loads of a row in flight before the first look-up
    u64 best = 0;
#pragma unroll 1
    for (int base = 0; base < n; base += step) {
        const int i = base + threadIdx.x / lanes;
        unsigned word[WORDS], scale = 0, slot = 0, error = 0;
        const unsigned* record = nullptr;
        if (i < n) {
            slot = items[i].x & 0xffffff;
            record = (const unsigned*)(a.image + stage.rows_at + (size_t)slot * stage.stride);
#pragma unroll
            for (int w = 0; w < WORDS; w++)
                if (own + w * lanes < stage.words) word[w] = __ldg(record + own + w * lanes);
            error = __ldg(a.image + stage.error_at + (size_t)slot * stage.error_stride);
            if (stage.table < 0) scale = __ldg((const unsigned short*)record + stage.bytes / 2);
        }
        float sum = 0;
        if (i < n && stage.table >= 0) {
#pragma unroll
            for (int b = 0; b < 4 * WORDS; b++)
                if (b < stage.bytes) sum += table[b * 256 + (word[b / 4] >> 8 * (b & 3) & 255)];
#pragma unroll 1
            for (int b = 4 * WORDS; b < stage.bytes; b++) sum += table[b * 256 + __ldg((const unsigned char*)record + b)];
        } else if (i < n) {
            const auto look_up = [&](int w, unsigned at) {
                const unsigned turned = __funnelshift_r(at, at, 4 * (own & 7));  // lanes of a row start at different tables: fewer conflicts
#pragma unroll
                for (int b = 0; b < 8; b++) sum += table[(8 * w + ((b + own) & 7)) * 16 + (turned >> 4 * b & 15)];
            };
#pragma unroll
            for (int w = 0; w < WORDS; w++)
                if (own + w * lanes < stage.words) look_up(own + w * lanes, word[w]);
#pragma unroll 1
            for (int w = own + WORDS * lanes; w < stage.words; w += lanes) look_up(w, __ldg(record + w));
        }
#pragma unroll 1
        for (int way = lanes >> 1; way; way >>= 1) sum += __shfl_xor_sync(~0u, sum, way);
        __syncwarp();  // all lanes of a row have read its item: a shuffle does not order memory
        if (i < n && own == 0) {
            const float score = __uint_as_float(items[i].y) + (stage.table >= 0 ? sum : sum * from16(scale, false));
            items[i] = make_uint2(slot | error << 24, __float_as_uint(score));
            const u64 key = item_key(score, slot);
            best = key > best ? key : best;
        }
    }
    return best;
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
