// SPDX-License-Identifier: Apache-2.0
//
// calls.cpp: text becomes tool calls, as it streams. Beside the path.
//
//   [1] Heads   where a call begins
//   [2] Reader  one for each choice
#include "calls.h"

#include <algorithm>
#include <random>

#include "fields.h"
#include "literals.h"

namespace gemma {

namespace {

constexpr size_t most_head = 4096;  // bytes that are held before a call is certain

bool is_word(char c) { return std::isalnum(uint8_t(c)) || c == '_' || c == '-' || c == '.'; }

bool is_one_of(char c, std::string_view all) { return all.find(c) != all.npos; }

std::string escaped(const std::string& s) {  // as it stands in a JSON string
    const std::string quoted = quote(s);
    return quoted.substr(1, quoted.size() - 2);
}

}  // namespace

// [1] Heads ---------------------------------------------------------------------------------------

// A place in a text that may go on.
struct CallReader::Cursor {
    std::string_view text;
    size_t at = 0;
    bool ran_out = false;  // more text might have been taken for something

    bool at_end() {
        ran_out |= at == text.size();
        return at == text.size();
    }
    bool take(std::string_view wanted) {
        const std::string_view left = text.substr(at);
        ran_out |= left.size() < wanted.size() && wanted.starts_with(left);
        if (!left.starts_with(wanted)) return false;
        at += wanted.size();
        return true;
    }
    bool skip_space() {  // was there a new line?
        const size_t begin = at;
        while (!at_end() && is_space(text[at])) at++;
        return text.substr(begin, at - begin).find('\n') != text.npos;
    }
    std::string_view word() {
        const size_t begin = at;
        while (!at_end() && is_word(text[at])) at++;
        return text.substr(begin, at - begin);
    }
    // Up to a comma or `close`, which are not taken. "": it is not all there.
    std::string_view value(char close) {
        Balance balance;
        const size_t begin = at;
        for (; !at_end(); at++) {
            if (balance.ends(text[at], close)) return text.substr(begin, at - begin);
        }
        return "";
    }
    std::string string() {  // what it says; "": none, or it is not all there
        if (at_end() || !is_quote(text[at])) return "";
        const size_t begin = at;
        for (at++; !at_end() && text[at] != text[begin]; at++) at += text[at] == '\\';
        if (at >= text.size()) {
            at = text.size();
            ran_out = true;
            return "";
        }
        at++;
        return json::parse(literal_to_json(text.substr(begin, at - begin))).get<std::string>();
    }
};

bool CallReader::Balance::ends(char c, char close) {
    if (std::exchange(escaped, false)) return false;
    if (quote != 0) {
        escaped = c == '\\';
        if (c == quote) quote = 0;
        return false;
    }
    if (depth == 0 && (c == ',' || c == close)) return true;
    if (is_quote(c)) quote = c;
    depth += c == '(' || c == '[' || c == '{';
    depth -= depth > 0 && (c == ')' || c == ']' || c == '}');
    return false;
}

CallReader::Head CallReader::read_head(std::string_view text, bool begins_line) const {
    Head head;
    Cursor c{text.substr(0, most_head)};
    begins_line |= c.skip_space();
    const bool in_fence = c.take("```");
    if (in_fence) {
        c.word();
        c.skip_space();
    }
    const bool in_list = c.take("[");
    if (in_list) c.skip_space();
    if (in_fence || in_list || begins_line) {
        if (c.take("{"))
            read_json(c, head);
        else
            read_python(c, head, !in_fence && !in_list);
    }
    head.size = c.at;
    head.may_come = !head.found && c.ran_out && !is_last && text.size() < most_head;
    return head;
}

// name(, and then what can only be an argument or the end: prose may name a function too.
void CallReader::read_python(Cursor& c, Head& head, bool is_bare) const {
    const std::string name(c.word());
    if (!name.empty() && c.at_end() && !tools->has_prefix(name)) c.ran_out = false;
    if (!tools->has(name) || !c.take("(")) return;
    Cursor next = c;
    next.skip_space();
    if (next.take(")")) {
        while (!next.at_end() && next.text[next.at] == ' ') next.at++;
        const bool is_over = next.at_end() ? is_last : is_one_of(next.text[next.at], "\n`,;]");
        head.found = !is_bare || is_over;
    } else if (!next.at_end() && is_one_of(next.text[next.at], "\"'[{(+.0123456789")) {
        head.found = true;
    } else {
        const std::string_view word = next.word();
        const bool is_whole = !next.at_end() || is_last;  // and not the start of a longer one
        const bool is_constant = word == "True" || word == "False" || word == "None";
        const bool is_value = (is_constant && is_whole) || word.starts_with('-');
        next.skip_space();
        head.found = is_value || (!word.empty() && next.take("="));
    }
    c.ran_out |= next.ran_out;
    head.name = name;
    head.closer = ')';
}

// The members of an object, from its first on: as far as the arguments, if the name is known there.
void CallReader::read_json(Cursor& c, Head& head) const {
    head.closer = '}';
    head.objects = 1;
    while (true) {
        c.skip_space();
        if (c.take("}")) {
            if (--head.objects > 0) continue;
            if (head.arguments.empty()) head.arguments = "{}";
            head.found = !head.name.empty();
            return;
        }
        if (c.take(",")) continue;
        const std::string key = c.string();
        c.skip_space();
        if (key.empty() || !c.take(":")) return;
        c.skip_space();
        const bool is_arguments = key == "parameters" || key == "arguments";
        if (key == "name") {
            head.name = c.string();
            if (!tools->has(head.name)) return;
        } else if (is_arguments && !head.name.empty() && c.take("{")) {
            head.found = true;
            return;
        } else if (is_arguments) {
            const std::string value = literal_to_json(c.value('}'));
            if (c.at_end()) return;
            const json parsed = json::parse(value);  // OpenAI's own form has the text of an object
            head.arguments =
                parsed.is_string() ? literal_to_json(parsed.get<std::string>()) : value;
            if (!head.arguments.starts_with('{')) head.arguments = "{}";
        } else if (key == "function" && c.take("{")) {
            head.objects++;
        } else if (key == "type" || key == "id") {
            c.value('}');
        } else {
            return;
        }
    }
}

// [2] Reader --------------------------------------------------------------------------------------

namespace {

std::string draw_id() {
    thread_local std::mt19937_64 random{std::random_device{}()};
    return text("chatcmpl-tool-%016lx%016lx", long(random()), long(random()));
}

}  // namespace

std::string CallReader::push(std::string_view more, Finish finish) {
    held += more;
    is_last = finish != Finish::none;
    std::string out;
    while (read(out)) {
    }
    if (finish == Finish::stop) complete();
    return tools->choice == Tools::Choice::automatic ? out : "";  // else it is part of a call
}

bool CallReader::read(std::string& out) {
    if (state == State::done) held.clear();
    if (held.empty()) return false;
    switch (state) {
        case State::text:
            return read_text(out);
        case State::member:
            return read_member();
        case State::value:
            return read_value();
        case State::string:
            return read_string();
        case State::gap:
            return read_gap();
        case State::behind:
            return read_behind();
        case State::done:
            return false;
    }
    return false;
}

bool CallReader::read_text(std::string& out) {
    Head head;
    size_t at = 0;
    for (; at < held.size(); at++) {
        const bool begins = at == 0 ? line_begins : held[at - 1] == '\n';
        if (!begins && !is_space(held[at]) && held[at] != '[' && held[at] != '`') continue;
        head = read_head(std::string_view(held).substr(at), begins);
        if (head.found || head.may_come) break;
    }
    if (at > 0) line_begins = held[at - 1] == '\n';
    out += held.substr(0, at);
    held.erase(0, at);
    if (!head.found) return false;
    begin_call(head);
    return true;
}

void CallReader::begin_call(const Head& head) {
    held.erase(0, head.size);
    calls.push_back({draw_id(), head.name, head.arguments});
    closer = head.closer;
    objects = head.objects;
    members = 0;
    state = State::member;
    if (!head.arguments.empty()) leave_call();
}

void CallReader::end_call() {
    calls.back().arguments += members > 0 ? "}" : "{}";
    leave_call();
}

void CallReader::leave_call() {
    balance = {};
    state = tools->parallel ? State::behind : State::done;
}

void CallReader::begin_member(const std::string& key) {
    calls.back().arguments += (members++ > 0 ? ", " : "{") + quote(key) + ": ";
}

// The key of the next argument, or the end of all.
bool CallReader::read_member() {
    Cursor c{held};
    c.skip_space();
    if (members > 0 && c.take(",")) c.skip_space();
    if (c.at_end()) return false;
    if (held[c.at] == closer) {
        held.erase(0, c.at + 1);
        end_call();
        return true;
    }
    Cursor behind = c;
    std::string key =
        is_quote(held[c.at]) && closer == '}' ? behind.string() : std::string(behind.word());
    behind.skip_space();
    if (behind.at_end() && !is_last) return false;
    if (!key.empty() && behind.take(closer == '}' ? ":" : "=")) {
        c = behind;
    } else if (closer == '}') {  // no member: what stands there is left out
        held.erase(0, c.at + 1);
        return true;
    } else if (behind.at_end() && std::islower(uint8_t(key[0]))) {
        return false;  // the start of a name, cut off; constants have capitals
    } else {
        key = tools->parameter(calls.back().name, size_t(members));  // by its place, as in Python
    }
    c.skip_space();
    if (c.at_end()) return false;
    begin_member(key.empty() ? text("argument_%d", members) : key);
    held.erase(0, c.at);
    state = State::value;
    scanned = 0;
    balance = {};
    return true;
}

// An argument. What is no string is told when it is complete.
bool CallReader::read_value() {
    if (scanned == 0 && is_quote(held[0])) {
        if (!open_string()) return false;
        calls.back().arguments += '"';
        return true;
    }
    while (scanned < held.size() && !balance.ends(held[scanned], closer)) scanned++;
    if (scanned == held.size()) return false;
    calls.back().arguments += literal_to_json(held.substr(0, scanned));
    held.erase(0, scanned);
    state = State::member;
    return true;
}

// `held` begins with a quote. Two of them are an empty string, or the start of three.
bool CallReader::open_string() {
    const std::string three(3, held[0]);
    if (!is_last && held.size() < three.size() && three.starts_with(held)) return false;
    quote_mark = held.starts_with(three) ? three : three.substr(0, 1);
    held.erase(0, quote_mark.size());
    state = State::string;
    return true;
}

bool CallReader::read_string() {
    const std::string_view s = held;
    std::string said;
    size_t at = 0;
    bool ends = false;
    while (at < s.size() && !ends) {
        const std::string_view left = s.substr(at);
        ends = left.starts_with(quote_mark);
        if (ends || (!is_last && std::string_view(quote_mark).starts_with(left))) break;
        const Escape escape = left[0] == '\\' ? read_escape(left) : Escape{1, {left[0]}};
        if (escape.size == 0) break;
        said += escape.meaning;
        at += escape.size;
    }
    calls.back().arguments += escaped(said);
    held.erase(0, at + (ends ? quote_mark.size() : 0));
    if (!ends) return false;
    state = State::gap;
    scanned = 0;
    balance = {};
    return true;
}

// Between a string and what ends its argument: Python joins strings that stand side by side, and
// what is no string is left out.
bool CallReader::read_gap() {
    Cursor c{held};
    c.skip_space();
    if (c.at_end()) return false;
    if (scanned == 0 && is_quote(held[c.at])) {
        held.erase(0, c.at);
        return open_string();
    }
    while (scanned < held.size() && !balance.ends(held[scanned], closer)) scanned++;
    if (scanned == held.size()) return false;
    calls.back().arguments += '"';
    held.erase(0, scanned);
    state = State::member;
    return true;
}

// Behind the arguments of a call: what closes it, then another one, or text.
bool CallReader::read_behind() {
    size_t closed = 0;
    for (; objects > 0 && closed < held.size(); closed++)
        objects -= balance.ends(held[closed], '}') && held[closed] == '}';
    held.erase(0, closed);
    Cursor c{held};
    c.skip_space();
    if (c.at_end() && !is_last) return false;
    if (c.take("```") || c.take("]") || c.take(",") || c.take(";")) {
        held.erase(0, c.at);
        return true;
    }
    const Head head = read_head(held, true);
    if (head.may_come || (!is_last && c.ran_out)) return false;
    if (head.found) {
        begin_call(head);
        return true;
    }
    held.erase(0, c.ran_out ? held.size() : c.at);  // the start of what closes it, cut off
    line_begins = true;
    state = State::text;
    return true;
}

// The model has ended its turn amid a call: what is there is all that it has.
void CallReader::complete() {
    if (state == State::text || state == State::behind || state == State::done) return;
    if (state == State::value) calls.back().arguments += literal_to_json(held);
    if (state == State::string || state == State::gap) calls.back().arguments += '"';
    end_call();
}

std::string CallReader::finish_reason(Finish finish) const {
    const bool called = finish == Finish::stop && !calls.empty();
    return called && tools->choice != Tools::Choice::named ? R"("tool_calls")" : "";
}

std::string CallReader::take_json(bool stream) {
    std::string list;
    for (size_t i = 0; i < calls.size(); i++) {
        Call& call = calls[i];
        if (call.is_told && call.arguments.empty()) continue;
        const std::string index = stream ? text(R"("index":%zu,)", i) : "";
        const std::string name = R"("name":)" + quote(call.name) + ",";
        list += (list.empty() ? "{" : ",{") +
                (call.is_told ? "" : R"("id":")" + call.id + R"(","type":"function",)") + index +
                R"("function":{)" + (call.is_told ? "" : name) + R"("arguments":)" +
                quote(std::exchange(call.arguments, {})) + "}}";
        call.is_told = true;
    }
    return list;
}

}  // namespace gemma
