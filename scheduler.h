// SPDX-License-Identifier: Apache-2.0
//
// scheduler.h: which tokens of which sequences make up the next step, and in which pages their K
// and V lie. Sitting 1, after server.cpp. Pure: host structs in, a Batch out; no clock, no thread,
// no model, no text. One thread calls it.
//
//   [1] Sequence   one choice of one request, and what it gets from a step
//   [2] Pages      who holds which page of K and V, and which prefix a page contains
//   [3] Scheduler  next() -> Batch; finish(Results) -> deliveries
//
//     add -> waiting -- admit --> running -- finish --> gone
//               ^----- preempt_newest ---'      drop_cancelled: from both, too
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <numeric>
#include <unordered_map>
#include <utility>
#include <vector>

#include "gemma.h"

namespace gemma {

// [1] Sequence ------------------------------------------------------------------------------------

struct Inbox;   // server.h: where a request waits for its deliveries
struct Prefix;  // [2]

// What a text must be, where a request says so. The thread of the scheduler calls these.
struct Constraint {
    virtual ~Constraint() = default;
    virtual void append(int id) = 0;  // the text goes on by it
    // The ids that may follow, as Output's; null while they are not made yet.
    virtual std::shared_ptr<const std::vector<uint32_t>> allowed() const = 0;
};

struct Sequence {
    // the scheduler's, once posted
    std::vector<int> tokens;  // the prompt, then what is generated
    // Starts as logit_bias and the prompt's repetition penalty; `penalise` adds an entry for each
    // id generated.
    std::vector<Adjustment> adjustments;
    // set once
    int prompt_tokens = 0;
    int max_tokens = 0;
    Sampling sampling;
    std::vector<int> stop_ids;
    int prompt_logprobs = -1;  // as Sampling::logprobs, of the prompt's own tokens
    // vLLM's penalties. presence, frequency: of generated ids, 0 is off. repetition: of the
    // prompt's ids too, 1 is off.
    float presence = 0, frequency = 0, repetition = 1;
    std::shared_ptr<const std::vector<uint32_t>> allowed;  // as Output's
    // While fewer than min_tokens are generated, allowed_before is used in the place of allowed: it
    // leaves out the ids that would end the text.
    int min_tokens = 0;
    std::shared_ptr<const std::vector<uint32_t>> allowed_before;
    std::shared_ptr<Constraint> constraint;  // null: none. Replaces `allowed` and allowed_before
    int choice = 0;
    std::shared_ptr<Inbox> inbox;
    double arrived = 0;  // seconds, as of seconds()
    // Set by the request's thread, when the client has left or a stop string has ended the text;
    // read when the next step is planned.
    std::atomic<bool> cancelled{false};
    // scheduler only
    int computed = 0;  // tokens whose K and V lie in pages
    int scored = 0;    // logprobs of the prompt that are out; the next is that of token scored + 1
    std::vector<int> pages[2];       // by Pool: the table, by absolute page; -1: released
    std::shared_ptr<Prefix> prefix;  // of its whole pages that are computed
    int preemptions = 0;
    int cached_tokens = 0;  // of its prompt, found in the cache when it started
    double started = -1;    // when it was first in a step; -1: not yet
    struct Penalised {
        size_t place;  // in adjustments
        int count;     // times generated
    };
    std::unordered_map<int, Penalised> penalised;  // by id
};

using Sequences = std::vector<std::shared_ptr<Sequence>>;

enum class Finish { none, stop, length, abort };

// What a sequence gets from a step. The scheduler makes it; an Inbox takes it to the request.
struct Delivery {
    std::shared_ptr<Sequence> sequence;  // null in an Inbox, which the sequence holds
    Result result;
    Finish finish = Finish::none;
    // true: the logprob of a token of the prompt, in order, from its second token on; the first has
    // none.
    bool of_prompt = false;
    int choice = 0, cached_tokens = 0, preemptions = 0;  // the sequence's
    double started = 0, at = 0;  // when it was first in a step, and when this step was done
};

// [2] Pages ---------------------------------------------------------------------------------------

struct Limits {
    int max_num_seqs, max_batched_tokens;  // rows and tokens of a step
    int window;
    int pages[2];  // by Pool: how many there are

