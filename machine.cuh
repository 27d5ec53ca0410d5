// SPDX-License-Identifier: Apache-2.0
//
// machine.cuh: what the kernels need of the machine. Sitting 2, first; included by gemma.cu.
//
//   [1] Instructions  each PTX instruction in one small wrapper, and how a kernel is launched
//   [2] Fragments     how matrices lie, so that both sides of an mma are 16-byte loads
//
// Without nvcc, tests/cuda_on_cpu.h has the same names and runs the kernels on the host.
#pragma once

#include <cassert>
#include <cstring>
#include <map>
#include <string>

#include "gemma.h"

// [1] Instructions --------------------------------------------------------------------------------

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define UNROLL _Pragma("unroll")  // where registers are indexed

// c[16, 8] += a[16, 16] b[16, 8]. Lane 4g+t holds rows g and g+8 of a and of c, and column g of b.
__device__ inline void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// 16 bytes that are read once. `volatile` keeps the load above grid_dependency_wait: with
// ld.global.nc ptxas moved it below, and the overlap was lost.
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
// Programmatic dependent launch; nothing below sm_90. launch_dependents lets the next kernel start
// while this one runs. grid_dependency_wait returns when every kernel before is complete and its
// writes are visible. Before its wait a kernel may read only what no kernel of the same step writes
// (weights, the Tables that `pack` copied, K of earlier steps): anything else may be half written.
// The emulation runs kernels one behind the other, so it cannot see a read that comes too early. A
// step's first kernel is launched without the attribute, so it waits for the whole step before.
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
inline void forbid(void*, size_t) {}  // the emulation reports whoever touches these bytes
#else
#include "tests/cuda_on_cpu.h"
#endif

namespace gemma {
namespace {

[[noreturn]] void die(cudaError_t error, const char* call, const char* file, int line) {
    say(text("%s:%d: %s: %s", file, line, call, cudaGetErrorString(error)), Severity::error);
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
    bool programmatic = false;  // programmatic dependent launch: compute capability 9.0 and up
    bool first = true;          // the next launch is the first of its step
    int processors = 1;         // SMs
    // For the benchmark: runs the kernel of this name alone; counts launches and bytes by name.
    const char* only = nullptr;
    std::map<std::string, std::pair<int, double>>* profile = nullptr;
    std::map<const void*, size_t> shared_limit;  // of kernels that use more than 48 KB

    // bytes: what the kernel reads and writes at least. block: threads. shared: bytes of dynamic
    // shared memory. A step's launches differ in nothing else.
    template <class... P, class... A>
    void launch(const char* name, double bytes, void (*kernel)(P...), dim3 grid, int block,
                size_t shared, A... args) {
        assert(shared <= most_shared && block % 32 == 0);
        if (only && std::strcmp(only, name)) return;
        if (profile) {
            auto& [launches, sum] = (*profile)[name];
            launches++;
            sum += bytes;
        }
        const auto* const key = reinterpret_cast<const void*>(kernel);
        size_t& limit = shared_limit.try_emplace(key, 48 * 1024).first->second;
        if (shared > limit) {
            CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      int(shared)));
            limit = shared;
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
//
// An mma multiplies 16 tokens by 8 outputs over 16 k. It adds products, so which k it calls its
// slot 3 does not matter, as long as both sides mean the same k. That freedom makes both sides one
// 16-byte load. Of 32 k, lane 4g+t takes k = 8t .. 8t+7, for two mmas, p = 0 and p = 1:
//
//   b: a row of weights, of K, or of transposed V, as it lies in memory. Lane 4g+t, row g:
//
//        k = 8t     8t+1 | 8t+2  8t+3 | 8t+4  8t+5 | 8t+6  8t+7
//           .x of uint4  |     .y     |     .z     |     .w
//           `---- mma p = 0 ---------'  `---- mma p = 1 ------'
//
//   a: activations, kept in fragment order: 16 tokens by 32 k are 1 KB, [p][g][t] of 16 bytes. With
//      k = 8t + 4p, lane 4g+t finds in its 16 bytes:
//
//        token g: k, k+1 | token g+8: k, k+1 | token g: k+2, k+3 | token g+8: k+2, k+3
//
// Where (n, k) of activations [N, K] lies, in elements. For even k, k and k+1 are neighbours.
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
    UNROLL for (int i = 0; i < BYTES / int(sizeof(Word)); i++) {
        static_cast<Word*>(to)[i] = static_cast<const Word*>(from)[i];
    }
}

// One of the two mmas of 32 k: a is [p] of a fragment, b0 and b1 are half of a row's 16 bytes.
__device__ inline void mma_half(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    mma_m16n8k16(c, a.x, a.y, a.z, a.w, b0, b1);
}

// The two bf16 of a pair, as floats.
__device__ inline float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ inline float warp_sum(float v) {
    for (int i = 16; i; i >>= 1) v += __shfl_xor_sync(~0u, v, i);
    return v;
}

// Sum over the block. The sums of warps are added in their order, so the bits are fixed. There is
// no barrier at the end: two calls must not share `scratch` [32].
__device__ inline float block_sum(float v, float* scratch) {
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < int(blockDim.x) / 32; i++) sum += scratch[i];
    return sum;
}

struct alignas(16) Eight {  // neighbours in a row
    float v[8];
};
__device__ inline Eight load8(const float* from) {
    Eight x;
    copy<32>(x.v, from);
    return x;
}
__device__ inline void store8(float* to, const Eight& x) { copy<32>(to, x.v); }
__device__ inline Eight load8(const bf16* from) {
    uint32_t pairs[4];
    copy<16>(pairs, from);
    Eight x;
    for (int i = 0; i < 8; i++) x.v[i] = i % 2 ? high(pairs[i / 2]) : low(pairs[i / 2]);
    return x;
}

}  // namespace
}  // namespace gemma
