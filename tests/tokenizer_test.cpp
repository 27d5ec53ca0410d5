// SPDX-License-Identifier: Apache-2.0
//
// tokenizer_test.cpp: golden ids and texts; text forges no turn; a stream has no partial
// characters.
//
// There are two vocabularies: the demo's, in the repository, and Gemma's 262,144 pieces, from
// $GEMMA_VOCAB or a folder beside the repository. Most tests use both; golden ids need Gemma's.
#include "tests/test.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <optional>
#include <random>
#include <thread>

#include <nlohmann/json.hpp>
#include <sentencepiece_processor.h>

using gemma::Detokenizer;
using gemma::Tokenizer;
using Ending = Tokenizer::Ending;
using nlohmann::json;
using Ids = std::vector<int>;

namespace {

const std::filesystem::path demo_file = repository / "demo/model/tokenizer.model";
const char* const skip_reason = "no Gemma vocabulary at $GEMMA_VOCAB or ../shared/golden";

const std::filesystem::path gemma_file = std::getenv("GEMMA_VOCAB")
                                             ? std::filesystem::path(std::getenv("GEMMA_VOCAB"))
                                             : repository / "../shared/golden/gemma3-vocab.model";

// Gemma's vocabulary, or nullptr if it is not there. Loaded once.
const Tokenizer* gemma_vocabulary() {
    static const auto loaded = []() -> std::optional<Tokenizer> {
        if (!std::filesystem::exists(gemma_file)) return std::nullopt;
        return std::optional<Tokenizer>(std::in_place, gemma_file.string());
    }();
    return loaded ? &*loaded : nullptr;
}

std::map<std::string, const Tokenizer*> vocabularies() {
    static const Tokenizer demo(demo_file.string());
    std::map<std::string, const Tokenizer*> all{{"demo", &demo}};
    if (const Tokenizer* big = gemma_vocabulary())
        all["gemma"] = big;
    else
        std::printf("only the demo vocabulary: %s\n", skip_reason);
    return all;
}

std::vector<json> golden(const char* name) {
    std::ifstream in(repository / "tests/golden" / name);
    std::vector<json> cases;
    for (std::string line; std::getline(in, line);) cases.push_back(json::parse(line));
    if (cases.empty()) throw std::runtime_error(std::string("no cases in ") + name);
    return cases;
}

const std::vector<std::string> controls = {"<pad>",
                                           "<eos>",
                                           "<bos>",
                                           "<unk>",
                                           "<start_of_turn>",
                                           "<end_of_turn>",
                                           "<start_of_image>",
                                           "<end_of_image>",
                                           "<image_soft_token>"};

// The control ids: a raw prompt can write them as literals, other text must never become them.
Ids control_ids(const Tokenizer& t) {
    Ids ids;
    for (const std::string& literal : controls)
        if (const Ids found = t.encode_with_controls(literal); found.size() == 1)
            ids.push_back(found[0]);
    return ids;
}

int count_controls(const Tokenizer& t, const Ids& ids) {
    const Ids control = control_ids(t);
    return int(std::count_if(ids.begin(), ids.end(), [&](int id) {
        return std::find(control.begin(), control.end(), id) != control.end();
    }));
}

json chat_of(const json& content) { return {{{"role", "user"}, {"content", content}}}; }

// Strict check of UTF-8 by decoding it, which is not how the tokenizer does it.
bool is_utf8(const std::string& s) {
    for (size_t i = 0; i < s.size();) {
        const auto lead = uint8_t(s[i]);
        const size_t n = lead < 0x80 ? 1 : lead >> 5 == 6 ? 2 : lead >> 4 == 14 ? 3 : 4;
        if (lead >= 0x80 && lead >> 5 != 6 && lead >> 4 != 14 && lead >> 3 != 30) return false;
        if (i + n > s.size()) return false;
        uint32_t code = n == 1 ? lead : lead & (0x7F >> n);
        for (size_t k = 1; k < n; ++k) {
            if ((s[i + k] & 0xC0) != 0x80) return false;
            code = code << 6 | (s[i + k] & 0x3F);
        }
        const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
        if (code < least[n] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) return false;
        i += n;
    }
    return true;
}

// Pushes ids one by one: is every piece valid UTF-8 by itself, and all together equal to decode()?
bool streams_well(const Tokenizer& t, const Ids& ids) {
    Detokenizer stream(t);
    std::string all;
    bool valid = true;
    const auto take = [&](const std::string& piece) {
        valid = valid && is_utf8(piece);
        all += piece;
    };
    for (int id : ids) take(stream.push(id));
    take(stream.flush());
    return valid && all == t.decode(ids);
}

// Both vocabularies have byte pieces at the same ids.
int byte_id(uint8_t byte) { return 238 + byte; }

std::string decoded_bytes(const Tokenizer& t, const std::string& bytes) {
    Ids ids;
    for (char c : bytes) ids.push_back(byte_id(uint8_t(c)));
    CHECK(streams_well(t, ids));
    return t.decode(ids);
}

std::filesystem::path scratch_file(const std::string& content) {
    const auto file = std::filesystem::temp_directory_path() /
                      ("gemma-tokenizer-test-" + std::to_string(std::random_device{}()));
    std::ofstream(file, std::ios::binary) << content;
    return file;
}

// "" if the file loads and then works, else the message of its Error.
std::string complaint(const std::string& content) {
    const auto file = scratch_file(content);
    std::string message;
    try {
        const Tokenizer t(file.string());
        const Ids ids = t.encode("Cloud Run is a <end_of_turn>\n\n\u00e9\U0001F600");
        t.decode(ids);
        CHECK(count_controls(t, ids) == 0);
    } catch (const gemma::Error& e) {
        message = e.what();
        CHECK(message.find(file.string()) == 0);
    }
    std::filesystem::remove(file);
    return message;
}

std::string invalid(const Tokenizer& t, const json& messages) {
    try {
        t.chat(messages, Ending::generation_prompt);
    } catch (const std::invalid_argument& e) {
        return e.what();
    }
    return "";
}

}  // namespace

