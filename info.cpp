// SPDX-License-Identifier: Apache-2.0
//
// info.cpp: what a service says of itself, in vLLM's forms. Beside the path.
#include "info.h"

#include <ctime>

#include "fields.h"

namespace gemma {

using ordered = nlohmann::ordered_json;

namespace {

HttpReply json_reply(const ordered& body) {
    return {body.dump(-1, ' ', false, json::error_handler_t::replace), "application/json", {}};
}

// An entry of /v1/models. root: what the server was started with.
ordered model_card(Service& service, const std::string& name) {
    ordered model = ordered::parse(R"({"id":0,"object":"model","created":0,"owned_by":"vllm",
        "root":0,"parent":null,"max_model_len":0,"permission":[{"id":0,
        "object":"model_permission","created":0,"allow_create_engine":false,
        "allow_sampling":true,"allow_logprobs":true,"allow_search_indices":false,
        "allow_view":true,"allow_fine_tuning":false,"organization":"*","group":null,
        "is_blocking":false}]})");
    ordered& permission = model["permission"][0];
    model["id"] = name;
    model["root"] = service.options.model;
    model["max_model_len"] = service.served.max_model_len;
    model["created"] = permission["created"] = std::time(nullptr);
    permission["id"] = "modelperm-" + service.draw_hex();
    return model;
}

}  // namespace

HttpReply tokenize(const Served& served, const json& body, const std::string& text,
                   const GoOn& go_on) {
    const Request r = parse_tokenize(served, body, text, go_on);
    const std::vector<int>& ids = r.prompts[0];
    ordered names;  // null unless asked for
    if (r.token_strs) names = ordered::array();
    for (size_t i = 0; r.token_strs && i < ids.size(); i++)
        names.push_back(std::string(served.tokenizer->name(ids[i])));
    return json_reply({{"count", ids.size()},
                       {"max_model_len", served.max_model_len},
                       {"tokens", ids},
                       {"token_strs", names}});
}

HttpReply detokenize(const Served& served, const json& body) {
    return json_reply({{"prompt", served.tokenizer->decode(parse_detokenize(served, body), true)}});
}

HttpReply list_models(Service& service, const HttpRequest& http) {
    const std::string all = "/v1/models";
    if (http.path != all) {
        const std::string name = http.path.substr(all.size() + 1);
        check_model(service.served, name.empty() ? "/" : name);  // no model is "/"; "" is the first
        return json_reply(model_card(service, name));
    }
    ordered list = ordered::parse(R"({"object":"list","data":[]})");
    for (const std::string& name : service.served.names)
        list["data"].push_back(model_card(service, name));
    return json_reply(list);
}

HttpReply responses(const HttpRequest&) {
    throw Refusal{
        404,
        "/v1/responses is not served: use /v1/chat/completions. openai: "
        "client.chat.completions.create; openai-agents: "
        "set_default_openai_api(\"chat_completions\"); @ai-sdk/openai: openai.chat(model)",
        ""};
}

HttpReply health(Service& service) {
    return service.locked([&]() -> HttpReply {
        if (service.leaving) throw Refusal{503, "the server is shutting down", ""};
        if (!service.ready) throw Refusal{503, "the model is loading", ""};
        return {};
    });
}

HttpReply metrics_page(Service& service) {
    if (!service.locked([&] { return service.ready; }))
        throw Refusal{503, "the model is loading", ""};
    return {service.metrics->page(service.served.names[0], service.cache_config),
            "text/plain; version=0.0.4; charset=utf-8",
            {}};
}

HttpReply load(Service& service) {
    return json_reply({{"server_load", service.locked([&] { return service.generating; })}});
}

HttpReply version(Service&) { return json_reply({{"version", GEMMA_VERSION}}); }

std::string cache_labels(const Limits& limits, int max_model_len) {
    const long most_tokens = long(limits.pages[global_pool]) * page_tokens;
    return text(R"(,block_size="%d",num_gpu_blocks="%d",num_local_blocks="%d",)"
                R"(cache_dtype="auto",enable_prefix_caching="True",)"
                R"(kv_cache_size_tokens="%ld",kv_cache_max_concurrency="%.2f")",
                page_tokens, limits.pages[global_pool], limits.pages[local_pool], most_tokens,
                double(most_tokens) / max_model_len);
}

}  // namespace gemma
