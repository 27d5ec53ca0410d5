// SPDX-License-Identifier: Apache-2.0
//
// gemma.h: what an engine is. Sitting 1 (docs/afternoon.md), first: the letters of every shape,
// then the nouns that gemma.cu and reference.cpp share with those who call them. Nothing here knows
// a request.
//
//     HTTP -- server.cpp --> Sequence -- Scheduler --> Batch -- Model::step --> Results
//     HTTP <-- server.cpp -- Inbox <------- Delivery -------- Scheduler::finish <--'
//
//   [1] Small things   Error, bf16, pages and pools
//   [2] A model        Config, Weights, Checkpoint
//   [3] A step         Batch in, Results out
//   [4] An engine      Model
//
// Letters, the same everywhere; a pointer's comment gives its shape in them:
//   N tokens of one step         R rows (sequences) of one step     V logits (embedding rows)
//   D width of the model         F width of the feed-forward        L layers
//   H query heads                G key/value heads                  E width of a head
//   W sliding window, counting the token itself
//   K inputs of a matrix, M its outputs; K and V are also the keys and values of attention
// Matrices are row-major, and a weight matrix is [outputs, inputs], as Hugging Face stores it.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "log.h"

namespace gemma {

// [1] Small things --------------------------------------------------------------------------------

// Start-up cannot go on: the message names the file, field or flag, what was found and what is
// allowed.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct bf16 {
    uint16_t bits;  // the upper half of a float
};

// Of a clock that only goes forward.
inline double seconds() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double>(now).count();
}

// K and V (the keys and values of attention) live in pages of 32 tokens, in two pools. A page of
// the global pool covers its tokens in all global layers. A page of the local pool covers them in
// all local layers; it is released once it lies wholly before the window.
enum Pool { local_pool, global_pool };
constexpr Pool pools[] = {local_pool, global_pool};
constexpr int page_tokens = 32;

// [2] A model -------------------------------------------------------------------- checkpoint.cpp

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
    int rows() const { return (V + 15) / 16 * 16; }  // of `embed`: behind V there are only zeros
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
    const bf16* embed;  // [rows, D], also the output matrix
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

// [3] A step --------------------------------------------------------------------------------------

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

// One result that a step returns, about the token that follows batch.tokens[token].
struct Output {
    int token;        // index into the N tokens
    int target = -1;  // -1: sample. Else: the logprob of this id
    int index = 0;    // how many tokens were generated before this one: the draw depends on it
    Sampling sampling;
    std::vector<Adjustment> adjustments;  // an id at most once
    // Bitset over the vocabulary, [ceil(vocab/32)]: bit id%32 of word id/32 says whether id may be
    // sampled. At least one bit is set. Null: every id may.
    std::shared_ptr<const std::vector<uint32_t>> allowed;
};

// One step's work, ragged: row r has the tokens row_start[r] .. row_start[r+1]-1, at consecutive
// positions. Prefill is a longer row, not another program.
struct Batch {
    std::vector<int> tokens;     // [N]
    std::vector<int> positions;  // [N]
    std::vector<int> row_start;  // [R+1]
    std::vector<int> pages[2];   // [R, pages_per_row] by Pool; entry i covers 32i..32i+31; -1: none
    int pages_per_row = 0;
    std::vector<Output> outputs;
    // By Pool: pages whose old content nobody may read any more. Debug builds of an engine fill
    // them with NaN before the step writes anything, since a dead page may already be in `pages`
    // again.
    std::vector<int> dead[2];
};

// Always from the raw log-softmax, whatever the sampling.
struct Result {
    struct Top {
        int id;
        float logprob;
    };
    int id = 0;            // sampled, or the Output's target
    float logprob = 0;     // 0 where none was asked for
    int rank = 0;          // 1: the likeliest
    std::vector<Top> top;  // likeliest first; ties by id
};
using Results = std::vector<Result>;  // [batch.outputs]

// [4] An engine ------------------------------------------------------- gemma.cu and reference.cpp

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

// The checkpoint must outlive the model. max_batched_tokens: of a step, at most.
std::unique_ptr<Model> open_cpu(const Checkpoint& checkpoint, int max_batched_tokens = 64);

struct CudaOptions {
    int max_batched_tokens = 8192;
    double memory_utilization = 0.9;  // share of the GPU's memory to use in all
};

// Only in builds with GEMMA_CUDA. Error: the model does not fit, with the bytes it needs and has.
std::unique_ptr<Model> open_cuda(const Checkpoint& checkpoint, const CudaOptions& options);
// Tokens of a step by default: few on a small GPU, so that those who decode wait less for a prompt.
int cuda_step_tokens();
// Why no GPU can be used, and what to do about it, in one sentence; "" if there is one.
std::string cuda_missing();

}  // namespace gemma
