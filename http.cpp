// SPDX-License-Identifier: Apache-2.0
//
// http.cpp: the wire. Sitting 3, first. cpp-httplib parses and writes HTTP; what keeps it safe
// among strangers is here and nowhere else, and holds for Debian 12's version (0.11.4) as for newer
// ones:
//
//   [1] Connection   every byte that is read is counted, and has a deadline
//   [2] Crowd        a thread for each connection; how many there may be, and how much of bodies
//   [3] Refusals     one envelope for every error
//   [4] Gate         what can be refused is refused before the body is read
//   [5] HttpServer
//
// By itself the library (facts measured on 0.11.4 and 0.18.7) buffers a header line, a number of
// headers and a chunked body without limit, decompresses, knows no deadline for a whole request,
// queues five connections and serves them from a pool that idle ones fill, ends streams in their
// midst when it is stopped, and ends the process if a stream's callback throws.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <thread>

#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <httplib.h>
#include <nlohmann/json.hpp>
#include <openssl/crypto.h>
#include <openssl/sha.h>

#include "gemma.h"
#include "http.h"

namespace gemma {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using nlohmann::ordered_json;

namespace {

constexpr size_t max_head = 64 << 10;  // of a request: its line and its headers
constexpr size_t max_body = 4 << 20;
constexpr size_t max_connections = 2048;
constexpr auto patience = 30s;  // for a request to come whole, and for a reader that takes nothing

// [1] Connection ----------------------------------------------------------------------------------

class Connection : public httplib::Stream {
  public:
    explicit Connection(int fd_) : fd(fd_) { here = this; }
    ~Connection() override {
        here = nullptr;
        linger();
    }
    Connection(const Connection&) = delete;

    // The one that this thread serves, for read_body: the library hands nothing through.
    static thread_local Connection* here;

    bool late() const { return Clock::now() >= deadline; }
    // The head is whole. A body in chunks of a byte takes six times its size; 8 to be sure.
    void expect_body() { allowed = taken + 8 * max_body; }

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

    // Is the client still there? Its FIN, or a reset, says no, also behind unread bytes. So who
    // closes its sending side after the request counts as gone (README, Limits).
    bool is_peer_alive() const { return !(events(0, 0ms) & (POLLRDHUP | POLLHUP | POLLERR)); }
    bool is_writable() const { return is_peer_alive(); }  // as 0.11.4 and 0.18.7 call it
    bool is_readable() const override { return at < end || wait(POLLIN, 0ms); }
    int socket() const override { return fd; }
    void get_remote_ip_and_port(std::string&, int&) const override {}
    void get_local_ip_and_port(std::string&, int&) const override {}
    // What versions from 0.41 on ask besides, the image's among them; virtual in some only, so
    // these say no `override`.
    bool wait_readable() const { return at < end || wait(POLLIN, patience); }
    bool wait_writable() const { return wait(POLLOUT, patience); }
    time_t duration() const { return 0; }

  private:
    short events(short asked, std::chrono::milliseconds limit) const {
        pollfd p{fd, short(asked | POLLRDHUP), 0};
        return poll(&p, 1, int(limit.count())) > 0 ? p.revents : short(0);
    }
    bool wait(short asked, std::chrono::milliseconds limit) const {
        return events(asked, std::max(limit, 0ms)) & (asked | POLLHUP | POLLERR);
    }

    bool fill() {
        const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
        const size_t most = std::min(sizeof buffer, allowed - taken);
        if (most == 0 || !wait(POLLIN, left) || late()) return false;
        const ssize_t n = recv(fd, buffer, most, MSG_DONTWAIT);
        if (n <= 0) return false;
        at = 0;
        end = size_t(n);
        taken += size_t(n);
        return true;
    }

