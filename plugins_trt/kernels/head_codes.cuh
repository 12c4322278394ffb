// head_codes.cuh: scores of items by their codes, through tables made for the state, and by their exact rows.
#pragma once
#include "head_basics.cuh"

// Tables of a bits code: eight a word, words made up to a multiple of four.
__device__ __forceinline__ int bit_tables(const FlashHeadStage& stage) { return (stage.words + 3) / 4 * 32; }

// Tables of 16 floats for every four bits of a code: the sums of +-(half a bit's weight) * its coordinate, a thread a table.
// Lanes that look up the same table have no bank conflicts, whatever entries they take.
static __device__ void make_bit_tables(const float4* weights, int groups, const float* z, float* table) {
#pragma unroll 1
    for (int g = threadIdx.x; g < groups; g += FLASHHEAD_THREADS) {
        const float4 low = weights[2 * g], high = weights[2 * g + 1];  // two bits each: half weight, coordinate
        const float a = low.x * z[__float_as_int(low.y)], b = low.z * z[__float_as_int(low.w)];
        const float c = high.x * z[__float_as_int(high.y)], d = high.z * z[__float_as_int(high.w)];
#pragma unroll
        for (int i = 0; i < 4; i++) {  // neighbours write different quarters at a time, so their banks differ
            const int q = (i + (threadIdx.x >> 1)) & 3;
            const float upper = (q & 1 ? c : -c) + (q & 2 ? d : -d);
            ((float4*)table)[4 * g + q] = {(-a - b) + upper, (a - b) + upper, (b - a) + upper, (a + b) + upper};
        }
    }
}

