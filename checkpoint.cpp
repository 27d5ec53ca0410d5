// SPDX-License-Identifier: Apache-2.0
//
// checkpoint.cpp: a model directory of Hugging Face becomes Config, SamplingDefaults and Weights.
// Beside the path.
//
//     find_model("google/gemma-3-1b-it") -> directory        Checkpoint(directory) -> all of it
//
// config.json has many dialects: flatten() makes one flat JSON of any, read_config() reads that
// once. Weights stay in their files, mapped; what is not bf16 is converted. No file is trusted:
// what is not Gemma 3, not text, not whole or not as the config says is refused in one line, and
// memory is taken only for bytes that a file really has.
#include "gemma.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <list>
#include <map>
#include <set>

#include <nlohmann/json.hpp>

namespace gemma {

using json = nlohmann::json;
namespace fs = std::filesystem;

Config read_config(const std::string& directory);  // also for the tests

// [1] Files and JSON ------------------------------------------------------------------------------

namespace {

[[noreturn]] void refuse(const std::string& where, const std::string& found,
                         const std::string& expected) {
    throw Error(where + ": found " + found + ", expected " + expected);
}

// A value as it goes into a message: ASCII, on one line, not too long.
std::string shown(const json& value) {
    const std::string s = value.dump(-1, ' ', true, json::error_handler_t::replace);
    return s.size() <= 160 ? s : s.substr(0, 157) + "...";
}

bool is_there(const std::string& path) { return access(path.c_str(), F_OK) == 0; }

// A regular file, mapped read-only.
struct File {
    std::string path;
    std::string_view bytes;

    explicit File(const std::string& name) : path(name) {
        const int fd = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);  // a FIFO: no waiting
        if (fd < 0) refuse(path, std::strerror(errno), "a readable file");
        struct stat s = {};
        const bool regular = fstat(fd, &s) == 0 && S_ISREG(s.st_mode);
        const size_t size = regular ? s.st_size : 0;
        void* const data = size ? mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0) : MAP_FAILED;
        close(fd);
        if (!regular) refuse(path, "no regular file", "one");
        if (data == MAP_FAILED) refuse(path, text("%zu bytes", size), "a file that can be mapped");
        bytes = {static_cast<const char*>(data), size};
    }
    File(const File&) = delete;
    ~File() { munmap(const_cast<char*>(bytes.data()), bytes.size()); }
};

// Stricter than nlohmann: a key that comes twice is refused (it would keep the last), and so is
// depth or number that would make much memory of few bytes (a 27B's header has 22,000 events).
json parse(const std::string& path, std::string_view bytes) {
    std::vector<std::set<std::string>> keys;  // of the objects around the current place
    int events = 0;
    const auto strict = [&](int depth, json::parse_event_t event, json& value) {
        if (event == json::parse_event_t::object_start) keys.emplace_back();
        if (event == json::parse_event_t::object_end) keys.pop_back();
        if (event == json::parse_event_t::key && !keys.back().insert(value).second)
            refuse(path, "the key " + shown(value) + " twice", "each key once");
        if (depth > 8 || ++events > 1 << 18) refuse(path, "JSON too deep or too long", "less");
        return true;
    };
    try {
        const json parsed = json::parse(bytes, strict);
        if (!parsed.is_object()) refuse(path, shown(parsed), "a JSON object");
        return parsed;
    } catch (const json::exception& e) {
        const std::string what = e.what();  // "[json.exception.NAME] parse error at line 1, ..."
        refuse(path, shown(what.substr(what.find("] ") + 2)), "a JSON object");
    }
}

// [2] Configuration -------------------------------------------------------------------------------

// A flat JSON, and the only ways in which a field of it becomes a value.
struct Fields {
    std::string path;
    json flat;

