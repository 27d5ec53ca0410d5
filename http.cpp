// SPDX-License-Identifier: Apache-2.0
//
// http.cpp: the wire. Sitting 3, first. cpp-httplib parses and writes HTTP. This file, and no
// other, keeps it safe against strangers, for Debian 12's version (0.11.4) as for newer ones.
// docs/design.md, section 9, lists the library's traps.
//
//   [1] Connection   counts every byte that is read, and has a deadline
//   [2] Connections  a thread for each; limits on their number and on memory for bodies
//   [3] Refusals     one envelope for every error
//   [4] Gate         refuses before the body is read, where the head suffices
//   [5] HttpServer
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <thread>

#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <httplib.h>
#include <nlohmann/json.hpp>
#include <openssl/crypto.h>

#include "gemma.h"
#include "http.h"

namespace gemma {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using nlohmann::ordered_json;

namespace {

constexpr size_t max_head = 64 << 10;  // request line and headers
constexpr size_t max_body = 4 << 20;
constexpr size_t max_connections = 2048;
constexpr auto patience = 30s;  // to send a whole request; to take any of the answer

// [1] Connection ----------------------------------------------------------------------------------

std::chrono::milliseconds until(Clock::time_point end) {
    return std::max(0ms, std::chrono::ceil<std::chrono::milliseconds>(end - Clock::now()));
}

class Connection : public httplib::Stream {
    const int fd;
    const Clock::time_point deadline = Clock::now() + patience;
    char buffer[4096];
    size_t at = 0, end = 0;  // buffer[at, end) is unread
    size_t received = 0, may_receive = max_head;

  public:
    explicit Connection(int fd_) : fd(fd_) { here = this; }
    ~Connection() override {
        here = nullptr;
        linger();
    }
    Connection(const Connection&) = delete;

    // The connection that this thread serves. read_body needs it, and the library does not pass it.
    static inline thread_local Connection* here = nullptr;

    bool late() const { return Clock::now() >= deadline; }
    // Called behind the head. In chunks of a byte a body takes six times its size; 8 to be sure.
    void expect_body() { may_receive = received + 8 * max_body; }

    ssize_t read(char* to, size_t size) override {
        if (at == end && !fill()) return -1;
        const size_t n = std::min(size, end - at);
        std::copy_n(buffer + at, n, to);
        at += n;
        return ssize_t(n);
    }

    ssize_t write(const char* from, size_t size) override {
        for (;;) {
            const ssize_t n = send(fd, from, size, MSG_NOSIGNAL | MSG_DONTWAIT);
            if (n >= 0) return n;
            if ((errno != EAGAIN && errno != EINTR) || !wait(POLLOUT, patience)) return -1;
        }
    }

    // A FIN or a reset says that the client has left, even behind unread bytes. So a client that
    // closes its sending side after the request counts as gone (README, Limits).
    bool is_peer_alive() const { return !(events(0, 0ms) & (POLLRDHUP | POLLHUP | POLLERR)); }
    bool is_writable() const { return is_peer_alive(); }  // 0.11.4 and 0.18.7 call this one
    bool is_readable() const override { return at < end || wait(POLLIN, 0ms); }
    int socket() const override { return fd; }
    void get_remote_ip_and_port(std::string&, int&) const override {}
    void get_local_ip_and_port(std::string&, int&) const override {}
    // Versions from 0.41 on, the image's among them, call these too. Only some versions declare
    // them virtual, so they cannot say `override`.
    bool wait_readable() const { return at < end || wait(POLLIN, patience); }
    bool wait_writable() const { return wait(POLLOUT, patience); }
    time_t duration() const { return 0; }

  private:
    short events(short asked, std::chrono::milliseconds limit) const {
        pollfd p{fd, short(asked | POLLRDHUP), 0};
        return poll(&p, 1, int(limit.count())) > 0 ? p.revents : short(0);
    }
    bool wait(short asked, std::chrono::milliseconds limit) const {
        return events(asked, limit) & (asked | POLLHUP | POLLERR);
    }

    bool fill() {
        const size_t room = std::min(sizeof buffer, may_receive - received);
        if (room == 0 || !wait(POLLIN, until(deadline)) || late()) return false;
        const ssize_t n = recv(fd, buffer, room, MSG_DONTWAIT);
        if (n <= 0) return false;
        at = 0;
        end = size_t(n);
        received += size_t(n);
        return true;
    }

