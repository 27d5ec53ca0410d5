// SPDX-License-Identifier: Apache-2.0
//
// Tests of checkpoint.cpp: every dialect of config.json, every layout of tensors, every refusal. A
// test writes its own tiny checkpoint to disk, so that it can make a single byte wrong.
#include "test.h"

#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <map>
#include <new>
#include <random>

#include <nlohmann/json.hpp>

namespace gemma {
Config read_config(const std::string& directory);  // checkpoint.cpp
}

using namespace gemma;
using nlohmann::json;
namespace fs = std::filesystem;

// [1] A checkpoint on disk ------------------------------------------------------------------------

namespace {

struct Directory {
    fs::path path;
    Directory() {
        std::string name = (fs::temp_directory_path() / "gemma-checkpoint-XXXXXX").string();
        if (!mkdtemp(name.data())) throw std::runtime_error("no temporary directory");
        path = name;
    }
    ~Directory() { fs::remove_all(path); }
    std::string string() const { return path.string(); }
    void write(const std::string& name, const std::string& bytes) const {
        fs::create_directories((path / name).parent_path());
        std::ofstream(path / name, std::ios::binary) << bytes;
    }
};

struct Entry {
    std::string dtype;
    std::vector<uint64_t> shape;
    std::string data;
};
using Entries = std::map<std::string, Entry>;

constexpr int D = 64, F = 96, L = 3, H = 2, G = 1, E = 64, V = 48;

json tiny_config() {
    return {{"model_type", "gemma3_text"},
            {"architectures", {"Gemma3ForCausalLM"}},
            {"hidden_size", D},
            {"intermediate_size", F},
            {"num_hidden_layers", L},
            {"num_attention_heads", H},
            {"num_key_value_heads", G},
            {"head_dim", E},
            {"vocab_size", V},
            {"sliding_window", 32},
            {"sliding_window_pattern", 2}};
}

Entry random_entry(const std::vector<uint64_t>& shape, unsigned seed) {
    uint64_t n = 1;
    for (const uint64_t d : shape) n *= d;
    std::mt19937 random(seed);
    Entry entry{"BF16", shape, std::string(2 * n, '\0')};
    for (char& c : entry.data) c = static_cast<char>(random());
    return entry;
}

// The text tensors. They repeat checkpoint.cpp's list on purpose: the test must not use that.
Entries tiny_tensors(const std::string& prefix = "model.", int layers = L) {
    Entries all;
    unsigned seed = 1;
    const auto add = [&](const std::string& name, const std::vector<uint64_t>& shape) {
        all[prefix + name + ".weight"] = random_entry(shape, seed++);
    };
    add("embed_tokens", {V, D});
    add("norm", {D});
    for (int i = 0; i < layers; i++) {
        const std::string layer = "layers." + std::to_string(i) + ".";
        add(layer + "input_layernorm", {D});
        add(layer + "post_attention_layernorm", {D});
        add(layer + "pre_feedforward_layernorm", {D});
        add(layer + "post_feedforward_layernorm", {D});
        add(layer + "self_attn.q_proj", {H * E, D});
        add(layer + "self_attn.k_proj", {G * E, D});
        add(layer + "self_attn.v_proj", {G * E, D});
        add(layer + "self_attn.o_proj", {D, H * E});
        add(layer + "self_attn.q_norm", {E});
        add(layer + "self_attn.k_norm", {E});
        add(layer + "mlp.gate_proj", {F, D});
        add(layer + "mlp.up_proj", {F, D});
        add(layer + "mlp.down_proj", {D, F});
    }
    return all;
}

std::string with_header(const std::string& header, const std::string& data) {
    const uint64_t length = header.size();
    return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

std::string safetensors(const Entries& entries, const std::string& padding = "") {
    json header = {{"__metadata__", {{"format", "pt"}}}};
    std::string data;
    for (const auto& [name, entry] : entries) {
        header[name] = {{"dtype", entry.dtype},
                        {"shape", entry.shape},
                        {"data_offsets", {data.size(), data.size() + entry.data.size()}}};
        data += entry.data;
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    return with_header(text + padding, data);
}

void write_tiny(const Directory& dir, const json& config, const Entries& entries) {
    dir.write("config.json", config.dump());
    dir.write("model.safetensors", safetensors(entries));
}

// The message of the Error that `run` throws, or "".
template <typename Function>
std::string error_of(Function run) {
    try {
        run();
    } catch (const Error& e) {
        return e.what();
    }
    return "";
}
std::string error_of(const Directory& dir) {
    return error_of([&] { Checkpoint checkpoint(dir.string()); });
}

// The message is one line and contains every part.
void check_message(const std::string& message, const std::vector<std::string>& parts) {
    CAPTURE(message);
    CHECK(message.find('\n') == std::string::npos);
    CHECK(message.size() < 600);
    for (const std::string& part : parts) {
        CAPTURE(part);
        CHECK(message.find(part) != std::string::npos);
    }
}

bool same_bits(const bf16* weight, const Entry& entry) {
    return std::memcmp(weight, entry.data.data(), entry.data.size()) == 0;
}

void check_weights(const Checkpoint& c, const Entries& all, const std::string& prefix) {
    CHECK(same_bits(c.weights.embed, all.at(prefix + "embed_tokens.weight")));
    CHECK(same_bits(c.weights.norm, all.at(prefix + "norm.weight")));
    REQUIRE(c.weights.layers.size() == L);
    uint64_t bytes = 2 * (V * D + D);
    for (int i = 0; i < L; i++) {
        const Layer& layer = c.weights.layers[static_cast<size_t>(i)];
        const std::string start = prefix + "layers." + std::to_string(i) + ".";
        const std::pair<const bf16*, const char*> parts[] = {
            {layer.input_norm, "input_layernorm"},
            {layer.post_attention_norm, "post_attention_layernorm"},
            {layer.pre_ffn_norm, "pre_feedforward_layernorm"},
            {layer.post_ffn_norm, "post_feedforward_layernorm"},
            {layer.q, "self_attn.q_proj"},
            {layer.k, "self_attn.k_proj"},
            {layer.v, "self_attn.v_proj"},
            {layer.o, "self_attn.o_proj"},
            {layer.q_norm, "self_attn.q_norm"},
            {layer.k_norm, "self_attn.k_norm"},
            {layer.gate, "mlp.gate_proj"},
            {layer.up, "mlp.up_proj"},
            {layer.down, "mlp.down_proj"}};
        for (const auto& [weight, name] : parts) {
            const Entry& entry = all.at(start + name + ".weight");
            CAPTURE(name);
            CHECK(same_bits(weight, entry));
            bytes += entry.data.size();
        }
    }
    CHECK(c.bytes == bytes);
}

// The largest single allocation since the last reset: no file may cause one larger than itself.
std::atomic<size_t> largest = 0;

void* counted(size_t size) {
    for (size_t seen = largest; size > seen && !largest.compare_exchange_weak(seen, size);)
        continue;
    return std::malloc(size ? size : 1);
}

}  // namespace

void* operator new(size_t size, const std::nothrow_t&) noexcept { return counted(size); }
void* operator new[](size_t size, const std::nothrow_t&) noexcept { return counted(size); }
void* operator new(size_t size) {
    if (void* p = counted(size)) return p;
    throw std::bad_alloc();
}
void* operator new[](size_t size) { return operator new(size); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete[](void* p, size_t) noexcept { std::free(p); }
void operator delete[](void* p, const std::nothrow_t&) noexcept { std::free(p); }

// [2] Configuration -------------------------------------------------------------------------------

namespace {

Config config_of(const json& config, const json& generation = nullptr) {
    const Directory dir;
    dir.write("config.json", config.dump());
    if (!generation.is_null()) dir.write("generation_config.json", generation.dump());
    return read_config(dir.string());
}

// Flat configs on the hub, as of the 1B, spell out every field.
json flat_config(int hidden, int ffn, int layers) {
    json c = R"({"architectures": ["Gemma3ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "attn_logit_softcapping": null, "bos_token_id": 2,
        "cache_implementation": "hybrid", "eos_token_id": [1, 106],
        "final_logit_softcapping": null, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02,
        "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
        "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": null,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 262144})"_json;
    c["hidden_size"] = hidden;
    c["intermediate_size"] = ffn;
    c["num_hidden_layers"] = layers;
    return c;
}

// Configs of 4B and up are nested and leave out defaults.
json nested_config(int hidden, int ffn, int layers, const json& more) {
    json c = R"({"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
        "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "sliding_window": 1024,
                        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
                          "model_type": "siglip_vision_model", "num_attention_heads": 16,
                          "num_hidden_layers": 27, "patch_size": 14,
                          "vision_use_head": false}})"_json;
    c["text_config"].update(more);
    c["text_config"]["hidden_size"] = hidden;
    c["text_config"]["intermediate_size"] = ffn;
    c["text_config"]["num_hidden_layers"] = layers;
    return c;
}

