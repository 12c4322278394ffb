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
// One kernel, because at these sizes launches and grid barriers are the cost: 2 + stages barriers (one counter each
// row), and two or three more where a cap may have been hit. Tables of the next codes are made while a barrier waits.
#include "head_step.h"

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
    for (int i = 0; i < FLASHHEAD_THREADS / 32; i++) total += scratch[i];
    return total;
}

// The warp's largest key, in every lane.
__device__ __forceinline__ u64 warp_max(u64 key) {
    const unsigned high = __reduce_max_sync(~0u, (unsigned)(key >> 32));
    const unsigned low = __reduce_max_sync(~0u, (unsigned)(key >> 32) == high ? (unsigned)key : 0u);
    return (u64)high << 32 | low;
}

__device__ u64 block_max(u64 key, u64* scratch) {
    key = warp_max(key);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = key;
    __syncthreads();
    return warp_max(scratch[threadIdx.x & 15]);
}

// What a row's blocks share, zero between steps.
struct RowState {
    u64 best[FLASHHEAD_MAX_STAGES + 2];         // of the probe, each code and the exact rows: ordered score, then ~number
    unsigned counter, arrived, candidates;
    unsigned within[FLASHHEAD_MAX_STAGES];      // at least as many items as lie within each margin
    unsigned counts[FLASHHEAD_MAX_STAGES + 1];  // items scored by each code, rows scored exactly
};

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
__device__ u64 threshold(Keys key_of, int n, unsigned cap, unsigned* bins, unsigned* scratch, unsigned* histograms, RowState* state, unsigned& target, unsigned blocks,
                         int& passes) {
    u64 low = 1;
    int width = 24 + FLASHHEAD_MAX_NUMBER;
    unsigned remaining = cap;
    for (passes = 0; passes < FLASHHEAD_PASSES;) {
        const int shift = width > 11 ? width - 11 : 0;
        for (int i = threadIdx.x; i <= FLASHHEAD_BINS; i += FLASHHEAD_THREADS) bins[i] = 0;
        __syncthreads();
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
            for (int i = threadIdx.x; i <= FLASHHEAD_BINS; i += FLASHHEAD_THREADS)
                if (bins[i]) atomicAdd(&shared_bins[i], bins[i]);
            arrive(&state->counter);
            wait(&state->counter, target += blocks);
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
    const int first = (long long)L.chunks * block / L.blocks, end = (long long)L.chunks * (block + 1) / L.blocks;
    const uint4* rotation = (const uint4*)(a.image + L.rotation_at);
    float4* x_low = (float4*)(shared + L.shared_x);
    float4* x_high = x_low + octets;
    float4* partial = (float4*)(shared + L.shared_work);                                   // [batch chunks][segments]
    float* z_own = (float*)(partial + FLASHHEAD_BATCH_CHUNKS * segments);                   // [batch chunks * 4]
    int4* columns = (int4*)(z_own + 4 * FLASHHEAD_BATCH_CHUNKS);                             // [tables][batch chunks * 4]
    unsigned char* books = (unsigned char*)(columns + FLASHHEAD_MAX_TABLES * 4 * FLASHHEAD_BATCH_CHUNKS);  // [tables][batch chunks * 1024]
    __shared__ float scratch[16];
    __shared__ unsigned from[FLASHHEAD_MAX_TABLES];  // where the staged part of a codebook starts in the image
    int shift = 0;

    int begin = first;
    do {
        const int chunks = min(FLASHHEAD_BATCH_CHUNKS, end - begin), tasks = chunks * segments;
        // the loads that wait longest first: two tasks' fields of the rotation, then the codebooks' columns
        uint4 fields[2];
        for (int i = 0; i < 2; i++) {
            const int task = warp + 16 * i, octet = task % segments * 32 + lane;
            if (task < tasks && octet < octets) fields[i] = __ldcs(&rotation[(size_t)(begin + task / segments) * octets + octet]);
        }
        for (int t = 0; t < L.tables; t++) {
            const FlashHeadTable& table = L.table[t];
            const unsigned* offsets = (const unsigned*)(a.image + table.chunks_at);
            const unsigned start = __ldg(&offsets[begin]), stop = __ldg(&offsets[begin + chunks]);
            if (threadIdx.x == 0) from[t] = start;
            for (unsigned i = start / 16 + threadIdx.x; i < stop / 16; i += FLASHHEAD_THREADS)
                ((uint4*)(books + t * FLASHHEAD_BATCH_CHUNKS * 1024))[i - start / 16] = __ldcs((const uint4*)a.image + i);
            if (threadIdx.x < 4 * chunks) columns[t * 4 * FLASHHEAD_BATCH_CHUNKS + threadIdx.x] = __ldg((const int4*)(a.image + table.columns_at) + 4 * begin + threadIdx.x);
        }
        if (begin == first) {
            const unsigned short* hidden = (const unsigned short*)a.hidden + (size_t)row * L.hidden_size;
            const unsigned short* scale = (const unsigned short*)(a.image + L.row_scale_at);
            const float* mean = (const float*)(a.image + L.mean_at);
            const float place[8] = {1.f / 16, 1.f / 16, 1.f / 256, 1.f / 4096, 1.f / 65536, 1.f / 16, 1.f / 256, 1.f / 4096};
            float size = 0;
            for (int i = threadIdx.x; i < octets * 2; i += FLASHHEAD_THREADS) {
                const uint2 h = ((const uint2*)hidden)[i], s = __ldg((const uint2*)scale + i);
                const float4 m = __ldg((const float4*)mean + i);
                float4 x;
                x.x = from16(s.x & 0xffff, false) * (from16(h.x & 0xffff, a.hidden_bf16) - m.x);
                x.y = from16(s.x >> 16, false) * (from16(h.x >> 16, a.hidden_bf16) - m.y);
                x.z = from16(s.y & 0xffff, false) * (from16(h.y & 0xffff, a.hidden_bf16) - m.z);
                x.w = from16(s.y >> 16, false) * (from16(h.y >> 16, a.hidden_bf16) - m.w);
                size += fabsf(x.x) + fabsf(x.y) + fabsf(x.z) + fabsf(x.w);
                const int half = 4 * (i & 1);
                x.x *= half ? place[4] : place[0], x.y *= half ? place[5] : place[1], x.z *= half ? place[6] : place[2], x.w *= half ? place[7] : place[3];
                (half ? x_high : x_low)[i >> 1] = x;
            }
            size = block_sum(size, scratch);
            // sums stay whole numbers from here on: their scale is a power of two that no sum can overflow
            shift = 60 - ilogbf(fmaxf(size * L.bound_slope + L.bound_base, 1e-30f));
        }
        __syncthreads();
        for (int task = warp, i = 0; task < tasks; task += 16, i++) {
            const int octet = task % segments * 32 + lane;
            float4 sum = {0, 0, 0, 0};
            if (octet < octets) {
                const uint4 w = i == 0 ? fields[0] : i == 1 ? fields[1] : __ldcs(&rotation[(size_t)(begin + task / segments) * octets + octet]);
                const float4 low = x_low[octet], high = x_high[octet];
                sum.x = eight_fields(w.x, low, high, sum.x);
                sum.y = eight_fields(w.y, low, high, sum.y);
                sum.z = eight_fields(w.z, low, high, sum.z);
                sum.w = eight_fields(w.w, low, high, sum.w);
            }
            for (int step = 16; step; step >>= 1) {
                sum.x += __shfl_xor_sync(~0u, sum.x, step), sum.y += __shfl_xor_sync(~0u, sum.y, step);
                sum.z += __shfl_xor_sync(~0u, sum.z, step), sum.w += __shfl_xor_sync(~0u, sum.w, step);
            }
            if (lane == 0) partial[task] = sum;
        }
        __syncthreads();
        if (threadIdx.x < 4 * FLASHHEAD_BATCH_CHUNKS) {
            const int v = threadIdx.x;
            int2 column = {-1, 0};
            float value = 0;
            if (v < 4 * chunks) {
                column = __ldg((const int2*)(a.image + L.virtual_at) + 4 * begin + v);
                for (int s = 0; s < segments; s++) value += ((const float*)&partial[v / 4 * segments + s])[v & 3];
                value *= __int_as_float(column.y);
            }
            // a column of more than four bits is two virtual ones, side by side in one chunk
            const int next = __shfl_down_sync(0xffffu, column.x, 1), last = __shfl_up_sync(0xffffu, column.x, 1);
            const float upper = __shfl_down_sync(0xffffu, value, 1);
            if ((v & 3) < 3 && next == column.x) value += upper;
            if (column.x == 0) value = 1;
            z_own[v] = value;
            const bool owner = column.x >= 0 && ((v & 3) == 0 || last != column.x);
            if (owner) __stcg(&z_out[column.x], value);
        }
        __syncthreads();
        const int entry = threadIdx.x & 255, half = threadIdx.x >> 8, middle = (chunks + 1) / 2;
        for (int t = 0; t < L.tables; t++) {
            long long sum = 0;
            int part = -1;
            for (int c = half ? middle : 0; c < (half ? chunks : middle); c++) {
                float run = 0;
                for (int i = 0; i < 4; i++) {
                    const int4 column = columns[t * 4 * FLASHHEAD_BATCH_CHUNKS + 4 * c + i];  // {book | wide, step, centre, part}
                    if (column.w < 0) continue;
                    if (column.w != part) {
                        if (part >= 0) atomicAdd((u64*)&tables[(L.table[t].first_part + part) * 256 + entry], (u64)(sum + __float2ll_rn(ldexpf(run, shift))));
                        sum = 0, run = 0, part = column.w;
                    }
                    const unsigned char* book = books + t * FLASHHEAD_BATCH_CHUNKS * 1024 + ((unsigned)column.x / 2 - from[t]);
                    const unsigned field = column.x & 1 ? book[entry] : book[entry >> 1] >> (4 * (entry & 1)) & 15;
                    run = fmaf(((float)field - __int_as_float(column.z)) * __int_as_float(column.y), z_own[4 * c + i], run);
                }
                sum += __float2ll_rn(ldexpf(run, shift));
            }
            if (part >= 0) atomicAdd((u64*)&tables[(L.table[t].first_part + part) * 256 + entry], (u64)sum);
        }
        __syncthreads();
        begin += FLASHHEAD_BATCH_CHUNKS;
    } while (begin < end);
    return shift;
}

// A row of 16-bit numbers times the state in shared memory (two planes of float4), summed by a warp in a tree fixed by d.
__device__ __forceinline__ float product(const uint4* row, bool bf16, const float4* low, const float4* high, int octets) {
    float sum = 0;
#pragma unroll 8
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
    float4* low = (float4*)(shared + a.layout.shared_x);
    const uint4* hidden = (const uint4*)((const unsigned short*)a.hidden + (size_t)row * a.layout.hidden_size);
    for (int i = threadIdx.x; i < octets; i += FLASHHEAD_THREADS) {
        const uint4 h = hidden[i];
        const bool bf16 = a.hidden_bf16;
        low[i] = {from16(h.x & 0xffff, bf16), from16(h.x >> 16, bf16), from16(h.y & 0xffff, bf16), from16(h.y >> 16, bf16)};
        low[octets + i] = {from16(h.z & 0xffff, bf16), from16(h.z >> 16, bf16), from16(h.w & 0xffff, bf16), from16(h.w >> 16, bf16)};
    }
}

// The tables of the row codes for this state: of a product code the sums that `rotate` made, of a bits code the sums of
// every four bits. A table of 16 floats has no bank conflicts, whatever entries a warp looks up.
__device__ void make_tables(const FlashHeadArguments& a, const long long* sums, int shift, unsigned char* shared) {
    const FlashHeadLayout& L = a.layout;
    const float* z = (const float*)(shared + L.shared_z);
    for (int s = 0; s < L.stages; s++) {
        const FlashHeadStage& stage = L.stage[s];
        float* table = (float*)(shared + stage.shared_table);
        if (stage.table >= 0) {
            const FlashHeadTable& made = L.table[stage.table];
            const unsigned char* bytes = a.image + made.bytes_at;
            for (int i = threadIdx.x; i < made.parts * 256; i += FLASHHEAD_THREADS) {
                const int part = i >> 8, byte = bytes[part];
                if (part && bytes[part - 1] == byte) continue;  // summed with the first part of its byte
                long long sum = 0;
                for (int p = part; p < made.parts && bytes[p] == byte; p++) sum += sums[(made.first_part + p) * 256 + (i & 255)];
                table[byte * 256 + (i & 255)] = ldexpf((float)sum, -shift);
            }
        } else {
            const int4* weights = (const int4*)(a.image + stage.weights_at);  // two bits each: {half weight, coordinate} twice
#pragma unroll 4
            for (int i = threadIdx.x; i < stage.words * 128; i += FLASHHEAD_THREADS) {
                const int4 lower = __ldg(&weights[i / 16 * 2]), upper = __ldg(&weights[i / 16 * 2 + 1]);
                const float b0 = __int_as_float(lower.x) * z[lower.y], b1 = __int_as_float(lower.z) * z[lower.w];
                const float b2 = __int_as_float(upper.x) * z[upper.y], b3 = __int_as_float(upper.z) * z[upper.w];
                table[i] = ((i & 1 ? b0 : -b0) + (i & 2 ? b1 : -b1)) + ((i & 4 ? b2 : -b2) + (i & 8 ? b3 : -b3));
            }
        }
    }
}

// Adds a code's score to items [0, n) and returns the thread's best key; item n, if `scout`, is scored for its key alone.
__device__ u64 score_items(const FlashHeadArguments& a, const FlashHeadStage& stage, uint2* items, int n, unsigned char* shared) {
    const float* table = (const float*)(shared + stage.shared_table);
    const int lanes = stage.lanes, own = threadIdx.x & (lanes - 1);
    u64 best = 0;
    for (int base = 0; base < n; base += FLASHHEAD_THREADS / lanes) {
        const int i = base + threadIdx.x / lanes;
        float sum = 0;
        unsigned slot = 0, error = 0, scale = 0;
        float score = 0;
        if (i < n) {
            slot = items[i].x & 0xffffff, score = __uint_as_float(items[i].y);
            const unsigned char* record = a.image + stage.rows_at + (size_t)slot * stage.stride;
            const unsigned* words = (const unsigned*)record;
            error = __ldg(a.image + stage.error_at + (size_t)slot * stage.error_stride);
            if (stage.table >= 0) {
                for (int w = 0; w < stage.words; w++) {
                    const unsigned word = __ldg(words + w);
#pragma unroll
                    for (int b = 0; b < 4; b++)
                        if (4 * w + b < stage.bytes) sum += table[(4 * w + b) * 256 + (word >> 8 * b & 255)];
                }
            } else {
                scale = __ldg((const unsigned short*)(record + stage.bytes));
                for (int w = own; w < stage.words; w += lanes) {
                    const unsigned word = __ldg(words + w);
                    const unsigned turned = __funnelshift_r(word, word, 4 * (own & 7));  // lanes of a row start at different tables: fewer conflicts
#pragma unroll
                    for (int b = 0; b < 8; b++) sum += table[(8 * w + ((b + own) & 7)) * 16 + (turned >> 4 * b & 15)];
                }
            }
        }
        for (int step = lanes >> 1; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
        if (i < n && own == 0) {
            score += stage.table >= 0 ? sum : sum * from16(scale, false);
            items[i] = make_uint2(slot | error << 24, __float_as_uint(score));
            const u64 key = (u64)ordered(score) << 32 | (0xffffffffu - slot);
            best = key > best ? key : best;
        }
    }
    return best;
}

extern "C" __global__ void __launch_bounds__(FLASHHEAD_THREADS, 1) flashhead_step(const __grid_constant__ FlashHeadArguments a) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ u64 keys[16];
    __shared__ unsigned numbers[32];
    __shared__ unsigned count, within, last;
    const FlashHeadLayout& L = a.layout;
    const int blocks = L.blocks, block = blockIdx.x % blocks, groups = gridDim.x / blocks;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, octets = L.hidden_size / 8;
    const unsigned char* filled = a.image + L.filled_at;
    float* z = (float*)(shared + L.shared_z);
    float* gaps = (float*)(shared + L.shared_clusters);
    unsigned* bins = (unsigned*)(shared + L.shared_work);
    const float4* state_low = (const float4*)(shared + L.shared_x);

    // what every step reads, small and scattered, is asked for at once
    for (unsigned i = (block * FLASHHEAD_THREADS + threadIdx.x) * 128; i < L.prefetch_bytes; i += blocks * FLASHHEAD_THREADS * 128) prefetch(a.image + L.prefetch_at + i);

    for (int row = blockIdx.x / blocks; row < a.rows; row += groups) {
        unsigned char* work = a.workspace + (size_t)row * L.row_bytes;
        RowState* state = (RowState*)work;
        long long* sums = (long long*)(work + L.row_tables);
        float* z_all = (float*)(work + L.row_z);
        float* scores = (float*)(work + L.row_scores);
        unsigned* histograms = (unsigned*)(work + L.row_histograms);
        unsigned target = 0, passes_used = 0;
        int shift = 0;
        bool cut = false;

        // probe
        const int first = (long long)L.clusters * block / blocks, end = (long long)L.clusters * (block + 1) / blocks;
        u64 best = 0;
        if (L.chunks) {
            shift = rotate(a, row, block, shared, sums, z_all);
            arrive(&state->counter);
            wait(&state->counter, target += blocks);
            const FlashHeadTable& made = L.table[0];
            const unsigned char* bytes = a.image + made.bytes_at;
            for (int base = first; base < end; base += FLASHHEAD_THREADS / 16) {
                const int k = base + (threadIdx.x >> 4);
                long long sum = 0;
                if (k < end)
                    for (int p = threadIdx.x & 15; p < made.parts; p += 16)
                        sum += sums[p * 256 + __ldg(a.image + L.centroids_at + (size_t)k * L.centroid_stride + __ldg(bytes + p))];
                for (int step = 8; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
                if (k < end && (threadIdx.x & 15) == 0) {
                    const float score = ldexpf((float)sum, -shift);
                    scores[k] = score;
                    const u64 key = (u64)ordered(score) << 32 | (0xffffffffu - k);
                    best = key > best ? key : best;
                }
            }
        } else {
            load_state(a, row, shared);
            __syncthreads();
            for (int k = block * 16 + warp; k < L.clusters; k += blocks * 16) {
                const float score = product((const uint4*)(a.image + L.centroids_at) + (size_t)k * octets, false, state_low, state_low + octets, octets);
                if (lane == 0) {
                    scores[k] = score;
                    const u64 key = (u64)ordered(score) << 32 | (0xffffffffu - k);
                    best = key > best ? key : best;
                }
            }
        }
        best = block_max(best, keys);
        if (threadIdx.x == 0) atomicMax(&state->best[0], best);
        arrive(&state->counter);

        // while the others arrive: the state, its unit, the tables of the row codes, the clusters' errors
        float inverse_unit = 1;
        if (L.chunks) {
            float square = 0;
            for (int i = threadIdx.x; i < L.coordinates; i += FLASHHEAD_THREADS) {
                const float value = z_all[i];
                z[i] = value;
                if (i) square = fmaf(value, value, square);
            }
            square = block_sum(square, (float*)numbers);
            if (L.state_power != 0) inverse_unit = 1 / powf(square / (L.coordinates - 1), 0.5f * L.state_power);
            make_tables(a, sums, shift, shared);
            load_state(a, row, shared);
        }
        for (int k = threadIdx.x; k < L.clusters; k += FLASHHEAD_THREADS) gaps[k] = __ldg((const float*)(a.image + L.cluster_inverse_at) + __ldg(a.image + L.cluster_error_at + k)) * inverse_unit;
        if (threadIdx.x == 0) count = 0;
        wait(&state->counter, target += blocks);

        // the probe's gate: every block finds the same opened clusters, and takes every blocks-th of them
        const float top = unordered((unsigned)(state->best[0] >> 32));
        const int span = (L.clusters + FLASHHEAD_THREADS - 1) / FLASHHEAD_THREADS * 32;
        const auto cluster_key = [&](int k) { return gate_key(gaps[k], L.probe_margin, k); };
        u64 least = 1;
        unsigned opened = 0, before = 0;
        for (int round = 0; round < 2; round++) {
            unsigned own = 0;
            for (int j = lane; j < span; j += 32) {
                const int k = warp * span + j;
                bool passed = false;
                if (k < L.clusters) {
                    if (round == 0) gaps[k] = (top - scores[k]) * gaps[k];
                    passed = round == 0 ? gaps[k] <= L.probe_margin : cluster_key(k) >= least;
                }
                own += __popc(__ballot_sync(~0u, passed));
            }
            if (lane == 0) numbers[warp] = own;
            __syncthreads();
            opened = before = 0;
            for (int w = 0; w < 16; w++) {
                if (w < warp) before += numbers[w];
                opened += numbers[w];
            }
            __syncthreads();
            if (round || opened <= (unsigned)L.probe_cap) break;
            int passes;
            unsigned unused = 0;
            least = threshold(cluster_key, L.clusters, L.probe_cap, bins, numbers, nullptr, state, unused, 0, passes);
            cut = true;
        }
        uint2* items = L.row_items ? (uint2*)(work + L.row_items) + (size_t)block * 2 * L.capacity : (uint2*)(shared + L.shared_items);
        uint2* others = items + L.capacity;
        // the share of a block, as {cluster, score} in the other buffer
        for (int j = lane; j < span; j += 32) {
            const int k = warp * span + j;
            const bool passed = k < L.clusters && cluster_key(k) >= least;
            const unsigned ballot = __ballot_sync(~0u, passed), ordinal = before + __popc(ballot & ((1u << lane) - 1));
            before += __popc(ballot);
            if (passed && ordinal % blocks == block) others[ordinal / blocks] = make_uint2(k, __float_as_uint(scores[k]));
        }
        __syncthreads();
        const unsigned mine = (opened + blocks - 1 - block) / blocks;
        const auto append = [&](uint2* list, bool wanted, uint2 item) {  // all lanes of a warp together
            const unsigned ballot = __ballot_sync(~0u, wanted);
            unsigned start = 0;
            if (lane == 0 && ballot) start = atomicAdd(&count, (unsigned)__popc(ballot));
            start = __shfl_sync(~0u, start, 0);
            if (wanted) list[start + __popc(ballot & ((1u << lane) - 1))] = item;
        };
        for (unsigned base = 0; base < mine * L.cluster_size; base += FLASHHEAD_THREADS) {
            const unsigned i = base + threadIdx.x, place = i % L.cluster_size;
            const uint2 cluster = i < mine * L.cluster_size ? others[i / L.cluster_size] : make_uint2(0, 0);
            append(items, i < mine * L.cluster_size && place < __ldg(filled + cluster.x), make_uint2(cluster.x * L.cluster_size + place, cluster.y));
        }
        for (int base = 0; base * blocks + block < L.always; base += FLASHHEAD_THREADS) {
            const int i = (base + threadIdx.x) * blocks + block;
            const unsigned slot = i < L.always ? __ldg((const unsigned*)(a.image + L.always_at) + i) : 0, k = slot / L.cluster_size;
            append(items, i < L.always && cluster_key(k) < least, make_uint2(slot, __float_as_uint(scores[k])));
        }
        __syncthreads();
        unsigned n = count;

        // the cascade: a block keeps its items to the end
        for (int s = 0; s < L.stages; s++) {
            const FlashHeadStage& stage = L.stage[s];
            const bool scout = s > 0;  // the best item so far, scored in every block: it makes the first count of who passes a sharp one
            if (scout && threadIdx.x == 0) {
                const u64 key = state->best[s];
                items[n] = make_uint2(0xffffffffu - (unsigned)key, __float_as_uint(unordered((unsigned)(key >> 32))));
            }
            __syncthreads();
            best = block_max(score_items(a, stage, items, n + scout, shared), keys);
            if (threadIdx.x == 0) within = count = 0;
            __syncthreads();
            const float* inverse = (const float*)(a.image + stage.inverse_at);
            float limit = unordered((unsigned)(best >> 32));
            unsigned near = 0;
            for (unsigned i = threadIdx.x; i < n; i += FLASHHEAD_THREADS)
                near += (limit - __uint_as_float(items[i].y)) * (__ldg(inverse + (items[i].x >> 24)) * inverse_unit) <= stage.margin;
            near = __reduce_add_sync(~0u, near);
            if (lane == 0 && near) atomicAdd(&within, near);
            __syncthreads();
            if (threadIdx.x == 0) {
                atomicMax(&state->best[s + 1], best);
                if (within) atomicAdd(&state->within[s], within);
                if (n) atomicAdd(&state->counts[s], n);
            }
            arrive(&state->counter);
            wait(&state->counter, target += blocks);
            if (s == 0)  // all blocks have made their tables of these
                for (int i = block * FLASHHEAD_THREADS + threadIdx.x; i < L.parts * 256; i += blocks * FLASHHEAD_THREADS) sums[i] = 0;
            limit = unordered((unsigned)(state->best[s + 1] >> 32));
            const auto key_of = [&](int i) {
                const uint2 item = items[i];
                const float gap = (limit - __uint_as_float(item.y)) * (__ldg(inverse + (item.x >> 24)) * inverse_unit);
                return gate_key(gap, stage.margin, item.x & 0xffffff);
            };
            least = 1;
            if (state->within[s] > (unsigned)stage.cap) {
                int passes;
                least = threshold(key_of, n, stage.cap, bins, numbers, histograms + s * FLASHHEAD_PASSES * FLASHHEAD_HISTOGRAM, state, target, blocks, passes);
                passes_used |= (unsigned)passes << 4 * s;
                if (least) cut = true;
                else least = 1;
            }
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
            for (int i = block * FLASHHEAD_THREADS + threadIdx.x; i < L.parts * 256; i += blocks * FLASHHEAD_THREADS) sums[i] = 0;

        // exact rows, a warp each
        if (threadIdx.x == 0 && n) numbers[0] = atomicAdd(&state->candidates, n);
        best = 0;
        __syncthreads();
        for (unsigned i = warp; i < n; i += 16) {
            const unsigned token = __ldg((const unsigned*)(a.image + L.token_table_at) + items[i].x);
            float logit = product((const uint4*)a.weight + (size_t)token * octets, a.weight_bf16, state_low, state_low + octets, octets);
            if (a.bias) logit += from16(((const unsigned short*)a.bias)[token], a.weight_bf16);
            if (lane == 0) {
                const size_t place = (size_t)row * L.candidates + numbers[0] + i;
                a.ids[place] = token, a.logits[place] = logit;
                if (logit == 0) logit = 0;  // -0 is 0
            }
            const u64 key = (u64)ordered(logit) << 32 | (0xffffffffu - token);
            best = key > best ? key : best;
        }
        best = block_max(best, keys);
        if (threadIdx.x == 0) {
            atomicMax(&state->best[L.stages + 1], best);
            if (n) atomicAdd(&state->counts[L.stages], n);
            __threadfence();
            last = atomicAdd(&state->arrived, 1u) == (unsigned)blocks - 1;
            __threadfence();
        }
        __syncthreads();
        if (!last) continue;
        // the last block of the row writes the result and clears what the next step must find zero
        if (threadIdx.x == 0) {
            a.token[row] = 0xffffffffu - (unsigned)__ldcg(&state->best[L.stages + 1]);
            a.counts[(size_t)row * (2 + L.stages)] = opened;
            for (int s = 0; s <= L.stages; s++) a.counts[(size_t)row * (2 + L.stages) + 1 + s] = __ldcg(&state->counts[s]);
            a.capped[row] = cut;
        }
        __syncthreads();
        for (int s = 0; s < L.stages; s++)
            for (int i = threadIdx.x; i < (int)(passes_used >> 4 * s & 15) * FLASHHEAD_HISTOGRAM; i += FLASHHEAD_THREADS) histograms[s * FLASHHEAD_PASSES * FLASHHEAD_HISTOGRAM + i] = 0;
        for (unsigned i = threadIdx.x; i < sizeof(RowState) / 4; i += FLASHHEAD_THREADS) ((unsigned*)state)[i] = 0;
    }
}
