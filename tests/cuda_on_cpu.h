// SPDX-License-Identifier: Apache-2.0
//
// cuda_on_cpu.h: just enough of CUDA to compile gemma.cu as C++ and run its launchers on the host,
// under ASan and UBSan, in gdb, in CI. It is for testing and teaching, never for serving.
//
//     grid   its blocks are divided among OS threads; each OS thread is a "multiprocessor" that
//            runs one block at a time
//     block  its threads are fibers of that OS thread, so no two run at the same time
//     warp   32 fibers that run one after another, each to its next meeting point
//
// A meeting point is whatever makes a thread wait: a warp function, __syncthreads or the kernel's
// end. Between two meeting points each thread runs exactly once, in an order that set_order
// chooses; if a result depends on the order, a barrier is missing. All lanes of a warp must stop at
// the same point and all warps at the same __syncthreads; otherwise the program aborts and prints
// which threads stopped where.
//
// Unwritten memory is NaN: device memory, dynamic shared memory (before each block) and the target
// of a cp.async until its wait. __shared__ arrays are not reset: they keep what the block before
// left in them. Blocks cannot wait for each other. A stream runs each operation during the call
// that enqueues it.
//
// CUDA_ON_CPU_THREADS=1 runs all on the calling thread, for gdb: break in a kernel, print
// threadIdx. CUDA_ON_CPU_BYTES is the size of the device's memory, 1 GiB when not set.
#pragma once

#include <malloc.h>
#include <semaphore.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <numeric>
#include <source_location>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// [1] The language -------------------------------------------------------------------------------

#define UNROLL
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static thread_local  // an OS thread runs one block at a time

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
template <class T>
struct alignas(8) CudaVector2 {
    T x, y;
};
template <class T>
struct alignas(16) CudaVector4 {
    T x, y, z, w;
};
using int2 = CudaVector2<int>;
using uint2 = CudaVector2<unsigned>;
using float2 = CudaVector2<float>;
using int4 = CudaVector4<int>;
using uint4 = CudaVector4<unsigned>;
using float4 = CudaVector4<float>;
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

constinit inline thread_local uint3 threadIdx = {}, blockIdx = {};
constinit inline thread_local dim3 blockDim = {}, gridDim = {};