json types(int layers, int pattern) {
    json list = json::array();
    for (int i = 1; i <= layers; i++)
        list.push_back(i % pattern ? "sliding_attention" : "full_attention");
    return list;
}

json config_270m() {
    json c = flat_config(640, 2048, 18);
    c.erase("sliding_window_pattern");
    c["_sliding_window_pattern"] = 6;
    c["layer_types"] = types(18, 6);
    c["use_bidirectional_attention"] = false;
    return c;
}

json transformers5(json c) {
    json& t = c.contains("text_config") ? c["text_config"] : c;
    json full = {{"rope_type", "default"}, {"rope_theta", 1e6}};
    if (t.contains("rope_scaling") && !t["rope_scaling"].is_null()) full.update(t["rope_scaling"]);
    t["rope_parameters"] = {{"full_attention", full},
                            {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", 1e4}}}};
    for (const char* old :
         {"rope_scaling", "rope_theta", "rope_local_base_freq", "sliding_window_pattern"})
        t.erase(old);
    t["layer_types"] = types(t["num_hidden_layers"], 6);
    c.erase("torch_dtype");
    c["dtype"] = "bfloat16";
    return c;
}

}  // namespace

TEST_CASE("the five sizes in every dialect") {
    const json heads12 = {{"num_attention_heads", 16}, {"num_key_value_heads", 8}};
    const json heads27 = {{"num_attention_heads", 32},
                          {"num_key_value_heads", 16},
                          {"head_dim", 128},
                          {"query_pre_attn_scalar", 168}};
    struct Size {
        const char* name;
        json file;
        int D, F, L, H, G, E, V, W, positions;
        double scalar, embed_scale, divisor;
    };
    // sqrt(D) in bf16: 25.298 -> 25.25, 33.941 -> 34, 50.596 -> 50.5, 61.968 -> 62, 73.321 -> 73.5
    const Size sizes[] = {
        {"270M", config_270m(), 640, 2048, 18, 4, 1, 256, 262144, 512, 32768, 256, 25.25, 1},
        {"1B", flat_config(1152, 6912, 26), 1152, 6912, 26, 4, 1, 256, 262144, 512, 32768, 256, 34,
         1},
        {"4B", nested_config(2560, 10240, 34, json::object()), 2560, 10240, 34, 8, 4, 256, 262208,
         1024, 131072, 256, 50.5, 8},
        {"12B", nested_config(3840, 15360, 48, heads12), 3840, 15360, 48, 16, 8, 256, 262208, 1024,
         131072, 256, 62, 8},
        {"27B", nested_config(5376, 21504, 62, heads27), 5376, 21504, 62, 32, 16, 128, 262208, 1024,
         131072, 168, 73.5, 8},
    };
    for (const Size& s : sizes)
        for (const json& file : {s.file, transformers5(s.file)}) {
            CAPTURE(s.name, file.dump());
            const Config c = config_of(file);
            CHECK(std::vector<int>{c.D, c.F, c.L, c.H, c.G, c.E, c.V, c.W, c.max_positions} ==
                  std::vector<int>{s.D, s.F, s.L, s.H, s.G, s.E, s.V, s.W, s.positions});
            CHECK(c.vocab == 262144);
            CHECK(c.eps == 1e-6f);
            CHECK(c.scale == Approx(1 / std::sqrt(s.scalar)).epsilon(1e-7));
            CHECK(c.embed_scale == static_cast<float>(s.embed_scale));
            CHECK(c.theta[local_pool] == 1e4f);
            CHECK(c.theta[global_pool] == 1e6f);
            CHECK(c.rope_divisor[local_pool] == 1);
            CHECK(c.rope_divisor[global_pool] == static_cast<float>(s.divisor));
            CHECK(c.eos == std::vector<int>{1, 106});
            REQUIRE(c.global.size() == static_cast<size_t>(s.L));
            for (int i = 0; i < s.L; i++)
                CHECK(bool(c.global[static_cast<size_t>(i)]) == (i % 6 == 5));
        }
}

TEST_CASE("where the fields of a config come from") {
    json c = tiny_config();
    SECTION("theta: nested, else top, else default") {
        CHECK(config_of(c).theta[global_pool] == 1e6f);
        CHECK(config_of(c).theta[local_pool] == 1e4f);
        c["rope_theta"] = 5e5;
        c["rope_local_base_freq"] = 2e4;
        c["rope_scaling"] = nullptr;
        c["rope_parameters"] = {{"full_attention", {{"rope_type", "linear"}, {"factor", 4.0}}},
                                {"sliding_attention", {{"rope_type", "default"}}}};
        // Files from the transition to transformers 5 have both spellings.
        CHECK(config_of(c).theta[global_pool] == 5e5f);
        CHECK(config_of(c).theta[local_pool] == 2e4f);
        CHECK(config_of(c).rope_divisor[global_pool] == 4);
        CHECK(config_of(c).rope_divisor[local_pool] == 1);
        c["rope_parameters"]["full_attention"]["rope_theta"] = 3e5;
        c["rope_parameters"]["sliding_attention"]["rope_theta"] = 3e4;
        CHECK(config_of(c).theta[global_pool] == 3e5f);
        CHECK(config_of(c).theta[local_pool] == 3e4f);
    }
    SECTION("rope_scaling, also with its oldest key, is of the global layers alone") {
        c["rope_scaling"] = {{"type", "linear"}, {"factor", 2}};
        CHECK(config_of(c).rope_divisor[global_pool] == 2);
        CHECK(config_of(c).rope_divisor[local_pool] == 1);
        c["rope_scaling"] = {{"rope_type", "default"}, {"factor", 2}};
        CHECK(config_of(c).rope_divisor[global_pool] == 1);
    }
    SECTION("layer_types overrides the pattern") {
        CHECK(config_of(c).global == std::vector<char>{0, 1, 0});
        c["layer_types"] = {"full_attention", "sliding_attention", "full_attention"};
        CHECK(config_of(c).global == std::vector<char>{1, 0, 1});
    }
    SECTION("eos: generation_config.json, else the top, else text_config, else 1") {
        json nested = {{"model_type", "gemma3"}, {"text_config", c}};
        CHECK(config_of(nested).eos == std::vector<int>{1});
        nested["text_config"]["eos_token_id"] = 3;
        CHECK(config_of(nested).eos == std::vector<int>{3});
        nested["eos_token_id"] = {1, 6};
        CHECK(config_of(nested).eos == std::vector<int>{1, 6});
        CHECK(config_of(nested, {{"eos_token_id", 7}}).eos == std::vector<int>{7});
        CHECK(config_of(nested, {{"eos_token_id", {8, 9}}}).eos == std::vector<int>{8, 9});
        CHECK(config_of(nested, {{"eos_token_id", nullptr}}).eos == std::vector<int>{1, 6});
    }
    SECTION("a small vocabulary has text for every row") { CHECK(config_of(c).vocab == V); }
    SECTION("null is as good as absent") {
        c["rms_norm_eps"] = nullptr;
        CHECK(config_of(c).eps == 1e-6f);
    }
}

TEST_CASE("a config that cannot be served is refused in one line") {
    struct Refusal {
        const char* patch;               // to the tiny config
        std::vector<std::string> parts;  // of the message
    };
    const Refusal refusals[] = {
        {R"({"model_type": "llama"})", {"model_type", "\"llama\"", "gemma3", "only Gemma 3"}},
        {R"({"model_type": null})", {"model_type", "null", "gemma3"}},
        {R"({"architectures": ["Gemma3ForSequenceClassification"]})",
         {"architectures", "Gemma3ForSequenceClassification", "Gemma3ForCausalLM"}},
        {R"({"architectures": ["Gemma3TextModel"], "use_bidirectional_attention": true})",
         {"use_bidirectional_attention", "true", "EmbeddingGemma"}},
        {R"({"attn_logit_softcapping": 50.0})", {"attn_logit_softcapping", "50.0", "null"}},
        {R"({"final_logit_softcapping": 30.0})", {"final_logit_softcapping", "30.0", "null"}},
        {R"({"attention_bias": true})", {"attention_bias", "true", "false"}},
        {R"({"hidden_activation": "silu"})", {"hidden_activation", "silu", "gelu_pytorch_tanh"}},
        {R"({"rope_scaling": {"rope_type": "yarn", "factor": 8}})", {"rope", "yarn", "linear"}},
        {R"({"rope_scaling": {"rope_type": "linear"}})", {"factor", "null", "1 to"}},
        {R"({"rope_scaling": {"rope_type": "linear", "factor": 0.5}})", {"factor", "0.5", "1 to"}},
        {R"({"rope_scaling": 8})", {"rope_scaling", "8", "an object"}},
        {R"({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 8}}})",
         {"rope", "linear", "default"}},
        {R"({"rope_parameters": {"rope_type": "yarn"}})",
         {"rope_parameters", "yarn", "full_attention"}},
        {R"({"tie_word_embeddings": false})", {"tie_word_embeddings", "false", "true"}},
        {R"({"quantization_config": {"bits": 4}})", {"quantization_config", "bits", "bf16"}},
        {R"({"head_dim": 96})", {"head_dim", "96", "64", "128", "256"}},
        {R"({"hidden_size": 80})", {"hidden_size", "80", "multiple of 32"}},
        {R"({"intermediate_size": 100})", {"intermediate_size", "100", "multiple of 32"}},
        {R"({"num_attention_heads": 17})", {"num_attention_heads", "17", "at most 16"}},
        {R"({"num_attention_heads": 3, "num_key_value_heads": 2})",
         {"num_attention_heads", "3", "multiple of 2"}},
        {R"({"num_hidden_layers": "3"})", {"num_hidden_layers", "\"3\"", "1 to 1024"}},
        {R"({"num_hidden_layers": 2.5})", {"num_hidden_layers", "2.5", "1 to 1024"}},
        {R"({"num_hidden_layers": 0})", {"num_hidden_layers", "0", "1 to 1024"}},
        {R"({"hidden_size": -64})", {"hidden_size", "-64", "32 to 8192"}},
        {R"({"vocab_size": 18446744073709551615})", {"vocab_size", "18446744073709551615"}},
        {R"({"rms_norm_eps": 7})", {"rms_norm_eps", "7", "0 to 1"}},
        {R"({"rope_theta": 0})", {"rope_theta", "0", "1 to"}},
        {R"({"sliding_window_pattern": 0})", {"sliding_window_pattern", "0", "1 to"}},
        // A row of more positions would overrun the CUDA engine's room for chunks.
        {R"({"max_position_embeddings": 1048577})",
         {"max_position_embeddings", "1048577", "1 to 1048576"}},
        {R"({"layer_types": ["full_attention"]})", {"layer_types", "full_attention", "3"}},
        {R"({"layer_types": ["full_attention", "chunked", "full_attention"]})",
         {"layer_types", "chunked", "sliding_attention"}},
        {R"({"eos_token_id": 48})", {"eos_token_id", "48", "0 to 47"}},
        {R"({"eos_token_id": []})", {"eos_token_id", "[]"}},
        {R"({"eos_token_id": [1, "x\ny"]})", {"eos_token_id", "x\\ny"}},
        {R"({"text_config": 5})", {"text_config", "5", "an object"}},
    };
    for (const Refusal& refusal : refusals) {
        json c = tiny_config();
        c.update(json::parse(refusal.patch));
        CAPTURE(refusal.patch);
        check_message(error_of([&] { config_of(c); }), refusal.parts);
        check_message(error_of([&] { config_of(c); }), {"/config.json: ", "found ", "expected "});
    }
}

TEST_CASE("a config.json that is not a JSON object") {
    const Directory dir;
    const auto message = [&](const std::string& file) {
        dir.write("config.json", file);
        const std::string error = error_of([&] { read_config(dir.string()); });
        check_message(error, {"/config.json: found ", "expected "});
        return error;
    };
    check_message(message("{\"hidden_size\": 1,}"), {"line 1"});
    check_message(message("[]"), {"[]", "object"});
    check_message(message("{\"a\": \"\xff\"}"), {"UTF-8"});
    check_message(message("{\"a\": 1, \"b\": {\"a\": 1}, \"a\": 1}"), {"\"a\" twice"});
    check_message(message("{\"a\": " + std::string(100000, '[')), {"deep"});
    check_message(message(""), {"0 bytes"});
    std::string many = "{\"a\": [0";
    for (int i = 0; i < 300000; i++) many += ",0";
    check_message(message(many + "]}"), {"long"});
    fs::remove(dir.path / "config.json");
    check_message(error_of([&] { read_config(dir.string()); }), {"/config.json", "No such file"});
}

TEST_CASE("sampling defaults") {
    const Directory dir;
    write_tiny(dir, tiny_config(), tiny_tensors());
    const auto load = [&](const char* generation) {
        dir.write("generation_config.json", generation);
        return Checkpoint(dir.string()).defaults;
    };
    const SamplingDefaults none = Checkpoint(dir.string()).defaults;
    CHECK(none.temperature == 1);
    CHECK(none.top_k == 0);
    CHECK(none.max_new_tokens == -1);
    const SamplingDefaults hub = load(R"({"bos_token_id": 2, "cache_implementation": "hybrid",
        "do_sample": true, "eos_token_id": [1, 6], "pad_token_id": 0, "top_k": 64,
        "top_p": 0.95})");
    CHECK(hub.temperature == 1);
    CHECK(hub.top_k == 64);
    CHECK(hub.top_p == 0.95);
    const SamplingDefaults all = load(R"({"do_sample": false, "temperature": 0.5, "min_p": 0.1,
        "repetition_penalty": 1.5, "max_new_tokens": 20, "top_k": -1})");
    CHECK(all.temperature == 0.5);
    CHECK(all.min_p == 0.1);
    CHECK(all.repetition_penalty == 1.5);
    CHECK(all.max_new_tokens == 20);
    CHECK(all.top_k == 0);
    for (const char* bad :
         {R"({"temperature": -1})", R"({"top_p": 0})", R"({"top_p": 1.5})", R"({"min_p": 2})",
          R"({"top_k": 1.5})", R"({"repetition_penalty": "1"})"})
        check_message(error_of([&] { load(bad); }),
                      {"/generation_config.json: " + json::parse(bad).begin().key(), "found "});
}

