// SPDX-License-Identifier: Apache-2.0
//
// structured.cpp: the fields that say what a text must be. Beside the path.
#include "structured.h"

#include <algorithm>
#include <optional>

#include "fields.h"

namespace gemma {

namespace {

using ordered = nlohmann::ordered_json;

// nlohmann's objects that keep their order are searched from end to end, so these limits keep the
// time of a hostile schema below 0.2 s.
constexpr size_t most_schema_bytes = 256 << 10, most_members = 10'000;

// The text of a member of the object that `text` is, which is valid JSON: the last of that name.
std::string_view member_text(std::string_view text, const std::string& name) {
    std::string_view found;
    std::optional<std::string> key;
    size_t begun = 0;  // where the last value at depth 1 begins
    int depth = 0;
    for (size_t i = 0; i < text.size(); i++) {
        const char c = text[i];
        if (c == '"') {
            const size_t start = i;
            for (i++; text[i] != '"'; i++) i += text[i] == '\\';
            if (depth == 1 && !key)
                key = json::parse(text.substr(start, i + 1 - start)).get<std::string>();
        } else if (c == ':' && depth == 1) {
            begun = i + 1;
        } else if ((c == ',' || c == '}') && depth == 1) {
            if (key == name) found = text.substr(begun, i - begun);
            key.reset();
        }
        depth += c == '{' || c == '[';
        depth -= c == '}' || c == ']';
    }
    return found;
}

ordered parse_ordered(std::string_view text, const char* param) {
    const size_t members = count_members(text);
    if (text.size() > most_schema_bytes || members > most_members)
        refuse(param, "%s must have at most 256 KiB and %zu members, got %zu bytes and %zu", param,
               most_members, text.size(), members);
    check_depth(text, param);
    try {
        return ordered::parse(text);
    } catch (const ordered::exception&) {
        refuse(param, "%s is not valid JSON", param);
    }
}

// A field of a request that is neither absent nor null.
const json* given(const json& fields, const char* name) {
    const auto found = fields.find(name);
    return found == fields.end() || found->is_null() ? nullptr : &*found;
}

// One kind of constraint: what its value asks for. A `json` may be the text of a schema.
std::shared_ptr<Grammar> make_grammar(Grammars& grammars, const std::string& kind,
                                      const ordered& value, const char* param) {
    const auto need = [&](bool met, const char* wanted) {
        if (!met) refuse(param, "%s must be %s, got %s", param, wanted, show(json(value)).c_str());
    };
    if (kind == "json") {
        const ordered schema =
            value.is_string() ? parse_ordered(value.get_ref<const std::string&>(), param) : value;
        need(schema.is_object() || schema.is_boolean(), "a JSON schema");
        return grammars.find_or_make("json " + schema.dump(),
                                     [&] { return Grammar::of_schema(schema, param); });
    }
    if (kind == "json_object") {
        need(value == true, "true");
        return grammars.find_or_make("json_object", [&] { return Grammar::of_object(param); });
    }
    if (kind == "regex") {
        need(value.is_string() && value != "", "a regular expression");
        const std::string pattern = value;
        return grammars.find_or_make("regex " + pattern,
                                     [&] { return Grammar::of_regex(pattern, param); });
    }
    const auto good = [](const ordered& one) { return one.is_string() && one != ""; };
    need(value.is_array() && !value.empty() && std::all_of(value.begin(), value.end(), good),
         "a list of at least one string, none of them empty");
    return grammars.find_or_make("choice " + value.dump(), [&] {
        return Grammar::of_choices(value.get<std::vector<std::string>>(), param);
    });
}

// What response_format says, as a kind and its value; "" is any text.
std::pair<std::string, ordered> of_response_format(const ordered& format) {
    const char* const param = "response_format";
    const ordered type = format.is_object() ? format.value("type", ordered()) : ordered();
    if (type == "text") return {};
    if (type == "json_object") return {"json_object", true};
    if (type != "json_schema")
        refuse(param, "response_format.type must be text, json_object or json_schema, got %s",
               show(json(format.is_object() ? type : format)).c_str());
    const ordered wrapper = format.value("json_schema", ordered());
    if (!wrapper.is_object())
        refuse(param,
               "When response_format type is 'json_schema', the 'json_schema' field must be "
               "provided.");
    const ordered schema = wrapper.value("schema", ordered());
    if (!schema.is_object())
        refuse(param, "response_format.json_schema.schema must be a JSON schema, got %s",
               show(json(schema)).c_str());
    return {"json", schema};
}

// The one kind that structured_outputs names.
std::pair<std::string, ordered> of_structured_outputs(const ordered& fields) {
    const char* const param = "structured_outputs";
    std::pair<std::string, ordered> found;
    if (!fields.is_object())
        refuse(param, "%s must be an object, got %s", param, show(json(fields)).c_str());
    for (const auto& [name, value] : fields.items()) {
        if (value.is_null() || value == false || name == "disable_fallback") continue;
        if (name != "json" && name != "regex" && name != "choice" && name != "json_object")
            refuse(param,
                   "structured_outputs.%.100s is not supported by this server: json, regex, "
                   "choice and json_object are",
                   name.c_str());
        if (!found.first.empty())
            refuse(param,
                   "You can only use one kind of constraints for structured outputs ('json', "
                   "'regex' or 'choice').");
        found = {name, value};
    }
    if (found.first.empty())
        refuse(param,
               "You must use one kind of structured outputs constraint but none are "
               "specified: %s",
               show(json(fields)).c_str());
    return found;
}

// Refuses a function's schema by the name that the client knows: tools[i].function.parameters. In
// the schema of all calls the fault has a place that the client never wrote.
void check_schemas(const Tools& tools) {
    for (size_t i = 0; i < tools.offered.size(); i++) {
        const ordered schema = tools.offered[i].value("parameters", ordered());
        const std::string place = gemma::text("tools[%zu].function.parameters", i);
        try {
            if (schema.is_object()) Grammar::of_schema(schema, place.c_str());
        } catch (Refusal& refusal) {
            refusal.param = "tools";
            throw;
        }
    }
}

}  // namespace

size_t count_members(std::string_view text) {  // the colons that are in no string
    size_t colons = 0;
    for (size_t i = 0; i < text.size(); i++) {
        colons += text[i] == ':';
        if (text[i] != '"') continue;
        for (i++; i < text.size() && text[i] != '"'; i++) i += text[i] == '\\';
    }
    return colons;
}

ordered ordered_field(const std::string& text, const char* name) {
    return parse_ordered(member_text(text, name), name);
}

std::shared_ptr<Grammar> asked_grammar(Grammars& grammars, const Request& r, const json& body,
                                       const std::string& text) {
    std::pair<std::string, ordered> asked;  // the kind, and its value
    const char* param = "";
    for (const char* name : {"response_format", "structured_outputs", "guided_json", "guided_regex",
                             "guided_choice"}) {
        if (!given(body, name)) continue;
        const ordered value = ordered_field(text, name);
        const std::string field = name;
        const auto next = field == "response_format"      ? of_response_format(value)
                          : field == "structured_outputs" ? of_structured_outputs(value)
                                                          : std::pair(field.substr(7), value);
        if (next.first.empty()) continue;
        if (!asked.first.empty() && field.starts_with("guided_"))
            refuse(name,
                   "You can only use one kind of guided decoding ('guided_json', "
                   "'guided_regex' or 'guided_choice').");
        if (!asked.first.empty())
            refuse(name,
                   "You can only use one kind of constraints for structured outputs ('json', "
                   "'regex' or 'choice').");
        asked = next;
        param = name;
    }
    const bool is_called = r.tools && r.tools->choice != Tools::Choice::automatic;
    if (is_called && !asked.first.empty() && param != std::string("response_format"))
        refuse(param,
               "You can only either use constraints for structured outputs or tools, not both.");
    if (is_called || (r.tools && param == std::string("response_format"))) {
        const ordered any{{"type", "object"}};
        const ordered document = asked.first == "json" ? asked.second : any;
        asked = {"json", calls_schema(*r.tools, is_called ? ordered() : document)};
        if (is_called) param = "tools";
    }
    if (asked.first.empty()) return nullptr;
    if (!r.allowed_token_ids.empty())
        refuse("allowed_token_ids", "allowed_token_ids cannot be given together with %s", param);
    try {
        return make_grammar(grammars, asked.first, asked.second, param);
    } catch (const Refusal&) {
        if (r.tools) check_schemas(*r.tools);
        throw;
    }
}

}  // namespace gemma
