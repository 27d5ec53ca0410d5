// SPDX-License-Identifier: Apache-2.0
//
// schema.cpp: a JSON schema becomes the language of its documents. Beside the path.
//
// Properties stand in the schema's order. Where `properties` stands without additionalProperties,
// there are no others, as with vLLM's grammars; a type that is not named is the one that the other
// keywords speak of. Whitespace and digits are bounded, so that no model writes them for ever.
//
//   [1] Pieces   strings, numbers, white space
//   [2] Schema   one function for each type; allOf is merged, oneOf must be exclusive
#include <algorithm>
#include <cmath>
#include <set>

#include "fields.h"
#include "grammar.h"
#include "schemas.h"

namespace gemma {

namespace {

using Id = Expressions::Id;
using ordered = nlohmann::ordered_json;

constexpr int64_t most_integer = 999'999'999'999'999'999;

class Schema {
  public:
    // no_text: the targets of $ref that have no document of finite length.
    Schema(Grammar& g, const ordered& whole, const std::set<std::string>& no_text = {})
        : x(g.expressions),
          all(whole, g.expressions.param),
          dead(no_text),
          character(x.any({g.plain, x.then(x.text("\\"), escaped())})) {
        const Id indent = x.then(x.text("\n"), x.repeat(x.any({x.text(" "), x.text("\t")}), 0, 64));
        space = x.any({x.empty, x.text(" "), indent});
        anything = x.rule();
        const Id items = x.optional(listed(anything, 1, x.no_end));
        x.define(anything, x.any({x.text("null"), boolean(), number(), any_string(),
                                  brackets(items), any_object()}));
    }

    Id any_object() {
        const Id member = x.sequence({any_string(), colon(), anything});
        return braces(x.optional(listed(member, 1, x.no_end)));
    }

    Id compile(const ordered& schema, const std::string& place) {
        if (place.size() > 4000 || ++depth > 100)
            refuse(x.param, "%s: the schema is nested too deep, at %.100s", x.param, place.c_str());
        const Id e = compile_one(schema, place);
        depth--;
        return e;
    }

    // The targets of $ref that have no document of finite length.
    std::set<std::string> without_text() {
        const std::vector<Id> found = x.rules_without_text();
        std::set<std::string> names;
        for (const auto& [name, rule] : rules) {
            if (std::count(found.begin(), found.end(), rule)) names.insert(name);
        }
        return names;
    }

  private:
    // [1] Pieces ----------------------------------------------------------------------------------

    Id colon() { return x.then(x.text(":"), space); }
    Id comma() { return x.then(x.text(","), space); }
    Id braces(Id members) { return x.sequence({x.text("{"), space, members, space, x.text("}")}); }
    Id brackets(Id items) { return x.sequence({x.text("["), space, items, space, x.text("]")}); }
    Id quoted(Id body) { return x.sequence({x.text("\""), body, x.text("\"")}); }
    Id any_string() { return quoted(x.repeat(character, 0, x.no_end)); }
    Id boolean() { return x.any({x.text("true"), x.text("false")}); }
    Id listed(Id item, int least, int most) {  // at least one
        const Id more = x.then(comma(), item);
        return x.then(item, x.repeat(more, std::max(0, least - 1), most < 0 ? most : most - 1));
    }

    Id hex_digit() { return x.any({x.range('0', '9'), x.range('a', 'f'), x.range('A', 'F')}); }
    // Behind a \: no half of a pair of UTF-16 stands alone.
    Id escaped() {
        Expressions::Bytes named{};
        for (const char c : std::string_view("\"\\/bfnrt"))
            named[size_t(c) / 64] |= uint64_t(1) << c % 64;
        const Id two = x.repeat(hex_digit(), 2, 2), three = x.repeat(hex_digit(), 3, 3);
        const Id not_d = x.any({x.range('0', '9'), x.range('a', 'c'), x.range('A', 'C'),
                                x.range('e', 'f'), x.range('E', 'F')});
        const Id d = x.any({x.text("d"), x.text("D")});
        const Id high = x.any({x.range('8', '9'), x.range('a', 'b'), x.range('A', 'B')});
        const Id low = x.any({x.range('c', 'f'), x.range('C', 'F')});
        const Id one = x.any({x.then(not_d, three), x.sequence({d, x.range('0', '7'), two})});
        const Id pair = x.sequence({d, high, two, x.text("\\u"), d, low, two});
        return x.any({x.one_of(named), x.then(x.text("u"), x.any({one, pair}))});
    }