// The tables of the row codes for this state: of a product code from the sums that `rotate` made, of a bits code from its weights.
static __device__ void make_tables(const FlashHeadArguments& a, const long long* sums, float unscale, const float4* weights, const float* z, unsigned char* shared) {
#pragma unroll 1
    for (int s = 0; s < a.layout.stages; s++) {
        const FlashHeadStage& stage = a.layout.stage[s];
        float* table = (float*)(shared + stage.shared_table);
        if (stage.table < 0) {
            make_bit_tables(weights, bit_tables(stage), z, table);
            weights += 2 * bit_tables(stage);
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

// A record in memory: its words lie `apart` words from each other.
struct Record {
    const unsigned* words;
    int apart;
};

__device__ __forceinline__ Record record_of(const FlashHeadArguments& a, const FlashHeadStage& stage, unsigned slot) {
    const unsigned* rows = (const unsigned*)(a.image + stage.rows_at);
    if (!stage.interleaved) return {rows + (size_t)slot * (stage.stride / 4), 1};
    const unsigned size = a.layout.cluster_size, cluster = slot / size;
    return {rows + (size_t)cluster * size * (stage.stride / 4) + (slot - cluster * size), (int)size};
}

__device__ __forceinline__ unsigned byte_of(const Record& record, int byte) { return __ldg(record.words + (byte >> 2) * record.apart) >> 8 * (byte & 3) & 255; }

__device__ __forceinline__ unsigned error_of(const FlashHeadArguments& a, const FlashHeadStage& stage, const Record& record, unsigned slot) {
    return stage.error_byte < 0 ? __ldg(a.image + stage.error_at + slot) : byte_of(record, stage.error_byte);
}

__device__ __forceinline__ float scale_of(const FlashHeadStage& stage, const Record& record) {
    return from16(__ldg(record.words + (stage.bytes >> 2) * record.apart) >> 8 * (stage.bytes & 2) & 0xffff, false);
}

// Records of a whole cluster, as the first code lays them out, towards the L2 cache: a warp together.
__device__ __forceinline__ void prefetch_cluster(const FlashHeadArguments& a, unsigned cluster) {
    const int bytes = a.layout.cluster_size * a.layout.stage[0].stride;
    const unsigned char* first = a.image + a.layout.stage[0].rows_at + (size_t)cluster * bytes;
#pragma unroll 1
    for (int i = (threadIdx.x & 31) * 128; i < bytes; i += 32 * 128) prefetch(first + i);
}

// What stage s most likely lets through will be read next: records of the next code, or exact rows.
static __device__ void prefetch_next(const FlashHeadArguments& a, int s, const uint2* items, int n) {
    const FlashHeadLayout& L = a.layout;
    if (s + 1 < L.stages) {
        const FlashHeadStage& next = L.stage[s + 1];
#pragma unroll 1
        for (int i = threadIdx.x; i < n; i += FLASHHEAD_THREADS) {
            const unsigned slot = items[i].x & 0xffffff;
            const unsigned char* record = a.image + next.rows_at + (size_t)slot * next.stride;
            prefetch(record);
            if (next.stride > 32) prefetch(record + next.stride - 4);
            if (next.error_byte < 0) prefetch(a.image + next.error_at + slot);
        }
        return;
    }
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, own = warp + 16 * lane;  // a warp's items: warp, warp + 16, ...; 512 at most
    const unsigned token = own < n ? __ldg((const unsigned*)(a.image + L.token_table_at) + (items[own].x & 0xffffff)) : 0;
#pragma unroll 1
    for (int j = 0; j < 32 && warp + 16 * j < n; j++) {
        const unsigned short* row = (const unsigned short*)a.weight + (size_t)__shfl_sync(~0u, token, j) * L.hidden_size;
#pragma unroll 1
        for (int i = lane * 64; i < L.hidden_size; i += 32 * 64) prefetch(row + i);
    }
}

__device__ __forceinline__ u64 keep_score(uint2* item, unsigned slot, unsigned error, float score, u64 best) {
    *item = make_uint2(slot | error << 24, __float_as_uint(score));
    const u64 key = item_key(score, slot);
    return key > best ? key : best;
}

// The address of shared memory that instructions of the kind ld.shared take.
__device__ __forceinline__ unsigned shared_address(const void* place) { return (unsigned)__cvta_generic_to_shared(place); }

// The entry that a word's four-bit field names in its table. `tables` is aligned to 64 bytes, so that one instruction masks the
// field and puts it into the address.
template <int field>
__device__ __forceinline__ float entry_of(unsigned tables, unsigned word) {
    float entry;
    const unsigned at = (field ? word >> (field ? 4 * field - 2 : 0) : word << 2) & 60 | tables;
    asm volatile("ld.shared.f32 %0, [%1 + %2];" : "=f"(entry) : "r"(at), "n"(64 * field) : "memory");
    return entry;
}

// The entries of a word's eight fields, added to four sums in turn: look-ups must not wait for each other.
__device__ __forceinline__ void look_up(unsigned tables, unsigned word, float (&sum)[4]) {
    sum[0] += entry_of<0>(tables, word), sum[1] += entry_of<1>(tables, word), sum[2] += entry_of<2>(tables, word), sum[3] += entry_of<3>(tables, word);
    sum[0] += entry_of<4>(tables, word), sum[1] += entry_of<5>(tables, word), sum[2] += entry_of<6>(tables, word), sum[3] += entry_of<7>(tables, word);
}

// Adds a code's score to items [0, n), one thread a row, with their own errors in the upper eight bits of the slot; returns the
// thread's best key. Where records are interleaved, a warp's loads are whole lines and its look-ups go to one table.
static __device__ u64 score_rows(const FlashHeadArguments& a, const FlashHeadStage& stage, uint2* items, int n, unsigned char* shared) {
    const float* table = (const float*)(shared + stage.shared_table);
    const unsigned tables = shared_address(table);
    constexpr int AHEAD = 8;  // words of a row in hand; as many more are on their way. Words are made up to a multiple of four
    u64 best = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += FLASHHEAD_THREADS) {
        const uint2 item = items[i];
        const unsigned slot = item.x & 0xffffff;
        const Record record = record_of(a, stage, slot);
        const auto load = [&](unsigned (&word)[AHEAD], int first) {
#pragma unroll
            for (int w = 0; w < AHEAD; w++) word[w] = first + w < stage.words ? __ldg(record.words + (first + w) * record.apart) : 0;
        };
        unsigned here[AHEAD], next[AHEAD];
        load(here, 0);
        load(next, AHEAD);
        const unsigned error = error_of(a, stage, record, slot);
        float sum[4] = {0, 0, 0, 0}, scale = 1;
        if (stage.table < 0) {
            scale = scale_of(stage, record);
#pragma unroll 1
            for (int base = 0; base < stage.words; base += AHEAD) {
#pragma unroll
                for (int w = 0; w < 4; w++) look_up(tables + (base + w) * 512, here[w], sum);
                if (base + 4 < stage.words)
#pragma unroll
                    for (int w = 4; w < 8; w++) look_up(tables + (base + w) * 512, here[w], sum);
#pragma unroll
                for (int w = 0; w < AHEAD; w++) here[w] = next[w];
                load(next, base + 2 * AHEAD);
            }
        } else {
#pragma unroll 1
            for (int base = 0; base < stage.words; base += AHEAD) {
#pragma unroll
                for (int b = 0; b < 4 * AHEAD; b++)
                    if (4 * base + b < stage.bytes) sum[b & 3] += table[(4 * base + b) * 256 + (here[b / 4] >> 8 * (b & 3) & 255)];
#pragma unroll
                for (int w = 0; w < AHEAD; w++) here[w] = next[w];
                load(next, base + 2 * AHEAD);
            }
        }
        best = keep_score(items + i, slot, error, __uint_as_float(item.y) + ((sum[0] + sum[1]) + (sum[2] + sum[3])) * scale, best);
    }
    return best;
}

// The same for `bits`, several lanes a row: where items are few, and lie far apart. `ready` is called once, by all threads, when
// the first rows are on their way; the tables must be there when it returns.
template <class Ready>
static __device__ u64 score_wide_rows(const FlashHeadArguments& a, const FlashHeadStage& stage, uint2* items, int n, unsigned char* shared, Ready ready) {
    const char* table = (const char*)(shared + stage.shared_table);
    const int lanes = stage.lanes, own = threadIdx.x & (lanes - 1), step = FLASHHEAD_THREADS / lanes;
    constexpr int WORDS = 4;  // of a lane; a longer row is refused when it is packed
    u64 best = 0;
#pragma unroll 1
    for (int base = 0; base == 0 || base < n; base += step) {
        const int i = base + threadIdx.x / lanes;
        unsigned word[WORDS] = {}, slot = 0, error = 0;
        float scale = 0, sum[4] = {0, 0, 0, 0};
        if (i < n) {
            slot = items[i].x & 0xffffff;
            const Record record = record_of(a, stage, slot);
#pragma unroll
            for (int w = 0; w < WORDS; w++)
                if (own + w * lanes < stage.words) word[w] = __ldg(record.words + (own + w * lanes) * record.apart);
            error = error_of(a, stage, record, slot);
            scale = scale_of(stage, record);
        }
        if (base == 0) ready();
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
            const unsigned at = word[w], turned = __funnelshift_r(at, at, 4 * (own & 7));  // lanes of a row start at different tables: fewer conflicts
            if (i < n && own + w * lanes < stage.words)
#pragma unroll
                for (int b = 0; b < 8; b++)
                    sum[b & 3] += *(const float*)(table + (own + w * lanes) * 512 + ((b + own) & 7) * 64 + ((b ? turned >> (4 * b - 2) : turned << 2) & 60));
        }
        float total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
#pragma unroll 1
        for (int way = lanes >> 1; way; way >>= 1) total += __shfl_xor_sync(~0u, total, way);
        __syncwarp();  // all lanes of a row have read its item: a shuffle does not order memory
        if (i < n && own == 0) best = keep_score(items + i, slot, error, __uint_as_float(items[i].y) + total * scale, best);
    }
    return best;
}

__device__ __forceinline__ u64 score_items(const FlashHeadArguments& a, const FlashHeadStage& stage, uint2* items, int n, unsigned char* shared) {
    return stage.lanes == 1 ? score_rows(a, stage, items, n, shared) : score_wide_rows(a, stage, items, n, shared, [] {});
}

// A row of 16-bit numbers times the state in shared memory (two planes of float4), summed by a warp in a tree fixed by d.
template <bool bf16>
__device__ __forceinline__ float product(const uint4* row, const float4* low, const float4* high, int octets) {
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
static __device__ void load_state(const FlashHeadArguments& a, int row, unsigned char* shared) {
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

// Exact logits of the slots of items [0, n), a warp each: {token, logit}. `ahead`: nobody has asked for the rows before.
static __device__ void score_exactly(const FlashHeadArguments& a, const uint2* items, int n, uint2* found, const float4* state_low, bool ahead) {
    const unsigned* tokens = (const unsigned*)(a.image + a.layout.token_table_at);
    const int lane = threadIdx.x & 31, octets = a.layout.hidden_size / 8;
#pragma unroll 1
    for (int i = threadIdx.x >> 5; i < n; i += FLASHHEAD_THREADS / 32) {
        const unsigned token = __ldg(tokens + (items[i].x & 0xffffff));
        if (ahead && i + FLASHHEAD_THREADS / 32 < n) {
            const uint4* next = (const uint4*)a.weight + (size_t)__ldg(tokens + (items[i + FLASHHEAD_THREADS / 32].x & 0xffffff)) * octets;
#pragma unroll 1
            for (int line = lane * 8; line < octets; line += 256) prefetch(next + line);
        }
        const uint4* weight = (const uint4*)a.weight + (size_t)token * octets;
        float logit = a.weight_bf16 ? product<true>(weight, state_low, state_low + octets, octets) : product<false>(weight, state_low, state_low + octets, octets);
        if (a.bias) logit += from16(((const unsigned short*)a.bias)[token], a.weight_bf16);
        logit += 0.f;  // -0 becomes 0
        if (lane == 0) found[i] = make_uint2(token, __float_as_uint(logit));
    }
}
