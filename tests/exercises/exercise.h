// SPDX-License-Identifier: Apache-2.0
//
// Shared by the exercises, which docs/afternoon.md explains. They run on the CPU, where device
// memory is host memory (tests/cuda_on_cpu.h), so a std::vector serves as either.
#pragma once

#include "../../gemma.cu"

#include <bit>
#include <random>

#include "tests/test.h"

namespace gemma {

inline float value(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

inline std::vector<bf16> random_bf16(size_t count, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<bf16> values(count);
    for (bf16& v : values) {
        const double uniform = double(random() >> 11) * 0x1p-53;
        v.bits = uint16_t(pack_bf16(float(2 * uniform - 1), 0));
    }
    return values;
}

// Rows [N, K] to fragment order; N is a multiple of 16.
inline std::vector<bf16> in_fragment_order(const std::vector<bf16>& x, int N, int K) {
    std::vector<bf16> ordered(x.size());
    for (int n = 0; n < N; n++) {
        for (int k = 0; k < K; k++) ordered[fragment(n, k, K)] = x[size_t(n * K + k)];
    }
    return ordered;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Returns the vector that run() returns. If a barrier is missing, it differs in another order of
// the threads, and a check fails.
template <class Run>
auto in_all_orders(Run run) {
    using cuda_on_cpu::Order;
    const auto result = run();
    for (const Order order : {Order::backward, Order::shuffled}) {
        cuda_on_cpu::set_order(order, 7);
        CHECK(same_bits(run(), result));
    }
    cuda_on_cpu::set_order(Order::forward);
    return result;
}

// x[16, K] w[8, K]^T = [16, 8], by the production kernels.
inline std::vector<float> by_linear(const std::vector<bf16>& x, std::vector<bf16> w, int K) {
    w.resize(16 * size_t(K));  // linear needs 16 rows: add 8 rows of zeros
    const auto ordered = in_fragment_order(x, 16, K);
    std::vector<float> y(16 * 16), part;
    Stream s;
    linear(s, "exercise", Store::parts_fp32, y.data(), ordered.data(), w.data(), 16, K, 16);
    for (size_t n = 0; n < 16; n++) part.insert(part.end(), &y[n * 16], &y[n * 16] + 8);
    return part;
}

// Checks y against sums in double, within the error that fp32 sums may have.
inline void check_near(const std::vector<float>& y, const std::vector<bf16>& x,
                       const std::vector<bf16>& w, int K) {
    int wrong = 0;
    for (int n = 0; n < 16; n++) {
        for (int m = 0; m < 8; m++) {
            double sum = 0, most = 0;
            for (int k = 0; k < K; k++) {
                const double product =
                    double(value(x[size_t(n * K + k)])) * double(value(w[size_t(m * K + k)]));
                sum += product, most += std::fabs(product);
            }
            const double difference = std::fabs(double(y[size_t(n * 8 + m)]) - sum);
            wrong += !(difference <= most * K * 0x1p-24);
        }
    }
    INFO("of the 16 x 8 sums so many are wrong:");
    CHECK(wrong == 0);
}

}  // namespace gemma
