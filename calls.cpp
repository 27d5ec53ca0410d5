// SPDX-License-Identifier: Apache-2.0
//
// calls.cpp: text becomes tool calls, as it streams. Beside the path.
//
//   [1] Heads   where a call begins
//   [2] Reader  one function for each state
#include "calls.h"

#include <algorithm>
#include <optional>
#include <random>

#include "fields.h"
#include "literals.h"

namespace gemma {

namespace {

// Bytes that are held before a call is certain, or an argument's name; white space in front of it.
constexpr size_t most_head = 4096, most_space = 64;

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
    std::optional<std::string> string() {  // what it says; none, or it is not all there
        if (at_end() || !is_quote(text[at])) return std::nullopt;
        const size_t begin = at;
        for (at++; at < text.size() && text[at] != text[begin]; at++) at += text[at] == '\\';
        if (at >= text.size()) {
            at = text.size();
            ran_out = true;
            return std::nullopt;
        }
        at++;
        return json::parse(literal_to_json(text.substr(begin, at - begin))).get<std::string>();
    }
};

// An apostrophe within a word is none; but r'a' is a string.
bool CallReader::Balance::opens_string(char c) const {
    const bool in_word = std::isalnum(uint8_t(last));
    const bool has_prefix = is_one_of(last, "rbufRBUF") && !std::isalnum(uint8_t(before));
    return c == '"' || (c == '\'' && (!in_word || has_prefix));
}

bool CallReader::Balance::ends(char c, char close) {
    const bool opens = opens_string(c);
    before = std::exchange(last, c);
    if (std::exchange(escaped, false)) return false;
    if (quote != 0) {
        escaped = c == '\\';
        if (c == quote) quote = 0;
        return false;
    }
    if (depth == 0 && (c == ',' || c == close)) return true;
    if (opens) quote = c;
    depth += c == '(' || c == '[' || c == '{';
    depth -= depth > 0 && (c == ')' || c == ']' || c == '}');
    return false;
}

CallReader::Head CallReader::read_head(std::string_view text, bool begins_line) const {
    Head head;
    Cursor c{text.substr(0, most_head)};
    begins_line |= c.skip_space();
    if (c.at > most_space) return head;
    head.in_fence = c.take("```");
    if (head.in_fence) {
        c.word();
        c.skip_space();
    }
    head.in_list = c.take("[");
    if (head.in_list) c.skip_space();
    if (head.in_fence || head.in_list || begins_line) {
        if (c.take("{"))
            read_json(c, head);
        else
            read_python(c, head);
    }
    head.size = c.at;
    head.may_come = !head.found && c.ran_out && !is_last && text.size() < most_head;
    return head;
}

// name(, and then what can only be an argument or the end: prose may name a function too.
void CallReader::read_python(Cursor& c, Head& head) const {
    head.in_print = head.in_fence && c.take("print(");
    const std::string name(c.word());
    // Ordinary words are not held.
    const bool may_be_print = head.in_fence && std::string_view("print(").starts_with(name);
    if (c.at_end() && !tools->has_prefix(name) && !may_be_print) c.ran_out = false;
    if (!tools->has(name) || !c.take("(")) return;
    Cursor next = c;  // looks ahead, and is not taken
    next.skip_space();
    if (next.take(")")) {
        while (!next.at_end() && next.text[next.at] == ' ') next.at++;
        const bool is_over = next.at_end() ? is_last : is_one_of(next.text[next.at], "\n`,;])");
        head.found = head.in_fence || head.in_list || is_over;
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
        const std::optional<std::string> key = c.string();
        c.skip_space();
        if (!key || !c.take(":")) return;
        c.skip_space();
        const bool is_arguments = key == "parameters" || key == "arguments";
        if (key == "name") {
            head.name = c.string().value_or("");
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

std::string CallReader::push(std::string_view more, Finish finish, bool cut) {
    held += more;
    is_last = finish != Finish::none;
    is_cut = cut;
    std::string out;
    while (read(out)) {
    }
    if (finish == Finish::stop && !is_cut) complete();
    return tools->choice == Tools::Choice::automatic ? out : "";  // else it is part of a call
}

bool CallReader::read(std::string& out) {
    if (held.empty()) return false;
    switch (state) {
        case State::start:
            return read_start();
        case State::text:
            return read_text(out);
        case State::plain:
            out += std::exchange(held, {});
            return false;
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
            held.clear();
            return false;
    }
    return false;
}

// A text that begins with an object which is no call is a document: what looks like a call in it
// is a part of it.
bool CallReader::read_start() {
    const size_t first = held.find_first_not_of(" \n\r\t");
    const bool is_object = first != held.npos && held[first] == '{';
    const Head head = is_object && !tools->in_json ? read_head(held, true) : Head{};
    const bool is_empty = first == held.npos && held.size() <= most_space;
    if ((is_empty && !is_last) || head.may_come) return false;
    state = is_object && !head.found ? State::plain : State::text;
    return true;
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
    in_fence |= head.in_fence;
    in_list |= head.in_list;
    in_print = head.in_print;
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

// What was read once must not be held, and read again with each piece of text.
void CallReader::drop_space() { held.erase(0, held.find_first_not_of(" \n\r\t")); }

// The key of the next argument, or the end of all.
bool CallReader::read_member() {
    held.erase(0, held.find_first_not_of(" \n\r\t,"));
    if (held.empty()) return false;
    const bool in_json = closer == '}';
    if (held[0] == closer) {
        held.erase(0, 1);
        end_call();
        return true;
    }
    Cursor c{std::string_view(held).substr(0, most_head)};
    const std::optional<std::string> key =
        in_json && is_quote(held[0]) ? c.string() : std::optional<std::string>(c.word());
    c.skip_space();
    const bool at_end = c.at_end();
    if (at_end && !is_last && held.size() < most_head) return false;
    std::string name;
    if (key && (in_json || !key->empty()) && c.take(in_json ? ":" : "=")) {
        c.skip_space();
        if (c.at_end() && held.size() < most_head) return false;  // the value decides
        name = *key;
        held.erase(0, c.at);
    } else if (in_json) {  // no member: what stands there is left out
        held.erase(0, at_end ? c.at : 1);
        return true;
    } else if (at_end && is_last && std::islower(uint8_t((*key)[0]))) {
        return false;  // the start of a name, cut off; constants have capitals
    } else {           // by its place, as in Python
        name = tools->parameter(calls.back().name, size_t(members));
        if (name.empty()) name = text("argument_%d", members);
    }
    begin_member(name);
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
    if (scanned == 0) drop_space();
    if (held.empty()) return false;
    if (scanned == 0 && is_quote(held[0]) && closer == ')') return open_string();
    while (scanned < held.size() && !balance.ends(held[scanned], closer)) scanned++;
    if (scanned == held.size()) return false;
    calls.back().arguments += '"';
    held.erase(0, scanned);
    state = State::member;
    return true;
}

// The objects around the arguments. Where a new one begins, or a blank line, they were not closed.
void CallReader::close_objects() {
    size_t read = 0;
    for (; objects > 0 && read < held.size(); read++) {
        const char c = held[read];
        const bool blank = c == '\n' && balance.last == '\n';
        if (balance.depth == 0 && balance.quote == 0 && (c == '{' || c == '`' || c == ']' || blank))
            objects = 0;
        if (objects == 0) break;
        objects -= balance.ends(c, '}') && c == '}';
    }
    held.erase(0, read);
}

// Behind the arguments of a call: what closes it, then another one, or text.
bool CallReader::read_behind() {
    close_objects();
    drop_space();
    if (held.empty()) return false;
    Cursor c{held};
    if (in_print && c.take(")")) {
        in_print = false;
    } else if (in_list && c.take("]")) {
        in_list = false;
    } else if (in_fence && c.take("```")) {
        in_fence = false;
    } else if (!in_list || !c.take(",")) {
        const Head head = read_head(held, true);
        if (head.may_come || (c.ran_out && !is_last)) return false;
        if (head.found) {
            begin_call(head);
            return true;
        }
        if (c.ran_out) held.clear();  // the start of what closes it, cut off
        line_begins = true;
        in_fence = in_list = false;
        state = State::text;
        return true;
    }
    held.erase(0, c.at);
    return true;
}

// The model has ended its turn amid a call: what is there is all that it has.
void CallReader::complete() {
    const bool is_open = state == State::member || state == State::value ||
                         state == State::string || state == State::gap;
    if (!is_open) return;
    if (state == State::value) calls.back().arguments += literal_to_json(held);
    if (state == State::string || state == State::gap) calls.back().arguments += '"';
    end_call();
}

std::string CallReader::finish_reason(Finish finish) const {
    const bool called = finish == Finish::stop && !is_cut && !calls.empty();
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
