// SPDX-License-Identifier: Apache-2.0
//
// literals.cpp: Python's and JSON's literals, as JSON. Beside the path.
#include "literals.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <map>
#include <optional>

#include "fields.h"
#include "grammar.h"

namespace gemma {

namespace {

constexpr int most_levels = 64;  // as of a request's JSON

std::string character(uint32_t c) {
    const bool is_one = c < 0xD800 || (c > 0xDFFF && c <= last_character);
    return encode_utf8(is_one ? c : 0xFFFD);
}

// The number of so many digits; nullopt: they are not all there.
std::optional<uint32_t> digits(std::string_view s, size_t count, int base) {
    uint32_t number = 0;
    if (s.size() < count) return std::nullopt;
    const auto [end, error] = std::from_chars(s.data(), s.data() + count, number, base);
    if (error != std::errc() || end != s.data() + count) return std::nullopt;
    return number;
}

}  // namespace

Escape read_escape(std::string_view s) {
    if (s.size() < 2) return {};
    static const std::map<char, const char*> named{
        {'n', "\n"}, {'t', "\t"}, {'r', "\r"}, {'b', "\b"},  {'f', "\f"}, {'v', "\v"},
        {'a', "\a"}, {'"', "\""}, {'\'', "'"}, {'\\', "\\"}, {'/', "/"},  {'\n', ""}};
    const auto found = named.find(s[1]);
    if (found != named.end()) return {2, found->second};
    size_t octal = 0;
    while (octal < 3 && 1 + octal < s.size() && s[1 + octal] >= '0' && s[1 + octal] < '8') octal++;
    if (octal > 0 && octal < 3 && 1 + octal == s.size()) return {};
    if (octal > 0) return {1 + octal, character(*digits(s.substr(1), octal, 8))};
    const size_t count = s[1] == 'x' ? 2 : s[1] == 'u' ? 4 : s[1] == 'U' ? 8 : 0;
    if (count == 0) return {2, std::string(s.substr(0, 2))};
    if (s.size() < 2 + count) return {};
    const auto number = digits(s.substr(2), count, 16);
    if (!number) return {2, std::string(s.substr(0, 2))};
    const bool is_half = s[1] == 'u' && *number >= 0xD800 && *number < 0xDC00;
    if (!is_half) return {2 + count, character(*number)};
    const std::string_view next = s.substr(6);
    if (next.size() < 6 && (next.empty() || next[0] == '\\')) return {};
    const auto low = next.starts_with("\\u") ? digits(next.substr(2), 4, 16) : std::nullopt;
    if (!low || *low < 0xDC00 || *low > 0xDFFF) return {6, character(0xFFFD)};
    return {12, character(0x10000 + ((*number - 0xD800) << 10) + (*low - 0xDC00))};
}

namespace {

// Reads a literal that is all there.
class Literal {
  public:
    explicit Literal(std::string_view text) : s(text) {}

    std::string value(bool is_key = false) {  // as JSON
        skip_space();
        if (levels >= most_levels) return rest();
        levels++;
        const std::string json = one(is_key);
        levels--;
        return json;
    }
    bool at_end() {
        skip_space();
        return at == s.size();
    }

  private:
    std::string one(bool is_key) {
        const size_t begin = at;
        if (take('[')) return "[" + items(']').list + "]";
        if (take('{')) return braces();
        if (take('(')) {
            const Items tuple = items(')');
            return tuple.is_one ? tuple.list : "[" + tuple.list + "]";
        }
        while (at < s.size() && at < begin + 2 && std::strchr("rbufRBUF", s[at])) at++;
        if (at < s.size() && is_quote(s[at])) return strings(begin);
        at = begin;
        return word(is_key);
    }

    struct Items {
        std::string list;
        bool is_one;  // one, with no comma behind it
    };
    Items items(char close) {
        std::string list;
        bool is_one = true;
        while (!at_end() && !take(close)) {
            const size_t before = at;
            is_one = list.empty();
            const std::string item = value();
            list += (list.empty() ? "" : ",") + item;
            skip_space();
            is_one &= !take(',');
            at += at == before;  // a bracket that closes nothing
        }
        return {list, is_one && !list.empty()};
    }

