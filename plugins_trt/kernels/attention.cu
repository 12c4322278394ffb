// attention.cu: attention over a key-value cache for decoding, and the rotary embedding that writes the cache (layouts: attention.h).
//
// Determinism. Positions go to splits and warps by their number alone, and a plan's `splits` says how many share them. Partial results are merged in an
// order fixed by warp and split, by the cluster of the splits' blocks or by whichever block finishes last: the atomic counts arrivals, it adds no floats.
// So for one plan a row's bits depend on its sequence only, not on batch, timing or grid.
//
// One pass over keys and values on the tensor cores, up to eight query rows at once: the query heads that share a key-value head, so each cached byte
// is read once. Keys and values go from memory to registers in the fragments' own order, 16 bytes a lane, all loads of a step in flight before the first
// is used; no shared memory until the merge.
//
// Floor: 4 * kv_heads * positions * head_size bytes; at 4,096 positions and 3.01 TB/s (H100): Llama-3.2-1B 2.8 us, Qwen3-1.7B 5.6 us.
// Predicted 4.9 and 9.0 us (half as much again, and an empty launch). Measured behind rope_write, as in a model: 6.8 and 10.3 us; with every launch
// waiting for the one before: 8.1 and 12.1 us. Verdict: not there. A trace of the blocks shows the bytes at their floor; what is left is latency
// around them: lengths and addresses, the merge of the warps, the cluster's exchange. Since then heads of 64 have 256 threads and blocks of a cluster no
// barrier behind their stores; in a layer of five launches attention costs Llama-3.2-1B 5.1 us at 512 positions (docs/kernels.md).
#include "attention_exchange.cuh"
#include "rope.cuh"

