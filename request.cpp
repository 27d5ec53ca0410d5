// SPDX-License-Identifier: Apache-2.0
//
// request.cpp: a body becomes a Request, and a Request becomes Sequences. Sitting 3. Every
// field is read through one table of fields.h; what is wrong is a Refusal with status 400 that
// names the field, in vLLM's words where clients search for them.
//
//   [1] Fields     which there are, and which are not offered
//   [2] Prompts    text, ids and messages become ids
//   [3] Checks     of more than one field
//   [4] Sequences  one for each choice
#include "request.h"

#include <algorithm>

#include "fields.h"
#include "messages.h"

namespace gemma {

namespace {

// [1] Fields --------------------------------------------------------------------------------------

using RequestFields = std::vector<Field<Request>>;

// Also of /tokenize and /detokenize.
const RequestFields prompt_fields{
    {"model", &Request::model},
    {"add_special_tokens", &Request::add_special_tokens},
    {"add_generation_prompt", &Request::add_generation_prompt},
    {"continue_final_message", &Request::continue_final_message},
};
const RequestFields common_fields{
    {"max_tokens", &Request::max_tokens, 0, 1e9},
    {"min_tokens", &Request::min_tokens, 0, 1e9},
    {"temperature", &Request::temperature, 0, no_limit},
    {"top_p", &Request::top_p, above_zero, 1},
    {"top_k", &Request::top_k, -1, 1e9},
    {"min_p", &Request::min_p, 0, 1},
    {"presence_penalty", &Request::presence_penalty, -2, 2},
    {"frequency_penalty", &Request::frequency_penalty, -2, 2},
    {"repetition_penalty", &Request::repetition_penalty, above_zero, 1e9},
    {"logit_bias", &Request::logit_bias, 0, any_id},
    {"allowed_token_ids", &Request::allowed_token_ids, 0, any_id},
    {"seed", &Request::seed, -0x1p63, 0x1p63},
    {"n", &Request::n, 1, 128},
    {"stop", &Request::stop, 0, 128},  // each token's text is searched for all of them
    {"stop_token_ids", &Request::stop_token_ids, 0, any_id},
    {"include_stop_str_in_output", &Request::include_stop},
    {"ignore_eos", &Request::ignore_eos},
    {"skip_special_tokens", &Request::skip_special_tokens},
    {"truncate_prompt_tokens", &Request::truncate_prompt_tokens, 1, 1e9},
    {"prompt_logprobs", &Request::prompt_logprobs, 0, 20},
    {"echo", &Request::echo},
    {"stream", &Request::stream},
    {"return_tokens_as_token_ids", &Request::tokens_as_ids},
};
const RequestFields tokenize_fields{{"return_token_strs", &Request::token_strs}};
const RequestFields completion_fields{{"logprobs", &Request::logprobs, 0, 20}};
const RequestFields chat_fields{
    {"max_completion_tokens", &Request::max_tokens, 1, 1e9},
    {"logprobs", &Request::chat_logprobs},
    {"top_logprobs", &Request::top_logprobs, 0, 20},
    {"parallel_tool_calls", &Request::parallel_tool_calls},
};
const RequestFields stream_fields{
    {"include_usage", &Request::include_usage},
    {"continuous_usage_stats", &Request::continuous_usage},
};

// What vLLM has, would change the result and is not offered here, each with the one value that it
// may have: silently ignoring what was asked for would falsify somebody's measurement.
const json not_offered = json::parse(R"({
    "bad_words": [], "best_of": 1, "use_beam_search": false, "length_penalty": 1, "priority": 0,
    "logits_processors": [], "guided_grammar": null, "guided_whitespace_pattern": null,
    "structural_tag": null, "suffix": null, "prompt_embeds": null, "tools": [],
    "tool_choice": "none", "functions": [], "function_call": "none", "chat_template": null,
    "return_token_ids": false, "logprob_token_ids": [], "thinking_token_budget": null,
    "repetition_detection": null})");

// What Gemma's template does not use has no effect, as in vLLM; the rest would change the prompt.
void check_template_kwargs(const json& body) {
    const char* const name = "chat_template_kwargs";
    const json kwargs = body.value(name, json());
    if (!kwargs.is_object() && !kwargs.is_null())
        refuse(name, "%s must be an object, got %s", name, show(kwargs).c_str());
    for (const char* used : {"messages", "bos_token", "add_generation_prompt",
                             "continue_final_message", "chat_template", "tokenize"}) {
        if (kwargs.contains(used))
            refuse(name, "%s cannot set %s, got %s", name, used, show(kwargs[used]).c_str());
    }
}

void check_offered(const json& body, bool chat) {
    for (const auto& [name, only] : not_offered.items()) {
        const auto value = body.find(name);
        if (value == body.end() || value->is_null() || *value == only) continue;
        if (chat && (name == "tools" || name == "tool_choice")) continue;  // tools.cpp reads them
        // Functions that may not be called change nothing.
        const bool idle = name == "functions" && body.value("function_call", json()) == "none";
        if (idle && value->is_array()) continue;
        refuse(name.c_str(), "%s is not supported by this server: leave it out or give %s, got %s",
               name.c_str(), quote(only).c_str(), show(*value).c_str());
    }
    check_template_kwargs(body);
}

// [2] Prompts -------------------------------------------------------------------------------------

void check_id(int64_t id, int limit, const char* param) {
    if (id < limit) return;
    refuse(param,
           "%s: token id %ld is out of vocabulary: ids are integers from 0 to %d (the vocabulary "
           "size is %d)",
           param, long(id), limit - 1, limit);
}

// Ids of a prompt, or of a text to be written out. V, the model's rows: what has no text may stand
// in a prompt.
std::vector<int> parse_ids(const Served& served, const json& list, const char* param) {
    std::vector<int> ids;
    const int V = served.checkpoint->config.V;
    for (const json& one : list) {
        const auto id = Allowed{param, 0, double(V - 1)}.integer(one);
        if (!id || !one.is_number_integer())
            refuse(param, "%s: token id %s is out of vocabulary: ids are integers from 0 to %d",
                   param, show(one).c_str(), V - 1);
        ids.push_back(int(*id));
    }
    return ids;
}

// Refuses text that cannot fit, however long its pieces are, before it is tokenised.
Tokenizer::Check check_text(const Served& served, const Request& r, const GoOn& go_on) {
    return [&](size_t fewest) {
        go_on();
        const bool is_cut = r.truncate_prompt_tokens >= 0;
        if (is_cut || fewest <= size_t(served.max_model_len)) return;
        refuse(r.chat ? "messages" : "prompt",
               "This model's maximum context length is %d tokens. However, you requested at least "
               "%zu tokens in the messages, Please reduce the length of the messages.",
               served.max_model_len, fewest);
    };
}

std::vector<int> encode_prompt(const Served& served, const std::string& prompt, bool add_bos,
                               const Tokenizer::Check& check) {
    std::vector<int> ids = served.tokenizer->encode_with_controls(prompt, check);
    if (add_bos) ids.insert(ids.begin(), Tokenizer::bos);
    for (const int id : ids) check_id(id, served.checkpoint->config.V, "prompt");
    return ids;
}

void parse_stream_options(const json& body, Request& r) {
    const json options = body.value("stream_options", json());
    if (options.is_null()) return;
    if (!r.stream && options != json::object())
        refuse("stream_options", "Stream options can only be defined when `stream=True`.");
    if (!options.is_object())
        refuse("stream_options", "stream_options must be an object, got %s", show(options).c_str());
    assign_all(r, stream_fields, options);
    r.continuous_usage &= r.include_usage;
}

// What concerns more than one field, or the vocabulary.
void check_fields(const Served& served, Request& r, const json& body) {
    if (r.max_tokens == 0 && (r.chat || !r.echo))
        refuse("max_tokens", "max_tokens must be at least 1, got 0.");
    const int64_t most = r.max_tokens < 0 ? served.max_model_len : r.max_tokens;
    if (r.min_tokens > most)
        refuse("min_tokens", "min_tokens must be at most max_tokens, %ld, got %ld", long(most),
               long(r.min_tokens));
    if (r.chat && r.top_logprobs > 0 && !r.chat_logprobs)
        refuse("top_logprobs", "when using `top_logprobs`, `logprobs` must be set to true.");
    if (r.stream && r.prompt_logprobs > 0)
        refuse("prompt_logprobs", "`prompt_logprobs` are not available when `stream=True`.");
    if (r.continue_final_message && r.add_generation_prompt)
        refuse("continue_final_message",
               "Cannot set both `continue_final_message` and `add_generation_prompt` to True.");
    if (r.temperature == 0 && r.n > 1)
        refuse("n", "n must be 1 when using greedy sampling, got %d.", int(r.n));
    // Each step looks at all of these.
    for (const auto& [name, size] : {std::pair("stop_token_ids", r.stop_token_ids.size()),
                                     std::pair("logit_bias", r.logit_bias.size())}) {
        if (size > 1024) refuse(name, "%s must have at most 1024 ids, got %zu", name, size);
    }
    const int V = served.checkpoint->config.V, vocab = served.checkpoint->config.vocab;
    for (const auto& [id, bias] : r.logit_bias) check_id(id, V, "logit_bias");
    for (const int id : r.stop_token_ids) check_id(id, V, "stop_token_ids");
    for (const int id : r.allowed_token_ids) check_id(id, vocab, "allowed_token_ids");
    const auto allowed = body.find("allowed_token_ids");
    if (allowed != body.end() && !allowed->is_null() && r.allowed_token_ids.empty())
        refuse("allowed_token_ids", "allowed_token_ids must be a list of at least one id, got []");
}

}  // namespace

