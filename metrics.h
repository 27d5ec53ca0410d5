// SPDX-License-Identifier: Apache-2.0
//
// metrics.h: the figures behind /metrics. Beside the path.
#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace gemma {

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

}  // namespace gemma