    // At most 20 digits before and behind the point, and no number beyond a double's.
    Id number() {
        const Id digit = x.range('0', '9');
        const Id fraction = x.then(x.text("."), x.repeat(digit, 1, 20));
        const Id size = x.any({x.repeat(digit, 1, 2), x.then(x.text("1"), x.repeat(digit, 2, 2)),
                               x.sequence({x.text("2"), x.range('0', '7'), digit})});
        const Id sign = x.any({x.empty, x.text("-"), x.text("+")});
        const Id exponent = x.sequence({x.any({x.text("e"), x.text("E")}), sign, size});
        return x.sequence({integer(), x.optional(fraction), x.optional(exponent)});
    }
    Id integer() {
        const Id digits = x.then(x.range('1', '9'), x.repeat(x.range('0', '9'), 0, 19));
        return x.then(x.optional(x.text("-")), x.any({x.text("0"), digits}));
    }
    // Decimal numbers of one length, from low to high.
    Id decimals(std::string_view low, std::string_view high) {
        const size_t rest = low.size() - 1;
        const std::string zeros(rest, '0'), nines(rest, '9');
        if (low == '0' + zeros && high == '9' + nines)
            return x.repeat(x.range('0', '9'), int(low.size()), int(low.size()));
        const uint8_t first = uint8_t(low[0]), last = uint8_t(high[0]);
        if (rest == 0) return x.range(first, last);
        const std::string_view low_rest = low.substr(1), high_rest = high.substr(1);
        if (first == last) return x.then(x.range(first, last), decimals(low_rest, high_rest));
        std::vector<Id> members{x.then(x.range(first, first), decimals(low_rest, nines)),
                                x.then(x.range(last, last), decimals(zeros, high_rest))};
        if (first + 1 < last)
            members.push_back(x.then(x.range(first + 1, last - 1), decimals(zeros, nines)));
        return x.any(std::move(members));
    }
    Id magnitudes(int64_t low, int64_t high) {  // 0 <= low
        std::vector<Id> members;
        for (int64_t end = 9; low <= high; end = end * 10 + 9) {  // of so many digits
            if (low > end) continue;
            const int64_t to = std::min(high, end);
            members.push_back(decimals(std::to_string(low), std::to_string(to)));
            low = to + 1;
            if (end >= most_integer) break;
        }
        return x.any(std::move(members));
    }
    Id integers(int64_t low, int64_t high) {
        std::vector<Id> members{magnitudes(std::max<int64_t>(0, low), high)};
        if (low < 0)
            members.push_back(x.then(x.text("-"), magnitudes(std::max<int64_t>(1, -high), -low)));
        return x.any(std::move(members));
    }

    // A value as json.dumps writes it.
    Id literal(const ordered& value) {
        if (value.is_string()) return x.text(quote_plain(value));
        if (!value.is_structured()) return x.text(value.dump());
        std::vector<Id> items;
        for (const auto& [name, item] : value.items())
            items.push_back(value.is_array()
                                ? literal(item)
                                : x.sequence({x.text(quote_plain(name)), colon(), literal(item)}));
        Id listed = x.empty;
        for (size_t i = items.size(); i-- > 0;)
            listed = x.then(items[i], i + 1 == items.size() ? x.empty : x.then(comma(), listed));
        return value.is_object() ? braces(listed) : brackets(listed);
    }
    static std::string quote_plain(const ordered& s) {
        return s.dump(-1, ' ', false, ordered::error_handler_t::replace);
    }
    // A name in every spelling that JSON has for it.
    Id spelled(const std::string& name) {
        Id e = x.empty;
        const std::u32string letters = decode_utf8(name);
        for (size_t i = letters.size(); i-- > 0;) {
            const char32_t c = letters[i];
            std::vector<Id> forms{json_characters(x, {{c, c}})};
            if (c == '/') forms.push_back(x.text("\\/"));
            Id digits = x.empty;
            for (const char32_t unit : c < 0x10000 ? std::u32string{c}
                                                   : std::u32string{0xD800 + ((c - 0x10000) >> 10),
                                                                    0xDC00 + (c & 0x3FF)}) {
                digits = x.then(digits, x.text("\\u"));
                for (int shift = 12; shift >= 0; shift -= 4) {
                    const char digit = "0123456789abcdef"[unit >> shift & 15];
                    digits = x.then(digits, x.any({x.range(uint8_t(digit), uint8_t(digit)),
                                                   x.range(uint8_t(std::toupper(digit)),
                                                           uint8_t(std::toupper(digit)))}));
                }
            }
            forms.push_back(digits);
            e = x.then(x.any(std::move(forms)), e);
        }
        return e;
    }

