// SPDX-License-Identifier: Apache-2.0
//
// writer.h: vLLM's JSON, as text, so that its shape can be compared with vLLM's, key for key.
// Sitting 3; server.cpp's Answer fills the choices, http.cpp sends the text. One writer for text
// and chat, streamed and whole.
#pragma once

#include <algorithm>
#include <ctime>
#include <string>
#include <utility>
#include <vector>

#include "calls.h"
#include "fields.h"
#include "gemma.h"
#include "request.h"
#include "tokenizer.h"

namespace gemma {

// What has come for one choice and is not written yet.
struct Choice {
    Choice(const Tokenizer& t, bool controls) : detokenizer(t, controls) {}
    Detokenizer detokenizer;
    std::string held;  // decoded, but it may turn out to be the start of a stop string
    size_t early = 0;  // bytes of held that are of the first min_tokens tokens
    std::string text;  // not sent yet
    std::optional<CallReader> calls{};  // where tools are offered: its calls, not sent yet
    std::string finish_reason = "null", stop_reason = "null";  // as JSON
    std::string logprobs[4];      // lists without brackets, in the order of take_choice_json
    std::string prompt_logprobs;  // the same
    size_t offset = 0;            // of the next token, in characters
    int prompt_size = 0, tokens = 0, cached = 0, preemptions = 0;
    double first = 0, last = 0;  // when these tokens were made
    bool finished = false;
};

class Writer {
  public:
    Writer(const Request& r, const Tokenizer& t, std::string of_answer)
        : request(r), tokenizer(t), id(std::move(of_answer)) {}

    std::string token_name(int token) const {  // its text; a control token's own spelling
        const std::string s = tokenizer.decode({token});
        return s.empty() ? std::string(tokenizer.name(token)) : s;
    }
    std::string token_text(int token) const {
        return request.tokens_as_ids ? text("token_id:%d", token) : token_name(token);
    }

    static std::string number(float logprob) {  // floored as vLLM's: JSON has no -inf
        return quote(std::max(double(logprob), -9999.));
    }

    static void append(std::string& list, const std::string& entry) {
        list += (list.empty() ? "" : ",") + entry;
    }

    // finish_reason, as JSON.
    static std::string reason(const Choice& c, Finish finish) {
        const std::string of_calls = c.calls ? c.calls->finish_reason(finish) : "";
        return !of_calls.empty()          ? of_calls
               : finish == Finish::stop   ? R"("stop")"
               : finish == Finish::length ? R"("length")"
                                          : R"("abort")";
    }

    // For the log: "stop", or "stop,length" where choices differ.
    static std::string finish_reasons(const std::vector<Choice>& choices) {
        std::string all, first;
        bool same = true;
        for (const Choice& c : choices) {
            const std::string reason = c.finished ? c.finish_reason : R"("abort")";
            if (all.empty()) first = reason;
            same &= reason == first;
            append(all, reason.substr(1, reason.size() - 2));
        }
        return same ? all.substr(0, all.find(',')) : all;
    }

    // An entry of prompt_logprobs: the token itself, then its alternatives.
    std::string ranked(const Result& r) const {
        const auto entry = [&](int token, float logprob, int rank) {
            return text(R"("%d":{"logprob":%s,"rank":%d,"decoded_token":%s})", token,
                        number(logprob).c_str(), rank, quote(token_name(token)).c_str());
        };
        std::string list = entry(r.id, r.logprob, r.rank);
        for (size_t i = 0; i < r.top.size(); i++) {
            const auto& t = r.top[i];
            if (t.id != r.id) append(list, entry(t.id, t.logprob, int(i) + 1));
        }
        return "{" + list + "}";
    }

    void add_logprobs(Choice& c, const Result& r) const {
        std::string top;
        if (request.chat) {
            const auto entry = [&](int token, float logprob) {
                const auto raw = tokenizer.bytes(token);
                return text(R"({"token":%s,"logprob":%s,"bytes":%s)",
                            quote(token_text(token)).c_str(), number(logprob).c_str(),
                            quote(std::vector<uint8_t>(raw.begin(), raw.end())).c_str());
            };
            for (const auto& t : r.top) append(top, entry(t.id, t.logprob) + "}");
            return append(c.logprobs[0],
                          entry(r.id, r.logprob) + R"(,"top_logprobs":[)" + top + "]}");
        }
        std::vector<std::string> names{token_text(r.id)};
        append(top, quote(names[0]) + ":" + number(r.logprob));
        for (const auto& t : r.top) {
            const std::string name = token_text(t.id);
            // A key must not repeat: the token itself is there, or another id with the same text.
            if (std::count(names.begin(), names.end(), name)) continue;
            names.push_back(name);
            append(top, quote(name) + ":" + number(t.logprob));
        }
        add_token(c, names[0], number(r.logprob), "{" + top + "}");
    }