// [3] Tensors -------------------------------------------------------------------------------------

TEST_CASE("every prefix of the tensors' names") {
    for (const char* prefix : {"model.", "language_model.model.", "model.language_model."}) {
        const Directory dir;
        const Entries all = tiny_tensors(prefix);
        write_tiny(dir, tiny_config(), all);
        const Checkpoint c(dir.string());
        check_weights(c, all, prefix);
    }
}

TEST_CASE("tensors that text does not need are skipped") {
    const std::pair<const char*, std::vector<const char*>> layouts[] = {
        {"model.", {"lm_head.weight"}},
        {"language_model.model.",
         {"language_model.lm_head.weight", "vision_tower.vision_model.post_layernorm.bias",
          "multi_modal_projector.mm_soft_emb_norm.weight"}},
        {"model.language_model.",
         {"lm_head.weight", "model.vision_tower.vision_model.post_layernorm.bias",
          "model.multi_modal_projector.mm_soft_emb_norm.weight"}}};
    for (const auto& [prefix, more] : layouts) {
        const Directory dir;
        Entries all = tiny_tensors(prefix);
        for (const char* name : more) all[name] = random_entry({7}, 99);
        write_tiny(dir, tiny_config(), all);
        const Checkpoint c(dir.string());
        check_weights(c, all, prefix);
    }
}