    // [2] Schema ----------------------------------------------------------------------------------

    Id compile_one(const ordered& schema, const std::string& place) {
        if (schema.is_boolean()) return schema.get<bool>() ? anything : x.nothing;
        if (!schema.is_object()) all.fail(place, "a schema must be an object, true or false");
        all.charge(1, place);
        all.check_keywords(schema, place);
        if (schema.contains("nullable")) return compile(all.without_nullable(schema), place);
        if (schema.contains("$ref")) return compile_reference(schema, place);
        if (schema.contains("allOf")) return compile_all(schema, place);
        for (const char* keyword : {"anyOf", "oneOf"}) {
            if (schema.contains(keyword)) return compile_any(schema, keyword, place);
        }
        Id e = x.nothing;
        if (schema.contains("const") || schema.contains("enum")) {
            e = compile_values(schema, place);
        } else {
            for (const std::string& type : all.types_of(schema, place))
                e = x.any({e, compile_type(type, schema, place)});
        }
        return e;
    }

    Id compile_reference(const ordered& schema, const std::string& place) {
        const ordered& target = all.resolve(schema, place);
        const ordered rest = Schemas::without(schema, "$ref");
        if (!rest.empty()) return compile(all.merged(target, rest, place), place);
        const std::string name = schema["$ref"];
        if (dead.count(name)) return x.nothing;
        const auto found = rules.find(name);
        if (found != rules.end()) return found->second;
        const Id rule = rules[name] = x.rule();
        x.define(rule, compile(target, name));
        return rule;
    }

    Id compile_all(const ordered& schema, const std::string& place) {
        if (!schema["allOf"].is_array() || schema["allOf"].empty())
            all.fail(place, "allOf must be a list of schemas");
        ordered merged = Schemas::without(schema, "allOf");
        for (const ordered& part : schema["allOf"]) merged = all.merged(merged, part, place);
        return compile(merged, place);
    }

    Id compile_any(const ordered& schema, const std::string& keyword, const std::string& place) {
        const ordered& branches = schema[keyword];
        if (!branches.is_array() || branches.empty())
            all.fail(place, keyword + " must be a list of schemas");
        const ordered base = Schemas::without(schema, keyword);
        std::vector<Id> members;
        for (size_t i = 0; i < branches.size(); i++) {
            for (size_t j = 0; j < i && keyword == "oneOf"; j++) {
                if (!all.exclusive(branches[i], branches[j], place))
                    all.fail(place,
                             text("oneOf: a value may fit branches %zu and %zu: use anyOf", j, i));
            }
            const std::string part = place + "/" + keyword + text("/%zu", i);
            members.push_back(base.empty() ? compile(branches[i], part)
                                           : compile(all.merged(base, branches[i], place), part));
        }
        return x.any(std::move(members));
    }

