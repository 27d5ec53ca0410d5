// SPDX-License-Identifier: Apache-2.0
//
// tokenizer.cpp: text <-> ids by libsentencepiece, Gemma's chat template, and text as it streams.
// Sitting 2, last. A Tokenizer is const, so threads share it. Rules:
//   - Control ids (turn, image, <bos>, ...) get into a prompt in two ways: chat() inserts them,
//     or encode_with_controls() finds their names in a raw prompt. encode() never makes one, since
//     SentencePiece matches no control piece: no user can forge a turn.
//   - The text between two control ids is encoded as one, because newlines fuse: "user\n" and
//     "\nHi" have other ids together than one by one.
//   - Long text is encoded in parts, which end where no piece of the vocabulary could reach across:
//     so the ids are those of the whole, and come several times as fast.
#include "file.h"
#include "gemma.h"
#include "tokenizer.h"

#include <bitset>

#include <sentencepiece_processor.h>

namespace gemma {

using std::string_view;

// [1] The model file ------------------------------------------------------------------------------

// Indices into `literals` and `controls`; the first four are also ids. The soft token, of which an
// image takes 256, is a piece only where a tokenizer.json has others behind it: else its id follows
// the last piece, if there are image pieces.
enum { pad, eos, bos, unk, start_of_turn, end_of_turn, start_of_image, end_of_image, soft_token };
// clang-format off
constexpr string_view literals[] = {
    "<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>",
    "<start_of_image>", "<end_of_image>", "<image_soft_token>"};
// clang-format on

// In Gemma's file <start_of_turn> and others are user-defined pieces (type 4), which match in any
// text. This makes one a control piece (3), which matches in none. A piece in the protobuf file:
//     0A size name   15 score(4 bytes)   18 type
static void make_control(std::string& model, string_view name) {
    const std::string head = std::string("\x0A") + char(name.size()) + std::string(name) + "\x15";
    const size_t found = model.find(head), type = found + head.size() + 4;
    if (found != model.npos && model.find("\x18\x04", type) == type) model[type + 1] = 3;
}

// The text that a piece adds when it is decoded.
static std::string text_of(const sentencepiece::SentencePieceProcessor& processor, int id) {
    if (processor.IsControl(id) || processor.IsUnknown(id)) return "";
    std::string s = processor.IdToPiece(id);
    if (processor.IsByte(id)) return {char(std::stoi(s.substr(3), nullptr, 16))};  // <0xE2>
    for (size_t at = 0; (at = s.find("\u2581", at)) != s.npos; ++at) s.replace(at, 3, " ");
    return s;
}

struct Tokenizer::Pieces {
    sentencepiece::SentencePieceProcessor processor;
    std::vector<std::string> text;  // [size]
    size_t longest = 0;             // bytes of prompt that one id can stand for, at most
    std::bitset<1 << 16> joined;    // [pair_of(first, second)] they are neighbours in a piece
    // What a raw prompt may write for a control id: `literals`, then a vocabulary's other ones.
    std::vector<std::string> names;
    std::vector<int> controls;  // [names] ids; -1: not in this vocabulary
};

// The index of two bytes in Pieces::joined.
static size_t pair_of(char first, char second) {
    return size_t(uint8_t(first)) << 8 | uint8_t(second);
}

// The bytes of a SentencePiece file, or those that a tokenizer.json is turned into.
static std::string read_model(const std::string& file) {
    if (file.ends_with(".json")) return sentencepiece_of_json(file);
    const File model(file);
    if (model.bytes.size() > 64 << 20)  // Gemma's has 4.5
        reject(file, text("%zu bytes", model.bytes.size()), "at most 64 MiB");
    return std::string(model.bytes);
}

Tokenizer::Tokenizer(const std::string& given) : pieces(std::make_unique<Pieces>()) {
    const std::string file = tokenizer_file(given);
    const auto require = [&](bool good, const std::string& found) {
        if (!good) throw Error(file + ": " + found + ", expected Gemma's tokenizer");
    };
    std::string model = read_model(file);
    auto& [processor, texts, longest, joined, names, controls] = *pieces;
    for (string_view literal : literals) make_control(model, literal);
    const auto status = processor.LoadFromSerializedProto(model);
    require(status.ok(), "no SentencePiece model (" + status.ToString() + ")");
    for (int id = 0; id < processor.GetPieceSize(); ++id) texts.push_back(text_of(processor, id));
    names.assign(std::begin(literals), std::end(literals));
    for (int i = pad; i < soft_token; ++i) {
        const std::string& name = names[size_t(i)];
        const int id = processor.PieceToId(name);  // the id of <unk> if there is no such piece
        controls.push_back(processor.IdToPiece(id) == name ? id : -1);
        require(controls[i] >= 0 || i > end_of_turn, "no piece " + name);  // images are optional
        require(id == i || i > unk, text("%s at id %d, not %d", name.c_str(), id, i));
        require(texts[id].empty(), name + " as ordinary text");
    }
    controls.push_back(controls[start_of_image] < 0 || controls[end_of_image] < 0 ? -1 : size());
    for (int id = 0; id < size(); ++id) {
        const std::string& name = processor.IdToPiece(id);
        if (name == literals[soft_token]) controls[soft_token] = id;
        if (!processor.IsControl(id) || std::count(names.begin(), names.end(), name)) continue;
        names.push_back(name);
        controls.push_back(id);
    }
    for (const std::string& name : names) longest = std::max(longest, name.size());
    for (const std::string& piece : texts) {
        longest = std::max(longest, piece.size());
        for (size_t i = 1; i < piece.size(); ++i) joined.set(pair_of(piece[i - 1], piece[i]));
    }
    for (size_t byte = 0; byte < 256; ++byte) {
        joined.set(0x81 << 8 | byte);  // U+2581 (E2 96 81), written out, is what a space becomes
        joined.set(byte << 8 | 0xE2);
        // No part ends within a character, whose later bytes are these.
        for (size_t later = 0x80; later < 0xC0; ++later) joined.set(byte << 8 | later);
    }
    // Spaces everywhere, a letter in two forms, a ligature, a character without a piece.
    const std::string probe = "  \u00e9e\u0301  \ufb01\u3000\U000F0000\r\n ";
    require(decode(encode(probe)) == probe, "text that comes back changed");
}

Tokenizer::~Tokenizer() = default;
int Tokenizer::size() const { return static_cast<int>(pieces->text.size()); }

// [2] Text to ids ---------------------------------------------------------------------------------

// A prompt under construction: text, then control ids, then text again.
struct Tokenizer::Prompt {
    struct Stretch {
        std::string text;
        std::vector<int> controls{};  // behind the text
    };
    const std::vector<int>& controls;
    std::vector<Stretch> stretches{{""}};

