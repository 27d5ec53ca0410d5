// SPDX-License-Identifier: Apache-2.0
//
// Exercise 4: a long prompt must not slow down the rows that decode. `./dev exercise 4`
//
// The time of a step depends on its tokens, so a prompt that fills the budget makes all other
// streams stutter. Give Limits a member `int max_chunk = 0`: a step in which some row decodes has
// at most max_chunk tokens of prompts in all; 0 is no limit. Write some ten lines in Scheduler.
//
// A row decodes once its prompt is computed. Two things must stay true: a step leaves at most two
// rows in the middle of their prompts, the oldest and the shortest (docs/design.md, "Scheduling"),
// and every sequence gets the same text as before.
#include "tests/test.h"

#include <map>

using namespace gemma;

namespace {

template <class T>
constexpr bool has_max_chunk = requires(T limits) {
    limits.max_chunk = 1;
};

template <class T>
void set_max_chunk([[maybe_unused]] T& limits, [[maybe_unused]] int tokens) {
    if constexpr (has_max_chunk<T>) limits.max_chunk = tokens;
}

// The model: the next id is a hash of all ids before it.
int next_id(const std::vector<int>& tokens) {
    uint64_t hash = 7;
    for (const int id : tokens)
        hash = (hash ^ uint64_t(id + 1)) * 0x9e3779b97f4a7c15, hash ^= hash >> 29;
    return int((hash >> 32) % 1000);
}

struct Ask {
    int step;            // it arrives before this step
    int prompt, answer;  // tokens
};

struct Seen {
    std::vector<std::vector<int>> texts;  // of each Ask
    int steps = 0, preemptions = 0;
    int beside = 0;  // most tokens of prompts in a step in which some row decoded
    int alone = 0;   // the same of steps in which no row decoded
    int amid = 0;    // most rows that a step left in the middle of their prompts
};

Seen play(Limits limits, int max_chunk, const std::vector<Ask>& asks) {
    set_max_chunk(limits, max_chunk);
    Scheduler scheduler(limits);
    std::vector<std::shared_ptr<Sequence>> all;
    std::map<const Sequence*, int> computed;
    Seen seen;
    for (int step = 0;; step++) {
        bool more = false;
        for (size_t i = 0; i < asks.size(); i++) {
            more |= asks[i].step > step;
            if (asks[i].step != step) continue;
            auto s = std::make_shared<Sequence>();
            for (int t = 0; t < asks[i].prompt; t++) s->tokens.push_back(int(i) * 7 + t % 5);
            s->prompt_tokens = asks[i].prompt, s->max_tokens = asks[i].answer;
            all.push_back(s), scheduler.add(s);
        }
        for (const auto& s : all) computed[s.get()] = s->computed;
        const Batch batch = scheduler.next();
        if (batch.tokens.empty() && !more) break;
        REQUIRE(step < 10'000);  // it ends
        Results results;
        int prompts = 0, decodes = 0, amid = 0;
        for (size_t r = 0; r + 1 < batch.row_start.size(); r++) {
            const int first = batch.row_start[r], count = batch.row_start[r + 1] - first;
            const int page = batch.positions[size_t(first)] / page_tokens;
            const int id = batch.pages[global_pool][r * size_t(batch.pages_per_row) + size_t(page)];
            // The row of the sequence that holds its page.
            const auto owner = std::find_if(all.begin(), all.end(), [&](const auto& s) {
                const auto& pages = s->pages[global_pool];
                return int(pages.size()) > page && pages[size_t(page)] == id;
            });
            REQUIRE(owner != all.end());
            const Sequence& s = **owner;
            const bool done = s.computed + count == int(s.tokens.size());
            if (done) results.push_back({next_id(s.tokens), 0, 1, {}});
            amid += !done;
            (s.computed < s.prompt_tokens ? prompts : decodes) += count;
        }
        for (const Delivery& t : scheduler.finish(results)) REQUIRE(t.sequence);
        int& most = decodes ? seen.beside : seen.alone;
        most = std::max(most, prompts), seen.amid = std::max(seen.amid, amid);
        seen.steps++;
    }
    seen.preemptions = scheduler.preemptions();
    for (const auto& s : all)
        seen.texts.push_back({s->tokens.begin() + s->prompt_tokens, s->tokens.end()});
    return seen;
}

const Limits ample{16, 400, 64, {200, 200}};
const std::vector<Ask> mixed{{0, 50, 40}, {1, 1000, 5}, {2, 30, 20}, {2, 20, 9},
                             {4, 700, 3}, {30, 10, 2},  {31, 333, 8}};

}  // namespace

TEST_CASE("Limits has a max_chunk, and 0 changes nothing") {
    REQUIRE(has_max_chunk<Limits>);  // add it in scheduler.h
    const Seen seen = play(ample, 0, mixed);
    CHECK(seen.beside > 300);
}

TEST_CASE("beside a row that decodes, prompts have max_chunk tokens in all") {
    const Seen before = play(ample, 0, mixed);
    for (const int chunk : {1, 32, 50, 399}) {
        CAPTURE(chunk);
        const Seen seen = play(ample, chunk, mixed);
        CHECK(seen.beside == chunk);
        CHECK(seen.amid <= 2);
        CHECK(seen.texts == before.texts);
    }
}

TEST_CASE("where no row decodes, a prompt has the whole budget") {
    const Seen seen = play(ample, 32, {{0, 1000, 2}});
    CHECK(seen.alone == 400);
    CHECK(seen.steps == 4);
    // Two prompts start together, so no row decodes yet.
    CHECK(play(ample, 32, {{0, 100, 2}, {0, 150, 2}}).alone == 250);
}

TEST_CASE("with too few pages too, every sequence gets the same text") {
    std::vector<Ask> crowd{{3, 200, 5}};
    for (int i = 0; i < 8; i++) crowd.push_back({i, 20 + i, 60});
    const Seen seen = play({16, 400, 64, {20, 10}}, 48, crowd);
    CHECK(seen.preemptions > 0);
    CHECK(seen.texts == play(ample, 0, crowd).texts);
}