namespace fh {

constexpr float kNothing = -3.402823466e38f;  // the maximum of no scores
constexpr int kStep = 16;                     // positions a warp takes at once: the k of one product with the values
[[maybe_unused]] constexpr int kMaxRows = 8;  // of the eight columns of the tensor cores' B operand
[[maybe_unused]] constexpr int kMaxCluster = 8;  // 16, which Hopper allows, took 4 us more on an H100

// A step's loads, the sums and the query fill a lane's registers. Heads of 64 leave room for twice the warps, which then merge for longer and leave the next
// launch no place beside them: on an H100 Llama-3.2-1B's body takes 372 us instead of 385 at 512 positions, at 3,500 it takes 2 % longer.
[[maybe_unused]] constexpr int kThreads = 256;

// What attention_rope_decode has besides attention_decode: the fused projection instead of the queries, and what rope_write does with it.
struct NewTokens {
  const u16* qkv;
  const float2* rotations;
  const u16 *q_norm, *k_norm;
  float norm_offset, epsilon;
  u16 *cache_k, *cache_v;
};

// Groups of four float4 that a block of a cluster receives at most: of each block's results a share, of as many blocks as have positions.
__host__ __device__ constexpr int inbox_groups(int rows, int head_size, int splits) { return rows * head_size / 16 + splits - 1; }

template <class T, int HEAD, bool CLUSTER>
__global__ void attention_decode(const u16* q, const u16* cache_k, const u16* cache_v, const int* lengths, u16* out, float* workspace, u32* arrivals_apart,
                                 int queries, int heads, int kv_heads, int rows, int row_blocks, int max_length, int window, float scale);
template <class T, int HEAD, bool CLUSTER>
__global__ void attention_rope_decode(const u16* qkv, const float2* rotations, const u16* q_norm, const u16* k_norm, float norm_offset, float epsilon,
                                      u16* cache_k, u16* cache_v, const int* lengths, u16* out, float* workspace, u32* arrivals_apart, int queries,
                                      int heads, int kv_heads, int rows, int row_blocks, int max_length, int window, float scale);
#ifdef __CUDACC__
__device__ inline float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// What was summed under its own maximum counts this much under the common one.
__device__ inline float merge_weight(float own, float common) { return own == kNothing ? 0.f : exp2_fast(own - common); }

__device__ inline void add_weighted(float4& total, float4 v, float weight) {
  total.x = fmaf(weight, v.x, total.x), total.y = fmaf(weight, v.y, total.y), total.z = fmaf(weight, v.z, total.z), total.w = fmaf(weight, v.w, total.w);
}

// The sum over the lanes that differ in the bits from STEP up: a fixed tree, the same in each of them.
template <int STEP>
__device__ float4 add_across(float4 v) {
#pragma unroll
  for (int step = STEP; step < 32; step *= 2) {
    v.x += __shfl_xor_sync(kAllLanes, v.x, step), v.y += __shfl_xor_sync(kAllLanes, v.y, step);
    v.z += __shfl_xor_sync(kAllLanes, v.z, step), v.w += __shfl_xor_sync(kAllLanes, v.w, step);
  }
  return v;
}

// A head that a warp turns.
struct Job {
  const u16 *in, *norm;
  u16* also;  // where it is written besides
  int token;  // of the new ones; -1: there is none
  bool is_value;
};

// Grid: (splits, kv_heads * row_blocks, batch). Dynamic shared memory: shared_bytes below.
// CLUSTER: the splits are one cluster, workspace is not used. Else workspace: partial sums float [items, splits, rows, HEAD], items = batch * kv_heads *
// row_blocks; then maxima and sums of weights float2 [items, splits, rows]; then, unless apart, arrivals uint32 [items], zero between launches.
// ROPE: a block takes its queries, and the new keys and values of its head, from the fused projection; they reach the cache by one block of a head, and
// nobody reads them there.
template <class T, int HEAD, bool CLUSTER, bool ROPE>
__device__ void attend(float4* raw, const u16* q, const u16* cache_k, const u16* cache_v, const int* lengths, u16* out, float* workspace,
                       u32* arrivals_apart, int queries, int heads, int kv_heads, int rows, int row_blocks, int max_length, int window, float scale,
                       const NewTokens& fresh) {
  constexpr int kWarps = kThreads / 32;
  constexpr int kTiles = kStep / 8, kBlocks = HEAD / 32, kSegments = (HEAD + 63) / 64;  // of 8 positions; of 32 and of 64 elements
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int splits = gridDim.x, split = blockIdx.x, batch = blockIdx.z, row_count = queries * heads;
  const int kv_head = row_blocks == 1 ? blockIdx.y : blockIdx.y / row_blocks, first_row = (blockIdx.y - kv_head * row_blocks) * rows;
  float* merged = reinterpret_cast<float*>(raw);  // [kWarps][rows][HEAD]
  // [active][shares][4]: this block's share of each block's sums
  [[maybe_unused]] float4* inbox = reinterpret_cast<float4*>(merged + kWarps * rows * HEAD);
  // [rows + 2 * queries][HEAD]: queries, new keys, new values
  u16* turned = reinterpret_cast<u16*>(inbox + (CLUSTER ? inbox_groups(rows, HEAD, splits) * 4 : 0));
  float2* merged_stats = reinterpret_cast<float2*>(turned + (ROPE ? (rows + 2 * queries) * HEAD : 0));  // [kWarps][rows]: maximum, sum of weights
  [[maybe_unused]] float2* inbox_stats = merged_stats + kWarps * rows;                                   // [splits][rows]
#if __CUDA_ARCH__ >= 900
  [[maybe_unused]] __shared__ u64 all_here;
  if (CLUSTER) {
    if (threadIdx.x == 0) barrier_begin(&all_here);
    cluster_arrive();  // who waits for this below knows that all blocks have begun: their memory may be written
  }
#endif

  const int length = min(max(__ldcg(lengths + batch), queries), max_length), old = length - queries;
  const int begin = window > 0 ? max(0, old + 1 - window) : 0;
  const int units = (length - begin + kStep - 1) / kStep, first_unit = split * kWarps + warp;
  // Blocks of a cluster that have positions. The others end here: nobody waits for them.
  const int active = CLUSTER ? min(splits, (units + kWarps - 1) / kWarps) : splits;
  if (CLUSTER && split >= active) return;
  const int inverse = CLUSTER ? 65536 / active + 1 : 0;
  auto by_active = [&](int v) { return v * inverse >> 16; };  // v / active, exact below 65536 / 8
  const int shares = by_active(rows * HEAD / 16 + active - 1);
#if __CUDA_ARCH__ >= 900
  if (CLUSTER && active > 1 && threadIdx.x == 0) {
    const int groups = rows * HEAD / 16, mine = by_active(groups - split + active - 1);
    barrier_expect(&all_here, active * (mine * 64 + rows * 8));
  }
#endif
  const size_t head_at = (size_t(batch) * kv_heads + kv_head) * max_length * HEAD;

  // A operand of the scores: row g is query row first_row + g, rows 8 to 15 are zero.
  const int row = first_row + g, token = queries == 1 ? 0 : row / heads;
  const bool row_exists = g < rows && row < row_count;
  const int position = row_exists ? old + token : -1;
  uint4 query[kBlocks];

  // sum[s][i]: elements 64 s + 8 g + 2 i (first two) and the next one, of query rows 2t and 2t + 1.
  float sum[kSegments][4][4] = {};
  float maximum = kNothing, weight = 0.f;  // of row g, the weight over this lane's positions

  // A warp takes a head: the block's queries, then the new tokens' keys, then their values.
  constexpr bool kTakesEarly = HEAD <= 128;  // larger ones have no registers for it
  const int jobs = ROPE ? rows + 2 * queries : 0;
  auto job_of = [&](int number) {
    Job job{nullptr, nullptr, nullptr, -1, number >= rows + queries};
    const bool is_query = number < rows;
    const int query_row = first_row + number;
    if (number >= jobs || (is_query && query_row >= row_count)) return job;
    job.token = queries == 1 ? 0 : is_query ? query_row / heads : number - rows - (job.is_value ? queries : 0);
    const int head = is_query ? kv_head * heads + query_row - job.token * heads : (heads + job.is_value) * kv_heads + kv_head;
    job.in = fresh.qkv + ((size_t(batch) * queries + job.token) * (heads + 2) * kv_heads + head) * HEAD;
    job.norm = is_query ? fresh.q_norm : fresh.k_norm;
    if (!is_query && split == 0 && first_row == 0) job.also = (job.is_value ? fresh.cache_v : fresh.cache_k) + head_at + size_t(old + job.token) * HEAD;
    return job;
  };
  Job job;
  Rotation<kSegments> rotation;
  auto take = [&](int number) {
    job = job_of(number);
    if (job.token >= 0 && !job.is_value) rotation.load(fresh.rotations + size_t(old + job.token) * (HEAD / 2), job.norm, HEAD);
  };
  auto turn = [&](int number) {
    if (job.token < 0) return;
    u16* to = turned + number * HEAD;
    if (!job.is_value) {
      rope_head<T, kSegments>(job.in, rotation, job.norm != nullptr, fresh.norm_offset, fresh.epsilon, HEAD, to, job.also);
      return;
    }
    for (int i = lane; i < HEAD / 2; i += 32) {
      const u32 pair = reinterpret_cast<const u32*>(job.in)[i];
      reinterpret_cast<u32*>(to)[i] = pair;
      if (job.also) reinterpret_cast<u32*>(job.also)[i] = pair;
    }
  };

  // One copy of the code for every step: what runs once is paid for in instruction fetches. With ROPE a warp without positions passes once too: all of its
  // weights are zero.
  const int cached = ROPE ? old : length;  // positions that are read from the cache
#pragma unroll 1
  for (int unit = first_unit; unit < units || (ROPE && unit == first_unit); unit += splits * kWarps) {
    const int first = begin + unit * kStep;
    if (!ROPE && first + kStep > old) wait_for_previous();  // new positions: the launch before this one writes them
    uint4 key[kTiles][kBlocks], value[4][kSegments];
    const u16* keys = cache_k + head_at + size_t(first + g) * HEAD + t * 8;
    const u16* values = cache_v + head_at + size_t(first + t * 2) * HEAD + g * 8;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const bool inside = first + i * 8 + g < cached;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) key[i][b] = load_if(inside, keys + i * 8 * HEAD + b * 32);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = j / 2 * 8 + j % 2;
      const bool inside = first + t * 2 + at < cached;
#pragma unroll
      for (int s = 0; s < kSegments; ++s) value[j][s] = load_if(inside && (HEAD % 64 == 0 || s * 64 + g * 8 < HEAD), values + at * HEAD + s * 64);
    }
    if (ROPE && unit == first_unit) {
      if (kTakesEarly) take(warp);
      wait_for_previous();
      release_next();
      if (!kTakesEarly) take(warp);
#pragma unroll 1
      for (int number = warp; number < jobs;) {
        turn(number);
        number += kWarps;
        if (number < jobs) take(number);
      }
      __syncthreads();
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        query[b] = row_exists ? *reinterpret_cast<const uint4*>(turned + g * HEAD + t * 8 + b * 32) : make_uint4(0, 0, 0, 0);
      }
    }
    if (ROPE && first + kStep > old) {
      const u16* new_keys = turned + rows * HEAD + t * 8;
      const u16* new_values = turned + (rows + queries) * HEAD + g * 8;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int at = first + i * 8 + g - old;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          if (at >= 0 && at < queries) key[i][b] = *reinterpret_cast<const uint4*>(new_keys + at * HEAD + b * 32);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = first + t * 2 + j / 2 * 8 + j % 2 - old;
#pragma unroll
        for (int s = 0; s < kSegments; ++s) {
          if (at >= 0 && at < queries && (HEAD % 64 == 0 || s * 64 + g * 8 < HEAD)) {
            value[j][s] = *reinterpret_cast<const uint4*>(new_values + at * HEAD + s * 64);
          }
        }
      }
    }
    if (!ROPE && unit == first_unit) {
      wait_for_previous();
      const u16* query_row = q + ((size_t(batch) * queries + token) * kv_heads * heads + kv_head * heads + row - token * heads) * HEAD + t * 8;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) query[b] = load_if(row_exists, query_row + b * 32);
    }

    float score[kTiles][4];
    float highest = maximum;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      score[i][0] = score[i][1] = score[i][2] = score[i][3] = 0.f;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        T::mma(score[i], query[b].x, 0, query[b].y, 0, key[i][b].x, key[i][b].y);
        T::mma(score[i], query[b].z, 0, query[b].w, 0, key[i][b].z, key[i][b].w);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = first + i * 8 + t * 2 + e;
        const bool seen = at <= position && (window == 0 || at > position - window);
        score[i][e] = seen ? score[i][e] * scale : kNothing;  // scale holds log2(e): weights are powers of two
        highest = fmaxf(highest, score[i][e]);
      }
    }
    highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
    const float keep = merge_weight(maximum, highest), base = highest == kNothing ? 0.f : highest;
    maximum = highest;
    weight *= keep;
    u32 packed[kTiles];  // weights as the B operand: positions 2t and 2t + 1 of each tile, row g
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float a = exp2_fast(score[i][0] - base), b = exp2_fast(score[i][1] - base);
      weight += a + b;
      packed[i] = T::from_float2(a, b);
    }
    const float keep_even = __shfl_sync(kAllLanes, keep, t * 8), keep_odd = __shfl_sync(kAllLanes, keep, t * 8 + 4);
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[s][i][0] *= keep_even, sum[s][i][1] *= keep_odd, sum[s][i][2] *= keep_even, sum[s][i][3] *= keep_odd;
      }
    }
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u32 word[4];  // elements 2i and 2i + 1 of four positions
#pragma unroll
        for (int j = 0; j < 4; ++j) word[j] = i == 0 ? value[j][s].x : i == 1 ? value[j][s].y : i == 2 ? value[j][s].z : value[j][s].w;
        T::mma(sum[s][i], __byte_perm(word[0], word[1], 0x5410), __byte_perm(word[0], word[1], 0x7632), __byte_perm(word[2], word[3], 0x5410),
               __byte_perm(word[2], word[3], 0x7632), packed[0], packed[1]);
      }
    }
  }
  wait_for_previous();
  release_next();

  // Merge the warps of the block.
  weight += __shfl_xor_sync(kAllLanes, weight, 1);
  weight += __shfl_xor_sync(kAllLanes, weight, 2);
  if (t == 0 && g < rows) merged_stats[warp * rows + g] = make_float2(maximum, weight);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (2 * t + e >= rows) continue;
