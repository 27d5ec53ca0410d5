// SPDX-License-Identifier: Apache-2.0
//
// gemma.h: every noun of gemma.cu, and the letters of every shape. (fields.h is beside it for those
// who parse.)
//
//     HTTP --server.cpp--> Sequence --Scheduler--> Batch --Model::step--> Result --> HTTP
//
// Letters, the same everywhere; a pointer's comment gives its shape in them:
//   N tokens of one step         R rows (sequences) of one step     V logits (embedding rows)
//   D width of the model         F width of the feed-forward        L layers
//   H query heads                G key/value heads                  E width of a head
//   W sliding window, counting the token itself
// Matrices are row-major, and a weight matrix is [outputs, inputs], as Hugging Face stores it.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "log.h"

namespace gemma {

// [1] Small things -------------------------------------------------------------------------------

// Start-up cannot go on: the message names the file, field or flag, what was found and what is
// allowed.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct bf16 {
    uint16_t bits;  // the upper half of a float
};

// [2] Checkpoint ------------------------------------------------------------------ checkpoint.cpp

struct Config {
    int D, F, L, H, G, E, V, W;
    int max_positions;
    int vocab;                 // ids at or above it have no text and are never sampled; <= V
    float eps;                 // of every RMSNorm
    float scale;               // of the scores: query_pre_attn_scalar ^ -1/2
    float embed_scale;         // sqrt(D), rounded to bf16 as the model was trained
    float theta[2];            // RoPE bases, by Pool
    float rope_divisor[2];     // inv_freq is divided by it; 8 for the global layers of 4B and up
    std::vector<char> global;  // [L] 1: sees everything, 0: sees the last W tokens
    std::vector<int> eos;      // generation stops on any of these
};

// What generation_config.json sets, else vLLM's own defaults.
struct SamplingDefaults {
    double temperature = 1, top_p = 1, min_p = 0, repetition_penalty = 1;
    int top_k = 0;            // 0: off
    int max_new_tokens = -1;  // -1: no limit of its own
};

struct Layer {
    const bf16 *input_norm, *post_attention_norm, *pre_ffn_norm, *post_ffn_norm;  // [D]
    const bf16* q;                                                                // [H*E, D]
    const bf16 *k, *v;                                                            // [G*E, D]
    const bf16* o;                                                                // [D, H*E]
    const bf16 *q_norm, *k_norm;                                                  // [E]
    const bf16 *gate, *up;                                                        // [F, D]
    const bf16* down;                                                             // [D, F]
};

struct Weights {
    const bf16* embed;  // [V, D], also the output matrix
    const bf16* norm;   // [D]
    std::vector<Layer> layers;
};

// A model directory as Hugging Face lays it out, validated whole; the weights are mapped, not read.
// Anything wrong is an Error that names file and tensor or field, found and expected.
class Checkpoint {
  public:
    explicit Checkpoint(const std::string& directory);
    ~Checkpoint();
    Config config;
    SamplingDefaults defaults;
    Weights weights;
    uint64_t bytes = 0;  // of the tensors that are used

  private:
    struct Files;  // the mappings, and tensors that had to be converted to bf16
    std::unique_ptr<Files> files;
};

// The directory of a model given as a path or as ORGANISATION/NAME in the Hugging Face cache
// (HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub). Error: names what was searched.
std::string find_model(const std::string& model);

// [3] Tokenizer -------------------------------------------------------------------- tokenizer.cpp

class Tokenizer {
  public:
    explicit Tokenizer(const std::string& file);  // a SentencePiece model of Gemma's family
    ~Tokenizer();
    int size() const;

    static constexpr int eos = 1, bos = 2;  // fixed for the family and checked at load

    // Text of a user: nothing in it can become a control id.
    std::vector<int> encode(std::string_view text) const;
    // Text of a raw prompt: control pieces written out in it become their ids. Adds no <bos>.
    std::vector<int> encode_with_controls(std::string_view text) const;
    // Gemma's chat template over OpenAI messages, <bos> included; behind them the start of an
    // answer, or nothing, or the last message left open to be continued. Throws
    // std::invalid_argument with the template's own message (roles that do not alternate, content
    // of a wrong type).
    enum class Ending { generation_prompt, closed, open };
    std::vector<int> chat(const nlohmann::json& messages, Ending ending) const;