    // To close while something is unread would reset the connection, and the answer might be lost
    // with it. So what still comes is read and dropped, for a while.
    void linger() {
        shutdown(fd, SHUT_WR);
        const auto until = Clock::now() + 2s;
        const auto left = [&] {
            return std::chrono::ceil<std::chrono::milliseconds>(until - Clock::now());
        };
        while (left() > 0ms && wait(POLLIN, left())) {
            if (recv(fd, buffer, sizeof buffer, MSG_DONTWAIT) <= 0) break;
        }
    }

    const int fd;
    const Clock::time_point deadline = Clock::now() + patience;
    size_t allowed = max_head, taken = 0, at = 0, end = 0;
    char buffer[4096];
};

thread_local Connection* Connection::here = nullptr;

// [2] Crowd ---------------------------------------------------------------------------------------

// A thread for each connection, made when it comes: 30 KB for one that idles, and none waits for
// another's. The library's loop hands over a function that serves one connection.
struct Crowd {
    std::mutex mutex;
    std::condition_variable changed;
    int threads = 0;      // guarded by mutex
    std::set<int> open;   // guarded by mutex: their sockets
    bool closed = false;  // guarded by mutex: whoever still comes is sent away

    // True while the accept loop serves a connection itself, because std::thread failed; such a
    // connection gets 503.
    static thread_local bool no_thread;

    void count(int change) {
        const std::lock_guard lock(mutex);
        threads += change;
        changed.notify_all();
    }
    bool wait(std::chrono::milliseconds limit) {  // until all have left
        std::unique_lock lock(mutex);
        return changed.wait_for(lock, limit, [&] { return threads == 0; });
    }
};

thread_local bool Crowd::no_thread = false;

class Queue : public httplib::TaskQueue {
  public:
    explicit Queue(std::shared_ptr<Crowd> c) : crowd(std::move(c)) {}
    using Enqueued = decltype(std::declval<httplib::TaskQueue>().enqueue({}));  // void, or bool

    Enqueued enqueue(std::function<void()> serve_one) override {
        crowd->count(+1);
        try {
            std::thread([serve_one, who = crowd] {
                serve_one();
                who->count(-1);
            }).detach();
        } catch (const std::system_error&) {
            Crowd::no_thread = true;
            serve_one();
            Crowd::no_thread = false;
            crowd->count(-1);
        }
        return Enqueued(true);
    }
    void shutdown() override { crowd->wait(std::chrono::hours(1)); }

  private:
    const std::shared_ptr<Crowd> crowd;
};

// Memory of bodies until they are answered. Each has 64 KiB of its own. Larger bodies share 32 MiB;
// while these are taken, their sockets are not read. The oldest reader may go beyond them,
// otherwise two half-read bodies could block each other for ever.
class Budget {
  public:
    class Share {
      public:
        explicit Share(Budget& b) : budget(b) {}
        ~Share() {
            const std::lock_guard lock(budget.mutex);
            budget.left += int64_t(taken);
            budget.shares.erase(number);
            budget.changed.notify_all();
        }
        Share(const Share&) = delete;

        bool cover(size_t size) {  // false: no room within 30 s
            const size_t own = 64 << 10, more = size > own + taken ? size - own - taken : 0;
            if (more == 0) return true;
            std::unique_lock lock(budget.mutex);
            if (number == 0) {
                number = ++budget.last;
                budget.shares.insert(number);
            }
            const auto may_go_on = [&] {
                return budget.left >= int64_t(more) || *budget.shares.begin() == number;
            };
            if (!budget.changed.wait_for(lock, patience, may_go_on)) return false;
            taken += more;
            budget.left -= int64_t(more);
            return true;
        }

      private:
        Budget& budget;
        size_t taken = 0;
        uint64_t number = 0;  // 0: none
    };

