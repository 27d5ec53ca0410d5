// SPDX-License-Identifier: Apache-2.0
//
// grammar_test.cpp: which ids may follow. tests/grammar_check.py has random schemas, and another
// library to judge them; here are the parts, and what must not go wrong once.
//
//   [1] Expressions  equal ones have one number; what is left can be completed
//   [2] Bitsets      those of a walk over all pieces, whatever was asked before
//   [3] Refusals     each names the field, and keyword and place, or the character
//   [4] Hostile      what is made to take for ever is refused or bounded
//   [5] Constraints  one text after the other, on threads
#include "tests/test.h"

#include <chrono>
#include <random>

#include "grammar.h"

using namespace gemma;
using nlohmann::ordered_json;
using Id = Expressions::Id;

namespace {

const Tokenizer& tokenizer() {
    static const Tokenizer demo((repository / "demo/model/tokenizer.model").string());
    return demo;
}
const Vocabulary& vocabulary() {
    static const Vocabulary demo(tokenizer(), {Tokenizer::eos}, tokenizer().size());
    return demo;
}

bool accepts(Expressions& x, Id e, std::string_view text) {
    for (const char c : text) e = x.after(e, uint8_t(c));
    return x.may_end(e);
}
bool accepts(Grammar& g, std::string_view text) { return accepts(g.expressions, g.start, text); }

std::shared_ptr<Grammar> schema(const std::string& text) {
    return Grammar::of_schema(ordered_json::parse(text), "field");
}

bool has(const Bitset& bits, int id) { return bits[size_t(id) / 32] >> id % 32 & 1; }

// Without trees, sets of plain pieces or limits.
Bitset by_hand(Grammar& g, Id e) {
    Bitset out(size_t(tokenizer().size() + 31) / 32);
    for (int id = 0; id < tokenizer().size(); id++) {
        const std::string_view bytes = tokenizer().bytes(id);
        Id left = bytes.empty() ? Expressions::nothing : e;
        for (const char c : bytes) left = g.expressions.after(left, uint8_t(c));
        const bool ends = id == Tokenizer::eos && g.expressions.may_end(e);
        if (left != Expressions::nothing || ends) out[size_t(id) / 32] |= 1u << id % 32;
    }
    return out;
}

std::vector<std::shared_ptr<Grammar>> some_grammars() {
    return {Grammar::of_object("o"),
            Grammar::of_regex(R"([A-Z][a-z]+ (is|was) .{0,40}\.)", "r"),
            Grammar::of_regex(R"(\w{3,5}(, \w+)*)", "r"),
            Grammar::of_regex("(é|ü|日本)+x?", "r"),
            Grammar::of_choices({"yes", "no", "no way", "日本"}, "c"),
            schema(R"({"type": "string", "maxLength": 5})"),
            schema(R"({"type": "string", "pattern": "^[a-z ]+$", "minLength": 4, "maxLength": 9})"),
            schema(R"({"type": "string", "pattern": "a.b", "maxLength": 6})"),
            schema(R"({"properties": {"name": {"type": "string"}, "n": {"minimum": 3,
                       "type": "integer"}}, "additionalProperties": {"type": "boolean"}})"),
            schema(R"({"type": "array", "items": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}})")};
}

}  // namespace

// [1] Expressions ---------------------------------------------------------------------------------

TEST_CASE("expressions: equal ones have one number") {
    Expressions x("x");
    const Id a = x.text("a"), b = x.text("b"), c = x.text("c");
    CHECK(x.then(x.then(a, b), c) == x.then(a, x.then(b, c)));
    CHECK(x.any({a, x.any({b, c})}) == x.any({c, b, a, a}));
    CHECK(x.any({a, b, c}) == x.range('a', 'c'));
    CHECK(x.but(x.but(a)) == a);
    CHECK(x.repeat(x.repeat(a, 0, 7), 0, 9) == x.repeat(a, 0, 63));
    CHECK(x.repeat(x.repeat(a, 0, 1 << 30), 5, 1 << 30) == x.repeat(a, 0, x.no_end));
    CHECK(x.texts({"ab", "ac", "b", "ab"}) == x.any({x.then(a, x.range('b', 'c')), b}));
    CHECK(x.both(x.repeat(a, 0, x.no_end), x.text("aa")) != x.nothing);
    CHECK(x.then(a, x.nothing) == x.nothing);
}

