// SPDX-License-Identifier: Apache-2.0
//
// Exercise 1: one matrix product by one warp, from plain rows. `./dev exercise 1`
//
// linear reads activations in fragment order. Here they are plain rows, x[16, K], like the weights:
// each lane loads 16 bytes from each of two tokens and one weight row, and picks from these the
// operands of two mmas. Write some ten lines in product_kernel; y must have the bits of linear.
#include "exercise.h"

using namespace gemma;

namespace {

// y[n, m] = sum over k of x[n, k] w[m, k]
// Needs one warp, and K a multiple of 32 that is a single slice of linear: then one chain of mmas
// computes each sum.
__global__ void product_kernel([[maybe_unused]] float* y,       // [16, 8]
                               [[maybe_unused]] const bf16* x,  // [16, K]
                               [[maybe_unused]] const bf16* w,  // [8, K]
                               [[maybe_unused]] int K) {
    [[maybe_unused]] const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
    // Write this. The picture in docs/afternoon.md shows which k each word of a lane has in each
    // mma.
}

std::vector<float> product(const std::vector<bf16>& x, const std::vector<bf16>& w, int K) {
    return in_all_orders([&] {
        std::vector<float> y(16 * 8, NAN);
        gemma::Stream s;
        s.launch("product", 0, product_kernel, dim3(1), 32, 0, y.data(), x.data(), w.data(), K);
        return y;
    });
}

}  // namespace

TEST_CASE("every element of the product is there") {
    for (const int K : {32, 96}) {
        const auto x = random_bf16(16 * size_t(K), 1), w = random_bf16(8 * size_t(K), 2);
        check_near(product(x, w, K), x, w, K);
    }
}

TEST_CASE("its bits are those of linear: the same k in the same slot of the same mma") {
    for (const int K : {32, 256, 288, 320}) {
        const auto x = random_bf16(16 * size_t(K), 3), w = random_bf16(8 * size_t(K), 4);
        CAPTURE(K);
        CHECK(same_bits(product(x, w, K), by_linear(x, w, K)));
    }
}