namespace cuda_on_cpu {

// [2] Fibers -------------------------------------------------------- a stack and a way to leave it

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || !defined(__OPTIMIZE__)
constexpr size_t stack_bytes = 256 << 10;  // sanitizers and -O0 make frames several times larger
#else
constexpr size_t stack_bytes = 64 << 10;
#endif
constexpr unsigned warp_size = 32;
constexpr size_t max_shared = 101'376;     // 99 KB, the most that a block can have on an L4
constexpr size_t default_shared = 49'152;  // the most without cudaFuncSetAttribute

struct Warp;
struct Multiprocessor;

struct Copy {  // a pending cp.async
    void* target;
    const void* source;
    int group;
};

struct Fiber {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    Warp* warp = nullptr;
    unsigned index = 0;  // threadIdx.x
    void* stack = nullptr;
    size_t bytes = stack_bytes;
    // ASan: the fake stack while the fiber is suspended. TSan: its handle.
    void* sanitizer = nullptr;
    int groups = 0;            // of cp.async, committed so far
    std::vector<Copy> copies;  // pending, oldest first
};

constinit inline thread_local Fiber* current = nullptr;

#if defined(__x86_64__)
// Saves the registers that a call must preserve on this stack, then continues where the other stack
// was left. (It does not save the floating-point control words: all fibers have the same.)
[[gnu::naked, gnu::noipa]] inline void switch_stack(void** /*keep*/, void* /*resume*/) {
    asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
        "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
        "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
#endif

// Suspends the running fiber and continues `to`; returns when the suspended one is resumed.
inline void resume(Fiber& to) {
    Fiber& from = *current;
    if (&to == &from) return;
    current = &to;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.sanitizer, to.stack, to.bytes);
#elif defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(to.sanitizer, 0);
#endif
#if defined(__x86_64__)
    switch_stack(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#endif
    threadIdx.x = from.index;
}

// [3] Warps and blocks ------------------------------------------------------------ meeting points

struct Place {
    const char* what;
    std::source_location where;
    bool of_block = false;  // __syncthreads and the end: all warps meet
    bool operator==(const Place& o) const {
        return what == o.what && where.line() == o.where.line() &&
               where.column() == o.where.column();
    }
};

// Values that the lanes of a warp exchange at a meeting point.
union Exchange {
    uint64_t value[warp_size];
    struct {
        uint32_t a[16][8];  // [row][pair of k]
        uint32_t b[8][8];   // [pair of k][column]
        float d[16][8];     // [row][column]
    } mma;
};

struct Warp {
    Exchange exchange[2];  // alternating: some lanes still read one while others fill the next
    unsigned meetings = 0, arrived = 0;
    Place place = {};          // where lanes are now arriving
    unsigned first = 0;        // the thread that arrived first
    uint8_t order[warp_size];  // of lanes
    Fiber* lanes = nullptr;    // [32]
    Multiprocessor* block = nullptr;
};

enum class Order { forward, backward, shuffled };
inline Order thread_order = Order::forward;
inline uint64_t order_seed = 0;
inline unsigned os_threads = [] {
    const char* given = std::getenv("CUDA_ON_CPU_THREADS");
    return std::max(1u, given ? unsigned(std::atoi(given)) : std::thread::hardware_concurrency());
}();

// Sets the order for later launches. Must not be called while a kernel runs.
inline void set_order(Order order, uint64_t seed = 0) { thread_order = order, order_seed = seed; }
inline void set_threads(unsigned count) { os_threads = std::max(1u, count); }

struct Launch {
    dim3 grid, block;
    size_t shared = 0;
    std::function<void()> kernel;  // with its arguments bound
};

[[noreturn]] inline void die(const std::string& why) {
    std::fprintf(stderr, "cuda_on_cpu: block (%u, %u, %u), thread %u: %s\n", blockIdx.x, blockIdx.y,
                 blockIdx.z, threadIdx.x, why.c_str());
    std::abort();
}

inline std::string describe(const Place& p) {
    if (!p.where.line()) return p.what;
    return std::string(p.what) + " (" + p.where.file_name() + ":" + std::to_string(p.where.line()) +
           ", in " + p.where.function_name() + ")";
}

// Checks that a lane (or a warp) arrives at the same place as the first one of its warp (or block).
inline void agree(unsigned arrived, const Place& place, unsigned thread, Place& all,
                  unsigned& first) {
    if (arrived == 0)
        all = place, first = thread;
    else if (!(place == all)) [[unlikely]]
        die("is at " + describe(place) + ", but thread " + std::to_string(first) +
            " waits for it at " + describe(all));
}

void live();

// The part of the device that one OS thread is: it runs one block after another.
struct Multiprocessor {
    static constexpr size_t redzone = 256;
    alignas(256) char shared[redzone + max_shared + redzone];
    std::vector<Fiber> fibers = std::vector<Fiber>(1024);  // stacks are made when first needed
    std::vector<Warp> warps = std::vector<Warp>(1024 / warp_size);
    Fiber host;  // the OS thread's own stack, which starts the block
    const Launch* launch = nullptr;
    unsigned fibers_made = 0, warp_count = 0, arrived = 0;  // arrived: warps at the place
    Place place = {};
    unsigned first = 0;
    uint8_t order[warp_size];  // of warps
    uint64_t random = 1;

    void run(const Launch& what, uint3 block) {
        current = &host;
        launch = &what;
        blockIdx = block;
        blockDim = what.block;
        gridDim = what.grid;
        while (fibers_made < blockDim.x) make_fiber(fibers_made++);
#if defined(__SANITIZE_ADDRESS__)
        __asan_poison_memory_region(shared, sizeof shared);
        __asan_unpoison_memory_region(shared + redzone, what.shared);
#endif
        std::memset(shared + redzone, 0xff, what.shared);
        random =
            (order_seed + 1) * 0x9e3779b97f4a7c15 + block.x + block.y * 7919 + block.z * 104729;
        warp_count = blockDim.x / warp_size;
        arrange(order, warp_count);
        for (unsigned i = 0; i < warp_count; i++) arrange(warps[i].order, warp_size);
        // Returns when the last thread has ended.
        resume(warps[order[0]].lanes[warps[order[0]].order[0]]);
    }

    void arrange(uint8_t* items, unsigned count) {
        for (unsigned i = 0; i < count; i++)
            items[i] = uint8_t(thread_order == Order::backward ? count - 1 - i : i);
        for (unsigned i = count; i-- > 1 && thread_order == Order::shuffled;) {
            random ^= random << 13, random ^= random >> 7, random ^= random << 17;
            std::swap(items[i], items[random % (i + 1)]);
        }
    }

    // All lanes of this warp have arrived at a place of the block. Continues with the next warp,
    // or, once all have arrived, with the first.
    void next_warp(Warp& warp) {
        agree(arrived, warp.place, warp.first, place, first);
        if (++arrived == warp_count) {
            arrived = 0;
            if (!place.where.line()) return resume(host);  // the end
            if (thread_order == Order::shuffled) arrange(order, warp_count);
        }
        Warp& next = warps[order[arrived]];
        resume(next.lanes[next.order[0]]);
    }

    void make_fiber(unsigned index) {
        Fiber& fiber = fibers[index];
        fiber.index = index;
        fiber.warp = &warps[index / warp_size];
        fiber.warp->block = this;
        fiber.warp->lanes = &fibers[index / warp_size * warp_size];
        // The lowest page stays inaccessible, so a stack that overflows ends the program.
        void* memory = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) die("no memory for a stack");
        mprotect(memory, 4096, PROT_NONE);
        fiber.stack = memory;
#if defined(__SANITIZE_THREAD__)
        host.sanitizer = __tsan_get_current_fiber();
        fiber.sanitizer = __tsan_create_fiber(0);
#endif
#if defined(__x86_64__)
        // Stack tops get different offsets into a page: with equal ones the frames of all fibers
        // would compete for the same few cache sets.
        char* top = static_cast<char*>(memory) + stack_bytes - index * 832 % 8192 - 64;
        void** frame = reinterpret_cast<void**>(top) - 8;  // 6 registers, return address, a gap
        frame[6] = reinterpret_cast<void*>(&live);
        fiber.stack_pointer = frame;
#else
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = memory;
        fiber.context.uc_stack.ss_size = stack_bytes;
        makecontext(&fiber.context, &live, 0);
#endif
    }

    ~Multiprocessor() {
        for (unsigned i = 0; i < fibers_made; i++) {
#if defined(__SANITIZE_ADDRESS__)
            __asan_unpoison_memory_region(fibers[i].stack, stack_bytes);
#elif defined(__SANITIZE_THREAD__)
            __tsan_destroy_fiber(fibers[i].sanitizer);
#endif
            munmap(fibers[i].stack, stack_bytes);
        }
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(shared, sizeof shared);
#endif
    }
};

inline Multiprocessor& multiprocessor() {
    static thread_local Multiprocessor mine;
    return mine;
}

// Stops the running thread until all of its warp (and of its block, if place.of_block) have
// arrived. The last lane to arrive calls `finish` before any lane continues.
template <class Finish>
inline void meet(const Place& place, Finish finish) {
    Warp& warp = *current->warp;
    agree(warp.arrived, place, current->index, warp.place, warp.first);
    if (++warp.arrived < warp_size) return resume(warp.lanes[warp.order[warp.arrived]]);
    finish();
    warp.arrived = 0;
    warp.meetings++;
    if (thread_order == Order::shuffled) warp.block->arrange(warp.order, warp_size);
    if (place.of_block) return warp.block->next_warp(warp);
    resume(warp.lanes[warp.order[0]]);
}

inline Exchange& exchange() { return current->warp->exchange[current->warp->meetings & 1]; }

// The body of a fiber: runs the kernel, meets at its end, and when resumed there runs the kernel
// for the next block.
inline void live() {
    Multiprocessor& block = *current->warp->block;
#if defined(__SANITIZE_ADDRESS__)
    // The first fiber is entered from the host: ASan then reports the bounds of the host's stack.
    void** stack = block.host.stack ? nullptr : &block.host.stack;
    __sanitizer_finish_switch_fiber(nullptr, const_cast<const void**>(stack), &block.host.bytes);
#endif
    for (;;) {
        threadIdx.x = current->index;
        block.launch->kernel();
        current->copies.clear();
        meet({"the kernel's end", {}, true}, [] {});
    }
}

// [4] Grids ------------------------------------------------------------ blocks over OS threads

class Device {
  public:
    Device() { sem_init(&start, 0, 0), sem_init(&done, 0, 0); }