    static int pages_for(int tokens) { return (tokens + page_tokens - 1) / page_tokens; }
    // Pages that `window` tokens can touch: the first of them may be the last token of its page.
    int window_pages() const { return pages_for(window - 1) + 1; }
    // Could a sequence that grows to so many tokens ever run?
    bool fit(int tokens) const {
        return pages_for(tokens) <= pages[global_pool] &&
               std::min(pages_for(tokens), window_pages()) <= pages[local_pool];
    }
};

// 32 tokens behind all the tokens of `parent`: a node in the tree of known prefixes. Tokens are
// compared, never hashed, so no two prefixes can be taken for each other. A child holds its parent;
// a parent only knows its children. A node lives as long as a sequence (Sequence::prefix), a page
// (Book::prefix) or a child holds it.
struct Prefix : std::enable_shared_from_this<Prefix> {
    using Tokens = std::array<int, page_tokens>;
    std::shared_ptr<Prefix> parent;
    Tokens tokens{};
    int page[2] = {-1, -1};  // by Pool: the page that holds these tokens' K and V, or -1
    std::map<Tokens, Prefix*> children;

    ~Prefix() {
        if (parent) parent->children.erase(tokens);
    }
    static Tokens tokens_at(const int* next) {  // [32]
        Tokens t;
        std::copy_n(next, page_tokens, t.begin());
        return t;
    }
    std::shared_ptr<Prefix> find(const int* next) const {  // [32]; null: not known
        const auto child = children.find(tokens_at(next));
        return child == children.end() ? nullptr : child->second->shared_from_this();
    }
    std::shared_ptr<Prefix> find_or_make(const int* next) {  // [32]
        if (auto known = find(next)) return known;
        auto made = std::make_shared<Prefix>();
        made->parent = shared_from_this();
        made->tokens = tokens_at(next);
        children[made->tokens] = made.get();
        return made;
    }
};

// A page is held by sequences, or cached (held by none, but found again by its tokens until its
// room is needed), or free. An idle scheduler holds none.
struct PoolUse {
    int held, cached, free;
};

// The books of one pool. A page that is released while it has a Prefix stays cached until its room
// is needed: first the pages that `pass` names, then the least recently used.
class Pages {
  public:
    Pages(Pool of_pool, int total) : pool(of_pool), books(size_t(total)) {
        for (int page = total; page-- > 0;) free.push_back(page);
    }

    int allocate() {  // a page held once, or -1
        if (free.empty()) {
            auto& list = passed.empty() ? cached : passed;
            if (list.empty()) return -1;
            forget(list.front());
            list.pop_front();
        }
        const int page = free.back();
        free.pop_back();
        books[page].holders = 1;
        return page;
    }

    void retain(int page) {
        Book& book = books[page];
        if (book.holders == 0) (book.passed ? passed : cached).erase(book.place);
        book.holders++;
        book.passed = false;
    }
    void count_hit(int page) { books[page].hits++; }

    // A sequence has gone on from this page by more than a window, so its next turn will not need
    // the page. A page with two hits is the end of a prompt that many share, and stays. False:
    // nothing changes.
    bool pass(int page) {
        if (page < 0) return false;
        Book& book = books[page];
        if (book.holders > 0 || book.passed || book.hits >= 2) return false;
        passed.splice(passed.end(), cached, book.place);
        book.passed = true;
        return true;
    }

    void release(int page) {
        Book& book = books[page];
        assert(book.holders > 0);
        book.holders--;
        if (book.holders > 0) return;
        if (!book.prefix) return forget(page);
        book.place = cached.insert(cached.end(), page);
    }

    // The page is filled with `prefix` and may be shared from now on. Where two sequences computed
    // the same page in the same step, the first one's is shared, and the other stays its own.
    void publish(int page, const std::shared_ptr<Prefix>& prefix) {
        if (prefix->page[pool] >= 0) return;
        prefix->page[pool] = page;
        books[page].prefix = prefix;
    }

    int available() const { return int(free.size() + cached.size() + passed.size()); }
    PoolUse use() const {
        const int unused = int(free.size());
        return {int(books.size()) - available(), available() - unused, unused};
    }
    std::vector<int> dead;  // as Batch::dead

