// decode.cu: from the candidates of a step to the next token, as flashhead_edge/decoding.py defines it (decode.h says what is read and written).
//
// One block a row. Min-p, top-k and top-p each keep a beginning of the candidates in the order (logit, then the smaller id); a token is the largest of
// logit / temperature + noise among what they keep. The noise of a token is a function of (seed, step, token id) alone. Only what a cut may keep, or is
// among the best that are asked for, is sorted: counts and masses by gap to the best logit say where that surely ends. A draw without cuts sorts nothing.
//
// Determinism. Nothing depends on the order of the candidates, on the grid or on other rows: masses are summed as whole numbers of 2^-100. Everything
// after the logits is in float64, as the definition is: a draw differs from the definition's only where two scores, or a sum of probabilities and top-p,
// agree to 15 digits.
//
// Cost: three passes over the candidates, which then lie in the L1 cache; sorting P of them (a power of two) takes log2(P) (log2(P) + 1) / 2 barriers; a
// candidate that may be drawn two logarithms in float64, which boards have little of: about 0.1 us a candidate on an Orin.
#include "decode.h"

extern "C" __global__ void flashhead_decode(FlashHeadDecode a);

#ifdef __CUDACC__
namespace {

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int kWarps = FH_DECODE_THREADS / 32;
constexpr int kBins = FH_DECODE_THREADS;  // one a thread: of gaps to the best score, 1 / kBinsPerUnit wide; the last has no end
constexpr double kBinsPerUnit = 8;
constexpr u32 kAllLanes = 0xffffffffu;

// Larger logit first, then the smaller id; keys rise with what comes first. -0 and 0 are equal.
__device__ u64 key_of(float logit, u32 id) {
  const u32 bits = __float_as_uint(logit + 0.f);
  const u32 rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (u64(rising) << 32) | (0xffffffffu - id);
}

__device__ float logit_of(u64 key) {
  const u32 rising = u32(key >> 32);
  return __uint_as_float(rising & 0x80000000u ? rising & 0x7fffffffu : ~rising);
}

__device__ u32 id_of(u64 key) { return 0xffffffffu - u32(key); }

// Standard Gumbel noise of a token. Source: Philox4x32-10, Salmon et al., SC 2011; see decoding.uniform.
__device__ double gumbel(u64 seed, u32 step, u32 id) {
  u32 c0 = id, c1 = step, c2 = 0, c3 = 0, k0 = u32(seed), k1 = u32(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u32 a_low = 0xD2511F53u * c0, a_high = __umulhi(0xD2511F53u, c0), b_low = 0xCD9E8D57u * c2, b_high = __umulhi(0xCD9E8D57u, c2);
    c0 = b_high ^ c1 ^ k0, c1 = b_low, c2 = a_high ^ c3 ^ k1, c3 = a_low;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const u64 x = (u64(c0 >> 6) << 26) | (c1 >> 6);
  return -log(-log((double(x) + 0.5) * 0x1p-52));
}

struct Candidates {
  const long long* ids;
  const float* logits;
  int count;
};

// Those that may be chosen, shared out over the block.
template <class Body>
__device__ void each(const Candidates& c, Body body) {
  for (int i = threadIdx.x; i < c.count; i += FH_DECODE_THREADS) {
    const float logit = c.logits[i];
    if (logit > __uint_as_float(0xff800000u)) body(logit, u32(c.ids[i]));
  }
}

// A sum of numbers from 0 to 1 in whole numbers of 2^-50 and 2^-100, so that its order is free; 8,192 of them at most.
struct Mass {
  u64 high, low;
};

__device__ Mass mass_of(double x) {
  const double scaled = x * 0x1p50;
  const u64 high = u64(scaled);
  return {high, u64((scaled - double(high)) * 0x1p50)};
}

__device__ double value_of(Mass m) { return double(m.high) * 0x1p-50 + double(m.low) * 0x1p-100; }

// Over the block; every thread gets it. `scratch` [2 * kWarps].
__device__ Mass block_sum(Mass m, u64* scratch) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    m.high += __shfl_xor_sync(kAllLanes, m.high, step);
    m.low += __shfl_xor_sync(kAllLanes, m.low, step);
  }
  __syncthreads();  // readers of the last sum are done
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = m.high, scratch[kWarps + threadIdx.x / 32] = m.low;
  __syncthreads();
  m = {0, 0};
  for (int w = 0; w < kWarps; ++w) m.high += scratch[w], m.low += scratch[kWarps + w];
  return m;
}

__device__ u64 block_max(u64 key, u64* scratch) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) key = max(key, __shfl_xor_sync(kAllLanes, key, step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = key;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) key = max(key, scratch[w]);
  return key;
}

__device__ int bin_of(double gap) { return gap * kBinsPerUnit < kBins - 1 ? int(gap * kBinsPerUnit) : kBins - 1; }

