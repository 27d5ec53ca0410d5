// SPDX-License-Identifier: Apache-2.0
//
// fake_model.cpp: a Model without weights, linked instead of reference.cpp to test HTTP.
//
// The next id is a hash of the row's tokens, which it keeps in the row's global pages. It is never
// a control id, unless one of these asks for it:
//   top_k 1000 + n        makes generated token n (from 0) <end_of_turn>
//   logit_bias            50 makes an id the likeliest, -50 the least likely
// $GEMMA_FAKE_STEP_MS is the least time of a step in milliseconds (0). Masks of allowed ids hold;
// penalties do nothing. Logprobs fall by rank in equal steps, whose size depends on the context.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <limits>
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
        int row = 0;
        for (const Output& out : b.outputs) {  // in the order of their tokens
            while (b.row_start[size_t(row) + 1] <= out.token) row++;
            const Sampling& sampling = out.sampling;
            const uint64_t context = hash(row, b.positions[size_t(out.token)]);
            const uint64_t likeliest = (context >> 32) % ordinary;
            const auto logprob = [&](int rank) {
                return -0.01f - float(rank) * (0.1f + float(context >> 40 & 0xfff) / 0x1p14f);
            };
            Result result{out.target >= 0 ? out.target : choose(out, likeliest), 0, 0, {}};
            if (out.target >= 0 || sampling.logprobs >= 0) {
                result.rank = rank_of(result.id, likeliest);
                result.logprob = logprob(result.rank);
            }
            for (int rank = 1; rank <= sampling.logprobs; rank++)
                result.top.push_back({of_rank(rank, likeliest), logprob(rank)});
            results.push_back(std::move(result));
        }
        return results;
    }

  private:
    // Ranks: first the ordinary ids in a circle that starts at the likeliest, then the ids below
    // `first`, in a circle too.
    int of_rank(int rank, uint64_t likeliest) const {
        const auto n = uint64_t(rank - 1);
        return n < ordinary ? first + int((likeliest + n) % ordinary)
                            : int((likeliest + n) % first);
    }
    int rank_of(int id, uint64_t likeliest) const {
        const auto ahead = [](uint64_t to, uint64_t from, uint64_t size) {
            return int((to + size - from % size) % size);
        };
        if (id >= first) return 1 + ahead(uint64_t(id - first), likeliest, ordinary);
        return 1 + int(ordinary) + ahead(uint64_t(id), likeliest + ordinary, first);
    }
    int choose(const Output& out, uint64_t likeliest) const {
        const Sampling& s = out.sampling;
        const uint64_t seed = s.temperature < 1e-5f ? 0 : s.seed * 7919;
        const uint64_t start = (likeliest + seed) % ordinary;
        const bool ends = s.top_k == 1000 + out.index;
        if (out.adjustments.empty() && !out.allowed) return ends ? end_of_turn : of_rank(1, start);
        const int vocab = first + int(ordinary);
        std::vector<float> scores;
        for (int id = 0; id < vocab; id++) scores.push_back(float(-rank_of(id, start)));
        if (ends) scores[end_of_turn] = 0;
        for (const Adjustment& a : out.adjustments)
            scores[size_t(a.id)] += a.bias / 50 * float(vocab);
        for (int id = 0; out.allowed && id < vocab; id++) {
            const bool allowed = (*out.allowed)[size_t(id / 32)] >> id % 32 & 1;
            if (!allowed) scores[size_t(id)] = -std::numeric_limits<float>::infinity();
        }
        return int(std::max_element(scores.begin(), scores.end()) - scores.begin());
    }

    static constexpr int end_of_turn = 106;
    static constexpr int first = 512;  // ids below are control ids, runs of spaces, single bytes
    const uint64_t ordinary;
    const char* const given = std::getenv("GEMMA_FAKE_STEP_MS");
    const int pace = given ? std::atoi(given) : 0;
    std::vector<uint64_t> hashes;  // [global pages, 32]
};

std::unique_ptr<Model> open_cpu(const Checkpoint& checkpoint, int) {
    return std::make_unique<FakeModel>(checkpoint.config.vocab);
}

}  // namespace gemma

#ifdef __SANITIZE_THREAD__
// The cpp-httplib library is not instrumented: ThreadSanitizer does not see how it guards its
// static constants, which one thread makes and others use, and would report false races. Do not
// report races whose stack goes through the library.
extern "C" const char* __tsan_default_suppressions() {
    return "called_from_lib:libcpp-httplib.so\n";
}
#endif