TEST_CASE("expressions: an intersection without a text is nothing, as soon as it has none") {
    Expressions x("x");
    const Id a = x.text("a"), any = x.range(0, 255);
    CHECK(x.both(x.repeat(a, 2, 3), x.repeat(any, 4, x.no_end)) == x.nothing);
    // Of two lengths only an even one may be, of three and more letters: aaaa.
    const Id even = x.repeat(x.text("aa"), 0, x.no_end), length = x.repeat(any, 3, 5);
    const Id both = x.both(even, length);
    CHECK(accepts(x, both, "aaaa"));
    CHECK(!accepts(x, both, "aa"));
    CHECK(x.after(both, 'b') == x.nothing);
    Id e = both;
    for (int i = 0; i < 4; i++) e = x.after(e, 'a');
    CHECK(x.after(e, 'a') == x.nothing);  // a fifth could not be completed to an even number
}

TEST_CASE("expressions: how many plain characters may come next") {
    Expressions x("x");
    const Id plain = characters(x, {{' ', '!'}, {'#', '['}, {']', last_character}});
    const Id quote = x.text("\""), any = x.repeat(plain, 0, x.no_end);
    const auto free = [&](Id e) { return x.free_characters(e, plain).characters; };
    CHECK(free(x.then(any, quote)) == x.no_end);
    CHECK(free(x.then(x.repeat(plain, 2, 7), quote)) == 7);
    CHECK(free(x.repeat(x.text("a"), 0, x.no_end)) == 0);
    CHECK(x.free_characters(x.then(x.repeat(plain, 0, 7), quote), plain).only);
    CHECK(!x.free_characters(x.then(x.repeat(plain, 0, 7), x.text(".")), plain).only);
    // All texts but a few can be begun by each; all but many cannot.
    CHECK(free(x.both(any, x.but(x.texts({"ab", "c"})))) == x.no_end);
    CHECK(free(x.both(any, x.but(x.then(x.text("a"), any)))) == 0);
}

// [2] Bitsets -------------------------------------------------------------------------------------

TEST_CASE("bitsets: those of a walk over all pieces, in any order of questions") {
    std::mt19937 random(1);
    int states = 0;
    const auto grammars = some_grammars(), others = some_grammars();
    for (size_t i = 0; i < grammars.size(); i++) {
        const auto g = grammars[i], fresh = others[i];
        for (int text = 0; text < 10; text++) {
            Id e = g->start, again = fresh->start;
            for (int step = 0; step < 12; step++, states++) {
                const Bitset hand = by_hand(*g, e);
                CAPTURE(i, text, step);
                CHECK(*g->allowed(vocabulary(), e) == hand);
                std::vector<int> ids;
                for (int id = 0; id < tokenizer().size(); id++) {
                    if (id != Tokenizer::eos && has(hand, id)) ids.push_back(id);
                }
                if (ids.empty()) break;
                const int id = ids[random() % ids.size()];
                for (const char c : tokenizer().bytes(id)) {
                    e = g->expressions.after(e, uint8_t(c));
                    again = fresh->expressions.after(again, uint8_t(c));
                }
                REQUIRE(e != Expressions::nothing);
                // The other one has not been asked on the way.
                if (step == 11) CHECK(*fresh->allowed(vocabulary(), again) == by_hand(*g, e));
            }
        }
    }
    std::printf("bitsets: %d states of %zu grammars\n", states, grammars.size());
}

