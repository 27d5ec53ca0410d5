// SPDX-License-Identifier: Apache-2.0
//
// Runs sequences through the production scheduler and a model, without HTTP. Shared by the engine
// tests, the benchmarks and the trace.
#pragma once

#include <cstring>
#include <map>

#include "gemma.h"
#include "scheduler.h"

namespace gemma {

// Limits whose default number of pages no test fills.
inline Limits limits_of(const Config& config, int max_batched_tokens = 64, int pages = 1024) {
    return {256, max_batched_tokens, config.W, {pages, pages}};
}

inline std::shared_ptr<Sequence> sequence(const std::vector<int>& prompt, int max_tokens,
                                          const Sampling& sampling = {}) {
    auto s = std::make_shared<Sequence>();
    s->tokens = prompt;
    s->prompt_tokens = static_cast<int>(prompt.size());
    s->max_tokens = max_tokens;
    s->sampling = sampling;
    return s;
}

// Steps until nothing waits or runs. Returns each sequence's results in order, those of its prompt
// (prompt_logprobs) first.
inline std::map<const Sequence*, Results> run(Model& model, Scheduler& scheduler) {
    std::map<const Sequence*, Results> all;
    for (;;) {
        const Batch& batch = scheduler.next();
        if (batch.tokens.empty()) return all;
        for (Delivery& token : scheduler.finish(model.step(batch))) {
            // This Delivery only says that the text has ended.
            if (!token.of_prompt && token.sequence->max_tokens == 0) continue;
            all[token.sequence.get()].push_back(std::move(token.result));
        }
    }
}

// Ids, ranks and the bits of all logprobs are equal.
inline bool same(const Results& a, const Results& b) {
    if (a.size() != b.size()) return false;
    for (size_t i = 0; i < a.size(); i++) {
        if (a[i].id != b[i].id || a[i].rank != b[i].rank || a[i].top.size() != b[i].top.size() ||
            std::memcmp(&a[i].logprob, &b[i].logprob, sizeof(float)) != 0) {
            return false;
        }
        for (size_t j = 0; j < a[i].top.size(); j++) {
            if (a[i].top[j].id != b[i].top[j].id ||
                std::memcmp(&a[i].top[j].logprob, &b[i].top[j].logprob, sizeof(float)) != 0) {
                return false;
            }
        }
    }
    return true;
}

}  // namespace gemma
