// SPDX-License-Identifier: Apache-2.0
//
// regex.cpp: Python's regular expressions become Expressions, as far as they are regular. Beside
// the path.
//
//   [1] Characters  as UTF-8, and as JSON strings spell them
//   [2] Regex       a parser by descent
#include <algorithm>
#include <optional>

#include "fields.h"
#include "grammar.h"

namespace gemma {

// [1] Characters ----------------------------------------------------------------------------------

std::u32string decode_utf8(std::string_view s) {
    std::u32string out;
    for (size_t at = 0; at < s.size();) {
        const uint8_t lead = uint8_t(s[at]);
        const size_t size = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
        char32_t c = size == 1 ? lead : lead & (0x7F >> size);
        for (size_t i = 1; i < size && at + i < s.size(); i++)
            c = c << 6 | (uint8_t(s[at + i]) & 0x3F);
        out += c;
        at += size;
    }
    return out;
}

std::string encode_utf8(char32_t c) {
    if (c < 0x80) return {char(c)};
    if (c < 0x800) return {char(0xC0 | c >> 6), char(0x80 | (c & 0x3F))};
    const std::string end = {char(0x80 | (c >> 6 & 0x3F)), char(0x80 | (c & 0x3F))};
    if (c < 0x10000) return char(0xE0 | c >> 12) + end;
    return std::string{char(0xF0 | c >> 18), char(0x80 | (c >> 12 & 0x3F))} + end;
}

namespace {

// All texts of one length from `low` to `high`, in the order of bytes; the bytes behind the first
// are those of characters.
Expressions::Id span(Expressions& x, std::string_view low, std::string_view high) {
    const uint8_t first = uint8_t(low[0]), last = uint8_t(high[0]);
    const std::string_view low_rest = low.substr(1), high_rest = high.substr(1);
    if (low_rest.empty()) return x.range(first, last);
    if (first == last) return x.then(x.range(first, last), span(x, low_rest, high_rest));
    const std::string least(low_rest.size(), '\x80'), most(low_rest.size(), '\xBF');
    const Expressions::Id from = x.then(x.range(first, first), span(x, low_rest, most));
    const Expressions::Id to = x.then(x.range(last, last), span(x, least, high_rest));
    if (first + 1 == last) return x.any({from, to});
    return x.any({from, to, x.then(x.range(first + 1, last - 1), span(x, least, most))});
}

// Sorted, and apart from each other.
Ranges normal(Ranges ranges) {
    std::sort(ranges.begin(), ranges.end());
    Ranges out;
    for (const auto& [low, high] : ranges) {
        if (!out.empty() && low <= out.back().second + 1)
            out.back().second = std::max(out.back().second, high);
        else
            out.push_back({low, high});
    }
    return out;
}

Ranges complement(const Ranges& ranges) {
    Ranges out;
    char32_t next = 0;
    for (const auto& [low, high] : normal(ranges)) {
        if (low > next) out.push_back({next, low - 1});
        next = high + 1;
    }
    if (next <= last_character) out.push_back({next, last_character});
    return out;
}

}  // namespace

Expressions::Id characters(Expressions& x, const Ranges& ranges) {
    // Of one length each, and no halves of UTF-16's pairs.
    static const Ranges lengths{
        {0, 0x7F}, {0x80, 0x7FF}, {0x800, 0xD7FF}, {0xE000, 0xFFFF}, {0x10000, last_character}};
    std::vector<Expressions::Id> members;
    for (const auto& [low, high] : normal(ranges)) {
        for (const auto& [from, to] : lengths) {
            if (std::max(low, from) > std::min(high, to)) continue;
            members.push_back(
                span(x, encode_utf8(std::max(low, from)), encode_utf8(std::min(high, to))));
        }
    }
    return x.any(std::move(members));
}

Expressions::Id json_characters(Expressions& x, const Ranges& ranges) {
    Ranges raw;
    std::vector<Expressions::Id> members;
    for (const auto& [low, high] : normal(ranges)) {
        char32_t next = low;
        for (char32_t c = low; c <= std::min<char32_t>(high, '\\'); c++) {
            if (c >= ' ' && c != '"' && c != '\\') continue;
            if (next < c) raw.push_back({next, c - 1});
            next = c + 1;
            members.push_back(x.text(text("\\u%04x", unsigned(c))));
            const size_t named = std::string_view("\"\\\b\f\n\r\t").find(char(c));
            if (named != std::string_view::npos)
                members.push_back(x.text(std::string("\\") + "\"\\bfnrt"[named]));
        }
        if (next <= high) raw.push_back({next, high});
    }
    members.push_back(characters(x, raw));
    return x.any(std::move(members));
}

// [2] Regex ---------------------------------------------------------------------------------------

namespace {

class Regex {
  public:
    Regex(Expressions& of, const std::string& pattern, bool as_json, const std::string& place)
        : x(of), s(decode_utf8(pattern)), in_json(as_json), where(place) {}