    // Reads and drops input for up to two seconds before the socket is closed: closing it with
    // unread bytes would reset the connection, and the client could lose the answer.
    void linger() {
        shutdown(fd, SHUT_WR);
        const auto stop = Clock::now() + 2s;
        while (Clock::now() < stop && wait(POLLIN, until(stop))) {
            if (recv(fd, buffer, sizeof buffer, MSG_DONTWAIT) <= 0) break;
        }
    }
};

// [2] Connections ---------------------------------------------------------------------------------

// The connections of a server. Each has a thread of its own, so that none waits for another.
struct Connections {
    std::mutex mutex;
    std::condition_variable changed;
    int threads = 0;        // guarded by mutex
    std::set<int> sockets;  // guarded by mutex
    bool closed = false;    // guarded by mutex; true: each new connection gets 503

    // True while the accept loop serves a connection itself, because std::thread failed; such a
    // connection gets 503.
    static inline thread_local bool no_thread = false;

    void count(int change) {
        const std::lock_guard lock(mutex);
        threads += change;
        changed.notify_all();
    }
    bool wait(std::chrono::milliseconds limit) {  // until all threads have ended
        std::unique_lock lock(mutex);
        return changed.wait_for(lock, limit, [&] { return threads == 0; });
    }
};

// The library's accept loop calls enqueue() with a function that serves one connection.
class Queue : public httplib::TaskQueue {
  public:
    explicit Queue(std::shared_ptr<Connections> c) : connections(std::move(c)) {}
    using Enqueued = decltype(std::declval<httplib::TaskQueue>().enqueue({}));  // void, then bool

    Enqueued enqueue(std::function<void()> serve) override {
        connections->count(+1);
        try {
            std::thread([serve, counted = connections] {
                serve();
                counted->count(-1);
            }).detach();
        } catch (const std::system_error&) {
            Connections::no_thread = true;
            serve();
            Connections::no_thread = false;
            connections->count(-1);
        }
        return Enqueued(true);
    }
    // HttpServer::stop() ends this wait sooner, or the process exits.
    void shutdown() override { connections->wait(std::chrono::hours(1)); }

  private:
    const std::shared_ptr<Connections> connections;
};

// Limits the memory of bodies that are not answered yet. Each body has 64 KiB of its own. Larger
// bodies share 32 MiB; while these are taken, their sockets are not read. The oldest reader may go
// beyond them, otherwise two half-read bodies could block each other for ever.
class Budget {
    std::mutex mutex;
    std::condition_variable changed;
    int64_t bytes_left = 32 << 20;  // guarded by mutex
    uint64_t last_number = 0;       // guarded by mutex
    std::set<uint64_t> readers;     // guarded by mutex: the numbers of shares, oldest first

  public:
    // One body's part of the budget.
    class Share {
        Budget& budget;
        size_t taken = 0;
        uint64_t number = 0;  // 0: the body has never been above 64 KiB

      public:
        explicit Share(Budget& b) : budget(b) {}
        ~Share() {
            const std::lock_guard lock(budget.mutex);
            budget.bytes_left += int64_t(taken);
            budget.readers.erase(number);
            budget.changed.notify_all();
        }
        Share(const Share&) = delete;