// [1] Golden ids ----------------------------------------------------------------------------------

TEST_CASE("raw prompts have the golden ids") {
    if (!gemma_vocabulary()) SKIP_BECAUSE(skip_reason);
    const Tokenizer& t = *gemma_vocabulary();
    int cases = 0, plain = 0, parsed = 0;
    for (const json& c : golden("tokenizer.jsonl")) {
        const auto text = c["text"].get<std::string>();
        CAPTURE(c["n"].get<int>(), text.substr(0, 100));
        const Ids ids = c["ids"].get<Ids>();
        // SentencePiece does not know the image's soft token; Hugging Face and our tokenizer do.
        const bool soft_token = text.find("<image_soft_token>") != text.npos;
        const Ids expected = soft_token ? c["hf_ids"].get<Ids>() : ids;
        CHECK(t.encode_with_controls(text) == expected);
        ++cases;
        parsed += soft_token;
        if (count_controls(t, ids) == 0) {
            CHECK(t.encode(text) == ids);
            ++plain;
        } else {
            CHECK(count_controls(t, t.encode(text)) == 0);
        }
        // Only U+2581 is not restored: it decodes to a space.
        if (count_controls(t, expected) == 0 && text.find("\u2581") == text.npos)
            CHECK(t.decode(expected) == text);
        CHECK(streams_well(t, expected));
    }
    std::printf(
        "tokenizer.jsonl: %d cases, %d of them without control ids, %d with the soft token\n",
        cases, plain, parsed);
    CHECK(plain > 90);
    CHECK(t.size() == 262144);
}

TEST_CASE("chat has the golden ids, except that text forges no turn") {
    if (!gemma_vocabulary()) SKIP_BECAUSE(skip_reason);
    const Tokenizer& t = *gemma_vocabulary();
    int ids = 0, errors = 0;
    for (const json& c : golden("chat.jsonl")) {
        const auto name = c["name"].get<std::string>();
        CAPTURE(name);
        const auto ending = c["add_generation_prompt"] ? Ending::generation_prompt : Ending::closed;
        if (c.contains("error")) {
            const std::string message = invalid(t, c["messages"]);
            if (name == "err_empty_list")
                CHECK(message.find("at least one") != message.npos);
            else
                CHECK("TemplateError: " + message == c["error"].get<std::string>());
            ++errors;
        } else if (name != "injection") {
            CHECK(t.chat(c["messages"], ending) == c["hf_ids"].get<Ids>());
            ++ids;
        } else {
            Ids expected{2, 105};
            const auto content = c["messages"][0]["content"].get<std::string>();
            for (int id : t.encode("user\n" + content)) expected.push_back(id);
            for (int id : {106, 107, 105, 4368, 107}) expected.push_back(id);
            CHECK(t.chat(c["messages"], ending) == expected);
            CHECK(t.decode(expected) == "user\n" + content + "\nmodel\n");
        }
    }
    std::printf("chat.jsonl: %d cases with ids, %d errors, 1 injection\n", ids, errors);
    CHECK(ids + errors == 14);
}

// [2] tokenizer.json ------------------------------------------------------------------------------

namespace {

// A piece of a SentencePiece file, whose types the library does not tell.
struct Piece {
    std::string name;
    float score = 0;
    int type = 1;  // normal; 2 unknown, 3 control, 4 user-defined, 6 byte
};

// The file begins with its pieces: 0A size (0A size name, 15 score, 18 type).
std::vector<Piece> pieces_of(const std::filesystem::path& file) {
    const std::string bytes = read_file(file);
    std::vector<Piece> pieces;
    for (size_t at = 0; bytes.at(at) == 0x0A;) {
        const size_t end = at + 2 + size_t(bytes.at(at + 1)), size = size_t(bytes.at(at + 3));
        REQUIRE(end - at < 130);  // sizes of one byte
        Piece p{bytes.substr(at + 4, size)};
        std::memcpy(&p.score, &bytes.at(at + 5 + size), 4);
        if (at + 9 + size < end) p.type = bytes.at(at + 10 + size);
        pieces.push_back(p);
        at = end;
    }
    return pieces;
}

// The tokenizer.json that transformers' converter makes of a SentencePiece file: a merge for each
// pair of pieces whose union is a piece, those with the higher score first.
json as_json(const std::filesystem::path& file) {
    const std::vector<Piece> pieces = pieces_of(file);
    std::map<std::string, size_t> ids;
    for (size_t id = 0; id < pieces.size(); id++) ids[pieces[id].name] = id;
    json vocabulary, tokens = json::array(), merges = json::array();
    std::vector<std::pair<float, json>> scored;
    for (size_t id = 0; id < pieces.size(); id++) {
        const auto& [name, score, type] = pieces[id];
        vocabulary[name] = id;
        for (size_t i = 1; i < name.size(); i++) {
            const std::string left = name.substr(0, i), right = name.substr(i);
            if (ids.count(left) && ids.count(right)) scored.emplace_back(-score, json{left, right});
        }
        const bool turn = name.ends_with("_of_turn>") || name.ends_with("_of_image>");
        if (type >= 2 && type <= 4)
            tokens.push_back({{"id", id},
                              {"content", name},
                              {"special", turn || type != 4},
                              {"normalized", false},
                              {"lstrip", false},
                              {"rstrip", false},
                              {"single_word", false}});
    }
    std::stable_sort(scored.begin(), scored.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    for (auto& [score, merge] : scored) merges.push_back(std::move(merge));
    json out = R"({"version": "1.0", "truncation": null, "padding": null,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "},
                          "behavior": "MergedWithPrevious", "invert": false},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "byte_fallback": true, "ignore_merges": false}})"_json;
    out["added_tokens"] = tokens;
    out["model"]["vocab"] = vocabulary;
    out["model"]["merges"] = merges;
    return out;
}

json added(int id, const std::string& content, bool special) {
    return {{"id", id}, {"content", content}, {"special", special}};
}

