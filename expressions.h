// SPDX-License-Identifier: Apache-2.0
//
// expressions.h: regular expressions over bytes, by derivatives. Beside the path: grammar.h says
// what for.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace gemma {

// Expressions stand for sets of texts. Each is known by its number, and equal ones have one number.
// What is left of a text to write is an expression too: `after` takes a byte off the front of each
// of its texts (Brzozowski, "Derivatives of Regular Expressions", 1964). A rule may stand within
// its own body, which makes the language context-free: its calls pile up in `then`, as on a stack.
// Throws a Refusal where a request needs too much memory, or a search too many steps.
class Expressions {
  public:
    using Id = int;
    using Bytes = std::array<uint64_t, 4>;       // a set of bytes
    static constexpr Id nothing = 0, empty = 1;  // no text; the empty text
    static constexpr int no_end = -1;            // as the most of repeat

    explicit Expressions(const char* of_request);  // the field that a Refusal names
    ~Expressions();
    Expressions(const Expressions&) = delete;
    Id one_of(const Bytes& bytes);
    Id range(uint8_t low, uint8_t high);
    Id text(std::string_view bytes);
    Id texts(std::vector<std::string> all);  // one of these
    Id then(Id a, Id b);
    Id sequence(const std::vector<Id>& parts);
    Id any(std::vector<Id> members);  // one of them
    Id both(Id a, Id b);              // what is in a and in b; neither has a rule
    Id but(Id a);                     // every text of bytes that a is not; a has no rule
    Id repeat(Id a, int least, int most);
    Id optional(Id a) { return repeat(a, 0, 1); }
    Id rule();  // its body is defined later, once
    void define(Id rule, Id body);
    // Once all rules are defined: those that have no text of finite length. Refuses one that calls
    // itself before it takes a byte.
    std::vector<Id> rules_without_text();

    bool may_end(Id e) const { return nodes[size_t(e)].may_end; }  // is the empty text in e?
    Id after(Id e, uint8_t byte) {                                 // nothing: it cannot follow
        const Id* const memo = nodes[size_t(e)].after.get();
        return memo && memo[byte] >= 0 ? memo[byte] : remember(e, byte);
    }
    Id remembered_after(Id e, uint8_t byte) const {  // -1: not known yet
        const Id* const memo = nodes[size_t(e)].after.get();
        return memo ? memo[byte] : -1;
    }
    // What after costs, about: a function of e alone, whatever is remembered.
    size_t work(Id e) const { return 1 + nodes[size_t(e)].members.size(); }
    size_t size() const { return nodes.size(); }
    size_t bytes() const { return spent; }  // of its nodes, which only grow
    void start_writing();                   // from here on more memory is given
    // How many characters of the set `plain` may come next, whichever they are. Most of a
    // vocabulary is made of them, so that few other pieces are left to try.
    struct Free {
        int characters;  // no_end: any number; 0: none, or not known
        bool only;       // no text of more plain characters may come
    };
    Free free_characters(Id e, Id plain);
    const char* const param;

  private:
    enum class Kind { nothing, empty, bytes, then, any, both, but, repeat, rule };
    struct Node {
        Kind kind;
        Id a = 0, b = 0;
        int least = 0, most = 0;
        std::vector<Id> members = {};
        Bytes bytes{};
        bool may_end = false, finite = false;   // finite: it has finitely many texts
        std::unique_ptr<Id[]> after = nullptr;  // [256], -1: not known
    };
    Id make(Node node);
    Id remember(Id e, uint8_t byte);
    Id derive(Id e, uint8_t byte);
    Id derive_list(Id e, uint8_t byte);
    Bytes alike(Id e, uint8_t byte) const;  // bytes that have the same derivative as `byte`
    Id intersect(Id a, Id b);
    bool is_live(Id e);
    bool has_text(Id e, const std::vector<char>& rule_has,
                  std::vector<signed char>& known_text) const;
    void forget();  // what `after` remembers; expressions keep their numbers
    Free free_of(Id e, Id plain);
    void spend(size_t bytes);

    std::vector<Node> nodes;
    std::unordered_map<std::string, Id> known;
    std::unordered_map<Id, bool> live;      // of intersections: is a text in it?
    std::unordered_map<Id, bool> is_plain;  // of what is repeated: does it take each character of
                                            // `plain`, and no longer text of them?
    std::vector<Id> rules;
    size_t spent = 0, remembered = 0;              // bytes
    static inline std::atomic<size_t> in_use = 0;  // what all have spent
    int depth = 0;
    bool is_compiled = false;
};

}  // namespace gemma