TEST_CASE("shards") {
    const Directory dir;
    const Entries all = tiny_tensors();
    Entries shards[2];
    json map;
    const std::string names[2] = {"model-00001-of-00002.safetensors",
                                  "model-00002-of-00002.safetensors"};
    size_t i = 0;
    for (const auto& [name, entry] : all) {
        shards[i % 2][name] = entry;
        map[name] = names[i++ % 2];
    }
    dir.write("config.json", tiny_config().dump());
    dir.write("model.safetensors.index.json",
              json{{"metadata", {{"total_size", 1}}}, {"weight_map", map}}.dump());
    for (int k : {0, 1}) dir.write(names[k], safetensors(shards[k]));
    SECTION("are one model") { check_weights(Checkpoint(dir.string()), all, "model."); }
    SECTION("one is missing") {
        fs::remove(dir.path / names[1]);
        check_message(error_of(dir), {names[1], "No such file"});
    }
    SECTION("a tensor in both") {
        const std::string name = shards[0].begin()->first;
        shards[1][name] = all.at(name);
        dir.write(names[1], safetensors(shards[1]));
        check_message(error_of(dir), {names[0], names[1], name, "again"});
    }
    SECTION("a tensor in neither") {
        const std::string name = shards[0].begin()->first;
        shards[0].erase(name);
        dir.write(names[0], safetensors(shards[0]));
        check_message(error_of(dir), {name.substr(6), "no such tensor", "shape"});
    }
    SECTION("the index leads out of the directory") {
        dir.write("model.safetensors.index.json", R"({"weight_map": {"a": "../x.safetensors"}})");
        check_message(error_of(dir), {"index.json", "../x.safetensors", "beside"});
    }
    SECTION("the index has no files") {
        dir.write("model.safetensors.index.json", "{}");
        check_message(error_of(dir), {"embed_tokens.weight", "no such tensor"});
    }
}

