// SPDX-License-Identifier: Apache-2.0
//
// Tests of the emulation itself: each promise of cuda_on_cpu.h is checked with small kernels,
// correct and broken ones. A kernel that ends the program (a barrier that not all threads reach, an
// overrun) runs in a forked child.
#include "cuda_on_cpu.h"
#include "test.h"

#include <csignal>
#include <sys/wait.h>
#include <unistd.h>

using cuda_on_cpu::Order;

namespace {

struct OrderGuard {  // restores the order after a test
    ~OrderGuard() { cuda_on_cpu::set_order(Order::forward); }
};

// Device memory that frees itself.
template <class T>
struct Device {
    T* p = nullptr;
    size_t n;
    explicit Device(size_t count) : n(count) { REQUIRE(cudaMalloc(&p, n * sizeof(T)) == 0); }
    explicit Device(const std::vector<T>& v) : Device(v.size()) {
        REQUIRE(cudaMemcpy(p, v.data(), n * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
    }
    ~Device() { cudaFree(p); }
    Device(const Device&) = delete;
    std::vector<T> read() const {
        std::vector<T> v(n);
        REQUIRE(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
        return v;
    }
};

template <class K, class... A>
cudaError_t launch(K* kernel, dim3 grid, unsigned block, size_t shared, A... args) {
    const cudaLaunchConfig_t config = {grid, block, shared, nullptr, nullptr, 0};
    return cudaLaunchKernelEx(&config, kernel, args...);
}

// Runs f in a child process. Returns "" if it exits with 0, else what it wrote to stderr.
template <class F>
std::string last_words(F f) {
    int ends[2];
    REQUIRE(pipe(ends) == 0);
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        for (int s : {SIGABRT, SIGSEGV}) std::signal(s, SIG_DFL);  // instead of Catch2's report
        dup2(ends[1], 2);
        cuda_on_cpu::set_threads(1);  // fork copies the calling thread only
        f();
        _exit(0);
    }
    close(ends[1]);
    std::string said;
    char buffer[4096];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) said.append(buffer, size_t(n));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return status == 0 ? "" : said + " ";
}

uint16_t bf16_of(float x) { return uint16_t(pack_bf16(x, 0)); }

// Product ----------------------------------------------------------------------------------------

__global__ void product(const uint16_t* a, const uint16_t* b, const float* c, float* d) {
    const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
    const auto pair = [](uint16_t lo, uint16_t hi) { return uint32_t(lo) | uint32_t(hi) << 16; };
    const auto A = [&](int row, int k) { return pair(a[row * 16 + k], a[row * 16 + k + 1]); };
    const auto B = [&](int k, int column) {
        return pair(b[k * 8 + column], b[(k + 1) * 8 + column]);
    };
    float sum[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[(g + 8) * 8 + 2 * t],
                    c[(g + 8) * 8 + 2 * t + 1]};
    mma_m16n8k16(sum, A(g, 2 * t), A(g + 8, 2 * t), A(g, 2 * t + 8), A(g + 8, 2 * t + 8),
                 B(2 * t, g), B(2 * t + 8, g));
    d[g * 8 + 2 * t] = sum[0];
    d[g * 8 + 2 * t + 1] = sum[1];
    d[(g + 8) * 8 + 2 * t] = sum[2];
    d[(g + 8) * 8 + 2 * t + 1] = sum[3];
}

TEST_CASE("mma is the matrix product, by the fragments of the PTX ISA") {
    // Small integers, so that sums are exact, which differ enough to show a swapped row, column or
    // k.
    std::vector<uint16_t> a(16 * 16), b(16 * 8);
    std::vector<float> c(16 * 8), expected(16 * 8);
    const auto A = [](int row, int k) { return float((row * 7 + k * 3) % 23 - 11); };
    const auto B = [](int k, int column) { return float((k * 5 + column * 11) % 19 - 9); };
    for (int i = 0; i < 16; i++) {
        for (int k = 0; k < 16; k++) a[size_t(i * 16 + k)] = bf16_of(A(i, k));
        for (int j = 0; j < 8; j++) b[size_t(i * 8 + j)] = bf16_of(B(i, j));
        for (int j = 0; j < 8; j++) {
            float& sum = expected[size_t(i * 8 + j)];
            sum = c[size_t(i * 8 + j)] = float(1000 * i + j);
            for (int k = 0; k < 16; k++) sum += A(i, k) * B(k, j);
        }
    }
    const Device<uint16_t> da(a), db(b);
    const Device<float> dc(c), dd(16 * 8);
    REQUIRE(launch(product, 1, 32, 0, da.p, db.p, dc.p, dd.p) == cudaSuccess);
    CHECK(dd.read() == expected);
}

TEST_CASE("pack_bf16 rounds to nearest even") {
    CHECK(pack_bf16(1.f, -2.f) == 0xc0003f80u);
    CHECK(bf16_of(__uint_as_float(0x3f808000)) == 0x3f80);  // a tie: down to even
    CHECK(bf16_of(__uint_as_float(0x3f818000)) == 0x3f82);  // a tie: up to even
    CHECK(bf16_of(__uint_as_float(0x3f808001)) == 0x3f81);
    CHECK(bf16_of(INFINITY) == 0x7f80);
    CHECK(bf16_of(-NAN) == 0x7fff);
}

// Warps ------------------------------------------------------------------------------------------

__global__ void warp_functions(unsigned* out) {  // [10][blockDim]
    const unsigned i = threadIdx.x, lane = i % 32, v = 100 + i;
    const unsigned results[10] = {
        __shfl_xor_sync(~0u, v, 5),
        __shfl_sync(~0u, v, 7),
        __shfl_up_sync(~0u, v, 3),
        __shfl_down_sync(~0u, v, 3),
        __ballot_sync(~0u, lane % 3 == 0),
        unsigned(__any_sync(~0u, i == 40) + 2 * __all_sync(~0u, i >= 32)),
        __reduce_add_sync(~0u, v),
        __reduce_max_sync(~0u, v ^ 21) + 1000 * __reduce_min_sync(~0u, v ^ 21),
        unsigned(__shfl_xor_sync(~0u, double(v) * 1e6, 31) / 1e6),
        unsigned(__reduce_min_sync(~0u, -int(lane)) + 31),
    };
    for (unsigned k = 0; k < 10; k++) out[k * blockDim.x + i] = results[k];
}

TEST_CASE("warp functions, in any order of the lanes") {
    const OrderGuard guard;
    for (Order order : {Order::forward, Order::backward, Order::shuffled}) {
        cuda_on_cpu::set_order(order, 7);
        const Device<unsigned> d(10 * 64);
        REQUIRE(launch(warp_functions, 1, 64, 0, d.p) == cudaSuccess);
        const std::vector<unsigned> out = d.read();
        unsigned ballot = 0, high[2] = {}, low[2] = {~0u, ~0u}, sum[2] = {};
        for (unsigned i = 0; i < 64; i++) {
            if (i < 32 && i % 3 == 0) ballot |= 1u << i;
            sum[i / 32] += 100 + i;
            high[i / 32] = std::max(high[i / 32], (100 + i) ^ 21);
            low[i / 32] = std::min(low[i / 32], (100 + i) ^ 21);
        }
        for (unsigned i = 0; i < 64; i++) {
            const unsigned lane = i % 32, base = i - lane, w = i / 32;
            const unsigned expected[10] = {
                100 + base + (lane ^ 5),
                100 + base + 7,
                100 + (lane < 3 ? i : i - 3),
                100 + (lane + 3 < 32 ? i + 3 : i),
                ballot,
                w == 0 ? 0u : 3u,
                sum[w],
                high[w] + 1000 * low[w],
                100 + base + (lane ^ 31),
                0,
            };
            for (unsigned k = 0; k < 10; k++) CHECK(out[k * 64 + i] == expected[k]);
        }
    }
}

// Blocks -----------------------------------------------------------------------------------------

// out[block] = sum of in[block][blockDim]
__global__ void block_sum(const int* in, int* out) {
    __shared__ int partial[32];
    int v = in[blockIdx.x * blockDim.x + threadIdx.x];
    for (int m = 16; m > 0; m /= 2) v += __shfl_xor_sync(~0u, v, m);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x == 0) {
        int sum = 0;
        for (unsigned w = 0; w < blockDim.x / 32; w++) sum += partial[w];
        out[blockIdx.x] = sum;
    }
}

TEST_CASE("a block's sum; blocks over OS threads; 1 to 32 warps") {
    const OrderGuard guard;
    for (Order order : {Order::forward, Order::backward, Order::shuffled}) {
        cuda_on_cpu::set_order(order, 3);
        for (unsigned threads : {32u, 96u, 256u, 1024u, 64u}) {
            std::vector<int> in(100 * threads), expected(100);
            for (size_t i = 0; i < in.size(); i++) {
                in[i] = int(i * i % 1001);
                expected[i / threads] += in[i];
            }
            const Device<int> d(in), out(100);
            REQUIRE(launch(block_sum, 100, threads, 0, d.p, out.p) == cudaSuccess);
            CHECK(out.read() == expected);
        }
    }
}

// Each thread of each block sets its own word: the built-in variables, in three dimensions.
__global__ void coordinates(uint4* out) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    __syncthreads();
    out[block * blockDim.x + threadIdx.x] =
        make_uint4(blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
}

TEST_CASE("every thread of every block runs once") {
    const OrderGuard guard;
    for (Order order : {Order::forward, Order::backward, Order::shuffled}) {
        cuda_on_cpu::set_order(order, 12345);
        const Device<uint4> out(5 * 3 * 2 * 64);
        REQUIRE(launch(coordinates, dim3(5, 3, 2), 64, 0, out.p) == cudaSuccess);
        const std::vector<uint4> seen = out.read();
        bool right = true;
        for (unsigned i = 0; i < seen.size(); i++) {
            const unsigned b = i / 64;
            right = right && seen[i].x == b % 5 && seen[i].y == b / 5 % 3 && seen[i].z == b / 15 &&
                    seen[i].w == i % 64;
        }
        CHECK(right);
    }
}

__global__ void count(unsigned* n, int* most, unsigned long long* least) {
    atomicAdd(n, 1u);
    atomicMax(most, int(blockIdx.x * 32 + threadIdx.x));
    atomicMin(least, (1ull << 40) - threadIdx.x);
}

TEST_CASE("atomics, from several OS threads") {
    const Device<unsigned> n(std::vector<unsigned>{0});
    const Device<int> most(std::vector<int>{-1});
    const Device<unsigned long long> least(std::vector<unsigned long long>{~0ull});
    cuda_on_cpu::set_threads(4);
    REQUIRE(launch(count, 500, 32, 0, n.p, most.p, least.p) == cudaSuccess);
    cuda_on_cpu::set_threads(std::thread::hardware_concurrency());
    CHECK(n.read()[0] == 16000);
    CHECK(most.read()[0] == 15999);
    CHECK(least.read()[0] == (1ull << 40) - 31);
}

// Mistakes ---------------------------------------------------------------------------------------

// out[i] = the number of thread i's neighbour in the block, passed through shared memory.
__global__ void neighbours(int* out, bool with_barrier) {
    int* values = reinterpret_cast<int*>(dynamic_shared());
    values[threadIdx.x] = int(threadIdx.x);
    if (with_barrier) __syncthreads();
    out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

// The same between the lanes of a warp.
__global__ void lane_neighbours(int* out, bool with_barrier) {
    int* values = reinterpret_cast<int*>(dynamic_shared());
    values[threadIdx.x] = int(threadIdx.x);
    if (with_barrier) __syncwarp();
    out[threadIdx.x] = values[threadIdx.x ^ 1];
}

TEST_CASE("a missing barrier makes the result depend on the order, and a present one does not") {
    const OrderGuard guard;
    for (auto* kernel : {neighbours, lane_neighbours}) {
        for (bool with_barrier : {true, false}) {
            std::vector<std::vector<int>> results;
            for (int o = 0; o < 4; o++) {
                cuda_on_cpu::set_order(o == 0   ? Order::forward
                                       : o == 1 ? Order::backward
                                                : Order::shuffled,
                                       uint64_t(o));
                const Device<int> out(128);
                REQUIRE(launch(kernel, 1, 128, 512, out.p, with_barrier) == cudaSuccess);
                results.push_back(out.read());
            }
            for (int o = 1; o < 4; o++) CHECK((results[size_t(o)] == results[0]) == with_barrier);
            // Shared memory that is not written yet is NaN bits, not the last launch's values.
            if (!with_barrier) CHECK(results[0][0] == -1);
        }
    }
}

// Two groups of copies; the second is in flight while the first is used.
__global__ void copies(const float4* in, float* out, int waits) {
    float4* target = reinterpret_cast<float4*>(dynamic_shared());  // [2][32]
    for (unsigned stage = 0; stage < 2; stage++) {
        cp_async16(target + stage * 32 + threadIdx.x, in + stage * 32 + threadIdx.x);
        cp_async_commit();
    }
    if (waits > 0) cp_async_wait<1>();
    out[threadIdx.x] = target[threadIdx.x].w;
    if (waits > 1) cp_async_wait<0>();
    out[32 + threadIdx.x] = target[32 + threadIdx.x].w;
}

TEST_CASE("a missing cp_async_wait leaves NaN") {
    std::vector<float4> in(64);
    for (size_t i = 0; i < 64; i++) in[i].w = float(i);
    const Device<float4> d(in);
    for (int waits : {0, 1, 2}) {
        const Device<float> out(64);
        REQUIRE(launch(copies, 1, 32, 1024, d.p, out.p, waits) == cudaSuccess);
        const std::vector<float> seen = out.read();
        for (size_t i = 0; i < 64; i++) {
            if (int(i) / 32 < waits)
                CHECK(seen[i] == float(i));
            else
                CHECK(std::isnan(seen[i]));
        }
    }
}

__global__ void barrier_for_some() {
    if (threadIdx.x != 37) __syncthreads();
}
__global__ void two_barriers() {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}
__global__ void shuffle_for_some(int* out) {
    if (threadIdx.x % 32 < 16) out[0] = __shfl_sync(~0u, 1, 0);
}
__global__ void warp_leaves() {
    if (threadIdx.x >= 32) __syncthreads();
}
__global__ void half_mask(int* out) { out[threadIdx.x] = __shfl_sync(0xffff, 1, 0); }
__global__ void some_return_early(int* out) {
    if (threadIdx.x >= 20) return;
    out[threadIdx.x] = 1;
}

TEST_CASE("threads that stop at different points are named, and the program ends") {
    const Device<int> out(64);
    const auto says = [&](auto* kernel, auto... args) {
        return last_words([&] { launch(kernel, dim3(2, 1, 1), 64, 0, args...); });
    };
    const std::string some = says(barrier_for_some);
    CHECK_THAT(some, Catch::Contains("block (0, 0, 0), thread 37"));
    CHECK_THAT(some, Catch::Contains("at the kernel's end"));
    CHECK_THAT(some, Catch::Contains("thread 32 waits"));
    CHECK_THAT(some, Catch::Contains("__syncthreads"));
    CHECK_THAT(some, Catch::Contains("barrier_for_some"));
    CHECK_THAT(some, Catch::Contains("cuda_on_cpu_test.cpp"));
    CHECK_THAT(says(two_barriers), Catch::Contains("thread 0 waits"));
    CHECK_THAT(says(shuffle_for_some, out.p), Catch::Contains("__shfl_sync"));
    CHECK_THAT(says(warp_leaves), Catch::Contains("the kernel's end"));
    CHECK_THAT(says(half_mask, out.p), Catch::Contains("mask that is not full"));
    CHECK(says(some_return_early, out.p) == "");
}

__global__ void write_shared(int bytes) {
    if (threadIdx.x == 0) dynamic_shared()[bytes] = 1;
}
[[maybe_unused]] __global__ void write_global(char* p) {
    p[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}

TEST_CASE("ASan sees an overrun of dynamic shared and of device memory") {
#if defined(__SANITIZE_ADDRESS__)
    const auto shared = [](int bytes) {
        return last_words([=] { launch(write_shared, 1, 32, 1000, bytes); });
    };
    CHECK(shared(999) == "");
    CHECK_THAT(shared(1000), Catch::Contains("AddressSanitizer"));
    CHECK_THAT(shared(-1), Catch::Contains("AddressSanitizer"));
    const Device<char> d(100);
    CHECK_THAT(last_words([&] { launch(write_global, 4, 32, 0, d.p); }),
               Catch::Contains("AddressSanitizer"));
#else
    SKIP_BECAUSE("built without AddressSanitizer");
#endif
}

// Runtime ----------------------------------------------------------------------------------------

__global__ void add(int* p, int n) { atomicAdd(p, n); }

TEST_CASE("a graph does nothing when captured and everything when launched") {
    const Device<int> d(std::vector<int>{0});
    int host = 0;
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
    REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
    for (int n : {1, 10}) {
        const cudaLaunchConfig_t config = {1, 32, 0, stream, nullptr, 0};
        REQUIRE(cudaLaunchKernelEx(&config, add, d.p, n) == cudaSuccess);
    }
    REQUIRE(cudaMemcpyAsync(&host, d.p, 4, cudaMemcpyDeviceToHost, stream) == cudaSuccess);
    CHECK(cudaStreamSynchronize(stream) == cudaErrorStreamCaptureUnsupported);
    int* more = nullptr;
    CHECK(cudaMalloc(&more, 4) == cudaErrorStreamCaptureUnsupported);
    REQUIRE(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
    REQUIRE(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess);
    REQUIRE(cudaGraphDestroy(graph) == cudaSuccess);
    CHECK(d.read()[0] == 0);
    for (int times : {1, 2}) {
        REQUIRE(cudaGraphLaunch(exec, stream) == cudaSuccess);
        CHECK(host == times * 11 * 32);
    }
    CHECK(cudaGetLastError() == cudaErrorStreamCaptureUnsupported);
    CHECK(cudaGetLastError() == cudaSuccess);
    cudaGraphExecDestroy(exec);
    cudaStreamDestroy(stream);
}

TEST_CASE("launches that our GPUs would refuse are refused with a message") {
    const auto refused = [](dim3 grid, unsigned block, size_t shared) {
        return launch(write_shared, grid, block, shared, 0) == cudaErrorInvalidValue;
    };
    CHECK(refused(0, 32, 64));
    CHECK(refused(dim3(1, 65536), 32, 64));
    CHECK(refused(dim3(1, 1, 65536), 32, 64));
    CHECK(refused(1, 0, 64));
    CHECK(refused(1, 1056, 64));
    CHECK(refused(1, 33, 64));
    CHECK(refused(1, 32, 49153));
    CHECK_THAT(cudaGetErrorString(cudaGetLastError()), Catch::Contains("49153 bytes"));
    const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    CHECK(cudaFuncSetAttribute(write_shared, limit, 101'377) == cudaErrorInvalidValue);
    CHECK(cudaFuncSetAttribute(write_shared, limit, 101'376) == cudaSuccess);
    CHECK(!refused(1, 32, 101'376));
    CHECK(refused(1, 32, 101'377));
    CHECK(cudaGetLastError() == cudaErrorInvalidValue);
}

TEST_CASE("device memory: unwritten is NaN, and it runs out") {
    const Device<float> d(3);
    for (float x : d.read()) CHECK(std::isnan(x));
    size_t unused = 0, total = 0;
    REQUIRE(cudaMemGetInfo(&unused, &total) == cudaSuccess);
    CHECK(total - unused >= 12);
    CHECK(total - unused < 100);
    char* p = nullptr;
    CHECK(cudaMalloc(&p, total) == cudaErrorMemoryAllocation);
    CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);
}

TEST_CASE("intrinsics") {
    float sine = 0, cosine = 0;
    sincospif(0.25f, &sine, &cosine);
    CHECK(sine == Approx(std::sqrt(0.5)));
    sincospif(1e6f + 1, &sine, &cosine);
    CHECK(std::fabs(sine) < 1e-12f);
    CHECK(cosine == -1);
    CHECK(__umul64hi(1ull << 63, 6) == 3);
    CHECK(__clz(0) == 32);
    CHECK(__clzll(1) == 63);
    CHECK(__popc(0xf0f0u) == 8);
    CHECK(rsqrtf(4) == 0.5f);
    CHECK(min(3u, 5) == 3);
    CHECK(max(-2.f, 1.f) == 1.f);
}

}
