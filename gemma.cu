// SPDX-License-Identifier: Apache-2.0
//
// gemma.cu: the CUDA engine. Kernels, paged K and V, the forward pass, sampling, CUDA graphs. Each
// kernel's plain twin stands in reference.cpp.
//
// The rule: a token's bits never depend on what runs beside it. There is one way to multiply
// (mma.sync, tokens as its rows, one map from k to its slots), sums have an order fixed by their
// length alone, attention folds chunks of 64 keys on the grid of absolute positions, and what
// chooses a token adds integers. What a batch may choose is only who computes what.
//
// Letters as in gemma.h. Products take bf16 and sum in fp32; the residual stream h is fp32.
#include "gemma.h"

#include <algorithm>
#include <cassert>
#include <climits>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>
#include <thread>

// [1] The machine -------------------------------------------------- one name for each instruction

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define UNROLL _Pragma("unroll")  // where registers are indexed

// c[16, 8] += a[16, 16] b[16, 8]; lane 4g+t holds a: rows g, g+8, and b: column g
// (docs/afternoon.md)
__device__ inline void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Volatile and not .nc: ptxas would sink it below the wait, and its latency would come back.
__device__ inline uint4 load_stream(const void* p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}
__device__ inline void cp_async16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(shared))),
                 "l"(global));
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;"); }
template <int N>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// Programmatic dependent launch, nothing below sm_90. A kernel lets the next one start at once; the
// next one waits here until all before it is complete and visible. Before its wait a kernel may
// only read what no kernel of the same step writes: weights, the step's tables, and K of earlier
// steps. A step's first kernel is launched without the attribute, and so waits for everything.
__device__ inline void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline uint32_t pack_bf16(float lo, float hi) {
    uint32_t v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));
    return v;
}
__device__ inline char* dynamic_shared() {
    extern __shared__ __align__(16) char bytes[];
    return bytes;
}
inline void forbid(void*, size_t) {}  // of the emulation: nobody may touch these bytes
#else
#include "tests/cuda_on_cpu.h"
#endif

namespace gemma {
namespace {

[[noreturn]] void die(cudaError_t error, const char* call, const char* file, int line) {
    say(text("%s:%d: %s: %s", file, line, call, cudaGetErrorString(error)));
    std::abort();
}
#define CUDA(call)                                                         \
    do {                                                                   \
        const cudaError_t error_ = (call);                                 \
        if (error_ != cudaSuccess) die(error_, #call, __FILE__, __LINE__); \
    } while (0)

constexpr size_t most_shared = 99 * 1024;  // of a block on sm_89; sm_90 has 227 KB

// Where kernels go, in order.
struct Stream {
    cudaStream_t stream = nullptr;
    bool programmatic = false;             // compute capability 9.0 and up
    bool first = true;                     // of its step
    int processors = 1;                    // SMs
    const char* only = nullptr;            // the benchmark runs one kernel of a step alone
    std::map<const void*, size_t> raised;  // kernels that may use more than 48 KB

    // name and bytes (read and written, at least) are the benchmark's.
    std::map<std::string, std::pair<int, double>>* book = nullptr;

    template <class... P, class... A>
    void launch(const char* name, double bytes, void (*kernel)(P...), dim3 grid, int block,
                size_t shared, A... args) {
        assert(shared <= most_shared && block % 32 == 0);
        if (only && std::strcmp(only, name)) return;
        if (book) (*book)[name].first++, (*book)[name].second += bytes;
        size_t& allowed =
            raised.try_emplace(reinterpret_cast<const void*>(kernel), 48 * 1024).first->second;
        if (shared > allowed) {
            CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      int(shared)));
            allowed = shared;
        }
        cudaLaunchAttribute dependent{};
        dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        dependent.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = grid, config.blockDim = dim3(unsigned(block));
        config.dynamicSmemBytes = shared, config.stream = stream;
        config.attrs = &dependent, config.numAttrs = programmatic && !first ? 1 : 0;
        first = false;
        CUDA(cudaLaunchKernelEx(&config, kernel, P(args)...));
    }
};

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// [2] Fragments -------------------------------------------------------- how matrices meet the mma

// Which k an mma calls its slot 3 does not matter to the sum, as long as both sides agree. So 16
// bytes of a row of weights, K or (transposed) V, k = 8t..8t+7 of 32, are as they lie column g of
// two mmas, (x, y) and (z, w). Activations are the 16 rows and are kept in fragment order, so that
// they too are one 16-byte load: 16 tokens by 32 k are 1 KB, [p = 0, 1][g][t], k = 8t + 4p, of
//     {token g: k, k+1} {token g+8: k, k+1} {token g: k+2, k+3} {token g+8: k+2, k+3}
// With the roles swapped, each quad had to be put together by moves: 45 % of a tile's instructions.
// Of [N, K] this is the place of (n, k); k and k+1 are neighbours for even k.
__host__ __device__ inline size_t fragment(int n, int k, int K) {
    const int t = k % 32 / 8, p = k % 8 / 4, word = k % 4 / 2 * 2 + n / 8 % 2;
    return (size_t(n / 16) * (K / 32) + k / 32) * 512 + ((p * 8 + n % 8) * 4 + t) * 8 + word * 2 +
           k % 2;
}

__device__ inline uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }

// BYTES between memory and registers, by the widest accesses that there are.
template <int BYTES>
__device__ inline void copy(void* to, const void* from) {
    using Word =
        std::conditional_t<BYTES % 16 == 0, uint4, std::conditional_t<BYTES == 8, uint2, uint32_t>>;
    UNROLL for (int i = 0; i < BYTES / int(sizeof(Word)); i++) static_cast<Word*>(to)[i] =
        static_cast<const Word*>(from)[i];
}

// Half a step of 32 k: a is the half p of a fragment, b0 and b1 half of a row's 16 bytes.
__device__ inline void mma_half(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    mma_m16n8k16(c, a.x, a.y, a.z, a.w, b0, b1);
}

__device__ inline float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ inline float warp_sum(float v) {
    for (int i = 16; i; i >>= 1) v += __shfl_xor_sync(~0u, v, i);
    return v;
}

// Over the block, warps in order; ends without a barrier, so each call has its own `scratch` [32].
__device__ inline float block_sum(float v, float* scratch) {
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < int(blockDim.x) / 32; i++) sum += scratch[i];
    return sum;
}

// [3] Embedding and norms -------------------------------------------------------------------------

struct RopeTables {
    const float* inv_freq;  // by Pool: [2][E/2]
    float* cos_sin[2];      // by Pool: [N, E], E/2 cosines, then E/2 sines
};

// h[n, :] = embed[token[n], :] * sqrt(D), and the angles of n's position. Twins: embed, rope_tables
// One block a token, eight elements a thread.
__global__ void __launch_bounds__(1024)
    embed_kernel(float* h, RopeTables rope, const bf16* table, const int* tokens,
                 const int* positions, int D, int E, float scale) {
    const int n = int(blockIdx.x), d = int(threadIdx.x) * 8;
    launch_dependents();
    const int token = tokens[n], position = positions[n];
    grid_dependency_wait();
    if (d < D) {
        uint32_t in[4];
        copy<16>(in, table + size_t(token) * D + d);
        float4* out = reinterpret_cast<float4*>(h + size_t(n) * D + d);
        out[0] = {low(in[0]) * scale, high(in[0]) * scale, low(in[1]) * scale, high(in[1]) * scale};
        out[1] = {low(in[2]) * scale, high(in[2]) * scale, low(in[3]) * scale, high(in[3]) * scale};
    }
    for (int i = int(threadIdx.x); i < E; i += int(blockDim.x)) {
        // The angle is rounded to fp32, as Hugging Face does; half turns are cut off in double.
        const int pool = i / (E / 2), j = i % (E / 2);
        const float angle = float(position) * rope.inv_freq[pool * (E / 2) + j];
        const double turns = double(angle) * 0.31830988618379067;  // in half turns, 1 / pi
        float sine, cosine;
        sincospif(float(turns - 2 * rint(turns * 0.5)), &sine, &cosine);
        float* out = (pool ? rope.cos_sin[1] : rope.cos_sin[0]) + size_t(n) * E;
        out[j] = cosine, out[E / 2 + j] = sine;
    }
}

void embed(Stream& s, float* h, const RopeTables& rope, const bf16* table, const int* tokens,
           const int* positions, int N, int D, int E, float scale) {
    assert(E % 2 == 0 && D % 8 == 0 && D <= 8 * 1024);
    s.launch("embed", N * (6. * D + 8. * E), embed_kernel, dim3(N), ceil_div(D / 8, 32) * 32, 0, h,
             rope, table, tokens, positions, D, E, scale);
}

struct Norm {
    bf16* x;             // [N, D] in fragment order
    const float* h;      // [*, D]
    float* h_out;        // where h goes with the branch added; null: nowhere
    const float* parts;  // [count][h_rows, D], whose sum is the branch; null: no branch
    int count, h_rows;
    const bf16 *post, *pre;  // [D]
    const int* rows;         // [N] which rows of h; null: all
    int D;
    float eps;
};

// h' = h + rmsnorm(sum of parts) (1 + post), x = rmsnorm(h') (1 + pre). Twins: rmsnorm, add_rmsnorm
// One block a token, eight elements a thread. (A warp a token with scalar loads: 7 us, not 1.8.)
__global__ void __launch_bounds__(1024) norm_kernel(Norm a) {
    __shared__ float scratch[2][32];
    const int n = int(blockIdx.x), d = int(threadIdx.x) * 8;
    const bool live = d < a.D;
    launch_dependents();
    uint4 post = {}, pre = {};
    if (live) pre = load16(a.pre + d);
    if (live && a.parts) post = load16(a.post + d);
    const int row = a.rows ? a.rows[n] : n;
    grid_dependency_wait();
    const uint32_t(&w_post)[4] = reinterpret_cast<const uint32_t(&)[4]>(post);
    const uint32_t(&w_pre)[4] = reinterpret_cast<const uint32_t(&)[4]>(pre);
    float h[8] = {}, y[8] = {}, squares = 0;
    if (live) {
        const float4* from = reinterpret_cast<const float4*>(a.h + size_t(row) * a.D + d);
        reinterpret_cast<float4(&)[2]>(h)[0] = from[0];
        reinterpret_cast<float4(&)[2]>(h)[1] = from[1];
    }
    if (a.parts) {
        float4 part[4][2] = {};
        UNROLL for (int p = 0; p < 4; p++) {
            if (!live || p >= a.count) continue;
            const float* from = a.parts + (size_t(p) * a.h_rows + row) * a.D + d;
            part[p][0] = reinterpret_cast<const float4*>(from)[0];
            part[p][1] = reinterpret_cast<const float4*>(from)[1];
        }
        UNROLL for (int p = 0; p < 4; p++) {
            for (int i = 0; i < 8; i++) y[i] += reinterpret_cast<float(&)[8]>(part[p])[i];
        }
        for (int i = 0; i < 8; i++) squares += y[i] * y[i];
        const float r = rsqrtf(block_sum(squares, scratch[0]) / float(a.D) + a.eps);
        for (int i = 0; i < 8; i++) {
            const float w = i % 2 ? high(w_post[i / 2]) : low(w_post[i / 2]);
            h[i] += y[i] * r * (1 + w);
        }
        if (live && a.h_out) {
            float4* to = reinterpret_cast<float4*>(a.h_out + size_t(row) * a.D + d);
            to[0] = reinterpret_cast<float4(&)[2]>(h)[0];
            to[1] = reinterpret_cast<float4(&)[2]>(h)[1];
        }
    }
    squares = 0;
    for (int i = 0; i < 8; i++) squares += h[i] * h[i];
    const float r = rsqrtf(block_sum(squares, scratch[1]) / float(a.D) + a.eps);
    if (!live) return;
    for (int i = 0; i < 8; i += 2) {
        const float x0 = h[i] * r * (1 + low(w_pre[i / 2]));
        const float x1 = h[i + 1] * r * (1 + high(w_pre[i / 2]));
        *reinterpret_cast<uint32_t*>(a.x + fragment(n, d + i, a.D)) = pack_bf16(x0, x1);
    }
}

