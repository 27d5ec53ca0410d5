// SPDX-License-Identifier: Apache-2.0
//
// main.cpp: from a command line to a server that answers, and from SIGTERM to the last answer.
//
//   [1] Flags
//   [2] Memory    who gets how many pages
//   [3] Start
//   [4] Stop
#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <optional>

#include <sys/resource.h>
#include <unistd.h>

#include "fields.h"
#include "gemma.h"

namespace gemma {

// [1] Flags ---------------------------------------------------------------------------------------

const std::vector<Field<Options>> flags{
    {"model", &Options::model, 0, 0,
     "directory, or a name in the Hugging Face cache (google/gemma-3-1b-it)"},
    {"served-model-name", &Options::served_model_name, 0, 100, "what requests may call it (model)"},
    {"host", &Options::host, 0, 0, "address to listen on (0.0.0.0)"},
    {"port", &Options::port, 0, 65535, "port to listen on, 0: any free one ($PORT, or 8000)"},
    {"max-model-len", &Options::max_model_len, 1, 131072,
     "most tokens of prompt and answer, as 8192, 8k or 8K ($MAX_MODEL_LEN, or what fits)"},
    {"max-num-seqs", &Options::max_num_seqs, 1, 4096, "most sequences in a step (256)"},
    {"max-num-batched-tokens", &Options::max_num_batched_tokens, 1, 1 << 20,
     "most tokens in a step (8192 on a GPU of 70 GB, 2048 on others, 32 a core on the CPU)"},
    {"num-gpu-blocks-override", &Options::pages, 1, 1 << 26,
     "pages of 32 tokens in each of the two pools (what memory allows)"},
    {"seed", &Options::seed, -0x1p63, 0x1p63, "of requests that bring none (0)"},
    {"device", &Options::device, 0, 0, "auto, cuda or cpu (auto)"},
    {"gpu-memory-utilization", &Options::gpu_memory_utilization, above_zero, 1,
     "share of the GPU's memory to use (0.9)"},
    {"max-queue", &Options::max_queue, 0, 1 << 20,
     "sequences that may wait beside max-num-seqs; then requests get 429 (1024)"},
    {"api-key", &Options::api_key, 0, 100,
     "keys, one of which requests under /v1 must bring ($VLLM_API_KEY, or none)"},
    {"enable-prompt-tokens-details", &Options::prompt_tokens_details, 0, 0,
     "usage says how many tokens of a prompt were cached"},
    {"enable-server-load-tracking", &Options::load_tracking, 0, 0,
     "accepted without effect: /load always counts"},
    {"block-size", &Options::block_size, 1, 1024,
     "accepted without effect: a page holds 32 tokens"},
};

std::string help() {
    std::string s =
        "gemma-server [MODEL] [--flag VALUE | --flag=VALUE]...\n\n"
        "Serves Gemma 3 over the OpenAI API. The flags are vLLM's, with - or _:\n\n";
    for (const auto& f : flags) s += text("  --%-30s%s\n", f.name, f.help);
    return s +
           "\nThe cache is $HF_HUB_CACHE, $HF_HOME/hub or ~/.cache/huggingface/hub. SIGTERM and "
           "SIGINT\n"
           "let what runs end, for 8 s.\n";
}

void set_flag(Options& options, const std::string& name, std::vector<std::string> values) {
    for (const auto& f : flags) {
        if (name != f.name) continue;
        const bool list = std::holds_alternative<std::vector<std::string> Options::*>(f.member);
        const bool plain = std::holds_alternative<bool Options::*>(f.member);
        if (plain && values.empty()) values = {"true"};
        if (std::count(values.begin(), values.end(), ""))
            refuse("", "--%s: a value is empty", f.name);
        if (values.empty() || (values.size() > 1 && !list))
            refuse(f.name, "--%s needs one value", f.name);
        if (std::string_view(f.help).starts_with("accepted")) say("--" + name + ": " + f.help);
        json value = list ? json(values) : json(values[0]);
        // As vLLM reads it, 25.6k is 25600 and 1K is 1024.
        const double unit = values[0].ends_with('k') ? 1000 : values[0].ends_with('K') ? 1024 : 0;
        const double number = as_number(values[0].substr(0, values[0].size() - 1)) * unit;
        if (name == "max-model-len" && number > 0) value = number;
        return assign(options, f, value);
    }
    std::string known;
    for (const auto& f : flags) known += std::string(" --") + f.name;
    refuse("", "--%s is not a flag; there are%s", name.c_str(), known.c_str());
}

Options parse_flags(const std::vector<std::string>& args) try {
    Options options;
    for (const auto& [variable, flag] :
         {std::pair("PORT", "port"), std::pair("MAX_MODEL_LEN", "max-model-len"),
          std::pair("VLLM_API_KEY", "api-key")}) {
        const char* value = std::getenv(variable);
        if (!value || !*value) continue;
        try {
            set_flag(options, flag, {value});
        } catch (Refusal& r) {
            r.message = text("$%s: ", variable) + r.message;
            throw;
        }
    }
    for (size_t i = 0; i < args.size(); i++) {
        const bool flag = args[i].starts_with("--");
        if (!flag && i > 0) refuse("", "unexpected argument %s", args[i].c_str());
        const size_t equals = flag ? std::min(args[i].find('='), args[i].size()) : 0;
        std::string name = flag ? args[i].substr(2, equals - 2) : "model";
        std::replace(name.begin(), name.end(), '_', '-');
        std::vector<std::string> values;
        if (!flag) values = {args[i]};
        if (flag && equals < args[i].size()) values = {args[i].substr(equals + 1)};
        const bool more = flag && values.empty();  // they follow, up to the next flag
        while (more && i + 1 < args.size() && !args[i + 1].starts_with("--")) {
            values.push_back(args[++i]);
        }
        set_flag(options, name, values);
    }
    if (options.served_model_name.empty()) options.served_model_name = {options.model};
    if (options.device != "auto" && options.device != "cuda" && options.device != "cpu")
        refuse("", "--device must be auto, cuda or cpu, got %s", options.device.c_str());
    return options;
} catch (const Refusal& r) {
    throw Error(r.message + " (--help lists the flags)");
}

// [2] Memory --------------------------------------------------------------------------------------

// Splits an engine's memory between the pools (docs/design.md, "Pages"), and finds max_model_len.
struct Plan {
    Limits limits;
    int max_model_len;
};
Plan plan_memory(const Config& c, const Options& o, const KvMemory& memory) {
    Limits limits{int(o.max_num_seqs), int(o.max_num_batched_tokens), c.W, {0, 0}};
    const auto pages_for = [](int64_t tokens) { return (tokens + page_tokens - 1) / page_tokens; };
    const int64_t window = (c.W + page_tokens - 2) / page_tokens + 1,
                  step = pages_for(limits.max_batched_tokens) + 1;
    const int64_t local_bytes = int64_t(memory.page[local_pool]), budget = int64_t(memory.budget);
    const int64_t global_bytes = std::max<int64_t>(1, int64_t(memory.page[global_pool]));

    // One sequence of max_model_len must fit.
    int64_t room = std::max<int64_t>(0, budget - (window + step) * local_bytes) / global_bytes;
    if (o.pages > 0) room = o.pages >= window ? o.pages : 0;
    const int64_t asked = o.max_model_len > 0 ? o.max_model_len : c.max_positions;
    const int64_t length = std::min({asked, int64_t(c.max_positions), room * page_tokens});
    if (length == 0 || (o.max_model_len > 0 && length < asked)) {
        throw Error(
            text("max_model_len %ld does not fit: the model has %d positions, and of %ld pages "
                 "(%.2f GB) that one sequence needs there is room for %ld (%.2f GB)",
                 long(asked), c.max_positions, long(pages_for(asked)),
                 double(pages_for(asked) * global_bytes + (window + step) * local_bytes) / 1e9,
                 long(room), double(budget) / 1e9));
    }
    if (length < asked)
        say(text("max_model_len is %ld, lowered from %ld to what fits", long(length), long(asked)));
    // Then as many sequences of a usual length as fit both pools; the rest is global.
    int64_t S = limits.max_num_seqs;
    const int64_t usual = pages_for(std::min<int64_t>(4096, length));
    const auto bytes = [&] {
        return (S * window + step) * local_bytes +
               std::max(S * usual, pages_for(length)) * global_bytes;
    };
    while (S > 1 && bytes() > budget) S--;
    const int64_t local = S * window + step, rest = (budget - local * local_bytes) / global_bytes;
    limits.pages[local_pool] = int(o.pages > 0 ? o.pages : local);
    limits.pages[global_pool] =
        int(o.pages > 0 ? o.pages : std::min(rest, limits.max_num_seqs * pages_for(length)));
    return {limits, int(length)};
}

// [3] Start ---------------------------------------------------------------------------------------

// The engine that --device asks for, and the defaults that depend on it. Not before
// SIGTERM is blocked: the GPU's driver starts threads, which inherit that.
std::unique_ptr<Model> open_model(const Checkpoint& checkpoint, Options& o) {
#if GEMMA_CUDA
    const std::string missing = o.device == "cpu" ? "--device says so" : cuda_missing();
#else
    const std::string missing = "this build has no CUDA engine: build it where nvcc is, see README";
#endif
    const bool gpu = missing.empty();
    if (!gpu && o.device == "cuda") throw Error("--device cuda: " + missing);
    say("device: " + (gpu ? "cuda, because there is a GPU" : "cpu, because " + missing));
    if (!gpu && o.gpu_memory_utilization > 0)
        say("--gpu-memory-utilization: without effect on the CPU");
    if (o.gpu_memory_utilization < 0) o.gpu_memory_utilization = 0.9;
    int64_t& tokens = o.max_num_batched_tokens;
    const auto choose = [&](int64_t otherwise) {
        if (tokens < 0) tokens = otherwise;
        o.max_num_seqs = std::min(o.max_num_seqs, tokens);
    };
#if GEMMA_CUDA
    if (gpu) {
        choose(cuda_step_tokens());
        return open_cuda(checkpoint, {int(o.max_num_seqs), int(tokens), o.gpu_memory_utilization});
    }
#endif
    choose(32 * std::max(1u, std::thread::hardware_concurrency()));
    return open_cpu(checkpoint);
}

// What a service needs, and what must outlive it.
struct Loaded {
    std::optional<Checkpoint> checkpoint;
    std::optional<Tokenizer> tokenizer;
};

void load(Loaded& loaded, Options o, Service& service) {
    const std::string directory = find_model(o.model);
    const Checkpoint& checkpoint = loaded.checkpoint.emplace(directory);
    const Tokenizer& tokenizer = loaded.tokenizer.emplace(directory + "/tokenizer.model");
    if (tokenizer.size() > checkpoint.config.V) {
        throw Error(
            text("%s/tokenizer.model: found %d pieces, expected at most the %d of the weights",
                 directory.c_str(), tokenizer.size(), checkpoint.config.V));
    }
    auto model = open_model(checkpoint, o);
    const auto [limits, max_model_len] = plan_memory(checkpoint.config, o, model->kv_memory());
    model->allocate_pages(limits.pages);
    const SamplingDefaults& d = checkpoint.defaults;
    say(
        text("sampling defaults: temperature %g, top_k %d, top_p %g, min_p %g, repetition_penalty "
             "%g",
             d.temperature, d.top_k, d.top_p, d.min_p, d.repetition_penalty));
    say(text("KV pages of 32 tokens: %d local (%d tokens), %d global (%ld tokens)",
             limits.pages[local_pool], limits.pages[local_pool] * page_tokens,
             limits.pages[global_pool], long(limits.pages[global_pool]) * page_tokens));
    say(text("max_model_len %d, up to %d sequences and %d tokens a step", max_model_len,
             limits.max_num_seqs, limits.max_batched_tokens));
    service.open(checkpoint, tokenizer, std::move(model), limits, max_model_len);
    say(text("ready in %.2f s", seconds() - std::atof(std::getenv("GEMMA_STARTED"))));
}

// [4] Stop ----------------------------------------------------------------------------------------

// Cloud Run gives 10 s between SIGTERM and SIGKILL.
constexpr auto to_end = std::chrono::seconds(8);
constexpr auto to_cut = std::chrono::milliseconds(500);

int serve(const Options& options) {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);  // in every thread that is made from here on
    rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;  // 1,024 by default, and a connection is one
    setrlimit(RLIMIT_NOFILE, &files);