// Copying 100,000 levels would overflow the stack. (With a callback, which could count them, the
// library takes time that is quadratic in a list's length.)
void check_depth(std::string_view text, const char* param) {
    int depth = 0;
    bool in_string = false;
    for (size_t i = 0; i < text.size(); i++) {
        if (text[i] == '"') in_string = !in_string;
        if (text[i] == '\\') i++;  // outside of strings it is an error anyway
        if (in_string || i >= text.size()) continue;
        if (text[i] == '[' || text[i] == '{') depth++;
        if (text[i] == ']' || text[i] == '}') depth--;
        if (depth <= 64) continue;
        refuse(param, "%s is nested more than 64 levels deep", *param ? param : "the body");
    }
}

json parse_body(const std::string& body) {
    const size_t nul = body.find('\0');  // the library takes it for the end of the body
    if (nul != body.npos) refuse("", "the body is not valid JSON, at byte %zu", nul + 1);
    check_depth(body, "");
    try {
        json parsed = json::parse(body);
        if (!parsed.is_object()) refuse("", "the body must be a JSON object");
        return parsed;
    } catch (const json::parse_error& e) {
        refuse("", "the body is not valid JSON, at byte %zu", e.byte);
    } catch (const json::exception&) {
        refuse("", "the body is not valid JSON: it has a number that no double can hold");
    }
}

