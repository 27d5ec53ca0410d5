// SPDX-License-Identifier: Apache-2.0
//
// Exercise 2: bits that do not depend on the number of warps. `./dev exercise 2`
//
// sliced_kernel is correct and divides k evenly between its warps. But the shares depend on the
// number of warps, so the order of the sums does, and so do the bits. Change some ten lines, so
// that every number of warps gives the bits of linear.
#include "exercise.h"

using namespace gemma;

namespace {

// y[n, m] = sum over k of x[n, k] w[m, k]
__global__ void sliced_kernel(float* y,       // [16, 8]
                              const bf16* x,  // [16, K] in fragment order
                              const bf16* w,  // [8, K]
                              int K,
                              [[maybe_unused]] int slice) {  // steps of 32 k in a slice of K
    // Room for one [16, 8] for each slice.
    float* sums = reinterpret_cast<float*>(dynamic_shared());
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const int warps = int(blockDim.x) / 32, g = lane / 4, t = lane % 4;
    const int share = (K / 32 + warps - 1) / warps;
    float c[4] = {};
    for (int step = warp * share; step < min(K / 32, (warp + 1) * share); step++) {
        const bf16* a = x + step * 512 + (g * 4 + t) * 8;
        const uint4 b = load16(w + g * K + step * 32 + t * 8);
        mma_half(c, load16(a), b.x, b.y);
        mma_half(c, load16(a + 256), b.z, b.w);
    }
    float* mine = sums + warp * 128;
    mine[g * 8 + 2 * t] = c[0], mine[g * 8 + 2 * t + 1] = c[1];
    mine[(g + 8) * 8 + 2 * t] = c[2], mine[(g + 8) * 8 + 2 * t + 1] = c[3];
    __syncthreads();
    for (int i = int(threadIdx.x); i < 128; i += int(blockDim.x)) {
        float sum = 0;
        for (int q = 0; q < warps; q++) sum += sums[q * 128 + i];
        y[i] = sum;
    }
}

std::vector<float> sliced(const std::vector<bf16>& x, const std::vector<bf16>& w, int K,
                          int warps) {
    const auto ordered = in_fragment_order(x, 16, K);
    const int slice = slice_steps(K), slices = K / 32 / slice;
    return in_all_orders([&] {
        std::vector<float> y(16 * 8, NAN);
        gemma::Stream s;
        s.launch("sliced", 0, sliced_kernel, dim3(1), warps * 32,
                 size_t(std::max(slices, warps)) * 128 * sizeof(float), y.data(), ordered.data(),
                 w.data(), K, slice);
        return y;
    });
}

constexpr int widths[] = {1152, 2048, 2560};  // K: 4 slices (the 1B's D), 8 slices of two lengths

}  // namespace

TEST_CASE("the sums are right") {
    for (const int K : widths) {
        const auto x = random_bf16(16 * size_t(K), 1), w = random_bf16(8 * size_t(K), 2);
        for (const int warps : {1, 3, 8}) check_near(sliced(x, w, K, warps), x, w, K);
    }
}

TEST_CASE("1 to 8 warps give the bits of linear") {
    for (const int K : widths) {
        const auto x = random_bf16(16 * size_t(K), 3), w = random_bf16(8 * size_t(K), 4);
        const auto want = by_linear(x, w, K);
        for (const int warps : {1, 2, 3, 4, 7, 8}) {
            CAPTURE(K, warps);
            CHECK(same_bits(sliced(x, w, K, warps), want));
        }
    }
}
