// SPDX-License-Identifier: Apache-2.0
//
// scheduler_test.cpp: every token is computed once and from the right pages, whatever runs beside
// it.
//
//   [1] A model of a few lines: the next id is a hash of the tokens that the row may see
//   [2] Machine: pages in memory, and every rule of a Batch checked in every step
//   [3] Scripts: tables of the rows that each step must have
//   [4] Windows, limits, stops, cancellation
//   [5] Prompt logprobs, penalties, masks
//   [6] Crowds: too few pages, and random sequences
//   [7] Waiting, and hits of the prefix cache, in crowds of full size
//
// Machine finds most bugs. It remembers which token was written to each place of each page, lets a
// row see nothing else, and compares every token with that of the same sequence run alone.
#include "tests/test.h"

#include <algorithm>
#include <array>
#include <functional>
#include <iterator>
#include <list>
#include <map>
#include <memory>
#include <random>
#include <utility>

using gemma::Adjustment;
using gemma::Batch;
using gemma::Finish;
using gemma::global_pool;
using gemma::Limits;
using gemma::local_pool;
using gemma::Output;
using gemma::page_tokens;
using gemma::Pool;
using gemma::PoolUse;
using gemma::Result;
using gemma::Results;
using gemma::Scheduler;
using gemma::Sequence;
using Ids = std::vector<int>;

