// SPDX-License-Identifier: Apache-2.0
//
// container.h: the memory and the processors that this process may use. Beside the path.
//
// A container limits its processes by cgroups. The kernel kills a process that takes more memory
// than its cgroup has, and stops one that takes more processor time until the next period begins.
// Neither limit is in what sysconf or std::thread say of the machine.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

namespace gemma {

// The smallest limits of this process's cgroup and of those above it, of version 1 and 2.
struct CgroupLimits {
    double memory = std::numeric_limits<double>::infinity();      // bytes; infinity: no limit
    double processors = std::numeric_limits<double>::infinity();  // processor time by time
};
// Reads ROOT/proc/self and the cgroups that are mounted below ROOT, "" outside of tests. A file
// that is missing or has no number in it sets no limit.
CgroupLimits read_cgroups(const std::string& root);

uint64_t usable_memory();  // bytes: the machine's, or a cgroup's limit if that is less
uint64_t held_memory();    // bytes that this process holds now, mapped weights included
int usable_processors();   // those this process may run on, or a cgroup's limit, rounded up

// What of so much memory the CPU engine's K and V may take, where `taken` is held already or will
// be by a step: at most half of the rest, which leaves the other half to requests and answers.
constexpr uint64_t kv_budget(uint64_t memory, uint64_t taken) {
    const uint64_t left = memory > taken ? memory - taken : 0;
    return std::min({uint64_t(4) << 30, memory / 4, left / 2});
}

}  // namespace gemma
