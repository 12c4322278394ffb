// head_codes.cuh: scores of items by their codes, through tables made for the state, and by their exact rows.
#pragma once
#include "head_basics.cuh"

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
