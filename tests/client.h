// SPDX-License-Identifier: Apache-2.0
//
// client.h: shared by the test suites that talk HTTP to a server.
//
//   [1] Child        a server process: its log, its port, its exit status
//   [2] Client       requests, and a stream merged into a whole answer
//
// No test may depend on the terminal, or the program, that starts it.
//
// $GEMMA_SERVER names another server binary, such as the sanitized one with the fake model.
#pragma once

#include "test.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <thread>

#include <arpa/inet.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <httplib.h>
#include <nlohmann/json.hpp>

using json = nlohmann::ordered_json;
using gemma::text;
using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using Strings = std::vector<std::string>;
using Ids = std::vector<int>;

// [1] Child ---------------------------------------------------------------------------------------

// How long a test waits before it fails: ten times the ten seconds that Cloud Run grants.
inline constexpr auto patience = 100s;

inline std::string binary() {
    if (const char* given = std::getenv("GEMMA_SERVER")) return given;
#ifdef GEMMA_SERVER_BINARY
    return GEMMA_SERVER_BINARY;
#else
    throw std::runtime_error("$GEMMA_SERVER must name the server to test");
#endif
}

// Waits until it holds; false if it never does.
inline bool eventually(const std::function<bool()>& condition) {
    for (const auto start = Clock::now(); Clock::now() - start < patience;) {
        if (condition()) return true;
        std::this_thread::sleep_for(2ms);
    }
    return false;
}

// What this process has from who started it, and tests would see: a pipe must not become
// descriptor 0, waitpid finds no child while SIGCHLD is ignored, a server that closes early would
// end the suite by SIGPIPE, and folders must be ours.
inline const bool started_alike = [] {
    for (const int fd : {0, 1, 2}) {
        if (fcntl(fd, F_GETFD) < 0) (void)!open("/dev/null", O_RDWR);
    }
    std::signal(SIGCHLD, SIG_DFL);
    std::signal(SIGPIPE, SIG_IGN);
    umask(022);
    return true;
}();

// Variables that a server reads. It gets those that its test gives.
inline constexpr std::array no_defaults{
    "PORT=",      "MODEL_NAME=",           "MAX_MODEL_LEN=",     "VLLM_API_KEY=",
    "K_SERVICE=", "GOOGLE_CLOUD_PROJECT=", "GCE_METADATA_HOST=", "GEMMA_STARTED="};