std::string own_id(const std::string& given) {
    const bool plain = given.size() <= 128 && std::all_of(given.begin(), given.end(), [](char c) {
                           return std::isalnum(uint8_t(c)) ||
                                  std::string_view("-_.:").find(c) != std::string::npos;
                       });
    return plain ? given : "";
}

// A string, a list of strings, a list of ids, or a list of lists of ids: as a list of prompts.
json list_prompts(const json& body) {
    const json prompt = body.value("prompt", json());
    if (prompt.is_null() || prompt == "")  // "" in a list is a prompt: <bos> alone, as in vLLM
        refuse("prompt", "Either prompt or prompt_embeds must be provided and non-empty.");
    const bool ids = prompt.is_array() && !prompt.empty() && prompt[0].is_number();
    const json list = ids || prompt.is_string() ? json::array({prompt}) : prompt;
    const auto good = [&](const json& p) {
        return p.type() == list[0].type() && (p.is_string() || (p.is_array() && !p.empty()));
    };
    if (!list.is_array() || list.empty() || list.size() > 64 ||
        !std::all_of(list.begin(), list.end(), good)) {
        refuse("prompt", "prompt must be text, a list of token ids, or 1 to 64 of these, got %s",
               show(prompt).c_str());
    }
    return list;
}

void parse_prompts(const Served& served, const json& list, Request& r, const GoOn& go_on) {
    const Tokenizer::Check check = check_text(served, r, go_on);
    const size_t most = r.truncate_prompt_tokens < 0 ? SIZE_MAX : size_t(r.truncate_prompt_tokens);
    for (const json& one : list) {
        auto ids = one.is_string() ? encode_prompt(served, one.get_ref<const std::string&>(),
                                                   r.add_special_tokens, check)
                                   : parse_ids(served, one, "prompt");
        const bool cut = ids.size() > most, bos = one.is_string() && r.add_special_tokens;
        if (cut) ids.erase(ids.begin(), ids.end() - ptrdiff_t(most));
        if (cut && bos) ids[0] = Tokenizer::bos;  // Hugging Face cuts before it adds <bos>
        if (ids.empty()) refuse("prompt", "prompt has no token");
        if (r.echo && one.is_string() && !cut) {
            r.echoed.push_back(one);
        } else if (r.echo) {  // ids show as they were given; <bos> only if the client gave it
            const std::vector<int> given(ids.begin() + bos, ids.end());
            r.echoed.push_back(served.tokenizer->decode(given, true));
        }
        r.prompts.push_back(std::move(ids));
    }
}

