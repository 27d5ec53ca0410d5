// SPDX-License-Identifier: Apache-2.0
//
// flags_test.cpp: what a command line, the environment and a file become: Options, a line of the
// log, or an error that says what to do.
#include "flags.h"

#include "client.h"

// libyaml-cpp 0.7 does not free its buffer of 2 KB where a file's text is refused.
extern "C" const char* __lsan_default_suppressions() { return "leak:libyaml-cpp"; }

namespace {

namespace fs = std::filesystem;
using gemma::Error, gemma::help, gemma::Options, gemma::parse_flags;

// The environment's flags, for as long as it lives.
struct Environment {
    explicit Environment(const std::map<std::string, std::string>& variables) {
        clear();
        for (const auto& [name, value] : variables) setenv(name.c_str(), value.c_str(), 1);
    }
    ~Environment() { clear(); }

  private:
    static void clear() {
        for (const char* name : {"PORT", "MODEL_NAME", "MAX_MODEL_LEN", "VLLM_API_KEY"})
            unsetenv(name);
    }
};

struct File {
    static inline int files = 0;
    const std::string path =
        fs::temp_directory_path() / text("gemma-flags-%d-%d.yaml", getpid(), ++files);
    explicit File(const std::string& content) { std::ofstream(path) << content; }
    ~File() { fs::remove(path); }
};

// "" if the flags are good.
std::string error_of(const Strings& args) {
    try {
        parse_flags(args);
    } catch (const Error& e) {
        return e.what();
    }
    return "";
}

Strings words_of(const std::string& line) {
    std::istringstream in(line);
    return {std::istream_iterator<std::string>(in), {}};
}

// What the server logs of flags that are good.
std::string said_of(const Strings& args) {
    Strings words = args;
    words.push_back("--check");
    Child child(words);
    REQUIRE(child.exit_status() == 0);
    return child.log();
}

}  // namespace

TEST_CASE("D11: neutral flags are taken, and named once in one line", "[flags]") {
    // Command lines of vLLM's own tests and recipes.
    const std::string line =
        "--dtype bfloat16 --tensor-parallel-size 1 -pp 1 --data-parallel-size=1 --enforce-eager "
        "--enable-prefix-caching --enable-chunked-prefill --trust-remote-code --enforce_eager "
        "--no-enable-log-requests --generation-config auto --max-logprobs 20 -O3 "
        "--uvicorn-log-level warning --load-format auto --kv-cache-dtype auto --swap-space 4 "
        "--cpu-offload-gb 0.0 --compilation-config.mode 3 --limit-mm-per-prompt {\"image\":0} "
        "--no-enable-lora --allowed-origins [\"*\"] --disable-log-stats --block-size 16 "
        "--hf-token secret --root-path= --enable-auto-tool-choice --tool-call-parser pythonic";
    CHECK(said_of(words_of(line)) ==
          "without effect here: --allowed-origins, --block-size, --compilation-config, "
          "--cpu-offload-gb, --data-parallel-size, --disable-log-stats, --dtype, "
          "--enable-auto-tool-choice, --enable-chunked-prefill, --enable-lora, "
          "--enable-prefix-caching, --enforce-eager, "
          "--hf-token, --kv-cache-dtype, --limit-mm-per-prompt, --load-format, --max-logprobs, "
          "--optimization-level, --pipeline-parallel-size, --root-path, --swap-space, "
          "--tensor-parallel-size, --tool-call-parser, --trust-remote-code, "
          "--uvicorn-log-level\n");
    CHECK(said_of({"--dtype", "auto", "DIR"}) == "without effect here: --dtype\n");
    CHECK(said_of({"DIR"}) == "");
    CHECK(said_of({"--use-fp64-gumbel", "--watermark", "0.1", "--device-memory-utilization=0.5"}) ==
          "without effect here: --use-fp64-gumbel, --watermark\n");
    CHECK(said_of({"--no-enable-chunked-prefill"}) ==
          "without effect here: --enable-chunked-prefill\n");
}