#pragma unroll
    for (int s = 0; s < kSegments; ++s) {
      if (HEAD % 64 && s * 64 + g * 8 >= HEAD) continue;
      float4* to = reinterpret_cast<float4*>(merged + (warp * rows + 2 * t + e) * HEAD + s * 64 + g * 8);
      to[0] = make_float4(sum[s][0][e], sum[s][0][2 + e], sum[s][1][e], sum[s][1][2 + e]);
      to[1] = make_float4(sum[s][2][e], sum[s][2][2 + e], sum[s][3][e], sum[s][3][2 + e]);
    }
  }
  __syncthreads();
  const size_t item = size_t(batch) * gridDim.y + blockIdx.y, items = size_t(gridDim.z) * gridDim.y;
  const int outputs = rows * HEAD;
  float* partials = workspace + item * splits * outputs;
  float2* stats = reinterpret_cast<float2*>(workspace + items * splits * outputs) + item * splits * rows;
  // A lane for each warp and row finds its weight; then a lane for four outputs and a quarter of the warps. Short code: it runs once a launch.
  if (warp * 32 < rows * kWarps) {
    const int r = threadIdx.x / kWarps, w = threadIdx.x % kWarps;
    const float2 own = r < rows ? merged_stats[w * rows + r] : make_float2(kNothing, 0.f);
    float highest = own.x;
#pragma unroll
    for (int step = kWarps / 2; step > 0; step /= 2) highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, step));
    const float keep = merge_weight(own.x, highest);
    float total = keep * own.y;
