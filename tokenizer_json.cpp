// SPDX-License-Identifier: Apache-2.0
//
// tokenizer_json.cpp: makes a SentencePiece model of a tokenizer.json, for checkpoints without a
// tokenizer.model, which transformers 5 does not save, or with added tokens. Beside the path.
//
// Hugging Face's BPE merges the pair with the lowest rank, SentencePiece the pair whose union is
// the piece with the highest score. Both give the same ids if every pair whose union is a piece is
// a merge, and the merges into one piece have ranks side by side: minus a rank is then the score.
// Gemma's file is so. A file that is not, or asks for what SentencePiece does not do, is rejected.
#include "file.h"
#include "gemma.h"
#include "tokenizer.h"

#include <algorithm>
#include <unordered_map>

namespace gemma {

namespace {

using std::string_view;
using Event = json::parse_event_t;

constexpr size_t most_bytes = 128 << 20;  // Gemma's has 33 MB
constexpr int most_ids = 1 << 19;         // as vocab_size in config.json
constexpr const char* soft_token = "<image_soft_token>";

enum Type : char { normal = 1, unknown, control, user_defined, byte = 6 };  // SentencePiece's

struct Piece {
    std::string name;
    float score = 0;
    Type type = normal;
};

struct Hash {
    using is_transparent = void;  // so that a string_view is looked up without a copy
    size_t operator()(string_view s) const { return std::hash<string_view>()(s); }
};

// A tokenizer.json while it is read and checked.
struct Source {
    const std::string path;
    std::vector<Piece> pieces;  // by id
    std::unordered_map<std::string, int, Hash, std::equal_to<>> vocabulary;
    std::vector<std::pair<std::string, std::string>> merges;  // by rank
    std::vector<std::pair<int, size_t>> unions;  // [merges] id, and the bytes of the left piece

    void place(const std::string& name, int id, Type type);
    bool take_merge(int depth, Event event, const json& value);
    json read();
    void check_algorithm(const json& file) const;
    void add_tokens(const json& tokens);
    int id_of(string_view name) const;
    void score_pieces();
    void check_merges();
};

void Source::place(const std::string& name, int id, Type type) {
    if (name.empty()) reject(path + text(": id %d", id), "\"\"", "a piece");
    if (size_t(id) >= pieces.size()) pieces.resize(size_t(id) + 1);
    Piece& piece = pieces[size_t(id)];
    if (!piece.name.empty() && piece.name != name)
        reject(path + text(": id %d", id), brief(piece.name) + " and " + brief(name), "one piece");
    piece.name = name;
    piece.type = type;
}

// A merge is "a b" or, since tokenizers 0.20, ["a", "b"].
bool Source::take_merge(int depth, Event event, const json& value) {
    if (depth == 3 && event == Event::array_start) {
        merges.emplace_back();
        return true;
    }
    const bool is_text = event == Event::value && value.is_string();
    std::string word = is_text ? value.get<std::string>() : "";
    if (depth == 3 && is_text) {
        const size_t space = std::min(word.find(' '), word.size());
        merges.emplace_back(word.substr(0, space), word.substr(std::min(space + 1, word.size())));
    } else if (depth == 4 && is_text && merges.back().second.empty()) {
        auto& [left, right] = merges.back();
        (left.empty() ? left : right) = std::move(word);
    } else if (depth != 3 || event != Event::array_end) {
        reject(path + ": model.merges", "at " + std::to_string(merges.size()) + " no pair", "one");
    }
    return false;
}

// Returns the file without its vocabulary and merges, which as JSON values would take 300 MB.
json Source::read() {
    std::string section, part, name;  // the last keys at depths 1, 2 and 3
    const File file(path);
    if (file.bytes.size() > most_bytes)
        reject(path, text("%zu bytes", file.bytes.size()), text("at most %zu", most_bytes));
    return parse_json(path, file.bytes, 1 << 23, [&](int depth, Event event, json& value) {
        if (event == Event::key && depth <= 3)
            (depth == 1 ? section : depth == 2 ? part : name) = value;
        if (depth < 3 || section != "model") return true;
        if (part == "merges") return take_merge(depth, event, value);
        if (part != "vocab") return true;
        if (event == Event::key) return false;
        if (event != Event::value || !value.is_number_unsigned() || value >= most_ids)
            reject(path + ": model.vocab: " + brief(name), brief(value),
                   text("an id below %d", most_ids));
        place(name, value, normal);
        vocabulary.emplace(name, value);
        return true;
    });
}

void Source::check_algorithm(const json& file) const {
    const auto require = [&](const char* pointer, const json& allowed) {
        const json found = file.value(json::json_pointer(pointer), json());
        if (std::find(allowed.begin(), allowed.end(), found) == allowed.end())
            reject(path + ": " + (pointer + 1), brief(found), "one of " + brief(allowed));
    };
    require("/model/type", {"BPE"});
    require("/model/byte_fallback", {true});
    require("/model/unk_token", {"<unk>"});
    require("/model/ignore_merges", {false, nullptr});
    require("/model/dropout", {nullptr});
    require("/model/continuing_subword_prefix", {nullptr, ""});
    require("/model/end_of_word_suffix", {nullptr, ""});
    require("/normalizer",
            R"([{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}])"_json);
    // It divides at spaces, and the normalizer leaves none.
    require("/pre_tokenizer", R"([{"type": "Split", "pattern": {"String": " "}, "invert": false,
                                   "behavior": "MergedWithPrevious"}, null])"_json);
    require("/decoder", R"([{"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"}]}])"_json);
}