  private:
    std::mutex mutex;
    std::condition_variable changed;
    // guarded by mutex
    int64_t left = 32 << 20;
    uint64_t last = 0;
    std::set<uint64_t> shares;  // oldest first
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

bool same(const std::string& a, const char* b) { return strcasecmp(a.c_str(), b) == 0; }

// Constant time: how long it takes says nothing about the key.
bool equal_secrets(const std::string& a, const std::string& b) {
    unsigned char hash[2][SHA256_DIGEST_LENGTH];
    SHA256(reinterpret_cast<const unsigned char*>(a.data()), a.size(), hash[0]);
    SHA256(reinterpret_cast<const unsigned char*>(b.data()), b.size(), hash[1]);
    return CRYPTO_memcmp(hash[0], hash[1], SHA256_DIGEST_LENGTH) == 0;
}

// How a body comes is said once, and in one way: else two readers of the same bytes might see two
// requests in them.
void check_framing(const httplib::Request& req) {
    const size_t lengths = req.get_header_value_count("Content-Length"),
                 codings = req.get_header_value_count("Transfer-Encoding");
    const std::string length = req.get_header_value("Content-Length");
    const bool digits = !length.empty() && length.size() <= 18 &&
                        length.find_first_not_of("0123456789") == std::string::npos;
    if (lengths + codings > 1)
        throw Refusal{400, "a body has one Content-Length or one Transfer-Encoding", ""};
    if (lengths && !digits)
        throw Refusal{400, "Content-Length must be a number, got " + length.substr(0, 100), ""};
    if (codings && !same(req.get_header_value("Transfer-Encoding"), "chunked"))
        throw Refusal{400, "Transfer-Encoding must be chunked", ""};
    if (lengths && std::stoull(length) > max_body)
        throw Refusal{413, "the body is over 4 MiB: Content-Length " + length, ""};
}

void check_content(const httplib::Request& req) {
    if (req.has_header("Content-Encoding") &&
        !same(req.get_header_value("Content-Encoding"), "identity"))
        throw Refusal{415, "Content-Encoding must be identity", ""};
    const std::string type = req.get_header_value("Content-Type");
    const size_t end = std::min(type.find_first_of("; \t"), type.size());
    if (!same(type.substr(0, end), "application/json"))
        throw Refusal{400, "Unsupported Media Type: Only 'application/json' is allowed", ""};
}

}  // namespace

// [5] HttpServer ----------------------------------------------------------------------------------

struct HttpServer::Library : httplib::Server {
    const std::vector<Route> routes;
    const std::vector<std::string> api_keys;
    const std::shared_ptr<Crowd> crowd = std::make_shared<Crowd>();
    Budget budget;

    Library(std::vector<Route> r, std::vector<std::string> keys)
        : routes(std::move(r)), api_keys(std::move(keys)) {
        new_task_queue = [this] { return new Queue(crowd); };
        set_tcp_nodelay(true);
        set_keep_alive_max_count(1);
        set_pre_routing_handler([this](const auto& req, auto& res) {
            auto& request = const_cast<httplib::Request&>(req);
            // It would compress event streams, and hold them back until there is a block of it.
            request.headers.erase("Accept-Encoding");
            request.ranges.clear();  // it would cut JSON
            const bool body = guard(res, [&] { check(req, res); }) && req.method == "POST";
            if (!body && res.status == -1) guard(res, [&] { answer(req, res, {}); });
            return body ? HandlerResponse::Unhandled : HandlerResponse::Handled;
        });
        Post(".*", [this](const auto& req, auto& res, const httplib::ContentReader& read) {
            Budget::Share share(budget);
            guard(res, [&] { answer(req, res, read_body(req, read, share)); });
        });
        set_error_handler([](const auto&, auto& res) {  // what the library itself refuses
            if (res.body.empty()) refuse_with(res, {res.status, "no valid HTTP request", ""});
        });
    }