void norm(Stream& s, int N, const Norm& a) {
    assert(a.D % 8 == 0 && a.D <= 8 * 1024 && a.count <= 4);
    const double elements = double(N) * a.D;
    s.launch("norm", elements * (2 + 4 + (a.parts ? 4 * a.count + 4 : 0)), norm_kernel, dim3(N),
             ceil_div(a.D / 8, 32) * 32, 0, a);
}

// [4] linear ----------------------------------------------------------- y[N, M] = x[N, K] w[M,
// K]^T

// K is cut into slices, each summed from zero by one chain of mmas and then added, in order, within
// a group; groups are written apart, as parts, and added by the norm that follows. Both lengths
// depend on K alone. Never chain through slices: a small batch gives each slice to a warp.
constexpr int slice_steps(int K) {  // in steps of 32 k
    for (int steps : {10, 9, 8}) {  // one of them divides each matrix of the family
        if (K / 32 % steps == 0) return steps;
    }
    return 1;
}
constexpr int groups_of(int K) {  // for matrices whose sums a norm takes in parts
    const int slices = K / 32 / slice_steps(K);
    return slices >= 16 ? std::gcd(slices, 4) : 1;
}

enum class Store { rows_bf16, parts_fp32, geglu };

struct Product {
    const bf16 *w, *x;  // [M, K], and [N, K] in fragment order
    void* y;            // bf16 [N, M]; fp32 [groups][N, M]; or bf16 [N, M/2] in fragment order
    int N, K, M;
    int steps, slices;  // of a slice, of a group
    Store store;
};

// gelu_tanh(gate) up: gelu_tanh(z) = z / (1 + e^-2u), u = sqrt(2/pi) (z + 0.044715 z^3).
// Twin: geglu
__device__ inline float geglu(float z, float up) {
    const float u = z * fmaf(0.044715f * z, z, 1.f);
    return z / (1 + exp2f(-2 * 0.7978845608028654f * 1.4426950408889634f * u)) * up;
}

// Two neighbours of y, m even. Gate and up are interleaved rows of one matrix, so that one lane
// holds both and GeGLU costs nothing.
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

// The same for a tile of 16 tokens by 8 columns, by the warp that holds it. For GeGLU two lanes
// swap halves, so that each writes two neighbours.
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

// Adds this round's slices, in order, to the totals of earlier rounds; the last round stores.
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
            if (q < warps) v0 += sums[q * rows * pitch + at], v1 += sums[q * rows * pitch + at + 1];
        }
        if (last) {
            store_pair(p, group, n0 + n, m0 + m, v0, v1);
        } else {
            totals[at] = v0, totals[at + 1] = v1;
        }
    }
    if (!last) __syncthreads();
}

// Few tokens and weights straight from memory: a warp takes a slice, of 8 NT rows of w by 16 MT
// tokens, with DEPTH steps of weights in registers before the first is needed. Twin: linear
// Grid: (columns, groups, tokens).
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
        // 32 bits: 64 for each of NT rows spilled.
        const unsigned from = unsigned(m0 + g) * unsigned(p.K) + unsigned(step0 * 32 + t * 8);
        const bf16* x = p.x + (size_t(n0 / 16) * (p.K / 32) + step0) * 512 + (g * 4 + t) * 8;
        uint4 w[depth][NT], a[x_depth][2];
        const auto load_w = [&](int i) {
            UNROLL for (int j = 0; j < NT; j++) w[i % depth][j] =
                load_stream(p.w + (from + unsigned(j * 8 * p.K + i * 32)));
        };
        const auto load_x = [&](int i, int m) {
            const bf16* at = x + (size_t(m) * (p.K / 32) + i) * 512;
            const bool live = n0 + m * 16 + g < p.N;  // else both of the lane's tokens are none
            a[i % x_depth][0] = live ? load16(at) : uint4{};
            a[i % x_depth][1] = live ? load16(at + 256) : uint4{};
        };
        UNROLL for (int i = 0; i < depth; i++) load_w(i);
        if (first == 0) grid_dependency_wait();
        if (MT == 1) {
            UNROLL for (int i = 0; i < STEPS; i++) load_x(i, 0);
        }
        float c[MT][NT][4] = {};
        // Unrolled whole, the loads of x would all move up, and spill.
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
                UNROLL for (int v = 0; v < 4; v++)
                    mine[(m * 16 + v / 2 * 8) * pitch + j * 8 + v % 2] = c[m][j][v];
            }
        }
        __syncthreads();
        add_slices<rows, columns>(p, sums, first, group, n0, m0);
    }
}