        bool cover(size_t size) {  // false: no room within 30 s
            constexpr size_t own = 64 << 10;
            if (size <= own + taken) return true;
            const size_t more = size - own - taken;
            std::unique_lock lock(budget.mutex);
            if (number == 0) {
                number = ++budget.last_number;
                budget.readers.insert(number);
            }
            const auto may_go_on = [&] {
                return budget.bytes_left >= int64_t(more) || *budget.readers.begin() == number;
            };
            if (!budget.changed.wait_for(lock, patience, may_go_on)) return false;
            taken += more;
            budget.bytes_left -= int64_t(more);
            return true;
        }
    };
};

// [3] Refusals ------------------------------------------------------------------------------------

std::string type_of(int status) {
    static const std::map<int, const char*> types{
        {401, "AuthenticationError"},   {404, "NotFoundError"},
        {405, "MethodNotAllowedError"}, {408, "RequestTimeoutError"},
        {413, "RequestTooLargeError"},  {415, "UnsupportedMediaTypeError"},
        {429, "RateLimitError"},        {503, "ServiceUnavailableError"}};
    const auto found = types.find(status);
    if (found != types.end()) return found->second;
    return status < 500 ? "BadRequestError" : "InternalServerError";
}

std::string envelope(const Refusal& r) {
    const ordered_json param = r.param.empty() ? ordered_json() : ordered_json(r.param);
    const ordered_json body{{"error",
                             {{"message", r.message},
                              {"type", type_of(r.status)},
                              {"param", param},
                              {"code", r.status}}}};
    return body.dump(-1, ' ', false, ordered_json::error_handler_t::replace);
}

void refuse_with(httplib::Response& res, const Refusal& r) {
    res.status = r.status;
    res.set_content(envelope(r), "application/json");
    if (r.status == 429 || r.status == 503) res.set_header("Retry-After", "1");
    if (r.status == 401) res.set_header("WWW-Authenticate", "Bearer");
}

// [4] Gate ----------------------------------------------------------------------------------------

bool iequals(const std::string& a, const char* b) { return strcasecmp(a.c_str(), b) == 0; }

// Takes the same time wherever the first wrong byte is; only the length of a key shows.
bool equal_secrets(const std::string& a, const std::string& b) {
    return a.size() == b.size() && CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

// The head must give the size of the body once, and in one way: otherwise a proxy and this server
// could see different requests in the same bytes.
void check_framing(const httplib::Request& req) {
    const size_t lengths = req.get_header_value_count("Content-Length");
    const size_t codings = req.get_header_value_count("Transfer-Encoding");
    const std::string length = req.get_header_value("Content-Length");
    const bool digits = !length.empty() && length.size() <= 18 &&
                        length.find_first_not_of("0123456789") == std::string::npos;
    if (lengths + codings > 1)
        throw Refusal{400, "a body has one Content-Length or one Transfer-Encoding", ""};
    if (lengths && !digits)
        throw Refusal{400, "Content-Length must be a number, got " + length.substr(0, 100), ""};
    if (codings && !iequals(req.get_header_value("Transfer-Encoding"), "chunked"))
        throw Refusal{400, "Transfer-Encoding must be chunked", ""};
    if (lengths && std::stoull(length) > max_body)
        throw Refusal{413, "the body is over 4 MiB: Content-Length " + length, ""};
}

void check_content(const httplib::Request& req) {
    if (req.has_header("Content-Encoding") &&
        !iequals(req.get_header_value("Content-Encoding"), "identity"))
        throw Refusal{415, "Content-Encoding must be identity", ""};
    const std::string type = req.get_header_value("Content-Type");
    const size_t end = std::min(type.find_first_of("; \t"), type.size());
    if (!iequals(type.substr(0, end), "application/json"))
        throw Refusal{400, "Unsupported Media Type: Only 'application/json' is allowed", ""};
}

}  // namespace

// [5] HttpServer ----------------------------------------------------------------------------------

struct HttpServer::Library : httplib::Server {
    const std::vector<Route> routes;
    const std::vector<std::string> api_keys;
    const std::shared_ptr<Connections> connections = std::make_shared<Connections>();
    Budget budget;

    Library(std::vector<Route> r, std::vector<std::string> keys)
        : routes(std::move(r)), api_keys(std::move(keys)) {
        new_task_queue = [this] { return new Queue(connections); };
        set_tcp_nodelay(true);
        set_keep_alive_max_count(1);
        // Called once the head is read. Unhandled: the library calls the handler of Post.
        set_pre_routing_handler([this](const auto& req, auto& res) {
            auto& request = const_cast<httplib::Request&>(req);
            // The library would compress event streams, and hold them back until a block is full.
            request.headers.erase("Accept-Encoding");
            request.ranges.clear();  // the library would cut JSON
            const bool passed = guard(res, [&] { check(req, res); });
            if (passed && req.method == "POST") return HandlerResponse::Unhandled;
            const bool answered = res.status != -1;  // by a refusal or by preflight()
            if (!answered) guard(res, [&] { answer(req, res, {}); });
            return HandlerResponse::Handled;
        });
        Post(".*", [this](const auto& req, auto& res, const httplib::ContentReader& read) {
            Budget::Share share(budget);
            guard(res, [&] { answer(req, res, read_body(req, read, share)); });
        });
        set_error_handler([](const auto&, auto& res) {  // the library's own refusals have no body
            if (res.body.empty()) refuse_with(res, {res.status, "no valid HTTP request", ""});
        });
    }