struct Folder {
    std::filesystem::path path = scratch_file("");
    Folder() {
        std::filesystem::remove(path);
        std::filesystem::create_directory(path);
    }
    ~Folder() { std::filesystem::remove_all(path); }
    // A tokenizer whose tokenizer.model is missing.
    Tokenizer load(const std::string& tokenizer_json) const {
        std::ofstream(path / "tokenizer.json", std::ios::binary) << tokenizer_json;
        return Tokenizer((path / "tokenizer.model").string());
    }
    std::string complaint(const std::string& tokenizer_json) const {
        try {
            load(tokenizer_json);
        } catch (const gemma::Error& e) {
            const std::string message = e.what();
            CHECK(message.find((path / "tokenizer.json").string() + ": ") == 0);
            CHECK(message.find('\n') == message.npos);
            CHECK(message.find(", expected ") != message.npos);
            return message;
        }
        return "";
    }
};

}  // namespace

TEST_CASE("D8: a tokenizer.json has the ids of the tokenizer.model that it was made of") {
    const Folder folder;
    std::map<std::string, std::filesystem::path> files{{"demo", demo_file}};
    if (gemma_vocabulary() && gemma_file.extension() == ".model") files["gemma"] = gemma_file;
    for (const auto& [name, file] : files) {
        CAPTURE(name);
        const Tokenizer& model = *vocabularies()[name];
        json source = as_json(file);
        // Gemma's own file has this token, of which tokenizer.model knows nothing.
        if (name == "gemma")
            source["added_tokens"].push_back(added(262144, "<image_soft_token>", true));
        const std::string bytes = source.dump(1);
        const double start = gemma::seconds();
        const Tokenizer t = folder.load(bytes);
        std::printf("%s: a tokenizer.json of %.1f MB, loaded in %.2f s\n", name.c_str(),
                    double(bytes.size()) / 1e6, gemma::seconds() - start);
        REQUIRE(t.size() == model.size());
        for (int id = 0; id < t.size(); id++)
            if (t.bytes(id) != model.bytes(id) || t.name(id) != model.name(id)) FAIL("id " << id);
        int cases = 0;
        for (const json& c : golden("tokenizer.jsonl")) {
            const auto text = c["text"].get<std::string>();
            CAPTURE(c["n"].get<int>());
            CHECK(t.encode(text) == model.encode(text));
            CHECK(t.encode_with_controls(text) == model.encode_with_controls(text));
            ++cases;
        }
        for (const json& c : golden("chat.jsonl")) {
            if (c.contains("error") ||
                (name == "demo" && c.dump().find("image") != std::string::npos))
                continue;
            CHECK(t.chat(c["messages"], Ending::closed) ==
                  model.chat(c["messages"], Ending::closed));
            ++cases;
        }
        std::mt19937 random(13);
        for (int i = 0; i < 500; ++i, ++cases) {  // texts of random pieces
            std::string text;
            for (int k = 0; k < 20; ++k) text += model.bytes(int(random() % unsigned(t.size())));
            CHECK(t.encode(text) == model.encode(text));
        }
        std::printf("%s: %d texts have equal ids by tokenizer.json\n", name.c_str(), cases);
    }
}

TEST_CASE("D8: beside a tokenizer.model, tokenizer.json is read only for added tokens") {
    const Folder folder;
    const auto add = [&](const char* tokens) {
        std::ofstream(folder.path / "added_tokens.json") << tokens;
    };
    std::filesystem::copy(demo_file, folder.path / "tokenizer.model");
    CHECK(folder.load("not read").size() == 2048);
    add(R"({"<image_soft_token>": 2048})");  // as Gemma's own directory has it
    CHECK(folder.load("not read").size() == 2048);
    add(R"({"<image_soft_token>": 2048, "<mine>": 2049})");
    CHECK(folder.complaint("not read") != "");
    json source = as_json(demo_file);
    source["added_tokens"].push_back(added(2048, "<image_soft_token>", true));
    source["added_tokens"].push_back(added(2049, "<mine>", true));
    CHECK(folder.load(source.dump()).encode_with_controls("<mine>") == Ids{2049});
    std::filesystem::remove(folder.path / "tokenizer.json");
    CHECK(Tokenizer((folder.path / "tokenizer.model").string()).size() == 2048);
}

TEST_CASE("D8: a finetune's added tokens have ids, and special ones match in raw prompts only") {
    const Folder folder;
    json source = as_json(demo_file);
    auto& tokens = source["added_tokens"];
    tokens.push_back(added(2048, "<image_soft_token>", true));
    tokens.push_back(added(2049, "[TOOL]", true));
    tokens.push_back(added(2050, "my token", false));
    const Tokenizer t = folder.load(source.dump());
    CHECK(t.size() == 2051);
    CHECK(t.name(2049) == "[TOOL]");
    CHECK(t.bytes(2049) == "");
    CHECK(t.bytes(2050) == "my token");
    Ids expected = t.encode("a");
    expected.insert(expected.end(), {2049, 2050, 106});
    CHECK(t.encode_with_controls("a[TOOL]my token<end_of_turn>") == expected);
    CHECK(count_controls(t, t.encode("[TOOL]")) == 0);
    for (const int id : t.encode("[TOOL]")) CHECK(id < 2048);
    CHECK(t.encode("my token") == Ids{2050});
    CHECK(t.decode(t.encode("a [TOOL] my token.")) == "a [TOOL] my token.");
    // Old files write a merge as one string.
    for (json& merge : source["model"]["merges"])
        merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
    CHECK(folder.load(source.dump()).encode("my own text, a[TOOL]") ==
          t.encode("my own text, a[TOOL]"));
}

