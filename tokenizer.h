// SPDX-License-Identifier: Apache-2.0
//
// tokenizer.h: text to ids and back. Sitting 2.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace gemma {

class Tokenizer {
  public:
    explicit Tokenizer(const std::string& file);  // a SentencePiece model of Gemma's family
    ~Tokenizer();
    int size() const;

    static constexpr int eos = 1, bos = 2;  // fixed for the family and checked at load

    // Text of a user: nothing in it can become a control id.
    std::vector<int> encode(std::string_view text) const;
    // Text of a raw prompt: control pieces written out in it become their ids. Adds no <bos>.
    std::vector<int> encode_with_controls(std::string_view text) const;
    // Gemma's chat template over OpenAI messages, <bos> included; behind them the start of an
    // answer, or nothing, or the last message left open to be continued. Throws
    // std::invalid_argument with the template's own message (roles that do not alternate, content
    // of a wrong type).
    enum class Ending { generation_prompt, closed, open };
    std::vector<int> chat(const nlohmann::json& messages, Ending ending) const;

    // A piece's text, a byte piece's byte, "" for control ids and ids that have no piece.
    std::string_view bytes(int id) const;
    std::string_view name(int id) const;  // as the vocabulary spells it: "<end_of_turn>"
    // Text of whole ids; what is not UTF-8 becomes U+FFFD. Control ids are left out.
    std::string decode(const std::vector<int>& ids) const;

  private:
    struct Pieces;
    std::unique_ptr<Pieces> pieces;
};

// Ids in, text out, at every moment valid UTF-8: a character that is not whole yet is held back.
class Detokenizer {
  public:
    // Control ids are left out, or written as the vocabulary spells them.
    explicit Detokenizer(const Tokenizer& t, bool controls = false)
        : tokenizer(t), show_controls(controls) {}
    std::string push(int id);
    std::string flush();  // at the end: what was held back, as U+FFFD

  private:
    const Tokenizer& tokenizer;
    const bool show_controls;
    std::string held;  // the first 1 to 3 bytes of a character
};

}  // namespace gemma
