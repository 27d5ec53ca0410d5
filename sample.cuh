// SPDX-License-Identifier: Apache-2.0
//
// sample.cuh: from a row of logits to an id, its logprob and its rank. Sitting 2; included by
// gemma.cu. Twins: sample, adjust and log_softmax in reference.cpp.
//
//   key     a logit and its id as one integer: ascending keys are descending logits, then ascending
//           ids. Who has the best key is a minimum, and no two keys are equal.
//   weight  e^(z - top) in units of 2^-40, an integer: sums of weights have no order, so threads
//           may add them as they like, and the result has the same bits.
//   bound   a key that all ids of interest reach. Blocks of 256 ids know their best key, and a
//           block whose best is behind the bound is never read again.
//
//           | block 0 | block 1 | block 2 | ..          best_kernel: 1 key of 256 logits
//             best      best      best
//              `-- top k of these is a bound --'        sample_kernel: candidates within it
//
#pragma once

#include "machine.cuh"

namespace gemma {
namespace {

constexpr int block_ids = 256;         // a warp finds the best of so many ids
constexpr int most_candidates = 1024;  // as many threads sort them
constexpr int bins = 2048;
constexpr double log2e = 1.4426950408889634;

// [1] Arguments -----------------------------------------------------------------------------------

// What one row of logits is asked for; ask_of makes it from an Output.
struct Ask {
    float scale;            // log2 e / temperature; 0: greedy
    int top_k;              // 0: off
    float top_p;            // 1: off
    uint64_t least_weight;  // min_p: lighter ids are never drawn
    uint64_t hash;          // of the seed and the output's index: the draw
    int target, logprobs;   // as Output's and Sampling's
    int allowed;            // where its bitset begins in SampleArgs::allowed; -1: every id
    int first_adjustment, adjustments;  // its part of SampleArgs::adjustments
};
struct DeviceAdjustment {
    Adjustment made;
    float raw;  // the logit, while the adjusted one stands in its place
};
struct Details {  // what a Result has beside its id
    float logprob;
    int rank;
    int ids[20];
    float logprobs[20];
};

struct SampleArgs {
    float* logits;            // [outputs, rows]: V, then padding
    uint64_t* best;           // [outputs, ceil(vocab / 256)] the best key of each block of ids
    const Ask* asks;          // [outputs]
    const uint32_t* allowed;  // bitsets, one behind the other
    DeviceAdjustment* adjustments;
    int* ids;          // [outputs], in the host's memory
    Details* details;  // [outputs], likewise
    int outputs, rows, V, vocab;
};

// [2] Keys and weights ----------------------------------------------------------------------------

// 2^x for x in [-126, 126], 0 below: the same bits as reference.cpp's, which explains it.
__device__ inline float exp2_exact(float x) {
    const float clamped = fminf(fmaxf(x, -126.f), 126.f);
    const float n = (clamped + 12582912.f) - 12582912.f, f = clamped - n;
    float p = 0.00015353361959569156f;
    p = fmaf(p, f, 0.0013398875016719103f);
    p = fmaf(p, f, 0.00961843691766262f);
    p = fmaf(p, f, 0.055503323674201965f);
    p = fmaf(p, f, 0.24022647738456726f);
    p = fmaf(p, f, 0.6931471824645996f);
    p = fmaf(p, f, 1.f);
    return x < -126.f ? 0.f : p * __int_as_float((int(n) + 127) << 23);
}

// A logit and its id as one integer: ascending keys are descending logits, then ascending ids, and
// the logit can be read from it. `none` is behind all. Twin: order
constexpr uint64_t none = ~uint64_t(0);
__device__ inline uint64_t order(float logit, int id) {
    const uint32_t bits = __float_as_uint(logit + 0.f);  // -0 is 0
    const uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
    return uint64_t(~ascending) << 32 | uint32_t(id);
}
__device__ inline float logit_of(uint64_t key) {
    const uint32_t ascending = ~uint32_t(key >> 32);
    return __uint_as_float(ascending >> 31 ? ascending & 0x7fffffffu : ~ascending);
}

// e^(z - top) in units of 2^-40. Twin: weight
struct Weigher {
    float top, scale;
    uint64_t least_weight;  // lighter ones count as 0
    __device__ uint64_t operator()(uint64_t key) const {
        if (key == none) return 0;
        const auto w = uint64_t(exp2_exact((logit_of(key) - top) * scale) * 0x1p40f);
        return w >= least_weight ? w : 0;
    }
};

// The ids of one output's row of logits.
__host__ __device__ inline int blocks_of(int ids) { return (ids + block_ids - 1) / block_ids; }
struct Ids {
    const float* logits;      // [count]
    const uint32_t* allowed;  // bitset; null: all
    const uint64_t* best;     // [ceil(count / 256)] the best key of each block; null: not known
    int count;