    Pattern parse(bool search) {
        const Pattern anything{x.repeat(set({{0, last_character}}), 0, x.no_end), 0, -1};
        std::vector<Pattern> members;
        do {
            const bool from_start = take('^');
            Pattern p = sequence();
            const bool to_end = take('$');
            if (search && !from_start) p = joined(anything, p);
            if (search && !to_end) p = joined(p, anything);
            members.push_back(p);
        } while (take('|'));
        if (at < s.size()) fail(s[at] == ')' ? "a ) without its (" : "^ or $ amid the pattern");
        return one_of(members);
    }

  private:
    [[noreturn]] void fail(const std::string& what) const {
        refuse(x.param, "%s: regular expression: %s is not supported, at character %zu",
               where.c_str(), what.c_str(), at + 1);
    }
    bool take(char32_t c) {
        const bool is_there = at < s.size() && s[at] == c;
        at += is_there;
        return is_there;
    }
    Expressions::Id set(const Ranges& ranges) const {
        return in_json ? json_characters(x, ranges) : characters(x, ranges);
    }

    Pattern joined(const Pattern& a, const Pattern& b) const {
        const bool endless = a.most < 0 || b.most < 0;
        return {x.then(a.e, b.e), capped(double(a.least) + double(b.least)),
                endless ? -1 : capped(double(a.most) + double(b.most))};
    }
    Pattern one_of(const std::vector<Pattern>& members) const {
        if (members.size() == 1) return members[0];
        std::vector<Expressions::Id> all;
        Pattern out{x.nothing, members[0].least, members[0].most};
        for (const Pattern& p : members) {
            all.push_back(p.e);
            out.least = std::min(out.least, p.least);
            out.most = out.most < 0 || p.most < 0 ? -1 : std::max(out.most, p.most);
        }
        out.e = x.any(std::move(all));
        return out;
    }
    static long capped(double characters) { return long(std::min(characters, 1e15)); }

    Pattern sequence() {
        std::vector<Pattern> parts;
        const std::u32string_view ends = U"|)$^";
        while (at < s.size() && ends.find(s[at]) == ends.npos) parts.push_back(item());
        if (parts.size() == 1) return parts[0];
        Pattern p{x.empty};
        for (size_t i = parts.size(); i-- > 0;) p = joined(parts[i], p);
        return p;
    }

    Pattern group() {
        if (take('?')) {
            const bool named = take('P') ? take('<')
                                         : at + 1 < s.size() && s[at] == '<' && s[at + 1] != '=' &&
                                               s[at + 1] != '!';
            if (named) at = std::min(s.find(U'>', at), s.size());
            if (named ? !take('>') : !take(':')) fail("(? with what follows it here");
        }
        if (++depth > 64) fail("nesting beyond 64 groups");
        std::vector<Pattern> members{sequence()};
        while (take('|')) members.push_back(sequence());
        if (!take(')')) fail(at < s.size() ? "^ or $ amid the pattern" : "a ( without its )");
        depth--;
        return one_of(members);
    }

    Pattern item() {
        if (take('(')) return quantified(group());
        if (take('[')) return quantified(character(bracket()));
        if (take('.')) return quantified(character(complement({{'\n', '\n'}})));
        if (take('\\')) return quantified(character(escape()));
        if (s[at] == '*' || s[at] == '+' || s[at] == '?') fail("a quantifier behind nothing");
        const char32_t c = s[at++];
        return quantified(character({{c, c}}));
    }
    Pattern character(const Ranges& ranges) const { return {set(ranges), 1, 1}; }

