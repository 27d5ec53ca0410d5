// SPDX-License-Identifier: Apache-2.0
//
// container_test.cpp: limits of made-up cgroups, which need no root, and what becomes of them.
#include "container.h"

#include <sched.h>
#include <unistd.h>

#include "test.h"

namespace {

namespace fs = std::filesystem;
using namespace gemma;

const double none = std::numeric_limits<double>::infinity();

// A root directory with the given files, for as long as it lives.
struct Tree {
    fs::path root = fs::temp_directory_path() / ("gemma-container-" + std::to_string(getpid()));
    explicit Tree(const std::vector<std::pair<std::string, std::string>>& files) {
        for (const auto& [path, content] : files) {
            fs::create_directories((root / path).parent_path());
            std::ofstream(root / path) << content;
        }
    }
    ~Tree() { fs::remove_all(root); }
    CgroupLimits limits() const { return read_cgroups(root); }
};

const std::pair<std::string, std::string> v2_mount{
    "proc/self/mountinfo",
    "22 1 0:20 / / rw - ext4 /dev/sda rw\n"
    "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"};
const std::pair<std::string, std::string> v1_mounts{
    "proc/self/mountinfo",
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
    "36 31 0:33 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"};

}  // namespace

TEST_CASE("F13: version 2: the smallest limit on the way to the root", "[container]") {
    const std::string top = "sys/fs/cgroup/";
    const Tree tree({v2_mount,
                     {"proc/self/cgroup", "0::/pod/container\n"},
                     {top + "pod/container/memory.max", "max\n"},
                     {top + "pod/container/cpu.max", "max 100000\n"},
                     {top + "pod/memory.max", "80000000\n"},
                     {top + "pod/cpu.max", "150000 100000\n"},
                     {top + "memory.max", "900000000\n"},
                     {top + "other/memory.max", "1000\n"}});
    CHECK(tree.limits().memory == 80'000'000);
    CHECK(tree.limits().processors == 1.5);
    std::ofstream(tree.root / (top + "pod/container/memory.max")) << "70000000\n";
    std::ofstream(tree.root / (top + "pod/container/cpu.max")) << "50000 100000\n";
    CHECK(tree.limits().memory == 70'000'000);
    CHECK(tree.limits().processors == 0.5);
    std::ofstream(tree.root / (top + "memory.max")) << "60000000\n";
    CHECK(tree.limits().memory == 60'000'000);
    std::ofstream(tree.root / (top + "pod/memory.high")) << "50000000\n";
    CHECK(tree.limits().memory == 50'000'000);
}

TEST_CASE("F13: version 1: each controller has a hierarchy of its own", "[container]") {
    const std::string top = "sys/fs/cgroup/";
    const Tree tree({v1_mounts,
                     {"proc/self/cgroup",
                      "12:name=systemd:/user\n4:memory:/docker/abc\n3:cpuset:/\n"
                      "2:cpu,cpuacct:/quota/abc\n0::/\n"},
                     {top + "memory/docker/abc/memory.limit_in_bytes", "80000000\n"},
                     {top + "memory/memory.limit_in_bytes", "9223372036854771712\n"},
                     {top + "memory/quota/abc/memory.limit_in_bytes", "1000\n"},
                     {top + "cpu,cpuacct/quota/abc/cpu.cfs_quota_us", "-1\n"},
                     {top + "cpu,cpuacct/quota/abc/cpu.cfs_period_us", "100000\n"},
                     {top + "cpu,cpuacct/quota/cpu.cfs_quota_us", "250000\n"},
                     {top + "cpu,cpuacct/quota/cpu.cfs_period_us", "100000\n"}});
    CHECK(tree.limits().memory == 80'000'000);
    CHECK(tree.limits().processors == 2.5);
}

TEST_CASE("F13: what a container sees of its cgroup is mounted in several ways", "[container]") {
    const std::string mount = " - cgroup2 cgroup2 rw\n";
    const std::vector<std::array<std::string, 3>> seen{
        // the path in the hierarchy, the mount's root and point, where the limit is then
        {"/", "/ /sys/fs/cgroup", "sys/fs/cgroup"},                            // a namespace
        {"/docker/abc", "/docker/abc /sys/fs/cgroup", "sys/fs/cgroup"},        // a bind mount
        {"/docker/abc/in", "/docker/abc /sys/fs/cgroup", "sys/fs/cgroup/in"},  // a cgroup below it
        {"/docker/abc", "/docker /sys/fs/cgroup", "sys/fs/cgroup/abc"},
        {"/docker/abc", "/ /sys/fs/cgroup", "sys/fs/cgroup"},  // the host's path, which is not here
        {"/../..", "/ /sys/fs/cgroup", "sys/fs/cgroup"},
        {"/a b", "/a\\040b /my\\040cgroups", "my cgroups"},
    };
    for (const auto& [path, root_and_point, directory] : seen) {
        INFO(path << " " << root_and_point);
        const Tree tree({{"proc/self/cgroup", "0::" + path + "\n"},
                         {"proc/self/mountinfo", "31 23 0:28 " + root_and_point + " rw" + mount},
                         {directory + "/memory.max", "80000000"}});
        CHECK(tree.limits().memory == 80'000'000);
    }
    // Another cgroup that is mounted is none of this process's.
    const Tree other({{"proc/self/cgroup", "0::/docker/abc\n"},
                      {"proc/self/mountinfo", "31 23 0:28 /docker/ab /sys/fs/cgroup rw" + mount},
                      {"sys/fs/cgroup/memory.max", "80000000"}});
    CHECK(other.limits().memory == none);
}

