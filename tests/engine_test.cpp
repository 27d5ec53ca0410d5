// SPDX-License-Identifier: Apache-2.0
//
// The engine against Hugging Face (tolerances, derived and printed) and against itself (equalities,
// to the last bit). tests/make_golden.py made the numbers.
#include <cmath>
#include <map>
#include <random>

#include <nlohmann/json.hpp>

#include "test.h"
#include "run.h"

using namespace gemma;
using nlohmann::json;

namespace {

const std::filesystem::path golden = repository / "tests/golden";

struct Engine {
    explicit Engine(const std::filesystem::path& directory, int pages = 1024)
        : checkpoint(directory.string()), model(open_cpu(checkpoint)) {
        model->allocate_pages({pages, pages});
    }
    Checkpoint checkpoint;
    std::unique_ptr<Model> model;
};

std::vector<float> read_floats(const std::filesystem::path& path) {
    const std::string bytes = read_file(path);
    std::vector<float> floats(bytes.size() / sizeof(float));
    std::memcpy(floats.data(), bytes.data(), floats.size() * sizeof(float));
    return floats;
}

// log softmax, in double.
std::vector<double> log_softmax(const float* logits, int V) {
    const double top = *std::max_element(logits, logits + V);
    double total = 0;
    for (int i = 0; i < V; i++) total += std::exp(logits[i] - top);
    std::vector<double> out(size_t(V), 0);
    for (int i = 0; i < V; i++) out[size_t(i)] = logits[i] - top - std::log(total);
    return out;
}

// The whole of `ids` in one step, with the logprob of every id of the vocabulary at `positions`.
Results score(Engine& engine, const std::vector<int>& ids, const std::vector<int>& positions) {
    Batch batch;
    batch.tokens = ids;
    batch.row_start = {0, int(ids.size())};
    batch.pages_per_row = int(ids.size()) / page_tokens + 1;
    for (size_t i = 0; i < ids.size(); i++) batch.positions.push_back(int(i));
    for (auto& table : batch.pages) {
        for (int i = 0; i < batch.pages_per_row; i++) table.push_back(i);
    }
    for (const int position : positions) {
        for (int id = 0; id < engine.checkpoint.config.V; id++) {
            batch.outputs.push_back({position, 0, id, 0, {}});
        }
    }
    return engine.model->step(batch);
}

std::vector<int> ids_of(const Results& results) {
    std::vector<int> ids;
    for (const Result& r : results) ids.push_back(r.id);
    return ids;
}

void check_golden(const std::string& name) {
    const json g = json::parse(read_file(golden / (name + ".json")));
    const std::vector<float> logits = read_floats(golden / g["logits_file"]);
    const int V = g["vocab_size"];
    // Two fp32 programs differ by the roundings of their sums. What they cost transformers was
    // measured against float64; ours may cost as much, the difference is at most their sum, and a
    // factor of 4 covers other inputs' extremes. Then log softmax: the largest rounding of a
    // logprob near -32, and 2^-40 steps of V probabilities.
    const double tolerance = 8 * double(g["fp64_max_abs_diff"]) + 0x1p-19 + V * 0x1p-40;
    for (const std::string directory : g["checkpoints"]) {
        Engine engine(std::filesystem::exists(golden / directory) ? golden / directory
                                                                  : repository / directory);
        double worst = 0;
        for (const json& prompt : g["prompts"]) {
            std::vector<int> ids = prompt["ids"];
            const std::vector<int> greedy = prompt["greedy"], positions = prompt["positions"];
            const size_t prompt_size = ids.size();
            ids.insert(ids.end(), greedy.begin(), greedy.end());
            const Results results = score(engine, ids, positions);
            for (size_t i = 0; i < positions.size(); i++) {
                const auto want =
                    log_softmax(logits.data() + (size_t(prompt["first_row"]) + i) * size_t(V), V);
                for (int id = 0; id < V; id++) {
                    worst = std::max(worst, std::abs(want[size_t(id)] -
                                                     results[i * size_t(V) + size_t(id)].logprob));
                }
            }
            ids.resize(prompt_size);
            Scheduler scheduler(limits_of(engine.checkpoint.config));
            const auto s = sequence(ids, int(greedy.size()), {.temperature = 0});
            scheduler.add(s);
            INFO(directory << ", prompt of " << prompt_size << ", smallest gap "
                           << prompt["min_gap"]);
            CHECK(ids_of(run(*engine.model, scheduler)[s.get()]) == greedy);
        }
        std::printf("%-8s max |logprob - Hugging Face's| %.2e = %2.0f%% of the tolerance\n",
                    directory.c_str(), worst, 100 * worst / tolerance);
        CHECK(worst <= tolerance);
    }
}

}  // namespace

TEST_CASE("logits and greedy text are Hugging Face's, in every branch of the family") {
    for (const char* name : {"1b", "270m", "4b", "27b", "v5"}) check_golden(name);
}

TEST_CASE("the demo model's logits and 200 greedy tokens are Hugging Face's") {
    check_golden("demo");
}