    // A piece's text, a byte piece's byte, "" for control ids and ids that have no piece.
    std::string_view bytes(int id) const;
    std::string_view name(int id) const;  // as the vocabulary spells it: "<end_of_turn>"
    // Text of whole ids; what is not UTF-8 becomes U+FFFD. Control ids are left out.
    std::string decode(const std::vector<int>& ids) const;

  private:
    struct Pieces;
    std::unique_ptr<Pieces> pieces;
};

// Ids in, text out, at every moment valid UTF-8: a character that is not whole yet is held back.
class Detokenizer {
  public:
    // Control ids are left out, or written as the vocabulary spells them.
    explicit Detokenizer(const Tokenizer& t, bool controls = false)
        : tokenizer(t), show_controls(controls) {}
    std::string push(int id);
    std::string flush();  // at the end: what was held back, as U+FFFD

  private:
    const Tokenizer& tokenizer;
    const bool show_controls;
    std::string held;  // the first 1 to 3 bytes of a character
};

// [4] Sequence and Batch --------------------------------------------------------------------------

// K and V live in pages of 32 tokens, in two pools. A page of the global pool covers its tokens in
// all global layers; one of the local pool covers them in all local layers, and is released once it
// lies wholly before the window.
enum Pool { local_pool, global_pool };
constexpr Pool pools[] = {local_pool, global_pool};
constexpr int page_tokens = 32;

struct Sampling {
    float temperature = 1;       // below 1e-5: greedy
    int top_k = 0;               // 0: off
    float top_p = 1, min_p = 0;  // 1 and 0: off
    uint64_t seed = 0;
    int logprobs = -1;  // alternatives wanted, 0 to 20; -1: not even the token's own
};

// What logit_bias and penalties make of one id's logit z before it is sampled, in vLLM's order:
// z += bias;  z = z > 0 ? z / repetition : z * repetition;  z -= penalty
struct Adjustment {
    int id;
    float bias = 0, repetition = 1, penalty = 0;
};

// One thing that a step returns, about the token that follows batch.tokens[token].
struct Output {
    int token;  // index into the N tokens
    int row;
    int target = -1;  // -1: sample. Else: the logprob of this id
    int index = 0;    // how many tokens were generated before this one: the draw depends on it
    Sampling sampling;
    std::vector<Adjustment> adjustments;  // an id at most once
    // Bit id%32 of word id/32: may it be sampled? [ceil(vocab/32)], one bit at least; none: all may
    std::shared_ptr<const std::vector<uint32_t>> allowed;
};

// One step's work, ragged: row r has the tokens row_start[r] .. row_start[r+1]-1, at consecutive
// positions. Prefill is a longer row, not another program.
struct Batch {
    std::vector<int> tokens;     // [N]
    std::vector<int> positions;  // [N]
    std::vector<int> row_start;  // [R+1]
    std::vector<int> pages[2];   // [R, pages_per_row] by Pool; entry i covers positions 32i..32i+31
    int pages_per_row = 0;
    std::vector<Output> outputs;
    std::vector<int> dead[2];  // by Pool; debug builds of an engine fill these pages with NaN
};

// Always from the raw log-softmax, whatever the sampling.
struct Result {
    struct Top {
        int id;
        float logprob;
    };
    int id = 0;
    float logprob = 0;     // 0 where none was asked for
    int rank = 0;          // 1: the likeliest
    std::vector<Top> top;  // likeliest first; ties by id
};
using Results = std::vector<Result>;  // [batch.outputs]

enum class Finish { none, stop, length, abort };

struct Inbox;  // server.cpp: where a request waits for its tokens

