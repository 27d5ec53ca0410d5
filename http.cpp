// SPDX-License-Identifier: Apache-2.0
//
// http.cpp: the wire. Sitting 3, first. A Connection reads the request; cpp-httplib decodes its
// path and writes the answer. This file and connection.cpp keep the library safe against strangers,
// for Debian 12's version (0.11.4) as for newer ones. docs/design.md, section 9, lists its traps.
//
//   [1] Connections  limits on their number and on memory for bodies
//   [2] Refusals     one envelope for every error
//   [3] Gate         refuses before the body is read, where the head suffices
//   [4] Answers      written whole with their length, or streamed
//   [5] HttpServer
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <ctime>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <thread>

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <httplib.h>
#include <nlohmann/json.hpp>
#include <openssl/crypto.h>

#include "connection.h"
#include "gemma.h"
#include "http.h"

namespace gemma {

using namespace std::chrono_literals;
using nlohmann::ordered_json;

namespace {

constexpr size_t max_connections = 2048;

// [1] Connections ---------------------------------------------------------------------------------

// The connections of a server. Each has a thread of its own, so that none waits for another.
struct Connections {
    std::mutex mutex;
    std::condition_variable changed;
    int threads = 0;        // guarded by mutex
    std::set<int> sockets;  // guarded by mutex
    bool closed = false;    // guarded by mutex; true: each new connection gets 503

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

// [2] Refusals ------------------------------------------------------------------------------------

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

// [3] Gate ----------------------------------------------------------------------------------------

// Takes the same time wherever the first wrong byte is; only the length of a key shows.
bool equal_secrets(const std::string& a, const std::string& b) {
    return a.size() == b.size() && CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

// The head must give the size of the body once, and in one way: otherwise a proxy and this server
// could see different requests in the same bytes.
void check_framing(const Head& head) {
    const size_t lengths = head.count("Content-Length");
    const size_t codings = head.count("Transfer-Encoding");
    const std::string length = head.get("Content-Length");
    const bool digits = !length.empty() && length.size() <= 18 &&
                        length.find_first_not_of("0123456789") == std::string::npos;
    if (lengths + codings > 1)
        throw Refusal{400, "a body has one Content-Length or one Transfer-Encoding", ""};
    if (lengths && !digits)
        throw Refusal{400, "Content-Length must be a number, got " + length.substr(0, 100), ""};
    if (codings && !(head.knows_chunks && iequals(head.get("Transfer-Encoding"), "chunked")))
        throw Refusal{400, "Transfer-Encoding must be chunked, and the version HTTP/1.1", ""};
    if (lengths && std::stoull(length) > max_body)
        throw Refusal{413, "the body is over 4 MiB: Content-Length " + length, ""};
}

void check_content(const Head& head) {
    if (head.has("Content-Encoding") && !iequals(head.get("Content-Encoding"), "identity"))
        throw Refusal{415, "Content-Encoding must be identity", ""};
    const std::string type = head.get("Content-Type");
    const size_t end = std::min(type.find_first_of("; \t"), type.size());
    if (!iequals(type.substr(0, end), "application/json"))
        throw Refusal{400, "Unsupported Media Type: Only 'application/json' is allowed", ""};
}

void check_key(const Head& head, const std::vector<std::string>& keys) {
    const std::string given = head.get("Authorization");
    const bool bearer = iequals(given.substr(0, 7), "Bearer ");
    bool known = false;
    for (const std::string& key : keys) {
        if (bearer && equal_secrets(given.substr(7), key)) known = true;
    }
    if (!known) throw Refusal{401, "Unauthorized", ""};
}

// What a browser asks before it lets a page of another origin send a request.
void preflight(const Head& head, httplib::Response& res) {
    res.set_header("Access-Control-Allow-Methods", "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT");
    const std::string asked = head.get("Access-Control-Request-Headers");
    const bool plain = std::all_of(asked.begin(), asked.end(), [](char c) {
        return std::isalnum(uint8_t(c)) || c == '-' || c == ',' || c == ' ' || c == '_';
    });
    res.set_header("Access-Control-Allow-Headers", asked.empty() || !plain ? "*" : asked);
    res.set_header("Access-Control-Max-Age", "600");
    res.status = 200;
    res.set_content("OK", "text/plain");
}

// [4] Answers -------------------------------------------------------------------------------------

std::string date() {
    const std::time_t now = std::time(nullptr);
    std::tm utc{};
    char text[40];
    std::strftime(text, sizeof text, "%a, %d %b %Y %H:%M:%S GMT", gmtime_r(&now, &utc));
    return text;
}

// Of an answer whose end is not made yet. HTTP/1.0 has no chunks: there the connection ends it.
void stream(httplib::Response& res, HttpReply reply) {
    res.set_header("Cache-Control", "no-cache");
    res.set_header("X-Accel-Buffering", "no");  // nginx would collect events, and send many at once
    auto write = [more = std::move(reply.more)](size_t, httplib::DataSink& sink) {
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
    };
    if (Connection::here->head.knows_chunks)
        res.set_chunked_content_provider(reply.type, std::move(write));
    else
        res.set_content_provider(reply.type, std::move(write));
}

// Waits for the end of the answer, since its length comes first. `more` must outlive the writing: a
// shutdown takes the request for answered once `more` is destroyed.
void write_whole(httplib::Response& res, HttpReply made) {
    const auto reply = std::make_shared<HttpReply>(std::move(made));
    while (reply->more(reply->body)) {
        if (!Connection::here->is_peer_alive())  // or stop() has ended every read
            throw Refusal{503, "the server shut down before the answer was whole", ""};
    }
    res.set_content_provider(reply->body.size(), reply->type,
                             [reply](size_t at, size_t size, httplib::DataSink& sink) {
                                 return sink.write(reply->body.data() + at, size);
                             });
}

}  // namespace

// [5] HttpServer ----------------------------------------------------------------------------------

struct HttpServer::Library : httplib::Server {
    const std::vector<Route> routes;
    const std::vector<std::string> api_keys;
    const std::shared_ptr<Connections> connections = std::make_shared<Connections>();
    Budget budget;
    int listening = -1;

