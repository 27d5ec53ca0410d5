// SPDX-License-Identifier: Apache-2.0
//
// log_test.cpp: the server's log for people and for Cloud Logging, and what must never be in it.
#include "client.h"

namespace {

const Strings cloud{"K_SERVICE=gemma", "GOOGLE_CLOUD_PROJECT=some-project"};

// A ready server that logs JSON.
struct CloudServer : Child {
    int port = 0;
    explicit CloudServer(const Strings& flags = {}, const Strings& variables = cloud)
        : Child(with_defaults(flags), variables) {
        const std::string start = "listening on http://127.0.0.1:";
        REQUIRE(says("\"ready in"));
        port = std::atoi(log().c_str() + log().find(start) + start.size());
    }
    ~CloudServer() { terminate(); }

    // All lines so far, parsed; throws if a line is not JSON.
    std::vector<json> entries() {
        std::vector<json> all;
        const std::string whole = log();
        for (size_t at = 0, end; (end = whole.find('\n', at)) != std::string::npos; at = end + 1)
            all.push_back(json::parse(whole.substr(at, end - at)));
        return all;
    }
    // Waits for the line of the generation with this X-Request-Id, and ends the server.
    json generation(const std::string& id) {
        REQUIRE(says(id));
        REQUIRE(says(id + "\""));
        terminate();  // then the line is complete
        exit_status();
        for (const json& entry : entries()) {
            if (entry.value("id", "").ends_with(id)) return entry;
        }
        return {};
    }
};

httplib::Headers headers(const std::string& id, const httplib::Headers& more = {}) {
    httplib::Headers all{{"Content-Type", "application/json"}, {"X-Request-Id", id}};
    all.insert(more.begin(), more.end());
    return all;
}

Reply ask_as(const std::string& id, int port, const json& body, const httplib::Headers& more = {}) {
    return send(port, "POST", completions, write(body), headers(id, more));
}

const json short_text{{"prompt", "Cloud Run is a "}, {"max_tokens", 7}, {"ignore_eos", true}};

}  // namespace

TEST_CASE("a generation's line in Cloud Logging's form", "[http]") {
    CloudServer s;
    REQUIRE(ask_as("one", s.port, short_text).status == 200);
    const json line = s.generation("one");
    INFO(line);
    CHECK(keys(line) == Strings{"severity", "message", "id", "model", "status", "finish_reason",
                                "prompt_tokens", "completion_tokens", "queued_ms", "first_token_ms",
                                "total_ms"});
    CHECK(line["severity"] == "INFO");
    CHECK(line["message"] == "generation");
    CHECK(line["id"] == "cmpl-one");
    CHECK(line["model"] == "gemma-demo");
    CHECK(line["status"] == 200);
    CHECK(line["finish_reason"] == "length");
    CHECK(line["prompt_tokens"] == 6);
    CHECK(line["completion_tokens"] == 7);
    CHECK(line["queued_ms"] >= 0);
    CHECK(line["first_token_ms"] >= line["queued_ms"]);
    CHECK(line["total_ms"] >= line["first_token_ms"]);
    CHECK(s.exit_status() == 0);
    for (const json& entry : s.entries()) {
        CHECK(entry.contains("severity"));
        CHECK(entry.contains("message"));
    }
}

TEST_CASE("choices that end for different reasons are all named", "[demo]") {
    CloudServer s;
    const json body{{"prompt", {"Cloud Run is a ", "The"}}, {"max_tokens", 3}, {"stop", {"e"}}};
    const Reply reply = ask_as("two", s.port, with(body, {{"temperature", 0}}));
    REQUIRE(reply.status == 200);
    std::string reasons;
    const json answer = reply.parsed();
    for (const json& c : answer["choices"])
        reasons += (reasons.empty() ? "" : ",") + c["finish_reason"].get<std::string>();
    const json line = s.generation("two");
    CHECK(line["finish_reason"] == (reasons == "stop,stop" ? "stop" : reasons));
    CHECK(line["completion_tokens"] == answer["usage"]["completion_tokens"]);
}

TEST_CASE("a trace is logged by Cloud Trace's name for it, from either header", "[http]") {
    const std::string trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    const std::string name = "projects/some-project/traces/" + trace;
    const std::vector<std::pair<httplib::Headers, std::string>> table{
        {{{"X-Cloud-Trace-Context", trace + "/123;o=1"}}, name},
        {{{"X-Cloud-Trace-Context", trace}}, name},
        {{{"traceparent", "00-" + trace + "-00f067aa0ba902b7-01"}}, name},
        {{{"X-Cloud-Trace-Context", trace + "/1"}, {"traceparent", "00-0-0-0"}}, name},
        {{{"X-Cloud-Trace-Context", "\"},{\"severity\":\"ALERT"}}, ""},
        {{{"X-Cloud-Trace-Context", trace.substr(1) + "/1"}}, ""},
        {{{"traceparent", "00-" + trace.substr(1) + "z-00f067aa0ba902b7-01"}}, ""},
        {{{"traceparent", trace + "-"}}, name},
        {{}, ""},
    };
    for (const auto& [header, expected] : table) {
        CloudServer s;
        REQUIRE(ask_as("t", s.port, short_text, header).status == 200);
        const json line = s.generation("t");
        INFO(line);
        CHECK(line.value("logging.googleapis.com/trace", "") == expected);
    }
}

