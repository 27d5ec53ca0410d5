// SPDX-License-Identifier: Apache-2.0
//
// flags.h: from a command line, the environment and a file to Options. Beside the path.
#pragma once

#include <string>
#include <vector>

#include "server.h"

namespace gemma {

// Throws an Error for whatever cannot be served as it is asked for. Logs in one line the flags that
// change nothing here.
Options parse_flags(const std::vector<std::string>& args);
std::string help();

}  // namespace gemma