TEST_CASE("bitsets: nothing is allowed that has no text, and the end only where a text is whole") {
    const auto g = Grammar::of_choices({"yes", "yes!"}, "c");
    Id e = g->start;
    CHECK(!has(*g->allowed(vocabulary(), e), Tokenizer::eos));
    for (const char c : std::string("yes")) e = g->expressions.after(e, uint8_t(c));
    CHECK(has(*g->allowed(vocabulary(), e), Tokenizer::eos));
    e = g->expressions.after(e, '!');
    const Bitset only = *g->allowed(vocabulary(), e);
    for (int id = 0; id < tokenizer().size(); id++) CHECK(has(only, id) == (id == Tokenizer::eos));
}

TEST_CASE("a key that is not named cannot be a name in other letters") {
    const auto g = schema(R"({"properties": {"ab": {"type": "null"}}, "required": ["ab"],
                              "additionalProperties": {"type": "integer"}})");
    CHECK(accepts(*g, R"({"ab": null, "abc": 1, "a": 2})"));
    CHECK(!accepts(*g, R"({"ab": null, "ab": 1})"));
    CHECK(!accepts(*g, R"({"ab": null, "\u0061b": 1})"));
    CHECK(!accepts(*g, R"({"abc": 1, "ab": null})"));  // the named ones first
}

