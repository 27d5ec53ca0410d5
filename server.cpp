// SPDX-License-Identifier: Apache-2.0
//
// server.cpp: from an HTTP byte to a Batch, and from a Result back to an HTTP byte.
//
//   [1] Pages      who holds which page of K and V, and which prefix it contains
//   [2] Scheduler  which tokens of which sequences make up the next step
//   [3] Engine     the one thread that owns the model; an inbox for each request
//   [4] Fields     one table drives parsing, ranges and error texts of requests and of flags
//   [5] Requests   two parsers, one struct
//   [6] Answers    streamed or whole, text or chat: one path
//   [7] Routes     the OpenAI surface
//   [8] main       flags, memory, start, drain
//
// Rules: only the engine thread touches the model, the pages and what the scheduler changes. HTTP
// threads parse, tokenize, post sequences and wait on their request's inbox; nothing they do can
// stall a step.
#include "gemma.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <ctime>
#include <deque>
#include <filesystem>
#include <fstream>
#include <future>
#include <limits>
#include <list>
#include <map>
#include <mutex>
#include <optional>
#include <random>
#include <thread>
#include <variant>

#include <sys/socket.h>
#include <unistd.h>

#include <httplib.h>
#include <nlohmann/json.hpp>

namespace gemma {

using nlohmann::json;
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