  private:
    struct Book {
        int holders = 0;
        std::shared_ptr<Prefix> prefix;
        std::list<int>::iterator place;  // in `cached` or `passed`; only while the page is there
        int hits = 0;
        bool passed = false;
    };

    void forget(int page) {
        if (auto prefix = std::move(books[page].prefix)) prefix->page[pool] = -1;
        books[page] = Book{};
        free.push_back(page);
        dead.push_back(page);
    }

    Pool pool;
    std::vector<Book> books;
    std::vector<int> free;
    std::list<int> cached, passed;  // least recently used first
};

// [3] Scheduler -----------------------------------------------------------------------------------

class Scheduler {
  public:
    explicit Scheduler(const Limits& l)
        : limits(l),
          pages{{local_pool, l.pages[local_pool]}, {global_pool, l.pages[global_pool]}} {}

    bool fits(int tokens) const { return limits.fit(tokens); }

    void add(std::shared_ptr<Sequence> sequence) {
        assert(fits(sequence->prompt_tokens + sequence->max_tokens));
        sequence->prefix = root;
        waiting_.push_back(std::move(sequence));
    }

    // A Batch without tokens means that no sequence is left, or that each awaits its constraint:
    // every sequence that was added fits alone. `now` is kept as the time when sequences start.
    const Batch& next(double now = 0) {
        rows.clear();
        drop_cancelled();
        admit();
        const auto may_run = [](const auto& s) { return !awaits_constraint(*s); };
        while (rows.empty() && std::any_of(running_.begin(), running_.end(), may_run))
            plan(now);  // again, if all rows were preempted
        build();
        return batch;
    }

    // Results of the Batch that next() gave, in the order of its outputs.
    std::vector<Delivery> finish(const Results& results) {
        std::vector<Delivery> deliveries;
        size_t used = 0;  // of the results
        for (const Row& row : rows) {
            Sequence& s = *row.sequence;
            advance(s, row.count);
            while (s.scored < scored_until(s, s.computed)) {
                deliveries.push_back(delivery(row.sequence, results[used++], Finish::none, true));
                s.scored++;
            }
            if (s.computed < int(s.tokens.size())) continue;  // some known tokens are left
            Result result;
            Finish how = Finish::length;  // stays so where max_tokens is 0: a text is only scored
            if (s.max_tokens > 0) {
                result = results[used++];
                how = append(s, result.id);
            }
            deliveries.push_back(delivery(row.sequence, result, how, false));
            if (how == Finish::none) continue;
            release(s);
            std::erase(running_, row.sequence);
        }
        return deliveries;
    }

    int waiting() const { return int(waiting_.size()); }
    int running() const { return int(running_.size()); }
    int preemptions() const { return preemptions_; }
    PoolUse use(Pool pool) const { return pages[pool].use(); }

  private:
    struct Row {
        std::shared_ptr<Sequence> sequence;
        int count;  // tokens of this step
    };

    void drop_cancelled() {
        const auto drop = [&](const std::shared_ptr<Sequence>& s) {
            if (!s->cancelled) return false;
            release(*s);
            return true;
        };
        std::erase_if(waiting_, drop);
        std::erase_if(running_, drop);
    }

    // Tokens whose K and V are not there: 1 in decode, more in prefill.
    static int left(const Sequence& s) { return int(s.tokens.size()) - s.computed; }

    // Which ids may follow is made by other threads: until it is there, the row sits out steps.
    static bool awaits_constraint(const Sequence& s) {
        return s.constraint && !s.constraint->allowed();
    }

    // Gives each running sequence its share of the step's tokens, and pages for them, oldest first.
    // Where no page is left, the newest sequence gives up its own.
    void plan(double now) {
        const std::vector<int> shares = share_out();
        for (size_t i = 0; i < running_.size(); i++) {
            if (shares[i] == 0) continue;
            const auto s = running_[i];
            int got = grow(*s, shares[i]);
            while (got == 0) {
                preempt_newest();
                if (i == running_.size()) return;  // it was s itself
                got = grow(*s, shares[i]);
            }
            if (s->started < 0) {
                s->started = now;
                s->cached_tokens = s->computed;
            }
            rows.push_back({s, got});
        }
    }

