// SPDX-License-Identifier: Apache-2.0
//
// literals.h: what a model writes as the value of an argument. Beside the path.
#pragma once

#include <string>
#include <string_view>

namespace gemma {

inline bool is_space(char c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; }
inline bool is_quote(char c) { return c == '"' || c == '\''; }

// The value of a literal of Python or JSON, as JSON text: True is true, (1, 2) is [1,2], 'a' "b" is
// "ab". A number keeps its digits. What is no literal is a string.
std::string literal_to_json(std::string_view literal);

struct Escape {
    size_t size = 0;  // of its text; 0: more must come
    std::string meaning;
};
// An escape of a string, from its backslash on. One that neither language has stands for itself.
Escape read_escape(std::string_view text);

}  // namespace gemma
