// SPDX-License-Identifier: Apache-2.0
//
// metrics.h: the figures behind /metrics. Beside the path.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace gemma {

struct Histogram {
    std::vector<double> bounds;    // of the buckets, inclusive, ascending
    std::vector<uint64_t> counts;  // [bounds + 1]: the last counts values above all bounds
    double sum = 0;

    void observe(double value) {
        sum += value;
        counts[size_t(std::lower_bound(bounds.begin(), bounds.end(), value) - bounds.begin())]++;
    }
};

// Of a token: when its request arrived and was first in a step, when the choice's first token and
// the one before it were made, and when it was.
struct TokenTimes {
    double arrived, started, first, last, at;
};

// metrics.cpp's table has their names. Each choice is observed once. Times are in seconds.
struct Figures {
    double running = 0, waiting = 0, pages_used = 0, preemptions = 0;
    double deferred = 0;  // stays 0: a sequence waits for a place or for pages, for nothing else
    double rejected = 0;
    double prompt_tokens = 0, generated_tokens = 0, cache_queries = 0, cache_hits = 0;
    double stopped = 0, reached_length = 0, aborted = 0;
    Histogram first_token, next_token, whole, queue, inference, prefill, decode;
    Histogram prompt_size, generated_size, max_generated_size, asked_size, asked_n, step_tokens;
    Histogram preempted;
    std::map<std::string, double> http_requests;    // by their labels
    std::map<std::string, Histogram> http_seconds;  // the same

    void observe_token(const TokenTimes& t, bool is_first, bool is_last) {
        if (is_first) {
            first_token.observe(t.at - t.arrived);
            queue.observe(t.started - t.arrived);
            prefill.observe(t.at - t.started);
        } else {
            next_token.observe(t.at - t.last);
        }
        if (!is_last) return;
        whole.observe(t.at - t.arrived);
        inference.observe(t.at - t.started);
        decode.observe(t.at - t.first);
    }
    void observe_sizes(int prompt, int generated, int asked) {
        prompt_size.observe(prompt);
        generated_size.observe(generated);
        max_generated_size.observe(generated);
        asked_size.observe(asked);
    }
    // A request that reached the route and has been answered.
    void observe_http(const std::string& route, bool refused, double seconds);
};

class Metrics {
  public:
    explicit Metrics(int max_model_len);
    void change(auto&& update) {  // runs update(figures) under the mutex
        const std::lock_guard lock(mutex);
        update(figures);
    }
    // Prometheus' text. vLLM's samples have the model as a label; cache_config_info also has
    // `cache_config`.
    std::string page(const std::string& model, const std::string& cache_config);

  private:
    std::mutex mutex;
    Figures figures;  // guarded by mutex
};

}  // namespace gemma
