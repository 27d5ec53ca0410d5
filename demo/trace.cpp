// SPDX-License-Identifier: Apache-2.0
//
// ./dev trace ["PROMPT"...]: shows what a step does. Runs the prompts together through the
// production scheduler and the CPU engine. Prints each step's tokens, rows and pages, and the five
// likeliest next tokens of every row. The default is the prompt of the codelab.
//
// $TRACE_MODEL is another model's directory, $TRACE_TOKENS the number of tokens to generate (16).
#include <cmath>
#include <cstdlib>
#include <map>

#include "tests/run.h"
#include "tokenizer.h"

using namespace gemma;

namespace {

std::string quoted(const Tokenizer& tokenizer, int id) {
    std::string s = tokenizer.decode({id}), out = "'";
    if (s.empty()) s = tokenizer.name(id);
    for (const char c : s) out += c == '\n' ? "\\n" : std::string(1, c);
    return out + "'";
}

std::string page_list(const int* table, int count) {
    std::string s;
    for (int i = 0; i < count; i++) {
        s += table[i] < 0 ? std::string(" -") : text(" %d", table[i]);
    }
    return s;
}

void print_row(const Batch& b, size_t r, const Tokenizer& tokenizer) {
    const int begin = b.row_start[r], end = b.row_start[r + 1];
    std::printf("  row %zu  positions %d..%d ", r, b.positions[size_t(begin)],
                b.positions[size_t(end) - 1]);
    for (int i = begin; i < end; i++) {
        if (end - begin > 12 && i == begin + 6) std::printf(" ... %d more ...", end - begin - 12);
        if (end - begin > 12 && i >= begin + 6 && i < end - 6) continue;
        std::printf(" %s", quoted(tokenizer, b.tokens[size_t(i)]).c_str());
    }
    const int used = b.positions[size_t(end) - 1] / page_tokens + 1;
    const size_t at = r * size_t(b.pages_per_row);
    std::printf("\n         pages: local%s, global%s\n",
                page_list(b.pages[local_pool].data() + at, used).c_str(),
                page_list(b.pages[global_pool].data() + at, used).c_str());
}

}  // namespace

int main(int argc, char** argv) try {
    const char* directory = std::getenv("TRACE_MODEL");
    const char* tokens = std::getenv("TRACE_TOKENS");
    const std::string model_path = find_model(directory ? directory : "demo/model");
    const Checkpoint checkpoint(model_path);
    const Tokenizer tokenizer(model_path + "/tokenizer.model");
    const auto model = open_cpu(checkpoint);
    const int pages = 256;
    model->allocate_pages({pages, pages});
    // A small token budget, so that a long prompt is cut into chunks.
    Scheduler scheduler({8, 32, checkpoint.config.W, {pages, pages}});

    std::vector<std::string> prompts(argv + 1, argv + argc);
    if (prompts.empty()) prompts = {"Cloud Run is a "};
    std::map<const Sequence*, std::string> answers;
    Sequences sequences;
    for (const std::string& prompt : prompts) {
        std::vector<int> ids = tokenizer.encode_with_controls(prompt);
        ids.insert(ids.begin(), Tokenizer::bos);
        const auto s = sequence(ids, tokens ? std::max(1, std::atoi(tokens)) : 16,
                                {.temperature = 0, .logprobs = 5});
        s->stop_ids = checkpoint.config.eos;
        if (!scheduler.fits(s->prompt_tokens + s->max_tokens))
            throw Error("a prompt is longer than the trace's pages");
        scheduler.add(sequences.emplace_back(s));
    }
    for (int step = 1;; step++) {
        const Batch& batch = scheduler.next();
        if (batch.tokens.empty()) break;
        std::printf("step %d: tokens %zu, rows %zu\n", step, batch.tokens.size(),
                    batch.row_start.size() - 1);
        const Batch shown = batch;  // a copy that outlives finish()
        const Results results = model->step(batch);
        const auto news = scheduler.finish(results);
        for (size_t r = 0; r + 1 < shown.row_start.size(); r++) {
            print_row(shown, r, tokenizer);
            for (size_t o = 0; o < shown.outputs.size(); o++) {
                const int token = shown.outputs[o].token;
                if (token < shown.row_start[r] || token >= shown.row_start[r + 1]) continue;
                std::printf("         next:");
                for (const auto& top : results[o].top)
                    std::printf(" %s %.1f%%", quoted(tokenizer, top.id).c_str(),
                                100 * std::exp(top.logprob));
                std::printf("\n");
                answers[news[o].sequence.get()] += tokenizer.decode({results[o].id});
            }
        }
        const PoolUse l = scheduler.use(local_pool), g = scheduler.use(global_pool);
        std::printf("         pools: local %d held, %d cached; global %d held, %d cached\n", l.held,
                    l.cached, g.held, g.cached);
    }
    for (size_t i = 0; i < prompts.size(); i++)
        std::printf("%s|%s\n", prompts[i].c_str(), answers[sequences[i].get()].c_str());
} catch (const Error& e) {
    say(e.what(), Severity::error);
    return 1;
}