TEST_CASE("D11: flags that are not offered say what to do", "[flags]") {
    const Environment empty{{}};
    const std::vector<std::pair<std::string, std::string>> table{
        {"--tensor-parallel-size 2",
         "--tensor-parallel-size must be 1, got \"2\": one GPU serves; start a server for each"},
        {"-tp 2", "--tensor-parallel-size must be 1, got \"2\""},
        {"-tp", "--tensor-parallel-size needs a value"},
        {"--dtype float16", "--dtype must be auto or bfloat16, got \"float16\": weights are bf16"},
        {"--quantization fp8", "--quantization is not offered: give a checkpoint of bf16"},
        {"-q awq", "--quantization is not offered"},
        {"--kv-cache-dtype fp8", "--kv-cache-dtype must be auto or bfloat16, got \"fp8\""},
        {"--enable-lora", "--enable-lora is not offered: merge the adapter"},
        {"--enable-lora=true", "--enable-lora is not offered: merge the adapter"},
        {"--lora-modules a=b c=d", "--lora-modules is not offered"},
        {"--max-num-queued-reqs 5", "--max-num-queued-reqs is not offered: --max-queue says how"},
        {"--device-ids 1", "--device-ids is not offered: set $CUDA_VISIBLE_DEVICES"},
        {"--sse-keep-alive-interval 15", "--sse-keep-alive-interval must be 0, got \"15\""},
        {"--device-memory-utilization 2", "gpu-memory-utilization must be a number"},
        {"--ssl-keyfile key.pem", "--ssl-keyfile is not offered: put a proxy with TLS in front"},
        {"--chat-template x.jinja", "--chat-template is not offered: the chat template is Gemma"},
        {"--no-enable-prefix-caching", "--enable-prefix-caching cannot be turned off"},
        {"--enable-prefix-caching=false", "--enable-prefix-caching cannot be turned off"},
        {"--enforce-eager=maybe", "--enforce-eager must be true or false, got \"maybe\""},
        {"--generation-config DIR", "--generation-config must be auto or vllm, got \"DIR\": put"},
        {"--max-logprobs 5", "--max-logprobs must be 20, got \"5\""},
        {"--root-path /llm", "--root-path must be \"\", got \"/llm\""},
        {"--allowed-origins a b", "--allowed-origins must be [\"*\"] or *, got \"a\""},
        {"--speculative-config.model x", "--speculative-config is not offered"},
        {"--enable-auto-tool-choice --tool-parser-plugin x.py",
         "--tool-parser-plugin is not offered: calls are found by this server's own parser"},
        {"--revision abc", "--revision must be main, got \"abc\": ./dev fetch NAME --revision"},
    };
    for (const auto& [line, expected] : table) {
        const std::string error = error_of(words_of("DIR " + line));
        INFO(line << "\n" << error);
        CHECK(error.starts_with(expected));
        CHECK(error.ends_with(" (--help lists the flags)"));
    }
}

TEST_CASE("wrong usage: what is wrong is named as it was typed", "[flags]") {
    const Environment empty{{}};
    const std::vector<std::pair<std::string, std::string>> table{
        {"-p 9000", "-p is not a flag: flags begin with --, as --port"},
        {"--served-model-name a -p 9000", "-p is not a flag"},
        {"--max-model-len 200k",
         "max-model-len must be an integer of at least 1 and at most "
         "131072, got \"200k\""},
        {"--max-model-len 1.0001k",
         "max-model-len must be an integer of at least 1 and at most "
         "131072, got \"1.0001k\""},
        {"--max-model-len k",
         "max-model-len must be an integer of at least 1 and at most 131072, "
         "got \"k\""},
        {"--max-num-batched-tokens 9m",
         "max-num-batched-tokens must be an integer of at least 1 "
         "and at most 1048576, got \"9m\""},
        {"--no-such-flag 1", "--no-such-flag is not a flag"},
        {"--no-port 1", "--no-port is not a flag"},
        {"--config", "--config needs a value"},
        {"--port", "--port needs a value"},
        {"--port=", "--port: a value is empty"},
        {"DIR DIR2", "unexpected argument DIR2: the model is DIR"},
        {"--model DIR DIR2", "unexpected argument DIR2: the model is DIR"},
        {"-", "- is not a flag"},
        {"--", "-- is not a flag"},
        {"--=1", "-- is not a flag"},
        {"--enforce-eager DIR DIR2", "unexpected argument DIR2: the model is DIR"},
        {"--config /no/such/file", "--config: cannot read /no/such/file"},
    };
    for (const auto& [line, expected] : table) {
        const std::string error = error_of(words_of(line));
        INFO(line << "\n" << error);
        CHECK(error.starts_with(expected));
    }
    CHECK(error_of({""}).starts_with("--model: a value is empty"));
}