TEST_CASE("F13: files that are missing, empty or garbage set no limit", "[container]") {
    const std::string top = "sys/fs/cgroup/";
    const auto unlimited = [](const Tree& tree) {
        return tree.limits().memory == none && tree.limits().processors == none;
    };
    CHECK(unlimited(Tree({})));
    CHECK(unlimited(Tree({v2_mount})));
    CHECK(unlimited(Tree({v2_mount, {"proc/self/cgroup", "0::/a\n"}})));
    CHECK(unlimited(Tree({{"proc/self/cgroup", "0::/a\n"}, {top + "memory.max", "1000"}})));
    for (const char* cgroup : {"", "\n\n", "0", "0:", ":", "::", "0::", "4:memory\n", "\xff\xfe"}) {
        INFO(cgroup);
        CHECK(unlimited(Tree({v2_mount, {"proc/self/cgroup", cgroup}, {top + "a", "1"}})));
    }
    for (const char* mounts :
         {"", " - ", "31 23 - cgroup2 cgroup2 rw\n", "31 23 0:28 / /sys/fs/cgroup - cgroup2\n",
          "31 23 0:28 / /sys/fs/cgroup rw cgroup2 cgroup2 rw\n",
          "31 23 0:28 \\ /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"}) {
        INFO(mounts);
        CHECK(unlimited(Tree({{"proc/self/cgroup", "0::/\n"},
                              {"proc/self/mountinfo", mounts},
                              {top + "memory.max", "1000"}})));
    }
    for (const char* value : {"", "max", "-1", "0", "banana", "1e", "12MB", "nan", "inf", "\xff"}) {
        INFO(value);
        CHECK(unlimited(Tree({v2_mount,
                              {"proc/self/cgroup", "0::/\n"},
                              {top + "memory.max", value},
                              {top + "memory.high", value},
                              {top + "cpu.max", value + std::string(" 100000")}})));
        CHECK(unlimited(Tree({v2_mount,
                              {"proc/self/cgroup", "0::/\n"},
                              {top + "cpu.max", std::string("100000 ") + value}})));
    }
}

TEST_CASE("F13: K and V take no more than what the container has left", "[container]") {
    constexpr uint64_t MB = 1'000'000, GB = 1000 * MB;
    CHECK(kv_budget(80 * MB, 22 * MB) == 20 * MB);  // the demo: 42 of 80 MB when all pages are used
    CHECK(kv_budget(800 * MB, 700 * MB) == 50 * MB);
    CHECK(kv_budget(700 * MB, 700 * MB) == 0);
    CHECK(kv_budget(700 * MB, 701 * MB) == 0);
    CHECK(kv_budget(8 * GB, 1 * GB) == 2 * GB);
    CHECK(kv_budget(64 * GB, 2 * GB) == uint64_t(4) << 30);
}

TEST_CASE("this process holds memory, and may use a processor", "[container]") {
    CHECK(held_memory() > 1 << 20);
    CHECK(usable_memory() > held_memory());
    const std::vector<char> more(32 << 20, 1);
    CHECK(held_memory() > 32 << 20);
    CHECK(usable_processors() >= 1);
    // D3: no more than those that the process may run on.
    cpu_set_t before, one;
    REQUIRE(sched_getaffinity(0, sizeof before, &before) == 0);
    CHECK(usable_processors() <= CPU_COUNT(&before));
    CPU_ZERO(&one);
    for (int i = 0; i < CPU_SETSIZE && CPU_COUNT(&one) == 0; i++) {
        if (CPU_ISSET(i, &before)) CPU_SET(i, &one);
    }
    REQUIRE(sched_setaffinity(0, sizeof one, &one) == 0);
    CHECK(usable_processors() == 1);
    REQUIRE(sched_setaffinity(0, sizeof before, &before) == 0);
}