TEST_CASE("what stands beside a keyword holds, too") {
    const std::tuple<const char*, const char*, bool> table[]{
        {R"({"enum": ["abc", "x"], "minLength": 2})", R"("x")", false},
        {R"({"enum": ["abc", "x"], "minLength": 2})", R"("abc")", true},
        {R"({"const": "x", "pattern": "^[a-x]$"})", R"("x")", true},
        {R"({"enum": ["x", "y"], "pattern": "^[a-x]"})", R"("y")", false},
        {R"({"type": "integer", "enum": [1, 5, 7.0], "minimum": 3})", "1", false},
        {R"({"type": "integer", "enum": [1, 5, 7.0], "minimum": 3})", "7.0", true},
        {R"({"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}},
             "additionalProperties": false}, {"properties": {"b": {"type": "integer"}}}]})",
         R"({"b": 1})", false},
        {R"({"allOf": [{"type": "object", "additionalProperties": {"type": "string"}},
             {"properties": {"b": {"type": "integer"}, "c": {"maxLength": 1}}}]})",
         R"({"b": 1})", false},
        {R"({"allOf": [{"type": "object", "additionalProperties": {"type": "string"}},
             {"properties": {"b": {"type": "integer"}, "c": {"maxLength": 1}}}]})",
         R"({"c": "x"})", true},
        {R"({"allOf": [{"type": "array", "items": {"type": "integer"}},
             {"prefixItems": [{"type": "string"}]}]})",
         R"(["a"])", false},
        {R"({"allOf": [{"type": "array", "items": {"type": "integer"}},
             {"prefixItems": [{"minimum": 5}]}]})",
         "[5, 1]", true},
        {R"({"allOf": [{"type": "string", "nullable": true}, {"type": "string"}]})", "null", false},
        {R"({"allOf": [{"type": "string", "nullable": true}, {"type": "null"}]})", "null", true},
        {R"({"type": "string", "nullable": true})", "null", true},
        {R"({"$ref": "#/$defs/a", "nullable": true, "$defs": {"a": {"const": 1}}})", "null", true},
        {R"({"allOf": [{"type": ["string", "number"]}, {"type": ["string", "integer"]}]})", "1",
         true},
        {R"({"type": "array", "items": {"$ref": "#/$defs/n"},
             "$defs": {"n": {"type": "integer", "minimum": 2, "maximum": 1}}})",
         "[]", true},
        {R"({"type": "array", "items": {"$ref": "#/$defs/n"},
             "$defs": {"n": {"type": "integer", "minimum": 2, "maximum": 1}}})",
         "[", false},
        {R"({"properties": {"a": {"allOf": [{"enum": [1]}, {"enum": [2]}]}}})", "{}", true},
        {R"({"format": "date"})", R"("2024-01-31")", true},
        {R"({"format": "date"})", R"("2024-02-30")", false},
        {R"({"format": "date"})", R"("2024-02-29")", true},
        {R"({"format": "date"})", R"("2000-02-29")", true},
        {R"({"format": "date"})", R"("2023-02-29")", false},
        {R"({"format": "date"})", R"("1900-02-29")", false},
        {R"({"format": "date"})", R"("0000-02-29")", false},
        {R"({"$ref": "#/$defs/a%25", "$defs": {"a%": {"const": 1}}})", "1", true},
        {R"({"$ref": "#/$defs/a%", "$defs": {"a%": {"const": 1}}})", "1", true},
        {R"({"$ref": "#/$defs/a%-1", "$defs": {"a%-1": {"const": 1}}})", "1", true},
        {R"({"$ref": "#/$defs/a%25%22b", "$defs": {"a%\"b": {"const": 1}}})", "1", true},
        {R"({"format": "date-time"})", R"("2024-04-30T23:59:59.123456789z")", true},
        {R"({"format": "ipv6"})", R"("fe80::1")", true},
        {R"({"format": "ipv6"})", R"("1:2:3:4:5:6:7::8:9")", false},
        {R"({"format": "uri"})", R"("http://[::1]:80/a//b/?q#f")", true},
        {R"({"format": "uri"})", R"("ftp://bob@a.com/%20a/")", true},
        {R"({"format": "uri"})", R"("a://h:80x")", false}};
    for (const auto& [of, document, valid] : table) {
        INFO(of << " " << document);
        const auto g = schema(of);
        CHECK(accepts(*g, document) == valid);
    }
    const std::tuple<const char*, const char*, bool> patterns[]{
        {"[^\\D]", "é", false},   {"[^\\D]", "5", true}, {"[^\\w]", "é", false},
        {"[^\\W_]+", "a5", true}, {"x{,}", "xxx", true}, {"x{,2}", "xxx", false},
        {"x{}", "x{}", true}};
    for (const auto& [of, given, matches] : patterns) {
        INFO(of << " " << given);
        CHECK(accepts(*Grammar::of_regex(of, "field"), given) == matches);
    }
}

// [3] Refusals ------------------------------------------------------------------------------------

TEST_CASE("refusals name the field, and keyword and place, or the character") {
    const auto refusal = [](const auto& make) -> std::string {
        try {
            make();
        } catch (const Refusal& r) {
            CHECK(r.status == 400);
            CHECK(r.param == "field");
            return r.message;
        }
        return "no refusal";
    };
    const std::vector<std::pair<const char*, const char*>> schemas{
        {R"({"properties": {"a": {"not": {}}}})",
         "field: JSON schema: /properties/a: the keyword not is not supported"},
        {R"({"items": {"type": "text"}})",
         "field: JSON schema: /items: type must be a JSON type, got \"text\""},
        {R"({"type": "number", "minimum": 1})",
         "field: JSON schema: the whole: minimum is supported for integers only"},
        {R"({"type": "string", "format": "hostname"})",
         "field: JSON schema: the whole: the format \"hostname\" is not supported"},
        {R"({"type": "string", "maxLength": -1})",
         "field: JSON schema: the whole: maxLength must be an integer from 0 to 10^9, got -1"},
        {R"({"type": "string", "pattern": "a\\b"})",
         "/pattern: regular expression: \\b is not supported, at character 3"},
        {R"({"$ref": "http://x/y"})",
         "field: JSON schema: the whole: $ref must begin with #, got \"http://x/y\""},
        {R"({"oneOf": [{"type": "integer"}, {"type": "number"}]})",
         "field: JSON schema: the whole: oneOf: a value may fit branches 0 and 1: use anyOf"},
        {R"({"allOf": [{"pattern": "a"}, {"pattern": "b"}]})",
         "field: JSON schema: the whole: pattern stands twice, with different values, where all "
         "must hold"},
        {R"({"enum": 5})", "field: JSON schema: the whole: enum must be a list of values"},
        {R"({"enum": []})", "field: no document fits the schema"},
        {R"({"enum": [{}], "properties": {"a": true}})",
         "field: JSON schema: the whole: properties beside enum or const is not supported"},
        {R"({"type": "integer", "minimum": 3, "maximum": 2})",
         "field: no document fits the schema"},
        {R"({"properties": {"a": {"$ref": "#"}}, "required": ["a"]})",
         "field: no document fits the schema"},
        {R"({"$ref": "#"})",
         "field is nested too deep, or refers to itself before it takes a byte"},
        {R"({"anyOf": [{"$ref": "#"}, {"type": "null"}]})", "field is nested too deep"},
        {R"({"allOf": [{"$ref": "#"}]})", "field: the schema is nested too deep"}};
    for (const auto& [text, words] : schemas) {
        const std::string said = refusal([text = text] { schema(text); });
        INFO(text << "\n" << said);
        CHECK(said.find(words) != std::string::npos);
    }
    const std::vector<std::pair<const char*, const char*>> patterns{
        {"(?=a)", "field: regular expression: (? with what follows it here is not supported"},
        {"a{2}{3}", "a quantifier behind a quantifier is not supported, at character 5"},
        {"*", "a quantifier behind nothing is not supported, at character 1"},
        {"(a", "a ( without its ) is not supported, at character 3"},
        {"a)", "a ) without its ( is not supported, at character 2"},
        {"[a", "a [ without its ] is not supported, at character 3"},
        {R"((a)\1)", R"(\1 is not supported, at character 5)"},
        {"a$b", "^ or $ amid the pattern is not supported, at character 3"},
        {"[z-a]", "a range of such ends is not supported"}};
    for (const auto& [text, words] : patterns) {
        const std::string said = refusal([text = text] { Grammar::of_regex(text, "field"); });
        INFO(text << "\n" << said);
        CHECK(said.find(words) != std::string::npos);
    }
}

// [4] Hostile -------------------------------------------------------------------------------------

TEST_CASE("hostile patterns and schemas are refused or bounded") {
    using Clock = std::chrono::steady_clock;
    const auto repeated = [](const std::string& one, int count) {
        std::string all;
        for (int i = 0; i < count; i++) all += one;
        return all;
    };
    std::string names;
    for (int i = 0; i < 5000; i++) names += text(R"(%s"p%d": {})", i ? "," : "", i);
    std::string required, branches, optional;
    for (int i = 0; i < 60; i++) optional += text(R"("p%d": {"type": "null"}, )", i);
    for (int i = 0; i < 5000; i++) required += text(R"(%s"p%d")", i ? "," : "", i);
    for (int i = 0; i < 1000; i++)
        branches += text(R"({"properties": {"k": {"const": %d}}, "required": ["k"]},)", i);
    const std::vector<std::string> patterns{"(.*a){20}.{20}",
                                            ".*a.{30}",
                                            "((.{0,1000}){0,1000}){0,1000}x",
                                            "(a{0,100000000}){100000000}",
                                            "(a|aa)*b",
                                            "(a*)*b",
                                            "(x+x+)+y",
                                            repeated("a?", 300) + repeated("a", 300),
                                            repeated("(a|b)?", 390),
                                            repeated("a?", 2000),
                                            repeated("a*", 4000),
                                            repeated("(", 60) + "a" + repeated(")*", 60),
                                            repeated("(.*a){9}", 9),
                                            "a{1000000000}",
                                            "(" + repeated("ab|", 9000) + "c)*d"};
    const std::vector<std::string> schemas{
        R"({"type": "string", "pattern": ".*a.{30}$", "maxLength": 200})",
        R"({"type": "string", "pattern": "^a*$", "minLength": 1000000})",
        R"({"type": "array", "minItems": 1000000000, "items": {"$ref": "#"}})",
        "{\"properties\": {" + names + "}}",
        "{\"required\": [" + required + "]}",
        R"({"oneOf": [{"$ref": "#/$defs/n"}, {"$ref": "#/$defs/n"}], "$defs": {"n": {"type":
            "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}}})",
        R"({"$ref": "#/$defs/R", "$defs": {"R": {"properties": {)" + optional +
            R"("q": {"$ref": "#/$defs/R"}}, "required": ["q"]}}})",
        "{\"oneOf\": [" + branches + "{\"type\": \"null\"}]}",
        repeated("{\"anyOf\": [{\"type\": \"null\"}, ", 25) + "{\"enum\": [" + required + "]}" +
            repeated("], \"type\": [\"null\", \"string\"]}", 25),
        "{\"properties\": {" + names + "}, \"additionalProperties\": {}}",
        R"({"type": "string", "pattern": "^(a|b)*a(a|b){12}$", "minLength": 40,
            "format": "email"})"};
    const auto run = [](const std::string& what, const auto& make) {
        const auto begun = Clock::now();
        std::string end = "compiled";
        double longest = 0;
        try {
            const std::shared_ptr<Grammar> g = make();
            Id e = g->start;
            for (int step = 0; step < 40 && e != Expressions::nothing; step++) {
                const auto start = Clock::now();
                const Bitset bits = *g->allowed(vocabulary(), e);
                longest =
                    std::max(longest, std::chrono::duration<double>(Clock::now() - start).count());
                // Whatever is left out of a bitset, a byte can follow, or the text is whole.
                const auto any = [](uint32_t word) { return word != 0; };
                CHECK(std::any_of(bits.begin(), bits.end(), any));
                const char* const bytes = step % 3 ? "a{\"" : "b,\"p";
                for (int i = 0; i < 256; i++) {
                    const Id next = g->expressions.after(e, uint8_t(bytes[i % 3] + i / 3));
                    if (next == Expressions::nothing) continue;
                    e = next;
                    break;
                }
            }
        } catch (const Refusal& r) {
            end = r.message;
        }
        const std::chrono::duration<double> all = Clock::now() - begun;
        std::printf("%7.1f ms, longest bitset %6.1f ms: %.40s: %.60s\n", all.count() * 1e3,
                    longest * 1e3, what.c_str(), end.c_str());
    };
    for (const auto& p : patterns) run(p, [&] { return Grammar::of_regex(p, "field"); });
    for (const auto& s : schemas) run(s, [&] { return schema(s); });
}

// [5] Constraints ---------------------------------------------------------------------------------

namespace {

// Waits for the ids that may follow.
std::shared_ptr<const Bitset> await(Grammars& all, const Constraint& constraint) {
    while (!constraint.allowed()) all.settle(std::chrono::milliseconds(100));
    return constraint.allowed();
}

}  // namespace

TEST_CASE("what was refused once is refused again, and the rest goes on") {
    // Both reach the limit of members, again and again, in one grammar.
    std::string many;
    for (int i = 0; i < 2000; i++) many += "a?";
    const auto g = Grammar::of_regex("b" + many + "c|dx*", "field");
    const Id b = g->expressions.after(g->start, 'b');
    int refused = 0;
    for (int i = 0; i < 1000; i++) {
        try {
            g->allowed(vocabulary(), b);
        } catch (const Refusal&) {
            refused++;
        }
    }
    CHECK(refused == 1000);
    CHECK(accepts(*g, "dxxx"));
}

TEST_CASE("a counted string may be long before its states need too much memory") {
    const auto g = schema(R"({"type": "string", "maxLength": 10000000})");
    Id e = g->expressions.after(g->start, '"');
    int characters = 0;
    try {
        for (; characters < 10'000'000; characters++) {
            e = g->expressions.after(e, 'a');
            if (characters % 4 == 0) g->allowed(vocabulary(), e);
        }
    } catch (const Refusal& r) {
        CHECK(r.message == "field is too complex: it needs more than 32 MiB");
    }
    std::printf("a string with maxLength, tokens of 4 characters: %d characters\n", characters);
    CHECK(characters > 20'000);
}

TEST_CASE("constraints: many texts at once, of one grammar and of several") {
    Grammars all(tokenizer(), {Tokenizer::eos}, tokenizer().size());
    std::mt19937 random(3);
    struct Text {
        std::shared_ptr<Grammar> grammar;
        std::shared_ptr<Constraint> constraint;
        std::string text = {};
        bool ended = false;
    };
    std::vector<Text> texts;
    const Sequence s;
    for (int i = 0; i < 40; i++) {
        const std::string key = std::to_string(i % 10);
        auto g = all.find_or_make(key, [&] { return some_grammars()[size_t(i % 10)]; });
        texts.push_back({g, all.start(g, s)});
        if (i >= 10) CHECK(g == texts[size_t(i) - 10].grammar);
    }
    for (int step = 0; step < 60; step++) {
        for (Text& t : texts) {
            if (t.ended) continue;
            const Bitset bits = *await(all, *t.constraint);
            std::vector<int> ids;
            for (int id = 0; id < tokenizer().size(); id++) {
                if (has(bits, id)) ids.push_back(id);
            }
            REQUIRE(!ids.empty());
            const int id = has(bits, Tokenizer::eos) ? Tokenizer::eos : ids[random() % ids.size()];
            t.ended = id == Tokenizer::eos;
            if (t.ended) continue;
            t.text += tokenizer().bytes(id);
            t.constraint->append(id);
        }
    }
    int ended = 0;
    for (Text& t : texts) {
        ended += t.ended;
        INFO(t.text);
        if (t.ended) CHECK(accepts(*t.grammar, t.text));
    }
    CHECK(ended > 20);
}

TEST_CASE("constraints: the grammars of late requests are kept, up to a number and a size") {
    Grammars all(tokenizer(), {Tokenizer::eos}, tokenizer().size());
    int compiled = 0;
    const auto ask = [&](int i, bool large) {
        return all.find_or_make(std::to_string(i), [&] {
            compiled++;
            std::vector<std::string> choices;
            for (int n = 0; n < (large ? 2000 : 1); n++)
                choices.push_back(text("%d and %ld", n, (n + 10'000L * i) * 7919 % 1'000'003));
            return Grammar::of_choices(choices, "c");
        });
    };
    for (const bool large : {false, true}) {
        const int first = large ? 1000 : 0, count = large ? 80 : 200;
        compiled = 0;
        for (int i = 0; i < count; i++) ask(first + i, large);
        CHECK(compiled == count);
        for (int i = count - 1; i > count - 10; i--) ask(first + i, large);
        CHECK(compiled == count);  // these were there
        size_t bytes = 0;
        int kept = 0;
        for (int i = count - 1; i >= 0; i--) {  // the latest first
            const int before = compiled;
            const auto g = ask(first + i, large);
            bytes += compiled == before ? g->bytes() : 0;
            kept += compiled == before;
        }
        std::printf("%d grammars kept, %.1f MB\n", kept, double(bytes) / 1e6);
        CHECK((kept >= 9 && kept <= 64));
        CHECK(bytes <= 256 << 20);
    }
}

TEST_CASE("constraints: before min_tokens no stop id may follow, unless nothing else may") {
    Grammars all(tokenizer(), {Tokenizer::eos}, tokenizer().size());
    const auto g = Grammar::of_regex("a*", "r"), one = Grammar::of_choices({"a"}, "c");
    Sequence s;
    s.min_tokens = 2;
    s.stop_ids = {Tokenizer::eos};
    const int a = tokenizer().encode("a").back();
    REQUIRE(tokenizer().bytes(a) == "a");
    for (const bool only : {false, true}) {
        const auto constraint = all.start(only ? one : g, s);
        CHECK(!has(*await(all, *constraint), Tokenizer::eos));
        constraint->append(a);
        CHECK(has(*await(all, *constraint), Tokenizer::eos) == only);
        if (only) continue;
        constraint->append(a);
        CHECK(has(*await(all, *constraint), Tokenizer::eos));
    }
}
