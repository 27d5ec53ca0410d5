// SPDX-License-Identifier: Apache-2.0
//
// Compares the engines with Hugging Face (within tolerances that are derived here and printed) and
// with themselves (equal to the last bit). tests/make_golden.py makes the golden files.
//
// The macro GEMMA_CUDA adds the CUDA engine, where it can run. GEMMA_EMULATED means that this
// engine is gemma.cu compiled for the CPU with tests/cuda_on_cpu.h: then only it is tested, and the
// tests do less work.
#include <cmath>
#include <map>
#include <random>

#include <nlohmann/json.hpp>

#include "test.h"
#include "run.h"

using namespace gemma;
using nlohmann::json;

#ifndef GEMMA_CUDA
#define GEMMA_CUDA 0
#endif
#ifndef GEMMA_EMULATED
#define GEMMA_EMULATED 0
#endif

namespace {

const std::filesystem::path golden = repository / "tests/golden";
// With an empty CUDA_VISIBLE_DEVICES the emulated build tests the CPU engine like other builds.
const char* const visible = std::getenv("CUDA_VISIBLE_DEVICES");
const bool emulated = GEMMA_EMULATED && (!visible || *visible);
#ifdef __SANITIZE_ADDRESS__  // a tenth of the speed: fewer sequences and budgets
constexpr bool sanitized = true;
#else
constexpr bool sanitized = false;
#endif

enum class Device { cpu, cuda };
const char* name_of(Device device) { return device == Device::cpu ? "CPU" : "CUDA"; }

// The engines to test. Prints once what is left out.
const std::vector<Device>& devices() {
    static const std::vector<Device> all = [] {
        std::vector<Device> found;
        if (!emulated) found.push_back(Device::cpu);
#if GEMMA_CUDA
        const std::string missing = cuda_missing();
        if (missing.empty()) {
            found.push_back(Device::cuda);
        } else {
            std::printf("skipped: the CUDA engine: %s\n", missing.c_str());
        }
#endif
        if (emulated) {
            std::printf(
                "emulated: without the CPU engine's own runs; every 16th id's logprob, 1,000 draws "
                "instead of 20,000, crowds of 5 sequences instead of 65 and 3 budgets instead of "
                "11\n");
        }
        if (found.empty()) throw std::runtime_error("there is no engine to test");
        return found;
    }();
    return all;
}

std::unique_ptr<Model> open(const Checkpoint& checkpoint, Device device) {
#if GEMMA_CUDA
    if (device == Device::cuda) return open_cuda(checkpoint, {4096, 0.5});
#endif
    (void)device;
    return open_cpu(checkpoint);
}

struct Engine {
    Engine(const std::filesystem::path& directory, Device device, int pages = 1024)
        : checkpoint(directory.string()), model(open(checkpoint, device)) {
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

// Log softmax in double precision.
std::vector<double> log_softmax(const float* logits, int V) {
    const double top = *std::max_element(logits, logits + V);
    double total = 0;
    for (int i = 0; i < V; i++) total += std::exp(logits[i] - top);
    std::vector<double> out(size_t(V), 0);
    for (int i = 0; i < V; i++) out[size_t(i)] = logits[i] - top - std::log(total);
    return out;
}

// A step with one row: all of `ids`, nothing computed before.
Batch one_row(const std::vector<int>& ids) {
    Batch batch;
    batch.tokens = ids;
    batch.row_start = {0, int(ids.size())};
    batch.pages_per_row = int(ids.size()) / page_tokens + 1;
    for (size_t i = 0; i < ids.size(); i++) batch.positions.push_back(int(i));
    for (auto& table : batch.pages) {
        for (int i = 0; i < batch.pages_per_row; i++) table.push_back(i);
    }
    return batch;
}

// The logprobs of every `stride`th id of the vocabulary at each of `positions`, in one step.
Results score(Engine& engine, const std::vector<int>& ids, const std::vector<int>& positions,
              int stride = 1) {
    Batch batch = one_row(ids);
    for (const int position : positions) {
        for (int id = 0; id < engine.checkpoint.config.V; id += stride) {
            batch.outputs.push_back({position, id, 0, {}, {}, nullptr});
        }
    }
    return engine.model->step(batch);
}

// For each id of `greedy`: its logprob after the prompt and the ids of `greedy` before it, and the
// `top` likeliest ids at that place.
Results follow(Engine& engine, std::vector<int> ids, const std::vector<int>& greedy, int top) {
    const int first = int(ids.size()) - 1;
    ids.insert(ids.end(), greedy.begin(), greedy.end());
    Batch batch = one_row(ids);
    for (int i = 0; i < int(greedy.size()); i++)
        batch.outputs.push_back({first + i, greedy[size_t(i)], i, {.logprobs = top}, {}, nullptr});
    return engine.model->step(batch);
}

std::vector<int> ids_of(const Results& results) {
    std::vector<int> ids;
    for (const Result& r : results) ids.push_back(r.id);
    return ids;
}

// How far an engine's logprobs may be from Hugging Face's fp32 run.
//
// The CPU engine computes in fp32 too, so the two differ by the roundings of their sums. The error
// of transformers' sums was measured against float64. Ours may be as large, so the difference is at
// most twice that, and a factor of 4 covers the extremes of other inputs. Log softmax adds the
// largest rounding of a logprob near -32, and V probabilities rounded to 2^-40.
//
// The CUDA engine rounds fewer values to bf16 than transformers does in bf16 (its residual stream
// and all sums stay fp32), so it may be off by as much as that run. The run's error was measured on
// a few rows only: again a factor of 4.
double tolerance_of(const json& g, Device device, int V) {
    const double roundings = device == Device::cpu ? 8 * double(g["fp64_max_abs_diff"])
                                                   : 4 * double(g["bf16_max_abs_diff"]);
    return roundings + 0x1p-19 + V * 0x1p-40;
}

struct Difference {
    double worst = 0, squares = 0, count = 0;
    void add(double a, double b) {
        worst = std::max(worst, std::abs(a - b));
        squares += (a - b) * (a - b), count++;
    }
    double rms() const { return std::sqrt(squares / count); }
};

void check_difference(const Difference& d, double tolerance, Device device,
                      const std::string& model) {
    std::printf("%-4s %-10s max |logprob - Hugging Face's| %.2e = %2.0f%% of the tolerance\n",
                name_of(device), model.c_str(), d.worst, 100 * d.worst / tolerance);
    CHECK(d.worst <= tolerance);
}

// Compares greedy text after each prompt. The CPU engine generates its own, which must equal
// Hugging Face's. For the CUDA engine that is too strict: its tolerance is larger than most gaps
// between the two best logits, and one different id changes all text after it. So it is fed Hugging
// Face's text and asked for the logprob of each id, which may be below its own best by at most
// twice the tolerance (one logprob may be too low by it, the other too high). Where Hugging Face's
// gap is larger than that, the best id must be the same.
std::vector<Results> check_greedy(Engine& engine, Device device, const json& prompts,
                                  double tolerance, int top) {
    Scheduler scheduler(limits_of(engine.checkpoint.config, 256, 512));
    Sequences sequences;
    std::vector<Results> answers;
    for (const json& prompt : prompts) {
        const std::vector<int> ids = prompt["ids"], greedy = prompt["greedy"];
        if (device == Device::cuda) {
            answers.push_back(follow(engine, ids, greedy, top));
            continue;
        }
        sequences.push_back(sequence(ids, int(greedy.size()), {.temperature = 0, .logprobs = top}));
        scheduler.add(sequences.back());
    }
    auto all = run(*engine.model, scheduler);
    for (const auto& s : sequences) answers.push_back(all[s.get()]);
    size_t best = 0, total = 0;
    for (size_t p = 0; p < answers.size(); p++) {
        INFO("prompt of " << prompts[p]["ids"].size() << ", smallest gap "
                          << prompts[p]["min_gap"]);
        CHECK(ids_of(answers[p]) == prompts[p]["greedy"].get<std::vector<int>>());
        for (const Result& r : answers[p]) {
            CHECK(r.logprob >= r.top.at(0).logprob - 2 * tolerance);
            best += r.rank == 1, total++;
        }
    }
    if (device == Device::cuda)
        std::printf("CUDA %zu of %zu greedy ids are its own best\n", best, total);
    return answers;
}

void check_golden(const std::string& name, Device device) {
    const json g = json::parse(read_file(golden / (name + ".json")));
    const std::vector<float> logits = read_floats(golden / g["logits_file"]);
    const int V = g["vocab_size"], stride = emulated ? 16 : 1;
    const double tolerance = tolerance_of(g, device, V);
    const auto row = [&](int i) { return log_softmax(logits.data() + size_t(i) * size_t(V), V); };
    for (const std::string directory : g["checkpoints"]) {
        INFO(name_of(device) << ", " << directory);
        Engine engine(std::filesystem::exists(golden / directory) ? golden / directory
                                                                  : repository / directory,
                      device);
        Difference ours, low;
        for (const json& prompt : g["prompts"]) {
            std::vector<int> ids = prompt["ids"];
            const std::vector<int> greedy = prompt["greedy"], positions = prompt["positions"];
            const int first_row = prompt["first_row"], last = int(ids.size()) - 1;
            const auto low_row = row(prompt["bf16_row"]);
            ids.insert(ids.end(), greedy.begin(), greedy.end());
            const Results results = score(engine, ids, positions, stride);
            auto result = results.begin();
            for (int i = 0; i < int(positions.size()); i++) {
                const auto want = row(first_row + i);
                for (size_t id = 0; id < want.size(); id += size_t(stride)) {
                    ours.add(result++->logprob, want[id]);
                    if (positions[size_t(i)] == last) low.add(low_row[id], want[id]);
                }
            }
        }
        check_difference(ours, tolerance, device, directory);
        // The rms needs no factor for extremes: it shows a rounding that is too coarse.
        if (device == Device::cuda)
            std::printf("CUDA %-10s rms %.2e, of transformers in bf16 %.2e\n", directory.c_str(),
                        ours.rms(), low.rms());
        CHECK(ours.rms() <= low.rms());
        check_greedy(engine, device, g["prompts"], tolerance, 1);
    }
}

}  // namespace

TEST_CASE("logits and greedy text are Hugging Face's, in every branch of the family") {
    for (const Device device : devices()) {
        for (const char* name : {"1b", "270m", "4b", "27b", "v5"}) check_golden(name, device);
    }
}

TEST_CASE("the demo model's logits and 240 greedy tokens are Hugging Face's") {
    for (const Device device : devices()) check_golden("demo", device);
}

TEST_CASE("real Gemma 3 270M: greedy text and the 20 likeliest tokens are Hugging Face's",
          "[real]") {
    const char* directory = std::getenv("GEMMA_REAL");
    if (!directory) SKIP_BECAUSE("GEMMA_REAL does not name a directory with google/gemma-3-270m");
    const json g = json::parse(read_file(golden / "real-270m.json"));
    for (const Device device : devices()) {
        INFO(name_of(device));
        Engine engine(directory, device, 512);
        const double tolerance = tolerance_of(g, device, engine.checkpoint.config.V);
        const auto all = check_greedy(engine, device, g["prompts"], tolerance, 20);
        Difference ours;
        for (size_t p = 0; p < all.size(); p++) {
            for (const json& top : g["prompts"][p]["top"]) {
                std::map<int, double> want;
                for (size_t i = 0; i < 20; i++) want[top["ids"][i]] = top["logprobs"][i];
                for (const auto& t : all[p][size_t(top["index"])].top) {
                    // If two ids are about equally likely, either may be the twentieth.
                    ours.add(t.logprob,
                             want.count(t.id) ? want[t.id] : double(top["logprobs"][19]));
                }
            }
        }
        check_difference(ours, tolerance, device, "270M");
    }
}

#if GEMMA_CUDA
TEST_CASE("the CUDA engine's logprobs are the CPU engine's") {
    for (const Device device : devices()) {
        if (device == Device::cpu) continue;
        const json g = json::parse(read_file(golden / "4b.json"));
        Engine gpu(golden / "4b", Device::cuda), cpu(golden / "4b", Device::cpu);
        const std::vector<int> ids = g["prompts"][2]["ids"];
        const int last = int(ids.size()) - 1, stride = emulated ? 16 : 1;
        const Results ours = score(gpu, ids, {31, last}, stride),
                      theirs = score(cpu, ids, {31, last}, stride);
        Difference d;
        for (size_t i = 0; i < ours.size(); i++) d.add(ours[i].logprob, theirs[i].logprob);
        const double tolerance = tolerance_of(g, Device::cuda, g["vocab_size"]);
        std::printf("CUDA 4b         max |logprob - the CPU engine's| %.2e = %2.0f%%\n", d.worst,
                    100 * d.worst / tolerance);
        CHECK(d.worst <= tolerance);
    }
}
#endif

// [equalities] -----------------------------------------------------------------------------------

namespace {

// Sets penalties and biases the way a request does.
void penalise(Sequence& s, const std::map<int, float>& biases) {
    s.presence = 0.5f, s.frequency = 0.25f, s.repetition = 1.2f;
    std::map<int, Adjustment> adjustments;
    for (const auto& [id, bias] : biases) adjustments[id] = {id, bias};
    for (const int id : s.tokens) adjustments[id].id = id, adjustments[id].repetition = 1.2f;
    for (const auto& [id, adjustment] : adjustments) s.adjustments.push_back(adjustment);
}

// Prompts of lengths around pages, windows and chunks; some greedy, some sampled, all with
// logprobs. Of each five sequences the second has penalties, the third prompt_logprobs, the fourth
// masks of allowed ids, the fifth all three.
Sequences crowd(const Config& config, int count, unsigned seed) {
    std::mt19937 random(seed);
    const auto pick = [&](int low, int high) {
        return std::uniform_int_distribution<int>(low, high)(random);
    };
    Sequences all;
    for (int i = 0; i < count; i++) {
        std::vector<int> prompt{Tokenizer::bos};
        for (int n = pick(0, 1) ? pick(0, 8) : pick(20, 150); n > 0; n--)
            prompt.push_back(pick(3, config.vocab - 1));
        Sampling sampling{.seed = random(), .logprobs = 5};
        if (i % 3 == 0) sampling.temperature = 0;
        if (i % 3 == 1) sampling.top_k = 20, sampling.top_p = 0.9f;
        all.push_back(sequence(prompt, pick(1, 90), sampling));
        Sequence& s = *all.back();
        if (i % 5 == 1 || i % 5 == 4)
            penalise(s, {{pick(0, config.vocab - 1), 4}, {prompt[0], -1}, {prompt.back(), 1}});
        if (i % 5 == 2 || i % 5 == 4) {
            s.prompt_logprobs = 5;
            s.max_tokens = std::max(0, s.max_tokens - s.prompt_tokens);  // keeps the cost the same
        }
        if (i % 5 == 3 || i % 5 == 4) {
            std::vector<uint32_t> masks[2];
            for (auto& mask : masks) {
                for (int id = 0; id < config.vocab; id += 32) mask.push_back(uint32_t(random()));
            }
            s.allowed_before = std::make_shared<const std::vector<uint32_t>>(masks[0]);
            s.allowed = std::make_shared<const std::vector<uint32_t>>(masks[1]);
            s.min_tokens = pick(1, 20);
        }
    }
    return all;
}

std::shared_ptr<Sequence> fresh(const Sequence& s) {
    const auto copy = sequence(s.tokens, s.max_tokens, s.sampling);
    copy->prompt_logprobs = s.prompt_logprobs;
    copy->presence = s.presence, copy->frequency = s.frequency, copy->repetition = s.repetition;
    copy->adjustments = s.adjustments;
    copy->allowed = s.allowed, copy->allowed_before = s.allowed_before;
    copy->min_tokens = s.min_tokens;
    return copy;
}

std::vector<Results> results_of(Model& model, const Limits& limits, const Sequences& sequences,
                                int* preemptions = nullptr) {
    Scheduler scheduler(limits);
    Sequences copies;
    for (const auto& s : sequences) scheduler.add(copies.emplace_back(fresh(*s)));
    auto all = run(model, scheduler);
    if (preemptions) *preemptions = scheduler.preemptions();
    std::vector<Results> in_order;
    for (const auto& s : copies) in_order.push_back(all[s.get()]);
    for (const Pool pool : pools) CHECK(scheduler.use(pool).held == 0);
    return in_order;
}

void check_equalities(const char* name, Device device) {
    Engine engine(repository / name, device);
    const Config& config = engine.checkpoint.config;
    INFO(name_of(device) << ", " << name);
    const auto sequences = crowd(config,
                                 emulated                 ? 5
                                 : sanitized              ? 10
                                 : device == Device::cuda ? 65
                                                          : 33,
                                 7);
    std::vector<Results> alone;
    for (const auto& s : sequences)
        alone.push_back(results_of(*engine.model, limits_of(config, 4096), {s})[0]);
    const auto equal = [&](const std::vector<Results>& others) {
        for (size_t i = 0; i < alone.size(); i++) {
            INFO("sequence " << i << ", prompt of " << sequences[i]->prompt_tokens);
            CHECK(same(others[i], alone[i]));
        }
    };
    // All together, with budgets below and above the sizes of the kernels' tiles.
    const std::vector<int> few{2, 9, 65}, all{1, 2, 7, 8, 9, 16, 17, 32, 64, 65, 4096};
    for (const int budget : emulated || sanitized ? few : all) {
        INFO("up to " << budget << " tokens a step");
        equal(results_of(*engine.model, limits_of(config, budget), sequences));
    }
    // One after another; the second round takes its prompts from the prefix cache.
    Scheduler scheduler(limits_of(config));
    for (const int round : {0, 1}) {
        std::vector<Results> results;
        int cached = 0;
        for (const auto& s : sequences) {
            const auto copy = fresh(*s);
            scheduler.add(copy);
            results.push_back(run(*engine.model, scheduler)[copy.get()]);
            cached += copy->cached_tokens;
            if (s->prompt_logprobs >= 0) CHECK(copy->cached_tokens == 0);
        }
        equal(results);
        CHECK((cached > 0) == (round == 1));
    }
    // All together, with so few pages that sequences are preempted again and again.
    int preemptions = 0;
    equal(results_of(*engine.model, limits_of(config, 64, 9), sequences, &preemptions));
    CHECK(preemptions > 0);
}

}  // namespace

TEST_CASE("a sequence's bits do not depend on its neighbours, chunks, cache or preemption") {
    for (const Device device : devices()) {
        for (const char* name :
             {"tests/golden/1b", "tests/golden/4b", "tests/golden/27b", "demo/model"}) {
            check_equalities(name, device);
        }
    }
}

TEST_CASE("the logprobs of a prompt are those with which it was generated") {
    for (const Device device : devices()) {
        for (const char* name :
             {"tests/golden/1b", "tests/golden/4b", "tests/golden/27b", "demo/model"}) {
            INFO(name_of(device) << ", " << name);
            Engine engine(repository / name, device);
            const Config& config = engine.checkpoint.config;
            Sequences writers, readers;
            for (const int size : {3, 20, 50}) {
                std::vector<int> prompt{Tokenizer::bos};
                for (int i = 1; i < size; i++) prompt.push_back(3 + i * 7 % (config.vocab - 3));
                const float temperature = size == 20 ? 1 : 0;
                writers.push_back(
                    sequence(prompt, 40, {.temperature = temperature, .seed = 5, .logprobs = 5}));
            }
            const auto written = results_of(*engine.model, limits_of(config), writers);
            for (size_t i = 0; i < writers.size(); i++) {
                std::vector<int> text = writers[i]->tokens;
                for (const int id : ids_of(written[i])) text.push_back(id);
                readers.push_back(sequence(text, int(i % 2)));
                readers.back()->prompt_logprobs = 5;
            }
            for (const int budget : {33, 4096}) {
                const auto read = results_of(*engine.model, limits_of(config, budget), readers);
                for (size_t i = 0; i < readers.size(); i++) {
                    INFO("prompt of " << writers[i]->prompt_tokens << ", " << budget << " a step");
                    REQUIRE(int(read[i].size()) == readers[i]->prompt_tokens - 1 + int(i % 2));
                    const auto first = read[i].begin() + writers[i]->prompt_tokens - 1;
                    CHECK(same({first, first + 40}, written[i]));
                }
                if (emulated) break;  // 33 only: the emulation is slow
            }
        }
    }
}

// A hash over all bits of a crowd's results.
uint64_t hash_of_crowd(const char* name, Device device, uint64_t hash) {
    const auto add = [&](const auto& value) {
        unsigned char bytes[sizeof value];
        std::memcpy(bytes, &value, sizeof value);
        for (const unsigned char byte : bytes) hash = (hash ^ byte) * 1099511628211u;  // FNV-1a
    };
    Engine engine(golden / name, device);
    const auto sequences = crowd(engine.checkpoint.config, 16, 11);
    for (const Results& results :
         results_of(*engine.model, limits_of(engine.checkpoint.config), sequences)) {
        for (const Result& r : results) {
            add(r.id), add(r.logprob), add(r.rank);
            for (const auto& top : r.top) add(top.id), add(top.logprob);
        }
    }
    return hash;
}

// Prints a hash for each engine, to compare builds. ./dev sanitize compares builds for different
// vector widths, which must agree. A change that should change no bit can be checked the same way.
TEST_CASE("bits", "[.][bits]") {
    for (const Device device : devices()) {
        uint64_t hash = 14695981039346656037u;
        for (const char* name : {"1b", "4b", "27b"}) hash = hash_of_crowd(name, device, hash);
        std::printf("bits %s %016lx\n", name_of(device), static_cast<unsigned long>(hash));
    }
}

// [sampler] --------------------------------------------------------------------------------------

namespace {

// How a token is sampled after `drawn_after`, on the 1b golden's checkpoint.
struct Draw {
    Sampling sampling;
    std::vector<Adjustment> adjustments = {};
    std::vector<int> allowed = {};  // empty: all
};

const std::vector<int> drawn_after{Tokenizer::bos, 17, 300, 41};

Output output_of(const Draw& draw, int vocab, int index = 0) {
    Output out{3, -1, index, draw.sampling, draw.adjustments, nullptr};
    if (draw.allowed.empty()) return out;
    std::vector<uint32_t> bits(size_t(vocab + 31) / 32, 0);
    for (const int id : draw.allowed) bits[size_t(id / 32)] |= 1u << id % 32;
    out.allowed = std::make_shared<const std::vector<uint32_t>>(bits);
    return out;
}

Result draw(Engine& engine, const Draw& d) {
    Batch batch = one_row(drawn_after);
    batch.outputs.push_back(output_of(d, engine.checkpoint.config.vocab));
    return engine.model->step(batch).at(0);
}

// The raw logit of `id`; logprobs give it up to a constant only. By bisection: at which bias does
// `id` win against `other`, whose logit a huge repetition penalty makes 0?
double raw_logit(Engine& engine, int id, int other) {
    double low = -64, high = 64;  // with bias low `id` loses, with high it wins
    while (high - low > 0x1p-16) {
        const double bias = (low + high) / 2;
        const Draw d{{.temperature = 0}, {{other, 100, 1e30f, 0}, {id, float(bias)}}, {id, other}};
        (draw(engine, d).id == id ? high : low) = bias;
    }
    return -high;
}

// The exact probabilities, in double: adjust the logits, sort, cut, renormalise.
std::vector<double> distribution(std::vector<double> logits, const Draw& d) {
    const Sampling& s = d.sampling;
    for (const Adjustment& a : d.adjustments) {
        double& z = logits[size_t(a.id)];
        z += a.bias;
        z = z > 0 ? z / a.repetition : z * a.repetition;
        z -= a.penalty;
    }
    std::vector<std::pair<double, int>> likeliest;
    for (int id = 0; id < int(logits.size()); id++) {
        if (d.allowed.empty() || std::count(d.allowed.begin(), d.allowed.end(), id))
            likeliest.push_back({-logits[size_t(id)], id});
    }
    std::sort(likeliest.begin(), likeliest.end());
    std::vector<double> p(logits.size(), 0);
    double total = 0, before = 0;
    for (size_t i = 0; i < likeliest.size(); i++) {
        const auto [cost, id] = likeliest[i];
        double q = std::exp((likeliest[0].first - cost) / s.temperature);
        if ((s.top_k && i >= size_t(s.top_k)) || q < s.min_p) q = 0;
        p[size_t(id)] = q;
        total += q;
    }
    for (const auto& [cost, id] : likeliest) {
        const double q = p[size_t(id)];
        if (before >= s.top_p * total && before > 0) p[size_t(id)] = 0;
        before += q;
    }
    total = 0;
    for (const double q : p) total += q;
    for (double& q : p) q /= total;
    return p;
}

// Checks that draws follow `p`, and that the same step draws the same ids again.
void check_draws(Engine& engine, const Draw& d, const std::vector<double>& p) {
    const int draws = emulated ? 1'000 : 20'000;
    Batch batch = one_row(drawn_after);
    for (int i = 0; i < draws; i++) {
        batch.outputs.push_back(output_of(d, int(p.size()), i % 10));
        batch.outputs.back().sampling.seed = uint64_t(i / 10);
    }
    const Results drawn = engine.model->step(batch);
    CHECK(ids_of(drawn) == ids_of(engine.model->step(batch)));
    std::vector<int> counts(p.size(), 0);
    for (const Result& r : drawn) counts[size_t(r.id)]++;
    double chi2 = 0;
    int cells = 0;
    for (size_t id = 0; id < p.size(); id++) {
        const double expected = draws * p[id];
        CHECK((counts[id] == 0 || expected > 0));
        if (expected < 10) continue;
        chi2 += std::pow(counts[id] - expected, 2) / expected;
        cells++;
    }
    // Chi squared has mean `cells` and variance 2 * cells. Five standard deviations are rarely
    // exceeded by chance, and the seeds are fixed, so the outcome never varies.
    const Sampling& s = d.sampling;
    INFO("temperature " << s.temperature << " top_k " << s.top_k << " top_p " << s.top_p
                        << " min_p " << s.min_p << ", " << d.adjustments.size() << " adjusted, "
                        << d.allowed.size() << " allowed: chi2 " << chi2 << " of " << cells
                        << " cells");
    CHECK(chi2 < cells + 5 * std::sqrt(2. * cells) + 1);
    CHECK(cells > 0);
}

// The raw logits after `drawn_after`, and the ids, likeliest first.
struct Logits {
    explicit Logits(Engine& engine) {
        for (const Result& r : score(engine, drawn_after, {3})) {
            values.push_back(r.logprob);
            ids.push_back(r.id);
        }
        std::sort(ids.begin(), ids.end(), [&](int a, int b) {
            return std::pair(-values[size_t(a)], a) < std::pair(-values[size_t(b)], b);
        });
        constant = raw_logit(engine, ids[0], ids[1]) - values[size_t(ids[0])];
        for (double& z : values) z += constant;
    }
    std::vector<double> values;
    std::vector<int> ids;
    double constant;  // logit - logprob
};

}  // namespace

TEST_CASE(
    "draws follow the softmax, top-k, top-p and min-p, and depend on the seed and the index "
    "alone") {
    for (const Device device : devices()) {
        INFO(name_of(device));
        Engine engine(golden / "1b", device);
        const Logits logits(engine);
        for (const Draw& d : {Draw{{1, 0, 1, 0}},
                              {{0.7f, 0, 1, 0}},
                              {{1, 5, 1, 0}},
                              {{1.5f, 40, 0.6f, 0}},
                              {{1, 0, 1, 0.2f}},
                              {{1, 0, 0.0001f, 0}},
                              {{1, 1, 1, 0}}}) {
            check_draws(engine, d, distribution(logits.values, d));
        }
    }
}

TEST_CASE("draws follow adjusted logits and stay within the allowed ids") {
    for (const Device device : devices()) {
        INFO(name_of(device));
        Engine engine(golden / "1b", device);
        const Logits logits(engine);
        const auto& by_rank = logits.ids;
        // Biases move the logits of the 40 likeliest ids to -2 .. 2, so that both branches of the
        // repetition penalty (positive and negative logits) are used; negative penalties then raise
        // them above the others again.
        std::vector<Adjustment> some, even;
        for (int i = 0; i < 40; i++) {
            const int id = by_rank[size_t(i)];
            some.push_back({id, float(0.5 * (i % 9) - 2 - logits.values[size_t(id)]),
                            i % 2 ? 1.5f : 0.75f, 0.25f * float(i % 5) - 6});
            even.push_back({id, 3});
        }
        const std::vector<int> forty(by_rank.begin(), by_rank.begin() + 40);
        const std::vector<int> three{by_rank[0], by_rank[40], by_rank[300]};
        std::vector<Adjustment> near;  // brings the three logits close together
        for (const int id : three)
            near.push_back(
                {id, float(1 - logits.values[size_t(id)]), 1, 0.5f * float(near.size())});
        for (const Draw& d : {Draw{{1, 0, 1, 0}, some},
                              {{1.5f, 20, 0.8f, 0}, some},
                              {{1, 0, 1, 0.1f}, some},
                              {{1, 0, 1, 0}, some, forty},
                              {{1, 0, 1, 0}, {}, three},
                              {{1, 0, 1, 0}, near, three},
                              {{1, 2, 1, 0}, near, three},
                              {{1, 0, 0.7f, 0}, near, three},
                              {{1, 0, 1, 0.5f}, near, three},
                              {{1, 0, 1, 0}, {}, {by_rank[300]}},
                              // min_p is relative to the likeliest allowed id, not of all ids.
                              {{1, 0, 1, 0.5f}, {}, {by_rank[100], by_rank[101]}}}) {
            check_draws(engine, d, distribution(logits.values, d));
        }
        // The same bias on all allowed ids changes nothing.
        check_draws(engine, {{1, 0, 1, 0}, even, forty},
                    distribution(logits.values, {{1, 0, 1, 0}, {}, forty}));
    }
}

TEST_CASE("greedy sees adjustments and the allowed ids, and takes the lowest of equal logits") {
    for (const Device device : devices()) {
        INFO(name_of(device));
        Engine engine(golden / "1b", device);
        const auto likeliest = draw(engine, {{.temperature = 0, .logprobs = 3}}).top;
        const int first = likeliest.at(0).id, second = likeliest.at(1).id, third = likeliest[2].id;
        const auto greedy = [&](const std::vector<Adjustment>& adjustments,
                                const std::vector<int>& allowed = {}) {
            return draw(engine, {{.temperature = 0}, adjustments, allowed}).id;
        };
        CHECK(greedy({}) == first);
        CHECK(greedy({{first, -100}}) == second);
        CHECK(greedy({{first, 0, 1, 100}, {second, -100}}) == third);
        CHECK(greedy({{77, 100}}) == 77);
        CHECK(greedy({{first, 0, 1e30f}}) == second);  // a positive logit divided by 1e30 is 0
        CHECK(greedy({}, {second, third}) == second);
        CHECK(greedy({{first, 100}}, {second, third}) == second);
        CHECK(greedy({{third, 100}}, {second, third}) == third);
        CHECK(greedy({{first, -100}}, {first}) == first);
        // A penalty of 1e30 makes all logits equal: the logit is lost in rounding.
        std::vector<Adjustment> equal;
        for (int id = 0; id < engine.checkpoint.config.vocab; id++)
            equal.push_back({id, 0, 1, 1e30f});
        CHECK(greedy(equal) == 0);
        CHECK(greedy(equal, {77, 78, 300}) == 77);
        CHECK(greedy({{300, 1e30f}, {78, 1e30f}}) == 78);
        CHECK(greedy({}, {0}) == 0);
        CHECK(greedy({}, {511}) == 511);
        // Where top-k cuts among equal logits, it keeps the lowest ids.
        for (uint64_t seed = 0; seed < 20; seed++) {
            const Draw d{{.top_k = 2, .seed = seed}, equal, {77, 78, 300}};
            CHECK(draw(engine, d).id <= 78);
        }
    }
}

namespace {

// The 1b golden without the last ids of its vocabulary.
std::filesystem::path cut_vocabulary(int V) {
    const auto from = golden / "1b";
    std::string name = (std::filesystem::temp_directory_path() / "gemma-cut-XXXXXX").string();
    if (!mkdtemp(name.data())) throw std::runtime_error("no temporary directory");
    json config = json::parse(read_file(from / "config.json"));
    config["vocab_size"] = V;
    const std::string file = read_file(from / "model.safetensors");
    uint64_t length;
    std::memcpy(&length, file.data(), 8);
    json header = json::parse(file.substr(8, length));
    std::string data;
    for (auto& [tensor, entry] : header.items()) {
        if (tensor == "__metadata__") continue;
        const uint64_t begin = entry["data_offsets"][0], end = entry["data_offsets"][1];
        std::string bytes = file.substr(8 + length + begin, end - begin);
        if (tensor == "model.embed_tokens.weight") {
            bytes.resize(bytes.size() / entry["shape"][0].get<size_t>() * size_t(V));
            entry["shape"][0] = V;
        }
        entry["data_offsets"] = {data.size(), data.size() + bytes.size()};
        data += bytes;
    }
    std::string head = header.dump();
    head.resize((head.size() + 7) / 8 * 8, ' ');
    length = head.size();
    std::ofstream(name + "/config.json") << config;
    std::ofstream(name + "/model.safetensors", std::ios::binary)
        << std::string(reinterpret_cast<const char*>(&length), 8) << head << data;
    return name;
}

}  // namespace

TEST_CASE("D8: rows that pad an embedding are never sampled and count nowhere") {
    constexpr int V = 509;
    const auto directory = cut_vocabulary(V);
    for (const Device device : devices()) {
        INFO(name_of(device));
        Engine whole(golden / "1b", device), cut(directory, device);
        REQUIRE(cut.checkpoint.config.V == V);
        REQUIRE(cut.checkpoint.config.vocab == V);
        REQUIRE(cut.checkpoint.config.rows() == 512);
        // The logits are those of the whole embedding, so a logprob lacks what the other ids had.
        const Results all = score(whole, drawn_after, {1, 3}),
                      some = score(cut, drawn_after, {1, 3});
        for (const size_t at : {0, 1}) {
            double kept = 0;
            for (size_t id = 0; id < V; id++) kept += std::exp(double(all[at * 512 + id].logprob));
            for (size_t id = 0; id < V; id++) {
                const float was = all[at * 512 + id].logprob;
                REQUIRE(some[at * V + id].logprob == Approx(was - std::log(kept)).margin(1e-5));
            }
        }
        // All ids get logits so low that a row of zeros would win.
        std::vector<Adjustment> low;
        for (int id = 0; id < V; id++) low.push_back({id, 0, 1, 1e30f});
        for (const float temperature : {0.f, 1.f, 100.f}) {
            Batch batch = one_row(drawn_after);
            for (uint64_t seed = 0; seed < 64; seed++) {
                const Sampling s{.temperature = temperature, .seed = seed, .logprobs = 20};
                batch.outputs.push_back(
                    output_of({s, seed % 2 ? low : std::vector<Adjustment>{}}, V));
            }
            for (const Result& r : cut.model->step(batch)) {
                REQUIRE(r.id < V);
                REQUIRE(r.rank <= V);
                for (const Result::Top& top : r.top) REQUIRE(top.id < V);
            }
        }
    }
    std::filesystem::remove_all(directory);
}

TEST_CASE("logprobs are the raw logits', whatever is sampled") {
    for (const Device device : devices()) {
        INFO(name_of(device));
        Engine engine(golden / "1b", device);
        const int vocab = engine.checkpoint.config.vocab;
        const Results every = score(engine, drawn_after, {3});
        const std::vector<Adjustment> shift{{7, 50}, {8, -50, 2, 3}, {300, 0, 1.3f, 0.5f}};
        // All in one step: the adjustments of one output must not affect the next.
        Batch batch = one_row(drawn_after);
        for (uint64_t seed = 0; seed < 8; seed++) {
            for (const Draw& d : {Draw{{.seed = seed, .logprobs = 20}},
                                  {{.seed = seed, .logprobs = 20}, shift},
                                  {{.seed = seed, .logprobs = 20}, {}, {3, 8, 300}},
                                  {{.seed = seed, .logprobs = 20}, shift, {3, 8, 300}}}) {
                batch.outputs.push_back(output_of(d, vocab));
                batch.outputs.push_back(output_of(d, vocab));
                batch.outputs.back().target = 8;
            }
        }
        const Results results = engine.model->step(batch);
        for (size_t i = 0; i < results.size(); i++) {
            INFO("output " << i);
            // The same id as the target of the only output of a step.
            Batch alone = one_row(drawn_after);
            alone.outputs.push_back({3, results[i].id, 0, {.logprobs = 20}, {}, nullptr});
            CHECK(same({results[i]}, engine.model->step(alone)));
            CHECK(results[i].logprob == every[size_t(results[i].id)].logprob);
            if (i % 2) CHECK(results[i].id == 8);
            // Its bias of 50 makes it exp(50) times as likely.
            if (i % 8 == 2) CHECK(results[i].id == 7);
            if (i % 8 == 4)
                CHECK((results[i].id == 3 || results[i].id == 8 || results[i].id == 300));
        }
    }
}