TEST_CASE("the project's name comes from the metadata server where no variable has it", "[http]") {
    httplib::Server metadata;
    std::mutex mutex;
    std::condition_variable changed;
    int asked = 0;
    metadata.Get("/computeMetadata/v1/project/project-id",
                 [&](const httplib::Request& request, httplib::Response& response) {
                     const bool flavor = request.get_header_value("Metadata-Flavor") == "Google";
                     response.status = flavor ? 200 : 403;
                     response.set_content(flavor ? "told-project" : "no", "text/plain");
                     const std::lock_guard lock(mutex);
                     asked++;
                     changed.notify_all();
                 });
    const int port = metadata.bind_to_any_port("127.0.0.1");
    std::thread thread([&] { metadata.listen_after_bind(); });
    {
        CloudServer s({}, {"K_SERVICE=gemma", text("GCE_METADATA_HOST=127.0.0.1:%d", port)});
        {
            std::unique_lock lock(mutex);
            CHECK(changed.wait_for(lock, patience, [&] { return asked > 0; }));
        }
        // The server needs a moment to use the name that the metadata server has sent.
        const auto until = Clock::now() + patience;
        const std::string trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        while (Clock::now() < until &&
               s.log().find("projects/told-project/traces/" + trace) == std::string::npos)
            ask_as("p", s.port, short_text, {{"X-Cloud-Trace-Context", trace + "/1"}});
        CHECK(s.log().find("projects/told-project/traces/" + trace) != std::string::npos);
        CHECK(asked == 1);
    }
    metadata.stop();
    thread.join();
}

TEST_CASE("without a project's name there is no trace", "[http]") {
    // Nothing listens there.
    CloudServer s({}, {"K_SERVICE=gemma", "GCE_METADATA_HOST=127.0.0.1:1"});
    const std::string trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    const httplib::Headers header{{"X-Cloud-Trace-Context", trace + "/1"}};
    REQUIRE(ask_as("t", s.port, short_text, header).status == 200);
    CHECK(s.generation("t").value("logging.googleapis.com/trace", "none") == "none");
}

