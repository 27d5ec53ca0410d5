// SPDX-License-Identifier: Apache-2.0
//
// file.cpp: maps a file, and parses JSON more strictly than the library does. Beside the path.
#include "file.h"
#include "gemma.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <unordered_set>

namespace gemma {

void reject(const std::string& where, const std::string& found, const std::string& expected) {
    throw Error(where + ": found " + found + ", expected " + expected);
}

std::string brief(const json& value) {
    const std::string s = value.dump(-1, ' ', true, json::error_handler_t::replace);
    return s.size() <= 160 ? s : s.substr(0, 157) + "...";
}

bool is_there(const std::string& path) { return access(path.c_str(), F_OK) == 0; }

File::File(const std::string& name) : path(name) {
    const int fd = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);  // a FIFO: no waiting
    if (fd < 0) reject(path, std::strerror(errno), "a readable file");
    struct stat s = {};
    const bool regular = fstat(fd, &s) == 0 && S_ISREG(s.st_mode);
    const size_t size = regular ? s.st_size : 0;
    void* const data = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);  // fails for size 0
    close(fd);
    if (!regular) reject(path, "no regular file", "one");
    if (data == MAP_FAILED) reject(path, text("%zu bytes", size), "a file that can be mapped");
    bytes = {static_cast<const char*>(data), size};
    if (bytes.starts_with("version https://git-lfs.github.com/spec/")) {
        munmap(data, size);  // the destructor of an object that is not made does not run
        reject(path, "a Git LFS pointer", "the file that it stands for: git lfs pull");
    }
}

File::~File() { munmap(const_cast<char*>(bytes.data()), bytes.size()); }

json parse_json(const std::string& path, std::string_view bytes, int most_events,
                const json::parser_callback_t& keep) {
    // The library takes a NUL for the end, and would not look at what follows it.
    if (const size_t nul = bytes.find('\0'); nul != bytes.npos)
        reject(path, text("a NUL byte at %zu", nul), "a JSON object");
    std::vector<std::unordered_set<std::string>>
        keys;  // one set for each object that is still open
    int events = 0;
    const auto check_event = [&](int depth, json::parse_event_t event, json& value) {
        if (event == json::parse_event_t::object_start) keys.emplace_back();
        if (event == json::parse_event_t::object_end) keys.pop_back();
        if (event == json::parse_event_t::key && !keys.back().insert(value).second)
            reject(path, "the key " + brief(value) + " twice", "each key once");
        if (depth > 8 || ++events > most_events) reject(path, "JSON too deep or too long", "less");
        return keep(depth, event, value);
    };
    try {
        json parsed = json::parse(bytes, check_event);
        if (!parsed.is_object()) reject(path, brief(parsed), "a JSON object");
        return parsed;
    } catch (const json::exception& e) {
        const std::string what = e.what();  // "[json.exception.NAME] parse error at line 1, ..."
        reject(path, brief(what.substr(what.find("] ") + 2)), "a JSON object");
    }
}

}  // namespace gemma