    // Tokens of the step for each running sequence. Decode rows come first, so none waits for a
    // prompt; then prompts, oldest first. But the shortest of the other prompts may take `lead`
    // tokens from the oldest, so a short prompt does not wait for a long one. The lead grows by a
    // 16th of what the oldest gets, so the oldest takes less than a tenth longer.
    std::vector<int> share_out() {
        std::vector<int> shares(running_.size());
        std::vector<size_t> prompts;
        int tokens = limits.max_batched_tokens;
        for (size_t i = 0; i < running_.size(); i++) {
            if (awaits_constraint(*running_[i])) continue;
            if (left(*running_[i]) > 1) prompts.push_back(i);
            if (left(*running_[i]) == 1 && tokens > 0) shares[i] = 1;
            tokens -= shares[i];
        }
        if (prompts.empty()) return shares;
        const size_t oldest = prompts[0];
        const int whole = std::min(left(*running_[oldest]), tokens);  // the oldest's, if alone
        const size_t shortest = *std::min_element(
            prompts.begin(), prompts.end(),
            [&](size_t a, size_t b) { return left(*running_[a]) < left(*running_[b]); });
        if (left(*running_[shortest]) <= left(*running_[oldest]) / 4) {
            shares[shortest] = std::min({left(*running_[shortest]), lead, tokens / 2});
            tokens -= shares[shortest];
        }
        for (const size_t i : prompts) {
            const int more = std::min(left(*running_[i]) - shares[i], tokens);
            shares[i] += more;
            tokens -= more;
        }
        const int taken = whole - shares[oldest];
        lead = std::min(lead - taken + shares[oldest] / 16, most_lead());
        return shares;
    }
    int most_lead() const { return std::max(page_tokens, limits.max_batched_tokens / 16); }

    // The victim keeps its tokens. They are computed again, with the same bits. Nothing is
    // delivered twice: only the last token, and tokens that are not scored yet, have an Output.
    void preempt_newest() {
        const auto victim = running_.back();
        running_.pop_back();
        release(*victim);
        victim->preemptions++;
        preemptions_++;
        waiting_.push_front(victim);
    }

    // Pages for the next `count` tokens; returns for how many of them both pools had room. Pages
    // that only one pool had stay with s.
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
        return covered;
    }

    void release(Sequence& s) {
        for (const Pool pool : pools) {
            // The last page first: of a prefix that is evicted page by page, the start stays.
            for (size_t i = s.pages[pool].size(); i-- > 0;) {
                if (s.pages[pool][i] >= 0) pages[pool].release(s.pages[pool][i]);
            }
            s.pages[pool].clear();
        }
        s.computed = 0;
        s.prefix = root;  // a Sequence may die on another thread, and must not take the tree along
    }

    // First come, first served: a sequence without room holds up those behind it. One whose pages
    // another is computing is passed over, until they are there.
    void admit() {
        auto at = waiting_.begin();
        while (at != waiting_.end() && int(running_.size()) < limits.max_num_seqs) {
            const auto s = *at;
            if (is_being_computed(*s)) {
                at++;
                continue;
            }
            take_cached(*s);
            if (!has_room(*s)) {
                release(*s);  // what take_cached held
                return;
            }
            for (const int page : s->pages[local_pool]) {
                if (page >= 0) pages[local_pool].count_hit(page);
            }
            at = waiting_.erase(at);
            running_.push_back(s);
        }
    }

    // Will a running prompt fill a page that this one could find in the cache?
    bool is_being_computed(const Sequence& s) const {
        if (wants_scores(s)) return false;
        return std::any_of(running_.begin(), running_.end(), [&](const auto& r) {
            const int end = (r->computed / page_tokens + 1) * page_tokens;  // of its next page
            return left(*r) > 1 && !awaits_constraint(*r) && end <= int(r->tokens.size()) &&
                   end < int(s.tokens.size()) &&
                   std::equal(s.tokens.begin(), s.tokens.begin() + end, r->tokens.begin());
        });
    }

    // prompt_logprobs need logits of every token of the prompt, and cached pages have none.
    static bool wants_scores(const Sequence& s) {
        return s.scored < s.prompt_tokens - 1 && s.prompt_logprobs >= 0;
    }

    // First of the pages that the window of the token at `position` still touches.
    int first_seen(int position) const {
        return std::max(0, position - limits.window + 1) / page_tokens;
    }

