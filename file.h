// SPDX-License-Identifier: Apache-2.0
//
// file.h: a file of a model's directory, mapped, and its JSON. Beside the path.
//
// checkpoint.cpp and the tokenizer read all their files through these. No file is trusted: what is
// wrong with one is an Error that names the file, what was found and what is expected.
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace gemma {

using json = nlohmann::json;

[[noreturn]] void reject(const std::string& where, const std::string& found,
                         const std::string& expected);

// A value for an error message: ASCII, one line, at most 160 characters.
std::string brief(const json& value);

bool is_there(const std::string& path);

// A regular file, mapped read-only. A Git LFS pointer, which stands where the file should, is
// rejected.
struct File {
    std::string path;
    std::string_view bytes;

    explicit File(const std::string& name);
    File(const File&) = delete;
    ~File();
};

// A file's only JSON object. Rejects anything behind it, a repeated key, of which the library would
// keep the last value, and JSON so deep or long that a small file could take much memory (a 27B's
// header has 22,000 events). `keep` sees each event, as nlohmann's parser_callback_t; what it
// refuses does not become a part of the result.
json parse_json(
    const std::string& path, std::string_view bytes, int most_events = 1 << 18,
    const json::parser_callback_t& keep = [](int, json::parse_event_t, json&) { return true; });

}  // namespace gemma
