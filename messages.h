// SPDX-License-Identifier: Apache-2.0
//
// messages.h: OpenAI's messages as Gemma's template takes them. Beside the path.
#pragma once

#include "tools.h"

namespace gemma {

// The text of a content that make_turns returned.
std::string text_of(const json& content);

// Messages of the roles that the template has, their contents text or lists of parts that are text.
// Calls and results of tools become text, and what is offered stands before the first question.
// Throws a Refusal that names the message; what the template refuses is left as it is.
json make_turns(json messages, const Tools* tools);

}  // namespace gemma
