// SPDX-License-Identifier: Apache-2.0
//
// expressions.cpp: regular expressions over bytes, by derivatives. Beside the path.
//
//   [1] Making      equal expressions have one number
//   [2] Taking      derivatives, remembered for each byte
//   [3] Being sure  that what is left can be completed
//   [4] Free        how many plain characters may follow
#include "expressions.h"

#include <algorithm>
#include <climits>

#include "fields.h"

namespace gemma {

namespace {

using Bytes = Expressions::Bytes;

// Bytes of nodes: of a grammar before its text begins, and in all, and of all grammars together.
constexpr size_t most_compiled = 12 << 20, most_bytes = 32 << 20, most_in_use = 512 << 20;
constexpr size_t most_remembered = 8 << 20;  // bytes of what `after` remembers
constexpr size_t most_members = 1500;        // of `any`: each costs each derivative
constexpr int deepest = 400;                 // of calls within `after`: a few hundred bytes each
constexpr size_t most_searched = 10'000;     // states of an intersection

Bytes meet(Bytes a, const Bytes& b) {
    for (size_t i = 0; i < a.size(); i++) a[i] &= b[i];
    return a;
}
Bytes join(Bytes a, const Bytes& b) {
    for (size_t i = 0; i < a.size(); i++) a[i] |= b[i];
    return a;
}
bool has(const Bytes& bytes, unsigned byte) { return bytes[byte / 64] >> byte % 64 & 1; }
constexpr Bytes all_bytes{~0ull, ~0ull, ~0ull, ~0ull};

}  // namespace

// [1] Making --------------------------------------------------------------------------------------

Expressions::Expressions(const char* of_request) : param(of_request) {
    make({.kind = Kind::nothing, .finite = true});
    make({.kind = Kind::empty, .may_end = true, .finite = true});
}

Expressions::~Expressions() { in_use -= spent; }

void Expressions::spend(size_t bytes) {
    const size_t most = is_compiled ? most_bytes : most_compiled;
    if (spent + bytes > most)
        refuse(param, "%s is too complex: it needs more than %zu MiB", param, most >> 20);
    if (in_use + bytes > most_in_use)
        throw Refusal{429,
                      gemma::text("%s: too many large grammars are in use: try again soon", param),
                      param};
    spent += bytes;
    in_use += bytes;
}

Expressions::Id Expressions::make(Node node) {
    std::string key(1, char(node.kind));
    const auto add = [&](const auto& value) {
        key.append(reinterpret_cast<const char*>(&value), sizeof value);
    };
    for (const int number : {node.a, node.b, node.least, node.most}) add(number);
    for (const Id member : node.members) add(member);
    if (node.kind == Kind::bytes) add(node.bytes);
    const Id next = Id(nodes.size());
    if (node.kind == Kind::rule) add(next);  // each rule is another
    if (const auto found = known.find(key); found != known.end()) return found->second;
    spend(sizeof node + 2 * key.size() + 100);
    nodes.push_back(std::move(node));
    known.emplace(std::move(key), next);
    return next;
}

Expressions::Id Expressions::one_of(const Bytes& bytes) {
    if (bytes == Bytes{}) return nothing;
    return make({.kind = Kind::bytes, .bytes = bytes, .finite = true});
}

Expressions::Id Expressions::range(uint8_t low, uint8_t high) {
    Bytes bytes{};
    for (unsigned byte = low; byte <= high; byte++) bytes[byte / 64] |= uint64_t(1) << byte % 64;
    return one_of(bytes);
}

Expressions::Id Expressions::text(std::string_view bytes) {
    Id e = empty;
    for (size_t i = bytes.size(); i-- > 0;)
        e = then(range(uint8_t(bytes[i]), uint8_t(bytes[i])), e);
    return e;
}

// By their first bytes, so that 10,000 choices cost a derivative no more than their first bytes do.
Expressions::Id Expressions::texts(std::vector<std::string> all) {
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    std::vector<std::vector<Id>> open(1);  // [n] what may follow the last text's first n bytes
    std::string last;
    const auto close = [&](size_t keep) {
        while (open.size() > keep + 1) {
            const Id rest = any(std::move(open.back()));
            open.pop_back();
            const uint8_t byte = uint8_t(last[open.size() - 1]);
            open.back().push_back(then(range(byte, byte), rest));
        }
    };
    for (const std::string& one : all) {
        const auto apart = std::mismatch(one.begin(), one.end(), last.begin(), last.end()).first;
        close(size_t(apart - one.begin()));
        open.resize(one.size() + 1);
        open.back().push_back(empty);
        last = one;
    }
    close(0);
    return any(std::move(open[0]));
}

// The first of a pair is never a pair, so that equal lists have one number.
Expressions::Id Expressions::then(Id a, Id b) {
    if (a == nothing || b == nothing) return nothing;
    std::vector<Id> firsts;
    for (; nodes[size_t(a)].kind == Kind::then; a = nodes[size_t(a)].b)
        firsts.push_back(nodes[size_t(a)].a);
    if (a != empty) firsts.push_back(a);
    for (size_t i = firsts.size(); i-- > 0;) {
        const Node &first = nodes[size_t(firsts[i])], &rest = nodes[size_t(b)];
        b = b == empty ? firsts[i]
                       : make({.kind = Kind::then,
                               .a = firsts[i],
                               .b = b,
                               .may_end = first.may_end && rest.may_end,
                               .finite = first.finite && rest.finite});
    }
    return b;
}

Expressions::Id Expressions::sequence(const std::vector<Id>& parts) {
    Id e = empty;
    for (size_t i = parts.size(); i-- > 0;) e = then(parts[i], e);
    return e;
}

Expressions::Id Expressions::any(std::vector<Id> members) {
    std::vector<Id> flat;
    for (const Id member : members) {
        const Node& node = nodes[size_t(member)];
        if (node.kind == Kind::any)
            flat.insert(flat.end(), node.members.begin(), node.members.end());
        else if (member != nothing)
            flat.push_back(member);
    }
    Bytes bytes{};  // of all members that are sets of bytes
    for (const Id member : flat) bytes = join(bytes, nodes[size_t(member)].bytes);
    std::erase_if(flat, [&](Id member) { return nodes[size_t(member)].kind == Kind::bytes; });
    if (bytes != Bytes{}) flat.push_back(one_of(bytes));
    std::sort(flat.begin(), flat.end());
    flat.erase(std::unique(flat.begin(), flat.end()), flat.end());
    if (flat.empty()) return nothing;
    if (flat.size() == 1) return flat[0];
    if (flat.size() > most_members)
        refuse(param, "%s is too complex: more than %zu parts may come next", param, most_members);
    bool may_end = false, finite = true;
    for (const Id member : flat) {
        may_end |= nodes[size_t(member)].may_end;
        finite &= nodes[size_t(member)].finite;
    }
    return make(
        {.kind = Kind::any, .members = std::move(flat), .may_end = may_end, .finite = finite});
}

Expressions::Id Expressions::both(Id a, Id b) {
    const Id e = intersect(a, b);
    return is_live(e) ? e : nothing;
}

Expressions::Id Expressions::intersect(Id a, Id b) {
    if (a == nothing || b == nothing) return nothing;
    if (a > b) std::swap(a, b);
    const Id everything = but(nothing);
    if (a == b || b == everything) return a;
    if (a == everything) return b;
    const Node &left = nodes[size_t(a)], &right = nodes[size_t(b)];
    return make({.kind = Kind::both,
                 .a = a,
                 .b = b,
                 .may_end = left.may_end && right.may_end,
                 .finite = left.finite || right.finite});
}

Expressions::Id Expressions::but(Id a) {
    if (nodes[size_t(a)].kind == Kind::but) return nodes[size_t(a)].a;
    return make({.kind = Kind::but, .a = a, .may_end = !may_end(a)});
}

Expressions::Id Expressions::repeat(Id a, int least, int most) {
    if (a == empty || most == 0) return empty;
    if (a == nothing) return least == 0 ? empty : nothing;
    if (may_end(a)) least = 0;
    if (least == 1 && most == 1) return a;
    const Node& node = nodes[size_t(a)];
    if (node.kind == Kind::repeat && node.least == 0 && least == 0) {
        // (x{0,m}){0,n} is x{0,mn}: else each byte could belong to any of the m n pairs of counts
        const long product = long(node.most) * most;
        const bool endless = node.most == no_end || most == no_end || product > INT_MAX;
        return repeat(node.a, 0, endless ? no_end : int(product));
    }
    return make({.kind = Kind::repeat,
                 .a = a,
                 .least = least,
                 .most = most,
                 .may_end = least == 0,
                 .finite = node.finite && most != no_end});
}

Expressions::Id Expressions::rule() { return make({.kind = Kind::rule}); }

// A rule takes a byte at least, as every value of JSON does: its may_end stays false.
void Expressions::define(Id rule, Id body) {
    nodes[size_t(rule)].a = body;
    rules.push_back(rule);
}

// [2] Taking --------------------------------------------------------------------------------------

Expressions::Id Expressions::derive(Id e, uint8_t byte) {
    // Copies: what is called below may move the nodes.
    const Kind kind = nodes[size_t(e)].kind;
    const Id a = nodes[size_t(e)].a, b = nodes[size_t(e)].b;
    const int least = nodes[size_t(e)].least, most = nodes[size_t(e)].most;
    switch (kind) {
        case Kind::nothing:
        case Kind::empty:
            return nothing;
        case Kind::bytes:
            return has(nodes[size_t(e)].bytes, byte) ? empty : nothing;
        case Kind::then:
            return derive_list(e, byte);
        case Kind::any: {
            std::vector<Id> members = nodes[size_t(e)].members;
            for (Id& member : members) member = after(member, byte);
            return any(std::move(members));
        }
        case Kind::both:
            return intersect(after(a, byte), after(b, byte));
        case Kind::but:
            return but(after(a, byte));
        case Kind::repeat:
            return then(after(a, byte),
                        repeat(a, std::max(0, least - 1), most == no_end ? no_end : most - 1));
        case Kind::rule:
            return after(a, byte);
    }
    return nothing;
}

// Of a list: without calls for each of its elements, since a pattern may have thousands.
Expressions::Id Expressions::derive_list(Id e, uint8_t byte) {
    std::vector<Id> members;
    while (true) {
        const bool is_list = nodes[size_t(e)].kind == Kind::then;
        const Id first = is_list ? nodes[size_t(e)].a : e;
        const Id rest = is_list ? nodes[size_t(e)].b : empty;
        members.push_back(then(after(first, byte), rest));
        if (!is_list || !may_end(first)) return any(std::move(members));
        e = rest;
    }
}

Bytes Expressions::alike(Id e, uint8_t byte) const {
    const Node& node = nodes[size_t(e)];
    switch (node.kind) {
        case Kind::nothing:
        case Kind::empty:
            return all_bytes;
        case Kind::bytes: {
            Bytes bytes = node.bytes;
            if (has(bytes, byte)) return bytes;
            for (uint64_t& word : bytes) word = ~word;
            return bytes;
        }
        case Kind::then: {
            Bytes bytes = all_bytes;
            while (true) {
                const Node& list = nodes[size_t(e)];
                const bool is_list = list.kind == Kind::then;
                bytes = meet(bytes, alike(is_list ? list.a : e, byte));
                if (!is_list || !may_end(list.a)) return bytes;
                e = list.b;
            }
        }
        case Kind::any: {
            Bytes bytes = all_bytes;
            for (const Id member : node.members) bytes = meet(bytes, alike(member, byte));
            return bytes;
        }
        case Kind::both:
            return meet(alike(node.a, byte), alike(node.b, byte));
        case Kind::but:
        case Kind::repeat:
        case Kind::rule:
            return alike(node.a, byte);
    }
    return {};
}

namespace {

struct Level {  // of calls
    int& depth;
    explicit Level(int& of) : depth(of) { depth++; }
    ~Level() { depth--; }
};

}  // namespace

Expressions::Id Expressions::remember(Id e, uint8_t byte) {
    if (depth > deepest)
        refuse(param, "%s is nested too deep, or refers to itself before it takes a byte", param);
    const Level level(depth);
    const Id found = derive(e, byte);
    const Id left = is_live(found) ? found : nothing;
    if (remembered > most_remembered) forget();
    auto& memo = nodes[size_t(e)].after;
    if (!memo) {
        remembered += 256 * sizeof(Id);
        memo = std::make_unique<Id[]>(256);
        std::fill_n(memo.get(), 256, -1);
    }
    const Bytes same = alike(e, byte);
    for (unsigned other = 0; other < 256; other++) {
        if (has(same, other)) memo[other] = left;
    }
    return left;
}

// What waits for its turn should hold little.
void Expressions::start_writing() {
    is_compiled = true;
    forget();
}

void Expressions::forget() {
    for (Node& node : nodes) node.after = nullptr;
    remembered = 0;
}

// [3] Being sure ----------------------------------------------------------------------------------

// Whether there is a text in an intersection is found by a search for the nearest one. Others are
// `nothing` as soon as they have no text, except complements, which stand in intersections alone.
bool Expressions::is_live(Id e) {
    if (nodes[size_t(e)].kind != Kind::both) return e != nothing;
    if (const auto found = live.find(e); found != live.end()) return found->second;
    std::vector<std::pair<Id, size_t>> reached{{e, 0}};  // and from which of them
    std::unordered_map<Id, bool> seen{{e, true}};
    for (size_t at = 0; at < reached.size(); at++) {
        const Id one = reached[at].first;
        const auto known_live = live.find(one);
        const bool is_known = known_live != live.end();
        if (is_known && !known_live->second) continue;
        if (is_known || may_end(one) || nodes[size_t(one)].kind != Kind::both) {
            for (size_t step = at;; step = reached[step].second) {
                live[reached[step].first] = true;
                if (step == 0) return true;
            }
        }
        if (reached.size() > most_searched) refuse(param, "%s is too complex", param);
        Bytes tried{};
        for (unsigned byte = 0; byte < 256; byte++) {
            if (has(tried, byte)) continue;
            tried = join(tried, alike(one, uint8_t(byte)));
            const Id next = derive(one, uint8_t(byte));
            if (next != nothing && seen.emplace(next, true).second) reached.push_back({next, at});
        }
    }
    for (const auto& [one, from] : reached) live[one] = false;
    return false;
}

std::vector<Expressions::Id> Expressions::rules_without_text() {
    for (const Id rule : rules)
        after(rule, 0);  // one that calls itself at once has no end of calls
    // Rules are found to have a text from those that call no other on.
    std::vector<char> has(nodes.size());
    for (bool found = true; found;) {
        found = false;
        std::vector<signed char> known_text(nodes.size(), -1);  // in this round
        for (const Id rule : rules) {
            const Id body = nodes[size_t(rule)].a;
            if (has[size_t(rule)] || !has_text(body, has, known_text)) continue;
            has[size_t(rule)] = found = true;
        }
    }
    std::vector<Id> without;
    for (const Id rule : rules) {
        if (!has[size_t(rule)]) without.push_back(rule);
    }
    return without;
}

bool Expressions::has_text(Id e, const std::vector<char>& rule_has,
                           std::vector<signed char>& known_text) const {
    signed char& answer = known_text[size_t(e)];
    if (answer >= 0) return answer;
    const Node& node = nodes[size_t(e)];
    const auto has = [&](Id one) { return has_text(one, rule_has, known_text); };
    switch (node.kind) {
        case Kind::then:
            answer = has(node.a) && has(node.b);
            break;
        case Kind::any:
            answer = std::any_of(node.members.begin(), node.members.end(), has);
            break;
        case Kind::repeat:
            answer = node.least == 0 || has(node.a);
            break;
        case Kind::rule:
            answer = rule_has[size_t(e)];
            break;
        default:
            answer = e != nothing;
    }
    return answer;
}

// [4] Free ----------------------------------------------------------------------------------------

Expressions::Free Expressions::free_characters(Id e, Id plain) {
    if (nodes[size_t(e)].kind != Kind::any) return free_of(e, plain);
    const std::vector<Id> members = nodes[size_t(e)].members;
    for (const Id member : members) {
        if (free_of(member, plain).characters == no_end) return {no_end, true};
    }
    return {0, false};
}

// Of a repetition, and what follows it.
Expressions::Free Expressions::free_of(Id e, Id plain) {
    const bool has_rest = nodes[size_t(e)].kind == Kind::then;
    const Id first = has_rest ? nodes[size_t(e)].a : e,
             rest = has_rest ? nodes[size_t(e)].b : empty;
    Id repeated = first;
    if (nodes[size_t(first)].kind == Kind::both) {
        // Every text can be continued to one that finitely many texts do not have.
        const Id a = nodes[size_t(first)].a, b = nodes[size_t(first)].b;
        const auto excludes = [&](Id one) {
            const Node& node = nodes[size_t(one)];
            return node.kind == Kind::but && nodes[size_t(node.a)].finite;
        };
        repeated = excludes(b) ? a : excludes(a) ? b : first;
        if (nodes[size_t(repeated)].most != no_end) return {0, false};
    }
    if (nodes[size_t(repeated)].kind != Kind::repeat) return {0, false};
    const Id unit = nodes[size_t(repeated)].a;
    auto known_plain = is_plain.find(unit);
    if (known_plain == is_plain.end()) {
        const Id longer = then(plain, repeat(plain, 1, no_end));
        const bool each = both(plain, but(unit)) == nothing && both(longer, unit) == nothing;
        known_plain = is_plain.emplace(unit, each).first;
    }
    if (!known_plain->second) return {0, false};
    bool rest_goes_on = false;  // by a byte that a plain character may begin with
    for (unsigned byte = 0; byte < 256; byte++) {
        if (after(plain, uint8_t(byte)) != nothing && after(rest, uint8_t(byte)) != nothing)
            rest_goes_on = true;
    }
    return {nodes[size_t(repeated)].most, !rest_goes_on};
}

}  // namespace gemma