TEST_CASE("a client that leaves: 499 and abort", "[http]") {
    CloudServer s({}, {"K_SERVICE=gemma", "GOOGLE_CLOUD_PROJECT=p", "GEMMA_FAKE_STEP_MS=2"});
    const json body = with(short_text, {{"max_tokens", 30'000}, {"stream", true}});
    send(s.port, "POST", completions, write(body), headers("gone"),
         [](std::string_view) { return false; });
    const json line = s.generation("gone");
    CHECK(line["status"] == 499);
    CHECK(line["severity"] == "WARNING");
    CHECK(line["finish_reason"] == "abort");
}

TEST_CASE("a refusal names the field and never the value", "[http]") {
    CloudServer s;
    const Reply reply =
        ask_as("no", s.port, with(short_text, {{"max_tokens", "a secret of the client's"}}));
    REQUIRE(reply.status == 400);
    REQUIRE(reply.body.find("a secret of") != std::string::npos);
    const json line = s.generation("no");
    CHECK(keys(line) == Strings{"severity", "message", "id", "status", "param", "total_ms"});
    CHECK(line["status"] == 400);
    CHECK(line["param"] == "max_tokens");
    CHECK(line["severity"] == "WARNING");
}

TEST_CASE("no prompt, answer or key is in the log", "[http]") {
    for (const bool json_lines : {true, false}) {
        Child s(with_defaults({"--api-key", "zebra-key"}), {json_lines ? "K_SERVICE=x" : "X=x"});
        const std::string start = "listening on http://127.0.0.1:";
        REQUIRE(s.says("ready in"));
        const int port = std::atoi(s.log().c_str() + s.log().find(start) + start.size());
        const httplib::Headers key{{"Authorization", "Bearer zebra-key"}};
        const httplib::Headers wrong{{"Authorization", "Bearer yak-key"}};
        const json body{{"prompt", "walrus"}, {"max_tokens", 3}, {"echo", true}};
        const Reply good = ask_as("a", port, body, key);
        CHECK(good.status == 200);
        CHECK(ask_as("b", port, body, wrong).status == 401);
        CHECK(ask_as("c", port, with(body, {{"n", "walrus"}}), key).status == 400);
        CHECK(ask_as("walrus tusk", port, with(body, {{"model", "walrus"}}), key).status == 404);
        CHECK(send(port, "POST", completions, "{\"walrus", headers("e", key)).status == 400);
        s.terminate();
        CHECK(s.exit_status() == 0);
        const std::string log = s.log(), answer = first_text(good.parsed());
        INFO(log);
        for (const char* word : {"walrus", "zebra", "yak", "tusk"})
            CHECK(log.find(word) == std::string::npos);
        CHECK(answer.starts_with("walrus"));
        CHECK(log.find("an API key guards") != std::string::npos);
        size_t lines = 0;
        for (size_t at = 0; (at = log.find("generation", at)) != std::string::npos; at++) lines++;
        CHECK(lines == 4);  // the request with a wrong key has no line
    }
}

TEST_CASE("F12: nothing is parsed or tokenised for a client that has left", "[http]") {
    Server s;
    // Tokenised, it would be refused with 400: these are more tokens than the model takes.
    const std::string words(48 << 10, 'a');
    std::vector<std::string> ids;
    kill(s.id(), SIGSTOP);  // so that each client has left before the server reads its request
    for (const size_t size : {1, 2}) {  // a body within 64 KiB, and one that waits for its turn
        for (const int i : {1, 2, 3, 4}) {
            ids.push_back(text("left-%zu-%d", size, i));
            const Raw raw(s.port);
            const int room = 200 << 10;
            setsockopt(raw.handle(), SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
            json body{{"prompt", ""}};
            for (size_t n = 0; n < size; n++) body["prompt"] = std::string(body["prompt"]) + words;
            std::string request = raw_post(completions, body);
            request.insert(request.find("Host:"), "X-Request-Id: " + ids.back() + "\r\n");
            REQUIRE(raw.write(request));
        }
    }
    kill(s.id(), SIGCONT);
    REQUIRE(ask_as("stays", s.port, short_text).status == 200);
    for (const std::string& id : ids) {
        INFO(id);
        CHECK(s.says(id + "\n"));
        const std::string log = s.log(), line = log.substr(0, log.find(id));
        CHECK(line.substr(line.rfind('\n') + 1).find("status 499") != std::string::npos);
    }
}

TEST_CASE("a generation's line for people, and none with --disable-log-requests", "[http]") {
    {
        Server s;
        REQUIRE(ask_as("three", s.port, short_text).status == 200);
        REQUIRE(ask_as("four", s.port, with(short_text, {{"n", 0}})).status == 400);
        CHECK(s.says(" generation: status 200, 6 prompt tokens, 7 completion tokens, length, "));
        CHECK(s.says("cmpl-three\n"));
        CHECK(s.says(" generation: status 400, refused for n, total "));
        CHECK(s.log().find('{') == std::string::npos);
    }
    Server silent({"--disable-log-requests"});
    REQUIRE(ask_as("three", silent.port, short_text).status == 200);
    REQUIRE(ask_as("four", silent.port, with(short_text, {{"n", 0}})).status == 400);
    silent.terminate();
    CHECK(silent.exit_status() == 0);
    CHECK(silent.log().find("generation") == std::string::npos);
}

TEST_CASE("the start logs what an operator needs, in order, with times", "[http]") {
    Server s({"--device=cpu"});
    const std::string log = s.log();
    INFO(log);
    size_t at = 0;
    for (const char* words :
         {"gemma-server 0.", "listening on http://127.0.0.1:", "not ready",
          "requests may call the model gemma-demo, google/gemma-3-1b-it; no API key", " s  mapped ",
          " s  device: cpu, because ", " threads, built for ",
          " s  KV pages of 32 tokens: ", "max_model_len ", "\nready in "}) {
        const size_t found = log.find(words, at);
        INFO(words);
        REQUIRE(found != std::string::npos);
        at = found;
    }
    double last = 0;
    for (size_t from = 0, mark; (mark = log.find(" s  ", from)) != std::string::npos;) {
        const double now = std::atof(log.c_str() + log.rfind('\n', mark) + 1);
        CHECK(now >= last);
        last = now;
        from = mark + 1;
    }
    CHECK(log.find("lowered") == std::string::npos);
}

TEST_CASE("a lowered limit is logged", "[http]") {
    Server s({"--device=cpu", "--max-num-batched-tokens", "48", "--max-num-seqs", "50"});
    CHECK(s.log().find("max_num_seqs is 48, lowered from 50") != std::string::npos);
    CHECK(s.log().find("up to 48 sequences and 48 tokens a step") != std::string::npos);
}

TEST_CASE("an IPv6 address is in brackets", "[http]") {
    Strings flags = with_defaults({"--host", "::1"});
    Child s(flags);
    if (!s.says("ready in")) {
        std::printf("skipped: no IPv6 here: %s\n", s.log().c_str());
        return;
    }
    CHECK(s.log().find("listening on http://[::1]:") != std::string::npos);
    s.terminate();
    CHECK(s.exit_status() == 0);
}