    template <typename T>
    T get(const std::string& name, T otherwise, T low, T high) const {
        const json value = flat.value(name, json(otherwise));
        const bool kind = std::is_integral_v<T> ? value.is_number_integer() : value.is_number();
        if (kind && value.get<double>() >= low && value.get<double>() <= high) return value;
        refuse(path + ": " + name, shown(value), text("%.9g to %.9g", 0. + low, 0. + high));
    }
    // The first of the allowed values is what a missing field means.
    void only(const std::string& name, const json& allowed, const char* why = "") const {
        const json value = flat.value(name, allowed[0]);
        if (std::find(allowed.begin(), allowed.end(), value) == allowed.end())
            refuse(path + ": " + name, shown(value), "one of " + shown(allowed) + why);
    }
    void multiple(const char* name, int value, int of) const {
        if (value % of) refuse(path + ": " + name, text("%d", value), text("a multiple of %d", of));
    }
    // The object of that name, empty where there is none.
    Fields part(const std::string& name) const {
        const json value = flat.value(name, json::object());
        const std::string where = path + ": " + shown(name);
        if (!value.is_object()) refuse(where, shown(value), "an object");
        return {where, value};
    }
};

Fields fields_of(const std::string& path) {
    json flat;
    flat.merge_patch(parse(path, File(path).bytes));  // drops nulls: they are as good as absent
    return {path, flat};
}

// Any dialect -> the plain fields of the 1B's config.json.
Fields flatten(const std::string& path) {
    Fields top = fields_of(path);
    top.flat.emplace("model_type", nullptr);
    Fields f = top;
    f.flat.merge_patch(top.part("text_config").flat);
    for (const char* whole : {"model_type", "architectures", "eos_token_id", "tie_word_embeddings",
                              "quantization_config", "use_bidirectional_attention"})
        if (top.flat.contains(whole)) f.flat[whole] = top.flat[whole];  // not its text part's
    if (f.flat.contains("_sliding_window_pattern"))                     // the 270M's name for it
        f.flat.emplace("sliding_window_pattern", f.flat["_sliding_window_pattern"]);

    const Fields rope = f.part("rope_parameters");  // transformers 5
    json full = rope.part("full_attention").flat, local = rope.part("sliding_attention").flat;
    if (rope.flat.size() !=
        rope.flat.count("full_attention") + rope.flat.count("sliding_attention"))
        refuse(rope.path, shown(rope.flat), "full_attention and sliding_attention");
    full.merge_patch(f.part("rope_scaling").flat);  // transformers 4: of the global layers
    if (full.contains("rope_theta")) f.flat["rope_theta"] = full["rope_theta"];
    if (local.contains("rope_theta")) f.flat["rope_local_base_freq"] = local["rope_theta"];
    const json type = full.value("rope_type", full.value("type", json("default")));
    f.flat["rope_type"] = type;
    f.flat["rope_factor"] = type == "linear" ? full.value("factor", json()) : json(1);
    f.flat["rope_local_type"] = local.value("rope_type", json("default"));
    return f;
}

Fields generation_config(const std::string& directory) {
    const std::string path = directory + "/generation_config.json";
    return is_there(path) ? fields_of(path) : Fields{path, json::object()};
}

SamplingDefaults read_defaults(const std::string& directory) {
    const Fields f = generation_config(directory);
    SamplingDefaults d;
    d.temperature = f.get("temperature", d.temperature, 0., 100.);
    d.top_p = f.get("top_p", d.top_p, 1e-6, 1.);
    d.min_p = f.get("min_p", d.min_p, 0., 1.);
    d.repetition_penalty = f.get("repetition_penalty", d.repetition_penalty, 0.01, 100.);
    d.top_k = std::max(0, f.get("top_k", d.top_k, -1, 1 << 30));  // vLLM's off is -1
    d.max_new_tokens = f.get("max_new_tokens", d.max_new_tokens, -1, 1 << 30);
    return d;
}