TEST_CASE("D8: a tokenizer.json that SentencePiece would not follow is refused in one line") {
    const Folder folder;
    const json good = as_json(demo_file);
    REQUIRE(folder.complaint(good.dump()) == "");
    const auto refused = [&](const char* patch, const std::vector<const char*>& parts) {
        const std::string message = folder.complaint(good.patch(json::parse(patch)).dump());
        CAPTURE(patch, message);
        for (const char* part : parts) CHECK(message.find(part) != message.npos);
    };
    refused(R"([{"op": "replace", "path": "/model/type", "value": "Unigram"}])",
            {"model/type: found \"Unigram\"", "BPE"});
    refused(R"([{"op": "replace", "path": "/model/byte_fallback", "value": false}])",
            {"model/byte_fallback: found false"});
    refused(R"([{"op": "replace", "path": "/model/ignore_merges", "value": true}])",
            {"model/ignore_merges: found true"});
    refused(R"([{"op": "replace", "path": "/normalizer", "value": {"type": "NFKC"}}])",
            {"normalizer: found ", "NFKC"});
    refused(R"([{"op": "replace", "path": "/pre_tokenizer", "value": {"type": "ByteLevel"}}])",
            {"pre_tokenizer: found ", "ByteLevel"});
    refused(R"([{"op": "remove", "path": "/decoder"}])", {"decoder: found null"});
    refused(R"([{"op": "replace", "path": "/model", "value": 5}])", {"model/type: found null"});
    refused(R"([{"op": "remove", "path": "/model/merges/0"}])",
            {"model.merges: found no [", "each pair"});
    refused(R"([{"op": "add", "path": "/model/merges/0", "value": ["<pad>", "<eos>"]}])",
            {"model.merges: [\"<pad>\",\"<eos>\"]", "no piece \"<pad><eos>\""});
    refused(R"([{"op": "copy", "path": "/model/merges/1", "from": "/model/merges/0"}])",
            {"model.merges: found [", "once"});
    for (const char* no_pair :
         {"5", "[\"a\"]", "[\"a\", 5]", "[[\"a\"], \"b\"]", "[\"a\", \"b\", \"c\"]", "{}", "null",
          "\"\"", "\"ab\"", "[]", "[\"\", \"\"]"}) {
        const std::string patch =
            std::string(R"([{"op": "add", "path": "/model/merges/2", "value": )") + no_pair + "}]";
        refused(patch.c_str(), {"model.merges"});
    }
    for (const char* no_id : {"-1", "1.5", "\"1\"", "[1]", "{}", "null", "524288"}) {
        const std::string patch =
            std::string(R"([{"op": "add", "path": "/model/vocab/zzz", "value": )") + no_id + "}]";
        refused(patch.c_str(), {"model.vocab: \"zzz\": found ", "an id below 524288"});
    }
    refused(R"([{"op": "add", "path": "/model/vocab/zzz", "value": 7}])",
            {"id 7: found ", "\"zzz\""});
    refused(R"([{"op": "add", "path": "/model/vocab/zzz", "value": 2050}])",
            {"no piece of id 2048"});
    refused(
        R"([{"op": "add", "path": "/added_tokens/-", "value": {"id": 2048, "content": "<pad>"}}])",
        {"added_tokens", "the vocabulary's id 0"});
    refused(R"([{"op": "add", "path": "/added_tokens/-",
                 "value": {"id": 2048, "content": "x", "lstrip": true}}])",
            {"lstrip"});
    refused(R"([{"op": "add", "path": "/added_tokens/-", "value": 5}])", {"added_tokens: 5"});
    refused(R"([{"op": "replace", "path": "/added_tokens", "value": []}])", {"unk is not defined"});
    // The ranks of a piece's merges stand side by side.
    json apart = good;
    auto& merges = apart["model"]["merges"];
    for (size_t i = merges.size() - 1; i > 0; i--) {
        const auto piece = [&](size_t at) {
            return merges[at][0].get<std::string>() + merges[at][1].get<std::string>();
        };
        if (piece(i) != piece(i - 1) || piece(i) == piece(0)) continue;
        std::swap(merges[0], merges[i]);
        break;
    }
    CHECK(folder.complaint(apart.dump()).find("side by side") != std::string::npos);
    // F7, D12: nothing may follow it.
    const std::string bytes = good.dump();
    for (const std::string& end : {std::string("\0x", 2), std::string(1, '\0'), std::string("x")})
        CHECK(folder.complaint(bytes + end).find("a JSON object") != std::string::npos);
    CHECK(folder.complaint("").find("0 bytes") != std::string::npos);
    CHECK(folder.complaint("[]").find("a JSON object") != std::string::npos);
    CHECK(folder.complaint("{}").find("model/type") != std::string::npos);
    CHECK(folder.complaint("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
              .find("Git LFS pointer") != std::string::npos);
    std::mt19937 random(17);
    int loaded = 0, cases = 0;
    for (; cases < 100; ++cases) {  // damaged: refused or loaded, and never a crash
        std::string damaged = bytes;
        if (cases % 2)
            damaged.resize(random() % damaged.size());
        else
            damaged[random() % damaged.size()] ^= char(1 << random() % 8);
        loaded += folder.complaint(damaged).empty();
    }
    std::printf("damaged tokenizer.json: %d of %d loaded\n", loaded, cases);
    CHECK(loaded < 50);
}

// [3] Control ids ---------------------------------------------------------------------------------