#pragma unroll
    for (int step = kWarps / 2; step > 0; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);
    if (r < rows) merged_stats[w * rows + r] = make_float2(keep, total);
    if (!CLUSTER && r < rows && w == 0) stats[split * rows + r] = make_float2(highest, total);
#if __CUDA_ARCH__ >= 900
    if (CLUSTER && active > 1) cluster_wait();
    if (CLUSTER && active > 1 && r < rows && w < active) send_to_rank(inbox_stats + split * rows + r, &all_here, w, make_float2(highest, total));
#endif
  }
#if __CUDA_ARCH__ >= 900
  else if (CLUSTER && active > 1) cluster_wait();
#endif
  __syncthreads();
  auto write = [&](int quad, float4 total, float weight) {
    const int r = first_row + quad * 4 / HEAD;
    if (r >= row_count) return;
    const int query_token = queries == 1 ? 0 : r / heads;
    u16* to = out + ((size_t(batch) * queries + query_token) * kv_heads * heads + kv_head * heads + r - query_token * heads) * HEAD + quad * 4 % HEAD;
    const float inverse = 1.f / weight;
    *reinterpret_cast<uint2*>(to) = make_uint2(T::from_float2(total.x * inverse, total.y * inverse), T::from_float2(total.z * inverse, total.w * inverse));
  };
  const int quads = outputs / 4;
