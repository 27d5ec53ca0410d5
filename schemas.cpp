// SPDX-License-Identifier: Apache-2.0
//
// schemas.cpp: what the JSON schemas of one document say together. Beside the path.
//
//   [1] One    its keywords, its types, what its $ref refers to
//   [2] All    a schema of the values that fit two
//   [3] One of two that no value can fit both
#include "schemas.h"

#include <algorithm>
#include <charconv>
#include <set>

#include "fields.h"

namespace gemma {

using ordered = Schemas::ordered;

namespace {

constexpr size_t most_work = 50'000;  // some 20 ms
constexpr int deepest = 100;          // of calls that follow $ref

const std::set<std::string> describing{
    "title",    "description", "default",  "examples",  "example",       "$schema", "$id",
    "$comment", "deprecated",  "readOnly", "writeOnly", "discriminator", "$defs",   "definitions"};

size_t count_nodes(const ordered& value) {
    size_t count = 1;
    if (!value.is_structured()) return count;
    for (const ordered& one : value) count += count_nodes(one);
    return count;
}

}  // namespace

// [1] One -----------------------------------------------------------------------------------------

void Schemas::fail(const std::string& place, const std::string& what) const {
    refuse(param, "%s: JSON schema: %s: %s", param,
           place.empty() ? "the whole" : place.substr(0, 200).c_str(), what.c_str());
}

void Schemas::charge(size_t nodes, const std::string& place) {
    work += nodes;
    if (work > most_work)
        fail(place, "the schema is too large, or what $ref, allOf, anyOf and oneOf make of it is");
}

const ordered& Schemas::member(const ordered& object, std::string_view name) {
    static const ordered null;
    if (!object.is_object()) return null;
    const auto found = object.find(std::string(name));
    return found == object.end() ? null : *found;
}

bool Schemas::has(const ordered& list, const ordered& value) {
    return list.is_array() && std::find(list.begin(), list.end(), value) != list.end();
}

ordered Schemas::without(const ordered& schema, const std::string& keyword) {
    ordered rest = ordered::object();
    for (const auto& [name, value] : schema.items()) {
        if (name != keyword && !describing.count(name)) rest[name] = value;
    }
    return rest;
}

void Schemas::check_keywords(const ordered& schema, const std::string& place) const {
    static const std::set<std::string> known{
        "type",     "properties",  "required",        "additionalProperties",
        "items",    "minItems",    "maxItems",        "enum",
        "const",    "anyOf",       "oneOf",           "allOf",
        "$ref",     "pattern",     "minLength",       "format",
        "minimum",  "maxLength",   "maximum",         "exclusiveMinimum",
        "nullable", "prefixItems", "exclusiveMaximum"};
    for (const auto& [keyword, value] : schema.items()) {
        if (!known.count(keyword) && !describing.count(keyword))
            fail(place, "the keyword " + keyword.substr(0, 100) + " is not supported");
    }
}

const ordered& Schemas::resolve(const ordered& schema, const std::string& place) const {
    const ordered& name = member(schema, "$ref");
    if (!name.is_string() || !name.get_ref<const std::string&>().starts_with("#"))
        fail(place, "$ref must begin with #, got " + name.dump().substr(0, 100));
    const auto& s = name.get_ref<const std::string&>();
    std::string pointer;
    for (size_t i = 1; i < s.size(); i++) {
        unsigned byte = 0;  // of a percent-escape, such as %25
        const bool is_code = s[i] == '%' && i + 2 < s.size() &&
                             std::from_chars(&s[i + 1], &s[i] + 3, byte, 16).ptr == &s[i] + 3;
        pointer += is_code ? char(byte) : s[i];
        i += is_code ? 2 : 0;
    }
    try {
        return root.at(ordered::json_pointer(pointer));
    } catch (const ordered::exception&) {
        fail(place, "$ref " + name.dump().substr(0, 100) + " leads nowhere");
    }
}

// Where no type is named, the types that the other keywords speak of.
std::vector<std::string> Schemas::types_of(const ordered& schema, const std::string& place) const {
    static const std::vector<std::string> all{"object", "array",   "string",
                                              "number", "boolean", "null"};
    static const std::vector<std::pair<std::string, std::string>> speaks_of{
        {"properties", "object"},
        {"required", "object"},
        {"additionalProperties", "object"},
        {"items", "array"},
        {"prefixItems", "array"},
        {"minItems", "array"},
        {"maxItems", "array"},
        {"pattern", "string"},
        {"minLength", "string"},
        {"maxLength", "string"},
        {"format", "string"},
        {"minimum", "number"},
        {"maximum", "number"},
        {"exclusiveMinimum", "number"},
        {"exclusiveMaximum", "number"}};
    std::vector<std::string> types;
    const ordered& given = member(schema, "type");
    if (given.is_null()) {
        for (const auto& [keyword, type] : speaks_of) {
            if (schema.contains(keyword) && !std::count(types.begin(), types.end(), type))
                types.push_back(type);
        }
        return types.empty() ? all : types;
    }
    for (const ordered& type : given.is_array() ? given : ordered::array({given})) {
        const std::string name = type.is_string() ? type.get<std::string>() : "";
        if (name != "integer" && !std::count(all.begin(), all.end(), name))
            fail(place, "type must be a JSON type, got " + type.dump().substr(0, 100));
        types.push_back(name);
    }
    return types;
}

ordered Schemas::without_nullable(const ordered& schema) const {
    const bool null = member(schema, "nullable") == true;
    ordered rest = without(schema, "nullable");
    if (!null) return rest;
    const bool plain = rest.contains("type") && !rest.contains("$ref") && !rest.contains("enum") &&
                       !rest.contains("const") && !rest.contains("anyOf") &&
                       !rest.contains("oneOf") && !rest.contains("allOf");
    if (!plain) return {{"anyOf", ordered::array({rest, {{"type", "null"}}})}};
    ordered types = rest["type"].is_array() ? rest["type"] : ordered::array({rest["type"]});
    if (!has(types, "null")) types.push_back("null");
    rest["type"] = types;
    return rest;
}

// [2] All -----------------------------------------------------------------------------------------

ordered Schemas::merged(const ordered& left, const ordered& right, const std::string& place) {
    charge(count_nodes(left) + count_nodes(right), place);
    if (left == false || right == false) return false;
    if (left == true) return right;
    if (right == true) return left;
    if (!left.is_object() || !right.is_object())
        fail(place, "a schema must be an object, true or false");
    if (++depth > deepest) fail(place, "allOf and $ref are too deep, or refer to themselves");
    const auto resolved = [&](const ordered& schema) {
        check_keywords(schema, place);
        if (schema.contains("nullable")) return without_nullable(schema);
        if (!schema.contains("$ref")) return without(schema, "");
        return merged(resolve(schema, place), without(schema, "$ref"), place);
    };
    const ordered a = resolved(left), b = resolved(right);
    ordered out = a.is_object() && b.is_object() ? a : merged(a, b, place);
    if (a.is_object() && b.is_object()) {
        for (const auto& [keyword, value] : b.items()) merge_keyword(out, keyword, value, place);
        merge_properties(out, a, b, place);
        merge_items(out, a, b, place);
        if (out.contains("enum") && out["enum"].empty()) out = false;
        if (out.is_object() && out.contains("type") && out["type"].empty()) out = false;
    }
    depth--;
    return out;
}

void Schemas::merge_keyword(ordered& out, const std::string& keyword, const ordered& value,
                            const std::string& place) {
    if (!out.contains(keyword) || out[keyword] == value) {
        out[keyword] = value;
        return;
    }
    ordered& first = out[keyword];
    const bool numbers = first.is_number() && value.is_number();
    const std::string start = keyword.substr(0, 3);
    if (keyword == "properties" || keyword == "additionalProperties" || keyword == "items" ||
        keyword == "prefixItems")
        return;  // merge_properties and merge_items have both sides
    if ((keyword == "required" || keyword == "allOf") && first.is_array() && value.is_array()) {
        first.insert(first.end(), value.begin(), value.end());
    } else if (numbers && (start == "min" || keyword == "exclusiveMinimum")) {
        if (first < value) first = value;
    } else if (numbers && (start == "max" || keyword == "exclusiveMaximum")) {
        if (value < first) first = value;
    } else if (keyword == "enum" && first.is_array()) {
        ordered both = ordered::array();
        for (const ordered& one : first) {
            if (has(value, one)) both.push_back(one);
        }
        first = both;
    } else if (keyword == "type") {
        const ordered a = first.is_array() ? first : ordered::array({first});
        const ordered b = value.is_array() ? value : ordered::array({value});
        ordered both = ordered::array();
        for (const char* type :
             {"object", "array", "string", "number", "integer", "boolean", "null"}) {
            const bool whole = type == std::string("integer");  // an integer is a number
            const bool in_a = has(a, type) || (whole && has(a, "number"));
            const bool in_b = has(b, type) || (whole && has(b, "number"));
            const bool is_implied = whole && has(both, "number");
            if (in_a && in_b && !is_implied) both.push_back(type);
        }
        first = both;
    } else {
        fail(place, keyword + " stands twice, with different values, where all must hold");
    }
}

// A name that only one side has is an additional property of the other.
void Schemas::merge_properties(ordered& out, const ordered& a, const ordered& b,
                               const std::string& place) {
    const auto of = [](const ordered& schema, const std::string& name) -> ordered {
        const ordered &own = member(member(schema, "properties"), name),
                      &others = member(schema, "additionalProperties");
        return !own.is_null() ? own : others.is_null() ? ordered(true) : others;
    };
    ordered properties = ordered::object();
    for (const ordered* side : {&a, &b}) {
        const ordered& own = member(*side, "properties");
        if (!own.is_object()) continue;
        charge(own.size() * own.size() / 64, place);  // its members are found from end to end
        for (const auto& [name, schema] : own.items()) {
            if (!properties.contains(name))
                properties[name] = merged(of(a, name), of(b, name), place);
        }
    }
    if (a.contains("properties") || b.contains("properties")) out["properties"] = properties;
    if (a.contains("additionalProperties") && b.contains("additionalProperties"))
        out["additionalProperties"] =
            merged(a["additionalProperties"], b["additionalProperties"], place);
}

void Schemas::merge_items(ordered& out, const ordered& a, const ordered& b,
                          const std::string& place) {
    const ordered &first_a = member(a, "prefixItems"), &first_b = member(b, "prefixItems");
    const auto of = [](const ordered& schema, const ordered& first, size_t i) -> ordered {
        if (first.is_array() && i < first.size()) return first[i];
        const ordered& items = member(schema, "items");
        return items.is_null() ? ordered(true) : items;
    };
    ordered first = ordered::array();
    const size_t count = std::max(first_a.size(), first_b.size());
    for (size_t i = 0; i < count; i++)
        first.push_back(merged(of(a, first_a, i), of(b, first_b, i), place));
    if (count > 0) out["prefixItems"] = first;
    if (a.contains("items") && b.contains("items"))
        out["items"] = merged(a["items"], b["items"], place);
}

// [3] One of two ----------------------------------------------------------------------------------

// Where their types differ, or their values, or those of a property that both require.
bool Schemas::exclusive(const ordered& left, const ordered& right, const std::string& place,
                        int levels) {
    charge(20, place);
    if (levels == 0) return false;
    for (const auto& [one, other] : {std::pair(&left, &right), std::pair(&right, &left)}) {
        if (*one == false) return true;
        if (one->contains("nullable"))
            return exclusive(without_nullable(*one), *other, place, levels - 1);
        if (one->contains("$ref"))
            return exclusive(resolve(*one, place), *other, place, levels - 1);
        for (const char* keyword : {"anyOf", "oneOf"}) {
            const ordered& branches = member(*one, keyword);
            if (!branches.is_array()) continue;
            return std::all_of(branches.begin(), branches.end(), [&](const ordered& branch) {
                return exclusive(branch, *other, place, levels - 1);
            });
        }
    }
    if (!left.is_object() || !right.is_object()) return false;
    const auto values = [](const ordered& schema) {
        if (schema.contains("const")) return ordered::array({schema["const"]});
        return ordered(member(schema, "enum"));
    };
    const ordered values_left = values(left), values_right = values(right);
    if (values_left.is_array() && values_right.is_array()) {
        charge(values_left.size() * values_right.size(), place);
        return std::none_of(values_left.begin(), values_left.end(),
                            [&](const ordered& value) { return has(values_right, value); });
    }
    if (share_no_type(left, right, place)) return true;
    const std::vector<std::string> object{"object"};
    if (types_of(left, place) != object || types_of(right, place) != object) return false;
    const ordered &required = member(left, "required"), &also = member(right, "required");
    if (!required.is_array() || !also.is_array()) return false;
    return std::any_of(required.begin(), required.end(), [&](const ordered& name) {
        charge(1 + also.size() + member(left, "properties").size() / 8, place);
        if (!name.is_string() || !has(also, name)) return false;
        const auto& key = name.get_ref<const std::string&>();
        const ordered &of_left = member(member(left, "properties"), key),
                      &of_right = member(member(right, "properties"), key);
        return !of_left.is_null() && !of_right.is_null() &&
               exclusive(of_left, of_right, place, levels - 1);
    });
}

bool Schemas::share_no_type(const ordered& a, const ordered& b, const std::string& place) const {
    const auto types = [&](const ordered& schema) {
        auto list = types_of(schema, place);
        for (std::string& type : list) {
            if (type == "integer") type = "number";
        }
        return list;
    };
    const auto of_a = types(a), of_b = types(b);
    return std::none_of(of_a.begin(), of_a.end(), [&](const std::string& type) {
        return std::count(of_b.begin(), of_b.end(), type) > 0;
    });
}

}  // namespace gemma
