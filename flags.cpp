// SPDX-License-Identifier: Apache-2.0
//
// flags.cpp: every flag of `vllm serve`, and what this server makes of it. Beside the path. A flag
// that would change an answer, or who may ask, and is not offered ends the start; one that can
// change neither is taken, and named in the log.
//
//   [1] Tables     the flags that are members of Options; the other flags of vLLM
//   [2] Help
//   [3] Look-up    a name, as it was typed, to a row of a table
//   [4] Reading    words and lines to flags and their values, and these to Options
#include "flags.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <sstream>

#include <yaml-cpp/yaml.h>

#include "fields.h"

namespace gemma {

namespace {

// [1] Tables --------------------------------------------------------------------------------------

struct Group {
    const char* title;
    std::vector<Field<Options>> flags;
};
const std::vector<Group> groups{
    {"Server",
     {
         {"host", &Options::host, 0, 0, "address to listen on (0.0.0.0)"},
         {"port", &Options::port, 0, 65535, "port to listen on, 0: any free one ($PORT, or 8000)"},
         {"api-key", &Options::api_key, 0, 100,
          "keys, one of which requests under /v1 must bring ($VLLM_API_KEY, or none)"},
         {"max-queue", &Options::max_queue, 0, 1 << 20,
          "sequences that may wait beside max-num-seqs; then requests get 429 (1024)"},
         {"enable-prompt-tokens-details", &Options::prompt_tokens_details, 0, 0,
          "usage says how many tokens of a prompt were cached"},
         {"config", &Options::config, 0, 0,
          "YAML file of lines FLAG: VALUE; the command line's flags win over it"},
         {"check", &Options::check, 0, 0, "check the flags, and end"},
     }},
    {"Model",
     {
         {"model", &Options::model, 0, 0,
          "directory, or a name in the Hugging Face cache ($MODEL_NAME, or google/gemma-3-1b-it)"},
         {"served-model-name", &Options::served_model_name, 0, 100,
          "what requests may call it (model)"},
         {"max-model-len", &Options::max_model_len, 1, 131072,
          "most tokens of prompt and answer, as 8192, 8k or 8K ($MAX_MODEL_LEN, or what fits)"},
         {"generation-config", &Options::generation_config, 0, 0,
          "auto: sampling's defaults are the model's, vllm: they are vLLM's (auto)"},
         {"seed", &Options::seed, -0x1p63, 0x1p63, "of requests that bring none (0)"},
         {"device", &Options::device, 0, 0, "auto, cuda or cpu (auto)"},
     }},
    {"Batching and memory",
     {
         {"max-num-seqs", &Options::max_num_seqs, 1, 4096, "most sequences in a step (256)"},
         {"max-num-batched-tokens", &Options::max_num_batched_tokens, 1, 1 << 20,
          "most tokens in a step (8192 on a GPU of 70 GB, 2048 on others, 32 a core on the CPU)"},
         {"gpu-memory-utilization", &Options::gpu_memory_utilization, above_zero, 1,
          "share of the GPU's memory to use (0.9)"},
         {"num-gpu-blocks-override", &Options::pages, 1, 1 << 26,
          "pages of 32 tokens in each of the two pools (what memory allows)"},
     }},
    {"Logs",
     {
         {"disable-log-requests", &Options::disable_log_requests, 0, 0,
          "no line in the log for each generation; the same as --no-enable-log-requests"},
     }},
};

// The other flags of vLLM.
enum Takes { a_switch, one_value, many_values };
constexpr const char* any = "*";
struct OtherFlags {
    Takes takes;
    const char* names;    // words
    const char* neutral;  // the values that change nothing here, words; any; or "": there is none
    const char* advice = "";
};
const OtherFlags other_flags[]{
    {a_switch,
     "aggregate-engine-logging allow-deprecated-quantization async-scheduling"
     " calculate-kv-scales cudagraph-metrics disable-access-log-for-endpoints"
     " disable-async-output-proc disable-cascade-attn disable-chunked-mm-input"
     " disable-custom-all-reduce disable-fastapi-docs disable-frontend-multiprocessing"
     " disable-hybrid-kv-cache-manager disable-log-stats disable-mm-preprocessor-cache"
     " disable-nccl-for-dp-synchronization disable-uvicorn-access-log enable-auto-tool-choice"
     " enable-chunked-prefill"
     " enable-dbo enable-elastic-ep enable-ep-weight-filter enable-eplb enable-expert-parallel"
     " enable-flashinfer-autotune enable-layerwise-nvtx-tracing enable-log-deltas"
     " enable-logging-iteration-details enable-mfu-metrics"
     " enable-multimodal-encoder-data-parallel enable-offline-docs enable-server-load-tracking"
     " enforce-eager eplb-log-balancedness exclude-tools-when-tool-choice-none"
     " fail-on-environ-validation fully-sharded-loras"
     " guided-decoding-disable-additional-properties guided-decoding-disable-any-whitespace"
     " guided-decoding-disable-fallback interleave-mm-strings kv-cache-metrics"
     " language-model-only log-error-stack multi-step-stream-outputs numa-bind"
     " ray-workers-use-nsight scheduler-reserve-full-isl skip-mm-profiling trust-remote-code"
     " use-tqdm-on-load use-v2-block-manager",
     any},
    {a_switch,
     "cohere-is-reasoning-model data-parallel-multi-port-external-lb"
     " enable-batch-sharded-sampling enable-cumem-allocator enable-fault-tolerance"
     " enable-flash-late-interaction enable-hc-sp enable-mamba-cache-stochastic-rounding"
     " enable-mamba-shared-prefix-checkpoint enable-mixed-moe-lora-format"
     " enable-moe-shared-loras enable-nccl-comm-suspend enable-shm-tensor-arena"
     " enable-tower-connector-lora dcp-q-replicate jit-monitor-verbose"
     " long-prefill-token-threshold-adaptive mm-device-do-normalize monokernel"
     " sleep-mode-offload-cudagraph specialize-active-lora swa-bounded-replay"
     " use-fp64-gumbel use-replayssm",
     any},
    {a_switch, "enable-scale-out enable-trace-replay", "false", "/v1/completions is served"},
    {a_switch, "mm-encoder-only", "false", "the language model is what is served"},
    {a_switch, "return-sampling-mask", "false", "requests may ask for 20 logprobs"},
    {a_switch, "trust-request-mm-kwargs", "false", "only text is served"},
    {a_switch, "enable-prefix-caching", "true", "prompts always share their common beginning"},
    {a_switch, "allow-credentials", "false", "browsers are answered without credentials"},
    {a_switch, "enable-reasoning", "false", "Gemma 3 writes no reasoning apart"},
    {a_switch, "enable-lora enable-lora-bias enable-prompt-adapter", "false",
     "merge the adapter into the checkpoint, and serve that"},
    {a_switch, "enable-prompt-embeds enable-mm-embeds", "false", "prompts are text or token ids"},
    {a_switch, "enable-ssl-refresh", "false", "put a proxy with TLS in front"},
    {a_switch, "enable-sleep-mode", "false", "stop the server, and start it again in a second"},
    {a_switch, "enable-request-id-headers", "false", "an answer has the request's id in its body"},
    {a_switch, "enable-log-outputs", "false", "no answer is ever logged"},
    {a_switch, "enable-force-include-usage", "false",
     "requests ask with stream_options.include_usage"},
    {a_switch, "return-tokens-as-token-ids", "false",
     "requests ask with return_tokens_as_token_ids"},
    {a_switch, "enable-tokenizer-info-endpoint", "false", "/tokenize and /detokenize are served"},
    {a_switch, "enable-per-request-metrics", "false", "/metrics has the sums of all requests"},
    {a_switch, "enable-return-routed-experts", "false", "Gemma 3 has no experts"},
    {a_switch, "trust-request-chat-template", "false", "the chat template is Gemma 3's"},
    {a_switch, "skip-tokenizer-init", "false", "requests and answers are text"},
    {a_switch, "disable-sliding-window kv-sharing-fast-prefill", "false",
     "the model is computed as it was trained"},
    {a_switch, "headless grpc tokens-only", "false", "one process serves HTTP"},
    {a_switch, "data-parallel-hybrid-lb data-parallel-external-lb", "false",
     "start a server for each GPU, and balance between them"},
    {one_value,
     "additional-config all2all-backend allowed-local-media-path attention-backend"
     " attention-config code-revision compilation-config cp-kv-cache-interleave-size"
     " data-parallel-address data-parallel-backend data-parallel-rpc-port"
     " dbo-decode-token-threshold dbo-prefill-token-threshold dcp-comm-backend"
     " dcp-kv-cache-interleave-size distributed-executor-backend distributed-timeout-seconds"
     " eplb-config eplb-step-interval eplb-window-size expert-placement-strategy"
     " guided-decoding-backend hf-token kernel-config kv-offloading-backend"
     " limit-mm-per-prompt log-config-file long-prefill-token-threshold lora-dtype"
     " lora-extra-vocab-size mamba-backend mamba-block-size mamba-cache-dtype mamba-cache-mode"
     " mamba-ssm-cache-dtype master-addr master-port max-cpu-loras max-cudagraph-capture-size"
     " max-log-len max-logical-loras max-long-partial-prefills max-lora-rank max-loras"
     " max-parallel-loading-workers max-prompt-adapter-token max-prompt-adapters"
     " max-seq-len-to-capture media-io-kwargs mm-encoder-attn-backend mm-encoder-tp-mode"
     " mm-processor-cache-gb mm-processor-cache-type mm-processor-kwargs"
     " mm-shm-cache-max-object-size-mb model-loader-extra-config moe-backend"
     " num-lookahead-slots num-redundant-experts num-scheduler-steps offload-backend"
     " offload-group-size offload-num-in-group offload-prefetch-step optimization-level"
     " performance-mode preemption-mode prefix-caching-hash-algo profiler-config"
     " pt-load-map-location renderer-num-workers safetensors-load-strategy"
     " scheduler-delay-factor show-hidden-metrics-for-version structured-outputs-config"
     " anthropic-disabled-thinking-effort cohere-format cpu-distributed-timeout-seconds"
     " custom-histogram-buckets data-parallel-supervisor-port"
     " dp-supervisor-probe-failure-threshold dp-supervisor-probe-interval-s"
     " dp-supervisor-probe-timeout-s dp-sync-interval ec-manager-config"
     " elastic-ep-max-dp-size fault-tolerance-config gdn-prefill-backend ir-op-priority"
     " jit-monitor-mode kda-decode-backend kda-prefill-backend kv-cache-metrics-sample"
     " linear-backend log-level logging-config mamba-cache-philox-rounds mamba-ssu-algorithm"
     " max-lora-cls-labels mm-encoder-attn-dtype mm-encoder-fp8-scale-path"
     " mm-encoder-fp8-scale-save-margin mm-encoder-fp8-scale-save-path mm-hasher-algorithm"
     " mm-ipc-gpu-memory-gb mm-processor-device mm-tensor-ipc per-request-spec-decode-metrics"
     " prefill-schedule-interval prefix-cache-retention-interval prefix-match-unit"
     " replayssm-buffer-len safetensors-prefetch-block-size safetensors-prefetch-num-threads"
     " sleep-mode-backend sparse-indexer-topk-backend tool-strict-level video-pruning-method"
     " watchdog-config watermark"
     " swap-space tool-call-parser tokenizer-pool-extra-config tokenizer-pool-size "
     "tokenizer-pool-type"
     " ubatch-size uvicorn-log-level video-pruning-rate",
     any},
    {many_values,
     "allowed-media-domains cuda-graph-sizes cudagraph-capture-sizes ignore-patterns"
     " kv-cache-dtype-skip-layers lora-target-modules numa-bind-cpus numa-bind-nodes offload-params"
     " sleep-preserve-parameter-names",
     any},
    {one_value,
     "data-parallel-size decode-context-parallel-size nnodes pipeline-parallel-size"
     " prefill-context-parallel-size tensor-parallel-size",
     "1", "one GPU serves; start a server for each GPU, and balance between them"},
    {one_value, "data-parallel-rank data-parallel-start-rank node-rank", "0", "one GPU serves"},
    {one_value, "data-parallel-size-local", "0 1", "one GPU serves"},
    {one_value, "api-server-count", "1", "one process serves all connections"},
    {one_value, "dtype", "auto bfloat16", "weights are bf16, and others are converted to it"},
    {one_value, "kv-cache-dtype", "auto bfloat16", "K and V are bf16 on a GPU and fp32 on a CPU"},
    {one_value, "quantization quantization-config", "", "give a checkpoint of bf16, fp16 or fp32"},
    {one_value, "load-format", "auto safetensors", "the directory must have safetensors"},
    {one_value, "config-format", "auto hf", "the directory must have config.json"},
    {one_value, "tokenizer-mode", "auto hf slow", "the tokenizer is SentencePiece"},
    {one_value, "tokenizer hf-config-path", "", "the model's directory must have these files"},
    {one_value, "revision tokenizer-revision", "main",
     "./dev fetch NAME --revision R prints a directory: give that"},
    {one_value, "download-dir", "", "set $HF_HUB_CACHE to it"},
    {one_value, "model-impl", "auto vllm", "the model's code is this server's"},
    {one_value, "runner task", "auto generate", "this server generates text, and nothing else"},
    {one_value, "convert", "auto none", "this server generates text, and nothing else"},
    {one_value, "override-generation-config", "{}",
     "edit generation_config.json in the model's directory"},
    {one_value, "hf-overrides rope-scaling rope-theta", "{}",
     "edit config.json in the model's directory"},
    {one_value, "override-neuron-config override-pooler-config pooler-config", "{}",
     "this server generates text, and nothing else"},
    {one_value, "override-attention-dtype quantization-param-path qlora-adapter-name-or-path", "",
     "weights are bf16, as the model was trained"},
    {one_value, "io-processor-plugin logits-processor-pattern", "",
     "requests have logit_bias and penalties"},
    {many_values, "logits-processors", "", "requests have logit_bias and penalties"},
    {one_value, "max-logprobs", "20", "requests may ask for 20 and no more"},
    {one_value, "logprobs-mode", "raw_logprobs",
     "logprobs are of the logits as the model has them"},
    {one_value, "block-size", "1 8 16 32 64 128 256", "a page holds 32 tokens"},
    {one_value, "kv-cache-memory-bytes", "", "--num-gpu-blocks-override says how many pages"},
    {one_value, "cpu-offload-gb kv-offloading-size", "0",
     "weights, K and V stay where the engine computes"},
    {one_value,
     "cpu-offload-params ec-transfer-config kv-events-config kv-transfer-config"
     " weight-transfer-config",
     "", "K, V and weights stay in this process"},
    {one_value,
     "speculative-config speculative-model num-speculative-tokens spec-method spec-model"
     " spec-tokens",
     "", "each step gives a token to each sequence"},
    {one_value, "max-num-queued-reqs max-num-queued-tokens", "",
     "--max-queue says how many sequences may wait"},
    {one_value, "max-num-active-seqs", "", "--max-num-seqs says how many sequences run"},
    {one_value, "max-num-scheduled-tokens", "", "--max-num-batched-tokens is a step's size"},
    {many_values, "device-ids", "", "set $CUDA_VISIBLE_DEVICES to one GPU"},
    {one_value, "sse-keep-alive-interval", "0", "a stream has events and no comments"},
    {one_value, "aux-output-config diffusion-config engram-config watermark-config", "",
     "the model is computed as it was trained"},
    {one_value, "model-class-overrides reasoning-effort-map", "{}", "the model is Gemma 3"},
    {one_value, "grpc-port", "", "one process serves HTTP"},
    {one_value, "scheduling-policy", "fcfs", "first come, first served"},
    {one_value, "scheduler-cls worker-cls worker-extension-cls", "auto",
     "no Python class can be loaded"},
    {one_value, "max-num-partial-prefills", "1", "prompts are computed one after the other"},
    {one_value, "stream-interval", "1", "each token is sent when it is there"},
    {one_value, "tool-parser-plugin tool-server", "",
     "calls are found by this server's own parser"},
    {one_value, "reasoning-config reasoning-parser reasoning-parser-plugin", "",
     "Gemma 3 writes no reasoning apart"},
    {one_value, "chat-template", "", "the chat template is Gemma 3's"},
    {one_value, "default-chat-template-kwargs", "{}", "the chat template is Gemma 3's"},
    {one_value, "chat-template-content-format", "auto openai", "the chat template is Gemma 3's"},
    {one_value, "response-role", "assistant", "the chat template is Gemma 3's"},
    {many_values, "lora-modules default-mm-loras long-lora-scaling-factors prompt-adapters", "",
     "merge the adapter into the checkpoint, and serve that"},
    {many_values, "middleware", "", "no Python can be loaded: put a proxy in front"},
    {many_values, "allowed-headers allowed-methods allowed-origins", "[\"*\"] *",
     "browsers may ask from everywhere: put a proxy in front"},
    {one_value, "ssl-ca-certs ssl-certfile ssl-ciphers ssl-keyfile", "",
     "put a proxy with TLS in front"},
    {one_value, "ssl-cert-reqs", "0", "put a proxy with TLS in front"},
    {one_value, "root-path", "\"\"", "let the proxy strip the path"},
    {one_value, "uds", "", "give --host and --port"},
    {one_value, "fingerprint-value", "", "answers have no system_fingerprint"},
    {one_value, "fingerprint-mode", "none", "answers have no system_fingerprint"},
    {one_value, "h11-max-header-count", "256", "a request's head may have 64 KiB"},
    {one_value, "h11-max-incomplete-event-size", "4194304", "a request's head may have 64 KiB"},
    {one_value, "shutdown-timeout", "8", "after SIGTERM running requests have 8 s"},
    {one_value, "otlp-traces-endpoint", "", "the log has the times of each generation"},
    {many_values, "collect-detailed-traces", "", "the log has the times of each generation"},
};

// Other names, with their dashes: of argparse, and a switch that is the opposite of another.
const std::pair<const char*, const char*> aliases[]{
    {"-tp", "--tensor-parallel-size"},
    {"-pp", "--pipeline-parallel-size"},
    {"-dp", "--data-parallel-size"},
    {"-dcp", "--decode-context-parallel-size"},
    {"-pcp", "--prefill-context-parallel-size"},
    {"-dpn", "--data-parallel-rank"},
    {"-dpr", "--data-parallel-start-rank"},
    {"-dpl", "--data-parallel-size-local"},
    {"-dpa", "--data-parallel-address"},
    {"-dpp", "--data-parallel-rpc-port"},
    {"-dpb", "--data-parallel-backend"},
    {"-dph", "--data-parallel-hybrid-lb"},
    {"-dpe", "--data-parallel-external-lb"},
    {"-dpm", "--data-parallel-multi-port-external-lb"},
    {"-dc", "--diffusion-config"},
    {"-ep", "--enable-expert-parallel"},
    {"-asc", "--api-server-count"},
    {"-cc", "--compilation-config"},
    {"-ac", "--attention-config"},
    {"-sc", "--speculative-config"},
    {"-n", "--nnodes"},
    {"-r", "--node-rank"},
    {"-q", "--quantization"},
    {"-O", "--optimization-level"},
    {"--device-memory-utilization", "--gpu-memory-utilization"},
    {"--enable-log-requests", "--no-disable-log-requests"},
    {"--no-enable-log-requests", "--disable-log-requests"},
};

std::vector<std::string> words(const std::string& list) {
    std::istringstream in(list);
    return {std::istream_iterator<std::string>(in), {}};
}

std::string joined(const std::vector<std::string>& parts, const char* between) {
    std::string s;
    for (const auto& part : parts) s += (s.empty() ? "" : between) + part;
    return s;
}

// [2] Help ----------------------------------------------------------------------------------------

// Those of the other flags that may be given, with their values; or those that may not.
std::string list_others(bool taken) {
    std::string s, line = " ";
    for (const auto& row : other_flags) {
        const bool off = row.takes == a_switch && row.neutral == std::string("false");
        if (taken != (*row.neutral && !off)) continue;
        const bool valued = taken && row.takes != a_switch && row.neutral != any;
        const std::string value = valued ? " " + joined(words(row.neutral), "|") : "";
        for (const auto& name : words(row.names)) {
            const std::string item = " --" + name + value;
            if (line.size() + item.size() > 90) {
                s += line + "\n";
                line = " ";
            }
            line += item;
        }
    }
    return s + line + "\n";
}

}  // namespace

std::string help() {
    std::string s = R"(gemma-server [MODEL] [--flag VALUE | --flag=VALUE]...

Serves Gemma 3 over the OpenAI API. The flags are vLLM's, with - or _, besides --max-queue,
--check and --version. A switch is turned off with --no-SWITCH.
)";
    for (const auto& group : groups) {
        s += text("\n%s\n", group.title);
        for (const auto& f : group.flags) s += text("  --%-30s%s\n", f.name, f.help);
    }
    return s + "\nWithout effect; other values than those shown are refused\n" + list_others(true) +
           "\nRefused, with a word on what to do instead\n" + list_others(false) + R"(
The cache is $HF_HUB_CACHE, $HUGGINGFACE_HUB_CACHE, $HF_HOME/hub,
$XDG_CACHE_HOME/huggingface/hub or ~/.cache/huggingface/hub, the first that is set. SIGTERM
and SIGINT let what runs end, for 8 s. 8k is 8000 and 8K is 8192. --check reads the flags
and looks at no model; --version prints the version.
)";
}