    // Each value is held against what stands beside it.
    Id compile_values(const ordered& schema, const std::string& place) {
        const ordered& constant = Schemas::member(schema, "const");
        const ordered& list = Schemas::member(schema, "enum");
        const ordered values = schema.contains("const") ? ordered::array({constant}) : list;
        if (!values.is_array()) all.fail(place, "enum must be a list of values");
        const ordered rest = Schemas::without(Schemas::without(schema, "const"), "enum");
        for (const char* keyword : {"properties", "additionalProperties", "items", "prefixItems"}) {
            if (rest.contains(keyword))
                all.fail(place, text("%s beside enum or const is not supported", keyword));
        }
        const Id fitting = rest.empty() ? x.nothing : compile(rest, place);
        std::vector<std::string> strings;
        std::vector<Id> members;
        for (const ordered& value : values) {
            if (schema.contains("const") && schema.contains("enum") && !Schemas::has(list, value))
                continue;
            if (!rest.empty() && !fits(fitting, value)) continue;
            if (value.is_structured())
                members.push_back(literal(value));
            else
                strings.push_back(quote_plain(value));
        }
        members.push_back(x.texts(strings));
        return x.any(std::move(members));
    }
    bool fits(Id e, const ordered& value) {
        const double number = value.is_number() ? value.get<double>() : 0.5;
        const bool whole = std::floor(number) == number;
        const auto most = double(most_integer);  // what is larger fits where this does
        const auto integer = int64_t(whole ? std::clamp(number, -most, most) : 0);
        for (const char c : whole ? std::to_string(integer) : quote_plain(value))
            e = x.after(e, uint8_t(c));
        return x.may_end(e);
    }

    Id compile_type(const std::string& type, const ordered& schema, const std::string& place) {
        if (type == "null") return x.text("null");
        if (type == "boolean") return boolean();
        if (type == "string") return compile_string(schema, place);
        if (type == "array") return compile_array(schema, place);
        if (type == "object") return compile_object(schema, place);
        return compile_number(type, schema, place);
    }

    int count_of(const ordered& schema, const char* keyword, int otherwise,
                 const std::string& place) const {
        if (!schema.contains(keyword)) return otherwise;
        const ordered& value = schema[keyword];
        const bool whole = value.is_number() && value.get<double>() >= 0 &&
                           value.get<double>() <= 1e9 &&
                           std::floor(value.get<double>()) == value.get<double>();
        if (!whole)
            all.fail(place, text("%s must be an integer from 0 to 10^9, got %s", keyword,
                                 value.dump().substr(0, 100).c_str()));
        return int(value.get<double>());
    }

    Id compile_number(const std::string& type, const ordered& schema, const std::string& place) {
        double low = -double(most_integer), high = double(most_integer);
        bool bounded = false;
        for (const char* keyword : {"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"}) {
            if (!schema.contains(keyword)) continue;
            if (!schema[keyword].is_number())
                all.fail(place, text("%s must be a number, got %s", keyword,
                                     schema[keyword].dump().substr(0, 100).c_str()));
            if (type != "integer")
                all.fail(place, text("%s is supported for integers only", keyword));
            bounded = true;
            const double limit = schema[keyword];
            const std::string name = keyword;
            if (std::fabs(limit) > 0x1p53) all.fail(place, name + " must be within 2^53");
            if (name == "minimum") low = std::max(low, std::ceil(limit));
            if (name == "exclusiveMinimum") low = std::max(low, std::floor(limit) + 1);
            if (name == "maximum") high = std::min(high, std::floor(limit));
            if (name == "exclusiveMaximum") high = std::min(high, std::ceil(limit) - 1);
        }
        if (!bounded) return type == "integer" ? integer() : number();
        if (low > high) return x.nothing;
        return integers(std::max(-most_integer, int64_t(low)),
                        std::min(most_integer, int64_t(high)));
    }

