// head_rotate.cuh: the coordinates of a state, and what they add to the tables of product codes.
#pragma once
#include "head_basics.cuh"

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

// z of the block's chunks of rotated coordinates, each posted with the step's epoch, and what they add to the tables of every
// product code; returns the power of two by which the tables' whole numbers are scaled, the same in every block.
static __device__ int rotate(const FlashHeadArguments& a, int row, int block, unsigned char* shared, long long* tables, u64* z_out, unsigned epoch) {
    const FlashHeadLayout& L = a.layout;
    const int octets = L.hidden_size / 8, segments = (octets + 31) / 32, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
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

    const int first = block * L.chunks_a_block, end = min(first + L.chunks_a_block, L.chunks);
    int begin = first;
    const auto place_of = [&](int task) { return (task >= segments) + (task >= 2 * segments) + (task >= 3 * segments); };
    static_assert(FLASHHEAD_BATCH_CHUNKS == 4, "place_of counts to three");
    do {
        const int chunks = max(0, min(FLASHHEAD_BATCH_CHUNKS, end - begin)), tasks = chunks * segments;
        // all loads first, none waits for another: two tasks' fields of the rotation, the codebooks' columns, the state
        uint4 fields[2];
        for (int i = 0; i < 2; i++) {
            const int task = warp + 16 * i, place = place_of(task), octet = (task - place * segments) * 32 + lane;
            if (task < tasks && octet < octets) fields[i] = __ldcs(&rotation[(size_t)(begin + place) * octets + octet]);
        }
        int2 column = {-1, 0};
        if (threadIdx.x < 4 * chunks) column = __ldg((const int2*)(a.image + L.virtual_at) + 4 * begin + threadIdx.x);
#pragma unroll 1
        for (int t = 0; t < L.tables; t++) {
            const FlashHeadTable& table = L.table[t];
            const int place = threadIdx.x >> 6, c = begin + place, i = threadIdx.x & 63;  // 64 threads a chunk: 16 bytes each, in wide chunks
            const bool wide = c < table.wide_chunks;
            if (place < chunks && c < table.chunks && i < (wide ? 64 : 32))
                copy_async(books + (t * FLASHHEAD_BATCH_CHUNKS + place) * 64 + i,
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
            if (L.tables) size = block_sum(size, scratch);
            // sums stay whole numbers from here on: their scale is a power of two that no sum can overflow
            shift = min(120, 60 - ilogbf(fmaxf(size * L.bound_slope + L.bound_base, 1e-30f)));
            scale = ldexpf(1.f, shift);
        }
        wait_copies();
        __syncthreads();
#pragma unroll 1
        for (int task = warp, i = 0; task < tasks; task += 16, i++) {
            const int place = place_of(task), octet = (task - place * segments) * 32 + lane;
            float4 sum = {0, 0, 0, 0};
            if (octet < octets) {
                const uint4 w = i == 0 ? fields[0] : i == 1 ? fields[1] : __ldcs(&rotation[(size_t)(begin + place) * octets + octet]);
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
#pragma unroll 8
                for (int s = 0; s < segments; s++) value += ((const float*)&partial[v / 4 * segments + s])[v & 3];
            value *= __int_as_float(column.y);
            // a column of more than four bits is two virtual ones, side by side in one chunk
            const int next = __shfl_down_sync(0xffffu, column.x, 1), last = __shfl_up_sync(0xffffu, column.x, 1);
            const float upper = __shfl_down_sync(0xffffu, value, 1);
            if ((v & 3) < 3 && next == column.x) value += upper;
            if (column.x == 0) value = 1;
            z_own[v] = value;
            if (column.x >= 0 && ((v & 3) == 0 || last != column.x)) post_float(z_out + column.x, epoch, value);
        }
        if (begin + FLASHHEAD_BATCH_CHUNKS >= end && L.tables == 0) break;  // nothing is left to do with z
        __syncthreads();
        const int entry = threadIdx.x & 255, half = threadIdx.x >> 8, middle = (chunks + 1) / 2;
#pragma unroll 1
        for (int t = 0; t < L.tables; t++) {
            const FlashHeadTable& table = L.table[t];
            const int stop = half ? chunks : middle;
            long long sum = 0;
            int part = -1;
#pragma unroll 1
            for (int c = half ? middle : 0; c < stop && begin + c < table.chunks; c++) {
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

// Waits for all coordinates: into shared memory, and the mean square of all but the constant, in every thread.
static __device__ float collect_coordinates(const FlashHeadLayout& L, const u64* posted, unsigned epoch, float* z, float* scratch) {
    float square = 0;
    collect_floats(posted, L.coordinates, epoch, [&](int i, float value) {
        z[i] = value;
        if (i) square = fmaf(value, value, square);
    });
    return block_sum(square, scratch) / (L.coordinates - 1);
}