TEST_CASE("D8: a numbered set of weight files needs no index") {
    const Directory dir;
    const Entries all = tiny_tensors();
    dir.write("config.json", tiny_config().dump());
    dir.write("adapter_model.safetensors", "not of the set");
    dir.write("model-1-of-1.safetensors", "not of the set");
    check_message(error_of(dir), {dir.string(), "no weights"});
    SECTION("one file") {
        dir.write("model-00001-of-00001.safetensors", safetensors(all));
        check_weights(Checkpoint(dir.string()), all, "model.");
    }
    SECTION("two files") {
        Entries half[2];
        size_t i = 0;
        for (const auto& [name, entry] : all) half[i++ % 2][name] = entry;
        dir.write("model-00002-of-00002.safetensors", safetensors(half[1]));
        check_message(error_of(dir), {"/model-00001-of-00002.safetensors", "no such file", "set"});
        dir.write("model-00001-of-00002.safetensors", safetensors(half[0]));
        check_weights(Checkpoint(dir.string()), all, "model.");
    }
    SECTION("beside an index, which decides") {
        dir.write("model-00001-of-00001.safetensors", "not named by the index");
        dir.write("model.safetensors.index.json", R"({"weight_map": {"a": "b.safetensors"}})");
        dir.write("b.safetensors", safetensors(all));
        check_weights(Checkpoint(dir.string()), all, "model.");
    }
}

TEST_CASE("row 48: files that lie beside a whole model do not matter") {
    const Directory dir;
    const Entries all = tiny_tensors();
    write_tiny(dir, tiny_config(), all);
    SECTION("an index of shards that are gone") {
        dir.write("model.safetensors.index.json",
                  R"({"weight_map": {"x": "model-00001-of-00002.safetensors"}})");
    }
    SECTION("an index that is no JSON") { dir.write("model.safetensors.index.json", "{"); }
    SECTION("one shard of a set") { dir.write("model-00001-of-00002.safetensors", "no weights"); }
    SECTION("config.json begins with a byte order mark") {
        dir.write("config.json", "\xef\xbb\xbf" + tiny_config().dump());
    }
    SECTION("another model in a folder") {
        dir.write("original/config.json", "{}");
        dir.write("original/model.safetensors", "no weights");
        dir.write("original/consolidated.00.pth", "no weights");
    }
    SECTION("links that lead back, and nowhere") {
        fs::create_directory_symlink(".", dir.path / "loop");
        fs::create_symlink("model-00001-of-00001.safetensors",
                           dir.path / "model-00001-of-00001.safetensors");
    }
    CHECK(find_model(dir.string()) == dir.string());
    check_weights(Checkpoint(dir.string()), all, "model.");
}

TEST_CASE("row 48: links in a numbered set's directory do not matter") {
    const Directory dir;
    const Entries all = tiny_tensors();
    dir.write("config.json", tiny_config().dump());
    dir.write("model-00001-of-00001.safetensors", safetensors(all));
    dir.write("original/model-00001-of-00002.safetensors", "no weights");
    fs::create_directory_symlink(".", dir.path / "loop");
    fs::create_symlink("itself", dir.path / "itself");
    check_weights(Checkpoint(dir.string()), all, "model.");
}

TEST_CASE("D8: an embedding that is no multiple of 16 rows gets rows of zeros") {
    for (const char* dtype : {"BF16", "F32"}) {
        const Directory dir;
        json config = tiny_config();
        Entries all = tiny_tensors();
        const int rows = V + 1;
        Entry& embed = all["model.embed_tokens.weight"] = random_entry({rows, D}, 1);
        const std::string bits = embed.data;
        if (embed.dtype = dtype; embed.dtype == "F32") {  // the same values, with 16 zero bits more
            embed.data.clear();
            for (size_t i = 0; i < bits.size(); i += 2)
                embed.data += std::string(2, '\0') + bits.substr(i, 2);
        }
        config["vocab_size"] = rows;
        write_tiny(dir, config, all);
        const Checkpoint c(dir.string());
        CAPTURE(dtype);
        CHECK(c.config.V == rows);
        CHECK(c.config.vocab == rows);
        CHECK(c.config.rows() == V + 16);
        if (embed.dtype == "BF16")
            CHECK(std::memcmp(c.weights.embed, bits.data(), bits.size()) == 0);
        for (size_t i = 0; i < rows * D; i++) {
            uint16_t value;
            std::memcpy(&value, bits.data() + 2 * i, 2);
            const bool nan =
                (value & 0x7fff) > 0x7f80;  // which becomes quiet, where it is converted
            if (c.weights.embed[i].bits != value && !nan) FAIL("element " << i);
        }
        for (size_t i = rows * D; i < (V + 16) * D; i++)
            if (c.weights.embed[i].bits != 0) FAIL("element " << i << " is not zero");
    }
    json config = tiny_config();
    config["vocab_size"] = 262145;
    CHECK(config_of(config).V == 262145);
    CHECK(config_of(config).rows() == 262160);
    CHECK(config_of(config).vocab == 262144);  // the tokenizer may say more
    CHECK(config_of(flat_config(1152, 6912, 26)).rows() == 262144);
}

TEST_CASE("F32 and F16 become bf16, to nearest and ties to even") {
    // {bits of the source, bits in bf16}
    const std::vector<std::pair<uint32_t, uint16_t>> f32 = {
        {0x3f800000, 0x3f80}, {0x3f808000, 0x3f80}, {0x3f818000, 0x3f82}, {0x3f808001, 0x3f81},
        {0x3f807fff, 0x3f80}, {0xbf808001, 0xbf81}, {0x80000000, 0x8000}, {0x00000001, 0x0000},
        {0x0000ffff, 0x0001}, {0x7f7fffff, 0x7f80}, {0x7f800000, 0x7f80}, {0xff800000, 0xff80},
        {0x7f800001, 0x7fc0}, {0x7fffffff, 0x7fff}, {0xffffffff, 0xffff}};
    const std::vector<std::pair<uint32_t, uint16_t>> f16 = {
        {0x3c00, 0x3f80}, {0xbc00, 0xbf80}, {0x0000, 0x0000},
        {0x8000, 0x8000}, {0x0001, 0x3380},   // 2^-24, the smallest half
        {0x03ff, 0x3880},                     // 1023 * 2^-24 rounds up to 2^-14
        {0x7bff, 0x4780},                     // 65504 rounds up to 65536
        {0x7c00, 0x7f80}, {0xfc00, 0xff80},   // infinities
        {0x7c01, 0x7fc0}, {0x3c04, 0x3f80},   // a NaN; a tie, down
        {0x3c0c, 0x3f82}, {0x3c05, 0x3f81}};  // a tie, up; above a tie
    for (const bool half : {false, true}) {
        const Directory dir;
        Entries all = tiny_tensors();
        const auto& cases = half ? f16 : f32;
        const size_t width = half ? 2 : 4;
        Entry& norm = all["model.norm.weight"];
        norm = {half ? "F16" : "F32", {D}, std::string(width * D, '\0')};
        for (size_t i = 0; i < cases.size(); i++)
            std::memcpy(norm.data.data() + width * i, &cases[i].first, width);
        write_tiny(dir, tiny_config(), all);
        const Checkpoint c(dir.string());
        for (size_t i = 0; i < cases.size(); i++) {
            CAPTURE(half, cases[i].first);
            CHECK(c.weights.norm[i].bits == cases[i].second);
        }
        CHECK(same_bits(c.weights.embed, all["model.embed_tokens.weight"]));
    }
}