void parse_messages(const Served& served, const json& body, Request& r, const GoOn& go_on) try {
    const json messages = make_turns(body.value("messages", json()), r.tools.get());
    using Ending = Tokenizer::Ending;
    const Ending ending = r.continue_final_message  ? Ending::open
                          : r.add_generation_prompt ? Ending::generation_prompt
                                                    : Ending::closed;
    auto ids = served.tokenizer->chat(messages, ending, check_text(served, r, go_on));
    if (r.add_special_tokens) ids.insert(ids.begin(), Tokenizer::bos);  // beside the template's own
    const auto most = r.truncate_prompt_tokens;
    if (most > 0 && int64_t(ids.size()) > most) ids.erase(ids.begin(), ids.end() - most);
    // The answer goes on with the last message, if both are of one role.
    const bool goes_on = !r.add_generation_prompt || messages.back()["role"] == "assistant";
    if (r.echo) r.echoed.push_back(goes_on ? text_of(messages.back()["content"]) : "");
    r.prompts.push_back(std::move(ids));
} catch (const std::invalid_argument& e) {
    refuse("messages", "%s", e.what());
}

// [3] Checks --------------------------------------------------------------------------------------

void check_model(const Served& served, const std::string& model) {
    if (model.empty() || std::count(served.names.begin(), served.names.end(), model)) return;
    throw Refusal{404, "The model `" + model.substr(0, 100) + "` does not exist.", "model"};
}

// In vLLM's words, which clients search for.
void check_length(const Served& served, const Request& r, size_t size) {
    const long most = served.max_model_len, prompt = long(size), asked = long(r.max_tokens);
    if (asked < 0 ? prompt < most : prompt + asked <= most) return;
    const std::string head =
        text("This model's maximum context length is %ld tokens. However, ", most);
    if (asked < 0) {
        refuse(
            "messages",
            "%syou requested %ld tokens in the messages, Please reduce the length of the messages.",
            head.c_str(), prompt);
    }
    refuse("max_tokens",
           "%syou requested %ld tokens (%ld in the messages, %ld in the completion). Please reduce "
           "the length of the messages or completion.",
           head.c_str(), prompt + asked, prompt, asked);
}

