// SPDX-License-Identifier: Apache-2.0
//
// grammar_judge VOCABULARY: what tests/grammar_test.py asks of a Grammar, a JSON object a line.
// {"schema"|"regex"|"choices": ..., "accept": [texts], "generate": count, "seed": n} is answered by
// {"accepted": [true...], "texts": [...], "seconds": [of each set]} or {"error": ...}.
#include <chrono>
#include <iostream>
#include <random>

#include "grammar.h"
#include "http.h"

using namespace gemma;
using ordered = nlohmann::ordered_json;

namespace {

std::shared_ptr<Grammar> grammar_of(const ordered& request) {
    if (request.contains("schema")) return Grammar::of_schema(request["schema"], "schema");
    if (request.contains("regex")) return Grammar::of_regex(request["regex"], "regex");
    if (request.contains("choices")) return Grammar::of_choices(request["choices"], "choices");
    return Grammar::of_object("object");
}

bool accepts(Grammar& g, const std::string& text) {
    Expressions::Id e = g.start;
    for (const char c : text) e = g.expressions.after(e, uint8_t(c));
    return g.expressions.may_end(e);
}

// Keeps the ids of one byte, if there is any: long pieces would lead away from the end.
void keep_bytes(const Vocabulary& vocabulary, std::vector<int>& ids) {
    std::vector<int> small;
    for (const int id : ids) {
        if (vocabulary.tokenizer.bytes(id).size() <= 1) small.push_back(id);
    }
    if (!small.empty()) ids = small;
}

// Draws among the ids that may follow; after a while, those that bring the end nearer.
std::string generate(Grammar& g, const Vocabulary& vocabulary, std::mt19937& random, int vocab,
                     std::vector<double>& seconds) {
    std::string out;
    Expressions::Id e = g.start;
    for (int step = 0; step < 1000; step++) {
        const auto begun = std::chrono::steady_clock::now();
        const auto set = g.allowed(vocabulary, e);
        seconds.push_back(
            std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count());
        std::vector<int> ids;
        for (int id = 0; id < vocab; id++) {
            if ((*set)[size_t(id) / 32] >> id % 32 & 1) ids.push_back(id);
        }
        if (ids.empty()) return "DEAD END " + out;
        const bool may_end = std::count(ids.begin(), ids.end(), Tokenizer::eos) > 0;
        if (step > 60 && !may_end) keep_bytes(vocabulary, ids);
        int id = ids[random() % ids.size()];
        if (may_end && (step > 60 || random() % 4 == 0)) return out;
        if (id == Tokenizer::eos) return out;
        for (const char* closing : {"]", "}", "\""}) {
            if (*closing != '"' && ids.size() > 100) continue;  // in a string they end nothing
            for (const int one : ids) {
                if (step > 60 && vocabulary.tokenizer.bytes(one) == closing) id = one;
            }
        }
        out += vocabulary.tokenizer.bytes(id);
        for (const char c : vocabulary.tokenizer.bytes(id)) e = g.expressions.after(e, uint8_t(c));
    }
    return "ENDLESS " + out;
}

}  // namespace

int main(int, char** argv) {
    const Tokenizer tokenizer(argv[1]);
    const Vocabulary vocabulary(tokenizer, {Tokenizer::eos}, tokenizer.size());
    for (std::string line; std::getline(std::cin, line);) {
        ordered answer;
        try {
            const ordered request = ordered::parse(line);
            const auto begun = std::chrono::steady_clock::now();
            const auto g = grammar_of(request);
            answer["compiled"] =
                std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
            for (const ordered& text : request.value("accept", ordered::array()))
                answer["accepted"].push_back(accepts(*g, text));
            std::mt19937 random(request.value("seed", 0u));
            std::vector<double> seconds;
            for (int i = 0; i < request.value("generate", 0); i++)
                answer["texts"].push_back(
                    generate(*g, vocabulary, random, tokenizer.size(), seconds));
            answer["seconds"] = seconds;
        } catch (const Refusal& r) {
            answer = {{"error", r.message}};
        }
        std::cout << answer.dump(-1, ' ', false, ordered::error_handler_t::replace) << std::endl;
    }
}