TEST_CASE("control text in content stays text") {
    for (const auto& [name, tokenizer] : vocabularies()) {
        CAPTURE(name);
        const Tokenizer& t = *tokenizer;
        CHECK(control_ids(t).size() == (name == "demo" ? 6 : 9));
        const int frame = count_controls(t, t.chat(chat_of("Hi"), Ending::generation_prompt));
        CHECK(frame == 4);  // <bos>, two <start_of_turn>, one <end_of_turn>
        std::vector<std::string> texts = controls;
        std::mt19937 random(7);
        for (int i = 0; i < 300; ++i) {  // literals and pieces of literals, joined
            std::string mix;
            for (int k = 0; k < 12; ++k) {
                const std::string& literal = controls[random() % controls.size()];
                const char* const glue[] = {"", " ", "\n", "<", "model\n", "\u2581", "a>"};
                const size_t at = random() % literal.size();
                mix += random() % 4 ? literal : literal.substr(0, at) + literal.substr(at);
                mix += glue[random() % std::size(glue)];
            }
            texts.push_back(mix);
        }
        for (const std::string& content : texts) {
            CAPTURE(content);
            const json part = {{"type", "text"}, {"text", content}};
            const json half = {{"type", "text"}, {"text", content.substr(0, content.size() / 2)}};
            const json rest = {{"type", "text"}, {"text", content.substr(content.size() / 2)}};
            const json system = {{"role", "system"}, {"content", content}};
            CHECK(count_controls(t, t.encode(content)) == 0);
            CHECK(count_controls(t, t.chat(chat_of(content), Ending::generation_prompt)) == frame);
            CHECK(count_controls(
                      t, t.chat(chat_of(json::array({part})), Ending::generation_prompt)) == frame);
            if (content.find("\u2581") == content.npos)
                CHECK(count_controls(t, t.chat(chat_of(json::array({half, rest})),
                                               Ending::generation_prompt)) == frame);
            json messages = chat_of("Hi");
            messages.insert(messages.begin(), system);
            CHECK(count_controls(t, t.chat(messages, Ending::generation_prompt)) == frame);
            messages = chat_of("Hi");
            messages.push_back({{"role", content}, {"content", "x"}});
            CHECK(count_controls(t, t.chat(messages, Ending::generation_prompt)) == frame + 2);
        }
    }
}

TEST_CASE("a raw prompt's literals become ids, the text between them stays text") {
    for (const auto& [name, tokenizer] : vocabularies()) {
        CAPTURE(name);
        const Tokenizer& t = *tokenizer;
        CHECK(t.encode_with_controls("<pad><eos><bos><unk>") == Ids{0, 1, 2, 3});
        CHECK(t.encode_with_controls("<start_of_turn><end_of_turn>") == Ids{105, 106});
        Ids expected = t.encode("a <");
        expected.push_back(2);
        for (int id : t.encode("> \n\n")) expected.push_back(id);
        expected.push_back(106);
        CHECK(t.encode_with_controls("a <<bos>> \n\n<end_of_turn>") == expected);
        CHECK(t.encode_with_controls("<bos") == t.encode("<bos"));
        CHECK(t.encode_with_controls("") == Ids{});
        for (int id : control_ids(t)) CHECK(t.bytes(id).empty());
        CHECK(t.name(106) == "<end_of_turn>");
        CHECK(t.name(byte_id(0xE2)) == "<0xE2>");
        CHECK(t.name(-1).empty());
        CHECK(t.name(t.size()).empty());
        CHECK(t.decode({2, 105, 106, 0, 3}) == "");
        CHECK(t.decode({2, 105, 106, 0, 3}, true) == "<bos><start_of_turn><end_of_turn><pad><unk>");
        for (int id : {-1, t.size(), t.size() + 1, 1 << 30}) CHECK(t.bytes(id).empty());
    }
}

TEST_CASE("row 36: control words of other families are text, with SentencePiece's own ids") {
    std::map<std::string, std::filesystem::path> files{{"demo", demo_file}};
    if (gemma_vocabulary() && gemma_file.extension() == ".model") files["gemma"] = gemma_file;
    for (const auto& [name, file] : files) {
        sentencepiece::SentencePieceProcessor library;
        REQUIRE(library.Load(file.string()).ok());
        const Tokenizer& t = *vocabularies().at(name);
        CHECK(library.PieceToId("[toxicity=0]") == library.unk_id());
        for (const char* words : {"[toxicity=0]", "Hi [toxicity=0] there", "[INST] Hi [/INST]",
                                  "<|im_start|>user\nHi<|im_end|>", "<s>Hi</s>", "<|endoftext|>"}) {
            CAPTURE(name, words);
            const Ids ids = library.EncodeAsIds(words);
            CHECK(t.encode(words) == ids);
            CHECK(t.encode_with_controls(words) == ids);
            CHECK(t.decode(ids) == words);
        }
    }
}

// [4] Chat ----------------------------------------------------------------------------------------

TEST_CASE("chat's frame") {
    for (const auto& [name, tokenizer] : vocabularies()) {
        CAPTURE(name);
        const Tokenizer& t = *tokenizer;
        const auto turn = [&](const std::string& text, bool generate = false) {
            Ids ids{2, 105};
            for (int id : t.encode("user\n" + text)) ids.push_back(id);
            ids.push_back(106);
            for (int id : t.encode("\n")) ids.push_back(id);
            if (generate) ids.push_back(105);
            if (generate)
                for (int id : t.encode("model\n")) ids.push_back(id);
            return ids;
        };
        CHECK(t.chat(chat_of("Hi"), Ending::closed) == turn("Hi"));
        CHECK(t.chat(chat_of("Hi"), Ending::generation_prompt) == turn("Hi", true));
        CHECK(t.chat(chat_of(" \n\t\v\f\r\x1c\x1d\x1e\x1f\u0085\u00a0\u1680\u2000\u200a\u2028\u2029"
                             "\u202f\u205f\u3000Hi you\u3000\u00a0\u0085 "),
                     Ending::generation_prompt) == turn("Hi you", true));
        CHECK(t.chat(chat_of("\u200bHi\ufeff"), Ending::closed) ==
              turn("\u200bHi\ufeff"));  // not stripped: not white space
        CHECK(t.chat(chat_of(" \u3000 "), Ending::closed) == turn(""));
        CHECK(t.chat(chat_of(json::array()), Ending::closed) == turn(""));
        // Of a system message's list only the first part is used, and it is not stripped; the turn
        // is.
        const json parts = {{{"type", "text"}, {"text", " a "}}, {{"type", "text"}, {"text", "b"}}};
        CHECK(t.chat({{{"role", "system"}, {"content", parts}},
                      {{"role", "user"}, {"content", " Hi"}}},
                     Ending::closed) == turn(" a \n\nHi"));
        CHECK(t.chat(chat_of(parts), Ending::closed) == turn("ab"));
        // Ending::open leaves out the end of the last message, and of no other.
        for (const char* text : {"Hi", " Hi ", ""}) {
            const json one = chat_of(text);
            Ids whole = t.chat(one, Ending::closed);
            const Ids open = t.chat(one, Ending::open), end = t.encode("\n");
            whole.resize(whole.size() - 1 - end.size());  // <end_of_turn>, new line
            CHECK(open == whole);
            CHECK(std::count(open.begin(), open.end(), 106) == 0);
        }
        const json two = {{{"role", "user"}, {"content", "Hi"}},
                          {{"role", "assistant"}, {"content", "A token is"}}};
        const Ids open = t.chat(two, Ending::open);
        CHECK(std::count(open.begin(), open.end(), 106) == 1);
        CHECK(std::count(open.begin(), open.end(), 105) == 2);
    }
}