#pragma unroll 1
  for (int quad = warp * 8 + lane % 8; quad < quads; quad += kWarps * 8) {
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int j = 0; j < kWarps / 4; ++j) {
      const int w = lane / 8 * (kWarps / 4) + j;
      const float4 v = reinterpret_cast<const float4*>(merged + w * outputs)[quad];
      add_weighted(total, v, merged_stats[w * rows + quad * 4 / HEAD].x);
    }
    total = add_across<8>(total);
    if (!CLUSTER && lane < 8) reinterpret_cast<float4*>(partials + split * outputs)[quad] = total;
#if __CUDA_ARCH__ >= 900
    if (CLUSTER && lane < 8 && active > 1) {
      const int share = by_active(quad / 4);
      send_to_rank(inbox + (split * shares + share) * 4 + quad % 4, &all_here, quad / 4 - share * active, total);
    }
    if (CLUSTER && lane < 8 && active == 1) {
      const float4 sum = make_float4(total.x + 0.f, total.y + 0.f, total.z + 0.f, total.w + 0.f);  // no -0, which the merge below makes none of either
      write(quad, sum, merged_stats[quad * 4 / HEAD].y);
    }
#endif
  }
#if __CUDA_ARCH__ >= 900
  if (CLUSTER) {
    if (active == 1) return;
    barrier_wait(&all_here);  // nobody writes here any more, and nobody reads what this block holds
    // The cluster's warps share the outputs out: a lane for four outputs of one block.
#pragma unroll 1
    for (int share = warp; share < shares; share += kWarps) {
      const int quad = (share * active + split) * 4 + lane % 4, rank = lane / 4;
      if (quad >= quads) break;
      float2 own = make_float2(kNothing, 0.f);
      float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
      if (rank < active) own = inbox_stats[rank * rows + quad * 4 / HEAD], total = inbox[(rank * shares + share) * 4 + lane % 4];
      float highest = own.x;
#pragma unroll
      for (int step = 4; step < 32; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, step));
      const float keep = merge_weight(own.x, highest);
      float4 weighted = make_float4(0.f, 0.f, 0.f, 0.f);
      add_weighted(weighted, total, keep);
      weighted = add_across<4>(weighted);
      float total_weight = keep * own.y;
#pragma unroll
      for (int step = 4; step < 32; step *= 2) total_weight += __shfl_xor_sync(kAllLanes, total_weight, step);
      if (rank == 0) write(quad, weighted, total_weight);
    }
    return;
  }