namespace {

// [1] A model of a few lines ----------------------------------------------------------------------

constexpr int vocabulary = 50;  // small, so that stop ids occur by chance

uint64_t mix(uint64_t hash, int x) {
    hash = (hash ^ uint64_t(x + 1)) * 0x9e3779b97f4a7c15;
    return hash ^ hash >> 29;
}

uint64_t mix(uint64_t hash, const Ids& ids) {
    for (const int id : ids) hash = mix(hash, id);
    return hash;
}

// Like a model's, the next id depends on all tokens (global layers) and on those in the window
// (local layers), in order; and like a sampled one on the seed and the number of tokens drawn.
int next_id(const Ids& all, const Ids& window, uint64_t seed, int index) {
    return int((mix(mix(mix(seed, all), window), index) >> 32) % vocabulary);
}

float logprob_of(int id, const Ids& all, const Ids& window) {  // 24 bits: exact in a float
    return -float(mix(mix(mix(5, all), window), id) >> 40);
}

struct Answer {
    Ids ids;
    Finish finish = Finish::none;
    std::vector<float> scores = {};  // prompt_logprobs, from the second token on
};

// The answer that a sequence must get, computed without pages, batches or neighbours.
Answer undisturbed(const Sequence& s, int window) {
    Answer answer;
    Ids all;
    const auto seen = [&] { return Ids(all.end() - std::min(window, int(all.size())), all.end()); };
    for (const int id : s.tokens) {
        if (s.prompt_logprobs >= 0 && !all.empty())
            answer.scores.push_back(logprob_of(id, all, seen()));
        all.push_back(id);
    }
    if (s.max_tokens == 0) answer.finish = Finish::length;
    while (answer.finish == Finish::none) {
        const int index = int(answer.ids.size());
        const int id = next_id(all, seen(), s.sampling.seed, index);
        all.push_back(id);
        answer.ids.push_back(id);
        if (std::count(s.stop_ids.begin(), s.stop_ids.end(), id))
            answer.finish = Finish::stop;
        else if (index + 1 == s.max_tokens)
            answer.finish = Finish::length;
    }
    return answer;
}

// `count` pseudo-random ids; two topics differ within the first page already.
Ids words(int topic, int count) {
    Ids ids;
    for (int i = 0; i < count; i++) ids.push_back(int((mix(mix(7, topic), i) >> 32) % vocabulary));
    return ids;
}

Ids operator+(Ids a, const Ids& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

// [2] Machine -------------------------------------------------------------------------------------

struct Wishes {  // parameters of a sequence
    int prompt_logprobs = -1;
    float presence = 0, frequency = 0, repetition = 1;
    std::map<int, float> bias = {};
    bool mask = false;
    int min_tokens = 0;
    int delay = -1;  // steps that a constraint takes to make its ids; -1: no constraint
};

// Takes some steps to say which ids may follow, and remembers what it was told.
struct SlowConstraint : gemma::Constraint {
    SlowConstraint(const double& of_machine, int steps) : now(of_machine), delay(steps) {}
    void append(int id) override {
        told.push_back(id);
        ready = now + 0.5 * delay;
        set = std::make_shared<const std::vector<uint32_t>>(3);
    }
    std::shared_ptr<const std::vector<uint32_t>> allowed() const override {
        return now >= ready ? set : nullptr;
    }
    const double& now;
    const int delay;
    double ready = 0;
    Ids told;
    std::shared_ptr<const std::vector<uint32_t>> set =
        std::make_shared<const std::vector<uint32_t>>(3);
};

// The expected adjustment of each id's logit, by id, computed from the whole text. Tests use
// multiples of 1/4, so that sums of floats are exact.
using Adjusted = std::array<Adjustment, vocabulary>;

Adjusted adjusted(const Wishes& wishes, const Ids& text, int prompt_tokens) {
    Adjusted all{};
    for (const auto& [id, bias] : wishes.bias) all[size_t(id)].bias = bias;
    for (size_t i = 0; i < text.size(); i++) {
        Adjustment& a = all[size_t(text[i])];
        a.repetition = wishes.repetition;
        if (i < size_t(prompt_tokens)) continue;
        // Until the loop below, a.id counts occurrences.
        a.penalty += wishes.frequency + (a.id++ ? 0 : wishes.presence);
    }
    for (int id = 0; id < vocabulary; id++) all[size_t(id)].id = id;
    return all;
}

bool carries(const Output& out, Adjusted missing) {
    for (const Adjustment& a : out.adjustments) {
        Adjustment& m = missing.at(size_t(a.id));
        if (a.id != m.id || a.bias != m.bias || a.repetition != m.repetition ||
            a.penalty != m.penalty)
            return false;
        m = {-1};  // a second adjustment of this id fails
    }
    return std::all_of(missing.begin(), missing.end(), [](const Adjustment& a) {
        return a.bias == 0 && a.repetition == 1 && a.penalty == 0;
    });
}

struct Job {
    char name;
    std::shared_ptr<Sequence> sequence;
    Wishes wishes;
    Answer expected, got;
    double started = -1;
    int preemptions = 0;
};

struct Span {  // the tokens of one row in one step
    char name;
    int first, last;  // positions
    int scored;       // number of prompt logprobs
    bool output;
};
using Step = std::vector<Span>;

class Machine {
  public:
    explicit Machine(const Limits& l) : limits(l), scheduler(l) {
        for (const Pool pool : {local_pool, global_pool})
            memory[pool].resize(size_t(l.pages[pool]) * page_tokens);
    }

    const std::shared_ptr<Job>& add(char name, const Ids& prompt, int max_tokens,
                                    const Ids& stop_ids = {}, uint64_t seed = 0,
                                    const Wishes& wishes = {}) {
        auto s = std::make_shared<Sequence>();
        s->tokens = prompt;
        s->prompt_tokens = int(prompt.size());
        s->max_tokens = max_tokens;
        s->stop_ids = stop_ids;
        s->sampling.seed = seed;
        s->prompt_logprobs = wishes.prompt_logprobs;
        s->presence = wishes.presence, s->frequency = wishes.frequency;
        s->repetition = wishes.repetition;
        for (const Adjustment& a : adjusted(wishes, prompt, int(prompt.size()))) {
            if (a.bias != 0 || a.repetition != 1) s->adjustments.push_back(a);
        }
        if (wishes.mask) s->allowed = std::make_shared<const std::vector<uint32_t>>(1);
        s->min_tokens = wishes.min_tokens;
        if (s->min_tokens) s->allowed_before = std::make_shared<const std::vector<uint32_t>>(2);
        if (wishes.delay >= 0) s->constraint = std::make_shared<SlowConstraint>(now, wishes.delay);
        live.push_back(
            std::make_shared<Job>(Job{name, s, wishes, undisturbed(*s, limits.window), {}}));
        scheduler.add(s);
        return live.back();
    }

    Step step() {
        const Batch& batch = scheduler.next(now += 0.5);
        must(scheduler.preemptions() <= limit, "it does nothing but preempt");
        count_preempted();
        forget_cancelled();
        check_books();
        check_present();
        check_shape(batch);
        const Step rows = name_rows(batch);
        check_started();
        poison(batch);
        write(batch, rows);
        const Results results = attend(batch, rows);
        if (while_it_runs) std::exchange(while_it_runs, nullptr)();
        deliver(batch, results, rows);
        check_books();
        check_window();
        return rows;
    }

    // Steps until there is nothing to do. Then all sequences must have ended, and no page be held.
    void run() {
        for (int steps = 0; !step().empty(); steps++) must(steps < limit, "it does not end");
        check_idle();
    }

    void check_idle() {
        must(live.empty() && scheduler.waiting() + scheduler.running() == 0, "idle before the end");
        for (const Pool pool : {local_pool, global_pool})
            must(scheduler.use(pool).held == 0, "idle, and a page is held");
    }

    const Limits limits;
    Scheduler scheduler;
    std::list<std::shared_ptr<Job>> live;  // in the order of arrival
    std::function<void()> while_it_runs;   // called once, between next() and finish()
    double now = 0;                        // of the last step
    int preempted_amid = 0;                // preemptions with some prompt logprobs delivered

  private:
    struct Place {  // the slot of one token in a page
        int position = -1, id = -1;
        bool operator==(const Place&) const = default;
    };
    static constexpr int limit = 100'000;

    // There are millions of these checks: Catch2's own macros would take most of the time.
    static void must(bool met, const char* rule) {
        if (!met) FAIL("broken: " << rule);
    }

    Place& place(Pool pool, int page, int position) {
        must(page >= 0, "a page is needed that the row does not have");
        must(page < limits.pages[pool], "a page beyond the pool");
        return memory[pool][size_t(page * page_tokens + position % page_tokens)];
    }

    static bool holds_pages(const Job& job) {
        const auto& pages = job.sequence->pages;
        return !pages[local_pool].empty() || !pages[global_pool].empty();
    }

    std::vector<int> holders(Pool pool) const {  // [pages]
        std::vector<int> count(size_t(limits.pages[pool]));
        for (const auto& job : live) {
            for (const int page : job->sequence->pages[pool])
                if (page >= 0) count[size_t(page)]++;
        }
        return count;
    }

    Job& job_of(const Sequence& s) {
        const auto job = std::find_if(live.begin(), live.end(),
                                      [&](const auto& j) { return j->sequence.get() == &s; });
        must(job != live.end(), "a sequence that had already ended");
        return **job;
    }

    void check_books() const {
        for (const Pool pool : {local_pool, global_pool}) {
            const PoolUse use = scheduler.use(pool);
            const auto count = holders(pool);
            must(use.held >= 0 && use.cached >= 0 && use.free >= 0, "pages below zero");
            must(use.held + use.cached + use.free == limits.pages[pool],
                 "held + cached + free is not the pool");
            must(use.held == std::count_if(count.begin(), count.end(), [](int n) { return n > 0; }),
                 "the pages that are held are not those in the tables");
        }
    }

    void count_preempted() {
        for (const auto& job : live) {
            const Sequence& s = *job->sequence;
            if (job->preemptions == s.preemptions) continue;
            must(++job->preemptions == s.preemptions && !holds_pages(*job), "a preemption");
            const int scored = int(job->got.scores.size());
            preempted_amid += scored > 0 && scored + 1 < s.prompt_tokens;
        }
    }

    void check_started() {
        for (Job* job : row_jobs) {
            if (job->started < 0) job->started = now;
        }
        for (const auto& job : live)
            must(job->sequence->started == job->started, "the time of the first step");
    }

    void check_present() const {
        const auto holds = [](const auto& job) { return holds_pages(*job); };
        must(std::count_if(live.begin(), live.end(), holds) <= scheduler.running(),
             "what waits holds pages");
        must(scheduler.running() + scheduler.waiting() == int(live.size()), "a sequence is lost");
    }

    void check_shape(const Batch& b) const {
        const size_t N = b.tokens.size(), R = b.row_start.size() - 1;
        must(int(N) <= limits.max_batched_tokens, "more tokens than the budget");
        must(int(R) <= limits.max_num_seqs, "more rows than max_num_seqs");
        must(b.positions.size() == N && b.row_start[0] == 0 && b.row_start[R] == int(N),
             "the shape of a batch");
        for (const Pool pool : {local_pool, global_pool})
            must(b.pages[pool].size() == R * size_t(b.pages_per_row), "the shape of a page table");
        for (size_t r = 0; r < R; r++) {
            must(b.row_start[r] < b.row_start[r + 1], "a row without tokens");
            for (int i = b.row_start[r] + 1; i < b.row_start[r + 1]; i++)
                must(b.positions[size_t(i)] == b.positions[size_t(i) - 1] + 1, "a gap in a row");
        }
    }

    // A Batch does not say which sequence a row belongs to: find the holder of the page it writes.
    Step name_rows(const Batch& b) {
        Step rows;
        row_jobs.clear();
        for (size_t r = 0; r + 1 < b.row_start.size(); r++) {
            const auto from = size_t(b.row_start[r]), to = size_t(b.row_start[r + 1]);
            const auto table = [&](Pool pool) {
                const auto start = b.pages[pool].begin() + ptrdiff_t(r) * b.pages_per_row;
                return Ids(start, start + b.pages_per_row);
            };
            const auto page = size_t(b.positions[from] / page_tokens);
            const auto global = table(global_pool);
            Job* owner = nullptr;
            for (const auto& job : live) {
                const Ids& own = job->sequence->pages[global_pool];
                if (own.size() <= page || own[page] != global.at(page)) continue;
                must(!owner, "a shared page is written");
                owner = job.get();
            }
            must(owner && !std::count(row_jobs.begin(), row_jobs.end(), owner), "a stray row");
            const Sequence& s = *owner->sequence;
            for (const Pool pool : {local_pool, global_pool}) {
                Ids own = s.pages[pool];
                own.resize(size_t(b.pages_per_row), -1);
                must(table(pool) == own, "a row's pages are not its sequence's");
            }
            must(b.positions[from] == s.computed, "a row starts elsewhere than the last one ended");
            must(size_t(s.computed) + (to - from) <= s.tokens.size(), "more tokens than there are");
            must(std::equal(b.tokens.begin() + ptrdiff_t(from), b.tokens.begin() + ptrdiff_t(to),
                            s.tokens.begin() + s.computed),
                 "a row's tokens are not its sequence's");
            const int last = b.positions[to - 1], due = int(owner->got.scores.size());
            int scored = 0;
            if (s.prompt_logprobs >= 0 && due + 1 < s.prompt_tokens) {
                must(s.computed <= due, "a logprob of the prompt is skipped");
                scored = std::max(0, std::min(last, s.prompt_tokens - 2) + 1 - due);
            }
            const bool output = last + 1 == int(s.tokens.size());
            rows.push_back({owner->name, s.computed, last, scored, output});
            row_jobs.push_back(owner);
        }
        const bool prompts =
            std::any_of(rows.begin(), rows.end(), [](const Span& r) { return r.first < r.last; });
        for (const auto& job : live) {
            const Sequence& s = *job->sequence;
            const bool decodes = holds_pages(*job) && s.computed + 1 == int(s.tokens.size()) &&
                                 (!s.constraint || s.constraint->allowed());
            must(!prompts || !decodes || std::count(row_jobs.begin(), row_jobs.end(), job.get()),
                 "a decode row waits for a prompt");
        }
        return rows;
    }

    void poison(const Batch& b) {
        for (const Pool pool : {local_pool, global_pool}) {
            for (const int page : b.dead[pool]) {
                for (int i = 0; i < page_tokens; i++) place(pool, page, i) = {};
            }
        }
    }

    // All rows write before any row reads, as in a layer. A row may write to an empty place only,
    // in a page that no other sequence holds: shared and cached pages are full.
    void write(const Batch& b, const Step& rows) {
        for (const Pool pool : {local_pool, global_pool}) {
            const auto count = holders(pool);
            for (size_t r = 0; r < rows.size(); r++) {
                for (int p = rows[r].first; p <= rows[r].last; p++) {
                    const int page =
                        b.pages[pool].at(r * size_t(b.pages_per_row) + size_t(p / page_tokens));
                    Place& to = place(pool, page, p);
                    must(count[size_t(page)] == 1, "two sequences have a page that one writes");
                    must(to == Place{}, "a place is written twice");
                    to = {p, row_jobs[r]->sequence->tokens[size_t(p)]};
                }
            }
        }
    }

    // The tokens first..last, read from the row's pages.
    Ids read(Pool pool, size_t r, const Batch& b, int first, int last) {
        Ids ids;
        const Ids& tokens = row_jobs[r]->sequence->tokens;
        for (int p = first; p <= last; p++) {
            const size_t entry = r * size_t(b.pages_per_row) + size_t(p / page_tokens);
            const Place& from = place(pool, b.pages[pool].at(entry), p);
            must(from == Place{p, tokens[size_t(p)]}, "a page holds something else");
            ids.push_back(from.id);
        }
        return ids;
    }

    Results attend(const Batch& b, const Step& rows) {
        Results results;
        const int behind = limits.window - 1;  // tokens before itself that a token sees
        for (size_t r = 0; r < rows.size(); r++) {
            const auto [name, first, last, scored, output] = rows[r];
            const Job& job = *row_jobs[r];
            const Sequence& s = *job.sequence;
            const Ids all = read(global_pool, r, b, 0, last);
            read(local_pool, r, b, std::max(0, first - behind), last);
            const auto window = [&](int p) {
                return read(local_pool, r, b, std::max(0, p - behind), p);
            };
            const auto next_output = [&](int p) -> const Output& {
                must(results.size() < b.outputs.size(), "an output is missing");
                const Output& out = b.outputs[results.size()];
                must(out.token == b.row_start[r] + p - first, "an output is about another token");
                return out;
            };
            const int due = int(job.got.scores.size());
            for (int p = due; p < due + scored; p++) {
                const Output& out = next_output(p);
                must(out.target == s.tokens[size_t(p) + 1], "the target is not the next token");
                must(out.sampling.logprobs == job.wishes.prompt_logprobs, "other alternatives");
                must(out.adjustments.empty() && !out.allowed, "a target is not sampled");
                const float logprob =
                    logprob_of(out.target, {all.begin(), all.begin() + p + 1}, window(p));
                results.push_back({out.target, logprob, 1, {}});
            }
            if (!output || s.max_tokens == 0) continue;
            const Output& out = next_output(last);
            must(out.target == -1 && out.sampling.seed == s.sampling.seed, "another's sampling");
            must(out.index == int(job.got.ids.size()), "the index of an output");
            must(carries(out, adjusted(job.wishes, s.tokens, s.prompt_tokens)),
                 "the adjustments are not the text's");
            if (const auto* slow = dynamic_cast<SlowConstraint*>(s.constraint.get())) {
                must(out.allowed && out.allowed == slow->set, "ids that no constraint allows");
                must(slow->told == job.got.ids, "a constraint was told other ids than the client");
            } else {
                const bool early = out.index < job.wishes.min_tokens;
                must(out.allowed == (early ? s.allowed_before : s.allowed),
                     "the wrong ids are allowed");
            }
            const int id = next_id(all, window(last), out.sampling.seed, out.index);
            results.push_back({id, 0, 1, {}});
        }
        must(results.size() == b.outputs.size(), "an output too many");
        return results;
    }

    void deliver(const Batch& b, const Results& results, const Step& rows) {
        const auto tokens = scheduler.finish(results);
        size_t next = 0, result = 0;
        const auto take = [&](const Job& job, bool of_prompt, const Result& want) {
            must(next < tokens.size(), "a token is missing");
            const gemma::Delivery& token = tokens[next++];
            must(&job == &job_of(*token.sequence) && token.result.id == want.id &&
                     token.result.logprob == want.logprob && token.result.rank == want.rank,
                 "a token for another");
            must(token.of_prompt == of_prompt, "prompt and text are told apart");
            return token.finish;
        };
        for (size_t r = 0; r < rows.size(); r++) {
            Job& job = *row_jobs[r];
            const Sequence& s = *job.sequence;
            for (int n = 0; n < rows[r].scored; n++) {
                auto& scores = job.got.scores;
                scores.push_back(results[result].logprob);
                must(scores.back() == job.expected.scores.at(scores.size() - 1),
                     "a prompt's logprobs depend on the neighbours");
                must(take(job, true, results[result++]) == Finish::none, "a prompt ends nothing");
            }
            if (!rows[r].output) continue;
            Ids& ids = job.got.ids;
            if (s.max_tokens > 0) ids.push_back(results[result].id);
            must(ids.size() <= job.expected.ids.size() &&
                     std::equal(ids.begin(), ids.end(), job.expected.ids.begin()),
                 "the text depends on the neighbours");
            must(s.tokens.size() == size_t(s.prompt_tokens) + ids.size() &&
                     std::equal(ids.begin(), ids.end(), s.tokens.begin() + s.prompt_tokens),
                 "the token is appended");
            const Finish finish = take(job, false, s.max_tokens > 0 ? results[result++] : Result{});
            if (finish != Finish::none) end(job, finish);
        }
        must(next == tokens.size() && result == b.outputs.size(), "a token too many");
    }

    void check_window() const {
        for (const auto& job : live) {
            const Sequence& s = *job->sequence;
            // The first position that the next token sees.
            const int seen = std::max(0, s.computed - limits.window + 1);
            for (int i = 0; i < seen / page_tokens; i++)
                must(s.pages[local_pool][size_t(i)] == -1, "a page behind the window is held");
        }
    }

    void forget_cancelled() {
        for (auto job = live.begin(); job != live.end();) {
            const auto next = std::next(job);
            if ((*job)->sequence->cancelled) end(**job, Finish::abort);
            job = next;
        }
    }

    void end(Job& job, Finish finish) {
        job.got.finish = finish;
        if (finish != Finish::abort) {
            must(job.got.ids == job.expected.ids, "the answer is whole");
            must(job.got.scores == job.expected.scores, "so are the logprobs of the prompt");
            must(finish == job.expected.finish, "the reason of the end");
        }
        must(!holds_pages(job), "pages outlive their sequence");
        live.remove_if([&](const auto& j) { return j.get() == &job; });
    }

    std::vector<Place> memory[2];  // by Pool
    std::vector<Job*> row_jobs;    // [R]
};

// [3] Scripts -------------------------------------------------------------------------------------
//
// One string is one step. "a0..63 b9!" computes positions 0 to 63 of a, and 9 of b. "!" means that
// all of the sequence is then computed: the step yields a token, or ends a text with max_tokens 0.
// "a9~20!" stands for twelve steps of one token each. "a0..63+64": the step yields 64 prompt
// logprobs.

struct Ask {
    int step;  // the sequence arrives before this step
    char name;
    Ids prompt;
    int max_tokens;
    Wishes wishes = {};
};

struct Cancel {
    int step;  // the client leaves before this step
    char name;
};

struct Script {
    const char* title;
    Limits limits;  // max_num_seqs, max_batched_tokens, window, {local pages, global pages}
    std::vector<Ask> asks;
    std::vector<std::string> steps;
    std::vector<Cancel> cancels = {};
};

bool goes_on(const Step& before, const Step& now) {  // `now` decodes one token more in each row
    return std::equal(
        before.begin(), before.end(), now.begin(), now.end(), [](const Span& a, const Span& b) {
            return a.name == b.name && a.first == a.last && b.first == b.last &&
                   b.first == a.last + 1 && a.output && b.output && a.scored == b.scored;
        });
}

std::string line(const Step& from, const Step& to) {
    std::string s;
    for (size_t r = 0; r < from.size(); r++) {
        const int first = from[r].first, last = to[r].last;
        s += (r ? " " : "") + std::string(1, from[r].name) + std::to_string(first);
        if (first < last) s += (from[r].last == last ? ".." : "~") + std::to_string(last);
        if (from[r].scored) s += "+" + std::to_string(from[r].scored);
        if (from[r].output) s += "!";
    }
    return s;
}

std::vector<std::string> play(const Script& script) {
    Machine machine(script.limits);
    std::vector<Step> steps;
    std::map<char, std::shared_ptr<Job>> jobs;
    for (int n = 0;; n++) {
        bool more = false;
        for (const Ask& ask : script.asks) {
            if (ask.step == n)
                jobs[ask.name] =
                    machine.add(ask.name, ask.prompt, ask.max_tokens, {}, 0, ask.wishes);
            more |= ask.step > n;
        }
        for (const Cancel& cancel : script.cancels) {
            if (cancel.step == n) jobs.at(cancel.name)->sequence->cancelled = true;
        }
        steps.push_back(machine.step());
        if (steps.back().empty() && !more) break;
    }
    machine.check_idle();
    for (const auto& [name, job] : jobs) {
        const bool left = std::any_of(script.cancels.begin(), script.cancels.end(),
                                      [n = name](const Cancel& c) { return c.name == n; });
        CHECK((job->got.finish == Finish::abort) == left);
    }
    std::vector<std::string> lines;
    for (size_t from = 0, to; from + 1 < steps.size(); from = to) {
        for (to = from + 1; goes_on(steps[to - 1], steps[to]);) to++;
        lines.push_back(line(steps[from], steps[to - 1]));
    }
    return lines;
}

void play_all(const std::vector<Script>& scripts) {
    for (const Script& script : scripts) {
        INFO(script.title);
        CHECK(play(script) == script.steps);
    }
}

TEST_CASE("scheduler: which sequences run, and how many tokens of each") {
    const int W = 64, many = 99;
    play_all({
        {"all at once, in the order of arrival",
         {8, 100, W, {many, many}},
         {{0, 'a', words(1, 3), 2}, {0, 'b', words(2, 5), 1}, {0, 'c', words(3, 2), 2}},
         {"a0..2! b0..4! c0..1!", "a3! c2!"}},
        {"one that comes later joins those that run",
         {8, 100, W, {many, many}},
         {{0, 'a', words(1, 3), 4}, {2, 'b', words(2, 5), 2}},
         {"a0..2!", "a3!", "a4! b0..4!", "a5! b5!"}},
        {"no more rows than max_num_seqs",
         {2, 100, W, {many, many}},
         {{0, 'a', words(1, 3), 2}, {0, 'b', words(2, 3), 3}, {0, 'c', words(3, 3), 1}},
         {"a0..2! b0..2!", "a3! b3!", "b4! c0..2!"}},
        {"a prompt of several steps",
         {8, 32, W, {many, many}},
         {{0, 'a', words(1, 70), 2}},
         {"a0..31", "a32..63", "a64..69!", "a70!"}},
        {"a prompt of exactly one step",
         {8, 32, W, {many, many}},
         {{0, 'a', words(1, 32), 2}},
         {"a0..31!", "a32!"}},
        {"what one prompt leaves of the budget the next one takes",
         {8, 32, W, {many, many}},
         {{0, 'a', words(1, 20), 1}, {0, 'b', words(2, 30), 1}, {0, 'c', words(3, 9), 1}},
         {"a0..19! b0..11", "b12..29! c0..8!"}},
        {"of those that are less than a quarter of the oldest the shortest goes ahead",
         {8, 32, W, {many, many}},
         {{0, 'a', words(1, 90), 1},
          {1, 'b', words(2, 20), 1},
          {1, 'c', words(3, 14), 1},
          {1, 'd', words(4, 12), 2}},
         {"a0..31", "a32..51 d0..11!", "a52..82 d12!", "a83..89! b0..19! c0..4", "c5..13!"}},
        {"decode rows first, the prompt takes what is left",
         {8, 16, W, {many, many}},
         {{0, 'a', words(1, 4), 5}, {0, 'b', words(2, 40), 2}},
         {"a0..3! b0..11", "a4! b12..26", "a5! b27..39!", "a6! b40!", "a7!"}},
        {"a budget smaller than the rows serves the oldest",
         {8, 2, W, {many, many}},
         {{0, 'a', words(1, 1), 3}, {0, 'b', words(2, 1), 3}, {0, 'c', words(3, 1), 2}},
         {"a0~2! b0~2!", "c0~1!"}},
        {"across the edges of pages, with not one page to spare",
         {8, 100, W, {3, 3}},
         {{0, 'a', words(1, 31), 60}},
         {"a0..30!", "a31~89!"}},
        {"a prompt waits until all of it has room beside the others",
         {8, 100, W, {many, 4}},
         {{0, 'a', words(1, 40), 3}, {0, 'b', words(2, 64), 1}, {0, 'c', words(3, 1), 1}},
         {"a0..39!", "a40~41!", "b0..63! c0!"}},
        {"the same in the local pool",
         {8, 100, W, {4, many}},
         {{0, 'a', words(1, 40), 3}, {0, 'b', words(2, 64), 1}, {0, 'c', words(3, 1), 1}},
         {"a0..39!", "a40~41!", "b0..63! c0!"}},
    });
}

TEST_CASE("scheduler: when pages run out the newest waits, and is computed again") {
    const int W = 64, many = 99;
    // Both have 3 global pages when a needs a 4th, so b is preempted and its pages are cached. a
    // then takes the last of them, and b finds its first 64 tokens in the cache.
    const std::vector<Ask> two{{0, 'a', words(1, 40), 60}, {0, 'b', words(2, 40), 60}};
    const std::vector<std::string> exchange{"a0..39! b0..39!", "a40~95! b40~95!", "a96~98!",
                                            "b64..96!", "b97~98!"};
    play_all({
        {"global pages", {8, 200, W, {many, 6}}, two, exchange},
        {"local pages, no window", {8, 200, 999, {6, many}}, two, exchange},
        {"it goes on before those that came after it",
         {8, 200, W, {many, 6}},
         {two[0], two[1], {58, 'c', words(3, 5), 2}},
         {"a0..39! b0..39!", "a40~95! b40~95!", "a96~98!", "b64..96!", "b97~98!", "c0..4!", "c5!"}},
        {"in steps of the budget, and no token is drawn twice",
         {8, 16, W, {many, 6}},
         {{0, 'a', words(1, 40), 60}, {0, 'b', words(2, 39), 60}},
         {"a0..15", "a16..31", "a32..39! b0..7", "a40! b8..22", "a41! b23..37", "a42~95! b38~91!",
          "a96~98!", "b64..79", "b80..92!", "b93~97!"}},
    });
}

// b decodes with the only token of each step while a is amid its prompt. When b needs its third
// page it gives up its own, and the step has no row left: an empty batch would look like an idle
// end.
TEST_CASE("scheduler: where the only row of a step gives up its pages, another row runs") {
    Machine machine({8, 1, 999, {99, 4}});
    machine.add('a', words(1, 40), 2);
    for (int i = 0; i < 35; i++) machine.step();
    machine.add('b', words(2, 1), 70);
    machine.run();
    CHECK(machine.scheduler.preemptions() > 0);
}

TEST_CASE("scheduler: a prompt that begins like another shares its pages") {
    const int W = 64, many = 99;
    const Ids common = words(1, 300);
    const auto first = [&](int n) { return Ids(common.begin(), common.begin() + n); };
    Sequence turn;  // a prompt and its answer
    turn.tokens = first(40), turn.max_tokens = 30;
    const Ids talk = turn.tokens + undisturbed(turn, W).ids;
    const auto twice = [&](const char* title, int n, const char* hit) {
        return Script{title,
                      {8, 400, W, {many, many}},
                      {{0, 'a', first(n), 1}, {1, 'b', first(n), 1}},
                      {"a0.." + std::to_string(n - 1) + "!", hit}};
    };
    play_all({
        twice("less than a page", 31, "b0..30!"),
        twice("one page, but one token must be computed", 32, "b0..31!"),
        twice("one page and a token", 33, "b32!"),
        twice("two pages less a token", 63, "b32..62!"),
        twice("two pages, but one token must be computed", 64, "b32..63!"),
        twice("two pages and a token", 65, "b64!"),
        twice("past the window", 257, "b256!"),
        {"equal prompts that arrive together are computed once, those behind them do not wait",
         {8, 400, W, {many, many}},
         {{0, 'a', first(65), 1},
          {0, 'b', first(65), 1},
          {0, 'c', first(65), 1},
          {0, 'd', words(3, 5), 1}},
         {"a0..64! d0..4!", "b64! c64!"}},
        {"a prompt waits while a longer one fills its pages, and no longer",
         {8, 40, W, {many, many}},
         {{0, 'a', first(200), 2}, {0, 'b', first(70), 1}},
         {"a0..39", "a40..79", "a80..113 b64..69!", "a114..153", "a154..193", "a194..199!",
          "a200!"}},
        {"a prompt of less than a page and a token does not wait",
         {8, 400, W, {many, many}},
         {{0, 'a', first(32), 1}, {0, 'b', first(32), 1}},
         {"a0..31! b0..31!"}},
        {"the one whose pages it waits for leaves",
         {8, 40, W, {many, many}},
         {{0, 'a', first(200), 2}, {0, 'b', first(70), 1}},
         {"a0..39", "b32..69!"},
         {{1, 'a'}}},
        {"from one that still runs",
         {8, 400, W, {many, many}},
         {{0, 'a', first(70), 4}, {1, 'b', first(64) + words(2, 9), 3}},
         {"a0..69!", "a70! b64..72!", "a71~72! b73~74!"}},
        {"from an answer, in the next turn of a talk",
         {8, 400, W, {many, many}},
         {{0, 'a', first(40), 30}, {40, 'b', talk + words(2, 9), 1}},
         {"a0..39!", "a40~68!", "", "b64..78!"}},
        {"shared pages count once: five of 65 tokens in 2 + 5 pages",
         {8, 400, W, {13, 13}},
         {{0, 'a', first(65), 9},
          {1, 'b', first(65), 8},
          {1, 'c', first(65), 8},
          {1, 'd', first(65), 8},
          {1, 'e', first(65), 8}},
         {"a0..64!", "a65~72! b64~71! c64~71! d64~71! e64~71!"}},
    });
}

TEST_CASE("scheduler: a page is shared only if all tokens up to its end are equal") {
    const Ids prompt = words(1, 97);
    for (int at = 0; at < 97; at++) {
        Ids other = prompt;
        other[size_t(at)] = (other[size_t(at)] + 1) % vocabulary;
        CAPTURE(at);
        const int hit = std::min(at / page_tokens * page_tokens, 96);
        const std::string rest = hit == 96 ? "b96!" : "b" + std::to_string(hit) + "..96!";
        CHECK(play({"", {8, 400, 64, {99, 99}}, {{0, 'a', prompt, 1}, {1, 'b', other, 1}}, {}}) ==
              std::vector<std::string>{"a0..96!", rest});
    }
    // Pages with equal tokens are not shared if the tokens before them differ.
    const Ids page = words(2, 32), x = words(3, 32), tail = words(4, 1);
    CHECK(play({"",
                {8, 400, 64, {99, 99}},
                {{0, 'a', x + page + tail, 1},
                 {1, 'b', page + x + tail, 1},
                 {2, 'c', page + page + page + tail, 1}},
                {}}) == std::vector<std::string>{"a0..64!", "b0..64!", "c32..96!"});
}

TEST_CASE("scheduler: equal pages computed in the same step are cached once") {
    Machine machine({8, 400, 64, {9, 9}});
    for (const char name : {'a', 'b'}) machine.add(name, words(1, 65), 1);
    machine.run();
    for (const Pool pool : {local_pool, global_pool})
        CHECK(machine.scheduler.use(pool).cached == 2);
}

TEST_CASE("scheduler: cached pages go when room is needed, the least recently used first") {
    const int many = 20;
    for (const auto& [local, global] : {std::pair(many, 6), {6, many}}) {
        CAPTURE(local, global);
        const Limits limits{1, 400, 64, {local, global}};
        const Ids a = words(1, 65), b = words(2, 65), big = words(3, 97);  // 2, 2, 4 pages to evict
        play_all({
            {"the older one goes",
             limits,
             {{0, 'a', a, 1}, {1, 'b', b, 1}, {2, 'c', big, 1}, {3, 'd', b, 1}, {4, 'e', a, 1}},
             {"a0..64!", "b0..64!", "c0..96!", "d64!", "e0..64!"}},
            {"unless it was used since",
             limits,
             {{0, 'a', a, 1},
              {1, 'b', b, 1},
              {2, 'x', a, 1},
              {3, 'c', big, 1},
              {4, 'd', a, 1},
              {5, 'e', b, 1}},
             {"a0..64!", "b0..64!", "x64!", "c0..96!", "d64!", "e0..64!"}},
        });
    }
    play_all({{"of one prefix the end goes first",
               {1, 400, 64, {many, 6}},
               {{0, 'a', words(1, 129), 1}, {1, 'b', words(2, 100), 1}, {2, 'c', words(1, 129), 1}},
               {"a0..128!", "b0..99!", "c64..128!"}}});
}

// A hit of n pages needs n global pages, and local pages for the last min(32n, W-1) tokens. A
// prompt of 4 pages and 1 token is cached; then `evicted` of its local pages are evicted.
TEST_CASE("scheduler: a hit needs the local pages that the window still sees") {
    struct Case {
        int window;
        std::vector<int> hits;  // by `evicted`
    };
    for (const auto& [window, hits] : std::vector<Case>{
             {1, {128, 128, 128, 128, 128}},  // needs no local page
             {2, {128, 128, 128, 128, 0}},    // 1 token: 1 page; evicted in the order 2 1 0 3
             {33, {128, 128, 128, 128, 0}},   // 32 tokens: 1 page; 1 0 2 3
             {34, {128, 128, 128, 0, 0}},     // 33 tokens: 2 pages; 1 0 2 3
             {65, {128, 128, 128, 0, 0}},     // 64 tokens: 2 pages; 0 1 3 2
             {66, {128, 128, 0, 0, 0}},       // 65 tokens: 3 pages; 0 1 3 2
             {200, {128, 96, 64, 32, 0}},     // all 4 pages; 3 2 1 0
         }) {
        for (int evicted = 0; evicted <= 4; evicted++) {
            CAPTURE(window, evicted);
            const auto lines = play({"",
                                     {1, 400, window, {9, 99}},
                                     {{0, 'a', words(1, 129), 1},
                                      {1, 'b', words(2, 32 * (5 + evicted)), 1},
                                      {2, 'c', words(1, 129), 1}},
                                     {}});
            const int hit = hits[size_t(evicted)];
            CHECK(lines.back() == "c" + (hit == 128 ? "128!" : std::to_string(hit) + "..128!"));
        }
    }
}

// [4] Windows, limits, stops, cancellation --------------------------------------------------------

int pages_seen(int window) { return (window + page_tokens - 2) / page_tokens + 1; }

TEST_CASE("scheduler: a long sequence holds only the local pages that its window sees") {
    for (const int window : {1, 2, 31, 32, 33, 34, 40, 63, 64, 65, 66, 100, 128, 129}) {
        for (const int budget : {7, 32, 50, 300}) {
            CAPTURE(window, budget);
            Machine machine({1, budget, window, {pages_seen(window), 9}});
            REQUIRE(machine.scheduler.fits(9 * page_tokens));
            const auto job = machine.add('a', words(1, 150), 9 * page_tokens - 150);
            const Sequence& s = *job->sequence;
            int most = 0;
            for (bool more = true; more;) {
                if (s.computed >= s.prompt_tokens) {  // the prompt is computed
                    machine.while_it_runs = [&] {
                        most = std::max(most, machine.scheduler.use(local_pool).held);
                    };
                }
                more = !machine.step().empty();
            }
            machine.check_idle();
            CHECK(most == pages_seen(window));
            CHECK(most <= window / page_tokens + 2);
        }
    }
}

TEST_CASE("scheduler: a sequence that fits runs alone to its end, any other is refused") {
    struct Case {
        int window, local, global, longest;  // tokens of the longest sequence that fits
    };
    for (const auto& [window, local, global, longest] : std::vector<Case>{
             {64, 3, 10, 320},
             {64, 99, 10, 320},  // the global pool limits it
             {64, 2, 10, 64},    // 64 tokens can span 3 pages
             {64, 1, 10, 32},
             {33, 2, 10, 320},
             {34, 2, 10, 64},
             {32, 2, 10, 320},
             {32, 1, 10, 32},
             {2, 1, 10, 32},
             {1, 1, 10, 320},
             {1, 1, 1, 32},
             {999, 4, 10, 128},
         }) {
        CAPTURE(window, local, global);
        for (int tokens = 1; tokens <= 400; tokens++) {
            CAPTURE(tokens);
            REQUIRE(Scheduler({8, 9, window, {local, global}}).fits(tokens) == (tokens <= longest));
        }
        for (const int budget : {1, 31, 32, 33, 1000}) {
            Machine machine({8, budget, window, {local, global}});
            CAPTURE(budget);
            // The second of each pair finds the pages of the first in the cache.
            for (const int prompt : {1, 1, longest / 2, longest / 2, longest - 1, longest - 1}) {
                machine.add('a', words(prompt, prompt), longest - prompt);
                machine.run();
            }
            CHECK(machine.scheduler.preemptions() == 0);
        }
    }
}

TEST_CASE("scheduler: an answer ends at a stop id or at max_tokens") {
    const Ids prompt = words(1, 9);
    Sequence free;
    free.tokens = prompt, free.max_tokens = 40;
    const Ids ids = undisturbed(free, 64).ids;
    const auto where = [&](int id) {
        return int(std::find(ids.begin(), ids.end(), id) - ids.begin());
    };
    struct Case {
        const char* title;
        int max_tokens;
        Ids stop_ids;
        int length;
        Finish finish;
    };
    const int sixth = where(ids[6]);  // the first occurrence of that id
    REQUIRE((sixth > 0 && where(ids[12]) > sixth));
    for (const auto& [title, max_tokens, stop_ids, length, finish] : std::vector<Case>{
             {"max_tokens", 5, {}, 5, Finish::length},
             {"one token", 1, {}, 1, Finish::length},
             {"a stop id, which counts", 40, {ids[6]}, sixth + 1, Finish::stop},
             {"the first of two stop ids", 40, {ids[12], ids[6]}, sixth + 1, Finish::stop},
             {"a stop id as the first token", 40, {ids[0]}, 1, Finish::stop},
             {"a stop id as the last token", sixth + 1, {ids[6]}, sixth + 1, Finish::stop},
             {"a stop id that would come later", sixth, {ids[6]}, sixth, Finish::length},
             {"a stop id never met, though it is in the prompt", 3, {prompt[2]}, 3, Finish::length},
         }) {
        INFO(title);
        Machine machine({8, 100, 64, {9, 9}});
        const auto job = machine.add('a', prompt, max_tokens, stop_ids);
        machine.run();
        CHECK(job->got.ids == Ids(ids.begin(), ids.begin() + length));
        CHECK(job->got.finish == finish);
    }
}

TEST_CASE("scheduler: a cancelled sequence leaves before the next step, waiting or running") {
    const int W = 64, many = 99;
    const std::vector<Ask> two{{0, 'a', words(1, 40), 60}, {0, 'b', words(2, 40), 60}};
    play_all({
        {"before it ever ran",
         {1, 100, W, {many, many}},
         {{0, 'a', words(1, 3), 3}, {0, 'b', words(2, 3), 3}, {0, 'c', words(3, 3), 1}},
         {"a0..2!", "a3~4!", "c0..2!"},
         {{1, 'b'}}},
        {"in its first moment",
         {1, 100, W, {many, many}},
         {{0, 'a', words(1, 3), 3}, {0, 'b', words(2, 3), 1}},
         {"b0..2!"},
         {{0, 'a'}}},
        {"in the middle of its prompt",
         {8, 32, W, {many, many}},
         {{0, 'a', words(1, 90), 3}, {0, 'b', words(2, 40), 1}},
         {"a0..31", "a32..63", "b0..31", "b32..39!"},
         {{2, 'a'}}},
        {"while it decodes, beside others",
         {8, 100, W, {many, many}},
         {{0, 'a', words(1, 3), 6}, {0, 'b', words(2, 3), 6}},
         {"a0..2! b0..2!", "a3! b3!", "b4~7!"},
         {{2, 'a'}}},
        {"while it waits to be computed again",
         {8, 200, W, {many, 6}},
         two,
         {"a0..39! b0..39!", "a40~95! b40~95!", "a96~98!"},
         {{58, 'b'}}},
        {"in the moment in which it would have been preempted",
         {8, 200, W, {many, 6}},
         two,
         {"a0..39! b0..39!", "a40~95! b40~95!", "a96~98!"},
         {{57, 'b'}}},
        {"in the moment in which another would have been, for its sake",
         {8, 200, W, {many, 6}},
         two,
         {"a0..39! b0..39!", "a40~95! b40~95!", "b96~98!"},
         {{57, 'a'}}},
        {"everyone",
         {8, 100, W, {many, many}},
         {{0, 'a', words(1, 3), 6}, {0, 'b', words(2, 3), 6}},
         {"a0..2! b0..2!"},
         {{1, 'a'}, {1, 'b'}}},
        {"its whole pages stay for others",
         {8, 100, W, {many, many}},
         {{0, 'a', words(1, 70), 6}, {1, 'b', words(1, 70), 1}},
         {"a0..69!", "b64..69!"},
         {{1, 'a'}}},
    });
}

TEST_CASE("scheduler: a sequence is cancelled while the model computes") {
    for (const int max_tokens : {1, 5}) {  // the token is its last, or not
        Machine machine({8, 100, 64, {9, 9}});
        const auto job = machine.add('a', words(1, 40), max_tokens);
        machine.while_it_runs = [&] { job->sequence->cancelled = true; };
        machine.run();
        CHECK(job->got.ids.size() == 1);  // a computed token is delivered
        CHECK(job->got.finish == (max_tokens == 1 ? Finish::length : Finish::abort));
    }
}

TEST_CASE("scheduler: rows whose window is full do not block newcomers") {
    // The pools that split_memory would give 16 rows with a window of 64: 3 local pages for each
    // row, and 3 for a step.
    Scheduler scheduler({16, 64, 64, {16 * 3 + 3, 1000}});
    const auto add = [&](int prompt, int max_tokens) {
        auto s = std::make_shared<Sequence>();
        s->tokens.assign(size_t(prompt), 7);
        s->tokens[0] = int(prompt + scheduler.running());  // rows share no prefix
        s->prompt_tokens = prompt, s->max_tokens = max_tokens;
        scheduler.add(s);
        return s;
    };
    const auto step = [&] {
        const Batch batch = scheduler.next();
        scheduler.finish(Results(batch.outputs.size()));
        return batch;
    };
    for (int i = 0; i < 15; i++) {
        add(70 + i, 1000);  // rows end at different places in a page
        for (int n = 0; n < 5; n++) step();
    }
    for (int n = 0; n < 100; n++) {
        const auto newcomer = add(1, 1);
        const Batch batch = step();
        CHECK(batch.outputs.size() == 16);
        CHECK(newcomer->tokens.size() == 2);
    }
    CHECK(scheduler.preemptions() == 0);
}

// [5] Prompt logprobs, penalties, masks -----------------------------------------------------------

const Wishes score{.prompt_logprobs = 2};

TEST_CASE("scheduler: the logprobs of a prompt come out as it is computed") {
    const int W = 64, many = 99;
    play_all({
        {"all in one step",
         {8, 100, W, {many, many}},
         {{0, 'a', words(1, 40), 3, score}},
         {"a0..39+39!", "a40~41!"}},
        {"chunk by chunk",
         {8, 16, W, {many, many}},
         {{0, 'a', words(1, 40), 2, score}},
         {"a0..15+16", "a16..31+16", "a32..39+7!", "a40!"}},
        {"all before the last chunk",
         {8, 39, W, {many, many}},
         {{0, 'a', words(1, 40), 3, score}},
         {"a0..38+39", "a39~41!"}},
        {"of two tokens it is one, of one token none",
         {8, 100, W, {many, many}},
         {{0, 'a', words(1, 2), 2, score}, {0, 'b', words(2, 1), 2, score}},
         {"a0..1+1! b0!", "a2! b1!"}},
        {"beside others, those who ask and those who do not",
         {8, 32, W, {many, many}},
         {{0, 'a', words(1, 3), 4},
          {0, 'b', words(2, 50), 3, score},
          {0, 'c', words(3, 10), 1, score},
          {0, 'd', words(4, 5), 2}},
         {"a0..2! b0..28+29", "a3! b29..49+20! c0..4+5 d0..4!", "a4! b50! c5..9+4! d5!",
          "a5! b51!"}},
    });
}

TEST_CASE("scheduler: prompt logprobs take no cached page until all are delivered") {
    const int W = 64, many = 99;
    const Ids common = words(1, 70);
    play_all({
        {"it computes all of it, though others need not",
         {8, 100, W, {many, many}},
         {{0, 'a', common, 1}, {1, 'b', common, 2, score}, {3, 'c', common, 1}},
         {"a0..69!", "b0..69+69!", "b70!", "c64..69!"}},
        {"others take from the cache what it computed",
         {8, 100, W, {many, many}},
         {{0, 'a', common, 0, score}, {1, 'b', common, 1}, {2, 'c', common, 0, score}},
         {"a0..69+69!", "b64..69!", "c0..69+69!"}},
        {"preempted when all are out",
         {8, 200, W, {many, 6}},
         {{0, 'a', words(1, 40), 60}, {0, 'b', words(2, 40), 60, score}},
         {"a0..39! b0..39+39!", "a40~95! b40~95!", "a96~98!", "b64..96!", "b97~98!"}},
    });
    for (const int max_tokens : {0, 5}) {
        // Each step computes one token of each, until there is no page for b's 97th.
        Machine machine({8, 2, W, {many, 7}});
        const auto a = machine.add('a', words(1, 2), 200);
        const auto b = machine.add('b', words(2, 100), max_tokens, {}, 0, score);
        while (b->preemptions == 0) machine.step();
        CHECK(machine.preempted_amid == 1);
        CHECK(b->got.scores.size() == 96);
        CHECK(machine.scheduler.use(global_pool).cached == 3);
        a->sequence->cancelled = true;
        for (int first = 0; first < 100; first += 2) {
            const Step step = machine.step();
            REQUIRE(step.size() == 1);
            CHECK((step[0].first == first && step[0].last == first + 1));
            CHECK(step[0].scored == (first < 96 ? 0 : first < 98 ? 2 : 1));
        }
        machine.run();
        CHECK(b->got.finish == Finish::length);
        CHECK(b->sequence->cached_tokens == 0);
    }
}

TEST_CASE("scheduler: each logprob of a prompt comes once, whatever the budget") {
    for (int budget = 1; budget <= 400; budget += budget < 70 ? 1 : 330) {
        CAPTURE(budget);
        Machine machine({8, budget, 40, {99, 14}});
        for (const int size : {1, 2, 3}) machine.add('o', words(size, size), 120);
        std::vector<std::shared_ptr<Job>> jobs;
        for (const int size : {100, 31, 100, 32, 33, 1, 64, 65, 2, 65, 100}) {
            const int max_tokens = jobs.size() % 3 ? 40 : 0;
            jobs.push_back(machine.add('a', words(size, size), max_tokens, {}, 0, score));
        }
        machine.run();
        for (const auto& job : jobs) {
            CHECK(int(job->got.scores.size()) == job->sequence->prompt_tokens - 1);
            CHECK(job->got.scores == job->expected.scores);
            CHECK(job->sequence->cached_tokens == 0);
        }
    }
    // Each step computes one token of the prompt, while each other sequence grows by three pages.
    for (int others = 1; others < 8; others++) {
        CAPTURE(others);
        Machine machine({8, others + 1, 40, {99, 5 + 2 * others}});
        for (int i = 1; i <= others; i++) machine.add('o', words(i, i), 200);
        const auto a = machine.add('a', words(100, 100), 40, {}, 0, score);
        machine.run();
        CHECK(machine.preempted_amid > 0);
        CHECK(a->got.scores == a->expected.scores);
    }
}

TEST_CASE("scheduler: a text of no tokens ends when its prompt is computed") {
    const int W = 64, many = 99;
    const auto both = [&](const char* title, const Limits& limits, std::vector<Ask> asks,
                          const std::vector<std::string>& plain,
                          const std::vector<std::string>& scored) {
        play_all({{title, limits, asks, plain}});
        for (Ask& ask : asks) ask.wishes = score;
        play_all({{title, limits, asks, scored}});
    };
    both("in one step", {8, 100, W, {many, many}}, {{0, 'a', words(1, 40), 0}}, {"a0..39!"},
         {"a0..39+39!"});
    both("in three", {8, 16, W, {many, many}}, {{0, 'a', words(1, 40), 0}},
         {"a0..15", "a16..31", "a32..39!"}, {"a0..15+16", "a16..31+16", "a32..39+7!"});
    both("of one token", {8, 16, W, {many, many}}, {{0, 'a', words(1, 1), 0}}, {"a0!"}, {"a0!"});
    both("of all the pages there are", {8, 100, W, {3, 3}}, {{0, 'a', words(1, 96), 0}},
         {"a0..95!"}, {"a0..95+95!"});
    both("beside others", {8, 100, W, {many, many}},
         {{0, 'a', words(1, 3), 2}, {0, 'b', words(2, 40), 0}, {0, 'c', words(3, 4), 2}},
         {"a0..2! b0..39! c0..3!", "a3! c4!"}, {"a0..2+2! b0..39+39! c0..3+3!", "a3! c4!"});
    both("from the cache", {8, 100, W, {many, many}},
         {{0, 'a', words(1, 70), 0}, {1, 'b', words(1, 70), 0}}, {"a0..69!", "b64..69!"},
         {"a0..69+69!", "b0..69+69!"});
}

// A scheduler with one sequence, whose generated ids the test chooses.
struct Dictation {
    explicit Dictation(const std::shared_ptr<Sequence>& s) {
        s->prompt_tokens = int(s->tokens.size());
        scheduler.add(s);
    }
    Output next(int id) {  // the Output of the step that then generates `id`
        const Batch& batch = scheduler.next();
        REQUIRE(batch.outputs.size() == 1);
        const Output out = batch.outputs[0];
        scheduler.finish({{id, 0, 1, {}}});
        return out;
    }
    Scheduler scheduler{{8, 100, 64, {9, 9}}};
};

TEST_CASE("scheduler: penalties count what was generated, repetition the prompt too") {
    struct Case {
        const char* title;
        float presence, frequency, repetition;
        std::vector<Adjustment> before;                // as the request sets them
        std::vector<std::vector<Adjustment>> carried;  // by the Outputs of the ids 7, 9, 7, 7
    };
    const std::vector<Adjustment> none, bias{{7, -1.5f}, {30, 4}};
    for (const auto& [title, presence, frequency, repetition, before, carried] : std::vector<Case>{
             {"neutral", 0, 0, 1, none, {none, none, none, none}},
             {"neutral beside a bias", 0, 0, 1, bias, {bias, bias, bias, bias}},
             {"presence",
              0.5f,
              0,
              1,
              none,
              {none,
               {{7, 0, 1, 0.5f}},
               {{7, 0, 1, 0.5f}, {9, 0, 1, 0.5f}},
               {{7, 0, 1, 0.5f}, {9, 0, 1, 0.5f}}}},
             {"frequency",
              0,
              0.25f,
              1,
              none,
              {none,
               {{7, 0, 1, 0.25f}},
               {{7, 0, 1, 0.25f}, {9, 0, 1, 0.25f}},
               {{7, 0, 1, 0.5f}, {9, 0, 1, 0.25f}}}},
             {"both, and negative, beside a bias",
              -2,
              0.25f,
              1,
              bias,
              {bias,
               {{7, -1.5f, 1, -1.75f}, {30, 4}},
               {{7, -1.5f, 1, -1.75f}, {30, 4}, {9, 0, 1, -1.75f}},
               {{7, -1.5f, 1, -1.5f}, {30, 4}, {9, 0, 1, -1.75f}}}},
             {"repetition: 5 and 7 are in the prompt",
              0,
              0,
              1.5f,
              {{5, 0, 1.5f}, {7, 2, 1.5f}},
              {{{5, 0, 1.5f}, {7, 2, 1.5f}},
               {{5, 0, 1.5f}, {7, 2, 1.5f}},
               {{5, 0, 1.5f}, {7, 2, 1.5f}, {9, 0, 1.5f}},
               {{5, 0, 1.5f}, {7, 2, 1.5f}, {9, 0, 1.5f}}}},
             {"repetition of what only a bias knew",
              1,
              0,
              0.75f,
              {{5, 0, 0.75f}, {7, 0, 0.75f}, {9, 8}},
              {{{5, 0, 0.75f}, {7, 0, 0.75f}, {9, 8}},
               {{5, 0, 0.75f}, {7, 0, 0.75f, 1}, {9, 8}},
               {{5, 0, 0.75f}, {7, 0, 0.75f, 1}, {9, 8, 0.75f, 1}},
               {{5, 0, 0.75f}, {7, 0, 0.75f, 1}, {9, 8, 0.75f, 1}}}},
         }) {
        auto s = std::make_shared<Sequence>();
        s->tokens = {5, 7}, s->max_tokens = 9;
        s->presence = presence, s->frequency = frequency, s->repetition = repetition;
        s->adjustments = before;
        Dictation dictation(s);
        const int ids[] = {7, 9, 7, 7};
        for (size_t i = 0; i < 4; i++) {
            INFO(title << ", token " << i);
            const auto got = dictation.next(ids[i]).adjustments;
            REQUIRE(got.size() == carried[i].size());
            for (size_t a = 0; a < got.size(); a++) {
                INFO("id " << got[a].id);
                CHECK(got[a].id == carried[i][a].id);
                CHECK(got[a].bias == carried[i][a].bias);
                CHECK(got[a].repetition == carried[i][a].repetition);
                CHECK(got[a].penalty == carried[i][a].penalty);
            }
        }
    }
}

TEST_CASE("scheduler: until min_tokens are generated other ids are allowed") {
    const auto before = std::make_shared<const std::vector<uint32_t>>(1, 1u << 9),
               after = std::make_shared<const std::vector<uint32_t>>(1, ~0u);
    for (const int prompt : {1, 40}) {
        for (const int min_tokens : {0, 1, 3, 5}) {
            for (const auto& allowed : {after, {}}) {  // {}: all ids
                CAPTURE(prompt, min_tokens);
                auto s = std::make_shared<Sequence>();
                s->tokens = words(1, prompt), s->max_tokens = 5;
                s->min_tokens = min_tokens, s->allowed_before = before, s->allowed = allowed;
                Dictation dictation(s);
                for (int made = 0; made < 5; made++)
                    CHECK(dictation.next(9).allowed == (made < min_tokens ? before : allowed));
            }
        }
    }
}

TEST_CASE("scheduler: a row sits out the steps until its constraint has made its ids") {
    Machine machine({4, 64, 64, {20, 20}});
    const Wishes slow{.delay = 3};
    machine.add('a', words(1, 5), 3, {}, 0, slow);
    machine.add('b', words(2, 5), 4);
    const auto names = [](const Step& step) {
        std::string all;
        for (const Span& row : step) all += row.name;
        return all;
    };
    std::string rows;
    for (int step = 0; !machine.live.empty(); step++) rows += names(machine.step()) + " ";
    // Three steps apart. Alone, it is waited for: then a step is empty.
    CHECK(rows == "ab b b ab   a ");
    machine.check_idle();
}

TEST_CASE("scheduler: a sequence has started when it was first in a step") {
    Machine machine({2, 200, 64, {99, 6}});
    const auto a = machine.add('a', words(1, 40), 60), b = machine.add('b', words(2, 40), 60),
               c = machine.add('c', words(3, 5), 1);
    for (int n = 0; n < 20; n++) machine.step();
    const double noon = machine.now;
    machine.run();
    CHECK(a->sequence->started == 0.5);
    CHECK(b->sequence->started == 0.5);
    CHECK(b->sequence->preemptions == 1);
    CHECK(c->sequence->started > noon);
    machine.now = 1000;
    const auto d = machine.add('d', words(4, 40), 60), e = machine.add('e', words(5, 40), 60);
    machine.run();
    CHECK(d->sequence->started == 1000.5);
    CHECK((e->sequence->preemptions == 1 && e->sequence->started == 1000.5));
}

// [6] Crowds --------------------------------------------------------------------------------------

TEST_CASE("scheduler: with 4x too few pages every sequence still gets the same text") {
    for (const int window : {5, 40, 64, 999}) {
        for (const int budget : {5, 32, 200}) {
            CAPTURE(window, budget);
            // 12 sequences of 128 tokens need 48 global pages and up to 48 local ones; 12 exist.
            Machine machine({12, budget, window, {12, 12}});
            std::vector<std::shared_ptr<Job>> jobs;
            for (int i = 0; i < 12; i++) {
                Wishes wishes;
                if (i % 2) wishes = score;
                if (i % 3) wishes.presence = 0.5f, wishes.frequency = -0.25f;
                if (i % 4 == 3) wishes.repetition = 1.25f, wishes.bias = {{i, 1}, {i + 9, -8}};
                if (i % 5 == 4) wishes.min_tokens = 50, wishes.mask = i % 2;
                jobs.push_back(
                    machine.add('a', words(i, 20 + i), 108 - i, {}, uint64_t(i), wishes));
            }
            machine.run();
            for (const auto& job : jobs) CHECK(job->got.ids == job->expected.ids);
            CHECK(machine.scheduler.preemptions() > 0);
            CHECK(jobs[0]->sequence->preemptions == 0);  // the oldest is never preempted
            int sum = 0;
            for (const auto& job : jobs) sum += job->sequence->preemptions;
            CHECK(sum == machine.scheduler.preemptions());
        }
    }
}

// A long sequence ends although short ones never stop arriving: only earlier ones can delay it.
TEST_CASE("scheduler: a long sequence does not starve behind a stream of short ones") {
    Machine machine({4, 40, 40, {12, 12}});
    const auto big = machine.add('B', words(0, 300), 50);
    for (int n = 1; big->got.finish == Finish::none; n++) {
        REQUIRE(n < 400);
        machine.add('s', words(n, 1 + n % 9), 1 + n % 5);
        machine.step();
    }
    const auto second = machine.add('C', words(500, 300), 50);
    const auto behind = machine.live.size();
    for (size_t n = 1; second->got.finish == Finish::none; n++) {
        REQUIRE(n < 20 * behind + 400);
        machine.add('s', words(int(n), 1 + int(n) % 9), 1 + int(n) % 5);
        machine.step();
    }
    machine.run();
}

TEST_CASE("scheduler: random sequences, limits and cancellations") {
    int preemptions = 0, shared = 0, cancelled = 0, scored = 0;
    for (unsigned seed = 1; seed <= 24; seed++) {
        CAPTURE(seed);
        std::mt19937 random(seed);
        const auto pick = [&](int low, int high) {  // low..high; equal in every standard library
            return low + int(random() % unsigned(high - low + 1));
        };
        const int window = pick(0, 3) ? pick(1, 130) : 32 * pick(1, 4);
        const int longest = pick(70, 250);
        const Limits limits{pick(1, 16),
                            pick(0, 2) ? pick(1, 80) : 400,
                            window,
                            {pages_seen(window) + pick(0, 30),
                             (longest + page_tokens - 1) / page_tokens + pick(0, 20)}};
        Machine machine(limits);
        for (int to_come = 40; to_come > 0 || !machine.live.empty();) {
            while (to_come > 0 && pick(0, 3) == 0) {
                const Ids prompt = words(pick(1, 3), pick(0, 1) * pick(0, longest / 2)) +
                                   words(pick(4, 2000), pick(1, 33));
                const int room = longest - int(prompt.size());
                Wishes wishes;
                if (pick(0, 3) == 0) wishes.prompt_logprobs = pick(0, 20);
                if (pick(0, 3) == 0) wishes.presence = 0.25f * float(pick(-8, 8));
                if (pick(0, 3) == 0) wishes.frequency = 0.25f * float(pick(-8, 8));
                if (pick(0, 3) == 0) wishes.repetition = 0.25f * float(pick(1, 8));
                for (int n = pick(0, 3); n > 1; n--) wishes.bias[pick(0, 49)] = float(pick(-9, 9));
                wishes.mask = pick(0, 3) == 0;
                if (pick(0, 3) == 0) wishes.min_tokens = pick(1, room);
                if (pick(0, 3) == 0) wishes.delay = pick(0, 3);
                const int most = pick(0, 1) ? room : pick(1, room);
                machine.add('?', prompt, pick(0, 15) ? most : 0,
                            pick(0, 3) ? Ids{} : Ids{pick(0, 49)}, uint64_t(pick(0, 9)), wishes);
                to_come--;
            }
            for (const auto& job : machine.live) {
                if (pick(0, 3000) > 0) continue;
                cancelled += !job->sequence->cancelled.exchange(true);
            }
            for (const Span& row : machine.step()) {
                shared += row.first >= page_tokens && row.last > row.first;
                scored += row.scored;
            }
        }
        machine.run();
        preemptions += machine.scheduler.preemptions();
    }
    std::printf(
        "960 sequences: %d preemptions, %d prompts continued, %d cancels, %d logprobs of prompts\n",
        preemptions, shared, cancelled, scored);
    CHECK(preemptions > 50);
    CHECK(shared > 100);
    CHECK(cancelled > 20);
    CHECK(scored > 5000);
}

// [7] Waiting, and hits ---------------------------------------------------------------------------
//
// At full size, so without Machine: steps are counted, and each sampled id is the step's number.

struct World {
    explicit World(const Limits& limits) : scheduler(limits) {}

    std::shared_ptr<Sequence> add(Ids prompt, int max_tokens) {
        const auto s = std::make_shared<Sequence>();
        s->prompt_tokens = int(prompt.size());
        s->tokens = std::move(prompt);
        s->max_tokens = max_tokens;
        scheduler.add(s);
        return s;
    }
    bool step() {  // false: nothing to do
        const Batch& batch = scheduler.next(++steps);
        if (batch.tokens.empty()) return false;
        computed += batch.tokens.size();
        Results results(batch.outputs.size());
        for (Result& r : results) r.id = int(steps) % vocabulary;
        for (const auto& d : scheduler.finish(results)) first.insert({d.sequence.get(), steps});
        return true;
    }
    void run() {
        while (step()) {
        }
    }
    std::shared_ptr<Sequence> serve(Ids prompt, int max_tokens) {  // alone
        const auto s = add(std::move(prompt), max_tokens);
        run();
        return s;
    }

    Scheduler scheduler;
    double steps = 0;
    size_t computed = 0;                      // tokens, in all
    std::map<const Sequence*, double> first;  // the step of each sequence's first token
};

int whole_pages(size_t tokens) {  // tokens of a text that its next turn can find
    return int(tokens - 1) / page_tokens * page_tokens;
}

const Limits demo{64, 64, 64, {195, 65536}};  // demo/model's on two cores

TEST_CASE(
    "F11: many conversations in turn find all of their texts, while their windows have room") {
    for (const int talks : {4, 40}) {
        World world(demo);
        std::vector<Ids> texts;
        for (int i = 0; i < talks; i++) texts.push_back(words(i, 1024));
        int hits = 0;
        for (int round = 0; round < 4; round++) {
            for (int i = 0; i < talks; i++) {
                Ids& text = texts[size_t(i)];
                const size_t known = text.size();  // of which all but the new words are cached
                if (round > 0) text = text + words(1000 * round + i, 50);
                const auto s = world.serve(text, 10);
                // The last id of an answer was never computed.
                if (round > 0) hits += s->cached_tokens == whole_pages(known);
                text = s->tokens;
            }
        }
        CHECK(hits == 3 * talks);
        for (int round = 0; round < 2; round++) {  // the same again, which needs one page more
            for (int i = 0; i < talks; i++) {
                const Ids prompt = words(5000 + i, 1024);
                const int cached = world.serve(prompt, 1)->cached_tokens;
                CHECK(cached == (round ? whole_pages(prompt.size()) : 0));
            }
        }
    }
}

TEST_CASE("F11: a shared beginning is found by all, also beside conversations in turn") {
    World world(demo);
    const Ids system = words(1, 500);
    std::vector<Ids> texts;
    for (int i = 0; i < 30; i++) texts.push_back(words(100 + i, 600));
    int users = 0, found = 0, turns = 0, hits = 0;
    for (int round = 0; round < 4; round++) {
        for (size_t i = 0; i < texts.size(); i++) {
            const size_t known = texts[i].size();
            if (round > 0) texts[i] = texts[i] + words(2000 * round + int(i), 60);
            const auto s = world.serve(texts[i], 20);
            if (round > 0) {
                turns++;
                hits += s->cached_tokens == whole_pages(known);
            }
            texts[i] = s->tokens;
            const auto user = world.serve(system + words(10'000 + users, 200), 20);
            if (users++ > 0) found += user->cached_tokens == whole_pages(system.size() + 1);
        }
    }
    std::printf("F11: %d of %d turns and %d of %d users hit all that is cached\n", hits, turns,
                found, users - 1);
    CHECK(hits == turns);
    CHECK(found == users - 1);
}

TEST_CASE("D2: a short prompt does not wait for a long one, which takes less than a tenth longer") {
    for (const int budget : {64, 512, 2048}) {
        CAPTURE(budget);
        const Limits limits{64, budget, 512, {4096, 8192}};
        World alone(limits);
        const auto undisturbed = alone.add(words(1, 30'000), 1);
        alone.run();
        World world(limits);
        const auto other = world.add(words(2, 40'000), 1);  // a second long one does not matter
        const auto long_one = world.add(words(1, 30'000), 1);
        std::vector<std::pair<std::shared_ptr<Sequence>, double>> newcomers;
        for (int n = 0; world.step(); n++) {
            if (!world.first.contains(long_one.get()) && n % 10 == 5)
                newcomers.push_back({world.add(words(100 + n, 20), 3), world.steps});
        }
        for (const auto& [s, arrived] : newcomers) CHECK(world.first[s.get()] <= arrived + 3);
        const double both = 70'000. / 30'000 * alone.first[undisturbed.get()];
        CHECK(world.first[long_one.get()] <= 1.1 * both + 2);
        CHECK(world.first[other.get()] <=
              1.1 * 40'000. / 30'000 * alone.first[undisturbed.get()] + 2);
    }
}

// How long a sequence waits depends on the tokens of those that came before it, less what decode
// rows (15 of 64 tokens here) and the lead (a 16th) take; not on how many come later.
TEST_CASE("D2: nobody starves, whoever comes later") {
    for (unsigned seed = 1; seed <= 20; seed++) {
        CAPTURE(seed);
        std::mt19937 random(seed);
        World world({16, 64, 64, {400, 8192}});
        std::vector<std::pair<std::shared_ptr<Sequence>, double>> arrived;
        for (int n = 0; arrived.size() < 150 || world.step(); n++) {
            if (arrived.size() == 150 || random() % 3) continue;
            // Three of four are short.
            const int size = random() % 4 ? 1 + int(random() % 60) : 500 + int(random() % 3000);
            const auto s = world.add(words(1000 * int(seed) + n, size), 1 + int(random() % 20));
            arrived.push_back({s, world.steps});
            world.step();
        }
        double tokens = 0;  // of all up to this one
        for (const auto& [s, step] : arrived) {
            tokens += s->prompt_tokens + s->max_tokens;
            REQUIRE(world.first.contains(s.get()));
            CHECK(world.first[s.get()] - step <= 17. / 16 * tokens / (64 - 15) + 5);
        }
    }
}

TEST_CASE("equal prompts that arrive together compute their prompt once") {
    World world({64, 256, 512, {4096, 8192}});
    for (int i = 0; i < 8; i++) world.add(words(1, 1000), 1);
    world.run();
    CHECK(int(world.computed) == 1000 + 7 * (1000 - whole_pages(1000)));
}

}  // namespace