    // One connection, from its first byte to its end, in a thread of its own.
    bool process_and_close_socket(socket_t fd) override {
        bool many, ok = false;
        {
            const std::lock_guard lock(crowd->mutex);
            crowd->open.insert(fd);
            many = Crowd::no_thread || crowd->closed || crowd->open.size() > max_connections;
        }
        if (many) {
            const std::string body = envelope({503, "too many connections", ""});
            const std::string all = text(
                "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
                "Retry-After: 1\r\nConnection: close\r\nContent-Length: %zu\r\n\r\n%s",
                body.size(), body.c_str());
            send(fd, all.data(), all.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
            ::shutdown(fd, SHUT_WR);
        } else {
            Connection connection(fd);
            bool closed = true;
            const std::function<void(httplib::Request&)> head = [&](httplib::Request&) {
                connection.expect_body();
            };
            try {
                ok = process(*this, connection, closed, head);
            } catch (const std::exception& e) {  // out of memory, say: it would end the process
                say(std::string("a connection ended with ") + e.what(), Severity::error);
            }
        }
        const std::lock_guard lock(crowd->mutex);
        crowd->open.erase(fd);
        close(fd);
        return ok;
    }

    // Newer versions want addresses too, which nobody here looks at.
    static bool process(auto& self, httplib::Stream& stream, bool& closed, const auto& head) {
        if constexpr (requires { self.process_request(stream, true, closed, head); })
            return self.process_request(stream, true, closed, head);
        else
            return self.process_request(stream, "", 0, "", 0, true, closed, head);
    }

    static bool guard(httplib::Response& res, auto&& what) {
        try {
            what();
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
            bool known = false;
            for (const std::string& key : api_keys)
                known |= same(given.substr(0, 7), "Bearer ") &&
                         equal_secrets(given.substr(std::min<size_t>(7, given.size())), key);
            if (!known) throw Refusal{401, "Unauthorized", ""};
        }
        const std::string what = req.method + " " + req.path.substr(0, 100);
        if (!find("", req.path)) throw Refusal{404, what + " is not served", ""};
        if (!find(req.method == "HEAD" ? "GET" : req.method, req.path)) {
            std::string allowed;
            if (find("GET", req.path)) allowed = "GET, HEAD";
            if (find("POST", req.path)) allowed += allowed.empty() ? "POST" : ", POST";
            res.set_header("Allow", allowed);
            throw Refusal{405, what + " is not served: use " + allowed, ""};
        }
        check_framing(req);
        if (req.method == "POST" && find("POST", req.path)->body) check_content(req);
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
        const bool comes = req.has_header("Content-Length") || req.has_header("Transfer-Encoding");
        bool over = false, crowded = false;
        const bool whole = !comes || read([&](const char* data, size_t size) {
            over = body.size() + size > max_body;
            crowded = !over && !share.cover(body.size() + size);
            if (!over && !crowded) body.append(data, size);
            return !over && !crowded;
        });
        if (over) throw Refusal{413, "the body is over 4 MiB", ""};
        if (crowded) throw Refusal{503, "too many large bodies at a time", ""};
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
                } catch (const std::exception& e) {  // it would end the process
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
    // The library would share the port with another server (SO_REUSEPORT) and queue 5 connections.
    int listening = -1;
    errno = 0;
    library->set_socket_options([&](int fd) {
        const int yes = 1;
        setsockopt(listening = fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
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
        const std::lock_guard lock(library->crowd->mutex);
        if (library->crowd->closed) return;
        say("no connection can be accepted any more", Severity::error);  // out of memory, say
        std::_Exit(1);
    });
    while (!library->is_running()) std::this_thread::yield();  // stop() would not reach it before
}

// Nobody new; those who have sent no request are cut at once, those who read an answer soon.
bool HttpServer::stop() {
    {
        const std::lock_guard lock(library->crowd->mutex);
        library->crowd->closed = true;
    }
    library->stop();
    for (const int how : {SHUT_RD, SHUT_RDWR}) {
        {
            const std::lock_guard lock(library->crowd->mutex);
            for (const int fd : library->crowd->open) ::shutdown(fd, how);
        }
        if (!library->crowd->wait(300ms)) continue;
        listener.join();
        return true;
    }
    return false;
}

HttpServer::~HttpServer() {
    if (listener.joinable())
        std::_Exit(1);  // someone is still inside what is about to be destroyed
}

}  // namespace gemma