    Loaded loaded;
    Service service(options);
    HttpServer http(options.host, int(options.port), service.routes(), options.api_key);
    say(text("listening on http://%s:%d", options.host.c_str(), http.port));
    std::atomic<bool> failed = false;
    std::thread loading([&] {
        try {
            load(loaded, options, service);
        } catch (const std::exception& e) {
            say(std::string("error: ") + e.what());
            failed = true;
            kill(getpid(), SIGTERM);
        }
    });
    int signal;
    sigwait(&signals, &signal);
    for (const int again : {SIGTERM, SIGINT}) std::signal(again, [](int) { std::_Exit(1); });
    pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
    const bool open = service.leave();
    if (open) say("shutting down: what runs has 8 s to end");
    if (open && !service.drained(to_end)) {
        service.cut();
        service.drained(to_cut);
    }
    // Threads that are still at work must not see their ground taken away.
    if (!http.stop() || !open || !service.rests(to_cut)) std::_Exit(failed);
    loading.join();
    return failed;
}

}  // namespace gemma

int main(int argc, char** argv) try {
    // OpenMP's library reads GOMP_SPINCOUNT when it is loaded, so the program starts twice. By its
    // own measure threads spin for milliseconds at each barrier: beside one busy process on two
    // cores a token of the demo took 4.6 ms, so 1.6 (alone 0.42 and 0.51).
    if (!std::getenv("GEMMA_STARTED")) {
        setenv("GEMMA_STARTED", gemma::text("%.3f", gemma::seconds()).c_str(), 1);
        setenv("GOMP_SPINCOUNT", "2000", 0);
        execv(std::filesystem::read_symlink("/proc/self/exe").c_str(), argv);  // by name, for ps
    }
    const std::vector<std::string> args(argv + 1, argv + argc);
    if (std::count(args.begin(), args.end(), "--help")) return std::puts(gemma::help().c_str()) < 0;
    return gemma::serve(gemma::parse_flags(args));
} catch (const std::exception& e) {
    gemma::say(std::string("error: ") + e.what());
    return 1;
}