// Round to nearest, ties to even; a NaN stays one.
bf16 to_bf16(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    return {static_cast<uint16_t>(x != x ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

// Exact before the rounding: in a float's places, a half's exponent is too small by 112.
bf16 half_to_bf16(uint16_t half) {
    const uint32_t u = (half & 0x7fffu) << 13;
    const float x = u < 0x0f800000 ? std::bit_cast<float>(u) * 0x1p112f
                                   : std::bit_cast<float>(u | 0x7f800000);  // infinity, NaN
    return to_bf16(half & 0x8000 ? -x : x);
}

}  // namespace

Config read_config(const std::string& directory) {
    const Fields f = flatten(directory + "/config.json"), g = generation_config(directory);
    f.only("use_bidirectional_attention", {false}, " (EmbeddingGemma makes no text)");
    f.only("model_type", {"gemma3", "gemma3_text"}, " (only Gemma 3 is served)");
    f.only("architectures", {{"Gemma3ForCausalLM"}, {"Gemma3ForConditionalGeneration"}});
    f.only("quantization_config", {nullptr}, " (weights in bf16, f32 or f16)");
    f.only("tie_word_embeddings", {true}, " (Gemma 3 has no output matrix of its own)");
    f.only("attn_logit_softcapping", {nullptr}, " (Gemma 2 had it)");
    f.only("final_logit_softcapping", {nullptr}, " (Gemma 2 had it)");
    f.only("attention_bias", {false});
    f.only("hidden_activation", {"gelu_pytorch_tanh"});
    f.only("rope_type", {"default", "linear"});
    f.only("rope_local_type", {"default"});
    f.only("head_dim", {256, 128, 64});
    Config c = {};
    c.D = f.get("hidden_size", 2304, 32, 1 << 13);
    c.F = f.get("intermediate_size", 9216, 32, 1 << 20);
    c.L = f.get("num_hidden_layers", 26, 1, 1 << 10);
    c.H = f.get("num_attention_heads", 8, 1, 1 << 10);
    c.G = f.get("num_key_value_heads", 4, 1, 1 << 10);
    c.E = f.get("head_dim", 256, 64, 256);
    c.V = f.get("vocab_size", 262208, 16, 1 << 19);
    c.W = f.get("sliding_window", 4096, 1, 1 << 24);
    c.max_positions = f.get("max_position_embeddings", 131072, 1, 1 << 24);
    c.vocab = std::min(c.V, 262144);  // the rows beyond stand for images
    c.eps = f.get("rms_norm_eps", 1e-6f, 0.f, 1.f);
    c.scale = 1 / std::sqrt(f.get("query_pre_attn_scalar", 256.f, 1.f, 65536.f));
    c.embed_scale = std::bit_cast<float>(to_bf16(std::sqrt(0.f + c.D)).bits * 65536u);
    c.theta[local_pool] = f.get("rope_local_base_freq", 1e4f, 1.f, 1e12f);
    c.theta[global_pool] = f.get("rope_theta", 1e6f, 1.f, 1e12f);
    c.rope_divisor[local_pool] = 1;
    c.rope_divisor[global_pool] = f.get("rope_factor", 1.f, 1.f, 65536.f);
    f.multiple("hidden_size", c.D, 32);
    f.multiple("intermediate_size", c.F, 32);
    f.multiple("vocab_size", c.V, 16);
    f.multiple("num_attention_heads", c.H, c.G);
    if (c.H / c.G > 16)  // they share an mma's 16 rows
        refuse(f.path + ": num_attention_heads", text("%d", c.H), text("at most %d", 16 * c.G));

    const int pattern = f.get("sliding_window_pattern", 6, 1, 1 << 16);
    json types = f.flat.value("layer_types", json::array());
    for (int i = 1; !f.flat.contains("layer_types") && i <= c.L; i++)
        types.push_back(i % pattern ? "sliding_attention" : "full_attention");
    if (!types.is_array() || types.size() != 0u + c.L)
        refuse(f.path + ": layer_types", shown(types), text("%d, one a layer", c.L));
    for (const json& type : types) {
        const Fields one{f.path, {{"layer_types", type}}};
        one.only("layer_types", {"full_attention", "sliding_attention"});
        c.global.push_back(type == "full_attention");
    }
    const Fields& source = g.flat.contains("eos_token_id") ? g : f;
    json ids = source.flat.value("eos_token_id", json(1));
    if (!ids.is_array()) ids = {ids};
    if (ids.empty()) refuse(source.path + ": eos_token_id", "[]", "an id or more");
    for (const json& id : ids)
        c.eos.push_back(
            Fields{source.path, {{"eos_token_id", id}}}.get("eos_token_id", 1, 0, c.V - 1));
    return c;
}

// [3] Safetensors: 8 bytes with the length of the header, the header (JSON), the data -------------

namespace {

struct Tensor {
    std::string name, where, dtype;  // where: its file and name, for messages
    json shape;
    std::string_view data;
};

// One entry of a header. Its shape, dtype and offsets must agree, without overflow.
Tensor read_entry(const std::string& name, const Fields& entry, std::string_view data) {
    static const std::map<json, uint64_t> widths = {
        {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1},
        {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},
        {"U32", 4},  {"F32", 4}, {"I64", 8}, {"U64", 8},     {"F64", 8}};
    const auto get = [&](const char* key) { return entry.flat.value(key, json()); };
    const json dtype = get("dtype"), shape = get("shape"), at = get("data_offsets");
    bool good = entry.flat.size() == 3 && widths.count(dtype) && shape.is_array() &&
                at.is_array() && at.size() == 2;
    for (const json& list : {shape, at})
        for (const json& n : list) good = good && n.is_number_unsigned();
    uint64_t bytes = good ? widths.at(dtype) : 0;
    for (const json& n : shape)
        good = good && !__builtin_mul_overflow(bytes, n.get<uint64_t>(), &bytes);
    if (good && at[0] <= at[1] && at[1] <= data.size() && at[1] == at[0].get<uint64_t>() + bytes)
        return {name, entry.path, dtype, shape, data.substr(at[0], bytes)};
    refuse(entry.path, shown(entry.flat),
           text("dtype, shape and data_offsets that agree, within %zu bytes", data.size()));
}

// All tensors of a file, in the order of their data. Each byte of the data belongs to exactly one.
std::vector<Tensor> read_header(const File& file) {
    uint64_t length = 0;
    const size_t size = file.bytes.size();
    if (size >= 8) std::memcpy(&length, file.bytes.data(), 8);
    if (size < 8 || length > 100'000'000 || length > size - 8 || file.bytes.substr(8, 1) != "{")
        refuse(file.path, text("a header of %ju bytes", uintmax_t{length}),
               text("one in {}, at most 100000000, within the file's %zu bytes", size));
    const std::string_view data = file.bytes.substr(8 + length);
    const Fields header{file.path, parse(file.path, file.bytes.substr(8, length))};
    const Fields metadata = header.part("__metadata__");
    for (const json& value : metadata.flat)
        if (!value.is_string()) refuse(file.path + ": __metadata__", shown(value), "a string");

    std::vector<Tensor> tensors;
    for (const auto& [name, entry] : header.flat.items())
        if (name != "__metadata__") tensors.push_back(read_entry(name, header.part(name), data));
    std::ranges::sort(tensors, {},
                      [](const Tensor& t) { return std::pair(t.data.data(), t.data.size()); });
    const char* next = data.data();
    for (const Tensor& t : tensors) {
        if (t.data.data() != next)
            refuse(t.where, text("data at %td", t.data.data() - data.data()),
                   text("%td, where the tensor before it ends", next - data.data()));
        next += t.data.size();
    }
    if (const char* end = data.data() + data.size(); next != end)
        refuse(file.path, text("%td bytes after the last tensor", end - next), "its end");
    return tensors;
}

// The weight files of a directory: one, or those in an index.
std::set<std::string> weight_files(const std::string& directory) {
    const std::string single = directory + "/model.safetensors", index = single + ".index.json";
    if (is_there(single)) return {single};
    if (!is_there(index)) refuse(directory, "no weights", "model.safetensors or its .index.json");
    std::set<std::string> paths;
    const Fields map = fields_of(index).part("weight_map");
    for (const json& name : map.flat) {
        if (!name.is_string() || name.get<std::string>().find('/') != std::string::npos)
            refuse(index + ": weight_map", shown(name), "a file beside it");
        paths.insert(directory + "/" + name.get<std::string>());
    }
    return paths;
}

// [4] Weights -------------------------------------------------------------------------------------

// Brings a file into memory, and says once a second how far it is.
void page_in(const File& file) {
    constexpr size_t piece = 64 << 20;
    auto told = std::chrono::steady_clock::now();
    for (size_t at = 0; at < file.bytes.size(); at += piece) {
        const std::string_view part = file.bytes.substr(at, piece);
        void* const start = const_cast<char*>(part.data());
        madvise(start, part.size(), MADV_WILLNEED);  // one long read
        if (madvise(start, part.size(), MADV_POPULATE_READ) && errno != EINVAL)
            refuse(file.path, std::strerror(errno), "data that can be read");
        const auto now = std::chrono::steady_clock::now();
        if (now - told < std::chrono::seconds(1)) continue;
        told = now;
        say_step(
            text("  %s: %.2f of %.2f GB", file.path.c_str(), at / 1e9, file.bytes.size() / 1e9));
    }
}

template <typename From, typename Function>
void convert(std::string_view from, bf16* to, Function one) {
    for (size_t i = 0; i < from.size() / sizeof(From); i++) {
        From x;  // a tensor need not be aligned
        std::memcpy(&x, from.data() + i * sizeof x, sizeof x);
        to[i] = one(x);
    }
}

}  // namespace

struct Checkpoint::Files {
    std::list<File> mapped;
    std::map<std::string, Tensor> tensors;  // of the text model, by name without prefix
    std::vector<std::pair<Tensor, std::unique_ptr<bf16[]>>> converted;
    uint64_t skipped = 0;

    void sort_in(const Tensor& t) {
        for (const char* other : {"vision_tower.", "multi_modal_projector.", "lm_head."})
            if (t.name.find(other) != std::string::npos) return void(skipped += t.data.size());
        std::string tail = t.name;
        for (const std::string prefix :
             {"model.language_model.", "language_model.model.", "model."})
            if (tail == t.name && tail.starts_with(prefix)) tail.erase(0, prefix.size());
        const auto [first, is_new] = tensors.emplace(tail, t);
        if (!is_new) refuse(t.where, "it again", "it only once, as in " + first->second.where);
    }

    const bf16* take(const std::string& directory, const std::string& name, const json& shape) {
        const auto node = tensors.extract(name);
        const std::string file = mapped.size() == 1 ? mapped.front().path : directory;
        if (!node) refuse(file + ": " + shown(name), "no such tensor", "shape " + shown(shape));
        const Tensor& t = node.mapped();
        if (t.shape != shape) refuse(t.where, "shape " + shown(t.shape), "shape " + shown(shape));
        if (t.dtype != "BF16" && t.dtype != "F16" && t.dtype != "F32")
            refuse(t.where, "dtype " + t.dtype, "BF16, F16 or F32");
        if (t.dtype == "BF16" && reinterpret_cast<uintptr_t>(t.data.data()) % 2 == 0)
            return reinterpret_cast<const bf16*>(t.data.data());
        const size_t n = t.data.size() / (t.dtype == "F32" ? 4 : 2);
        return converted.emplace_back(t, std::make_unique_for_overwrite<bf16[]>(n)).second.get();
    }

    void load() {
        for (const File& file : mapped) page_in(file);
        for (const auto& [t, to] : converted)
            if (t.dtype == "F32")
                convert<float>(t.data, to.get(), to_bf16);
            else if (t.dtype == "F16")
                convert<uint16_t>(t.data, to.get(), half_to_bf16);
            else
                std::memcpy(to.get(), t.data.data(), t.data.size());
    }
};

Checkpoint::~Checkpoint() = default;

Checkpoint::Checkpoint(const std::string& directory)
    : config(read_config(directory)),
      defaults(read_defaults(directory)),
      files(std::make_unique<Files>()) {
    for (const std::string& path : weight_files(directory))
        for (const Tensor& t : read_header(files->mapped.emplace_back(path))) files->sort_in(t);

    const int D = config.D, F = config.F, Q = config.H * config.E, K = config.G * config.E;
    const struct {
        const char* name;
        json shape;
        const bf16* Layer::*member;
    } parts[] = {
        {"input_layernorm", {D}, &Layer::input_norm},
        {"post_attention_layernorm", {D}, &Layer::post_attention_norm},
        {"pre_feedforward_layernorm", {D}, &Layer::pre_ffn_norm},
        {"post_feedforward_layernorm", {D}, &Layer::post_ffn_norm},
        {"self_attn.q_proj", {Q, D}, &Layer::q},
        {"self_attn.k_proj", {K, D}, &Layer::k},
        {"self_attn.v_proj", {K, D}, &Layer::v},
        {"self_attn.o_proj", {D, Q}, &Layer::o},
        {"self_attn.q_norm", {config.E}, &Layer::q_norm},
        {"self_attn.k_norm", {config.E}, &Layer::k_norm},
        {"mlp.gate_proj", {F, D}, &Layer::gate},
        {"mlp.up_proj", {F, D}, &Layer::up},
        {"mlp.down_proj", {D, F}, &Layer::down},
    };
    size_t count = 0;
    const auto take = [&](const std::string& name, const json& shape) {
        uint64_t elements = 1;
        for (const json& n : shape) elements *= n.get<uint64_t>();
        bytes += elements * sizeof(bf16);
        count++;
        return files->take(directory, name + ".weight", shape);
    };
    weights.embed = take("embed_tokens", {config.V, D});
    weights.norm = take("norm", {D});
    weights.layers.resize(config.L);
    for (size_t i = 0; i < weights.layers.size(); i++)
        for (const auto& part : parts)
            weights.layers[i].*part.member = take(text("layers.%zu.", i) + part.name, part.shape);
    for (const auto& [name, t] : files->tensors) refuse(t.where, "it", "only the config's tensors");

    say_step(
        text("mapped %s: %zu tensors, %.2f GB of bf16", directory.c_str(), count, bytes / 1e9));
    if (files->skipped)
        say_step(
            text("  not used, for text: %.2f GB of vision_tower, multi_modal_projector or lm_head",
                 files->skipped / 1e9));
    uint64_t before = 0;
    for (const auto& [t, to] : files->converted) before += t.data.size();
    if (before)
        say_step(
            text("  to be converted to bf16: %zu tensors, %.2f GB of F32, F16 or unaligned BF16",
                 files->converted.size(), before / 1e9));
    files->load();
}

// [5] The Hugging Face cache ----------------------------------------------------------------------

namespace {

// $HF_HUB_CACHE and what huggingface_hub takes where that is not set. Empty is as good as not set.
fs::path hub_cache() {
    for (const auto& [name, below] : {std::pair("HF_HUB_CACHE", ""),
                                      {"HUGGINGFACE_HUB_CACHE", ""},
                                      {"HF_HOME", "hub"},
                                      {"XDG_CACHE_HOME", "huggingface/hub"},
                                      {"HOME", ".cache/huggingface/hub"}}) {
        const char* const value = std::getenv(name);
        if (!value || !*value) continue;
        const char* const home = std::getenv("HOME");
        const bool tilde = home && std::string_view(value).starts_with("~/");
        return (tilde ? fs::path(home) / (value + 2) : fs::path(value)) / below;
    }
    return ".cache/huggingface/hub";
}

// The hub's rule: ORGANISATION/NAME.
bool is_hub_name(const std::string& model) {
    const auto good = [](char c) { return std::isalnum(uint8_t(c)) || std::strchr("/._-", c); };
    return std::count(model.begin(), model.end(), '/') == 1 && std::isalnum(uint8_t(model[0])) &&
           model.back() != '/' && std::all_of(model.begin(), model.end(), good);
}

}  // namespace

std::string find_model(const std::string& model) {
    std::error_code ignored;
    if (is_there(model + "/config.json")) return model;
    if (model.ends_with(".gguf"))
        refuse(model, "GGUF, which is not read", "a directory with config.json and safetensors");
    if (fs::is_directory(model, ignored))
        refuse(model, "no config.json in it", "a model's directory");
    if (is_there(model))
        refuse(model, "a file", "its directory, " + fs::absolute(model).parent_path().string());
    if (!is_hub_name(model))
        refuse(model, "no such directory", "a model's directory, or its ORGANISATION/NAME");

    std::string folder = "models--" + model;
    const fs::path cache = hub_cache();
    folder.replace(folder.find('/'), 1, "--");
    const fs::path snapshots = cache / folder / "snapshots";
    std::string revision;
    if (std::ifstream(cache / folder / "refs/main") >> revision)
        if (is_there(snapshots / revision / "config.json")) return snapshots / revision;
    std::string found;  // without refs/main, which a pinned download does not write: the newest
    fs::file_time_type newest = fs::file_time_type::min();
    for (const auto& entry : fs::directory_iterator(snapshots, ignored))
        if (const auto time = entry.last_write_time(ignored);
            !ignored && time > newest && is_there(entry.path() / "config.json"))
            newest = time, found = entry.path();
    if (!found.empty()) return found;
    refuse(model, "no such directory, and no snapshot in " + snapshots.string(),
           "one of them; this gets it from the Hugging Face hub: ./dev fetch " + model);
}

}  // namespace gemma
