// SPDX-License-Identifier: Apache-2.0
//
// server.cpp: from an HTTP byte to a Batch, and from a Result back to an HTTP byte.
//
//   [1] Pages      who holds which page of K and V, and which prefix it contains
//   [2] Scheduler  which tokens of which sequences make up the next step
//   [3] Engine     the one thread that owns the model; an inbox for each request
//   [4] Requests   two parsers, one struct
//   [5] Answers    streamed or whole, text or chat: one path
//   [6] Routes     the OpenAI surface
//   [7] Service    what main.cpp starts, and stops
//
// Rules: only the engine thread touches the model, the pages and what the scheduler changes. HTTP
// threads parse, tokenize, post sequences and wait on their request's inbox; nothing they do can
// stall a step.
#include "gemma.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <condition_variable>
#include <cstring>
#include <ctime>
#include <deque>
#include <list>
#include <mutex>
#include <random>

#include <malloc.h>

#include "fields.h"

namespace gemma {

using ordered = nlohmann::ordered_json;  // what is written keeps vLLM's order of keys

// [1] Pages ---------------------------------------------------------------------------------------

// 32 tokens behind all the tokens of `parent`: a node in the tree of known prefixes. Tokens are
// compared, never hashed, so no two prefixes can be taken for each other. A node lives as long as a
// sequence, a page or a child needs it.
struct Prefix : std::enable_shared_from_this<Prefix> {
    using Tokens = std::array<int, page_tokens>;
    std::shared_ptr<Prefix> parent;
    Tokens tokens{};
    int page[2] = {-1, -1};  // by Pool: the page that holds these tokens' K and V, or -1
    std::map<Tokens, Prefix*> children;

    ~Prefix() {
        if (parent) parent->children.erase(tokens);
    }
    static Tokens read(const int* next) {
        Tokens t;
        std::copy_n(next, page_tokens, t.begin());
        return t;
    }
    std::shared_ptr<Prefix> find(const int* next) const {  // [32]; null: not known
        const auto child = children.find(read(next));
        return child == children.end() ? nullptr : child->second->shared_from_this();
    }
    std::shared_ptr<Prefix> find_or_make(const int* next) {  // [32]
        if (auto known = find(next)) return known;
        auto made = std::make_shared<Prefix>();
        made->parent = shared_from_this();
        made->tokens = read(next);
        children[made->tokens] = made.get();
        return made;
    }
};

// The books of one pool. A page that is freed while it has a Prefix stays cached until its room is
// needed, least recently used first.
class Pages {
  public:
    Pages(Pool of_pool, int total) : pool(of_pool), books(size_t(total)) {
        for (int page = total; page-- > 0;) idle.push_back(page);
    }

    int allocate() {  // a page held once, or -1
        if (idle.empty()) {
            if (cached.empty()) return -1;
            forget(cached.front());
            cached.pop_front();
        }
        const int page = idle.back();
        idle.pop_back();
        books[page].holders = 1;
        return page;
    }

    void retain(int page) {
        Book& book = books[page];
        if (book.holders++ == 0) cached.erase(book.place);
    }

    void release(int page) {
        Book& book = books[page];
        assert(book.holders > 0);
        if (--book.holders > 0) return;
        if (!book.prefix) return forget(page);
        book.place = cached.insert(cached.end(), page);
    }

    // The page is filled with `prefix` and may be shared from now on. Where two sequences computed
    // the same page at the same time, the first one's is shared.
    void publish(int page, const std::shared_ptr<Prefix>& prefix) {
        if (prefix->page[pool] >= 0) return;
        prefix->page[pool] = page;
        books[page].prefix = prefix;
    }

    int available() const { return int(idle.size() + cached.size()); }
    PoolUse use() const {
        return {int(books.size()) - available(), int(cached.size()), int(idle.size())};
    }
    std::vector<int> dead;  // see Batch::dead

  private:
    struct Book {
        int holders = 0;
        std::shared_ptr<Prefix> prefix;
        std::list<int>::iterator place;  // in `cached`, where it is cached
    };

    void forget(int page) {
        if (auto prefix = std::move(books[page].prefix)) prefix->page[pool] = -1;
        idle.push_back(page);
        dead.push_back(page);
    }

    Pool pool;
    std::vector<Book> books;
    std::vector<int> idle;
    std::list<int> cached;  // least recently used first
};

// [2] Scheduler -----------------------------------------------------------------------------------

struct Scheduler::State {
    struct Row {
        std::shared_ptr<Sequence> sequence;
        int count;  // tokens of this step
    };

    Limits limits;
    Pages pages[2];  // by Pool
    std::shared_ptr<Prefix> root = std::make_shared<Prefix>();
    std::deque<std::shared_ptr<Sequence>> waiting;   // in the order in which they will run
    std::vector<std::shared_ptr<Sequence>> running;  // oldest first
    std::vector<Row> rows;
    Batch batch;
    int preemptions = 0;

    explicit State(const Limits& l)
        : limits(l),
          pages{{local_pool, l.pages[local_pool]}, {global_pool, l.pages[global_pool]}} {}

    static int pages_for(int tokens) { return (tokens + page_tokens - 1) / page_tokens; }
    // Pages that W tokens can touch, wherever the first of them lies.
    int window_pages() const { return (limits.window + page_tokens - 2) / page_tokens + 1; }

    void release(Sequence& s) {
        for (const Pool pool : pools) {
            // The last page first: of a prefix that is evicted piece by piece, the start stays.
            for (size_t i = s.pages[pool].size(); i-- > 0;) {
                if (s.pages[pool][i] >= 0) pages[pool].release(s.pages[pool][i]);
            }
            s.pages[pool].clear();
        }
        s.computed = 0;
        s.prefix = root;
    }

    // Recomputing is exact (one arithmetic), so no one can tell it from the text.
    void preempt_newest() {
        const auto victim = running.back();
        running.pop_back();
        release(*victim);
        victim->preemptions++, preemptions++;
        waiting.push_front(victim);
    }

    // Pages for the next `count` tokens; returns for how many of them there was room.
    int grow(Sequence& s, int count) {
        int covered = count;
        for (const Pool pool : pools) {
            auto& table = s.pages[pool];
            while (int(table.size()) * page_tokens < s.computed + count) {
                const int page = pages[pool].allocate();
                if (page < 0) break;
                table.push_back(page);
            }
            covered = std::min(covered, int(table.size()) * page_tokens - s.computed);
        }
        return std::max(0, covered);
    }

    void drop_cancelled() {
        const auto drop = [&](const std::shared_ptr<Sequence>& s) {
            if (!s->cancelled) return false;
            release(*s);
            return true;
        };
        std::erase_if(waiting, drop);
        std::erase_if(running, drop);
    }

    // The oldest takes pages, the newest gives up its own. In order of age, because only the newest
    // can be amid its prompt: so no decode row waits for a long one.
    void plan_running(int& budget) {
        for (size_t i = 0; i < running.size() && budget > 0; i++) {
            const auto s = running[i];
            const int want = std::min(int(s->tokens.size()) - s->computed, budget);
            int got = 0;
            while (i < running.size() && (got = grow(*s, want)) == 0) preempt_newest();
            if (got > 0) rows.push_back({s, got});
            budget -= got;
        }
    }

    // What penalties make of an id that was generated, from the next token on.
    static void penalise(Sequence& s, int id) {
        if (s.presence == 0 && s.frequency == 0 && s.repetition == 1) return;
        auto [at, fresh] = s.penalised.try_emplace(id, Sequence::Penalised{0, 0});
        if (fresh) {
            const auto known = std::find_if(s.adjustments.begin(), s.adjustments.end(),
                                            [&](const Adjustment& a) { return a.id == id; });
            at->second.place = size_t(known - s.adjustments.begin());
            if (known == s.adjustments.end()) s.adjustments.push_back({id});
        }
        Adjustment& a = s.adjustments[at->second.place];
        a.repetition = s.repetition;
        a.penalty = s.presence + s.frequency * float(++at->second.count);
    }