// One choice of one request.
struct Sequence {
    // set once
    std::vector<int> tokens;  // the prompt; the scheduler appends
    int prompt_tokens = 0;
    int max_tokens = 0;
    Sampling sampling;
    std::vector<int> stop_ids;
    int prompt_logprobs = -1;  // as Sampling::logprobs, of the prompt's own tokens
    // Penalties on ids that were generated, and on those of the prompt too: as vLLM's, 0 and 1: off
    float presence = 0, frequency = 0, repetition = 1;
    std::vector<Adjustment> adjustments;                          // the scheduler goes on with them
    std::shared_ptr<const std::vector<uint32_t>> allowed;         // as Output's
    int min_tokens = 0;                                           // until so many are generated,
    std::shared_ptr<const std::vector<uint32_t>> allowed_before;  // these are allowed
    int choice = 0;
    std::shared_ptr<Inbox> inbox;
    double arrived = 0;
    // any thread
    std::atomic<bool> cancelled{false};
    // scheduler only
    int computed = 0;                       // tokens whose K and V lie in pages
    int scored = 0;                         // tokens of the prompt whose logprobs are out
    std::vector<int> pages[2];              // by Pool and absolute page; -1: released
    std::shared_ptr<struct Prefix> prefix;  // of its whole pages that are computed; server.cpp
    int preemptions = 0, cached_tokens = 0;
    double started = 0;
    struct Penalised {
        size_t place;  // in adjustments
        int count;     // times generated
    };
    std::unordered_map<int, Penalised> penalised;  // by id
};

// [5] Scheduler ----------------------------------------------------------------------- server.cpp

struct Limits {
    int max_num_seqs, max_batched_tokens;  // rows and tokens of a step
    int window;
    int pages[2];  // by Pool
};

struct Token {
    std::shared_ptr<Sequence> sequence;
    Result result;
    Finish finish;
    bool of_prompt;  // the result is about the prompt's next token, from its second on
};

// A page is held by sequences, or cached (held by none, but found again by its tokens until its
// room is needed), or free. An idle scheduler holds none.
struct PoolUse {
    int held, cached, free;
};

// Pure: host structs in, a Batch out. No clock, no thread, no model.
class Scheduler {
  public:
    explicit Scheduler(const Limits& limits);
    ~Scheduler();
    bool fits(int tokens) const;  // could a sequence that grows to so many tokens ever run?
    void add(std::shared_ptr<Sequence> sequence);
    // Empty: nothing to do. `now` is kept as the time when sequences start.
    const Batch& next(double now = 0);
    std::vector<Token> finish(const Results& results);  // of the Batch that next() gave
    int waiting() const, running() const, preemptions() const;
    PoolUse use(Pool pool) const;

  private:
    struct State;
    std::unique_ptr<State> state;
};

// [6] Model -------------------------------------------------------- gemma.cu and reference.cpp

// What an engine has for K and V, in bytes.
struct KvMemory {
    uint64_t budget;
    uint64_t page[2];  // one page, by Pool
};

class Model {
  public:
    virtual ~Model() = default;
    virtual KvMemory kv_memory() const = 0;
    virtual void allocate_pages(const int (&pages)[2]) = 0;  // by Pool; once, before the first step
    virtual Results step(const Batch& batch) = 0;            // one caller at a time
};

// The checkpoint must outlive the model.
std::unique_ptr<Model> open_cpu(const Checkpoint& checkpoint);

struct CudaOptions {
    int max_num_seqs = 256, max_batched_tokens = 8192;  // rows and tokens of a step, at most
    double memory_utilization = 0.9;                    // share of the GPU's memory to use in all
};

// Only in builds with GEMMA_CUDA. Error: the model does not fit, with the bytes it needs and has.
std::unique_ptr<Model> open_cuda(const Checkpoint& checkpoint, const CudaOptions& options);
// Tokens of a step by default: few on a small GPU, so that those who decode wait less for a prompt.
int cuda_step_tokens();
// Why no GPU can be used, and what to do about it, in one sentence; "" if there is one.
std::string cuda_missing();

// [7] HTTP ------------------------------------------------------------------------------ http.cpp

// A mistake of the client's, or of a flag's; `param` names the field.
struct Refusal {
    int status;  // of HTTP
    std::string message, param;
};

