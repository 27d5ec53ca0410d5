// SPDX-License-Identifier: Apache-2.0
//
// reference.cpp: Gemma 3's forward in plain loops: the formula of every kernel of gemma.cu, the
// oracle of the tests, and the engine of machines without a GPU. Beside the path; sitting 2 reads
// each kernel's twin here.
//
// Weights are bf16, as the file has them. Everything else, K and V included, is fp32, so that only
// the order of sums differs from Hugging Face's fp32 run.
//
// The rule: a token's bits never depend on the rest of the batch. The length of a sum alone fixes
// its order (16 lanes, then a tree), each fused multiply-add is written out, and threads divide
// outputs among themselves, never a sum. All threads of one parallel region (the team) call each
// function that has an `omp for`, which divides its loop among them.
#include "gemma.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "container.h"

namespace gemma {
namespace {

using i64 = int64_t;

// [1] Lanes ------------------------------------------------------- 16 floats, in three widths

// The widths use different registers and give the same bits: lane i is the same sum in each. A
// tile's accumulators take 24 of 32 registers with AVX-512 and 12 of 16 with AVX2.
#if defined(__AVX512F__)
using Vector = __m512;
constexpr int tile_rows = 3, tile_tokens = 8;
inline Vector load_vector(const float* p) { return _mm512_loadu_ps(p); }
inline Vector load_vector(const bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    // The unmasked forms are the same, but g++ 12 believes that they read uninitialised memory.
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, bits);
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, wide, 16));
}
inline Vector broadcast(float x) { return _mm512_set1_ps(x); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__) && defined(__FMA__)
using Vector = __m256;
constexpr int tile_rows = 2, tile_tokens = 3;
inline Vector load_vector(const float* p) { return _mm256_loadu_ps(p); }
inline Vector load_vector(const bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Vector broadcast(float x) { return _mm256_set1_ps(x); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
#else
using Vector = float;
constexpr int tile_rows = 2, tile_tokens = 3;
inline Vector load_vector(const float* p) { return *p; }
inline Vector load_vector(const bf16* p) { return std::bit_cast<float>(uint32_t(p->bits) << 16); }
inline Vector broadcast(float x) { return x; }
inline Vector fma(Vector a, Vector b, Vector c) { return std::fma(a, b, c); }
#endif

constexpr int lanes = 16;
constexpr int width = sizeof(Vector) / sizeof(float), vectors = lanes / width;

struct Lanes {
    Vector v[vectors] = {};
};

template <class T>
inline Lanes load(const T* p) {  // [16] floats, or bf16 widened
    Lanes a;
    for (int i = 0; i < vectors; i++) a.v[i] = load_vector(p + i * width);
    return a;
}

inline Lanes fma(const Lanes& a, const Lanes& b, Lanes c) {
    for (int i = 0; i < vectors; i++) c.v[i] = fma(a.v[i], b.v[i], c.v[i]);
    return c;
}

inline Lanes fma(float a, const Lanes& b, Lanes c) {
    for (int i = 0; i < vectors; i++) c.v[i] = fma(broadcast(a), b.v[i], c.v[i]);
    return c;
}

// The tree: lane i + lane i+8, then i + i+4, i + i+2, i + i+1.
inline float sum(const Lanes& a) {
    float s[lanes];
    std::memcpy(s, a.v, sizeof s);
    for (int i = 0; i < 8; i++) s[i] += s[i + 8];
    for (int i = 0; i < 4; i++) s[i] += s[i + 4];
    return (s[0] + s[2]) + (s[1] + s[3]);
}

// 2^x for x in [-126, 126], 0 below, with a relative error of 8e-8: a minimax polynomial on
// [-1/2, 1/2]. Fused multiply-adds and exact steps alone, so every machine gives the same bits.
inline float exp2_exact(float x) {
    const float clamped = std::min(std::max(x, -126.f), 126.f);
    const float n = (clamped + 12582912.f) - 12582912.f;  // 1.5 * 2^23: rounds to an integer
    const float f = clamped - n;
    float p = 0.00015353361959569156f;
    p = std::fma(p, f, 0.0013398875016719103f);
    p = std::fma(p, f, 0.00961843691766262f);
    p = std::fma(p, f, 0.055503323674201965f);
    p = std::fma(p, f, 0.24022647738456726f);
    p = std::fma(p, f, 0.6931471824645996f);
    p = std::fma(p, f, 1.f);
    const float power = std::bit_cast<float>((int32_t(n) + 127) << 23);
    return x < -126.f ? 0.f : p * power;
}

constexpr float log2e = 1.4426950408889634f;

// [2] linear -------------------------------------------------------------------------------------

// y[t, r] (+)= x[t, :] . w[r, :] over one slice of K, for a tile of ROWS weight rows by TOKENS
// tokens, so that each weight is read once for all tokens. The first slice sets y, later ones add.
template <int ROWS, int TOKENS, class W>
inline void dot_tile(float* y, i64 y_stride, const W* w, i64 w_stride, const float* x, i64 x_stride,
                     i64 K, bool first) {
    Lanes acc[ROWS][TOKENS];
    for (i64 k = 0; k < K; k += lanes) {
        Lanes weights[ROWS];
        for (int r = 0; r < ROWS; r++) {
            weights[r] = load(w + r * w_stride + k);
            // The next tile's weights. The hardware's prefetcher restarts at each row, and
            // without this line decode at batch 1 is a quarter slower (docs/design.md, section 10).
            __builtin_prefetch(w + (r + ROWS) * w_stride + k);
        }
        for (int t = 0; t < TOKENS; t++) {
            const Lanes token = load(x + t * x_stride + k);
            for (int r = 0; r < ROWS; r++) acc[r][t] = fma(weights[r], token, acc[r][t]);
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int t = 0; t < TOKENS; t++) {
            float& out = y[t * y_stride + r];
            out = first ? sum(acc[r][t]) : out + sum(acc[r][t]);
        }
    }
}

// dot_tile for any number of rows, and for up to tile_tokens tokens.
template <class W, int TOKENS = tile_tokens>
void dot_rows(i64 tokens, float* y, i64 y_stride, const W* w, i64 w_stride, i64 rows,
              const float* x, i64 x_stride, i64 K, bool first) {
    if constexpr (TOKENS > 1) {
        if (tokens < TOKENS) {
            return dot_rows<W, TOKENS - 1>(tokens, y, y_stride, w, w_stride, rows, x, x_stride, K,
                                           first);
        }
    }
    i64 r = 0;
    for (; r + tile_rows <= rows; r += tile_rows) {
        dot_tile<tile_rows, TOKENS>(y + r, y_stride, w + r * w_stride, w_stride, x, x_stride, K,
                                    first);
    }
    for (; r < rows; r++) {
        dot_tile<1, TOKENS>(y + r, y_stride, w + r * w_stride, w_stride, x, x_stride, K, first);
    }
}

// y[N, M] = x[N, K] w[M, K]^T, by the team; ends without a barrier.
//
// K is cut into slices of 1,152 floats, each summed from zero and then added, so that a tile of
// tokens (36 KB) stays in the first-level cache, and blocks of 72 weight rows, so that a block
// stays in the second. With few tokens a block is one tile, so that rows stream from memory in
// order.
void linear(float* y, const float* x, const bf16* w, i64 N, i64 K, i64 M) {
    constexpr i64 slice = 1152;
    const i64 block = N <= tile_tokens ? tile_rows : 24 * tile_rows;
#pragma omp for nowait schedule(static)
    for (i64 m = 0; m < M; m += block) {
        for (i64 n = 0; n < N; n += tile_tokens) {
            for (i64 k = 0; k < K; k += slice) {
                dot_rows(std::min<i64>(tile_tokens, N - n), y + n * M + m, M, w + m * K + k, K,
                         std::min(block, M - m), x + n * K + k, K, std::min(slice, K - k), k == 0);
            }
        }
    }
}

// [3] The other kernels ---------------------------------------------------------------------------

inline float widen(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

// h[n, :] = embed[token[n], :] * sqrt(D)
void embed(float* h, const bf16* table, const int* tokens, i64 N, i64 D, float scale) {
#pragma omp for
    for (int n = 0; n < N; n++) {
        const bf16* row = table + tokens[n] * D;
        for (int d = 0; d < D; d++) h[n * D + d] = widen(row[d]) * scale;
    }
}

// y = x / sqrt(mean(x^2) + eps) * (1 + w): one row of D. y may be x.
void rmsnorm_row(float* y, const float* x, const bf16* w, i64 D, float eps) {
    Lanes squares;
    for (int d = 0; d < D; d += lanes) squares = fma(load(x + d), load(x + d), squares);
    const float r = 1.f / std::sqrt(sum(squares) / float(D) + eps);
    for (int d = 0; d < D; d++) y[d] = x[d] * r * (1.f + widen(w[d]));
}

void rmsnorm(float* y, const float* x, const bf16* w, i64 N, i64 D, float eps) {
#pragma omp for
    for (int n = 0; n < N; n++) rmsnorm_row(y + n * D, x + n * D, w, D, eps);
}

// h += rmsnorm(branch, w). Overwrites the branch.
void add_rmsnorm(float* h, float* branch, const bf16* w, i64 N, i64 D, float eps) {
#pragma omp for
    for (int n = 0; n < N; n++) {
        float* b = branch + n * D;
        rmsnorm_row(b, b, w, D, eps);
        for (int d = 0; d < D; d++) h[n * D + d] += b[d];
    }
}

// out[i] = x[i] cos - x[i+E/2] sin, out[i+E/2] = x[i+E/2] cos + x[i] sin
void rope_row(float* x, const float* cos_sin, i64 E) {
    const int half = E / 2;
    for (int i = 0; i < half; i++) {
        const float c = cos_sin[i], s = cos_sin[half + i], a = x[i], b = x[i + half];
        x[i] = std::fma(a, c, -(b * s));
        x[i + half] = std::fma(b, c, a * s);
    }
}

// gate = gelu_tanh(gate) * up, with tanh(u) = 1 - 2 / (1 + e^2u):
// gelu_tanh(z) = z / (1 + e^-2u), u = sqrt(2/pi) (z + 0.044715 z^3)
void geglu(float* gate, const float* up, i64 count) {
    constexpr float minus_2u = -2.f * 0.7978845608028654f * log2e;
#pragma omp for
    for (i64 i = 0; i < count; i++) {
        const float z = gate[i];
        const float u = z * std::fma(0.044715f * z, z, 1.f);
        gate[i] = z / (1.f + exp2_exact(minus_2u * u)) * up[i];
    }
}

// One query token's heads over the keys lo..hi of one KV head:
//   s[m, p] = scale q[m, :] . k[p, :],  out[m, :] = sum over p of softmax(s[m, :])[p] v[p, :]
// page(i) returns the KV head's K of positions 32i..32i+31, followed by its V. A sum's order
// depends on absolute positions alone. Keys outside lo..hi have weight 0 and are never read.
template <class PageOf>
void attend(float* out, const float* q, int heads, int E, float scale, int lo, int hi, PageOf page,
            std::vector<float>& scratch) {
    const int start = lo / page_tokens * page_tokens;
    const int span = (hi / page_tokens + 1) * page_tokens - start;
    scratch.assign(heads * span, -std::numeric_limits<float>::infinity());  // [heads, span]
    for (int p = lo; p <= hi; p = (p / page_tokens + 1) * page_tokens) {
        const int keys = std::min(hi + 1, (p / page_tokens + 1) * page_tokens) - p;
        const float* K = page(p / page_tokens) + p % page_tokens * E;  // [keys, E]
        for (int m = 0; m < heads; m += tile_tokens) {
            dot_rows(std::min(tile_tokens, heads - m), &scratch[m * span + p - start], span, K, E,
                     keys, q + m * E, E, E, true);
        }
    }
    for (int m = 0; m < heads; m++) {
        float* s = &scratch[m * span];
        const float top = *std::max_element(s, s + span);
        Lanes total;
        for (int i = 0; i < span; i++) s[i] = exp2_exact((s[i] - top) * (scale * log2e));
        for (int i = 0; i < span; i += lanes) total = fma(1.f, load(s + i), total);
        const float inverse = 1.f / sum(total);
        for (int i = 0; i < span; i++) s[i] *= inverse;
    }
    std::fill_n(out, heads * E, 0.f);
    for (int p = lo; p <= hi; p = (p / page_tokens + 1) * page_tokens) {
        const int keys = std::min(hi + 1, (p / page_tokens + 1) * page_tokens) - p;
        const float* V = page(p / page_tokens) + (page_tokens + p % page_tokens) * E;  // [keys, E]
        for (int m = 0; m < heads; m++) {
            for (int e = 0; e < E; e += 4 * lanes) {
                float* o = out + m * E + e;
                Lanes acc[4] = {load(o), load(o + lanes), load(o + 2 * lanes), load(o + 3 * lanes)};
                for (int i = 0; i < keys; i++) {
                    const float weight = scratch[m * span + p - start + i];
                    for (int j = 0; j < 4; j++) {
                        acc[j] = fma(weight, load(V + i * E + e + j * lanes), acc[j]);
                    }
                }
                std::memcpy(o, acc, sizeof acc);
            }
        }
    }
}

// [4] Sampling ------------------------------------------------------------------------------------

// Probabilities are integers, e^(z - max z) in units of 2^-40, so their sums have no order.
inline uint64_t weight(float logit, float top, float scale) {
    return uint64_t(exp2_exact((logit - top) * scale) * 0x1p40f);
}

// Likelier ids first, equal logits by id, as one integer: ascending keys are descending logits.
inline uint64_t order(float logit, int id) {
    const uint32_t bits = std::bit_cast<uint32_t>(logit + 0.f);  // -0 is 0
    const uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
    return uint64_t(~ascending) << 32 | uint32_t(id);
}

// SplitMix64's finaliser over the seed and the output's index.
inline uint64_t hash(uint64_t seed, uint64_t index) {
    const auto mix = [](uint64_t x) {
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        return x ^ (x >> 31);
    };
    return mix(seed + 0x9e3779b97f4a7c15u * (index + 1) + mix(seed));
}

// Shortens `keys` to the likeliest ids whose weights reach top_p of the total. Sorts 64 keys, then
// 512, and so on, since the likeliest few usually suffice.
void cut_top_p(std::vector<uint64_t>& keys, float top_p, auto&& weight_of) {
    uint64_t total = 0, sum = 0;
    for (const uint64_t key : keys) total += weight_of(key);
    const auto enough = uint64_t(double(top_p) * double(total));
    size_t sorted = 0;
    for (size_t target = 64; sorted < keys.size(); target *= 8) {
        const size_t end = std::min(target, keys.size());
        const auto begin = keys.begin();
        std::partial_sort(begin + ptrdiff_t(sorted), begin + ptrdiff_t(end), keys.end());
        for (; sorted < end; sorted++) {
            sum += weight_of(keys[sorted]);
            if (sum >= enough) return keys.resize(sorted + 1);
        }
    }
}

// Returns the adjusted logits. Ids that are not allowed get -infinity, whose weight is 0.
std::vector<float> adjust(const float* logits, const Config& c, const Output& out) {
    std::vector<float> adjusted(logits, logits + c.V);
    for (const Adjustment& a : out.adjustments) {
        float& z = adjusted[a.id];
        z += a.bias;
        z = z > 0 ? z / a.repetition : z * a.repetition;
        z -= a.penalty;
    }
    for (int id = 0; out.allowed && id < c.vocab; id++) {
        const bool allowed = (*out.allowed)[id / 32] >> id % 32 & 1;
        if (!allowed) adjusted[id] = -std::numeric_limits<float>::infinity();
    }
    return adjusted;
}

// The next token of logits[vocab]: min-p, then top-k, renormalised, then top-p; the draw is the
// first id whose cumulative weight exceeds hash * total / 2^64.
int sample(const std::vector<float>& logits, int vocab, const Output& out) {
    const Sampling& s = out.sampling;
    const auto best = std::max_element(logits.begin(), logits.begin() + vocab);
    if (s.temperature < 1e-5f) return int(best - logits.begin());
    const float top = *best, scale = float(1.4426950408889634 / s.temperature);
    const auto weight_of = [&](uint64_t key) { return weight(logits[uint32_t(key)], top, scale); };
    const auto least = std::max<uint64_t>(1, uint64_t(s.min_p * 0x1p40f));
    std::vector<uint64_t> keys;
    for (int id = 0; id < vocab; id++) {
        if (weight(logits[id], top, scale) >= least) keys.push_back(order(logits[id], id));
    }
    if (s.top_k > 0 && size_t(s.top_k) < keys.size()) {
        std::nth_element(keys.begin(), keys.begin() + s.top_k - 1, keys.end());
        keys.resize(s.top_k);
    }
    if (s.top_p < 1) cut_top_p(keys, s.top_p, weight_of);
    std::sort(keys.begin(), keys.end(),
              [](uint64_t a, uint64_t b) { return uint32_t(a) < uint32_t(b); });
    uint64_t total = 0;
    for (const uint64_t key : keys) total += weight_of(key);
    const unsigned __int128 random = hash(s.seed, uint64_t(out.index));
    const auto draw = uint64_t(random * total >> 64);
    uint64_t sum = 0;
    for (const uint64_t key : keys) {
        sum += weight_of(key);
        if (sum > draw) return int(uint32_t(key));
    }
    assert(false);
    return int(best - logits.begin());
}

// Fills in the log softmax of result.id and of the `count` likeliest ids, over all V logits.
void log_softmax(Result& result, const float* logits, int V, int count) {
    const float top = *std::max_element(logits, logits + V);
    uint64_t total = 0;
    std::vector<uint64_t> keys(V);
    for (int id = 0; id < V; id++) {
        total += weight(logits[id], top, log2e);
        keys[id] = order(logits[id], id);
    }
    const auto log_total = float(std::log(double(total) * 0x1p-40));
    const auto logprob = [&](int id) { return (logits[id] - top) - log_total; };
    const uint64_t own = keys[result.id];
    result.logprob = logprob(result.id);
    result.rank =
        1 + int(std::count_if(keys.begin(), keys.end(), [&](uint64_t k) { return k < own; }));
    std::partial_sort(keys.begin(), keys.begin() + count, keys.end());
    for (int i = 0; i < count; i++) {
        const int id = int(uint32_t(keys[i]));
        result.top.push_back({id, logprob(id)});
    }
}

// [5] The model -----------------------------------------------------------------------------------

struct FreeDeleter {
    void operator()(float* p) const { std::free(p); }
};

class CpuModel : public Model {
  public:
    CpuModel(const Checkpoint& checkpoint, int max_batched_tokens)
        : c(checkpoint.config), w(checkpoint.weights), most_tokens(max_batched_tokens) {
        for (int l = 0; l < c.L; l++) layer_in_pool.push_back(layers_of[pool_of(l)]++);
    }

    KvMemory kv_memory() const override {
        return {kv_budget(usable_memory(), held_memory() + step_bytes()),
                {page_floats(local_pool) * 4, page_floats(global_pool) * 4}};
    }

    // Untouched pages cost nothing: calloc maps large blocks lazily.
    void allocate_pages(const int (&pages)[2]) override {
        for (const Pool pool : pools) {
            const size_t floats = std::max<size_t>(1, size_t(pages[pool]) * page_floats(pool));
            kv[pool].reset(static_cast<float*>(std::calloc(floats, sizeof(float))));
            if (!kv[pool])
                throw Error(text("cannot allocate %zu bytes for K and V", floats * sizeof(float)));
        }
    }

    Results step(const Batch& batch) override;

  private:
    Pool pool_of(int layer) const { return c.global[layer] ? global_pool : local_pool; }
    size_t page_floats(Pool pool) const {  // [layers of the pool][G][K, V][32][E]
        return size_t(layers_of[pool]) * c.G * 2 * page_tokens * c.E;
    }
    float* kv_page(int layer, int page, int g) const {  // K [32, E], then V [32, E]
        const Pool pool = pool_of(layer);
        assert(page >= 0);
        return kv[pool].get() + page * page_floats(pool) +
               (size_t(layer_in_pool[layer]) * c.G + g) * 2 * page_tokens * c.E;
    }
    const int* page_table(const Batch& b, int layer, int row) const {
        return b.pages[pool_of(layer)].data() + row * b.pages_per_row;
    }
    uint64_t step_bytes() const {  // of the largest step, as resize makes its vectors
        const uint64_t token = 2 * c.D + 2 * c.H * c.E + 2 * c.G * c.E + 2 * c.F + 2 * c.E;
        return sizeof(float) * (uint64_t(most_tokens) * token +
                                uint64_t(std::min(most_tokens, most_outputs)) * (c.D + c.V));
    }
    void resize(int N, int outputs);
    void rope_tables(const Batch& b);
    void forward(const Batch& b);
    void qk_norm_rope_write(const Batch& b, int layer);
    void attention(const Batch& b, int layer);

    static constexpr int most_outputs = 256;  // rows of logits at a time

    const Config& c;
    const Weights& w;
    const int most_tokens;
    int layers_of[2] = {0, 0};       // by Pool
    std::vector<int> layer_in_pool;  // [L]
    std::unique_ptr<float[], FreeDeleter> kv[2];
    std::vector<int> row_of;        // [N]
    std::vector<float> h, x;        // [N, D] residual stream; its norm, then a branch's output
    std::vector<float> q, a;        // [N, H*E]
    std::vector<float> k, v;        // [N, G*E]
    std::vector<float> gate, up;    // [N, F]
    std::vector<float> cos_sin[2];  // by Pool: [N, E], E/2 cosines, then E/2 sines
    std::vector<float> last;        // [outputs, D]
    std::vector<float> logits;      // [outputs, rows]
};

void CpuModel::resize(int N, int outputs) {
    const size_t n = size_t(N), o = size_t(outputs);
    for (auto* xs : {&h, &x}) xs->resize(n * c.D);
    for (auto* xs : {&q, &a}) xs->resize(n * c.H * c.E);
    for (auto* xs : {&k, &v}) xs->resize(n * c.G * c.E);
    for (auto* xs : {&gate, &up}) xs->resize(n * c.F);
    for (auto& xs : cos_sin) xs.resize(n * c.E);
    last.resize(o * c.D);
    logits.resize(o * c.rows());
}

// Angles are fp32, as in Hugging Face: at position 30,000 the rounding of pos * inv_freq is a
// thousandth of a radian, and the model was trained with it.
void CpuModel::rope_tables(const Batch& b) {
    const int half = c.E / 2;
#pragma omp for
    for (size_t n = 0; n < b.tokens.size(); n++) {
        for (const Pool pool : pools) {
            float* row = cos_sin[pool].data() + n * c.E;
            for (int i = 0; i < half; i++) {
                const auto inv_freq =
                    float(std::pow(c.theta[pool], -2. * i / c.E)) / c.rope_divisor[pool];
                const float angle = float(b.positions[n]) * inv_freq;
                row[i] = std::cos(angle);
                row[half + i] = std::sin(angle);
            }
        }
    }
}

// Norms each head of q and k and rotates it by RoPE; writes k and v to their place in the pages.
void CpuModel::qk_norm_rope_write(const Batch& b, int layer) {
    const Layer& l = w.layers[layer];
    const int E = c.E;
#pragma omp for
    for (size_t n = 0; n < b.tokens.size(); n++) {
        const float* cs = cos_sin[pool_of(layer)].data() + n * E;
        const int position = b.positions[n];
        const int page = page_table(b, layer, row_of[n])[position / page_tokens];
        for (int m = 0; m < c.H; m++) {
            float* head = q.data() + (n * c.H + m) * E;
            rmsnorm_row(head, head, l.q_norm, E, c.eps);
            rope_row(head, cs, E);
        }
        for (int g = 0; g < c.G; g++) {
            float* head = k.data() + (n * c.G + g) * E;
            rmsnorm_row(head, head, l.k_norm, E, c.eps);
            rope_row(head, cs, E);
            float* slot = kv_page(layer, page, g) + size_t(position % page_tokens) * E;
            std::copy_n(head, E, slot);
            std::copy_n(v.data() + (n * c.G + g) * E, E, slot + page_tokens * E);
        }
    }
}

void CpuModel::attention(const Batch& b, int layer) {
    const int heads = c.H / c.G;
    std::vector<float> scratch;
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < b.tokens.size() * c.G; i++) {
        const size_t n = i / c.G, first = n * c.H + (i % c.G) * heads;
        const int* table = page_table(b, layer, row_of[n]);
        const int hi = b.positions[n], lo = c.global[layer] ? 0 : std::max(0, hi - c.W + 1);
        attend(
            a.data() + first * c.E, q.data() + first * c.E, heads, c.E, c.scale, lo, hi,
            [&](int page) { return kv_page(layer, table[page], int(i % c.G)); }, scratch);
    }
}

// Runs in every thread of the team; each `omp for` without nowait ends in a barrier.
void CpuModel::forward(const Batch& b) {
    const int N = int(b.tokens.size()), D = c.D, F = c.F, HE = c.H * c.E, GE = c.G * c.E;
    rope_tables(b);
    embed(h.data(), w.embed, b.tokens.data(), N, D, c.embed_scale);
    for (int i = 0; i < c.L; i++) {
        const Layer& l = w.layers[i];
        rmsnorm(x.data(), h.data(), l.input_norm, N, D, c.eps);  // [N, D]
        linear(q.data(), x.data(), l.q, N, D, HE);               // [N, D] -> [N, H*E]
        linear(k.data(), x.data(), l.k, N, D, GE);
        linear(v.data(), x.data(), l.v, N, D, GE);
#pragma omp barrier
        qk_norm_rope_write(b, i);
        attention(b, i);                            // [N, H*E]
        linear(x.data(), a.data(), l.o, N, HE, D);  // [N, H*E] -> [N, D]
#pragma omp barrier
        add_rmsnorm(h.data(), x.data(), l.post_attention_norm, N, D, c.eps);
        rmsnorm(x.data(), h.data(), l.pre_ffn_norm, N, D, c.eps);
        linear(gate.data(), x.data(), l.gate, N, D, F);  // [N, D] -> [N, F]
        linear(up.data(), x.data(), l.up, N, D, F);
#pragma omp barrier
        geglu(gate.data(), up.data(), i64(N) * F);
        linear(x.data(), gate.data(), l.down, N, F, D);  // [N, F] -> [N, D]
#pragma omp barrier
        add_rmsnorm(h.data(), x.data(), l.post_ffn_norm, N, D, c.eps);
    }
}

Results CpuModel::step(const Batch& b) {
    const int outputs = int(b.outputs.size());
    resize(int(b.tokens.size()), std::min(outputs, most_outputs));
    row_of.resize(b.tokens.size());
    for (size_t r = 0; r + 1 < b.row_start.size(); r++) {
        std::fill(row_of.begin() + b.row_start[r], row_of.begin() + b.row_start[r + 1], int(r));
    }
#ifndef NDEBUG
    for (const Pool pool : pools) {
        const size_t floats = page_floats(pool);
        for (const int page : b.dead[pool])
            std::fill_n(kv[pool].get() + page * floats, floats, std::nanf(""));
    }
#endif
    Results results(b.outputs.size());
#pragma omp parallel
    {
        forward(b);
        for (int first = 0; first < outputs; first += most_outputs) {
            const int count = std::min(most_outputs, outputs - first);
#pragma omp for
            for (int i = 0; i < count; i++) {
                rmsnorm_row(last.data() + i * c.D,
                            h.data() + size_t(b.outputs[first + i].token) * c.D, w.norm, c.D,
                            c.eps);
            }
            linear(logits.data(), last.data(), w.embed, count, c.D, c.rows());
#pragma omp barrier
#pragma omp for schedule(dynamic)
            for (int i = 0; i < count; i++) {
                const Output& out = b.outputs[first + i];
                const float* row = logits.data() + i * c.rows();
                Result& result = results[first + i];
                result.id =
                    out.target >= 0 ? out.target : sample(adjust(row, c, out), c.vocab, out);
                if (out.target >= 0 || out.sampling.logprobs >= 0)
                    log_softmax(result, row, c.V, std::max(0, out.sampling.logprobs));
            }
        }
    }
    return results;
}

}  // namespace

std::unique_ptr<Model> open_cpu(const Checkpoint& checkpoint, int max_batched_tokens) {
    return std::make_unique<CpuModel>(checkpoint, max_batched_tokens);
}

}  // namespace gemma