    // The longest known prefix: global pages from the start on, and the local pages that the window
    // still sees. At least one token is left to compute, because its logits are needed.
    void take_cached(Sequence& s) {
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

    void admit(int& budget) {
        while (!waiting.empty() && int(running.size()) < limits.max_num_seqs && budget > 0) {
            const auto s = waiting.front();
            take_cached(*s);
            const int cached = s->computed;
            int got = 0;
            if (has_room(*s, budget)) {
                got = grow(*s, std::min(int(s->tokens.size()) - s->computed, budget));
            }
            if (got == 0) return release(*s);
            if (s->preemptions == 0) s->cached_tokens = cached;
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
                batch.tokens.push_back(s.tokens[i]);
                batch.positions.push_back(i);
            }
            batch.row_start.push_back(int(batch.tokens.size()));
            for (const Pool pool : pools) {
                auto& table = batch.pages[pool];
                table.insert(table.end(), s.pages[pool].begin(), s.pages[pool].end());
                table.resize(batch.pages_per_row * (batch.row_start.size() - 1), -1);
            }
            if (end == int(s.tokens.size())) {
                const int last = int(batch.tokens.size()) - 1;
                batch.outputs.push_back(
                    {last, index, -1, end - s.prompt_tokens, s.sampling, {}, nullptr});
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

const Batch& Scheduler::next() {
    int budget = state->limits.max_batched_tokens;
    const int before = state->preemptions;
    state->rows.clear();
    state->drop_cancelled();
    state->plan_running(budget);
    if (state->preemptions == before) state->admit(budget);  // else it would take the same pages
    state->build();
    return state->batch;
}

std::vector<Token> Scheduler::finish(const Results& results) {
    std::vector<Token> tokens;
    for (const State::Row& row : state->rows) {
        Sequence& s = *row.sequence;
        state->settle(s, row.count);
        if (s.computed < int(s.tokens.size())) continue;  // its prompt goes on
        const Result& result = results[tokens.size()];
        s.tokens.push_back(result.id);
        Finish finish = Finish::none;
        if (std::count(s.stop_ids.begin(), s.stop_ids.end(), result.id)) {
            finish = Finish::stop;
        } else if (int(s.tokens.size()) - s.prompt_tokens >= s.max_tokens) {
            finish = Finish::length;
        }
        tokens.push_back({row.sequence, result, finish});
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
    Engine(std::unique_ptr<Model> m, const Limits& limits)
        : model(std::move(m)), scheduler(limits), thread([this] { run(); }) {}
    ~Engine() {
        tell([&] { stopping = true; });
        thread.join();
    }
    Engine(const Engine&) = delete;

    void post(const std::vector<std::shared_ptr<Sequence>>& sequences) {
        tell([&] { arrived.insert(arrived.end(), sequences.begin(), sequences.end()); });
    }
    bool fits(int tokens) const { return scheduler.fits(tokens); }

  private:
    void tell(auto&& change) {
        {
            const std::lock_guard lock(mutex);
            change();
        }
        changed.notify_one();
    }

    void run() {
        for (bool idle = true;;) {
            std::vector<std::shared_ptr<Sequence>> news;
            {
                std::unique_lock lock(mutex);
                if (idle) changed.wait(lock, [&] { return !arrived.empty() || stopping; });
                if (stopping) return;
                news.swap(arrived);
            }
            for (auto& sequence : news) scheduler.add(std::move(sequence));
            const Batch& batch = scheduler.next();
            idle = batch.tokens.empty();
            if (idle) {
                check_books();
            } else {
                for (Token& t : scheduler.finish(model->step(batch))) {
                    t.sequence->inbox->put({t.sequence->choice, std::move(t.result), t.finish});
                }
            }
        }
    }

    // With nothing to do, no page may be held: a leak would otherwise show days later.
    void check_books() const {
        for (const Pool pool : pools) {
            const PoolUse use = scheduler.use(pool);
            if (use.held == 0 && scheduler.waiting() + scheduler.running() == 0) continue;
            say(text("BUG: idle, but pool %d holds %d pages (%d cached, %d free); %d waiting", pool,
                     use.held, use.cached, use.free, scheduler.waiting()));
            std::abort();
        }
    }

    // engine thread only, but for fits(), which reads constants
    std::unique_ptr<Model> model;
    Scheduler scheduler;
    // any thread
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<std::shared_ptr<Sequence>> arrived;  // guarded by mutex, as is the next
    bool stopping = false;
    std::thread thread;  // last: it starts when the rest is there
};

// [4] Fields --------------------------------------------------------------------------------------

// A mistake of the client's, or of a flag's: `param` names the field.
struct Refusal {
    int status;
    std::string message, param;
};

[[noreturn, gnu::format(printf, 2, 3)]] void refuse(const char* param, const char* format, ...) {
    char message[1000];
    va_list args;
    va_start(args, format);
    std::vsnprintf(message, sizeof message, format, args);
    va_end(args);
    throw Refusal{400, message, param};
}

std::string quote(const json& value) {  // JSON text, valid UTF-8 whatever the bytes
    return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

// A value in an error: cut, so that an answer is never much longer than its request.
std::string show(const json& value) {
    const std::string s = quote(value);
    return s.size() <= 100 ? s : s.substr(0, 97) + "...";
}

// One row of a table that drives parsing, ranges, error texts and help, for requests and flags.
template <class T>
struct Field {
    const char* name;
    std::variant<bool T::*, int64_t T::*, double T::*, std::string T::*,
                 std::vector<std::string> T::*>
        member;
    double low = 0, high = 0;
    const char* help = "";
};

constexpr double no_limit = std::numeric_limits<double>::infinity();
constexpr double above_zero = std::numeric_limits<double>::min();

// As pydantic reads numbers: "16" is 16, true is 1. Not a number: NaN.
double as_number(const json& v) {
    if (v.is_boolean()) return v.get<bool>();
    if (v.is_number()) return v.get<double>();
    const std::string s = v.is_string() ? v.get<std::string>() : "";
    double d = 0;
    const auto [end, error] = std::from_chars(s.data(), s.data() + s.size(), d);
    return error == std::errc() && end == s.data() + s.size() ? d : std::nan("");
}

template <class T>
void assign(T& out, const Field<T>& field, const json& value) {
    const auto need = [&](bool met, const std::string& allowed) {
        if (met) return;
        refuse(field.name, "%s must be %s, got %s", field.name, allowed.c_str(),
               show(value).c_str());
    };
    const std::string range =
        (field.low == above_zero ? " above 0" : text(" of at least %.15g", field.low)) +
        (field.high == no_limit ? "" : text(" and at most %.15g", field.high));
    const double number = as_number(value);
    const bool in_range = number >= field.low && number <= field.high;
    std::visit(
        [&](auto member) {
            using M = std::decay_t<decltype(member)>;
            if constexpr (std::is_same_v<M, bool T::*>) {
                const bool yes = value == "true" || number == 1;
                need(yes || value == "false" || number == 0, "true or false");
                out.*member = yes;
            } else if constexpr (std::is_same_v<M, int64_t T::*>) {
                // 2^63 is the first double, and the first uint64, that is too large.
                const bool fits =
                    number == std::floor(number) && number >= -0x1p63 &&
                    (value.is_number_unsigned() ? value.get<uint64_t>() <= uint64_t(INT64_MAX)
                                                : number < 0x1p63);
                need(in_range && fits, "an integer" + range);
                out.*member = value.is_number_integer() ? value.get<int64_t>() : int64_t(number);
            } else if constexpr (std::is_same_v<M, double T::*>) {
                need(in_range && !value.is_boolean(), "a number" + range);
                out.*member = number;
            } else if constexpr (std::is_same_v<M, std::string T::*>) {
                need(value.is_string(), "a string");
                out.*member = value;
            } else if constexpr (std::is_same_v<M, std::vector<std::string> T::*>) {
                const json list = value.is_string() ? json::array({value}) : value;
                const auto good = [](const json& s) { return s.is_string() && s != ""; };
                need(list.is_array() && double(list.size()) <= field.high &&
                         std::all_of(list.begin(), list.end(), good),
                     text("a string or a list of at most %.0f, none of them empty", field.high));
                out.*member = list;
            }
        },
        field.member);
}

template <class T>
void assign_all(T& out, const std::vector<Field<T>>& fields, const json& body) {
    for (const auto& field : fields) {
        const auto value = body.find(field.name);
        if (value != body.end() && !value->is_null()) assign(out, field, *value);
    }
}

// [5] Requests ------------------------------------------------------------------------------------

struct Options {
    std::string model = "google/gemma-3-1b-it", host = "0.0.0.0", device = "auto";
    std::vector<std::string> served_model_name;
    int64_t port = 8000, max_num_seqs = 256, seed = 0;
    int64_t block_size = page_tokens;                                     // read and not used
    int64_t max_model_len = -1, max_num_batched_tokens = -1, pages = -1;  // -1: not given
    double gpu_memory_utilization = -1;
};

struct App {
    // constant once the model is ready
    Options options;
    int max_model_len = 0;
    std::optional<Checkpoint> checkpoint;
    std::optional<Tokenizer> tokenizer;
    std::optional<Engine> engine;
    // guarded by mutex
    std::mutex mutex;
    std::condition_variable changed;
    bool ready = false, leaving = false;
    int in_flight = 0;
    std::mt19937_64 seeds, ids{std::random_device{}()};
    // any thread
    std::atomic<bool> cut{false};  // what still runs ends now, with what it has

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

// A request that is being answered. It waits for the model; when the server leaves, it is refused,
// and those that are inside are waited for.
struct Visit {
    App& app;
    explicit Visit(App& a) : app(a) {
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
    std::string model;
    std::vector<std::vector<int>> prompts;
    int64_t max_tokens = -1, seed = -1;        // -1: not given
    int64_t logprobs = -1, top_logprobs = -1;  // alternatives wanted; -1: none
    double temperature = 1, top_p = 1, min_p = 0;
    int64_t top_k = 0, n = 1;
    bool chat_logprobs = false, tokens_as_ids = false, ignore_eos = false;
    bool stream = false, include_usage = true;
    bool add_special_tokens = true, add_generation_prompt = true;
    std::vector<std::string> stop;
};

using RequestFields = std::vector<Field<Request>>;

const RequestFields common_fields{
    {"model", &Request::model},
    {"max_tokens", &Request::max_tokens, 1, 1e9},
    {"temperature", &Request::temperature, 0, no_limit},
    {"top_p", &Request::top_p, above_zero, 1},
    {"top_k", &Request::top_k, -1, 1e9},
    {"min_p", &Request::min_p, 0, 1},
    {"seed", &Request::seed, -0x1p63, 0x1p63},
    {"n", &Request::n, 1, 128},
    {"stop", &Request::stop, 0, 16},
    {"ignore_eos", &Request::ignore_eos},
    {"stream", &Request::stream},
    {"return_tokens_as_token_ids", &Request::tokens_as_ids},
    {"add_special_tokens", &Request::add_special_tokens},
};
const RequestFields completion_fields{{"logprobs", &Request::logprobs, 0, 20}};
const RequestFields chat_fields{
    {"max_completion_tokens", &Request::max_tokens, 1, 1e9},
    {"logprobs", &Request::chat_logprobs},
    {"top_logprobs", &Request::top_logprobs, 0, 20},
};
const RequestFields stream_fields{{"include_usage", &Request::include_usage}};
const RequestFields tokenize_fields{
    {"model", &Request::model},
    {"add_special_tokens", &Request::add_special_tokens},
    {"add_generation_prompt", &Request::add_generation_prompt},
};

// What vLLM has, would change the result and is not offered here, each with the one value that it
// may have: silently ignoring what was asked for would falsify somebody's measurement.
const json not_offered = json::parse(R"({
    "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "logit_bias": {},
    "min_tokens": 0, "stop_token_ids": [], "include_stop_str_in_output": false,
    "allowed_token_ids": null, "bad_words": [], "skip_special_tokens": true,
    "truncate_prompt_tokens": null, "prompt_logprobs": null, "best_of": 1, "echo": false,
    "use_beam_search": false, "length_penalty": 1, "priority": 0, "logits_processors": [],
    "response_format": {"type": "text"}, "structured_outputs": null, "guided_json": null,
    "guided_regex": null, "guided_choice": null, "guided_grammar": null, "suffix": null,
    "prompt_embeds": null, "add_generation_prompt": true, "continue_final_message": false,
    "tools": [], "tool_choice": "none", "functions": [], "chat_template": null,
    "chat_template_kwargs": {}, "documents": [], "continuous_usage_stats": false,
    "function_call": "none", "return_token_ids": false, "logprob_token_ids": [],
    "thinking_token_budget": null, "repetition_detection": null, "structural_tag": null})");

void check_offered(const json& body) {
    for (const auto& [name, only] : not_offered.items()) {
        const auto value = body.find(name);
        if (value == body.end() || value->is_null() || *value == only) continue;
        refuse(name.c_str(), "%s is not supported by this server: leave it out or give %s, got %s",
               name.c_str(), quote(only).c_str(), show(*value).c_str());
    }
}

// Nested at most 64 deep: copying 100,000 levels would overflow the stack.
json parse_body(const std::string& body) {
    const auto limit = [](int depth, json::parse_event_t, json&) {
        if (depth > 64) refuse("", "the body is nested more than 64 levels deep");
        return true;
    };
    try {
        json parsed = json::parse(body, limit);
        if (!parsed.is_object()) refuse("", "the body must be a JSON object");
        return parsed;
    } catch (const json::parse_error& e) {
        refuse("", "the body is not valid JSON, at byte %zu", e.byte);
    } catch (const json::exception&) {
        refuse("", "the body is not valid JSON: it has a number that no double can hold");
    }
}

int check_token(const App& app, const json& id, const char* param) {
    const int V = app.checkpoint->config.V;
    if (id.is_number_integer() && id >= 0 && id < V) return id;
    refuse(param, "%s: token id %s is out of vocabulary: ids are integers from 0 to %d", param,
           show(id).c_str(), V - 1);
}

std::vector<int> encode_prompt(const App& app, const std::string& prompt, bool add_bos) {
    std::vector<int> ids = app.tokenizer->encode_with_controls(prompt);
    if (add_bos) ids.insert(ids.begin(), Tokenizer::bos);
    for (const int id : ids) check_token(app, id, "prompt");
    return ids;
}

// A string, a list of strings, a list of ids, or a list of lists of ids.
std::vector<std::vector<int>> parse_prompts(const App& app, const json& body, bool add_bos) {
    const json prompt = body.value("prompt", json());
    const bool ids = prompt.is_array() && !prompt.empty() && prompt[0].is_number();
    const json list = ids || prompt.is_string() ? json::array({prompt}) : prompt;
    const auto need = [&](bool met) {
        if (met) return;
        refuse("prompt", "prompt must be text, a list of token ids, or 1 to 64 of these, got %s",
               show(prompt).c_str());
    };
    need(list.is_array() && !list.empty() && list.size() <= 64);
    std::vector<std::vector<int>> prompts;
    for (const json& one : list) {
        need(one.is_string() || (one.is_array() && !one.empty()));
        auto& to = prompts.emplace_back();
        if (one.is_string()) to = encode_prompt(app, one.get_ref<const std::string&>(), add_bos);
        if (one.is_array()) {
            for (const json& id : one) to.push_back(check_token(app, id, "prompt"));
        }
        if (to.empty()) refuse("prompt", "prompt has no token");
    }
    return prompts;
}

std::vector<int> parse_messages(const App& app, const json& body, const Request& r) try {
    const json messages = body.value("messages", json());
    for (const json& message : messages) {
        const json content = message.is_object() ? message.value("content", json()) : json();
        for (const json& part : content.is_array() ? content : json::array()) {
            const json type = part.is_object() ? part.value("type", json()) : json();
            if (type == "text") continue;
            refuse("messages", "only text is served: a part of a content has the type %s",
                   show(type).c_str());
        }
    }
    auto ids = app.tokenizer->chat(messages, r.add_generation_prompt);  // <bos> is the template's
    if (r.add_special_tokens) ids.insert(ids.begin(), Tokenizer::bos);
    return ids;
} catch (const std::invalid_argument& e) {
    refuse("messages", "%s", e.what());
}

void check_model(const App& app, const std::string& model) {
    const auto& names = app.options.served_model_name;
    if (model.empty() || std::count(names.begin(), names.end(), model)) return;
    throw Refusal{404, "The model `" + model.substr(0, 200) + "` does not exist.", "model"};
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

Request parse_request(const App& app, const json& body, bool chat) {
    const SamplingDefaults& d = app.checkpoint->defaults;
    Request r;
    r.chat = chat, r.add_special_tokens = !chat;
    r.temperature = d.temperature, r.top_p = d.top_p, r.min_p = d.min_p, r.top_k = d.top_k;
    assign_all(r, common_fields, body);
    assign_all(r, chat ? chat_fields : completion_fields, body);
    check_offered(body);
    const json options = body.value("stream_options", json());
    r.include_usage = options.is_object();
    if (!options.is_null() && !r.stream) {
        refuse("stream_options", "Stream options can only be defined when `stream=True`.");
    }
    if (!options.is_null() && !options.is_object()) {
        refuse("stream_options", "stream_options must be an object, got %s", show(options).c_str());
    }
    if (r.include_usage) assign_all(r, stream_fields, options), check_offered(options);
    check_model(app, r.model);
    if (r.model.empty()) r.model = app.options.served_model_name[0];
    if (chat && r.top_logprobs >= 0 && !r.chat_logprobs)
        refuse("top_logprobs", "when using `top_logprobs`, `logprobs` must be set to true.");
    if (r.chat_logprobs) r.logprobs = std::max<int64_t>(0, r.top_logprobs);
    r.temperature = r.temperature < 1e-5 ? 0 : std::clamp(r.temperature, 0.01, 1e6);  // as vLLM
    if (r.temperature == 0 && r.n > 1)
        refuse("n", "n must be 1 when using greedy sampling, got %d.", int(r.n));
    if (!chat && r.max_tokens < 0) r.max_tokens = 16;
    if (chat) r.prompts.push_back(parse_messages(app, body, r));
    if (!chat) r.prompts = parse_prompts(app, body, r.add_special_tokens);
    for (const auto& prompt : r.prompts) check_length(app, r, prompt.size());
    if (int64_t(r.prompts.size()) * r.n > 128)
        refuse("n", "prompts times n must be at most 128, got %zu x %d", r.prompts.size(),
               int(r.n));
    return r;
}

// One for each choice: choice i of prompt p has the index p * n + i, and the seed plus i.
std::vector<std::shared_ptr<Sequence>> make_sequences(App& app, const Request& r) {
    const auto inbox = std::make_shared<Inbox>();
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
        const uint64_t seed = r.seed == -1 ? app.draw_seed() : uint64_t(r.seed);
        for (int i = 0; i < r.n; i++) {
            auto& s = *sequences.emplace_back(std::make_shared<Sequence>());
            s.tokens = prompt;
            s.prompt_tokens = size;
            s.max_tokens = max_tokens;
            s.sampling = {float(r.temperature), int(std::max<int64_t>(0, r.top_k)),
                          float(r.top_p),       float(r.min_p),
                          seed + uint64_t(i),   int(r.logprobs)};
            if (!r.ignore_eos) s.stop_ids = app.checkpoint->config.eos;
            s.choice = int(sequences.size()) - 1;
            s.inbox = inbox;
        }
    }
    return sequences;
}

// [6] Answers -------------------------------------------------------------------------------------

// One request's answer, streamed or whole, text or chat. Lives as long as its response; when that
// ends, whatever still runs for it is cancelled. JSON is written as text, so that its shape can be
// compared with vLLM's, key for key.
class Answer {
  public:
    Answer(std::shared_ptr<Visit> v, Request r)
        : visit(std::move(v)), request(std::move(r)), sequences(make_sequences(app, request)) {
        for (const auto& prompt : request.prompts) prompt_tokens += int(prompt.size());
        app.engine->post(sequences);
    }
    ~Answer() {
        for (const auto& s : sequences) s->cancelled = true;
    }
    Answer(const Answer&) = delete;

    const char* content_type() const {
        return request.stream ? "text/event-stream; charset=utf-8" : "application/json";
    }

    // Called again and again by the HTTP library until the answer is done; false: the client left,
    // as a write finds out, or a look while there is nothing to write.
    bool pump(httplib::DataSink& sink) {
        std::string out;
        if (request.stream && request.chat && !started) {
            for (size_t i = 0; i < choices.size(); i++) {
                event(out, text(R"({"index":%zu,"delta":{"role":"assistant","content":""},)"
                                R"("logprobs":null,"finish_reason":null})",
                                i));
            }
        }
        started = true;
        for (const Delivery& delivery : sequences[0]->inbox->take()) put(out, delivery);
        for (int i = 0; app.cut && i < int(choices.size()); i++) put(out, {i, {}, Finish::abort});
        if (unfinished == 0) {
            if (request.stream && request.include_usage) event(out, "", usage());
            out += request.stream ? "data: [DONE]\n\n" : whole();
        }
        if (out.empty()) return sink.is_writable();
        if (!sink.write(out.data(), out.size())) return false;
        if (unfinished == 0) sink.done();
        return true;
    }

  private:
    struct Choice {
        explicit Choice(const Tokenizer& t) : detokenizer(t) {}
        Detokenizer detokenizer;
        std::string held;  // decoded, but it may turn out to be the start of a stop string
        std::string text;  // of a whole answer
        std::string finish_reason = "null", stop_reason = "null";  // as JSON
        std::string logprobs[4];  // lists without brackets, in the order of logprobs_json
        size_t offset = 0;        // of the next token, in characters
        bool finished = false;
    };

    void put(std::string& out, const Delivery& d) {
        const int token_id = d.result.id;
        Choice& c = choices[d.choice];
        if (c.finished) return;  // it came behind a stop string
        Finish finish = d.finish;
        if (finish != Finish::abort) {
            completion_tokens++;
            if (request.logprobs >= 0) add_logprobs(c, d.result);
            if (finish != Finish::stop)
                c.held += c.detokenizer.push(token_id);
            else if (token_id != Tokenizer::eos)
                c.stop_reason = std::to_string(token_id);
        }
        if (finish != Finish::none) c.held += c.detokenizer.flush();
        c.text += sendable(c, finish);
        c.finished = finish != Finish::none;
        if (c.finished) {
            static const char* const names[] = {"null", R"("stop")", R"("length")", R"("abort")"};
            c.finish_reason = names[int(finish)];
            sequences[d.choice]->cancelled = true;  // for the scheduler a stop string is none
            unfinished--;
        }
        if (request.stream) event(out, choice_json(d.choice));
    }

    // The part of the held text that may go out. The earliest stop string cuts it and ends the
    // choice; what could be the start of one stays held.
    std::string sendable(Choice& c, Finish& finish) const {
        size_t cut = std::string::npos, keep = 0;
        for (const std::string& stop : request.stop) {
            const size_t at = c.held.find(stop);
            if (at < cut) cut = at, c.stop_reason = quote(stop);
            for (size_t n = std::min(stop.size() - 1, c.held.size()); n > keep; n--) {
                if (c.held.ends_with(std::string_view(stop).substr(0, n))) keep = n;
            }
        }
        if (cut != std::string::npos)
            finish = Finish::stop;
        else
            cut = c.held.size() - (finish == Finish::none ? keep : 0);
        const std::string out = c.held.substr(0, cut);
        c.held.erase(0, cut);
        return out;
    }

    std::string token_text(int token) const {
        if (request.tokens_as_ids) return quote(text("token_id:%d", token));
        const std::string s = app.tokenizer->decode({token});
        return quote(s.empty() ? std::string(app.tokenizer->name(token)) : s);
    }

    static std::string number(float logprob) {  // floored as vLLM's: JSON has no -inf
        return quote(std::max(double(logprob), -9999.));
    }

    static void append(std::string& list, const std::string& entry) {
        list += (list.empty() ? "" : ",") + entry;
    }

    void add_logprobs(Choice& c, const Result& r) const {
        const std::string name = token_text(r.id);
        std::string top;
        if (request.chat) {
            const auto entry = [&](int token, float logprob) {
                const auto raw = app.tokenizer->bytes(token);
                return text(R"({"token":%s,"logprob":%s,"bytes":%s)", token_text(token).c_str(),
                            number(logprob).c_str(),
                            quote(std::vector<uint8_t>(raw.begin(), raw.end())).c_str());
            };
            for (const auto& t : r.top) append(top, entry(t.id, t.logprob) + "}");
            return append(c.logprobs[0],
                          entry(r.id, r.logprob) + R"(,"top_logprobs":[)" + top + "]}");
        }
        append(top, name + ":" + number(r.logprob));
        for (const auto& t : r.top) {
            if (t.id != r.id) append(top, token_text(t.id) + ":" + number(t.logprob));
        }
        append(c.logprobs[0], std::to_string(c.offset));
        append(c.logprobs[1], number(r.logprob));
        append(c.logprobs[2], name);
        append(c.logprobs[3], "{" + top + "}");
        const std::string plain = json::parse(name).get<std::string>();
        c.offset += size_t(
            std::count_if(plain.begin(), plain.end(), [](char b) { return (b & 0xc0) != 0x80; }));
    }

    // What has come since the last call.
    std::string choice_json(int index) {
        Choice& c = choices[index];
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
        return s + (request.chat || request.stream ? "}" : R"(,"prompt_logprobs":null})");
    }

    std::string usage() const {
        return text(R"({"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d,)"
                    R"("prompt_tokens_details":null})",
                    prompt_tokens, prompt_tokens + completion_tokens, completion_tokens);
    }

    std::string envelope(const char* object, const std::string& list) const {
        return text(R"({"id":"%s","object":"%s","created":%ld,"model":)", id.c_str(), object,
                    created) +
               quote(request.model) + R"(,"choices":[)" + list + "]";
    }

    void event(std::string& out, const std::string& choice, const std::string& use = "null") const {
        out +=
            "data: " + envelope(request.chat ? "chat.completion.chunk" : "text_completion", choice);
        if (!request.chat || use != "null") out += R"(,"usage":)" + use;
        out += "}\n\n";
    }

    std::string whole() {
        std::string list;
        for (size_t i = 0; i < choices.size(); i++) append(list, choice_json(int(i)));
        return envelope(request.chat ? "chat.completion" : "text_completion", list) +
               R"(,"usage":)" + usage() + (request.chat ? R"(,"prompt_logprobs":null})" : "}");
    }

    const std::shared_ptr<Visit> visit;
    App& app = visit->app;
    const Request request;
    const std::vector<std::shared_ptr<Sequence>> sequences;
    std::vector<Choice> choices = std::vector<Choice>(sequences.size(), Choice(*app.tokenizer));
    size_t unfinished = sequences.size();
    int prompt_tokens = 0, completion_tokens = 0;
    bool started = false;
    const std::string id = (request.chat ? "chatcmpl-" : "cmpl-") + app.draw_hex();
    const long created = std::time(nullptr);
};

// [7] Routes --------------------------------------------------------------------------------------

void reply(httplib::Response& res, const ordered& body, int status = 200) {
    res.status = status;
    res.set_content(body.dump(-1, ' ', false, json::error_handler_t::replace), "application/json");
}

void reply_error(httplib::Response& res, const Refusal& r) {
    const char* type = r.status == 404   ? "NotFoundError"
                       : r.status == 503 ? "ServiceUnavailableError"
                       : r.status < 500  ? "BadRequestError"
                                         : "InternalServerError";
    if (r.status == 503) res.set_header("Retry-After", "1");
    const ordered param = r.param.empty() ? ordered() : ordered(r.param);
    reply(
        res,
        {{"error", {{"message", r.message}, {"type", type}, {"param", param}, {"code", r.status}}}},
        r.status);
}

// A handler gets what it needs to answer, and throws a Refusal when it will not.
using Handler = void (*)(const std::shared_ptr<Visit>&, const json& body, httplib::Response&);

template <bool chat>
void generate(const std::shared_ptr<Visit>& visit, const json& body, httplib::Response& res) {
    const auto answer = std::make_shared<Answer>(visit, parse_request(visit->app, body, chat));
    res.set_chunked_content_provider(
        answer->content_type(),
        [answer](size_t, httplib::DataSink& sink) { return answer->pump(sink); });
}

void tokenize(const std::shared_ptr<Visit>& visit, const json& body, httplib::Response& res) {
    const App& app = visit->app;
    const bool chat = body.contains("messages");
    Request r;
    r.add_special_tokens = !chat;
    assign_all(r, tokenize_fields, body);
    check_model(app, r.model);
    const json prompt = body.value("prompt", json());
    if (!chat && !prompt.is_string())
        refuse("prompt", "prompt must be a string, got %s", show(prompt).c_str());
    auto ids = chat
                   ? parse_messages(app, body, r)
                   : encode_prompt(app, prompt.get_ref<const std::string&>(), r.add_special_tokens);
    reply(res, {{"count", ids.size()}, {"max_model_len", app.max_model_len}, {"tokens", ids}});
}

void detokenize(const std::shared_ptr<Visit>& visit, const json& body, httplib::Response& res) {
    Request r;
    assign_all(r, tokenize_fields, body);
    check_model(visit->app, r.model);
    const json tokens = body.value("tokens", json());
    if (!tokens.is_array())
        refuse("tokens", "tokens must be a list of token ids, got %s", show(tokens).c_str());
    std::vector<int> ids;
    for (const json& id : tokens) ids.push_back(check_token(visit->app, id, "tokens"));
    reply(res, {{"prompt", visit->app.tokenizer->decode(ids)}});
}

void list_models(const std::shared_ptr<Visit>& visit, const json&, httplib::Response& res) {
    App& app = visit->app;
    ordered list = ordered::parse(R"({"object":"list","data":[]})");
    for (const std::string& name : app.options.served_model_name) {
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
        list["data"].push_back(model);
    }
    reply(res, list);
}

constexpr size_t max_body = 4 << 20;

// The library would limit only a declared length: here chunked and compressed bodies count too.
// What is too long is read on, and dropped, for a while: else the reset would take the answer with
// it.
json read_body(const httplib::Request& req, const httplib::ContentReader& read) {
    std::string body;
    size_t size = 0;
    const auto take = [&](const char* data, size_t more) {
        if ((size += more) <= max_body) body.append(data, more);
        return size <= 16 * max_body;
    };
    const bool whole = req.is_multipart_form_data() || read(take);
    if (size > max_body) throw Refusal{413, "the body is over 4 MiB", ""};
    if (!whole) refuse("", "the body did not come whole");
    if (!req.get_header_value("Content-Type").starts_with("application/json"))
        refuse("", "Unsupported Media Type: Only 'application/json' is allowed");
    return parse_body(body);
}

void add_routes(httplib::Server& server, App& app) {
    using In = const httplib::Request&;
    using Out = httplib::Response&;
    const auto guarded = [](Out res, auto&& answer) {
        try {
            answer();
        } catch (const Refusal& r) {
            reply_error(res, r);
        }
    };
    const auto post = [&](const char* path, Handler handler) {
        server.Post(path,
                    [&app, handler, guarded](In req, Out res, const httplib::ContentReader& read) {
                        guarded(res, [&] {
                            const json body = read_body(req, read);
                            handler(std::make_shared<Visit>(app), body, res);
                        });
                    });
        server.Get(path, [](In, Out res) { reply_error(res, {405, "only POST is served", ""}); });
    };
    post("/v1/completions", generate<false>);
    post("/v1/chat/completions", generate<true>);
    post("/tokenize", tokenize);
    post("/detokenize", detokenize);
    server.Get("/v1/models", [&app, guarded](In, Out res) {
        guarded(res, [&] { list_models(std::make_shared<Visit>(app), json(), res); });
    });
    server.Get("/version", [](In, Out res) { reply(res, {{"version", GEMMA_VERSION}}); });
    server.Get("/health", [&](In, Out res) {
        res.status = app.change([&] { return app.ready && !app.leaving; }) ? 200 : 503;
    });
}

// What cpp-httplib 0.11.4 needs to serve well.
void configure(httplib::Server& server) {
    server.set_pre_routing_handler([](const httplib::Request& req, httplib::Response&) {
        auto& request = const_cast<httplib::Request&>(req);
        // It would compress event streams, and hold them back until there is a block to compress.
        request.headers.erase("Accept-Encoding");
        request.ranges.clear();  // it would cut JSON
        return httplib::Server::HandlerResponse::Unhandled;
    });
    server.set_error_handler([](const httplib::Request& req, httplib::Response& res) {
        if (!res.body.empty() || req.path == "/health") return;
        const std::string what = req.method + " " + req.path.substr(0, 100) + " is not served";
        reply_error(res, {res.status, res.status == 404 ? what : "no valid request", ""});
    });
    server.set_exception_handler([](const auto&, httplib::Response& res, std::exception_ptr) {
        reply_error(res, {500, "internal error", ""});
    });
    server.set_write_timeout(60);        // a reader that takes nothing for so long is cut
    server.set_keep_alive_max_count(1);  // a thread serves one connection: none idles in it
    server.set_tcp_nodelay(true);
    server.new_task_queue = [] { return new httplib::ThreadPool(512); };
}

// [8] main ----------------------------------------------------------------------------------------

const std::vector<Field<Options>> flags{
    {"model", &Options::model, 0, 0,
     "directory, or a name in the Hugging Face cache (google/gemma-3-1b-it)"},
    {"served-model-name", &Options::served_model_name, 0, 100, "what requests may call it (model)"},
    {"host", &Options::host, 0, 0, "address to listen on (0.0.0.0)"},
    {"port", &Options::port, 0, 65535, "port to listen on, 0: any free one ($PORT, or 8000)"},
    {"max-model-len", &Options::max_model_len, 1, 131072,
     "most tokens of prompt and answer, as 8192, 8k or 8K ($MAX_MODEL_LEN, or what fits)"},
    {"max-num-seqs", &Options::max_num_seqs, 1, 4096, "most sequences in a step (256)"},
    {"max-num-batched-tokens", &Options::max_num_batched_tokens, 1, 1 << 20,
     "most tokens in a step (8192 on a GPU of 70 GB, 2048 on others, 32 a core on the CPU)"},
    {"num-gpu-blocks-override", &Options::pages, 1, 1 << 26,
     "pages of 32 tokens in each of the two pools (what memory allows)"},
    {"seed", &Options::seed, -0x1p63, 0x1p63, "of requests that bring none (0)"},
    {"device", &Options::device, 0, 0, "auto, cuda or cpu (auto)"},
    {"gpu-memory-utilization", &Options::gpu_memory_utilization, above_zero, 1,
     "share of the GPU's memory to use (0.9)"},
    {"block-size", &Options::block_size, 1, 1024,
     "accepted without effect: a page holds 32 tokens"},
};

std::string help() {
    std::string s =
        "gemma-server [MODEL] [--flag VALUE | --flag=VALUE]...\n\n"
        "Serves Gemma 3 over the OpenAI API. The flags are vLLM's, with - or _:\n\n";
    for (const auto& f : flags) s += text("  --%-25s%s\n", f.name, f.help);
    return s +
           "\nThe cache is $HF_HUB_CACHE, $HF_HOME/hub or ~/.cache/huggingface/hub. SIGTERM and "
           "SIGINT\n"
           "let what runs end, for 8 s.\n";
}

void set_flag(Options& options, const std::string& name, const std::vector<std::string>& values) {
    for (const auto& f : flags) {
        if (name != f.name) continue;
        const bool list = name == "served-model-name";
        if (values.empty() || (values.size() > 1 && !list))
            refuse(f.name, "--%s needs one value", f.name);
        if (std::string_view(f.help).starts_with("accepted")) say("--" + name + ": " + f.help);
        json value = list ? json(values) : json(values[0]);
        // As vLLM reads it, 25.6k is 25600 and 1K is 1024.
        const double unit = values[0].ends_with('k') ? 1000 : values[0].ends_with('K') ? 1024 : 0;
        const double number = as_number(values[0].substr(0, values[0].size() - 1)) * unit;
        if (name == "max-model-len" && number > 0) value = number;
        return assign(options, f, value);
    }
    std::string known;
    for (const auto& f : flags) known += std::string(" --") + f.name;
    refuse("", "--%s is not a flag; there are%s", name.c_str(), known.c_str());
}

Options parse_flags(const std::vector<std::string>& args) try {
    Options options;
    for (const auto& [variable, flag] :
         {std::pair("PORT", "port"), std::pair("MAX_MODEL_LEN", "max-model-len")}) {
        const char* value = std::getenv(variable);
        if (!value || !*value) continue;
        try {
            set_flag(options, flag, {value});
        } catch (Refusal& r) {
            r.message = text("$%s: ", variable) + r.message;
            throw;
        }
    }
    for (size_t i = 0; i < args.size(); i++) {
        const bool flag = args[i].starts_with("--");
        if (!flag && i > 0) refuse("", "unexpected argument %s", args[i].c_str());
        const size_t equals = flag ? std::min(args[i].find('='), args[i].size()) : 0;
        std::string name = flag ? args[i].substr(2, equals - 2) : "model";
        std::replace(name.begin(), name.end(), '_', '-');
        std::vector<std::string> values;
        if (!flag) values = {args[i]};
        if (flag && equals < args[i].size()) values = {args[i].substr(equals + 1)};
        const bool more = flag && values.empty();  // they follow, up to the next flag
        while (more && i + 1 < args.size() && !args[i + 1].starts_with("--")) {
            values.push_back(args[++i]);
        }
        set_flag(options, name, values);
    }
    if (options.served_model_name.empty()) options.served_model_name = {options.model};
    if (options.device != "auto" && options.device != "cuda" && options.device != "cpu")
        refuse("", "--device must be auto, cuda or cpu, got %s", options.device.c_str());
    return options;
} catch (const Refusal& r) {
    throw Error(r.message + " (--help lists the flags)");
}

// Splits an engine's memory between the pools (docs/design.md, "Pages"), and finds max_model_len.
Limits plan_memory(App& app, const KvMemory& memory) {
    const Config& c = app.checkpoint->config;
    const Options& o = app.options;
    Limits limits{int(o.max_num_seqs), int(o.max_num_batched_tokens), c.W, {0, 0}};
    const auto pages_for = [](int64_t tokens) { return (tokens + page_tokens - 1) / page_tokens; };
    const int64_t window = (c.W + page_tokens - 2) / page_tokens + 1,
                  step = pages_for(limits.max_batched_tokens) + 1;
    const int64_t local_bytes = int64_t(memory.page[local_pool]), budget = int64_t(memory.budget);
    const int64_t global_bytes = std::max<int64_t>(1, int64_t(memory.page[global_pool]));

    // One sequence of max_model_len must fit.
    int64_t room = std::max<int64_t>(0, budget - (window + step) * local_bytes) / global_bytes;
    if (o.pages > 0) room = o.pages >= window ? o.pages : 0;
    const int64_t asked = o.max_model_len > 0 ? o.max_model_len : c.max_positions;
    const int64_t length = std::min({asked, int64_t(c.max_positions), room * page_tokens});
    if (length == 0 || (o.max_model_len > 0 && length < asked)) {
        throw Error(
            text("max_model_len %ld does not fit: the model has %d positions, and of %ld pages "
                 "(%.2f GB) that one sequence needs there is room for %ld (%.2f GB)",
                 long(asked), c.max_positions, long(pages_for(asked)),
                 double(pages_for(asked) * global_bytes + (window + step) * local_bytes) / 1e9,
                 long(room), double(budget) / 1e9));
    }
    if (length < asked)
        say(text("max_model_len is %ld, lowered from %ld to what fits", long(length), long(asked)));
    app.max_model_len = int(length);

    // Then as many sequences of a usual length as fit both pools; the rest is global.
    int64_t S = limits.max_num_seqs;
    const int64_t usual = pages_for(std::min<int64_t>(4096, length));
    const auto bytes = [&] {
        return (S * window + step) * local_bytes +
               std::max(S * usual, pages_for(length)) * global_bytes;
    };
    while (S > 1 && bytes() > budget) S--;
    const int64_t local = S * window + step, rest = (budget - local * local_bytes) / global_bytes;
    limits.pages[local_pool] = int(o.pages > 0 ? o.pages : local);
    limits.pages[global_pool] =
        int(o.pages > 0 ? o.pages : std::min(rest, limits.max_num_seqs * pages_for(length)));
    return limits;
}

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

// The engine that --device asks for, and the defaults that depend on it. Not before
// watch_signals(): the GPU's driver starts threads, and SIGTERM is blocked in none made earlier.
std::unique_ptr<Model> open_model(const Checkpoint& checkpoint, Options& o) {
#if GEMMA_CUDA
    const std::string missing = o.device == "cpu" ? "--device says so" : cuda_missing();
#else
    const std::string missing = "this build has no CUDA engine: build it where nvcc is, see README";
#endif
    const bool gpu = missing.empty();
    if (!gpu && o.device == "cuda") throw Error("--device cuda: " + missing);
    say("device: " + (gpu ? "cuda, because there is a GPU" : "cpu, because " + missing));
    if (!gpu && o.gpu_memory_utilization > 0)
        say("--gpu-memory-utilization: without effect on the CPU");
    if (o.gpu_memory_utilization < 0) o.gpu_memory_utilization = 0.9;
    int64_t& tokens = o.max_num_batched_tokens;
    const auto choose = [&](int64_t otherwise) {
        if (tokens < 0) tokens = otherwise;
        o.max_num_seqs = std::min(o.max_num_seqs, tokens);
    };
#if GEMMA_CUDA
    if (gpu) {
        choose(cuda_step_tokens());
        return open_cuda(checkpoint, {int(o.max_num_seqs), int(tokens), o.gpu_memory_utilization});
    }
#endif
    choose(32 * std::max(1u, std::thread::hardware_concurrency()));
    return open_cpu(checkpoint);
}

void load(App& app) {
    const std::string directory = find_model(app.options.model);
    app.checkpoint.emplace(directory);
    app.tokenizer.emplace(directory + "/tokenizer.model");
    if (app.tokenizer->size() > app.checkpoint->config.V) {
        throw Error(
            text("%s/tokenizer.model: found %d pieces, expected at most the %d of the weights",
                 directory.c_str(), app.tokenizer->size(), app.checkpoint->config.V));
    }
    auto model = open_model(*app.checkpoint, app.options);
    const Limits limits = plan_memory(app, model->kv_memory());
    model->allocate_pages(limits.pages);
    const SamplingDefaults& d = app.checkpoint->defaults;
    say(text("sampling defaults: temperature %g, top_k %d, top_p %g, min_p %g", d.temperature,
             d.top_k, d.top_p, d.min_p));
    if (d.repetition_penalty != 1)
        say(text("generation_config.json: repetition_penalty %g is not applied",
                 d.repetition_penalty));
    say(text("KV pages of 32 tokens: %d local (%d tokens), %d global (%ld tokens)",
             limits.pages[local_pool], limits.pages[local_pool] * page_tokens,
             limits.pages[global_pool], long(limits.pages[global_pool]) * page_tokens));
    say(text("max_model_len %d, up to %d sequences and %d tokens a step", app.max_model_len,
             limits.max_num_seqs, limits.max_batched_tokens));
    app.engine.emplace(std::move(model), limits);
    app.change([&] { app.ready = true; });
    say(text("ready in %.2f s", now() - std::atof(std::getenv("GEMMA_STARTED"))));
}

// Waits for SIGTERM or SIGINT, then until the visitors have left or been sent away.
void drain(App& app) {
    app.wait([&] { return app.leaving; });
    say("shutting down: what runs has 8 s to end");
    const auto empty = [&] { return app.in_flight == 0; };
    if (app.wait(empty, std::chrono::seconds(8))) return;
    app.cut = true;
    app.wait(empty, std::chrono::seconds(1));
}

void watch_signals(App& app) {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);  // in every thread that is made from here on
    std::thread([&app, signals] {
        int signal;
        sigwait(&signals, &signal);
        if (!app.change([&] { return app.leaving = true, app.ready; })) std::_Exit(0);  // loading
        sigwait(&signals, &signal);
        std::_Exit(1);  // asked twice
    }).detach();
}

int serve(App& app) {
    watch_signals(app);
    httplib::Server server;
    configure(server);
    add_routes(server, app);
    // The library would share the port with another server (SO_REUSEPORT) and queue 5 connections.
    int listening = -1;
    server.set_socket_options([&](int fd) {
        const int yes = 1;
        setsockopt(listening = fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    });
    const std::string& host = app.options.host;
    int port = int(app.options.port);
    if (port == 0) {
        port = server.bind_to_any_port(host);
    } else if (!server.bind_to_port(host, port)) {
        port = -1;
    }
    if (port < 0 || listen(listening, 1024) != 0) {
        throw Error(text("cannot listen on %s, port %ld: %s", host.c_str(), long(app.options.port),
                         std::strerror(errno)));
    }
    auto listener = std::async(std::launch::async, [&] { server.listen_after_bind(); });
    while (!server.is_running()) std::this_thread::yield();  // stop() would not reach it before
    say(text("listening on http://%s:%d", host.c_str(), port));
    int status = 0;
    try {
        load(app);
        drain(app);
    } catch (const std::exception& e) {
        say(std::string("error: ") + e.what());
        app.change([&] { app.leaving = true; });
        status = 1;
    }
    server.stop();
    // All answers are out. A connection that sends nothing would hold the library for 5 s more.
    if (listener.wait_for(std::chrono::milliseconds(500)) == std::future_status::timeout)
        std::_Exit(status);
    return status;
}

}  // namespace gemma

int main(int argc, char** argv) try {
    // OpenMP's library reads GOMP_SPINCOUNT when it is loaded, so the program starts twice. By its
    // own measure threads spin for milliseconds at each barrier: beside one busy process on two
    // cores a token of the demo took 4.6 ms, so 1.6 (alone 0.42 and 0.51).
    if (!std::getenv("GEMMA_STARTED")) {
        setenv("GEMMA_STARTED", gemma::text("%.3f", gemma::now()).c_str(), 1);
        setenv("GOMP_SPINCOUNT", "2000", 0);
        execv(std::filesystem::read_symlink("/proc/self/exe").c_str(), argv);  // by name, for ps
    }
    const std::vector<std::string> args(argv + 1, argv + argc);
    if (std::count(args.begin(), args.end(), "--help")) return std::puts(gemma::help().c_str()) < 0;
    gemma::App app;
    app.options = gemma::parse_flags(args);
    app.seeds.seed(uint64_t(app.options.seed));
    return gemma::serve(app);
} catch (const std::exception& e) {
    gemma::say(std::string("error: ") + e.what());
    return 1;
}