    // Serves one connection, from its first byte to its end.
    bool process_and_close_socket(socket_t fd) override {
        bool admitted;
        {
            const std::lock_guard lock(connections->mutex);
            connections->sockets.insert(fd);
            admitted = !Connections::no_thread && !connections->closed &&
                       connections->sockets.size() <= max_connections;
        }
        const bool ok = admitted && serve(fd);
        if (!admitted) turn_away(fd);
        const std::lock_guard lock(connections->mutex);
        connections->sockets.erase(fd);
        close(fd);
        return ok;
    }

    static void turn_away(int fd) {
        const std::string body = envelope({503, "too many connections", ""});
        const std::string all = text(
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
            "Retry-After: 1\r\nConnection: close\r\nContent-Length: %zu\r\n\r\n%s",
            body.size(), body.c_str());
        send(fd, all.data(), all.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
        ::shutdown(fd, SHUT_WR);
    }

    bool serve(int fd) {
        Connection connection(fd);
        bool closed = true;
        const std::function<void(httplib::Request&)> after_head = [&](httplib::Request&) {
            connection.expect_body();
        };
        try {
            return process(*this, connection, closed, after_head);
        } catch (const std::exception& e) {  // such as bad_alloc; uncaught, it ends the process
            say(std::string("a connection ended with ") + e.what(), Severity::error);
            return false;
        }
    }

    // 0.11.4 takes no addresses; newer versions take them, and nothing here reads them.
    static bool process(auto& self, httplib::Stream& stream, bool& closed, const auto& after_head) {
        if constexpr (requires { self.process_request(stream, true, closed, after_head); })
            return self.process_request(stream, true, closed, after_head);
        else
            return self.process_request(stream, "", 0, "", 0, true, closed, after_head);
    }

    // False: `step` threw, and res is the refusal.
    static bool guard(httplib::Response& res, auto&& step) {
        try {
            step();
            return true;
        } catch (const Refusal& r) {
            refuse_with(res, r);
        } catch (const std::exception& e) {
            say(std::string("a request ended with ") + e.what(), Severity::error);
            refuse_with(res, {500, "internal error", ""});
        }
        return false;
    }

    const Route* find(const std::string& method, const std::string& path) const {
        const auto found = std::find_if(routes.begin(), routes.end(), [&](const Route& r) {
            return (method.empty() || r.method == method) &&
                   (r.path.ends_with('/') ? path.starts_with(r.path) : path == r.path);
        });
        return found == routes.end() ? nullptr : &*found;
    }

    void check(const httplib::Request& req, httplib::Response& res) const {
        const bool origin = req.has_header("Origin");
        if (origin) res.set_header("Access-Control-Allow-Origin", "*");
        if (origin && req.method == "OPTIONS" && req.has_header("Access-Control-Request-Method"))
            return preflight(req, res);
        if (!api_keys.empty() && req.path.starts_with("/v1")) {
            const std::string given = req.get_header_value("Authorization");
            const bool bearer = iequals(given.substr(0, 7), "Bearer ");
            bool known = false;
            for (const std::string& key : api_keys) {
                if (bearer && equal_secrets(given.substr(7), key)) known = true;
            }
            if (!known) throw Refusal{401, "Unauthorized", ""};
        }
        const std::string request = req.method + " " + req.path.substr(0, 100);
        if (!find("", req.path)) throw Refusal{404, request + " is not served", ""};
        const Route* route = find(req.method == "HEAD" ? "GET" : req.method, req.path);
        if (!route) {
            std::string allowed;
            if (find("GET", req.path)) allowed = "GET, HEAD";
            if (find("POST", req.path)) allowed += allowed.empty() ? "POST" : ", POST";
            res.set_header("Allow", allowed);
            throw Refusal{405, request + " is not served: use " + allowed, ""};
        }
        check_framing(req);
        if (req.method == "POST" && route->body) check_content(req);
    }

    static void preflight(const httplib::Request& req, httplib::Response& res) {
        res.set_header("Access-Control-Allow-Methods",
                       "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT");
        const std::string asked = req.get_header_value("Access-Control-Request-Headers");
        const bool plain = std::all_of(asked.begin(), asked.end(), [](char c) {
            return std::isalnum(uint8_t(c)) || c == '-' || c == ',' || c == ' ' || c == '_';
        });
        res.set_header("Access-Control-Allow-Headers", asked.empty() || !plain ? "*" : asked);
        res.set_header("Access-Control-Max-Age", "600");
        res.status = 200;
        res.set_content("OK", "text/plain");
    }

    std::string read_body(const httplib::Request& req, const httplib::ContentReader& read,
                          Budget::Share& share) {
        std::string body;
        if (!req.has_header("Content-Length") && !req.has_header("Transfer-Encoding")) return body;
        std::optional<Refusal> refusal;
        const bool whole = read([&](const char* data, size_t size) {
            if (body.size() + size > max_body)
                refusal = Refusal{413, "the body is over 4 MiB", ""};
            else if (!share.cover(body.size() + size))
                refusal = Refusal{503, "too many large bodies at a time", ""};
            else
                body.append(data, size);
            return !refusal;
        });
        if (refusal) throw *refusal;
        if (!whole && Connection::here->late())
            throw Refusal{408, "the request did not come whole within 30 s", ""};
        if (!whole) throw Refusal{400, "the body did not come whole", ""};
        return body;
    }

    void answer(const httplib::Request& req, httplib::Response& res, std::string body) const {
        const Route* route = find(req.method == "HEAD" ? "GET" : req.method, req.path);
        const char* trace =
            req.has_header("X-Cloud-Trace-Context") ? "X-Cloud-Trace-Context" : "traceparent";
        HttpReply reply =
            route->answer({req.path, std::move(body), req.get_header_value("X-Request-Id"),
                           req.get_header_value(trace)});
        res.status = 200;
        if (!reply.more) return res.set_content(reply.body, reply.type.c_str());
        res.set_chunked_content_provider(
            reply.type, [more = std::move(reply.more)](size_t, httplib::DataSink& sink) {
                std::string out;
                bool goes_on = false;
                try {
                    goes_on = more(out);
                } catch (const std::exception& e) {  // uncaught, it ends the process
                    say(std::string("an answer ended with ") + e.what(), Severity::error);
                    return false;
                }
                // Ask first: writing to a closed peer succeeds until its reset arrives.
                if (!sink.is_writable()) return false;
                if (!out.empty() && !sink.write(out.data(), out.size())) return false;
                if (!goes_on) sink.done();
                return true;
            });
    }
};

HttpServer::HttpServer(const std::string& host, int wanted, std::vector<Route> routes,
                       std::vector<std::string> api_keys)
    : library(std::make_unique<Library>(std::move(routes), std::move(api_keys))) {
    // Replaces the library's own options, which would share the port with another server
    // (SO_REUSEPORT); the listen() below replaces its backlog of 5.
    int listening = -1;
    errno = 0;  // stays 0 if the name cannot be resolved
    library->set_socket_options([&](int fd) {
        const int yes = 1;
        listening = fd;
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    });
    if (wanted == 0)
        port = library->bind_to_any_port(host);
    else
        port = library->bind_to_port(host, wanted) ? wanted : -1;
    if (port < 0 || listen(listening, 1024) != 0) {
        throw Error(text("cannot listen on %s, port %d: %s", host.c_str(), wanted,
                         errno ? std::strerror(errno) : "no such address"));
    }
    listener = std::thread([this] {
        library->listen_after_bind();
        const std::lock_guard lock(library->connections->mutex);
        if (library->connections->closed) return;
        say("no connection can be accepted any more", Severity::error);  // such as out of memory
        std::_Exit(1);
    });
    while (!library->is_running()) std::this_thread::yield();  // until then, stop() has no effect
}

// New connections get 503, and the accept loop ends. Then SHUT_RD ends every read at once, and
// every answer when it next asks is_peer_alive(). 300 ms later SHUT_RDWR ends writes to slow
// readers too.
bool HttpServer::stop() {
    {
        const std::lock_guard lock(library->connections->mutex);
        library->connections->closed = true;
    }
    library->stop();
    for (const int how : {SHUT_RD, SHUT_RDWR}) {
        {
            const std::lock_guard lock(library->connections->mutex);
            for (const int fd : library->connections->sockets) ::shutdown(fd, how);
        }
        if (!library->connections->wait(300ms)) continue;
        listener.join();
        return true;
    }
    return false;
}

HttpServer::~HttpServer() {
    if (listener.joinable()) std::_Exit(1);  // a connection's thread may still use *library
}

}  // namespace gemma