    __device__ uint64_t key(int id) const {
        if (id >= count || (allowed && !(allowed[id / 32] >> id % 32 & 1))) return none;
        return order(logits[id], id);
    }
    // f(block), by a warp each, for the blocks of ids whose best key is not behind hi. A lane looks
    // at the best key of every 32nd of the warp's blocks.
    template <class Function>
    __device__ void each_block(uint64_t hi, Function f) const {
        const int warps = int(blockDim.x) / 32, lane = int(threadIdx.x) % 32;
        const int blocks = blocks_of(count);
        for (int first = int(threadIdx.x) / 32; first < blocks; first += 32 * warps) {
            const int mine = first + lane * warps;
            const unsigned near = __ballot_sync(~0u, mine < blocks && (!best || best[mine] <= hi));
            for (int i = 0; i < 32; i++) {
                if (near >> i & 1) f(first + i * warps);
            }
        }
    }
    // f(key) by a thread of the block for each key in lo..hi.
    template <class Function>
    __device__ void each(uint64_t lo, uint64_t hi, Function f) const {
        each_block(hi, [&](int block) {
            uint64_t keys[block_ids / 32];
            UNROLL for (int i = 0; i < block_ids / 32; i++) {
                keys[i] = key(block * block_ids + i * 32 + int(threadIdx.x) % 32);
            }
            UNROLL for (int i = 0; i < block_ids / 32; i++) {
                if (keys[i] >= lo && keys[i] <= hi && keys[i] != none) f(keys[i]);
            }
        });
    }
};

__device__ inline Ids ids_of(const SampleArgs& a, int o) {
    const int set = a.asks[o].allowed;
    return {a.logits + size_t(o) * a.rows, set < 0 ? nullptr : a.allowed + set,
            a.best + size_t(o) * blocks_of(a.vocab), a.vocab};
}

// [3] Searching a row -----------------------------------------------------------------------------

__device__ inline uint64_t warp_reduce(uint64_t v, auto op) {
    for (int i = 16; i; i >>= 1) v = op(v, uint64_t(__shfl_xor_sync(~0u, v, i)));
    return v;
}
struct Plus {
    __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Smaller {
    __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a < b ? a : b; }
};

// One row's scratch, of the 1,024 threads that work on it.
struct Scratch {
    uint64_t warps[32];
    uint64_t values[bins];  // a histogram, or the sums of blocks of ids
    struct alignas(16) Candidate {
        uint64_t key, value;
    } candidates[most_candidates];
    uint64_t found, before;
    int index, count;

    template <class Operation>
    __device__ uint64_t reduce(uint64_t v, Operation op) {
        v = warp_reduce(v, op);
        __syncthreads();
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
        __syncthreads();
        return warp_reduce(warps[threadIdx.x % 32], op);
    }
    __device__ uint64_t sum(uint64_t v) { return reduce(v, Plus()); }
    __device__ uint64_t smallest(uint64_t v) { return reduce(v, Smaller()); }