    // The longest known prefix: global pages from the start on, and the local pages that the window
    // still sees. At least one token is left to compute, because its logits are needed.
    void take_cached(Sequence& s) {
        if (wants_scores(s)) return;
        std::vector<std::shared_ptr<Prefix>> chain;
        auto node = root;
        while ((chain.size() + 1) * page_tokens < s.tokens.size()) {
            node = node->find(s.tokens.data() + chain.size() * page_tokens);
            if (!node || node->page[global_pool] < 0) break;
            chain.push_back(node);
        }
        while (!chain.empty() && !window_is_cached(chain)) chain.pop_back();
        if (chain.empty()) return;
        const int first_local = first_seen(int(chain.size()) * page_tokens);
        for (int i = 0; i < int(chain.size()); i++) {
            for (const Pool pool : pools) {
                const bool behind = pool == local_pool && i < first_local;
                const int page = behind ? -1 : chain[size_t(i)]->page[pool];
                if (page >= 0) pages[pool].retain(page);
                s.pages[pool].push_back(page);
            }
        }
        s.prefix = chain.back();
        s.computed = int(chain.size()) * page_tokens;
    }

    // Are the local pages there that the token behind this prefix sees?
    bool window_is_cached(const std::vector<std::shared_ptr<Prefix>>& chain) const {
        const int first = first_seen(int(chain.size()) * page_tokens);
        return std::all_of(chain.begin() + first, chain.end(),
                           [](const auto& p) { return p->page[local_pool] >= 0; });
    }

    // Beside others a sequence starts only if both pools have room for all known tokens and one
    // page to grow by, of it and of each other: else it would be preempted at once.
    bool has_room(const Sequence& s) const {
        if (running_.empty()) return true;
        return std::all_of(std::begin(pools), std::end(pools), [&](Pool pool) {
            int sum = pages_to_take(s, pool);
            for (const auto& r : running_) sum += pages_to_take(*r, pool);
            return sum <= pages[pool].available();
        });
    }
    int pages_to_take(const Sequence& s, Pool pool) const {
        const bool prompt = left(s) > 1;
        const int all = Limits::pages_for(int(s.tokens.size())) - int(s.pages[pool].size());
        const int most = prompt ? all + 1 : 1;
        if (pool == global_pool) return most;
        // Local: what a window lacks, and what a step of a prompt adds before it releases the pages
        // behind. A decode row with a whole window (W = 512: 17 pages) has released one before it
        // takes the next.
        const int lacks =
            limits.window_pages() - int(s.pages[pool].size()) + first_seen(s.computed);
        const int step =
            prompt ? Limits::pages_for(std::min(left(s), limits.max_batched_tokens)) : 0;
        return std::clamp(lacks + step, 0, most);
    }

    // A step that computes up to `end` gives the prompt's logprobs scored .. scored_until - 1.
    // While any is due, scored >= computed, because take_cached takes nothing: build and finish
    // rely on it, else they would count different outputs.
    static int scored_until(const Sequence& s, int end) {
        return s.prompt_logprobs < 0 ? 0 : std::min(end, s.prompt_tokens - 1);
    }

    // rows -> batch. Outputs: each row's prompt logprobs, then what it generates; finish() reads
    // the results in this order.
    void build() {
        batch = Batch{};
        batch.row_start = {0};
        for (const Row& row : rows) {
            for (const auto& table : row.sequence->pages)
                batch.pages_per_row = std::max(batch.pages_per_row, int(table.size()));
        }
        for (size_t r = 0; r < rows.size(); r++) {
            const Sequence& s = *rows[r].sequence;
            const int end = s.computed + rows[r].count;
            for (int i = s.computed; i < end; i++) {
                if (i >= s.scored && i < scored_until(s, end)) {
                    Output out;
                    out.token = int(batch.tokens.size());
                    out.target = s.tokens[size_t(i) + 1];
                    out.sampling.logprobs = s.prompt_logprobs;
                    batch.outputs.push_back(out);
                }
                batch.tokens.push_back(s.tokens[size_t(i)]);
                batch.positions.push_back(i);
            }
            batch.row_start.push_back(int(batch.tokens.size()));
            for (const Pool pool : pools) {
                auto& table = batch.pages[pool];
                table.insert(table.end(), s.pages[pool].begin(), s.pages[pool].end());
                table.resize(size_t(batch.pages_per_row) * (r + 1), -1);
            }
            if (end == int(s.tokens.size()) && s.max_tokens > 0) {
                Output out;
                out.token = int(batch.tokens.size()) - 1;
                out.index = end - s.prompt_tokens;
                out.sampling = s.sampling;
                out.adjustments = s.adjustments;
                out.allowed = s.constraint               ? s.constraint->allowed()
                              : out.index < s.min_tokens ? s.allowed_before
                                                         : s.allowed;
                batch.outputs.push_back(out);
            }
        }
        if (rows.empty()) return;  // an engine is not given an empty batch: dead pages wait
        for (const Pool pool : pools) batch.dead[pool] = std::exchange(pages[pool].dead, {});
    }