    Library(std::vector<Route> r, std::vector<std::string> keys)
        : routes(std::move(r)), api_keys(std::move(keys)) {
        // The library calls this with the path of the request, before it would look for handlers.
        set_pre_routing_handler([this](const auto& req, auto& res) {
            guard(res, [&] { answer(*Connection::here, req.path, res); });
            return HandlerResponse::Handled;
        });
        set_error_handler([](const auto&, auto& res) {  // the library's own refusals have no body
            const char* reason =
                res.status == 414 ? "the path is over 8 KiB" : "unknown method or target";
            if (res.body.empty()) refuse_with(res, {res.status, reason, ""});
        });
        set_post_routing_handler([](const auto&, auto& res) {  // of every answer
            res.set_header("Date", date());
            res.headers.erase("Accept-Ranges");  // they would cut JSON
        });
    }

    // Throws an Error if it cannot. Returns the port.
    int bind(const std::string& host, int wanted) {
        // Replaces the library's own options, which would share the port with another server
        // (SO_REUSEPORT); the listen() below replaces its backlog of 5.
        set_socket_options([&](int fd) {
            const int yes = 1;
            listening = fd;
            setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);  // connections inherit it
        });
        errno = 0;  // stays 0 if the name cannot be resolved
        const int port = wanted == 0                  ? bind_to_any_port(host)
                         : bind_to_port(host, wanted) ? wanted
                                                      : -1;
        if (port < 0 || ::listen(listening, 1024) != 0) {
            throw Error(text("cannot listen on %s, port %d: %s", host.c_str(), wanted,
                             errno ? std::strerror(errno) : "no such address"));
        }
        return port;
    }

    // Until stop(). The library's own loop would end, and close the port, at the first error. But
    // each error of accept passes: a client that has left, a network that is down, a full table of
    // files.
    void accept_all() {
        for (int failures = 0;;) {
            const int fd = accept4(listening, nullptr, nullptr, SOCK_CLOEXEC);
            const int error = errno;
            {
                const std::lock_guard lock(connections->mutex);
                if (connections->closed && fd >= 0) close(fd);
                if (connections->closed) return;
            }
            if (fd >= 0) {
                failures = 0;
                start_thread(fd);
                continue;
            }
            if (++failures == 1000)
                say(text("accept has failed for a second, and is tried again: %s",
                         std::strerror(error)),
                    Severity::warning);
            std::this_thread::sleep_for(1ms);
        }
    }

    void start_thread(int fd) {
        connections->count(+1);
        try {
            std::thread([this, fd, counted = connections] {
                serve(fd);
                counted->count(-1);
            }).detach();
        } catch (const std::exception&) {  // no thread, no memory
            turn_away(fd);
            close(fd);
            connections->count(-1);
        }
    }

    // Serves one connection, from its first byte to its end.
    void serve(int fd) {
        bool admitted;
        {
            const std::lock_guard lock(connections->mutex);
            connections->sockets.insert(fd);
            admitted = !connections->closed && connections->sockets.size() <= max_connections;
        }
        if (admitted)
            read_and_answer(fd);
        else
            turn_away(fd);
        const std::lock_guard lock(connections->mutex);
        connections->sockets.erase(fd);
        close(fd);
    }

