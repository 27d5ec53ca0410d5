// SPDX-License-Identifier: Apache-2.0
//
// messages.cpp: OpenAI's messages become the turns of Gemma's template, which knows of users and
// models alone: what may be called, what was called and what came of it is text, in Google's form.
// Beside the path.
#include "messages.h"

#include <algorithm>
#include <map>
#include <optional>

#include "fields.h"
#include "request.h"
#include "structured.h"

namespace gemma {

using ordered = nlohmann::ordered_json;

std::string text_of(const json& content) {
    if (!content.is_array()) return content.is_string() ? content.get<std::string>() : "";
    std::string s;
    for (const json& part : content) s += part["text"].get_ref<const std::string&>();
    return s;
}

namespace {

// A message's content as the template takes it: text, or a list of parts that are text. As in
// vLLM, null is a list without parts, and a part whose text is null is left out.
json template_content(const json& content, size_t message) {
    static const std::map<std::string, const char*> texts{{"text", "text"},
                                                          {"input_text", "text"},
                                                          {"output_text", "text"},
                                                          {"refusal", "refusal"},
                                                          {"thinking", "thinking"}};
    if (!content.is_array() && !content.is_null()) return content;
    json parts = json::array();
    for (const json& part : content) {
        if (part.is_string()) parts.push_back({{"type", "text"}, {"text", part}});
        if (part.is_string()) continue;
        const json type = part.is_object() ? part.value("type", json()) : json();
        const auto found = type.is_string() ? texts.find(type) : texts.end();
        if (found == texts.end())
            refuse("messages", "messages[%zu].content: only text is served: a part has the type %s",
                   message, show(type).c_str());
        const auto text = part.find(found->second);
        if (text == part.end() || !(text->is_string() || text->is_null()))
            refuse("messages", "messages[%zu].content: %s must be a string", message,
                   found->second);
        if (text->is_string()) parts.push_back({{"type", "text"}, {"text", *text}});
    }
    return parts;
}

// As https://ai.google.dev/gemma/docs/capabilities/function-calling has it.
std::string offer(const Tools& tools) {
    const char* const form =
        tools.in_json ? R"([{"name": function name, "parameters": dictionary of argument name )"
                        "and its value}]"
                      : "[func_name1(params_name1=params_value1, params_name2=params_value2...), "
                        "func_name2(params)]";
    return std::string(
               "You have access to functions. If you decide to invoke any of the function(s), you "
               "MUST put it in the format of ") +
           form +
           "\n\nYou SHOULD NOT include any other text in the response if you call a "
           "function\n" +
           tools.offered.dump(2, ' ', false, ordered::error_handler_t::replace);
}

template <class Json>
std::string python(const Json& value) {
    if (value.is_null()) return "None";
    if (value.is_boolean()) return value.template get<bool>() ? "True" : "False";
    if (!value.is_structured()) return value.dump(-1, ' ', false, json::error_handler_t::replace);
    std::string s;
    for (const auto& [name, item] : value.items())
        s += (s.empty() ? "" : ", ") + (value.is_object() ? quote(name) + ": " : "") + python(item);
    return value.is_object() ? "{" + s + "}" : "[" + s + "]";
}

// As the prompt asks for calls. Null if the arguments are no object.
template <class Json>
std::optional<std::string> write_call(const std::string& name, const Json& arguments,
                                      bool in_json) {
    if (!arguments.is_object()) return std::nullopt;
    if (in_json)
        return R"({"name":)" + quote(name) + R"(,"parameters":)" +
               arguments.dump(-1, ' ', false, json::error_handler_t::replace) + "}";
    std::string list;
    for (const auto& [key, value] : arguments.items())
        list += (list.empty() ? "" : ", ") + key + "=" + python(value);
    return name + "(" + list + ")";
}

// The calls of an assistant's message.
std::string write_calls(const json& calls, bool in_json, size_t message) {
    std::string s;
    for (size_t i = 0; i < calls.size(); i++) {
        const std::string place = text("messages[%zu].tool_calls[%zu].function", message, i);
        const auto need = [&](bool met, const char* what, const json& got) {
            if (!met) refuse("messages", "%s%s, got %s", place.c_str(), what, show(got).c_str());
        };
        const json& call = calls[i];
        const json function = call.is_object() ? call.value("function", json()) : json();
        need(function.is_object(), " must be an object", function);
        const json name = function.value("name", json());
        need(name.is_string() && name != "", ".name must be a name", name);
        const json given = function.value("arguments", json());
        std::string text = given.is_string() ? given.get<std::string>() : given.dump();
        if (text.empty() || given.is_null()) text = "{}";
        const bool has_nul = text.find('\0') != text.npos;  // the library takes it for the end
        check_depth(text, "messages");
        // With their order, which is the model's; but that parser takes the square of the members.
        const auto written = has_nul ? std::nullopt
                             : count_members(text) > 256
                                 ? write_call(name, json::parse(text, nullptr, false), in_json)
                                 : write_call(name, ordered::parse(text, nullptr, false), in_json);
        need(written.has_value(), ".arguments must be a JSON object", given);
        s += (i > 0 ? ", " : "") + *written;
    }
    return "[" + s + "]";
}

// What a message says, where it becomes a part of a turn.
std::string text_at(const json& message, size_t index) {
    const json& content = message["content"];
    if (!content.is_string() && !content.is_array())
        refuse("messages", "messages[%zu].content must be text, got %s", index,
               show(content).c_str());
    return text_of(content);
}

// Results that stand side by side: they are one turn, in the order of the calls that they answer.
class ToolResults {
  public:
    void begin(const json& calls) {  // of an assistant's message
        order.clear();
        for (const json& call : calls) order.emplace(call.value("id", json()).dump(), order.size());
    }
    void add(const json& message, size_t index) {
        const auto call = order.find(message.value("tool_call_id", json()).dump());
        found.emplace_back(call == order.end() ? order.size() : call->second,
                           "```tool_output\n" + text_at(message, index) + "\n```");
    }
    bool empty() const { return found.empty(); }
    json take_turn(const std::string& behind) {
        std::stable_sort(found.begin(), found.end(),
                         [](const auto& a, const auto& b) { return a.first < b.first; });
        std::string s;
        for (const auto& [call, text] : found) s += (s.empty() ? "" : "\n") + text;
        found.clear();
        return {{"role", "user"}, {"content", s + behind}};
    }

