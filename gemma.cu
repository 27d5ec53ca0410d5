// SPDX-License-Identifier: Apache-2.0
//
// gemma.cu: the CUDA engine, one translation unit. Sitting 1, last: a Batch becomes launches of
// kernels, and their results a Results. It knows gemma.h and nothing of sequences, JSON or HTTP.
//
//   [1] The model            what a step is, and forward: the whole of Gemma 3 in forty lines
//   [2] Embedding and norms  the kernels that are not products
//   [3] Memory               weights, activations, pages
//   [4] Packing              a Batch becomes arrays on the device
//   [5] Steps                a decode step replays a CUDA graph
//
// The products, attention and sampling lie in linear.cuh, attention.cuh and sample.cuh (sitting 2).
// Each kernel's plain twin stands in reference.cpp.
//
// The rule: given its seed, a token's bits never depend on what runs beside it. One way to multiply
// (mma.sync, tokens as its rows), sums in an order fixed by their length alone, attention in chunks
// of 64 keys on the grid of absolute positions, and integers where a token is chosen. A batch only
// decides which kernel and which block computes what.
//
// Letters as in gemma.h. Products take bf16 and sum in fp32; the residual stream h is fp32.
#include "gemma.h"

#include <algorithm>
#include <bit>
#include <climits>
#include <cmath>
#include <cstring>
#include <unordered_map>

#include "attention.cuh"
#include "linear.cuh"
#include "machine.cuh"
#include "sample.cuh"
#include "weights.cuh"

namespace gemma {
namespace {

// [1] The model -----------------------------------------------------------------------------------

constexpr int most_outputs = 256;  // rows of logits at a time

// What the host knows of a step's shape; the rest is in the tables on the device.
struct StepShape {
    int N = 0, R = 0, outputs = 0, tiles = 0;
    bool adjusted = false, logprobs = false;  // whether any output has adjustments, wants logprobs
    // Neighbouring rows that attend_rows takes in one launch: the chunks (of 64 keys) of their rows
    // of one token have room in most_slots. Longer rows amid them have no chunks.
    struct Span {
        int first_row, rows;
        // By Pool, fewer in the local one. Only for the bytes that `launch` reports: a graph keeps
        // the values of its capture, so no grid may depend on them.
        int chunks[2];
    };
    std::vector<Span> spans;
};

struct RopeTables {
    const float* inv_freq;  // by Pool: [2][E/2]
    float* cos_sin[2];      // by Pool: [N, E], E/2 cosines, then E/2 sines
};

// h[n, :] = embed[token[n], :] * sqrt(D), and the cosines and sines of n's position.
void embed(Stream& s, float* h, const RopeTables& rope, const bf16* table, const int* tokens,
           const int* positions, int N, int D, int E, float scale);

constexpr int most_groups = 4;  // partial sums of a product, which groups_of(K) counts: 1, 2 or 4

// Adds a branch to the residual stream and norms the sum for the next branch. Three uses: the first
// of a step has no branch; those between branches have one, and write h_out; the last one norms
// only the rows that have an output, and writes none.
struct Norm {
    bf16* x;             // [N, D] in fragment order
    const float* h;      // [*, D]
    float* h_out;        // where h goes with the branch added; null: nowhere
    const float* parts;  // [count][h_rows, D], whose sum is the branch; null: there is none
    int count, h_rows;
    const bf16 *post, *pre;  // [D]
    const int* rows;         // [N] which rows of h; null: all
    int D;
    float eps;
};
void norm(Stream& s, int N, const Norm& a);

class CudaModel : public Model {
  public:
    CudaModel(const Checkpoint& checkpoint, const CudaOptions& options);
    ~CudaModel() override;
    KvMemory kv_memory() const override;
    void allocate_pages(const int (&pages)[2]) override;
    Results step(const Batch& batch) override;

    // Also called by the benchmark and the tests.
    Stream stream;
    StepShape pack(const Batch& batch, int bucket);
    void forward(const StepShape& shape);
    static int bucket_of(const Batch& batch);

