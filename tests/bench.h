// SPDX-License-Identifier: Apache-2.0
//
// Shared by bench.cpp (CPU) and gpu_bench.cpp: a random Gemma 3 1B, a server as a child process,
// streams read from it, and the rows of a table.
#pragma once

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <random>

#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include "run.h"
#include "tokenizer.h"

namespace bench {

using namespace gemma;
using nlohmann::json;
namespace fs = std::filesystem;

inline double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

inline std::string today() {
    char date[20];
    const time_t t = std::time(nullptr);
    std::strftime(date, sizeof date, "%Y-%m-%d", std::gmtime(&t));
    return date;
}

inline std::string commit() {
    const char* given = std::getenv("GEMMA_COMMIT");
    return given ? given : "unknown";
}

inline double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v.empty() ? 0 : v[v.size() / 2];
}

inline std::vector<int> random_ids(int count, uint64_t seed, int vocab) {
    std::mt19937_64 random(seed);
    std::vector<int> ids;
    for (int i = 0; i < count; i++) ids.push_back(int(random() % uint64_t(vocab)));
    return ids;
}

// [1] A random 1B ---------------------------------------------------------------------------------

// The demo's tokenizer, padded to Gemma's size, so that a server takes as long to load it.
inline void make_tokenizer(const fs::path& file, int size) {
    const std::string demo = "demo/model/tokenizer.model";
    std::ifstream in(demo, std::ios::binary);
    std::string model{std::istreambuf_iterator<char>(in), {}};
    for (int id = Tokenizer(demo).size(); id < size; id++) {
        const std::string name = text("\u27e8%d\u27e9", id);  // a piece is {1: name, 2: score}
        const float score = -float(id);
        std::string piece = "\x0A" + (char(name.size()) + name) + "\x15";
        piece.append(reinterpret_cast<const char*>(&score), 4);
        model += "\x0A" + (char(piece.size()) + piece);
    }
    std::ofstream(file, std::ios::binary) << model;
}

// Random bf16 with absolute values from 0.016 to 0.031: sign and mantissa are random, the exponent
// is fixed. Four generators side by side, so that the compiler vectorizes them: each machine makes
// the file again.
inline void write_weights(std::ofstream& out, int64_t bytes) {
    uint64_t state[4] = {1, 2, 3, 4};
    std::vector<uint64_t> block(1 << 18);
    for (uint64_t& s : state) s *= 0x9e3779b97f4a7c15u;
    for (int64_t left = bytes; left > 0; left -= int64_t(block.size() * 8)) {
        for (size_t i = 0; i < block.size(); i += 4) {
            for (size_t lane = 0; lane < 4; lane++) {
                uint64_t& s = state[lane];
                s ^= s << 13, s ^= s >> 7, s ^= s << 17;
                block[i + lane] = (s & 0x807f807f807f807fu) | 0x3c803c803c803c80u;
            }
        }
        out.write(reinterpret_cast<const char*>(block.data()),
                  std::streamsize(std::min<int64_t>(left, int64_t(block.size() * 8))));
    }
    if (!out) throw Error("cannot write the random 1B");
}

// A checkpoint with Gemma 3 1B's shapes; its random bf16 weights are small enough to keep
// activations finite.
inline void make_1b(const fs::path& directory) {
    const int D = 1152, F = 6912, L = 26, H = 4, G = 1, E = 256, V = 262144;
    fs::create_directories(directory);
    make_tokenizer(directory / "tokenizer.model", V);
    if (fs::exists(directory / "complete")) return;
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
    write_weights(out, offset);
    std::ofstream(directory / "complete");
}

// [2] A server ------------------------------------------------------------------------------------

// A server as a child process. The constructor returns once it listens; requests then wait until
// the model is ready. $GEMMA_SERVER names another binary than the one that was built here.
struct Server {
    pid_t pid;
    int port = 0;
    double started, ready = 0;  // ready: seconds since exec, from its log
    std::string log;