namespace {

// [3] Look-up -------------------------------------------------------------------------------------

// What a name stands for: a row of the one table or of the other.
struct Flag {
    std::string name;
    const Field<Options>* field;
    const OtherFlags* other;
    bool on = true;  // false: --no-SWITCH

    Takes takes() const {
        if (other) return other->takes;
        if (std::holds_alternative<bool Options::*>(field->member)) return a_switch;
        const bool list =
            std::holds_alternative<std::vector<std::string> Options::*>(field->member);
        return list ? many_values : one_value;
    }
};

std::optional<Flag> look_up(const std::string& name) {
    for (const auto& group : groups) {
        for (const auto& f : group.flags) {
            if (name == f.name) return Flag{name, &f, nullptr};
        }
    }
    for (const auto& row : other_flags) {
        const auto names = words(row.names);
        if (std::count(names.begin(), names.end(), name)) return Flag{name, nullptr, &row};
    }
    return {};
}

// `typed` has its dashes, and no value behind an equals sign; `where` is the begin of an error.
Flag find_flag(const std::string& typed, const std::string& where = "") {
    std::string name = typed.substr(0, typed.find('.'));  // vLLM: --compilation-config.mode 3
    std::replace(name.begin() + 1, name.end(), '_', '-');
    for (const auto& [alias, of] : aliases) {
        if (name == alias) name = of;
    }
    if (!name.starts_with("--"))
        refuse("", "%s%s is not a flag: flags begin with --, as --port", where.c_str(),
               typed.c_str());
    if (const auto flag = look_up(name.substr(2))) return *flag;
    auto flag = name.starts_with("--no-") ? look_up(name.substr(5)) : std::nullopt;
    if (!flag || flag->takes() != a_switch)
        refuse("", "%s%s is not a flag", where.c_str(), typed.c_str());
    flag->on = false;
    return *flag;
}

// [4] Reading -------------------------------------------------------------------------------------

// A flag as it was given, before its values are checked.
struct Given {
    Flag flag;
    std::vector<std::string> values;
    std::string where;  // the begin of an error: "$PORT: ", "serve.yaml:3: ", or "": command line
};
// By name: what is given last wins. What it wins over is not checked, so that a file may be shared
// with vLLM.
using AllGiven = std::map<std::string, Given>;

// As in vLLM, 25.6k is 25600 and 1K is 1024. What is no such number within the limits stays as it
// was typed, for the error that it will get.
json read_length(const Field<Options>& f, const std::string& value) {
    const std::string units = "kmgtKMGT";
    const size_t unit = units.find(value.back());
    if (unit == std::string::npos) return value;
    const double size = std::pow(unit < 4 ? 1000 : 1024, double(unit % 4 + 1));
    const double number = as_number(value.substr(0, value.size() - 1)) * size;
    const bool fits = number == std::floor(number) && number >= f.low && number <= f.high;
    return fits ? json(number) : json(value);
}

void set_own(Options& options, const Field<Options>& f, const Given& given, Takes takes) {
    const auto& values = given.values;
    if (std::count(values.begin(), values.end(), "")) refuse("", "--%s: a value is empty", f.name);
    if (values.empty()) refuse("", "--%s needs a value", f.name);
    if (takes == many_values) return assign(options, f, values);
    if (values.size() > 1) refuse("", "--%s needs one value, got %s", f.name, show(values).c_str());
    const std::string name = f.name;
    if (name == "max-model-len" && (values[0] == "auto" || values[0] == "-1")) {
        options.max_model_len = -1;  // as in vLLM: what fits
        return;
    }
    const bool length = name == "max-model-len" || name == "max-num-batched-tokens";
    assign(options, f, length ? read_length(f, values[0]) : json(values[0]));
}

// Refuses what would have an effect.
void check_other(const OtherFlags& row, const std::string& name, const Given& given) {
    if (row.neutral == any) return;
    if (given.values.empty()) refuse("", "--%s needs a value", name.c_str());
    const auto neutral = words(row.neutral);
    for (const auto& value : given.values) {
        const auto same = [&](const std::string& wanted) {
            return value == wanted || as_number(value) == as_number(wanted) ||
                   (value.empty() && wanted == "\"\"");
        };
        if (std::any_of(neutral.begin(), neutral.end(), same)) continue;
        if (neutral.empty() || neutral[0] == "false")
            refuse("", "--%s is not offered: %s", name.c_str(), row.advice);
        if (neutral[0] == "true")
            refuse("", "--%s cannot be turned off: %s", name.c_str(), row.advice);
        refuse("", "--%s must be %s, got %s: %s", name.c_str(), joined(neutral, " or ").c_str(),
               show(value).c_str(), row.advice);
    }
}

// The value of a switch, "true" or "false". In a file it may also be YAML's yes, on or their
// opposites.
std::string value_of_switch(const Given& given) {
    bool yes = true;
    const auto& values = given.values;
    if (values.size() > 1 ||
        (values.size() == 1 && !YAML::convert<bool>::decode(YAML::Node(values[0]), yes)))
        refuse("", "--%s must be true or false, got %s", given.flag.name.c_str(),
               show(values.size() == 1 ? json(values[0]) : json(values)).c_str());
    return yes == given.flag.on ? "true" : "false";
}

void apply(Options& options, Given given) try {
    const Flag& flag = given.flag;
    if (flag.takes() == a_switch) given.values = {value_of_switch(given)};
    if (flag.field)
        set_own(options, *flag.field, given, flag.takes());
    else
        check_other(*flag.other, flag.name, given);
} catch (Refusal& r) {
    r.message = given.where + r.message;
    throw;
}

// The variables of the environment that are flags.
void read_environment(AllGiven& all) {
    for (const auto& [variable, flag] :
         {std::pair("PORT", "port"), std::pair("MODEL_NAME", "model"),
          std::pair("MAX_MODEL_LEN", "max-model-len"), std::pair("VLLM_API_KEY", "api-key")}) {
        const char* const value = std::getenv(variable);
        if (value && *value)
            all.insert_or_assign(flag, Given{*look_up(flag), {value}, text("$%s: ", variable)});
    }
}

// A list, or one word. What is a map in vLLM's files stays YAML text.
std::vector<std::string> read_values(const YAML::Node& value) {
    if (value.IsScalar()) return {value.Scalar()};
    if (value.IsMap()) return {value.size() == 0 ? "{}" : YAML::Dump(value)};
    std::vector<std::string> values;
    for (const auto& one : value) values.push_back(one.IsScalar() ? one.Scalar() : YAML::Dump(one));
    return values;
}

// Lines of FLAG: VALUE, as in vLLM.
void read_file(const std::string& path, AllGiven& all) try {
    const auto documents = YAML::LoadAllFromFile(path);
    if (documents.size() != 1 || !documents[0].IsMap())
        refuse("", "--config: %s has no lines of FLAG: VALUE", path.c_str());
    for (const auto& entry : documents[0]) {
        const std::string where = text("%s:%d: ", path.c_str(), entry.first.Mark().line + 1);
        if (!entry.first.IsScalar()) refuse("", "%sa flag must be a word", where.c_str());
        const Flag flag = find_flag("--" + entry.first.Scalar(), where);
        const auto values = read_values(entry.second);
        if (values.empty()) refuse("", "%s--%s has no value", where.c_str(), flag.name.c_str());
        if (flag.name == "config")
            refuse("", "%s--config must be on the command line", where.c_str());
        all.insert_or_assign(flag.name, Given{flag, values, where});
    }
} catch (const YAML::BadFile&) {
    refuse("", "--config: cannot read %s", path.c_str());
} catch (const std::ios_base::failure&) {  // a directory
    refuse("", "--config: cannot read %s", path.c_str());
} catch (const YAML::Exception& e) {
    refuse("", "%s:%d: %s", path.c_str(), e.mark.line + 1, e.msg.c_str());
}

// Reads [MODEL] and flags in any order. A flag takes the next word. A list takes all words up to
// the next flag, as in vLLM, so MODEL cannot stand behind a list.
void read_words(const std::vector<std::string>& args, AllGiven& all) {
    for (size_t i = 0; i < args.size(); i++) {
        const std::string& arg = args[i];
        const size_t equals = std::min(arg.find('='), arg.size());
        const bool model = !arg.starts_with('-');
        const bool level = arg.starts_with("-O") && arg.size() > 2 && equals == arg.size();  // -O3
        const Flag flag = find_flag(model ? "--model" : level ? "-O" : arg.substr(0, equals));
        const Takes takes = flag.takes();
        std::vector<std::string> values;
        if (model) {
            if (const auto known = all.find("model"); known != all.end())
                refuse("", "unexpected argument %s: the model is %s", arg.c_str(),
                       joined(known->second.values, " ").c_str());
            values = {arg};
        } else if (level) {
            values = {arg.substr(2)};
        } else if (equals < arg.size()) {
            values = {arg.substr(equals + 1)};
        } else if (takes == many_values) {
            while (i + 1 < args.size() && !args[i + 1].starts_with('-'))
                values.push_back(args[++i]);
        } else if (takes == one_value && i + 1 < args.size() && !args[i + 1].starts_with("--")) {
            values = {args[++i]};
        }
        if (flag.name == "config" && all.count("config"))
            refuse("", "--config: only one file can be read");
        all.insert_or_assign(flag.name, Given{flag, values, ""});
    }
}

}  // namespace

Options parse_flags(const std::vector<std::string>& args) try {
    AllGiven typed, all;
    read_words(args, typed);
    read_environment(all);
    const auto file = typed.find("config");
    if (file != typed.end() && !file->second.values.empty()) read_file(file->second.values[0], all);
    for (const auto& [name, given] : typed) all.insert_or_assign(name, given);
    Options options;
    std::vector<std::string> without_effect;
    for (const auto& [name, given] : all) {
        apply(options, given);
        if (given.flag.other) without_effect.push_back("--" + name);
    }
    if (options.served_model_name.empty()) options.served_model_name = {options.model};
    if (options.device != "auto" && options.device != "cuda" && options.device != "cpu")
        refuse("", "--device must be auto, cuda or cpu, got %s", options.device.c_str());
    if (options.generation_config != "auto" && options.generation_config != "vllm")
        refuse("", "--generation-config must be auto or vllm, got %s: put %s",
               show(options.generation_config).c_str(),
               "generation_config.json into the model's directory");
    if (!without_effect.empty()) say("without effect here: " + joined(without_effect, ", "));
    return options;
} catch (const Refusal& r) {
    throw Error(r.message + " (--help lists the flags)");
}

}  // namespace gemma
