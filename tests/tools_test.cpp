// SPDX-License-Identifier: Apache-2.0
//
// Tests of tools.cpp, calls.cpp and literals.cpp: what a request offers, and what a text calls.
#include "calls.h"
#include "grammar.h"
#include "literals.h"
#include "test.h"
#include "tools.h"

#include <random>

using namespace gemma;
using nlohmann::ordered_json;

namespace {

const char* const two_tools = R"({"tools": [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather",
     "parameters": {"type": "object", "properties": {"zone": {"type": "string"},
                    "city": {"type": "string"}, "days": {"type": "integer"}},
                    "required": ["city"]}}},
    {"type": "function", "function": {"name": "get_time"}}])";

std::shared_ptr<const Tools> make_tools(const std::string& more = "}") {
    const std::string body = two_tools + more;
    return parse_tools(json::parse(body), body, more.find("false") == more.npos);
}

// What a reader makes of a text: the text around the calls, then each call as name(arguments).
struct Reading {
    std::string text;
    std::vector<std::pair<std::string, std::string>> calls;
    bool operator==(const Reading&) const = default;
};

std::ostream& operator<<(std::ostream& out, const Reading& r) {
    out << '"' << r.text << '"';
    for (const auto& [name, arguments] : r.calls) out << " " << name << arguments;
    return out;
}

// Reads a text that comes in pieces; the deltas of a stream are put together as a client does.
Reading read(const std::vector<std::string>& pieces, Finish finish = Finish::stop,
             const std::string& more = "}") {
    CallReader reader(make_tools(more));
    Reading r;
    for (size_t i = 0; i <= pieces.size(); i++) {
        r.text +=
            i < pieces.size() ? reader.push(pieces[i], Finish::none) : reader.push("", finish);
        for (const json& delta : json::parse("[" + reader.take_json(true) + "]")) {
            const size_t index = delta["index"];
            if (delta.contains("id")) {
                REQUIRE(index == r.calls.size());
                CHECK(delta["id"].get<std::string>().starts_with("chatcmpl-tool-"));
                CHECK(delta["type"] == "function");
                r.calls.emplace_back(delta["function"]["name"], "");
            }
            REQUIRE(index + 1 == r.calls.size());
            r.calls[index].second += delta["function"]["arguments"].get<std::string>();
        }
    }
    return r;
}

std::vector<std::string> letters(const std::string& text) {
    std::vector<std::string> pieces;
    for (const char32_t c : decode_utf8(text)) pieces.push_back(encode_utf8(c));
    return pieces;
}

// However the text is divided, the reading is one.
Reading read_all_ways(const std::string& text, Finish finish = Finish::stop) {
    const Reading whole = read({text}, finish);
    CHECK(read(letters(text), finish) == whole);
    std::mt19937 random(1);
    for (int i = 0; i < 10; i++) {
        std::vector<std::string> pieces{""};
        for (const std::string& letter : letters(text)) {
            if (random() % 4 == 0) pieces.push_back("");
            pieces.back() += letter;
        }
        CHECK(read(pieces, finish) == whole);
    }
    return whole;
}

const std::pair<std::string, std::string> paris{"get_weather", R"({"city": "Paris"})"};
const std::pair<std::string, std::string> now{"get_time", "{}"};

}  // namespace