// More tokens: a block takes BT tokens by BW rows of w, through STAGES stages of KB steps in shared
// memory; a warp 16 WM tokens by 8 WN rows. What tripled it: no moves (see [2]), addresses computed
// once, no branch inside the unrolled steps. Twin: linear
// Grid: (tokens, columns, groups): blocks that run together share weights; of a narrow matrix,
// which stays in the cache, (columns, tokens, groups).
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
    const int steps = p.slices * p.steps, step0 = group * steps;
    launch_dependents();
    grid_dependency_wait();
    const bf16* from = p.w + size_t(m0 + thread / 4) * p.K + step0 * 32 + thread % 4 * 8;
    const bf16* x = p.x + (size_t(n0 / 16) * (p.K / 32) + step0) * 512;
    const auto fetch = [&](int step, int stage) {
        if (step < steps) {
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
        cp_async_commit();
    };
    for (int i = 0; i < STAGES - 1; i++) fetch(i * KB, i);
    float total[WM][WN][4] = {}, c[WM][WN][4] = {};
    int in_slice = 0, stage = 0;
#pragma unroll 1
    for (int step = 0; step < steps; step += KB) {
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
                UNROLL for (int j = 0; j < WN / 2; j++) bv[j] =
                    load16(b + (q * BW + (j0 + j) * 8) * 32);
                UNROLL for (int i = 0; i < WM; i++) {
                    UNROLL for (int j = 0; j < WN / 2; j++)
                        mma_half(c[i][j0 + j], av[i][0], bv[j].x, bv[j].y);
                }
                UNROLL for (int i = 0; i < WM; i++) {
                    UNROLL for (int j = 0; j < WN / 2; j++)
                        mma_half(c[i][j0 + j], av[i][1], bv[j].z, bv[j].w);
                }
            }
        }
        if ((in_slice += KB) < p.steps) continue;
        in_slice = 0;
        UNROLL for (int i = 0; i < WM; i++) {
            UNROLL for (int j = 0; j < WN; j++) {
                UNROLL for (int v = 0; v < 4; v++) total[i][j][v] += c[i][j][v], c[i][j][v] = 0;
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
    const auto shared = [&] {  // with totals, if there is more than one round
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

// The thresholds are an H100's, measured on the 1B (docs/design.md, "Numbers"): narrow matrices
// have few columns to spread over the processors, wide ones many bytes to stream.
template <int STEPS>
void linear_steps(Stream& s, const char* name, double bytes, const Product& p, int groups) {
    if (STEPS == 1 || p.M % 64)  // none of the family's
        return launch_rows<2, 1, 8, STEPS>(s, name, bytes, p, groups);
    if constexpr (STEPS > 1) {
        constexpr int KB = STEPS % 3 ? 2 : 3, stages = KB == 3 ? 2 : 3;
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

// What N chooses is who computes what, never the bits. A tile's stages fill 96 KB.
void linear(Stream& s, const char* name, Store store, void* y, const bf16* x, const bf16* w, int N,
            int K, int M, int groups = 1) {
    assert(K % 32 == 0 && M % 16 == 0);
    const int steps = slice_steps(K), slices = K / 32 / steps / groups;
    const Product p{w, x, y, N, K, M, steps, slices, store};
    const double bytes =
        2. * M * K + 2. * N * K + double(N) * M * (store == Store::parts_fp32 ? 4 * groups : 2);
    if (steps == 1) return linear_steps<1>(s, name, bytes, p, groups);
    if (steps == 10) return linear_steps<10>(s, name, bytes, p, groups);
    if (steps == 9) return linear_steps<9>(s, name, bytes, p, groups);
    linear_steps<8>(s, name, bytes, p, groups);
}

// [5] Attention -----------------------------------------------------------------------------------

constexpr int chunk_keys = 64;
constexpr int most_slots = 16384;  // (row, chunk) partials at a time

// A pool's page holds, for each of its layers and each KV head, K [32, E] and then V transposed,
// [E, 32]: both are the mma's 8 columns, by the same 16-byte loads as weights, and a page of 32
// keys is one step of k.

// The step's tables, on the device.
struct Tables {
    const int *tokens, *positions, *row_of;  // [N]
    const int* row_start;                    // [R+1]
    // Rows of one token attend chunk by chunk, others in tiles of rows. Row r has the chunks
    // chunk_start[pool][r] .. [r+1]-1, or the tiles tile_start[r] .. [r+1]-1.
    const int *chunk_start[2], *tile_start;  // [R+1]
    const int2* pages;                       // [pages][R]: {local, global}; -1: not there
    const int* output_token;                 // [outputs]
    int R;

    __device__ int page(int pool, int row, int i) const {
        const int2 both = pages[size_t(i) * R + row];
        return pool == global_pool ? both.y : both.x;
    }
};

struct Attention {
    Tables tables;
    const bf16* qkv;               // [N, (H + 2G) E]
    const bf16 *q_norm, *k_norm;   // [E]
    const float* cos_sin;          // [N, E], of the pool
    bf16* kv;                      // this layer's place in page 0
    size_t page_stride;            // bf16s from a page to the next
    int pool, window, H, G, E, N;  // window: INT_MAX for global layers
    float eps, scale;              // scale: of scores, with log2 e
    float* parts;                  // [slots][H][E]
    float2* part_sums;             // [slots][H]: {maximum, sum of weights}
    bf16* out;                     // [N, H E] in fragment order

    __device__ bf16* page(int id, int g) const {
        return kv + id * page_stride + size_t(g) * 2 * page_tokens * E;
    }
    __device__ const bf16* head(int n, int i) const {  // queries, then keys, then values
        return qkv + (size_t(n) * (H + 2 * G) + i) * E;
    }
    __device__ int first_chunk(int position) const {
        return max(0, position - window + 1) / chunk_keys;
    }
};

// One head of q or k by a warp: rmsnorm over the head, then RoPE; the result goes, a pair at a
// time, to store(d, pair). Twins: rmsnorm_row, rope_row
template <int E, class StorePair>
__device__ inline void norm_rope(const bf16* head, const bf16* weight, const float* cos_sin,
                                 float eps, StorePair store) {
    constexpr int pairs = E / 64;  // of a lane
    const int d0 = int(threadIdx.x) % 32 * 2 * pairs, half = d0 % (E / 2);
    uint32_t in[pairs], w[pairs];
    float x[2 * pairs], c[2 * pairs], s[2 * pairs], squares = 0;
    copy<pairs * 4>(in, head + d0), copy<pairs * 4>(w, weight + d0);
    copy<pairs * 8>(c, cos_sin + half), copy<pairs * 8>(s, cos_sin + E / 2 + half);
    UNROLL for (int i = 0; i < pairs; i++) x[2 * i] = low(in[i]), x[2 * i + 1] = high(in[i]);
    UNROLL for (int i = 0; i < 2 * pairs; i++) squares += x[i] * x[i];
    const float r = rsqrtf(warp_sum(squares) / float(E) + eps);
    UNROLL for (int i = 0; i < 2 * pairs; i++) {
        x[i] = x[i] * r * (1 + (i % 2 ? high(w[i / 2]) : low(w[i / 2])));
        const float other = __shfl_xor_sync(~0u, x[i], 16);  // half a head away
        x[i] = d0 < E / 2 ? fmaf(x[i], c[i], -(other * s[i])) : fmaf(x[i], c[i], other * s[i]);
    }
    UNROLL for (int i = 0; i < pairs; i++) store(d0 + 2 * i, pack_bf16(x[2 * i], x[2 * i + 1]));
}

// k of token n, normed and turned, goes to its page, and to `spare` [E] if there is one. By a warp.
// Twin: qk_norm_rope_write
template <int E>
__device__ inline void write_k(const Attention& a, int n, int row, int g, bf16* spare) {
    const int position = a.tables.positions[n];
    const int id = a.tables.page(a.pool, row, position / page_tokens);
    bf16* k = a.page(max(id, 0), g) + position % page_tokens * E;
    norm_rope<E>(a.head(n, a.H + g), a.k_norm, a.cos_sin + size_t(n) * E, a.eps,
                 [&](int d, uint32_t pair) {
                     if (id >= 0) *reinterpret_cast<uint32_t*>(k + d) = pair;
                     if (spare) *reinterpret_cast<uint32_t*>(spare + d) = pair;
                 });
}

// v of `count` tokens of a row, from n on, in the same aligned eight; 32 dims from d on, by a warp.
template <int count>
__device__ inline void write_v(const Attention& a, int n, int row, int g, int d) {
    const int lane = int(threadIdx.x) % 32, position = a.tables.positions[n];
    const int id = a.tables.page(a.pool, row, position / page_tokens);
    bf16* to = a.page(max(id, 0), g) + page_tokens * a.E + (d + lane) * page_tokens;
    to += position % page_tokens;
    uint32_t v[count];  // all loads before the store
    UNROLL for (int i = 0; i < count; i++) v[i] = a.head(n + i, a.H + a.G + g)[d + lane].bits;
    if (id < 0) return;
    if constexpr (count == 8) {
        *reinterpret_cast<uint4*>(to) = {v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16,
                                         v[6] | v[7] << 16};
    } else {
        UNROLL for (int i = 0; i < count; i++) to[i].bits = uint16_t(v[i]);
    }
}

// For rows of several tokens; rows of one write theirs in the attention kernel, which saves a
// kernel in each layer. A V page has 2 bytes of each token every 64: eight tokens at once are one
// store of 16 bytes (one by one 23 us a layer of the 1B for 4,096 tokens). Grid: (eight tokens, KV
// heads).
template <int E>
__global__ void __launch_bounds__(256) write_kv_kernel(Attention a) {
    const int warp = int(threadIdx.x) / 32, g = int(blockIdx.y);
    const int first = int(blockIdx.x) * 8, last = min(first + 7, a.N - 1), n = first + warp;
    launch_dependents();
    const int row = a.tables.row_of[min(n, last)];
    const bool long_row = a.tables.row_start[row + 1] - a.tables.row_start[row] > 1;
    const bool eight = last == first + 7 && a.tables.positions[first] % 8 == 0 &&
                       a.tables.row_of[first] == a.tables.row_of[last];
    grid_dependency_wait();
    if (n > last || !long_row) return;
    write_k<E>(a, n, row, g, nullptr);
    if (eight) {
        if (warp < E / 32) write_v<8>(a, first, row, g, warp * 32);
    } else {
        for (int d = 0; d < E; d += 32) write_v<1>(a, n, row, g, d);
    }
}

// The row whose part of start[rows+1] holds `item`, by each warp: rows that end before it are
// before it.
__device__ inline int find_row(const int* start, int rows, int item) {
    int row = 0;
    for (int r = int(threadIdx.x) % 32; r - int(threadIdx.x) % 32 < rows; r += 32)
        row += __popc(__ballot_sync(~0u, r < rows && start[r + 1] <= item));
    return row;
}

// What folds chunks into a result, in order and in one place, so that every kernel rounds alike:
// total = total * old + chunk * fresh. A chunk that is masked for a row leaves the row's bits
// alone.
struct Fold {
    float top = -INFINITY, sum = 0, old = 0, fresh = 0;

    __device__ void add(float chunk_top, float chunk_sum) {
        if (chunk_top == -INFINITY) return void(old = -1);
        const float higher = fmaxf(top, chunk_top);
        old = exp2f(top - higher), fresh = exp2f(chunk_top - higher);
        sum = apply(sum, chunk_sum), top = higher;
    }
    __device__ float apply(float total, float chunk) const {
        return old < 0 ? total : total * old + chunk * fresh;
    }
};

// A block's view of its query rows: row i is head i % heads of token n0 + i / heads.
struct Queries {
    int n0, tokens, heads, row, position;  // position: of n0
};

// The attention of 16 MT query rows (tokens by the heads that share a KV head) to chunks of 64
// keys, each computed from zero: scores, their maximum, weights 2^(score - maximum), their sum by
// tiles of 8 keys, and the product with V. Warps divide keys for the scores and dims for the
// product.
//
// split: an item is one chunk of a row of one token; it writes a part, and merge folds them.
// Else:  an item is a tile of a row's tokens, which folds all its chunks itself.
// The bits are the same. Twin: attend
template <int E, int MT, int WARPS>
struct Tile {
    static constexpr int rows = 16 * MT, key_tiles = 8 / WARPS, dim_tiles = E / 8 / WARPS;
    static constexpr size_t shared =
        MT * (E / 32 + 2) * 1024 + (WARPS + 8) * rows * sizeof(float) + rows * sizeof(Fold) + 2 * E;
    bf16* q;      // [MT][E/32][512], fragment order
    bf16* p;      // [MT][2][512]
    float* tops;  // [WARPS][rows]
    float* sums;  // [8][rows]
    Fold* folds;  // [rows]
    bf16* new_k;  // [E]
    int warp, lane, g, t;
    uint4 k[key_tiles][E / 32], v[dim_tiles][2];
    float scores[MT][key_tiles][4], out[MT][dim_tiles][4];

    __device__ __forceinline__ Tile() {
        q = reinterpret_cast<bf16*>(dynamic_shared()), p = q + MT * E / 32 * 512;
        tops = reinterpret_cast<float*>(p + MT * 2 * 512), sums = tops + WARPS * rows;
        folds = reinterpret_cast<Fold*>(sums + 8 * rows);
        new_k = reinterpret_cast<bf16*>(folds + rows);
        warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    }

    __device__ __forceinline__ void load_queries(const Attention& a, const Queries& m,
                                                 int kv_head) {
        for (int i = warp; i < m.tokens * m.heads; i += WARPS) {
            const int n = m.n0 + i / m.heads, head = kv_head * m.heads + i % m.heads;
            norm_rope<E>(a.head(n, head), a.q_norm, a.cos_sin + size_t(n) * E, a.eps,
                         [&](int d, uint32_t pair) {
                             *reinterpret_cast<uint32_t*>(q + fragment(i, d, E)) = pair;
                         });
        }
    }

    // Pages of the chunk; -1 where there is none, or no key of it is needed.
    __device__ __forceinline__ int2 pages(const Attention& a, const Queries& m, int chunk) const {
        const int last = m.position + m.tokens - 1;
        return {a.tables.page(a.pool, m.row, chunk * 2),
                chunk * chunk_keys + page_tokens <= last
                    ? a.tables.page(a.pool, m.row, chunk * 2 + 1)
                    : -1};
    }

    __device__ __forceinline__ void load_keys(const Attention& a, int2 ids, int kv_head) {
        const int key = warp * 8 * key_tiles, id = key < page_tokens ? ids.x : ids.y;
        const bf16* from = a.page(max(id, 0), kv_head) + (key % page_tokens + g) * E + t * 8;
        UNROLL for (int j = 0; j < key_tiles; j++) {
            UNROLL for (int i = 0; i < E / 32; i++) k[j][i] =
                id >= 0 ? load_stream(from + j * 8 * E + i * 32) : uint4{};
        }
    }

    // Keys outside lo..hi are masked for all rows; their bytes may be anything, and 0 * NaN is NaN.
    __device__ __forceinline__ void load_values(const Attention& a, int2 ids, int kv_head,
                                                int chunk, int lo, int hi) {
        UNROLL for (int b = 0; b < 2; b++) {
            const int id = b ? ids.y : ids.x, key = chunk * chunk_keys + b * page_tokens + t * 8;
            const bf16* from = a.page(max(id, 0), kv_head) + page_tokens * E +
                               (warp * dim_tiles * 8 + g) * page_tokens + t * 8;
            uint32_t keep[4];
            for (int i = 0; i < 4; i++) {
                const int first = key + 2 * i;
                keep[i] = (first >= lo && first <= hi ? 0xffffu : 0) |
                          (first + 1 >= lo && first + 1 <= hi ? 0xffff0000u : 0);
            }
            UNROLL for (int d = 0; d < dim_tiles; d++) {
                const uint4 x = id >= 0 ? load_stream(from + d * 8 * page_tokens) : uint4{};
                v[d][b] = {x.x & keep[0], x.y & keep[1], x.z & keep[2], x.w & keep[3]};
            }
        }
    }

    // What this step's own key has in registers was loaded before it was written: here it is.
    __device__ __forceinline__ void patch_key(int key) {
        UNROLL for (int j = 0; j < key_tiles; j++) {
            if (key / 8 != warp * key_tiles + j || key % 8 != g) continue;
            UNROLL for (int i = 0; i < E / 32; i++) k[j][i] = load16(new_k + i * 32 + t * 8);
        }
    }
    // The scores of one chunk, and each row's maximum over this warp's keys.
    __device__ __forceinline__ void score(const Attention& a, const Queries& m, int chunk) {
        UNROLL for (int r = 0; r < MT; r++) {
            UNROLL for (int j = 0; j < key_tiles; j++) {
                float(&c)[4] = scores[r][j];
                c[0] = c[1] = c[2] = c[3] = 0;
                UNROLL for (int i = 0; i < E / 32; i++) {
                    const bf16* at = q + (r * (E / 32) + i) * 512 + (g * 4 + t) * 8;
                    mma_half(c, load16(at), k[j][i].x, k[j][i].y);
                    mma_half(c, load16(at + 256), k[j][i].z, k[j][i].w);
                }
            }
            UNROLL for (int half = 0; half < 2; half++) {
                const int i = r * 16 + g + half * 8, position = m.position + i / m.heads;
                float top = -INFINITY;
                UNROLL for (int j = 0; j < key_tiles; j++) {
                    UNROLL for (int e = 2 * half; e < 2 * half + 2; e++) {
                        const int key =
                            chunk * chunk_keys + (warp * key_tiles + j) * 8 + 2 * t + e % 2;
                        float& c = scores[r][j][e];
                        c = key <= position && key > position - a.window ? c * a.scale : -INFINITY;
                        top = fmaxf(top, c);
                    }
                }
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
                if (t == 0) tops[warp * rows + i] = top;
            }
        }
    }

    // The weights p of one chunk and their sums, in shared memory. Ends in a barrier.
    __device__ __forceinline__ void soften() {
        UNROLL for (int r = 0; r < MT; r++) {
            UNROLL for (int half = 0; half < 2; half++) {
                const int i = r * 16 + g + half * 8;
                const float top = row_top(i), base = top == -INFINITY ? 0 : top;
                UNROLL for (int j = 0; j < key_tiles; j++) {
                    const int tile = warp * key_tiles + j;
                    const float(&c)[4] = scores[r][j];
                    const uint32_t pair =
                        pack_bf16(exp2f(c[2 * half] - base), exp2f(c[2 * half + 1] - base));
                    *reinterpret_cast<uint32_t*>(
                        p + r * 1024 + fragment(i % 16, tile * 8 + 2 * t, chunk_keys)) = pair;
                    float sum = low(pair) + high(pair);
                    sum += __shfl_xor_sync(~0u, sum, 1);
                    sum += __shfl_xor_sync(~0u, sum, 2);
                    if (t == 0) sums[tile * rows + i] = sum;
                }
            }
        }
        __syncthreads();
    }

    __device__ __forceinline__ float row_top(int i) const {
        float top = tops[i];
        UNROLL for (int w = 1; w < WARPS; w++) top = fmaxf(top, tops[w * rows + i]);
        return top;
    }
    __device__ __forceinline__ float row_sum(int i) const {
        float sum = sums[i];
        UNROLL for (int tile = 1; tile < 8; tile++) sum += sums[tile * rows + i];
        return sum;
    }

    // out = p V of one chunk, from zero.
    __device__ __forceinline__ void multiply() {
        UNROLL for (int r = 0; r < MT; r++) {
            UNROLL for (int d = 0; d < dim_tiles; d++) out[r][d][0] = out[r][d][1] = out[r][d][2] =
                out[r][d][3] = 0;
            UNROLL for (int b = 0; b < 2; b++) {
                const bf16* at = p + (r * 2 + b) * 512 + (g * 4 + t) * 8;
                const uint4 a0 = load16(at), a1 = load16(at + 256);
                UNROLL for (int d = 0; d < dim_tiles; d++) {
                    mma_half(out[r][d], a0, v[d][b].x, v[d][b].y);
                    mma_half(out[r][d], a1, v[d][b].z, v[d][b].w);
                }
            }
        }
    }

    __device__ __forceinline__ void store_part(const Attention& a, const Queries& m, int kv_head,
                                               int slot) const {
        const size_t at = size_t(slot) * a.H + kv_head * m.heads;
        UNROLL for (int d = 0; d < dim_tiles; d++) {
            float* to = a.parts + (at + g) * E + (warp * dim_tiles + d) * 8 + 2 * t;
            const float(&c)[4] = out[0][d];
            if (g < m.heads) *reinterpret_cast<float2*>(to) = make_float2(c[0], c[1]);
            if (g + 8 < m.heads) *reinterpret_cast<float2*>(to + 8 * E) = make_float2(c[2], c[3]);
        }
        const int i = int(threadIdx.x);
        if (i < m.heads) a.part_sums[at + i] = make_float2(row_top(i), row_sum(i));
    }

    __device__ __forceinline__ void add_to(float (&total)[MT][dim_tiles][4]) const {
        UNROLL for (int r = 0; r < MT; r++) {
            UNROLL for (int i = 0; i < 4; i++) {
                const Fold& fold = folds[r * 16 + g + i / 2 * 8];
                UNROLL for (int d = 0; d < dim_tiles; d++) total[r][d][i] =
                    fold.apply(total[r][d][i], out[r][d][i]);
            }
        }
    }

    __device__ __forceinline__ void store(const Attention& a, const Queries& m, int kv_head,
                                          const float (&total)[MT][dim_tiles][4]) const {
        UNROLL for (int r = 0; r < MT; r++) {
            UNROLL for (int half = 0; half < 2; half++) {
                const int i = r * 16 + g + half * 8, n = m.n0 + i / m.heads;
                const int head = kv_head * m.heads + i % m.heads;
                if (i >= m.tokens * m.heads) continue;
                const float sum = folds[i].sum;
                UNROLL for (int d = 0; d < dim_tiles; d++) {
                    const float(&c)[4] = total[r][d];
                    const int at = head * E + (warp * dim_tiles + d) * 8 + 2 * t;
                    *reinterpret_cast<uint32_t*>(a.out + fragment(n, at, a.H * E)) =
                        pack_bf16(c[2 * half] / sum, c[2 * half + 1] / sum);
                }
            }
        }
    }
};

template <int E, int MT, int WARPS, bool split>
__global__ void __launch_bounds__(WARPS * 32, split ? 3 : 1)
    attention_kernel(Attention a, int first_row, int rows) {
    Tile<E, MT, WARPS> tile;
    const int* start = (split ? a.tables.chunk_start[a.pool] : a.tables.tile_start) + first_row;
    const int items = start[rows] - start[0], kv_head = int(blockIdx.y);
    launch_dependents();
    for (int i = int(blockIdx.x); i < items; i += int(gridDim.x)) {
        const int item = start[0] + (split ? i : items - 1 - i);  // the longest tiles first
        const int row = find_row(start, rows, item), within = item - start[row];
        Queries m{a.tables.row_start[first_row + row], 1, a.H / a.G, first_row + row, 0};
        if (!split) {
            m.n0 += within * (tile.rows / m.heads);
            m.tokens = min(tile.rows / m.heads, a.tables.row_start[m.row + 1] - m.n0);
        }
        m.position = a.tables.positions[m.n0];
        const int last_key = m.position + m.tokens - 1, lo = m.position - a.window + 1;
        const int first = a.first_chunk(m.position) + (split ? within : 0);
        const int last = split ? first : last_key / chunk_keys;
        int2 ids = tile.pages(a, m, first);
        // A row of one token: its older keys were written by earlier steps and are loaded before
        // the wait; the block with its newest chunk writes the row's own k and v, and puts k where
        // it was loaded too early. Longer rows: write_kv_kernel has written all.
        if (split) tile.load_keys(a, ids, kv_head);
        grid_dependency_wait();
        const bool newest = split && last == last_key / chunk_keys;
        if (newest && tile.warp == WARPS - 1) write_k<E>(a, m.n0, m.row, kv_head, tile.new_k);
        for (int d = 32 * tile.warp; newest && d < E; d += 32 * WARPS)
            write_v<1>(a, m.n0, m.row, kv_head, d);
        tile.load_queries(a, m, kv_head);
        float total[MT][tile.dim_tiles][4] = {};
        if (!split && threadIdx.x < tile.rows) tile.folds[threadIdx.x] = {};
        __syncthreads();
        if (!split) tile.load_keys(a, ids, kv_head);
        if (newest) tile.patch_key(last_key % chunk_keys);
        for (int chunk = first; chunk <= last; chunk++) {  // loads go ahead of what needs them
            tile.score(a, m, chunk);
            tile.load_values(a, ids, kv_head, chunk, lo, last_key);
            __syncthreads();
            tile.soften();
            if (!split && threadIdx.x < tile.rows)
                tile.folds[threadIdx.x].add(tile.row_top(threadIdx.x), tile.row_sum(threadIdx.x));
            tile.multiply();
            if (split) {
                tile.store_part(a, m, kv_head, i);
            } else {
                __syncthreads();
                if (chunk < last)
                    ids = tile.pages(a, m, chunk + 1), tile.load_keys(a, ids, kv_head);
                tile.add_to(total);
            }
        }
        if (!split) tile.store(a, m, kv_head, total);
    }
    if (blockIdx.x == 0) grid_dependency_wait();  // idle blocks would hold their place until then
}

// Folds a row's parts: a block a (head, row of one token), four dims a thread. Eight to
// sixteen parts are in flight, since each costs a latency; merging in the last attention block to
// arrive cost 7.0 us where the two kernels cost 3.2 + 2.9.
template <int E>
__global__ void __launch_bounds__(64) merge_kernel(Attention a, int first_row) {
    constexpr int dims = E >= 128 ? 4 : 2, flying = 8;
    const int row = first_row + int(blockIdx.y), head = int(blockIdx.x);
    launch_dependents();
    const int* start = a.tables.chunk_start[a.pool];
    const int chunks = start[row + 1] - start[row], slot = start[row] - start[first_row];
    const int n = a.tables.row_start[row], d = int(threadIdx.x) * dims;
    grid_dependency_wait();
    if (chunks == 0) return;
    struct {
        float out[flying][dims];
        float2 sums[flying];
    } now, next;
    const auto fetch = [&](auto& parts, int first) {
        UNROLL for (int i = 0; i < flying; i++) {
            if (first + i >= chunks) continue;
            const size_t at = size_t(slot + first + i) * a.H + head;
            parts.sums[i] = a.part_sums[at];
            copy<dims * 4>(parts.out[i], a.parts + at * E + d);
        }
    };
    float total[dims] = {};
    Fold fold;
    fetch(now, 0);
    for (int first = 0; first < chunks; first += flying) {
        fetch(next, first + flying);
        UNROLL for (int i = 0; i < flying; i++) {
            if (first + i >= chunks) break;
            fold.add(now.sums[i].x, now.sums[i].y);
            UNROLL for (int j = 0; j < dims; j++) total[j] = fold.apply(total[j], now.out[i][j]);
        }
        now = next;
    }
    for (int j = 0; j < dims; j += 2) {
        bf16* to = a.out + fragment(n, head * E + d + j, a.H * E);
        *reinterpret_cast<uint32_t*>(to) = pack_bf16(total[j] / fold.sum, total[j + 1] / fold.sum);
    }
}

template <class Function>
void with_head_width(int E, Function function) {
    if (E == 256) return function(std::integral_constant<int, 256>());
    if (E == 128) return function(std::integral_constant<int, 128>());
    assert(E == 64);
    function(std::integral_constant<int, 64>());
}

void write_kv(Stream& s, const Attention& a) {
    with_head_width(a.E, [&](auto E) {
        s.launch("write_kv", 8. * a.N * a.G * E, write_kv_kernel<E>, dim3(ceil_div(a.N, 8), a.G),
                 256, 0, a);
    });
}

// Rows of one token among first_row .. +rows; `chunks` of them in all, if they are known.
void attend_rows(Stream& s, const Attention& a, int first_row, int rows, int chunks) {
    assert(chunks <= most_slots && a.H / a.G <= 16);
    // Enough blocks for the window, or for 2,048 tokens a row; they walk on if there is more.
    const int most = (a.window - 2) / chunk_keys + 2;
    const int blocks = a.window < INT_MAX ? std::min(rows * most, most_slots)
                                          : std::clamp(rows * 32, 4 * s.processors, most_slots);
    const double bytes = 4. * chunk_keys * a.E * a.G * chunks;
    with_head_width(a.E, [&](auto E) {
        using Shape = Tile<E, 1, 4>;
        s.launch("attention", bytes, attention_kernel<E, 1, 4, true>, dim3(blocks, a.G), 128,
                 Shape::shared, a, first_row, rows);
        s.launch("merge", 4. * a.H * a.E * chunks, merge_kernel<E>, dim3(a.H, rows),
                 std::max(32, E / 4), 0, a, first_row);
    });
}

constexpr int tile_rows = 64;  // query rows of a tile, of a row of several tokens

void attend_tiles(Stream& s, const Attention& a, int tiles) {
    assert(a.H / a.G <= 16);
    with_head_width(a.E, [&](auto E) {
        using Shape = Tile<E, tile_rows / 16, 8>;
        s.launch("attention of tiles", 4. * chunk_keys * a.E * a.G * tiles,
                 attention_kernel<E, tile_rows / 16, 8, false>, dim3(tiles, a.G), 256,
                 Shape::shared, a, 0, a.tables.R);
    });
}

// [6] Sampling ------------------------------------------------------------------------------------

constexpr int block_ids = 256;         // a warp finds the best of so many ids
constexpr int most_candidates = 1024;  // as many threads sort them
constexpr int bins = 2048;
constexpr float log2e = 1.4426950408889634f;

// What a row of logits is asked for; made by the host from an Output.
struct Request {
    float scale;  // log2 e / temperature; 0: greedy
    int top_k;    // 0: off
    float top_p;  // 1: off
    uint64_t least, hash;
    int target, logprobs;
    int allowed;                     // where its bitset begins; -1: none
    int first_adjustment, adjusted;  // which are its own
};
struct DeviceAdjustment {
    Adjustment made;
    float raw;  // the logit, while the adjusted one stands in its place
};
struct Details {  // of a Result
    float logprob;
    int rank;
    int ids[20];
    float logprobs[20];
};

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
    uint64_t least;  // lighter ones count as 0
    __device__ uint64_t operator()(uint64_t key) const {
        if (key == none) return 0;
        const auto w = uint64_t(exp2_exact((logit_of(key) - top) * scale) * 0x1p40f);
        return w >= least ? w : 0;
    }
};

// The ids of one row of logits.
struct Ids {
    const float* logits;      // [count]
    const uint32_t* allowed;  // bitset; null: all
    const uint64_t* best;     // [ceil(count / 256)] the best key of each block; null: not known
    int count;

    __device__ uint64_t key(int id) const {
        if (id >= count || (allowed && !(allowed[id / 32] >> id % 32 & 1))) return none;
        return order(logits[id], id);
    }
    // f(key) by a thread of the block for each key in lo..hi.
    template <class Function>
    __device__ void each(uint64_t lo, uint64_t hi, Function f) const {
        const int warps = int(blockDim.x) / 32, lane = int(threadIdx.x) % 32;
        for (int b = int(threadIdx.x) / 32; b * block_ids < count; b += warps) {
            if (best && best[b] > hi) continue;
            uint64_t keys[block_ids / 32];
            UNROLL for (int i = 0; i < block_ids / 32; i++) keys[i] =
                key(b * block_ids + i * 32 + lane);
            UNROLL for (int i = 0; i < block_ids / 32; i++) {
                if (keys[i] >= lo && keys[i] <= hi && keys[i] != none) f(keys[i]);
            }
        }
    }
};

__device__ inline uint64_t warp_reduce(uint64_t v, auto op) {
    for (int i = 16; i; i >>= 1) v = op(v, uint64_t(__shfl_xor_sync(~0u, v, i)));
    return v;
}
struct Plus {
    __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Least {
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
    __device__ uint64_t least(uint64_t v) { return reduce(v, Least()); }

    // index = the first whose cumulative value reaches target, before = the sum before it. n: none
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
            if (lane == 31 && until < target) index = n, before = until;
            if (until >= target && until - own < target) {
                uint64_t sum = until - own;
                int i = first;
                while (sum + from[i] < target) sum += from[i++];
                index = i, before = sum;
            }
        }
        __syncthreads();
    }

    // Puts the keys in lo..hi of any value among the candidates; how many there are, perhaps more
    // than fit.
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

    // values = the sum of values by bin; then finds the bin that reaches target.
    template <class Value, class Bin>
    __device__ void histogram(const Ids& ids, uint64_t lo, uint64_t hi, Value value, Bin bin,
                              uint64_t target) {
        __syncthreads();
        for (int i = int(threadIdx.x); i < bins; i += int(blockDim.x)) values[i] = 0;
        __syncthreads();
        ids.each(lo, hi, [&](uint64_t key) {
            const unsigned long long v = value(key);
            if (v) atomicAdd(reinterpret_cast<unsigned long long*>(&values[bin(key)]), v);
        });
        find(values, bins, target);
    }

    // The first key, in order and up to hi, at which the sum of values reaches target; hi if none
    // does. First a histogram over the distance to the top logit, which spreads them well, then
    // over the keys that are left, until so few are left that they fit.
    template <class Value>
    __device__ uint64_t select(const Ids& ids, uint64_t hi, uint64_t target, Value value, float top,
                               float scale) {
        const auto distance = [&](uint64_t key) {
            return int(fminf((top - logit_of(key)) * scale * 48, bins - 1));
        };
        histogram(ids, 0, hi, value, distance, target);
        if (index == bins) return hi;
        target -= before;
        const int bin = index;
        uint64_t low = none, high = 0;
        ids.each(0, hi, [&](uint64_t key) {
            if (value(key) == 0 || distance(key) != bin) return;
            low = min(low, key), high = max(high, key);
        });
        low = least(low), high = ~least(~high);
        while (collect(ids, low, high, value) > most_candidates) {
            const int shift = max(0, 53 - __clzll((long long)((high - low) | 1)));
            const uint64_t from = low;
            const auto step = [&](uint64_t key) { return int((key - from) >> shift); };
            histogram(ids, low, high, value, step, target);
            target -= before;
            low += uint64_t(index) << shift;
            high = min(high, low + (uint64_t(1) << shift) - 1);
        }
        const int i = int(threadIdx.x);
        if (i < count) {
            uint64_t sum = 0;
            for (int j = 0; j < count; j++) {
                if (candidates[j].key < candidates[i].key) sum += candidates[j].value;
            }
            if (sum < target && sum + candidates[i].value >= target) found = candidates[i].key;
        }
        __syncthreads();
        return found;
    }
};

// The draw among few: each thread ranks its own candidate by comparing it with all others, which
// needs no order among them. Top-k, then top-p of what is left, then the first id, ascending, whose
// cumulative weight exceeds hash * total / 2^64. Twin: sample
__device__ inline int draw_candidates(Scratch& s, const Request& r) {
    const int i = int(threadIdx.x), count = s.count;
    const Scratch::Candidate own = i < count ? s.candidates[i] : Scratch::Candidate{none, 0};
    uint64_t before = 0;
    int rank = 0;
    for (int j = 0; j < count; j++) {
        const Scratch::Candidate other = s.candidates[j];
        if (other.key < own.key) rank++, before += other.value;
    }
    bool kept = i < count && rank < r.top_k;
    const uint64_t total = s.sum(kept ? own.value : 0);
    if (r.top_p < 1) kept &= rank == 0 || before < uint64_t(double(r.top_p) * double(total));
    __syncthreads();
    if (i < count && !kept) s.candidates[i].value = 0;
    const uint64_t draw = __umul64hi(r.hash, s.sum(kept ? own.value : 0));
    before = 0;
    for (int j = 0; j < count; j++) {
        const Scratch::Candidate other = s.candidates[j];
        if (uint32_t(other.key) < uint32_t(own.key)) before += other.value;
    }
    if (kept && before <= draw && draw < before + own.value) s.index = int(uint32_t(own.key));
    __syncthreads();
    return s.index;
}

// The draw among any number of ids, in a few passes over all of them.
__device__ inline int draw_all(Scratch& s, const Ids& ids, const Request& r, const Weigher& weigh) {
    uint64_t last = none;
    if (r.top_k > 0) {
        const auto one = [&](uint64_t key) { return uint64_t(weigh(key) > 0); };
        last = s.select(ids, last, uint64_t(r.top_k), one, weigh.top, weigh.scale);
    }
    const auto kept = [&](uint64_t key) { return key <= last ? weigh(key) : 0; };
    if (r.top_p < 1) {
        uint64_t own = 0;
        ids.each(0, last, [&](uint64_t key) { own += weigh(key); });
        const auto enough = uint64_t(double(r.top_p) * double(s.sum(own)));
        last = s.select(ids, last, max(enough, uint64_t(1)), weigh, weigh.top, weigh.scale);
    }
    const int lane = int(threadIdx.x) % 32, blocks = (ids.count + block_ids - 1) / block_ids;
    __syncthreads();
    for (int b = int(threadIdx.x) / 32; b < blocks; b += int(blockDim.x) / 32) {
        uint64_t own = 0;
        for (int i = lane; i < block_ids; i += 32) own += kept(ids.key(b * block_ids + i));
        own = warp_reduce(own, Plus());
        if (lane == 0) s.values[b] = own;
    }
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

struct Choice {
    float* logits;            // [outputs, V]
    uint64_t* best;           // [outputs, ceil(vocab / 256)]
    const Request* requests;  // [outputs]
    const uint32_t* allowed;  // bitsets
    DeviceAdjustment* adjustments;
    int* ids;          // [outputs], in the host's memory
    Details* details;  // [outputs], likewise
    int outputs, V, vocab;

    __device__ Ids row(int o) const {
        const int set = requests[o].allowed;
        return {logits + size_t(o) * V, set < 0 ? nullptr : allowed + set,
                best + size_t(o) * ((vocab + block_ids - 1) / block_ids), vocab};
    }
};

// Bias and penalties, in place, and back: logprobs are of the raw logits. Twin: adjust
__global__ void __launch_bounds__(128) adjust_kernel(Choice c, bool back) {
    launch_dependents();
    grid_dependency_wait();
    const Request& r = c.requests[blockIdx.x];
    for (int i = int(threadIdx.x); i < r.adjusted; i += 128) {
        DeviceAdjustment& a = c.adjustments[r.first_adjustment + i];
        float& logit = c.logits[size_t(blockIdx.x) * c.V + a.made.id];
        if (!back) {
            a.raw = logit;
            const float z = logit + a.made.bias;
            logit = (z > 0 ? z / a.made.repetition : z * a.made.repetition) - a.made.penalty;
        } else {
            logit = a.raw;
        }
    }
}

// The best key of each block of 256 ids: the whole GPU reads the logits once. Then greedy is a
// minimum of 1,024 keys, and top-k reads only the blocks whose best is good enough.
// Grid: (sixteen blocks of ids, outputs).
__global__ void __launch_bounds__(256) best_kernel(Choice c) {
    launch_dependents();
    grid_dependency_wait();
    const int o = int(blockIdx.y), lane = int(threadIdx.x) % 32;
    const Ids ids = c.row(o);
    const int first = int(blockIdx.x) * 16 + int(threadIdx.x) / 32 * 2;
    for (int b = first; b < first + 2 && b * block_ids < ids.count; b++) {
        uint64_t best = none;
        for (int i = 0; i < block_ids; i += 32)
            best = Least()(best, ids.key(b * block_ids + i + lane));
        best = warp_reduce(best, Least());
        if (lane == 0) c.best[ids.best - c.best + b] = best;
    }
}

// One block an output. Twin: sample
__global__ void __launch_bounds__(1024) sample_kernel(Choice c) {
    Scratch& s = *reinterpret_cast<Scratch*>(dynamic_shared());
    launch_dependents();
    const Request r = c.requests[blockIdx.x];
    grid_dependency_wait();
    if (r.target >= 0) {
        if (threadIdx.x == 0) c.ids[blockIdx.x] = r.target;
        return;
    }
    const Ids ids = c.row(int(blockIdx.x));
    const int blocks = (ids.count + block_ids - 1) / block_ids, thread = int(threadIdx.x);
    uint64_t own = none;
    for (int b = thread; b < blocks; b += 1024) own = Least()(own, ids.best[b]);
    const uint64_t best = s.least(own);
    int id = int(uint32_t(best));
    if (r.scale > 0) {
        const Weigher weigh{logit_of(best), r.scale, r.least};
        bool few = false;
        if (r.top_k > 0 && r.top_k <= most_candidates / 4 && r.top_k <= blocks) {
            // A bound that the best ids of at least top_k threads reach, by bisection.
            uint32_t lo = uint32_t(best >> 32), hi = ~0u;
            while (lo < hi) {
                const uint32_t middle = lo + (hi - lo) / 2;
                const int reach = __syncthreads_count(uint32_t(own >> 32) <= middle);
                if (reach < r.top_k) lo = middle + 1;
                if (reach >= r.top_k) hi = middle;
                if (reach >= r.top_k && reach <= r.top_k + r.top_k / 8) break;
            }
            few = s.collect(ids, 0, uint64_t(hi) << 32 | 0xffffffffu, weigh) <= most_candidates;
        }
        id = few ? draw_candidates(s, r) : draw_all(s, ids, r, weigh);
    }
    if (threadIdx.x == 0) c.ids[blockIdx.x] = id;
}

// log softmax of the id, its rank, and the likeliest, over all V raw logits. Twin: log_softmax
// One block an output that wants it.
__global__ void __launch_bounds__(1024) log_softmax_kernel(Choice c) {
    Scratch& s = *reinterpret_cast<Scratch*>(dynamic_shared());
    launch_dependents();
    const Request r = c.requests[blockIdx.x];
    grid_dependency_wait();
    if (r.target < 0 && r.logprobs < 0) return;
    const Ids ids{c.logits + size_t(blockIdx.x) * c.V, nullptr, nullptr, c.V};
    uint64_t own = none, total = 0, ahead = 0;
    ids.each(0, none, [&](uint64_t key) { own = Least()(own, key); });
    const float top = logit_of(s.least(own));
    const uint64_t mine = ids.key(c.ids[blockIdx.x]);
    const Weigher weigh{top, log2e, 0};
    ids.each(0, none, [&](uint64_t key) { total += weigh(key), ahead += key < mine; });
    const auto log_total = float(log(double(s.sum(total)) * 0x1p-40));
    ahead = s.sum(ahead);
    Details& d = c.details[blockIdx.x];
    if (threadIdx.x == 0) {
        d.logprob = (logit_of(mine) - top) - log_total;
        d.rank = int(ahead) + 1;
    }
    if (r.logprobs <= 0) return;
    const auto one = [](uint64_t) { return uint64_t(1); };
    const uint64_t last = s.select(ids, none, uint64_t(r.logprobs), one, top, log2e);
    const int found = s.collect(ids, 0, last, one), i = int(threadIdx.x);
    if (i >= found) return;
    const uint64_t key = s.candidates[i].key;
    int rank = 0;
    for (int j = 0; j < found; j++) rank += s.candidates[j].key < key;
    d.ids[rank] = int(uint32_t(key));
    d.logprobs[rank] = (logit_of(key) - top) - log_total;
}

void sample(Stream& s, const Choice& c, bool adjusted, bool logprobs) {
    const double read = 4. * c.outputs * c.V;
    const int blocks = ceil_div(c.vocab, block_ids);
    assert(blocks <= bins);
    const dim3 outputs(c.outputs);
    if (adjusted) s.launch("adjust", 0, adjust_kernel, outputs, 128, 0, c, false);
    s.launch("best", read, best_kernel, dim3(ceil_div(blocks, 16), c.outputs), 256, 0, c);
    s.launch("sample", 8. * c.outputs * blocks, sample_kernel, outputs, 1024, sizeof(Scratch), c);
    if (!logprobs) return;
    if (adjusted) s.launch("adjust", 0, adjust_kernel, outputs, 128, 0, c, true);
    s.launch("log_softmax", 5 * read, log_softmax_kernel, outputs, 1024, sizeof(Scratch), c);
}

// [7] Memory --------------------------------------------------------------------------------------

// Device memory, or page-locked memory of the host that the device can reach.
template <class T, bool host = false>
struct Memory {
    T* data = nullptr;
    size_t size = 0;

    Memory() = default;
    Memory(const Memory&) = delete;
    ~Memory() { release(); }
    void release() {
        if constexpr (host) {
            CUDA(cudaFreeHost(data));
        } else {
            CUDA(cudaFree(data));
        }
        data = nullptr, size = 0;
    }
    // Forgets what was there. Whether it moved.
    bool reserve(size_t count) {
        if (count <= size) return false;
        release();
        if constexpr (host) {
            CUDA(cudaHostAlloc(reinterpret_cast<void**>(&data), count * sizeof(T), 0));
        } else {
            CUDA(cudaMalloc(reinterpret_cast<void**>(&data), count * sizeof(T)));
        }
        return size = count, true;
    }
    T* operator+(size_t i) const { return data + i; }
};

// A matrix of the arena: rows of `width` from one or more of the checkpoint's, one after another or
// in turns.
struct Tensor {
    const bf16** place;
    std::vector<std::pair<const bf16*, size_t>> from;  // with its rows
    size_t width;
    bool in_turns = false;

    size_t rows() const {
        size_t sum = 0;
        for (const auto& part : from) sum += part.second;
        return sum;
    }
    const bf16* row(size_t r) const {
        if (in_turns) return from[r % from.size()].first + r / from.size() * width;
        size_t part = 0;
        while (r >= from[part].second) r -= from[part++].second;
        return from[part].first + r * width;
    }
};

struct DeviceLayer {
    const bf16 *input_norm, *post_attention_norm, *pre_ffn_norm, *post_ffn_norm;  // [D]
    const bf16 *q_norm, *k_norm;                                                  // [E]
    const bf16* qkv;                                                              // [(H + 2G) E, D]
    const bf16* o;                                                                // [D, H E]
    const bf16* gate_up;  // [2F, D], gate i and up i in rows 2i and 2i+1
    const bf16* down;     // [D, F]
};

struct DeviceWeights {
    const bf16 *embed, *norm;
    std::vector<DeviceLayer> layers;
    Memory<bf16> arena;

    std::vector<Tensor> tensors(const Config& c, const Weights& w) {
        const auto D = size_t(c.D), E = size_t(c.E), F = size_t(c.F);
        layers.resize(size_t(c.L));
        std::vector<Tensor> all{{&embed, {{w.embed, size_t(c.V)}}, D}, {&norm, {{w.norm, 1}}, D}};
        for (size_t i = 0; i < layers.size(); i++) {
            const Layer& l = w.layers[i];
            DeviceLayer& d = layers[i];
            all.push_back({&d.input_norm, {{l.input_norm, 1}}, D});
            all.push_back({&d.post_attention_norm, {{l.post_attention_norm, 1}}, D});
            all.push_back({&d.pre_ffn_norm, {{l.pre_ffn_norm, 1}}, D});
            all.push_back({&d.post_ffn_norm, {{l.post_ffn_norm, 1}}, D});
            all.push_back({&d.q_norm, {{l.q_norm, 1}}, E});
            all.push_back({&d.k_norm, {{l.k_norm, 1}}, E});
            all.push_back({&d.qkv, {{l.q, c.H * E}, {l.k, c.G * E}, {l.v, c.G * E}}, D});
            all.push_back({&d.o, {{l.o, D}}, c.H * E});
            all.push_back({&d.gate_up, {{l.gate, F}, {l.up, F}}, D, true});
            all.push_back({&d.down, {{l.down, D}}, F});
        }
        return all;
    }
    // Bytes, with a gap behind each tensor that tests make untouchable.
    static constexpr size_t gap = 128;  // bf16s
    static size_t span(const Tensor& t) { return (t.rows() * t.width + 2 * gap - 1) / gap * gap; }

    void upload(const std::vector<Tensor>& all);
};

// From the mapped file through page-locked memory, by threads that copy while others' transfers are
// under way: one thread copies some 10 GB/s, PCIe takes 50.
void DeviceWeights::upload(const std::vector<Tensor>& all) {
    constexpr size_t block = 2 << 20;  // bf16s
    struct Job {
        const Tensor* tensor;
        bf16* to;
        size_t first, rows;
    };
    std::vector<Job> jobs;
    size_t total = 0;
    for (const Tensor& t : all) total += span(t);
    arena.reserve(total);
    bf16* to = arena.data;
    for (const Tensor& t : all) {
        *t.place = to;
        const size_t rows = t.rows(), most = std::max<size_t>(1, block / t.width);
        for (size_t r = 0; r < rows; r += most)
            jobs.push_back({&t, to + r * t.width, r, std::min(most, rows - r)});
        forbid(to + rows * t.width, (span(t) - rows * t.width) * sizeof(bf16));
        to += span(t);
    }
    std::atomic<size_t> next{0};
    const auto work = [&] {
        Memory<bf16, true> staging[2];
        cudaStream_t stream;
        cudaEvent_t copied[2];
        CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        for (auto& event : copied) CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        for (int i = 0;; i = 1 - i) {
            const size_t j = next++;
            if (j >= jobs.size()) break;
            const Job& job = jobs[j];
            const size_t width = job.tensor->width;
            CUDA(cudaEventSynchronize(copied[i]));
            staging[i].reserve(std::max(block, width));
            for (size_t r = 0; r < job.rows; r++) {
                std::memcpy(staging[i] + r * width, job.tensor->row(job.first + r),
                            width * sizeof(bf16));
            }
            CUDA(cudaMemcpyAsync(job.to, staging[i].data, job.rows * width * sizeof(bf16),
                                 cudaMemcpyHostToDevice, stream));
            CUDA(cudaEventRecord(copied[i], stream));
        }
        CUDA(cudaStreamSynchronize(stream));
        for (auto& event : copied) CUDA(cudaEventDestroy(event));
        CUDA(cudaStreamDestroy(stream));
    };
    std::vector<std::jthread> threads;
    for (size_t i = 0; i < std::min<size_t>(6, jobs.size()); i++) threads.emplace_back(work);
}

// [8] The model -----------------------------------------------------------------------------------

constexpr int most_outputs = 256;  // rows of logits at a time

// What the host knows of a step's shape; the rest is in the tables.
struct Plan {
    int N = 0, R = 0, outputs = 0, tiles = 0;
    bool adjusted = false, logprobs = false;
    struct Group {  // of rows, whose chunks have room in the slots
        int first, rows, chunks[2];
    };
    std::vector<Group> groups;  // none, if no row has one token
};

class CudaModel : public Model {
  public:
    CudaModel(const Checkpoint& checkpoint, const CudaOptions& options);
    ~CudaModel() override;
    KvMemory kv_memory() const override;
    void allocate_pages(const int (&pages)[2]) override;
    Results step(const Batch& batch) override;

    // The benchmark's and the tests'.
    Stream stream;
    Plan prepare(const Batch& batch, int bucket);
    void forward(const Plan& plan);
    static int bucket_of(const Batch& batch);

  private:
    size_t page_size(Pool pool) const {  // bf16s: [layers of the pool][G][K, V][32][E]
        return size_t(layers_of[pool]) * size_t(c.G) * 2 * page_tokens * size_t(c.E);
    }
    Attention attention_of(int layer, const Plan& plan) const;
    void replay(const Plan& plan);
    void drop_graphs();

    const Config& c;
    CudaOptions options;
    DeviceWeights w;
    int layers_of[2] = {0, 0};       // by Pool
    std::vector<int> layer_in_pool;  // [L]
    Memory<bf16> kv[2];
    // Activations of a step, rows rounded up to a tile's 128.
    Memory<float> h, parts, cos_sin[2], inv_freq;
    Memory<bf16> x, qkv, attended, gated;
    Memory<float> part_out;    // [slots][H][E]
    Memory<float2> part_sums;  // [slots][H]
    Memory<float> logits;      // [256, V]
    Memory<uint64_t> best;
    // A step's inputs in one copy, and its results where the kernels write them: the host's memory.
    Memory<char, true> inputs;
    Memory<char> device_inputs;
    Memory<int, true> ids;
    Memory<Details, true> details;
    Tables tables{};
    const Request* requests = nullptr;
    DeviceAdjustment* adjustments = nullptr;
    const uint32_t* allowed = nullptr;
    std::map<int, cudaGraphExec_t> graphs;  // by rows
};

CudaModel::CudaModel(const Checkpoint& checkpoint, const CudaOptions& options_)
    : c(checkpoint.config), options(options_) {
    cudaDeviceProp gpu;
    CUDA(cudaGetDeviceProperties(&gpu, 0));
    stream.programmatic = gpu.major >= 9, stream.processors = gpu.multiProcessorCount;
    const auto tensors = w.tensors(c, checkpoint.weights);
    for (int l = 0; l < c.L; l++)
        layer_in_pool.push_back(layers_of[c.global[size_t(l)] ? global_pool : local_pool]++);

    const size_t N =
        size_t(ceil_div(std::max(options.max_batched_tokens, most_outputs), 128)) * 128;
    const auto D = size_t(c.D), HE = size_t(c.H) * size_t(c.E), GE = size_t(c.G) * size_t(c.E);
    const auto groups = size_t(std::max(groups_of(c.F), groups_of(int(HE))));
    const size_t blocks = size_t(ceil_div(c.vocab, block_ids));
    size_t weights = 0;
    for (const Tensor& t : tensors) weights += DeviceWeights::span(t) * sizeof(bf16);
    const size_t workspace = N * (D * 4 + groups * D * 4 + 2 * size_t(c.E) * 4 + D * 2 +
                                  (HE + 2 * GE) * 2 + HE * 2 + size_t(c.F) * 2) +
                             most_slots * (HE * 4 + size_t(c.H) * 8) +
                             most_outputs * (size_t(c.V) * 4 + blocks * 8);
    size_t free_bytes, total;
    CUDA(cudaMemGetInfo(&free_bytes, &total));
    const double room = options.memory_utilization * double(total) - double(total - free_bytes);
    if (double(weights + workspace) > room) {
        throw Error(
            text("the model needs %.2f GB for weights and %.2f GB for steps of %d tokens, and "
                 "%.2f of the %.2f GB of %s leaves %.2f GB: take a smaller model, or change "
                 "--max-num-batched-tokens or --gpu-memory-utilization",
                 double(weights) / 1e9, double(workspace) / 1e9, options.max_batched_tokens,
                 options.memory_utilization, double(total) / 1e9, gpu.name, room / 1e9));
    }
    CUDA(cudaStreamCreateWithFlags(&stream.stream, cudaStreamNonBlocking));
    w.upload(tensors);
    h.reserve(N * D), parts.reserve(groups * N * D), x.reserve(N * D);
    qkv.reserve(N * (HE + 2 * GE)), attended.reserve(N * HE), gated.reserve(N * size_t(c.F));
    for (auto& table : cos_sin) table.reserve(N * size_t(c.E));
    part_out.reserve(most_slots * HE), part_sums.reserve(most_slots * size_t(c.H));
    logits.reserve(most_outputs * size_t(c.V)), best.reserve(most_outputs * blocks);
    std::vector<float> frequencies;
    for (const Pool pool : pools) {
        for (int i = 0; i < c.E / 2; i++)
            frequencies.push_back(float(std::pow(c.theta[pool], -2. * i / c.E)) /
                                  c.rope_divisor[pool]);
    }
    inv_freq.reserve(frequencies.size());
    CUDA(cudaMemcpy(inv_freq.data, frequencies.data(), frequencies.size() * sizeof(float),
                    cudaMemcpyHostToDevice));
}

CudaModel::~CudaModel() {
    drop_graphs();
    CUDA(cudaStreamDestroy(stream.stream));
}

void CudaModel::drop_graphs() {
    for (const auto& graph : graphs) CUDA(cudaGraphExecDestroy(graph.second));
    graphs.clear();
}

KvMemory CudaModel::kv_memory() const {
    size_t free_bytes, total;
    CUDA(cudaMemGetInfo(&free_bytes, &total));
    const double room = options.memory_utilization * double(total) - double(total - free_bytes);
    return {uint64_t(std::max(0., room)),
            {page_size(local_pool) * sizeof(bf16), page_size(global_pool) * sizeof(bf16)}};
}

void CudaModel::allocate_pages(const int (&pages)[2]) {
    for (const Pool pool : pools)
        kv[pool].reserve(std::max<size_t>(1, pages[pool] * page_size(pool)));
}

Attention CudaModel::attention_of(int layer, const Plan& plan) const {
    const Pool pool = c.global[size_t(layer)] ? global_pool : local_pool;
    const DeviceLayer& l = w.layers[size_t(layer)];
    Attention a{};
    a.tables = tables;
    a.qkv = qkv.data, a.q_norm = l.q_norm, a.k_norm = l.k_norm, a.cos_sin = cos_sin[pool].data;
    a.kv = kv[pool] +
           size_t(layer_in_pool[size_t(layer)]) * size_t(c.G) * 2 * page_tokens * size_t(c.E);
    a.page_stride = page_size(pool);
    a.pool = pool, a.window = pool == global_pool ? INT_MAX : c.W;
    a.H = c.H, a.G = c.G, a.E = c.E, a.N = plan.N;
    a.eps = c.eps, a.scale = c.scale * log2e;
    a.parts = part_out.data, a.part_sums = part_sums.data, a.out = attended.data;
    return a;
}

// The model, as the paper has it. [..] are the shapes of what a line makes.
void CudaModel::forward(const Plan& p) {
    const int N = p.N, D = c.D, F = c.F, HE = c.H * c.E, GE = c.G * c.E;
    const RopeTables rope{inv_freq.data, {cos_sin[0].data, cos_sin[1].data}};
    Stream& s = stream;
    s.first = true;
    embed(s, h.data, rope, w.embed, tables.tokens, tables.positions, N, D, c.E, c.embed_scale);
    Norm norms{x.data, h.data, h.data, nullptr, 0, N, nullptr, nullptr, nullptr, D, c.eps};
    const auto add_norm = [&](int K, const bf16* post, const bf16* pre) {  // [N, D]
        norms.count = K ? groups_of(K) : 0, norms.parts = K ? parts.data : nullptr;
        norms.post = post, norms.pre = pre;
        norm(s, N, norms);
    };
    for (int i = 0; i < c.L; i++) {
        const DeviceLayer& l = w.layers[size_t(i)];
        const Attention a = attention_of(i, p);
        add_norm(i ? F : 0, i ? w.layers[size_t(i) - 1].post_ffn_norm : nullptr, l.input_norm);
        linear(s, "qkv", Store::rows_bf16, qkv.data, x.data, l.qkv, N, D, HE + 2 * GE);
        if (p.tiles) write_kv(s, a), attend_tiles(s, a, p.tiles);
        for (const auto& g : p.groups) attend_rows(s, a, g.first, g.rows, g.chunks[a.pool]);
        linear(s, "o", Store::parts_fp32, parts.data, attended.data, l.o, N, HE, D, groups_of(HE));
        add_norm(HE, l.post_attention_norm, l.pre_ffn_norm);
        linear(s, "gate_up", Store::geglu, gated.data, x.data, l.gate_up, N, D, 2 * F);  // [N, F]
        linear(s, "down", Store::parts_fp32, parts.data, gated.data, l.down, N, F, D, groups_of(F));
    }
    for (int first = 0; first < p.outputs; first += most_outputs) {
        const int count = std::min(most_outputs, p.outputs - first);
        norms.h_out = nullptr, norms.rows = tables.output_token + first;
        norms.count = groups_of(F), norms.parts = parts.data;
        norms.post = w.layers.back().post_ffn_norm, norms.pre = w.norm;
        norm(s, count, norms);
        linear(s, "lm_head", Store::parts_fp32, logits.data, x.data, w.embed, count, D, c.V);
        sample(s,
               {logits.data, best.data, requests + first, allowed, adjustments, ids + size_t(first),
                details + size_t(first), count, c.V, c.vocab},
               p.adjusted, p.logprobs);
    }
}

// Decode steps have a few shapes, so that each has a graph: all rows of one token, none with
// requests of its own. Else 0.
int CudaModel::bucket_of(const Batch& b) {
    const auto R = int(b.row_start.size()) - 1;
    if (int(b.tokens.size()) != R || R > most_outputs || int(b.outputs.size()) > R) return 0;
    for (const Output& o : b.outputs) {
        if (!o.adjustments.empty() || o.allowed || o.target >= 0 || o.sampling.logprobs >= 0)
            return 0;
    }
    for (int rows : {1, 2, 4, 8}) {
        if (R <= rows) return rows;
    }
    return ceil_div(R, 16) * 16;
}

Request request_of(const Output& o) {
    const Sampling& s = o.sampling;
    Request r{};
    r.scale = s.temperature < 1e-5f ? 0 : float(1.4426950408889634 / s.temperature);
    r.top_k = s.top_k, r.top_p = s.top_p;
    r.least = std::max<uint64_t>(1, uint64_t(s.min_p * 0x1p40f));
    const auto mix = [](uint64_t x) {  // SplitMix64's finaliser; twin: hash
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        return x ^ (x >> 31);
    };
    r.hash = mix(s.seed + 0x9e3779b97f4a7c15u * (uint64_t(o.index) + 1) + mix(s.seed));
    r.target = o.target, r.logprobs = s.logprobs, r.allowed = -1;
    return r;
}

// Packs a step's inputs, one array behind the other. With a bucket, rows without tokens of their
// own are added up to it: they have page -1, no chunks, and nobody reads what they compute.
Plan CudaModel::prepare(const Batch& b, int bucket) {
    const auto rows = int(b.row_start.size()) - 1, tokens = int(b.tokens.size());
    const auto outputs = int(b.outputs.size());
    Plan p;
    p.N = bucket ? bucket : tokens, p.R = bucket ? bucket : rows;
    p.outputs = bucket ? bucket : outputs;
    const auto N = size_t(p.N), R = size_t(p.R), pages = size_t(b.pages_per_row);
    size_t adjusted = 0, words = 0;
    for (const Output& o : b.outputs) {
        adjusted += o.adjustments.size();
        if (o.allowed) words += o.allowed->size();
    }
    const size_t most = (3 * N + 4 * (R + 1) + size_t(p.outputs) + words) * 4 + pages * R * 8 +
                        size_t(p.outputs) * sizeof(Request) + adjusted * sizeof(DeviceAdjustment) +
                        16 * 16;
    bool moved = inputs.reserve(most) | device_inputs.reserve(inputs.size);
    moved |= ids.reserve(size_t(p.outputs)) | details.reserve(size_t(p.outputs));
    if (moved) drop_graphs();
    size_t used = 0;
    const auto add = [&]<class T>(const T*& device, size_t count) {
        T* host = reinterpret_cast<T*>(inputs + used);
        device = reinterpret_cast<const T*>(device_inputs + used);
        used += (count * sizeof(T) + 15) / 16 * 16;
        std::memset(static_cast<void*>(host), 0, count * sizeof(T));
        return host;
    };
    std::copy(b.tokens.begin(), b.tokens.end(), add(tables.tokens, N));
    std::copy(b.positions.begin(), b.positions.end(), add(tables.positions, N));
    int* row_of = add(tables.row_of, N);
    int* row_start = add(tables.row_start, R + 1);
    int* chunk_start[] = {add(tables.chunk_start[0], R + 1), add(tables.chunk_start[1], R + 1)};
    int* tile_start = add(tables.tile_start, R + 1);
    Plan::Group group{0, 0, {0, 0}};
    for (int r = 0; r < p.R; r++) {
        const int first = r < rows ? b.row_start[size_t(r)] : r;
        const int count = r < rows ? b.row_start[size_t(r) + 1] - first : 1;
        std::fill_n(row_of + first, count, r);
        row_start[r + 1] = first + count;
        const int position = r < rows ? b.positions[size_t(first)] : 0;
        int chunks[2] = {0, 0};
        if (r < rows && count == 1) {
            chunks[global_pool] = position / chunk_keys + 1;
            chunks[local_pool] =
                position / chunk_keys - std::max(0, position - c.W + 1) / chunk_keys + 1;
        }
        for (const Pool pool : pools)
            chunk_start[pool][r + 1] = chunk_start[pool][r] + chunks[pool];
        tile_start[r + 1] =
            tile_start[r] + (count > 1 ? ceil_div(count, tile_rows / (c.H / c.G)) : 0);
        if (group.chunks[global_pool] + chunks[global_pool] > most_slots) {
            p.groups.push_back(group);
            group = {r, 0, {0, 0}};
        }
        group.rows++;
        for (const Pool pool : pools) group.chunks[pool] += chunks[pool];
    }
    if (group.chunks[global_pool] > 0) p.groups.push_back(group);
    p.tiles = tile_start[R];
    tables.R = p.R;
    int* output_token = add(tables.output_token, size_t(p.outputs));
    Request* request = add(requests, size_t(p.outputs));
    int2* table = add(tables.pages, pages * R);
    const DeviceAdjustment* first_adjustment;
    DeviceAdjustment* adjustment = add(first_adjustment, adjusted);
    adjustments = const_cast<DeviceAdjustment*>(first_adjustment);
    uint32_t* bits = add(allowed, words);
    for (size_t i = 0; i < pages; i++) {
        for (size_t r = 0; r < R; r++) {
            const bool real = int(r) < rows;
            table[i * R + r] = {real ? b.pages[local_pool][r * pages + i] : -1,
                                real ? b.pages[global_pool][r * pages + i] : -1};
        }
    }
    int next_adjustment = 0, next_word = 0;
    for (int i = 0; i < outputs; i++) {
        const Output& o = b.outputs[size_t(i)];
        output_token[i] = o.token;
        request[i] = request_of(o);
        request[i].first_adjustment = next_adjustment;
        request[i].adjusted = int(o.adjustments.size());
        for (const Adjustment& a : o.adjustments) adjustment[next_adjustment++] = {a, 0};
        if (o.allowed && o.target < 0) {
            request[i].allowed = next_word;
            std::copy(o.allowed->begin(), o.allowed->end(), bits + next_word);
            next_word += int(o.allowed->size());
        }
        p.adjusted |= !o.adjustments.empty() && o.target < 0;
        p.logprobs |= o.target >= 0 || o.sampling.logprobs >= 0;
    }
    CUDA(cudaMemcpyAsync(device_inputs.data, inputs.data, used, cudaMemcpyHostToDevice,
                         stream.stream));
    return p;
}

void CudaModel::replay(const Plan& p) {
    cudaGraphExec_t& exec = graphs[p.R];
    if (!exec) {
        cudaGraph_t graph;
        CUDA(cudaStreamBeginCapture(stream.stream, cudaStreamCaptureModeThreadLocal));
        forward(p);
        CUDA(cudaStreamEndCapture(stream.stream, &graph));
        CUDA(cudaGraphInstantiate(&exec, graph, 0));
        CUDA(cudaGraphDestroy(graph));
    }
    CUDA(cudaGraphLaunch(exec, stream.stream));
}

Results CudaModel::step(const Batch& b) {
    if (b.tokens.empty()) return {};
    assert(int(b.tokens.size()) <= options.max_batched_tokens);
#ifndef NDEBUG
    for (const Pool pool : pools) {
        for (const int page : b.dead[pool])
            CUDA(cudaMemsetAsync(kv[pool] + size_t(page) * page_size(pool), 0xff,
                                 page_size(pool) * sizeof(bf16), stream.stream));  // NaN
    }
#endif
    int bucket = bucket_of(b);
    Plan p = prepare(b, bucket);
    if (bucket && p.groups.size() > 1) bucket = 0, p = prepare(b, 0);
    if (bucket) {
        replay(p);
    } else {
        forward(p);
    }
    CUDA(cudaStreamSynchronize(stream.stream));
    Results results(b.outputs.size());
    for (size_t i = 0; i < results.size(); i++) {
        results[i].id = ids.data[i];
        const int wanted = b.outputs[i].sampling.logprobs;
        if (b.outputs[i].target < 0 && wanted < 0) continue;
        const Details& d = details.data[i];
        results[i].logprob = d.logprob, results[i].rank = d.rank;
        for (int j = 0; j < std::min(wanted, c.V); j++)
            results[i].top.push_back({d.ids[j], d.logprobs[j]});
    }
    return results;
}

std::string version(int v) { return text("%d.%d", v / 1000, v % 1000 / 10); }

}  // namespace

std::string cuda_missing() {
    int driver = 0, runtime = 0, count = 0;
    CUDA(cudaRuntimeGetVersion(&runtime));
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
        return "there is no NVIDIA driver: install one, or go on without";
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorInsufficientDriver) {
        return text(
            "the NVIDIA driver is for CUDA %s and this build for %s: update the driver, or "
            "build with an older toolkit",
            version(driver).c_str(), version(runtime).c_str());
    }
    if (error != cudaSuccess || count == 0)
        return text("no NVIDIA GPU can be used: %s", cudaGetErrorString(error));
    cudaDeviceProp gpu;
    CUDA(cudaGetDeviceProperties(&gpu, 0));
    if (gpu.major >= 8) return "";
    return text("%s has compute capability %d.%d, and the kernels need 8.0 (Ampere) or newer",
                gpu.name, gpu.major, gpu.minor);
}

int cuda_step_tokens() {  // vLLM's rule
    size_t free_bytes, total;
    CUDA(cudaMemGetInfo(&free_bytes, &total));
    return total >= size_t(70) << 30 ? 8192 : 2048;
}

std::unique_ptr<Model> open_cuda(const Checkpoint& checkpoint, const CudaOptions& options) {
    int driver, runtime;
    cudaDeviceProp gpu;
    CUDA(cudaDriverGetVersion(&driver));
    CUDA(cudaRuntimeGetVersion(&runtime));
    CUDA(cudaGetDeviceProperties(&gpu, 0));
    say_step(
        text("CUDA context: %s, compute capability %d.%d, %.1f GB; driver for CUDA %s, "
             "runtime %s",
             gpu.name, gpu.major, gpu.minor, double(gpu.totalGlobalMem) / 1e9,
             version(driver).c_str(), version(runtime).c_str()));
    auto model = std::make_unique<CudaModel>(checkpoint, options);
    say_step(text("uploaded: %.2f GB of weights", double(checkpoint.bytes) / 1e9));
    return model;
}

}  // namespace gemma