    // index = the first of from[n] at which the cumulative sum reaches target, n if none does;
    // before = the sum before it.
    __device__ void find(const uint64_t* from, int n, uint64_t target) {
        __syncthreads();
        if (threadIdx.x < 32) {
            const int lane = int(threadIdx.x), share = (n + 31) / 32, first = lane * share;
            uint64_t own = 0, until;
            for (int i = first; i < min(n, first + share); i++) own += from[i];
            until = own;
            for (int i = 1; i < 32; i *= 2) {
                const uint64_t left = __shfl_up_sync(~0u, until, unsigned(i));
                if (lane >= i) until += left;
            }
            if (lane == 31 && until < target) {
                index = n;
                before = until;
            }
            if (until >= target && until - own < target) {
                uint64_t sum = until - own;
                int i = first;
                while (sum + from[i] < target) sum += from[i++];
                index = i;
                before = sum;
            }
        }
        __syncthreads();
    }

    // Puts the keys in lo..hi whose value is not 0 among the candidates. Returns how many there
    // are, which may be more than fit.
    template <class Value>
    __device__ int collect(const Ids& ids, uint64_t lo, uint64_t hi, Value value) {
        __syncthreads();
        if (threadIdx.x == 0) count = 0;
        __syncthreads();
        ids.each(lo, hi, [&](uint64_t key) {
            const uint64_t v = value(key);
            if (v == 0) return;
            const int i = atomicAdd(&count, 1);
            if (i < most_candidates) candidates[i] = {key, v};
        });
        __syncthreads();
        return count;
    }

    // A key that at least k ids reach, or `none`. best: the best key of this thread's ids, so the
    // key that k threads' bests reach is a bound. Found by bisection over logits, an eighth too
    // wide at most.
    __device__ uint64_t bound(uint64_t best, int k) {
        uint32_t lo = 0, hi = ~0u;
        while (lo < hi) {
            const uint32_t middle = lo + (hi - lo) / 2;
            const int reach = __syncthreads_count(uint32_t(best >> 32) <= middle);
            if (reach < k) lo = middle + 1;
            if (reach >= k) hi = middle;
            if (reach >= k && reach <= k + k / 8) break;
        }
        return uint64_t(hi) << 32 | 0xffffffffu;
    }

