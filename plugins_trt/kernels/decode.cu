// decode.cu: from the candidates of a step to the next token, as flashhead_edge/decoding.py defines it (decode.h says what is read and written).
//
// One block a row. The candidates are sorted by (logit, then the smaller id), so that min-p, top-k and top-p each keep a beginning of the list; a token is
// the largest of logit / temperature + noise among what they keep. The noise of a token is a function of (seed, step, token id) alone.
//
// Determinism. Nothing depends on the order of the candidates, on the grid or on other rows. Everything after the logits is in float64, as the definition is:
// a draw differs from the definition's only where two scores, or a sum of probabilities and top-p, agree to 15 digits.
//
// Cost: sorting P candidates (a power of two) takes log2(P) (log2(P) + 1) / 2 barriers; a candidate that may be drawn two logarithms in float64, which
// boards have little of: about 0.1 us a candidate on an Orin.
#include "decode.h"

namespace {

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int kWarps = FH_DECODE_THREADS / 32;
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

// Sum over the block, in an order that FH_DECODE_THREADS fixes; every thread gets it.
__device__ double block_sum(double value, double* warps) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  __syncthreads();  // readers of the last sum are done
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < kWarps; ++w) total += warps[w];
  return total;
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
  __shared__ double warps[kWarps];
  __shared__ double warp_score[kWarps];
  __shared__ u32 warp_id[kWarps];
  const int row = blockIdx.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int count = int(min(a.count[size_t(row) * a.count_stride], (long long)(a.width)));
  const double temperature = a.temperature[row];
  int padded = 64;
  while (padded < count) padded *= 2;

  for (int i = thread; i < padded; i += FH_DECODE_THREADS) {
    keys[i] = i < count ? key_of(a.logits[size_t(row) * a.width + i], u32(a.ids[size_t(row) * a.width + i])) : 0;
  }
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

  const float lowest = __uint_as_float(0xff800000u);  // minus infinity
  const int there = boundary(count, [&](int i) { return logit_of(keys[i]) > lowest; });
  if (there == 0) {
    if (thread == 0) {
      a.token[row] = -1;
      if (a.best > 0) a.logprob[row] = lowest;
    }
    for (int i = thread; i < a.best; i += FH_DECODE_THREADS) a.best_ids[row * a.best + i] = -1, a.best_logprobs[row * a.best + i] = lowest;
    return;
  }

  u64 chosen = keys[0];
  if (temperature > 0) {
    const auto score = [&](int i) { return double(logit_of(keys[i])) / temperature; };
    const double best = score(0);
    int kept = there;
    if (a.min_p[row] > 0) {
      const double least = best + log(a.min_p[row]);
      kept = boundary(kept, [&](int i) { return score(i) >= least; });
    }
    const long long top_k = a.top_k[row];
    if (top_k > 0 && top_k < kept) {
      const float kth = logit_of(keys[top_k - 1]);
      kept = boundary(kept, [&](int i) { return logit_of(keys[i]) >= kth; });  // what ties with the k-th stays
    }
    if (a.top_p[row] < 1) {
      double mass = 0;
      for (int i = thread; i < kept; i += FH_DECODE_THREADS) mass += exp(score(i) - best);
      const double limit = a.top_p[row] * block_sum(mass, warps);
      double before = 0;  // mass of all earlier candidates
      int stay = 0;
      for (int start = 0; start < kept; start += FH_DECODE_THREADS) {
        const int i = start + thread;
        const double own = i < kept ? exp(score(i) - best) : 0;
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
    for (int i = thread; i < kept; i += FH_DECODE_THREADS) {
      const u32 id = id_of(keys[i]);
      const double value = score(i) + gumbel(a.seed[row], u32(a.step[row]), id);
      if (value > mine || (value == mine && id < mine_id)) mine = value, mine_id = id;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const double value = __shfl_xor_sync(kAllLanes, mine, step);
      const u32 id = __shfl_xor_sync(kAllLanes, mine_id, step);
      if (value > mine || (value == mine && id < mine_id)) mine = value, mine_id = id;
    }
    if (lane == 0) warp_score[warp] = mine, warp_id[warp] = mine_id;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
      if (warp_score[w] > mine || (warp_score[w] == mine && warp_id[w] < mine_id)) mine = warp_score[w], mine_id = warp_id[w];
    }
    chosen = 0xffffffffu - mine_id;  // its logit is looked up below, where one is wanted
  }
  if (thread == 0) a.token[row] = id_of(chosen);
  if (a.best == 0) return;

  double mass = 0;
  const double top = logit_of(keys[0]);
  for (int i = thread; i < there; i += FH_DECODE_THREADS) mass += exp(double(logit_of(keys[i])) - top);
  const double normaliser = top + log(block_sum(mass, warps));
  for (int i = thread; i < max(a.best, there); i += FH_DECODE_THREADS) {
    const float logprob = i < there ? float(double(logit_of(keys[i])) - normaliser) : lowest;
    if (i < a.best) {
      a.best_ids[row * a.best + i] = i < there ? (long long)(id_of(keys[i])) : -1;
      a.best_logprobs[row * a.best + i] = logprob;
    }
    if (i < there && id_of(keys[i]) == id_of(chosen)) a.logprob[row] = logprob;
  }
}
