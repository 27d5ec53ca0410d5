// SPDX-License-Identifier: Apache-2.0
//
// http.h: routes, and the server that calls them. Sitting 3.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace gemma {

// Thrown to refuse a request or a flag; `param` names the field, if there is one.
struct Refusal {
    int status;  // of HTTP
    std::string message, param;
};

struct HttpRequest {
    std::string path, body;
    std::string id;     // the header X-Request-Id
    std::string trace;  // the header X-Cloud-Trace-Context, else traceparent
    // Only while a route answers.
    std::function<bool()> client_left = [] { return false; };
};

struct HttpReply {
    std::string body, type = "application/json";
    // If set, it makes the body: it is called until it returns false. Each call waits for 50 ms at
    // most and may append to out. What it appends is sent at once if the type is an event stream,
    // else when it is whole. It is destroyed when the body is written, or the client has left.
    std::function<bool(std::string& out)> more;
};

struct Route {
    std::string method, path;  // a path that ends with / serves all paths below it
    std::function<HttpReply(const HttpRequest&)> answer;  // may throw a Refusal
    bool body = true;                                     // a POST must bring JSON
};

// Listens once it is constructed. Each connection has a thread, one request and one answer.
class HttpServer {
  public:
    // Throws an Error if it cannot listen. Port 0: any free port. With keys, each request under /v1
    // must bring one of them.
    HttpServer(const std::string& host, int port, std::vector<Route> routes,
               std::vector<std::string> api_keys);
    ~HttpServer();
    int port;
    // Returns within a second. False: a connection has not ended, and the process must _Exit.
    bool stop();

  private:
    struct Library;
    std::unique_ptr<Library> library;
    std::thread listener;
};

}  // namespace gemma
