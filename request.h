// SPDX-License-Identifier: Apache-2.0
//
// request.h: what a client asks for, checked. Sitting 3.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "scheduler.h"
#include "tokenizer.h"
#include "tools.h"

namespace gemma {

using nlohmann::json;

// What requests are checked against: constant once the model is ready.
struct Served {
    std::vector<std::string>
        names;  // that requests may use, at least one; the first is the default
    const Checkpoint* checkpoint = nullptr;
    const Tokenizer* tokenizer = nullptr;
    Limits limits{};
    int max_model_len = 0;
};

// A request for text. Members are named as OpenAI's and vLLM's fields.
struct Request {
    bool chat = false;
    std::string model, id;
    std::vector<std::vector<int>> prompts;
    std::vector<std::string> echoed;  // [prompts] what stands before each answer
    int64_t max_tokens = -1;          // -1: what the model's length leaves
    int64_t seed = -1;                // -1: drawn
    int64_t logprobs = -1, top_logprobs = -1,
            prompt_logprobs = -1;                         // alternatives; -1: no logprobs
    int64_t min_tokens = 0, truncate_prompt_tokens = -1;  // -1: not cut
    double temperature = 1, top_p = 1, min_p = 0;
    double presence_penalty = 0, frequency_penalty = 0, repetition_penalty = 1;
    int64_t top_k = 0, n = 1;
    bool chat_logprobs = false, tokens_as_ids = false, ignore_eos = false, echo = false;
    bool stream = false, include_usage = false, continuous_usage = false;
    bool add_special_tokens = true, skip_special_tokens = true, include_stop = false;
    bool add_generation_prompt = true, continue_final_message = false, token_strs = false;
    std::vector<std::string> stop;
    std::vector<int> stop_token_ids, allowed_token_ids;
    std::map<int, double> logit_bias;
    bool parallel_tool_calls = true;
    std::shared_ptr<const Tools> tools;  // null: none
};

// Tokenising a request can take seconds. This is called amid it, and what it throws ends the work.
using GoOn = std::function<void()>;

// Each of these throws a Refusal that names the field.
json parse_body(const std::string& body);                    // an object, nested at most 64 deep
void check_depth(std::string_view text, const char* param);  // of JSON, before it is parsed
// All that can be said of a request before its text is looked at.
// text: the body as it came.
Request parse_request(const Served& served, const json& body, const std::string& text, bool chat);
json list_prompts(const json& body);  // "prompt", as a list of prompts
// A client's own id for its request; "" if it cannot stand in JSON and in a log as it is.
std::string own_id(const std::string& given);
// Both fill r.prompts and r.echoed.
void parse_prompts(const Served& served, const json& list, Request& r, const GoOn& go_on);
void parse_messages(const Served& served, const json& body, Request& r, const GoOn& go_on);
void check_model(const Served& served, const std::string& name);  // 404
void check_length(const Served& served, const Request& r, size_t prompt_tokens);
void check_scores(const Request& r);
// One prompt.
Request parse_tokenize(const Served& served, const json& body, const std::string& text,
                       const GoOn& go_on);
std::vector<int> parse_detokenize(const Served& served, const json& body);

// One for each choice: choice i of prompt p has the index p * n + i, and the seed plus i.
Sequences make_sequences(const Served& served, const Request& r,
                         const std::shared_ptr<Inbox>& inbox,
                         const std::function<uint64_t()>& draw_seed);

}  // namespace gemma
