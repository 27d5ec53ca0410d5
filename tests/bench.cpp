// SPDX-License-Identifier: Apache-2.0
//
// ./dev bench: one table, every ratio measured in this run.
//
//   - a full-size random Gemma 3 1B, made when first needed: decode, batches, prefill
//   - the demo model: what HTTP costs with 16 streams at once
//   - exec to 'ready', for both
//
// Decode is bounded by reading all weights, and the K and V of the context, once a step.
#include <thread>

#include "bench.h"

using namespace bench;

namespace {

// Bytes per second of a plain read of all weights in the mapped file (make_1b puts the embedding
// first), with as many threads as the engine has; best of five. Each thread reads four pages side
// by side: one at a time is 5 % slower.
double read_bandwidth(const Checkpoint& checkpoint) {
    constexpr size_t page = 4096 / sizeof(uint64_t), streams = 4;
    const auto* memory = reinterpret_cast<const uint64_t*>(checkpoint.weights.embed);
    const size_t blocks = checkpoint.bytes / sizeof(uint64_t) / (page * streams);
    double best = 0;
    uint64_t total = 0;
    for (int round = 0; round < 5; round++) {
        const double start = now();
#pragma omp parallel for reduction(+ : total) schedule(static)
        for (size_t b = 0; b < blocks; b++) {
            const uint64_t* block = memory + b * page * streams;
            for (size_t i = 0; i < page; i++) {
                for (size_t s = 0; s < streams; s++) total += block[s * page + i];
            }
        }
        best = std::max(best, double(blocks * page * streams * sizeof(uint64_t)) / (now() - start));
    }
    if (total == 0) std::abort();  // uses the sums, so the reads cannot be optimized away
    return best;
}

// Mean seconds of a step of `batch` rows that decode at a context of `context` tokens each.
double decode(Model& model, const Config& config, int batch, int context, int pages) {
    Scheduler scheduler(limits_of(config, 1024, pages));
    std::mt19937 random(2);
    const int steps = 12;
    for (int i = 0; i < batch; i++) {
        std::vector<int> prompt;
        for (int t = 0; t < context; t++) prompt.push_back(int(random() % unsigned(config.vocab)));
        scheduler.add(sequence(prompt, steps + batch * context, {.temperature = 0}));
    }
    for (bool all_decode = false; !all_decode;) {
        const Batch& b = scheduler.next();
        all_decode = int(b.tokens.size()) == batch && int(b.outputs.size()) == batch;
        scheduler.finish(model.step(b));
    }
    const double start = now();
    for (int i = 0; i < steps; i++) scheduler.finish(model.step(scheduler.next()));
    return (now() - start) / steps;
}

double prefill(Model& model, const Config& config, int tokens, int pages) {
    Scheduler scheduler(limits_of(config, tokens, pages));
    std::mt19937 random(3);
    std::vector<int> prompt;
    for (int t = 0; t < tokens; t++) prompt.push_back(int(random() % unsigned(config.vocab)));
    scheduler.add(sequence(prompt, 1, {.temperature = 0}));
    const double start = now();
    run(model, scheduler);
    return now() - start;
}

constexpr int http_streams = 16, stream_tokens = 400;

// Tokens per second of 16 sequences, by the engine alone.
double streams_by_engine(Model& model, const Config& config) {
    Scheduler scheduler(limits_of(config, 64, 1024));
    for (int i = 0; i < http_streams; i++) {
        scheduler.add(
            sequence({Tokenizer::bos, 494 + i}, stream_tokens,
                     {.temperature = 0.7f, .top_k = 64, .top_p = 0.95f, .seed = uint64_t(i)}));
    }
    const double start = now();
    run(model, scheduler);
    return http_streams * stream_tokens / (now() - start);
}

// The same 16 streams through HTTP.
double streams_by_http(int port) {
    std::vector<std::vector<int>> prompts;
    for (int i = 0; i < http_streams; i++) prompts.push_back({Tokenizer::bos, 494 + i});
    return read_streams(port, prompts, stream_tokens).tokens_per_second;
}

std::string first_match(const char* file, const char* key) {
    std::ifstream in(file);
    for (std::string line; std::getline(in, line);) {
        if (line.starts_with(key)) return line.substr(line.find(':') + 2);
    }
    return "unknown";
}

}  // namespace

int main(int argc, char** argv) try {
    const fs::path directory = argc > 1 ? argv[1] : "build/random-1b";
    make_1b(directory);
    std::printf("./dev bench, %s, commit %s\n%s, %u threads\n\n", today().c_str(), commit().c_str(),
                first_match("/proc/cpuinfo", "model name").c_str(),
                std::thread::hardware_concurrency());
    row("what", "measured", "ratio, in this run");
    row("---", "---", "---");

    const Checkpoint checkpoint(directory.string());
    const Config& c = checkpoint.config;
    const int pages = 400;
    const auto model = open_cpu(checkpoint);
    model->allocate_pages({pages, pages});
    const double bandwidth = read_bandwidth(checkpoint);
    row("plain read of the same weights", text("%.1f GB/s", bandwidth / 1e9), "");
    // The CPU engine's K and V are fp32. Local layers read the window's, global layers all.
    double one = 0;
    for (const int batch : {1, 8}) {
        const double t = decode(*model, c, batch, 1024, pages);
        double kv = 0;
        for (int l = 0; l < c.L; l++) kv += 2. * 4 * c.G * c.E * (c.global[size_t(l)] ? 1024 : c.W);
        const double share = (double(checkpoint.bytes) + batch * kv) / t / bandwidth;
        if (batch == 1) one = 1 / t;
        row(text("random 1B, decode at 1k, batch %d", batch), text("%.1f tok/s", batch / t),
            batch == 1 ? text("%.0f %% of the read bandwidth", 100 * share)
                       : text("%.1f x batch 1", batch / t / one));
    }
    const double t = prefill(*model, c, 512, pages);
    row("random 1B, prefill of 512", text("%.0f tok/s", 512 / t),
        text("%.1f x decode", 512 / t / one));
    {
        Server server(directory.string());
        server.wait();
        row("random 1B in the page cache, exec to ready", text("%.2f s", server.ready), "");
    }
    const Checkpoint demo("demo/model");
    const auto demo_model = open_cpu(demo);
    demo_model->allocate_pages({1024, 1024});
    const double engine = streams_by_engine(*demo_model, demo.config);
    row("demo, 16 streams, engine alone", text("%.0f tok/s", engine), "");
    Server server("demo/model");
    server.wait();
    const double http = streams_by_http(server.port);
    row("demo, 16 streams, through HTTP", text("%.0f tok/s", http),
        text("%.0f %% of the engine alone", 100 * http / engine));
    row("demo, exec to ready", text("%.2f s", server.ready), "");
    return 0;
} catch (const Error& e) {
    say(e.what(), Severity::error);
    return 1;
}
