// SPDX-License-Identifier: Apache-2.0
//
// ./dev bench: one table, every ratio measured in this run.
//
//   - a full-size random Gemma 3 1B, made on the spot: decode against the memory bus, batches, prefill
//   - the demo model: what HTTP costs with 16 streams at once
//   - exec to 'ready', for both
//
// The bound of decode is reading all weights, and the K and V of the context, once a step.
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include <sys/wait.h>
#include <unistd.h>

#include <httplib.h>
#include <nlohmann/json.hpp>

#include "run.h"

using namespace gemma;
using nlohmann::json;
namespace fs = std::filesystem;

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Gemma 3 1B's shapes with random bf16 weights; norms near 0, the rest of a spread that keeps
// activations finite.
void make_1b(const fs::path& directory) {
    if (fs::exists(directory / "complete")) return;
    fs::create_directories(directory);
    const int D = 1152, F = 6912, L = 26, H = 4, G = 1, E = 256, V = 262144;
    std::ofstream(directory / "config.json") << json{
        {"architectures", {"Gemma3ForCausalLM"}}, {"model_type", "gemma3_text"}, {"hidden_size", D}, {"intermediate_size", F}, {"num_hidden_layers", L}, {"num_attention_heads", H}, {"num_key_value_heads", G}, {"head_dim", E}, {"vocab_size", V}, {"sliding_window", 512}, {"sliding_window_pattern", 6}, {"max_position_embeddings", 32768}, {"query_pre_attn_scalar", 256}, {"rms_norm_eps", 1e-6}, {"rope_theta", 1e6}, {"rope_local_base_freq", 1e4}, {"eos_token_id", {1, 106}}, {"torch_dtype", "bfloat16"}};
    std::vector<std::pair<std::string, std::vector<int64_t>>> tensors{{"model.embed_tokens.weight", {V, D}}, {"model.norm.weight", {D}}};
    for (int l = 0; l < L; l++) {
        const std::string p = text("model.layers.%d.", l);
        for (const char* norm : {"input", "post_attention", "pre_feedforward", "post_feedforward"}) tensors.push_back({p + norm + "_layernorm.weight", {D}});
        tensors.insert(tensors.end(), {{p + "self_attn.q_proj.weight", {H * E, D}}, {p + "self_attn.k_proj.weight", {G * E, D}}, {p + "self_attn.v_proj.weight", {G * E, D}}, {p + "self_attn.o_proj.weight", {D, H * E}}, {p + "self_attn.q_norm.weight", {E}}, {p + "self_attn.k_norm.weight", {E}}, {p + "mlp.gate_proj.weight", {F, D}}, {p + "mlp.up_proj.weight", {F, D}}, {p + "mlp.down_proj.weight", {D, F}}});
    }
    nlohmann::ordered_json header;
    int64_t offset = 0;
    for (const auto& [name, shape] : tensors) {
        const int64_t bytes = 2 * shape[0] * (shape.size() > 1 ? shape[1] : 1);
        header[name] = {{"dtype", "BF16"}, {"shape", shape}, {"data_offsets", {offset, offset + bytes}}};
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
        out.write(reinterpret_cast<const char*>(block.data()), std::streamsize(std::min<int64_t>(left, int64_t(block.size() * 8))));
    }
    std::ofstream(directory / "complete");
}

// A plain read of `bytes` bytes with as many threads as the engine has, best of three.
double read_bandwidth(uint64_t bytes) {
    std::vector<uint64_t> memory(bytes / 8, 1);
    double best = 0;
    uint64_t total = 0;
    for (int round = 0; round < 3; round++) {
        const double start = now();
#pragma omp parallel for reduction(+ : total) schedule(static)
        for (size_t i = 0; i < memory.size(); i++) total += memory[i];
        best = std::max(best, double(bytes) / (now() - start));
    }
    if (total != 3 * memory.size()) std::abort();
    return best;
}

}  // namespace

int main(int argc, char** argv) {
    const fs::path directory = argc > 1 ? argv[1] : "build/random-1b";
    make_1b(directory);
    const double bandwidth = read_bandwidth(2'000'000'000);
    std::printf("read bandwidth %.1f GB/s\n", bandwidth / 1e9);
    const Checkpoint checkpoint(directory.string());
    const auto model = open_cpu(checkpoint);
    model->allocate_pages({400, 400});
    const Config& c = checkpoint.config;
    std::mt19937 random(1);
    const auto prompt = [&](int n) { std::vector<int> p; while (n-- > 0) p.push_back(int(random() % 262144u)); return p; };
    {
        Scheduler s(limits_of(c, 512, 400));
        s.add(sequence(prompt(512), 1, {.temperature = 0}));
        run(*model, s);
        s.add(sequence(prompt(512), 1, {.temperature = 0}));
        double t = now(); run(*model, s); t = now() - t;
        std::printf("prefill 512: %.2f s, %.1f tok/s\n", t, 512 / t);
    }
    for (int batch : {1, 2, 4, 8}) {
        Scheduler s(limits_of(c, 1024, 400));
        for (int i = 0; i < batch; i++) s.add(sequence(prompt(argc > 2 ? 1024 : 100), 1000, {.temperature = 0}));
        while (true) { const Batch& b = s.next(); const bool decode = int(b.tokens.size()) == batch && int(b.outputs.size()) == batch; s.finish(model->step(b)); if (decode) break; }
        double t = now(); int n = 8;
        for (int i = 0; i < n; i++) s.finish(model->step(s.next()));
        t = (now() - t) / n;
        std::printf("batch %d: %.1f ms a step, %.2f tok/s, %.0f%% of the bandwidth\n", batch, t * 1e3, batch / t, 100 * 2.0e9 / t / bandwidth);
    }
}