    // The longest known prefix: global pages from the start on, and the local pages that the window
    // still sees. At least one token is left to compute, because its logits are needed.
    void take_cached(Sequence& s) {
        if (s.scored < s.prompt_tokens - 1 && s.prompt_logprobs >= 0) return;  // of all of them
        std::vector<std::shared_ptr<Prefix>> chain;
        auto node = root;
        while ((chain.size() + 1) * page_tokens < s.tokens.size()) {
            node = node->find(s.tokens.data() + chain.size() * page_tokens);
            if (!node || node->page[global_pool] < 0) break;
            chain.push_back(node);
        }
        size_t first = 0;  // of the local pages
        const auto seen = [&] {
            const int before = int(chain.size()) * page_tokens - (limits.window - 1);
            first = size_t(std::max(0, before) / page_tokens);
            return std::all_of(chain.begin() + ptrdiff_t(first), chain.end(),
                               [](const auto& p) { return p->page[local_pool] >= 0; });
        };
        while (!chain.empty() && !seen()) chain.pop_back();
        if (chain.empty()) return;
        for (size_t i = 0; i < chain.size(); i++) {
            for (const Pool pool : pools) {
                const int page = pool == local_pool && i < first ? -1 : chain[i]->page[pool];
                if (page >= 0) pages[pool].retain(page);
                s.pages[pool].push_back(page);
            }
        }
        s.prefix = chain.back();
        s.computed = int(chain.size()) * page_tokens;
    }

    // Beside others a sequence starts only if its whole prompt has room, and each of the others has
    // a page to grow by: else it would be preempted at once.
    bool has_room(const Sequence& s, int budget) const {
        if (running.empty()) return true;
        const int left = int(s.tokens.size()) - s.computed;
        const int local =
            std::min(pages_for(left) + 1, window_pages() + pages_for(std::min(left, budget)));
        // A row that has all the local pages of a window gives one back before it takes one.
        const auto grows = std::count_if(running.begin(), running.end(), [&](const auto& r) {
            const int behind = std::max(0, (r->computed - limits.window + 1) / page_tokens);
            return int(r->pages[local_pool].size()) - behind < window_pages();
        });
        return pages_for(left) + 1 + int(running.size()) <= pages[global_pool].available() &&
               local + grows <= pages[local_pool].available();
    }

    void admit(int& budget, double now) {
        while (!waiting.empty() && int(running.size()) < limits.max_num_seqs && budget > 0) {
            const auto s = waiting.front();
            take_cached(*s);
            const int cached = s->computed;
            int got = 0;
            if (has_room(*s, budget)) {
                got = grow(*s, std::min(int(s->tokens.size()) - s->computed, budget));
            }
            if (got == 0) return release(*s);
            if (s->preemptions == 0) s->cached_tokens = cached, s->started = now;
            waiting.pop_front();
            running.push_back(s);
            rows.push_back({s, got});
            budget -= got;
        }
    }

    void build() {
        batch = Batch{};
        batch.row_start = {0};
        for (const Row& row : rows) {
            for (const auto& table : row.sequence->pages) {
                batch.pages_per_row = std::max(batch.pages_per_row, int(table.size()));
            }
        }
        for (const Row& row : rows) {
            const Sequence& s = *row.sequence;
            const int end = s.computed + row.count, index = int(batch.row_start.size()) - 1;
            for (int i = s.computed; i < end; i++) {
                if (s.prompt_logprobs >= 0 && i >= s.scored && i + 1 < s.prompt_tokens) {
                    const Sampling how{.logprobs = s.prompt_logprobs};
                    batch.outputs.push_back(
                        {int(batch.tokens.size()), index, s.tokens[i + 1], 0, how, {}, nullptr});
                }
                batch.tokens.push_back(s.tokens[i]);
                batch.positions.push_back(i);
            }
            batch.row_start.push_back(int(batch.tokens.size()));
            for (const Pool pool : pools) {
                auto& table = batch.pages[pool];
                table.insert(table.end(), s.pages[pool].begin(), s.pages[pool].end());
                table.resize(batch.pages_per_row * (batch.row_start.size() - 1), -1);
            }
            if (end == int(s.tokens.size()) && s.max_tokens > 0) {
                const int last = int(batch.tokens.size()) - 1, made = end - s.prompt_tokens;
                batch.outputs.push_back({last, index, -1, made, s.sampling, s.adjustments,
                                         made < s.min_tokens ? s.allowed_before : s.allowed});
            }
        }
        for (const Pool pool : pools) batch.dead[pool] = std::exchange(pages[pool].dead, {});
    }

    // After a step: whole pages may be shared, and local pages behind the window are let go.
    void settle(Sequence& s, int count) {
        const int filled = s.computed / page_tokens;
        s.computed += count;
        for (int i = filled; i < s.computed / page_tokens; i++) {
            s.prefix = s.prefix->find_or_make(s.tokens.data() + i * page_tokens);
            for (const Pool pool : pools) {
                pages[pool].publish(s.pages[pool][i], s.prefix);
            }
        }
        for (int i = (s.computed - limits.window + 1) / page_tokens; i-- > 0;) {
            int& page = s.pages[local_pool][i];
            if (page < 0) break;
            pages[local_pool].release(std::exchange(page, -1));
        }
    }
};

Scheduler::Scheduler(const Limits& limits) : state(std::make_unique<State>(limits)) {}
Scheduler::~Scheduler() = default;

bool Scheduler::fits(int tokens) const {
    const int pages = State::pages_for(tokens);
    return pages <= state->limits.pages[global_pool] &&
           std::min(pages, state->window_pages()) <= state->limits.pages[local_pool];
}

void Scheduler::add(std::shared_ptr<Sequence> sequence) {
    assert(fits(sequence->prompt_tokens + sequence->max_tokens));
    sequence->prefix = state->root;
    state->waiting.push_back(std::move(sequence));
}

const Batch& Scheduler::next(double now) {
    int budget = state->limits.max_batched_tokens;
    const int before = state->preemptions;
    state->rows.clear();
    state->drop_cancelled();
    state->plan_running(budget);
    if (state->preemptions == before)
        state->admit(budget, now);  // else it would take the same pages
    state->build();
    return state->batch;
}

std::vector<Token> Scheduler::finish(const Results& results) {
    std::vector<Token> tokens;
    size_t next = 0;  // of the results, which come in the order of build()
    for (const State::Row& row : state->rows) {
        Sequence& s = *row.sequence;
        state->settle(s, row.count);
        while (s.prompt_logprobs >= 0 && s.scored < std::min(s.computed, s.prompt_tokens - 1)) {
            tokens.push_back({row.sequence, results[next++], Finish::none, true});
            s.scored++;
        }
        if (s.computed < int(s.tokens.size())) continue;  // its prompt goes on
        const Result result = s.max_tokens > 0 ? results[next++] : Result{};
        if (s.max_tokens > 0) {
            s.tokens.push_back(result.id);
            State::penalise(s, result.id);
        }
        Finish finish = Finish::none;
        if (s.max_tokens > 0 && std::count(s.stop_ids.begin(), s.stop_ids.end(), result.id)) {
            finish = Finish::stop;
        } else if (int(s.tokens.size()) - s.prompt_tokens >= s.max_tokens) {
            finish = Finish::length;
        }
        tokens.push_back({row.sequence, result, finish, false});
        if (finish == Finish::none) continue;
        state->release(s);
        std::erase(state->running, row.sequence);
    }
    return tokens;
}

int Scheduler::waiting() const { return int(state->waiting.size()); }
int Scheduler::running() const { return int(state->running.size()); }
int Scheduler::preemptions() const { return state->preemptions; }
PoolUse Scheduler::use(Pool pool) const { return state->pages[pool].use(); }

// [3] Engine --------------------------------------------------------------------------------------

// What a choice gets from a step.
struct Delivery {
    int choice;
    Result result;
    Finish finish;
    bool of_prompt;      // as Token's
    double at, started;  // when the step was done, and when the sequence was first in a step
    int cached_tokens;   // of its prompt
};

// One for each request, whatever its number of prompts and choices. It knows no sequence: a
// sequence holds its inbox, and neither would ever be freed.
struct Inbox {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Delivery> deliveries;  // guarded by mutex

    void put(Delivery delivery) {
        {
            const std::lock_guard lock(mutex);
            deliveries.push_back(std::move(delivery));
        }
        changed.notify_one();
    }

