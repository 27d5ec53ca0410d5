// SPDX-License-Identifier: Apache-2.0
//
// tokenizer.h: text to ids and back. Sitting 2.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace gemma {

// The file to read where tokenizer.model is asked for: it, or tokenizer.json beside it.
std::string tokenizer_file(const std::string& model);
// A SentencePiece model, serialized, with the ids of a tokenizer.json.
std::string sentencepiece_of_json(const std::string& path);

class Tokenizer {
  public:
    explicit Tokenizer(const std::string& file);  // of Gemma's family; see tokenizer_file
    ~Tokenizer();
    int size() const;

    static constexpr int eos = 1, bos = 2;  // fixed for the family and checked at load

    // Called before each 4 KiB or so of a prompt are encoded, with the least number of ids that the
    // whole prompt can have. What it throws ends the work.
    using Check = std::function<void(size_t fewest)>;
    static void unchecked(size_t) {}

    // Encodes a user's text: nothing in it can become a control id.
    std::vector<int> encode(std::string_view text) const;
    // Encodes a raw prompt: a control piece that is written out becomes its id. Adds no <bos>.
    std::vector<int> encode_with_controls(std::string_view text,
                                          const Check& check = unchecked) const;
    enum class Ending {
        generation_prompt,  // the start of the model's turn follows the messages
        closed,             // nothing follows them
        open,               // the last message has no end of turn, so that it can be continued
    };
    // Writes OpenAI messages in Gemma's chat template, <bos> included. Throws std::invalid_argument
    // with the template's own message if roles do not alternate or a content has a wrong type.
    std::vector<int> chat(const nlohmann::json& messages, Ending ending,
                          const Check& check = unchecked) const;

    // The text of a piece, or the byte of a byte piece; "" for control ids and ids without a piece.
    std::string_view bytes(int id) const;
    std::string_view name(int id) const;  // as the vocabulary spells it: "<end_of_turn>"
    // Decodes a finished text. Bytes that are not UTF-8 become U+FFFD. controls: as Detokenizer's.
    std::string decode(const std::vector<int>& ids, bool controls = false) const;

  private:
    struct Pieces;
    struct Prompt;
    std::vector<int> encode(const Prompt& prompt, const Check& check) const;
    std::unique_ptr<Pieces> pieces;
};

// Decodes id by id. Each piece of text is valid UTF-8: an incomplete character is held back.
class Detokenizer {
  public:
    // controls: write control ids as the vocabulary spells them, instead of leaving them out.
    explicit Detokenizer(const Tokenizer& t, bool controls = false)
        : tokenizer(t), show_controls(controls) {}
    std::string push(int id);
    std::string flush();  // call it at the end: U+FFFD if bytes were held back

  private:
    const Tokenizer& tokenizer;
    const bool show_controls;
    std::string held;  // the first 1 to 3 bytes of a character
};

}  // namespace gemma