    // The first key, in order and up to hi, at which the sum of values reaches target; hi if none
    // does. A histogram leaves the keys of one bin, again and again, until those that are left fit
    // among the candidates.
    template <class Value>
    __device__ uint64_t select(const Ids& ids, uint64_t hi, uint64_t target, Value value) {
        uint64_t first = 0, last = hi;
        while (collect(ids, first, last, value) > most_candidates) {
            const int shift = max(0, 53 - __clzll((long long)((last - first) | 1)));  // 2,048 bins
            for (int i = int(threadIdx.x); i < bins; i += int(blockDim.x)) values[i] = 0;
            __syncthreads();
            ids.each(first, last, [&](uint64_t key) {
                const unsigned long long v = value(key);
                const auto bin =
                    reinterpret_cast<unsigned long long*>(&values[(key - first) >> shift]);
                if (v) atomicAdd(bin, v);
            });
            find(values, bins, target);
            if (index == bins) return hi;
            target -= before;
            first += uint64_t(index) << shift;
            last = min(last, first + (uint64_t(1) << shift) - 1);
        }
        const int i = int(threadIdx.x);
        uint64_t sum = 0;  // of the candidates before this thread's
        for (int j = 0; i < count && j < count; j++) {
            if (candidates[j].key < candidates[i].key) sum += candidates[j].value;
        }
        if (i == 0) found = hi;
        __syncthreads();
        if (i < count && sum < target && sum + candidates[i].value >= target)
            found = candidates[i].key;
        __syncthreads();
        return found;
    }
};

// [4] Drawing -------------------------------------------------------------------------------------

// Top-k, then top-p of what is left, then the first id, ascending, whose cumulative weight exceeds
// hash * total / 2^64. best: the best key of this thread's ids. Twin: sample
__device__ inline int draw(Scratch& s, const Ids& ids, const Ask& r, const Weigher& weigh,
                           uint64_t best) {
    uint64_t last = none;  // of the keys that may be drawn
    if (r.top_k > 0) {
        const auto one = [&](uint64_t key) { return uint64_t(weigh(key) > 0); };
        last = s.select(ids, s.bound(best, r.top_k), uint64_t(r.top_k), one);
    }
    if (r.top_p < 1) {
        uint64_t own = 0;
        ids.each(0, last, [&](uint64_t key) { own += weigh(key); });
        const auto enough = uint64_t(double(r.top_p) * double(s.sum(own)));
        last = s.select(ids, last, max(enough, uint64_t(1)), weigh);
    }
    const auto kept = [&](uint64_t key) { return key <= last ? weigh(key) : 0; };
    const int blocks = blocks_of(ids.count);
    __syncthreads();
    for (int b = int(threadIdx.x); b < blocks; b += int(blockDim.x)) s.values[b] = 0;
    __syncthreads();
    ids.each_block(last, [&](int b) {
        uint64_t own = 0;
        for (int i = int(threadIdx.x) % 32; i < block_ids; i += 32)
            own += kept(ids.key(b * block_ids + i));
        own = warp_reduce(own, Plus());
        if (threadIdx.x % 32 == 0) s.values[b] = own;
    });
    __syncthreads();
    uint64_t own = 0;
    for (int b = int(threadIdx.x); b < blocks; b += int(blockDim.x)) own += s.values[b];
    uint64_t draw = __umul64hi(r.hash, s.sum(own));
    s.find(s.values, blocks, draw + 1);
    const int block = s.index;
    draw -= s.before;
    __syncthreads();
    if (threadIdx.x < block_ids)
        s.values[threadIdx.x] = kept(ids.key(block * block_ids + int(threadIdx.x)));
    s.find(s.values, block_ids, draw + 1);
    return block * block_ids + s.index;
}

// [5] Kernels -------------------------------------------------------------------------------------

// Applies bias and penalties in place; with `back` puts the raw logits back, which logprobs are of.
// Twin: adjust
__global__ void __launch_bounds__(128) adjust_kernel(SampleArgs a, bool back) {
    launch_dependents();
    grid_dependency_wait();
    const Ask& ask = a.asks[blockIdx.x];
    for (int i = int(threadIdx.x); i < ask.adjustments; i += 128) {
        DeviceAdjustment& own = a.adjustments[ask.first_adjustment + i];
        const Adjustment& made = own.made;
        float& logit = a.logits[size_t(blockIdx.x) * a.rows + made.id];
        if (!back) {
            own.raw = logit;
            const float z = logit + made.bias;
            logit = (z > 0 ? z / made.repetition : z * made.repetition) - made.penalty;
        } else {
            logit = own.raw;
        }
    }
}

// The best key of each block of 256 ids: the whole GPU reads the logits once. Then greedy is a
// minimum of 1,024 keys, and top-k reads only the blocks whose best is good enough.
// Grid: (sixteen blocks of ids, outputs).
__global__ void __launch_bounds__(256) best_kernel(SampleArgs a) {
    launch_dependents();
    grid_dependency_wait();
    const int o = int(blockIdx.y), lane = int(threadIdx.x) % 32;
    const Ids ids = ids_of(a, o);
    const int first = int(blockIdx.x) * 16 + int(threadIdx.x) / 32 * 2;
    for (int b = first; b < first + 2 && b * block_ids < ids.count; b++) {
        uint64_t best = none;
        for (int i = 0; i < block_ids; i += 32)
            best = Smaller()(best, ids.key(b * block_ids + i + lane));
        best = warp_reduce(best, Smaller());
        if (lane == 0) a.best[size_t(o) * blocks_of(a.vocab) + b] = best;
    }
}

// One block an output. Twin: sample
__global__ void __launch_bounds__(1024) sample_kernel(SampleArgs a) {
    Scratch& s = *reinterpret_cast<Scratch*>(dynamic_shared());
    launch_dependents();
    const Ask r = a.asks[blockIdx.x];
    grid_dependency_wait();
    if (r.target >= 0) {
        if (threadIdx.x == 0) a.ids[blockIdx.x] = r.target;
        return;
    }
    const Ids ids = ids_of(a, int(blockIdx.x));
    const int blocks = blocks_of(ids.count), thread = int(threadIdx.x);
    uint64_t own = none;
    for (int b = thread; b < blocks; b += 1024) own = Smaller()(own, ids.best[b]);
    const uint64_t best = s.smallest(own);
    int id = int(uint32_t(best));
    if (r.scale > 0) id = draw(s, ids, r, {logit_of(best), r.scale, r.least_weight}, own);
    if (threadIdx.x == 0) a.ids[blockIdx.x] = id;
}

// log softmax of the id, its rank, and the likeliest, over all V raw logits. Twin: log_softmax
// One block an output that wants it.
__global__ void __launch_bounds__(1024) log_softmax_kernel(SampleArgs a) {
    Scratch& s = *reinterpret_cast<Scratch*>(dynamic_shared());
    launch_dependents();
    const Ask r = a.asks[blockIdx.x];
    grid_dependency_wait();
    if (r.target < 0 && r.logprobs < 0) return;
    const Ids ids{a.logits + size_t(blockIdx.x) * a.rows, nullptr, nullptr, a.V};
    uint64_t own = none, total = 0, ahead = 0;
    ids.each(0, none, [&](uint64_t key) { own = Smaller()(own, key); });
    const float top = logit_of(s.smallest(own));
    const uint64_t mine = ids.key(a.ids[blockIdx.x]);
    const Weigher weigh{top, float(log2e), 0};
    ids.each(0, none, [&](uint64_t key) {
        total += weigh(key);
        ahead += key < mine;
    });
    const auto log_total = float(log(double(s.sum(total)) * 0x1p-40));
    ahead = s.sum(ahead);
    Details& d = a.details[blockIdx.x];
    if (threadIdx.x == 0) {
        d.logprob = (logit_of(mine) - top) - log_total;
        d.rank = int(ahead) + 1;
    }
    if (r.logprobs <= 0) return;
    const auto one = [](uint64_t) { return uint64_t(1); };
    const uint64_t last = s.select(ids, s.bound(own, r.logprobs), uint64_t(r.logprobs), one);
    const int found = s.collect(ids, 0, last, one), i = int(threadIdx.x);
    if (i >= found) return;
    const uint64_t key = s.candidates[i].key;
    int rank = 0;
    for (int j = 0; j < found; j++) rank += s.candidates[j].key < key;
    d.ids[rank] = int(uint32_t(key));
    d.logprobs[rank] = (logit_of(key) - top) - log_total;
}

// adjusted, logprobs: whether any output has adjustments, or wants logprobs.
void sample(Stream& s, const SampleArgs& a, bool adjusted, bool logprobs) {
    const double read = 4. * a.outputs * a.V;
    const int blocks = blocks_of(a.vocab);
    assert(blocks <= bins);
    const dim3 outputs(a.outputs);
    if (adjusted) s.launch("adjust", 0, adjust_kernel, outputs, 128, 0, a, false);
    s.launch("best", read, best_kernel, dim3(ceil_div(blocks, 16), a.outputs), 256, 0, a);
    s.launch("sample", 8. * a.outputs * blocks, sample_kernel, outputs, 1024, sizeof(Scratch), a);
    if (!logprobs) return;
    if (adjusted) s.launch("adjust", 0, adjust_kernel, outputs, 128, 0, a, true);
    s.launch("log_softmax", 5 * read, log_softmax_kernel, outputs, 1024, sizeof(Scratch), a);
}

}  // namespace
}  // namespace gemma