    // What has arrived; waits for something, but not for long, so that the caller can look whether
    // its client is still there.
    std::deque<Delivery> take() {
        std::unique_lock lock(mutex);
        changed.wait_for(lock, std::chrono::milliseconds(50), [&] { return !deliveries.empty(); });
        return std::exchange(deliveries, {});
    }
};

class Engine {
  public:
    Engine(std::unique_ptr<Model> m, const Limits& limits, int max_queue, Metrics& shown)
        : most(limits.max_num_seqs + max_queue),
          model(std::move(m)),
          scheduler(limits),
          metrics(shown),
          thread([this] { run(); }) {}
    ~Engine() {
        tell([&] { stopping = true; });
        thread.join();
    }
    Engine(const Engine&) = delete;

    // Takes places for so many sequences, all or none. They are given back when a sequence that was
    // posted has ended, or by `leave`.
    void enter(int count) {
        const std::lock_guard lock(mutex);
        if (inside + count > most)
            throw Refusal{429,
                          text("the queue is full: %d sequences run or wait, of at most %d, and "
                               "this request has %d: try again soon",
                               inside, most, count),
                          ""};
        inside += count;
    }
    void leave(int count) {
        const std::lock_guard lock(mutex);
        inside -= count;
    }
    void post(const std::vector<std::shared_ptr<Sequence>>& sequences) {
        tell([&] { arrived.insert(arrived.end(), sequences.begin(), sequences.end()); });
    }
    bool fits(int tokens) const { return scheduler.fits(tokens); }
    bool rests(std::chrono::milliseconds wait) {  // amid no step, and with nothing to do
        std::unique_lock lock(mutex);
        return changed.wait_for(lock, wait, [&] { return resting; });
    }

  private:
    void tell(auto&& change) {
        const std::lock_guard lock(mutex);
        change();
        changed.notify_all();
    }

    void run() {
        for (bool idle = true;;) {
            std::vector<std::shared_ptr<Sequence>> news;
            {
                std::unique_lock lock(mutex);
                resting = idle;
                if (idle) changed.notify_all();
                if (idle) changed.wait(lock, [&] { return !arrived.empty() || stopping; });
                resting = false;
                if (stopping) return;
                news.swap(arrived);
            }
            const int before = present() + int(news.size());
            for (auto& sequence : news) scheduler.add(std::move(sequence));
            const Batch& batch = scheduler.next(seconds());
            idle = batch.tokens.empty();
            show();
            std::vector<Token> tokens;
            if (idle) {
                check_books();
            } else {
                tokens = scheduler.finish(model->step(batch));
                show();
                count(tokens);
            }
            leave(before - present());  // before the clients know
            for (Token& t : tokens) {
                const Sequence& s = *t.sequence;
                s.inbox->put({s.choice, std::move(t.result), t.finish, t.of_prompt, seconds(),
                              s.started, s.cached_tokens});
            }
        }
    }

    // As vLLM counts them: a prompt's tokens come with the first that follows.
    void count(const std::vector<Token>& tokens) const {
        size_t sum = 0;
        for (const Token& t : tokens) {
            const size_t made = t.sequence->tokens.size() - size_t(t.sequence->prompt_tokens);
            if (!t.of_prompt) sum += made <= 1 ? t.sequence->tokens.size() : 1;
        }
        metrics.change([&](Figures& f) { f.step_tokens.observe(double(sum)); });
    }

    int present() const { return scheduler.waiting() + scheduler.running(); }

    void show() const {
        double used = 0;  // of the pool that is fuller
        for (const Pool pool : pools) {
            const PoolUse use = scheduler.use(pool);
            used = std::max(used, double(use.held) / (use.held + use.cached + use.free));
        }
        metrics.change([&](Figures& f) {
            f.running = scheduler.running(), f.waiting = scheduler.waiting();
            f.preemptions = scheduler.preemptions(), f.pages_used = used;
        });
    }

    // With nothing to do, no page may be held: a leak would otherwise show days later.
    void check_books() const {
        for (const Pool pool : pools) {
            const PoolUse use = scheduler.use(pool);
            if (use.held == 0 && present() == 0) continue;
            say(text("BUG: idle, but pool %d holds %d pages (%d cached, %d free); %d waiting", pool,
                     use.held, use.cached, use.free, scheduler.waiting()),
                Severity::error);
            std::abort();
        }
    }

    const int most;  // sequences that run or wait
    // engine thread only, but for fits(), which reads constants
    std::unique_ptr<Model> model;
    Scheduler scheduler;
    Metrics& metrics;
    // any thread
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<std::shared_ptr<Sequence>> arrived;  // guarded by mutex, as are the next
    int inside = 0;
    bool stopping = false, resting = false;
    std::thread thread;  // last: it starts when the rest is there
};

// [4] Requests ------------------------------------------------------------------------------------

struct Service::App {
    const Options options;
    // constant once the model is ready
    int max_model_len = 0;
    const Checkpoint* checkpoint = nullptr;
    const Tokenizer* tokenizer = nullptr;
    std::string cache_config;  // labels of /metrics
    std::optional<Metrics> metrics;
    std::optional<Engine> engine;
    // guarded by mutex
    std::mutex mutex;
    std::condition_variable changed;
    bool ready = false, leaving = false;
    int in_flight = 0, generating = 0;
    std::mt19937_64 seeds, ids{std::random_device{}()};
    // any thread
    std::atomic<bool> cut{false};  // what still runs ends now, with what it has
    std::mutex large;              // SentencePiece takes up to 800 MB for 4 MiB: one at a time