#endif

  // The last of the splits to arrive merges them all.
  __shared__ bool last;
  u32* arrivals = (arrivals_apart ? arrivals_apart : reinterpret_cast<u32*>(workspace + items * splits * (outputs + 2 * rows))) + item;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(arrivals, 1u) == u32(splits - 1);
    if (last) *arrivals = 0;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();

  // Parts of the splits side by side, then merged in order; no more parts than the memory of the warps' results holds.
  const int parts = min(max(kThreads / quads, 1), kWarps);
  float4* totals = reinterpret_cast<float4*>(merged);
#pragma unroll 1
  for (int i = threadIdx.x; i < quads * parts; i += kThreads) {
    const int part = i / quads, quad = i - part * quads, r = quad * 4 / HEAD;
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
    float highest = kNothing, total_weight = 0.f;
#pragma unroll 4
    for (int s = part; s < splits; s += parts) {
      const float2 own = __ldcg(stats + s * rows + r);
      const float4 v = __ldcg(reinterpret_cast<const float4*>(partials + s * outputs) + quad);
      const float common = fmaxf(highest, own.x);
      const float keep = merge_weight(highest, common), gain = merge_weight(own.x, common);
      total.x *= keep, total.y *= keep, total.z *= keep, total.w *= keep;
      add_weighted(total, v, gain);
      total_weight = total_weight * keep + own.y * gain;
      highest = common;
    }
    totals[i] = total;
    if (quad * 4 % HEAD == 0) merged_stats[part * rows + r] = make_float2(highest, total_weight);
  }
  __syncthreads();
#pragma unroll 1
  for (int quad = threadIdx.x; quad < quads; quad += kThreads) {
    const int r = quad * 4 / HEAD;
    float highest = kNothing, total_weight = 0.f;
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int p = 0; p < parts; ++p) highest = fmaxf(highest, merged_stats[p * rows + r].x);
    for (int p = 0; p < parts; ++p) {
      const float2 own = merged_stats[p * rows + r];
      const float keep = merge_weight(own.x, highest);
      add_weighted(total, totals[p * quads + quad], keep);
      total_weight = fmaf(keep, own.y, total_weight);
    }
    write(quad, total, total_weight);
  }
}

template <class T, int HEAD, bool CLUSTER>
__global__ void __launch_bounds__(kThreads, 1)
    attention_decode(const u16* q, const u16* cache_k, const u16* cache_v, const int* lengths, u16* out, float* workspace, u32* arrivals_apart,
                     int queries, int heads, int kv_heads, int rows, int row_blocks, int max_length, int window, float scale) {
  extern __shared__ float4 raw[];
  attend<T, HEAD, CLUSTER, false>(raw, q, cache_k, cache_v, lengths, out, workspace, arrivals_apart, queries, heads, kv_heads, rows, row_blocks, max_length,
                                  window, scale, {});
}

template <class T, int HEAD, bool CLUSTER>
__global__ void __launch_bounds__(kThreads, 1)
    attention_rope_decode(const u16* qkv, const float2* rotations, const u16* q_norm, const u16* k_norm, float norm_offset, float epsilon, u16* cache_k,
                          u16* cache_v, const int* lengths, u16* out, float* workspace, u32* arrivals_apart, int queries, int heads, int kv_heads, int rows,
                          int row_blocks, int max_length, int window, float scale) {
  extern __shared__ float4 raw[];
  const NewTokens fresh{qkv, rotations, q_norm, k_norm, norm_offset, epsilon, cache_k, cache_v};
  attend<T, HEAD, CLUSTER, true>(raw, nullptr, cache_k, cache_v, lengths, out, workspace, arrivals_apart, queries, heads, kv_heads, rows, row_blocks,
                                 max_length, window, scale, fresh);
}

#endif

}  // namespace fh

#ifndef __CUDACC_RTC__
#include "attention.h"
#include "launch.h"

