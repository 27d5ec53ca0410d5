// SPDX-License-Identifier: Apache-2.0
//
// structured.h: the fields that say what a text must be. Beside the path; grammar.h has the rest.
#pragma once

#include <memory>
#include <string>

#include "grammar.h"
#include "request.h"

namespace gemma {

// What response_format, structured_outputs or vLLM's older guided_* ask for; null: any text. Throws
// a Refusal that names the field. text: the body as it came, which has the properties' order.
std::shared_ptr<Grammar> asked_grammar(Grammars& grammars, const Request& r, const json& body,
                                       const std::string& text);
size_t count_members(std::string_view text);  // of all objects in a JSON text
// A field of the object that `text` is, which is valid JSON, with its members' order. Throws a
// Refusal where it has more than 256 KiB or 10,000 members.
nlohmann::ordered_json ordered_field(const std::string& text, const char* name);

}  // namespace gemma