    explicit App(const Options& o) : options(o), seeds(uint64_t(o.seed)) {}
    auto change(auto&& how) {
        const std::lock_guard lock(mutex);
        changed.notify_all();  // they wake when the lock is free
        return how();
    }
    bool wait(auto&& until, std::chrono::milliseconds at_most = std::chrono::hours(100'000)) {
        std::unique_lock lock(mutex);
        return changed.wait_for(lock, at_most, until);
    }
    uint64_t draw_seed() {
        return change([&] { return seeds(); });
    }
    std::string draw_hex() {  // 32 digits, for ids
        return change([&] { return text("%016lx%016lx", long(ids()), long(ids())); });
    }
};

using App = Service::App;

// A request that is being answered. It waits for the model; when the server leaves, it is refused,
// and those that are inside are waited for.
struct Visit {
    App& app;
    const double begun = seconds();
    const std::string trace;  // of HttpRequest
    Visit(App& a, const std::string& of_request) : app(a), trace(of_request) {
        app.wait([&] { return app.ready || app.leaving; });
        app.change([&] {
            if (app.leaving) throw Refusal{503, "the server is shutting down", ""};
            app.in_flight++;
        });
    }
    ~Visit() {
        app.change([&] { app.in_flight--; });
    }
    Visit(const Visit&) = delete;
};

struct Request {
    bool chat = false;
    std::string model, id;
    std::vector<std::vector<int>> prompts;
    std::vector<std::string> echoed;           // [prompts] what stands before each answer
    int64_t max_tokens = -1, seed = -1;        // -1: not given
    int64_t logprobs = -1, top_logprobs = -1;  // alternatives wanted; -1: none
    int64_t prompt_logprobs = -1, min_tokens = 0, truncate_prompt_tokens = -1;
    double temperature = 1, top_p = 1, min_p = 0;
    double presence_penalty = 0, frequency_penalty = 0, repetition_penalty = 1;
    int64_t top_k = 0, n = 1;
    bool chat_logprobs = false, tokens_as_ids = false, ignore_eos = false, echo = false;
    bool stream = false, include_usage = true, continuous_usage = false;
    bool add_special_tokens = true, skip_special_tokens = true, include_stop = false;
    bool add_generation_prompt = true, continue_final_message = false;
    std::vector<std::string> stop;
    std::vector<int> stop_token_ids, allowed_token_ids;
    std::map<int, double> logit_bias;
};

using RequestFields = std::vector<Field<Request>>;

const RequestFields prompt_fields{
    {"model", &Request::model},
    {"add_special_tokens", &Request::add_special_tokens},
    {"add_generation_prompt", &Request::add_generation_prompt},
    {"continue_final_message", &Request::continue_final_message},
};
const RequestFields common_fields{
    {"max_tokens", &Request::max_tokens, 0, 1e9},
    {"min_tokens", &Request::min_tokens, 0, 1e9},
    {"temperature", &Request::temperature, 0, no_limit},
    {"top_p", &Request::top_p, above_zero, 1},
    {"top_k", &Request::top_k, -1, 1e9},
    {"min_p", &Request::min_p, 0, 1},
    {"presence_penalty", &Request::presence_penalty, -2, 2},
    {"frequency_penalty", &Request::frequency_penalty, -2, 2},
    {"repetition_penalty", &Request::repetition_penalty, above_zero, 1e9},
    {"logit_bias", &Request::logit_bias, 0, any_id},
    {"allowed_token_ids", &Request::allowed_token_ids, 0, any_id},
    {"seed", &Request::seed, -0x1p63, 0x1p63},
    {"n", &Request::n, 1, 128},
    {"stop", &Request::stop, 0, 16},
    {"stop_token_ids", &Request::stop_token_ids, 0, any_id},
    {"include_stop_str_in_output", &Request::include_stop},
    {"ignore_eos", &Request::ignore_eos},
    {"skip_special_tokens", &Request::skip_special_tokens},
    {"truncate_prompt_tokens", &Request::truncate_prompt_tokens, 1, 1e9},
    {"prompt_logprobs", &Request::prompt_logprobs, 0, 20},
    {"echo", &Request::echo},
    {"stream", &Request::stream},
    {"return_tokens_as_token_ids", &Request::tokens_as_ids},
};
const RequestFields completion_fields{{"logprobs", &Request::logprobs, 0, 20}};
const RequestFields chat_fields{
    {"max_completion_tokens", &Request::max_tokens, 1, 1e9},
    {"logprobs", &Request::chat_logprobs},
    {"top_logprobs", &Request::top_logprobs, 0, 20},
};
const RequestFields stream_fields{
    {"include_usage", &Request::include_usage},
    {"continuous_usage_stats", &Request::continuous_usage},
};

// What vLLM has, would change the result and is not offered here, each with the one value that it
// may have: silently ignoring what was asked for would falsify somebody's measurement.
const json not_offered = json::parse(R"({
    "bad_words": [], "best_of": 1, "use_beam_search": false, "length_penalty": 1, "priority": 0,
    "logits_processors": [], "response_format": {"type": "text"}, "structured_outputs": null,
    "guided_json": null, "guided_regex": null, "guided_choice": null, "guided_grammar": null,
    "structural_tag": null, "suffix": null, "prompt_embeds": null, "tools": [],
    "tool_choice": "none", "functions": [], "function_call": "none", "chat_template": null,
    "chat_template_kwargs": {}, "documents": [], "return_token_ids": false,
    "logprob_token_ids": [], "thinking_token_budget": null, "repetition_detection": null})");

void check_offered(const json& body) {
    for (const auto& [name, only] : not_offered.items()) {
        const auto value = body.find(name);
        if (value == body.end() || value->is_null() || *value == only) continue;
        refuse(name.c_str(), "%s is not supported by this server: leave it out or give %s, got %s",
               name.c_str(), quote(only).c_str(), show(*value).c_str());
    }
}

// Nested at most 64 deep: copying 100,000 levels would overflow the stack. (The library's own
// callback could count them, but with one it takes time that is quadratic in a list's length.)
json parse_body(const std::string& body) {
    int depth = 0;
    bool in_string = false;
    for (size_t i = 0; i < body.size(); i++) {
        if (body[i] == '"') in_string = !in_string;
        if (body[i] == '\\') i++;  // outside of strings it is an error anyway
        if (in_string || i >= body.size()) continue;
        if (body[i] == '[' || body[i] == '{') depth++;
        if (body[i] == ']' || body[i] == '}') depth--;
        if (depth > 64) refuse("", "the body is nested more than 64 levels deep");
    }
    try {
        json parsed = json::parse(body);
        if (!parsed.is_object()) refuse("", "the body must be a JSON object");
        return parsed;
    } catch (const json::parse_error& e) {
        refuse("", "the body is not valid JSON, at byte %zu", e.byte);
    } catch (const json::exception&) {
        refuse("", "the body is not valid JSON: it has a number that no double can hold");
    }
}

void check_id(int64_t id, int limit, const char* param) {
    if (id < limit) return;
    refuse(param,
           "%s: token id %ld is out of vocabulary: ids are integers from 0 to %d (the vocabulary "
           "size is %d)",
           param, long(id), limit - 1, limit);
}

// Ids of a prompt, or of a text to be written out. V, the model's rows: what has no text may stand
// in a prompt.
std::vector<int> parse_ids(const App& app, const json& list, const char* param) {
    std::vector<int> ids;
    const int V = app.checkpoint->config.V;
    for (const json& one : list) {
        const auto id = one.is_number_integer() ? as_integer(one, 0, V - 1) : std::nullopt;
        if (!id)
            refuse(param, "%s: token id %s is out of vocabulary: ids are integers from 0 to %d",
                   param, show(one).c_str(), V - 1);
        ids.push_back(int(*id));
    }
    return ids;
}

std::vector<int> encode_prompt(const App& app, const std::string& prompt, bool add_bos) {
    std::vector<int> ids = app.tokenizer->encode_with_controls(prompt);
    if (add_bos) ids.insert(ids.begin(), Tokenizer::bos);
    for (const int id : ids) check_id(id, app.checkpoint->config.V, "prompt");
    return ids;
}

// A string, a list of strings, a list of ids, or a list of lists of ids: as a list of prompts.
json list_prompts(const json& body) {
    const json prompt = body.value("prompt", json());
    const bool ids = prompt.is_array() && !prompt.empty() && prompt[0].is_number();
    const json list = ids || prompt.is_string() ? json::array({prompt}) : prompt;
    const auto good = [&](const json& p) {
        return p.type() == list[0].type() && (p.is_string() || (p.is_array() && !p.empty()));
    };
    if (!list.is_array() || list.empty() || list.size() > 64 ||
        !std::all_of(list.begin(), list.end(), good)) {
        refuse("prompt", "prompt must be text, a list of token ids, or 1 to 64 of these, got %s",
               show(prompt).c_str());
    }
    return list;
}

void parse_prompts(const App& app, const json& list, Request& r) {
    const size_t most = r.truncate_prompt_tokens < 0 ? SIZE_MAX : size_t(r.truncate_prompt_tokens);
    for (const json& one : list) {
        auto ids = one.is_string()
                       ? encode_prompt(app, one.get_ref<const std::string&>(), r.add_special_tokens)
                       : parse_ids(app, one, "prompt");
        const bool cut = ids.size() > most, bos = one.is_string() && r.add_special_tokens;
        if (cut) ids.erase(ids.begin(), ids.end() - ptrdiff_t(most));
        if (cut && bos) ids[0] = Tokenizer::bos;  // Hugging Face cuts before it adds <bos>
        if (ids.empty()) refuse("prompt", "prompt has no token");
        if (r.echo)
            r.echoed.push_back(one.is_string() && !cut ? one.get<std::string>()
                                                       : app.tokenizer->decode(ids));
        r.prompts.push_back(std::move(ids));
    }
}

void parse_messages(const App& app, const json& body, Request& r) try {
    const json messages = body.value("messages", json());
    std::string last;  // the last message's text
    for (const json& message : messages) {
        const json content = message.is_object() ? message.value("content", json()) : json();
        last = content.is_string() ? content : "";
        for (const json& part : content.is_array() ? content : json::array()) {
            const json type = part.is_object() ? part.value("type", json()) : json();
            if (type != "text")
                refuse("messages", "only text is served: a part of a content has the type %s",
                       show(type).c_str());
            if (part.contains("text") && part["text"].is_string()) last += part["text"];
        }
    }
    using Ending = Tokenizer::Ending;
    auto ids = app.tokenizer->chat(messages, r.continue_final_message  ? Ending::open
                                             : r.add_generation_prompt ? Ending::generation_prompt
                                                                       : Ending::closed);
    if (r.add_special_tokens) ids.insert(ids.begin(), Tokenizer::bos);  // beside the template's own
    const auto most = r.truncate_prompt_tokens;
    if (most > 0 && int64_t(ids.size()) > most) ids.erase(ids.begin(), ids.end() - most);
    // The answer goes on with the last message, if both are of one role.
    const bool goes_on = !r.add_generation_prompt || messages.back()["role"] == "assistant";
    if (r.echo) r.echoed.push_back(goes_on ? last : "");
    r.prompts.push_back(std::move(ids));
} catch (const std::invalid_argument& e) {
    refuse("messages", "%s", e.what());
}

void check_model(const App& app, const std::string& model) {
    const auto& names = app.options.served_model_name;
    if (model.empty() || std::count(names.begin(), names.end(), model)) return;
    throw Refusal{404, "The model `" + model.substr(0, 100) + "` does not exist.", "model"};
}

// In vLLM's words, which clients search for.
void check_length(const App& app, const Request& r, size_t size) {
    const long most = app.max_model_len, prompt = long(size), asked = long(r.max_tokens);
    if (asked < 0 ? prompt < most : prompt + asked <= most) return;
    const std::string head =
        text("This model's maximum context length is %ld tokens. However, ", most);
    if (asked < 0) {
        refuse(
            "messages",
            "%syou requested %ld tokens in the messages, Please reduce the length of the messages.",
            head.c_str(), prompt);
    }
    refuse("max_tokens",
           "%syou requested %ld tokens (%ld in the messages, %ld in the completion). Please reduce "
           "the length of the messages or completion.",
           head.c_str(), prompt + asked, prompt, asked);
}

// Logprobs of prompts are held as text until the answer is whole: some 500 bytes for each id named.
void check_scores(const Request& r) {
    size_t tokens = 0;
    for (const auto& prompt : r.prompts) tokens += prompt.size();
    const size_t ids = r.prompt_logprobs < 0 ? 0 : tokens * size_t(r.n * (r.prompt_logprobs + 1));
    if (ids > 4 << 20)
        refuse("prompt_logprobs",
               "logprobs of prompts must name at most 4194304 ids, got %zu: %zu tokens x n %d x %d",
               ids, tokens, int(r.n), int(r.prompt_logprobs) + 1);
}

void parse_stream_options(const json& body, Request& r) {
    const json options = body.value("stream_options", json());
    r.include_usage = options.is_object();
    if (options.is_null()) return;
    if (!r.stream && options != json::object())
        refuse("stream_options", "Stream options can only be defined when `stream=True`.");
    if (!options.is_object())
        refuse("stream_options", "stream_options must be an object, got %s", show(options).c_str());
    assign_all(r, stream_fields, options);
    r.continuous_usage &= r.include_usage;
}

// What concerns more than one field, or the vocabulary.
void check_fields(const App& app, Request& r, const json& body) {
    if (r.max_tokens == 0 && (r.chat || !r.echo))
        refuse("max_tokens", "max_tokens must be at least 1, got 0.");
    const int64_t most = r.max_tokens < 0 ? app.max_model_len : r.max_tokens;
    if (r.min_tokens > most)
        refuse("min_tokens", "min_tokens must be at most max_tokens, %ld, got %ld", long(most),
               long(r.min_tokens));
    if (r.chat && r.top_logprobs >= 0 && !r.chat_logprobs)
        refuse("top_logprobs", "when using `top_logprobs`, `logprobs` must be set to true.");
    if (r.stream && r.prompt_logprobs > 0)
        refuse("prompt_logprobs", "`prompt_logprobs` are not available when `stream=True`.");
    if (r.continue_final_message && r.add_generation_prompt)
        refuse("continue_final_message",
               "Cannot set both `continue_final_message` and `add_generation_prompt` to True.");
    if (r.temperature == 0 && r.n > 1)
        refuse("n", "n must be 1 when using greedy sampling, got %d.", int(r.n));
    // Each step looks at all of these.
    for (const auto& [name, size] : {std::pair("stop_token_ids", r.stop_token_ids.size()),
                                     std::pair("logit_bias", r.logit_bias.size())}) {
        if (size > 1024) refuse(name, "%s must have at most 1024 ids, got %zu", name, size);
    }
    const int V = app.checkpoint->config.V, drawn = app.checkpoint->config.vocab;
    for (const auto& [id, bias] : r.logit_bias) check_id(id, V, "logit_bias");
    for (const int id : r.stop_token_ids) check_id(id, V, "stop_token_ids");
    for (const int id : r.allowed_token_ids) check_id(id, drawn, "allowed_token_ids");
    const auto allowed = body.find("allowed_token_ids");
    if (allowed != body.end() && !allowed->is_null() && r.allowed_token_ids.empty())
        refuse("allowed_token_ids", "allowed_token_ids must be a list of at least one id, got []");
}

// All that can be said of a request before its text is looked at.
Request parse_request(const App& app, const json& body, bool chat) {
    const SamplingDefaults& d = app.checkpoint->defaults;
    Request r;
    r.chat = chat, r.add_special_tokens = !chat;
    r.temperature = d.temperature, r.top_p = d.top_p, r.min_p = d.min_p, r.top_k = d.top_k;
    r.repetition_penalty = d.repetition_penalty;
    for (const auto* fields : {&prompt_fields, &common_fields}) assign_all(r, *fields, body);
    assign_all(r, chat ? chat_fields : completion_fields, body);
    parse_stream_options(body, r);
    check_model(app, r.model);
    check_offered(body);
    if (!chat) r.add_generation_prompt = r.continue_final_message = false;
    if (r.model.empty()) r.model = app.options.served_model_name[0];
    r.temperature = r.temperature < 1e-5 ? 0 : std::clamp(r.temperature, 0.01, 1e6);  // as vLLM
    if (!chat && r.max_tokens < 0) r.max_tokens = 16;
    check_fields(app, r, body);
    if (r.chat_logprobs) r.logprobs = std::max<int64_t>(0, r.top_logprobs);
    if (r.echo && r.prompt_logprobs < 0) r.prompt_logprobs = r.logprobs;
    return r;
}

using Mask = std::vector<uint32_t>;

// The ids that may be sampled, at any time or before min_tokens. None: all.
std::shared_ptr<const Mask> make_mask(const App& app, const Request& r,
                                      const std::vector<int>& but) {
    if (r.allowed_token_ids.empty() && but.empty()) return nullptr;
    const int vocab = app.checkpoint->config.vocab;
    const bool all = r.allowed_token_ids.empty();
    auto mask = std::make_shared<Mask>(size_t(vocab + 31) / 32, all ? ~0u : 0u);
    for (const int id : r.allowed_token_ids) (*mask)[size_t(id / 32)] |= 1u << id % 32;
    for (const int id : but) {
        if (id < vocab) (*mask)[size_t(id / 32)] &= ~(1u << id % 32);
    }
    if (std::all_of(mask->begin(), mask->end(), [](uint32_t word) { return word == 0; }))
        refuse("min_tokens",
               "min_tokens must be 0 where all ids that are allowed end the text, got %ld",
               long(r.min_tokens));
    return mask;
}

// One for each choice: choice i of prompt p has the index p * n + i, and the seed plus i.
std::vector<std::shared_ptr<Sequence>> make_sequences(App& app, const Request& r) {
    const auto inbox = std::make_shared<Inbox>();
    std::vector<int> stop_ids = r.stop_token_ids;
    const auto& eos = app.checkpoint->config.eos;
    if (!r.ignore_eos) stop_ids.insert(stop_ids.end(), eos.begin(), eos.end());
    // vLLM masks the ends of the model even where they are ignored.
    std::vector<int> ends = stop_ids;
    if (r.min_tokens > 0) ends.insert(ends.end(), eos.begin(), eos.end());
    const auto allowed = make_mask(app, r, {});
    const auto allowed_before = r.min_tokens > 0 ? make_mask(app, r, ends) : nullptr;
    std::vector<std::shared_ptr<Sequence>> sequences;
    for (const auto& prompt : r.prompts) {
        const int size = int(prompt.size()), own_limit = app.checkpoint->defaults.max_new_tokens;
        int max_tokens = r.max_tokens < 0 ? app.max_model_len - size : int(r.max_tokens);
        if (own_limit > 0) max_tokens = std::min(max_tokens, own_limit);
        if (!app.engine->fits(size + max_tokens))
            refuse("max_tokens",
                   "%d prompt tokens and %d more need more pages than the server has: ask for "
                   "less, or give it more memory",
                   size, max_tokens);
        // A logit divided by less would be no finite number.
        const float repetition = float(std::clamp(r.repetition_penalty, 1e-6, 1e6));
        std::map<int, Adjustment> adjustments;
        for (const auto& [id, bias] : r.logit_bias)
            adjustments[id].bias = float(std::clamp(bias, -100., 100.));
        for (const int id : r.repetition_penalty != 1 ? prompt : std::vector<int>())
            adjustments[id].repetition = repetition;
        const uint64_t seed = r.seed == -1 ? app.draw_seed() : uint64_t(r.seed);
        for (int i = 0; i < r.n; i++) {
            auto& s = *sequences.emplace_back(std::make_shared<Sequence>());
            s.tokens = prompt;
            s.prompt_tokens = size;
            s.max_tokens = max_tokens;
            s.sampling = {float(r.temperature), int(std::max<int64_t>(0, r.top_k)),
                          float(r.top_p),       float(r.min_p),
                          seed + uint64_t(i),   int(r.logprobs)};
            s.stop_ids = stop_ids;
            s.prompt_logprobs = int(r.prompt_logprobs);
            s.presence = float(r.presence_penalty), s.frequency = float(r.frequency_penalty);
            s.repetition = repetition;
            for (auto& [id, adjustment] : adjustments) {
                s.adjustments.push_back(adjustment);
                s.adjustments.back().id = id;
            }
            s.allowed = allowed, s.allowed_before = allowed_before;
            s.min_tokens = int(r.min_tokens);
            s.choice = int(sequences.size()) - 1;
            s.inbox = inbox;
            s.arrived = seconds();
        }
    }
    return sequences;
}

// [5] Answers -------------------------------------------------------------------------------------

// One request's answer, streamed or whole, text or chat. Lives as long as its response; when that
// ends, whatever still runs for it is cancelled. JSON is written as text, so that its shape can be
// compared with vLLM's, key for key.
class Answer {
  public:
    Answer(std::shared_ptr<Visit> v, Request r)
        : visit(std::move(v)), request(std::move(r)), sequences(make_sequences(app, request)) {
        for (size_t i = 0; i < choices.size(); i++) begin(choices[i], i / size_t(request.n));
        for (const auto& prompt : request.prompts) prompt_tokens += int(prompt.size());
        app.metrics->change([&](Figures& f) {
            f.asked_n.observe(double(request.n));
            f.prompt_tokens += prompt_tokens;
        });
        app.engine->post(sequences);
        app.change([&] { app.generating++; });
    }
    ~Answer() {
        for (const auto& s : sequences) s->cancelled = true;
        app.metrics->change([&](Figures& f) { f.aborted += double(unfinished); });
        app.change([&] { app.generating--; });
        if (!app.options.disable_log_requests) log();
    }
    Answer(const Answer&) = delete;

