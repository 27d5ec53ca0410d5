// SPDX-License-Identifier: Apache-2.0
//
// connection.h: a connection to one client: its bytes become a Head and a body. Sitting 3.
//
// Every byte is counted, there is one deadline for the whole request, and what a Refusal says is
// what a client can mend. cpp-httplib sees the request line only, so it cannot misread the rest.
#pragma once

#include <chrono>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <poll.h>
#include <strings.h>

#include <httplib.h>

#include "http.h"

namespace gemma {

constexpr size_t max_head = 64 << 10;  // request line and headers
constexpr size_t max_body = 4 << 20;
constexpr auto patience = std::chrono::seconds(30);  // to send a request; to take some of an answer

inline bool iequals(const std::string& a, const char* b) { return !strcasecmp(a.c_str(), b); }

struct Head {
    std::string method, path;   // as the client sent it: percent-encoded
    bool knows_chunks = false;  // HTTP/1.1; a client that speaks 1.0 does not
    // The values are the client's bytes. cpp-httplib would decode %-escapes in them: an API key
    // with a % would not be the key, and a proxy could see another length of the body.
    std::vector<std::pair<std::string, std::string>> headers;

    size_t count(const char* name) const;
    bool has(const char* name) const { return count(name) > 0; }
    std::string get(const char* name) const;  // the first; "": there is none
};

class Connection : public httplib::Stream {
  public:
    explicit Connection(int fd);
    ~Connection() override;
    Connection(const Connection&) = delete;

    // The connection that this thread serves: the library calls handlers without it.
    static inline thread_local Connection* here = nullptr;

    Head head;
    std::optional<Refusal> refusal;  // of the head
    // False: the client closed, or the deadline came, before its first byte.
    bool read_head();

    using Take = std::function<void(const char* bytes, size_t size)>;  // may throw
    // Hands on the body, piece by piece. The head must have passed check_framing().
    void read_body(const Take& take);

    // A FIN or a reset says that the client has left, even behind unread bytes. So a client that
    // closes its sending side after the request counts as gone (README, Limits).
    bool is_peer_alive() const { return !(events(0, {}) & (POLLRDHUP | POLLHUP | POLLERR)); }

    // For the library: it reads the request line, and then the end of the input.
    ssize_t read(char* to, size_t size) override;
    ssize_t write(const char* from, size_t size) override;
    bool is_readable() const override { return !request_line.empty(); }
    bool is_writable() const { return is_peer_alive(); }  // 0.11.4 and 0.18.7 call this one
    int socket() const override { return fd; }
    void get_remote_ip_and_port(std::string&, int&) const override {}
    void get_local_ip_and_port(std::string&, int&) const override {}
    // Versions from 0.41 on, the image's among them, call these too. Only some versions declare
    // them virtual, so they cannot say `override`.
    bool wait_readable() const { return is_readable(); }
    bool wait_writable() const { return wait(POLLOUT, patience); }
    time_t duration() const { return 0; }

  private:
    short events(short asked, std::chrono::milliseconds limit) const;
    bool wait(short asked, std::chrono::milliseconds limit) const;
    void allow(size_t bytes, Refusal beyond);
    void fill();
    std::string read_line();
    void read_request_line(const std::string& line);
    void read_header(const std::string& line);
    void pass(size_t size, const Take& take);
    void read_chunks(const Take& take);
    void linger();

    const int fd;
    const std::chrono::steady_clock::time_point deadline =
        std::chrono::steady_clock::now() + patience;
    char buffer[4096];
    size_t at = 0, end = 0;  // buffer[at, end) is unread
    size_t received = 0, may_receive = 0;
    Refusal over_limit{};                                 // thrown by a byte beyond may_receive
    std::string request_line = "GET / HTTP/1.1\r\n\r\n";  // what the library has not read of it
};

}  // namespace gemma
