// SPDX-License-Identifier: Apache-2.0
//
// Tests of tools/fetch against the fake hub of hub.h: the files it leaves in the cache, how it
// resumes, each refusal, and that it gives the token to nobody but the hub.
#include "test.h"

#include "hub.h"

#include <algorithm>
#include <cctype>
#include <csignal>
#include <cstring>
#include <map>
#include <random>
#include <set>

#include <fcntl.h>
#include <pty.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

namespace fs = std::filesystem;
using Strings = std::vector<std::string>;

// [1] A model, a hub, a run -----------------------------------------------------------------------

namespace {

constexpr size_t large = 1'000'000;
const std::string name = "org/some-model", secret = "hf_TheSecretOfThisTest";
const std::string script = (repository / "tools/fetch").string();

struct Directory {
    fs::path path;
    Directory() {
        std::string made = (fs::temp_directory_path() / "gemma-fetch-XXXXXX").string();
        if (!mkdtemp(made.data())) throw std::runtime_error("no temporary directory");
        path = made;
    }
    ~Directory() {
        std::error_code ignored;
        fs::remove_all(path, ignored);
    }
    void write(const fs::path& file, const std::string& bytes) const {
        fs::create_directories((path / file).parent_path());
        std::ofstream(path / file, std::ios::binary) << bytes;
    }
};

std::string random_bytes(size_t size, unsigned seed) {
    std::mt19937 random(seed);
    std::string bytes(size, '\0');
    for (char& c : bytes) c = static_cast<char>(random());
    return bytes;
}

// A process and its output. Its environment is `variables` only.
class Process {
  public:
    Process(Strings words, const std::map<std::string, std::string>& variables,
            bool on_terminal = false) {
        int out_ends[2], err_ends[2];
        if (pipe2(out_ends, O_CLOEXEC) != 0) throw std::runtime_error("no pipe");
        if (on_terminal ? openpty(&err_ends[0], &err_ends[1], nullptr, nullptr, nullptr)
                        : pipe2(err_ends, O_CLOEXEC))
            throw std::runtime_error("no pipe");
        if (on_terminal)
            for (const int fd : err_ends) fcntl(fd, F_SETFD, FD_CLOEXEC);
        Strings environment;
        for (const auto& [key, value] : variables) environment.push_back(key + "=" + value);
        posix_spawn_file_actions_t actions;
        posix_spawn_file_actions_init(&actions);
        posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
        posix_spawn_file_actions_adddup2(&actions, out_ends[1], 1);
        posix_spawn_file_actions_adddup2(&actions, err_ends[1], 2);
        const int error = posix_spawnp(&pid, words[0].c_str(), &actions, nullptr,
                                       pointers(words).data(), pointers(environment).data());
        posix_spawn_file_actions_destroy(&actions);
        close(out_ends[1]), close(err_ends[1]);
        readers.emplace_back([this, fd = out_ends[0]] { read_all(fd, out_text); });
        readers.emplace_back([this, fd = err_ends[0]] { read_all(fd, err_text); });
        if (error) {
            for (auto& r : readers) r.join();
            throw std::runtime_error(words[0] + ": " + std::strerror(error));
        }
    }
    ~Process() {
        if (status < 0) kill(pid, SIGKILL), wait();
        for (auto& r : readers) r.join();
    }
    Process(const Process&) = delete;

    void send(int signal) const { kill(pid, signal); }

    // Waits until stderr contains these words; false if it never does.
    bool says(const std::string& words) {
        std::unique_lock lock(mutex);
        const auto found = [&] { return err_text.find(words) != std::string::npos; };
        changed.wait_for(lock, std::chrono::seconds(100), [&] { return found() || ended == 2; });
        return found();
    }
    // The exit status, or 1000 + N for signal N. Children that still run may print more.
    int wait() {
        if (int raw; status < 0 && waitpid(pid, &raw, 0) == pid)
            status = WIFEXITED(raw) ? WEXITSTATUS(raw) : 1000 + WTERMSIG(raw);
        return status;
    }
    std::string out() { return all(out_text); }
    std::string err() { return all(err_text); }

  private:
    static std::vector<char*> pointers(Strings& strings) {
        std::vector<char*> all;
        for (auto& s : strings) all.push_back(s.data());
        all.push_back(nullptr);
        return all;
    }
    void read_all(int fd, std::string& to) {
        char buffer[4096];
        for (ssize_t n; (n = read(fd, buffer, sizeof buffer)) > 0;) {
            const std::lock_guard lock(mutex);
            to.append(buffer, size_t(n));
            changed.notify_all();
        }
        close(fd);
        const std::lock_guard lock(mutex);
        ended++;
        changed.notify_all();
    }
    std::string all(const std::string& text) {  // waits until both pipes are closed
        std::unique_lock lock(mutex);
        if (!changed.wait_for(lock, std::chrono::seconds(100), [&] { return ended == 2; }))
            throw std::runtime_error("somebody may still write: " + text);
        return text;
    }