TEST_CASE("real Gemma 3 270M: greedy text and the 20 likeliest tokens are Hugging Face's",
          "[real]") {
    const char* directory = std::getenv("GEMMA_REAL");
    if (!directory) SKIP_BECAUSE("GEMMA_REAL does not name a directory with google/gemma-3-270m");
    const json g = json::parse(read_file(golden / "real-270m.json"));
    Engine engine(directory, 512);
    const double tolerance =
        8 * double(g["fp64_max_abs_diff"]) + 0x1p-19 + engine.checkpoint.config.V * 0x1p-40;
    double worst = 0;
    Scheduler scheduler(limits_of(engine.checkpoint.config, 256, 512));
    std::vector<std::shared_ptr<Sequence>> sequences;
    for (const json& prompt : g["prompts"]) {
        sequences.push_back(sequence(prompt["ids"], int(prompt["greedy"].size()),
                                     {.temperature = 0, .logprobs = 20}));
        scheduler.add(sequences.back());
    }
    auto all = run(*engine.model, scheduler);
    for (size_t p = 0; p < sequences.size(); p++) {
        const json& prompt = g["prompts"][p];
        const Results& results = all[sequences[p].get()];
        INFO(prompt["text"].get<std::string>().substr(0, 60) << " -> " << prompt["greedy_text"]);
        CHECK(ids_of(results) == prompt["greedy"].get<std::vector<int>>());
        for (const json& top : prompt["top"]) {
            std::map<int, double> want;
            for (size_t i = 0; i < 20; i++) want[top["ids"][i]] = top["logprobs"][i];
            for (const auto& t : results[size_t(top["index"])].top) {
                // Where two ids are as likely as each other, either may be the twentieth.
                const double w = want.count(t.id) ? want[t.id] : double(top["logprobs"][19]);
                worst = std::max(worst, std::abs(w - double(t.logprob)));
            }
        }
    }
    std::printf("270M     max |logprob - Hugging Face's| %.2e = %2.0f%% of the tolerance\n", worst,
                100 * worst / tolerance);
    CHECK(worst <= tolerance);
}

// [equalities] -----------------------------------------------------------------------------------

namespace {

// Prompts of all lengths around pages, windows and chunks; some greedy, some drawn, all with
// logprobs.
std::vector<std::shared_ptr<Sequence>> crowd(const Config& config, int count, unsigned seed) {
    std::mt19937 random(seed);
    const auto pick = [&](int low, int high) {
        return std::uniform_int_distribution<int>(low, high)(random);
    };
    std::vector<std::shared_ptr<Sequence>> all;
    for (int i = 0; i < count; i++) {
        std::vector<int> prompt{Tokenizer::bos};
        for (int n = pick(0, 1) ? pick(0, 8) : pick(20, 150); n > 0; n--)
            prompt.push_back(pick(3, config.vocab - 1));
        Sampling sampling{.seed = random(), .logprobs = 5};
        if (i % 3 == 0) sampling.temperature = 0;
        if (i % 3 == 1) sampling.top_k = 20, sampling.top_p = 0.9f;
        all.push_back(sequence(prompt, pick(1, 90), sampling));
    }
    return all;
}

std::shared_ptr<Sequence> fresh(const Sequence& s) {
    return sequence({s.tokens.begin(), s.tokens.begin() + s.prompt_tokens}, s.max_tokens,
                    s.sampling);
}

std::vector<Results> results_of(Model& model, const Limits& limits,
                                const std::vector<std::shared_ptr<Sequence>>& sequences,
                                int* preemptions = nullptr) {
    Scheduler scheduler(limits);
    std::vector<std::shared_ptr<Sequence>> copies;
    for (const auto& s : sequences) scheduler.add(copies.emplace_back(fresh(*s)));
    auto all = run(model, scheduler);
    if (preemptions) *preemptions = scheduler.preemptions();
    std::vector<Results> in_order;
    for (const auto& s : copies) in_order.push_back(all[s.get()]);
    for (const Pool pool : pools) CHECK(scheduler.use(pool).held == 0);
    return in_order;
}

}  // namespace

TEST_CASE("a sequence's bits do not depend on its neighbours, chunks, cache or preemption") {
    for (const char* name :
         {"tests/golden/1b", "tests/golden/4b", "tests/golden/27b", "demo/model"}) {
        Engine engine(repository / name);
        const Config& config = engine.checkpoint.config;
        INFO(name);
        const auto sequences = crowd(config, 33, 7);
        std::vector<Results> alone;
        for (const auto& s : sequences)
            alone.push_back(results_of(*engine.model, limits_of(config, 4096), {s})[0]);
        const auto equal = [&](const std::vector<Results>& others) {
            for (size_t i = 0; i < alone.size(); i++) {
                INFO("sequence " << i << ", prompt of " << sequences[i]->prompt_tokens);
                CHECK(same(others[i], alone[i]));
            }
        };
        // In a crowd, whole or in chunks.
        for (const int budget : {7, 32, 65, 4096}) {
            equal(results_of(*engine.model, limits_of(config, budget), sequences));
        }
        // From the prefix cache, in the second round.
        Scheduler scheduler(limits_of(config));
        for (const int round : {0, 1}) {
            std::vector<Results> results;
            int cached = 0;
            for (const auto& s : sequences) {
                const auto copy = fresh(*s);
                scheduler.add(copy);
                results.push_back(run(*engine.model, scheduler)[copy.get()]);
                cached += copy->cached_tokens;
            }
            equal(results);
            CHECK((cached > 0) == (round == 1));
        }
        // With so few pages that sequences are preempted again and again.
        int preemptions = 0;
        equal(results_of(*engine.model, limits_of(config, 64, 9), sequences, &preemptions));
        CHECK(preemptions > 0);
    }
}