namespace fh {

// Of one block; queries: 0 without the rotary embedding in the launch.
static int shared_bytes(int head_size, int rows, int cluster, int queries) {
  const int warps = kThreads / 32;
  const int inbox = cluster > 1 ? inbox_groups(rows, head_size, cluster) * 64 + cluster * rows * 8 : 0;
  return 4 * warps * rows * (head_size + 2) + inbox + (queries ? (rows + 2 * queries) * head_size * 2 : 0);
}

static const char* check(const fh_attention_shape& s) {
  if (s.head_size != 64 && s.head_size != 96 && s.head_size != 128 && s.head_size != 256) {
    return failure("attention: head_size is %d, expected 64, 96, 128 or 256; use another attention for this model", s.head_size);
  }
  if (s.batch < 1 || s.queries < 1 || s.kv_heads < 1 || s.q_heads < 1 || s.q_heads % s.kv_heads) {
    return failure("attention: batch %d, queries %d, heads %d over %d, expected at least 1 each and heads a multiple of key-value heads", s.batch, s.queries,
                   s.q_heads, s.kv_heads);
  }
  if (s.max_length < s.queries || s.window < 0) {
    return failure("attention: max_length is %d and window %d, expected at least %d queries and 0 or more", s.max_length, s.window, s.queries);
  }
  if (s.dtype != FH_FP16 && s.dtype != FH_BF16) return failure("attention: dtype is %d, expected FH_FP16 or FH_BF16", int(s.dtype));
  return nullptr;
}

struct Arguments {
  const u16 *q, *k, *v;
  const int* lengths;
  u16* out;
  float* workspace;
  u32* arrivals;
  const fh_attention_fusion* fusion;  // NULL: q is given
};

template <class T, int HEAD>
const char* decode(const fh_attention_shape& s, const fh_attention_plan& plan, const Arguments& a, const fh_device& device, cudaStream_t stream) {
  const Grid grid{dim3(plan.splits, s.kv_heads * plan.row_blocks, s.batch), plan.threads,
                  shared_bytes(HEAD, plan.rows, plan.cluster, a.fusion ? s.queries : 0), plan.cluster};
  const float scale = s.scale * 1.4426950408889634f;
  const int heads = s.q_heads / s.kv_heads;
  if (const fh_attention_fusion* f = a.fusion) {
    return launch("attention_rope_decode", device, stream, grid,
                  plan.cluster > 1 ? attention_rope_decode<T, HEAD, true> : attention_rope_decode<T, HEAD, false>, static_cast<const u16*>(f->qkv),
                  reinterpret_cast<const float2*>(f->rotations), static_cast<const u16*>(f->q_norm), static_cast<const u16*>(f->k_norm), f->norm_offset,
                  f->epsilon, const_cast<u16*>(a.k), const_cast<u16*>(a.v), a.lengths, a.out, a.workspace, a.arrivals, s.queries, heads, s.kv_heads,
                  plan.rows, plan.row_blocks, s.max_length, s.window, scale);
  }
  return launch("attention_decode", device, stream, grid, plan.cluster > 1 ? attention_decode<T, HEAD, true> : attention_decode<T, HEAD, false>, a.q, a.k,
                a.v, a.lengths, a.out, a.workspace, a.arrivals, s.queries, heads, s.kv_heads, plan.rows, plan.row_blocks, s.max_length, s.window, scale);
}

template <class T>
const char* decode(const fh_attention_shape& s, const fh_attention_plan& plan, const Arguments& a, const fh_device& device, cudaStream_t stream) {
  switch (s.head_size) {
    case 64: return decode<T, 64>(s, plan, a, device, stream);
    case 96: return decode<T, 96>(s, plan, a, device, stream);
    case 128: return decode<T, 128>(s, plan, a, device, stream);
    default: return decode<T, 256>(s, plan, a, device, stream);
  }
}

}  // namespace fh