TEST_CASE("bf16 at an odd address is copied") {
    const Directory dir;
    const Entries all = tiny_tensors();
    dir.write("config.json", tiny_config().dump());
    dir.write("model.safetensors", safetensors(all, " "));
    const Checkpoint c(dir.string());
    CHECK(reinterpret_cast<uintptr_t>(c.weights.embed) % 2 == 0);
    check_weights(c, all, "model.");
}

TEST_CASE("tensors that do not match the config") {
    const Directory dir;
    Entries all = tiny_tensors();
    const std::string q = "model.layers.1.self_attn.q_proj.weight";
    std::vector<std::string> parts;
    SECTION("missing") {
        all.erase(q);
        parts = {"layers.1.self_attn.q_proj.weight", "no such tensor", "[128,64]"};
    }
    SECTION("unexpected") {
        all["model.layers.3.self_attn.q_proj.weight"] = all[q];
        parts = {"model.safetensors: \"model.layers.3.self_attn.q_proj.weight\""};
    }
    SECTION("doubled under two prefixes") {
        all["language_model." + q] = all[q];
        parts = {q, "again", "language_model." + q};
    }
    SECTION("transposed") {
        all[q].shape = {64, 128};
        parts = {"model.safetensors: \"" + q + "\"", "shape [64,128]", "shape [128,64]"};
    }
    SECTION("fewer rows of embedding than vocab_size") {
        all["model.embed_tokens.weight"] = random_entry({V - 1, D}, 1);
        parts = {"embed_tokens", "shape [47,64]", "shape [48,64]"};
    }
    SECTION("of another dtype") {
        all[q].dtype = "I16";
        parts = {q, "dtype I16", "BF16"};
    }
    SECTION("8 bits wide") {
        all[q].dtype = "F8_E4M3";
        all[q].data.resize(H * E * D);
        parts = {q, "dtype F8_E4M3", "BF16"};
    }
    write_tiny(dir, tiny_config(), all);
    parts.insert(parts.end(), {"found ", "expected "});
    check_message(error_of(dir), parts);
}

TEST_CASE("the rules of safetensors") {
    const Directory dir;
    dir.write("config.json", tiny_config().dump());
    const auto message = [&](const std::string& header, size_t data) {
        dir.write("model.safetensors", with_header(header, std::string(data, '\0')));
        const std::string error = error_of(dir);
        check_message(error, {"/model.safetensors: ", "found ", "expected "});
        return error;
    };
    const auto entry = [](const char* name, const char* shape, const char* offsets,
                          const char* dtype = "BF16") {
        return text(R"("%s":{"dtype":"%s","shape":%s,"data_offsets":%s})", name, dtype, shape,
                    offsets);
    };
    const auto one = [&](const char* shape, const char* offsets, const char* dtype = "BF16") {
        return message("{" + entry("x", shape, offsets, dtype) + "}", 8);
    };
    check_message(one("[4]", "[0,8]"), {"embed_tokens", "no such tensor"});  // x itself is valid
    check_message(one("[5]", "[0,8]"), {"\"x\"", "[5]", "agree"});
    check_message(one("[4]", "[8,0]"), {"\"x\"", "[8,0]"});
    check_message(one("[8]", "[0,16]"), {"\"x\"", "[0,16]", "8 bytes"});
    check_message(one("[-4]", "[0,8]"), {"\"x\"", "[-4]"});
    check_message(one("[4.0]", "[0,8]"), {"\"x\"", "[4.0]"});
    check_message(one("[1e300]", "[0,8]"), {"\"x\""});
    check_message(one("4", "[0,8]"), {"\"x\"", "\"shape\":4"});
    check_message(one("{\"a\":4}", "[0,8]"), {"\"x\""});
    check_message(one("[4]", "[0,8,8]"), {"\"x\""});
    check_message(one("[4]", "[0,8]", "BF17"), {"\"x\"", "BF17"});
    check_message(one("[9223372036854775812,2]", "[0,8]"), {"\"x\""});  // 2^63 + 4, times 4
    check_message(one("[0,18446744073709551615]", "[8,18446744073709551615]"), {"\"x\""});
    check_message(message("{\"x\":{\"dtype\":\"BF16\",\"shape\":[4]}}", 8),
                  {"\"x\"", "data_offsets"});
    check_message(message("{\"x\":5}", 8), {"\"x\"", "5"});
    check_message(
        message("{" + entry("x", "[4]", "[0,8]") + "," + entry("x", "[4]", "[8,16]") + "}", 16),
        {"\"x\" twice"});
    check_message(
        message("{" + entry("x", "[2]", "[0,4]") + "," + entry("y", "[2]", "[6,10]") + "}", 10),
        {"\"y\"", "6", "4"});  // a gap
    check_message(
        message("{" + entry("x", "[2]", "[0,4]") + "," + entry("y", "[2]", "[2,6]") + "}", 6),
        {"\"y\"", "2", "4"});  // an overlap
    check_message(
        message("{" + entry("x", "[2]", "[0,4]") + "," + entry("y", "[2]", "[0,4]") + "}", 4),
        {"0", "4"});  // two tensors in the same place
    check_message(message("{" + entry("x", "[2]", "[2,6]") + "}", 6), {"\"x\"", "2", "0"});
    check_message(message("{" + entry("x", "[2]", "[0,4]") + "}", 6),
                  {"2 bytes after the last tensor"});
    check_message(message("{\"__metadata__\":{\"format\":1}}", 0), {"__metadata__", "1", "string"});
    check_message(message("{\"__metadata__\":7}", 0), {"__metadata__", "7"});
    check_message(message(" {}", 0), {"header"});
    check_message(message("[]", 0), {"header"});
    check_message(message("{\"x\":" + std::string(100, '['), 0), {"deep"});
    check_message(message("{\"x\ny\":1}", 0), {"line 2", "control character"});
    check_message(message("{\"x\\ny\":1}", 0), {"\"x\\ny\""});
    for (const uint64_t length : {uint64_t{3}, uint64_t{100'000'001}, ~uint64_t{0}, ~uint64_t{7}}) {
        std::string file(reinterpret_cast<const char*>(&length), 8);
        dir.write("model.safetensors", file + "{}");
        check_message(error_of(dir), {"/model.safetensors", std::to_string(length), "10 bytes"});
    }
}