class Child {
  public:
    // With `starter`, a command that executes the rest of its line, such as env.
    explicit Child(const Strings& arguments, const Strings& variables = {},
                   const Strings& starter = {}) {
        int ends[2];
        if (pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error("no pipe");
        Strings words = starter, environment = variables;
        words.push_back(binary());
        environment.push_back("OMP_WAIT_POLICY=passive");  // suites run in parallel: do not spin
        words.insert(words.end(), arguments.begin(), arguments.end());
        for (char** e = environ; *e; e++) {
            const std::string_view v = *e;
            // If a name stands twice, getenv finds the first, so `variables` win.
            const auto names = [&](const char* name) { return v.starts_with(name); };
            if (std::none_of(no_defaults.begin(), no_defaults.end(), names))
                environment.emplace_back(v);
        }
        const int error = spawn(words, environment, ends[1]);
        close(ends[1]);
        if (error) throw std::runtime_error(words[0] + ": " + std::strerror(error));
        reader = std::thread([this, fd = ends[0]] { read_log(fd); });
    }
    ~Child() {
        if (status < 0) kill(pid, SIGKILL), exit_status();
        reader.join();
    }
    Child(const Child&) = delete;

    void terminate() const { kill(pid, SIGTERM); }
    pid_t id() const { return pid; }  // for /proc, and for other signals

    // Waits until the log contains these words; false if it never does.
    bool says(const std::string& words) {
        std::unique_lock lock(mutex);
        const auto found = [&] { return lines.find(words) != std::string::npos; };
        changed.wait_for(lock, patience, [&] { return found() || ended; });
        return found();
    }
    std::string log() {
        const std::lock_guard lock(mutex);
        return lines;
    }
    // Waits for the exit. 991 + N: the child was ended by signal N; so 1000 (SIGKILL) if it did
    // not end in time.
    int exit_status() {
        {
            std::unique_lock lock(mutex);
            if (!changed.wait_for(lock, patience, [&] { return ended; })) kill(pid, SIGKILL);
        }
        int raw;
        if (status < 0 && waitpid(pid, &raw, 0) == pid)
            status = WIFEXITED(raw) ? WEXITSTATUS(raw) : 991 + WTERMSIG(raw);
        return status;
    }

  private:
    // With no descriptor and no treatment of signals that this process has.
    int spawn(Strings& words, Strings& environment, int log) {
        posix_spawn_file_actions_t actions;
        posix_spawn_file_actions_init(&actions);
        for (const int fd : {1, 2}) posix_spawn_file_actions_adddup2(&actions, log, fd);
        posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
        posix_spawn_file_actions_addclosefrom_np(&actions, 3);
        posix_spawnattr_t attributes;
        posix_spawnattr_init(&attributes);
        sigset_t none, all;
        sigemptyset(&none);
        sigfillset(&all);
        posix_spawnattr_setsigmask(&attributes, &none);
        posix_spawnattr_setsigdefault(&attributes, &all);
        posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
        const int error = posix_spawnp(&pid, words[0].c_str(), &actions, &attributes,
                                       pointers(words).data(), pointers(environment).data());
        posix_spawn_file_actions_destroy(&actions);
        posix_spawnattr_destroy(&attributes);
        return error;
    }
    static std::vector<char*> pointers(Strings& strings) {
        std::vector<char*> all;
        for (auto& s : strings) all.push_back(s.data());
        all.push_back(nullptr);
        return all;
    }
    void read_log(int fd) {
        char buffer[4096];
        for (ssize_t n; (n = read(fd, buffer, sizeof buffer)) > 0;) {
            const std::lock_guard lock(mutex);
            lines.append(buffer, size_t(n));
            changed.notify_all();
        }
        close(fd);
        const std::lock_guard lock(mutex);
        ended = true;
        changed.notify_all();
    }

    pid_t pid = 0;
    int status = -1;
    std::mutex mutex;
    std::condition_variable changed;
    std::string lines;   // guarded by mutex
    bool ended = false;  // guarded by mutex: the pipe is closed, the log complete
    std::thread reader;
};

inline const std::string demo = (repository / "demo/model").string();

// No --device: the server takes a GPU, real or emulated, if there is one. Servers of several tests
// fit on it at once, since the demo model's pools are small.
inline Strings with_defaults(const Strings& flags) {
    Strings all{demo,     "--served-model-name", "gemma-demo", "google/gemma-3-1b-it",
                "--host", "127.0.0.1",           "--port",     "0"};
    all.insert(all.end(), flags.begin(), flags.end());
    return all;
}

// A server that is ready. The destructor sends SIGTERM if the test has not ended it; an exit status
// other than 0 fails the whole suite.
struct Server : Child {
    int port = 0;
    explicit Server(const Strings& flags = {}, const Strings& variables = {})
        : Child(with_defaults(flags), variables) {
        const std::string start = "listening on http://127.0.0.1:";
        if (!says("\nready in")) throw std::runtime_error("the server is not ready: " + log());
        port = std::atoi(log().c_str() + log().find(start) + start.size());
    }
    ~Server() {
        terminate();
        if (const int e = exit_status(); e != 0) {
            std::printf("the server ended with %d\n%s", e, log().c_str());
            std::fflush(stdout);
            std::_Exit(1);  // too late for a Catch2 assertion
        }
    }
};

inline Server& server() {  // shared by all tests that do not end it
    static Server shared({}, {"GEMMA_FAKE_STEP_MS=0"});
    return shared;
}

// [2] Client --------------------------------------------------------------------------------------

struct Reply {
    int status = 0;  // 0: no complete answer came
    std::string body;
    httplib::Headers headers;
    json parsed() const { return json::parse(body); }
    std::string header(const std::string& name) const {
        const auto found = headers.find(name);
        return found == headers.end() ? "" : found->second;
    }
};

inline const httplib::Headers as_json{{"Content-Type", "application/json"}};
using Listener = std::function<bool(std::string_view)>;  // returns false to hang up

inline Reply send(int port, const std::string& method, const std::string& path,
                  const std::string& body, const httplib::Headers& headers = as_json,
                  const Listener& listener = nullptr) {
    Reply reply;
    httplib::Client client("127.0.0.1", port);
    client.set_read_timeout(patience);
    httplib::Request request;
    request.method = method, request.path = path, request.headers = headers, request.body = body;
    request.content_receiver = [&](const char* data, size_t size, uint64_t, uint64_t) {
        reply.body.append(data, size);
        return !listener || listener({data, size});
    };
    if (const auto result = client.send(request)) {
        reply.status = result->status;
        reply.headers = result->headers;
    }
    return reply;
}

inline Reply get(const std::string& path, int port = server().port) {
    return send(port, "GET", path, "");
}

// Waits until so many requests for text are being answered; false if they never are.
inline bool answering(int count, int port) {
    return eventually([&] { return get("/load", port).parsed()["server_load"] == count; });
}

inline std::string write(const json& body) {
    return body.dump(-1, ' ', false, json::error_handler_t::replace);
}

inline Reply post(const std::string& path, const json& body, int port = server().port) {
    return send(port, "POST", path, write(body));
}

inline const std::string completions = "/v1/completions", chat = "/v1/chat/completions";

// The smallest body for a generating route: the two routes differ in how they take the prompt.
inline json base(const std::string& path, const std::string& prompt = "The server answers") {
    if (path == completions) return {{"prompt", prompt}};
    return {{"messages", {{{"role", "user"}, {"content", prompt}}}}};
}

inline json with(json body, const json& fields) {
    for (const auto& [name, value] : fields.items()) body[name] = value;
    return body;
}

// Sends a request that must succeed.
inline json ask(const std::string& path, const json& fields, int port = server().port) {
    const Reply reply = post(path, with(base(path), fields), port);
    INFO(write(fields) << " " << reply.body);
    REQUIRE(reply.status == 200);
    return reply.parsed();
}

inline json complete(const json& fields) { return ask(completions, fields); }

inline std::string text_of(const json& choice) {
    const json text = choice.contains("text") ? choice["text"] : choice["message"]["content"];
    return text.is_null() ? "" : text.get<std::string>();  // null: the answer is a call
}

inline std::string first_text(const json& answer) { return text_of(answer["choices"][0]); }

inline Strings keys(const json& object) {
    Strings names;
    for (const auto& item : object.items()) names.push_back(item.key());
    return names;
}

struct Stream {
    Reply reply;
    std::vector<json> events;
    bool done = false;  // [DONE] was the last event
};

inline Stream read_events(Reply reply) {
    Stream s{std::move(reply), {}, false};
    size_t at = 0;
    for (size_t end; (end = s.reply.body.find("\n\n", at)) != std::string::npos; at = end + 2) {
        const std::string line = s.reply.body.substr(at, end - at);
        if (!line.starts_with("data: ") || s.done) throw std::runtime_error("an event: " + line);
        if (line == "data: [DONE]")
            s.done = true;
        else
            s.events.push_back(json::parse(line.substr(6)));
    }
    if (at != s.reply.body.size()) throw std::runtime_error("half an event at the end");
    return s;
}

inline Stream stream(const std::string& path, const json& fields, int port = server().port) {
    return read_events(post(path, with(with(base(path), fields), {{"stream", true}}), port));
}

inline void join(json& whole, const json& part) {  // appends the lists within `part`
    if (whole.is_null())
        whole = part;
    else if (whole.is_array())
        whole.insert(whole.end(), part.begin(), part.end());
    else if (whole.is_object())
        for (const auto& [name, value] : part.items()) join(whole[name], value);
}

// Puts a stream's tool calls together, as clients do.
inline void join_calls(json& calls, const json& deltas) {
    for (const json& delta : deltas) {
        const size_t index = delta["index"];
        if (delta.contains("id")) {
            if (index != calls.size()) throw std::runtime_error("a call out of its order");
            calls.push_back(
                {{"type", delta["type"]},
                 {"function", {{"name", delta["function"]["name"]}, {"arguments", ""}}}});
        }
        json& arguments = calls.at(index)["function"]["arguments"];
        arguments =
            arguments.get<std::string>() + delta["function"]["arguments"].get<std::string>();
    }
}

// The n choices of a stream as a whole answer would have them; see comparable().
inline json merged(const Stream& s, size_t n) {
    json choices = json::array();
    for (size_t i = 0; i < n; i++) {
        choices.push_back({{"text", ""},
                           {"calls", json::array()},
                           {"logprobs", {}},
                           {"finish", {}},
                           {"stop", {}}});
    }
    for (const json& event : s.events) {
        for (const json& c : event["choices"]) {
            json& whole = choices.at(c["index"].get<size_t>());
            if (!whole["finish"].is_null()) throw std::runtime_error("a chunk after the last");
            const json delta = c.value("delta", json::object());
            const std::string piece = c.value("text", delta.value("content", ""));
            whole["text"] = whole["text"].get<std::string>() + piece;
            join_calls(whole["calls"], delta.value("tool_calls", json::array()));
            join(whole["logprobs"], c["logprobs"]);
            whole["finish"] = c["finish_reason"];
            whole["stop"] = c.value("stop_reason", json());
        }
    }
    return choices;
}

inline json comparable(const json& answer) {
    json choices = json::array();
    for (const json& c : answer["choices"]) {
        json calls = c.value("message", json::object()).value("tool_calls", json::array());
        for (json& call : calls) call.erase("id");
        choices.push_back({{"text", text_of(c)},
                           {"calls", calls},
                           {"logprobs", c["logprobs"]},
                           {"finish", c["finish_reason"]},
                           {"stop", c.value("stop_reason", json())}});
    }
    return choices;
}

// A body as JSON text with its id, time and generated text blanked out, to compare keys and their
// order with vLLM's bytes.
inline std::string skeleton(json body) {
    const std::string id = body["id"];
    body["id"] = id.substr(0, id.find('-'));
    body["created"] = body["created"].is_number_integer() ? 0 : -1;
    for (json& c : body["choices"]) {
        json& owner = c.contains("message") ? c["message"] : c.contains("delta") ? c["delta"] : c;
        owner[c.contains("text") ? "text" : "content"] = "*";
    }
    return write(body);
}

// A TCP connection, to send bytes that no client library would send.
class Raw {
  public:
    explicit Raw(int port) {
        sockaddr_in address{};
        address.sin_family = AF_INET;
        address.sin_port = htons(uint16_t(port));
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        timeval limit{std::chrono::seconds(patience).count(), 0};
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
        if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0)
            throw std::runtime_error("cannot connect");
    }
    ~Raw() { close(fd); }
    Raw(const Raw&) = delete;
    int handle() const { return fd; }