    static const std::map<std::string, std::string>& formats() {
        const std::string year = R"(([1-9]\d{3}|0([1-9]\d\d|0([1-9]\d|0[1-9]))))";
        const std::string days = R"(-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|)"
                                 R"((0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8])))";
        const std::string fourth = "(0[48]|[2468][048]|[13579][26])";  // 04, 08, 12 to 96
        const std::string date =
            "(" + year + days + "|(\\d\\d" + fourth + "|" + fourth + "00)-02-29)";
        const std::string hour = R"(([01]\d|2[0-3]):[0-5]\d)";
        const std::string time = hour + R"(:[0-5]\d(\.\d{1,9})?([Zz]|[+-])" + hour + ")";
        const std::string byte = R"((25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d))";
        const std::string h = "[0-9a-fA-F]{1,4}", left = "(" + h + ":)", right = "(:" + h + ")";
        std::string ipv6 = left + "{7}" + h + "|" + left + "{1,7}:|:" + right + "{1,7}|::";
        for (int i = 1; i <= 6; i++)  // groups before the two colons, and behind them
            ipv6 += "|" + left + text("{1,%d}", i) + right + text("{1,%d}", 7 - i);
        const std::string mark = "a-zA-Z0-9_.~!$&'()*+,;=:\\-", code = "|%[0-9a-fA-F]{2})";
        const std::string letter = "([" + mark + "@]" + code, user = "(([" + mark + "]" + code;
        const std::string host = user + "*@)?([a-zA-Z0-9._~-]+|\\[(" + ipv6 + ")\\])(:\\d{1,5})?";
        const std::string path = "(/" + letter + "*)*", rest = "([" + mark + "@/?]" + code + "*";
        static const std::map<std::string, std::string> all_formats{
            {"date", date},
            {"time", time},
            {"date-time", "(" + date + ")[Tt]" + time},
            {"uuid", "[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"},
            {"email", R"([a-zA-Z0-9_%+~-]+(\.[a-zA-Z0-9_%+~-]+)*@)"
                      R"(([a-zA-Z0-9]([a-zA-Z0-9-]{0,30}[a-zA-Z0-9])?\.)+[a-zA-Z]{2,20})"},
            {"ipv4", "(" + byte + R"(\.){3})" + byte},
            {"ipv6", ipv6},
            {"uri", "[a-zA-Z][a-zA-Z0-9+.-]{0,20}:(//" + host + path + "|/?" + letter + "+" + path +
                        ")(\\?" + rest + ")?(#" + rest + ")?"}};
        return all_formats;
    }

    Id compile_string(const ordered& schema, const std::string& place) {
        const int least = count_of(schema, "minLength", 0, place);
        const int most = count_of(schema, "maxLength", x.no_end, place);
        if (most != x.no_end && most < least) return x.nothing;
        std::vector<Pattern> patterns;
        if (schema.contains("format")) {
            const std::string name = schema["format"].is_string() ? schema["format"] : "";
            const auto format = formats().find(name);
            if (format == formats().end())
                all.fail(place, "the format " + schema["format"].dump().substr(0, 100) +
                                    " is not supported");
            patterns.push_back(regex(x, format->second, false, true, x.param));
        }
        if (schema.contains("pattern")) {
            if (!schema["pattern"].is_string()) all.fail(place, "pattern must be a string");
            patterns.push_back(
                regex(x, schema["pattern"], true, true,
                      std::string(x.param) + ": JSON schema: " + place + "/pattern"));
        }
        if (patterns.empty()) return quoted(x.repeat(character, least, most));
        Id body = limited(patterns[0], least, most);
        if (patterns.size() == 2) body = x.both(body, patterns[1].e);
        return quoted(body);
    }

    // Lengths that the pattern has by itself cost nothing, and those of `[a-z]+` little.
    Id limited(const Pattern& p, int least, int most) {
        const bool long_enough = p.least >= least;
        const bool short_enough = most == x.no_end || (p.most >= 0 && p.most <= most);
        if (long_enough && short_enough) return p.e;
        if (p.unit == x.nothing) return x.both(x.repeat(character, least, most), p.e);
        const int from = int(std::max<long>(p.least, least));
        const int to = most == x.no_end ? int(p.most)
                       : p.most < 0     ? most
                                        : int(std::min<long>(p.most, most));
        return to >= 0 && to < from ? x.nothing : x.repeat(p.unit, from, to < 0 ? x.no_end : to);
    }