    HttpReply reply(const std::shared_ptr<Answer>& self) const {
        return {"", request.stream ? "text/event-stream; charset=utf-8" : "application/json",
                [self](std::string& out) { return self->pump(out); }};
    }

  private:
    struct Choice {
        Choice(const Tokenizer& t, bool controls) : detokenizer(t, controls) {}
        Detokenizer detokenizer;
        std::string held;  // decoded, but it may turn out to be the start of a stop string
        std::string text;  // not sent yet
        std::string finish_reason = "null", stop_reason = "null";  // as JSON
        std::string logprobs[4];      // lists without brackets, in the order of logprobs_json
        std::string prompt_logprobs;  // the same
        size_t offset = 0;            // of the next token, in characters
        int prompt_size = 0, tokens = 0, cached = 0;
        double first = 0, last = 0;  // when these tokens were made
        bool finished = false;
    };

    void log() const {
        Generation g;
        g.status = unfinished > 0 ? 499 : 200;
        g.id = id, g.model = request.model, g.trace = visit->trace;
        g.prompt_tokens = prompt_tokens;
        g.queued = queued, g.first_token = first_token, g.total = seconds() - visit->begun;
        bool same = true;
        std::string reasons;
        for (const Choice& c : choices) {
            const std::string& reason = c.finished ? c.finish_reason : R"("abort")";
            same &= reason == (choices[0].finished ? choices[0].finish_reason : R"("abort")");
            append(reasons, reason.substr(1, reason.size() - 2));
            g.completion_tokens += c.tokens;
        }
        g.finish_reason = same ? reasons.substr(0, reasons.find(',')) : reasons;
        say(g);
    }

