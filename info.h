// SPDX-License-Identifier: Apache-2.0
//
// info.h: the routes that need no engine: models, health, metrics, ids of a text. Beside the path.
#pragma once

#include "server.h"

namespace gemma {

// Each may throw a Refusal.
HttpReply tokenize(const Served& served, const json& body, const std::string& text,
                   const GoOn& go_on);
HttpReply detokenize(const Served& served, const json& body);
HttpReply list_models(Service& service, const HttpRequest& http);  // or the one that its path names
HttpReply health(Service& service);
HttpReply responses(const HttpRequest& http);  // OpenAI's newer API: 404, and what to do
HttpReply metrics_page(Service& service);
HttpReply load(Service& service);  // requests that are being answered
HttpReply version(Service& service);
std::string cache_labels(const Limits& limits, int max_model_len);  // of vllm:cache_config_info

}  // namespace gemma
