// SPDX-License-Identifier: Apache-2.0
//
// Tests the kernels of gemma.cu through their own launchers: against plain loops in double (within
// tolerances that are derived here and printed) and against themselves (equal to the last bit).
//
// Kernel and loop get the same inputs, rounded to bf16, so their results differ by the roundings of
// sums and of the output only. Outputs are filled with a pattern first: each element that should be
// written is compared, and all other bytes must still have the pattern.
//
// The macro GEMMA_EMULATED means that gemma.cu is compiled for the CPU with tests/cuda_on_cpu.h.
// Then every kernel also runs with its threads in other orders, and the bits must agree: a missing
// barrier changes them.
#include "../gemma.cu"

#include <bit>
#include <limits>
#include <random>

#include <unistd.h>
#if defined(__x86_64__)
#ifdef __CUDACC__
#define _AMXTILEINTRIN_H_INCLUDED  // skips g++ 13's header, whose builtins nvcc 12.4 lacks
#endif
#include <immintrin.h>
#endif

#include "../container.h"
#include "test.h"

// The CPU twins have the kernels' names, so they are put into a namespace of their own. All headers
// of reference.cpp are already included above, so this include adds its own text only.
namespace twin {
namespace gemma {
using namespace ::gemma;
}
#include "../reference.cpp"
}

using namespace gemma;

#ifndef GEMMA_EMULATED
#define GEMMA_EMULATED 0
#endif
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t guard = 0;  // ASan's own redzones also see reads
#else
constexpr size_t guard = 64;
#endif
constexpr bool emulated = GEMMA_EMULATED;

// For loops over {T{..}, {..}}: nvcc 12.4 cannot deduce the type.
template <class T>
using List = std::initializer_list<T>;

#define NEED_DEVICE()                                \
    do {                                             \
        const std::string missing = cuda_missing();  \
        if (!missing.empty()) SKIP_BECAUSE(missing); \
    } while (0)

namespace {

// [1] Shared by the tests ------------------------------------------------------------------------

constexpr int pattern = 0xa5;  // of unwritten bytes

// Device memory with initial contents, and a guard region behind it.
template <class T>
class Array {
  public:
    explicit Array(size_t count) : size(count) { fill(pattern); }
    Array(const std::vector<T>& values) : Array(values.size()) { write(values); }
    ~Array() {
        if (guard) CHECK(all_of_pattern(read(size, guard)));
    }
    operator T*() const { return memory.data; }
    T* data() const { return memory.data; }
    void write(const std::vector<T>& values) {
        if (values.empty()) return;
        CUDA(cudaMemcpy(memory.data, values.data(), values.size() * sizeof(T),
                        cudaMemcpyHostToDevice));
    }
    std::vector<T> read() const { return read(0, size); }