    // Appends what has come; false: that was all.
    bool pump(std::string& out) {
        if (request.stream && request.chat && !started) {
            for (size_t i = 0; i < choices.size(); i++) {
                event(out,
                      text(R"({"index":%zu,"delta":{"role":"assistant","content":""},)"
                           R"("logprobs":null,"finish_reason":null})",
                           i),
                      usage_so_far(choices[i]));
            }
            started = true;
            return true;
        }
        for (const Delivery& delivery : sequences[0]->inbox->take()) put(out, delivery);
        for (size_t i = 0; app.cut && i < choices.size(); i++) {
            Finish finish = Finish::abort;
            if (choices[i].finished) continue;
            release_text(choices[i], finish);
            settle(out, int(i), finish);
        }
        if (unfinished > 0) return true;
        if (request.stream && request.include_usage) event(out, "", usage());
        out += request.stream ? "data: [DONE]\n\n" : whole();
        return false;
    }

    // The first token has nothing before it to be likely after.
    void begin(Choice& c, size_t prompt) {
        const auto& ids = request.prompts[prompt];
        c.prompt_size = int(ids.size());
        if (request.echo) c.text = request.echoed[prompt];
        if (request.prompt_logprobs >= 0) c.prompt_logprobs = "null";
        if (!request.echo || request.chat || request.logprobs < 0) return;
        add_token(c, token_text(ids[0]), "null", "null");
    }

    void put(std::string& out, const Delivery& d) {
        Choice& c = choices[size_t(d.choice)];
        if (c.finished) return;  // it came behind a stop string
        if (d.of_prompt) {
            append(c.prompt_logprobs, ranked(d.result));
            if (request.echo && !request.chat && request.logprobs >= 0) add_logprobs(c, d.result);
            return;
        }
        Finish finish = d.finish;
        if (request.max_tokens != 0) {  // else an end without a token
            c.tokens++;
            if (request.logprobs >= 0) add_logprobs(c, d.result);
            if (finish == Finish::stop && d.result.id != Tokenizer::eos)
                c.stop_reason = std::to_string(d.result.id);
            if (finish != Finish::stop || request.include_stop)
                c.held += c.detokenizer.push(d.result.id);
        }
        release_text(c, finish);
        observe(c, d, finish != Finish::none);
        settle(out, d.choice, finish);
    }

    // What can be sent of the text held. The earliest stop string cuts it and ends the choice; what
    // could be the start of one stays held.
    void release_text(Choice& c, Finish& finish) const {
        if (finish != Finish::none) c.held += c.detokenizer.flush();
        size_t first = std::string::npos, cut = 0, keep = 0;
        for (const std::string& stop : request.stop) {
            const size_t at = c.held.find(stop);
            if (at < first) {
                first = at, cut = at + (request.include_stop ? stop.size() : 0);
                c.stop_reason = quote(stop);
            }
            for (size_t n = std::min(stop.size() - 1, c.held.size()); n > keep; n--) {
                if (c.held.ends_with(std::string_view(stop).substr(0, n))) keep = n;
            }
        }
        if (first != std::string::npos)
            finish = Finish::stop;
        else
            cut = c.held.size() - (finish == Finish::none ? keep : 0);
        c.text += c.held.substr(0, cut);
        c.held.erase(0, cut);
    }

    void settle(std::string& out, int index, Finish finish) {
        static const char* const names[] = {"null", R"("stop")", R"("length")", R"("abort")"};
        Choice& c = choices[size_t(index)];
        if (finish != Finish::none) {
            c.finished = true;
            c.finish_reason = names[int(finish)];
            sequences[size_t(index)]->cancelled = true;  // for the scheduler a stop string is none
            unfinished--;
            app.metrics->change([&](Figures& m) {
                (finish == Finish::stop     ? m.stopped
                 : finish == Finish::length ? m.reached_length
                                            : m.aborted)++;
                m.prompt_size.observe(c.prompt_size), m.generated_size.observe(c.tokens);
                m.max_generated_size.observe(c.tokens);
                m.asked_size.observe(sequences[size_t(index)]->max_tokens);
            });
        }
        if (request.stream) event(out, choice_json(index), usage_so_far(c));
    }