    bool write(std::string_view bytes) const {
        return ::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL) == ssize_t(bytes.size());
    }
    // Reads until these bytes have come, or until the server closes. Returns all bytes so far.
    const std::string& read_until(const std::string& bytes) {
        char buffer[4096];
        while (got.find(bytes) == std::string::npos) {
            const ssize_t n = recv(fd, buffer, sizeof buffer, 0);
            if (n <= 0) break;
            got.append(buffer, size_t(n));
        }
        return got;
    }

  private:
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    std::string got;
};

inline std::string raw_post(const std::string& path, const json& body) {
    const std::string s = write(body);
    return text(
               "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
               "Content-Length: %zu\r\n\r\n",
               path.c_str(), s.size()) +
           s;
}

// Runs work(0) .. work(count - 1), each in a thread of its own. `work` must not use Catch2's
// macros, which are not thread-safe.
template <class T>
std::vector<T> at_once(size_t count, const std::function<T(size_t)>& work) {
    std::vector<T> results(count);
    std::vector<std::thread> threads;
    for (size_t i = 0; i < count; i++) {
        threads.emplace_back([&, i] {
            try {
                results[i] = work(i);
            } catch (const std::exception& e) {
                std::printf("%s\n", e.what());  // the result stays empty
            }
        });
    }
    for (auto& t : threads) t.join();
    return results;
}

// Checks that a reply is an error: its envelope, its status, and words of its message.
inline void check_refusal(const Reply& reply, int status, const Strings& words) {
    INFO(reply.body);
    REQUIRE(reply.status == status);
    const json body = reply.parsed();
    CHECK(keys(body) == Strings{"error"});
    CHECK(keys(body["error"]) == Strings{"message", "type", "param", "code"});
    CHECK(body["error"]["code"] == status);
    const std::string message = body["error"]["message"];
    for (const std::string& w : words) CHECK(message.find(w) != std::string::npos);
    CHECK(message.size() < 1000);
}

// Free, and likely to stay so: below the ports that connections get from the kernel.
inline int free_port() {
    std::ifstream range("/proc/sys/net/ipv4/ip_local_port_range");
    int below = 0;
    if (!(range >> below) || below < 20'000) below = 32'768;
    std::mt19937 random{std::random_device{}()};
    for (int tries = 0; tries < 1000; tries++) {
        sockaddr_in address{};
        address.sin_family = AF_INET;
        address.sin_port = htons(uint16_t(10'000 + int(random() % uint32_t(below - 10'000))));
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        const bool bound = bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
        close(fd);
        if (bound) return ntohs(address.sin_port);
    }
    throw std::runtime_error("no free port");
}