TEST_CASE("chat refuses wrong messages with the reason") {
    for (const auto& [name, tokenizer] : vocabularies()) {
        CAPTURE(name);
        const Tokenizer& t = *tokenizer;
        const std::string alternate =
            "Conversation roles must alternate user/assistant/user/assistant/...";
        const json user = {{"role", "user"}, {"content", "x"}};
        const auto with_role = [&](const char* role) {
            return json{{"role", role}, {"content", "x"}};
        };
        CHECK(invalid(t, {user, user}) == alternate);
        CHECK(invalid(t, json::array({with_role("assistant")})) == alternate);
        CHECK(invalid(t, {user, with_role("assistant"), with_role("system")}) == alternate);
        CHECK(invalid(t, {user, with_role("tool")}) == "");  // as in the template
        CHECK(invalid(t, json::array()) == "messages must be a list of at least one message");
        CHECK(invalid(t, "text") == "messages must be a list of at least one message");
        CHECK(invalid(t, nullptr) == "messages must be a list of at least one message");
        for (const json& content : {json(), json(5), json(true), json::object()})
            CHECK(invalid(t, chat_of(content)) == "Invalid content type");
        CHECK(invalid(t, {{{"role", "user"}}}) == "Invalid content type");
        CHECK(invalid(t, {{{"content", "x"}}}).find("messages[0]: role") == 0);
        CHECK(invalid(t, {{{"role", 5}, {"content", "x"}}}).find("messages[0]: role") == 0);
        CHECK(invalid(t, {user, 7}).find("messages[1]: role") == 0);
        CHECK(invalid(t, chat_of(json::array({5}))).find("messages[0].content: type") == 0);
        CHECK(invalid(t, chat_of({{{"type", "text"}}})).find("messages[0].content: text") == 0);
        for (const json& content : {json(), json(5), json::array(), json{{{"type", "image"}}}})
            CHECK(invalid(t, {{{"role", "system"}, {"content", content}}, user}) != "");
        if (name == "demo")
            CHECK(invalid(t, chat_of({{{"type", "image"}}})).find("no images") !=
                  std::string::npos);
    }
}

TEST_CASE("an image's newlines fuse with their neighbours") {
    if (!gemma_vocabulary()) SKIP_BECAUSE(skip_reason);
    const Tokenizer& t = *gemma_vocabulary();
    const json image = {{"type", "image"}}, text = {{"type", "text"}, {"text", "x"}};
    const Ids ids = t.chat(chat_of({text, image, image}), Ending::closed);
    CHECK(std::count(ids.begin(), ids.end(), 262144) == 512);
    // "\n\n" after one image and "\n\n" before the next fuse.
    CHECK(std::count(ids.begin(), ids.end(), 110) == 1);
    CHECK(Ids(ids.end() - 4, ids.end()) == Ids{256000, 108, 106, 107});
}

// [5] Streamed text -------------------------------------------------------------------------------

TEST_CASE("invalid UTF-8 becomes U+FFFD, one for each maximal subpart") {
    for (const auto& [name, tokenizer] : vocabularies()) {
        CAPTURE(name);
        const auto decoded = [&, t = tokenizer](const std::string& s) {
            return decoded_bytes(*t, s);
        };
        const std::string bad = "\uFFFD";
        for (const char* whole : {"a", "\u0080", "\u07ff", "\u0800", "\ud7ff", "\ue000", "\uffff",
                                  "\U00010000", "\U0010ffff", "\u20ac\U0001F600z"})
            CHECK(decoded(whole) == whole);
        CHECK(decoded("\x80") == bad);
        CHECK(decoded("\xff\xfe") == bad + bad);
        CHECK(decoded("\xc0\x80") == bad + bad);                      // overlong
        CHECK(decoded("\xe0\x9f\xbf") == bad + bad + bad);            // overlong
        CHECK(decoded("\xf0\x8f\xbf\xbf") == bad + bad + bad + bad);  // overlong
        CHECK(decoded("\xed\xa0\x80") == bad + bad + bad);            // surrogate
        CHECK(decoded("\xf4\x90\x80\x80") == bad + bad + bad + bad);  // above U+10FFFF
        CHECK(decoded("\xf5") == bad);
        CHECK(decoded("\xe2\x82") == bad);         // cut off by the end
        CHECK(decoded("\xf0\x9f\x98") == bad);     // cut off by the end
        CHECK(decoded("\xe2\x82z") == bad + "z");  // cut off by another character
        CHECK(decoded("\xe2\xe2\x82\xac") == bad + "\u20ac");
        CHECK(decoded("\xf0\x9f\xc3\xa9") == bad + "\u00e9");
        CHECK(decoded("\xe2\x82\xac\xff") == "\u20ac" + bad);
    }
}

TEST_CASE("a character is held back until it is whole") {
    for (const auto& [name, tokenizer] : vocabularies()) {
        CAPTURE(name);
        Detokenizer stream(*tokenizer);
        CHECK(stream.push(byte_id(0xF0)) == "");
        CHECK(stream.push(byte_id(0x9F)) == "");
        CHECK(stream.push(106) == "");  // a control id adds no text
        CHECK(stream.push(byte_id(0x98)) == "");
        CHECK(stream.push(byte_id(0x80)) == "\U0001F600");
        CHECK(stream.flush() == "");
        CHECK(stream.push(byte_id(0xF0)) == "");
        CHECK(stream.flush() == "\uFFFD");
        CHECK(stream.flush() == "");
        CHECK(stream.push(byte_id('a')) == "a");
    }
}