    void run(const Launch& what) {
        std::lock_guard one_grid_at_a_time(mutex);
        launch = &what;
        blocks = uint64_t(what.grid.x) * what.grid.y * what.grid.z;
        // Shuffled, the i-th block to run is i * stride (modulo blocks): a permutation, because
        // stride and blocks share no factor.
        stride = thread_order == Order::shuffled ? order_seed % blocks + blocks / 2 + 1 : 1;
        while (std::gcd(stride, blocks) != 1) stride++;
        next = 0;
        // Waking other OS threads costs some 50 us: do so only if the first block took so long that
        // the rest is worth it.
        const auto began = std::chrono::steady_clock::now();
        take_block();
        const auto rest = (std::chrono::steady_clock::now() - began) * (blocks - 1);
        const bool alone = rest < std::chrono::microseconds(100);
        const unsigned helpers = alone ? 0 : unsigned(std::min<uint64_t>(os_threads, blocks)) - 1;
        while (threads.size() < helpers) threads.emplace_back([this] { help(); });
        for (unsigned i = 0; i < helpers; i++) sem_post(&start);
        while (take_block()) continue;
        for (unsigned i = 0; i < helpers; i++) wait(done);
    }

    ~Device() {
        launch = nullptr;
        for (size_t i = 0; i < threads.size(); i++) sem_post(&start);
        for (std::thread& t : threads) t.join();
    }

