// SPDX-License-Identifier: Apache-2.0
//
// ./dev bench: one table, every ratio measured in this run.
//
//   - a full-size random Gemma 3 1B, made on the spot: decode against the memory bus, batches,
//   prefill
//   - the demo model: what HTTP costs with 16 streams at once
//   - exec to 'ready', for both
//
// The bound of decode is reading all weights, and the K and V of the context, once a step.
#include <chrono>
#include <csignal>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include "run.h"

using namespace gemma;
using nlohmann::json;
namespace fs = std::filesystem;

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// Gemma 3 1B's shapes with random bf16 weights; norms near 0, the rest of a spread that keeps
// activations finite.
void make_1b(const fs::path& directory) {
    if (fs::exists(directory / "complete")) return;
    fs::create_directories(directory);
    const int D = 1152, F = 6912, L = 26, H = 4, G = 1, E = 256, V = 262144;
    std::ofstream(directory / "config.json") << json{{"architectures", {"Gemma3ForCausalLM"}},
                                                     {"model_type", "gemma3_text"},
                                                     {"hidden_size", D},
                                                     {"intermediate_size", F},
                                                     {"num_hidden_layers", L},
                                                     {"num_attention_heads", H},
                                                     {"num_key_value_heads", G},
                                                     {"head_dim", E},
                                                     {"vocab_size", V},
                                                     {"sliding_window", 512},
                                                     {"sliding_window_pattern", 6},
                                                     {"max_position_embeddings", 32768},
                                                     {"query_pre_attn_scalar", 256},
                                                     {"rms_norm_eps", 1e-6},
                                                     {"rope_theta", 1e6},
                                                     {"rope_local_base_freq", 1e4},
                                                     {"eos_token_id", {1, 106}},
                                                     {"torch_dtype", "bfloat16"}};
    std::vector<std::pair<std::string, std::vector<int64_t>>> tensors{
        {"model.embed_tokens.weight", {V, D}}, {"model.norm.weight", {D}}};
    for (int l = 0; l < L; l++) {
        const std::string p = text("model.layers.%d.", l);
        for (const char* norm : {"input", "post_attention", "pre_feedforward", "post_feedforward"})
            tensors.push_back({p + norm + "_layernorm.weight", {D}});
        tensors.insert(tensors.end(), {{p + "self_attn.q_proj.weight", {H * E, D}},
                                       {p + "self_attn.k_proj.weight", {G * E, D}},
                                       {p + "self_attn.v_proj.weight", {G * E, D}},
                                       {p + "self_attn.o_proj.weight", {D, H * E}},
                                       {p + "self_attn.q_norm.weight", {E}},
                                       {p + "self_attn.k_norm.weight", {E}},
                                       {p + "mlp.gate_proj.weight", {F, D}},
                                       {p + "mlp.up_proj.weight", {F, D}},
                                       {p + "mlp.down_proj.weight", {D, F}}});
    }
    nlohmann::ordered_json header;
    int64_t offset = 0;
    for (const auto& [name, shape] : tensors) {
        const int64_t bytes = 2 * shape[0] * (shape.size() > 1 ? shape[1] : 1);
        header[name] = {
            {"dtype", "BF16"}, {"shape", shape}, {"data_offsets", {offset, offset + bytes}}};
        offset += bytes;
    }
    std::string head = header.dump();
    head.resize((head.size() + 7) / 8 * 8, ' ');
    std::ofstream out(directory / "model.safetensors", std::ios::binary);
    const uint64_t size = head.size();
    out.write(reinterpret_cast<const char*>(&size), 8).write(head.data(), std::streamsize(size));
    // +-0.016 to 0.031: sign and mantissa random, exponent fixed.
    std::mt19937_64 random(1);
    std::vector<uint64_t> block(1 << 16);
    for (int64_t left = offset; left > 0; left -= int64_t(block.size() * 8)) {
        for (uint64_t& x : block) x = (random() & 0x807f807f807f807full) | 0x3c803c803c803c80ull;
        out.write(reinterpret_cast<const char*>(block.data()),
                  std::streamsize(std::min<int64_t>(left, int64_t(block.size() * 8))));
    }
    // The demo's tokenizer: a server wants one, and its ids are within the 1B's.
    fs::copy_file("demo/model/tokenizer.model", directory / "tokenizer.model",
                  fs::copy_options::overwrite_existing);
    std::ofstream(directory / "complete");
}

// A plain read of all weights where they lie (make_1b puts the embedding first) with as many
// threads as the engine has, best of five. Four pages side by side: one at a time reads a twentieth
// less.
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
    if (total == 0) std::abort();  // so that the sums are needed
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

// A server as a child process, ready when constructed.
struct Server {
    pid_t pid;
    int port = 0;
    double ready = 0;  // seconds since exec, as it says itself

