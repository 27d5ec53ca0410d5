// SPDX-License-Identifier: Apache-2.0
//
// container.cpp: reads what the kernel says of this process's cgroups. Beside the path. The files
// are described in the kernel's documentation, cgroup-v1 and cgroup-v2, and in proc(5).
#include "container.h"

#include <sched.h>
#include <unistd.h>

#include <charconv>
#include <cmath>
#include <fstream>
#include <iterator>
#include <sstream>
#include <thread>
#include <vector>

namespace gemma {

namespace {

constexpr double no_limit = std::numeric_limits<double>::infinity();

std::vector<std::string> split(const std::string& s, char at) {
    std::vector<std::string> parts;
    std::istringstream in(s);
    for (std::string part; std::getline(in, part, at);) parts.push_back(part);
    return parts;
}

bool has(const std::string& list, const std::string& word) {
    const auto words = split(list, ',');
    return std::count(words.begin(), words.end(), word) > 0;
}

// A number above 0 that is a word of the file. "max", version 1's -1, no number at all: no limit.
double number(const std::string& path, size_t word = 0) {
    std::ifstream in(path);
    const std::vector<std::string> words{std::istream_iterator<std::string>(in), {}};
    if (word >= words.size()) return no_limit;
    const char* const end = words[word].data() + words[word].size();
    double value = 0;
    const auto [stop, error] = std::from_chars(words[word].data(), end, value);
    return error == std::errc() && stop == end && value > 0 ? value : no_limit;
}

// mountinfo writes a space as \040.
std::string without_escapes(const std::string& s) {
    std::string plain;
    for (size_t i = 0; i < s.size(); i++) {
        int code = 0;
        const char* const digits = s.data() + i + 1;
        const bool escape = s[i] == '\\' && i + 3 < s.size() &&
                            std::from_chars(digits, digits + 3, code, 8).ptr == digits + 3;
        plain += escape ? char(code) : s[i];
        if (escape) i += 3;
    }
    return plain;
}

// The directories of this process's cgroup and of those above it that are mounted. `controller` is
// version 1's; "" asks for version 2.
std::vector<std::string> cgroups(const std::string& root, const std::string& controller) {
    std::string own;  // the cgroup's path in its hierarchy
    std::ifstream of_process(root + "/proc/self/cgroup");
    for (std::string line; std::getline(of_process, line);) {  // 4:cpu,cpuacct:/path
        const size_t list = line.find(':') + 1, path = line.find(':', list) + 1;
        if (list == 0 || path == 0) continue;
        const std::string controllers = line.substr(list, path - list - 1);
        if (controller.empty() ? controllers.empty() : has(controllers, controller))
            own = line.substr(path);
    }
    std::vector<std::string> directories;
    std::ifstream mounts(root + "/proc/self/mountinfo");
    for (std::string line; !own.empty() && std::getline(mounts, line);) {
        // 31 23 0:28 ROOT-IN-THE-HIERARCHY MOUNT-POINT rw - cgroup cgroup rw,memory
        const size_t dash = line.find(" - ");
        if (dash == std::string::npos) continue;
        const auto left = split(line.substr(0, dash), ' '),
                   right = split(line.substr(dash + 3), ' ');
        if (left.size() < 5 || right.size() < 3) continue;
        const bool wanted = controller.empty() ? right[0] == "cgroup2"
                                               : right[0] == "cgroup" && has(right[2], controller);
        std::string top = without_escapes(left[3]);
        if (top == "/") top = "";
        if (!wanted || !(own + "/").starts_with(top + "/")) continue;
        // Also those that are not there: a container may see the path of the host.
        for (std::string path = own.substr(top.size()); !path.empty(); path.resize(path.rfind('/')))
            directories.push_back(root + without_escapes(left[4]) + path);
        directories.push_back(root + without_escapes(left[4]));
    }
    return directories;
}

}  // namespace

CgroupLimits read_cgroups(const std::string& root) {
    CgroupLimits limits;
    const auto limit_memory = [&](const std::string& file) {
        limits.memory = std::min(limits.memory, number(file));
    };
    const auto limit_processors = [&](double quota, double period) {
        if (quota < no_limit && period < no_limit)
            limits.processors = std::min(limits.processors, quota / period);
    };
    for (const auto& group : cgroups(root, "")) {
        limit_memory(group + "/memory.max");
        limit_memory(group + "/memory.high");  // above it the kernel slows the process down
        limit_processors(number(group + "/cpu.max"), number(group + "/cpu.max", 1));
    }
    for (const auto& group : cgroups(root, "memory"))
        limit_memory(group + "/memory.limit_in_bytes");
    for (const auto& group : cgroups(root, "cpu"))
        limit_processors(number(group + "/cpu.cfs_quota_us"), number(group + "/cpu.cfs_period_us"));
    return limits;
}

uint64_t usable_memory() {
    const double ram = double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGESIZE));
    return uint64_t(std::min(ram, read_cgroups("").memory));
}

uint64_t held_memory() {
    const double pages = number("/proc/self/statm", 1);  // resident
    return pages < no_limit ? uint64_t(pages) * uint64_t(sysconf(_SC_PAGESIZE)) : 0;
}

int usable_processors() {
    cpu_set_t set;  // a cpuset of a cgroup narrows it, too
    const int count = sched_getaffinity(0, sizeof set, &set) == 0
                          ? CPU_COUNT(&set)
                          : int(std::thread::hardware_concurrency());
    return std::max(1, int(std::min<double>(count, std::ceil(read_cgroups("").processors))));
}

}  // namespace gemma