struct HttpRequest {
    std::string path, body;
    std::string id;     // the header X-Request-Id
    std::string trace;  // the header X-Cloud-Trace-Context, else traceparent
};

struct HttpReply {
    std::string body, type = "application/json";
    // Where set, in the place of body: is called until it returns false, and appends what is ready,
    // perhaps nothing; it waits for 50 ms at most. It is destroyed when the client has left.
    std::function<bool(std::string& out)> more;
};

struct Route {
    std::string method, path;  // a path that ends with / serves all below it
    std::function<HttpReply(const HttpRequest&)> answer;  // throws a Refusal when it will not
    bool body = true;                                     // of a POST: it must be JSON
};

// Listens from its start on; each connection has a thread, one request and one answer.
class HttpServer {
  public:
    // Error: cannot listen. Port 0: any free one. With keys, what lies under /v1 wants one of them.
    HttpServer(const std::string& host, int port, std::vector<Route> routes,
               std::vector<std::string> api_keys);
    ~HttpServer();
    int port;
    // Ends within a second; false: some connection did not, and the process must exit by itself.
    bool stop();

  private:
    struct Library;
    std::unique_ptr<Library> library;
    std::thread listener;
};

// [8] Metrics ------------------------------------------------------------------------ metrics.cpp

struct Histogram {
    std::vector<double> bounds;    // upper ones, ascending
    std::vector<uint64_t> counts;  // [bounds + 1]
    double sum = 0;

    void observe(double value) {
        sum += value;
        counts[size_t(std::lower_bound(bounds.begin(), bounds.end(), value) - bounds.begin())]++;
    }
};

// What /metrics shows; one observation for each choice. Times in seconds.
struct Figures {
    double running = 0, waiting = 0, pages_used = 0, preemptions = 0;
    double prompt_tokens = 0, generated_tokens = 0, cache_queries = 0, cache_hits = 0;
    double stopped = 0, reached_length = 0, aborted = 0;
    Histogram first_token, next_token, whole, queue, inference, prefill, decode;
    Histogram prompt_size, generated_size, max_generated_size, asked_size, asked_n, step_tokens;
};

class Metrics {
  public:
    explicit Metrics(int max_model_len);
    void change(auto&& how) {
        const std::lock_guard lock(mutex);
        how(figures);
    }
    // Prometheus' text. `labels` stand at each figure, `cache_config` behind them at one.
    std::string page(const std::string& labels, const std::string& cache_config);

  private:
    std::mutex mutex;
    Figures figures;  // guarded by mutex
};

// Of a clock that only goes forward.
inline double seconds() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double>(now).count();
}

// [9] Service ------------------------------------------------------------------------- server.cpp

struct Options {
    std::string model = "google/gemma-3-1b-it", host = "0.0.0.0", device = "auto";
    std::vector<std::string> served_model_name, api_key;
    int64_t port = 8000, max_queue = 1024, seed = 0;
    int64_t max_model_len = -1, max_num_seqs = -1, max_num_batched_tokens = -1;  // -1: not given
    int64_t pages = -1;                                                          // the same
    double gpu_memory_utilization = -1;
    bool prompt_tokens_details = false, disable_log_requests = false, check = false;
    int64_t block_size = page_tokens;  // this and the next: read, and without effect
    bool load_tracking = true;
};

// The OpenAI surface of one model. Requests that come before open() wait for it.
class Service {
  public:
    explicit Service(const Options& options);
    ~Service();
    std::vector<Route> routes();
    // What is given must outlive the service.
    void open(const Checkpoint& checkpoint, const Tokenizer& tokenizer,
              std::unique_ptr<Model> model, const Limits& limits, int max_model_len);
    bool leave();                                  // nobody new from here on: 503. Was it open?
    bool drained(std::chrono::milliseconds wait);  // is no request inside any more?
    bool rests(std::chrono::milliseconds wait);    // open, and its engine amid no step?
    void cut();                                    // who is inside ends now, with what it has

    struct App;

  private:
    std::unique_ptr<App> app;
};

}  // namespace gemma