    Id compile_array(const ordered& schema, const std::string& place) {
        const int least = count_of(schema, "minItems", 0, place);
        const int most = count_of(schema, "maxItems", x.no_end, place);
        if (most != x.no_end && most < least) return x.nothing;
        std::vector<Id> first;
        const ordered& prefix = Schemas::member(schema, "prefixItems");
        if (!prefix.is_array() && !prefix.is_null())
            all.fail(place, "prefixItems must be a list of schemas");
        for (size_t i = 0; i < prefix.size() && (most < 0 || int(i) < most); i++)
            first.push_back(compile(prefix[i], place + text("/prefixItems/%zu", i)));
        const Id item =
            schema.contains("items") ? compile(schema["items"], place + "/items") : anything;
        const int size = int(first.size());
        // From the last to the first: what may stand behind i items.
        Id rest = x.repeat(x.then(comma(), item), std::max(0, least - size),
                           most < 0 ? most : most - size);
        if (size == 0) {
            rest = most == 0 ? x.empty : listed(item, std::max(1, least), most);
            if (least == 0) rest = x.optional(rest);
        }
        for (int i = size; i-- > 0;) {
            rest = x.then(first[size_t(i)], rest);
            if (i > 0) rest = x.then(comma(), rest);
            if (i >= least) rest = x.optional(rest);
        }
        return brackets(rest);
    }

    std::set<std::string> names_of(const ordered& required, const std::string& place) const {
        const bool is_list = required.is_null() || required.is_array();
        std::set<std::string> names;
        for (const ordered& name : is_list ? required : ordered::array({0})) {
            if (!name.is_string()) all.fail(place, "required must be a list of names");
            names.insert(name.get<std::string>());
        }
        return names;
    }

    Id compile_object(const ordered& schema, const std::string& place) {
        struct Property {
            std::string name;
            Id pair;
            bool required;
        };
        const ordered &properties = Schemas::member(schema, "properties"),
                      &required = Schemas::member(schema, "required");
        if (!properties.is_object() && !properties.is_null())
            all.fail(place, "properties must be an object");
        const std::set<std::string> needed = names_of(required, place);
        const bool open = schema.contains("additionalProperties") || !schema.contains("properties");
        const Id others =
            !open ? x.nothing
            : schema.contains("additionalProperties")
                ? compile(schema["additionalProperties"], place + "/additionalProperties")
                : anything;
        std::vector<Property> list;
        for (const auto& [name, value] : properties.items()) {
            const Id e = compile(value, place + "/properties/" + name);
            list.push_back({name, x.sequence({x.text(quote_plain(name)), colon(), e}),
                            needed.count(name) > 0});
        }
        for (const std::string& name : needed) {
            if (!properties.contains(name))
                list.push_back(
                    {name, x.sequence({x.text(quote_plain(name)), colon(), others}), true});
        }
        std::vector<Id> names;
        for (const Property& p : list) {
            if (others != x.nothing) names.push_back(spelled(p.name));
        }
        const Id characters = x.repeat(character, 0, x.no_end);
        const Id key = quoted(names.empty() ? characters : x.both(characters, x.but(x.any(names))));
        const Id pair = x.sequence({key, colon(), others});
        Id behind = x.repeat(x.then(comma(), pair), 0, x.no_end);  // one that is written
        Id first = x.any({x.empty, x.then(pair, behind)});         // nothing
        for (size_t i = list.size(); i-- > 0;) {
            const Id with = x.then(list[i].pair, behind);
            first = list[i].required ? with : x.any({with, first});
            behind =
                list[i].required ? x.then(comma(), with) : x.any({x.then(comma(), with), behind});
        }
        return braces(first);
    }

    Expressions& x;
    Schemas all;
    const std::set<std::string> dead;
    const Id character;  // of a string
    Id space = 0, anything = 0;
    std::map<std::string, Id> rules;
    int depth = 0;
};

}  // namespace

std::shared_ptr<Grammar> Grammar::of_schema(const ordered& schema, const char* param) {
    std::set<std::string> dead;
    while (true) {
        auto g = std::make_shared<Grammar>(param);
        Schema compiler(*g, schema, dead);
        g->start = compiler.compile(schema, "");
        const std::set<std::string> found = compiler.without_text();
        dead.insert(found.begin(), found.end());
        if (!found.empty()) continue;  // again, with nothing in their place
        if (g->start == Expressions::nothing)
            refuse(param, "%s: no document fits the schema", param);
        g->try_start();
        return g;
    }
}

std::shared_ptr<Grammar> Grammar::of_object(const char* param) {
    auto g = std::make_shared<Grammar>(param);
    const ordered any = true;
    g->start = Schema(*g, any).any_object();
    g->try_start();
    return g;
}

}  // namespace gemma