    // After a step: pages that became whole may be shared, then local pages behind the window are
    // released. In this order: one step can fill a page and leave it behind.
    void advance(Sequence& s, int count) {
        const int filled = s.computed / page_tokens;
        s.computed += count;
        for (int i = filled; i < s.computed / page_tokens; i++) {
            s.prefix = s.prefix->find_or_make(s.tokens.data() + i * page_tokens);
            for (const Pool pool : pools) pages[pool].publish(s.pages[pool][size_t(i)], s.prefix);
        }
        bool released = false;
        for (int i = first_seen(s.computed); i-- > 0;) {
            int& page = s.pages[local_pool][size_t(i)];
            if (page < 0) break;
            pages[local_pool].release(page);
            page = -1;
            released = true;
        }
        if (released) pass_pages(s);
    }

    // A page that the window has left by more than a page: the first one behind is needed if the
    // same prompt comes again, because a hit leaves a token to compute.
    void pass_pages(const Sequence& s) {
        int i = s.computed / page_tokens;
        const Prefix* node = s.prefix.get();  // of page i - 1
        for (; i > first_seen(s.computed) - 1 && node != root.get(); i--) node = node->parent.get();
        while (node != root.get() && pages[local_pool].pass(node->page[local_pool]))
            node = node->parent.get();
    }

    // A generated id; returns whether it ends the sequence.
    static Finish append(Sequence& s, int id) {
        s.tokens.push_back(id);
        penalise(s, id);
        if (std::count(s.stop_ids.begin(), s.stop_ids.end(), id)) return Finish::stop;
        if (int(s.tokens.size()) - s.prompt_tokens >= s.max_tokens) return Finish::length;
        if (s.constraint) s.constraint->append(id);
        return Finish::none;
    }

    // What penalties make of an id that was generated, from the next token on.
    static void penalise(Sequence& s, int id) {
        if (s.presence == 0 && s.frequency == 0 && s.repetition == 1) return;
        auto known = s.penalised.find(id);
        if (known == s.penalised.end()) {  // logit_bias or the prompt may have an entry for it
            const auto entry = std::find_if(s.adjustments.begin(), s.adjustments.end(),
                                            [&](const Adjustment& a) { return a.id == id; });
            const auto place = size_t(entry - s.adjustments.begin());
            if (entry == s.adjustments.end()) s.adjustments.push_back({id});
            known = s.penalised.insert({id, {place, 0}}).first;
        }
        known->second.count++;
        Adjustment& a = s.adjustments[known->second.place];
        a.repetition = s.repetition;
        a.penalty = s.presence + s.frequency * float(known->second.count);
    }

    static Delivery delivery(const std::shared_ptr<Sequence>& s, const Result& result,
                             Finish finish, bool of_prompt) {
        return {s,          result, finish, of_prompt, s->choice, s->cached_tokens, s->preemptions,
                s->started, 0};
    }

    const Limits limits;
    Pages pages[2];  // by Pool
    std::shared_ptr<Prefix> root = std::make_shared<Prefix>();
    std::deque<std::shared_ptr<Sequence>> waiting_;  // in the order in which they will run
    Sequences running_;                              // oldest first
    std::vector<Row> rows;                           // of the step that next() planned
    Batch batch;
    int preemptions_ = 0;
    int lead = most_lead();  // see share_out
};

}  // namespace gemma