    Pattern quantified(const Pattern& p) {
        int least = 1, most = 1;
        const size_t before = at;
        if (take('*')) {
            least = 0;
            most = x.no_end;
        } else if (take('+')) {
            most = x.no_end;
        } else if (take('?')) {
            least = 0;
        } else if (take('{')) {
            const auto low = number();
            const bool comma = take(',');
            const auto high = comma ? number() : low;
            if (!take('}') || (!low && !comma)) {  // then { is a character
                at = before + 1;
                return joined(p, quantified(character({{'{', '{'}})));
            }
            least = low.value_or(0);
            most = high.value_or(x.no_end);
            if (high && *high < least) fail("a quantifier whose end is below its start");
        }
        if (at == before) return p;
        take('?');  // lazy: the same texts
        if (at < s.size() && (s[at] == '*' || s[at] == '+' || s[at] == '{'))
            fail("a quantifier behind a quantifier");
        const bool endless = p.most != 0 && (p.most < 0 || most < 0);
        const bool is_character = p.least == 1 && p.most == 1;
        return {x.repeat(p.e, least, most), capped(double(p.least) * least),
                endless ? -1 : capped(double(p.most) * std::max(0, most)),
                is_character ? p.e : x.nothing};
    }
    std::optional<int> number() {
        std::optional<int> value;
        for (; at < s.size() && s[at] >= '0' && s[at] <= '9'; at++) {
            if (value.value_or(0) > 100'000'000) fail("a count over 10^9");
            value = value.value_or(0) * 10 + int(s[at] - '0');
        }
        return value;
    }

    // Classes mean ASCII: so they hold in Python, where they mean more, and in JavaScript.
    Ranges escape() {
        static const Ranges digit{{'0', '9'}}, word{{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}},
            space{{'\t', '\r'}, {' ', ' '}};
        const auto without = [](Ranges ranges) {
            ranges.push_back({0x80, last_character});
            return complement(ranges);
        };
        if (at == s.size()) fail("a \\ at the end");
        const char32_t c = s[at++];
        switch (c) {
            case 'd':
                return digit;
            case 'w':
                return word;
            case 's':
                return space;
            case 'D':
                return without(digit);
            case 'W':
                return without(word);
            case 'S':
                return without(space);
            case 'n':
                return {{'\n', '\n'}};
            case 'r':
                return {{'\r', '\r'}};
            case 't':
                return {{'\t', '\t'}};
            case 'f':
                return {{'\f', '\f'}};
            case 'v':
                return {{'\v', '\v'}};
            case 'x':
                return hex(2);
            case 'u':
                return hex(4);
            default:
                break;
        }
        if (c < 0x80 && std::isalnum(int(c))) {
            at--;
            fail(std::string("\\") + char(c));
        }
        return {{c, c}};
    }
    Ranges hex(size_t digits) {
        char32_t value = 0;
        for (size_t i = 0; i < digits; i++, at++) {
            if (at == s.size() || s[at] > 0x7F || !std::isxdigit(int(s[at])))
                fail("an escape without its digits");
            value = value * 16 + char32_t(std::stoi(std::string(1, char(s[at])), nullptr, 16));
        }
        return {{value, value}};
    }
    Ranges bracket() {
        Ranges out;
        const bool negated = take('^');
        bool has_class = false;
        for (bool first = true; first || !take(']'); first = false) {
            const bool is_class = at + 1 < s.size() && s[at] == '\\' &&
                                  std::u32string_view(U"dwsDWS").find(s[at + 1]) != s.npos;
            has_class |= is_class;
            const Ranges low = member();
            out.insert(out.end(), low.begin(), low.end());
            if (at + 1 >= s.size() || s[at] != '-' || s[at + 1] == ']') continue;
            at++;
            const Ranges high = member();
            const bool single = low.size() == 1 && high.size() == 1 &&
                                low[0].first == low[0].second && high[0].first == high[0].second;
            if (!single || high[0].first < low[0].first) fail("a range of such ends");
            out.push_back({low[0].first, high[0].first});
        }
        // Python's own classes have more than ASCII, and what is not in them has less.
        if (negated && has_class) out.push_back({0x80, last_character});
        return negated ? complement(out) : normal(out);
    }
    Ranges member() {
        if (at == s.size()) fail("a [ without its ]");
        if (take('\\')) {
            if (take('b')) return {{'\b', '\b'}};
            return escape();
        }
        const char32_t c = s[at++];
        return {{c, c}};
    }

    Expressions& x;
    const std::u32string s;
    const bool in_json;
    const std::string where;
    size_t at = 0;
    int depth = 0;
};

}  // namespace

Pattern regex(Expressions& x, const std::string& pattern, bool search, bool in_json,
              const std::string& where) {
    return Regex(x, pattern, in_json, where).parse(search);
}

}  // namespace gemma
