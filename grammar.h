// SPDX-License-Identifier: Apache-2.0
//
// grammar.h: which ids may follow, where a request says what its text must be. Beside the path: the
// engine sees a bitset (Output::allowed), nothing else.
//
//   Vocabulary         bytes that may follow become ids that may follow
//   Grammar            what a request asks for, compiled: a JSON schema, a pattern or choices
//   Grammars           those of recent requests, and the threads that make bitsets
//   GrammarConstraint  the place of one sequence in its text
#pragma once

#include <condition_variable>
#include <deque>
#include <future>
#include <list>
#include <mutex>
#include <thread>

#include <nlohmann/json.hpp>

#include "expressions.h"
#include "scheduler.h"
#include "tokenizer.h"

namespace gemma {

using Bitset = std::vector<uint32_t>;  // of ids, as Output::allowed

// The pieces of a vocabulary by their bytes. Constant once it is made: threads share it.
class Vocabulary {
  public:
    // ends: the ids that end a text. size: of the bitsets, in ids.
    Vocabulary(const Tokenizer& tokenizer, std::vector<int> ends, int size);
    // The ids that may follow where `e` is left to write; `ends` where nothing need be. There is
    // always one, because every byte has a piece: a walk that would take too long leaves out long
    // pieces.
    Bitset allowed(Expressions& x, Expressions::Id e, Expressions::Id plain) const;
    // For a text that cannot go on: `ends` alone. Says the reason in the log.
    std::shared_ptr<const Bitset> ended_early(const std::string& reason) const;

    const Tokenizer& tokenizer;
    const std::vector<int> ends;

  private:
    // The pieces as a tree, in the order of a walk from its root.
    struct Node {
        uint8_t byte, depth;
        int next;   // the node behind this one's children
        int first;  // of this node's ids, which end where the next node's begin
    };
    struct Tree {
        std::vector<Node> nodes;  // and one behind the last
        std::vector<int> ids;
    };
    static Tree grow(std::vector<std::pair<std::string_view, int>> pieces);
    static void walk(const Tree& tree, Expressions& x, Expressions::Id e, Bitset& out);

    const int size;
    std::vector<Bitset> plain_pieces;  // [n] pieces of 1 to n plain characters, and no others
    Tree all, others;                  // others: the pieces that are not plain
};

// Not constant: it learns as texts are written. One thread at a time uses it, under its mutex.
struct Grammar {
    // Each throws a Refusal that names `param`, and keyword and place, or the character.
    static std::shared_ptr<Grammar> of_schema(const nlohmann::ordered_json& schema,
                                              const char* param);
    static std::shared_ptr<Grammar> of_object(const char* param);  // any JSON object
    static std::shared_ptr<Grammar> of_regex(const std::string& regex, const char* param);
    static std::shared_ptr<Grammar> of_choices(const std::vector<std::string>& choices,
                                               const char* param);
    explicit Grammar(const char* param);
    // These two with the mutex held.
    std::shared_ptr<const Bitset> allowed(const Vocabulary& vocabulary, Expressions::Id e);
    std::shared_ptr<const Bitset> known_set(Expressions::Id e) const;  // null: not made yet
    size_t bytes();    // of its nodes and bitsets; takes the mutex
    void try_start();  // refuses now what its first byte would refuse

    std::mutex mutex;
    Expressions expressions;
    Expressions::Id start = Expressions::nothing;
    const Expressions::Id plain;  // a character that stands in JSON strings as it is

  private:
    std::unordered_map<Expressions::Id, std::shared_ptr<const Bitset>> sets;
};

class Grammars;

class GrammarConstraint : public Constraint,
                          public std::enable_shared_from_this<GrammarConstraint> {
  public:
    GrammarConstraint(Grammars& all, std::shared_ptr<Grammar> grammar, const Sequence& sequence);
    void append(int id) override;  // asks a thread only where this state is new
    std::shared_ptr<const Bitset> allowed() const override;

  private:
    friend Grammars;
    bool append_known(int id);
    void make();  // a thread of `all` calls it: takes the ids that came, and makes the next set

    Grammars& all;
    const std::shared_ptr<Grammar> grammar;
    const int min_tokens;
    const std::vector<int> stop_ids;  // which may not follow before min_tokens
    Expressions::Id left;             // to write
    int generated = 0;
    mutable std::mutex mutex;
    std::vector<int> appended;          // guarded by mutex, as is the next
    std::shared_ptr<const Bitset> set;  // null: not made yet
};

class Grammars {
  public:
    Grammars(const Tokenizer& tokenizer, const std::vector<int>& ends, int size);
    ~Grammars();
    Grammars(const Grammars&) = delete;
    // The grammar that was compiled for this key, or the one that `compile` returns now.
    std::shared_ptr<Grammar> find_or_make(const std::string& key,
                                          const std::function<std::shared_ptr<Grammar>()>& compile);
    std::shared_ptr<Constraint> start(const std::shared_ptr<Grammar>& grammar,
                                      const Sequence& sequence);
    // Waits until the sets of all that was appended are made, at most so long.
    void settle(std::chrono::microseconds at_most);
    const Vocabulary& vocabulary();  // waits until it is made

  private:
    friend GrammarConstraint;
    void keep(const std::string& key, const std::shared_ptr<Grammar>& grammar);
    void post(std::shared_ptr<GrammarConstraint> constraint, bool runs);
    void run();  // each thread

    std::shared_future<Vocabulary> made;
    std::mutex mutex;
    std::condition_variable changed;
    // guarded by mutex
    std::deque<std::shared_ptr<GrammarConstraint>> posted;
    int in_work = 0;
    bool stopping = false;
    std::list<std::pair<std::string, std::shared_ptr<Grammar>>> recent;  // last used first
    std::vector<std::thread> threads;  // last: they start when the rest is there
};

// regex.cpp -----------------------------------------------------------------------------------

using Ranges = std::vector<std::pair<char32_t, char32_t>>;  // of characters, inclusive
constexpr char32_t last_character = 0x10FFFF;
std::u32string decode_utf8(std::string_view s);  // of valid UTF-8
std::string encode_utf8(char32_t c);
// One of these characters in UTF-8; as a JSON string spells it, escaped where it must be.
Expressions::Id characters(Expressions& x, const Ranges& ranges);
Expressions::Id json_characters(Expressions& x, const Ranges& ranges);

// A pattern, and how many characters its texts have.
struct Pattern {
    Expressions::Id e;
    long least = 0, most = 0;                     // most: below 0 is no end
    Expressions::Id unit = Expressions::nothing;  // e is this one character, repeated
};
// Python's regular expressions, as far as they are regular. search: the pattern may match a part of
// the text. in_json: within a JSON string. Refusals name `where` and the character.
Pattern regex(Expressions& x, const std::string& pattern, bool search, bool in_json,
              const std::string& where);

}  // namespace gemma
