// SPDX-License-Identifier: Apache-2.0
//
// grammar.cpp: bytes that may follow become ids that may follow. Beside the path.
//
//   [1] Vocabulary   a walk over the tree of all pieces, or of few
//   [2] Grammar      one for each schema; its bitsets are kept
//   [3] Constraints  one for each sequence; threads make the bitsets
#include "grammar.h"

#include <algorithm>

#include "fields.h"

namespace gemma {

using Id = Expressions::Id;

// [1] Vocabulary ----------------------------------------------------------------------------------

namespace {

// A JSON string takes these as they are, and so does `.` of a regular expression.
const Ranges plain_ranges{{' ', '!'}, {'#', '['}, {']', last_character}};

// Of what a bitset may cost, as Expressions::work; ordinary ones cost a few hundred.
constexpr size_t most_work = 20'000;
constexpr size_t most_piece = 255;  // bytes: as Vocabulary::Node's depth
constexpr size_t most_sets = 128;   // of a grammar: 4 MB for 262,144 ids
// Of the grammars that are kept: how many, and the bytes of each and of all.
constexpr size_t most_grammars = 64, most_bytes_each = 16 << 20, most_bytes_kept = 256 << 20;

void set(Bitset& bits, int id) { bits[size_t(id) / 32] |= 1u << id % 32; }

// The number of characters, if all are plain; else 0.
size_t plain_characters(Expressions& x, Id plain, std::string_view bytes) {
    size_t count = 0;
    Id e = plain;
    for (const char c : bytes) {
        e = x.after(e, uint8_t(c));
        if (e == x.nothing) return 0;
        if (!x.may_end(e)) continue;
        count++;
        e = plain;
    }
    return e == plain ? count : 0;
}

}  // namespace

Vocabulary::Vocabulary(const Tokenizer& t, std::vector<int> of_text, int ids)
    : tokenizer(t), ends(std::move(of_text)), size(ids) {
    Expressions x("the vocabulary");
    const Id plain = characters(x, plain_ranges);
    std::vector<std::pair<std::string_view, int>> pieces, rest;
    std::vector<std::vector<int>> by_characters(1);
    for (int id = 0; id < std::min(size, tokenizer.size()); id++) {
        const std::string_view bytes = tokenizer.bytes(id);
        if (bytes.empty() || bytes.size() > most_piece || std::count(ends.begin(), ends.end(), id))
            continue;
        pieces.emplace_back(bytes, id);
        const size_t count = plain_characters(x, plain, bytes);
        if (count == 0) rest.emplace_back(bytes, id);
        if (by_characters.size() <= count) by_characters.resize(count + 1);
        if (count > 0) by_characters[count].push_back(id);
    }
    Bitset bits(size_t(size + 31) / 32);
    for (const auto& list : by_characters) {
        for (const int id : list) set(bits, id);
        plain_pieces.push_back(bits);
    }
    all = grow(std::move(pieces));
    others = grow(std::move(rest));
}

Vocabulary::Tree Vocabulary::grow(std::vector<std::pair<std::string_view, int>> pieces) {
    std::sort(pieces.begin(), pieces.end());
    Tree tree;
    std::vector<int> open;  // the nodes from the root to the last piece
    std::string_view last;
    const auto close = [&](size_t depth) {
        for (; open.size() > depth; open.pop_back())
            tree.nodes[size_t(open.back())].next = int(tree.nodes.size());
    };
    for (const auto& [bytes, id] : pieces) {
        const auto apart =
            std::mismatch(bytes.begin(), bytes.end(), last.begin(), last.end()).first;
        close(size_t(apart - bytes.begin()));
        for (size_t i = open.size(); i < bytes.size(); i++) {
            open.push_back(int(tree.nodes.size()));
            tree.nodes.push_back({uint8_t(bytes[i]), uint8_t(i), 0, int(tree.ids.size())});
        }
        tree.ids.push_back(id);  // of the last node: equal bytes follow each other
        last = bytes;
    }
    close(0);
    tree.nodes.push_back({0, 0, 0, int(tree.ids.size())});
    return tree;
}

void Vocabulary::walk(const Tree& tree, Expressions& x, Id e, Bitset& out) {
    std::array<Id, 256> left{e};  // [depth]
    std::vector<bool> met(x.size());
    size_t work = 0;
    for (size_t at = 0; at + 1 < tree.nodes.size();) {
        const Node& node = tree.nodes[at];
        const Id rest = x.after(left[node.depth], node.byte);
        if (rest == x.nothing) {
            at = size_t(node.next);
            continue;
        }
        if (size_t(rest) >= met.size()) met.resize(x.size());
        if (!met[size_t(rest)]) {
            // Decided by this walk alone, whatever others have left in `x`: the same state has the
            // same bitset in every batch.
            if (work > most_work && node.depth > 0) {
                at = size_t(node.next);
                continue;
            }
            work += x.work(rest);
            met[size_t(rest)] = true;
        }
        left[size_t(node.depth) + 1] = rest;
        for (int i = node.first; i < tree.nodes[at + 1].first; i++) set(out, tree.ids[size_t(i)]);
        at++;
    }
}

Bitset Vocabulary::allowed(Expressions& x, Id e, Id plain) const {
    const auto [characters, only] = x.free_characters(e, plain);
    const size_t longest = plain_pieces.size() - 1;
    const bool all_plain = characters == x.no_end || size_t(characters) >= longest;
    Bitset out(size_t(size + 31) / 32);
    if (all_plain || only) out = plain_pieces[all_plain ? longest : size_t(characters)];
    walk(all_plain || only ? others : all, x, e, out);
    if (x.may_end(e)) {
        for (const int id : ends) set(out, id);
    }
    return out;
}

// Only a pattern that is made for it comes so far, or a counted string of very many characters.
std::shared_ptr<const Bitset> Vocabulary::ended_early(const std::string& reason) const {
    say("constrained text ends early: " + reason, Severity::warning);
    Bitset out(size_t(size + 31) / 32);
    for (const int id : ends) set(out, id);
    return std::make_shared<const Bitset>(std::move(out));
}

// [2] Grammar -------------------------------------------------------------------------------------

Grammar::Grammar(const char* param)
    : expressions(param), plain(characters(expressions, plain_ranges)) {}

std::shared_ptr<Grammar> Grammar::of_regex(const std::string& pattern, const char* param) {
    auto g = std::make_shared<Grammar>(param);
    g->start = regex(g->expressions, pattern, /*search=*/false, /*in_json=*/false, param).e;
    if (g->start == Expressions::nothing) refuse(param, "%s matches no text", param);
    g->try_start();
    return g;
}

std::shared_ptr<Grammar> Grammar::of_choices(const std::vector<std::string>& choices,
                                             const char* param) {
    auto g = std::make_shared<Grammar>(param);
    g->start = g->expressions.texts(choices);
    g->try_start();
    return g;
}

void Grammar::try_start() {
    for (unsigned byte = 0; byte < 256; byte++) expressions.after(start, uint8_t(byte));
    expressions.start_writing();
}

size_t Grammar::bytes() {
    const std::lock_guard lock(mutex);
    const size_t each = sets.empty() ? 0 : sets.begin()->second->size() * sizeof(uint32_t);
    return expressions.bytes() + sets.size() * each;
}

std::shared_ptr<const Bitset> Grammar::known_set(Id e) const {
    const auto found = sets.find(e);
    return found == sets.end() ? nullptr : found->second;
}

std::shared_ptr<const Bitset> Grammar::allowed(const Vocabulary& vocabulary, Id e) {
    if (auto known = known_set(e)) return known;
    if (sets.size() >= most_sets) sets.clear();
    return sets[e] = std::make_shared<Bitset>(vocabulary.allowed(expressions, e, plain));
}

// [3] Constraints ---------------------------------------------------------------------------------

namespace {

// The ids of `from` that are not in `ids`; `from` itself where that would leave none, because then
// a text must end before min_tokens.
std::shared_ptr<const Bitset> without(const std::vector<int>& ids,
                                      const std::shared_ptr<const Bitset>& from) {
    Bitset out = *from;
    for (const int id : ids) {
        if (size_t(id) / 32 < out.size()) out[size_t(id) / 32] &= ~(1u << id % 32);
    }
    const bool is_empty = std::all_of(out.begin(), out.end(), [](uint32_t w) { return w == 0; });
    return is_empty ? from : std::make_shared<const Bitset>(std::move(out));
}

}  // namespace

GrammarConstraint::GrammarConstraint(Grammars& of, std::shared_ptr<Grammar> g, const Sequence& s)
    : all(of),
      grammar(std::move(g)),
      min_tokens(s.min_tokens),
      stop_ids(s.stop_ids),
      left(grammar->start) {}

std::shared_ptr<const Bitset> GrammarConstraint::allowed() const {
    const std::lock_guard lock(mutex);
    return set;
}

void GrammarConstraint::append(int id) {
    if (append_known(id)) return;
    {
        const std::lock_guard lock(mutex);
        appended.push_back(id);
        set = nullptr;
    }
    all.post(shared_from_this(), /*runs=*/true);
}

// Nearly all states of a text have been met before: then there is nothing to wait for.
bool GrammarConstraint::append_known(int id) {
    const std::unique_lock lock(grammar->mutex, std::try_to_lock);
    if (!lock) return false;
    Expressions::Id e = left;
    for (const char c : all.vocabulary().tokenizer.bytes(id)) {
        e = grammar->expressions.remembered_after(e, uint8_t(c));
        if (e < 0) return false;
    }
    const auto next = grammar->known_set(e);
    if (!next) return false;
    left = e;
    generated++;
    const std::lock_guard set_lock(mutex);
    set = generated < min_tokens ? without(stop_ids, next) : next;
    return true;
}

void GrammarConstraint::make() {
    const Vocabulary& vocabulary = all.vocabulary();
    std::vector<int> ids;
    {
        const std::lock_guard lock(mutex);
        ids = std::exchange(appended, {});
    }
    std::shared_ptr<const Bitset> next;
    try {
        const std::lock_guard lock(grammar->mutex);
        for (const int id : ids) {
            for (const char c : vocabulary.tokenizer.bytes(id))
                left = grammar->expressions.after(left, uint8_t(c));
        }
        generated += int(ids.size());
        next = grammar->allowed(vocabulary, left);
    } catch (const Refusal& r) {
        next = vocabulary.ended_early(r.message);
    } catch (const std::exception& e) {  // no memory
        next = vocabulary.ended_early(e.what());
    }
    if (generated < min_tokens) next = without(stop_ids, next);
    const std::lock_guard lock(mutex);
    set = next;
}

Grammars::Grammars(const Tokenizer& tokenizer, const std::vector<int>& ends, int size)
    : made(std::async(std::launch::async,
                      [&tokenizer, ends, size] { return Vocabulary(tokenizer, ends, size); })) {
    const unsigned count = std::clamp(std::thread::hardware_concurrency() / 2, 1u, 4u);
    for (unsigned i = 0; i < count; i++) threads.emplace_back([this] { run(); });
}

Grammars::~Grammars() {
    {
        const std::lock_guard lock(mutex);
        stopping = true;
    }
    changed.notify_all();
    for (std::thread& thread : threads) thread.join();
}

const Vocabulary& Grammars::vocabulary() { return made.get(); }

std::shared_ptr<Grammar> Grammars::find_or_make(
    const std::string& key, const std::function<std::shared_ptr<Grammar>()>& compile) {
    std::shared_ptr<Grammar> kept;
    {
        const std::lock_guard lock(mutex);
        const auto found = std::find_if(recent.begin(), recent.end(),
                                        [&](const auto& one) { return one.first == key; });
        if (found != recent.end()) {
            recent.splice(recent.begin(), recent, found);
            kept = found->second;
        }
    }
    if (kept && kept->bytes() <= most_bytes_each) return kept;
    auto grammar = compile();
    keep(key, grammar);
    return grammar;
}

// A grammar grows as texts are written. Its size is asked for without the mutex, which the engine
// needs, because a thread may be busy with the grammar.
void Grammars::keep(const std::string& key, const std::shared_ptr<Grammar>& grammar) {
    std::list<std::pair<std::string, std::shared_ptr<Grammar>>> all;
    {
        const std::lock_guard lock(mutex);
        std::erase_if(recent, [&](const auto& one) { return one.first == key; });
        recent.emplace_front(key, grammar);
        all = recent;
    }
    size_t count = 0, bytes = 0;
    std::erase_if(all, [&](const auto& one) {  // what stays in `all` is dropped
        bytes += one.second->bytes();
        return ++count <= most_grammars && bytes <= most_bytes_kept;
    });
    const std::lock_guard lock(mutex);
    std::erase_if(recent, [&](const auto& one) {
        return std::any_of(all.begin(), all.end(),
                           [&](const auto& other) { return other.second == one.second; });
    });
}

std::shared_ptr<Constraint> Grammars::start(const std::shared_ptr<Grammar>& grammar,
                                            const Sequence& sequence) {
    const auto constraint = std::make_shared<GrammarConstraint>(*this, grammar, sequence);
    post(constraint, /*runs=*/false);
    return constraint;
}

void Grammars::post(std::shared_ptr<GrammarConstraint> constraint, bool runs) {
    {
        const std::lock_guard lock(mutex);
        // Texts that run go before those that begin.
        if (runs)
            posted.push_front(std::move(constraint));
        else
            posted.push_back(std::move(constraint));
    }
    changed.notify_all();
}

void Grammars::settle(std::chrono::microseconds at_most) {
    std::unique_lock lock(mutex);
    changed.wait_for(lock, at_most, [&] { return posted.empty() && in_work == 0; });
}

void Grammars::run() {
    std::unique_lock lock(mutex);
    while (true) {
        changed.wait(lock, [&] { return !posted.empty() || stopping; });
        if (stopping) return;
        const auto constraint = std::move(posted.front());
        posted.pop_front();
        in_work++;
        lock.unlock();
        if (constraint.use_count() > 1) constraint->make();  // else its sequence is gone
        lock.lock();
        in_work--;
        if (posted.empty() && in_work == 0) changed.notify_all();
    }
}

}  // namespace gemma
