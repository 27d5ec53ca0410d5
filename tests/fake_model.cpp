// SPDX-License-Identifier: Apache-2.0
//
// fake_model.cpp: a Model without weights, linked in the place of reference.cpp to test HTTP.
// Adjustments and masks do not move it.
//
// The next id is a hash of the row's tokens, kept in its global pages; never a control id, unless:
//   top_k 1000 + n        generated token n, from 0, is <end_of_turn>
//   GEMMA_FAKE_STEP_MS    milliseconds that a step takes at least (0)
#include <chrono>
#include <cstdlib>
#include <thread>

#include "gemma.h"

namespace gemma {

class FakeModel : public Model {
  public:
    explicit FakeModel(int vocabulary) : ordinary(uint64_t(vocabulary - first)) {}
    KvMemory kv_memory() const override { return {64 << 20, {1024, 1024}}; }
    void allocate_pages(const int (&pages)[2]) override {
        hashes.resize(size_t(pages[global_pool]) * page_tokens);
    }

    Results step(const Batch& b) override {
        std::this_thread::sleep_for(std::chrono::milliseconds(pace));
        const auto hash = [&](int row, int p) -> uint64_t& {  // of the tokens up to position p
            const int page =
                b.pages[global_pool].at(size_t(row * b.pages_per_row + p / page_tokens));
            return hashes.at(size_t(page) * page_tokens + size_t(p % page_tokens));
        };
        for (int row = 0, i = 0; row + 1 < int(b.row_start.size()); row++) {
            for (; i < b.row_start[size_t(row) + 1]; i++) {
                const int p = b.positions[size_t(i)];
                hash(row, p) = ((p ? hash(row, p - 1) : 0) ^ uint64_t(b.tokens[size_t(i)])) *
                                   0x9e3779b97f4a7c15 +
                               1;
            }
        }
        Results results;
        for (const Output& out : b.outputs) {
            const Sampling& sampling = out.sampling;
            const uint64_t seed = sampling.temperature < 1e-5f ? 0 : sampling.seed * 7919;
            const int n =
                int(((hash(out.row, b.positions[size_t(out.token)]) >> 32) + seed) % ordinary);
            const int id = sampling.top_k == 1000 + out.index ? 106 : first + n;
            Result result{out.target >= 0 ? out.target : id, 0, 0, {}};
            if (sampling.logprobs >= 0) result.logprob = -0.5f, result.rank = 1;
            for (int i = 0; i < sampling.logprobs; i++)
                result.top.push_back(
                    {i ? first + int(uint64_t(n + i) % ordinary) : id, -0.5f - float(i)});
            results.push_back(std::move(result));
        }
        return results;
    }

  private:
    static constexpr int first = 512;  // below lie control ids, runs of spaces, single bytes
    const uint64_t ordinary;
    const char* const given = std::getenv("GEMMA_FAKE_STEP_MS");
    const int pace = given ? std::atoi(given) : 0;
    std::vector<uint64_t> hashes;  // [global pages, 32]
};

std::unique_ptr<Model> open_cpu(const Checkpoint& checkpoint) {
    return std::make_unique<FakeModel>(checkpoint.config.vocab);
}

}  // namespace gemma
