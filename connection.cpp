// SPDX-License-Identifier: Apache-2.0
//
// connection.cpp: reads a request as RFC 9112 has it, strictly. Sitting 3, after http.cpp.
//
//   [1] Head
//   [2] Body
//   [3] Bytes   in and out, counted, before the deadline
#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>

#include <sys/socket.h>

#include "connection.h"
#include "log.h"

namespace gemma {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

namespace {

std::chrono::milliseconds until(Clock::time_point end) {
    return std::max(0ms, std::chrono::ceil<std::chrono::milliseconds>(end - Clock::now()));
}

bool is_token(const std::string& s) {  // as RFC 9110 has it
    return !s.empty() && std::all_of(s.begin(), s.end(), [](char c) {
        return std::isalnum(uint8_t(c)) || (c && std::strchr("!#$%&'*+-.^_`|~", c));
    });
}

// A client that takes the server for a proxy sends a whole URL. No route reads a query.
std::string path_of(std::string target) {
    for (const char* scheme : {"http://", "https://"}) {
        const size_t size = std::strlen(scheme);
        if (!iequals(target.substr(0, size), scheme)) continue;
        target.erase(0, std::min(target.find_first_of("/?#", size), target.size()));
        if (!target.starts_with('/')) target.insert(0, "/");
    }
    return target.substr(0, target.find_first_of("?#"));
}

}  // namespace

// [1] Head ----------------------------------------------------------------------------------------

size_t Head::count(const char* name) const {
    return size_t(std::count_if(headers.begin(), headers.end(),
                                [&](const auto& h) { return iequals(h.first, name); }));
}

std::string Head::get(const char* name) const {
    for (const auto& [of, value] : headers) {
        if (iequals(of, name)) return value;
    }
    return "";
}

bool Connection::read_head() {
    allow(max_head, {431, "the head of the request is over 64 KiB", ""});
    try {
        std::string line;
        while (line.empty()) line = read_line();  // RFC 9112, 2.2: some clients send a CRLF first
        read_request_line(line);
        while (!(line = read_line()).empty()) read_header(line);
        const size_t hosts = head.count("Host");
        if (hosts > 1 || (hosts == 0 && head.knows_chunks))
            throw Refusal{400, text("a request must have one Host header, got %zu", hosts), ""};
    } catch (const Refusal& r) {
        refusal = r;
    }
    return received > 0;
}

void Connection::read_request_line(const std::string& line) {
    const size_t first = line.find(' '), last = line.rfind(' ');
    const std::string version = line.substr(last + 1);
    const std::string target = first < last ? line.substr(first + 1, last - first - 1) : "";
    head.method = line.substr(0, first);
    if (!is_token(head.method) || target.empty() || target.find_first_of(" \t") != target.npos)
        throw Refusal{400, "no valid HTTP request: it must begin with METHOD TARGET HTTP/1.1", ""};
    if (version.size() != 8 || !version.starts_with("HTTP/1.") ||
        !std::isdigit(uint8_t(version[7])))
        throw Refusal{400, "the version must be HTTP/1.1, got " + version.substr(0, 100), ""};
    head.knows_chunks = version != "HTTP/1.0";  // 1.2 would be what 1.1 is, and more
    head.path = path_of(target);
    request_line = head.method + " " + head.path + " HTTP/1.1\r\n\r\n";
}

// The text of a bad line is not repeated: it may hold a key.
void Connection::read_header(const std::string& line) {
    const size_t colon = std::min(line.find(':'), line.size());
    const std::string name = line.substr(0, colon);
    if (colon == line.size() || !is_token(name))
        throw Refusal{400, "a header must be NAME: VALUE, on one line, no space before :", ""};
    const size_t begin = line.find_first_not_of(" \t", colon + 1);
    const size_t last = line.find_last_not_of(" \t");
    const bool empty = begin == std::string::npos;
    head.headers.emplace_back(name, empty ? "" : line.substr(begin, last + 1 - begin));
}

// [2] Body ----------------------------------------------------------------------------------------

void Connection::read_body(const Take& take) {
    // In chunks of a byte a body takes six times its size; 8 to be sure.
    allow(8 * max_body, {413, "the body and its chunks' sizes are over 32 MiB", ""});
    const bool waits = head.knows_chunks && iequals(head.get("Expect"), "100-continue");
    const std::string go_on = "HTTP/1.1 100 Continue\r\n\r\n";
    if (waits) write(go_on.data(), go_on.size());
    if (head.has("Transfer-Encoding"))
        read_chunks(take);
    else if (head.has("Content-Length"))
        pass(std::stoull(head.get("Content-Length")), take);
}

void Connection::pass(size_t size, const Take& take) {
    while (size > 0) {
        if (at == end) fill();
        const size_t n = std::min(size, end - at);
        take(buffer + at, n);
        at += n;
        size -= n;
    }
}

void Connection::read_chunks(const Take& take) {
    for (;;) {
        size_t size = 0;
        const std::string line = read_line();  // a size, and perhaps ;extensions, which say nothing
        const char* const line_end = line.data() + line.size();
        const auto [behind, error] = std::from_chars(line.data(), line_end, size, 16);
        if (error != std::errc() || (behind < line_end && !std::strchr("; \t", *behind)))
            throw Refusal{400, "the size of a chunk must be a hexadecimal number", ""};
        if (size > max_body) throw Refusal{413, "the body is over 4 MiB", ""};
        if (size == 0) break;
        pass(size, take);
        if (!read_line().empty()) throw Refusal{400, "a chunk is longer than its size", ""};
    }
    // Trailers are headers behind the body. RFC 9112, 7.1.2, lets who reads none drop them.
    allow(max_head, {431, "the trailers of the body are over 64 KiB", ""});
    while (!read_line().empty()) continue;
}

// [3] Bytes ---------------------------------------------------------------------------------------

Connection::Connection(int f) : fd(f) { here = this; }
Connection::~Connection() {
    here = nullptr;
    linger();
}

void Connection::allow(size_t bytes, Refusal beyond) {
    may_receive = received - (end - at) + bytes;
    over_limit = std::move(beyond);
}

void Connection::fill() {
    const size_t room = std::min(sizeof buffer, std::max(received, may_receive) - received);
    if (room == 0) throw over_limit;
    if (!wait(POLLIN, until(deadline)) || Clock::now() >= deadline)
        throw Refusal{408, "the request did not come whole within 30 s", ""};
    const ssize_t n = recv(fd, buffer, room, MSG_DONTWAIT);
    if (n <= 0) throw Refusal{400, "the request did not come whole", ""};
    at = 0;
    end = size_t(n);
    received += size_t(n);
}

// Without its CRLF. Another control character is refused at once, so that a client that speaks TLS
// or ends lines with LF need not wait for the deadline.
std::string Connection::read_line() {
    std::string line;
    for (;;) {
        if (at == end) fill();
        if (line.size() >= max_head) throw Refusal{431, "a line of the body is over 64 KiB", ""};
        const char c = buffer[at++];
        const bool ends = line.ends_with('\r');
        if (ends && c == '\n') break;
        if (ends || c == 127 || (uint8_t(c) < ' ' && c != '\t' && c != '\r'))
            throw Refusal{400, "no valid HTTP request: lines end with CRLF, and have no controls",
                          ""};
        line += c;
    }
    line.pop_back();
    return line;
}

ssize_t Connection::read(char* to, size_t size) {
    const size_t n = request_line.copy(to, size);
    request_line.erase(0, n);
    return ssize_t(n);
}

ssize_t Connection::write(const char* from, size_t size) {
    for (;;) {
        const ssize_t n = send(fd, from, size, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n >= 0) return n;
        if ((errno != EAGAIN && errno != EINTR) || !wait(POLLOUT, patience)) return -1;
    }
}

short Connection::events(short asked, std::chrono::milliseconds limit) const {
    pollfd p{fd, short(asked | POLLRDHUP), 0};
    return poll(&p, 1, int(limit.count())) > 0 ? p.revents : short(0);
}
bool Connection::wait(short asked, std::chrono::milliseconds limit) const {
    return events(asked, limit) & (asked | POLLHUP | POLLERR);
}

// Reads and drops input for up to two seconds before the socket is closed: closing it with
// unread bytes would reset the connection, and the client could lose the answer.
void Connection::linger() {
    shutdown(fd, SHUT_WR);
    const auto stop = Clock::now() + 2s;
    while (Clock::now() < stop && wait(POLLIN, until(stop))) {
        if (recv(fd, buffer, sizeof buffer, MSG_DONTWAIT) <= 0) break;
    }
}

}  // namespace gemma