  private:
    static void wait(sem_t& semaphore) {
        while (sem_wait(&semaphore) != 0) continue;  // interrupted by a signal
    }

    void help() {
        for (wait(start); launch; wait(start)) {
            while (take_block()) continue;
            sem_post(&done);
        }
    }

    bool take_block() {
        uint64_t i = next++;
        if (i >= blocks) return false;
        if (thread_order == Order::backward) i = blocks - 1 - i;
        i = i * stride % blocks;
        const dim3 g = launch->grid;
        multiprocessor().run(*launch,
                             {unsigned(i % g.x), unsigned(i / g.x % g.y), unsigned(i / g.x / g.y)});
        return true;
    }

    std::mutex mutex;
    sem_t start, done;  // not std::counting_semaphore: libstdc++'s can lose a wake-up
    std::vector<std::thread> threads;
    std::atomic<uint64_t> next = 0;
    uint64_t blocks = 0, stride = 1;
    const Launch* launch = nullptr;  // null: the threads end
};
inline Device device;

inline unsigned lane() { return current->index % warp_size; }

template <class T>
inline T shuffle(unsigned mask, const Place& place, T v, unsigned from) {
    static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8);
    if (mask != ~0u) die("a mask that is not full at " + describe(place));
    Exchange& x = exchange();
    std::memcpy(&x.value[lane()], &v, sizeof v);
    meet(place, [] {});
    std::memcpy(&v, &x.value[from % warp_size], sizeof v);
    return v;
}

template <class T, class Fold>
inline T reduce(unsigned mask, const Place& place, T v, Fold fold) {
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
    if (mask != ~0u) die("a mask that is not full at " + describe(place));
    Exchange& x = exchange();
    x.value[lane()] = uint64_t(v);
    meet(place, [&] {
        for (unsigned i = 1; i < warp_size; i++)
            x.value[0] = uint64_t(fold(T(x.value[0]), T(x.value[i])));
    });
    return T(x.value[0]);
}