    static void turn_away(int fd) {
        const std::string body = envelope({503, "too many connections", ""});
        const std::string all = text(
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nDate: %s\r\n"
            "Retry-After: 1\r\nConnection: close\r\nContent-Length: %zu\r\n\r\n%s",
            date().c_str(), body.size(), body.c_str());
        send(fd, all.data(), all.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
        ::shutdown(fd, SHUT_WR);
    }

    void read_and_answer(int fd) try {
        Connection connection(fd);
        if (connection.read_head()) process(*this, connection);
    } catch (const std::exception& e) {  // such as bad_alloc; uncaught, it ends the process
        say(std::string("a connection ended with ") + e.what(), Severity::error);
    }

    // 0.11.4 takes no addresses; newer versions take them, and nothing here reads them.
    static void process(auto& self, httplib::Stream& stream) {
        bool closed = true;
        if constexpr (requires { self.process_request(stream, true, closed, nullptr); })
            self.process_request(stream, true, closed, nullptr);
        else
            self.process_request(stream, "", 0, "", 0, true, closed, nullptr);
    }

    // If `step` throws, res is the refusal.
    static void guard(httplib::Response& res, auto&& step) {
        try {
            step();
        } catch (const Refusal& r) {
            refuse_with(res, r);
        } catch (const std::exception& e) {
            say(std::string("a request ended with ") + e.what(), Severity::error);
            refuse_with(res, {500, "internal error", ""});
        }
    }

    const Route* find(const std::string& method, const std::string& path) const {
        const auto found = std::find_if(routes.begin(), routes.end(), [&](const Route& r) {
            return (method.empty() || r.method == method) &&
                   (r.path.ends_with('/') ? path.starts_with(r.path) : path == r.path);
        });
        return found == routes.end() ? nullptr : &*found;
    }

    void answer(Connection& connection, const std::string& path, httplib::Response& res) {
        const Head& head = connection.head;
        if (connection.refusal) throw *connection.refusal;
        const bool origin = head.has("Origin");
        if (origin) res.set_header("Access-Control-Allow-Origin", "*");
        if (origin && head.method == "OPTIONS" && head.has("Access-Control-Request-Method"))
            return preflight(head, res);
        if (!api_keys.empty() && path.starts_with("/v1")) check_key(head, api_keys);
        const Route& route = find_or_refuse(head.method, path, res);
        check_framing(head);
        if (head.method == "POST" && route.body) check_content(head);
        HttpReply reply = ask(connection, route, path);
        res.status = 200;
        if (!reply.more) return res.set_content(reply.body, reply.type.c_str());
        if (reply.type.starts_with("text/event-stream"))
            stream(res, std::move(reply));
        else
            write_whole(res, std::move(reply));
    }

    const Route& find_or_refuse(const std::string& method, const std::string& path,
                                httplib::Response& res) const {
        const std::string request = method + " " + path.substr(0, 100);
        if (!find("", path)) throw Refusal{404, request + " is not served", ""};
        if (const Route* route = find(method == "HEAD" ? "GET" : method, path)) return *route;
        std::string allowed;
        if (find("GET", path)) allowed = "GET, HEAD";
        if (find("POST", path)) allowed += allowed.empty() ? "POST" : ", POST";
        res.set_header("Allow", allowed);
        throw Refusal{405, request + " is not served: use " + allowed, ""};
    }

    HttpReply ask(Connection& connection, const Route& route, const std::string& path) {
        const Head& head = connection.head;
        Budget::Share share(budget);
        std::string body;
        if (head.method == "POST") {
            connection.read_body([&](const char* bytes, size_t size) {
                if (body.size() + size > max_body) throw Refusal{413, "the body is over 4 MiB", ""};
                if (!share.cover(body.size() + size))
                    throw Refusal{503, "too many large bodies at a time", ""};
                body.append(bytes, size);
            });
        }
        const char* trace =
            head.has("X-Cloud-Trace-Context") ? "X-Cloud-Trace-Context" : "traceparent";
        return route.answer({path, std::move(body), head.get("X-Request-Id"), head.get(trace),
                             [&] { return !connection.is_peer_alive(); }});
    }
};

HttpServer::HttpServer(const std::string& host, int wanted, std::vector<Route> routes,
                       std::vector<std::string> api_keys)
    : library(std::make_unique<Library>(std::move(routes), std::move(api_keys))) {
    port = library->bind(host, wanted);
    listener = std::thread([this] { library->accept_all(); });
}

// New connections get 503, and the accept loop ends. Then SHUT_RD ends every read at once, and
// every answer when it next asks is_peer_alive(). 300 ms later SHUT_RDWR ends writes to slow
// readers too.
bool HttpServer::stop() {
    {
        const std::lock_guard lock(library->connections->mutex);
        library->connections->closed = true;
    }
    ::shutdown(library->listening, SHUT_RDWR);  // wakes accept
    for (const int how : {SHUT_RD, SHUT_RDWR}) {
        {
            const std::lock_guard lock(library->connections->mutex);
            for (const int fd : library->connections->sockets) ::shutdown(fd, how);
        }
        if (!library->connections->wait(300ms)) continue;
        listener.join();
        close(library->listening);
        return true;
    }
    return false;
}

HttpServer::~HttpServer() {
    if (listener.joinable()) std::_Exit(1);  // a connection's thread may still use *library
}

}  // namespace gemma
