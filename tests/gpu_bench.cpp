// SPDX-License-Identifier: Apache-2.0
//
// gpu_bench [start] [decode] [prefill] [kernels] [http] [structured]: the CUDA engine's speed, on a
// full-size random Gemma 3 1B in build/random-1b; all sections if none is named. ./dev gpu runs it
// last.
//
//   start     exec to the first token that a client has
//   decode    steps of one token a row, beside the bound: reading the weights, and the K and V of
//             the context, once, at the read bandwidth that is measured first
//   prefill   one prompt
//   kernels   each kernel of a step alone: shows the next bottleneck
//   http      64 clients, and the engine alone on the same work
//   structured  the same, each client with a schema of its own, against free text
//
// A device time is measured between two events around replays of a graph, which holds the launches
// of the production code.
#include "../gemma.cu"

#include <set>

#include "bench.h"

namespace bench {
namespace {

constexpr int step_tokens = 4096;  // the server's default
constexpr int unending = 1000;     // max_tokens that no row here reaches
const char* const directory = "build/random-1b";

// [1] Measuring -----------------------------------------------------------------------------------

__global__ void fill_kernel(uint4* to) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    uint64_t x = (i + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    const auto lo = uint32_t(x), hi = uint32_t(x >> 32);
    to[i] = {lo, hi, lo * 0x85ebca6bu, hi * 0xc2b2ae35u};
}

constexpr int loads = 8;  // of 16 bytes in flight, a thread
__global__ void read_kernel(const uint4* from, uint32_t* sink) {
    const uint4* mine = from + size_t(blockIdx.x) * blockDim.x * loads + threadIdx.x;
    uint4 v[loads];
#pragma unroll
    for (int i = 0; i < loads; i++) v[i] = load_stream(mine + i * int(blockDim.x));
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < loads; i++) sum ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    if (sum == 0x12345678) *sink = sum;  // uses the loads, so they are not removed
}

struct Events {
    cudaEvent_t start, stop;
    Events() {
        CUDA(cudaEventCreate(&start));
        CUDA(cudaEventCreate(&stop));
    }
    ~Events() { cudaEventDestroy(start), cudaEventDestroy(stop); }
    double seconds() {
        float ms;
        CUDA(cudaEventSynchronize(stop));
        CUDA(cudaEventElapsedTime(&ms, start, stop));
        return ms * 1e-3;
    }
};

// Bytes per second of a plain read of 4 GB, best of five. The bytes are random: zeros take less
// power, so the GPU might clock higher.
double read_bandwidth() {
    constexpr size_t bytes = size_t(4) << 30;
    constexpr unsigned threads = 256;
    Memory<char> memory;
    Memory<uint32_t> sink;
    memory.reserve(bytes), sink.reserve(1);
    auto* data = reinterpret_cast<uint4*>(memory.data);
    fill_kernel<<<unsigned(bytes / 16 / threads), threads>>>(data);
    Events events;
    double best = 0;
    for (int round = 0; round < 6; round++) {  // the first warms up
        CUDA(cudaEventRecord(events.start));
        read_kernel<<<unsigned(bytes / 16 / threads / loads), threads>>>(data, sink.data);
        CUDA(cudaEventRecord(events.stop));
        const double seconds = events.seconds();
        if (round) best = std::max(best, double(bytes) / seconds);
    }
    return best;
}

// Device seconds of the launches that `record` makes: the mean over some 50 ms of graph replays.
template <class Record>
double device_time(Stream& stream, Record record) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA(cudaStreamBeginCapture(stream.stream, cudaStreamCaptureModeThreadLocal));
    record();
    CUDA(cudaStreamEndCapture(stream.stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    CUDA(cudaGraphDestroy(graph));
    Events events;
    const auto replay = [&](int times) {
        CUDA(cudaEventRecord(events.start, stream.stream));
        for (int i = 0; i < times; i++) CUDA(cudaGraphLaunch(exec, stream.stream));
        CUDA(cudaEventRecord(events.stop, stream.stream));
        return events.seconds() / times;
    };
    replay(2);
    const int times = std::clamp(int(0.05 / replay(3)), 5, 500);
    const double seconds = replay(times);
    CUDA(cudaGraphExecDestroy(exec));
    return seconds;
}

// [2] Work ----------------------------------------------------------------------------------------

struct Setup {
    const Checkpoint& checkpoint;
    CudaModel& model;
    int pages[2];
    double bandwidth;  // bytes per second
    const Config& c;

    Limits limits(int tokens = step_tokens) const {
        return {256, tokens, c.W, {pages[0], pages[1]}};
    }
};

using Profile = std::map<std::string, std::pair<int, double>>;  // kernel -> launches, bytes

Profile profile_of(CudaModel& model, const StepShape& shape) {
    Profile profile;
    model.stream.profile = &profile;
    model.forward(shape);
    model.stream.profile = nullptr;
    CUDA(cudaStreamSynchronize(model.stream.stream));
    return profile;
}

double keys_of(const Config& c, int layer, double context) {
    return c.global[size_t(layer)] ? context : std::min(context, double(c.W));
}

double step_bytes(const Setup& s, const Batch& b) {
    double bytes = double(s.checkpoint.bytes);
    for (const int position : b.positions) {
        for (int l = 0; l < s.c.L; l++)
            bytes += keys_of(s.c, l, position + 1) * 2 * 2 * s.c.G * s.c.E;  // K and V, bf16
    }
    return bytes;
}

void add_prompts(const Setup& s, Scheduler& scheduler, int count, int prompt, int tokens,
                 Sampling sampling) {
    for (int i = 0; i < count; i++) {
        sampling.seed = uint64_t(i);
        const auto ids = random_ids(prompt, uint64_t(1000 + i), s.c.vocab);
        scheduler.add(sequence(ids, tokens, sampling));
    }
}

// Runs steps until one consists of `rows` rows that decode.
void until_decode(const Setup& s, Scheduler& scheduler, int rows) {
    for (bool decodes = false; !decodes;) {
        const Batch& b = scheduler.next();
        decodes = int(b.tokens.size()) == rows && int(b.outputs.size()) == rows;
        scheduler.finish(s.model.step(b));
    }
}

// Floating-point operations of a prompt: linear layers, attention, and one row of logits.
double linear_flops(const Config& c, const std::string& name) {
    const double D = c.D, F = c.F, HE = c.H * c.E, GE = c.G * c.E;
    if (name == "qkv") return 2 * D * (HE + 2 * GE);
    if (name == "o") return 2 * HE * D;
    if (name == "gate_up") return 4 * D * F;
    if (name == "down") return 2 * D * F;
    return 0;
}
double attention_flops(const Config& c, int tokens) {  // of all layers
    double keys = 0;
    for (int l = 0; l < c.L; l++) {
        for (int n = 0; n < tokens; n++) keys += keys_of(c, l, n + 1);
    }
    return keys * 4 * c.H * c.E;
}
double prompt_flops(const Config& c, int tokens) {
    double flops = attention_flops(c, tokens) + 2. * c.D * c.V;
    for (const char* name : {"qkv", "o", "gate_up", "down"})
        flops += linear_flops(c, name) * tokens * c.L;
    return flops;
}

// [3] Sections ------------------------------------------------------------------------------------

void start() {
    std::vector<double> first, ready;
    for (int round = 0; round < 3; round++) {
        Server server(directory, {"--gpu-memory-utilization", "0.5"});
        const double posted = now() - server.started;
        first.push_back(posted + read_streams(server.port, {{2, 1000, 2000, 3000}}, 1).first);
        server.wait();
        ready.push_back(server.ready);
    }
    row("exec to first token, file in page cache", text("%.2f s", median(first)),
        text("%.2f, %.2f, %.2f s; ready %.2f s", first[0], first[1], first[2], median(ready)));
}

struct Rate {
    double step, device;  // seconds
    double bytes;
    int launches;
};

// Times steps of `batch` rows at contexts around `context`; the device time is taken half-way.
Rate decode(const Setup& s, int batch, int context, const Sampling& sampling) {
    constexpr int warm = 8, half = 32;
    Scheduler scheduler(s.limits());
    // Rows whose prefill is done first decode while others are in prefill, so contexts differ.
    add_prompts(s, scheduler, batch, context - warm - half, unending, sampling);
    until_decode(s, scheduler, batch);
    const auto steps = [&](int count) {
        const double from = now();
        for (int i = 0; i < count; i++) scheduler.finish(s.model.step(scheduler.next()));
        return now() - from;
    };
    steps(warm);
    Rate rate{};
    rate.step = steps(half);
    const Batch& b = scheduler.next();
    const StepShape shape = s.model.pack(b, CudaModel::bucket_of(b));
    rate.bytes = step_bytes(s, b);
    rate.device = device_time(s.model.stream, [&] { s.model.forward(shape); });
    for (const auto& entry : profile_of(s.model, shape)) rate.launches += entry.second.first;
    scheduler.finish(s.model.step(b));
    rate.step = (rate.step + steps(half)) / (2 * half);
    return rate;
}

const Sampling greedy{.temperature = 0};
const Sampling usual{.temperature = 1, .top_k = 64, .top_p = 0.95f};
const Sampling nucleus{.temperature = 1, .top_p = 0.95f};
const Sampling with_logprobs{.temperature = 0, .logprobs = 5};

void decode_rows(const Setup& s) {
    const auto print = [&](const std::string& what, int batch, const Rate& r) {
        row(what, text("%.0f tok/s", batch / r.step),
            text("%.0f %% of bound; %.0f us, host %.0f", 100 * r.bytes / s.bandwidth / r.step,
                 1e6 * r.step, 1e6 * (r.step - r.device)));
    };
    std::map<int, Rate> rates;
    for (const int batch : {1, 8, 16, 64, 256}) {
        rates[batch] = decode(s, batch, 1024, greedy);
        print(text("decode at 1k, batch %d", batch), batch, rates[batch]);
    }
    for (const int batch : {1, 64, 256}) {
        print(text("  top-k 64, top-p 0.95, batch %d", batch), batch,
              decode(s, batch, 1024, usual));
    }
    for (const int batch : {1, 64}) {
        print(text("  top-p 0.95 alone, batch %d", batch), batch, decode(s, batch, 1024, nucleus));
        print(text("  5 logprobs, batch %d", batch), batch, decode(s, batch, 1024, with_logprobs));
    }
    const Rate far = decode(s, 1, 32700, greedy);
    row("decode at 32k, batch 1", text("%.0f tok/s", 1 / far.step),
        text("%.0f %% of its rate at 1k; %.0f %% of bound", 100 * rates[1].step / far.step,
             100 * far.bytes / s.bandwidth / far.step));
    for (const int batch : {1, 8, 64}) {
        const Rate& r = rates[batch];
        const double seconds = r.bytes / 300e9 + r.launches * 2e-6;
        row(text("predicted, not measured: L4, batch %d", batch),
            text("%.0f tok/s", batch / seconds),
            text("%.2f GB at 300 GB/s, %d kernels of 2 us", r.bytes / 1e9, r.launches));
    }
}

double prefill(const Setup& s, int prompt, int tokens) {
    std::vector<double> seconds;
    for (int round = 0; round < 4; round++) {  // the first warms up
        Scheduler scheduler(s.limits(tokens));
        add_prompts(s, scheduler, 1, prompt, 1, greedy);
        const double from = now();
        run(s.model, scheduler);
        if (round) seconds.push_back(now() - from);
    }
    return median(seconds);
}

void prefill_rows(const Setup& s) {
    for (const int tokens : {step_tokens, 2 * step_tokens}) {
        for (const int prompt : {1024, 8192, 30720}) {
            if (prompt < tokens && tokens > step_tokens) continue;  // the same as before
            const double t = prefill(s, prompt, tokens);
            row(text("prefill of %d, steps of %d", prompt, std::min(prompt, tokens)),
                text("%.1f ms", 1e3 * t),
                text("%.0f tok/s, %.0f TFLOP/s", prompt / t, prompt_flops(s.c, prompt) / t / 1e12));
        }
    }
}

// Times, for each kernel, a step that runs this kernel only. Kernels with few launches a step are
// recorded several times, so that the start of the graph does not count.
void kernel_rows(const Setup& s, const std::string& step, const Batch& b, bool prompt) {
    CudaModel& model = s.model;
    const StepShape shape = model.pack(b, CudaModel::bucket_of(b));
    const double whole = device_time(model.stream, [&] { model.forward(shape); });
    const Profile profile = profile_of(model, shape);
    double sum = 0;
    for (const auto& [name, launches_bytes] : profile) {
        const auto [launches, bytes] = launches_bytes;
        const int times = std::max(1, 24 / launches);
        model.stream.only = name.c_str();
        const double seconds = device_time(model.stream,
                                           [&] {
                                               for (int i = 0; i < times; i++) model.forward(shape);
                                           }) /
                               times;
        model.stream.only = nullptr;
        sum += seconds;
        double flops = linear_flops(s.c, name) * shape.N * launches;
        if (name == "attention of tiles") flops = attention_flops(s.c, shape.N);
        const std::string rate = prompt && flops > 0
                                     ? text("%4.0f TFLOP/s", flops / seconds / 1e12)
                                     : text("%4.0f %%", 100 * bytes / s.bandwidth / seconds);
        std::printf("%-8s %-18s %3d x %8.2f us %9.3f MB %s\n", step.c_str(), name.c_str(), launches,
                    1e6 * seconds / launches, bytes / launches / 1e6, rate.c_str());
    }
    std::printf("%-8s %-18s       %8.1f us, kernels alone %.1f us\n", step.c_str(), "whole step",
                1e6 * whole, 1e6 * sum);
    std::fflush(stdout);
}

void kernel_table(const Setup& s) {
    std::printf("\nstep     kernel, launches a step, each: time, bytes, share of the read rate\n");
    for (const int batch : {1, 64, 256}) {
        Scheduler scheduler(s.limits());
        add_prompts(s, scheduler, batch, 1020, unending, greedy);
        until_decode(s, scheduler, batch);
        kernel_rows(s, text("batch %d", batch), scheduler.next(), false);
    }
    Scheduler scheduler(s.limits());
    add_prompts(s, scheduler, 1, step_tokens, 1, greedy);
    kernel_rows(s, "prefill", scheduler.next(), true);
    std::printf("\n");
}

constexpr int clients = 64, in = 1024, out = 128;

// Tokens per second of the engine alone, all requests at once. The second round counts, since the
// first one captures graphs.
double engine_rate(const Setup& s) {
    double seconds = 0;
    for (int round = 0; round < 2; round++) {
        Scheduler scheduler(s.limits());
        add_prompts(s, scheduler, clients, in, out, greedy);
        const double from = now();
        run(s.model, scheduler);
        seconds = now() - from;
    }
    return clients * out / seconds;
}

void http_rows(double engine, int vocab) {
    Server server(directory, {"--gpu-memory-utilization", "0.5"});
    server.wait();
    uint64_t seed = 1;
    const auto streams = [&](int count) {
        std::vector<std::vector<int>> prompts;
        for (int i = 0; i < count; i++) prompts.push_back(random_ids(in, seed++ << 20, vocab));
        return read_streams(server.port, prompts, out, {{"temperature", 0}});
    };
    row(text("engine alone, %d x %d in, %d out", clients, in, out), text("%.0f tok/s out", engine),
        "");
    for (const int count : {clients, 1}) {
        streams(count);  // not counted: it captures graphs
        const Streams many = streams(count);
        std::string rest = text("TTFT %.1f ms, TPOT %.2f ms", 1e3 * many.first, 1e3 * many.each);
        if (count == clients)
            rest = text("%.0f %% of the engine; ", 100 * many.tokens_per_second / engine) + rest;
        row(text("through HTTP, %d client%s", count, count > 1 ? "s" : ""),
            text("%.0f tok/s out", many.tokens_per_second), rest);
    }
}

// A schema of its own for each client, whose documents are longer than `out` tokens.
std::vector<json> schemas() {
    std::vector<json> all;
    for (int i = 0; i < clients; i++) {
        const json properties{
            {text("a_name_%d", i), {{"type", "string"}, {"maxLength", 100 + i}}},
            {text("b_kind_%d", i), {{"enum", {"red", "green", text("blue %d", i)}}}},
            {text("c_count_%d", i), {{"type", "integer"}, {"minimum", 1}, {"maximum", 900 + i}}},
            {text("d_list_%d", i),
             {{"type", "array"}, {"minItems", 1000}, {"items", {{"type", "string"}}}}}};
        json required = json::array();
        for (const auto& [name, schema] : properties.items()) required.push_back(name);
        all.push_back({{"guided_json",
                        {{"type", "object"}, {"properties", properties}, {"required", required}}}});
    }
    return all;
}

// Text of 64 schemas against free text, of 64 clients each, in turn; the first round is not
// counted.
void structured_rows(int vocab) {
    // Nobody reads its log, whose lines would fill the pipe.
    Server server(directory, {"--gpu-memory-utilization", "0.5", "--disable-log-requests"});
    server.wait();
    const std::vector<json> own = schemas();
    double free = 0, bound = 0;
    for (int round = 0; round < 3; round++) {
        std::vector<std::vector<int>> prompts;
        for (int i = 0; i < clients; i++)
            prompts.push_back(random_ids(in, uint64_t(1000 + round * clients + i) << 20, vocab));
        free = read_streams(server.port, prompts, out, {{"temperature", 1}}).tokens_per_second;
        for (auto& prompt : prompts) prompt[0]++;  // not from the prefix cache
        bound =
            read_streams(server.port, prompts, out, {{"temperature", 1}}, own).tokens_per_second;
        if (round == 0)
            row("64 schemas, each seen for the first time", text("%.0f tok/s out", bound),
                text("%.0f %% of free text", 100 * bound / free));
    }
    row("64 schemas, each in its third text", text("%.0f tok/s out", bound),
        text("%.0f %% of free text, %.0f tok/s", 100 * bound / free, free));
}

std::string driver() {
    int cuda = 0;
    CUDA(cudaDriverGetVersion(&cuda));
    std::ifstream in_kernel("/proc/driver/nvidia/version");
    for (std::string word; in_kernel >> word;) {
        if (std::isdigit(static_cast<unsigned char>(word[0])) && word.find('.') != word.npos)
            return word + ", CUDA " + version(cuda);
    }
    return "for CUDA " + version(cuda);
}

void on_the_engine(const std::set<std::string>& sections) {
    const Checkpoint checkpoint(directory);
    const Config& c = checkpoint.config;
    const double bandwidth = read_bandwidth();
    row("read bandwidth, 4 GB", text("%.0f GB/s", bandwidth / 1e9), "");
    double engine = 0;
    {
        CudaModel model(checkpoint, {2 * step_tokens, 0.9});
        // Local pages: 256 windows and one step. Global pages: 256 rows of 1,300 tokens.
        const int window = c.W / page_tokens + 2, step = 2 * step_tokens / page_tokens;
        const int pages[2] = {256 * (window + 1) + step, 256 * 1300 / page_tokens};
        model.allocate_pages(pages);
        const Setup setup{checkpoint, model, {pages[0], pages[1]}, bandwidth, c};
        if (sections.count("decode")) decode_rows(setup);
        if (sections.count("prefill")) prefill_rows(setup);
        if (sections.count("kernels")) kernel_table(setup);
        if (sections.count("http")) engine = engine_rate(setup);
    }
    if (sections.count("http")) http_rows(engine, c.vocab);
    if (sections.count("structured")) structured_rows(c.vocab);
}

int main(int argc, char** argv) try {
    std::set<std::string> sections(argv + 1, argv + argc);
    if (sections.empty())
        sections = {"start", "decode", "prefill", "kernels", "http", "structured"};
    const std::string missing = cuda_missing();
    if (!missing.empty()) throw Error(missing);
    cudaDeviceProp gpu;
    CUDA(cudaGetDeviceProperties(&gpu, 0));
    std::printf("gpu_bench, %s, driver %s, commit %s, %s\n", gpu.name, driver().c_str(),
                commit().c_str(), today().c_str());
    const double from = now();
    make_1b(directory);
    std::printf("random 1B, bf16; made in %.1f s\n\n", now() - from);
    row("what", "measured", "in this run");
    row("---", "---", "---");
    if (sections.count("start")) start();
    sections.erase("start");
    if (!sections.empty()) on_the_engine(sections);
    std::printf("%.0f s in all\n", now() - from);
    return 0;
} catch (const std::exception& e) {
    say(e.what(), Severity::error);
    return 1;
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) { return bench::main(argc, argv); }