// Prints a hash of every bit that a crowd's results have: ./dev sanitize compares builds for
// processors with other vector widths (AVX-512, AVX2, none), which must agree.
TEST_CASE("bits", "[.][bits]") {
    uint64_t hash = 14695981039346656037u;  // FNV-1a
    const auto add = [&](const auto& value) {
        unsigned char bytes[sizeof value];
        std::memcpy(bytes, &value, sizeof value);
        for (const unsigned char byte : bytes) hash = (hash ^ byte) * 1099511628211u;
    };
    for (const char* name : {"1b", "4b", "27b"}) {
        Engine engine(golden / name);
        const auto sequences = crowd(engine.checkpoint.config, 16, 11);
        for (const Results& results :
             results_of(*engine.model, limits_of(engine.checkpoint.config), sequences)) {
            for (const Result& r : results) {
                add(r.id), add(r.logprob), add(r.rank);
                for (const auto& top : r.top) add(top.id), add(top.logprob);
            }
        }
    }
    std::printf("bits %016lx\n", static_cast<unsigned long>(hash));
}

// [sampler] --------------------------------------------------------------------------------------

TEST_CASE(
    "draws follow the softmax, top-k, top-p and min-p, and depend on the seed and the index "
    "alone") {
    Engine engine(golden / "1b");
    const int V = engine.checkpoint.config.V, draws = 20'000;
    const std::vector<int> prompt{Tokenizer::bos, 17, 300, 41};
    const Results every = score(engine, prompt, {3});
    std::vector<std::pair<double, int>> likeliest;
    for (int id = 0; id < V; id++) likeliest.push_back({-double(every[size_t(id)].logprob), id});
    std::sort(likeliest.begin(), likeliest.end());
    struct Case {
        float temperature;
        int top_k;
        float top_p, min_p;
    };
    for (const Case c : {Case{1, 0, 1, 0},
                         {0.7f, 0, 1, 0},
                         {1, 5, 1, 0},
                         {1.5f, 40, 0.6f, 0},
                         {1, 0, 1, 0.2f},
                         {1, 0, 0.0001f, 0},
                         {1, 1, 1, 0}}) {
        // The reference: sort, cut, renormalise, in double.
        std::vector<double> p(size_t(V), 0);
        double total = 0, before = 0;
        for (const auto& [cost, id] : likeliest)
            p[size_t(id)] = std::exp((likeliest[0].first - cost) / c.temperature);
        for (int i = 0; i < V; i++) {
            double& q = p[size_t(likeliest[size_t(i)].second)];
            if ((c.top_k && i >= c.top_k) || q < c.min_p) q = 0;
            total += q;
        }
        for (const auto& [cost, id] : likeliest) {
            const double q = p[size_t(id)];
            if (before >= c.top_p * total && before > 0) p[size_t(id)] = 0;
            before += q;
        }
        total = 0;
        for (const double q : p) total += q;
        Batch batch;
        batch.tokens = prompt, batch.positions = {0, 1, 2, 3}, batch.row_start = {0, 4};
        batch.pages[0] = batch.pages[1] = {0}, batch.pages_per_row = 1;
        for (int i = 0; i < draws; i++) {
            batch.outputs.push_back(
                {3,
                 0,
                 -1,
                 i % 10,
                 {c.temperature, c.top_k, c.top_p, c.min_p, uint64_t(i / 10), -1}});
        }
        const Results drawn = engine.model->step(batch);
        CHECK(ids_of(drawn) == ids_of(engine.model->step(batch)));
        std::vector<int> counts(size_t(V), 0);
        for (const Result& r : drawn) counts[size_t(r.id)]++;
        double chi2 = 0, rest = draws;
        int cells = 0;
        for (int id = 0; id < V; id++) {
            const double expected = draws * p[size_t(id)] / total;
            CHECK((counts[size_t(id)] == 0 || expected > 0));
            if (expected < 10) continue;
            chi2 += std::pow(counts[size_t(id)] - expected, 2) / expected;
            rest -= expected, cells++;
        }
        // Chi squared has mean `cells` and variance 2 cells; five deviations are one run in a
        // million, and the seeds are fixed.
        INFO("temperature " << c.temperature << " top_k " << c.top_k << " top_p " << c.top_p
                            << " min_p " << c.min_p << ": chi2 " << chi2 << " of " << cells
                            << " cells");
        CHECK(chi2 < cells + 5 * std::sqrt(2. * cells) + 1);
        CHECK(cells > 0);
    }
}
