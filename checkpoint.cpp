// SPDX-License-Identifier: Apache-2.0
//
// checkpoint.cpp: reads a Hugging Face model directory into Config, SamplingDefaults and Weights.
// Beside the path.
//
// config.json has many dialects: flatten() turns each into one flat object, read_config() reads
// that object. Weights stay in their mapped files, or are converted to bf16. No file is trusted: a
// model that is not Gemma 3, is incomplete or contradicts its config is rejected in one line, and
// memory is allocated only for bytes that a file really has.
#include "file.h"
#include "gemma.h"

#include <pwd.h>
#include <sys/mman.h>
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

namespace gemma {

namespace fs = std::filesystem;

// [1] Configuration -------------------------------------------------------------------------------

namespace {

// A JSON value of a file. Its methods check what they return.
struct JsonValue {
    std::string where;  // its file and name, for messages
    json value;

    JsonValue field(const std::string& name, const json& otherwise) const {
        return {where + ": " + name, value.value(name, otherwise)};
    }
    template <typename T>
    T number(T low, T high) const {
        const bool kind = std::is_integral_v<T> ? value.is_number_integer() : value.is_number();
        if (kind && value.get<double>() >= low && value.get<double>() <= high) return value;
        reject(where, brief(value), text("%.9g to %.9g", 0. + low, 0. + high));
    }
    // A missing field counts as the first of the allowed values.
    void require(const std::string& name, const json& allowed, const char* why = "") const {
        const JsonValue f = field(name, allowed[0]);
        if (std::find(allowed.begin(), allowed.end(), f.value) == allowed.end())
            reject(f.where, brief(f.value), "one of " + brief(allowed) + why);
    }
    void require_multiple(const char* name, int n, int of) const {
        if (n % of) reject(where + ": " + name, text("%d", n), text("a multiple of %d", of));
    }
    JsonValue object(const std::string& name) const {  // {} if it is missing
        const JsonValue f{where + ": " + brief(name), value.value(name, json::object())};
        if (!f.value.is_object()) reject(f.where, brief(f.value), "an object");
        return f;
    }
};

JsonValue read_object(const std::string& path) {
    json fields;
    fields.merge_patch(parse_json(path, File(path).bytes));  // drops nulls: null means missing
    return {path, fields};
}

// Turns any dialect of config.json into the flat fields of the 1B's. text_config overrides the top
// level, except in the fields that describe the whole model.
JsonValue flatten(const std::string& path) {
    JsonValue top = read_object(path);
    top.value.emplace("model_type", nullptr);  // missing here, text_config's must not replace it
    JsonValue f = top;
    f.value.merge_patch(top.object("text_config").value);
    for (const char* name : {"model_type", "architectures", "eos_token_id", "tie_word_embeddings",
                             "quantization_config", "use_bidirectional_attention"}) {
        if (top.value.contains(name)) f.value[name] = top.value[name];
    }
    if (f.value.contains("_sliding_window_pattern"))  // the 270M's name for it
        f.value.emplace("sliding_window_pattern", f.value["_sliding_window_pattern"]);

    const JsonValue rope = f.object("rope_parameters");  // of transformers 5
    json full = rope.object("full_attention").value;
    const json local = rope.object("sliding_attention").value;
    if (rope.value.size() !=
        rope.value.count("full_attention") + rope.value.count("sliding_attention"))
        reject(rope.where, brief(rope.value), "full_attention and sliding_attention");
    full.merge_patch(f.object("rope_scaling").value);  // of transformers 4, for the global layers
    if (full.contains("rope_theta")) f.value["rope_theta"] = full["rope_theta"];
    if (local.contains("rope_theta")) f.value["rope_local_base_freq"] = local["rope_theta"];
    const json type = full.value("rope_type", full.value("type", json("default")));
    f.value["rope_type"] = type;
    f.value["rope_factor"] = type == "linear" ? full.value("factor", json()) : json(1);
    f.value["rope_local_type"] = local.value("rope_type", json("default"));
    return f;
}

JsonValue generation_config(const std::string& directory) {
    const std::string path = directory + "/generation_config.json";
    return is_there(path) ? read_object(path) : JsonValue{path, json::object()};
}

SamplingDefaults read_defaults(const std::string& directory) {
    const JsonValue f = generation_config(directory);
    SamplingDefaults d;
    d.temperature = f.field("temperature", d.temperature).number(0., 100.);
    d.top_p = f.field("top_p", d.top_p).number(1e-6, 1.);
    d.min_p = f.field("min_p", d.min_p).number(0., 1.);
    d.repetition_penalty = f.field("repetition_penalty", d.repetition_penalty).number(0.01, 100.);
    d.top_k = std::max(0, f.field("top_k", d.top_k).number(-1, 1 << 30));  // vLLM: -1 is off too
    d.max_new_tokens = f.field("max_new_tokens", d.max_new_tokens).number(-1, 1 << 30);
    return d;
}

// Logs a chat template that is not Gemma 3's, since chat() writes Gemma 3's whatever is there.
// Templates are compared by FNV-1a hashes of their characters without white space.
void name_other_template(const std::string& directory) {
    constexpr uint64_t known[] = {0xfde372dce0686f89, 0xd95b0ba72b0cbf9d};  // Gemma 3's, the demo's
    // In the order in which transformers looks for it.
    for (const char* name :
         {"chat_template.jinja", "chat_template.json", "tokenizer_config.json"}) {
        const std::string path = directory + "/" + name;
        if (!is_there(path)) continue;
        const File file(path);
        json found = file.bytes;
        if (path.ends_with(".json")) {
            const json fields = parse_json(path, file.bytes);
            found = fields.value("chat_template", json());
        }
        if (found.is_null()) continue;
        uint64_t hash = 0xcbf29ce484222325;
        for (const char c : found.is_string() ? found.get<std::string>() : brief(found))
            if (!std::isspace(uint8_t(c))) hash = (hash ^ uint8_t(c)) * 0x100000001b3;
        if (std::find(std::begin(known), std::end(known), hash) == std::end(known))
            say(path + ": a chat template that is not Gemma 3's has no effect: chat uses Gemma 3's",
                Severity::warning);
        return;
    }
}

// Rounds to nearest, ties to even. Setting 0x40 keeps a NaN from becoming an infinity.
bf16 to_bf16(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    return {static_cast<uint16_t>(x != x ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

// Moved to a float's places, a half has an exponent that is 112 too small; the product is exact.
bf16 half_to_bf16(uint16_t half) {
    const uint32_t u = (half & 0x7fffu) << 13;
    const float x = u < 0x0f800000 ? std::bit_cast<float>(u) * 0x1p112f
                                   : std::bit_cast<float>(u | 0x7f800000);  // infinity, NaN
    return to_bf16(half & 0x8000 ? -x : x);
}

}  // namespace

Config read_config(const std::string& directory) {
    const JsonValue f = flatten(directory + "/config.json");
    const JsonValue generation = generation_config(directory);
    f.require("use_bidirectional_attention", {false}, " (EmbeddingGemma makes no text)");
    f.require("model_type", {"gemma3", "gemma3_text"}, " (only Gemma 3 is served)");
    f.require("architectures", {{"Gemma3ForCausalLM"}, {"Gemma3ForConditionalGeneration"}});
    f.require("quantization_config", {nullptr}, " (weights in bf16, f32 or f16)");
    f.require("tie_word_embeddings", {true}, " (Gemma 3 has no output matrix of its own)");
    f.require("attn_logit_softcapping", {nullptr}, " (Gemma 2 had it)");
    f.require("final_logit_softcapping", {nullptr}, " (Gemma 2 had it)");
    f.require("attention_bias", {false});
    f.require("hidden_activation", {"gelu_pytorch_tanh"});
    f.require("rope_type", {"default", "linear"});
    f.require("rope_local_type", {"default"});
    f.require("head_dim", {256, 128, 64});
    Config c = {};
    c.D = f.field("hidden_size", 2304).number(32, 1 << 13);
    c.F = f.field("intermediate_size", 9216).number(32, 1 << 20);
    c.L = f.field("num_hidden_layers", 26).number(1, 1 << 10);
    c.H = f.field("num_attention_heads", 8).number(1, 1 << 10);
    c.G = f.field("num_key_value_heads", 4).number(1, 1 << 10);
    c.E = f.field("head_dim", 256).number(64, 256);
    c.V = f.field("vocab_size", 262208).number(16, 1 << 19);
    c.W = f.field("sliding_window", 4096).number(1, 1 << 24);
    c.max_positions = f.field("max_position_embeddings", 131072).number(1, 1 << 20);
    c.vocab = std::min(c.V, 262144);  // Gemma's; main puts the tokenizer's size in its place
    c.eps = f.field("rms_norm_eps", 1e-6f).number(0.f, 1.f);
    c.scale = 1 / std::sqrt(f.field("query_pre_attn_scalar", 256.f).number(1.f, 65536.f));
    c.embed_scale = std::bit_cast<float>(to_bf16(std::sqrt(0.f + c.D)).bits * 65536u);
    c.theta[local_pool] = f.field("rope_local_base_freq", 1e4f).number(1.f, 1e12f);
    c.theta[global_pool] = f.field("rope_theta", 1e6f).number(1.f, 1e12f);
    c.rope_divisor[local_pool] = 1;
    c.rope_divisor[global_pool] = f.field("rope_factor", 1.f).number(1.f, 65536.f);
    f.require_multiple("hidden_size", c.D, 32);
    f.require_multiple("intermediate_size", c.F, 32);
    f.require_multiple("num_attention_heads", c.H, c.G);
    if (c.H / c.G > 16)  // the query heads of one KV head share the 16 rows of an mma
        reject(f.where + ": num_attention_heads", text("%d", c.H), text("at most %d", 16 * c.G));
    const int pattern = f.field("sliding_window_pattern", 6).number(1, 1 << 16);
    json usual;
    for (int i = 1; i <= c.L; i++)
        usual.push_back(i % pattern ? "sliding_attention" : "full_attention");
    const JsonValue types = f.field("layer_types", usual);
    if (!types.value.is_array() || types.value.size() != 0u + c.L)
        reject(types.where, brief(types.value), text("%d, one a layer", c.L));
    for (const json& type : types.value) {
        if (type != "full_attention" && type != "sliding_attention")
            reject(types.where, brief(type), R"(one of ["full_attention","sliding_attention"])");
        c.global.push_back(type == "full_attention");
    }
    const JsonValue& source = generation.value.contains("eos_token_id") ? generation : f;
    JsonValue ids = source.field("eos_token_id", 1);
    if (!ids.value.is_array()) ids.value = {ids.value};
    if (ids.value.empty()) reject(ids.where, "[]", "an id or more");
    for (const json& id : ids.value) c.eos.push_back(JsonValue{ids.where, id}.number(0, c.V - 1));
    return c;
}

// [2] Safetensors: 8 bytes with the length of the header, the header (JSON), the data -------------

namespace {

struct Tensor {
    std::string name, where, dtype;  // where: its file and name, for messages
    json shape;
    std::string_view data;
};

// Reads one entry of a header. Its shape, dtype and offsets must agree, without overflow.
Tensor read_entry(const std::string& name, const JsonValue& entry, std::string_view data) {
    // Weights are BF16, F16 or F32. The others may occur in tensors that this server skips.
    static const std::map<json, uint64_t> widths = {
        {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1},
        {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},
        {"U32", 4},  {"F32", 4}, {"I64", 8}, {"U64", 8},     {"F64", 8}};
    const auto get = [&](const char* key) { return entry.value.value(key, json()); };
    const json dtype = get("dtype"), shape = get("shape"), range = get("data_offsets");
    bool good = entry.value.size() == 3 && widths.count(dtype) && shape.is_array() &&
                range.is_array() && range.size() == 2 && range[0].is_number_unsigned() &&
                range[1].is_number_unsigned();
    uint64_t bytes = good ? widths.at(dtype) : 0;
    for (const json& n : shape) {
        good = good && n.is_number_unsigned() &&
               !__builtin_mul_overflow(bytes, n.get<uint64_t>(), &bytes);
    }
    if (good && range[0] <= range[1] && range[1] <= data.size() &&
        range[1] == range[0].get<uint64_t>() + bytes)
        return {name, entry.where, dtype, shape, data.substr(range[0], bytes)};
    reject(entry.where, brief(entry.value),
           text("dtype, shape and data_offsets that agree, within %zu bytes", data.size()));
}

// Returns a file's tensors in the order of their data. They must cover it without gap or overlap.
std::vector<Tensor> read_header(const File& file) {
    uint64_t length = 0;
    const size_t size = file.bytes.size();
    if (size >= 8) std::memcpy(&length, file.bytes.data(), 8);
    if (size < 8 || length > 100'000'000 || length > size - 8 || file.bytes.substr(8, 1) != "{")
        reject(file.path, text("a header of %ju bytes", uintmax_t{length}),
               text("one in {}, at most 100000000, within the file's %zu bytes", size));
    const std::string_view data = file.bytes.substr(8 + length);
    const JsonValue header{file.path, parse_json(file.path, file.bytes.substr(8, length))};
    const JsonValue metadata = header.object("__metadata__");
    for (const json& value : metadata.value)
        if (!value.is_string()) reject(file.path + ": __metadata__", brief(value), "a string");

    std::vector<Tensor> tensors;
    for (const auto& [name, entry] : header.value.items())
        if (name != "__metadata__") tensors.push_back(read_entry(name, header.object(name), data));
    // By size too: a tensor without elements begins where the next one begins.
    std::ranges::sort(tensors, {},
                      [](const Tensor& t) { return std::pair(t.data.data(), t.data.size()); });
    const char* next = data.data();
    for (const Tensor& t : tensors) {
        if (t.data.data() != next)
            reject(t.where, text("data at %td", t.data.data() - data.data()),
                   text("%td, where the tensor before it ends", next - data.data()));
        next += t.data.size();
    }
    if (const char* end = data.data() + data.size(); next != end)
        reject(file.path, text("%td bytes after the last tensor", end - next), "its end");
    return tensors;
}

// The paths of model-00001-of-N.safetensors to model-N-of-N.safetensors, which say without an index
// that they are all; none where no such file is.
std::set<std::string> numbered_files(const std::string& directory) {
    std::set<std::string> paths;
    std::error_code ignored;
    for (const auto& entry : fs::directory_iterator(directory, ignored)) {
        const std::string name = entry.path().filename();
        int part = 0, of = 0;
        std::sscanf(name.c_str(), "model-%5d-of-%5d", &part, &of);
        const auto name_of = [&](int i) { return text("model-%05d-of-%05d.safetensors", i, of); };
        if (name != name_of(part)) continue;
        for (int i = 1; i <= of; i++) paths.insert(directory + "/" + name_of(i));
    }
    for (const std::string& path : paths)
        if (!is_there(path)) reject(path, "no such file", "the whole set that others belong to");
    return paths;
}

// The paths of a directory's weight files: model.safetensors, or the files that its index lists, or
// a numbered set.
std::set<std::string> weight_files(const std::string& directory) {
    const std::string single = directory + "/model.safetensors", index = single + ".index.json";
    if (is_there(single)) return {single};
    std::set<std::string> paths;
    if (!is_there(index)) paths = numbered_files(directory);
    if (!paths.empty()) return paths;
    if (!is_there(index)) reject(directory, "no weights", "model.safetensors or its .index.json");
    const JsonValue weight_map = read_object(index).object("weight_map");
    for (const json& name : weight_map.value) {
        if (!name.is_string() || name.get<std::string>().find('/') != std::string::npos)
            reject(index + ": weight_map", brief(name), "a file beside it");
        paths.insert(directory + "/" + name.get<std::string>());
    }
    return paths;
}

// [3] Weights -------------------------------------------------------------------------------------

// Reads a whole file into the page cache, and logs its progress once a second.
void page_in(const File& file) {
    constexpr size_t piece = 64 << 20;
    auto last_said = std::chrono::steady_clock::now();
    for (size_t at = 0; at < file.bytes.size(); at += piece) {
        const std::string_view part = file.bytes.substr(at, piece);
        void* const start = const_cast<char*>(part.data());
        madvise(start, part.size(), MADV_WILLNEED);  // one long read
        if (madvise(start, part.size(), MADV_POPULATE_READ) && errno != EINVAL)
            reject(file.path, std::strerror(errno), "data that can be read");
        const auto now = std::chrono::steady_clock::now();
        if (now - last_said < std::chrono::seconds(1)) continue;
        last_said = now;
        say_step(
            text("  %s: %.2f of %.2f GB", file.path.c_str(), at / 1e9, file.bytes.size() / 1e9));
    }
}

template <typename From, typename Function>
void convert(std::string_view from, bf16* to, Function to_one) {
    for (size_t i = 0; i < from.size() / sizeof(From); i++) {
        From x;  // copied, since a tensor may be unaligned
        std::memcpy(&x, from.data() + i * sizeof x, sizeof x);
        to[i] = to_one(x);
    }
}

std::string without_prefix(const std::string& name) {
    for (const std::string prefix : {"model.language_model.", "language_model.model.", "model."}) {
        if (name.starts_with(prefix)) return name.substr(prefix.size());
    }
    return name;
}

}  // namespace

struct Checkpoint::Files {
    std::list<File> mapped;
    std::map<std::string, Tensor> unused;  // the text model's tensors, by name without prefix
    std::vector<std::pair<Tensor, std::unique_ptr<bf16[]>>> converted;
    uint64_t bytes_skipped = 0, bytes_to_convert = 0, bytes_of_bf16 = 0;

    void add(const Tensor& t) {
        for (const char* part : {"vision_tower.", "multi_modal_projector.", "lm_head."}) {
            if (t.name.find(part) == std::string::npos) continue;
            bytes_skipped += t.data.size();
            return;
        }
        const auto [first, is_new] = unused.emplace(without_prefix(t.name), t);
        if (!is_new) reject(t.where, "it again", "it only once, as in " + first->second.where);
    }

    // Moves a tensor out of `unused`. If the result is a converted copy, load() fills it. If it is
    // to have more elements than the tensor has, it is a copy with zeros at the end.
    const bf16* take(const std::string& directory, const std::string& tensor, const json& shape,
                     size_t elements = 0) {
        const std::string name = tensor + ".weight";
        const auto node = unused.extract(name);
        const std::string file = mapped.size() == 1 ? mapped.front().path : directory;
        if (!node) reject(file + ": " + brief(name), "no such tensor", "shape " + brief(shape));
        const Tensor& t = node.mapped();
        if (t.shape != shape) reject(t.where, "shape " + brief(t.shape), "shape " + brief(shape));
        if (t.dtype != "BF16" && t.dtype != "F16" && t.dtype != "F32")
            reject(t.where, "dtype " + t.dtype, "BF16, F16 or F32");
        const size_t n = t.data.size() / (t.dtype == "F32" ? 4 : 2);
        elements = std::max(elements, n);
        bytes_of_bf16 += elements * sizeof(bf16);
        const bool aligned = reinterpret_cast<uintptr_t>(t.data.data()) % 2 == 0;
        if (t.dtype == "BF16" && aligned && elements == n)
            return reinterpret_cast<const bf16*>(t.data.data());
        bytes_to_convert += t.data.size();
        auto copy = std::make_unique_for_overwrite<bf16[]>(elements);
        std::fill(&copy[n], &copy[elements], bf16{0});
        return converted.emplace_back(t, std::move(copy)).second.get();
    }

    void load() {
        for (const File& file : mapped) page_in(file);
        for (const auto& [t, to] : converted) {
            if (t.dtype == "F32")
                convert<float>(t.data, to.get(), to_bf16);
            else if (t.dtype == "F16")
                convert<uint16_t>(t.data, to.get(), half_to_bf16);
            else  // BF16, unaligned or with zeros at its end
                std::memcpy(to.get(), t.data.data(), t.data.size());
        }
    }
};

Checkpoint::~Checkpoint() = default;

Checkpoint::Checkpoint(const std::string& directory)
    : config(read_config(directory)),
      defaults(read_defaults(directory)),
      files(std::make_unique<Files>()) {
    for (const std::string& path : weight_files(directory)) {
        for (const Tensor& t : read_header(files->mapped.emplace_back(path))) files->add(t);
    }

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
    const size_t count = files->unused.size();
    const size_t embedded = size_t(config.rows()) * D;
    weights.embed = files->take(directory, "embed_tokens", {config.V, D}, embedded);
    weights.norm = files->take(directory, "norm", {D});
    weights.layers.resize(config.L);
    for (size_t i = 0; i < weights.layers.size(); i++) {
        const std::string layer = text("layers.%zu.", i);
        for (const auto& part : parts)
            weights.layers[i].*part.member = files->take(directory, layer + part.name, part.shape);
    }
    for (const auto& [name, t] : files->unused) reject(t.where, "it", "only the config's tensors");

    bytes = files->bytes_of_bf16;
    say_step(
        text("mapped %s: %zu tensors, %.2f GB of bf16", directory.c_str(), count, bytes / 1e9));
    if (files->bytes_skipped)
        say_step(
            text("  not used, for text: %.2f GB of vision_tower, multi_modal_projector or lm_head",
                 files->bytes_skipped / 1e9));
    if (files->bytes_to_convert)
        say_step(
            text("  to be copied as bf16: %zu tensors, %.2f GB of F32, F16, or BF16 that is "
                 "unaligned or has no multiple of 16 rows",
                 files->converted.size(), files->bytes_to_convert / 1e9));
    name_other_template(directory);
    files->load();
}

// [4] The Hugging Face cache ----------------------------------------------------------------------

namespace {

// As Python's expanduser: a leading ~ is the home directory.
fs::path expand_home(const std::string& path) {
    if (path != "~" && !path.starts_with("~/")) return path;
    const char* home = std::getenv("HOME");
    const passwd* const user = home ? nullptr : getpwuid(getuid());
    if (user) home = user->pw_dir;
    return home ? home + path.substr(1) : path;
}

// As in huggingface_hub, except that a variable that is empty counts as not set: the first of these
// decides.
fs::path hub_cache() {
    for (const auto& [name, subdirectory] : {std::pair("HF_HUB_CACHE", ""),
                                             {"HUGGINGFACE_HUB_CACHE", ""},
                                             {"HF_HOME", "hub"},
                                             {"XDG_CACHE_HOME", "huggingface/hub"}}) {
        const char* const value = std::getenv(name);
        if (value && *value) return expand_home(value) / subdirectory;
    }
    return expand_home("~/.cache/huggingface/hub");
}

// Could this be a model's name on the hub, ORGANISATION/NAME?
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
        reject(model, "GGUF, which is not read", "a directory with config.json and safetensors");
    if (fs::is_directory(model, ignored))
        reject(model, "no config.json in it", "a model's directory");
    if (is_there(model))
        reject(model, "a file", "its directory, " + fs::absolute(model).parent_path().string());
    if (!is_hub_name(model))
        reject(model, "no such directory", "a model's directory, or its ORGANISATION/NAME");

    std::string folder = "models--" + model;
    folder.replace(folder.find('/'), 1, "--");
    const fs::path cached = hub_cache() / folder, snapshots = cached / "snapshots";
    std::string revision;
    std::ifstream(cached / "refs/main") >> revision;
    if (!revision.empty() && is_there(snapshots / revision / "config.json"))
        return snapshots / revision;
    // A download of a pinned revision writes no refs/main: take the newest snapshot.
    std::string found;
    fs::file_time_type newest = fs::file_time_type::min();
    for (const auto& entry : fs::directory_iterator(snapshots, ignored)) {
        const auto time = entry.last_write_time(ignored);
        if (ignored || time <= newest || !is_there(entry.path() / "config.json")) continue;
        newest = time;
        found = entry.path();
    }
    if (!found.empty()) return found;
    reject(model, "no such directory, and no snapshot in " + snapshots.string(),
           "one of them; this gets it from the Hugging Face hub: ./dev fetch " + model);
}

}  // namespace gemma