// The first bin at which the sum of all bins so far reaches `wanted`, the last one where none does. A thread a bin; `scratch` [kWarps].
__device__ int reaching(u64 own, u64 wanted, u64* scratch) {
  __shared__ int first;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const u64 other = __shfl_up_sync(kAllLanes, own, step);
    if (threadIdx.x % 32 >= step) own += other;
  }
  __syncthreads();
  if (threadIdx.x == 0) first = kBins - 1;
  if (threadIdx.x % 32 == 31) scratch[threadIdx.x / 32] = own;
  __syncthreads();
  for (int w = 0; w < int(threadIdx.x) / 32; ++w) own += scratch[w];
  if (own >= wanted) atomicMin(&first, int(threadIdx.x));
  __syncthreads();
  return first;
}

// First place of the sorted list at which `keeps` ends; keeps holds for a beginning of the list.
template <class Keeps>
__device__ int boundary(int n, Keeps keeps) {
  int low = 0;
  while (low < n) {
    const int middle = (low + n) / 2;
    if (keeps(middle)) {
      low = middle + 1;
    } else {
      n = middle;
    }
  }
  return low;
}

}  // namespace

// Grid: rows. Dynamic shared memory: 8 bytes for each candidate of `width`, rounded up to a power of two, at least 64.
extern "C" __global__ void __launch_bounds__(FH_DECODE_THREADS) flashhead_decode(const FlashHeadDecode a) {
  extern __shared__ u64 keys[];
  __shared__ u64 scratch[2 * kWarps];
  __shared__ u64 bin_mass[kBins];
  __shared__ u32 bin_count[kBins];
  __shared__ double warps[kWarps];
  __shared__ u32 warp_id[kWarps];
  __shared__ u32 listed_count;
  const int row = blockIdx.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int count = int(min(a.count[size_t(row) * a.count_stride], (long long)(a.width)));
  const float lowest = __uint_as_float(0xff800000u);  // minus infinity
  const Candidates candidates = {a.ids + size_t(row) * a.width, a.logits + size_t(row) * a.width, count};

  u64 best_key = 0;
  each(candidates, [&](float logit, u32 id) { best_key = max(best_key, key_of(logit, id)); });
  best_key = block_max(best_key, scratch);
  if (best_key == 0) {
    if (thread == 0) {
      a.token[row] = -1;
      if (a.best > 0) a.logprob[row] = lowest;
    }
    for (int i = thread; i < a.best; i += FH_DECODE_THREADS) a.best_ids[row * a.best + i] = -1, a.best_logprobs[row * a.best + i] = lowest;
    return;
  }

  const double temperature = a.temperature[row], min_p = a.min_p[row], top_p = a.top_p[row];
  const long long top_k = a.top_k[row];
  const bool draws = temperature > 0, truncates = draws && (min_p > 0 || top_k > 0 || top_p < 1);
  const double unit = draws ? temperature : 1, top = logit_of(best_key), best = top / unit;
  const auto score = [&](float logit) { return double(logit) / unit; };

  int there = 0, listed = 0;  // candidates that may be chosen; the first so many of them are in `keys`, in order
  Mass all = {0, 0};          // of exp(score - best), where top-p alone cuts
  if (truncates || a.best > 0) {
    const bool by_mass = truncates && top_p < 1 && min_p <= 0 && top_k <= 0;
    bin_count[thread] = 0, bin_mass[thread] = 0;
    if (thread == 0) listed_count = 0;
    __syncthreads();
    int mine = 0;
    each(candidates, [&](float logit, u32) {
      const double gap = best - score(logit);
      const int bin = bin_of(gap);
      atomicAdd(&bin_count[bin], 1u);
      if (by_mass) {
        const Mass m = mass_of(exp(-gap));
        all.high += m.high, all.low += m.low;
        atomicAdd(&bin_mass[bin], m.high);
      }
      ++mine;
    });
    there = int(block_sum({u64(mine), 0}, scratch).high);
    int last = -1;  // bin that surely holds the end of what is needed in order
    if (truncates) {
      last = kBins - 1;
      if (min_p > 0) last = bin_of(-log(min_p) * (1 + 1e-12) + 1e-9);
      if (top_k > 0) last = min(last, reaching(bin_count[thread], u64(top_k), scratch));
      if (by_mass) {
        all = block_sum(all, scratch);
        last = reaching(bin_mass[thread], u64(min(top_p * value_of(all) + 1e-9, 8192.) * 0x1p50), scratch);
      }
    }
    if (a.best > 0) last = max(last, reaching(bin_count[thread], u64(a.best), scratch));
    each(candidates, [&](float logit, u32 id) {
      if (bin_of(best - score(logit)) <= last) keys[atomicAdd(&listed_count, 1u)] = key_of(logit, id);
    });
    __syncthreads();
    listed = int(listed_count);
    int padded = 64;
    while (padded < listed) padded *= 2;
    for (int i = listed + thread; i < padded; i += FH_DECODE_THREADS) keys[i] = 0;
    __syncthreads();
    for (int size = 2; size <= padded; size *= 2) {
      for (int step = size / 2; step > 0; step /= 2) {
        for (int pair = thread; pair < padded / 2; pair += FH_DECODE_THREADS) {
          const int i = 2 * pair - (pair & (step - 1)), j = i + step;
          const u64 x = keys[i], y = keys[j];
          if ((x < y) == ((i & size) == 0)) keys[i] = y, keys[j] = x;
        }
        __syncthreads();
      }
    }
  }

  u32 chosen = id_of(best_key);
  if (draws) {
    const auto sorted_score = [&](int i) { return score(logit_of(keys[i])); };
    int kept = listed;
    if (min_p > 0) {
      const double least = best + log(min_p);
      kept = boundary(kept, [&](int i) { return sorted_score(i) >= least; });
    }
    if (top_k > 0 && top_k < kept) {
      const float kth = logit_of(keys[top_k - 1]);
      kept = boundary(kept, [&](int i) { return logit_of(keys[i]) >= kth; });  // what ties with the k-th stays
    }
    if (top_p < 1) {
      if (min_p > 0 || top_k > 0) {
        all = {0, 0};
        for (int i = thread; i < kept; i += FH_DECODE_THREADS) {
          const Mass m = mass_of(exp(sorted_score(i) - best));
          all.high += m.high, all.low += m.low;
        }
        all = block_sum(all, scratch);
      }
      const double limit = top_p * value_of(all);
      double before = 0;  // mass of all earlier candidates
      int stay = 0;
      for (int start = 0; start < kept; start += FH_DECODE_THREADS) {
        const int i = start + thread;
        const double own = i < kept ? exp(sorted_score(i) - best) : 0;
        double sum = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          const double other = __shfl_up_sync(kAllLanes, sum, step);
          if (lane >= step) sum += other;
        }
        __syncthreads();
        if (lane == 31) warps[warp] = sum;
        __syncthreads();
        double earlier = before;
        for (int w = 0; w < kWarps; ++w) {
          if (w < warp) earlier += warps[w];
          before += warps[w];
        }
        stay += __syncthreads_count(i < kept && (i == 0 || earlier + (sum - own) < limit));
        if (stay < start + FH_DECODE_THREADS) break;
      }
      kept = stay;
    }
    double mine = -1e300;
    u32 mine_id = 0xffffffffu;
    const auto draw = [&](float logit, u32 id) {
      const double value = score(logit) + gumbel(a.seed[row], u32(a.step[row]), id);
      if (value > mine || (value == mine && id < mine_id)) mine = value, mine_id = id;
    };
    if (truncates) {
      for (int i = thread; i < kept; i += FH_DECODE_THREADS) draw(logit_of(keys[i]), id_of(keys[i]));
    } else {
      each(candidates, draw);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const double value = __shfl_xor_sync(kAllLanes, mine, step);
      const u32 id = __shfl_xor_sync(kAllLanes, mine_id, step);
      if (value > mine || (value == mine && id < mine_id)) mine = value, mine_id = id;
    }
    __syncthreads();  // readers of `warps` are done
    if (lane == 0) warps[warp] = mine, warp_id[warp] = mine_id;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
      if (warps[w] > mine || (warps[w] == mine && warp_id[w] < mine_id)) mine = warps[w], mine_id = warp_id[w];
    }
    chosen = mine_id;
  }
  if (thread == 0) a.token[row] = chosen;
  if (a.best == 0) return;

  Mass mass = {0, 0};
  each(candidates, [&](float logit, u32) {
    const Mass m = mass_of(exp(double(logit) - top));
    mass.high += m.high, mass.low += m.low;
  });
  const double normaliser = top + log(value_of(block_sum(mass, scratch)));
  each(candidates, [&](float logit, u32 id) {
    if (id == chosen) a.logprob[row] = float(double(logit) - normaliser);
  });
  for (int i = thread; i < a.best; i += FH_DECODE_THREADS) {
    a.best_ids[row * a.best + i] = i < there ? (long long)(id_of(keys[i])) : -1;
    a.best_logprobs[row * a.best + i] = i < there ? float(double(logit_of(keys[i])) - normaliser) : lowest;
  }
}
#endif

#ifndef __CUDACC_RTC__
#include "launch.h"

const char* fh_decode(const FlashHeadDecode* arguments, const fh_device* device, cudaStream_t stream) {
  if (arguments->rows < 1 || arguments->width < 1 || arguments->width > FH_DECODE_CANDIDATES || arguments->best < 0) {
    return fh::failure("decode: %d rows of %d candidates, the best %d of them, expected at least 1 row, 1 to %d candidates and 0 or more", arguments->rows,
                       arguments->width, arguments->best, FH_DECODE_CANDIDATES);
  }
  int keys = 64;
  while (keys < arguments->width) keys *= 2;
  fh_device apart = *device;
  apart.overlap = 0;  // a draw does not wait by itself for the launch before it
  return fh::launch("decode", apart, stream, {dim3(arguments->rows), FH_DECODE_THREADS, 8 * keys}, flashhead_decode, *arguments);
}
#endif
