// SPDX-License-Identifier: Apache-2.0
//
// calls.h: tool calls in a text, as it streams. Beside the path; tools.h has what may be called.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "scheduler.h"
#include "tools.h"

namespace gemma {

// Divides a text into calls and the rest. Calls are in Python's form or in JSON:
//     [get_weather(city="Paris"), get_time(city="Rome")]
//     [{"name": "get_weather", "parameters": {"city": "Paris"}}]
// with or without the list, in a fence (```json) or not, at the start or behind words. What begins
// as a call is held until the name of an offered function and the start of its arguments have come;
// from there on it is one, and its arguments are told as they come. All else is text.
class CallReader {
  public:
    explicit CallReader(std::shared_ptr<const Tools> of_request) : tools(std::move(of_request)) {}
    // Takes text as it comes, and returns what of it is no call. finish: how it ends, if it does;
    // a call that its turn ends is completed; one that a limit cuts is left as it is.
    // is_cut: a stop string ends it, so that a call may be incomplete.
    std::string push(std::string_view more, Finish finish, bool is_cut = false);
    // The parts of calls that came since this was asked last, as vLLM's JSON without brackets.
    std::string take_json(bool stream);
    // As JSON: "tool_calls", as OpenAI has it; "" where the answer's own reason stands.
    std::string finish_reason(Finish finish) const;
    // As vLLM: a content that is empty is null beside a call that the model chose, else "".
    bool gives_content() const {
        return calls.empty() || tools->choice != Tools::Choice::automatic;
    }

  private:
    // What stands in front of a call's arguments.
    struct Head {
        bool found = false, may_come = false;  // may_come: with more text
        bool in_fence = false, in_list = false, in_print = false;
        size_t size = 0;
        std::string name, arguments;  // arguments: JSON, if the head has all of them
        char closer = ')';            // of the arguments
        int objects = 0;              // that stand around them
    };
    // Where a value ends: at a comma or a closer that is in no brackets and no string.
    struct Balance {
        int depth = 0;
        char quote = 0, last = 0, before = 0;  // the two characters in front of the next
        bool escaped = false;
        bool ends(char c, char closer);
        bool opens_string(char c) const;
    };
    struct Cursor;
    struct Call {
        std::string id, name;
        std::string arguments;  // JSON text that was not told yet
        bool is_told = false;   // is the name?
    };
    // start: nothing but white space has come. plain: no call can come.
    enum class State { start, text, plain, member, value, string, gap, behind, done };

    // Each reads from `held` as far as it can; false: it needs more.
    bool read(std::string& out);
    bool read_start();
    bool read_text(std::string& out);
    bool read_member();
    bool read_value();
    bool read_string();
    bool read_gap();
    bool open_string();
    bool read_behind();
    void begin_call(const Head& head);
    void begin_member(const std::string& key);
    void end_call();
    void leave_call();
    void drop_space();
    void close_objects();
    void complete();
    Head read_head(std::string_view text, bool line_begins) const;
    void read_python(Cursor& c, Head& head) const;
    void read_json(Cursor& c, Head& head) const;

    std::shared_ptr<const Tools> tools;
    std::vector<Call> calls;
    std::string held;  // came, and is not read
    State state = State::start;
    bool is_last = false, is_cut = false;  // no more text comes; a stop string has cut it
    bool line_begins = true;               // in front of `held`
    // What was opened around calls, and is closed behind them.
    bool in_fence = false, in_list = false, in_print = false;
    char closer = ')';             // of this call's arguments
    int objects = 0, members = 0;  // objects around the arguments, members of them so far
    std::string quote_mark;        // that ends the string being read
    size_t scanned = 0;            // of held, by `balance`
    Balance balance;
};

}  // namespace gemma