  private:
    void fill(int byte) {
        memory.reserve(size + guard + (size + guard == 0));
        CUDA(cudaMemset(memory.data, byte, (size + guard) * sizeof(T)));
    }
    std::vector<T> read(size_t from, size_t count) const {
        std::vector<T> values(count);
        if (count == 0) return values;
        CUDA(cudaMemcpy(values.data(), memory + from, count * sizeof(T), cudaMemcpyDeviceToHost));
        return values;
    }
    static bool all_of_pattern(const std::vector<T>& values) {
        const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
        return std::all_of(bytes, bytes + values.size() * sizeof(T),
                           [](unsigned char b) { return b == pattern; });
    }
    size_t size;
    Memory<T> memory;
};

template <class T>
std::vector<T> of_pattern(size_t count) {
    std::vector<T> values(count);
    if (count) std::memset(static_cast<void*>(values.data()), pattern, count * sizeof(T));
    return values;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() &&
           (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

gemma::Stream new_stream() {
    gemma::Stream s;
    cudaDeviceProp gpu;
    CUDA(cudaGetDeviceProperties(&gpu, 0));
    s.programmatic = gpu.major >= 9, s.processors = gpu.multiProcessorCount;
    return s;
}

// Returns the vector that run() returns, which must have the same bits in every order of the
// threads.
template <class Run>
auto in_all_orders(Run run) {
    const auto result = run();
#if GEMMA_EMULATED
    using cuda_on_cpu::Order;
    cuda_on_cpu::set_order(Order::backward);
    CHECK(same_bits(run(), result));
    cuda_on_cpu::set_order(Order::shuffled, 7);
    CHECK(same_bits(run(), result));
    cuda_on_cpu::set_order(Order::forward);
#endif
    return result;
}

// Collects the worst of many differences, each as a share of its own tolerance.
class Margin {
  public:
    explicit Margin(std::string what) : name(std::move(what)) {}
    ~Margin() {
        std::printf("%-34s max error %.2e; worst %3.0f%% of its tolerance\n", name.c_str(), worst,
                    100 * share);
        INFO(name);
        CHECK(share <= 1);
    }
    void add(double got, double want, double tolerance) {
        const double error = std::abs(got - want);
        if (!(error <= worst)) worst = error;  // true for a NaN, which then stays
        const double part = error == 0 ? 0 : error / tolerance;
        if (!(part <= share)) share = part;
    }

  private:
    std::string name;
    double worst = 0, share = 0;
};

// Half a unit in the last place, relative to the value.
constexpr double half_bf16 = 0x1p-8, half_fp32 = 0x1p-24;

bf16 to_bf16(double x) {  // round to nearest even
    const auto bits = std::bit_cast<uint32_t>(float(x));
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
float value(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

struct Random {
    std::mt19937_64 engine;
    explicit Random(uint64_t seed) : engine(seed) {}
    // std::uniform_real_distribution differs between standard libraries.
    double uniform(double lo, double hi) {
        return lo + (hi - lo) * double(engine() >> 11) * 0x1p-53;
    }
    int below(int n) { return int(engine() % uint64_t(n)); }
    std::vector<bf16> bf16s(size_t count, double lo = -1, double hi = 1) {
        std::vector<bf16> v(count);
        for (bf16& x : v) x = to_bf16(uniform(lo, hi));
        return v;
    }
    std::vector<float> floats(size_t count, double lo = -1, double hi = 1) {
        std::vector<float> v(count);
        for (float& x : v) x = float(uniform(lo, hi));
        return v;
    }
    template <class T>
    void shuffle(std::vector<T>& v) {
        for (size_t i = v.size(); i > 1; i--) std::swap(v[i - 1], v[size_t(below(int(i)))]);
    }
};

int rounded_up(int n, int to) { return ceil_div(n, to) * to; }

// The N rows of x in fragment order; rows from N up to `padded` are NaN.
std::vector<bf16> in_fragments(const bf16* x, int N, int K, int padded) {
    std::vector<bf16> out(size_t(padded) * size_t(K), bf16{0xffff});
    for (int n = 0; n < N; n++) {
        for (int k = 0; k < K; k++) out[fragment(n, k, K)] = x[size_t(n) * size_t(K) + size_t(k)];
    }
    return out;
}

}  // namespace

// [2] The map ------------------------------------------------------------------------------------

TEST_CASE("fragment order is a permutation of [16n, K] that keeps pairs of k together") {
    for (const int N : {16, 48}) {
        for (const int K : {32, 64, 288}) {
            std::vector<int> seen(size_t(N * K), 0);
            size_t apart = 0;
            for (int n = 0; n < N; n++) {
                for (int k = 0; k < K; k++) {
                    seen.at(fragment(n, k, K))++;
                    if (k % 2 == 0) {
                        apart += fragment(n, k + 1, K) != fragment(n, k, K) + 1;
                        apart += fragment(n, k, K) % 2;
                    }
                    // The 512 elements of 16 tokens by 32 k are contiguous.
                    apart += fragment(n, k, K) / 512 != size_t(n / 16 * (K / 32) + k / 32);
                }
            }
            CHECK(std::count(seen.begin(), seen.end(), 1) == N * K);
            CHECK(apart == 0);
        }
    }
}

// [3] Embedding and norms ------------------------------------------------------------------------

TEST_CASE("embed: rows of the table times sqrt(D), and the angles of all positions") {
    NEED_DEVICE();
    Margin margin("embed: cosines and sines");
    for (const int E : {64, 128, 256}) {
        const int D = E == 64 ? 32 : E == 128 ? 640 : 1152, V = 11;
        const std::vector<int> tokens = {10, 0, 3, 3, 7, 1, 9},
                               positions = {0, 1, 63, 4097, 8191, 32768, 131071};
        const int N = int(tokens.size());
        const std::vector<bf16> table = Random(1).bf16s(size_t(V * D));
        const float scale = 25.25f;
        std::vector<float> frequencies;
        for (const Pool pool : pools) {
            for (int i = 0; i < E / 2; i++) {
                frequencies.push_back(float(std::pow(pool == local_pool ? 1e4 : 1e6, -2. * i / E)) /
                                      (pool == local_pool ? 1 : 8));
            }
        }
        const auto all = in_all_orders([&] {
            const Array<bf16> table_(table);
            const Array<int> tokens_(tokens), positions_(positions);
            const Array<float> frequencies_(frequencies), h(size_t(N * D)), c0(size_t(N * E)),
                c1(size_t(N * E));
            auto s = new_stream();
            embed(s, h, {frequencies_, {c0, c1}}, table_, tokens_, positions_, N, D, E, scale);
            std::vector<float> result = h.read();
            for (const auto* c : {&c0, &c1}) {
                const auto values = c->read();
                result.insert(result.end(), values.begin(), values.end());
            }
            return result;
        });
        size_t wrong = 0;
        for (int n = 0; n < N; n++) {
            for (int d = 0; d < D; d++) {
                wrong += all[size_t(n * D + d)] !=
                         value(table[size_t(tokens[size_t(n)] * D + d)]) * scale;
            }
            for (const Pool pool : pools) {
                const float* row = all.data() + N * D + (int(pool) * N + n) * E;
                for (int i = 0; i < E / 2; i++) {
                    // The fp32 angle is exact by definition. The kernel turns it into half turns,
                    // rounded to fp32 (at most 2^-25); the sine's own error is 2 units in the last
                    // place.
                    const float angle =
                        float(positions[size_t(n)]) * frequencies[size_t(int(pool) * E / 2 + i)];
                    const double tolerance = 3.1416 * 0x1p-25 + 2 * 0x1p-24;
                    margin.add(row[i], std::cos(double(angle)), tolerance);
                    margin.add(row[E / 2 + i], std::sin(double(angle)), tolerance);
                }
            }
        }
        CHECK(wrong == 0);
    }
}

TEST_CASE("norm: with and without a branch in parts, all rows and chosen ones") {
    NEED_DEVICE();
    Margin margin_x("norm: x"), margin_h("norm: h");
    for (const int D : {32, 96, 128, 256, 1152, 5376}) {
        for (int count = 0; count <= 4; count++) {
            // gather: only chosen rows, some of them twice; h must stay unchanged.
            for (const bool gather : {false, true}) {
                INFO("D " << D << ", parts " << count << ", gather " << gather);
                Random random(uint64_t(D * 10 + count * 2 + gather));
                const int rows = 19;
                const std::vector<int> chosen =
                    gather ? std::vector<int>{18, 0, 7, 7, 16} : std::vector<int>();
                const int N = gather ? int(chosen.size()) : rows, padded = rounded_up(N, 16);
                const float eps = 1e-6f;
                auto h = random.floats(size_t(rows * D), -3, 3);
                for (int d = 0; d < D; d++) h[size_t(D + d)] *= 1e-3f;  // so small that eps matters
                auto parts = random.floats(size_t(count * rows * D));
                for (size_t i = 0; i < parts.size(); i++)
                    if (i / size_t(D) % rows == 7) parts[i] *= 1e-3f;  // the same for the branch
                const auto post = random.bf16s(size_t(D)), pre = random.bf16s(size_t(D));
                std::vector<float> h_after;
                const auto x = in_all_orders([&] {
                    const Array<float> h_(h), parts_(parts);
                    const Array<bf16> x_(size_t(padded * D)), post_(post), pre_(pre);
                    const Array<int> chosen_(chosen);
                    Norm a{x_,      h_,   gather ? nullptr : h_.data(),
                           nullptr, 0,    rows,
                           nullptr, pre_, nullptr,
                           D,       eps};
                    if (count) a.parts = parts_, a.count = count, a.post = post_;
                    if (gather) a.rows = chosen_;
                    auto s = new_stream();
                    norm(s, N, a);
                    h_after = h_.read();
                    return x_.read();
                });
                auto want_x = of_pattern<bf16>(x.size());
                auto want_h = h;
                for (int n = 0; n < N; n++) {
                    const int row = gather ? chosen[size_t(n)] : n;
                    std::vector<double> y(size_t(D), 0), noise(size_t(D), 0), after(size_t(D), 0);
                    double squares = 0;
                    for (int d = 0; d < D; d++) {
                        for (int p = 0; p < count; p++) {
                            const double part = parts[size_t((p * rows + row) * D + d)];
                            y[size_t(d)] += part, noise[size_t(d)] += std::abs(part) * 4;
                        }
                        squares += y[size_t(d)] * y[size_t(d)];
                    }
                    // Squares are positive, so the relative error of their sum is at most one
                    // rounding for each addition that a square goes through: 8 in its thread, 5 in
                    // its warp, up to 21 in the block. The root halves it. 6 more are for the root,
                    // the quotient and the products.
                    const double roundings = (8 + 5 + 21) / 2. + 6;
                    double r = 1 / std::sqrt(squares / D + double(eps));
                    squares = 0;
                    double squares_noise = 0;
                    for (int d = 0; d < D; d++) {
                        const double before = h[size_t(row * D + d)],
                                     factor = r * (1 + value(post[size_t(d)])),
                                     add = count ? y[size_t(d)] * factor : 0;
                        const double now = before + add;
                        after[size_t(d)] = now;
                        // The sum of the parts has up to 4 roundings too. They reach the result
                        // twice: directly and through the root.
                        noise[size_t(d)] = (noise[size_t(d)] * std::abs(factor) * 2 +
                                            std::abs(add) * roundings + std::abs(now)) *
                                           half_fp32;
                        squares += now * now;
                        squares_noise += 2 * std::abs(now) * noise[size_t(d)];
                        float& kept = want_h[size_t(row * D + d)];
                        if (!gather && count) {
                            kept = h_after[size_t(row * D + d)];
                            margin_h.add(kept, now, noise[size_t(d)]);
                        }
                    }
                    r = 1 / std::sqrt(squares / D + double(eps));
                    for (int d = 0; d < D; d++) {
                        const double factor = r * (1 + value(pre[size_t(d)]));
                        const double want = after[size_t(d)] * factor;
                        bf16& got = want_x[fragment(n, d, D)];
                        got = x[fragment(n, d, D)];
                        margin_x.add(value(got), want,
                                     std::abs(want) * (half_bf16 + roundings * half_fp32 +
                                                       squares_noise / squares / 2) +
                                         noise[size_t(d)] * std::abs(factor));
                    }
                }
                CHECK(same_bits(x, want_x));        // rows from N on keep the pattern
                CHECK(same_bits(h_after, want_h));  // rows without a branch keep h
            }
        }
    }
}

// [4] linear -------------------------------------------------------------------------------------

namespace {

using LaunchLinear = void (*)(gemma::Stream&, const char*, double, const Product&, int);
struct Variant {
    const char* name;
    int columns;  // M must be a multiple of it
    int tokens;   // rows of a tile: it may read whole tiles of x
    LaunchLinear launch;
};
// All instances that linear() can choose from for slices of STEPS steps, so that each is tested,
// whichever linear() would choose.
template <int STEPS>
std::vector<Variant> variants_of() {
    constexpr int KB = STEPS % 3 ? 2 : 3, stages = KB == 3 ? 2 : 3;
    return {
        {"rows 2 1", 16, 16, launch_rows<2, 1, 8, STEPS>},
        {"rows 2 1 deep", 16, 16, launch_rows<2, 1, 10, STEPS>},
        {"rows 4 1", 32, 16, launch_rows<4, 1, 4, STEPS>},
        {"rows 2 2", 16, 16, launch_rows<2, 2, 10, STEPS>},
        {"rows 4 2", 32, 16, launch_rows<4, 2, 4, STEPS>},
        {"rows 4 4", 32, 16, launch_rows<4, 4, 4, STEPS>},
        {"rows 8 4", 64, 16, launch_rows < 8, 4, STEPS == 9 ? 2 : 1, STEPS > },
        {"tile 64", 64, 64, launch_tile<64, 2, 4, KB, stages>},
        {"tile 64 by 8", 64, 64, launch_tile<64, 2, 2, KB, stages>},
        {"tile 128", 128, 128, launch_tile<128, 2, 8, KB, stages>},
    };
}
std::vector<Variant> variants_of(int steps) {
    if (steps == 8) return variants_of<8>();
    if (steps == 9) return variants_of<9>();
    if (steps == 10) return variants_of<10>();
    return {{"rows 2 1", 16, 16, launch_rows<2, 1, 8, 1>}};
}

Product product_of(const bf16* w, const bf16* x, void* y, int N, int K, int M, int groups,
                   Store store) {
    const int steps = slice_steps(K);
    return {w, x, y, N, K, M, steps, K / 32 / steps / groups, store};
}

struct Matrices {
    int K, M, rows;
    std::vector<bf16> x, w;  // [rows, K], [M, K]
    Matrices(int K_, int M_, int rows_) : K(K_), M(M_), rows(rows_) {
        Random random(uint64_t(K * 1000 + M));
        x = random.bf16s(size_t(rows) * size_t(K));
        w = random.bf16s(size_t(M) * size_t(K));
        // Row 5 is so large that GeGLU's exponential overflows and underflows.
        for (int k = 0; k < K && rows > 5; k++) {
            bf16& large = x[size_t(5) * size_t(K) + size_t(k)];
            large = to_bf16(value(large) * 64);
        }
    }
};

const char* name_of(Store store) {
    return store == Store::rows_bf16 ? "bf16" : store == Store::parts_fp32 ? "parts" : "geglu";
}

size_t bytes_of(Store store, int N, int M, int groups) {
    if (store == Store::rows_bf16) return size_t(N) * size_t(M) * 2;
    if (store == Store::parts_fp32) return size_t(groups) * size_t(N) * size_t(M) * 4;
    return size_t(rounded_up(N, 16)) * size_t(M) / 2 * 2;
}

// Computes N rows of y, from row `first` on, with a variant or (null) with linear(). Returns the
// bits of their elements row by row, [N][groups][M] or for GeGLU [N][M/2], whatever y's layout, and
// checks that no other byte of y was written.
std::vector<uint32_t> product(const Matrices& m, Store store, int groups, int first, int N,
                              const Variant* variant) {
    const int tokens = variant ? variant->tokens : 128;
    const Array<bf16> w(m.w),
        x(in_fragments(m.x.data() + size_t(first) * size_t(m.K), N, m.K, rounded_up(N, tokens)));
    const Array<char> y(bytes_of(store, N, m.M, groups));
    auto s = new_stream();
    char* to = y;
    if (variant) {
        variant->launch(s, "", 0, product_of(w, x, to, N, m.K, m.M, groups, store), groups);
    } else {
        linear(s, "", store, to, x, w, N, m.K, m.M, groups);
    }
    const std::vector<char> bytes = y.read();
    auto untouched = of_pattern<char>(bytes.size());
    std::vector<uint32_t> rows;
    const auto take = [&](size_t at, size_t size) {
        uint32_t bits = 0;
        std::memcpy(&bits, bytes.data() + at * size, size);
        std::memcpy(untouched.data() + at * size, &bits, size);
        rows.push_back(bits);
    };
    const auto M = size_t(m.M);
    for (size_t n = 0; n < size_t(N); n++) {
        if (store == Store::geglu) {
            for (int i = 0; i < m.M / 2; i++) take(fragment(int(n), i, m.M / 2), 2);
        } else if (store == Store::rows_bf16) {
            for (size_t i = 0; i < M; i++) take(n * M + i, 2);
        } else {
            for (size_t i = 0; i < size_t(groups) * M; i++)
                take((i / M * size_t(N) + n) * M + i % M, 4);
        }
    }
    CHECK(same_bits(bytes, untouched));
    return rows;
}

// y in double, and how far the kernels' sums may be from it.
//
// A product of two bf16 is exact in fp32. It goes through up to 16 additions in its mma, one in
// each later mma of its slice (2 a step), and one for each slice. Tensor cores truncate instead of
// rounding, so each addition may be off by a whole unit in the last place of the sum so far, which
// is at most the sum of the absolute products.
struct Exact {
    std::vector<double> y, noise;  // [rows][groups][M]
    Exact(const Matrices& m, int groups) {
        const auto K = size_t(m.K), share = K / size_t(groups);
        std::vector<float> x(m.x.size()), w(m.w.size());
        std::transform(m.x.begin(), m.x.end(), x.begin(), value);
        std::transform(m.w.begin(), m.w.end(), w.begin(), value);
        const int steps = slice_steps(m.K), slices = m.K / 32 / steps / groups;
        for (size_t n = 0; n < size_t(m.rows); n++) {
            for (size_t i = 0; i < size_t(groups) * size_t(m.M); i++) {
                const float* a = x.data() + n * K + i / size_t(m.M) * share;
                const float* b = w.data() + i % size_t(m.M) * K + i / size_t(m.M) * share;
                double sum = 0, absolute = 0;
                for (size_t k = 0; k < share; k++) {
                    const double p = double(a[k]) * double(b[k]);
                    sum += p, absolute += std::abs(p);
                }
                y.push_back(sum);
                noise.push_back((16 + 2 * steps + slices) * 2 * half_fp32 * absolute);
            }
        }
    }
};

void check_product(Margin& margin, const std::vector<uint32_t>& got, const Exact& e, Store store) {
    for (size_t i = 0; i < got.size(); i++) {
        const float v = std::bit_cast<float>(store == Store::parts_fp32 ? got[i] : got[i] << 16);
        if (store == Store::parts_fp32) {
            margin.add(v, e.y[i], e.noise[i]);
        } else if (store == Store::rows_bf16) {
            margin.add(v, e.y[i], e.noise[i] + std::abs(e.y[i]) * half_bf16);
        } else {
            // gelu'(z) is below 1.13. The exponential's argument -2u has 5 roundings, so the error
            // of e^-2u grows with |2u|; it counts only as far as e^-2u is a part of 1 + e^-2u.
            const double z = e.y[2 * i], up = e.y[2 * i + 1],
                         u = std::sqrt(2 / 3.14159265358979324) * (z + 0.044715 * z * z * z),
                         want = z / (1 + std::exp(-2 * u)) * up,
                         tail = std::min(std::abs(2 * u), 40.) / (1 + std::exp(2 * u));
            margin.add(v, want,
                       1.13 * e.noise[2 * i] * std::abs(up) +
                           std::abs(z / (1 + std::exp(-2 * u))) * e.noise[2 * i + 1] +
                           std::abs(want) * (half_bf16 + half_fp32 * (8 + 8 * std::abs(tail))) +
                           0x1p-120);
        }
    }
}

}  // namespace

TEST_CASE("linear: every instance gives each row the bits that it has alone, near exact sums") {
    NEED_DEVICE();
    // Values of K with slices of one step (1, 2, 3, 7 or 11 slices) and of 8, 9 and 10 steps (one
    // slice or several); with so many slices that they form four groups, or more than a block has
    // warps. The last is a wide matrix.
    struct Problem {
        int K, M, rows;
    };
    const Problem problems[] = {{32, 16, 257},  {64, 32, 257},   {96, 64, 129},   {224, 64, 33},
                                {352, 192, 65}, {256, 64, 129},  {288, 128, 257}, {320, 128, 129},
                                {640, 96, 65},  {1024, 128, 65}, {1152, 128, 65}, {2048, 64, 65},
                                {4096, 64, 33}, {6912, 16, 17},  {5376, 32, 33},  {256, 2176, 129}};
    for (const Store store : {Store::parts_fp32, Store::rows_bf16, Store::geglu}) {
        Margin margin(std::string("linear: ") + name_of(store));
        for (const Problem& problem : problems) {
            const int K = problem.K, M = problem.M;
            if (store == Store::geglu && M % 64) continue;  // [N, M/2] in fragment order needs it
            const bool large = M > 2048;                    // one count only, for time
            if (large && store != Store::parts_fp32) continue;
            INFO(name_of(store) << ", K " << K << ", M " << M);
            const Matrices m(K, M, problem.rows);
            const int groups = store == Store::parts_fp32 ? groups_of(K) : 1;
            const Exact exact(m, groups);
            const auto all =
                in_all_orders([&] { return product(m, store, groups, 0, m.rows, nullptr); });
            check_product(margin, all, exact, store);
            const size_t width = all.size() / size_t(m.rows);
            const auto begins_like_all = [&](const std::vector<uint32_t>& y, int first) {
                return std::equal(y.begin(), y.end(), all.begin() + first * ptrdiff_t(width));
            };
            for (int n = 0; n < m.rows; n++) {
                if (n > 17 && n % 32 != 0 && n % 32 != 31 && n % 32 != 1 && K > 64) continue;
                if (large && n % 64) continue;
                if (!begins_like_all(product(m, store, groups, n, 1, nullptr), n))
                    FAIL_CHECK("row " << n << " has other bits alone");
            }
            // All numbers of tokens are tested with fp32 output only, which hides no bit.
            const std::vector<int> counts =
                large ? std::vector<int>{129}
                : store == Store::parts_fp32
                    ? std::vector<int>{1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129, 257}
                    : std::vector<int>{1, 9, 33, 65};
            for (const Variant& v : variants_of(slice_steps(K))) {
                if (M % v.columns) continue;
                for (const int N : counts) {
                    if (N > m.rows) continue;
                    const auto run = [&] { return product(m, store, groups, 0, N, &v); };
                    if (!begins_like_all(N == 33 || N == 17 ? in_all_orders(run) : run(), 0))
                        FAIL_CHECK(v.name << " has other bits for " << N << " rows");
                }
            }
            for (const int N : counts) {
                if (N > m.rows) continue;
                if (!begins_like_all(product(m, store, groups, 0, N, nullptr), 0))
                    FAIL_CHECK("linear() has other bits for " << N << " rows");
            }
        }
    }
}

// [5] Attention ----------------------------------------------------------------------------------

namespace {

// A sequence of T tokens. The first `known` have random K and V; the others have a random qkv, from
// which attention computes their K and V.
struct Story {
    int E, H, G, window, known, T;
    float eps = 1e-6f, scale;
    std::vector<bf16> qkv;             // [T - known, (H + 2G) E]
    std::vector<float> cos_sin;        // [T - known, E]
    std::vector<bf16> q_norm, k_norm;  // [E]
    std::vector<bf16> kv;              // [T][G][K, V][E]; at first of `known` tokens only

    Story(int E_, int heads, int G_, int window_, int known_, int T_)
        : E(E_), H(heads * G_), G(G_), window(window_), known(known_), T(T_) {
        Random random(uint64_t(E * 1000003 + heads * 1009 + G * 101 + T));
        const auto tokens = size_t(T - known), width = size_t(E);
        scale = 2 / std::sqrt(float(E));  // scores near 2: weights neither flat nor all on one key
        qkv = random.bf16s(tokens * size_t(H + 2 * G) * width, -2, 2);
        q_norm = random.bf16s(width, -0.5, 0.5), k_norm = random.bf16s(width, -0.5, 0.5);
        kv = random.bf16s(size_t(T) * size_t(G) * 2 * width, -1.7, 1.7);
        for (size_t n = 0; n < tokens; n++) {
            for (const bool sine : {false, true}) {
                for (int i = 0; i < E / 2; i++) {
                    const double angle = double(n) * std::pow(1e4, -2. * i / E) + 0.1;
                    cos_sin.push_back(float(sine ? std::sin(angle) : std::cos(angle)));
                }
            }
        }
    }
    const bf16* head(int token, int h) const {  // of q; the heads of K and V follow
        return qkv.data() + (size_t(token - known) * size_t(H + 2 * G) + size_t(h)) * size_t(E);
    }
    bf16* key(int token, int g) {
        return kv.data() + (size_t(token) * size_t(G) + size_t(g)) * 2 * size_t(E);
    }
    int oldest(int position) const { return std::max(0, position - window + 1); }
};

// One row of a step: tokens first .. first+count-1 of the story; earlier ones are in pages already.
// count 0: a row that only fills a bucket, with a token but neither pages nor chunks.
struct Part {
    int first, count;
};

constexpr int first_in_page = 1, layers_in_page = 2;  // the tests use the second layer of a page

// One step's attention, [N, H E], with rows launched in groups that begin at `cuts`. Pages are in
// random places. All that no query may read is NaN: pages of no row, the page -1, keys before the
// window, slots that are not written yet, the other layer. Checks that nothing else was written.
std::vector<bf16> attention(Story& story, const std::vector<Part>& parts, std::vector<int> cuts,
                            bool learn) {
    const int E = story.E, H = story.H, G = story.G, R = int(parts.size());
    const int pool = story.window == INT_MAX ? global_pool : local_pool;
    const size_t layer = size_t(G) * 2 * page_tokens * size_t(E), stride = layer * layers_in_page;
    std::vector<int> tokens, positions, row_of, row_start = {0}, chunk_start = {0},
                                                tile_start = {0};
    std::vector<bf16> qkv;
    std::vector<float> cos_sin;
    int pages_per_row = 1, all_pages = 3;
    for (const Part& part : parts) {
        const int last = part.first + part.count - 1, count = std::max(1, part.count);
        for (int i = 0; i < count; i++) {
            const int token = part.first + i;
            positions.push_back(part.count ? token : 0),
                row_of.push_back(int(row_start.size()) - 1);
            const bf16* from = story.head(token, 0);
            qkv.insert(qkv.end(), from, from + (H + 2 * G) * E);
            const auto angles = story.cos_sin.begin() + (token - story.known) * E;
            cos_sin.insert(cos_sin.end(), angles, angles + E);
        }
        row_start.push_back(row_start.back() + count);
        chunk_start.push_back(
            chunk_start.back() +
            (part.count == 1 ? last / chunk_keys - story.oldest(last) / chunk_keys + 1 : 0));
        tile_start.push_back(tile_start.back() +
                             (part.count > 1 ? ceil_div(count, query_rows / (H / G)) : 0));
        if (part.count) {
            pages_per_row = std::max(pages_per_row, last / page_tokens + 1);
            all_pages += last / page_tokens + 1 - story.oldest(part.first) / page_tokens;
        }
    }
    const int N = row_start.back();
    std::vector<int> ids(static_cast<size_t>(all_pages));
    std::iota(ids.begin(), ids.end(), 0);
    Random(uint64_t(all_pages)).shuffle(ids);
    std::vector<PagePair> table(size_t(pages_per_row * R), PagePair{-1, -1});
    std::vector<bf16> before(size_t(all_pages) * stride, bf16{0xffff});
    // The place of a page's K (V, transposed, follows) that holds token t of a row.
    const auto place = [&](int row, int t, int g) {
        const PagePair both = table[size_t(t / page_tokens * R + row)];
        return size_t(pool == global_pool ? both.global : both.local) * stride +
               layer * first_in_page + size_t(g) * 2 * page_tokens * size_t(E);
    };
    const auto put = [&](std::vector<bf16>& pages, int row, int t) {
        for (int g = 0; g < G; g++) {
            for (int d = 0; d < E; d++) {
                bf16* page = pages.data() + place(row, t, g);
                page[t % page_tokens * E + d] = story.key(t, g)[d];
                page[page_tokens * E + d * page_tokens + t % page_tokens] = story.key(t, g)[E + d];
            }
        }
    };
    for (int r = 0; r < R; r++) {
        const Part& part = parts[size_t(r)];
        if (!part.count) continue;
        const int oldest = story.oldest(part.first);
        for (int i = oldest / page_tokens; i <= (part.first + part.count - 1) / page_tokens; i++) {
            PagePair& both = table[size_t(i * R + r)];
            (pool == global_pool ? both.global : both.local) = ids.back();
            ids.pop_back();
        }
        for (int t = oldest; t < part.first; t++) put(before, r, t);
    }
    if (cuts.empty()) cuts = {0};
    cuts.push_back(R);
    int slots = 1;
    for (size_t i = 0; i + 1 < cuts.size(); i++)
        slots = std::max(slots, chunk_start[size_t(cuts[i + 1])] - chunk_start[size_t(cuts[i])]);

    const int padded = rounded_up(N, 16);
    std::vector<bf16> after;
    const auto run = [&] {
        const Array<int> positions_(positions), row_of_(row_of), row_start_(row_start),
            chunk_start_(chunk_start), tile_start_(tile_start),
            none_(std::vector<int>(size_t(R + 1), 0));
        const Array<PagePair> table_(table);
        const Array<bf16> qkv_(qkv), q_norm(story.q_norm), k_norm(story.k_norm), pages(before),
            out_(size_t(padded * H) * size_t(E));
        const Array<float> cos_sin_(cos_sin), chunk_out(size_t(slots * H) * size_t(E));
        const Array<float2> chunk_sums(size_t(slots * H));
        Attention a{};
        a.tables.positions = positions_, a.tables.row_of = row_of_;
        a.tables.row_start = row_start_, a.tables.tile_start = tile_start_;
        a.tables.chunk_start[pool] = chunk_start_, a.tables.chunk_start[1 - pool] = none_;
        a.tables.pages = table_, a.tables.R = R;
        a.qkv = qkv_, a.q_norm = q_norm, a.k_norm = k_norm, a.cos_sin = cos_sin_;
        a.kv = static_cast<bf16*>(pages) + layer * first_in_page, a.page_stride = stride;
        a.pool = pool, a.window = story.window, a.H = H, a.G = G, a.E = E, a.N = N;
        a.eps = story.eps, a.scale = story.scale * log2e;
        a.chunk_out = chunk_out, a.chunk_sums = chunk_sums, a.out = out_;
        auto s = new_stream();
        if (tile_start.back()) write_kv(s, a), attend_tiles(s, a, tile_start.back());
        for (size_t i = 0; i + 1 < cuts.size(); i++) {
            const int chunks = chunk_start[size_t(cuts[i + 1])] - chunk_start[size_t(cuts[i])];
            attend_rows(s, a, cuts[i], cuts[i + 1] - cuts[i], chunks);
        }
        after = pages.read();
        return out_.read();
    };
    // Orders of the threads are tested with a single group only.
    const auto out = cuts.size() > 2 ? run() : in_all_orders(run);
    auto want_pages = before;
    auto want_out = of_pattern<bf16>(out.size());
    std::vector<bf16> rows;
    for (int r = 0; r < R; r++) {
        const Part& part = parts[size_t(r)];
        for (int t = part.first; t < part.first + part.count; t++) {
            for (int g = 0; g < G && learn; g++) {
                const bf16* page = after.data() + place(r, t, g);
                for (int d = 0; d < E; d++) {
                    story.key(t, g)[d] = page[t % page_tokens * E + d];
                    story.key(t, g)[E + d] =
                        page[page_tokens * E + d * page_tokens + t % page_tokens];
                }
            }
            put(want_pages, r, t);
            const int n = row_start[size_t(r)] + t - part.first;
            for (int k = 0; k < H * E; k++) {
                const size_t at = fragment(n, k, H * E);
                want_out[at] = out[at], rows.push_back(out[at]);
            }
        }
    }
    CHECK(same_bits(after, want_pages));
    CHECK(same_bits(out, want_out));
    return rows;
}

// A head after norm and RoPE, in double; `sizes` are what its roundings are relative to.
std::vector<double> turned(const bf16* head, const bf16* weight, const float* cos_sin, int E,
                           double eps, std::vector<double>& sizes) {
    double squares = 0;
    for (int d = 0; d < E; d++) squares += double(value(head[d])) * double(value(head[d]));
    const double r = 1 / std::sqrt(squares / E + eps);
    std::vector<double> x(size_t(E), 0), out(size_t(E), 0);
    sizes.assign(size_t(E), 0);
    for (int d = 0; d < E; d++) x[size_t(d)] = value(head[d]) * r * (1 + value(weight[d]));
    for (int d = 0; d < E; d++) {
        const bool left = d < E / 2;
        const double other = x[size_t(left ? d + E / 2 : d - E / 2)], own = x[size_t(d)],
                     c = cos_sin[d % (E / 2)], s = cos_sin[E / 2 + d % (E / 2)];
        out[size_t(d)] = left ? own * c - other * s : own * c + other * s;
        sizes[size_t(d)] = std::abs(own * c) + std::abs(other * s);
    }
    return out;
}

void check_against_softmax(Story& story, const std::vector<bf16>& out, Margin& margin_k,
                           Margin& margin) {
    const int E = story.E, H = story.H, G = story.G, heads = H / G;
    std::vector<double> sizes;
    for (int t = story.known; t < story.T; t++) {
        const float* cos_sin = story.cos_sin.data() + (t - story.known) * E;
        for (int g = 0; g < G; g++) {
            const auto k = turned(story.head(t, H + g), story.k_norm.data(), cos_sin, E,
                                  double(story.eps), sizes);
            // Roundings: E/32 + 5 additions of squares, halved by the root, and 8 operations.
            for (int d = 0; d < E; d++) {
                margin_k.add(value(story.key(t, g)[d]), k[size_t(d)],
                             std::abs(k[size_t(d)]) * half_bf16 +
                                 sizes[size_t(d)] * ((E / 32. + 5) / 2 + 8) * half_fp32);
            }
            CHECK(std::memcmp(story.key(t, g) + E, story.head(t, H + G + g), size_t(E) * 2) == 0);
        }
        for (int h = 0; h < H; h++) {
            // K and V are read from the pages, and q is rounded to bf16 as the kernel does.
            const int g = h / heads, lo = story.oldest(t);
            auto q =
                turned(story.head(t, h), story.q_norm.data(), cos_sin, E, double(story.eps), sizes);
            for (double& x : q) x = value(to_bf16(x));
            std::vector<double> p;
            double top = -INFINITY, total = 0, flip = 0, size = 0;
            for (int key = lo; key <= t; key++) {
                double score = 0, absolute = 0;
                for (int d = 0; d < E; d++) {
                    const double product = q[size_t(d)] * double(value(story.key(key, g)[d]));
                    score += product, absolute += std::abs(product);
                    flip = std::max(flip, std::abs(product));
                }
                p.push_back(score * double(story.scale)), top = std::max(top, p.back());
                size = std::max(size, absolute);
            }
            for (double& x : p) x = std::exp(x - top), total += x;
            // Weights are rounded to bf16 before both the sum of weights and the product with V, so
            // an error counts by how far V is from its mean. The same holds for an error of a
            // score. A score is off if an element of q, computed in fp32, was almost halfway
            // between two bf16 and was rounded the other way (assumed in at most 2 dims), and by
            // the roundings of its additions.
            const double score_noise =
                double(story.scale) *
                (2 * 2 * half_bf16 * flip + (16 + E / 16.) * 2 * half_fp32 * size);
            for (int d = 0; d < E; d++) {
                double mean = 0, spread = 0;
                for (int key = lo; key <= t; key++)
                    mean += p[size_t(key - lo)] / total * double(value(story.key(key, g)[E + d]));
                for (int key = lo; key <= t; key++)
                    spread += p[size_t(key - lo)] / total *
                              std::abs(double(value(story.key(key, g)[E + d])) - mean);
                const size_t at = size_t(t - story.known) * size_t(H * E) + size_t(h * E + d);
                margin.add(
                    value(out[at]), mean,
                    spread * (half_bf16 + score_noise) + std::abs(mean) * half_bf16 + 2 * 0x1p-16);
            }
        }
    }
}

}  // namespace

TEST_CASE("attention: near an exact softmax, and the same bits however tokens are grouped") {
    NEED_DEVICE();
    constexpr int all = INT_MAX;
    struct Case {
        int E, heads, G, window, known, T;
    };
    const Case cases[] = {
        {64, 1, 1, all, 0, 200},     {64, 1, 2, 32, 0, 135},   {64, 2, 1, 64, 0, 200},
        {64, 4, 1, 32, 0, 100},      {64, 8, 2, all, 0, 66},   {64, 16, 1, 64, 0, 135},
        {128, 1, 2, 64, 0, 135},     {128, 2, 2, 32, 0, 100},  {128, 2, 1, all, 0, 135},
        {128, 4, 1, 64, 0, 70},      {128, 8, 1, 32, 0, 66},   {128, 16, 1, all, 0, 66},
        {256, 1, 1, 32, 0, 70},      {256, 2, 2, all, 0, 66},  {256, 4, 1, 64, 0, 130},
        {256, 8, 1, all, 0, 66},     {256, 16, 2, 32, 20, 66}, {64, 1, 1, 512, 505, 580},
        {64, 2, 1, all, 2090, 2115}, {64, 1, 2, 50, 0, 120},
    };
    Margin margin_k("attention: k in its page"), margin("attention: output");
    for (const Case& c : cases) {
        INFO("E " << c.E << ", " << c.heads << " heads of " << c.G << ", window " << c.window
                  << ", " << c.known << " .. " << c.T);
        Story story(c.E, c.heads, c.G, c.window, c.known, c.T);
        const auto whole = attention(story, {{c.known, c.T - c.known}}, {}, true);
        check_against_softmax(story, whole, margin_k, margin);

        // One row for each token, whose earlier tokens are in pages already. attention() checks
        // that each row writes the same bits to its pages, so this equals decoding step by step.
        std::vector<Part> parts;
        std::vector<int> edges = {0,  1,  31, 32,  33,  62,  63,      64,
                                  65, 95, 96, 127, 128, 129, c.T - 2, c.T - 1};
        for (int i = -2; i <= 2 && c.window < all; i++) {
            for (const int pages : {0, 1, 2}) edges.push_back(c.window + pages * page_tokens + i);
        }
        for (int t = c.known; t < c.T; t++) {
            if (c.E == 64 || std::count(edges.begin(), edges.end(), t)) parts.push_back({t, 1});
        }
        // In the same step, the story once more in chunks of random sizes that do not end at page
        // edges, and a row that only fills a bucket.
        Random random(uint64_t(c.T));
        for (int t = c.known; t < c.T;) {
            const int count = std::min(c.T - t, 1 + random.below(70));
            parts.push_back({t, count}), t += count;
        }
        parts.push_back({c.known, 0});
        random.shuffle(parts);
        const int R = int(parts.size()), width = story.H * c.E;
        std::vector<bf16> want;
        for (const Part& part : parts) {
            want.insert(want.end(), whole.begin() + (part.first - c.known) * width,
                        whole.begin() + (part.first - c.known + part.count) * width);
        }
        CHECK(same_bits(attention(story, parts, {}, false), want));
        CHECK(same_bits(attention(story, parts, {0, 1, R / 3, R / 2, R - 1}, false), want));

        // Single rows, each alone in its step.
        for (const Part& part : List<Part>{{c.T - 1, 1}, {(c.known + c.T) / 2, 1}, {c.T - 3, 2}}) {
            const auto alone = attention(story, {part}, {}, false);
            CHECK(std::equal(alone.begin(), alone.end(),
                             whole.begin() + (part.first - c.known) * width,
                             [](bf16 a, bf16 b) { return a.bits == b.bits; }));
        }
    }
}

// [6] Sampling -----------------------------------------------------------------------------------

namespace {

struct Sampled {
    std::vector<Result> results;
    std::vector<float> logits;  // after the step
};

// Does what CudaModel::pack and step do for sampling. `hashes`, if given, replace those of seeds.
Sampled sample_on_device(const std::vector<float>& logits, int V, int vocab,
                         const std::vector<Output>& outputs,
                         const std::vector<uint64_t>& hashes = {}) {
    std::vector<Ask> asks;
    std::vector<DeviceAdjustment> adjustments;
    std::vector<uint32_t> allowed;
    bool adjusted = false, logprobs = false;
    for (const Output& o : outputs) {
        Ask r = ask_of(o);
        r.first_adjustment = int(adjustments.size()), r.adjustments = int(o.adjustments.size());
        for (const Adjustment& a : o.adjustments) adjustments.push_back({a, 0});
        if (o.allowed) {
            r.allowed = int(allowed.size());
            allowed.insert(allowed.end(), o.allowed->begin(), o.allowed->end());
        }
        adjusted |= !o.adjustments.empty();
        logprobs |= o.target >= 0 || o.sampling.logprobs >= 0;
        if (!hashes.empty()) r.hash = hashes[asks.size()];
        asks.push_back(r);
    }
    const auto count = outputs.size();
    Sampled sampled;
    // Returns the ids, so that orders of the threads can be compared.
    in_all_orders([&] {
        const Array<float> logits_(logits);
        const Array<uint64_t> best(count * size_t(ceil_div(vocab, block_ids)));
        const Array<Ask> asks_(asks);
        const Array<DeviceAdjustment> adjustments_(adjustments);
        const Array<uint32_t> allowed_(allowed);
        HostMemory<int> ids;
        HostMemory<Details> details;
        ids.reserve(count), details.reserve(count);
        std::memset(static_cast<void*>(ids.data), pattern, count * sizeof(int));
        std::memset(static_cast<void*>(details.data), pattern, count * sizeof(Details));
        auto s = new_stream();
        sample(s,
               {logits_, best, asks_, allowed_, adjustments_, ids.data, details.data, int(count), V,
                V, vocab},
               adjusted, logprobs);
        CUDA(cudaDeviceSynchronize());
        sampled.logits = logits_.read(), sampled.results.clear();
        std::vector<uint32_t> bits;
        for (size_t i = 0; i < count; i++) {
            Result r{ids.data[i], 0, 0, {}};
            bits.push_back(uint32_t(r.id));
            if (outputs[i].target >= 0 || outputs[i].sampling.logprobs >= 0) {
                const Details& d = details.data[i];
                r.logprob = d.logprob, r.rank = d.rank;
                bits.push_back(std::bit_cast<uint32_t>(d.logprob)),
                    bits.push_back(uint32_t(d.rank));
                for (int j = 0; j < outputs[i].sampling.logprobs; j++) {
                    r.top.push_back({d.ids[j], d.logprobs[j]});
                    bits.push_back(uint32_t(d.ids[j]));
                    bits.push_back(std::bit_cast<uint32_t>(d.logprobs[j]));
                }
            }
            sampled.results.push_back(r);
        }
        return bits;
    });
    return sampled;
}

// Samples, each output from its own row of logits; the ids must be those of reference.cpp's
// sampler.
Sampled check_ids(const std::vector<float>& logits, int V, int vocab,
                  const std::vector<Output>& outputs) {
    Config c{};
    c.V = V, c.vocab = vocab;
    Sampled sampled = sample_on_device(logits, V, vocab, outputs);
    for (size_t i = 0; i < outputs.size(); i++) {
        const Output& o = outputs[i];
        const auto adjusted = twin::gemma::adjust(logits.data() + i * size_t(V), c, o);
        const int want = o.target >= 0 ? o.target : twin::gemma::sample(adjusted, vocab, o);
        if (sampled.results[i].id != want) {
            FAIL_CHECK("output " << i << " is " << sampled.results[i].id << " and not " << want
                                 << ": temperature " << o.sampling.temperature << ", top_k "
                                 << o.sampling.top_k << ", top_p " << o.sampling.top_p << ", min_p "
                                 << o.sampling.min_p);
        }
    }
    return sampled;
}

Output output(const Sampling& sampling, int index = 0) {
    Output o{};
    o.index = index, o.sampling = sampling;
    return o;
}

// Logits of several kinds, [rows, V]. Ids from vocab on have no text and must never be sampled;
// their logits are the largest.
enum class Kind { wide, flat, few_values, equal, holes, peaked, zeros, spikes };
constexpr Kind kinds[] = {Kind::wide,  Kind::flat,   Kind::few_values, Kind::equal,
                          Kind::holes, Kind::peaked, Kind::zeros,      Kind::spikes};
std::vector<float> make_logits(Kind kind, int V, int vocab, size_t rows, uint64_t seed) {
    Random random(seed);
    std::vector<float> logits(rows * size_t(V));
    for (size_t i = 0; i < logits.size(); i++) {
        const double u = random.uniform(-1, 1);
        const auto id = int(i % size_t(V));
        float& z = logits[i];
        if (kind == Kind::wide) z = float(u * 20);
        if (kind == Kind::flat) z = float(u * 0.01 - 7);
        if (kind == Kind::few_values) z = float(random.below(5)) - 9;
        if (kind == Kind::equal) z = 1.5f;
        if (kind == Kind::holes) z = id % 3 == 1 ? float(u * 2) : -INFINITY;
        if (kind == Kind::peaked) z = id % 500 == 7 ? float(u * 10000) : float(-20000 + u);
        if (kind == Kind::zeros) z = random.below(2) ? 0.f : random.below(2) ? -0.f : float(u);
        // Spikes: one id of each block has weight.
        if (kind == Kind::spikes) z = id % 256 == 3 ? 0.f : -200.f;
        if (id >= vocab) z = 30000;
    }
    return logits;
}

}  // namespace

TEST_CASE("sampling: the ids are those of reference.cpp, for every setting and many seeds",
          "[slow]") {
    NEED_DEVICE();
    const Sampling settings[] = {
        {.temperature = 0},
        {},
        {.temperature = 0.3f},
        {.temperature = 5},
        {.top_k = 1},
        {.top_k = 5},
        {.top_k = 64},
        {.top_k = 256},
        {.top_k = 257},
        {.top_k = 5000},
        {.top_p = 0.1f},
        {.top_p = 0.9f},
        {.top_p = 0.999f},
        {.top_p = 0.5f},
        {.top_p = 1e-20f},
        {.min_p = 0.05f},
        {.min_p = 1},
        {.top_k = 64, .top_p = 0.95f},
        {.top_k = 64, .top_p = 0.5f},
        {.top_k = 2, .top_p = 0.5f},
        {.top_k = 2, .top_p = 1e-20f},
        {.top_k = 5, .top_p = 0.5f, .min_p = 0.02f},
        {.temperature = 1.7f, .top_k = 300, .top_p = 0.8f, .min_p = 0.001f},
    };
    struct Size {
        int V, vocab, seeds;
    };
    const int more = emulated ? 1 : 100;
    for (const Size size : List<Size>{{512, 512, more},
                                      {2048, 2047, more},
                                      {4160, 4096, more},
                                      {1000, 1000, more},
                                      {17000, 16900, more}}) {
        for (const Kind kind : kinds) {
            INFO("V " << size.V << ", logits of kind " << int(kind));
            if (size.V > 10000 && kind != Kind::wide && kind != Kind::few_values &&
                kind != Kind::spikes)
                continue;
            std::vector<Output> outputs;
            Random random(uint64_t(int(kind) * 7 + size.V));
            for (const Sampling& setting : settings) {
                for (int i = 0; i < size.seeds; i++) {
                    outputs.push_back(output(setting, random.below(1000)));
                    outputs.back().sampling.seed = random.engine();
                }
            }
            check_ids(make_logits(kind, size.V, size.vocab, outputs.size(), uint64_t(kind)), size.V,
                      size.vocab, outputs);
        }
    }
}

TEST_CASE("sampling: hundreds of seeds draw what reference.cpp draws", "[slow]") {
    NEED_DEVICE();
    for (const Sampling& setting :
         List<Sampling>{{}, {.top_k = 2, .top_p = 0.99f}, {.top_k = 40}, {.top_p = 0.7f}}) {
        std::vector<Output> outputs;
        for (int i = 0; i < (emulated ? 70 : 1000); i++) {
            outputs.push_back(output(setting, i % 7));
            outputs.back().sampling.seed = uint64_t(i / 7);
        }
        const auto row = make_logits(Kind::flat, 700, 690, 1, 3);
        std::vector<float> logits;
        for (size_t i = 0; i < outputs.size(); i++)
            logits.insert(logits.end(), row.begin(), row.end());
        check_ids(logits, 700, 690, outputs);
    }
}

// Four equal weights of 2^40: with these hashes the draw falls exactly on the edge between two ids,
// which no seed is likely to do.
TEST_CASE("sampling: a draw exactly on the edge between two ids takes the second") {
    NEED_DEVICE();
    const int V = 4 * block_ids;  // ids 3, 259, 515 and 771 have weight
    for (const Sampling& setting : List<Sampling>{{}, {.top_k = 4}, {.top_p = 0.99f}}) {
        std::vector<uint64_t> hashes;
        std::vector<int> want;
        for (uint64_t i = 0; i < 4; i++) {
            hashes.push_back(i << 62), want.push_back(int(i) * block_ids + 3);
            hashes.push_back((i << 62) - 1), want.push_back(int((i + 3) % 4) * block_ids + 3);
        }
        const std::vector<Output> outputs(hashes.size(), output(setting));
        const auto sampled = sample_on_device(make_logits(Kind::spikes, V, V, hashes.size(), 1), V,
                                              V, outputs, hashes);
        for (size_t i = 0; i < want.size(); i++) CHECK(sampled.results[i].id == want[i]);
    }
}

TEST_CASE("sampling: adjustments and allowed ids, and the raw logits come back") {
    NEED_DEVICE();
    const int V = 2304, vocab = 2290;
    for (const bool logprobs : {false, true}) {
        std::vector<Output> outputs;
        Random random(5);
        for (int i = 0; i < 24; i++) {
            Output o = output(i % 3 == 0   ? Sampling{.temperature = 0}
                              : i % 3 == 1 ? Sampling{.top_k = 5, .top_p = 0.9f}
                                           : Sampling{.top_p = 0.8f, .min_p = 0.01f},
                              i);
            o.sampling.seed = uint64_t(i);
            if (i % 2) {
                // Adjustments of all kinds on many ids, more than a block has threads.
                std::vector<int> ids(static_cast<size_t>(vocab));
                std::iota(ids.begin(), ids.end(), 0);
                random.shuffle(ids);
                for (int j = 0; j < (i % 4 == 1 ? 300 : 3); j++) {
                    o.adjustments.push_back({ids[size_t(j)], float(random.uniform(-30, 30)),
                                             j % 2 ? 1.3f : 1, j % 3 ? 0 : 0.7f});
                }
            }
            if (i % 8 == 4) o.adjustments.push_back({17, 100, 1, 0});
            if (i % 5 == 2) {
                std::vector<uint32_t> bits(static_cast<size_t>(ceil_div(vocab, 32)));
                for (uint32_t& word : bits) word = i % 2 ? uint32_t(random.engine()) : 0;
                bits[7] |= 1u << 5, bits.back() |= 1;
                o.allowed = std::make_shared<const std::vector<uint32_t>>(std::move(bits));
            }
            if (logprobs && i % 3 != 2) o.sampling.logprobs = i % 2 ? 20 : 0;
            outputs.push_back(o);
        }
        const auto logits = make_logits(Kind::wide, V, vocab, outputs.size(), 9);
        const Sampled sampled = check_ids(logits, V, vocab, outputs);
        auto want = logits;  // raw; adjusted where no logprobs are asked for
        Config c{};
        c.V = V, c.vocab = vocab;
        for (size_t i = 0; i < outputs.size() && !logprobs; i++) {
            Output o = outputs[i];
            o.allowed = nullptr;
            const auto row = twin::gemma::adjust(logits.data() + i * size_t(V), c, o);
            std::copy(row.begin(), row.end(), want.begin() + ptrdiff_t(i) * V);
        }
        CHECK(same_bits(sampled.logits, want));
    }
}

TEST_CASE(
    "log softmax: near double, with exact ranks and likeliest ids, ids without text included") {
    NEED_DEVICE();
    Margin margin("log softmax");
    for (const int V : {512, 2304, 1000}) {
        const int vocab = V - 10;
        for (const Kind kind :
             {Kind::wide, Kind::flat, Kind::few_values, Kind::equal, Kind::peaked, Kind::zeros}) {
            INFO("V " << V << ", logits of kind " << int(kind));
            std::vector<Output> outputs;
            for (int i = 0; i < 8; i++) {
                outputs.push_back(output({.seed = uint64_t(i), .logprobs = i % 4 ? 20 - i : -1}));
                if (i % 2) outputs.back().target = i * 31 + 1;
                if (i == 7) outputs.back().target = V - 1;
                if (i == 6) outputs.back().sampling.logprobs = 0;
                if (i == 4) outputs.back().sampling.logprobs = 20;
                if (i == 3) outputs.back().sampling.logprobs = 1;
            }
            auto logits = make_logits(kind, V, vocab, outputs.size(), uint64_t(V));
            for (size_t i = 0; i < logits.size(); i++) {
                if (logits[i] == 30000 && i < 4 * size_t(V)) logits[i] = 0;
            }
            const Sampled sampled = check_ids(logits, V, vocab, outputs);
            for (size_t i = 0; i < outputs.size(); i++) {
                const int wanted = outputs[i].sampling.logprobs;
                if (outputs[i].target < 0 && wanted < 0) continue;
                const float* row = logits.data() + i * size_t(V);
                const double top = *std::max_element(row, row + V);
                double total = 0, noise = 0;
                for (int id = 0; id < V; id++) {
                    // The exponential's argument has two roundings; its polynomial is off by 1e-7.
                    const double x = row[id] - top, weight = std::exp(x);
                    total += weight, noise += weight * (2 * half_fp32 * std::abs(x) + 1e-7);
                }
                noise = noise / total + V * 0x1p-40;
                const auto check = [&](int id, float logprob) {
                    const double x = row[id] - top, want = x - std::log(total);
                    margin.add(
                        logprob, want,
                        noise + half_fp32 * (std::abs(x) + std::log(total) + std::abs(want)));
                };
                const Result& got = sampled.results[i];
                Result want;
                want.id = got.id;
                twin::gemma::log_softmax(want, row, V, std::max(0, wanted));
                check(got.id, got.logprob);
                CHECK(got.rank == want.rank);
                REQUIRE(got.top.size() == want.top.size());
                for (size_t j = 0; j < got.top.size(); j++) {
                    CHECK(got.top[j].id == want.top[j].id);
                    check(got.top[j].id, got.top[j].logprob);
                }
            }
        }
    }
}

// [7] Launches -----------------------------------------------------------------------------------

TEST_CASE("the launchers' preconditions hold for every size of the family") {
#ifdef NDEBUG
    SKIP_BECAUSE("launchers assert nothing in this build");
#endif
    struct Size {
        int D, F, H, G, E, V;
    };
    // 270M, 1B, 4B, 12B, 27B
    for (const Size& c : List<Size>{{640, 2048, 4, 1, 256, 262144},
                                    {1152, 6912, 4, 1, 256, 262144},
                                    {2560, 10240, 8, 4, 256, 262208},
                                    {3840, 15360, 16, 8, 256, 262208},
                                    {5376, 21504, 32, 16, 128, 262208}}) {
        for (const int processors : {1, 58, 132}) {
            for (int N = 1; N <= 4096; N += N < 300 ? 1 : 379) {
                INFO("D " << c.D << ", F " << c.F << ", N " << N);
                gemma::Stream s;
                // The launchers check their preconditions, but launch nothing.
                s.only = "no kernel of this name";
                s.processors = processors;
                const int HE = c.H * c.E, GE = c.G * c.E;
                Norm norms{};
                norms.D = c.D, norms.count = groups_of(c.F);
                norm(s, N, norms);
                norms.count = groups_of(HE);
                norm(s, N, norms);
                linear(s, "", Store::rows_bf16, nullptr, nullptr, nullptr, N, c.D, HE + 2 * GE);
                linear(s, "", Store::parts_fp32, nullptr, nullptr, nullptr, N, HE, c.D,
                       groups_of(HE));
                linear(s, "", Store::geglu, nullptr, nullptr, nullptr, N, c.D, 2 * c.F);
                linear(s, "", Store::parts_fp32, nullptr, nullptr, nullptr, N, c.F, c.D,
                       groups_of(c.F));
                embed(s, nullptr, {}, nullptr, nullptr, nullptr, N, c.D, c.E, 1);
                for (const int window : {512, 1024, INT_MAX}) {
                    Attention a{};
                    a.H = c.H, a.G = c.G, a.E = c.E, a.N = N, a.window = window;
                    write_kv(s, a);
                    attend_tiles(s, a, N);
                    attend_rows(s, a, 0, N, std::min(N * 9, most_slots));
                }
                if (N > most_outputs) continue;
                linear(s, "", Store::parts_fp32, nullptr, nullptr, nullptr, N, c.D, c.V);
                SampleArgs args{};
                args.outputs = N, args.rows = args.V = c.V, args.vocab = 262144;
                sample(s, args, true, true);
            }
        }
    }
    SUCCEED();
}
