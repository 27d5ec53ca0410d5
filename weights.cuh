// SPDX-License-Identifier: Apache-2.0
//
// weights.cuh: whether there is a GPU, its memory, and the weights' way into it. Beside the path;
// included by gemma.cu.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "machine.cuh"

namespace gemma {
namespace {

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
        data = nullptr;
        size = 0;
    }
    // Room for `count` at least; what was there is lost. True: data moved.
    bool reserve(size_t count) {
        if (count <= size) return false;
        if (!try_reserve(count)) die(cudaErrorMemoryAllocation, "reserve", __FILE__, __LINE__);
        return true;
    }
    // False: there is no memory for it.
    bool try_reserve(size_t count) {
        release();
        auto** const to = reinterpret_cast<void**>(&data);
        cudaError_t error;
        if constexpr (host) {
            error = cudaHostAlloc(to, count * sizeof(T), 0);
        } else {
            error = cudaMalloc(to, count * sizeof(T));
        }
        if (error == cudaErrorMemoryAllocation) {
            cudaGetLastError();  // else the next launch would report it again
            data = nullptr;
            return false;
        }
        CUDA(error);
        size = count;
        return true;
    }
    T* operator+(size_t i) const { return data + i; }
};

template <class T>
using HostMemory = Memory<T, true>;

// A matrix on the device: rows of `width` from one or more of the checkpoint's, which follow each
// other, or alternate.
struct DeviceMatrix {
    const bf16** place;                                // where its address goes
    std::vector<std::pair<const bf16*, size_t>> from;  // {first row, rows}
    size_t width;
    bool alternate = false;

    size_t rows() const {
        size_t sum = 0;
        for (const auto& part : from) sum += part.second;
        return sum;
    }
    const bf16* row(size_t r) const {
        if (alternate) return from[r % from.size()].first + r / from.size() * width;
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

    std::vector<DeviceMatrix> matrices(const Config& c, const Weights& w) {
        const auto D = size_t(c.D), E = size_t(c.E), F = size_t(c.F);
        layers.resize(size_t(c.L));
        std::vector<DeviceMatrix> all{{&embed, {{w.embed, size_t(c.rows())}}, D},
                                      {&norm, {{w.norm, 1}}, D}};
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
    // In bf16s: a matrix and a gap behind it, which the emulation makes untouchable.
    static constexpr size_t gap = 128;
    static size_t span(const DeviceMatrix& m) {
        return (m.rows() * m.width + 2 * gap - 1) / gap * gap;
    }

    void upload(const std::vector<DeviceMatrix>& all);
};

// From the mapped file through page-locked memory, by six threads: one copies some 10 GB/s, and
// PCIe takes 50. A thread has two buffers, so it copies while the other one's transfer is under
// way.
inline void DeviceWeights::upload(const std::vector<DeviceMatrix>& all) {
    constexpr size_t block = 2 << 20;  // bf16s
    struct Job {
        const DeviceMatrix* matrix;
        bf16* to;
        size_t first, rows;
    };
    std::vector<Job> jobs;
    size_t total = 0;
    for (const DeviceMatrix& m : all) total += span(m);
    arena.reserve(total);
    bf16* to = arena.data;
    for (const DeviceMatrix& m : all) {
        *m.place = to;
        const size_t rows = m.rows(), most = std::max<size_t>(1, block / m.width);
        for (size_t row = 0; row < rows; row += most)
            jobs.push_back({&m, to + row * m.width, row, std::min(most, rows - row)});
        forbid(to + rows * m.width, (span(m) - rows * m.width) * sizeof(bf16));
        to += span(m);
    }
    std::atomic<size_t> next{0};
    const auto work = [&] {
        Memory<bf16, true> staging[2];
        cudaStream_t stream;
        cudaEvent_t copied[2];
        CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        for (auto& event : copied) CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        for (int i = 0;; i = 1 - i) {  // which of the two buffers
            const size_t j = next++;
            if (j >= jobs.size()) break;
            const Job& job = jobs[j];
            const size_t width = job.matrix->width;
            CUDA(cudaEventSynchronize(copied[i]));
            staging[i].reserve(std::max(block, width));
            for (size_t r = 0; r < job.rows; r++) {
                std::memcpy(staging[i] + r * width, job.matrix->row(job.first + r),
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

std::string version(int v) { return text("%d.%d", v / 1000, v % 1000 / 10); }

cudaDeviceProp properties() {  // of the GPU that is used, the first
    cudaDeviceProp gpu;
    CUDA(cudaGetDeviceProperties(&gpu, 0));
    return gpu;
}

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
    const cudaDeviceProp gpu = properties();
    if (gpu.major >= 8) return "";
    return text("%s has compute capability %d.%d, and the kernels need 8.0 (Ampere) or newer",
                gpu.name, gpu.major, gpu.minor);
}

int cuda_step_tokens() {  // vLLM's rule
    size_t free_bytes, total;
    CUDA(cudaMemGetInfo(&free_bytes, &total));
    return total >= size_t(70) << 30 ? 8192 : 2048;
}

}  // namespace gemma