    std::string braces() {  // a dictionary or a set
        std::string list;
        bool is_set = false;
        while (!at_end() && !take('}')) {
            const size_t before = at;
            const std::string key = value(true);
            skip_space();
            const bool has_value = take(':');
            is_set |= list.empty() && !has_value;
            const std::string name = key.starts_with('"') ? key : quote(key);
            list += (list.empty() ? "" : ",") + (is_set ? key : name + ":" + value());
            skip_space();
            take(',');
            at += at == before;
        }
        return is_set ? "[" + list + "]" : "{" + list + "}";
    }

    std::string strings(size_t begin) {  // those that stand side by side are one
        std::string all;
        bool is_raw = false;
        for (size_t i = begin; i < at; i++) is_raw |= s[i] == 'r' || s[i] == 'R';
        while (!at_end() && is_quote(s[at])) {
            const std::string three(3, s[at]);
            const std::string mark = s.substr(at).starts_with(three) ? three : three.substr(0, 1);
            at += mark.size();
            while (at < s.size() && !s.substr(at).starts_with(mark)) {
                const bool is_escape = s[at] == '\\' && at + 1 < s.size();
                const Escape escape = is_escape && !is_raw ? read_escape(s.substr(at)) : Escape{};
                const size_t size = escape.size > 0 ? escape.size : is_escape ? 2 : 1;
                all += escape.size > 0 ? escape.meaning : std::string(s.substr(at, size));
                at += size;
            }
            at = std::min(s.size(), at + mark.size());
        }
        return quote(all);
    }

    std::string word(bool is_key) {
        const size_t begin = at;
        int depth = 0;  // of an expression's brackets
        for (; at < s.size(); at++) {
            const char c = s[at];
            if (depth == 0 && (std::strchr(",]})", c) || (is_key && c == ':'))) break;
            depth += c == '(' || c == '[' || c == '{';
            depth -= c == ')' || c == ']' || c == '}';
        }
        size_t end = at;
        while (end > begin && is_space(s[end - 1])) end--;
        const std::string text(s.substr(begin, end - begin));
        if (text == "True" || text == "true") return "true";
        if (text == "False" || text == "false") return "false";
        if (text == "None" || text == "null") return "null";
        return number(text);
    }

    static std::string number(const std::string& text) {
        std::string plain;
        std::copy_if(text.begin(), text.end(), std::back_inserter(plain),
                     [](char c) { return c != '_'; });
        if (plain.starts_with('+')) plain.erase(0, 1);
        if (json::accept(plain) && is_one_of(plain, "-0123456789")) return plain;  // all digits
        const bool negative = plain.starts_with('-');
        const std::string size = plain.substr(negative);
        if (!is_one_of(size, ".0123456789")) return quote(text);
        const int base = size.starts_with("0x") || size.starts_with("0X")   ? 16
                         : size.starts_with("0o") || size.starts_with("0O") ? 8
                         : size.starts_with("0b") || size.starts_with("0B") ? 2
                                                                            : 10;
        const char* const first = size.data() + (base == 10 ? 0 : 2);
        const char* const end = size.data() + size.size();
        uint64_t whole = 0;
        if (base != 10) {
            const auto [stopped, error] = std::from_chars(first, end, whole, base);
            if (error != std::errc() || stopped != end) return quote(text);
            return (negative ? "-" : "") + std::to_string(whole);
        }
        double real = 0;  // ".5", "5."; digits behind a 0 are no number of Python's
        const auto [stopped, error] = std::from_chars(first, end, real);
        const bool is_whole = error == std::errc() && stopped == end && std::isfinite(real);
        if (!is_whole || size.find_first_of(".eE") == size.npos) return quote(text);
        return quote(negative ? -real : real);
    }

    static bool is_one_of(const std::string& s, std::string_view all) {  // its first character
        return !s.empty() && all.find(s[0]) != all.npos;
    }

    std::string rest() { return quote(std::string(s.substr(std::exchange(at, s.size())))); }
    void skip_space() {
        while (at < s.size() && is_space(s[at])) at++;
    }
    bool take(char c) {
        if (at == s.size() || s[at] != c) return false;
        at++;
        return true;
    }

    const std::string_view s;
    size_t at = 0;
    int levels = 0;
};

}  // namespace

std::string literal_to_json(std::string_view literal) {
    Literal reader(literal);
    const std::string value = reader.value();
    if (reader.at_end()) return value;
    while (!literal.empty() && is_space(literal.back())) literal.remove_suffix(1);
    while (!literal.empty() && is_space(literal.front())) literal.remove_prefix(1);
    return quote(std::string(literal));  // an expression
}

}  // namespace gemma
