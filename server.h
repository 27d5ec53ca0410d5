// SPDX-License-Identifier: Apache-2.0
//
// server.h: what a service is. Sitting 1, after gemma.h.
//
//   Options   what the command line says
//   Inbox     where a request waits for its deliveries
//   Engine    the one thread that owns model, pages and scheduler
//   Service   the OpenAI surface of one model
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "grammar.h"
#include "http.h"
#include "metrics.h"
#include "request.h"
#include "scheduler.h"

namespace gemma {

struct Options {
    std::string model = "google/gemma-3-1b-it", host = "0.0.0.0", device = "auto";
    std::string generation_config = "auto", config;
    std::vector<std::string> served_model_name;  // parse_flags: the model, if none is given
    std::vector<std::string> api_key;
    int64_t port = 8000, max_queue = 1024, seed = 0;
    // -1: not given
    int64_t max_model_len = -1, max_num_seqs = -1, max_num_batched_tokens = -1, pages = -1;
    double gpu_memory_utilization = -1;
    bool prompt_tokens_details = false, disable_log_requests = false, check = false;
};

// One for each request, whatever its number of prompts and choices. It must not hold a Sequence:
// Sequence::inbox points here, and the cycle would leak both. It has no bound, so that nothing
// makes the engine wait: a request's max_tokens limits it.
struct Inbox {
    void put(Delivery delivery);
    // What has arrived. Waits for 50 ms at most, so that the caller can look after its client.
    std::deque<Delivery> take();

  private:
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Delivery> deliveries;  // guarded by mutex
};

class Engine {
  public:
    Engine(std::unique_ptr<Model> model, const Limits& limits, int max_queue, Metrics& metrics,
           Grammars& grammars);
    ~Engine();
    Engine(const Engine&) = delete;

    // Takes places for so many sequences that run or wait, all or none; Refusal 429: there are not
    // enough. Who entered and posts nothing must call give_back; once posted, `run` calls it for
    // each sequence that ends.
    void enter(int count);
    void give_back(int count);
    void post(const Sequences& sequences);
    bool rests(std::chrono::milliseconds at_most);  // waits until it is amid no step: is it?

  private:
    void run();  // the thread
    // nullopt: the engine stops. Empty: nobody is new.
    std::optional<Sequences> wait_for_work(bool idle);
    void deliver(std::vector<Delivery> deliveries) const;
    void count(const std::vector<Delivery>& deliveries) const;
    int present() const { return scheduler.waiting() + scheduler.running(); }
    void show() const;
    void check_books() const;

    const int most_places;
    // engine thread only
    std::unique_ptr<Model> model;
    Scheduler scheduler;
    Metrics& metrics;
    Grammars& grammars;
    // any thread
    std::mutex mutex;
    std::condition_variable changed;
    Sequences posted;  // guarded by mutex, as are the next
    int places_taken = 0;
    bool stopping = false, resting = false;
    std::thread thread;  // last: it starts when the rest is there
};

// The OpenAI surface of one model. Requests that come before open() wait for it. A shutdown:
// leave(), drained(8 s), cut = true for requests that are still inside, drained(), rests().
struct Service {
    explicit Service(const Options& options);
    ~Service();
    Service(const Service&) = delete;
    std::vector<Route> routes();
    // What is given must outlive the service.
    void open(const Checkpoint& checkpoint, const Tokenizer& tokenizer,
              std::unique_ptr<Model> model, const Limits& limits, int max_model_len);
    bool leave();  // new requests get 503 from here on. Was it open?
    bool drained(std::chrono::milliseconds at_most);  // waits until no request is inside: is none?
    bool rests(std::chrono::milliseconds at_most);    // as Engine's; only once open

    // For routes and answers, in server.cpp.
    uint64_t draw_seed();
    std::string draw_hex();  // 32 digits, for ids
    // Calls f under the mutex. Threads that wait look at what f changed: they are woken, but go on
    // only when the mutex is free.
    auto locked(auto&& f) {
        const std::lock_guard lock(mutex);
        changed.notify_all();
        return f();
    }
    void wait(auto&& until) {
        std::unique_lock lock(mutex);
        changed.wait(lock, until);
    }

    const Options options;
    // constant once the model is ready
    Served served;
    std::string cache_config;  // labels of /metrics
    std::optional<Metrics> metrics;
    std::optional<Grammars> grammars;
    std::optional<Engine> engine;
    // guarded by mutex
    std::mutex mutex;
    std::condition_variable changed;
    bool ready = false, leaving = false;
    int in_flight = 0, generating = 0;
    std::mt19937_64 seeds, ids{std::random_device{}()};
    // any thread
    std::atomic<bool> cut{false};  // answers end now, with what they have
    std::mutex large;              // SentencePiece takes up to 800 MB for 4 MiB: one at a time
};

}  // namespace gemma