// Logprobs of prompts are held as text until the answer is whole: some 500 bytes for each id named.
void check_scores(const Request& r) {
    size_t tokens = 0;
    for (const auto& prompt : r.prompts) tokens += prompt.size();
    const size_t ids = r.prompt_logprobs < 0 ? 0 : tokens * size_t(r.n * (r.prompt_logprobs + 1));
    if (ids > 4 << 20)
        refuse("prompt_logprobs",
               "logprobs of prompts must name at most 4194304 ids, got %zu: %zu tokens x n %d x %d",
               ids, tokens, int(r.n), int(r.prompt_logprobs) + 1);
}

// The order of checks is part of the API: of several mistakes a client is told the first. A full
// queue (429) comes behind these, and before those of prompts (see generate in server.cpp).
Request parse_request(const Served& served, const json& body, const std::string& text, bool chat) {
    const SamplingDefaults& d = served.checkpoint->defaults;
    Request r;
    r.chat = chat;
    r.add_special_tokens = !chat;
    r.temperature = d.temperature;
    r.top_p = d.top_p;
    r.min_p = d.min_p;
    r.top_k = d.top_k;
    r.repetition_penalty = d.repetition_penalty;
    for (const auto* fields : {&prompt_fields, &common_fields}) assign_all(r, *fields, body);
    assign_all(r, chat ? chat_fields : completion_fields, body);
    parse_stream_options(body, r);
    check_model(served, r.model);
    check_offered(body, chat);
    if (chat) r.tools = parse_tools(body, text, r.parallel_tool_calls);
    if (!chat) r.add_generation_prompt = r.continue_final_message = false;
    if (r.model.empty()) r.model = served.names[0];
    r.temperature = r.temperature < 1e-5 ? 0 : std::clamp(r.temperature, 0.01, 1e6);  // as vLLM
    if (!chat && r.max_tokens < 0) r.max_tokens = 16;
    check_fields(served, r, body);
    if (r.chat_logprobs) r.logprobs = std::max<int64_t>(0, r.top_logprobs);
    if (r.echo && r.prompt_logprobs < 0) r.prompt_logprobs = r.logprobs;
    return r;
}

Request parse_tokenize(const Served& served, const json& body, const std::string& text,
                       const GoOn& go_on) {
    Request r;
    r.chat = body.contains("messages");
    r.add_special_tokens = !r.chat;
    for (const auto* fields : {&prompt_fields, &tokenize_fields}) assign_all(r, *fields, body);
    check_model(served, r.model);
    check_offered(body, r.chat);
    if (r.chat) r.tools = parse_tools(body, text, true);
    if (!r.chat) r.add_generation_prompt = false;
    check_fields(served, r, json::object());
    const json prompt = body.value("prompt", json());
    if (!r.chat && !prompt.is_string())
        refuse("prompt", "prompt must be a string, got %s", show(prompt).c_str());
    if (r.chat) {
        parse_messages(served, body, r, go_on);
    } else {
        const Tokenizer::Check check = check_text(served, r, go_on);
        r.prompts.push_back(encode_prompt(served, prompt.get_ref<const std::string&>(),
                                          r.add_special_tokens, check));
    }
    return r;
}

std::vector<int> parse_detokenize(const Served& served, const json& body) {
    Request r;
    assign_all(r, prompt_fields, body);
    check_model(served, r.model);
    const json tokens = body.value("tokens", json());
    if (!tokens.is_array())
        refuse("tokens", "tokens must be a list of token ids, got %s", show(tokens).c_str());
    return parse_ids(served, tokens, "tokens");
}

// [4] Sequences -----------------------------------------------------------------------------------

