// SPDX-License-Identifier: Apache-2.0
//
// Shared by all tests: Catch2 2 (Debian 12) or 3 (Debian 13), and a skip that prints its reason.
#pragma once

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
using Catch::Approx;
#else
#include <catch2/catch.hpp>
#endif

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "gemma.h"
#include "http.h"
#include "scheduler.h"
#include "tokenizer.h"

// The repository's directory, from which tests read demo/model and tests/golden. CMake compiles it
// in; $GEMMA_SOURCE_DIR overrides it for tests that were built on another machine.
inline const std::filesystem::path repository =
    std::getenv("GEMMA_SOURCE_DIR") ? std::getenv("GEMMA_SOURCE_DIR") : GEMMA_SOURCE_DIR;

// Catch2 2 has no SKIP: print the reason, which ctest's log keeps, and let the test pass.
#define SKIP_BECAUSE(reason)                                       \
    do {                                                           \
        std::printf("skipped: %s\n", std::string(reason).c_str()); \
        SUCCEED("skipped: " << reason);                            \
        return;                                                    \
    } while (0)

inline std::string read_file(const std::filesystem::path& path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) throw std::runtime_error("cannot read " + path.string());
    return {std::istreambuf_iterator<char>(in), {}};
}
