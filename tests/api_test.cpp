// SPDX-License-Identifier: Apache-2.0
//
// api_test.cpp: every parameter and every route, and the requests of known client programs.
//
//   [1] Prompts        the ids that a request gives the model
//   [2] Prompt scores  echo and prompt_logprobs
//   [3] Choices        the parameters that change which token is chosen
//   [4] Stops          stop ids and stop strings, and how much of them the text shows
//   [5] Refusals       ranges, and the order of the checks
//   [6] Usage and ids
//   [7] Routes         the routes that do not generate, CORS, API keys
//   [8] Metrics
//   [9] Clients        requests as known client programs send them
//   [10] Known bugs    a case for each bug that other servers have had
//   [11] Structured output
//   [12] Tools
//
// A case tagged [http] holds for any model behind the server; [demo] needs the demo model's logits.
// [tools] needs what the demo model says, of whichever engine: one is enough.
#include "client.h"

#include <limits>
#include <numeric>
#include <set>
#include <sstream>

namespace {

// The answer to a request, which must be the same when it is streamed.
json both(const std::string& path, const json& fields, int port = server().port) {
    json answer = ask(path, fields, port);
    const Stream s = stream(path, fields, port);
    INFO(write(fields) << " " << s.reply.body);
    REQUIRE(s.done);
    CHECK(merged(s, answer["choices"].size()) == comparable(answer));
    return answer;
}

Ids tokens_of(const json& body) {
    const Reply reply = post("/tokenize", body);
    INFO(write(body) << " " << reply.body);
    REQUIRE(reply.status == 200);
    return reply.parsed()["tokens"];
}
Ids tokenized(const std::string& s) { return tokens_of({{"prompt", s}}); }
std::string decoded(const Ids& ids) {
    return post("/detokenize", {{"tokens", ids}}).parsed()["prompt"];
}
Ids plus(Ids a, const Ids& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}
Ids last(const Ids& ids, size_t n) { return {ids.end() - ptrdiff_t(n), ids.end()}; }
json last(const json& list, size_t n) {
    return json(json::array_t(list.end() - ptrdiff_t(n), list.end()));
}

// Fields with which a choice names its tokens by id. ids_of reads these ids back.
json as_ids(const std::string& path, int k = 0) {
    json fields{{"return_tokens_as_token_ids", true}, {"logprobs", k}};
    if (path == chat) fields["logprobs"] = true, fields["top_logprobs"] = k;
    return fields;
}
Ids ids_of(const json& choice) {
    const json& lists = choice["logprobs"];
    Ids ids;
    for (const json& t : lists.contains("tokens") ? lists["tokens"] : lists["content"]) {
        const std::string name = t.is_string() ? t : t["token"];
        REQUIRE(name.find("token_id:") == 0);
        ids.push_back(std::stoi(name.substr(9)));
    }
    return ids;
}
Ids made(const std::string& path, const json& fields) {
    return ids_of(both(path, with(with({{"temperature", 0}}, fields), as_ids(path)))["choices"][0]);
}

const json& prompt_logprobs(const std::string& path, const json& answer) {
    return path == chat ? answer["prompt_logprobs"] : answer["choices"][0]["prompt_logprobs"];
}
// The prompt's ids, read from prompt_logprobs. The first token has no entry there: it is -1.
Ids seen(const std::string& path, const json& fields) {
    const json answer = ask(path, with(fields, {{"prompt_logprobs", 0}, {"max_tokens", 1}}));
    const json list = prompt_logprobs(path, answer);
    CHECK(answer["usage"]["prompt_tokens"] == list.size());
    Ids ids;
    for (const json& entry : list) {
        CHECK((entry.is_null() ? ids.empty() : entry.size() == 1));
        ids.push_back(entry.is_null() ? -1 : std::stoi(keys(entry)[0]));
    }
    return ids;
}

Strings words(const std::string& s) {  // between spaces
    std::istringstream in(s);
    return {std::istream_iterator<std::string>(in), {}};
}

size_t characters(const std::string& s) {
    return size_t(std::count_if(s.begin(), s.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

// Checks the four logprobs lists of a completion: they have one length, each offset is the end of
// the token before, and top_logprobs has the chosen token with exactly its own logprob.
void check_lists(const json& lists, size_t size, size_t k, bool from_start) {
    CHECK(keys(lists) == Strings{"text_offset", "token_logprobs", "tokens", "top_logprobs"});
    for (const json& list : lists) REQUIRE(list.size() == size);
    size_t offset = lists["text_offset"][0];
    for (size_t i = 0; i < size; i++) {
        const std::string token = lists["tokens"][i];
        CHECK(lists["text_offset"][i] == offset);
        offset += characters(token);
        const json &top = lists["top_logprobs"][i], &own = lists["token_logprobs"][i];
        if (from_start && i == 0) {
            CHECK((top.is_null() && own.is_null() && lists["text_offset"][0] == 0));
            continue;
        }
        CHECK(top[token] == own);
        CHECK((top.size() >= 1 && top.size() <= k + 1));
    }
}

std::string everything(int port, const std::string& request) {  // reads until the server closes
    Raw raw(port);
    raw.write(request);
    return raw.read_until("\x01");
}

}  // namespace

// [1] Prompts -------------------------------------------------------------------------------------

TEST_CASE("what the model sees of a chat, token for token", "[http]") {
    // Each row: a chat body, and a raw prompt that must give the same tokens.
    const json table = json::parse(R"([
        [{"messages": [{"role": "user", "content": "Hi"}]},
            "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"],
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
            "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"],
        [{"messages": [{"role": "user", "content": "Hi"}], "add_special_tokens": true},
            "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"],
        [{"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": false},
            "<start_of_turn>user\nHi<end_of_turn>\n"],
        [{"messages": [{"role": "system", "content": "Be brief."},
                       {"role": "user", "content": "Hi"}]},
            "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"],
        [{"messages": [{"role": "user", "content": "Hi"},
                       {"role": "assistant", "content": "  The KV \n"}],
          "add_generation_prompt": false, "continue_final_message": true},
            "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nThe KV"],
        [{"messages": [{"role": "user", "content": "Hi"},
                       {"role": "assistant", "content": [{"type": "text", "text": "The KV"}]}],
          "add_generation_prompt": false, "continue_final_message": true},
            "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nThe KV"],
        [{"messages": [{"role": "user", "content": "What is"}],
          "add_generation_prompt": false, "continue_final_message": true},
            "<start_of_turn>user\nWhat is"],
        [{"messages": [{"role": "developer", "content": "Be brief."},
                       {"role": "user", "content": "Hi"}]},
            "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"],
        [{"messages": [{"role": "user", "content": "Hi"}],
          "chat_template_kwargs": {"enable_thinking": false}, "documents": [{"text": "x"}]},
            "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"]
    ])");
    for (const json& row : table) {
        INFO(row);
        Ids expected = tokenized(row[1]);
        CHECK(tokens_of(row[0]) == expected);
        expected[0] = -1;
        CHECK(seen(chat, row[0]) == expected);
    }
}

TEST_CASE("F2 and D1: content that is null or absent, and parts of every kind of text", "[http]") {
    const auto talk_of = [](const json& content) {
        return json{{"messages", json::array({{{"role", "user"}, {"content", content}}})}};
    };
    const Ids hi = tokens_of(base(chat, "Hi")), nothing = tokens_of(base(chat, ""));
    for (const json& part : json::parse(R"([
        "Hi", {"type": "text", "text": "Hi"}, {"type": "input_text", "text": "Hi"},
        {"type": "output_text", "text": "Hi"}, {"type": "refusal", "refusal": "Hi"},
        {"type": "thinking", "thinking": "Hi"}])")) {
        INFO(part);
        CHECK(tokens_of(talk_of(json::array({part}))) == hi);
        const json nulls = json::parse(R"([{"type": "text", "text": null},
            {"type": "refusal", "refusal": null}, {"type": "thinking", "thinking": null}])");
        CHECK(tokens_of(talk_of(json{nulls[0], part, nulls[1], nulls[2]})) == hi);
    }
    for (const char* empty : {R"({"content": null})", "{}", R"({"content": []})",
                              R"({"content": [{"type": "text", "text": null}]})"}) {
        json message = json::parse(empty);
        message["role"] = "user";
        INFO(empty);
        CHECK(tokens_of({{"messages", json::array({message})}}) == nothing);
        json talk = json::parse(R"([{"role": "user", "content": "Hi"}, {"role": "assistant"},
                                    {"role": "user", "content": "Hi"}])");
        talk[1].update(json::parse(empty));
        for (const bool streamed : {false, true}) {
            const json body{{"messages", talk}, {"max_tokens", 2}, {"stream", streamed}};
            CHECK(post(chat, body).status == 200);
        }
        // Gemma's template takes the first character or part of a system message.
        message["role"] = "system";
        check_refusal(post(chat, {{"messages", {message, talk[0]}}}), 400,
                      {"messages[0]: content must be a string"});
    }
    for (const char* bad :
         {R"({"type": "text"})", R"({"type": "text", "text": 5})", R"({"type": "thinking"})",
          R"({"type": "refusal", "text": "x"})", R"({"text": "x"})", "5", "null", "[]"})
        check_refusal(post(chat, talk_of(json::array({json::parse(bad)}))), 400,
                      {"messages[0].content: "});
    const json last{{"messages", json::parse(R"([{"role": "user", "content":
        ["What ", {"type": "input_text", "text": "is"}, {"type": "text", "text": null}]}])")},
                    {"add_generation_prompt", false},
                    {"max_tokens", 1},
                    {"echo", true}};
    CHECK(first_text(ask(chat, last)).starts_with("What is"));
}

TEST_CASE("row 3: an assistant's empty content is an empty turn", "[http]") {
    const Ids expected = tokenized(
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n<end_of_turn>\n"
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n");
    for (const json& empty : {json(""), json::array(), json{{{"type", "text"}, {"text", ""}}}}) {
        INFO(empty);
        json talk = json::parse(R"([{"role": "user", "content": "Hi"}, {"role": "assistant"},
                                    {"role": "user", "content": "Hi"}])");
        talk[1]["content"] = empty;
        CHECK(tokens_of({{"messages", talk}}) == expected);
        both(chat, {{"messages", talk}, {"max_tokens", 2}, {"temperature", 0}});
    }
}

TEST_CASE("what the model sees of a prompt: <bos>, and a prompt cut on the left", "[http]") {
    const std::string words = "Cloud Run is a service";
    const Ids whole = tokenized(words), bare(whole.begin() + 1, whole.end());
    const size_t size = whole.size();
    REQUIRE(size > 4);
    const Ids talk = tokens_of(base(chat));
    struct {
        std::string path;
        json fields;
        Ids expected;
    } const table[]{
        {completions, {{"prompt", words}}, whole},
        {completions, {{"prompt", words}, {"add_special_tokens", false}}, bare},
        {completions, {{"prompt", bare}}, bare},
        {completions, {{"prompt", bare}, {"add_special_tokens", true}}, bare},
        {completions, {{"prompt", json::array({""})}}, {2}},
        {completions, {{"prompt", words}, {"truncate_prompt_tokens", 3}}, plus({2}, last(bare, 2))},
        {completions, {{"prompt", words}, {"truncate_prompt_tokens", 1}}, {2}},
        {completions, {{"prompt", words}, {"truncate_prompt_tokens", size}}, whole},
        {completions, {{"prompt", words}, {"truncate_prompt_tokens", 1000}}, whole},
        {completions, {{"prompt", bare}, {"truncate_prompt_tokens", 3}}, last(bare, 3)},
        {chat, {{"truncate_prompt_tokens", 4}}, last(talk, 4)},
        {chat, {{"truncate_prompt_tokens", nullptr}}, talk},
    };
    for (const auto& row : table) {
        INFO(row.path << write(row.fields));
        Ids expected = row.expected;
        expected[0] = -1;
        CHECK(seen(row.path, row.fields) == expected);
    }
    check_refusal(post(completions, {{"prompt", ""}}), 400,
                  {"Either prompt or prompt_embeds must be provided and non-empty."});
    check_refusal(post(completions, {{"prompt", json::array({""})}, {"add_special_tokens", false}}),
                  400, {"prompt has no token"});
    check_refusal(post(completions, {{"prompt", {"a", ""}}, {"add_special_tokens", false}}), 400,
                  {"prompt has no token"});
}