    void observe(Choice& c, const Delivery& d, bool last) {
        const double arrived = sequences[size_t(d.choice)]->arrived;
        const bool first = c.tokens <= 1;
        if (first) c.first = d.at, c.cached = d.cached_tokens;
        if (queued < 0) queued = d.started - visit->begun, first_token = d.at - visit->begun;
        app.metrics->change([&](Figures& m) {
            if (c.tokens > 0) m.generated_tokens++;
            if (first) {
                m.first_token.observe(d.at - arrived), m.queue.observe(d.started - arrived);
                m.prefill.observe(d.at - d.started);
                m.cache_queries += c.prompt_size, m.cache_hits += d.cached_tokens;
            } else {
                m.next_token.observe(d.at - c.last);
            }
            if (last) {
                m.whole.observe(d.at - arrived), m.inference.observe(d.at - d.started);
                m.decode.observe(d.at - c.first);
            }
        });
        c.last = d.at;
    }

    std::string token_name(int token) const {  // its text; a control token's own spelling
        const std::string s = app.tokenizer->decode({token});
        return s.empty() ? std::string(app.tokenizer->name(token)) : s;
    }
    std::string token_text(int token) const {
        return request.tokens_as_ids ? text("token_id:%d", token) : token_name(token);
    }

    static std::string number(float logprob) {  // floored as vLLM's: JSON has no -inf
        return quote(std::max(double(logprob), -9999.));
    }

    static void append(std::string& list, const std::string& entry) {
        list += (list.empty() ? "" : ",") + entry;
    }

    // An entry of prompt_logprobs: the token itself, then its alternatives.
    std::string ranked(const Result& r) const {
        const auto entry = [&](int token, float logprob, int rank) {
            return text(R"("%d":{"logprob":%s,"rank":%d,"decoded_token":%s})", token,
                        number(logprob).c_str(), rank, quote(token_name(token)).c_str());
        };
        std::string list = entry(r.id, r.logprob, r.rank);
        for (size_t i = 0; i < r.top.size(); i++) {
            const auto& t = r.top[i];
            if (t.id != r.id) append(list, entry(t.id, t.logprob, int(i) + 1));
        }
        return "{" + list + "}";
    }

    void add_logprobs(Choice& c, const Result& r) const {
        std::string top;
        if (request.chat) {
            const auto entry = [&](int token, float logprob) {
                const auto raw = app.tokenizer->bytes(token);
                return text(R"({"token":%s,"logprob":%s,"bytes":%s)",
                            quote(token_text(token)).c_str(), number(logprob).c_str(),
                            quote(std::vector<uint8_t>(raw.begin(), raw.end())).c_str());
            };
            for (const auto& t : r.top) append(top, entry(t.id, t.logprob) + "}");
            return append(c.logprobs[0],
                          entry(r.id, r.logprob) + R"(,"top_logprobs":[)" + top + "]}");
        }
        std::vector<std::string> names{token_text(r.id)};
        append(top, quote(names[0]) + ":" + number(r.logprob));
        for (const auto& t : r.top) {
            const std::string name = token_text(t.id);
            if (std::count(names.begin(), names.end(), name)) continue;  // it, or one of its text
            names.push_back(name);
            append(top, quote(name) + ":" + number(t.logprob));
        }
        add_token(c, names[0], number(r.logprob), "{" + top + "}");
    }

    static void add_token(Choice& c, const std::string& name, const std::string& logprob,
                          const std::string& top) {
        append(c.logprobs[0], std::to_string(c.offset));
        append(c.logprobs[1], logprob);
        append(c.logprobs[2], quote(name));
        append(c.logprobs[3], top);
        c.offset += size_t(
            std::count_if(name.begin(), name.end(), [](char b) { return (b & 0xc0) != 0x80; }));
    }

    // What has come since the last call.
    std::string choice_json(int index) {
        Choice& c = choices[size_t(index)];
        const std::string piece = quote(std::exchange(c.text, {}));
        std::string logprobs = "null";
        std::string(&l)[4] = c.logprobs;
        if (request.chat && !l[0].empty()) logprobs = R"({"content":[)" + l[0] + "]}";
        if (!request.chat && !l[0].empty())
            logprobs = R"({"text_offset":[)" + l[0] + R"(],"token_logprobs":[)" + l[1] +
                       R"(],"tokens":[)" + l[2] + R"(],"top_logprobs":[)" + l[3] + "]}";
        for (auto& list : l) list.clear();
        std::string s = text(R"({"index":%d,)", index);
        if (!request.chat)
            s += R"("text":)" + piece;
        else if (request.stream)
            s += R"("delta":{"content":)" + piece + "}";
        else
            s += R"("message":{"role":"assistant","reasoning_content":null,"content":)" + piece +
                 R"(,"tool_calls":[]})";
        s += R"(,"logprobs":)" + logprobs + R"(,"finish_reason":)" + c.finish_reason;
        if (!request.chat || !request.stream || c.finished)
            s += R"(,"stop_reason":)" + c.stop_reason;
        return s + (request.chat || request.stream ? "}" : prompt_logprobs_json(c) + "}");
    }

    static std::string prompt_logprobs_json(const Choice& c) {
        const std::string& list = c.prompt_logprobs;
        return R"(,"prompt_logprobs":)" + (list.empty() ? "null" : "[" + list + "]");
    }

    static std::string usage_json(int prompt, int completion, int cached) {
        return text(R"({"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d,)"
                    R"("prompt_tokens_details":%s})",
                    prompt, prompt + completion, completion,
                    cached > 0 ? text(R"({"cached_tokens":%d})", cached).c_str() : "null");
    }

    // Of the whole: a prompt counts once, whatever its number of choices.
    std::string usage() const {
        int made = 0, cached = 0;
        for (size_t i = 0; i < choices.size(); i++) {
            made += choices[i].tokens;
            if (i % size_t(request.n) == 0) cached += choices[i].cached;
        }
        return usage_json(prompt_tokens, made, app.options.prompt_tokens_details ? cached : 0);
    }

    std::string usage_so_far(const Choice& c) const {
        return request.continuous_usage ? usage_json(c.prompt_size, c.tokens, 0) : "null";
    }

    std::string envelope(const char* object, const std::string& list) const {
        return text(R"({"id":"%s","object":"%s","created":%ld,"model":)", id.c_str(), object,
                    created) +
               quote(request.model) + R"(,"choices":[)" + list + "]";
    }

    void event(std::string& out, const std::string& choice, const std::string& use) const {
        out +=
            "data: " + envelope(request.chat ? "chat.completion.chunk" : "text_completion", choice);
        if (!request.chat || use != "null") out += R"(,"usage":)" + use;
        out += "}\n\n";
    }

    std::string whole() {
        std::string list;
        for (size_t i = 0; i < choices.size(); i++) append(list, choice_json(int(i)));
        return envelope(request.chat ? "chat.completion" : "text_completion", list) +
               R"(,"usage":)" + usage() + (request.chat ? prompt_logprobs_json(choices[0]) : "") +
               "}";
    }

    const std::shared_ptr<Visit> visit;
    App& app = visit->app;
    const Request request;
    const std::vector<std::shared_ptr<Sequence>> sequences;
    std::vector<Choice> choices =
        std::vector<Choice>(sequences.size(), Choice(*app.tokenizer, !request.skip_special_tokens));
    size_t unfinished = sequences.size();
    int prompt_tokens = 0;
    double queued = -1, first_token = -1;  // seconds from the request to its first token's step
    bool started = false;
    const std::string id =
        (request.chat ? "chatcmpl-" : "cmpl-") + (request.id.empty() ? app.draw_hex() : request.id);
    const long created = std::time(nullptr);
};

// [6] Routes --------------------------------------------------------------------------------------

HttpReply reply(const ordered& body) {
    return {body.dump(-1, ' ', false, json::error_handler_t::replace), "application/json", {}};
}

// A handler gets what it needs to answer, and throws a Refusal when it will not.
using Handler = HttpReply (*)(const std::shared_ptr<Visit>&, const HttpRequest&, const json& body);