const char* fh_attention_make_plan(const fh_attention_shape* s, const fh_device* device, fh_attention_plan* plan) {
  if (const char* wrong = fh::check(*s)) return wrong;
  const int row_count = s->queries * (s->q_heads / s->kv_heads);
  plan->rows = row_count < fh::kMaxRows ? row_count : fh::kMaxRows;
  plan->row_blocks = (row_count + plan->rows - 1) / plan->rows;
  plan->threads = fh::kThreads;
  const int items = plan->items = s->batch * s->kv_heads * plan->row_blocks;
  // A block for every multiprocessor, and no more splits than give each warp a step of its own.
  const int windowed = s->window + s->queries - 1, visible = s->window > 0 && windowed < s->max_length ? windowed : s->max_length;
  const int positions = plan->threads / 32 * fh::kStep, useful = (visible + positions - 1) / positions;
  const int wanted = device->multiprocessors < items ? 1 : device->multiprocessors / items;
  plan->splits = wanted < useful ? wanted : useful;
  // A cluster's blocks merge sooner than the last block to arrive: worth more than further splits, until a warp takes more than four steps. On an H100 that
  // is 5 us of each of Gemma-3-270M's layers without a window, one key-value head, at 512 positions of 4,096.
  plan->cluster = 1;
  if (device->capability >= 90 && plan->splits <= 4 * fh::kMaxCluster) {
    plan->splits = plan->splits < fh::kMaxCluster ? plan->splits : fh::kMaxCluster;
    plan->cluster = plan->splits;
  }
  plan->workspace_bytes = plan->cluster > 1 ? 0 : (size_t(items) * plan->splits * plan->rows * (s->head_size + 2) + items) * sizeof(float);
  return nullptr;
}

const char* fh_attention_decode(const fh_attention_shape* shape, const fh_attention_plan* plan, const void* q, const void* cache_k, const void* cache_v,
                                const int* lengths, void* out, void* workspace, unsigned* arrivals, const fh_device* device, cudaStream_t stream) {
  using namespace fh;
  if (const char* wrong = check(*shape)) return wrong;
  const Arguments a{static_cast<const u16*>(q), static_cast<const u16*>(cache_k), static_cast<const u16*>(cache_v), lengths,
                    static_cast<u16*>(out),     static_cast<float*>(workspace),   arrivals, nullptr};
  return shape->dtype == FH_FP16 ? decode<Fp16>(*shape, *plan, a, *device, stream) : decode<Bf16>(*shape, *plan, a, *device, stream);
}

const char* fh_attention_rope_decode(const fh_attention_shape* shape, const fh_attention_plan* plan, const fh_attention_fusion* fusion, void* cache_k,
                                     void* cache_v, const int* lengths, void* out, void* workspace, unsigned* arrivals, const fh_device* device,
                                     cudaStream_t stream) {
  using namespace fh;
  if (const char* wrong = check(*shape)) return wrong;
  if (shape->queries > FH_ATTENTION_FUSED_QUERIES) {
    return failure("attention_rope_decode: queries is %d, expected at most %d; launch fh_attention_rope_write and fh_attention_decode", shape->queries,
                   FH_ATTENTION_FUSED_QUERIES);
  }
  const Arguments a{nullptr, static_cast<u16*>(cache_k), static_cast<u16*>(cache_v), lengths, static_cast<u16*>(out), static_cast<float*>(workspace), arrivals,
                    fusion};
  return shape->dtype == FH_FP16 ? decode<Fp16>(*shape, *plan, a, *device, stream) : decode<Bf16>(*shape, *plan, a, *device, stream);
}

const char* fh_attention_rope_write(const fh_attention_shape* shape, const void* qkv, const float* rotations, const void* q_norm, const void* k_norm,
                                    float norm_offset, float epsilon, const int* lengths, void* q, void* cache_k, void* cache_v, const fh_device* device,
                                    cudaStream_t stream) {
  using namespace fh;
  if (const char* wrong = check(*shape)) return wrong;
  const Grid grid{dim3((shape->q_heads + 2 * shape->kv_heads + 3) / 4, shape->queries, shape->batch), 128};
  return launch("attention_rope_write", *device, stream, grid, shape->dtype == FH_FP16 ? attention_rope_write<Fp16> : attention_rope_write<Bf16>,
                static_cast<const u16*>(qkv), reinterpret_cast<const float2*>(rotations), static_cast<const u16*>(q_norm),
                static_cast<const u16*>(k_norm), norm_offset, epsilon, lengths, static_cast<u16*>(q), static_cast<u16*>(cache_k),
                static_cast<u16*>(cache_v), shape->q_heads, shape->kv_heads, shape->head_size, shape->max_length);
}
#endif