    pid_t pid = 0;
    int status = -1;
    std::mutex mutex;
    std::condition_variable changed;
    std::string out_text, err_text;
    int ended = 0;  // pipes that are closed, of the two
    std::vector<std::thread> readers;
};

struct Result {
    int status;
    std::string out, err;
};

// A fake hub with one model, and an empty cache.
struct World {
    Directory model, cache, tools;
    Hub hub{{{name, model.path}}, secret};
    std::map<std::string, std::string> variables{
        {"PATH",
         tools.path.string() + ":" + (std::getenv("PATH") ? std::getenv("PATH") : "/usr/bin:/bin")},
        {"HOME", cache.path.string()},
        {"HF_HOME", (cache.path / "hf").string()},
        {"HF_ENDPOINT", hub.address()},
        {"HF_TOKEN", secret}};

    World() {
        fake("sleep", "");  // skips the waits before retries
        model.write("config.json", R"({"model_type": "gemma3_text"})");
        model.write("generation_config.json", R"({"top_k": 64})");
        model.write("tokenizer_config.json", "{}");
        model.write("tokenizer.model", random_bytes(5000, 1));
        model.write("model.safetensors", random_bytes(large, 2));
    }

    // Puts a stand-in for a program first on the script's PATH.
    void fake(const std::string& program, const std::string& commands) const {
        tools.write(program, "#!/bin/sh\n" + commands + "\n");
        fs::permissions(tools.path / program, fs::perms(0755));
    }
    fs::path folder() const { return cache.path / "hf/hub/models--org--some-model"; }
    fs::path snapshot() { return folder() / "snapshots" / hub.commit(name); }
    std::string etag(const std::string& file) { return hub.etag(model.path / file); }
    fs::path part(const std::string& file) {
        return folder() / "blobs" / (etag(file) + ".incomplete");
    }

    std::unique_ptr<Process> start(const Strings& arguments = {name}, bool on_terminal = false) {
        Strings words{script};
        words.insert(words.end(), arguments.begin(), arguments.end());
        return std::make_unique<Process>(words, variables, on_terminal);
    }
    static Result end_of(Process& p) {
        const int status = p.wait();
        return {status, p.out(), p.err()};
    }
    Result run(const Strings& arguments = {name}) { return end_of(*start(arguments)); }
    // Runs a shell command in which "$@" is tools/fetch and the model's name.
    Result shell(const std::string& command) {
        Process p({"bash", "-c", command, "bash", script, name}, variables);
        return end_of(p);
    }
    // Files and links in the cache, except locks, relative to the model's folder.
    Strings left() const {
        Strings paths;
        if (fs::exists(folder()))
            for (const auto& entry : fs::recursive_directory_iterator(folder()))
                if (!entry.is_directory())
                    paths.push_back(entry.path().lexically_relative(folder()));
        std::sort(paths.begin(), paths.end());
        return paths;
    }
    void must_be_whole() {
        for (const auto& entry : fs::directory_iterator(snapshot())) {
            INFO(entry.path());
            CHECK(fs::read_symlink(entry) ==
                  "../../blobs/" + etag(entry.path().filename().string()));
            CHECK(read_file(entry) == read_file(model.path / entry.path().filename()));
        }
        CHECK(fs::exists(snapshot() / "config.json"));
        for (const std::string& path : left()) {
            CAPTURE(path);
            CHECK(path.find("incomplete") == std::string::npos);
        }
    }
};

// Checks that stderr is one line with "error:" and these words, and stdout is empty.
void check_error(const Result& r, const Strings& words) {
    INFO(r.err);
    CHECK(r.status == 1);
    CHECK(r.out == "");
    const size_t at = r.err.find("error: ");
    REQUIRE(at != std::string::npos);
    CHECK(std::count(r.err.begin() + long(at), r.err.end(), '\n') == 1);
    CHECK(r.err.back() == '\n');
    for (const std::string& w : words) {
        CAPTURE(w);
        CHECK(r.err.find(w, at) != std::string::npos);
    }
    CHECK(r.err.find(secret) == std::string::npos);
}

void check_success(const Result& r, World& world) {
    INFO(r.err);
    REQUIRE(r.status == 0);
    CHECK(r.out == world.snapshot().string() + "\n");
    world.must_be_whole();
}

bool has(const std::string& text, const std::string& words) {
    return text.find(words) != std::string::npos;
}

Strings gets(Hub& hub) {  // "FILE RANGE" of each download since the last call
    Strings all;
    for (const auto& r : hub.requests())
        if (r.method == "GET")
            all.push_back(fs::path(r.path.substr(0, r.path.find('?'))).filename().string() + " " +
                          r.range);
    std::sort(all.begin(), all.end());
    return all;
}

}  // namespace

// [2] The cache -----------------------------------------------------------------------------------