TEST_CASE("the model may stand before, amid and behind flags", "[flags]") {
    const Environment empty{{}};
    for (const char* line :
         {"DIR --port 8098 --enforce-eager", "--port 8098 DIR --dtype auto",
          "--port 8098 --enforce-eager DIR", "--port=8098 --no-enable-lora DIR",
          "-tp 1 DIR --port 8098", "--served_model_name a b --port 8098 DIR", "--port 8098 -O3 DIR",
          "--port 8098 --model DIR", "--model=DIR --port 8098"}) {
        INFO(line);
        const Options o = parse_flags(words_of(line));
        CHECK(o.model == "DIR");
        CHECK(o.port == 8098);
    }
}

TEST_CASE("lengths with units, and the ends of their ranges", "[flags]") {
    const Environment empty{{}};
    const std::vector<std::pair<const char*, int64_t>> table{
        {"8k", 8000},     {"8K", 8192},     {"25.6k", 25600}, {"8192", 8192}, {"131.072k", 131072},
        {"128K", 131072}, {"0.1m", 100000}, {"auto", -1},     {"-1", -1}};
    for (const auto& [typed, expected] : table) {
        INFO(typed);
        CHECK(parse_flags({"--max-model-len", typed}).max_model_len == expected);
    }
    CHECK(parse_flags({"--max-num-batched-tokens=1M"}).max_num_batched_tokens == 1 << 20);
}

TEST_CASE("switches have an opposite", "[flags]") {
    const Environment empty{{}};
    const auto silent = [](const Strings& args) { return parse_flags(args).disable_log_requests; };
    CHECK(!silent({}));
    CHECK(silent({"--disable-log-requests"}));
    CHECK(silent({"--no-enable-log-requests"}));
    CHECK(silent({"--no_enable_log_requests"}));
    CHECK(silent({"--enable-log-requests=false"}));
    CHECK(!silent({"--enable-log-requests"}));
    CHECK(!silent({"--disable-log-requests", "--no-disable-log-requests"}));
    CHECK(!parse_flags({"--no-enable-prompt-tokens-details"}).prompt_tokens_details);
    CHECK(parse_flags({"--enable-prompt-tokens-details"}).prompt_tokens_details);
}

TEST_CASE("--config: a file of flags, which the command line overrides", "[flags]") {
    const Environment environment({{"PORT", "1"}, {"VLLM_API_KEY", "of-environment"}});
    const File file(R"(# served as at home
model: demo/model
port: 2            # over $PORT
max-model-len: "8k"
served_model_name: [a, 'b c']
api-key:
  - one
  - two
enable-prompt-tokens-details: true
enable-log-requests: no
tensor-parallel-size: 1
enforce-eager: yes
compilation-config: {mode: 3}
hf-overrides: {}
)");
    Options o = parse_flags({"--config", file.path});
    CHECK(o.model == "demo/model");
    CHECK(o.port == 2);
    CHECK(o.max_model_len == 8000);
    CHECK(o.served_model_name == Strings{"a", "b c"});
    CHECK(o.api_key == Strings{"one", "two"});
    CHECK(o.prompt_tokens_details);
    CHECK(o.disable_log_requests);
    o = parse_flags({"DIR", "--config=" + file.path, "--port", "3", "--api-key", "three",
                     "--no-enable-prompt-tokens-details", "--max-model-len", "auto"});
    CHECK(o.model == "DIR");
    CHECK(o.port == 3);
    CHECK(o.api_key == Strings{"three"});
    CHECK(!o.prompt_tokens_details);
    CHECK(o.max_model_len == -1);
    // What would be refused is not, if the command line wins over it.
    const File shared("dtype: float16\nmax-model-len: 1G\n");
    CHECK(parse_flags({"--config", shared.path, "--dtype", "auto", "--max-model-len", "1k"})
              .max_model_len == 1000);
    CHECK(parse_flags({}).port == 1);
    CHECK(parse_flags({}).api_key == Strings{"of-environment"});
}

