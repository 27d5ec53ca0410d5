// SPDX-License-Identifier: Apache-2.0
//
// tools.h: the functions that a request offers to the model. Beside the path: they become text of
// the prompt, and text becomes calls (calls.h). The engine never knows.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

namespace gemma {

using nlohmann::json;

struct Tools {
    enum class Choice { automatic, required, named };
    Choice choice = Choice::automatic;
    bool parallel = true;            // may one answer have several calls?
    bool in_json = false;            // the form that the prompt asks for: JSON, else Python
    nlohmann::ordered_json offered;  // [{name, description, parameters, ...}] in the client's order
    std::string named;               // the one to call, with Choice::named

    bool has(std::string_view name) const;
    bool has_prefix(std::string_view start) const;  // of a name
    // The name of a function's parameter, by its place in the schema; "" if the schema has none
    // there.
    std::string parameter(std::string_view function, size_t index) const;
};

// What tools and tool_choice offer; null: nothing. Throws a Refusal that names the field. text: the
// body as it came, which has the order of a schema's properties. parallel: as Tools has it.
std::shared_ptr<const Tools> parse_tools(const json& body, const std::string& text, bool parallel);

// The JSON schema of a list of calls. One more branch is a document of `or_else`, unless null.
nlohmann::ordered_json calls_schema(const Tools& tools, const nlohmann::ordered_json& or_else);

}  // namespace gemma