// d = a b, each sum in the order of k. Products of bf16 are exact in fp32, so fused and unfused
// multiply-adds agree. Nearly all time is spent here, so it is written for vectors and excluded
// from the sanitizers: no kernel's bug shows in it.
[[gnu::optimize("O3"), gnu::no_sanitize("address", "undefined"), gnu::noinline]] inline void
multiply(Exchange& x) {
    using Floats [[gnu::vector_size(32)]] = float;
    using Words [[gnu::vector_size(32)]] = uint32_t;
    const auto split = [](const uint32_t* pairs, Floats& even, Floats& odd) {
        Words w;
        std::memcpy(&w, pairs, sizeof w);
        even = (Floats)(w << 16);
        odd = (Floats)(w & 0xffff0000u);
    };
    Floats b[8][2], a[16][2];
    for (int p = 0; p < 8; p++) split(x.mma.b[p], b[p][0], b[p][1]);
    for (int row = 0; row < 16; row++) split(x.mma.a[row], a[row][0], a[row][1]);
    for (int row = 0; row < 16; row += 4) {
        Floats sum[4] = {};
        for (int p = 0; p < 8; p++)
            for (int i = 0; i < 4; i++) {
                sum[i] += a[row + i][0][p] * b[p][0];
                sum[i] += a[row + i][1][p] * b[p][1];
            }
        std::memcpy(x.mma.d[row], sum, sizeof sum);
    }
}

inline void need_16(const void* p, const char* what) {
    if (reinterpret_cast<uintptr_t>(p) % 16) die(std::string(what) + " needs 16-byte alignment");
}

// [5] What a kernel can call ------------------------------------------- by CUDA's and PTX's names