TEST_CASE("the cache is laid out as the hub's own client does") {
    World world;
    world.model.write("README.md", "not for a server");
    world.model.write("tokenizer.json", "for transformers");
    world.model.write("pytorch_model.bin", "not read");
    const Result first = world.run();
    check_success(first, world);
    const std::string commit = world.hub.commit(name), snapshot = "snapshots/" + commit + "/";
    Strings expected{"refs/main"};
    for (const char* file : {"config.json", "generation_config.json", "tokenizer_config.json",
                             "tokenizer.json", "tokenizer.model", "model.safetensors"}) {
        expected.push_back("blobs/" + world.etag(file));
        expected.push_back(snapshot + file);
    }
    std::sort(expected.begin(), expected.end());
    CHECK(world.left() == expected);
    CHECK(world.etag("config.json").size() == 40);
    CHECK(world.etag("model.safetensors").size() == 64);
    CHECK(read_file(world.folder() / "refs/main") == commit);
    // All may read the cache; only the owner may write.
    for (const auto& entry : fs::recursive_directory_iterator(world.folder())) {
        if (entry.is_symlink()) continue;
        INFO(entry.path());
        CHECK((fs::status(entry).permissions() & fs::perms(0777)) ==
              (entry.is_directory() ? fs::perms(0755) : fs::perms(0644)));
    }
    // The hub gets the token with each request, the CDN never.
    for (const auto& r : world.hub.requests()) CHECK(r.authorized == (r.server == "hub"));
    // Without a terminal progress is printed as lines, at most eleven.
    CHECK(has(first.err, "  100 %: 1.0 MB of 1.0 MB\n"));
    CHECK(!has(first.err, "\r"));

    setenv("HF_HOME", world.variables["HF_HOME"].c_str(), 1);
    unsetenv("HF_HUB_CACHE");
    CHECK(gemma::find_model(name) == world.snapshot());
    unsetenv("HF_HOME");

    SECTION("what is there is not fetched again") {
        check_success(world.run(), world);
        for (const auto& r : world.hub.requests()) {
            CHECK(r.method == "HEAD");
            CHECK(fs::path(r.path).filename() == "config.json");
        }
    }
    SECTION("a commit that is there needs no network") {
        check_success(world.run({name, "--revision", commit}), world);
        CHECK(world.hub.requests().empty());
    }
    SECTION("the name may come from the environment") {
        world.variables["MODEL_NAME"] = name;
        check_success(world.run({}), world);
        world.variables.erase("MODEL_NAME");
        check_error(world.run({}), {"google/gemma-3-1b-it"});
    }
    SECTION("a new commit: its own snapshot, and only what has changed is fetched") {
        const fs::path before = world.snapshot();
        world.model.write("config.json", R"({"model_type": "gemma3_text", "new": 1})");
        check_success(world.run(), world);
        CHECK(gets(world.hub) == Strings{"config.json "});
        CHECK(world.snapshot() != before);
        CHECK(fs::exists(before / "config.json"));
        CHECK(read_file(world.folder() / "refs/main") == world.hub.commit(name));
    }
}

TEST_CASE("where the cache is") {
    World world;
    world.variables.erase("HF_HOME");
    const auto lies_in = [&](const std::string& below) {
        const Result r = world.run();
        INFO(r.err);
        CHECK(r.status == 0);
        CHECK(r.out == (world.cache.path / below / "models--org--some-model/snapshots").string() +
                           "/" + world.hub.commit(name) + "\n");
    };
    lies_in(".cache/huggingface/hub");
    world.variables["XDG_CACHE_HOME"] = (world.cache.path / "xdg").string();
    lies_in("xdg/huggingface/hub");
    world.variables["XDG_CACHE_HOME"] = "~/xdg2";
    lies_in("xdg2/huggingface/hub");
    world.variables["HF_HOME"] = "~/home";
    lies_in("home/hub");
    world.variables["HF_HOME"] = "~";
    lies_in("hub");
    world.variables["HUGGINGFACE_HUB_CACHE"] = "~/old";
    lies_in("old");
    world.variables["HF_HUB_CACHE"] = (world.cache.path / "with a space").string();
    lies_in("with a space");
}

TEST_CASE("shards are those that the index names") {
    World world;
    fs::remove(world.model.path / "model.safetensors");
    const Strings shards{"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"};
    for (unsigned i = 0; i < 2; i++) world.model.write(shards[i], random_bytes(large / 2, i));
    world.model.write("other.safetensors", "not named");
    world.model.write("model.safetensors.index.json",
                      R"({"metadata": {}, "weight_map": {"a.weight":")" + shards[0] +
                          R"(", "b.weight": ")" + shards[1] + R"(", "c.weight": ")" + shards[0] +
                          "\"}}\n");
    SECTION("all there") {
        check_success(world.run(), world);
        CHECK(fs::exists(world.snapshot() / shards[0]));
        CHECK(fs::exists(world.snapshot() / shards[1]));
        CHECK(!fs::exists(world.snapshot() / "other.safetensors"));
        const Result have = world.run({"--have", name});
        CHECK(have.status == 0);
        fs::remove(world.snapshot() / shards[1]);
        CHECK(world.run({"--have", name}).status == 1);
        world.hub.requests();
        check_success(world.run(), world);
        CHECK(gets(world.hub).empty());  // the blob was there already
        CHECK(fs::exists(world.snapshot() / shards[1]));
    }
    SECTION("one is missing at the hub") {
        fs::remove(world.model.path / shards[1]);
        check_error(world.run(), {name, shards[1]});
        CHECK(!fs::exists(world.snapshot()));
    }
    SECTION("an index without shards") {
        world.model.write("model.safetensors.index.json", "{}");
        check_error(world.run(), {name, "weights"});
        CHECK(!fs::exists(world.folder() / "refs/main"));
    }
}