    explicit Server(const std::string& model) {
        int ends[2];
        if (pipe(ends)) std::abort();
        pid = fork();
        if (pid == 0) {
            dup2(ends[1], 2);
            close(ends[0]), close(ends[1]);
            execl(GEMMA_SERVER_BINARY, GEMMA_SERVER_BINARY, model.c_str(), "--host", "127.0.0.1",
                  "--port", "0", nullptr);
            _exit(127);
        }
        close(ends[1]);
        FILE* log = fdopen(ends[0], "r");
        char line[500];
        while (ready == 0 && std::fgets(line, sizeof line, log)) {
            std::sscanf(line, "listening on http://127.0.0.1:%d", &port);
            std::sscanf(line, "ready in %lf", &ready);
        }
        if (ready == 0) throw Error("the server did not start");
        // The pipe stays open: the server may go on writing.
    }
    ~Server() {
        kill(pid, SIGTERM);
        waitpid(pid, nullptr, 0);
    }
};

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

// The same through HTTP: one thread reads all streams, so that the client costs little.
double streams_by_http(int port) {
    std::vector<pollfd> sockets;
    const double start = now();
    for (int i = 0; i < http_streams; i++) {
        const std::string body = json{
            {"prompt", {Tokenizer::bos, 494 + i}},
            {"max_tokens", stream_tokens},
            {"seed", i},
            {"ignore_eos", true},
            {"stream", true}}.dump();
        const std::string head = text(
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: "
            "application/json\r\nContent-Length: %zu\r\n\r\n",
            body.size());
        const int fd = socket(AF_INET, SOCK_STREAM, 0);
        sockaddr_in to{};
        to.sin_family = AF_INET, to.sin_port = htons(uint16_t(port)),
        to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        if (connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to) ||
            write(fd, (head + body).data(), head.size() + body.size()) < 0)
            throw Error("cannot reach the server");
        sockets.push_back({fd, POLLIN, 0});
    }
    std::vector<std::string> answers(http_streams);
    char block[1 << 16];
    for (int open = http_streams; open > 0;) {
        poll(sockets.data(), sockets.size(), -1);
        for (size_t i = 0; i < sockets.size(); i++) {
            if (!sockets[i].revents) continue;
            const ssize_t n = read(sockets[i].fd, block, sizeof block);
            if (n > 0) answers[i].append(block, size_t(n));
            if (n <= 0) close(sockets[i].fd), sockets[i].fd = -1, open--;
        }
    }
    const double seconds = now() - start;
    for (const std::string& a : answers) {
        int events = 0;
        for (size_t at = 0; (at = a.find("data: {", at)) != a.npos; at++) events++;
        if (events != stream_tokens)
            throw Error(text("a stream has %d events, not %d", events, stream_tokens));
    }
    return http_streams * stream_tokens / seconds;
}

std::string first_match(const char* file, const char* key) {
    std::ifstream in(file);
    for (std::string line; std::getline(in, line);) {
        if (line.starts_with(key)) return line.substr(line.find(':') + 2);
    }
    return "unknown";
}

void row(const char* what, const std::string& measured, const std::string& ratio) {
    std::printf("| %-42s | %-18s | %-42s |\n", what, measured.c_str(), ratio.c_str());
    std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) try {
    const fs::path directory = argc > 1 ? argv[1] : "build/random-1b";
    make_1b(directory);
    char date[20];
    const time_t today = std::time(nullptr);
    std::strftime(date, sizeof date, "%Y-%m-%d", std::gmtime(&today));
    const char* commit = std::getenv("GEMMA_COMMIT");
    std::printf("./dev bench, %s, commit %s\n%s, %u threads\n\n", date, commit ? commit : "unknown",
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
    // K and V are fp32 here: local layers read a window, global ones all.
    double one = 0;
    for (const int batch : {1, 8}) {
        const double t = decode(*model, c, batch, 1024, pages);
        double kv = 0;
        for (int l = 0; l < c.L; l++) kv += 2. * 4 * c.G * c.E * (c.global[size_t(l)] ? 1024 : c.W);
        const double share = (double(checkpoint.bytes) + batch * kv) / t / bandwidth;
        if (batch == 1) one = 1 / t;
        row(text("random 1B, decode at 1k, batch %d", batch).c_str(), text("%.1f tok/s", batch / t),
            batch == 1 ? text("%.0f %% of the read bandwidth", 100 * share)
                       : text("%.1f x batch 1", batch / t / one));
    }
    const double t = prefill(*model, c, 512, pages);
    row("random 1B, prefill of 512", text("%.0f tok/s", 512 / t),
        text("%.1f x decode", 512 / t / one));
    {
        const Server server(directory.string());
        row("random 1B in the page cache, exec to ready", text("%.2f s", server.ready), "");
    }
    const Checkpoint demo("demo/model");
    const auto demo_model = open_cpu(demo);
    demo_model->allocate_pages({1024, 1024});
    const double engine = streams_by_engine(*demo_model, demo.config);
    row("demo, 16 streams, engine alone", text("%.0f tok/s", engine), "");
    const Server server("demo/model");
    const double http = streams_by_http(server.port);
    row("demo, 16 streams, through HTTP", text("%.0f tok/s", http),
        text("%.0f %% of the engine alone", 100 * http / engine));
    row("demo, exec to ready", text("%.2f s", server.ready), "");
    return 0;
} catch (const Error& e) {
    say(std::string("error: ") + e.what());
    return 1;
}