TEST_CASE("a cut prompt may be longer than the context", "[http]") {
    const json answer =
        complete({{"prompt", Ids(33'000, 700)}, {"truncate_prompt_tokens", 5}, {"max_tokens", 1}});
    CHECK(answer["usage"]["prompt_tokens"] == 5);
}

// [2] Prompt scores -------------------------------------------------------------------------------

TEST_CASE("prompt_logprobs: an entry for each token but the first, on both endpoints", "[http]") {
    const Ids ids = tokens_of(base(chat));
    for (const size_t k : {0, 1, 5, 20}) {
        const json common{{"max_tokens", 1}, {"temperature", 0}, {"prompt_logprobs", k}};
        const json spoken = ask(chat, common);
        const json raw = complete(with(common, {{"prompt", ids}}));
        const json list = prompt_logprobs(completions, raw);
        CHECK(list == prompt_logprobs(chat, spoken));  // the same tokens
        CHECK(raw["choices"][0]["logprobs"].is_null());
        REQUIRE(list.size() == ids.size());
        CHECK(list[0].is_null());
        for (size_t i = 1; i < list.size(); i++) {
            CHECK((list[i].size() == k || list[i].size() == k + 1));
            REQUIRE(list[i].contains(std::to_string(ids[i])));
            std::map<int, double> by_rank;
            for (const auto& [id, entry] : list[i].items()) {
                CHECK(keys(entry) == Strings{"logprob", "rank", "decoded_token"});
                const std::string text = entry["decoded_token"], plain = decoded({std::stoi(id)});
                INFO(id << " '" << text << "' '" << plain << "'");
                CHECK((plain.empty() ? text.substr(0, 1) == "<" : text == plain));
                CHECK((entry["logprob"] <= 0 && entry["logprob"] >= -9999));
                by_rank[entry["rank"]] = entry["logprob"];
            }
            CHECK(by_rank.size() == list[i].size());
            if (k > 0) CHECK(std::next(by_rank.begin(), int(k) - 1)->first == int(k));
            for (auto a = by_rank.begin(), b = std::next(a); b != by_rank.end(); a = b++)
                CHECK(a->second >= b->second);
        }
    }
    for (const std::string& path : {completions, chat}) {
        for (const json& off : {json(), json(nullptr)})
            CHECK(prompt_logprobs(path, ask(path, {{"max_tokens", 1}, {"prompt_logprobs", off}}))
                      .is_null());
    }
}

TEST_CASE("prompt_logprobs: on every choice, and not in a stream", "[http]") {
    const json answer = complete({{"prompt", {"Cloud Run is", "A token"}},
                                  {"n", 2},
                                  {"max_tokens", 2},
                                  {"prompt_logprobs", 1}});
    const auto list = [&](size_t i) { return answer["choices"][i]["prompt_logprobs"]; };
    REQUIRE(answer["choices"].size() == 4);
    CHECK(list(0).size() == tokenized("Cloud Run is").size());
    CHECK(list(2).size() == tokenized("A token").size());
    CHECK((list(0) == list(1) && list(2) == list(3) && list(0) != list(2)));
    for (const std::string& path : {completions, chat}) {
        const json body = with(base(path), {{"stream", true}, {"max_tokens", 2}});
        check_refusal(post(path, with(body, {{"prompt_logprobs", 1}})), 400,
                      {"`prompt_logprobs` are not available when `stream=True`."});
        CHECK(read_events(post(path, with(body, {{"prompt_logprobs", 0}}))).done);
        for (const int bad : {-1, 21})
            check_refusal(post(path, with(base(path), {{"prompt_logprobs", bad}})), 400,
                          {"prompt_logprobs", std::to_string(bad)});
    }
}

TEST_CASE("echo: the prompt's text before the output, in every form of a prompt", "[http]") {
    const std::string one = "The KV cache 🌍 holds", two = "Cloud Run is a ";
    const json forms{one, tokenized(one), json{one, two}, json{tokenized(two), tokenized(one)}};
    for (const json& prompt : forms) {
        for (const json& more :
             {json{{"temperature", 0}}, json{{"seed", 5}, {"n", 2}},
              json{{"seed", 5}, {"logprobs", 0}}, json{{"seed", 5}, {"logprobs", 2}, {"n", 2}}}) {
            const json plain = with(more, {{"prompt", prompt}, {"max_tokens", 4}});
            const json fields = with(plain, {{"echo", true}});
            INFO(write(fields));
            const json answer = both(completions, fields), silent = complete(plain);
            const bool two_first = prompt.size() == 2 && prompt[0].is_array();
            const size_t n = more.value("n", 1);
            CHECK(answer["usage"] == silent["usage"]);
            for (size_t i = 0; i < answer["choices"].size(); i++) {
                const json& choice = answer["choices"][i];
                const std::string& own = (i / n == 1) != two_first ? two : one;
                const bool as_ids = prompt.is_array() && !prompt[0].is_string();
                CHECK(text_of(choice) ==
                      (as_ids ? "<bos>" : "") + own + text_of(silent["choices"][i]));
                if (!more.contains("logprobs")) continue;
                const size_t k = more["logprobs"], size = tokenized(own).size();
                check_lists(choice["logprobs"], size + 4, k, true);
                CHECK(last(choice["logprobs"]["token_logprobs"], 4) ==
                      silent["choices"][i]["logprobs"]["token_logprobs"]);
                // Echo with logprobs implies prompt_logprobs, as in vLLM.
                CHECK(choice["prompt_logprobs"].size() == size);
            }
        }
    }
}

TEST_CASE("echo: no prompt, a cut prompt, and a prompt with end tokens in it", "[http]") {
    const std::tuple<json, json, std::string> table[]{
        {json::array({""}), json::object(), ""},
        {"Cloud Run is", {{"truncate_prompt_tokens", 2}}, " is"},
        {"Cloud Run is", {{"truncate_prompt_tokens", 1}}, ""},
        {"Cloud Run is", {{"add_special_tokens", false}}, "Cloud Run is"},
        {{2, 700, 106, 1, 701},
         json::object(),
         "<bos>" + decoded({700}) + "<end_of_turn><eos>" + decoded({701})},
        {"a<end_of_turn>b", {{"truncate_prompt_tokens", 3}}, "<end_of_turn>b"},
        {{700, 701}, {{"stop_token_ids", {701}}}, decoded({700, 701})}};
    for (const auto& [prompt, more, head] : table) {
        for (const int most : {0, 3}) {
            const json plain{{"prompt", prompt}, {"temperature", 0}, {"ignore_eos", true}};
            const json fields = with(with(plain, more), {{"max_tokens", most}, {"echo", true}});
            INFO(write(fields));
            const json echoed = both(completions, fields);
            const json silent = with(fields, {{"echo", false}, {"max_tokens", 3}});
            CHECK(first_text(echoed) == head + (most > 0 ? first_text(complete(silent)) : ""));
            CHECK(echoed["usage"]["completion_tokens"] == most);
        }
    }
}

TEST_CASE("F3: echo of ids: text_offset counts the characters of the text", "[http]") {
    for (const Ids& ids : {Ids{0, 0, 0, 0, 0}, Ids{2, 700, 105, 701, 106, 1}}) {
        const json choice = both(completions, {{"prompt", ids},
                                               {"echo", true},
                                               {"logprobs", 1},
                                               {"logit_bias", {{"702", 100}}},
                                               {"max_tokens", 2}})["choices"][0];
        std::string joined;
        for (const std::string& token : choice["logprobs"]["tokens"].get<Strings>())
            joined += token;
        CHECK(text_of(choice) == joined);
        check_lists(choice["logprobs"], ids.size() + 2, 1, true);
    }
}

TEST_CASE("echo in a stream: the first chunk of a choice has the prompt", "[http]") {
    const std::string one = "The KV cache", two = "Cloud Run";
    const Stream s =
        stream(completions, {{"prompt", {one, two}}, {"n", 2}, {"max_tokens", 3}, {"echo", true}});
    std::set<size_t> begun;
    for (const json& e : s.events) {
        REQUIRE(e["choices"].size() == 1);
        const json& c = e["choices"][0];
        if (begun.insert(c["index"].get<size_t>()).second)
            CHECK(text_of(c).find(c["index"] < 2 ? one : two) == 0);
    }
    CHECK(begun.size() == 4);
}

TEST_CASE("echo and stop strings: only the output is searched", "[http]") {
    const json fields{{"prompt", "The KV cache"}, {"temperature", 0}, {"max_tokens", 4}};
    const json stopped = with(fields, {{"stop", {"KV", "cache"}}});
    CHECK(first_text(both(completions, with(stopped, {{"echo", true}}))) ==
          "The KV cache" + first_text(complete(stopped)));
}

TEST_CASE("echo of a chat: the last message, if the answer continues it", "[http]") {
    const json talk = json::parse(R"([{"role": "user", "content": "Hi"},
                                      {"role": "assistant", "content": "The KV"}])");
    const json open{{"messages", json::array({talk[0]})}, {"add_generation_prompt", false}};
    const json going_on{
        {"messages", talk}, {"add_generation_prompt", false}, {"continue_final_message", true}};
    const std::pair<json, std::string> table[]{
        {base(chat), ""}, {open, "Hi"}, {going_on, "The KV"}};
    for (const auto& [body, head] : table) {
        const json fields = with(body, {{"temperature", 0}, {"max_tokens", 4}});
        INFO(write(fields));
        const json answer = both(chat, with(fields, {{"echo", true}})), silent = ask(chat, fields);
        CHECK(first_text(answer) == head + first_text(silent));
        CHECK(answer["usage"] == silent["usage"]);
    }
}

namespace {

// The logprobs of a text's own tokens; nothing is generated.
json score(const Ids& ids, size_t k, int port = server().port) {
    const json fields{{"prompt", ids}, {"echo", true}, {"max_tokens", 0}};
    return ask(completions, with(fields, as_ids(completions, int(k))), port)["choices"][0];
}

}  // namespace

TEST_CASE("scoring a text gives the logprobs with which it was generated, to the last bit",
          "[http]") {
    // Sampling parameters change which token is chosen, never the logprob of a token.
    const Ids prompt = tokenized("The server answers");
    for (const json& making :
         {json{{"temperature", 0}}, json{{"seed", 3}, {"temperature", 2}, {"top_k", 0}},
          json{{"seed", 3}, {"top_k", 5}, {"top_p", 0.5}, {"min_p", 0.1}},
          json{{"seed", 3}, {"logit_bias", {{"600", 100}}}},
          json{{"seed", 3}, {"allowed_token_ids", {600, 700, 800}}},
          json{{"seed", 3}, {"repetition_penalty", 2}, {"frequency_penalty", 1}},
          json{{"seed", 3}, {"presence_penalty", -2}, {"min_tokens", 12}}}) {
        INFO(write(making));
        const json fields{{"prompt", prompt}, {"max_tokens", 12}, {"ignore_eos", true}};
        const json one = complete(with(with(fields, making), as_ids(completions, 3)))["choices"][0];
        const Ids ids = plus(prompt, ids_of(one));
        const json scored = score(ids, 3);
        check_lists(scored["logprobs"], ids.size(), 3, true);
        CHECK(ids_of(scored) == ids);
        for (const char* list : {"token_logprobs", "tokens", "top_logprobs"})
            CHECK(last(scored["logprobs"][list], 12) == one["logprobs"][list]);
        for (size_t i = 1; i < ids.size(); i++) {
            CHECK(scored["prompt_logprobs"][i][std::to_string(ids[i])]["logprob"] ==
                  scored["logprobs"]["token_logprobs"][i]);
        }
    }
}

TEST_CASE("scores do not depend on chunks, pages, neighbours or the prefix cache", "[http]") {
    Server tiny({"--num-gpu-blocks-override", "6", "--max-num-batched-tokens", "7"});
    std::vector<Ids> texts;
    for (int t = 0; t < 4; t++) {
        texts.emplace_back();
        for (int i = 0; i < 40; i++) texts.back().push_back(600 + (i * (t + 3) * 37) % 1000);
    }
    json alone = json::array();
    for (const Ids& ids : texts) alone.push_back(score(ids, 2)["prompt_logprobs"]);
    CHECK(score(texts[0], 2)["prompt_logprobs"] == alone[0]);  // from the prefix cache
    const json answer = ask(completions,
                            {{"prompt", texts},
                             {"max_tokens", 70},
                             {"temperature", 0},
                             {"ignore_eos", true},
                             {"prompt_logprobs", 2}},
                            tiny.port);
    for (size_t i = 0; i < 4; i++) CHECK(answer["choices"][i]["prompt_logprobs"] == alone[i]);
    const std::string metrics = get("/metrics", tiny.port).body;
    const size_t at = metrics.find("\nvllm:num_preemptions_total{");
    REQUIRE(at != std::string::npos);
    const double preemptions = std::atof(metrics.c_str() + metrics.find('}', at) + 1);
    CHECK(preemptions > 0);
    const size_t each = metrics.find("\nvllm:request_num_preemptions_sum{");
    REQUIRE(each != std::string::npos);
    CHECK(std::atof(metrics.c_str() + metrics.find('}', each) + 1) == preemptions);
}

// [3] Choices -------------------------------------------------------------------------------------

TEST_CASE("logit_bias: 100 forces an id, -100 bans it", "[http]") {
    for (const std::string& path : {completions, chat}) {
        const json five{{"max_tokens", 5}, {"ignore_eos", true}};
        CHECK(made(path, with(five, {{"logit_bias", {{"1000", 100}}}})) == Ids(5, 1000));
        CHECK(made(path, with(five, {{"logit_bias", {{"2047", 100}}}})) == Ids(5, 2047));
        const Ids plain = made(path, five);
        json ban;
        for (const int id : plain) ban[std::to_string(id)] = -100;
        for (const int id : made(path, with(five, {{"logit_bias", ban}})))
            CHECK(std::count(plain.begin(), plain.end(), id) == 0);
        for (const json& none : {json(), json::object(), json{{"1000", 0}}})
            CHECK(made(path, with(five, {{"logit_bias", none}})) == plain);
    }
    const auto biased = [](double a, double b) {
        return made(completions, {{"max_tokens", 8}, {"logit_bias", {{"700", a}, {"1500", b}}}});
    };
    const Ids even = biased(100, 100);  // 1e9 below is clamped to 100, so it wins no more often
    CHECK(biased(1e9, 100) == even);
    CHECK(biased(100, 1e9) == even);
}

TEST_CASE("allowed_token_ids: no other id is generated", "[http]") {
    const std::set<int> allowed{700, 1500, 2047};
    for (const std::string& path : {completions, chat}) {
        const json fields{{"max_tokens", 10}, {"allowed_token_ids", allowed}, {"ignore_eos", true}};
        for (const json& how : {json{{"temperature", 0}}, json{{"temperature", 5}, {"seed", 1}}}) {
            const Ids ids = made(path, with(fields, how));
            CHECK(ids.size() == 10);
            for (const int id : ids) CHECK(allowed.count(id) == 1);
        }
        CHECK(made(path, {{"max_tokens", 3}, {"allowed_token_ids", {700}}}) == Ids(3, 700));
    }
}

TEST_CASE("logprobs of prompts name a bounded number of ids", "[http]") {
    const json many{{"prompt", std::vector<Ids>(64, Ids(3'200, 300))}, {"max_tokens", 1}};
    check_refusal(post(completions, with(many, {{"prompt_logprobs", 20}})), 400,
                  {"at most 4194304 ids", "4300800"});
    check_refusal(post(completions, with(many, {{"echo", true}, {"logprobs", 20}})), 400,
                  {"4300800"});
}

TEST_CASE("empty stream_options count as absent", "[http]") {
    for (const std::string& path : {completions, chat})
        ask(path, {{"stream_options", json::object()}, {"max_tokens", 1}});
}

TEST_CASE("min_tokens: the text does not end before them, and may end right after", "[http]") {
    const json end{{"logit_bias", {{"106", 100}}}, {"max_tokens", 6}};
    for (const std::string& path : {completions, chat}) {
        for (const int least : {0, 1, 4, 5}) {
            const json answer = both(path, with(end, {{"min_tokens", least}, {"temperature", 0}}));
            CHECK(answer["usage"]["completion_tokens"] == least + 1);
            CHECK(answer["choices"][0]["finish_reason"] == "stop");
            CHECK(answer["choices"][0]["stop_reason"] == 106);
        }
        const json full = both(path, with(end, {{"min_tokens", 6}, {"temperature", 0}}));
        CHECK(full["usage"]["completion_tokens"] == 6);
        CHECK(full["choices"][0]["finish_reason"] == "length");
        const Ids own = made(path, {{"logit_bias", {{"600", 100}}},
                                    {"stop_token_ids", {600}},
                                    {"min_tokens", 3},
                                    {"max_tokens", 6}});
        REQUIRE(own.size() == 4);
        CHECK(own[3] == 600);
        CHECK(std::count(own.begin(), own.end(), 600) == 1);
        check_refusal(post(path, with(base(path), {{"min_tokens", 5}, {"max_tokens", 4}})), 400,
                      {"min_tokens", "max_tokens", "5", "4"});
        check_refusal(post(path, with(base(path), {{"min_tokens", 2},
                                                   {"max_tokens", 4},
                                                   {"allowed_token_ids", {1, 106}}})),
                      400, {"min_tokens", "allowed"});
    }
}

TEST_CASE("a generated end of turn is held off by min_tokens", "[http]") {
    // top_k 1000 makes the fake model end the text at its first token.
    const json fields{{"top_k", 1000}, {"temperature", 0}, {"min_tokens", 3}, {"max_tokens", 3}};
    CHECK(both(chat, fields)["usage"]["completion_tokens"] == 3);
}

TEST_CASE("presence and frequency penalties: each choice is the best of what is left", "[demo]") {
    const Ids odd{1500, 700, 1900, 900, 1300, 1100};  // no sense, so the distribution is flat
    int moved = 0;  // how often a likelier id than the chosen one existed
    for (const auto& [presence, frequency] :
         {std::pair(1.5, 0.), std::pair(0., 0.7), std::pair(2., 2.), std::pair(-1., -0.5)}) {
        const json fields{{"prompt", odd},
                          {"temperature", 0},
                          {"max_tokens", 24},
                          {"ignore_eos", true},
                          {"presence_penalty", presence},
                          {"frequency_penalty", frequency},
                          {"logit_bias", {{"1", -100}, {"106", -100}}}};
        const json choice = complete(with(fields, as_ids(completions, 20)))["choices"][0];
        std::map<int, int> counts;  // of generated ids; these penalties ignore the prompt
        const json& lists = choice["logprobs"];
        const Ids ids = ids_of(choice);
        for (size_t i = 0; i < ids.size(); i++) {
            const auto punished = [&](int id, double logprob) {
                return logprob - (counts[id] ? presence : 0) - frequency * counts[id];
            };
            const double raw = lists["token_logprobs"][i], own = punished(ids[i], raw);
            INFO(presence << " " << frequency << " " << i << " " << ids[i]);
            for (const auto& [name, logprob] : lists["top_logprobs"][i].items()) {
                const int id = std::stoi(name.substr(9));
                if (id == 1 || id == 106) continue;
                CHECK(own >= punished(id, logprob) - 1e-3);
                moved += logprob > raw;
            }
            counts[ids[i]]++;
        }
    }
    CHECK(moved > 0);
}

TEST_CASE("penalties change a text in the direction that they name", "[demo]") {
    for (const std::string& path : {completions, chat}) {
        const Ids prompt = path == chat ? tokens_of(base(chat)) : tokenized("The server answers");
        const auto ids_with = [&](const json& fields) {
            const json common{{"temperature", 0}, {"max_tokens", 20}, {"ignore_eos", true}};
            return ids_of(ask(path, with(with(common, fields), as_ids(path)))["choices"][0]);
        };
        // Of eight allowed ids, how often the most frequent one was generated.
        const auto most = [&](double penalty) {
            std::map<int, int> counts;
            for (const int id : ids_with(
                     {{"frequency_penalty", penalty},
                      {"allowed_token_ids", {1490, 1550, 1610, 1670, 1730, 1790, 1850, 1910}}}))
                counts[id]++;
            int times = 0;
            for (const auto& [id, count] : counts) times = std::max(times, count);
            return times;
        };
        CHECK(most(2) < most(0));
        CHECK(most(-2) == 20);
        CHECK(most(0) < 20);
        const auto different = [&](double penalty) {
            const Ids ids = ids_with({{"repetition_penalty", penalty}});
            return std::set<int>(ids.begin(), ids.end()).size();
        };
        CHECK(different(1) > different(0.1));
        // The repetition penalty counts prompt and output: no id comes twice.
        const Ids ids = ids_with({{"repetition_penalty", 100}});
        for (size_t i = 0; i < ids.size(); i++) {
            CHECK(std::count(prompt.begin(), prompt.end(), ids[i]) == 0);
            CHECK(std::count(ids.begin(), ids.begin() + ptrdiff_t(i), ids[i]) == 0);
        }
    }
}

TEST_CASE("penalties of a choice count that choice alone, in a stream too", "[demo]") {
    const json fields{{"frequency_penalty", 1.5}, {"repetition_penalty", 1.3}, {"max_tokens", 10}};
    for (const std::string& path : {completions, chat}) {
        const json crowd = both(path, with(fields, {{"seed", 7}, {"n", 3}}));
        for (int i = 0; i < 3; i++)
            CHECK(text_of(crowd["choices"][size_t(i)]) ==
                  first_text(ask(path, with(fields, {{"seed", 7 + i}}))));
    }
}

TEST_CASE("generation_config.json gives the repetition penalty", "[demo]") {
    std::string folder = (std::filesystem::temp_directory_path() / "gemma-api-XXXXXX").string();
    REQUIRE(mkdtemp(folder.data()));
    const std::filesystem::path copy = folder;
    for (const auto& file : std::filesystem::directory_iterator(demo))
        std::filesystem::create_symlink(file.path(), copy / file.path().filename());
    json config = json::parse(read_file(copy / "generation_config.json"));
    config["repetition_penalty"] = 100;
    std::filesystem::remove(copy / "generation_config.json");
    std::ofstream(copy / "generation_config.json") << config;
    {
        Server s({"--model", folder});
        const json fields{{"temperature", 0}, {"max_tokens", 20}};
        const auto said = [&](const json& more, int port) {
            return first_text(ask(completions, with(fields, more), port));
        };
        CHECK(said({}, s.port) == said({{"repetition_penalty", 100}}, server().port));
        CHECK(said({{"repetition_penalty", 1}}, s.port) == said({}, server().port));
        CHECK(said({}, s.port) != said({}, server().port));
    }
    std::filesystem::remove_all(copy);
}

TEST_CASE("every choice of several prompts has its own seed", "[http]") {
    const json fields{{"seed", 41}, {"max_tokens", 6}, {"temperature", 1}, {"logprobs", 1}};
    const json many = both(completions, with(fields, {{"prompt", {"The KV", "A page"}}, {"n", 2}}));
    for (size_t i = 0; i < 4; i++) {
        const json alone =
            complete(with(fields, {{"prompt", i < 2 ? "The KV" : "A page"}, {"seed", 41 + i % 2}}));
        CHECK(comparable(many)[i] == comparable(alone)[0]);
    }
}

// [4] Stops ---------------------------------------------------------------------------------------

TEST_CASE("stop_token_ids: the id is the reason, and not shown unless asked", "[http]") {
    for (const std::string& path : {completions, chat}) {
        const json fields{{"temperature", 0}, {"max_tokens", 8}, {"ignore_eos", true}};
        const Ids plain = made(path, fields);
        for (const size_t at : {0, 4, 7}) {
            const int id = plain[at];
            const auto first = std::find(plain.begin(), plain.end(), id) - plain.begin();
            const Ids before(plain.begin(), plain.begin() + first);
            for (const bool shown : {false, true}) {
                const json answer =
                    both(path, with(fields, {{"stop_token_ids", {id, 2046}},
                                             {"include_stop_str_in_output", shown}}));
                const json& choice = answer["choices"][0];
                INFO(path << " " << id << " " << shown);
                CHECK(choice["finish_reason"] == "stop");
                CHECK(choice["stop_reason"] == id);
                CHECK(answer["usage"]["completion_tokens"] == first + 1);
                CHECK(text_of(choice) == decoded(shown ? plus(before, {id}) : before));
            }
        }
        CHECK(made(path, with(fields, {{"stop_token_ids", json::array()}})) == plain);
        CHECK(made(path, with(fields, {{"stop_token_ids", nullptr}})) == plain);
    }
}

TEST_CASE("include_stop_str_in_output: the string ends the text, and nothing follows", "[http]") {
    for (const std::string& path : {completions, chat}) {
        const json fields{{"temperature", 0}, {"max_tokens", 14}, {"ignore_eos", true}};
        const std::string plain = first_text(ask(path, fields));
        for (const size_t size : {1, 5}) {
            const std::string stop = plain.substr(plain.size() / 2, size);
            if (std::any_of(stop.begin(), stop.end(), [](char c) { return c < 0; })) continue;
            const size_t at = plain.find(stop);
            for (const bool shown : {false, true}) {
                INFO(path << " " << stop);
                const json choice =
                    both(path, with(fields, {{"stop", stop},
                                             {"include_stop_str_in_output", shown}}))["choices"][0];
                CHECK(text_of(choice) == plain.substr(0, shown ? at + size : at));
                CHECK(choice["stop_reason"] == stop);
                CHECK(choice["finish_reason"] == "stop");
            }
        }
    }
}

TEST_CASE("F1: no stop string ends within the text of the first min_tokens tokens", "[http]") {
    for (const std::string& path : {completions, chat}) {
        // "\n\n" would end the text after two tokens of "\n" each.
        const auto run = [&](int least, const std::string& stop, const json& more = {}) {
            return both(path, with({{"logit_bias", {{"107", 100}}},
                                    {"max_tokens", 9},
                                    {"min_tokens", least},
                                    {"stop", stop}},
                                   more.is_null() ? json::object() : more));
        };
        const auto check = [&](const json& answer, int tokens, size_t shown, const char* finish) {
            INFO(path << write(answer));
            CHECK(answer["usage"]["completion_tokens"] == tokens);
            CHECK(first_text(answer) == std::string(shown, '\n'));
            CHECK(answer["choices"][0]["finish_reason"] == finish);
        };
        check(run(0, "\n"), 1, 0, "stop");
        check(run(1, "\n"), 2, 1, "stop");
        check(run(5, "\n"), 6, 5, "stop");
        check(run(5, "\n", {{"include_stop_str_in_output", true}}), 6, 6, "stop");
        check(run(9, "\n"), 9, 9, "length");
        // As in vLLM, it may begin in that text and end behind it.
        check(run(5, "\n\n\n"), 6, 3, "stop");
        check(run(2, "\n\n\n\n"), 4, 0, "stop");
        check(run(9, "\n\n\n"), 9, 9, "length");
    }
    // Greedy, from the demo or the fake model: the text up to min_tokens holds the stop string too.
    const json fields{{"temperature", 0}, {"max_tokens", 20}, {"ignore_eos", true}};
    const std::string plain = first_text(complete(fields));
    const json held = with(fields, {{"min_tokens", 20}, {"stop", plain.substr(2, 1)}});
    CHECK(first_text(both(completions, held)) == plain);
}

TEST_CASE(
    "control tokens in a text are shown by name if asked, and the stop token by its own field",
    "[http]") {
    // Each row: the id that is generated, other fields, then the expected text, finish_reason and
    // stop_reason.
    const json table = json::parse(R"([
        [105, {}, "", "length", null],
        [105, {"skip_special_tokens": false}, "<start_of_turn><start_of_turn>", "length", null],
        [105, {"skip_special_tokens": false, "include_stop_str_in_output": true},
            "<start_of_turn><start_of_turn>", "length", null],
        [106, {}, "", "stop", 106],
        [106, {"include_stop_str_in_output": true}, "", "stop", 106],
        [106, {"skip_special_tokens": false}, "", "stop", 106],
        [106, {"skip_special_tokens": false, "include_stop_str_in_output": true},
            "<end_of_turn>", "stop", 106],
        [106, {"skip_special_tokens": false, "ignore_eos": true},
            "<end_of_turn><end_of_turn>", "length", null],
        [106, {"ignore_eos": true, "stop_token_ids": [106]}, "", "stop", 106],
        [1, {}, "", "stop", null],
        [1, {"skip_special_tokens": false, "ignore_eos": true}, "<eos><eos>", "length", null],
        [107, {}, "\n\n", "length", null],
        [700, {"skip_special_tokens": false, "stop": "<end_of_turn>"}, null, "length", null]
    ])");
    for (const json& row : table) {
        const std::string id = std::to_string(row[0].get<int>());
        for (const std::string& path : {completions, chat}) {
            INFO(path << row);
            const json choice = both(path, with(row[1], {{"logit_bias", {{id, 100}}},
                                                         {"max_tokens", 2},
                                                         {"temperature", 0}}))["choices"][0];
            if (row[2].is_string()) CHECK(text_of(choice) == row[2].get<std::string>());
            CHECK(choice["finish_reason"] == row[3]);
            CHECK(choice["stop_reason"] == row[4]);
        }
    }
    const json named{{"logit_bias", {{"105", 100}}}, {"max_tokens", 3}, {"stop", "turn><"}};
    const json choice = both(completions, with(named, {{"skip_special_tokens", false}}));
    // Stop strings match the names of control tokens that are shown.
    CHECK(first_text(choice) == "<start_of_");
}

// [5] Refusals ------------------------------------------------------------------------------------

TEST_CASE("parameters of a wrong type or out of range are named, with value and limit", "[http]") {
    const json table = json::parse(R"([
        ["both", "presence_penalty", "at least -2 and at most 2", [-2.1, 2.1, "x", [1], {}]],
        ["both", "frequency_penalty", "at least -2 and at most 2", [-3, 1e300, "x"]],
        ["both", "repetition_penalty", "above 0", [0, -1, "x"]],
        ["both", "min_tokens", "at least 0", [-1, 1.5, "x", 1e30]],
        ["both", "logit_bias", "", [5, "x", [5], {"5": "x"}, {"5": null}, {"5": [1]}]],
        ["both", "logit_bias", "", [{"1e2": 1}, {"1.0": 1}]],
        ["both", "max_tokens", "an integer", ["1e2", "16.5", ""]],
        ["both", "logit_bias", "", [{"x": 1}, {"1.5": 1}, {"": 1}, {"5 ": 1}, {"0x5": 1}]],
        ["both", "logit_bias", "2048", [{"2048": 1}, {"5": 1, "999999": -1}]],
        ["both", "logit_bias", "", [{"-1": 1}, {"99999999999999999999": 1}, {"4294967301": 1}]],
        ["both", "allowed_token_ids", "", [[], 5, {}, "x", ["x"], [1.5], [[5]], [null]]],
        ["both", "allowed_token_ids", "", [[2048], [-1], [5, 999999], [4294967301]]],
        ["both", "stop_token_ids", "", [5, {}, "x", ["x"], [1.5], [[5]], [null]]],
        ["both", "stop_token_ids", "", [[2048], [-1], [5, 999999], [4294967301]]],
        ["both", "include_stop_str_in_output", "true or false", [2, "perhaps", []]],
        ["both", "skip_special_tokens", "true or false", [2, "perhaps"]],
        ["both", "add_special_tokens", "true or false", [2, "perhaps"]],
        ["both", "echo", "true or false", [2, "perhaps"]],
        ["chat", "add_generation_prompt", "true or false", [2, "perhaps"]],
        ["chat", "continue_final_message", "true or false", [2, "perhaps"]],
        ["both", "truncate_prompt_tokens", "at least 1", [0, -1, 1.5, "x"]],
        ["both", "prompt_logprobs", "at most 20", [-1, 21, 0.5, "x", 1e30]],
        ["completions", "max_tokens", "max_tokens must be at least 1, got 0.", [0]]
    ])");
    for (const json& row : table) {
        const std::string field = row[1];
        for (const std::string& path : {completions, chat}) {
            if (row[0] != "both" && (row[0] == "chat") != (path == chat)) continue;
            for (const json& bad : row[3]) {
                INFO(path << " " << field << " " << bad);
                const json body = with(base(path), {{field, bad}});
                const Reply reply = post(path, body);
                check_refusal(reply, 400, {field, row[2]});
                CHECK(reply.parsed()["error"]["param"] == field);
                CHECK(reply.parsed()["error"]["type"] == "BadRequestError");
                const Reply streamed = post(path, with(body, {{"stream", true}}));
                CHECK(streamed.body == reply.body);
                CHECK(streamed.header("Content-Type") == "application/json");
            }
        }
    }
}

TEST_CASE("D12: a seed is read as an integer, and its limits are written as integers", "[http]") {
    for (const std::string& path : {completions, chat}) {
        const auto reply = [&](const std::string& seed) {
            const std::string body = write(with(base(path), {{"max_tokens", 1}, {"seed", 77}}));
            const size_t at = body.find("77");
            return send(server().port, "POST", path,
                        body.substr(0, at) + seed + body.substr(at + 2));
        };
        for (const char* good :
             {"-9223372036854775808", "9223372036854775807", "\"9223372036854775807\"", "5.0"})
            CHECK(reply(good).status == 200);
        for (const char* bad : {"-9223372036854775809", "9223372036854775808", "1e30", "-1e30",
                                "\"-9223372036854775809\"", "\"9223372036854775808\"", "1.5"}) {
            INFO(bad);
            check_refusal(
                reply(bad), 400,
                {"seed must be an integer of at least -9223372036854775808",
                 "and at most 9223372036854775807", "greater_than_equal", "less_than_equal"});
        }
    }
    const auto first = [](int64_t seed) {
        return first_text(
            complete({{"seed", seed}, {"temperature", 9}, {"top_k", 0}, {"max_tokens", 8}}));
    };
    // As doubles these two are equal.
    CHECK(first(INT64_MAX) != first(INT64_MAX - 1));
}

TEST_CASE("D12: up to 128 stop strings", "[http]") {
    for (const std::string& path : {completions, chat}) {
        const json plain = ask(path, {{"temperature", 0}, {"max_tokens", 3}});
        CHECK(comparable(ask(path, {{"temperature", 0},
                                    {"max_tokens", 3},
                                    {"stop", Strings(128, "no such text")}})) == comparable(plain));
        check_refusal(post(path, with(base(path), {{"stop", Strings(129, "x")}})), 400,
                      {"stop must be a string or a list of at most 128"});
    }
}

TEST_CASE("F3: top_logprobs 0 needs no logprobs", "[http]") {
    for (const json& off :
         {json::object(), json{{"logprobs", false}}, json{{"logprobs", nullptr}}}) {
        const json zero = with(off, {{"top_logprobs", 0}, {"max_tokens", 2}, {"temperature", 0}});
        CHECK(both(chat, zero)["choices"][0]["logprobs"].is_null());
        check_refusal(post(chat, with(with(base(chat), off), {{"top_logprobs", 1}})), 400,
                      {"when using `top_logprobs`, `logprobs` must be set to true."});
    }
    const json some = ask(chat, {{"logprobs", true}, {"top_logprobs", 0}, {"max_tokens", 2}});
    CHECK(some["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == json::array());
}

TEST_CASE("F7: nothing may follow a body, also behind a NUL", "[http]") {
    for (const char* path :
         {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"}) {
        const json body =
            with(base(path == chat ? chat : completions), {{"max_tokens", 1}, {"tokens", {700}}});
        const std::string good = write(body), nul(1, '\0');
        CHECK(send(server().port, "POST", path, good + " \n").status == 200);
        for (const std::string& bad : {good + nul, good + nul + "{", nul + good, good + " " + nul,
                                       "{" + nul + good.substr(1), good + "x"}) {
            INFO(path << bad.size());
            check_refusal(send(server().port, "POST", path, bad), 400, {"not valid JSON"});
        }
    }
    // Written as JSON writes it, NUL is a character.
    CHECK(complete({{"prompt", std::string("a\0b", 3)}, {"max_tokens", 1}}).contains("id"));
}

TEST_CASE("values at the limits, and null, are accepted", "[http]") {
    const json table = json::parse(R"([
        {"presence_penalty": -2}, {"presence_penalty": 2}, {"frequency_penalty": "0.5"},
        {"repetition_penalty": 0.01}, {"repetition_penalty": 100}, {"min_tokens": "1"},
        {"logit_bias": {"0": 1, "2047": -1.5}}, {"logit_bias": {"5": "3"}},
        {"allowed_token_ids": [0, 2047]}, {"allowed_token_ids": [5, 5]},
        {"stop_token_ids": [0, 2047]}, {"stop_token_ids": [5, 5]}, {"echo": 0},
        {"include_stop_str_in_output": "true"}, {"skip_special_tokens": 1},
        {"truncate_prompt_tokens": 1}, {"truncate_prompt_tokens": 1000000},
        {"prompt_logprobs": "20"}, {"prompt_logprobs": 1.0}, {"max_tokens": true}
    ])");
    const Strings nulls = words(
        "presence_penalty frequency_penalty repetition_penalty min_tokens logit_bias "
        "allowed_token_ids stop_token_ids echo n stop include_stop_str_in_output "
        "skip_special_tokens logprobs user truncate_prompt_tokens prompt_logprobs stream "
        "stream_options seed temperature top_p top_k min_p ignore_eos best_of "
        "add_special_tokens add_generation_prompt continue_final_message");
    for (const std::string& path : {completions, chat}) {
        for (const json& good : table) ask(path, with({{"max_tokens", 2}}, good));
        json fields{{"max_tokens", 2}};
        for (const std::string& name : nulls) fields[name] = nullptr;
        ask(path, fields);
    }
}

TEST_CASE("the order of checks: types, then the model, then rules about several fields", "[http]") {
    const json table = json::parse(R"([
        [{"model": "gpt-4", "max_tokens": "many"}, 400, "max_tokens"],
        [{"model": "gpt-4", "temperature": {}}, 400, "temperature"],
        [{"model": "gpt-4", "logit_bias": 5}, 400, "logit_bias"],
        [{"model": 5, "n": 2, "temperature": 0}, 400, "model"],
        [{"model": "gpt-4", "n": 2, "temperature": 0}, 404, "gpt-4"],
        [{"model": "gpt-4", "min_tokens": 5, "max_tokens": 4}, 404, "gpt-4"],
        [{"model": "gpt-4", "max_tokens": 100000}, 404, "gpt-4"],
        [{"n": 2, "temperature": 0, "max_tokens": 100000}, 400, "greedy"],
        [{"min_tokens": 100001, "max_tokens": 100000}, 400, "min_tokens"]
    ])");
    for (const json& row : table) {
        for (const std::string& path : {completions, chat}) {
            INFO(path << row);
            check_refusal(post(path, with(base(path), row[0])), row[1], {row[2]});
        }
    }
    check_refusal(post(completions, {{"model", "gpt-4"}, {"prompt", {2048}}}), 404, {"gpt-4"});
    check_refusal(
        post(chat, {{"model", "gpt-4"}, {"messages", {{{"role", "assistant"}, {"content", "x"}}}}}),
        404, {"gpt-4"});
}

TEST_CASE("stream options belong to a stream", "[http]") {
    for (const std::string& path : {completions, chat}) {
        for (const char* given :
             {R"({"include_usage":true})", R"({"include_usage":null})",
              R"({"continuous_usage_stats":true})", R"({"include_usage":false})"}) {
            const json options{{"stream_options", json::parse(given)}};
            check_refusal(post(path, with(base(path), options)), 400,
                          {"Stream options can only be defined when `stream=True`."});
        }
        check_refusal(post(path, with(base(path), {{"stream", true}, {"stream_options", 5}})), 400,
                      {"stream_options"});
    }
}

TEST_CASE("both ways to end a chat's prompt at once", "[http]") {
    const json body =
        with(base(chat), {{"add_generation_prompt", true}, {"continue_final_message", true}});
    for (const std::string& path : {chat, std::string("/tokenize")})
        check_refusal(post(path, body), 400,
                      {"Cannot set both `continue_final_message` and `add_generation_prompt` to "
                       "True."});
}

TEST_CASE("a matrix of odd values: answered or refused, never a 5xx", "[http]") {
    const json odd = json::parse(R"([null, true, -1, 1e308, 9223372036854775808, "", [null],
                                     {"": null}, "\u0000"])");
    const Strings fields = words(
        "prompt messages max_tokens temperature top_p top_k min_p n seed stop stop_token_ids "
        "logprobs logit_bias top_logprobs prompt_logprobs echo stream stream_options "
        "min_tokens allowed_token_ids truncate_prompt_tokens model presence_penalty "
        "repetition_penalty response_format tools skip_special_tokens continue_final_message "
        "user best_of");
    int status[600] = {};
    for (size_t f = 0; f < fields.size(); f++) {
        for (size_t i = 0; i < odd.size(); i++) {
            const std::string& path = (f + i) % 2 ? chat : completions;
            const json body = with(with(base(path), {{"max_tokens", 1}}), {{fields[f], odd[i]}});
            const int code = post(path, body).status;
            INFO(write(body) << code);
            CHECK((code == 200 || code == 400 || code == 404));
            status[code]++;
        }
    }
    CHECK(status[200] > 50);
    CHECK(status[400] > 100);
}

// [6] Usage and ids -------------------------------------------------------------------------------

TEST_CASE("continuous_usage_stats: usage on every chunk", "[http]") {
    for (const std::string& path : {completions, chat}) {
        const json fields{{"max_tokens", 6},
                          {"min_tokens", 6},
                          {"seed", 1},
                          {"temperature", 1},
                          {"ignore_eos", true}};
        const json usage = ask(path, fields)["usage"];
        const auto run = [&](const char* options) {
            const Stream s = stream(path, with(fields, {{"stream_options", json::parse(options)}}));
            CHECK(s.done);
            return s.events;
        };
        const auto events = run(R"({"include_usage":true,"continuous_usage_stats":true})");
        CHECK(events.back()["choices"] == json::array());
        CHECK(events.back()["usage"] == usage);
        int before = 0;
        for (size_t i = 0; i + 1 < events.size(); i++) {
            const json& u = events[i]["usage"];
            const int now = u["completion_tokens"];
            CHECK(u["prompt_tokens"] == usage["prompt_tokens"]);
            CHECK(u["total_tokens"] == usage["prompt_tokens"].get<int>() + now);
            CHECK(now == (path == chat ? int(i) : int(i) + 1));
            CHECK(now >= std::exchange(before, now));
        }
        CHECK(before == 6);
        for (const char* off : {R"({"include_usage":false,"continuous_usage_stats":true})",
                                R"({"include_usage":false,"continuous_usage_stats":false})"}) {
            for (const json& e : run(off)) {
                CHECK(e["choices"].size() == 1);
                CHECK(e.value("usage", json()).is_null());
            }
        }
        CHECK(run(R"({"include_usage":true,"continuous_usage_stats":null})").back()["usage"] ==
              usage);
    }
}

TEST_CASE("F5: usage has the cached tokens, also 0, if the server's flag asks for it", "[http]") {
    Server telling({"--enable-prompt-tokens-details"});
    const Ids ids(100, 700);
    const auto details = [&](const json& prompt, int port) {
        const json fields{
            {"prompt", prompt}, {"max_tokens", 1}, {"stream_options", {{"include_usage", true}}}};
        const Stream s = stream(completions, fields, port);
        return s.events.back()["usage"]["prompt_tokens_details"];
    };
    CHECK(details(ids, telling.port) == json{{"cached_tokens", 0}});
    CHECK(details(ids, telling.port) == json{{"cached_tokens", 96}});
    CHECK(details(Ids(101, 700), telling.port) == json{{"cached_tokens", 96}});
    const json whole = ask(completions, {{"prompt", ids}, {"max_tokens", 1}}, telling.port);
    CHECK(whole["usage"]["prompt_tokens_details"] == json{{"cached_tokens", 96}});
    std::string long_talk;
    for (int i = 0; i < 60; i++) long_talk += "a\n";
    for (const int times : {0, 1}) {
        const json said = post(chat, with(base(chat, long_talk), {{"max_tokens", 1}}), telling.port)
                              .parsed()["usage"];
        if (times == 0) CHECK(said["prompt_tokens_details"] == json{{"cached_tokens", 0}});
        if (times == 1) {
            const int cached = said["prompt_tokens_details"]["cached_tokens"];
            CHECK((cached >= 64 && cached % 32 == 0 && cached < said["prompt_tokens"]));
        }
    }
    for (int i = 0; i < 2; i++) CHECK(details(ids, server().port).is_null());
}

TEST_CASE("a client's X-Request-Id is in the answer's id", "[http]") {
    const auto id = [](const std::string& path, bool streamed, const std::string& given) {
        const json body = with(base(path), {{"max_tokens", 2}, {"stream", streamed}});
        const Reply reply = send(server().port, "POST", path, write(body),
                                 {{"Content-Type", "application/json"}, {"X-Request-Id", given}});
        REQUIRE(reply.status == 200);
        if (!streamed) return reply.parsed()["id"].get<std::string>();
        const Stream s = read_events(reply);
        for (const json& e : s.events) CHECK(e["id"] == s.events[0]["id"]);
        return s.events[0]["id"].get<std::string>();
    };
    for (const std::string& path : {completions, chat}) {
        const std::string head = path == chat ? "chatcmpl-" : "cmpl-";
        for (const bool streamed : {false, true}) {
            for (const std::string& good :
                 {std::string("a"), std::string("job.7:A_b-9"), std::string(128, 'x')})
                CHECK(id(path, streamed, good) == head + good);
            for (const std::string& bad : {std::string(129, 'x'), std::string("a b"),
                                           std::string("a\"b"), std::string("\xc3\xa9")}) {
                const std::string own = id(path, streamed, bad);
                CHECK(own.size() == head.size() + 32);
                CHECK(own.find_first_not_of("0123456789abcdef", head.size()) == std::string::npos);
            }
        }
    }
}

// [7] Routes --------------------------------------------------------------------------------------

TEST_CASE("which methods a path has", "[http]") {
    const std::map<std::string, Strings> paths{{"/health", {"GET", "HEAD"}},
                                               {"/ping", {"GET", "HEAD", "POST"}},
                                               {"/version", {"GET", "HEAD"}},
                                               {"/load", {"GET", "HEAD"}},
                                               {"/metrics", {"GET", "HEAD"}},
                                               {"/v1/models", {"GET", "HEAD"}},
                                               {completions, {"POST"}},
                                               {chat, {"POST"}},
                                               {"/tokenize", {"POST"}},
                                               {"/detokenize", {"POST"}},
                                               {"/v1/models/gemma-demo", {"GET", "HEAD"}}};
    for (const auto& [path, methods] : paths) {
        for (const std::string method :
             {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}) {
            const json body = with(base(path == chat ? chat : completions),
                                   {{"max_tokens", 1}, {"tokens", {700}}});
            const Reply reply =
                send(server().port, method, path, method == "POST" ? write(body) : "");
            INFO(method << " " << path << " " << reply.status << " " << reply.body);
            if (std::count(methods.begin(), methods.end(), method)) {
                CHECK(reply.status == 200);
                continue;
            }
            CHECK(reply.status == 405);
            for (const std::string& m : methods)
                CHECK((m == "HEAD" || reply.header("Allow").find(m) != std::string::npos));
            if (method == "HEAD") continue;
            check_refusal(reply, 405, {});
            CHECK(reply.parsed()["error"]["type"] == "MethodNotAllowedError");
        }
        if (methods.size() == 1) continue;
        const std::string head =
            everything(server().port, "HEAD " + path + " HTTP/1.1\r\nHost: x\r\n\r\n");
        CHECK(head.find("HTTP/1.1 200") == 0);
        CHECK(head.find("\r\n\r\n") + 4 == head.size());  // no body
    }
    for (const char* path : {"/", "/v1", "/v1/", "/v1/completions/", "/V1/models", "/favicon.ico"})
        check_refusal(get(path), 404, {"/"});
    CHECK(get("/health?x=1").status == 200);
}

TEST_CASE("F6: /tokenize names its tokens if asked", "[http]") {
    const json fields{{"prompt", "Cloud <end_of_turn>"}};
    CHECK(post("/tokenize", fields).parsed()["token_strs"].is_null());
    const json answer = post("/tokenize", with(fields, {{"return_token_strs", true}})).parsed();
    CHECK(keys(answer) == Strings{"count", "max_model_len", "tokens", "token_strs"});
    const Strings names = answer["token_strs"];
    REQUIRE(names.size() == answer["tokens"].size());
    CHECK((names.front() == "<bos>" && names.back() == "<end_of_turn>"));
    std::string joined;  // a space is written as the vocabulary has it
    for (const std::string& name : names) joined += name;
    CHECK(joined == "<bos>Cloud\u2581<end_of_turn>");
    const json none =
        post("/tokenize",
             {{"prompt", ""}, {"add_special_tokens", false}, {"return_token_strs", true}})
            .parsed();
    CHECK(none["token_strs"] == json::array());
    check_refusal(post("/tokenize", with(fields, {{"return_token_strs", 5}})), 400,
                  {"return_token_strs must be true or false"});
}

TEST_CASE("ping, load and one model", "[http]") {
    CHECK(get("/ping").body == "");
    const Reply pinged = send(server().port, "POST", "/ping", "", {});
    CHECK((pinged.status == 200 && pinged.body.empty()));
    for (const char* name : {"gemma-demo", "google/gemma-3-1b-it"}) {
        json one = get(std::string("/v1/models/") + name).parsed(),
             list = get("/v1/models").parsed();
        CHECK(one["id"] == name);
        CHECK(keys(one) == keys(list["data"][0]));
        CHECK((one["object"] == "model" && one["root"] == list["data"][0]["root"]));
    }
    check_refusal(get("/v1/models/gpt-4"), 404, {"The model `gpt-4` does not exist."});
    check_refusal(get("/v1/models/"), 404, {});
    check_refusal(get("/v1/models/" + std::string(500, 'x')), 404, {"xxx"});

    Server counting({"--enable-server-load-tracking"}, {"GEMMA_FAKE_STEP_MS=2"});
    const auto load = [&] { return get("/load", counting.port).parsed(); };
    CHECK(load() == json{{"server_load", 0}});
    json during;
    const json body =
        with(base(chat), {{"stream", true}, {"max_tokens", 20'000}, {"ignore_eos", true}});
    send(counting.port, "POST", chat, write(body), as_json, [&](std::string_view) {
        during = load();
        return false;
    });
    CHECK(during == json{{"server_load", 1}});
    const auto start = Clock::now();
    while (load()["server_load"] != 0 && Clock::now() - start < patience) std::this_thread::yield();
    CHECK(load()["server_load"] == 0);
}

TEST_CASE("row 42: the / in a model's name may be sent as %2F", "[http]") {
    for (const char* slash : {"/", "%2F", "%2f"}) {
        const std::string got =
            everything(server().port, text("GET /v1/models/google%sgemma-3-1b-it HTTP/1.1\r\n"
                                           "Host: x\r\n\r\n",
                                           slash));
        INFO(got);
        REQUIRE(got.starts_with("HTTP/1.1 200 "));
        CHECK(json::parse(got.substr(got.find("\r\n\r\n")))["id"] == "google/gemma-3-1b-it");
    }
}

TEST_CASE("other origins' pages may call", "[http]") {
    const int port = server().port;
    for (const auto& path : {completions, std::string("/health"), std::string("/nowhere")}) {
        const Reply asked =
            send(port, "OPTIONS", path, "",
                 {{"Origin", "http://page.example"},
                  {"Access-Control-Request-Method", "POST"},
                  {"Access-Control-Request-Headers", "authorization,content-type"}});
        INFO(path << asked.body);
        CHECK((asked.status == 200 && asked.body == "OK"));
        CHECK(asked.header("access-control-allow-origin") == "*");
        CHECK(asked.header("access-control-allow-methods") ==
              "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT");
        CHECK(asked.header("access-control-allow-headers") == "authorization,content-type");
        CHECK(asked.header("access-control-max-age") == "600");
    }
    const Reply bare = send(port, "OPTIONS", chat, "",
                            {{"Origin", "x"}, {"Access-Control-Request-Method", "GET"}});
    CHECK(bare.status == 200);
    CHECK(bare.header("access-control-allow-headers") == "*");
    CHECK(send(port, "OPTIONS", chat, "", {{"Origin", "x"}}).status == 405);
    CHECK(send(port, "OPTIONS", chat, "", {}).status == 405);

    const httplib::Headers from{{"Content-Type", "application/json"}, {"Origin", "http://a.b"}};
    const json streamed = with(base(chat), {{"stream", true}, {"max_tokens", 1}});
    const std::tuple<const char*, std::string, std::string, int> table[]{
        {"GET", "/health", "", 200},     {"GET", "/v1/models", "", 200},
        {"GET", "/x", "", 404},          {"PUT", "/health", "", 405},
        {"POST", completions, "{", 400}, {"POST", chat, write(streamed), 200}};
    for (const auto& [method, path, body, status] : table) {
        const Reply reply = send(port, method, path, body, from);
        INFO(method << " " << path);
        CHECK(reply.status == status);
        CHECK(reply.header("access-control-allow-origin") == "*");
    }
    CHECK(get("/health").header("access-control-allow-origin") == "");
}

TEST_CASE("keys guard /v1 and nothing else", "[http]") {
    const auto check = [](int port, const Strings& keys_) {
        const auto status = [&](const std::string& method, const std::string& path,
                                const std::string& key) {
            httplib::Headers headers = as_json;
            if (!key.empty()) headers.emplace("Authorization", key);
            const json body = with(base(path == chat ? chat : completions), {{"max_tokens", 1}});
            const Reply reply =
                send(port, method, path, method == "POST" ? write(body) : "", headers);
            INFO(method << " " << path << " " << key << " " << reply.body);
            if (reply.status != 401) return reply.status;
            check_refusal(reply, 401, {"Unauthorized"});
            CHECK(reply.parsed()["error"]["type"] == "AuthenticationError");
            CHECK(reply.header("WWW-Authenticate") == "Bearer");
            return 401;
        };
        for (const std::string& key : keys_) {
            for (const char* scheme : {"Bearer ", "bearer ", "BEARER "}) {
                CHECK(status("GET", "/v1/models", scheme + key) == 200);
                CHECK(status("POST", chat, scheme + key) == 200);
            }
            for (const std::string& wrong :
                 Strings{"", key, "Bearer " + key + "x", "Bearer " + key.substr(1), "Basic " + key,
                         "Bearer", "Bearer Bearer " + key}) {
                CHECK(status("GET", "/v1/models", wrong) == 401);
                CHECK(status("POST", completions, wrong) == 401);
                // The key is checked before the path.
                CHECK(status("GET", "/v1/nothing", wrong) == 401);
            }
            CHECK(status("GET", "/v1/nothing", "Bearer " + key) == 404);
        }
        Raw spaced(port);  // cpp-httplib 0.41's client sends no header that ends in a space
        CHECK(spaced.write("GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \r\n\r\n"));
        CHECK(spaced.read_until("\r\n").starts_with("HTTP/1.1 401 "));
        for (const char* open : {"/health", "/ping", "/metrics", "/version", "/load"})
            CHECK(status("GET", open, "") == 200);
        CHECK(status("POST", "/tokenize", "") == 200);
        CHECK(send(port, "OPTIONS", chat, "",
                   {{"Origin", "x"}, {"Access-Control-Request-Method", "POST"}})
                  .status == 200);
    };
    Server flag({"--api-key", "k-one", "k-two"});
    check(flag.port, {"k-one", "k-two"});
    Server variable({}, {"VLLM_API_KEY=k-env"});
    check(variable.port, {"k-env"});
    CHECK(flag.log().find("k-one") == std::string::npos);
    CHECK(variable.log().find("k-env") == std::string::npos);
    CHECK(send(server().port, "GET", "/v1/models", "", {{"Authorization", "Bearer x"}}).status ==
          200);
}

// [8] Metrics -------------------------------------------------------------------------------------

namespace {

// Prometheus' text format, strictly read.
class Metrics {
  public:
    explicit Metrics(int port) {
        const Reply reply = get("/metrics", port);
        REQUIRE(reply.status == 200);
        CHECK(reply.header("Content-Type") == "text/plain; version=0.0.4; charset=utf-8");
        size_t at = 0;
        for (size_t end; (end = reply.body.find('\n', at)) != std::string::npos; at = end + 1)
            read(reply.body.substr(at, end - at));
        need(at == reply.body.size(), "half a line at the end");
        for (const auto& [name, kind] : types) check(name, kind);
    }

    // The value of the only sample with this name and this label.
    double operator()(const std::string& name, const std::string& label = "") const {
        double value = std::nan("");
        int found = 0;
        for (const Sample& s : samples) {
            const bool whole = name.starts_with("http_") || name.starts_with("process_");
            if (s.name != (whole ? "" : "vllm:") + name ||
                s.labels.find(label) == std::string::npos)
                continue;
            value = s.value, found++;
        }
        need(found == 1, name + "{" + label + "}: found " + std::to_string(found));
        return value;
    }
    std::string labels(const std::string& name) const {
        for (const Sample& s : samples) {
            if (s.name == "vllm:" + name) return s.labels;
        }
        return "";
    }
    std::map<std::string, std::string> types;  // metric family to type

  private:
    struct Sample {
        std::string name, labels;
        double value;
    };

    static void need(bool met, const std::string& what) {
        if (!met) throw std::runtime_error("metrics: " + what);
    }

    void read(const std::string& line) {
        if (line.starts_with("# HELP ")) {
            family = line.substr(7, line.find(' ', 7) - 7);
            need(line.size() > 8 + family.size() && helped.insert(family).second, line);
        } else if (line.starts_with("# TYPE ")) {
            const size_t space = line.find(' ', 7);
            need(line.substr(7, space - 7) == family, line);  // TYPE follows HELP
            const std::string kind = line.substr(space + 1);
            need(kind == "gauge" || kind == "counter" || kind == "histogram", line);
            need(types.emplace(family, kind).second, line);
        } else {
            const size_t space = line.rfind(' '), open = std::min(line.find('{'), space);
            need(space != std::string::npos, line);
            const std::string name = line.substr(0, open), labels = line.substr(open, space - open);
            need(labels.empty() || labels.ends_with('}'), line);
            const bool histogram = types[family] == "histogram";
            const Strings ends = histogram ? Strings{"_bucket", "_sum", "_count"} : Strings{""};
            need(std::any_of(ends.begin(), ends.end(),
                             [&](const auto& e) { return name == family + e; }),
                 line);
            const bool ours = name.starts_with("vllm:");
            need(!ours || labels.starts_with(R"({engine="0",model_name="gemma-demo")"), line);
            need(distinct.insert(line.substr(0, space)).second, line);
            char* end = nullptr;
            const double value = std::strtod(line.c_str() + space + 1, &end);
            need(*end == 0 && std::isfinite(value) && value >= 0, line);
            samples.push_back({name, labels, value});
        }
    }

    void check(const std::string& name, const std::string& kind) const {
        if (kind == "counter") need(name.ends_with("_total"), name);
        if (kind != "histogram") return;
        struct Series {
            double before = 0, limit = -1, count = -1;
            bool sum = false;
        };
        std::map<std::string, Series> all;  // by the labels other than le
        for (const Sample& s : samples) {
            if (s.name == name + "_bucket") {
                const size_t le = s.labels.find(",le=\"");
                need(le != std::string::npos, s.labels);
                Series& own = all[s.labels.substr(0, le) + "}"];
                // strtod reads +Inf too.
                const double edge = std::strtod(s.labels.c_str() + le + 5, nullptr);
                need(edge > own.limit && s.value >= own.before, name + " is not cumulative");
                own.limit = edge, own.before = s.value;
            }
            if (s.name == name + "_count") all[s.labels].count = s.value;
            if (s.name == name + "_sum") all[s.labels].sum = true;
        }
        for (const auto& [labels, own] : all) {
            need(own.limit == std::numeric_limits<double>::infinity(), name + " has no +Inf");
            need(own.sum && own.count == own.before, name + ": its count is not its +Inf");
        }
    }

    std::string family;
    std::set<std::string> helped, distinct;
    std::vector<Sample> samples;
};

// The server updates its metrics after it has sent the answer: poll until they are as expected.
Metrics metrics_when(int port, const std::function<bool(const Metrics&)>& ready) {
    for (const auto start = Clock::now();;) {
        Metrics m(port);
        if (ready(m) || Clock::now() - start > patience) return m;
    }
}

bool idle(const Metrics& m) {
    return m("num_requests_running") == 0 && m("num_requests_waiting") == 0 &&
           m("kv_cache_usage_perc") == 0;
}

}  // namespace

TEST_CASE("metrics: every family, of its type and with its buckets", "[http]") {
    const Metrics m(server().port);
    const std::map<std::string, Strings> families{
        {"gauge", words("num_requests_running num_requests_waiting gpu_cache_usage_perc "
                        "kv_cache_usage_perc cache_config_info num_requests_waiting_by_reason")},
        {"counter", words("prompt_tokens_total generation_tokens_total request_success_total "
                          "num_preemptions_total admission_rejections_total "
                          "gpu_prefix_cache_queries_total gpu_prefix_cache_hits_total "
                          "prefix_cache_queries_total prefix_cache_hits_total")},
        {"histogram",
         words("time_to_first_token_seconds time_per_output_token_seconds "
               "inter_token_latency_seconds e2e_request_latency_seconds "
               "request_queue_time_seconds request_inference_time_seconds "
               "request_prefill_time_seconds request_decode_time_seconds request_prompt_tokens "
               "request_generation_tokens request_max_num_generation_tokens "
               "request_params_max_tokens request_params_n iteration_tokens_total "
               "request_num_preemptions")}};
    for (const auto& [kind, names] : families) {
        for (const std::string& name : names) {
            INFO(name);
            CHECK(m.types.at("vllm:" + name) == kind);
        }
    }
    CHECK(m("cache_config_info") == 1);
    CHECK(m.labels("cache_config_info").find(R"(block_size="32")") != std::string::npos);
    for (const char* label :
         {"num_gpu_blocks=\"", "kv_cache_size_tokens=\"", "kv_cache_max_concurrency=\""})
        CHECK(m.labels("cache_config_info").find(label) != std::string::npos);
    for (const char* reason : {"stop", "length", "abort"})
        CHECK(m("request_success_total", text(R"(finished_reason="%s")", reason)) >= 0);
    // Of each histogram the first bucket's edge, one in the middle, and the last before +Inf.
    const std::map<std::string, Strings> edges{
        {"time_to_first_token_seconds", {"0.001", "0.06", "2560"}},
        {"time_per_output_token_seconds", {"0.01", "0.75", "80"}},
        {"inter_token_latency_seconds", {"0.01", "0.75", "80"}},
        {"e2e_request_latency_seconds", {"0.3", "2.5", "7680"}},
        {"request_decode_time_seconds", {"0.3", "2.5", "7680"}},
        {"request_prompt_tokens", {"1", "200", "20000"}},
        {"request_params_n", {"1", "5", "20"}},
        {"iteration_tokens_total", {"1", "8", "16384"}}};
    for (const auto& [name, list] : edges) {
        for (const std::string& le : list) {
            const double edge = std::stod(le);
            bool found = false;  // 1 may be written as 1.0
            for (const std::string& form : {le, le + ".0"}) {
                try {
                    m(name + "_bucket", "le=\"" + form + "\"");
                    found = true;
                } catch (const std::runtime_error&) {
                }
            }
            INFO(name << " " << edge);
            CHECK(found);
        }
    }
}

TEST_CASE("F14: metrics of requests, and of the process", "[http]") {
    Server s;
    for (const int n : {1, 2, 3}) ask(n > 1 ? completions : chat, {{"max_tokens", 1}}, s.port);
    CHECK(post(completions, {{"prompt", 5}}, s.port).status == 400);
    CHECK(post(completions, {{"model", "x"}, {"prompt", "a"}}, s.port).status == 404);
    CHECK(post("/tokenize", {{"prompt", "a"}}, s.port).status == 200);
    CHECK(get("/v1/models/gemma-demo", s.port).status == 200);
    const auto of = [](const char* handler, const char* method, const char* status = nullptr) {
        const std::string labels = text(R"(handler="%s",method="%s")", handler, method);
        return labels + (status ? text(R"(,status="%s")", status) : "}");
    };
    const auto get_models = of("/v1/models", "GET", "2xx");
    const Metrics m = metrics_when(s.port, [&](const Metrics& now) {
        try {
            return now("http_requests_total", of("/v1/completions", "POST", "2xx")) == 2 &&
                   now("http_requests_total", get_models) == 1;
        } catch (const std::runtime_error&) {  // no sample yet
            return false;
        }
    });
    const auto count = [&](const std::string& labels) { return m("http_requests_total", labels); };
    CHECK(count(of("/v1/chat/completions", "POST", "2xx")) == 1);
    CHECK(count(of("/v1/completions", "POST", "2xx")) == 2);
    CHECK(count(of("/v1/completions", "POST", "4xx")) == 2);
    CHECK(count(of("/tokenize", "POST", "2xx")) == 1);
    CHECK(count(get_models) == 1);
    const std::string labels = of("/v1/completions", "POST");
    CHECK(m("http_request_duration_seconds_count", labels) == 4);
    CHECK(m("http_request_duration_seconds_sum", labels) > 0);
    CHECK(m("num_requests_waiting_by_reason", R"(reason="capacity")") == 0);
    CHECK(m("num_requests_waiting_by_reason", R"(reason="deferred")") == 0);
    for (const char* name : {"cpu_seconds_total", "resident_memory_bytes", "virtual_memory_bytes",
                             "start_time_seconds", "open_fds", "max_fds"}) {
        INFO(name);
        CHECK(m(std::string("process_") + name) > 0);
    }
    CHECK(m("process_open_fds") < m("process_max_fds"));
    CHECK(m("process_resident_memory_bytes") < m("process_virtual_memory_bytes"));
    const double now = double(std::time(nullptr)), started = m("process_start_time_seconds");
    CHECK((started <= now && started > now - 3600));
    CHECK(started == Metrics(s.port)("process_start_time_seconds"));
}

TEST_CASE("D7: in a label's value Prometheus reads three escapes, and no others", "[http]") {
    Server s({"--served-model-name", "tab\tquote\"slash\\line\nend \u00e9"});
    const std::string page = get("/metrics", s.port).body;
    CHECK(page.find("vllm:num_requests_running{engine=\"0\",model_name=\"tab\tquote\\\"slash"
                    "\\\\line\\nend \u00e9\"} 0\n") != std::string::npos);
}

TEST_CASE("metrics: ten requests of ten tokens", "[http]") {
    Server s;
    json usage;
    for (int i = 0; i < 10; i++) {
        usage = ask(i % 2 ? chat : completions,
                    with(i % 2 ? json{{"messages", {{{"role", "user"}, {"content", "Hi"}}}}}
                               : json{{"prompt", tokens_of(base(chat, "Hi"))}},
                         {{"max_tokens", 10}, {"ignore_eos", true}, {"seed", i}}),
                    s.port)["usage"];
    }
    const double P = usage["prompt_tokens"];
    const std::string length = R"(finished_reason="length")", stop = R"(finished_reason="stop")";
    const auto done = [&](int n, const std::string& reason) {
        return [=](const Metrics& m) { return idle(m) && m("request_success_total", reason) >= n; };
    };
    {
        const Metrics m = metrics_when(s.port, done(10, length));
        for (const char* name :
             {"e2e_request_latency", "request_queue_time", "request_prefill_time",
              "request_decode_time", "request_inference_time", "time_to_first_token"}) {
            INFO(name);
            CHECK(m(std::string(name) + "_seconds_count") == 10);
        }
        const std::map<std::string, double> expected{{"time_per_output_token_seconds_count", 90},
                                                     {"inter_token_latency_seconds_count", 90},
                                                     {"generation_tokens_total", 100},
                                                     {"prompt_tokens_total", 10 * P},
                                                     {"request_prompt_tokens_sum", 10 * P},
                                                     {"request_prompt_tokens_count", 10},
                                                     {"request_generation_tokens_sum", 100},
                                                     {"request_generation_tokens_count", 10},
                                                     {"request_max_num_generation_tokens_sum", 100},
                                                     {"request_params_max_tokens_sum", 100},
                                                     {"request_params_n_sum", 10},
                                                     {"request_params_n_count", 10},
                                                     {"iteration_tokens_total_count", 100},
                                                     {"iteration_tokens_total_sum", 10 * (P + 10)},
                                                     {"num_preemptions_total", 0},
                                                     {"gpu_cache_usage_perc", 0}};
        for (const auto& [name, value] : expected) {
            INFO(name);
            CHECK(m(name) == value);
        }
        CHECK(m("request_success_total", length) == 10);
        CHECK(m("request_success_total", stop) == 0);
        CHECK(m("request_success_total", R"(finished_reason="abort")") == 0);
        CHECK(m("e2e_request_latency_seconds_sum") >= m("request_inference_time_seconds_sum"));
        CHECK(m("e2e_request_latency_seconds_sum") > 0);
    }
    // A choice is one observation; a refused request is none.
    ask(completions, {{"n", 3}, {"logit_bias", {{"106", 100}}}, {"seed", 1}, {"top_k", 1}}, s.port);
    ask(completions,
        {{"prompt", {"a", "b"}}, {"stop_token_ids", {700}}, {"logit_bias", {{"700", 100}}}},
        s.port);
    CHECK(post(completions, {{"prompt", 5}}, s.port).status == 400);
    const Metrics m = metrics_when(s.port, done(5, stop));
    CHECK(m("request_success_total", stop) == 5);
    CHECK(m("request_success_total", length) == 10);
    CHECK(m("time_to_first_token_seconds_count") == 15);
    CHECK(m("e2e_request_latency_seconds_count") == 15);
    CHECK(m("generation_tokens_total") == 105);
    CHECK(m("time_per_output_token_seconds_count") == 90);
}

TEST_CASE("metrics: hits of the prefix cache, in tokens", "[http]") {
    Server s;
    for (int i = 0; i < 2; i++)
        ask(completions, {{"prompt", Ids(100, 700)}, {"max_tokens", 1}}, s.port);
    const Metrics m = metrics_when(s.port, [](const Metrics& now) {
        return idle(now) && now("request_success_total", "length") == 2;
    });
    for (const std::string head : {"", "gpu_"}) {
        CHECK(m(head + "prefix_cache_hits_total") == 96);
        CHECK(m(head + "prefix_cache_queries_total") == 200);
    }
    CHECK(m("prompt_tokens_total") == 200);
}

TEST_CASE("metrics: who runs, who waits, and that nobody does any more", "[http]") {
    Server s({"--max-num-seqs", "1"}, {"GEMMA_FAKE_STEP_MS=2"});
    const json body = with(base(completions), {{"max_tokens", 20'000},
                                               {"n", 4},
                                               {"ignore_eos", true},
                                               {"temperature", 1},
                                               {"stream", true}});
    std::map<std::string, double> seen_then;
    send(s.port, "POST", completions, write(body), as_json, [&](std::string_view) {
        const Metrics m(s.port);
        for (const char* name : {"num_requests_running", "num_requests_waiting",
                                 "gpu_cache_usage_perc", "kv_cache_usage_perc"})
            seen_then[name] = m(name);
        seen_then["num_requests_waiting_by_reason"] =
            m("num_requests_waiting_by_reason", R"(reason="capacity")");
        return false;
    });
    CHECK(seen_then["num_requests_running"] == 1);
    CHECK(seen_then["num_requests_waiting"] == 3);
    CHECK(seen_then["num_requests_waiting_by_reason"] == 3);
    CHECK((seen_then["kv_cache_usage_perc"] > 0 && seen_then["kv_cache_usage_perc"] < 1));
    CHECK(seen_then["gpu_cache_usage_perc"] > 0);
    const Metrics m = metrics_when(s.port, idle);
    CHECK(idle(m));
    CHECK(m("generation_tokens_total") < 20'000);  // generation stopped early
    CHECK(m("request_success_total", R"(finished_reason="length")") == 0);
}

TEST_CASE("a client that accepts gzip gets each token as it is made", "[http]") {
    Server s;
    const httplib::Headers gzip{{"Content-Type", "application/json"}, {"Accept-Encoding", "gzip"}};
    const auto body = [](int tokens) {
        return write(with(base(completions),
                          {{"stream", true}, {"max_tokens", tokens}, {"ignore_eos", true}}));
    };
    const Reply whole = send(s.port, "POST", completions, body(40), gzip);
    CHECK(read_events(whole).events.size() == 40);
    CHECK(whole.header("Content-Encoding") == "");
    // The first token comes before the last is made: generation stops when the client leaves.
    const auto leave = [](std::string_view) { return false; };
    send(s.port, "POST", completions, body(30'000), gzip, leave);
    CHECK(metrics_when(s.port, idle)("generation_tokens_total") < 30'000);
}

// [9] Clients -------------------------------------------------------------------------------------

TEST_CASE("lm-eval: a batch of prompts, scored with one token more", "[http]") {
    const std::vector<Ids> prompts{tokenized("Cloud Run is a "), tokenized("The KV cache holds")};
    const json answer = complete({{"model", "gemma-demo"},
                                  {"prompt", prompts},
                                  {"temperature", 0},
                                  {"max_tokens", 1},
                                  {"logprobs", 1},
                                  {"seed", 1234},
                                  {"echo", true}});
    REQUIRE(answer["choices"].size() == 2);
    for (size_t i = 0; i < 2; i++) {
        const json& lists = answer["choices"][i]["logprobs"];
        const size_t size = prompts[i].size();
        check_lists(lists, size + 1, 1, true);
        CHECK(text_of(answer["choices"][i]).find(decoded(prompts[i])) == 0);
        // lm_eval counts a token as greedy if its logprob is the largest of the alternatives.
        for (size_t j = 1; j <= size; j++) {
            double most = -1e9;
            for (const json& logprob : lists["top_logprobs"][j])
                most = std::max<double>(most, logprob);
            const bool greedy = lists["token_logprobs"][j] == most;
            CHECK(greedy == (lists["top_logprobs"][j].size() == 1));
        }
        CHECK(lists["top_logprobs"][size].size() == 1);
    }
}

TEST_CASE("vllm bench serve: its body, and where it looks for times and counts", "[http]") {
    const json body = json::parse(R"({"model": "gemma-demo", "prompt": "The server answers",
        "temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": null,
        "stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true})");
    const Stream s =
        read_events(send(server().port, "POST", completions, write(body),
                         {{"Content-Type", "application/json"}, {"Authorization", "Bearer None"}}));
    CHECK(s.done);
    REQUIRE(s.events.size() == 9);
    for (size_t i = 0; i < 8; i++) CHECK(s.events[i]["choices"].size() == 1);
    CHECK(s.events[8]["choices"] == json::array());
    CHECK(s.events[8]["usage"]["completion_tokens"] == 8);
}

TEST_CASE("guidellm: health, the first model, and a chat of so many tokens", "[http]") {
    CHECK(get("/health").status == 200);
    const std::string name = get("/v1/models").parsed()["data"][0]["id"];
    const json body{
        {"model", name},
        {"max_tokens", 6},
        {"max_completion_tokens", 6},
        {"stop", nullptr},
        {"ignore_eos", true},
        {"stream", true},
        {"stream_options", {{"include_usage", true}, {"continuous_usage_stats", true}}}};
    for (const std::string& path : {completions, chat}) {
        const Stream s = read_events(post(path, with(base(path), body)));
        CHECK(s.done);
        for (const json& e : s.events) CHECK(!e.contains("error"));
        CHECK(s.events.back()["usage"]["completion_tokens"] == 6);
    }
}

TEST_CASE("others' programs send more fields than they use", "[http]") {
    const json table = json::parse(R"([
        ["chat", {"model": "gemma-demo", "user": "u", "parallel_tool_calls": false, "store": false,
                  "metadata": {"a": "b"}, "service_tier": "auto", "max_tokens": 2}],
        ["chat", {"best_of": 1, "use_beam_search": false, "spaces_between_special_tokens": true,
                  "request_id": "x", "cache_salt": "s", "reasoning_effort": "low",
                  "max_tokens": 2}],
        ["chat", {"tools": [], "tool_choice": "none", "response_format": {"type": "text"},
                  "max_tokens": 2, "extra_body": {"guided_json": {}}}],
        ["completions", {"best_of": 1, "use_beam_search": false, "user": "", "suffix": null,
                         "vllm_xargs": {}, "max_tokens": 2}]
    ])");
    for (const json& row : table) ask(row[0] == "chat" ? chat : completions, row[1]);
}

TEST_CASE("ids 0 five times are a prompt, and the shortest answer is exact", "[http]") {
    const json answer = complete(
        {{"prompt", {0, 0, 0, 0, 0}}, {"max_tokens", 5}, {"temperature", 0}, {"ignore_eos", true}});
    CHECK(write(answer["usage"]) == R"({"prompt_tokens":5,"total_tokens":10,"completion_tokens":5,)"
                                    R"("prompt_tokens_details":null})");
    REQUIRE(answer["choices"].size() == 1);
    CHECK(answer["choices"][0]["finish_reason"] == "length");
    CHECK(answer["choices"][0]["prompt_logprobs"].is_null());
}

TEST_CASE("a long prompt in a stream: usage counts the tokens that came", "[http]") {
    const Stream s =
        stream(completions,
               {{"prompt", Ids(300, 700)},
                {"max_tokens", 5},
                {"ignore_eos", true},
                {"stream_options", {{"include_usage", true}, {"continuous_usage_stats", true}}}});
    REQUIRE(s.events.size() == 6);
    for (int i = 0; i < 5; i++) {
        CHECK(s.events[size_t(i)]["usage"]["completion_tokens"] == i + 1);
        CHECK(s.events[size_t(i)]["usage"]["prompt_tokens"] == 300);
    }
}

TEST_CASE("choices in a stream: as many chunks as tokens, one finish for each", "[http]") {
    for (const json& many : {json{{"n", 3}}, json{{"prompt", {"a", "b", "c"}}},
                             json{{"prompt", {{700}, {701}, {702}}}}}) {
        const Stream s = stream(
            completions, with({{"max_tokens", 5}, {"ignore_eos", true}, {"temperature", 1}}, many));
        std::map<int, int> chunks, finishes;
        for (const json& e : s.events) {
            REQUIRE(e["choices"].size() == 1);
            const json& c = e["choices"][0];
            chunks[c["index"]]++;
            finishes[c["index"]] += !c["finish_reason"].is_null();
        }
        CHECK(chunks == std::map<int, int>{{0, 5}, {1, 5}, {2, 5}});
        CHECK(finishes == std::map<int, int>{{0, 1}, {1, 1}, {2, 1}});
    }
}

TEST_CASE("a chat's stream: the role once, one id, one time", "[http]") {
    const Stream s = stream(chat, {{"n", 2}, {"max_tokens", 4}, {"ignore_eos", true}});
    std::map<int, int> roles;
    for (const json& e : s.events) {
        CHECK((e["id"] == s.events[0]["id"] && e["created"] == s.events[0]["created"]));
        const json& c = e["choices"][0];
        if (c["delta"].contains("role")) roles[c["index"]]++;
    }
    CHECK(roles == std::map<int, int>{{0, 1}, {1, 1}});
    CHECK(s.events[0]["choices"][0]["delta"].contains("role"));
    CHECK(s.events[1]["choices"][0]["delta"].contains("role"));
}

// [10] Known bugs ---------------------------------------------------------------------------------

TEST_CASE("bug: UTF-8 split across tokens", "[http]") {
    Ids bytes;  // pieces of one byte each: first and later bytes of UTF-8 characters
    for (const int byte : {0xf0, 0x9f, 0x8c, 0x8d, 0xc3, 0xa9, 0xed, 0xa0, 0x41})
        bytes.push_back(238 + byte);
    for (const std::string& path : {completions, chat}) {
        std::string all;
        const json answer = both(path, {{"allowed_token_ids", bytes},
                                        {"temperature", 5},
                                        {"top_k", 0},
                                        {"top_p", 1},
                                        {"max_tokens", 8},
                                        {"n", 6},
                                        {"seed", 1}});  // the JSON parser throws on invalid UTF-8
        for (const json& c : answer["choices"]) all += text_of(c);
        CHECK(all.find("\uFFFD") != std::string::npos);
    }
    const std::string prompt = "Xin chào 🌍 日本";
    CHECK(first_text(both(completions, {{"prompt", prompt}, {"echo", true}, {"max_tokens", 0}})) ==
          prompt);
}

TEST_CASE("D6: no event of a stream has a character at which splitlines() ends a line", "[http]") {
    const std::string odd = "a\u0085b\u2028c\u2029d\v\f\x1c\x1d\x1e\r";
    for (const bool whole : {false, true}) {
        const json body =
            with(base(completions, odd), {{"echo", true}, {"max_tokens", 1}, {"stream", !whole}});
        const Reply reply = post(completions, body);
        REQUIRE(reply.status == 200);
        const std::string& sent = reply.body;
        for (const char* raw :
             {"\u0085", "\u2028", "\u2029", "\v", "\f", "\x1c", "\x1d", "\x1e", "\r"})
            CHECK(sent.find(raw) == std::string::npos);
        const json first = whole ? reply.parsed() : read_events(reply).events[0];
        CHECK(text_of(first["choices"][0]).starts_with(odd));
    }
    // Four megabytes of them in a value that an error shows. Replaced one by one, each in the whole
    // text, they would take minutes of one core.
    std::string many;
    for (int i = 0; i < 1'300'000; i++) many += "\u2028";
    const Reply reply = post(completions, with(base(completions), {{"temperature", many}}));
    CHECK(reply.status == 400);
    CHECK(reply.body.find(R"(\\u2028\\u2028)") != std::string::npos);
}

TEST_CASE("bug: stop string over tokens, streamed too early", "[http]") {
    const json fields{{"logit_bias", {{"107", 100}}}, {"max_tokens", 9}};  // forces "\n"
    const Stream s = stream(completions, with(fields, {{"stop", "\n\n\n\nx"}}));
    CHECK(merged(s, 1)[0]["text"] == std::string(9, '\n'));
    CHECK(s.events[5]["choices"][0]["text"] != "");  // only a possible stop string is held back
    const Stream cut = stream(completions, with(fields, {{"stop", "\n\n\n"}}));
    CHECK(merged(cut, 1)[0]["text"] == "");
    CHECK(cut.events.size() == 3);
}

TEST_CASE("bug: EOS list", "[http]") {
    for (const auto& [id, reason] :
         {std::pair(1, json()), std::pair(106, json(106)), std::pair(107, json("none"))}) {
        const json choice = ask(
            chat, {{"logit_bias", {{std::to_string(id), 100}}}, {"max_tokens", 3}})["choices"][0];
        CHECK(choice["finish_reason"] == (id == 107 ? "length" : "stop"));
        if (id != 107) CHECK(choice["stop_reason"] == reason);
    }
}

TEST_CASE("bug: -inf logprobs -> 500", "[http]") {
    for (const json& odd :
         {json{{"allowed_token_ids", {0, 3, 5}}}, json{{"logit_bias", {{"0", 100}}}},
          json{{"temperature", 1e-6}}, json{{"temperature", 1e300}}}) {
        const json fields = with(odd, {{"logprobs", 20}, {"max_tokens", 4}, {"seed", 1}});
        const json lists = both(completions, fields)["choices"][0]["logprobs"];
        for (const json& l : lists["token_logprobs"]) CHECK((l <= 0 && l >= -9999));
        for (const json& top : lists["top_logprobs"]) {
            for (const json& l : top) CHECK((l <= 0 && l >= -9999));
        }
    }
}

TEST_CASE("bug: logprob values depend on sampling params", "[http]") {
    const auto first = [](const json& fields) {
        return complete(with(
            fields,
            {{"logprobs", 5}, {"max_tokens", 1}}))["choices"][0]["logprobs"]["top_logprobs"][0];
    };
    const json plain = first({{"temperature", 0}});
    for (const json& other :
         {json{{"temperature", 1.7}, {"seed", 1}}, json{{"top_k", 1}},
          json{{"repetition_penalty", 3}}, json{{"logit_bias", {{"700", 5}}}}}) {
        const json top = first(other);
        for (const auto& [token, logprob] : plain.items()) CHECK(top[token] == logprob);
    }
}

TEST_CASE("bug: duplicate token strings collapse top_logprobs keys", "[http]") {
    // Every byte piece of a character is shown as U+FFFD, so alternatives collide as JSON keys; the
    // chosen token's own logprob must be the one that stays.
    const json fields{{"prompt", "🌍🌎🌏"}, {"echo", true}, {"logprobs", 20}, {"max_tokens", 1}};
    const json lists = complete(fields)["choices"][0]["logprobs"];
    check_lists(lists, lists["tokens"].size(), 20, true);
    const json spoken = ask(chat, {{"logprobs", true}, {"top_logprobs", 20}, {"max_tokens", 1}});
    CHECK(spoken["choices"][0]["logprobs"]["content"][0]["top_logprobs"].size() == 20);
}

TEST_CASE("bug: echo/prompt_logprobs kills the engine", "[http]") {
    const Ids ids(400, 700);
    const json answer =
        complete({{"prompt", ids}, {"echo", true}, {"logprobs", 20}, {"max_tokens", 1}, {"n", 2}});
    for (const json& c : answer["choices"]) CHECK(c["logprobs"]["tokens"].size() == 401);
    CHECK(get("/health").status == 200);
}

TEST_CASE("bug: echo + max_tokens 0 crash", "[http]") {
    const Ids ids = tokenized("The KV cache");
    for (const json& prompt :
         {json("The KV cache"), json(ids), json{"The KV cache", "The KV cache"}}) {
        for (const json& more : {json::object(), json{{"logprobs", 1}}, json{{"n", 2}},
                                 json{{"stop", "KV"}}, json{{"ignore_eos", true}}}) {
            const json fields =
                with(more, {{"prompt", prompt}, {"echo", true}, {"max_tokens", 0}, {"seed", 1}});
            INFO(write(fields));
            const json answer = both(completions, fields);
            CHECK(answer["usage"]["completion_tokens"] == 0);
            for (const json& c : answer["choices"]) {
                CHECK(text_of(c) == (prompt == json(ids) ? "<bos>The KV cache" : "The KV cache"));
                CHECK((c["finish_reason"] == "length" && c["stop_reason"].is_null()));
                if (more.contains("logprobs")) check_lists(c["logprobs"], ids.size(), 1, true);
            }
        }
    }
    for (const json& off : {json(false), json()})
        check_refusal(post(completions, {{"prompt", "a"}, {"echo", off}, {"max_tokens", 0}}), 400,
                      {"max_tokens must be at least 1, got 0."});
    check_refusal(post(chat, with(base(chat), {{"echo", true}, {"max_tokens", 0}})), 400,
                  {"max_tokens"});
}

TEST_CASE("bug: max_tokens null -> 500", "[http]") {
    CHECK(ask(completions,
              {{"max_tokens", nullptr}, {"ignore_eos", true}})["usage"]["completion_tokens"] == 16);
    const json talk = ask(chat, {{"max_tokens", nullptr},
                                 {"max_completion_tokens", nullptr},
                                 {"stop_token_ids", {700}},
                                 {"logit_bias", {{"700", 100}}}});
    CHECK(talk["usage"]["completion_tokens"] == 1);
}

TEST_CASE("bug: huge n / prompt list / logprobs: DoS", "[http]") {
    const json table = json::parse(R"([
        {"n": 129}, {"n": 1000000}, {"n": 2147483648}, {"n": 4294967297}, {"n": 1e30},
        {"best_of": 1000000}, {"logprobs": 1000000}, {"prompt_logprobs": 1000000},
        {"max_tokens": 4294967297}, {"min_tokens": 4294967297}
    ])");
    for (const json& row : table) {
        INFO(row);
        CHECK(post(completions, with(base(completions), row)).status == 400);
    }
    check_refusal(post(completions, {{"prompt", Strings(10'000, "a")}}), 400, {"64"});
    check_refusal(post(completions, {{"prompt", Strings(64, "a")}, {"n", 3}}), 400, {"128"});
}

TEST_CASE("bug: n>1 overwrites choices", "[http]") {
    for (const std::string& path : {completions, chat}) {
        const json answer =
            both(path, {{"n", 3}, {"seed", 9}, {"temperature", 2}, {"max_tokens", 6}});
        REQUIRE(answer["choices"].size() == 3);
        for (size_t i = 0; i < 3; i++) CHECK(answer["choices"][i]["index"] == i);
    }
}

TEST_CASE("bug: usage in streams missing or wrong", "[http]") {
    // The token that ends a text is counted, though it shows no text.
    const json fields{
        {"logit_bias", {{"106", 100}}}, {"n", 2}, {"temperature", 1}, {"min_tokens", 2}};
    for (const std::string& path : {completions, chat}) {
        const json whole = ask(path, fields)["usage"];
        CHECK(whole["completion_tokens"] == 6);
        const Stream s =
            stream(path, with(fields, {{"stream_options", {{"include_usage", true}}}}));
        CHECK(s.events.back()["usage"] == whole);
        CHECK(s.events.back()["choices"] == json::array());
    }
}

TEST_CASE("bug: missing finish_reason:null", "[http]") {
    for (const std::string& path : {completions, chat}) {
        for (const json& e : stream(path, {{"max_tokens", 3}}).events)
            CHECK(e["choices"][0].contains("finish_reason"));
    }
}

TEST_CASE("bug: disconnect not noticed", "[http]") {
    Server s({}, {"GEMMA_FAKE_STEP_MS=2"});
    const json body = with(base(completions), {{"max_tokens", 30'000}, {"ignore_eos", true}});
    {
        Raw whole(s.port);  // not streamed: no failing write tells the server that the client left
        whole.write(raw_post(completions, body));
        metrics_when(s.port, [](const Metrics& m) { return m("num_requests_running") == 1; });
    }
    const Metrics m = metrics_when(s.port, idle);
    CHECK(idle(m));
    CHECK(m("generation_tokens_total") < 30'000);
}

TEST_CASE("bug: duplicate X-Request-Id crashes/hangs engine", "[http]") {
    const auto replies = at_once<Reply>(6, [](size_t i) {
        const std::string path = i % 2 ? chat : completions;
        const json body = with(base(path), {{"max_tokens", 8}, {"seed", i}, {"ignore_eos", true}});
        return send(server().port, "POST", path, write(body),
                    {{"Content-Type", "application/json"}, {"X-Request-Id", "same"}});
    });
    for (size_t i = 0; i < 6; i++) {
        REQUIRE(replies[i].status == 200);
        const json answer = replies[i].parsed();
        CHECK(answer["id"] == (i % 2 ? "chatcmpl-same" : "cmpl-same"));
        CHECK(comparable(answer) ==
              comparable(ask(i % 2 ? chat : completions,
                             {{"max_tokens", 8}, {"seed", i}, {"ignore_eos", true}})));
    }
}

TEST_CASE("bug: invalid schema/regex crash", "[http]") {
    const json table = json::parse(R"([
        {"guided_json": 42}, {"guided_json": {"type": "nothing"}}, {"guided_regex": "(["},
        {"guided_choice": []}, {"guided_grammar": "root ::="},
        {"guided_json": {"type": "object"}, "guided_regex": "a"},
        {"structured_outputs": {"regex": "("}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}},
        {"response_format": {"type": "json_schema"}}, {"response_format": {"type": "sound"}},
        {"response_format": 5}, {"structural_tag": "x"},
        {"guided_json": {}, "allowed_token_ids": [5]}
    ])");
    for (const json& row : table) {
        for (const std::string& path : {completions, chat}) {
            INFO(path << row);
            check_refusal(post(path, with(base(path), row)), 400, {});
        }
    }
}

TEST_CASE("bug: endless whitespace in JSON mode", "[http]") {
    json bias;  // a model that wants nothing but white space
    for (const char* space : {" ", "  ", "\n", "\t"})
        bias[std::to_string(tokenized(space).back())] = 100;
    const json answer = ask(chat, {{"response_format", {{"type", "json_object"}}},
                                   {"logit_bias", bias},
                                   {"max_tokens", 400},
                                   {"seed", 1}});
    const std::string s = first_text(answer);
    size_t longest = 0, count = 0;
    for (const char c : s) {
        count = std::isspace(uint8_t(c)) ? count + 1 : 0;
        longest = std::max(longest, count);
    }
    INFO(s);
    CHECK(longest > 0);
    // A line's end, and what a line begins with; in an empty object twice.
    CHECK(longest <= 130);
}

TEST_CASE("bug: defaults from generation_config surprise", "[http]") {
    CHECK(server().says("sampling defaults: temperature 0.7, top_k 64, top_p 0.95"));
}

TEST_CASE("bug: error shape", "[http]") {
    const std::tuple<const char*, std::string, std::string, const char*, int> table[]{
        {"GET", "/nowhere", "", "NotFoundError", 404},
        {"POST", "/v1/nowhere", "{}", "NotFoundError", 404},
        {"GET", completions, "", "MethodNotAllowedError", 405},
        {"DELETE", "/v1/models", "", "MethodNotAllowedError", 405},
        {"POST", completions, "{", "BadRequestError", 400},
        {"POST", chat, "{}", "BadRequestError", 400},
        {"POST", "/tokenize", "{}", "BadRequestError", 400},
        {"POST", "/detokenize", "{}", "BadRequestError", 400},
        {"POST", completions, R"({"prompt":"a","model":"b"})", "NotFoundError", 404}};
    for (const auto& [method, path, body, type, status] : table) {
        INFO(method << " " << path << " " << body);
        const Reply reply = send(server().port, method, path, body);
        check_refusal(reply, status, {});
        CHECK(reply.parsed()["error"]["type"] == type);
        CHECK(reply.header("Content-Type") == "application/json");
        CHECK(reply.body == write(reply.parsed()));
    }
}

TEST_CASE("bug: 500 for bad types; message leaks/amplifies input", "[http]") {
    const std::string large(100'000, 'x');
    for (const json& bad :
         {json{{"max_tokens", large}}, json{{"model", large}}, json{{"logit_bias", {{large, 1}}}},
          json{{"stop", {large, 5}}}, json{{"prompt", Strings(2000, large.substr(0, 50))}}}) {
        const Reply reply = post(completions, with(base(completions), bad));
        INFO(reply.body.substr(0, 300));
        CHECK((reply.status == 400 || reply.status == 404));
        CHECK(reply.body.size() < 1000);
    }
}

TEST_CASE("bug: double BOS", "[http]") {
    for (const json& body : {base(chat), base(completions), base(chat, "<bos>x")}) {
        const Ids ids = tokens_of(body);
        CHECK(std::count(ids.begin(), ids.end(), 2) == 1);
        CHECK(ids[0] == 2);
        CHECK(ask(body.contains("prompt") ? completions : chat,
                  with(body, {{"max_tokens", 1}}))["usage"]["prompt_tokens"] == ids.size());
    }
}

TEST_CASE("bug: roles must alternate", "[http]") {
    for (const char* roles :
         {R"(["user","user"])", R"(["assistant"])", R"(["user","assistant","developer"])",
          R"(["user","tool"])", R"(["system","user","user"])"}) {
        json messages = json::array();
        for (const json& role : json::parse(roles))
            messages.push_back({{"role", role}, {"content", "x"}});
        INFO(roles);
        check_refusal(post(chat, {{"messages", messages}, {"max_tokens", 1}}), 400,
                      {"Conversation roles must alternate user/assistant/user/assistant/..."});
    }
}

TEST_CASE("bug: tool calls on Gemma 3", "[http]") {
    const json tool = json::parse(R"({"type": "function", "function": {"name": "f",
                                      "parameters": {"type": "object"}}})");
    // F8: tools that may not be called change nothing.
    const json idle{{"tools", json::array({tool})}, {"tool_choice", "none"}};
    const json old{{"functions", json::array({tool["function"]})}, {"function_call", "none"}};
    const json greedy{{"temperature", 0}, {"max_tokens", 4}};
    for (const json& unused : {idle, old})
        CHECK(first_text(both(chat, with(greedy, unused))) == first_text(ask(chat, greedy)));
    for (const json& asked : {with(old, {{"function_call", nullptr}}),
                              json{{"functions", json::array({tool["function"]})}}}) {
        INFO(write(asked));
        check_refusal(post(chat, with(base(chat), asked)), 400, {"not supported"});
    }
    for (const json& asked : {json{{"tools", json::array({tool})}}, json{{"tool_choice", "auto"}}})
        check_refusal(post(completions, with(base(completions), asked)), 400, {"not supported"});
    const json message =
        ask(chat, {{"tool_choice", "none"}, {"max_tokens", 1}})["choices"][0]["message"];
    CHECK(message["tool_calls"] == json::array());
}

TEST_CASE("bug: keep-alive 5 s -> 502", "[http]") {
    // Every answer closes its connection, so a proxy cannot reuse one at the moment it is closed.
    const json body = with(base(completions), {{"max_tokens", 1}});
    for (const std::string& request :
         {std::string("GET /health HTTP/1.1\r\nHost: x\r\n\r\n"),
          std::string("GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n"),
          raw_post(completions, body), raw_post(completions, with(body, {{"stream", true}})),
          raw_post(chat, json{{"messages", 5}})}) {
        const std::string answer = everything(server().port, request);  // returns, so it was closed
        INFO(answer);
        CHECK(answer.find("\r\nConnection: close\r\n") != std::string::npos);
        CHECK(answer.find("keep-alive") == std::string::npos);
    }
}

TEST_CASE("bug: silent ignore of asked features", "[http]") {
    const json same{{"seed", 1}, {"max_tokens", 6}};
    for (const std::string& path : {completions, chat}) {
        for (const json& asked :
             {json{{"best_of", 2}}, json{{"use_beam_search", true}}, json{{"bad_words", {"x"}}},
              json{{"priority", 1}}, json{{"return_token_ids", true}}, json{{"suffix", "x"}}}) {
            INFO(path << write(asked));
            check_refusal(post(path, with(base(path), asked)), 400,
                          {keys(asked)[0], "not supported"});
        }
        CHECK(first_text(ask(path, with(same, {{"no_such_field", {1, 2}}}))) ==
              first_text(ask(path, same)));
    }
    for (const char* used : {"messages", "bos_token", "add_generation_prompt", "chat_template",
                             "continue_final_message", "tokenize"}) {
        for (const std::string& path : {chat, std::string("/tokenize")})
            check_refusal(post(path, with(base(chat), {{"chat_template_kwargs", {{used, true}}}})),
                          400, {"chat_template_kwargs cannot set", used});
    }
    check_refusal(post(chat, with(base(chat), {{"chat_template_kwargs", 5}})), 400,
                  {"chat_template_kwargs must be an object"});
    const json image = json::parse(R"([{"role": "user", "content": [{"type": "image_url",
        "image_url": {"url": "data:image/png;base64,AAAA"}}]}])");
    check_refusal(post(chat, {{"messages", image}}), 400, {"image_url"});
}

// [11] Structured output --------------------------------------------------------------------------

namespace {

const json person = json::parse(R"({"type": "object", "properties": {
    "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 1,
    "maximum": 99}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}},
    "required": ["name", "age", "tags"]})");

json json_schema(const json& schema) {
    return {{"type", "json_schema"}, {"json_schema", {{"name", "x"}, {"schema", schema}}}};
}

void check_person(const std::string& text) {
    INFO(text);
    const json p = json::parse(text);
    CHECK(keys(p) == Strings{"name", "age", "tags"});  // the schema's order
    const std::string name = p["name"];
    CHECK(std::count_if(name.begin(), name.end(), [](char c) { return (c & 0xC0) != 0x80; }) <= 12);
    CHECK((p["age"] >= 1 && p["age"] <= 99));
    CHECK(p["tags"].size() <= 3);
    for (const json& tag : p["tags"]) CHECK((tag == "a" || tag == "b"));
}

// Each kind of constraint, in each of its fields.
std::vector<json> constraints() {
    return {{{"response_format", json_schema(person)}},
            {{"guided_json", person}},
            {{"guided_json", person.dump()}},
            {{"structured_outputs", {{"json", person}}}},
            {{"guided_choice", {"yes", "no", "perhaps not"}}},
            {{"structured_outputs", {{"choice", {"yes", "no", "perhaps not"}}}}},
            {{"guided_regex", "[a-c]{3,9}-\\d{4}"}},
            {{"structured_outputs", {{"regex", "[a-c]{3,9}-\\d{4}"}}}},
            {{"guided_json", {{"type", "array"}, {"items", {{"type", "number"}}}}}}};
}

}  // namespace

TEST_CASE("structured output: on both routes, streamed and whole, of one choice and of three",
          "[http]") {
    const auto all = constraints();
    for (size_t i = 0; i < all.size(); i++) {
        for (const std::string& path : {completions, chat}) {
            for (const size_t n : {1, 3}) {
                const json fields =
                    with(all[i], {{"n", n}, {"seed", i}, {"max_tokens", 300}, {"top_k", 50}});
                const json answer = ask(path, fields);
                for (const json& choice : answer["choices"]) {
                    const std::string s = text_of(choice);
                    INFO(path << write(all[i]) << s);
                    if (choice["finish_reason"] == "length") continue;  // nothing ends an array
                    CHECK(choice["finish_reason"] == "stop");
                    if (i < 4) check_person(s);
                    if (i == 4 || i == 5) CHECK((s == "yes" || s == "no" || s == "perhaps not"));
                    if (i == 6 || i == 7) CHECK((s.size() >= 8 && s[s.size() - 5] == '-'));
                    if (i == 8) CHECK(json::parse(s).is_array());
                }
                CHECK(merged(stream(path, fields), n) == comparable(answer));
            }
        }
    }
    const json any = ask(chat, {{"response_format", {{"type", "json_object"}}},
                                {"seed", 2},
                                {"max_tokens", 300},
                                {"ignore_eos", true}});
    if (any["choices"][0]["finish_reason"] == "stop")
        CHECK(json::parse(first_text(any)).is_object());
    CHECK(first_text(any)[0] == '{');
}

TEST_CASE("structured output does not depend on neighbours, chunks or pages", "[http]") {
    Server tiny({"--num-gpu-blocks-override", "8", "--max-num-batched-tokens", "16"});
    const auto all = constraints();
    const json longer = json::parse(R"({"guided_json": {"type": "array", "minItems": 100, "items":
        {"type": "string", "pattern": "^[a-z]{2}$"}}})");  // of all the tokens that it may have
    const auto run = [&](size_t i, int port) {
        const json fields{{"seed", i},
                          {"max_tokens", 120},
                          {"logprobs", 2},
                          {"prompt", Ids(20 + i % 7 * 9, 300)}};
        return comparable(
            ask(completions, with(fields, i % 3 ? longer : all[i / 3 % all.size()]), port));
    };
    const auto crowd = at_once<json>(27, [&](size_t i) { return run(i, tiny.port); });
    for (size_t i = 0; i < crowd.size(); i++) {
        INFO(i);
        CHECK(crowd[i] == run(i, server().port));
    }
    CHECK(Metrics(tiny.port)("num_preemptions_total") > 0);
}

TEST_CASE("structured output: 50 extractions by real weights are 50 documents", "[real]") {
    const char* const real = std::getenv("GEMMA_REAL");
    if (!real) SKIP_BECAUSE("GEMMA_REAL does not name a directory with google/gemma-3-270m");
    Server s({"--model", real, "--served-model-name", "real"});
    const Strings names = words("Anna Bob Chidi Dung Elif Farid Grace Hugo Ines Jun");
    const Strings cities = words("Paris Hanoi Lagos Lima Oslo");
    const json schema = json::parse(R"({"type": "object", "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "city": {"enum": ["Paris", "Hanoi", "Lagos", "Lima", "Oslo"]},
        "languages": {"type": "array", "items": {"enum": ["English", "French"]}, "maxItems": 2},
        "address": {"type": "object", "properties": {"zip": {"pattern": "^[0-9]{5}$"}},
                    "required": ["zip"]}},
        "required": ["name", "age", "city", "languages", "address"]})");
    int right = 0;
    for (size_t c = 0; c < cities.size(); c++) {
        const auto all = at_once<json>(names.size(), [&](size_t n) {
            const std::string prompt = text(
                "%s is %zu years old, lives in %s (zip 1%zu%zu45) and speaks French.\nAs JSON: ",
                names[n].c_str(), 20 + n, cities[c].c_str(), c, n);
            return ask(completions,
                       {{"model", "real"},
                        {"prompt", prompt},
                        {"max_tokens", 400},
                        {"temperature", n % 2},
                        {"seed", n},
                        {"response_format", json_schema(schema)}},
                       s.port);
        });
        for (size_t n = 0; n < all.size(); n++) {
            INFO(first_text(all[n]));
            CHECK(all[n]["choices"][0]["finish_reason"] == "stop");
            const json d = json::parse(first_text(all[n]));
            CHECK(keys(d) == words("name age city languages address"));
            CHECK((d["age"].is_number_integer() && d["age"] >= 0 && d["age"] <= 130));
            CHECK(std::count(cities.begin(), cities.end(), d["city"]) == 1);
            CHECK((d["languages"].is_array() && d["languages"].size() <= 2));
            const std::string zip = d["address"]["zip"];
            CHECK((zip.size() == 5 && std::all_of(zip.begin(), zip.end(), ::isdigit)));
            right += d["name"] == names[n] && d["age"] == 20 + n && d["city"] == cities[c];
        }
    }
    std::printf("50 extractions by real weights: %d right\n", right);
    CHECK(right > 25);
}

TEST_CASE("structured output: what is refused, in vLLM's words", "[http]") {
    const json table = json::parse(R"([
        [{"guided_json": {}, "guided_regex": "a"}, "You can only use one kind of guided decoding"],
        [{"structured_outputs": {"json": {}, "regex": "a"}},
            "You can only use one kind of constraints for structured outputs"],
        [{"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "You can only use one kind of constraints for structured outputs"],
        [{"structured_outputs": {"json": null}}, "You must use one kind of structured outputs"],
        [{"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar is not supported"],
        [{"guided_grammar": "x"}, "guided_grammar is not supported by this server"],
        [{"response_format": {"type": "structural_tag"}}, "got \"structural_tag\""],
        [{"response_format": {"type": "json_schema"}},
            "When response_format type is 'json_schema', the 'json_schema' field must be"],
        [{"guided_choice": ["a", 5]}, "guided_choice must be a list of at least one string"],
        [{"guided_json": {"properties": {"a": {"if": {}}}}},
            "guided_json: JSON schema: /properties/a: the keyword if is not supported"],
        [{"guided_regex": "a\\b"}, "\\b is not supported, at character 3"]
    ])");
    for (const json& row : table) {
        for (const std::string& path : {completions, chat})
            check_refusal(post(path, with(base(path), row[0])), 400, {row[1]});
    }
    json wide;
    for (int i = 0; i < 10'001; i++) wide[std::to_string(i)] = 1;
    check_refusal(post(chat, with(base(chat), {{"guided_json", wide}})), 400,
                  {"guided_json must have at most 256 KiB and 10000 members, got ", "10001"});
    CHECK(ask(completions, {{"guided_json", nullptr}, {"response_format", {{"type", "text"}}}})
              .contains("choices"));
}

// [12] Tools --------------------------------------------------------------------------------------

namespace {

const json get_weather = json::parse(R"({"type": "function", "function": {"name": "get_weather",
    "description": "Get the current weather in a city", "parameters": {"type": "object",
    "properties": {"city": {"type": "string"}}, "required": ["city"]}}})");
const json get_time = json::parse(R"({"type": "function", "function": {"name": "get_time",
    "description": "Get the current time in a city", "parameters": {"type": "object",
    "properties": {"city": {"type": "string"}}, "required": ["city"]}}})");
// As pydantic writes nested models, and bounded, because the demo model rambles.
const json plan_trip = json::parse(R"({"type": "function", "function": {"name": "plan_trip",
    "strict": true, "parameters": {"$defs": {"Stop": {"type": "object", "title": "Stop",
        "properties": {"city": {"type": "string", "maxLength": 8}, "nights": {"type": "integer",
        "minimum": 1, "maximum": 9}}, "required": ["city", "nights"]}},
    "type": "object", "properties": {"stops": {"type": "array", "maxItems": 2,
        "items": {"$ref": "#/$defs/Stop"}}, "mode": {"enum": ["train", "bus"]}},
    "required": ["stops", "mode"], "additionalProperties": false}}})");

json user(const std::string& says) { return {{"role", "user"}, {"content", says}}; }

json asked(const std::string& question, json more = json::object()) {
    const json two{{"messages", json::array({user(question)})},
                   {"tools", {get_weather, get_time}},
                   {"temperature", 0}};
    return with(two, more);
}

// The calls of a choice, as name(arguments).
Strings calls_of(const json& choice) {
    Strings calls;
    for (const json& call : choice["message"]["tool_calls"]) {
        CHECK(keys(call) == words("id type function"));
        CHECK(keys(call["function"]) == words("name arguments"));
        const std::string id = call["id"];
        CHECK((id.starts_with("chatcmpl-tool-") && id.size() == 14 + 32));
        CHECK(call["type"] == "function");
        calls.push_back(call["function"]["name"].get<std::string>() +
                        call["function"]["arguments"].get<std::string>());
    }
    return calls;
}

// The prompt that the model sees of a chat.
std::string prompt_of(const json& fields) {
    const json ids = post("/tokenize", fields).parsed()["tokens"];
    return post("/detokenize", {{"tokens", ids}}).parsed()["prompt"];
}

}  // namespace

TEST_CASE("tools: the model calls, reads the result and answers", "[tools]") {
    const json question = asked("What is the weather in Paris?");
    const json answer = both(chat, question);
    const json& choice = answer["choices"][0];
    CHECK(calls_of(choice) == Strings{R"(get_weather{"city": "Paris"})"});
    CHECK(choice["message"]["content"].is_null());
    CHECK(choice["finish_reason"] == "tool_calls");
    json talk = question["messages"];
    talk.push_back(choice["message"]);
    talk.push_back({{"role", "tool"},
                    {"tool_call_id", choice["message"]["tool_calls"][0]["id"]},
                    {"content", R"({"temperature": 18, "condition": "cloudy"})"}});
    const json end = both(chat, with(question, {{"messages", talk}}));
    CHECK(first_text(end) == "In Paris it is 18 degrees and cloudy.");
    CHECK(end["choices"][0]["finish_reason"] == "stop");
    CHECK(end["choices"][0]["message"]["tool_calls"] == json::array());

    const std::string several = "What is the weather in Paris, and what time is it in Rome?";
    CHECK(calls_of(both(chat, asked(several))["choices"][0]) ==
          Strings{R"(get_weather{"city": "Paris"})", R"(get_time{"city": "Rome"})"});
    CHECK(calls_of(both(chat, asked(several, {{"parallel_tool_calls", false}}))["choices"][0]) ==
          Strings{R"(get_weather{"city": "Paris"})"});
    // A question that needs no tool, tools that may not be called, and two choices.
    const json text = both(chat, asked("What is a token?"));
    CHECK(first_text(text).starts_with("A token is a small piece of text"));
    CHECK(text["choices"][0]["finish_reason"] == "stop");
    const json none = both(chat, asked("What is the weather in Paris?", {{"tool_choice", "none"}}));
    CHECK(calls_of(none["choices"][0]).empty());
    CHECK(none["usage"]["prompt_tokens"] < answer["usage"]["prompt_tokens"]);
    const json pair = both(
        chat, with(question, {{"n", 2}, {"temperature", 0.01}, {"seed", 1}, {"logprobs", true}}));
    for (const json& one : pair["choices"])
        CHECK(calls_of(one) == Strings{R"(get_weather{"city": "Paris"})"});
    // A limit cuts a call: what there is of it is told, and the reason is the limit.
    const json cut = both(chat, with(question, {{"max_tokens", 9}}));
    CHECK(cut["choices"][0]["finish_reason"] == "length");
    CHECK(calls_of(cut["choices"][0]).size() <= 1);
}

TEST_CASE("tools: the stream's events", "[tools]") {
    const Stream s = stream(chat, asked("What is the weather in Paris?"));
    std::string deltas;
    for (const json& event : s.events) {
        json delta = event["choices"][0]["delta"];
        if (delta.contains("tool_calls")) delta["tool_calls"][0].erase("id");
        if (!delta.empty()) deltas += write(delta) + "\n";
    }
    INFO(deltas);
    CHECK(deltas.starts_with(
        R"({"role":"assistant","content":""})"
        "\n"
        R"({"tool_calls":[{"type":"function","index":0,"function":{"name":"get_weather",)"
        R"("arguments":")"));
    CHECK(deltas.find(R"({"tool_calls":[{"index":0,"function":{"arguments":)") != deltas.npos);
    CHECK(s.events.back()["choices"][0]["finish_reason"] == "tool_calls");
}

TEST_CASE("tools: required and named are valid calls, whatever is drawn", "[tools]") {
    const json tools{{"tools", {get_weather, plan_trip}}, {"max_tokens", 400}};
    int trips = 0;
    for (int seed = 0; seed < 12; seed++) {
        const json fields = with(tools, {{"messages", json::array({user("Plan a trip.")})},
                                         {"tool_choice", "required"},
                                         {"parallel_tool_calls", false},
                                         {"temperature", 1},
                                         {"seed", seed}});
        const json answer = both(chat, fields);
        const json& choice = answer["choices"][0];
        INFO(write(choice));
        CHECK(choice["message"]["content"] == "");
        if (choice["finish_reason"] == "length") continue;  // get_weather's city has no bound
        CHECK(choice["finish_reason"] == "tool_calls");
        REQUIRE(calls_of(choice).size() == 1);
        const json& function = choice["message"]["tool_calls"][0]["function"];
        const json arguments = json::parse(function["arguments"].get<std::string>());
        if (function["name"] == "get_weather") CHECK(arguments["city"].is_string());
        trips += function["name"] == "plan_trip";
    }
    for (int seed = 0; seed < 8; seed++) {
        const json named{{"type", "function"}, {"function", {{"name", "plan_trip"}}}};
        const json fields = with(tools, {{"messages", json::array({user("Plan a trip.")})},
                                         {"tool_choice", named},
                                         {"temperature", 1},
                                         {"seed", seed}});
        const json choice = both(chat, fields)["choices"][0];
        INFO(write(choice));
        CHECK(choice["finish_reason"] == "stop");  // as OpenAI and vLLM
        CHECK(choice["message"]["content"] == "");
        REQUIRE(calls_of(choice).size() == 1);
        CHECK(choice["message"]["tool_calls"][0]["function"]["name"] == "plan_trip");
        const json arguments = json::parse(
            choice["message"]["tool_calls"][0]["function"]["arguments"].get<std::string>());
        CHECK(keys(arguments) == words("stops mode"));
        for (const json& stop : arguments["stops"]) {
            CHECK((stop["nights"] >= 1 && stop["nights"] <= 9));
            CHECK(stop["city"].is_string());
        }
    }
    // A document or a call: the AI SDK asks for either. The first bracket decides.
    for (const std::string bracket : {"{", "["}) {
        const json answer =
            both(chat, {{"tools", {plan_trip}},
                        {"response_format", json_schema(person)},
                        {"logit_bias", {{text("%d", tokenized(bracket).back()), 50}}},
                        {"temperature", 1},
                        {"seed", 3},
                        {"max_tokens", 600}});
        const json& choice = answer["choices"][0];
        INFO(write(choice));
        if (bracket == "{") check_person(text_of(choice));
        CHECK(calls_of(choice).empty() == (bracket == "{"));
        CHECK(choice["message"]["content"].is_null() == (bracket == "["));
        CHECK(choice["finish_reason"] == (bracket == "[" ? "tool_calls" : "stop"));
    }
}

TEST_CASE("tools: the prompt has Google's form", "[http]") {
    const json talk = json::parse(R"([
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Weather and time?"},
        {"role": "assistant", "content": "Let me see.", "refusal": null, "audio": null,
         "function_call": null, "tool_calls": [
            {"id": "a", "type": "function", "index": 0, "function": {"name": "get_weather",
             "arguments": "{\"city\": \"Paris\", \"days\": [1, true, null, {\"k\": 0.5}]}"}},
            {"type": "function", "id": "b", "function": {"arguments": "", "name": "get_time"}}]},
        {"role": "tool", "tool_call_id": "b", "name": "get_time", "content": "14:05"},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "warm"}]},
        {"role": "user", "content": "And then?"}])");
    const std::string tool = R"([
  {
    "name": "get_weather",
    "parameters": {
      "type": "object",
      "properties": {
        "zone": {
          "type": "string"
        },
        "city": {
          "type": "string"
        }
      }
    },
    "description": "The weather"
  }
])";
    // As text: the order of a schema's keys is the client's.
    const std::string body = R"({"messages": )" + talk.dump() +
                             R"(, "tools": [{"function": {"name": "get_weather", "parameters": {
        "type": "object", "properties": {"zone": {"type": "string"}, "city": {"type": "string"}}},
        "description": "The weather"}, "type": "function"}], "model": "gemma-demo"})";
    const auto seen = [&](const std::string& text) {
        const json ids = send(server().port, "POST", "/tokenize", text).parsed()["tokens"];
        return post("/detokenize", {{"tokens", ids}}).parsed()["prompt"].get<std::string>();
    };
    const std::string head = "<bos><start_of_turn>user\nBe short.\n\n";
    const std::string rest = "Weather and time?<end_of_turn>\n<start_of_turn>model\nLet me see.\n";
    const std::string results =
        "<end_of_turn>\n<start_of_turn>user\n```tool_output\nwarm\n```\n```tool_output\n14:05\n"
        "```\n\nAnd then?<end_of_turn>\n<start_of_turn>model\n";
    const std::string offer =
        "You have access to functions. If you decide to invoke any of the function(s), you MUST "
        "put it in the format of ";
    const std::string no_text =
        "\n\nYou SHOULD NOT include any other text in the response if you call a function\n";
    const std::string python =
        "[func_name1(params_name1=params_value1, params_name2=params_value2...), "
        "func_name2(params)]";
    const std::string calls =
        R"([get_weather(city="Paris", days=[1, True, None, {"k": 0.5}]), get_time()])";
    CHECK(seen(body) == head + offer + python + no_text + tool + "\n\n" + rest + calls + results);
    // Without tools the calls of the past stay; a call that is required is asked for in JSON.
    CHECK(prompt_of({{"messages", talk}}) == head + rest + calls + results);
    const std::string in_json =
        R"([{"name": function name, "parameters": dictionary of argument name and its value}])";
    const std::string required =
        body.substr(0, body.size() - 1) + R"(, "tool_choice": "required"})";
    CHECK(seen(required) == head + offer + in_json + no_text + tool + "\n\n" + rest +
                                R"([{"name":"get_weather","parameters":{"city":"Paris",)"
                                R"("days":[1,true,null,{"k":0.5}]}})"
                                R"(, {"name":"get_time","parameters":{}}])" +
                                results);
}