    explicit Server(const std::string& model, const std::vector<std::string>& flags = {}) {
        const char* given = std::getenv("GEMMA_SERVER");
        const std::string binary = given ? given : GEMMA_SERVER_BINARY;
        std::vector<std::string> words{binary, model, "--host", "127.0.0.1", "--port", "0"};
        words.insert(words.end(), flags.begin(), flags.end());
        std::vector<char*> arguments;
        for (std::string& word : words) arguments.push_back(word.data());
        arguments.push_back(nullptr);
        int ends[2];
        if (pipe(ends)) std::abort();
        started = now();
        pid = fork();
        if (pid == 0) {
            dup2(ends[1], 2);
            close(ends[0]), close(ends[1]);
            execv(binary.c_str(), arguments.data());
            _exit(127);
        }
        close(ends[1]);
        lines = fdopen(ends[0], "r");
        read_until([&] { return port != 0; });
    }
    ~Server() {
        kill(pid, SIGTERM);
        waitpid(pid, nullptr, 0);
        fclose(lines);
    }
    Server(const Server&) = delete;
    void wait() {
        read_until([&] { return ready != 0; });
    }

  private:
    FILE* lines;

    template <class Done>
    void read_until(Done done) {
        char line[500];
        while (!done() && std::fgets(line, sizeof line, lines)) {
            log += line;
            std::sscanf(line, "listening on http://127.0.0.1:%d", &port);
            std::sscanf(line, "ready in %lf", &ready);
        }
        if (!done()) throw Error("the server did not start:\n" + log);
        // The pipe stays open: the server may go on writing.
    }
};

struct Streams {
    double tokens_per_second;
    double first, each;  // median seconds: first token (TTFT), each further one (TPOT)
};

inline int post(int port, const json& body) {
    const std::string content = body.dump();
    const std::string request = text(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: "
        "application/json\r\nContent-Length: %zu\r\n\r\n%s",
        content.size(), content.c_str());
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in to{};
    to.sin_family = AF_INET, to.sin_port = htons(uint16_t(port)),
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to))
        throw Error("cannot reach the server");
    for (size_t sent = 0; sent < request.size();) {
        const ssize_t n = write(fd, request.data() + sent, request.size() - sent);
        if (n <= 0) throw Error("the server does not take the request");
        sent += size_t(n);
    }
    return fd;
}

// Sends one request for each prompt, all at once, each for `tokens` tokens; `fields` are added to
// the bodies, and own[i], if there are any, to the body of prompt i. One thread reads all streams,
// so that the client costs little.
inline Streams read_streams(int port, const std::vector<std::vector<int>>& prompts, int tokens,
                            const json& fields = json::object(),
                            const std::vector<json>& own = {}) {
    const size_t count = prompts.size();
    std::vector<pollfd> sockets;
    std::vector<double> sent, first(count, 0), last(count, 0);
    std::vector<std::string> answers(count);
    const double start = now();
    for (size_t i = 0; i < count; i++) {
        json body = {{"prompt", prompts[i]},
                     {"max_tokens", tokens},
                     {"seed", i},
                     {"ignore_eos", true},
                     {"stream", true}};
        body.update(fields);
        if (!own.empty()) body.update(own[i]);
        sent.push_back(now());
        sockets.push_back({post(port, body), POLLIN, 0});
    }
    std::vector<char> block(1 << 16);
    for (size_t open = count; open > 0;) {
        poll(sockets.data(), sockets.size(), -1);
        for (size_t i = 0; i < count; i++) {
            if (!sockets[i].revents) continue;
            const ssize_t n = read(sockets[i].fd, block.data(), block.size());
            if (n > 0) answers[i].append(block.data(), size_t(n)), last[i] = now();
            if (first[i] == 0 && answers[i].find("data: {") != std::string::npos)
                first[i] = last[i];
            if (n <= 0) close(sockets[i].fd), sockets[i].fd = -1, open--;
        }
    }
    const double seconds = now() - start;
    std::vector<double> firsts, eachs;
    for (size_t i = 0; i < count; i++) {
        int events = 0;
        for (size_t at = 0; (at = answers[i].find("data: {", at)) != std::string::npos; at++)
            events++;
        if (events != tokens) {
            throw Error(
                text("a stream has %d events, not %d: %.300s", events, tokens, answers[i].c_str()));
        }
        firsts.push_back(first[i] - sent[i]);
        eachs.push_back((last[i] - first[i]) / std::max(1, tokens - 1));
    }
    return {double(count) * tokens / seconds, median(firsts), median(eachs)};
}

// [3] The table -----------------------------------------------------------------------------------

inline void row(const std::string& what, const std::string& measured, const std::string& ratio) {
    std::printf("| %-42s | %-18s | %-42s |\n", what.c_str(), measured.c_str(), ratio.c_str());
    std::fflush(stdout);
}

}  // namespace bench