TEST_CASE("weights that are missing or not a regular file") {
    const Directory dir;
    dir.write("config.json", tiny_config().dump());
    const fs::path file = dir.path / "model.safetensors";
    check_message(error_of(dir), {dir.string(), "no weights", "model.safetensors"});
    dir.write("model.safetensors", "");
    check_message(error_of(dir), {file.string(), "0 bytes"});
    dir.write("model.safetensors", "abc");
    check_message(error_of(dir), {file.string(), "3 bytes"});
    fs::remove(file);
    fs::create_directory(file);
    check_message(error_of(dir), {file.string(), "regular file"});
    fs::remove(file);
    REQUIRE(mkfifo(file.c_str(), 0600) == 0);
    check_message(error_of(dir), {file.string(), "regular file"});
}

TEST_CASE("D12: a Git LFS pointer is named as one") {
    const std::string pointer =
        "version https://git-lfs.github.com/spec/v1\n"
        "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n";
    for (const char* name : {"config.json", "generation_config.json", "model.safetensors"}) {
        const Directory dir;
        write_tiny(dir, tiny_config(), tiny_tensors());
        dir.write(name, pointer);
        check_message(error_of(dir), {dir.string() + "/" + name + ": found a Git LFS pointer",
                                      "expected ", "git lfs pull"});
    }
}

TEST_CASE("F7: nothing may follow the JSON of a file, also not behind a NUL byte") {
    Entries all = tiny_tensors();
    const std::string weights = safetensors(all);
    for (const std::string& end : {std::string("\0garbage", 8), std::string(1, '\0'),
                                   std::string("x"), std::string("{}"), std::string("\n\0\n", 3)}) {
        const Directory dir;
        const auto refused = [&](const char* name, const std::string& bytes) {
            const fs::path file = dir.path / name;
            const std::string before = fs::exists(file) ? read_file(file) : "";
            dir.write(name, bytes);
            CAPTURE(name, end);
            check_message(error_of(dir), {file.string() + ": found ", "a JSON object"});
            if (end.find('\0') != end.npos) check_message(error_of(dir), {"a NUL byte at "});
            fs::remove(file);
            if (!before.empty()) dir.write(name, before);
            CHECK(error_of(dir) == "");
        };
        write_tiny(dir, tiny_config(), all);
        refused("config.json", tiny_config().dump() + end);
        refused("generation_config.json", "{}" + end);
        refused("tokenizer_config.json", "{}" + end);
        refused("chat_template.json", "{}" + end);
        refused("model.safetensors", safetensors(all, end));
        fs::rename(dir.path / "model.safetensors", dir.path / "a.safetensors");
        const std::string index = R"({"weight_map": {"x": "a.safetensors"}})";
        dir.write("model.safetensors.index.json", index);
        refused("model.safetensors.index.json", index + end);
    }
}

TEST_CASE("a truncated file is always refused") {
    const Directory dir;
    write_tiny(dir, tiny_config(), tiny_tensors());
    const fs::path file = dir.path / "model.safetensors";
    const std::string whole = read_file(file);
    uint64_t header = 0;
    std::memcpy(&header, whole.data(), 8);
    std::vector<size_t> sizes;
    for (size_t size = 0; size < 8 + header; size++) sizes.push_back(size);
    for (size_t i = 0; i < 100; i++)
        sizes.push_back(8 + header + (whole.size() - 9 - header) * i / 99);
    for (auto size = sizes.rbegin(); size != sizes.rend(); ++size) {  // from long to short
        fs::resize_file(file, *size);
        largest = 0;
        const std::string error = error_of(dir);
        if (error.find("/model.safetensors: ") == std::string::npos || largest > whole.size()) {
            CAPTURE(*size, error, largest);
            FAIL("no clear error, or more memory than the file has bytes");
        }
    }
}

TEST_CASE("no flipped byte of a header crashes or takes memory") {
    const Directory dir;
    json config = tiny_config();
    config["num_hidden_layers"] = 1;
    write_tiny(dir, config, tiny_tensors("model.", 1));
    const fs::path file = dir.path / "model.safetensors";
    const std::string whole = read_file(file);
    uint64_t header = 0;
    std::memcpy(&header, whole.data(), 8);
    std::fstream out(file, std::ios::binary | std::ios::in | std::ios::out);
    int refused = 0, loaded = 0;
    for (size_t at = 0; at < 8 + header; at++)
        for (int bit = 0; bit < 8; bit++) {
            const auto put = [&](char c) { out.seekp(static_cast<long>(at)).put(c).flush(); };
            put(static_cast<char>(whole[at] ^ 1 << bit));
            largest = 0;
            const std::string error = error_of(dir);
            put(whole[at]);
            error.empty() ? loaded++ : refused++;
            const bool clear = error.empty() || (error.find('\n') == std::string::npos &&
                                                 error.find(dir.string()) != std::string::npos);
            if (!clear || largest > whole.size()) {
                CAPTURE(at, bit, error, largest);
                FAIL("no clear error, or more memory than the file has bytes");
            }
        }
    // A flipped bit may load if it changes a word in __metadata__ or the kind of a white space.
    std::printf("flipped bits of a header: %d refused, %d loaded\n", refused, loaded);
    CHECK(loaded < 200);
    CHECK(error_of(dir) == "");
}

// [4] The chat template ---------------------------------------------------------------------------

namespace {

// What the log says while a checkpoint is loaded.
std::string log_of(const Directory& dir) {
    std::fflush(stderr);
    std::FILE* const log = std::tmpfile();
    const int before = dup(2);
    dup2(fileno(log), 2);
    const std::string error = error_of(dir);
    std::fflush(stderr);
    dup2(before, 2);
    close(before);
    std::rewind(log);
    std::string said;
    for (int c; (c = std::fgetc(log)) != EOF;) said += char(c);
    std::fclose(log);
    CHECK(error == "");
    return said;
}

}  // namespace