// A client's own id for a request, if it can stand in JSON and in a log as it is.
std::string own_id(const std::string& given) {
    const bool plain = given.size() <= 128 && std::all_of(given.begin(), given.end(), [](char c) {
                           return std::isalnum(uint8_t(c)) ||
                                  std::string_view("-_.:").find(c) != std::string::npos;
                       });
    return plain ? given : "";
}

template <bool chat>
HttpReply generate(const std::shared_ptr<Visit>& visit, const HttpRequest& http, const json& body) {
    App& app = visit->app;
    const json prompts = chat ? json::array({0}) : list_prompts(body);
    Request r = parse_request(app, body, chat);
    r.id = own_id(http.id);
    const int count = int(prompts.size()) * int(r.n);
    if (count > 128)
        refuse("n", "prompts times n must be at most 128, got %zu x %d", prompts.size(), int(r.n));
    app.engine->enter(count);
    std::shared_ptr<Answer> answer;
    try {
        if (chat)
            parse_messages(app, body, r);
        else
            parse_prompts(app, prompts, r);
        for (const auto& prompt : r.prompts) check_length(app, r, prompt.size());
        check_scores(r);
        answer = std::make_shared<Answer>(visit, std::move(r));
    } catch (...) {
        app.engine->leave(count);  // nothing was posted
        throw;
    }
    return answer->reply(answer);
}

HttpReply tokenize(const std::shared_ptr<Visit>& visit, const HttpRequest&, const json& body) {
    const App& app = visit->app;
    Request r;
    r.chat = body.contains("messages");
    r.add_special_tokens = !r.chat;
    assign_all(r, prompt_fields, body);
    check_model(app, r.model);
    check_offered(body);
    if (!r.chat) r.add_generation_prompt = false;
    check_fields(app, r, json::object());
    const json prompt = body.value("prompt", json());
    if (!r.chat && !prompt.is_string())
        refuse("prompt", "prompt must be a string, got %s", show(prompt).c_str());
    if (r.chat) parse_messages(app, body, r);
    const auto ids =
        r.chat ? r.prompts[0]
               : encode_prompt(app, prompt.get_ref<const std::string&>(), r.add_special_tokens);
    return reply({{"count", ids.size()}, {"max_model_len", app.max_model_len}, {"tokens", ids}});
}

HttpReply detokenize(const std::shared_ptr<Visit>& visit, const HttpRequest&, const json& body) {
    const App& app = visit->app;
    Request r;
    assign_all(r, prompt_fields, body);
    check_model(app, r.model);
    const json tokens = body.value("tokens", json());
    if (!tokens.is_array())
        refuse("tokens", "tokens must be a list of token ids, got %s", show(tokens).c_str());
    return reply({{"prompt", app.tokenizer->decode(parse_ids(app, tokens, "tokens"))}});
}

ordered model_card(App& app, const std::string& name) {
    ordered model = ordered::parse(R"({"id":0,"object":"model","created":0,"owned_by":"vllm",
        "root":0,"parent":null,"max_model_len":0,"permission":[{"id":0,
        "object":"model_permission","created":0,"allow_create_engine":false,
        "allow_sampling":true,"allow_logprobs":true,"allow_search_indices":false,
        "allow_view":true,"allow_fine_tuning":false,"organization":"*","group":null,
        "is_blocking":false}]})");
    ordered& permission = model["permission"][0];
    model["id"] = name, model["root"] = app.options.model;
    model["max_model_len"] = app.max_model_len;
    model["created"] = permission["created"] = std::time(nullptr);
    permission["id"] = "modelperm-" + app.draw_hex();
    return model;
}

// All of them, or the one that the path names.
HttpReply list_models(const std::shared_ptr<Visit>& visit, const HttpRequest& http, const json&) {
    App& app = visit->app;
    const std::string all = "/v1/models";
    if (http.path != all) {
        const std::string name = http.path.substr(all.size() + 1);
        check_model(app, name.empty() ? "/" : name);
        return reply(model_card(app, name));
    }
    ordered list = ordered::parse(R"({"object":"list","data":[]})");
    for (const std::string& name : app.options.served_model_name)
        list["data"].push_back(model_card(app, name));
    return reply(list);
}

HttpReply metrics(App& app) {
    if (!app.change([&] { return app.ready; })) throw Refusal{503, "the model is loading", ""};
    const std::string labels =
        R"(engine="0",model_name=)" + quote(app.options.served_model_name[0]);
    return {app.metrics->page(labels, app.cache_config),
            "text/plain; version=0.0.4; charset=utf-8",
            {}};
}

HttpReply health(App& app) {
    return app.change([&]() -> HttpReply {
        if (app.leaving) throw Refusal{503, "the server is shutting down", ""};
        if (!app.ready) throw Refusal{503, "the model is loading", ""};
        return {};
    });
}

// A large request has its turn; then the memory that it took goes back, which glibc would keep.
struct Large : std::lock_guard<std::mutex> {
    using lock_guard::lock_guard;
    ~Large() { malloc_trim(0); }
};

HttpReply post_reply(App& app, Handler handler, const HttpRequest& http) {
    const auto visit = std::make_shared<Visit>(app, http.trace);
    const auto answer = [&] { return handler(visit, http, parse_body(http.body)); };
    if (http.body.size() <= 64 << 10) return answer();
    const Large alone(app.large);
    return answer();
}

// What asks for text and is refused has its line in the log, as an answer has (~Answer).
HttpReply generation_reply(App& app, Handler handler, const HttpRequest& http) {
    const double begun = seconds();
    try {
        return post_reply(app, handler, http);
    } catch (const Refusal& r) {
        Generation g;
        g.status = r.status, g.param = r.param, g.id = own_id(http.id), g.trace = http.trace;
        g.total = seconds() - begun;
        if (!app.options.disable_log_requests) say(g);
        throw;
    }
}

std::vector<Route> Service::routes() {
    const auto post = [this](const char* path, auto reply, Handler handler) -> Route {
        return {"POST", path, [this, reply, handler](const HttpRequest& http) {
                    return reply(*app, handler, http);
                }};
    };
    const auto get = [this](const char* path, auto handler) -> Route {
        return {"GET", path, [this, handler](const HttpRequest&) { return handler(*app); }};
    };
    const auto models = [this](const HttpRequest& http) {
        return list_models(std::make_shared<Visit>(*app, http.trace), http, {});
    };
    return {post("/v1/completions", generation_reply, generate<false>),
            post("/v1/chat/completions", generation_reply, generate<true>),
            post("/tokenize", post_reply, tokenize),
            post("/detokenize", post_reply, detokenize),
            {"GET", "/v1/models", models},
            {"GET", "/v1/models/", models},
            get("/health", health),
            get("/ping", health),
            {"POST", "/ping", [this](const HttpRequest&) { return health(*app); }, false},
            get("/metrics", metrics),
            get("/load",
                [](App& a) {
                    return reply({{"server_load", a.change([&] { return a.generating; })}});
                }),
            get("/version", [](App&) {
                return reply({{"version", GEMMA_VERSION}});
            })};
}

// [7] Service -------------------------------------------------------------------------------------

Service::Service(const Options& options) : app(std::make_unique<App>(options)) {}
Service::~Service() = default;

void Service::open(const Checkpoint& checkpoint, const Tokenizer& tokenizer,
                   std::unique_ptr<Model> model, const Limits& limits, int max_model_len) {
    app->checkpoint = &checkpoint, app->tokenizer = &tokenizer;
    app->max_model_len = max_model_len;
    app->cache_config = text(R"(,block_size="%d",num_gpu_blocks="%d",num_local_blocks="%d",)"
                             R"(cache_dtype="auto",enable_prefix_caching="True")",
                             page_tokens, limits.pages[global_pool], limits.pages[local_pool]);
    app->metrics.emplace(max_model_len);
    app->engine.emplace(std::move(model), limits, int(app->options.max_queue), *app->metrics);
    app->change([&] { app->ready = true; });
}

bool Service::leave() {
    return app->change([&] { return app->leaving = true, app->ready; });
}

bool Service::drained(std::chrono::milliseconds wait) {
    return app->wait([&] { return app->in_flight == 0; }, wait);
}

void Service::cut() { app->cut = true; }

bool Service::rests(std::chrono::milliseconds wait) { return app->engine->rests(wait); }

}  // namespace gemma