  private:
    template <class Each>
    void each_activation(Each each);
    size_t page_size(Pool pool) const {  // bf16s: [layers of the pool][G][K, V][32][E]
        return size_t(layers_of[pool]) * size_t(c.G) * 2 * page_tokens * size_t(c.E);
    }
    Attention attention_of(int layer, int N) const;
    void add_norm(int N, int K, const bf16* post, const bf16* pre);
    void lm_head(const StepShape& shape);
    void reserve_inputs(const Batch& batch, const StepShape& shape);
    void pack_rows(const Batch& batch, StepShape& shape);
    void pack_outputs(const Batch& batch, StepShape& shape);
    void pack_pages(const Batch& batch, const StepShape& shape);
    void pack_adjustments(const Batch& batch);
    std::vector<int> pack_bitsets(const Batch& batch);
    template <class T>
    T* add_input(const T*& device, size_t count);
    void replay(const StepShape& shape);
    void drop_graphs();

    const Config& c;
    CudaOptions options;
    DeviceWeights w;
    int layers_of[2] = {0, 0};       // by Pool
    std::vector<int> layer_in_pool;  // [L]
    Memory<bf16> kv[2];
    // Activations of a step, with N rounded up to 128 tokens, a tile of linear.cuh.
    Memory<float> h, parts, cos_sin[2], inv_freq;
    Memory<bf16> x, qkv, attended, gated;
    Memory<float> chunk_out;    // [slots][H][E]
    Memory<float2> chunk_sums;  // [slots][H]
    Memory<float> logits;       // [256, V]
    Memory<uint64_t> best;
    // A step's inputs, one array behind the other, and their copy on the device.
    HostMemory<char> inputs;
    Memory<char> device_inputs;
    size_t inputs_used = 0;  // bytes
    Tables tables{};
    const Ask* asks = nullptr;
    const DeviceAdjustment* adjustments = nullptr;
    // The bitsets of a step's outputs, and their copy on the device.
    HostMemory<uint32_t> bitsets;
    Memory<uint32_t> device_bitsets;
    // A step's results: the kernels write them into the host's memory.
    HostMemory<int> ids;
    HostMemory<Details> details;
    struct Graph {
        cudaGraphExec_t exec;
        const PagePair* pages;  // where it reads the page table
    };
    std::map<int, Graph> graphs;  // by rows
};

// The model, as the paper has it: [..] are the shapes of what a line makes. The norm behind a
// branch and the norm before the next one are one kernel, so a layer's last norm runs at the start
// of the next layer.
void CudaModel::forward(const StepShape& shape) {
    const int N = shape.N, D = c.D, F = c.F, HE = c.H * c.E, GE = c.G * c.E;
    const RopeTables rope{inv_freq.data, {cos_sin[0].data, cos_sin[1].data}};
    Stream& s = stream;
    s.first = true;  // embed, the next launch, waits until the step before has ended
    embed(s, h.data, rope, w.embed, tables.tokens, tables.positions, N, D, c.E, c.embed_scale);
    for (int i = 0; i < c.L; i++) {
        const DeviceLayer& l = w.layers[size_t(i)];
        const Attention a = attention_of(i, N);
        if (i == 0) {
            add_norm(N, 0, nullptr, l.input_norm);  // [N, D]
        } else {
            add_norm(N, F, w.layers[size_t(i) - 1].post_ffn_norm, l.input_norm);
        }
        linear(s, "qkv", Store::rows_bf16, qkv.data, x.data, l.qkv, N, D, HE + 2 * GE);
        if (shape.tiles > 0) {  // rows of several tokens; write_kv skips the others
            write_kv(s, a);
            attend_tiles(s, a, shape.tiles);  // [N, HE]
        }
        for (const auto& span : shape.spans)  // rows of one token, which write their own k and v
            attend_rows(s, a, span.first_row, span.rows, span.chunks[a.pool]);
        linear(s, "o", Store::parts_fp32, parts.data, attended.data, l.o, N, HE, D, groups_of(HE));
        add_norm(N, HE, l.post_attention_norm, l.pre_ffn_norm);
        linear(s, "gate_up", Store::geglu, gated.data, x.data, l.gate_up, N, D, 2 * F);  // [N, F]
        linear(s, "down", Store::parts_fp32, parts.data, gated.data, l.down, N, F, D, groups_of(F));
    }
    lm_head(shape);
}

// x = the norm of h and the branch that a matrix with K inputs made; K 0: no branch.
void CudaModel::add_norm(int N, int K, const bf16* post, const bf16* pre) {
    const Norm a{x.data,
                 h.data,
                 /*h_out=*/h.data,
                 K ? parts.data : nullptr,
                 K ? groups_of(K) : 0,
                 /*h_rows=*/N,
                 post,
                 pre,
                 /*rows=*/nullptr,
                 c.D,
                 c.eps};
    norm(stream, N, a);
}

// Logits of the tokens that have an output, and what is asked of them; so many at a time as the
// logits have room.
void CudaModel::lm_head(const StepShape& shape) {
    for (int first = 0; first < shape.outputs; first += most_outputs) {
        const int count = std::min(most_outputs, shape.outputs - first);
        const Norm a{x.data,
                     h.data,
                     /*h_out=*/nullptr,
                     parts.data,
                     groups_of(c.F),
                     /*h_rows=*/shape.N,
                     w.layers.back().post_ffn_norm,
                     w.norm,
                     tables.output_token + first,
                     c.D,
                     c.eps};
        norm(stream, count, a);
        linear(stream, "lm_head", Store::parts_fp32, logits.data, x.data, w.embed, count, c.D,
               c.rows());
        sample(stream,
               // The adjustments are an input in which sample keeps the raw logits.
               {logits.data, best.data, asks + first, device_bitsets.data,
                const_cast<DeviceAdjustment*>(adjustments), ids + size_t(first),
                details + size_t(first), count, c.rows(), c.V, c.vocab},
               shape.adjusted, shape.logprobs);
    }
}

Attention CudaModel::attention_of(int layer, int N) const {
    const Pool pool = c.global[size_t(layer)] ? global_pool : local_pool;
    const DeviceLayer& l = w.layers[size_t(layer)];
    Attention a{};
    a.tables = tables;
    a.qkv = qkv.data;
    a.q_norm = l.q_norm;
    a.k_norm = l.k_norm;
    a.cos_sin = cos_sin[pool].data;
    a.kv = kv[pool] +
           size_t(layer_in_pool[size_t(layer)]) * size_t(c.G) * 2 * page_tokens * size_t(c.E);
    a.page_stride = page_size(pool);
    a.pool = pool;
    a.window = pool == global_pool ? INT_MAX : c.W;
    a.H = c.H;
    a.G = c.G;
    a.E = c.E;
    a.N = N;
    a.eps = c.eps;
    a.scale = c.scale * float(log2e);
    a.chunk_out = chunk_out.data;
    a.chunk_sums = chunk_sums.data;
    a.out = attended.data;
    return a;
}

// [2] Embedding and norms -------------------------------------------------------------------------

// h[n, :] = embed[token[n], :] * sqrt(D), and the angles of n's position. Twins: embed, rope_tables
// One block a token, eight elements a thread.
__global__ void __launch_bounds__(1024)
    embed_kernel(float* h, RopeTables rope, const bf16* table, const int* tokens,
                 const int* positions, int D, int E, float scale) {
    const int n = int(blockIdx.x), d = int(threadIdx.x) * 8;
    launch_dependents();
    // Before the wait: only what no kernel of this step writes, so weights and inputs
    // (machine.cuh).
    const int token = tokens[n], position = positions[n];
    grid_dependency_wait();
    if (d < D) {
        Eight x = load8(table + size_t(token) * D + d);
        for (float& v : x.v) v *= scale;
        store8(h + size_t(n) * D + d, x);
    }
    for (int i = int(threadIdx.x); i < E; i += int(blockDim.x)) {  // E/2 angles for each pool
        const int pool = i / (E / 2), j = i % (E / 2);
        // Hugging Face rounds the angle to fp32. sincospif wants half turns; whole turns, which
        // change nothing, are taken off in double, where a large angle loses no digit.
        const float angle = float(position) * rope.inv_freq[pool * (E / 2) + j];
        const double half_turns = double(angle) * 0.31830988618379067;  // angle / pi
        float sine, cosine;
        sincospif(float(half_turns - 2 * rint(half_turns * 0.5)), &sine, &cosine);
        float* out = (pool ? rope.cos_sin[1] : rope.cos_sin[0]) + size_t(n) * E;
        out[j] = cosine;
        out[E / 2 + j] = sine;
    }
}

void embed(Stream& s, float* h, const RopeTables& rope, const bf16* table, const int* tokens,
           const int* positions, int N, int D, int E, float scale) {
    assert(E % 2 == 0 && D % 8 == 0 && D <= 8 * 1024);
    s.launch("embed", /*bytes=*/N * (6. * D + 8. * E), embed_kernel, dim3(N),
             ceil_div(D / 8, 32) * 32, 0, h, rope, table, tokens, positions, D, E, scale);
}

// h' = h + rmsnorm(sum of parts) (1 + post), then x = rmsnorm(h') (1 + pre). One block a token,
// eight elements a thread. Twins: rmsnorm, add_rmsnorm
__global__ void __launch_bounds__(1024) norm_kernel(Norm a) {
    __shared__ float scratch[2][32];
    const int n = int(blockIdx.x), d = int(threadIdx.x) * 8;
    const bool live = d < a.D;
    launch_dependents();
    Eight post = {}, pre = {}, h = {};
    if (live) pre = load8(a.pre + d);
    if (live && a.parts) post = load8(a.post + d);
    const int row = a.rows ? a.rows[n] : n;
    const size_t at = size_t(row) * a.D + d;
    grid_dependency_wait();
    if (live) h = load8(a.h + at);
    if (a.parts) {
        Eight part[most_groups] = {}, y = {};
        UNROLL for (int p = 0; p < most_groups; p++) {  // all loads before the first sum
            if (live && p < a.count) part[p] = load8(a.parts + size_t(p) * a.h_rows * a.D + at);
        }
        UNROLL for (int p = 0; p < most_groups; p++) {
            for (int i = 0; i < 8; i++) y.v[i] += part[p].v[i];
        }
        float squares = 0;
        for (const float v : y.v) squares += v * v;
        const float r = rsqrtf(block_sum(squares, scratch[0]) / float(a.D) + a.eps);
        for (int i = 0; i < 8; i++) h.v[i] += y.v[i] * r * (1 + post.v[i]);
        if (live && a.h_out) store8(a.h_out + at, h);
    }
    float squares = 0;
    for (const float v : h.v) squares += v * v;
    const float r = rsqrtf(block_sum(squares, scratch[1]) / float(a.D) + a.eps);
    if (!live) return;
    for (int i = 0; i < 8; i += 2) {
        const float x0 = h.v[i] * r * (1 + pre.v[i]), x1 = h.v[i + 1] * r * (1 + pre.v[i + 1]);
        *reinterpret_cast<uint32_t*>(a.x + fragment(n, d + i, a.D)) = pack_bf16(x0, x1);
    }
}

void norm(Stream& s, int N, const Norm& a) {
    assert(a.D % 8 == 0 && a.D <= 8 * 1024 && a.count <= most_groups);
    const double elements = double(N) * a.D;
    s.launch("norm", /*bytes=*/elements * (2 + 4 + (a.parts ? 4 * a.count + 4 : 0)), norm_kernel,
             dim3(N), ceil_div(a.D / 8, 32) * 32, 0, a);
}

// [3] Memory --------------------------------------------------------------------------------------

CudaModel::CudaModel(const Checkpoint& checkpoint, const CudaOptions& options_)
    : c(checkpoint.config), options(options_) {
    assert(c.max_positions <= most_slots * chunk_keys);  // one row fits in a span
    const cudaDeviceProp gpu = properties();
    stream.programmatic = gpu.major >= 9;
    stream.processors = gpu.multiProcessorCount;
    for (int l = 0; l < c.L; l++)
        layer_in_pool.push_back(layers_of[c.global[size_t(l)] ? global_pool : local_pool]++);
    const auto matrices = w.matrices(c, checkpoint.weights);
    size_t weights = 0, workspace = 0;
    for (const DeviceMatrix& m : matrices) weights += DeviceWeights::span(m) * sizeof(bf16);
    const auto add = [&](auto& memory, size_t n) { workspace += n * sizeof(*memory.data); };
    each_activation(add);
    size_t free_bytes, total;
    CUDA(cudaMemGetInfo(&free_bytes, &total));
    const double room = options.memory_utilization * double(total) - double(total - free_bytes);
    if (double(weights + workspace) > room) {
        throw Error(
            text("the model needs %.2f GB for weights and %.2f GB for steps of %d tokens, and "
                 "%.2f of the %.2f GB of %s leaves %.2f GB: take a smaller model, or change "
                 "--max-num-batched-tokens or --gpu-memory-utilization",
                 double(weights) / 1e9, double(workspace) / 1e9, options.max_batched_tokens,
                 options.memory_utilization, double(total) / 1e9, gpu.name, room / 1e9));
    }
    CUDA(cudaStreamCreateWithFlags(&stream.stream, cudaStreamNonBlocking));
    w.upload(matrices);
    each_activation([](auto& memory, size_t count) { memory.reserve(count); });
    std::vector<float> frequencies;
    for (const Pool pool : pools) {
        for (int i = 0; i < c.E / 2; i++)
            frequencies.push_back(float(std::pow(c.theta[pool], -2. * i / c.E)) /
                                  c.rope_divisor[pool]);
    }
    CUDA(cudaMemcpy(inv_freq.data, frequencies.data(), frequencies.size() * sizeof(float),
                    cudaMemcpyHostToDevice));
}

// Calls each(memory, elements) for all that a step computes in.
template <class Each>
void CudaModel::each_activation(Each each) {
    const int most_rows = std::max(options.max_batched_tokens, most_outputs);
    const size_t N = size_t(ceil_div(most_rows, 128)) * 128;
    const auto D = size_t(c.D), F = size_t(c.F), E = size_t(c.E), H = size_t(c.H);
    const size_t HE = H * E, GE = size_t(c.G) * E;
    each(h, N * D);
    each(parts, size_t(std::max(groups_of(c.F), groups_of(int(HE)))) * N * D);
    each(x, N * D);
    each(qkv, N * (HE + 2 * GE));
    each(attended, N * HE);
    each(gated, N * F);
    for (auto& table : cos_sin) each(table, N * E);
    each(inv_freq, E);
    each(chunk_out, most_slots * HE);
    each(chunk_sums, most_slots * H);
    each(logits, most_outputs * size_t(c.rows()));
    each(best, most_outputs * size_t(blocks_of(c.V)));
}

CudaModel::~CudaModel() {
    drop_graphs();
    CUDA(cudaStreamDestroy(stream.stream));
}

void CudaModel::drop_graphs() {
    for (const auto& [rows, graph] : graphs) CUDA(cudaGraphExecDestroy(graph.exec));
    graphs.clear();
}

KvMemory CudaModel::kv_memory() const {
    size_t free_bytes, total;
    CUDA(cudaMemGetInfo(&free_bytes, &total));
    const double room = options.memory_utilization * double(total) - double(total - free_bytes);
    // A step's inputs grow later, with the longest row: 8 bytes a page and row, and the bitsets.
    return {uint64_t(std::max(0., room - double(64 << 20))),
            {page_size(local_pool) * sizeof(bf16), page_size(global_pool) * sizeof(bf16)}};
}

void CudaModel::allocate_pages(const int (&pages)[2]) {
    for (const Pool pool : pools) {
        const size_t size = std::max<size_t>(1, size_t(pages[pool]) * page_size(pool));
        // Another process may have taken the memory since kv_memory().
        if (!kv[pool].try_reserve(size))
            throw Error(
                text("the GPU has no %.2f GB left for %d pages of K and V: end what else "
                     "runs on it, or lower --gpu-memory-utilization",
                     double(size * sizeof(bf16)) / 1e9, pages[pool]));
    }
}

// [4] Packing -------------------------------------------------------------------------------------

Ask ask_of(const Output& o) {
    const Sampling& s = o.sampling;
    Ask r{};
    r.scale = s.temperature < 1e-5f ? 0 : float(log2e / s.temperature);
    r.top_k = s.top_k;
    r.top_p = s.top_p;
    // The likeliest id weighs 2^40. An id that weighs less than 1 is never drawn.
    r.least_weight = std::max<uint64_t>(1, uint64_t(s.min_p * 0x1p40f));
    const auto mix = [](uint64_t x) {  // SplitMix64's finaliser; twin: hash
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        return x ^ (x >> 31);
    };
    r.hash = mix(s.seed + 0x9e3779b97f4a7c15u * (uint64_t(o.index) + 1) + mix(s.seed));
    r.target = o.target;
    r.logprobs = s.logprobs;
    r.allowed = -1;
    return r;
}

// Packs a step's inputs, one array behind the other, and copies them to the device at once. Rows
// that fill a bucket have one token, 0 at position 0, no page and no chunk, and nobody reads what
// they compute.
StepShape CudaModel::pack(const Batch& b, int bucket) {
    StepShape shape;
    shape.N = bucket ? bucket : int(b.tokens.size());
    shape.R = bucket ? bucket : int(b.row_start.size()) - 1;
    shape.outputs = bucket ? bucket : int(b.outputs.size());
    reserve_inputs(b, shape);
    inputs_used = 0;
    // A graph keeps the addresses of its capture, so the order is a rule. First the arrays whose
    // sizes follow from N, R and outputs, which a bucket fixes; a new array goes here (and its
    // bytes into reserve_inputs).
    pack_rows(b, shape);
    pack_outputs(b, shape);
    pack_pages(b, shape);  // grows with the longest row, so it is the last that a graph reads
    pack_adjustments(b);   // which no graph reads (see bucket_of)
    CUDA(cudaMemcpyAsync(device_inputs.data, inputs.data, inputs_used, cudaMemcpyHostToDevice,
                         stream.stream));
    return shape;
}

void CudaModel::reserve_inputs(const Batch& b, const StepShape& shape) {
    const auto N = size_t(shape.N), R = size_t(shape.R), outputs = size_t(shape.outputs);
    size_t adjusted = 0;
    for (const Output& o : b.outputs) adjusted += o.adjustments.size();
    constexpr size_t arrays = 16;  // at most; each begins at a multiple of 16 bytes
    const size_t bytes = (3 * N + 4 * (R + 1) + outputs) * sizeof(int) +
                         size_t(b.pages_per_row) * R * sizeof(PagePair) + outputs * sizeof(Ask) +
                         adjusted * sizeof(DeviceAdjustment) + arrays * 16;
    bool moved = inputs.reserve(bytes);
    if (device_inputs.reserve(inputs.size)) moved = true;
    if (ids.reserve(outputs)) moved = true;
    if (details.reserve(outputs)) moved = true;
    if (moved) drop_graphs();
}

// The next array of the inputs, of zeros: returns where the host writes it; `device` becomes where
// kernels read it.
template <class T>
T* CudaModel::add_input(const T*& device, size_t count) {
    T* const host = reinterpret_cast<T*>(inputs + inputs_used);
    device = reinterpret_cast<const T*>(device_inputs + inputs_used);
    inputs_used += (count * sizeof(T) + 15) / 16 * 16;
    if (inputs_used > inputs.size) throw std::logic_error("reserve_inputs counts too few bytes");
    std::memset(static_cast<void*>(host), 0, count * sizeof(T));
    return host;
}

void CudaModel::pack_rows(const Batch& b, StepShape& shape) {
    const int rows = int(b.row_start.size()) - 1;
    const auto N = size_t(shape.N), R = size_t(shape.R);
    tables.R = shape.R;
    std::copy(b.tokens.begin(), b.tokens.end(), add_input(tables.tokens, N));
    std::copy(b.positions.begin(), b.positions.end(), add_input(tables.positions, N));
    int* row_of = add_input(tables.row_of, N);
    int* row_start = add_input(tables.row_start, R + 1);
    int* chunk_start[] = {add_input(tables.chunk_start[0], R + 1),
                          add_input(tables.chunk_start[1], R + 1)};
    int* tile_start = add_input(tables.tile_start, R + 1);
    StepShape::Span span{0, 0, {0, 0}};
    for (int r = 0; r < shape.R; r++) {
        const bool real = r < rows;
        const int first = real ? b.row_start[size_t(r)] : r;
        const int count = real ? b.row_start[size_t(r) + 1] - first : 1;
        const int last_chunk = real ? b.positions[size_t(first)] / chunk_keys : 0;
        std::fill_n(row_of + first, count, r);
        row_start[r + 1] = first + count;
        int chunks[2] = {0, 0};
        if (real && count == 1) {
            const int from = std::max(0, b.positions[size_t(first)] - c.W + 1) / chunk_keys;
            chunks[global_pool] = last_chunk + 1;
            chunks[local_pool] = last_chunk + 1 - from;
        }
        // A tile has query_rows rows: tokens by the heads that share a KV head.
        const int tiles = count > 1 ? ceil_div(count, query_rows / (c.H / c.G)) : 0;
        tile_start[r + 1] = tile_start[r] + tiles;
        if (span.chunks[global_pool] + chunks[global_pool] > most_slots) {
            shape.spans.push_back(span);
            span = {r, 0, {0, 0}};
        }
        span.rows++;
        for (const Pool pool : pools) {
            chunk_start[pool][r + 1] = chunk_start[pool][r] + chunks[pool];
            span.chunks[pool] += chunks[pool];
        }
    }
    if (span.chunks[global_pool] > 0) shape.spans.push_back(span);
    shape.tiles = tile_start[R];
}

void CudaModel::pack_outputs(const Batch& b, StepShape& shape) {
    const auto outputs = size_t(shape.outputs);
    int* const output_token = add_input(tables.output_token, outputs);
    Ask* const ask = add_input(asks, outputs);
    const std::vector<int> places = pack_bitsets(b);
    int next_adjustment = 0;  // as pack_adjustments lays them out
    for (size_t i = 0; i < b.outputs.size(); i++) {
        const Output& o = b.outputs[i];
        output_token[i] = o.token;
        ask[i] = ask_of(o);
        ask[i].first_adjustment = next_adjustment;
        ask[i].adjustments = int(o.adjustments.size());
        next_adjustment += int(o.adjustments.size());
        ask[i].allowed = places[i];
        if (!o.adjustments.empty() && o.target < 0) shape.adjusted = true;
        if (o.target >= 0 || o.sampling.logprobs >= 0) shape.logprobs = true;
    }
    // Outputs that fill a bucket are zeros. A target, 0, is not sampled; no bucket wants logprobs;
    // -1 keeps best_kernel from reading a bitset that is not there.
    for (size_t i = b.outputs.size(); i < outputs; i++) ask[i].allowed = -1;
}

// [pages][R], the transpose of Batch's: then an entry's address depends on R, which a bucket fixes,
// and not on the longest row.
void CudaModel::pack_pages(const Batch& b, const StepShape& shape) {
    const auto rows = b.row_start.size() - 1;
    const auto R = size_t(shape.R), pages = size_t(b.pages_per_row);
    PagePair* const table = add_input(tables.pages, pages * R);
    for (size_t i = 0; i < pages; i++) {
        for (size_t r = 0; r < R; r++) {
            PagePair& entry = table[i * R + r];
            entry.local = r < rows ? b.pages[local_pool][r * pages + i] : -1;
            entry.global = r < rows ? b.pages[global_pool][r * pages + i] : -1;
        }
    }
}

// One output's behind the other's.
void CudaModel::pack_adjustments(const Batch& b) {
    size_t adjusted = 0;
    for (const Output& o : b.outputs) adjusted += o.adjustments.size();
    DeviceAdjustment* adjustment = add_input(adjustments, adjusted);
    for (const Output& o : b.outputs) {
        for (const Adjustment& made : o.adjustments) {
            *adjustment = {made, /*raw=*/0};
            adjustment++;
        }
    }
}

// Bitsets have memory of their own, lest their number move the inputs that a graph reads. Returns
// where each output's begins, or -1: outputs that share one share its place.
std::vector<int> CudaModel::pack_bitsets(const Batch& b) {
    std::vector<int> places(b.outputs.size(), -1);
    size_t words = 0, used = 0;
    for (const Output& o : b.outputs) words += o.allowed ? o.allowed->size() : 0;
    if (words == 0) return places;
    bool moved = bitsets.reserve(std::bit_ceil(words));  // lest each new row drop the graphs
    if (device_bitsets.reserve(bitsets.size)) moved = true;
    if (moved) drop_graphs();
    std::unordered_map<const std::vector<uint32_t>*, int> known;
    for (size_t i = 0; i < b.outputs.size(); i++) {
        const Output& o = b.outputs[i];
        if (!o.allowed || o.target >= 0) continue;
        const auto [place, is_new] = known.insert({o.allowed.get(), int(used)});
        places[i] = place->second;
        if (!is_new) continue;
        std::copy(o.allowed->begin(), o.allowed->end(), bitsets + used);
        used += o.allowed->size();
    }
    CUDA(cudaMemcpyAsync(device_bitsets.data, bitsets.data, used * sizeof(uint32_t),
                         cudaMemcpyHostToDevice, stream.stream));
    return places;
}

// [5] Steps ---------------------------------------------------------------------------------------

// A step can replay a graph if every row has one token, no output wants adjustments, logprobs
// or a target, and one launch of attend_rows a layer has room for all chunks. Returns the
// step's rows, rounded up to a size that is captured, or 0: no graph.
int CudaModel::bucket_of(const Batch& b) {
    const auto R = int(b.row_start.size()) - 1;
    if (int(b.tokens.size()) != R || R > most_outputs || int(b.outputs.size()) > R) return 0;
    for (const Output& o : b.outputs) {
        if (!o.adjustments.empty() || o.target >= 0 || o.sampling.logprobs >= 0) return 0;
    }
    int chunks = 0;  // in the global pool
    for (const int position : b.positions) chunks += position / chunk_keys + 1;
    if (chunks > most_slots) return 0;
    for (int rows : {1, 2, 4, 8}) {
        if (R <= rows) return rows;
    }
    return ceil_div(R, 16) * 16;
}

void CudaModel::replay(const StepShape& shape) {
    auto found = graphs.find(shape.R);
    if (found == graphs.end()) {
        cudaGraph_t captured;
        cudaGraphExec_t exec;
        CUDA(cudaStreamBeginCapture(stream.stream, cudaStreamCaptureModeThreadLocal));
        forward(shape);
        CUDA(cudaStreamEndCapture(stream.stream, &captured));
        CUDA(cudaGraphInstantiate(&exec, captured, 0));
        CUDA(cudaGraphDestroy(captured));
        found = graphs.insert({shape.R, {exec, tables.pages}}).first;
    }
    // The page table is the last input that a graph reads (see pack): if it lies where it lay, so
    // do those before it.
    if (found->second.pages != tables.pages)
        throw std::logic_error("the inputs that a graph reads have moved");
    CUDA(cudaGraphLaunch(found->second.exec, stream.stream));
}

Results CudaModel::step(const Batch& b) {
    if (b.tokens.empty()) return {};
    assert(int(b.tokens.size()) <= options.max_batched_tokens);
#ifndef NDEBUG
    for (const Pool pool : pools) {
        for (const int page : b.dead[pool])
            CUDA(cudaMemsetAsync(kv[pool] + size_t(page) * page_size(pool), 0xff,
                                 page_size(pool) * sizeof(bf16), stream.stream));  // NaN
    }
#endif
    const int bucket = bucket_of(b);
    const StepShape shape = pack(b, bucket);
    if (bucket) {
        replay(shape);
    } else {
        forward(shape);
    }
    CUDA(cudaStreamSynchronize(stream.stream));
    Results results(b.outputs.size());
    for (size_t i = 0; i < results.size(); i++) {
        results[i].id = ids.data[i];
        const int wanted = b.outputs[i].sampling.logprobs;  // at most 20, as Details has room for
        if (b.outputs[i].target < 0 && wanted < 0) continue;
        const Details& d = details.data[i];
        results[i].logprob = d.logprob;
        results[i].rank = d.rank;
        for (int j = 0; j < std::min(wanted, c.V); j++)
            results[i].top.push_back({d.ids[j], d.logprobs[j]});
    }
    return results;
}

}  // namespace

std::unique_ptr<Model> open_cuda(const Checkpoint& checkpoint, const CudaOptions& options) {
    int driver, runtime;
    CUDA(cudaDriverGetVersion(&driver));
    CUDA(cudaRuntimeGetVersion(&runtime));
    const cudaDeviceProp gpu = properties();
    say_step(
        text("CUDA context: %s, compute capability %d.%d, %.1f GB; driver for CUDA %s, "
             "runtime %s",
             gpu.name, gpu.major, gpu.minor, double(gpu.totalGlobalMem) / 1e9,
             version(driver).c_str(), version(runtime).c_str()));
    auto model = std::make_unique<CudaModel>(checkpoint, options);
    say_step(text("uploaded: %.2f GB of weights", double(checkpoint.bytes) / 1e9));
    return model;
}

}  // namespace gemma