namespace {

using Mask = std::vector<uint32_t>;

// The ids that may be sampled: those allowed, without `excluded`. Null: all.
std::shared_ptr<const Mask> make_mask(const Served& served, const Request& r,
                                      const std::vector<int>& excluded) {
    if (r.allowed_token_ids.empty() && excluded.empty()) return nullptr;
    const int vocab = served.checkpoint->config.vocab;
    const bool all = r.allowed_token_ids.empty();
    auto mask = std::make_shared<Mask>(size_t(vocab + 31) / 32, all ? ~0u : 0u);
    for (const int id : r.allowed_token_ids) (*mask)[size_t(id / 32)] |= 1u << id % 32;
    for (const int id : excluded) {
        if (id < vocab) (*mask)[size_t(id / 32)] &= ~(1u << id % 32);
    }
    if (std::all_of(mask->begin(), mask->end(), [](uint32_t word) { return word == 0; }))
        refuse("min_tokens",
               "min_tokens must be 0 where all ids that are allowed end the text, got %ld",
               long(r.min_tokens));
    return mask;
}

}  // namespace

Sequences make_sequences(const Served& served, const Request& r,
                         const std::shared_ptr<Inbox>& inbox,
                         const std::function<uint64_t()>& draw_seed) {
    std::vector<int> stop_ids = r.stop_token_ids;
    const auto& eos = served.checkpoint->config.eos;
    if (!r.ignore_eos) stop_ids.insert(stop_ids.end(), eos.begin(), eos.end());
    // vLLM masks the ends of the model even where they are ignored.
    std::vector<int> ends = stop_ids;
    if (r.min_tokens > 0) ends.insert(ends.end(), eos.begin(), eos.end());
    const auto allowed = make_mask(served, r, {});
    const auto allowed_before = r.min_tokens > 0 ? make_mask(served, r, ends) : nullptr;
    Sequences sequences;
    for (const auto& prompt : r.prompts) {
        const int size = int(prompt.size()), own_limit = served.checkpoint->defaults.max_new_tokens;
        int max_tokens = r.max_tokens < 0 ? served.max_model_len - size : int(r.max_tokens);
        if (own_limit > 0) max_tokens = std::min(max_tokens, own_limit);
        if (!served.limits.fit(size + max_tokens))
            refuse("max_tokens",
                   "%d prompt tokens and %d more need more pages than the server has: ask for "
                   "less, or give it more memory",
                   size, max_tokens);
        // A logit divided by less would be no finite number.
        const float repetition = float(std::clamp(r.repetition_penalty, 1e-6, 1e6));
        std::map<int, Adjustment> adjustments;
        for (const auto& [id, bias] : r.logit_bias)
            adjustments[id].bias = float(std::clamp(bias, -100., 100.));
        if (r.repetition_penalty != 1) {
            for (const int id : prompt) adjustments[id].repetition = repetition;
        }
        const uint64_t seed = r.seed == -1 ? draw_seed() : uint64_t(r.seed);
        for (int i = 0; i < r.n; i++) {
            auto& s = *sequences.emplace_back(std::make_shared<Sequence>());
            s.tokens = prompt;
            s.prompt_tokens = size;
            s.max_tokens = max_tokens;
            s.sampling = {float(r.temperature), int(std::max<int64_t>(0, r.top_k)),
                          float(r.top_p),       float(r.min_p),
                          seed + uint64_t(i),   int(r.logprobs)};
            s.stop_ids = stop_ids;
            s.prompt_logprobs = int(r.prompt_logprobs);
            s.presence = float(r.presence_penalty);
            s.frequency = float(r.frequency_penalty);
            s.repetition = repetition;
            for (auto& [id, adjustment] : adjustments) {
                s.adjustments.push_back(adjustment);
                s.adjustments.back().id = id;
            }
            s.allowed = allowed;
            s.allowed_before = allowed_before;
            s.min_tokens = int(r.min_tokens);
            s.choice = int(sequences.size()) - 1;
            s.inbox = inbox;
            s.arrived = seconds();
        }
    }
    return sequences;
}

}  // namespace gemma
