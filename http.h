// SPDX-License-Identifier: Apache-2.0
//
// http.h: what http.cpp offers and what a route is. Sitting 3.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace gemma {

// A mistake of the client's, or of a flag's; `param` names the field.
struct Refusal {
    int status;  // of HTTP
    std::string message, param;
};

struct HttpRequest {
    std::string path, body;
    std::string id;     // the header X-Request-Id
    std::string trace;  // the header X-Cloud-Trace-Context, else traceparent
};

struct HttpReply {
    std::string body, type = "application/json";
    // Where set, in the place of body: is called until it returns false, and appends what is ready,
    // perhaps nothing; it waits for 50 ms at most. It is destroyed when the client has left.
    std::function<bool(std::string& out)> more;
};

struct Route {
    std::string method, path;  // a path that ends with / serves all below it
    std::function<HttpReply(const HttpRequest&)> answer;  // throws a Refusal when it will not
    bool body = true;                                     // of a POST: it must be JSON
};

// Listens from its start on; each connection has a thread, one request and one answer.
class HttpServer {
  public:
    // Error: cannot listen. Port 0: any free one. With keys, what lies under /v1 wants one of them.
    HttpServer(const std::string& host, int port, std::vector<Route> routes,
               std::vector<std::string> api_keys);
    ~HttpServer();
    int port;
    // Ends within a second; false: some connection did not, and the process must exit by itself.
    bool stop();

  private:
    struct Library;
    std::unique_ptr<Library> library;
    std::thread listener;
};

}  // namespace gemma