TEST_CASE("tools: what is wrong is named", "[http]") {
    const json f{{"type", "function"}, {"function", {{"name", "f"}}}};
    const auto tool = [](const json& function) {
        return json{{"tools", json::array({{{"type", "function"}, {"function", function}}})}};
    };
    const auto choice = [&](const json& chosen) {
        return json{{"tools", json::array({f})}, {"tool_choice", chosen}};
    };
    const auto call = [](const json& one) {
        return json{{"messages", json::array({user("x"),
                                              {{"role", "assistant"},
                                               {"content", nullptr},
                                               {"tool_calls", json::array({one})}},
                                              user("y")})}};
    };
    const json none, obj = json::object();
    const std::vector<std::tuple<json, std::string, std::string>> table{
        {json{{"tools", json::array()}}, "tools", "`tools` must not be an empty array."},
        {json{{"tools", 5}}, "tools", "tools must be a list of functions, got 5"},
        {json{{"tools", 5}, {"tool_choice", "none"}}, "tools", "must be a list"},
        {json{{"tools", json::array({5})}}, "tools", "tools[0] must be of the type function"},
        {json{{"tools", {f, {{"type", "custom"}}}}}, "tools", "tools[1] must be of the type"},
        {json{{"tools", json::array({obj})}}, "tools", "tools[0].function must be an object"},
        {tool(obj), "tools", "tools[0].function.name must have 1 to 128 of A-Z"},
        {tool({{"name", "a b"}}), "tools", "got \"a b\""},
        {tool({{"name", std::string(129, 'a')}}), "tools", "1 to 128"},
        {tool({{"name", "f"}, {"parameters", 5}}), "tools", "must be a JSON schema"},
        {tool({{"name", "f"}, {"parameters", {{"type", "string"}}}}), "tools", "type object"},
        {json{{"tools", json(129, f)}}, "tools", "tools must be at most 128, got 129"},
        {json{{"tool_choice", "auto"}}, "tool_choice",
         "When using `tool_choice`, `tools` must be set."},
        {choice("any"), "tool_choice", "Invalid value for `tool_choice`: \"any\"!"},
        {choice(5), "tool_choice", "Only named tools, \"none\", \"auto\" or \"required\""},
        {choice(obj), "tool_choice", "Invalid value for `function`: `null` in `tool_choice`!"},
        {choice({{"function", obj}}), "tool_choice", "Expected field `name` in `function`"},
        {choice({{"function", {{"name", ""}}}}), "tool_choice", "Invalid `name` in `function`"},
        {choice({{"function", {{"name", "g"}}}}), "tool_choice",
         "does not match any of the specified `tools`"},
        {with(choice(f), {{"guided_regex", "a"}}), "guided_regex",
         "either use constraints for structured outputs or tools, not both"},
        {with(choice("required"), {{"allowed_token_ids", {5}}}), "allowed_token_ids", "tools"},
        {with(choice("auto"), {{"parallel_tool_calls", 2}}), "parallel_tool_calls", "got 2"},
        {with(choice("required"), {{"guided_regex", "a"}}), "guided_regex", "tools, not both"},
        {with(tool({{"name", "f"}, {"parameters", {{"properties", {{"a", {{"x-y", 1}}}}}}}}),
              {{"tool_choice", "required"}}),
         "tools", "tools[0].function.parameters: JSON schema: /properties/a: the keyword x-y"},
        {call(5), "messages", "messages[1].tool_calls[0].function must be an object, got null"},
        {call({{"function", obj}}), "messages", "function.name must be a name"},
        {call({{"function", {{"name", "f"}, {"arguments", "{"}}}}), "messages",
         "messages[1].tool_calls[0].function.arguments must be a JSON object, got \"{\""},
        {call({{"function", {{"name", "f"}, {"arguments", "[1]"}}}}), "messages", "JSON object"},
        {call({{"function", {{"name", "f"}, {"arguments", std::string("{}\0{", 4)}}}}), "messages",
         "JSON object"},
        {with(choice("auto"), {{"messages", {user("x"), {{"role", 5}}}}}), "messages",
         "messages[1]: role must be a string"},
        {call({{"function", {{"name", "f"}, {"arguments", std::string(100, '[')}}}}), "messages",
         "nested more than 64 levels deep"},
        {json{{"messages", {user("x"), {{"role", "assistant"}, {"tool_calls", 5}}}}}, "messages",
         "messages[1].tool_calls must be a list, got 5"},
        {json{{"messages", {user("x"), {{"role", "tool"}, {"content", 5}}}}}, "messages",
         "messages[1].content must be text, got 5"},
    };
    for (const auto& [fields, param, words] : table) {
        INFO(write(fields));
        const Reply reply = post(chat, with(base(chat), fields));
        check_refusal(reply, 400, {words});
        CHECK(reply.parsed()["error"]["param"] == param);
    }
    // With 100,000 calls and results, an answer does not take the square of that.
    json many = json::array(), talk = json::array({user("x")});
    for (int i = 0; i < 20'000; i++)
        many.push_back({{"id", std::to_string(i)}, {"function", {{"name", "f"}}}});
    talk.push_back({{"role", "assistant"}, {"tool_calls", many}});
    for (int i = 20'000; i-- > 0;)
        talk.push_back({{"role", "tool"}, {"tool_call_id", std::to_string(i)}, {"content", "x"}});
    check_refusal(post(chat, {{"messages", talk}, {"max_tokens", 1}}), 400, {"maximum context"});
    CHECK(post("/v1/responses", {{"input", "x"}}).status == 404);
    check_refusal(post("/v1/responses", {{"input", "x"}}), 404,
                  {"/v1/chat/completions", "set_default_openai_api(\"chat_completions\")",
                   "openai.chat(model)"});
}