    std::string& text() { return stretches.back().text; }       // behind the last control id
    void write(const json& content, const std::string& where);  // a message's
    void mark(size_t control, const std::string& text_behind = {}, size_t times = 1) {
        stretches.back().controls.assign(times, controls[control]);
        stretches.push_back({text_behind});
    }
};

// The size of a text's first part: some 4 KiB, to where no piece reaches across, or all.
static size_t first_part(string_view text, const std::bitset<1 << 16>& joined) {
    size_t end = 4096;
    while (end < text.size() && joined[pair_of(text[end - 1], text[end])]) ++end;
    return std::min(end, text.size());
}

std::vector<int> Tokenizer::encode(const Prompt& prompt, const Check& check) const {
    size_t bytes = 0, marks = 0;
    for (const auto& [text, controls] : prompt.stretches) {
        bytes += text.size();
        marks += controls.size();
    }
    const size_t fewest = (bytes + pieces->longest - 1) / pieces->longest + marks;
    std::vector<int> ids, more;
    for (const auto& [text, controls] : prompt.stretches) {
        for (string_view left = text; !left.empty();) {
            check(fewest);
            const size_t size = first_part(left, pieces->joined);
            const auto status = pieces->processor.Encode(left.substr(0, size), &more);
            if (!status.ok()) throw std::runtime_error("SentencePiece: " + status.ToString());
            ids.insert(ids.end(), more.begin(), more.end());
            left.remove_prefix(size);
        }
        ids.insert(ids.end(), controls.begin(), controls.end());
    }
    return ids;
}

std::vector<int> Tokenizer::encode(string_view plain) const {
    Prompt prompt{pieces->controls};
    prompt.text() = plain;
    return encode(prompt, unchecked);
}

std::vector<int> Tokenizer::encode_with_controls(string_view raw, const Check& check) const {
    Prompt prompt{pieces->controls};
    size_t start = 0;  // of the text that is not in the prompt yet
    for (size_t at = 0; at < raw.size(); ++at) {
        for (size_t i = 0; i < pieces->names.size(); ++i) {
            if (pieces->controls[i] < 0 || !raw.substr(at).starts_with(pieces->names[i])) continue;
            prompt.text() = raw.substr(start, at - start);
            prompt.mark(i);
            start = at + pieces->names[i].size();
            at = start - 1;
            break;
        }
    }
    prompt.text() = raw.substr(start);
    return encode(prompt, check);
}

// The template calls Python's str.strip(), which removes all white space of Unicode.
static string_view trim(string_view s) {
    constexpr string_view spaces =
        " \t\n\v\f\r\x1c\x1d\x1e\x1f\u0085\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006"
        "\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000";
    size_t begin = s.size(), end = 0;  // of the result
    size_t next;                       // where the character after this one begins
    for (size_t at = 0; at < s.size(); at = next) {
        next = at + 1;
        while (next < s.size() && (s[next] & 0xC0) == 0x80) ++next;
        if (spaces.find(s.substr(at, next - at)) != spaces.npos) continue;
        begin = std::min(begin, at);
        end = next;
    }
    return s.substr(begin, end - begin);
}

static const std::string& string_in(const json& object, const char* key, const std::string& where) {
    if (object.is_object() && object.contains(key) && object[key].is_string())
        return object[key].get_ref<const std::string&>();
    throw std::invalid_argument(where + ": " + key + " must be a string");
}

// request.cpp refuses images, so only tests reach them here.
void Tokenizer::Prompt::write(const json& content, const std::string& where) {
    if (content.is_string()) text() += trim(content.get_ref<const std::string&>());
    if (!content.is_string() && !content.is_array())
        throw std::invalid_argument("Invalid content type");
    for (size_t i = 0; content.is_array() && i < content.size(); ++i) {
        const std::string& type = string_in(content[i], "type", where);
        if (type == "text") text() += trim(string_in(content[i], "text", where));
        if (type != "image") continue;  // the template ignores other parts
        if (controls[soft_token] < 0)
            throw std::invalid_argument(where + ": this model's vocabulary has no images");
        text() += "\n\n";
        mark(start_of_image);
        mark(soft_token, "", 256);
        mark(end_of_image, "\n\n");
    }
}

std::vector<int> Tokenizer::chat(const json& messages, Ending ending, const Check& check) const {
    if (!messages.is_array() || messages.empty())
        throw std::invalid_argument("messages must be a list of at least one message");
    Prompt prompt{pieces->controls};
    prompt.mark(gemma::bos);
    std::string prefix;
    const bool system = string_in(messages[0], "role", "messages[0]") == "system";
    const size_t first = system ? 1 : 0;  // message with a turn of its own
    if (system) {  // opens the first turn, untrimmed; the template takes a list's first part only
        const json content = messages[0].value("content", json());
        const bool list = content.is_array() && !content.empty();
        prefix = list ? string_in(content[0], "text", "messages[0].content")
                      : string_in(messages[0], "content", "messages[0]");
        prefix += "\n\n";
    }
    for (size_t i = first; i < messages.size(); ++i, prefix.clear()) {
        const std::string where = text("messages[%zu]", i);
        const std::string& role = string_in(messages[i], "role", where);
        if ((role == "user") != ((i - first) % 2 == 0))
            throw std::invalid_argument(
                "Conversation roles must alternate user/assistant/user/assistant/...");
        prompt.mark(start_of_turn, (role == "assistant" ? "model" : role) + "\n" + prefix);
        prompt.write(messages[i].value("content", json()), where + ".content");
        if (ending != Ending::open || i + 1 < messages.size()) prompt.mark(end_of_turn, "\n");
    }
    if (ending == Ending::generation_prompt) prompt.mark(start_of_turn, "model\n");
    return encode(prompt, check);
}

// [3] Ids to text ---------------------------------------------------------------------------------

string_view Tokenizer::bytes(int id) const {
    return id >= 0 && id < size() ? string_view(pieces->text[id]) : string_view();
}

string_view Tokenizer::name(int id) const {
    return id >= 0 && id < size() ? string_view(pieces->processor.IdToPiece(id)) : string_view();
}

std::string Tokenizer::decode(const std::vector<int>& ids, bool controls) const {
    Detokenizer stream(*this, controls);
    std::string out;
    for (int id : ids) out += stream.push(id);
    return out += stream.flush();
}

// The size of the character that begins with this byte; 0: no character does.
static size_t character_size(uint8_t lead) {
    if (lead < 0xC2 || lead > 0xF4) return lead < 0x80 ? 1 : 0;
    return lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}

// Can `next` follow the first bytes of a character? The second byte has a narrower range where the
// character would otherwise be overlong, a surrogate or above U+10FFFF.
static bool continues(string_view first, uint8_t next) {
    const uint8_t lead = first.size() == 1 ? first[0] : 0;
    const uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    return low <= next && next <= high;
}

// One U+FFFD replaces the longest start of a character that is not completed, or one other byte, as
// Unicode ("maximal subparts") and Python (errors="replace") do.
std::string Detokenizer::push(int id) {
    std::string out;
    std::string_view bytes = tokenizer.bytes(id);
    if (bytes.empty() && show_controls) bytes = tokenizer.name(id);
    for (char c : bytes) {
        if (!held.empty() && !continues(held, c)) out += flush();
        held += c;
        const size_t size = character_size(held[0]);
        if (size == 0) out += flush();
        if (size == held.size()) out += std::exchange(held, {});
    }
    return out;
}

std::string Detokenizer::flush() { return std::exchange(held, {}).empty() ? "" : "\uFFFD"; }

}  // namespace gemma
