// SPDX-License-Identifier: Apache-2.0
//
// metrics.cpp: one table names each figure as vLLM does, and page() writes Prometheus' text of it.
// Beside the path.
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <variant>

#include <sys/resource.h>
#include <unistd.h>

#include "fields.h"
#include "log.h"
#include "metrics.h"

namespace gemma {

struct Metric {
    const char *name, *type;  // Prometheus' types: gauge, counter, histogram
    std::variant<double Figures::*, Histogram Figures::*> member;
    const char* help;
    std::vector<double> bounds = {};  // empty: 1 2 5 10 20 50 ... up to max_model_len
    const char* label = "";           // follows other labels, so it starts with a comma
};

// The bounds of vLLM's buckets.
const std::vector<double> token_times{.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                                      1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
const std::vector<double> gap_times{.01, .025, .05, .075, .1,  .15, .2, .3, .4, .5,
                                    .75, 1,    2.5, 5,    7.5, 10,  20, 40, 80};
const std::vector<double> request_times{.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                        30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
const std::vector<double> step_sizes{1,   8,    16,   32,   64,   128,  256,
                                     512, 1024, 2048, 4096, 8192, 16384};
const std::vector<double> preemption_counts{1, 2, 3, 4, 5, 10, 20};
const std::vector<double> http_times{.1, .5, 1};
// Some figures have two names, since vLLM renamed them: dashboards of either version work.
const Metric metrics_table[] = {
    {"num_requests_running", "gauge", &Figures::running, "Choices that the engine computes."},
    {"num_requests_waiting", "gauge", &Figures::waiting, "Choices that wait for the engine."},
    {"num_requests_waiting_by_reason",
     "gauge",
     &Figures::waiting,
     "Choices that wait: capacity, for a place or for pages; deferred, for anything else.",
     {},
     R"(,reason="capacity")"},
    {"num_requests_waiting_by_reason",
     "gauge",
     &Figures::deferred,
     "",
     {},
     R"(,reason="deferred")"},
    {"admission_rejections",
     "counter",
     &Figures::rejected,
     "Requests refused because the queue was full.",
     {},
     R"(,reason="max_num_queued_reqs")"},
    {"gpu_cache_usage_perc", "gauge", &Figures::pages_used, "Old name of kv_cache_usage_perc."},
    {"kv_cache_usage_perc", "gauge", &Figures::pages_used,
     "Part of the fuller pool of KV pages that is held; 1 is all of it."},
    {"num_preemptions", "counter", &Figures::preemptions,
     "Times that a choice lost its pages to others, and was computed again."},
    {"prompt_tokens", "counter", &Figures::prompt_tokens, "Tokens of prompts, computed or cached."},
    {"generation_tokens", "counter", &Figures::generated_tokens, "Tokens generated."},
    {"gpu_prefix_cache_queries", "counter", &Figures::cache_queries,
     "Old name of prefix_cache_queries."},
    {"gpu_prefix_cache_hits", "counter", &Figures::cache_hits, "Old name of prefix_cache_hits."},
    {"prefix_cache_queries", "counter", &Figures::cache_queries,
     "Tokens of prompts that were looked for in the prefix cache."},
    {"prefix_cache_hits", "counter", &Figures::cache_hits,
     "Tokens of prompts that were found in the prefix cache."},
    {"request_success",
     "counter",
     &Figures::stopped,
     "Choices that ended, by why.",
     {},
     R"(,finished_reason="stop")"},
    {"request_success",
     "counter",
     &Figures::reached_length,
     "",
     {},
     R"(,finished_reason="length")"},
    {"request_success", "counter", &Figures::aborted, "", {}, R"(,finished_reason="abort")"},
    {"time_to_first_token_seconds", "histogram", &Figures::first_token,
     "From a choice's arrival to its first token.", token_times},
    {"time_per_output_token_seconds", "histogram", &Figures::next_token,
     "Old name of inter_token_latency_seconds.", gap_times},
    {"inter_token_latency_seconds", "histogram", &Figures::next_token,
     "Between two tokens of a choice.", gap_times},
    {"e2e_request_latency_seconds", "histogram", &Figures::whole,
     "From a choice's arrival to its last token.", request_times},
    {"request_queue_time_seconds", "histogram", &Figures::queue,
     "From a choice's arrival to its first step.", request_times},
    {"request_inference_time_seconds", "histogram", &Figures::inference,
     "From a choice's first step to its last token.", request_times},
    {"request_prefill_time_seconds", "histogram", &Figures::prefill,
     "From a choice's first step to its first token.", request_times},
    {"request_decode_time_seconds", "histogram", &Figures::decode,
     "From a choice's first token to its last.", request_times},
    {"request_prompt_tokens", "histogram", &Figures::prompt_size, "Tokens of a choice's prompt."},
    {"request_generation_tokens", "histogram", &Figures::generated_size,
     "Tokens of a choice that were generated."},
    {"request_max_num_generation_tokens", "histogram", &Figures::max_generated_size,
     "The same as request_generation_tokens: each choice counts by itself."},
    {"request_params_max_tokens", "histogram", &Figures::asked_size,
     "max_tokens of a choice, as asked for or by default."},
    {"request_params_n", "histogram", &Figures::asked_n, "n of a request.", {1, 2, 5, 10, 20}},
    {"request_num_preemptions", "histogram", &Figures::preempted,
     "Times that one choice was preempted.", preemption_counts},
    {"iteration_tokens_total", "histogram", &Figures::step_tokens,
     "Tokens of a step of the engine; a prompt counts in the step of its first token.", step_sizes},
};

Metrics::Metrics(int max_model_len) {
    std::vector<double> sizes;
    for (double ten = 1; ten <= max_model_len; ten *= 10) {
        for (const double size : {ten, 2 * ten, 5 * ten}) {
            if (size <= max_model_len) sizes.push_back(size);
        }
    }
    for (const Metric& m : metrics_table) {
        if (const auto* histogram = std::get_if<Histogram Figures::*>(&m.member)) {
            Histogram& h = figures.**histogram;
            h.bounds = m.bounds.empty() ? sizes : m.bounds;
            h.counts.resize(h.bounds.size() + 1);
        }
    }
}

namespace {

// A label; of a quoted value Prometheus reads these three escapes, and refuses others.
std::string label(const std::string& name, const std::string& value) {
    std::string escaped;
    for (const char c : json::parse(quote(value)).get<std::string>()) {  // quote makes it UTF-8
        if (c == '\\' || c == '"') escaped += '\\';
        escaped += c == '\n' ? "\\n" : std::string(1, c);
    }
    return name + "=\"" + escaped + '"';
}

std::string head(const std::string& name, const char* type, const char* help) {
    return text("# HELP %s %s\n# TYPE %s %s\n", name.c_str(), help, name.c_str(), type);
}

std::string sample(const std::string& name, const std::string& labels, double value) {
    return name + (labels.empty() ? "" : "{" + labels + "}") + text(" %.17g\n", value);
}

std::string samples(const std::string& name, const std::string& labels, const Histogram& h) {
    std::string out;
    uint64_t count = 0;  // Prometheus' buckets count everything up to their bound
    for (size_t i = 0; i <= h.bounds.size(); i++) {
        count += h.counts[i];
        const std::string bound = i < h.bounds.size() ? text("%.15g", h.bounds[i]) : "+Inf";
        out += sample(name + "_bucket", labels + ",le=\"" + bound + "\"", double(count));
    }
    return out + sample(name + "_sum", labels, h.sum) +
           sample(name + "_count", labels, double(count));
}

// As Python's client of Prometheus has them.
std::string process_page() {
    rusage used{};
    getrusage(RUSAGE_SELF, &used);
    const double cpu = double(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                       double(used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6;
    rlimit files{};
    getrlimit(RLIMIT_NOFILE, &files);
    double pages = 0, resident_pages = 0;
    std::ifstream("/proc/self/statm") >> pages >> resident_pages;
    std::error_code full;  // no file can be opened any more: then 0
    const std::filesystem::directory_iterator list("/proc/self/fd", full);
    // Less the one that reads the directory.
    const auto open = std::max<ptrdiff_t>(0, std::distance(begin(list), end(list)) - 1);
    // Once, since the two clocks are not read at one moment.
    static const double started = double(std::time(nullptr)) - seconds_since_start();
    const double page = double(sysconf(_SC_PAGESIZE));
    std::string out;
    const auto add = [&](const char* name, const char* type, const char* help, double value) {
        out += head(name, type, help) + sample(name, "", value);
    };
    add("process_cpu_seconds_total", "counter", "User and system time of the process.", cpu);
    add("process_resident_memory_bytes", "gauge", "Memory that the process has in RAM.",
        resident_pages * page);
    add("process_virtual_memory_bytes", "gauge", "Addresses that the process has mapped.",
        pages * page);
    add("process_start_time_seconds", "gauge", "When the process started, in seconds since 1970.",
        started);
    add("process_open_fds", "gauge", "Files and sockets that are open.", double(open));
    add("process_max_fds", "gauge", "Files and sockets that may be open.", double(files.rlim_cur));
    return out;
}

std::string http_page(const Figures& now) {
    std::string name = "http_requests_total";
    std::string out = head(name, "counter", "Requests that reached a route of the model.");
    for (const auto& [labels, count] : now.http_requests) out += sample(name, labels, count);
    name = "http_request_duration_seconds";
    out += head(name, "histogram", "From such a request to the end of its answer.");
    for (const auto& [labels, seconds] : now.http_seconds) out += samples(name, labels, seconds);
    return out;
}

}  // namespace

void Figures::observe_http(const std::string& route, bool refused, double seconds) {
    const char* const method = route.starts_with("/v1/models") ? "GET" : "POST";
    const std::string labels = label("handler", route) + "," + label("method", method);
    http_requests[labels + (refused ? R"(,status="4xx")" : R"(,status="2xx")")]++;
    Histogram& h = http_seconds[labels];
    h.bounds = http_times;
    h.counts.resize(h.bounds.size() + 1);
    h.observe(seconds);
}

std::string Metrics::page(const std::string& model, const std::string& cache_config) {
    const std::string labels = R"(engine="0",)" + label("model_name", model);
    std::string out =
        head("vllm:cache_config_info", "gauge", "The two pools of KV pages, as labels.") +
        sample("vllm:cache_config_info", labels + cache_config, 1);
    Figures now;  // a copy, so that the engine does not wait while the text is written
    change([&](const Figures& f) { now = f; });
    std::string last_name;
    for (const Metric& m : metrics_table) {
        const bool counter = std::string_view(m.type) == "counter";
        const std::string name = std::string("vllm:") + m.name + (counter ? "_total" : "");
        if (name != last_name) out += head(name, m.type, m.help);  // samples of a name share it
        last_name = name;
        if (const auto* number = std::get_if<double Figures::*>(&m.member))
            out += sample(name, labels + m.label, now.**number);
        else
            out += samples(name, labels, now.*std::get<Histogram Figures::*>(m.member));
    }
    return out + http_page(now) + process_page();
}

}  // namespace gemma