TEST_CASE("--config: errors name the file and the line", "[flags]") {
    const Environment empty{{}};
    const std::vector<std::pair<const char*, const char*>> table{
        {"port: 80\nmax-model-len: 200k\n", ":2: max-model-len must be an integer"},
        {"\n\nprot: 80\n", ":3: --prot is not a flag"},
        {"dtype: float16\n", ":1: --dtype must be auto or bfloat16, got \"float16\""},
        {"enable-lora: true\n", ":1: --enable-lora is not offered"},
        {"enable-prefix-caching: off\n", ":1: --enable-prefix-caching cannot be turned off"},
        {"enforce-eager: maybe\n", ":1: --enforce-eager must be true or false, got \"maybe\""},
        {"port:\n", ":1: --port has no value"},
        {"port: []\n", ":1: --port has no value"},
        {"port: [1, 2]\n", ":1: --port needs one value, got [\"1\",\"2\"]"},
        {"port: {a: 1}\n", ":1: port must be an integer"},
        {"? [a, b]\n: 1\n", ":1: a flag must be a word"},
        {"port: 80\nhost: [a\n", ":3: "},
        {"a: b: c\n", ":1: "},
        {"port: \"80\n", ":1: "},
        {"config: other.yaml\n", ":1: --config must be on the command line"},
    };
    for (const auto& [content, expected] : table) {
        const File file(content);
        const std::string error = error_of({"--config", file.path});
        INFO(content << error);
        CHECK(error.starts_with(file.path + expected));
    }
    for (const char* content : {"", "# nothing\n", "80\n", "- port\n", "port: 1\n---\nport: 2\n"}) {
        const File file(content);
        const std::string error = error_of({"--config", file.path});
        INFO(content << error);
        CHECK(error.starts_with("--config: " + file.path + " has no lines of FLAG: VALUE"));
    }
    const File file("port: 80\n");
    CHECK(error_of({"--config", file.path, "--config", file.path})
              .starts_with("--config: only one file can be read"));
    CHECK(error_of({"--config", repository.string()}).starts_with("--config: "));
}

TEST_CASE("an error of a variable names it", "[flags]") {
    const Environment environment(std::map<std::string, std::string>{{"MAX_MODEL_LEN", "1G"}});
    CHECK(error_of({}).starts_with("$MAX_MODEL_LEN: max-model-len must be an integer"));
}

TEST_CASE("--help has each flag once, in groups", "[flags]") {
    const std::string all = help();
    size_t last = 0;
    for (const char* title : {"\nServer\n", "\nModel\n", "\nBatching and memory\n", "\nLogs\n",
                              "\nWithout effect;", "\nRefused,"}) {
        INFO(title);
        const size_t found = all.find(title);
        REQUIRE(found != std::string::npos);
        CHECK(found > last);
        last = found;
    }
    std::map<std::string, int> times;
    const std::string rows =
        all.substr(all.find("\nServer\n"), all.find("\nThe cache") - all.find("\nServer\n"));
    for (size_t at = 0; (at = rows.find(" --", at)) != std::string::npos; at++) {
        const std::string name = rows.substr(at + 1, rows.find_first_of(" \n", at + 1) - at - 1);
        const bool named_in_text = name == "--no-enable-log-requests";
        INFO(name);
        CHECK((++times[name] == 1 || named_in_text));
    }
    CHECK(times.size() > 230);
    for (const char* name : {"--port", "--dtype", "--quantization", "--enable-lora"})
        CHECK(times[name] == 1);
    CHECK(all.find("--dtype auto|bfloat16") > all.find("\nWithout effect"));
    CHECK(all.find("--enable-lora") > all.find("\nRefused"));
}

TEST_CASE("--generation-config vllm: sampling's defaults are vLLM's", "[http]") {
    Server s({"--generation-config", "vllm"});
    CHECK(s.log().find("sampling defaults: temperature 1, top_k 0, top_p 1, min_p 0, "
                       "repetition_penalty 1\n") != std::string::npos);
}
