// SPDX-License-Identifier: Apache-2.0
//
// linear.cuh: y[N, M] = x[N, K] w[M, K]^T, in two kernels that give the same bits: linear_rows for
// few tokens, linear_tile for more. Sitting 2; included by gemma.cu. Twin: linear in reference.cpp.
//
// The order of a sum is fixed by K alone:
//
//     the 1B's down, K = 6912: 216 steps of 32 k, each step two mmas
//
//     [9 steps][9 steps][..] [..] [..] [..] | [9 steps] .. | .. | ..
//      slice 0  slice 1  ..            5    |  slice 6  ..        23
//     `------------- group 0 --------------' `- group 1 -' `-2-' `-3-'
//
//     slice: one chain of mmas that starts from zero; 10, 9 or 8 steps
//     group: its slices, added in order; the result is a part
//     parts: added in order by the norm that follows; other matrices are one group
//
// Never chain an mma through two slices: for few tokens each slice has a warp of its own, so the
// chained sum would have other bits than theirs.
#pragma once

#include <numeric>

#include "machine.cuh"

namespace gemma {
namespace {

// Steps in a slice of a matrix with K inputs. 10, 9 or 8 divides K / 32 of every matrix of the
// family; any other K has slices of one step.
constexpr int slice_steps(int K) {
    for (int steps : {10, 9, 8}) {
        if (K / 32 % steps == 0) return steps;
    }
    return 1;
}
// Groups of slices, for a matrix whose sums the following norm takes as parts.
constexpr int groups_of(int K) {
    const int slices = K / 32 / slice_steps(K);
    return slices >= 16 ? std::gcd(slices, 4) : 1;
}

enum class Store { rows_bf16, parts_fp32, geglu };

struct Product {
    const bf16 *w, *x;  // [M, K], and [N, K] in fragment order
    void* y;            // bf16 [N, M]; fp32 [groups][N, M]; or bf16 [N, M/2] in fragment order
    int N, K, M;
    int steps;   // in a slice
    int slices;  // in a group
    Store store;
};

// gelu_tanh(gate) up: gelu_tanh(z) = z / (1 + e^-2u), u = sqrt(2/pi) (z + 0.044715 z^3).
// Twin: geglu
__device__ inline float geglu(float z, float up) {
    const float u = z * fmaf(0.044715f * z, z, 1.f);
    return z / (1 + exp2f(-2 * 0.7978845608028654f * 1.4426950408889634f * u)) * up;
}

// Stores two neighbours of y, y[n, m] and y[n, m+1], m even. For GeGLU they are a gate and its up:
// their rows alternate in one matrix, so one lane holds both.
__device__ inline void store_pair(const Product& p, int group, int n, int m, float v0, float v1) {
    if (p.store == Store::rows_bf16) {
        static_cast<uint32_t*>(p.y)[(size_t(n) * p.M + m) / 2] = pack_bf16(v0, v1);
    } else if (p.store == Store::parts_fp32) {
        const size_t at = (size_t(group) * p.N + n) * p.M + m;
        static_cast<float2*>(p.y)[at / 2] = make_float2(v0, v1);
    } else {
        static_cast<bf16*>(p.y)[fragment(n, m / 2, p.M / 2)].bits =
            uint16_t(pack_bf16(geglu(v0, v1), 0));
    }
}

// Stores an mma's c, 16 tokens by 8 columns. GeGLU makes one value of a lane's pair, so a pair of
// lanes swaps: the even lane writes both of token g, the odd lane both of token g + 8, 4 bytes
// each.
__device__ inline void store_tile(const Product& p, int group, int n0, int m0,
                                  const float (&c)[4]) {
    const int lane = int(threadIdx.x) % 32, n = n0 + lane / 4, m = m0 + lane % 4 * 2;
    if (p.store != Store::geglu) {
        if (n < p.N) store_pair(p, group, n, m, c[0], c[1]);
        if (n + 8 < p.N) store_pair(p, group, n + 8, m, c[2], c[3]);
        return;
    }
    const int odd = lane % 2;
    const float upper = geglu(c[0], c[1]), lower = geglu(c[2], c[3]);
    const float mine = odd ? lower : upper;
    const float other = __shfl_xor_sync(~0u, odd ? upper : lower, 1);
    bf16* to = static_cast<bf16*>(p.y) + fragment(n + 8 * odd, m / 2 - odd, p.M / 2);
    if (n + 8 * odd < p.N)
        *reinterpret_cast<uint32_t*>(to) = odd ? pack_bf16(other, mine) : pack_bf16(mine, other);
}

constexpr int most_warps = 6;  // of a block of linear_rows: shared memory holds no more

// A round is as many slices as the block has warps. Adds this round's slices, in order, to the
// totals of earlier rounds, which lie behind `sums`; the last round stores.
template <int rows, int columns>
__device__ inline void add_slices(const Product& p, float* sums, int first, int group, int n0,
                                  int m0) {
    constexpr int pitch = columns + 1;
    const int warps = int(blockDim.x) / 32;
    const bool last = first + warps >= p.slices;
    float* totals = sums + warps * rows * pitch;
    const int pairs = min(p.N - n0, rows) * (columns / 2);
    for (int i = int(threadIdx.x); i < pairs; i += int(blockDim.x)) {
        const int n = i / (columns / 2), m = i % (columns / 2) * 2, at = n * pitch + m;
        float v0 = first ? totals[at] : 0, v1 = first ? totals[at + 1] : 0;
        UNROLL for (int q = 0; q < most_warps; q++) {
            if (q >= warps) continue;
            v0 += sums[q * rows * pitch + at];
            v1 += sums[q * rows * pitch + at + 1];
        }
        if (last) {
            store_pair(p, group, n0 + n, m0 + m, v0, v1);
        } else {
            totals[at] = v0;
            totals[at + 1] = v1;
        }
    }
    if (!last) __syncthreads();
}

// For few tokens. A warp takes a slice of 8 NT rows of w by 16 MT tokens, weights straight from
// memory, with DEPTH steps of them in registers before the first is needed. STEPS: in a slice.
// Grid: (columns, groups, tokens). Twin: linear
template <int NT, int MT, int DEPTH, int STEPS>
__global__ void __launch_bounds__(192, MT == 1 && DEPTH == 10 ? 2 : 0) linear_rows(Product p) {
    constexpr int rows = 16 * MT, columns = 8 * NT, pitch = columns + 1;
    constexpr int depth = DEPTH < STEPS ? DEPTH : STEPS, x_depth = MT == 1 ? STEPS : 1;
    float* sums = reinterpret_cast<float*>(dynamic_shared());  // [warps][rows][pitch], then totals
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const int g = lane / 4, t = lane % 4, group = int(blockIdx.y);
    const int m0 = int(blockIdx.x) * columns, n0 = int(blockIdx.z) * rows;
    launch_dependents();
    for (int first = 0; first < p.slices; first += int(blockDim.x) / 32) {
        const int step0 = (group * p.slices + first + warp) * STEPS;
        // 32 bits, which linear() asserts are enough: 64 for each of NT rows spilled.
        const unsigned from = unsigned(m0 + g) * unsigned(p.K) + unsigned(step0 * 32 + t * 8);
        const bf16* x = p.x + (size_t(n0 / 16) * (p.K / 32) + step0) * 512 + (g * 4 + t) * 8;
        uint4 w[depth][NT], a[x_depth][2];
        const auto load_w = [&](int i) {
            UNROLL for (int j = 0; j < NT; j++) {
                w[i % depth][j] = load_stream(p.w + (from + unsigned(j * 8 * p.K + i * 32)));
            }
        };
        const auto load_x = [&](int i, int m) {
            const bf16* at = x + (size_t(m) * (p.K / 32) + i) * 512;
            // The lane holds tokens g and g + 8. If g is past N, so is g + 8. If only g + 8 is,
            // its garbage stays in its own row of y, which is not stored.
            const bool live = n0 + m * 16 + g < p.N;
            a[i % x_depth][0] = live ? load16(at) : uint4{};
            a[i % x_depth][1] = live ? load16(at + 256) : uint4{};
        };
        UNROLL for (int i = 0; i < depth; i++) load_w(i);
        if (first == 0) grid_dependency_wait();
        if (MT == 1) {
            UNROLL for (int i = 0; i < STEPS; i++) load_x(i, 0);
        }
        float c[MT][NT][4] = {};
        // Fully unrolled, big tiles would spill: ptxas moves all loads of x to the front.
        [[maybe_unused]] constexpr int unroll = NT * MT > 16 ? depth : STEPS;
#pragma unroll unroll
        for (int i = 0; i < STEPS; i++) {
            UNROLL for (int m = 0; m < MT; m++) {
                if (MT > 1) load_x(i, m);
                UNROLL for (int half = 0; half < 2; half++) {
                    UNROLL for (int j = 0; j < NT; j++) {
                        const uint4& b = w[i % depth][j];
                        mma_half(c[m][j], a[i % x_depth][half], half ? b.z : b.x, half ? b.w : b.y);
                    }
                }
            }
            if (i + depth < STEPS) load_w(i + depth);
        }
        float* mine = sums + (warp * rows + g) * pitch + 2 * t;
        UNROLL for (int m = 0; m < MT; m++) {
            UNROLL for (int j = 0; j < NT; j++) {
                UNROLL for (int v = 0; v < 4; v++) {
                    mine[(m * 16 + v / 2 * 8) * pitch + j * 8 + v % 2] = c[m][j][v];
                }
            }
        }
        __syncthreads();
        add_slices<rows, columns>(p, sums, first, group, n0, m0);
    }
}

// For more tokens. A block takes BT tokens by BW rows of w; a warp takes 16 WM tokens by 8 WN rows.
// Both sides go through shared memory, in STAGES stages of KB steps. No branch inside the unrolled
// steps, and each address is computed once.
// Grid: (tokens, columns, groups), so that blocks that run together share weights; for a narrow
// matrix, which stays in the cache, (columns, tokens, groups). Twin: linear
constexpr int wide = 2048;
template <int BT, int BW, int WM, int WN, int KB, int STAGES>
__global__ void __launch_bounds__(BT / (16 * WM) * BW / (8 * WN) * 32, BT == 64 && WN == 4 ? 3 : 1)
    linear_tile(Product p) {
    constexpr int warps_t = BT / (16 * WM), threads = warps_t * (BW / (8 * WN)) * 32;
    constexpr int w_rows = threads / 4, w_loads = BW / w_rows, x_loads = BT * KB * 4 / threads;
    static_assert(BW % w_rows == 0 && BT * KB * 4 % threads == 0);
    bf16* shared_w = reinterpret_cast<bf16*>(dynamic_shared());  // [STAGES][KB][BW][32]
    bf16* shared_x = shared_w + STAGES * KB * BW * 32;           // [STAGES][BT/16][KB][512]
    const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int g = lane / 4, t = lane % 4, warp_t = warp % warps_t, warp_w = warp / warps_t;
    const bool tokens_first = p.M > wide;
    const int m0 = int(tokens_first ? blockIdx.y : blockIdx.x) * BW, group = int(blockIdx.z);
    const int n0 = int(tokens_first ? blockIdx.x : blockIdx.y) * BT;
    const int group_steps = p.slices * p.steps, step0 = group * group_steps;
    launch_dependents();
    grid_dependency_wait();
    const bf16* from = p.w + size_t(m0 + thread / 4) * p.K + step0 * 32 + thread % 4 * 8;
    const bf16* x = p.x + (size_t(n0 / 16) * (p.K / 32) + step0) * 512;
    const auto fetch = [&](int step, int stage) {
        if (step < group_steps) {
            bf16* to_w = shared_w + stage * KB * BW * 32 + thread * 8;
            bf16* to_x = shared_x + stage * (BT / 16) * KB * 512 + thread * 8;
            UNROLL for (int i = 0; i < w_loads; i++) {
                UNROLL for (int b = 0; b < KB; b++) {
                    cp_async16(to_w + (b * BW + i * w_rows) * 32,
                               from + size_t(i) * w_rows * p.K + (step + b) * 32);
                }
            }
            UNROLL for (int i = 0; i < x_loads; i++) {
                const int e = thread + i * threads, tile = e / (KB * 64), within = e % (KB * 64);
                cp_async16(to_x + i * threads * 8,
                           x + (size_t(tile) * (p.K / 32) + step) * 512 + within * 8);
            }
        }
        cp_async_commit();  // an empty group too: the wait counts groups
    };
    for (int i = 0; i < STAGES - 1; i++) fetch(i * KB, i);
    float total[WM][WN][4] = {}, c[WM][WN][4] = {};
    int in_slice = 0, stage = 0;
#pragma unroll 1
    for (int step = 0; step < group_steps; step += KB) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        fetch(step + (STAGES - 1) * KB, (stage + STAGES - 1) % STAGES);
        const bf16* b = shared_w + (stage * KB * BW + warp_w * 8 * WN + g) * 32 + t * 8;
        const bf16* a = shared_x + (stage * (BT / 16) + warp_t * WM) * KB * 512 + (g * 4 + t) * 8;
        stage = (stage + 1) % STAGES;
        UNROLL for (int q = 0; q < KB; q++) {
            uint4 av[WM][2];
            UNROLL for (int i = 0; i < WM; i++) {
                av[i][0] = load16(a + (i * KB + q) * 512);
                av[i][1] = load16(a + (i * KB + q) * 512 + 256);
            }
            UNROLL for (int j0 = 0; j0 < WN; j0 += WN / 2) {  // all at once would spill
                uint4 bv[WN / 2];
                UNROLL for (int j = 0; j < WN / 2; j++) {
                    bv[j] = load16(b + (q * BW + (j0 + j) * 8) * 32);
                }
                UNROLL for (int i = 0; i < WM; i++) {
                    UNROLL for (int j = 0; j < WN / 2; j++) {
                        mma_half(c[i][j0 + j], av[i][0], bv[j].x, bv[j].y);
                    }
                }
                UNROLL for (int i = 0; i < WM; i++) {
                    UNROLL for (int j = 0; j < WN / 2; j++) {
                        mma_half(c[i][j0 + j], av[i][1], bv[j].z, bv[j].w);
                    }
                }
            }
        }
        in_slice += KB;
        if (in_slice < p.steps) continue;
        in_slice = 0;
        UNROLL for (int i = 0; i < WM; i++) {
            UNROLL for (int j = 0; j < WN; j++) {
                UNROLL for (int v = 0; v < 4; v++) {
                    total[i][j][v] += c[i][j][v];
                    c[i][j][v] = 0;
                }
            }
        }
    }
    UNROLL for (int i = 0; i < WM; i++) {
        UNROLL for (int j = 0; j < WN; j++) {
            store_tile(p, group, n0 + (warp_t * WM + i) * 16, m0 + (warp_w * WN + j) * 8,
                       total[i][j]);
        }
    }
}

template <int NT, int MT, int DEPTH, int STEPS>
void launch_rows(Stream& s, const char* name, double bytes, const Product& p, int groups) {
    int warps = std::min(p.slices, most_warps);
    const auto shared = [&] {  // bytes; with totals, if there is more than one round
        return (warps + (warps < p.slices)) * sizeof(float) * size_t(16 * MT) * (8 * NT + 1);
    };
    while (p.slices % warps || shared() > most_shared) warps--;
    s.launch(name, bytes, linear_rows<NT, MT, DEPTH, STEPS>,
             dim3(p.M / (8 * NT), groups, ceil_div(p.N, 16 * MT)), warps * 32, shared(), p);
}

template <int B, int WM, int WN, int KB, int STAGES>
void launch_tile(Stream& s, const char* name, double bytes, const Product& p, int groups) {
    const unsigned tokens = unsigned(ceil_div(p.N, B)), columns = unsigned(p.M / B);
    s.launch(name, bytes, linear_tile<B, B, WM, WN, KB, STAGES>,
             p.M > wide ? dim3(tokens, columns, groups) : dim3(columns, tokens, groups),
             B / (16 * WM) * B / (8 * WN) * 32, size_t(STAGES) * KB * 2 * B * 64, p);
}

// Which shape is fastest: thresholds of an H100, measured on the 1B (docs/design.md, "Numbers").
// Narrow matrices have few columns to spread over the processors, wide ones many bytes to stream.
template <int STEPS>
void linear_steps(Stream& s, const char* name, double bytes, const Product& p, int groups) {
    if (STEPS == 1 || p.M % 64)  // no matrix of the family: right for every shape, and slow
        return launch_rows<2, 1, 8, STEPS>(s, name, bytes, p, groups);
    if constexpr (STEPS > 1) {
        constexpr int KB = STEPS % 3 ? 2 : 3, stages = KB == 3 ? 2 : 3;  // 96 KiB
        static_assert(STEPS % KB == 0, "linear_tile adds a slice after a whole number of stages");
        constexpr int deep = STEPS == 9 ? 2 : 1;  // more would spill
        const int tiles = ceil_div(p.N, 64) * (p.M / 64) * groups;
        if (p.N <= 16) {
            if (p.M * groups <= 2048)
                return launch_rows<2, 1, 10, STEPS>(s, name, bytes, p, groups);
            if (p.M > 4096 && p.M < 65536)
                return launch_rows<4, 1, 4, STEPS>(s, name, bytes, p, groups);
            return launch_rows<2, 1, 8, STEPS>(s, name, bytes, p, groups);
        }
        if (p.N <= 32) {
            if (p.M * groups > 1536) return launch_rows<4, 2, 4, STEPS>(s, name, bytes, p, groups);
            return launch_rows<2, 2, 10, STEPS>(s, name, bytes, p, groups);
        }
        if (p.N <= 64 && p.M <= 4096 && p.M * groups > 1536)
            return launch_rows<8, 4, deep, STEPS>(s, name, bytes, p, groups);
        if ((p.N <= 64 && p.M <= 4096) || tiles < s.processors)
            return launch_rows<4, 4, 4, STEPS>(s, name, bytes, p, groups);
        if (p.N > 64 && p.M % 128 == 0 && tiles >= 16 * s.processors)
            return launch_tile<128, 2, 8, KB, stages>(s, name, bytes, p, groups);
        if (p.N <= 64 && p.M < 65536)
            return launch_tile<64, 2, 2, KB, stages>(s, name, bytes, p, groups);
        launch_tile<64, 2, 4, KB, stages>(s, name, bytes, p, groups);
    }
}

// y = x w^T. N chooses who computes what, never the bits.
void linear(Stream& s, const char* name, Store store, void* y, const bf16* x, const bf16* w, int N,
            int K, int M, int groups = 1) {
    assert(K % 32 == 0 && M % 16 == 0);
    assert(int64_t(M) * K <= int64_t(1) << 32);  // offsets in linear_rows have 32 bits
    const int steps = slice_steps(K), slices = K / 32 / steps / groups;
    const Product p{w, x, y, N, K, M, steps, slices, store};
    const double bytes =
        2. * M * K + 2. * N * K + double(N) * M * (store == Store::parts_fp32 ? 4 * groups : 2);
    if (steps == 1) return linear_steps<1>(s, name, bytes, p, groups);
    if (steps == 10) return linear_steps<10>(s, name, bytes, p, groups);
    if (steps == 9) return linear_steps<9>(s, name, bytes, p, groups);
    linear_steps<8>(s, name, bytes, p, groups);
}

}  // namespace
}  // namespace gemma