// CUDA's names are global: the using-directive at the end makes these global too. `where` is the
// caller's source location, for die().
namespace cuda {

#define HERE std::source_location where = std::source_location::current()

inline char* dynamic_shared() {
    return current->warp->block->shared + cuda_on_cpu::Multiprocessor::redzone;
}

inline void __syncthreads(HERE) {
    meet({"__syncthreads", where, true}, [] {});
}

inline int __syncthreads_count(int predicate, HERE) {
    static thread_local int count;
    if (threadIdx.x == 0) count = 0;
    meet({"__syncthreads_count", where, true}, [] {});
    count += predicate != 0;
    meet({"__syncthreads_count", where, true}, [] {});
    const int all = count;
    meet({"__syncthreads_count", where, true}, [] {});
    return all;
}

inline void __syncwarp(unsigned mask = ~0u, HERE) { shuffle(mask, {"__syncwarp", where}, 0, 0); }

// The width w divides the warp into segments of w lanes. A lane that asks for one outside its
// segment gets its own value.
inline auto __shfl_sync(unsigned mask, auto v, int source, int width = 32, HERE) {
    const unsigned w = unsigned(width), from = (lane() & -w) + (unsigned(source) & (w - 1));
    return shuffle(mask, {"__shfl_sync", where}, v, from);
}
inline auto __shfl_xor_sync(unsigned mask, auto v, int lane_mask, int width = 32, HERE) {
    const unsigned w = unsigned(width), from = lane() ^ unsigned(lane_mask);
    return shuffle(mask, {"__shfl_xor_sync", where}, v, from < (lane() & -w) + w ? from : lane());
}
inline auto __shfl_up_sync(unsigned mask, auto v, unsigned delta, int width = 32, HERE) {
    const bool inside = (lane() & (unsigned(width) - 1)) >= delta;
    return shuffle(mask, {"__shfl_up_sync", where}, v, inside ? lane() - delta : lane());
}
inline auto __shfl_down_sync(unsigned mask, auto v, unsigned delta, int width = 32, HERE) {
    const bool inside = (lane() & (unsigned(width) - 1)) + delta < unsigned(width);
    return shuffle(mask, {"__shfl_down_sync", where}, v, inside ? lane() + delta : lane());
}

inline unsigned __ballot_sync(unsigned mask, int predicate, HERE) {
    const unsigned bit = predicate ? 1u << lane() : 0;
    return reduce(mask, {"__ballot_sync", where}, bit,
                  [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, HERE) {
    return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, HERE) {
    return __ballot_sync(mask, predicate, where) == ~0u;
}
template <class T>
inline T __reduce_add_sync(unsigned mask, T v, HERE) {
    const auto add = [](T a, T b) { return T(unsigned(a) + unsigned(b)); };
    return reduce(mask, {"__reduce_add_sync", where}, v, add);
}
inline auto __reduce_max_sync(unsigned mask, auto v, HERE) {
    return reduce(mask, {"__reduce_max_sync", where}, v,
                  [](auto a, auto b) { return a > b ? a : b; });
}
inline auto __reduce_min_sync(unsigned mask, auto v, HERE) {
    return reduce(mask, {"__reduce_min_sync", where}, v,
                  [](auto a, auto b) { return a < b ? a : b; });
}

// Atomics exist for integers only: a sum of floats would depend on the order of the threads. They
// are sequentially consistent, so __threadfence has nothing to do.
template <class T>
concept AtomicInteger =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;
template <AtomicInteger T, class Change>
inline T change(T* p, Change to) {
    std::atomic_ref<T> value(*p);
    T old = value.load();
    while (!value.compare_exchange_weak(old, to(old))) {
    }
    return old;
}
template <AtomicInteger T>
inline T atomicAdd(T* p, std::type_identity_t<T> v) {
    return std::atomic_ref<T>(*p).fetch_add(v);
}
template <AtomicInteger T>
inline T atomicMax(T* p, std::type_identity_t<T> v) {
    return change(p, [v](T old) { return std::max(old, v); });
}
template <AtomicInteger T>
inline T atomicMin(T* p, std::type_identity_t<T> v) {
    return change(p, [v](T old) { return std::min(old, v); });
}
inline void __threadfence() {}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32. Lane 4g + t holds rows g and g+8 of a,
// column g of b, k 2t, 2t+1 and 2t+8, 2t+9; and of c rows g and g+8, columns 2t and 2t+1.
inline void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                         uint32_t b0, uint32_t b1, HERE) {
    Exchange& x = exchange();
    const unsigned g = lane() / 4, t = lane() % 4;
    x.mma.a[g][t] = a0;
    x.mma.a[g + 8][t] = a1;
    x.mma.a[g][t + 4] = a2;
    x.mma.a[g + 8][t + 4] = a3;
    x.mma.b[t][g] = b0;
    x.mma.b[t + 4][g] = b1;
    meet({"mma_m16n8k16", where}, [&] { multiply(x); });
    c[0] += x.mma.d[g][2 * t];
    c[1] += x.mma.d[g][2 * t + 1];
    c[2] += x.mma.d[g + 8][2 * t];
    c[3] += x.mma.d[g + 8][2 * t + 1];
}

inline uint4 load_stream(const void* p) {
    need_16(p, "load_stream");
    return *static_cast<const uint4*>(p);
}

// The copy happens at the wait that covers it, so that a kernel without that wait reads NaN.
inline void cp_async16(void* shared_target, const void* global_source) {
    need_16(shared_target, "cp_async16's target");
    need_16(global_source, "cp_async16's source");
    // ASan checks this read of the source.
    [[maybe_unused]] volatile char seen = static_cast<const char*>(global_source)[15];
    std::memset(shared_target, 0xff, 16);
    Fiber& me = *current;
    me.copies.push_back({shared_target, global_source, me.groups});
}

inline void cp_async_commit() { current->groups++; }

template <int N>
inline void cp_async_wait() {
    Fiber& me = *current;
    size_t n = 0;
    for (; n < me.copies.size() && me.copies[n].group < me.groups - N; n++)
        std::memcpy(me.copies[n].target, me.copies[n].source, 16);
    me.copies.erase(me.copies.begin(), me.copies.begin() + std::ptrdiff_t(n));
}

// Programmatic dependent launch: on the host a kernel starts when the one before it has ended.
inline void grid_dependency_wait() {}
inline void launch_dependents() {}

// Makes ASan report any access to these bytes: the gaps between the parts of an arena.
inline void forbid([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(p, bytes);
#endif
}

// Rounds to nearest even; a NaN becomes 0x7fff, as on the GPU.
inline uint32_t pack_bf16(float lo, float hi) {
    const auto round = [](float x) -> uint32_t {
        const uint32_t bits = std::bit_cast<uint32_t>(x);
        return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    };
    return round(lo) | round(hi) << 16;
}

}
}

using namespace cuda_on_cpu::cuda;

// Conversions between bits and numbers. They are not in the namespace, since some C libraries
// declare some of them too.
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __clzll(long long x) { return std::countl_zero((unsigned long long)x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) noexcept { return float(1 / std::sqrt(double(x))); }
inline void sincospif(float x, float* sine, float* cosine) {
    const double r = std::remainder(double(x), 2.0) * 3.14159265358979323846;
    *sine = float(std::sin(r));
    *cosine = float(std::cos(r));
}
inline auto __ldg(const auto* p) { return *p; }
// Like fminf and fmaxf: for a NaN and a number the result is the number.
template <class A, class B, class T = std::common_type_t<A, B>>
constexpr T min(A a, B b) {
    return T(b) < T(a) || T(a) != T(a) ? T(b) : T(a);
}
template <class A, class B, class T = std::common_type_t<A, B>>
constexpr T max(A a, B b) {
    return T(b) > T(a) || T(a) != T(a) ? T(b) : T(a);
}

// [6] What the host can call ------------------------------------------------- the runtime's names

namespace cuda_on_cpu {
namespace cuda {

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaHostAllocDefault = 0;

using Event = std::chrono::steady_clock::time_point;
using Graph = std::vector<std::function<void()>>;
struct Stream {
    Graph* capturing = nullptr;
};
using cudaStream_t = Stream*;
using cudaEvent_t = Event*;
using cudaGraph_t = Graph*;
using cudaGraphExec_t = Graph*;

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    union {
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlockOptin;
    int major, minor, multiProcessorCount, l2CacheSize;
};

}

// Less memory than a real device has, since all that is allocated is filled with NaN.
inline const size_t memory_total = [] {
    const char* given = std::getenv("CUDA_ON_CPU_BYTES");
    return given ? size_t(std::atoll(given)) : size_t(1) << 30;
}();
inline std::atomic<size_t> memory_used = 0;

inline std::mutex shared_limits_mutex;
inline std::map<const void*, size_t> shared_limits;  // by kernel, as set by cudaFuncSetAttribute

inline thread_local cuda::cudaError_t error = cuda::cudaSuccess;  // for cudaGetLastError
inline thread_local std::string error_text;                       // of this thread's last error
// Captures that this thread has begun; it then may not wait or allocate.
inline thread_local int captures = 0;

inline cuda::cudaError_t fail(cuda::cudaError_t code, const std::string& why) {
    error_text = "cuda_on_cpu: " + why;
    return error = code;
}

inline cuda::cudaError_t outside_capture() {
    return captures ? fail(cuda::cudaErrorStreamCaptureUnsupported, "not while a stream captures")
                    : cuda::cudaSuccess;
}

// Does the work at once, or, if the stream is capturing, adds it to the graph.
inline cuda::cudaError_t enqueue(cuda::Stream* stream, std::function<void()> work) {
    if (stream && stream->capturing)
        stream->capturing->push_back(std::move(work));
    else
        work();
    return cuda::cudaSuccess;
}

inline void* allocate(size_t bytes) {
    void* block = nullptr;
    return posix_memalign(&block, 256, bytes) ? nullptr : std::memset(block, 0xff, bytes);
}

namespace cuda {

inline const char* cudaGetErrorString(cudaError_t e) {
    return e == cudaSuccess ? "no error" : error_text.c_str();
}
inline cudaError_t cudaGetLastError() { return std::exchange(error, cudaSuccess); }

inline cudaError_t cudaGetDeviceCount(int* n) {
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    *n = !visible || *visible;
    return *n ? cudaSuccess : fail(cudaErrorNoDevice, "no CUDA-capable device is detected");
}
inline cudaError_t cudaGetDevice(int* i) { return *i = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int i) {
    return i == 0 ? cudaSuccess : fail(cudaErrorInvalidValue, "there is only device 0");
}
inline cudaError_t cudaDriverGetVersion(int* v) { return *v = 12040, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* v) { return *v = 12040, cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
    *p = {"CUDA on the CPU", memory_total, max_shared, 9, 0, 2, 1 << 20};
    return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
    *total = memory_total;
    *unused = memory_total - std::min<size_t>(memory_used, memory_total);
    return cudaSuccess;
}

template <class T>
inline cudaError_t cudaMalloc(T** p, size_t bytes) {
    *p = nullptr;
    if (const cudaError_t e = outside_capture()) return e;
    if (bytes <= memory_total - std::min<size_t>(memory_used, memory_total))
        *p = static_cast<T*>(allocate(bytes));
    if (!*p) return fail(cudaErrorMemoryAllocation, "out of memory");
    memory_used += malloc_usable_size(*p);
    return cudaSuccess;
}
inline cudaError_t cudaFree(void* p) {
    if (const cudaError_t e = outside_capture()) return e;
    memory_used -= malloc_usable_size(p);
    return std::free(p), cudaSuccess;
}
template <class T>
inline cudaError_t cudaMallocHost(T** p, size_t bytes, unsigned = 0) {
    *p = static_cast<T*>(allocate(bytes));
    return *p ? cudaSuccess : fail(cudaErrorMemoryAllocation, "out of host memory");
}
template <class T>
inline cudaError_t cudaHostAlloc(T** p, size_t bytes, unsigned) {
    return cudaMallocHost(p, bytes);
}
inline cudaError_t cudaFreeHost(void* p) { return std::free(p), cudaSuccess; }

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream = nullptr) {
    return enqueue(stream, [=] { std::memmove(to, from, bytes); });
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    return captures ? outside_capture() : cudaMemcpyAsync(to, from, bytes, kind);
}
inline cudaError_t cudaMemsetAsync(void* p, int v, size_t bytes, cudaStream_t stream = nullptr) {
    return enqueue(stream, [=] { std::memset(p, v, bytes); });
}
inline cudaError_t cudaMemset(void* p, int v, size_t bytes) {
    return captures ? outside_capture() : cudaMemsetAsync(p, v, bytes);
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) {
    return *s = new Stream, cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t s) { return delete s, cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned = 0) {
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return outside_capture(); }
inline cudaError_t cudaDeviceSynchronize() { return outside_capture(); }

inline cudaError_t cudaEventCreate(cudaEvent_t* e) { return *e = new Event, cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return cudaEventCreate(e); }
inline cudaError_t cudaEventDestroy(cudaEvent_t e) { return delete e, cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return outside_capture(); }
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t stream = nullptr) {
    return enqueue(stream, [e] { *e = std::chrono::steady_clock::now(); });
}
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
    *ms = std::chrono::duration<float, std::milli>(*to - *from).count();
    return cudaSuccess;
}

// A graph is the list of operations that were enqueued on a stream, with their arguments by value.
inline cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    if (!s || s->capturing) return fail(cudaErrorInvalidValue, "this stream cannot capture");
    s->capturing = new Graph;
    captures++;
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
    *graph = nullptr;
    if (!s || !s->capturing) return fail(cudaErrorInvalidValue, "this stream does not capture");
    *graph = std::exchange(s->capturing, nullptr);
    captures--;
    return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long = 0) {
    return *e = new Graph(*g), cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t stream) {
    for (const auto& work : *e) enqueue(stream, work);
    return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t g) { return delete g, cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) { return delete e, cudaSuccess; }

