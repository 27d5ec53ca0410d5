// SPDX-License-Identifier: Apache-2.0
//
// main.cpp: from a command line to a server that answers, and from SIGTERM to the last answer.
// Beside the path.
//
//   [1] Memory    how many pages each pool gets
//   [2] Start
//   [3] Stop
#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <future>
#include <optional>

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <httplib.h>

#include "container.h"
#include "flags.h"

namespace gemma {

extern const char* const build_name;  // CMakeLists.txt writes it: "0.1.0 (commit 231a576)"

// [1] Memory --------------------------------------------------------------------------------------

// Divides an engine's memory between the pools (docs/design.md, "Pages"), and finds max_model_len.
struct MemorySplit {
    Limits limits;
    int max_model_len;
};
MemorySplit split_memory(const Config& c, const Options& o, const KvMemory& memory) {
    Limits limits{int(o.max_num_seqs), int(o.max_num_batched_tokens), c.W, {0, 0}};
    const int64_t window = limits.window_pages();
    const int64_t step = Limits::pages_for(limits.max_batched_tokens) + 1;
    const int64_t local_bytes = int64_t(memory.page[local_pool]);
    const int64_t global_bytes = std::max<int64_t>(1, int64_t(memory.page[global_pool]));
    const int64_t budget = int64_t(memory.budget);
    // First, one sequence of max_model_len must fit. Its pages in the global pool:
    int64_t room = std::max<int64_t>(0, budget - (window + step) * local_bytes) / global_bytes;
    if (o.pages > 0) room = o.pages >= window ? o.pages : 0;
    const int asked = o.max_model_len > 0 ? int(o.max_model_len) : c.max_positions;
    const int length = int(std::min<int64_t>({asked, c.max_positions, room * page_tokens}));
    if (o.max_model_len > c.max_positions)
        throw Error(text("max_model_len %d does not fit: the model has %d positions", asked,
                         c.max_positions));
    if (length == 0 || (o.max_model_len > 0 && length < asked)) {
        const int pages = Limits::pages_for(asked);
        const int64_t needed = pages * global_bytes + (window + step) * local_bytes;
        throw Error(
            text("max_model_len %d does not fit: one sequence needs %d pages (%.2f GB), "
                 "and there is room for %ld (%.2f GB)",
                 asked, pages, needed / 1e9, long(room), budget / 1e9));
    }
    if (length < asked)
        say(text("max_model_len is %d, lowered from %d to what fits", length, asked));
    // Then as many sequences of a usual length as fit both pools. The global pool gets the rest.
    const int64_t usual = Limits::pages_for(std::min(4096, length));
    const int64_t longest = Limits::pages_for(length);
    const auto bytes_for = [&](int64_t sequences) {
        return (sequences * window + step) * local_bytes +
               std::max(sequences * usual, longest) * global_bytes;
    };
    int64_t sequences = limits.max_num_seqs;
    while (sequences > 1 && bytes_for(sequences) > budget) sequences--;
    const int64_t local = sequences * window + step;
    const int64_t rest = (budget - local * local_bytes) / global_bytes;
    limits.pages[local_pool] = int(local);
    limits.pages[global_pool] = int(std::min(rest, limits.max_num_seqs * longest));
    if (o.pages > 0) limits.pages[local_pool] = limits.pages[global_pool] = int(o.pages);
    return {limits, length};
}

// [2] Start ---------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr const char* instructions = "AVX-512";
#elif defined(__AVX2__)
constexpr const char* instructions = "AVX2";
#else
constexpr const char* instructions = "a processor without AVX2: it is slow";
#endif

// Each sequence of a step has at least one of its tokens.
void fill_step_limits(Options& o, int64_t default_tokens) {
    int64_t& tokens = o.max_num_batched_tokens;
    if (tokens < 0) tokens = default_tokens;
    if (o.max_num_seqs > tokens)
        say(text("max_num_seqs is %ld, lowered from %ld to the tokens of a step", long(tokens),
                 long(o.max_num_seqs)));
    o.max_num_seqs = std::min(o.max_num_seqs < 0 ? 256 : o.max_num_seqs, tokens);
}

// As many as the container grants, unless the user says otherwise: `main` has set the variable.
int cpu_threads() {
    const char* const threads = std::getenv("OMP_NUM_THREADS");
    const int count = threads ? std::atoi(threads) : 0;
    return count > 0 ? count : usable_processors();
}

// Opens the engine that --device asks for, and fills in the options that depend on it. SIGTERM must
// be blocked before: the GPU's driver starts threads, which inherit the mask.
std::unique_ptr<Model> open_model(const Checkpoint& checkpoint, Options& o) {
#if GEMMA_CUDA
    const std::string missing = o.device == "cpu" ? "--device says so" : cuda_missing();
#else
    const std::string missing = "this build has no CUDA engine (./dev build --cuda makes one)";
#endif
    const bool gpu = missing.empty();
    if (!gpu && o.device == "cuda") throw Error("--device cuda: " + missing);
    say_step("device: " + (gpu ? "cuda, because there is a GPU" : "cpu, because " + missing));
    if (!gpu)
        say(text("%d threads, built for %s; %.2f GB of memory may be used", cpu_threads(),
                 instructions, double(usable_memory()) / 1e9));
    if (!gpu && o.gpu_memory_utilization > 0)
        say("--gpu-memory-utilization: without effect on the CPU");
    if (o.gpu_memory_utilization < 0) o.gpu_memory_utilization = 0.9;
#if GEMMA_CUDA
    if (gpu) {
        fill_step_limits(o, cuda_step_tokens());
        return open_cuda(checkpoint, {int(o.max_num_batched_tokens), o.gpu_memory_utilization});
    }
#endif
    fill_step_limits(o, 32 * cpu_threads());
    return open_cpu(checkpoint, int(o.max_num_batched_tokens));
}

// The service and its engine refer to these, so they must outlive both.
struct Loaded {
    std::optional<Checkpoint> checkpoint;
    std::optional<Tokenizer> tokenizer;
};

void load(Loaded& loaded, Options o, Service& service) {
    const std::string directory = find_model(o.model);
    // In a thread of its own, since the driver's start and the upload do not need the tokenizer.
    auto reading = std::async(std::launch::async,
                              [&] { loaded.tokenizer.emplace(directory + "/tokenizer.model"); });
    Checkpoint& checkpoint = loaded.checkpoint.emplace(directory);
    if (o.generation_config == "vllm") checkpoint.defaults = {};
    auto model = open_model(checkpoint, o);
    reading.get();
    const Tokenizer& tokenizer = *loaded.tokenizer;
    if (tokenizer.size() > checkpoint.config.V) {
        throw Error(
            text("%s: found a tokenizer of %d pieces, expected at most the %d of the weights",
                 directory.c_str(), tokenizer.size(), checkpoint.config.V));
    }
    checkpoint.config.vocab = tokenizer.size();
    const auto [limits, max_model_len] = split_memory(checkpoint.config, o, model->kv_memory());
    model->allocate_pages(limits.pages);
    const SamplingDefaults& d = checkpoint.defaults;
    say(
        text("sampling defaults: temperature %g, top_k %d, top_p %g, min_p %g, "
             "repetition_penalty %g",
             d.temperature, d.top_k, d.top_p, d.min_p, d.repetition_penalty));
    say_step(text("KV pages of 32 tokens: %d local (%d tokens), %d global (%ld tokens)",
                  limits.pages[local_pool], limits.pages[local_pool] * page_tokens,
                  limits.pages[global_pool], long(limits.pages[global_pool]) * page_tokens));
    say(text("max_model_len %d, up to %d sequences and %d tokens a step", max_model_len,
             limits.max_num_seqs, limits.max_batched_tokens));
    service.open(checkpoint, tokenizer, std::move(model), limits, max_model_len);
    say(text("ready in %.2f s", seconds_since_start()));
}

// The id of the Google Cloud project, from the metadata server. Its address is fixed: a name could
// wait for DNS on a machine that has none.
std::string find_project() {
    const char* const host = std::getenv("GCE_METADATA_HOST");
    httplib::Client metadata(text("http://%s", host ? host : "169.254.169.254"));
    metadata.set_connection_timeout(1);
    metadata.set_read_timeout(1);
    const auto reply = metadata.Get("/computeMetadata/v1/project/project-id",
                                    httplib::Headers{{"Metadata-Flavor", "Google"}});
    return reply && reply->status == 200 ? reply->body : "";
}

// [3] Stop ----------------------------------------------------------------------------------------

// Cloud Run gives 10 s between SIGTERM and SIGKILL.
constexpr auto to_end = std::chrono::seconds(8);
constexpr auto to_cut = std::chrono::milliseconds(500);

// SIGTERM and SIGINT stay pending until sigwait, also in threads that start later. Unblocked, they
// would have no effect on process 1, which the server is in a container.
sigset_t block_signals() {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
    return signals;
}

int serve(const Options& options) {
    const sigset_t signals = block_signals();
    rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;  // each connection is a file, and the default is 1,024
    setrlimit(RLIMIT_NOFILE, &files);
    Loaded loaded;
    Service service(options);
    HttpServer http(options.host, int(options.port), service.routes(), options.api_key);
    say(std::string("gemma-server ") + build_name);
    say(text(options.host.find(':') == std::string::npos ? "listening on http://%s:%d"
                                                         : "listening on http://[%s]:%d",
             options.host.c_str(), http.port) +
        ", not ready: requests wait for the model");
    std::string names;
    for (const auto& name : options.served_model_name) names += (names.empty() ? "" : ", ") + name;
    say("requests may call the model " + names +
        (options.api_key.empty() ? "; no API key guards it"
                                 : "; an API key guards what is under /v1"));
    std::atomic<bool> failed = false;
    std::thread loading([&] {
        try {
            // The first request's log line must have a given project; asking for it delays none.
            const char* const project = std::getenv("GOOGLE_CLOUD_PROJECT");
            if (project) set_trace_project(project);
            load(loaded, options, service);
            if (logs_json() && !project) set_trace_project(find_project());
        } catch (const std::exception& e) {
            say(e.what(), Severity::error);
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
        service.cut = true;
        service.drained(to_cut);
    }
    // If a thread may still use these objects, exit without destroying them.
    if (!http.stop() || !open || !service.rests(to_cut)) std::_Exit(failed);
    loading.join();
    return failed;
}

}  // namespace gemma

int main(int argc, char** argv) try {
    // Closed, one of these would be a client's socket later, and the log would be written into it.
    for (const int fd : {0, 1, 2}) {
        if (fcntl(fd, F_GETFD) < 0) (void)!open("/dev/null", O_RDWR);
    }
    const std::vector<std::string> args(argv + 1, argv + argc);
    const auto asks = [&](const char* word) { return std::count(args.begin(), args.end(), word); };
    if (asks("--help") || asks("-h")) return std::puts(gemma::help().c_str()) < 0;
    if (asks("--version")) return std::printf("gemma-server %s\n", gemma::build_name) < 0;
    gemma::block_signals();  // from the first moment, and through execv
    // OpenMP's library reads these variables when it is loaded, so the program sets them and
    // executes itself again. Without GOMP_SPINCOUNT threads spin for milliseconds at each barrier,
    // and a busy process beside them makes each token three times as slow (docs/design.md, section
    // 10). OpenMP knows nothing of a container's processor time: the threads above it would wait
    // for each other's next period.
    if (!std::getenv("GEMMA_STARTED")) {
        setenv("GEMMA_STARTED", gemma::text("%.3f", gemma::seconds()).c_str(), 1);
        setenv("GOMP_SPINCOUNT", "2000", 0);
        setenv("OMP_NUM_THREADS", std::to_string(gemma::usable_processors()).c_str(), 0);
        execv(std::filesystem::read_symlink("/proc/self/exe").c_str(), argv);  // its name, for ps
    }
    const gemma::Options options = gemma::parse_flags(args);
    return options.check ? 0 : gemma::serve(options);
} catch (const std::exception& e) {
    gemma::say(e.what(), gemma::Severity::error);
    return 1;
}