TEST_CASE("a model without what the server needs is refused before its weights are fetched") {
    for (const char* file : {"config.json", "tokenizer.model", "model.safetensors"}) {
        World world;
        fs::remove(world.model.path / file);
        check_error(world.run(), {name, file, "safetensors"});
        CHECK(gets(world.hub).empty());
        CHECK(!fs::exists(world.snapshot()));
    }
}

TEST_CASE("D8: a tokenizer.json does without tokenizer.model") {
    World world;
    fs::remove(world.model.path / "tokenizer.model");
    check_error(world.run(), {name, "tokenizer.model or tokenizer.json"});
    world.model.write("tokenizer.json", "{}");
    check_success(world.run(), world);
    CHECK(world.run({"--have", name}).status == 0);
    fs::remove(world.snapshot() / "tokenizer.json");
    CHECK(world.run({"--have", name}).status == 1);
}

TEST_CASE("D8: a numbered set of weight files needs no index") {
    World world;
    const std::string one = "model-00001-of-00001.safetensors";
    fs::rename(world.model.path / "model.safetensors", world.model.path / one);
    check_success(world.run(), world);
    CHECK(fs::exists(world.snapshot() / one));
    CHECK(world.run({"--have", name}).status == 0);
    // Others fetch more than one such file: the set must be whole.
    const auto rename = [&](const char* to) {
        fs::rename(world.snapshot() / one, world.snapshot() / to);
    };
    rename("model-00001-of-00002.safetensors");
    CHECK(world.run({"--have", name}).status == 1);
    fs::copy_symlink(world.snapshot() / "model-00001-of-00002.safetensors",
                     world.snapshot() / "model-00002-of-00002.safetensors");
    CHECK(world.run({"--have", name}).status == 0);
}

TEST_CASE("an empty file is a file") {
    World world;
    world.model.write("added_tokens.json", "");
    check_success(world.run(), world);
    CHECK(fs::exists(world.snapshot() / "added_tokens.json"));
}

TEST_CASE("a revision") {
    World world;
    const std::string commit = world.hub.commit(name);
    SECTION("with a slash") {
        world.hub.change([&](Hub::Faults& f) { f.revisions["refs/pr/1"] = commit; });
        check_success(world.run({name, "--revision", "refs/pr/1"}), world);
        CHECK(read_file(world.folder() / "refs/refs/pr/1") == commit);
        CHECK(!fs::exists(world.folder() / "refs/main"));
        CHECK(has(world.hub.requests()[0].path, "/resolve/refs%2Fpr%2F1/config.json"));
    }
    SECTION("a commit has no name") {
        check_success(world.run({"--revision", commit, name}), world);
        CHECK(!fs::exists(world.folder() / "refs"));
        CHECK(world.run({"--have", name}).out == world.snapshot().string() + "\n");
        CHECK(world.run({"--have", name, "--revision", "main"}).status == 1);
    }
    SECTION("another commit than was asked for") {
        const std::string other(40, 'a');
        world.hub.change([&](Hub::Faults& f) { f.revisions[other] = commit; });
        check_error(world.run({name, "--revision", other}), {other, commit});
    }
    SECTION("that is not there") {
        check_error(world.run({name, "--revision", "v9"}), {name, "no revision v9"});
        CHECK(!fs::exists(world.folder()));
    }
}

TEST_CASE("a mirror sends every file itself") {
    World world;
    world.hub.change([](Hub::Faults& f) { f.plain = true; });
    check_success(world.run(), world);
    for (const auto& r : world.hub.requests()) CHECK((r.server == "hub" && r.authorized));
}

TEST_CASE("a renamed model is cached under the name that was asked for") {
    World world;
    world.hub.change([](Hub::Faults& f) { f.moved["old/name"] = name; });
    const Result r = world.run({"old/name"});
    INFO(r.err);
    CHECK(r.status == 0);
    CHECK(has(r.out, "/models--old--name/snapshots/" + world.hub.commit(name)));
}

TEST_CASE("--have prints the directory of a whole model, or nothing") {
    World world;
    const Result before = world.run({"--have", name});
    CHECK(before.status == 1);
    CHECK(before.out + before.err == "");
    world.run();
    world.hub.requests();
    const Result after = world.run({"--have", name});
    CHECK(after.status == 0);
    CHECK(after.out == world.snapshot().string() + "\n");
    CHECK(after.err == "");
    CHECK(world.hub.requests().empty());
    for (const char* file : {"config.json", "tokenizer.model", "model.safetensors"}) {
        const fs::path link = world.snapshot() / file, to = fs::read_symlink(link);
        fs::remove(link);
        CHECK(world.run({"--have", name}).status == 1);
        fs::create_symlink("../../blobs/none", link);
        CHECK(world.run({"--have", name}).status == 1);
        fs::remove(link);
        fs::create_symlink(to, link);
    }
    CHECK(world.run({"--have", name}).status == 0);
    // Without refs/main the newest snapshot that has a config.json counts.
    fs::remove(world.folder() / "refs/main");
    const std::string other = "snapshots/" + std::string(40, 'b');
    fs::create_directories(world.folder() / other);
    const auto later = fs::file_time_type::clock::now() + std::chrono::hours(1);
    fs::last_write_time(world.folder() / other, later);
    CHECK(world.run({"--have", name}).out == world.snapshot().string() + "\n");
    std::ofstream(world.folder() / other / "config.json") << "{}";
    fs::last_write_time(world.folder() / other, later);
    // The server would take this one, and it is not whole.
    CHECK(world.run({"--have", name}).status == 1);
}