    static void add_token(Choice& c, const std::string& name, const std::string& logprob,
                          const std::string& top) {
        append(c.logprobs[0], std::to_string(c.offset));
        append(c.logprobs[1], logprob);
        append(c.logprobs[2], quote(name));
        append(c.logprobs[3], top);
        c.offset += size_t(
            std::count_if(name.begin(), name.end(), [](char b) { return (b & 0xc0) != 0x80; }));
    }

    // A choice: what has come for it since the last call, which is then forgotten.
    std::string take_choice_json(Choice& c, int index) const {
        const std::string calls = c.calls ? c.calls->take_json(request.stream) : "";
        const bool has_content =
            !c.calls || !c.text.empty() || (!request.stream && c.calls->gives_content());
        const std::string piece = has_content ? quote(std::exchange(c.text, {})) : "null";
        std::string logprobs = "null";
        std::string(&l)[4] = c.logprobs;
        if (request.chat && !l[0].empty()) logprobs = R"({"content":[)" + l[0] + "]}";
        if (!request.chat && !l[0].empty())
            logprobs = R"({"text_offset":[)" + l[0] + R"(],"token_logprobs":[)" + l[1] +
                       R"(],"tokens":[)" + l[2] + R"(],"top_logprobs":[)" + l[3] + "]}";
        for (auto& list : l) list.clear();
        std::string s = text(R"({"index":%d,)", index);
        if (!request.chat)
            s += R"("text":)" + piece;
        else if (request.stream)
            s += R"("delta":{)" + delta_json(piece, calls) + "}";
        else
            s += R"("message":{"role":"assistant","reasoning_content":null,"content":)" + piece +
                 R"(,"tool_calls":[)" + calls + "]}";
        s += R"(,"logprobs":)" + logprobs + R"(,"finish_reason":)" + c.finish_reason;
        if (!request.chat || !request.stream || c.finished)
            s += R"(,"stop_reason":)" + c.stop_reason;
        // return_token_ids is not offered, so the lists of ids are null.
        if (request.chat) return s + R"(,"token_ids":null})";
        if (request.stream) return s + R"(,"prompt_token_ids":null,"token_ids":null})";
        return s + R"(,"token_ids":null)" + prompt_logprobs_json(c) + "}";
    }

    // A delta has only the keys that it has something for: clients take an empty content for text.
    static std::string delta_json(const std::string& content, const std::string& calls) {
        const std::string text = content == "null" ? "" : R"("content":)" + content;
        if (calls.empty()) return text;
        return text + (text.empty() ? "" : ",") + R"("tool_calls":[)" + calls + "]";
    }

    static std::string prompt_logprobs_json(const Choice& c) {
        const std::string& list = c.prompt_logprobs;
        return R"(,"prompt_logprobs":)" + (list.empty() ? "null" : "[" + list + "]") +
               R"(,"prompt_token_ids":null)";
    }

    static std::string usage_json(int prompt, int completion, int cached) {  // -1: not told
        return text(R"({"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d,)"
                    R"("prompt_tokens_details":%s})",
                    prompt, prompt + completion, completion,
                    cached >= 0 ? text(R"({"cached_tokens":%d})", cached).c_str() : "null");
    }

    std::string usage_so_far(const Choice& c) const {
        return request.continuous_usage ? usage_json(c.prompt_size, c.tokens, -1) : "null";
    }

    std::string envelope(const char* object, const std::string& list) const {
        return text(R"({"id":"%s","object":"%s","created":%ld,"model":)", id.c_str(), object,
                    created) +
               quote(request.model) + R"(,"choices":[)" + list + "]";
    }

    // One event of a stream. use: as JSON.
    void event(std::string& out, const std::string& choice, const std::string& use,
               const char* end = "}") const {
        out +=
            "data: " + envelope(request.chat ? "chat.completion.chunk" : "text_completion", choice);
        if (!request.chat || use != "null") out += R"(,"usage":)" + use;
        out += std::string(end) + "\n\n";
    }

    // The whole answer; choices as take_choice_json wrote them, joined.
    std::string whole(const std::string& list, const std::string& use, const Choice& first) const {
        return envelope(request.chat ? "chat.completion" : "text_completion", list) +
               R"(,"usage":)" + use + (request.chat ? prompt_logprobs_json(first) : "") + "}";
    }

    // A chat's stream begins with the role.
    void role_event(std::string& out, const Choice& c, size_t index) const {
        const char* const form = R"({"index":%zu,"delta":{"role":"assistant","content":""},)"
                                 R"("logprobs":null,"finish_reason":null})";
        event(out, text(form, index), usage_so_far(c), R"(,"prompt_token_ids":null})");
    }

    const Request& request;
    const Tokenizer& tokenizer;
    const std::string id;
    const long created = std::time(nullptr);
};

}  // namespace gemma