// Special tokens become control pieces, which no text contains; others match wherever they stand.
void Source::add_tokens(const json& tokens) {
    for (const json& token : tokens) {
        const std::string where = path + ": added_tokens: " + brief(token);
        const auto flag = [&](const char* key) { return token.value(key, json()) == true; };
        if (!token.is_object() || !token.value("content", json()).is_string() ||
            !token.value("id", json()).is_number_unsigned() || token["id"] >= most_ids)
            reject(where, "it", text("a content, and an id below %d", most_ids));
        if (flag("single_word") || flag("lstrip") || flag("rstrip"))
            reject(where, "single_word, lstrip or rstrip", "none of them");
        std::string name = token["content"];
        const auto known = vocabulary.find(name);
        if (known != vocabulary.end() && known->second != token["id"])
            reject(where, "it", text("the vocabulary's id %d", known->second));
        for (size_t at = 0; !flag("special") && (at = name.find(' ', at)) != name.npos;)
            name.replace(at, 1, "▁");  // text is searched for it behind the normalizer
        place(name, token["id"],
              name == "<unk>"   ? unknown
              : flag("special") ? control
                                : user_defined);
    }
}

int Source::id_of(string_view name) const {
    const auto found = vocabulary.find(name);
    return found == vocabulary.end() ? -1 : found->second;
}

void Source::score_pieces() {
    int last = -1;
    for (const auto& [left, right] : merges) {
        const int id = id_of(left + right);
        const auto where = [&, &l = left, &r = right] {
            return path + ": model.merges: " + brief({l, r});
        };
        if (id < 0) reject(where(), "no piece " + brief(left + right), "one in model.vocab");
        Piece& piece = pieces[size_t(id)];
        // A piece of another type is found whole, before anything is merged.
        if (piece.type == normal && id != last && piece.score < 0)
            reject(where(), "it apart", "the merges into one piece side by side");
        unions.emplace_back(id, left.size());
        if (piece.score == 0) piece.score = -float(unions.size());
        last = id;
    }
    for (Piece& piece : pieces) {
        const bool is_byte = piece.name.size() == 6 && piece.name.starts_with("<0x");
        if (piece.type == normal && is_byte && piece.name.ends_with('>')) piece.type = byte;
    }
}

// Each pair of pieces whose union is a piece must be a merge, since SentencePiece would merge it.
void Source::check_merges() {
    std::vector<std::pair<int, size_t>> expected;
    for (size_t id = 0; id < pieces.size(); id++) {
        const string_view name = pieces[id].name;
        if (id_of(name) != int(id)) continue;  // an added token
        for (size_t i = 1; i < name.size(); i++) {
            const bool inside = (name[i] & 0xC0) == 0x80;  // a character
            if (!inside && id_of(name.substr(0, i)) >= 0 && id_of(name.substr(i)) >= 0)
                expected.emplace_back(id, i);
        }
    }
    std::sort(unions.begin(), unions.end());
    const auto [u, e] =
        std::mismatch(unions.begin(), unions.end(), expected.begin(), expected.end());
    const bool more = u != unions.end() && (e == expected.end() || *u < *e);
    if (!more && e == expected.end()) return;
    const auto [id, bytes] = more ? *u : *e;
    const std::string& name = pieces[size_t(id)].name;
    const std::string pair = brief({name.substr(0, bytes), name.substr(bytes)});
    reject(path + ": model.merges", more ? pair + ", no new pair of pieces" : "no " + pair,
           "each pair of pieces whose union is a piece, once");
}

// [2] SentencePiece's file, in protobuf's wire format: a tag, then a value or a size and bytes ----

std::string sized(char tag, string_view bytes) {
    std::string s{tag};
    size_t size = bytes.size();
    for (; size > 127; size /= 128) s += char(size % 128 + 128);
    s += char(size);
    return s.append(bytes);
}

std::string serialize(const std::vector<Piece>& pieces) {
    std::string model;
    for (const Piece& piece : pieces) {
        std::string fields = sized('\x0A', piece.name) + '\x15';
        fields.append(reinterpret_cast<const char*>(&piece.score), sizeof piece.score);
        model += sized('\x0A', fields + '\x18' + char(piece.type));
    }
    model += sized('\x12', "\x18\x02\x98\x02\x01");  // trainer_spec: BPE, byte_fallback
    // normalizer_spec: neither add_dummy_prefix nor remove_extra_whitespaces
    return model + sized('\x1A', string_view("\x18\0\x20\0", 4));
}

}  // namespace

// tokenizer.model loads in a sixth of the time, but does not have the tokens that a finetune added.
// Where transformers saves both, it lists these in added_tokens.json.
std::string tokenizer_file(const std::string& model) {
    const std::string directory = model.substr(0, model.rfind('/') + 1);
    const std::string other = directory + "tokenizer.json", added = directory + "added_tokens.json";
    if (!is_there(model) && !is_there(other))
        reject(model, "no such file", "it, or tokenizer.json beside it");
    if (!is_there(model)) return other;
    if (!is_there(other) || !is_there(added)) return model;
    const json tokens = parse_json(added, File(added).bytes);
    return tokens.size() > tokens.count(soft_token) ? other : model;
}

std::string sentencepiece_of_json(const std::string& path) {
    Source source{path, {}, {}, {}, {}};
    const json file = source.read();
    source.check_algorithm(file);
    source.add_tokens(file.value("added_tokens", json::array()));
    // The last id of Gemma's file; the Tokenizer puts it behind the pieces by itself.
    if (!source.pieces.empty() && source.pieces.back().name == soft_token) source.pieces.pop_back();
    for (size_t id = 0; id < source.pieces.size(); id++) {
        if (source.pieces[id].name.empty())
            reject(path, text("no piece of id %zu", id),
                   text("one of each id below %zu", source.pieces.size()));
    }
    source.score_pieces();
    source.check_merges();
    return serialize(source.pieces);
}

}  // namespace gemma
