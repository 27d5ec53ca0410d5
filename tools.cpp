// SPDX-License-Identifier: Apache-2.0
//
// tools.cpp: the functions that a request offers. Beside the path.
//
//   [1] Fields  tools, tool_choice, parallel_tool_calls
//   [2] Schema  of what may be written where a call is required
#include "tools.h"

#include <algorithm>

#include "fields.h"
#include "structured.h"

namespace gemma {

using ordered = nlohmann::ordered_json;

constexpr size_t most_tools = 128;  // as OpenAI's

// [1] Fields --------------------------------------------------------------------------------------

bool Tools::has(std::string_view name) const {
    return std::any_of(offered.begin(), offered.end(),
                       [&](const ordered& one) { return one["name"] == name; });
}

bool Tools::has_prefix(std::string_view start) const {
    return std::any_of(offered.begin(), offered.end(), [&](const ordered& one) {
        return one["name"].get_ref<const std::string&>().starts_with(start);
    });
}

std::string Tools::parameter(std::string_view function, size_t index) const {
    for (const ordered& one : offered) {
        if (one["name"] != function) continue;
        const auto schema = one.find("parameters");
        if (schema == one.end() || !schema->is_object()) return "";
        const auto properties = schema->find("properties");
        if (properties == schema->end() || index >= properties->size()) return "";
        return properties->is_object() ? std::next(properties->begin(), ptrdiff_t(index)).key()
                                       : "";
    }
    return "";
}

namespace {

// A name must be told apart from what stands around it in a call.
bool is_name(const ordered& name) {
    const auto plain = [](char c) {
        return std::isalnum(uint8_t(c)) || c == '_' || c == '-' || c == '.';
    };
    if (!name.is_string() || name == "") return false;
    const auto& s = name.get_ref<const std::string&>();
    return s.size() <= 128 && std::all_of(s.begin(), s.end(), plain);
}

ordered parse_offered(const ordered& list) {
    const auto shown = [](const ordered& value) { return show(json(value)); };
    if (list.empty())
        refuse("tools",
               "`tools` must not be an empty array. Either provide at least one tool or omit the "
               "field entirely.");
    if (list.size() > most_tools)
        refuse("tools", "tools must be at most %zu, got %zu", most_tools, list.size());
    ordered offered = ordered::array();
    for (size_t i = 0; i < list.size(); i++) {
        const ordered& tool = list[i];
        if (!tool.is_object() || tool.value("type", ordered("function")) != "function")
            refuse("tools", "tools[%zu] must be of the type function, got %s", i,
                   shown(tool).c_str());
        const ordered function = tool.value("function", ordered());
        if (!function.is_object())
            refuse("tools", "tools[%zu].function must be an object, got %s", i,
                   shown(function).c_str());
        const ordered name = function.value("name", ordered());
        if (!is_name(name))
            refuse("tools",
                   "tools[%zu].function.name must have 1 to 128 of A-Z, a-z, 0-9, _, - and ., "
                   "got %s",
                   i, shown(name).c_str());
        const ordered schema = function.value("parameters", ordered());
        const bool good = schema.is_object() && schema.value("type", ordered("object")) == "object";
        if (!schema.is_null() && !good)
            refuse("tools",
                   "tools[%zu].function.parameters must be a JSON schema of the type object, got "
                   "%s",
                   i, shown(schema).c_str());
        offered.push_back(function);
    }
    return offered;
}

// In vLLM's words.
std::string parse_named(const Tools& tools, const json& choice) {
    const char* const usage =
        R"(Correct usage: `{"type": "function", "function": {"name": "my_function"}}`)";
    const json function = choice.value("function", json());
    if (!function.is_object())
        refuse("tool_choice", "Invalid value for `function`: `%s` in `tool_choice`! %s",
               show(function).c_str(), usage);
    if (!function.contains("name"))
        refuse("tool_choice", "Expected field `name` in `function` in `tool_choice`! %s", usage);
    const json& name = function["name"];
    if (!name.is_string() || name == "")
        refuse("tool_choice", "Invalid `name` in `function`: `%s` in `tool_choice`! %s",
               show(name).c_str(), usage);
    if (!tools.has(name.get_ref<const std::string&>()))
        refuse("tool_choice",
               "The tool specified in `tool_choice` does not match any of the specified `tools`");
    return name;
}

}  // namespace

std::shared_ptr<const Tools> parse_tools(const json& body, const std::string& text, bool parallel) {
    const json none, choice = body.value("tool_choice", none);
    const json list = body.value("tools", none);
    const bool is_absent = list.is_null();
    if (!is_absent && !list.is_array())
        refuse("tools", "tools must be a list of functions, got %s", show(list).c_str());
    if (choice == "none") return nullptr;
    if (is_absent && !choice.is_null())
        refuse("tool_choice", "When using `tool_choice`, `tools` must be set.");
    if (is_absent) return nullptr;
    auto tools = std::make_shared<Tools>();
    tools->offered = parse_offered(ordered_field(text, "tools"));
    if (!choice.is_null() && !choice.is_object() && choice != "auto" && choice != "required")
        refuse("tool_choice",
               "Invalid value for `tool_choice`: %s! Only named tools, \"none\", \"auto\" or "
               "\"required\" are supported.",
               show(choice).c_str());
    if (choice.is_object()) tools->named = parse_named(*tools, choice);
    tools->choice = choice == "required" ? Tools::Choice::required
                    : choice.is_object() ? Tools::Choice::named
                                         : Tools::Choice::automatic;
    tools->parallel = parallel;
    // Where a grammar makes the answer JSON, the prompt must ask for JSON.
    const json format = body.value("response_format", none);
    const bool has_document = format.is_object() && format.value("type", json()) != "text";
    tools->in_json = tools->choice != Tools::Choice::automatic || has_document;
    return tools;
}

// [2] Schema --------------------------------------------------------------------------------------

namespace {

// A schema whose own references are to what stands at `place` of a larger one.
ordered moved(ordered schema, const std::string& place) {
    for (auto& [key, value] : schema.items()) {
        const std::string& name = key;
        const bool is_value =
            name == "const" || name == "enum" || name == "default" || name == "examples";
        const bool has_names = name == "properties" || name == "$defs" || name == "definitions";
        if (schema.is_object() && name == "$ref" && value.is_string()) {
            const std::string target = value;
            if (target == "#" || target.starts_with("#/")) value = place + target.substr(1);
        } else if (schema.is_object() && has_names && value.is_object()) {
            for (auto& [property, one] : value.items()) one = moved(one, place);
        } else if (value.is_structured() && !(schema.is_object() && is_value)) {
            value = moved(value, place);
        }
    }
    return schema;
}

}  // namespace

ordered calls_schema(const Tools& tools, const ordered& or_else) {
    const std::string place = or_else.is_null() ? "#" : "#/anyOf/0";
    ordered branches = ordered::array();
    for (const ordered& function : tools.offered) {
        if (!tools.named.empty() && function["name"] != tools.named) continue;
        ordered schema = function.value("parameters", ordered());
        if (schema.empty()) schema = {{"type", "object"}, {"properties", ordered::object()}};
        const std::string here =
            place + text("/items/anyOf/%zu/properties/parameters", branches.size());
        branches.push_back(
            {{"type", "object"},
             {"properties",
              {{"name", {{"const", function["name"]}}}, {"parameters", moved(schema, here)}}},
             {"required", {"name", "parameters"}},
             {"additionalProperties", false}});
    }
    // The upper bound is for models that would call for ever.
    const int most = tools.parallel && tools.named.empty() ? 32 : 1;
    const ordered calls{
        {"type", "array"}, {"items", {{"anyOf", branches}}}, {"minItems", 1}, {"maxItems", most}};
    if (or_else.is_null()) return calls;
    return {{"anyOf", {calls, moved(or_else, "#/anyOf/1")}}};
}

}  // namespace gemma
