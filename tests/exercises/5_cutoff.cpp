// SPDX-License-Identifier: Apache-2.0
//
// Exercise 5: a new rule of sampling, on both engines. `./dev exercise 5`
//
// Give Sampling a member `float epsilon = 0`: an id whose probability is below epsilon is not
// drawn; 0 is off. Probabilities are over all ids that may be sampled, at the request's
// temperature, before min-p, top-k and top-p cut any. Ids as likely as the likeliest always stay.
// The rule uses integers, so that the GPU's threads can add weights in any order:
//
//     an id stays if its weight is at least  min(uint64_t(double(epsilon) * double(total)), 2^40)
//
// Write some fifteen lines: in gemma.h, in `sample` in reference.cpp, and in `Ask`, `ask_of` and
// `sample_kernel` in sample.cuh. Both engines must draw the same ids.
#include "../../container.h"
#include "exercise.h"

#include <set>

namespace twin {
namespace gemma {
using namespace ::gemma;
}
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunknown-pragmas"
#include "../../reference.cpp"
#pragma GCC diagnostic pop
}

using namespace gemma;

namespace {

template <class T>
constexpr bool has_epsilon = requires(T sampling) {
    sampling.epsilon = 1;
};

template <class T>
void set_epsilon([[maybe_unused]] T& sampling, [[maybe_unused]] float epsilon) {
    if constexpr (has_epsilon<T>) sampling.epsilon = epsilon;
}

std::vector<Output> outputs_of(Sampling sampling, float epsilon, int count) {
    set_epsilon(sampling, epsilon);
    std::vector<Output> outputs(size_t(count), Output{});
    for (int i = 0; i < count; i++) {
        outputs[size_t(i)].index = i % 5;
        outputs[size_t(i)].sampling = sampling;
        outputs[size_t(i)].sampling.seed = uint64_t(i);
    }
    return outputs;
}

// All outputs have the same logits, [V]; only ids below `vocab` have text.
std::vector<int> on_gpu(const std::vector<float>& logits, int vocab,
                        const std::vector<Output>& outputs) {
    const auto V = int(logits.size());
    std::vector<Ask> asks;
    for (const Output& o : outputs) asks.push_back(ask_of(o));
    return in_all_orders([&] {
        std::vector<float> all;
        for (size_t i = 0; i < outputs.size(); i++)
            all.insert(all.end(), logits.begin(), logits.end());
        std::vector<uint64_t> best(outputs.size() * size_t(ceil_div(vocab, block_ids)));
        std::vector<int> ids(outputs.size(), -1);
        gemma::Stream s;
        gemma::sample(s,
                      {all.data(), best.data(), asks.data(), nullptr, nullptr, ids.data(), nullptr,
                       int(outputs.size()), V, V, vocab},
                      false, false);
        return ids;
    });
}

std::vector<int> on_cpu(const std::vector<float>& logits, int vocab,
                        const std::vector<Output>& outputs) {
    std::vector<int> ids;
    for (const Output& o : outputs) ids.push_back(twin::gemma::sample(logits, vocab, o));
    return ids;
}

using Set = std::set<int>;
Set set_of(const std::vector<int>& ids) { return {ids.begin(), ids.end()}; }

std::vector<float> logits_of(const std::vector<double>& probabilities) {
    std::vector<float> logits;
    for (const double p : probabilities) logits.push_back(float(std::log(p)));
    return logits;
}

void check_drawn(const std::vector<float>& logits, int vocab, const Sampling& sampling,
                 float epsilon, const Set& want) {
    const auto outputs = outputs_of(sampling, epsilon, 200);
    CAPTURE(epsilon, vocab);
    CHECK(set_of(on_cpu(logits, vocab, outputs)) == want);
    CHECK(set_of(on_gpu(logits, vocab, outputs)) == want);
}

}  // namespace

TEST_CASE("Sampling has an epsilon") {
    REQUIRE(has_epsilon<Sampling>);  // add it in gemma.h
}

TEST_CASE("ids less likely than epsilon are never drawn, all others are") {
    const auto logits = logits_of({0.5, 0.1, 0.3, 0.06, 0.04});
    check_drawn(logits, 5, {}, 0, {0, 1, 2, 3, 4});
    check_drawn(logits, 5, {}, 0.05f, {0, 1, 2, 3});
    check_drawn(logits, 5, {}, 0.2f, {0, 2});
    check_drawn(logits, 5, {}, 0.9f, {0});  // the likeliest stays
    // At temperature 3 the least likely id has 0.13.
    check_drawn(logits, 5, {.temperature = 3}, 0.05f, {0, 1, 2, 3, 4});
}

TEST_CASE("ids without text do not count, and equally likely ids all stay or all go") {
    check_drawn(logits_of({0.1, 0.1, 0.1, 0.1, 0.6}), 4, {}, 0.2f, {0, 1, 2, 3});
    check_drawn(std::vector<float>(6, 1.5f), 6, {}, 0.5f, {0, 1, 2, 3, 4, 5});
}

TEST_CASE("before the other cuts") {
    const auto logits = logits_of({0.5, 0.1, 0.3, 0.06, 0.04});
    // Among the ids that min-p leaves, 0.3 would be 0.375; among all it stays 0.3.
    check_drawn(logits, 5, {.min_p = 0.5f}, 0.35f, {0});
    check_drawn(logits, 5, {.top_k = 2}, 0.35f, {0});
    check_drawn(logits, 5, {.top_k = 3}, 0.08f, {0, 1, 2});
    // {0, 2} have 0.8 of the 0.9 that epsilon leaves.
    check_drawn(logits, 5, {.top_p = 0.85f}, 0.08f, {0, 2});
}

TEST_CASE("both engines draw the same, whatever else is asked") {
    std::mt19937_64 random(1);
    std::vector<float> logits(1000);
    for (float& z : logits) z = float(random() % 4096) / 512;
    for (const Sampling& s : {Sampling{},
                              {.temperature = 0.5f},
                              {.top_k = 40},
                              {.top_p = 0.9f},
                              {.min_p = 0.1f},
                              {.temperature = 2, .top_k = 300, .top_p = 0.8f, .min_p = 0.01f},
                              {.temperature = 0}}) {
        for (const float epsilon : {0.001f, 0.004f}) {
            const auto outputs = outputs_of(s, epsilon, 20);
            CHECK(on_gpu(logits, 990, outputs) == on_cpu(logits, 990, outputs));
        }
    }
}