TEST_CASE("random ids stream as they decode, valid at every push") {
    for (const auto& [name, tokenizer] : vocabularies()) {
        const Tokenizer& t = *tokenizer;
        std::mt19937 random(11);
        int bad = 0, ids_pushed = 0;
        for (int sequence = 0; sequence < 5000; ++sequence) {
            Ids ids;
            for (int i = 0; i < 20; ++i)  // half are byte pieces, mostly of bytes above ASCII
                ids.push_back(random() % 2
                                  ? int(random() % unsigned(t.size() + 10)) - 5
                                  : byte_id(uint8_t(random() % 8 ? random() | 0x80 : random())));
            bad += !streams_well(t, ids);
            ids_pushed += int(ids.size());
        }
        std::printf("%s: %d random ids streamed\n", name.c_str(), ids_pushed);
        CHECK(bad == 0);
    }
}

TEST_CASE("text comes back") {
    for (const auto& [name, tokenizer] : vocabularies()) {
        const Tokenizer& t = *tokenizer;
        int cases = 0;
        for (const json& c : golden("tokenizer.jsonl")) {
            const auto text = c["text"].get<std::string>();
            CAPTURE(name, text.substr(0, 100));
            const Ids ids = t.encode(text);
            if (text.find("\u2581") == text.npos) CHECK(t.decode(ids) == text);
            CHECK(count_controls(t, ids) == 0);
            CHECK(streams_well(t, ids));
            ++cases;
        }
        std::printf("%s: %d texts encoded and decoded\n", name.c_str(), cases);
    }
}

TEST_CASE("rows 35 and 37: long white space and odd characters come back") {
    const std::string texts[]{
        std::string(64, ' ') + "x",
        "x" + std::string(128, ' '),
        std::string(64, '\n'),
        std::string(40, '\t') + "x",
        "\U0001F468\u200d\U0001F469\u200d\U0001F467\u200d\U0001F466",  // a family, joined
        "\U0001F1FB\U0001F1F3\U0001F1E9\U0001F1EA",                    // two flags
        "1\ufe0f\u20e3 \U0001F44D\U0001F3FD",                          // a keycap, a skin tone
        "e\u0301 a\u0302\u0323",                                       // NFD
        "\u1112\u1161\u11ab\u1100\u1173\u11af",                        // jamo
        "\ufffe\uffff\U0010ffff\ufeff",
        std::string("a\0b\0", 4),
        "a\x7f\x1b\u0080",
    };
    for (const auto& [name, tokenizer] : vocabularies()) {
        const Tokenizer& t = *tokenizer;
        for (const std::string& text : texts) {
            CAPTURE(name, text);
            const Ids ids = t.encode(text);
            CHECK(t.decode(ids) == text);
            CHECK(streams_well(t, ids));
            CHECK(t.decode(t.chat(chat_of("<" + text + ">"), Ending::closed)) ==
                  "user\n<" + text + ">\n");
        }
        CHECK(t.decode(t.encode("a\u2581b")) == "a b");  // a space's own mark, as for Hugging Face
    }
}

// [6] Size, threads, bad files --------------------------------------------------------------------

TEST_CASE("a megabyte of anything is encoded") {
    std::mt19937 random(3);
    std::string noise;
    while (noise.size() < 1 << 20) noise += char('a' + random() % 26);
    for (const auto& [name, tokenizer] : vocabularies())
        for (const std::string unit :
             {"a", " ", "\n", "\U0001F600", "<", "hello ", "\u2581", "\x01", noise.c_str()}) {
            std::string text;
            while (text.size() < 1 << 20) text += unit;
            const auto start = std::chrono::steady_clock::now();
            const Ids ids = tokenizer->encode(text);
            const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
            std::printf("%s: 1 MB of %-8s %7zu ids, %.2f s\n", name.c_str(),
                        json(unit.substr(0, 6)).dump().c_str(), ids.size(), seconds.count());
            CHECK(!ids.empty());
            if (unit != "\u2581") CHECK(tokenizer->decode(ids) == text);
        }
}

// The ids must be those of the whole text, wherever it was divided.
TEST_CASE("long text is encoded in parts, as if it were encoded at once") {
    std::vector<std::string> texts{"\u2581", " ", "  ", "\n", "\n\n", ">", "</", "> </", "\t"};
    for (const json& c : golden("tokenizer.jsonl")) texts.push_back(c["text"]);
    std::mt19937 random(5);
    for (const auto& [name, tokenizer] : vocabularies()) {
        sentencepiece::SentencePieceProcessor whole;
        REQUIRE(whole.Load((name == "demo" ? demo_file : gemma_file).string()).ok());
        int parts = 0;
        for (int round = 0; round < 40; ++round) {
            std::string text;
            while (text.size() < 24 << 10) {
                const std::string& next = texts[random() % texts.size()];
                // This tokenizer alone takes what names a control id for text.
                if (next.find('<') == next.npos || next == "</" || next == "> </") text += next;
            }
            const auto count = [&](size_t) { ++parts; };
            CAPTURE(name, round);
            std::vector<int> expected;
            REQUIRE(whole.Encode(text, &expected).ok());
            CHECK(tokenizer->encode_with_controls(text, count) == expected);
        }
        CHECK(parts > 40 * 3);
        std::string prose;
        while (prose.size() < 1 << 20) prose += "Cloud Run is a service that runs containers. ";
        const auto start = std::chrono::steady_clock::now();
        const Ids in_parts = tokenizer->encode(prose);
        const auto between = std::chrono::steady_clock::now();
        const Ids at_once = whole.EncodeAsIds(prose);
        const std::chrono::duration<double> first = between - start,
                                            second = std::chrono::steady_clock::now() - between;
        CHECK(in_parts == at_once);
        std::printf("%s: 40 texts in %d parts; 1 MB of prose: %.2f s in parts, %.2f s at once\n",
                    name.c_str(), parts, first.count(), second.count());
    }
}

