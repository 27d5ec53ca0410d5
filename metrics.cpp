// SPDX-License-Identifier: Apache-2.0
//
// metrics.cpp: one table names each figure as vLLM does, and page() writes Prometheus' text of it.
// Beside the path.
#include <variant>

#include "log.h"
#include "metrics.h"

namespace gemma {

struct Metric {
    const char *name, *type;  // Prometheus' types: gauge, counter, histogram
    std::variant<double Figures::*, Histogram Figures::*> member;
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
// Some figures have two names, since vLLM renamed them: dashboards of either version work.
const Metric metrics_table[] = {
    {"num_requests_running", "gauge", &Figures::running},
    {"num_requests_waiting", "gauge", &Figures::waiting},
    {"gpu_cache_usage_perc", "gauge", &Figures::pages_used},
    {"kv_cache_usage_perc", "gauge", &Figures::pages_used},
    {"num_preemptions", "counter", &Figures::preemptions},
    {"prompt_tokens", "counter", &Figures::prompt_tokens},
    {"generation_tokens", "counter", &Figures::generated_tokens},
    {"gpu_prefix_cache_queries", "counter", &Figures::cache_queries},
    {"gpu_prefix_cache_hits", "counter", &Figures::cache_hits},
    {"prefix_cache_queries", "counter", &Figures::cache_queries},
    {"prefix_cache_hits", "counter", &Figures::cache_hits},
    {"request_success", "counter", &Figures::stopped, {}, R"(,finished_reason="stop")"},
    {"request_success", "counter", &Figures::reached_length, {}, R"(,finished_reason="length")"},
    {"request_success", "counter", &Figures::aborted, {}, R"(,finished_reason="abort")"},
    {"time_to_first_token_seconds", "histogram", &Figures::first_token, token_times},
    {"time_per_output_token_seconds", "histogram", &Figures::next_token, gap_times},
    {"inter_token_latency_seconds", "histogram", &Figures::next_token, gap_times},
    {"e2e_request_latency_seconds", "histogram", &Figures::whole, request_times},
    {"request_queue_time_seconds", "histogram", &Figures::queue, request_times},
    {"request_inference_time_seconds", "histogram", &Figures::inference, request_times},
    {"request_prefill_time_seconds", "histogram", &Figures::prefill, request_times},
    {"request_decode_time_seconds", "histogram", &Figures::decode, request_times},
    {"request_prompt_tokens", "histogram", &Figures::prompt_size},
    {"request_generation_tokens", "histogram", &Figures::generated_size},
    {"request_max_num_generation_tokens", "histogram", &Figures::max_generated_size},
    {"request_params_max_tokens", "histogram", &Figures::asked_size},
    {"request_params_n", "histogram", &Figures::asked_n, {1, 2, 5, 10, 20}},
    {"iteration_tokens_total", "histogram", &Figures::step_tokens, step_sizes},
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

std::string Metrics::page(const std::string& labels, const std::string& cache_config) {
    std::string out =
        "# HELP vllm:cache_config_info of each of the two pools of pages\n"
        "# TYPE vllm:cache_config_info gauge\nvllm:cache_config_info{" +
        labels + cache_config + "} 1.0\n";
    Figures now;  // a copy, so that the engine does not wait while the text is written
    change([&](const Figures& f) { now = f; });
    std::string last_name;
    for (const Metric& m : metrics_table) {
        const bool counter = std::string_view(m.type) == "counter";
        const std::string name = std::string("vllm:") + m.name + (counter ? "_total" : "");
        if (name != last_name)  // lines that differ in their labels share one head
            out += text("# HELP %s as vLLM's\n# TYPE %s %s\n", name.c_str(), name.c_str(), m.type);
        last_name = name;
        const auto add = [&](const std::string& suffix, const std::string& more, double value) {
            out += name + suffix + "{" + labels + more + text("} %.17g\n", value);
        };
        if (const auto* number = std::get_if<double Figures::*>(&m.member)) {
            add("", m.label, now.**number);
            continue;
        }
        const Histogram& h = now.*std::get<Histogram Figures::*>(m.member);
        uint64_t count = 0;  // Prometheus' buckets count everything up to their bound
        for (size_t i = 0; i <= h.bounds.size(); i++) {
            count += h.counts[i];
            const std::string bound = i < h.bounds.size() ? text("%.15g", h.bounds[i]) : "+Inf";
            add("_bucket", R"(,le=")" + bound + "\"", double(count));
        }
        add("_sum", "", h.sum);
        add("_count", "", double(count));
    }
    return out;
}

}  // namespace gemma