template <class Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    if (bytes < 0 || size_t(bytes) > max_shared)
        return fail(cudaErrorInvalidValue, std::to_string(bytes) + " bytes of shared memory");
    std::lock_guard lock(shared_limits_mutex);
    shared_limits[reinterpret_cast<const void*>(kernel)] = size_t(bytes);
    return cudaSuccess;
}

template <class... P, class... A>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...),
                                      A&&... args) {
    const dim3 g = c->gridDim, b = c->blockDim;
    const auto text = [](dim3 d) {
        return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
    };
    if (!g.x || !g.y || !g.z || g.x > 0x7fffffff || g.y > 65535 || g.z > 65535)
        return fail(cudaErrorInvalidValue, "a grid of " + text(g));
    if (!b.x || b.x > 1024 || b.x % warp_size || b.y != 1 || b.z != 1)
        return fail(cudaErrorInvalidValue, "a block of " + text(b));
    {
        std::lock_guard lock(shared_limits_mutex);
        const auto set = shared_limits.find(reinterpret_cast<const void*>(kernel));
        if (c->dynamicSmemBytes > (set == shared_limits.end() ? default_shared : set->second))
            return fail(cudaErrorInvalidValue, std::to_string(c->dynamicSmemBytes) +
                                                   " bytes of dynamic shared memory, more than "
                                                   "cudaFuncSetAttribute allowed this kernel");
    }
    const std::tuple<std::remove_cv_t<P>...> values(std::forward<A>(args)...);
    const Launch launch = {g, b, c->dynamicSmemBytes, [=] { std::apply(kernel, values); }};
    return enqueue(c->stream, [launch] { device.run(launch); });
}

#undef HERE
}
}