TEST_CASE("F12: encoding ends with what its check throws, and the check knows the least ids") {
    struct Enough {};
    std::string text;
    while (text.size() < 64 << 10) text += "the whole of it ";
    for (const auto& [name, tokenizer] : vocabularies()) {
        CAPTURE(name);
        const Tokenizer& t = *tokenizer;
        size_t calls = 0, fewest = 0;
        const auto third = [&](size_t least) {
            fewest = least;
            if (++calls == 3) throw Enough{};
        };
        CHECK_THROWS_AS(t.encode_with_controls(text, third), Enough);
        CHECK(calls == 3);
        CHECK(fewest > 1000);
        CHECK(fewest <= t.encode(text).size());
        calls = 0;
        CHECK_THROWS_AS(t.chat(chat_of(text), Ending::closed, third), Enough);
        // The longest piece, many times over, is the fewest ids that so many bytes can have.
        size_t longest = 0;
        for (int id = 0; id < t.size(); ++id) longest = std::max(longest, t.bytes(id).size());
        for (int id = 0; id < t.size(); ++id) {
            const std::string piece(t.bytes(id));
            if (piece.size() < longest) continue;
            std::string many;
            for (int i = 0; i < 100; ++i) many += piece + (i % 2 ? "a" : "b");
            const auto check = [&](size_t least) { fewest = least; };
            CHECK(t.encode_with_controls(many, check).size() == 200);
            CHECK(fewest == (many.size() + longest - 1) / longest);
            break;
        }
        // What the template trims is no text.
        const auto check = [&](size_t least) { fewest = least; };
        const size_t count =
            t.chat(chat_of(text + std::string(1 << 20, ' ')), Ending::closed, check).size();
        CHECK(fewest <= count);
    }
}

TEST_CASE("threads share a tokenizer") {
    std::vector<std::string> texts;
    for (const json& c : golden("tokenizer.jsonl")) texts.push_back(c["text"]);
    for (const auto& [name, tokenizer] : vocabularies()) {
        CAPTURE(name);
        const auto work = [&texts, t = tokenizer](std::vector<Ids>& out) {
            for (const std::string& text : texts) {
                out.push_back(t->encode(text));
                out.push_back(t->encode_with_controls(text));
                out.push_back(t->chat(chat_of(text), Ending::generation_prompt));
            }
        };
        std::vector<Ids> alone;
        work(alone);
        std::vector<std::vector<Ids>> together(4);
        std::vector<std::thread> threads;
        for (auto& out : together) threads.emplace_back(work, std::ref(out));
        for (std::thread& thread : threads) thread.join();
        for (const auto& out : together) CHECK(out == alone);
    }
}

TEST_CASE("a file that is not a tokenizer of Gemma's family is refused in one line") {
    const auto contains = [](const std::string& s, const char* part) {
        return s.find(part) != s.npos;
    };
    const std::string demo = read_file(demo_file);
    const auto edited = [&](const std::string& from, const std::string& to) {
        std::string model = demo;
        const size_t at = model.find(from);
        REQUIRE(at != model.npos);
        return complaint(model.replace(at, from.size(), to));
    };
    CHECK(complaint(demo) == "");
    CHECK(contains(complaint(""), "found 0 bytes"));
    CHECK(contains(complaint("no model"), "no SentencePiece model"));
    CHECK(contains(complaint("version https://git-lfs.github.com/spec/v1\n"),
                   "found a Git LFS pointer"));
    CHECK(contains(edited("<bos>", "<bot>"), "no piece <bos>"));
    CHECK(contains(edited("<end_of_turn>", "<end_of_torn>"), "no piece <end_of_turn>"));
    std::string swapped = demo;  // <pad> and <eos> swapped
    swapped.replace(swapped.find("<pad>"), 5, "<xxx>").replace(swapped.find("<eos>"), 5, "<pad>");
    CHECK(contains(complaint(swapped.replace(swapped.find("<xxx>"), 5, "<eos>")), "<pad> at id 1"));
    // normalizer_spec ends the file: add_dummy_prefix (18), remove_extra_whitespaces (20), both off
    CHECK(contains(edited(std::string("\x18\0\x20\0", 4), std::string("\x18\1\x20\0", 4)),
                   "changed"));
    CHECK(contains(edited(std::string("\x18\0\x20\0", 4), std::string("\x18\0\x20\1", 4)),
                   "changed"));

    const auto message_for = [](const std::string& file) -> std::string {
        try {
            Tokenizer t(file);
        } catch (const gemma::Error& e) {
            return e.what();
        }
        return "";
    };
    CHECK(contains(message_for("/nowhere/tokenizer.model"),
                   "/nowhere/tokenizer.model: found no such file, expected it, or tokenizer.json"));
    CHECK(contains(message_for(repository.string()), "no regular file"));
    CHECK(contains(message_for("/dev/zero"), "no regular file"));
    const auto sparse = scratch_file("");
    std::filesystem::resize_file(sparse, 1ull << 40);  // 1 TiB, all of it a hole
    CHECK(contains(message_for(sparse.string()), "at most 64 MiB"));
    std::filesystem::remove(sparse);
}

TEST_CASE("damaged files are refused or load, and never crash") {
    const std::string demo = read_file(demo_file);
    std::mt19937 random(5);
    int loaded = 0, refused = 0;
    const auto count = [&](const std::string& content) {
        ++(complaint(content).empty() ? loaded : refused);
    };
    for (int i = 0; i < 150; ++i) count(demo.substr(0, random() % demo.size()));
    CHECK(loaded < 150);
    for (int i = 0; i < 700; ++i) {  // half of the flips hit the head, which has the control pieces
        std::string flipped = demo;
        const size_t bytes = i % 2 ? demo.size() : std::min<size_t>(demo.size(), 3000);
        flipped[random() % bytes] ^= char(1 << random() % 8);
        count(flipped);
    }
    std::printf("damaged files: %d refused, %d loaded\n", refused, loaded);
    CHECK(refused > 100);
}