TEST_CASE("literals of Python and JSON become JSON") {
    const std::vector<std::pair<const char*, const char*>> same{
        {"True", "true"},
        {"False", "false"},
        {"None", "null"},
        {"true", "true"},
        {"null", "null"},
        {"0", "0"},
        {"-12", "-12"},
        {"+5", "5"},
        {"1_000_000", "1000000"},
        {"0x1F", "31"},
        {"-0b101", "-5"},
        {"0o17", "15"},
        {"1.50", "1.50"},
        {"5.", "5.0"},
        {".5", "0.5"},
        {"1e5", "1e5"},
        {"123456789012345678901234567890", "123456789012345678901234567890"},
        {"'a'", R"("a")"},
        {"\"it's\"", R"("it's")"},
        {R"('say "hi"')", R"("say \"hi\"")"},
        {R"('a\nb\x41\u00e9\U0001F600\101')", "\"a\\nbA\u00e9\U0001F600A\""},
        {R"("\ud83d\ude00 \ud83d!")", "\"\U0001F600 \uFFFD!\""},
        {R"('\q\/')", R"("\\q/")"},
        {R"(r'\d+\n')", R"("\\d+\\n")"},
        {"b'bytes'", R"("bytes")"},
        {"u'text'", R"("text")"},
        {"'''two\nlines'''", R"("two\nlines")"},
        {R"("""a "quoted" word""")", R"("a \"quoted\" word")"},
        {"'side ' \"by\" ' side'", R"("side by side")"},
        {"''", R"("")"},
        {"[]", "[]"},
        {"[1, 'a', [True, None],]", R"([1,"a",[true,null]])"},
        {"(1, 2)", "[1,2]"},
        {"(1,)", "[1]"},
        {"(1)", "1"},
        {"()", "[]"},
        {"{1, 2}", "[1,2]"},
        {"{}", "{}"},
        {"{'a': 1, \"b\": {'c': (2, 3)}, 4: None}", R"({"a":1,"b":{"c":[2,3]},"4":null})"},
        {R"({"json": [1.0, true, null, "x"]})", R"({"json":[1.0,true,null,"x"]})"},
        {" 7 ", "7"},
        // No literals: their text.
        {"Paris", R"("Paris")"},
        {"New York", R"("New York")"},
        {"date(2024, 1, 1)", "\"date(2024, 1, 1)\""},
        {"'a' + 'b'", R"("'a' + 'b'")"},
        {"1 + 1", R"("1 + 1")"},
        {"2j", R"("2j")"},
        {"01234", R"("01234")"},  // a zip code
        {"--5", R"("--5")"},
        {"-Infinity", R"("-Infinity")"},
        {"-nan", R"("-nan")"},
        {"3.0e2", "3.0e2"},
        {"1e999", R"("1e999")"},
        {"", R"("")"},
        {"]", R"("]")"},
        {"[1, 2", "[1,2]"},
        {"{'a': ", R"({"a":""})"},
        {"'open", R"("open")"},
    };
    for (const auto& [literal, expected] : same) {
        CAPTURE(literal);
        CHECK(literal_to_json(literal) == expected);
    }
    for (const int depth : {10, 63, 64, 1000, 100'000}) {
        const std::string deep =
            std::string(size_t(depth), '[') + "1" + std::string(size_t(depth), ']');
        CHECK(json::accept(literal_to_json(deep)));
    }
}

TEST_CASE("calls are found in each form, whatever stands around them") {
    const std::vector<const char*> one{
        R"([get_weather(city="Paris")])",
        R"([get_weather(city='Paris')])",
        R"([ get_weather( city = "Paris" , ) ])",
        "get_weather(city=\"Paris\")",
        "\n get_weather(city=\"Paris\")\n",
        "```tool_code\n[get_weather(city=\"Paris\")]\n```",
        "```tool_code\nget_weather(city=\"Paris\")\n```",
        "```python\nget_weather(city='Paris')\n```\n",
        "```\nget_weather(city='Paris')```",
        R"({"name": "get_weather", "parameters": {"city": "Paris"}})",
        R"({"name": "get_weather", "arguments": {"city": "Paris"}})",
        R"({"name":"get_weather","arguments":"{\"city\": \"Paris\"}"})",
        R"([{"name": "get_weather", "parameters": {"city": "Paris"}}])",
        "```json\n{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\"}}\n```",
        "```json\n[\n  {\n    \"name\": \"get_weather\",\n    \"parameters\": {\n      "
        "\"city\": "
        "\"Paris\"\n    }\n  }\n]\n```",
        R"({"type": "function", "function": {"name": "get_weather",
            "arguments": {"city": "Paris"}}})",
        R"([{"id": "x", "type": "function", "function": {"name": "get_weather",
             "arguments": "{'city': 'Paris'}"}}])",
        R"({"parameters": {"city": "Paris"}, "name": "get_weather"})",
        R"({"name": "get_weather", "parameters": {"city": "Paris"}, "id": "7"})",
        R"([get_weather(city=Paris)])",
        R"([get_weather(city="Pa" 'ris')])",
        R"([get_weather(city="""Paris""")])",
        R"([get_weather(city=u"Paris")])",
        R"([get_weather(city="P\u0061ris")])",
        "```tool_code\nprint(get_weather(city=\"Paris\"))\n```",
    };
    for (const char* text : one) {
        CAPTURE(text);
        Reading r = read_all_ways(text);
        REQUIRE(r.calls.size() == 1);
        r.calls[0].second = ordered_json::parse(r.calls[0].second).dump();
        CHECK(r == Reading{"", {{"get_weather", R"({"city":"Paris"})"}}});
    }
    CHECK(read_all_ways(one[0]).calls[0] == paris);  // as json.dumps writes it
    // Words in front of a call are the content.
    CHECK(read_all_ways("Sure, let me look.\n\n[get_weather(city=\"Paris\")]") ==
          Reading{"Sure, let me look.", {paris}});
    CHECK(read_all_ways("Sure:\n```tool_code\n[get_time()]\n```\nThat was it.") ==
          Reading{"Sure:That was it.", {now}});
    CHECK(read_all_ways("I call [get_time()]") == Reading{"I call", {now}});
    // What no call opened is not closed behind it.
    CHECK(read_all_ways("[get_time()]\n```python\nprint(1)\n```") ==
          Reading{"```python\nprint(1)\n```", {now}});
    CHECK(read_all_ways("get_time()\n], and more") == Reading{"], and more", {now}});
    CHECK(read_all_ways("```json\n{\"name\": \"get_time\"}\n```\n```\nx\n```") ==
          Reading{"```\nx\n```", {now}});
    // A brace that is missing costs no more than itself.
    CHECK(read_all_ways("{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\"}\n\n"
                        "It's there.") == Reading{"It's there.", {paris}});
    CHECK(read_all_ways(R"([{"name": "get_time", "parameters": {},
        {"name": "get_weather", "parameters": {"city": "Paris"}}])") == Reading{"", {now, paris}});
    // Several.
    CHECK(read_all_ways("[get_weather(city=\"Paris\"), get_time()]") == Reading{"", {paris, now}});
    CHECK(read_all_ways("[get_time(),\n get_weather(city='Paris')]\n") ==
          Reading{"", {now, paris}});
    CHECK(read_all_ways("get_time()\nget_weather(city='Paris')") == Reading{"", {now, paris}});
    CHECK(read_all_ways("```tool_code\nget_time()\nget_time()\n```") == Reading{"", {now, now}});
    CHECK(read_all_ways("[get_time()]\n[get_time()]") == Reading{"", {now, now}});
    CHECK(read_all_ways(R"([{"name": "get_time", "parameters": {}}, {"name": "get_weather",
        "parameters": {"city": "Paris"}}])") == Reading{"", {now, paris}});
    CHECK(read_all_ways(R"({"name": "get_time", "parameters": {}}
        {"name": "get_time"})") == Reading{"", {now, now}});
    CHECK(read({"[get_time(), get_weather(city='Paris')] x"}, Finish::stop,
               R"(, "parallel_tool_calls": false})") == Reading{"", {now}});
}

TEST_CASE("arguments keep their values, their order and their nesting") {
    const auto arguments = [](const std::string& written) {
        const Reading r = read_all_ways("[get_weather(" + written + ")]");
        REQUIRE(r.calls.size() == 1);
        CHECK(r.text == "");
        return r.calls[0].second;
    };
    CHECK(arguments("days=3, city='a, b) [c] \"d\"'") ==
          R"({"days": 3, "city": "a, b) [c] \"d\""})");
    CHECK(arguments("city=['x', {'y': (1, None)}], days=-1.5e3, zone=True") ==
          R"({"city": ["x",{"y":[1,null]}], "days": -1.5e3, "zone": true})");
    CHECK(arguments("city='\U0001F600 \\\\ \\' \\n'") == "{\"city\": \"\U0001F600 \\\\ ' \\n\"}");
    CHECK(arguments("city=''") == R"({"city": ""})");
    CHECK(arguments("city=O'Hare, days=2") == R"({"city": "O'Hare", "days": 2})");
    CHECK(arguments("city=[r'a', \"it's\"], days=2") == R"({"city": ["a","it's"], "days": 2})");
    CHECK(arguments("days=1,, city='x'") == R"({"days": 1, "city": "x"})");
    CHECK(arguments("city=\"\"") == R"({"city": ""})");
    CHECK(arguments("city=date(1, 2)") == "{\"city\": \"date(1, 2)\"}");
    CHECK(arguments("city='a' + 'b', days=1") == R"({"city": "a", "days": 1})");
    // By their places: zone stands first in the schema.
    CHECK(arguments("'UTC', 'Paris', 3") == R"({"zone": "UTC", "city": "Paris", "days": 3})");
    CHECK(arguments("'UTC', days=3") == R"({"zone": "UTC", "days": 3})");
    CHECK(arguments("1, 2, 3, 4") == R"({"zone": 1, "city": 2, "days": 3, "argument_3": 4})");
    CHECK(arguments("True") == R"({"zone": true})");
    CHECK(arguments("other=1") == R"({"other": 1})");
    const std::string in_json = R"({"name": "get_weather", "parameters": {"days": 1, "city": {"a":
        [true, null, "}"]}, "z": "\ud83d\ude00\/"}})";
    CHECK(read_all_ways(R"({"name": "get_weather", "parameters": {"": 5, "days": 2}})") ==
          Reading{"", {{"get_weather", R"({"": 5, "days": 2})"}}});
    const Reading r = read_all_ways(in_json);
    CHECK(r.calls.at(0).second ==
          "{\"days\": 1, \"city\": {\"a\":[true,null,\"}\"]}, \"z\": \"\U0001F600/\"}");
}

TEST_CASE("text that is no call stays as it is") {
    for (const char* text :
         {"", " ", "\n\n", "Hello.", " It is warm.\n\n", "See [1] and [2].", "[", "[]", "[[", "{",
          "{}", "`", "``", "```", "```json\n", "```json\n{\"a\": 1}\n```\n",
          "{\"city\": \"Paris\"}", "{\"name\": \"Ann\", \"age\": 5}",
          "{\"name\": \"get_weather\", \"age\": 5}", "{\"name\": \"get_weather\"",
          "[{\"name\": \"get_weather\"", "[get_weather", "[get_weather(", "[get_weather(city",
          "get_weather", "get_weather(city) gives the weather.", "get_time() gives the time.",
          "Call get_time() or get_weather(city='Paris').", "[foo(x=1)]", "foo(x=1)",
          "[get_weather_now(x=1)]", "def get_time():\n    pass\n", "```python\nprint(1)\n```",
          "a[get_weather] = 3", "\"get_time()\"", "get_weather(city ", "get_weather(city, days)",
          "get_weather", "[get_weather(Paris)]", "\u00e9 [\u00e9", "{'name': get_time}",
          "{\"parameters\": {}, \"name\": \"foo\"}", "{\"type\": \"x\"}",
          "- get_time\n- get_weather\n", "[{\"\\", "[{\"name\\",
          // A document: what looks like a call is a part of it.
          "{\"calls\": [{\"name\": \"get_weather\", \"arguments\": {\"city\": \"x\"}}]}",
          "{\"a\": \"\n[get_time()]\"}"}) {
        CAPTURE(text);
        CHECK(read_all_ways(text) == Reading{text, {}});
        CHECK(read_all_ways(text, Finish::length) == Reading{text, {}});
    }
    // What might become a call is held no longer than it has to be.
    CallReader reader(make_tools());
    CHECK(reader.push("The", Finish::none) == "The");
    CHECK(reader.push(" sky", Finish::none) == " sky");
    CHECK(reader.push(" [", Finish::none) == "");
    CHECK(reader.push("get_", Finish::none) == "");
    CHECK(reader.push("up", Finish::none) == " [get_up");
    CHECK(reader.finish_reason(Finish::stop) == "");
    // Not longer than 4 KiB, if no call begins there.
    std::string held;
    for (int i = 0; i < 5000; i++) held += reader.push("\n", Finish::none);
    CHECK(held.size() > 800);
    const std::string spaces(20'000, '\n');
    CHECK(read({spaces + "x"}).text == spaces + "x");
}

TEST_CASE("a name is told as soon as it is certain, arguments as they come") {
    CallReader reader(make_tools());
    const auto push = [&](const char* more) {
        CHECK(reader.push(more, Finish::none) == "");
        json list = json::parse("[" + reader.take_json(true) + "]");
        if (!list.empty()) list[0].erase("id");
        return list.dump();
    };
    CHECK(push("[get_weather(") == "[]");
    CHECK(push("city=") ==
          R"([{"function":{"arguments":"","name":"get_weather"},"index":0,"type":"function"}])");
    CHECK(push("\"Pa") == R"([{"function":{"arguments":"{\"city\": \"Pa"},"index":0}])");
    CHECK(push("ris\\") == R"([{"function":{"arguments":"ris"},"index":0}])");
    CHECK(push("n\"") == R"([{"function":{"arguments":"\\n"},"index":0}])");
    CHECK(push(", days=1") == R"([{"function":{"arguments":"\", \"days\": "},"index":0}])");
    CHECK(push("2") == "[]");
    CHECK(push(")") == R"([{"function":{"arguments":"12}"},"index":0}])");
    CHECK(push(", get_time()") == "[]");  // " gives the time" may follow
    CHECK(push("]") ==
          R"([{"function":{"arguments":"{}","name":"get_time"},"index":1,"type":"function"}])");
    CHECK(reader.push("", Finish::stop) == "");
    CHECK(reader.finish_reason(Finish::stop) == "\"tool_calls\"");
    CHECK(reader.finish_reason(Finish::length) == "");
}

TEST_CASE("a call that its turn ends is completed; one that a limit cuts is left") {
    for (const char* text : {"[get_weather(city=\"Paris\"", "[get_weather(city=\"Paris\")",
                             "[get_weather(city='Paris", "[get_weather(city=Paris",
                             "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\"}",
                             "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\""}) {
        CAPTURE(text);
        CHECK(read_all_ways(text) == Reading{"", {paris}});
    }
    // A stop string may end a text anywhere: the start of a name is no value.
    for (const char* text :
         {"{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\", \"da",
          "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\", \"",
          "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\", \"days\"",
          "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\", \"days\": ",
          "[get_weather(city=\"Paris\", da", "[get_weather(city=\"Paris\", days ="}) {
        CAPTURE(text);
        CHECK(read_all_ways(text) == Reading{"", {paris}});
    }
    // One that a stop string cuts is no whole command either.
    CallReader cut(make_tools());
    CHECK(cut.push("[get_weather(city=\"Paris", Finish::stop, true) == "");
    CHECK(json::parse(cut.take_json(false))["function"]["arguments"] == R"({"city": "Paris)");
    CHECK(cut.finish_reason(Finish::stop) == "");
    CHECK(read_all_ways("[get_weather(city='Par", Finish::length) ==
          Reading{"", {{"get_weather", R"({"city": "Par)"}}});
    CHECK(read_all_ways("[get_weather(city=\"Paris\", days=1", Finish::length) ==
          Reading{"", {{"get_weather", R"({"city": "Paris", "days": )"}}});
}

TEST_CASE("whatever a model writes, arguments are JSON and divisions do not matter") {
    const std::vector<std::string> parts{"[",
                                         "]",
                                         "(",
                                         ")",
                                         "{",
                                         "}",
                                         ",",
                                         "=",
                                         ":",
                                         "\"",
                                         "'",
                                         "\\",
                                         "```",
                                         "json",
                                         "\n",
                                         " ",
                                         "city",
                                         "get_weather",
                                         "get_time(",
                                         "get_weather(city=",
                                         "\"name\"",
                                         "\"parameters\": {",
                                         "\u00e9",
                                         "1.5",
                                         "True",
                                         "{\"name\": \"get_weather\", \"parameters\": {",
                                         "\\u00",
                                         "x",
                                         "\"get_time\"",
                                         "-",
                                         "[get_weather(",
                                         "'''"};
    std::mt19937 random(7);
    int called = 0;
    for (int i = 0; i < 4000; i++) {
        std::string text;
        for (size_t n = random() % 24; n > 0; n--) text += parts[random() % parts.size()];
        CAPTURE(text);
        const Reading whole = read({text});
        REQUIRE(read(letters(text)) == whole);
        REQUIRE(read(letters(text), Finish::length).calls.size() == whole.calls.size());
        for (const auto& [name, arguments] : whole.calls) {
            called++;
            CAPTURE(arguments);
            REQUIRE(json::accept(arguments));
            REQUIRE(json::parse(arguments).is_object());
        }
        if (whole.calls.empty()) REQUIRE(whole.text == text);
    }
    CHECK(called > 1000);
}