// [3] Interruptions -------------------------------------------------------------------------------

TEST_CASE("an interrupted download is resumed") {
    World world;
    SECTION("within a run") {
        world.hub.change([](Hub::Faults& f) { f.breaks = {300'000, 700'000}; });
        const Result r = world.run();
        check_success(r, world);
        CHECK(has(r.err, "going on at 300.0 kB"));
        const Strings all = gets(world.hub);
        CHECK(std::count(all.begin(), all.end(), "model.safetensors bytes=300000-") == 1);
        CHECK(std::count(all.begin(), all.end(), "model.safetensors bytes=700000-") == 1);
    }
    SECTION("in the next run") {
        world.hub.change([](Hub::Faults& f) {
            f.breaks = {300'000, 300'000, 300'000, 300'000, 300'000, 300'000};
        });
        check_error(world.run(), {"model.safetensors", "300.0 kB of 1.0 MB", "again"});
        CHECK(!fs::exists(world.snapshot()));
        CHECK(!fs::exists(world.folder() / "refs"));
        CHECK(fs::file_size(world.part("model.safetensors")) == 300'000);
        world.hub.requests();
        const Result r = world.run();
        check_success(r, world);
        CHECK(has(r.err, "700.0 kB are to come"));
        CHECK(gets(world.hub) == Strings{"model.safetensors bytes=300000-"});
    }
    SECTION("from a server that ignores ranges, from the start") {
        world.hub.change([](Hub::Faults& f) { f.breaks = {300'000}, f.ignore_ranges = true; });
        const Result r = world.run();
        check_success(r, world);
        CHECK(has(r.err, "starts again"));
    }
    SECTION("while the hub is out of order for a moment") {
        world.hub.change([](Hub::Faults& f) { f.hold = 400'000; });
        const auto p = world.start();
        REQUIRE(world.hub.wait_for_hold());
        world.hub.change([](Hub::Faults& f) {
            f.hold = 0, f.breaks = {400'000}, f.hub = {503, "", "on fire", "", 3};
        });
        check_success(World::end_of(*p), world);
    }
    SECTION("but not once the hub refuses") {
        world.hub.change([](Hub::Faults& f) { f.hold = 400'000; });
        const auto p = world.start();
        REQUIRE(world.hub.wait_for_hold());
        world.hub.change([](Hub::Faults& f) {
            f.hold = 0, f.breaks = {400'000}, f.hub = {403, "GatedRepo", "no more"};
        });
        check_error(World::end_of(*p), {"accept its terms", "no more"});
    }
    SECTION("an address that has expired is asked for again") {
        world.hub.change([](Hub::Faults& f) { f.hold = 400'000; });
        const auto p = world.start();
        REQUIRE(world.hub.wait_for_hold());
        world.hub.change([](Hub::Faults& f) { f.hold = 0, f.breaks = {400'000}, f.age = 1; });
        check_success(World::end_of(*p), world);
    }
    SECTION("a CDN that refuses once is asked again") {
        world.hub.change([](Hub::Faults& f) { f.cdn = {500, "", "on fire", "", 1}; });
        check_success(world.run(), world);
    }
    SECTION("all the bytes were there already") {
        fs::create_directories(world.folder() / "blobs");
        fs::copy(world.model.path / "model.safetensors", world.part("model.safetensors"));
        fs::permissions(world.part("model.safetensors"), fs::perms(0600));
        check_success(world.run(), world);
        CHECK(fs::status(world.snapshot() / "model.safetensors").permissions() == fs::perms(0644));
        const Strings all = gets(world.hub);
        CHECK(std::count(all.begin(), all.end(), "model.safetensors ") == 0);
    }
}

TEST_CASE("a download that was stopped can be resumed") {
    World world;
    world.hub.change([](Hub::Faults& f) { f.hold = 400'000; });
    const auto first = world.start();
    REQUIRE(world.hub.wait_for_hold());
    const auto free_again = [&] { world.hub.change([](Hub::Faults& f) { f.hold = 0; }); };
    SECTION("SIGTERM ends curl too") {
        while (!fs::exists(world.part("model.safetensors")) ||
               fs::file_size(world.part("model.safetensors")) == 0)
            std::this_thread::yield();
        first->send(SIGTERM);
        CHECK(first->wait() == 130);
        world.hub.requests();
        const auto second = world.start();
        CHECK(second->says("going on at"));
        free_again();
        const Result r = World::end_of(*second);
        check_success(r, world);
        CHECK(!has(r.err, "another download"));  // the stopped run does not hold the lock
        CHECK(has(first->err(), "stopped"));
        const Strings all = gets(world.hub);
        REQUIRE(all.size() == 1);
        CHECK(has(all[0], "model.safetensors bytes="));
    }
    SECTION("SIGKILL leaves curl, which keeps the lock until its end") {
        first->send(SIGKILL);
        CHECK(first->wait() == 1000 + SIGKILL);
        const auto second = world.start();
        CHECK(second->says("another download"));
        free_again();
        check_success(World::end_of(*second), world);
    }
}

TEST_CASE("two downloads of one model at once do not harm each other") {
    World world;
    world.hub.change([](Hub::Faults& f) { f.hold = 400'000; });
    const auto first = world.start();
    REQUIRE(world.hub.wait_for_hold());
    const auto second = world.start();
    CHECK(second->says("another download"));
    world.hub.change([](Hub::Faults& f) { f.hold = 0; });
    check_success(World::end_of(*first), world);
    check_success(World::end_of(*second), world);
    const Strings all = gets(world.hub);
    CHECK(std::count(all.begin(), all.end(), "model.safetensors ") == 1);
    CHECK(all.size() == 5);
}

TEST_CASE("wrong bytes are removed, and no snapshot has them") {
    World world;
    for (const std::string file : {"model.safetensors", "config.json"}) {
        world.hub.change([&](Hub::Faults& f) { f.wrong = file; });
        check_error(world.run(), {file, "wrong", world.etag(file), "removed"});
        CHECK(!fs::exists(world.part(file)));
        CHECK(!fs::exists(world.folder() / "blobs" / world.etag(file)));
        CHECK(!fs::exists(world.snapshot()));
        CHECK(!fs::exists(world.folder() / "refs"));
        fs::remove_all(world.folder());
    }
    world.hub.change([](Hub::Faults& f) { f.wrong = ""; });
    // Partial files of other programs, of the file's length and longer.
    for (const size_t size : {large, large + 1}) {
        fs::create_directories(world.folder() / "blobs");
        std::ofstream(world.part("model.safetensors")) << std::string(size, 'x');
        check_error(world.run(), {"model.safetensors", std::to_string(size) + " bytes", "removed"});
        CHECK(!fs::exists(world.part("model.safetensors")));
    }
    check_success(world.run(), world);
}

// [4] Refusals ------------------------------------------------------------------------------------

TEST_CASE("the hub refuses") {
    World world;
    const std::string terms = world.hub.address() + "/" + name,
                      tokens = world.hub.address() + "/settings/tokens";
    SECTION("nobody's token") {
        world.variables.erase("HF_TOKEN");
        check_error(world.run(), {name, "wants a token", terms, tokens, "HF_TOKEN"});
        check_error(world.run({"no/such"}), {"no model no/such", "HF_TOKEN"});
    }
    SECTION("a wrong token") {
        world.variables["HF_TOKEN"] = "hf_wrong";
        const Result r = world.run();
        check_error(r, {"does not accept the token from HF_TOKEN", tokens, "Invalid credentials"});
        CHECK(!has(r.err, "hf_wrong"));
    }
    SECTION("a token with a quote") {
        world.variables["HF_TOKEN"] = "hf_\"x";
        const Result r = world.run();
        check_error(r, {"HF_TOKEN", "characters"});
        CHECK(!has(r.err, "hf_\"x"));
        CHECK(world.hub.requests().empty());
    }
    SECTION("terms that were not accepted") {
        world.hub.change([](Hub::Faults& f) {
            f.hub = {403, "GatedRepo",
                     "Access to model org/some-model is restricted and you are not in the "
                     "authorized list. Visit the page to ask for access."};
        });
        check_error(world.run(), {"open " + terms + " and accept its terms", "authorized list"});
    }
    SECTION("a token without the right") {
        world.hub.change([](Hub::Faults& f) {
            f.hub = {403, "GatedRepo",
                     "Please enable access to public gated repositories in your fine-grained "
                     "token settings to view this repository."};
        });
        check_error(world.run(), {"token from HF_TOKEN has no right", tokens, "public gated"});
    }
    SECTION("no such model") {
        check_error(world.run({"no/such"}), {"no model no/such", world.hub.address()});
    }
    SECTION("too many requests") {
        world.hub.change([](Hub::Faults& f) { f.hub = {429, "", "slow down", "300"}; });
        check_error(world.run(), {"too many requests", "in 300 seconds"});
        CHECK(world.hub.requests().size() == 1);
    }
    SECTION("a fault of its own, that stays") {
        world.hub.change([](Hub::Faults& f) { f.hub = {503, "", "on fire"}; });
        check_error(world.run(), {"503", "on fire", "config.json"});
    }
    SECTION("a fault of its own, that passes") {
        world.hub.change([](Hub::Faults& f) { f.hub = {503, "", "on fire", "", 1}; });
        check_success(world.run(), world);
    }
    SECTION("words that would move the cursor are not printed") {
        world.hub.change([](Hub::Faults& f) { f.hub = {400, "", "a\x1b[2Jb"}; });
        const Result r = world.run();
        check_error(r, {"400"});  // Debian 13's httplib refuses to send them
        CHECK(!has(r.err, "\x1b"));
    }
    CHECK(!fs::exists(world.snapshot().parent_path() / "config.json"));
}

TEST_CASE("no network") {
    World world;
    const auto dead = [&] { world.variables["HF_ENDPOINT"] = "http://127.0.0.1:1"; };
    SECTION("and nothing there") {
        dead();
        check_error(world.run(), {"cannot reach http://127.0.0.1:1", "connect"});
        world.variables["HF_ENDPOINT"] = "http://no-such-host.invalid";
        check_error(world.run(), {"cannot reach http://no-such-host.invalid", "resolve"});
    }
    SECTION("and everything there") {
        world.run();
        dead();
        const Result r = world.run();
        check_success(r, world);
        CHECK(has(r.err, "http://127.0.0.1:1 cannot be asked"));
        world.variables["HF_ENDPOINT"] = world.hub.address();
        world.hub.change([](Hub::Faults& f) { f.hub = {503, "", "on fire"}; });
        check_success(world.run(), world);
    }
    SECTION("and a part there") {
        world.run();
        fs::remove(world.snapshot() / "model.safetensors");
        dead();
        check_error(world.run(), {"cannot reach"});
    }
    SECTION("by the user's wish") {
        for (const std::string yes : {"1", "true", "YES"}) {
            world.variables["HF_HUB_OFFLINE"] = yes;
            check_error(world.run(), {"HF_HUB_OFFLINE", name, world.variables["HF_HOME"]});
            CHECK(world.hub.requests().empty());
        }
        world.variables["HF_HUB_OFFLINE"] = "0";
        check_success(world.run(), world);
        world.hub.requests();
        world.variables["HF_HUB_OFFLINE"] = "1";
        check_success(world.run(), world);
        CHECK(world.hub.requests().empty());
    }
}

TEST_CASE("no space") {
    World world;
    const auto fake_df = [&](const std::string& free) {
        world.fake("df", "printf 'Avail\\n" + free + "\\n'");
    };
    SECTION("is seen before the download") {
        fake_df("1004999");  // some bytes too few, with the small files
        check_error(world.run(), {"no space", "1.0 MB are to come", "blobs has 1.0 MB free"});
        CHECK(gets(world.hub).empty());
    }
    SECTION("counts what is there already") {
        fs::create_directories(world.folder() / "blobs");
        std::ofstream(world.part("model.safetensors"))
            << read_file(world.model.path / "model.safetensors").substr(0, 600'000);
        fake_df("500000");
        check_success(world.run(), world);
    }
    SECTION("is missed in the middle") {
        const Result r = world.shell("ulimit -f 300; trap '' XFSZ; exec \"$@\"");
        check_error(r, {"cannot write", ".incomplete", "free"});
        CHECK(!fs::exists(world.snapshot()));
        check_success(world.run(), world);
    }
    SECTION("is missed in the middle, and curl is killed for it") {
        check_error(world.shell("ulimit -f 300; exec \"$@\""), {"cannot write", "killed"});
    }
    SECTION("on a real small disk") {
        const std::string mounted =
            "mkdir -p $HF_HOME && mount -t tmpfs -o size=400k none $HF_HOME && ";
        const std::string alone = "exec unshare --user --map-root-user --mount bash -c '";
        if (world.shell(alone + mounted + "true' \"$@\"").status != 0)
            SKIP_BECAUSE("a disk that fills up: no user namespaces with mount here");
        check_error(world.shell(alone + mounted + "shift 0; exec \"$0\" \"$@\"' \"$@\""),
                    {"no space", "1.0 MB are to come"});
        fake_df("99999999");
        check_error(world.shell(alone + mounted + "exec \"$0\" \"$@\"' \"$@\""),
                    {"cannot write", ".incomplete"});
    }
    SECTION("to write in at all") {
        world.variables["HF_HOME"] = "/proc";
        check_error(world.run(), {"/proc/hub cannot be written to"});
    }
}

TEST_CASE("an invalid name is refused before anything is requested") {
    World world;
    for (const std::string bad :
         {"", "model", "a/b/c", "../x", "a/..", "a/b..c", "/a", "a/", "a b/c", "a/b\n", "a/b?c",
          "a/b--c", "./model", "a/b%2f", "-a/b"}) {
        CAPTURE(bad);
        const Result r = world.run({bad});
        CHECK(r.status != 0);
        CHECK(r.out == "");
        CHECK(has(r.err, bad.starts_with("-") ? "not an option" : "ORGANISATION/NAME"));
    }
    for (const std::string bad :
         {"", "..", "../main", "a/../b", "a..b", "/main", "main/", "a b", "-x", "a?b"}) {
        CAPTURE(bad);
        check_error(world.run({name, "--revision", bad}), {"\"" + bad + "\" is no revision"});
    }
    check_error(world.run({name, "--revision"}), {"revision"});
    check_error(world.run({name, "other/model"}), {name, "other/model"});
    check_error(world.run({name, "--force"}), {"--force", "--revision"});
    for (const std::string bad : {"ftp://x", "127.0.0.1", "http://user@host", "http://x/\" y"}) {
        world.variables["HF_ENDPOINT"] = bad;
        check_error(world.run(), {"HF_ENDPOINT", bad});
    }
    CHECK(world.hub.requests().empty());
    const Result help = world.run({"--help"});
    CHECK(help.status == 0);
    CHECK(has(help.out, "HF_TOKEN"));
}

// [5] The token -----------------------------------------------------------------------------------

namespace {

// The command lines of all processes that this user may see.
Strings command_lines() {
    Strings all;
    for (const auto& entry : fs::directory_iterator("/proc")) {
        if (!std::isdigit(entry.path().filename().string()[0])) continue;
        std::ifstream in(entry.path() / "cmdline", std::ios::binary);
        all.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
    }
    return all;
}

}  // namespace

TEST_CASE("the token is in no argument, no file, no output") {
    World world;
    world.hub.change([](Hub::Faults& f) { f.hold = 400'000; });
    // A user's .curlrc could make curl print the headers that it sends.
    std::ofstream(world.cache.path / ".curlrc") << "verbose\ntrace-ascii = -\n";
    Process p({"bash", "-ax", script, name}, world.variables);
    REQUIRE(world.hub.wait_for_hold());
    bool seen = false;
    for (const std::string& line : command_lines()) {
        CHECK(!has(line, secret));
        seen |= has(line, "curl") && has(line, world.cache.path.string());
    }
    CHECK(seen);
    // The token is not in curl's environment either.
    for (const auto& entry : fs::directory_iterator("/proc")) {
        if (!std::isdigit(entry.path().filename().string()[0])) continue;
        std::ifstream of(entry.path() / "cmdline"), in(entry.path() / "environ", std::ios::binary);
        const std::string line(std::istreambuf_iterator<char>(of), {});
        if (line.starts_with("curl")) CHECK(!has({std::istreambuf_iterator<char>(in), {}}, secret));
    }
    world.hub.change([](Hub::Faults& f) { f.hold = 0; });
    const Result r = World::end_of(p);
    check_success(r, world);
    CHECK(!has(r.err, secret));
    for (const auto& entry : fs::recursive_directory_iterator(world.cache.path))
        if (entry.is_regular_file()) CHECK(!has(read_file(entry), secret));
    for (const auto& request : world.hub.requests())
        CHECK(request.authorized == (request.server == "hub"));
}

TEST_CASE("where the token comes from") {
    World world;
    world.variables.erase("HF_TOKEN");
    SECTION("HF_HOME") {
        world.cache.write("hf/token", secret + "\r\n");
        check_success(world.run(), world);
    }
    SECTION("HF_TOKEN_PATH") {
        world.cache.write("elsewhere", secret);
        world.variables["HF_TOKEN_PATH"] = (world.cache.path / "elsewhere").string();
        check_success(world.run(), world);
    }
    SECTION("HF_TOKEN before a file; and an error names the source") {
        world.cache.write("hf/token", "hf_wrong\n");
        check_error(world.run(), {"token from " + world.variables["HF_HOME"] + "/token"});
        world.variables["HF_TOKEN"] = secret;
        check_success(world.run(), world);
    }
    SECTION("a build's secret") {
        world.cache.write("secrets/hf_token", secret + "\n");
        world.cache.write("hf/token", "hf_wrong\n");
        const std::string mounted =
            "exec unshare --user --map-root-user --mount bash -c "
            "'mount -t tmpfs none /run && mkdir /run/secrets && "
            "cp $HOME/secrets/hf_token /run/secrets && ";
        if (world.shell(mounted + "true'").status != 0)
            SKIP_BECAUSE("/run/secrets/hf_token: no user namespaces with mount here");
        check_success(world.shell(mounted + "exec \"$0\" \"$@\"' \"$@\""), world);
    }
    SECTION("nowhere, for a model that wants none") {
        Hub open({{name, world.model.path}}, "");
        world.variables["HF_ENDPOINT"] = open.address();
        check_success(world.run(), world);
        for (const auto& r : open.requests()) CHECK(!r.authorized);
    }
}

// [6] A terminal ----------------------------------------------------------------------------------

TEST_CASE("on a terminal there is one bar") {
    World world;
    world.hub.change([](Hub::Faults& f) { f.hold = 500'000; });
    const auto p = world.start({name}, true);
    REQUIRE(world.hub.wait_for_hold());
    CHECK(p->says("[###"));  // the bar is drawn while the download waits
    world.hub.change([](Hub::Faults& f) { f.hold = 0; });
    const Result r = World::end_of(*p);
    check_success(r, world);
    CHECK(has(r.err, "[##############################] 100 %, 1.0 MB of 1.0 MB"));
    const size_t bar = r.err.find('\r' + std::string("[")), last = r.err.rfind("\r[");
    REQUIRE(bar != std::string::npos);
    CHECK(r.err.substr(bar, last - bar).find('\n') == std::string::npos);
}