TEST_CASE("D9: a chat template that is not Gemma 3's is named once") {
    const Directory dir;
    write_tiny(dir, tiny_config(), tiny_tensors());
    const auto names = [&](const char* file) {
        const std::string said = log_of(dir), words = "a chat template that is not Gemma 3's";
        CAPTURE(file, said);
        const size_t at = said.find(words);
        if (!file) return at == said.npos;
        return said.find(dir.string() + "/" + file + ": " + words) != said.npos &&
               said.find(words, at + 1) == said.npos;
    };
    CHECK(names(nullptr));
    const json demo = json::parse(read_file(repository / "demo/model/tokenizer_config.json"));
    dir.write("tokenizer_config.json", demo.dump());
    CHECK(names(nullptr));
    dir.write("tokenizer_config.json", R"({"model_max_length": 1000000000000000019884624838656})");
    CHECK(names(nullptr));
    std::string known;  // the same up to white space
    for (const char c : demo["chat_template"].get<std::string>())
        known += c == ' ' ? "\n  " : std::string(1, c);
    dir.write("chat_template.jinja", known);
    CHECK(names(nullptr));
    dir.write("tokenizer_config.json", R"({"chat_template": "{{ messages }}"})");
    CHECK(names(nullptr));  // chat_template.jinja is the one that transformers uses
    dir.write("chat_template.jinja", known + "x");
    CHECK(names("chat_template.jinja"));
    fs::remove(dir.path / "chat_template.jinja");
    CHECK(names("tokenizer_config.json"));
    dir.write("tokenizer_config.json",
              R"({"chat_template": [{"name": "default", "template": ""}]})");
    CHECK(names("tokenizer_config.json"));
    dir.write("chat_template.json", R"({"chat_template": "{{ raise_exception('no') }}"})");
    CHECK(names("chat_template.json"));
}

// [5] The cache -----------------------------------------------------------------------------------

namespace {

// Sets an environment variable until the end of the scope.
struct Environment {
    std::string name, before;
    bool was_set;
    Environment(const char* variable, const std::string& value)
        : name(variable),
          before(std::getenv(variable) ? std::getenv(variable) : ""),
          was_set(std::getenv(variable)) {
        value.empty() ? unsetenv(variable) : setenv(variable, value.c_str(), 1);
    }
    ~Environment() { was_set ? setenv(name.c_str(), before.c_str(), 1) : unsetenv(name.c_str()); }
};

}  // namespace

TEST_CASE("a model is found as a directory or in the cache") {
    const Directory root;
    const std::string folder = "models--org--name", model = "org/name";
    const auto at = [&](const std::string& hub, const std::string& revision) {
        root.write(hub + "/" + folder + "/snapshots/" + revision + "/config.json", "{}");
        return root.string() + "/" + hub + "/" + folder + "/snapshots/" + revision;
    };
    const Environment home("HOME", root.string());
    const Environment hf_home("HF_HOME", ""), hub_cache("HF_HUB_CACHE", ""),
        old_cache("HUGGINGFACE_HUB_CACHE", ""), xdg("XDG_CACHE_HOME", "");

    check_message(error_of([&] { find_model(model); }),
                  {"org/name: ", root.string() + "/.cache/huggingface/hub/" + folder,
                   "./dev fetch org/name"});
    const std::string in_home = at(".cache/huggingface/hub", "a");
    CHECK(find_model(model) == in_home);
    {
        const Environment xdg2("XDG_CACHE_HOME", root.string() + "/xdg");
        check_message(error_of([&] { find_model(model); }),
                      {root.string() + "/xdg/huggingface/hub/" + folder});
        const Environment tilde2("XDG_CACHE_HOME", "~/xdg2");
        check_message(error_of([&] { find_model(model); }),
                      {root.string() + "/xdg2/huggingface/hub/" + folder});
        const Environment tilde("HF_HOME", "~/tilde");
        check_message(error_of([&] { find_model(model); }), {root.string() + "/tilde/hub/"});
        const Environment alone("HF_HOME", "~");
        check_message(error_of([&] { find_model(model); }), {root.string() + "/hub/" + folder});
        const Environment old_tilde("HUGGINGFACE_HUB_CACHE", "~/old");
        check_message(error_of([&] { find_model(model); }), {root.string() + "/old/" + folder});
        const Environment new_tilde("HF_HUB_CACHE", "~/new");
        check_message(error_of([&] { find_model(model); }), {root.string() + "/new/" + folder});
    }
    const Environment hf_home2("HF_HOME", root.string() + "/hf");
    check_message(error_of([&] { find_model(model); }), {root.string() + "/hf/hub/" + folder});
    const std::string first = at("hf/hub", "a1"), second = at("hf/hub", "b2");
    const auto now = fs::file_time_type::clock::now();
    fs::last_write_time(first, now);
    fs::last_write_time(second, now - std::chrono::hours(1));
    CHECK(find_model(model) == first);  // without refs/main: the newest
    fs::last_write_time(second, now + std::chrono::hours(1));
    CHECK(find_model(model) == second);
    const std::string empty = root.string() + "/hf/hub/" + folder + "/snapshots/c3";
    fs::create_directories(empty);
    fs::last_write_time(empty, now + std::chrono::hours(2));
    CHECK(find_model(model) == second);  // the newest that has a config.json
    root.write("hf/hub/" + folder + "/refs/main", "a1");
    CHECK(find_model(model) == first);
    root.write("hf/hub/" + folder + "/refs/main", "a1\n");
    CHECK(find_model(model) == first);
    root.write("hf/hub/" + folder + "/refs/main", "c3");
    CHECK(find_model(model) == second);

    const Environment old2("HUGGINGFACE_HUB_CACHE", root.string() + "/old");
    check_message(error_of([&] { find_model(model); }), {root.string() + "/old/" + folder});
    const Environment cache2("HF_HUB_CACHE", root.string() + "/elsewhere");
    check_message(error_of([&] { find_model(model); }), {root.string() + "/elsewhere/" + folder});
    CHECK(find_model(first) == first);  // a directory is used as it is
}

TEST_CASE("a path that is not a model is refused with a message that says what it is") {
    const Directory root;
    const std::string config = root.string() + "/model/config.json";
    root.write("model/config.json", "{}");
    root.write("empty/readme", "");
    root.write("model.gguf", "GGUF");
    const auto message = [](const std::string& model, const std::vector<std::string>& parts) {
        const std::string error = error_of([&] { find_model(model); });
        check_message(error, parts);
        CHECK(error.find("dev fetch") == std::string::npos);  // fetching would not help
    };
    message("NO-SUCH-DIR", {"NO-SUCH-DIR: found no such directory", "ORGANISATION/NAME"});
    message("./no/such", {"./no/such: found no such directory"});
    message("/no/such", {"no such directory"});
    message("no/such/", {"no such directory"});
    message("org/na me", {"no such directory"});
    message("", {"no such directory"});
    message("./model.gguf", {"GGUF, which is not read", "safetensors"});
    message(root.string() + "/model.gguf", {"GGUF, which is not read"});
    message(config, {config + ": found a file", "its directory, " + root.string() + "/model"});
    message(root.string() + "/empty", {"/empty: found no config.json"});
}