  private:
    std::map<std::string, size_t> order;  // of calls, by their ids
    std::vector<std::pair<size_t, std::string>> found;
};

// Puts the offer where a system's message stands, which is in front of the first question.
void put_offer(json& turns, const Tools& tools) {
    std::string text = offer(tools);
    if (turns[0]["role"] == "system") {
        json& content = turns[0]["content"];
        // Of a list, the template takes the first part.
        if (content.is_array() && content.size() > 1) content = json::array({content[0]});
        const std::string of_system = text_at(turns[0], 0);
        text = of_system + (of_system.empty() ? "" : "\n\n") + text;
        turns.erase(0);
    }
    turns.insert(turns.begin(), json{{"role", "system"}, {"content", text}});
}

}  // namespace

json make_turns(json messages, const Tools* tools) {
    if (!messages.is_array() || messages.empty()) return messages;
    json turns = json::array();
    ToolResults results;  // that are in no turn yet
    for (size_t i = 0; i < messages.size(); i++) {
        json& message = messages[i];
        const json role = message.is_object() ? message.value("role", json()) : json();
        if (!role.is_string()) refuse("messages", "messages[%zu]: role must be a string", i);
        message["content"] = template_content(message.value("content", json()), i);
        if (role == "tool") {
            results.add(message, i);
            continue;
        }
        if (!results.empty() && role == "user") {  // roles alternate: both are one turn
            turns.push_back(results.take_turn("\n\n" + text_at(message, i)));
            continue;
        }
        if (!results.empty()) turns.push_back(results.take_turn(""));
        if (role == "developer") message["role"] = "system";
        const json calls = role == "assistant" ? message.value("tool_calls", json()) : json();
        if (!calls.is_null() && calls != json::array()) {
            if (!calls.is_array())
                refuse("messages", "messages[%zu].tool_calls must be a list, got %s", i,
                       show(calls).c_str());
            const std::string said = text_at(message, i);
            message["content"] =
                said + (said.empty() ? "" : "\n") + write_calls(calls, tools && tools->in_json, i);
            results.begin(calls);
        }
        turns.push_back(std::move(message));
    }
    if (!results.empty()) turns.push_back(results.take_turn(""));
    if (tools) put_offer(turns, *tools);
    return turns;
}

}  // namespace gemma
