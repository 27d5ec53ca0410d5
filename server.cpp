// SPDX-License-Identifier: Apache-2.0
//
// server.cpp: batching and OpenAI completions, in the order in which a request meets them. Sitting
// 1, after server.h; scheduler.h comes next, and has Sequence and Delivery.
//
//   [1] Routes   the OpenAI surface: a body becomes a Request, a Request an Answer
//   [2] Answers  streamed or whole, text or chat: one path
//   [3] Engine   the one thread that owns the model; an inbox for each request
//   [4] Service  what main.cpp starts, and stops
//
// Rules: only the engine thread touches the model and the scheduler, so also pages. HTTP threads
// parse, tokenize, post sequences and wait at their request's inbox; nothing that they do can stall
// a step, and a slow reader stalls only itself.
#include "server.h"

#include <algorithm>
#include <mutex>

#include <malloc.h>

#include "fields.h"
#include "info.h"
#include "structured.h"
#include "writer.h"

namespace gemma {

namespace {

// [1] Routes --------------------------------------------------------------------------------------

// A request that is being answered. A new request waits until the model is loaded, and is refused
// when the server is shutting down; main.cpp waits for the requests that are inside.
struct Visit {
    Service& service;
    const double begun = seconds();
    const std::string route, trace;  // trace: of HttpRequest

    Visit(Service& s, const std::string& path, const std::string& of_request)
        : service(s), route(path), trace(of_request) {
        service.wait([&] { return service.ready || service.leaving; });
        service.locked([&] {
            if (service.leaving) throw Refusal{503, "the server is shutting down", ""};
            service.in_flight++;
        });
    }
    ~Visit() {
        const bool refused = std::uncaught_exceptions() > 0;  // by a handler
        service.metrics->change(
            [&](Figures& f) { f.observe_http(route, refused, seconds() - begun); });
        service.locked([&] { service.in_flight--; });
    }
    Visit(const Visit&) = delete;
};

// [2]: posts the request's sequences; the reply's body is made of what comes into the inbox.
HttpReply start_answer(std::shared_ptr<Visit> visit, Request request, std::shared_ptr<Inbox> inbox,
                       Sequences sequences);

// Nothing is parsed or tokenised for a client that has left: its 4 MiB would hold up the others.
void need_client(const Service& service, const HttpRequest& http) {
    if (!http.client_left()) return;
    if (service.cut) throw Refusal{503, "the server is shutting down", ""};  // it ended the reads
    throw Refusal{499, "the client has left", ""};
}

// A handler gets what it needs to answer, and throws a Refusal when it will not.
using Handler = HttpReply (*)(const std::shared_ptr<Visit>&, const HttpRequest&, const json& body);

template <bool chat>
HttpReply generate(const std::shared_ptr<Visit>& visit, const HttpRequest& http, const json& body) {
    Engine& engine = *visit->service.engine;
    const Served& served = visit->service.served;
    const json prompts = chat ? json() : list_prompts(body);
    Request r = parse_request(served, body, http.body, chat);
    const auto grammar = asked_grammar(*visit->service.grammars, r, body, http.body);
    if (grammar) r.ignore_eos = false;  // behind a complete text nothing else may follow
    r.id = own_id(http.id);
    const GoOn go_on = [&] { need_client(visit->service, http); };
    const int count = (chat ? 1 : int(prompts.size())) * int(r.n);
    if (count > 128)
        refuse("n", "prompts times n must be at most 128, got %zu x %d", prompts.size(), int(r.n));
    engine.enter(count);  // before tokenising, which costs the most of what a refused request costs
    try {
        if (chat)
            parse_messages(served, body, r, go_on);
        else
            parse_prompts(served, prompts, r, go_on);
        for (const auto& prompt : r.prompts) check_length(served, r, prompt.size());
        check_scores(r);
        const auto inbox = std::make_shared<Inbox>();
        auto sequences =
            make_sequences(served, r, inbox, [&] { return visit->service.draw_seed(); });
        for (const auto& s : sequences) {
            if (grammar) s->constraint = visit->service.grammars->start(grammar, *s);
        }
        return start_answer(visit, std::move(r), inbox, std::move(sequences));
    } catch (...) {
        engine.give_back(count);  // nothing was posted: start_answer posts last
        throw;
    }
}

// Large requests take turns; then malloc_trim gives back the memory that glibc would keep.
struct LargeTurn {
    const std::lock_guard<std::mutex> lock;
    explicit LargeTurn(std::mutex& mutex) : lock(mutex) {}
    ~LargeTurn() { malloc_trim(0); }
};

HttpReply body_reply(Service& service, Handler handler, const HttpRequest& http) {
    const auto visit = std::make_shared<Visit>(service, http.path, http.trace);
    std::optional<LargeTurn> turn;
    if (http.body.size() > 64 << 10) turn.emplace(service.large);
    need_client(service, http);
    return handler(visit, http, parse_body(http.body));
}

// A request for text that is refused has its line in the log, as an answer has (~Answer).
HttpReply generation_reply(Service& service, Handler handler, const HttpRequest& http) {
    const double begun = seconds();
    try {
        return body_reply(service, handler, http);
    } catch (const Refusal& r) {
        Generation g;
        g.status = r.status;
        g.param = r.param;
        g.id = own_id(http.id);
        g.trace = http.trace;
        g.total = seconds() - begun;
        if (!service.options.disable_log_requests) say(g);
        throw;
    }
}

}  // namespace

std::vector<Route> Service::routes() {
    const auto on_post = [this](const char* path, auto reply, Handler handler) -> Route {
        return {"POST", path, [this, reply, handler](const HttpRequest& http) {
                    return reply(*this, handler, http);
                }};
    };
    const auto on_get = [this](const char* path, auto handler) -> Route {
        return {"GET", path, [this, handler](const HttpRequest&) { return handler(*this); }};
    };
    const auto models = [this](const HttpRequest& http) {
        const Visit visit(*this, "/v1/models", http.trace);
        return list_models(*this, http);
    };
    return {on_post("/v1/completions", generation_reply, generate<false>),
            on_post("/v1/chat/completions", generation_reply, generate<true>),
            on_post("/tokenize", body_reply,
                    [](const auto& visit, const auto& http, const json& body) {
                        const GoOn go_on = [&] { need_client(visit->service, http); };
                        return tokenize(visit->service.served, body, http.body, go_on);
                    }),
            on_post("/detokenize", body_reply,
                    [](const auto& visit, const auto&, const json& body) {
                        return detokenize(visit->service.served, body);
                    }),
            {"GET", "/v1/models", models},
            {"GET", "/v1/models/", models},
            on_get("/health", health),
            on_get("/ping", health),
            {"POST", "/ping", [this](const HttpRequest&) { return health(*this); },
             /*body=*/false},
            on_get("/metrics", metrics_page),
            on_get("/load", load),
            {"POST", "/v1/responses", responses, /*body=*/false},
            on_get("/version", version)};
}

namespace {

// [2] Answers -------------------------------------------------------------------------------------

// One request's answer, streamed or whole, text or chat. Lives as long as its response; when the
// response ends, whatever still runs for it is cancelled.
class Answer {
    // In this order: each is made of those above it.
    const std::shared_ptr<Visit> visit;
    Service& service = visit->service;
    const Request request;
    const std::shared_ptr<Inbox> inbox;
    const Sequences sequences;
    std::vector<Choice> choices = std::vector<Choice>(
        sequences.size(), Choice(*service.served.tokenizer, !request.skip_special_tokens));
    size_t unfinished = sequences.size();
    int prompt_tokens = 0;
    double queued = -1, first_token = -1;  // seconds until it was in a step, and had a token
    bool role_sent = false;
    const Writer writer{request, *service.served.tokenizer,
                        (request.chat ? "chatcmpl-" : "cmpl-") +
                            (request.id.empty() ? service.draw_hex() : request.id)};

  public:
    Answer(std::shared_ptr<Visit> v, Request r, std::shared_ptr<Inbox> of_request, Sequences all)
        : visit(std::move(v)),
          request(std::move(r)),
          inbox(std::move(of_request)),
          sequences(std::move(all)) {
        for (size_t i = 0; i < choices.size(); i++) begin(choices[i], i / size_t(request.n));
        for (const auto& prompt : request.prompts) prompt_tokens += int(prompt.size());
        service.metrics->change([&](Figures& f) {
            f.asked_n.observe(double(request.n));
            f.prompt_tokens += prompt_tokens;
        });
        service.locked([&] { service.generating++; });
    }
    ~Answer() {
        for (const auto& s : sequences) s->cancelled = true;
        service.metrics->change([&](Figures& f) { f.aborted += double(unfinished); });
        service.locked([&] { service.generating--; });
        if (!service.options.disable_log_requests) log();
    }
    Answer(const Answer&) = delete;

    HttpReply reply(const std::shared_ptr<Answer>& self) const {
        return {"", request.stream ? "text/event-stream; charset=utf-8" : "application/json",
                [self](std::string& out) { return self->pump(out); }};
    }

  private:
    void log() const {
        Generation g;
        g.status = unfinished > 0 ? 499 : 200;
        g.id = writer.id;
        g.model = request.model;
        g.trace = visit->trace;
        g.prompt_tokens = prompt_tokens;
        g.queued = queued;
        g.first_token = first_token;
        g.total = seconds() - visit->begun;
        g.finish_reason = Writer::finish_reasons(choices);
        for (const Choice& c : choices) g.completion_tokens += c.tokens;
        say(g);
    }

    // Appends what has come; false: that was all.
    bool pump(std::string& out) {
        if (request.stream && request.chat && !role_sent) {
            for (size_t i = 0; i < choices.size(); i++) writer.role_event(out, choices[i], i);
            role_sent = true;
            return true;
        }
        for (const Delivery& delivery : inbox->take()) take(out, delivery);
        if (service.cut) cut_short(out);
        if (unfinished > 0) return true;
        if (request.stream && request.include_usage) writer.event(out, "", usage());
        out += request.stream ? "data: [DONE]\n\n" : whole();
        return false;
    }

    // The server leaves: choices end with what they have.
    void cut_short(std::string& out) {
        for (size_t i = 0; i < choices.size(); i++) {
            if (!choices[i].finished) send(out, int(i), release_text(choices[i], Finish::abort));
        }
    }

    // With echo the prompt stands before the answer. Its first token has no logprob.
    void begin(Choice& c, size_t prompt) {
        const auto& ids = request.prompts[prompt];
        c.prompt_size = int(ids.size());
        if (request.echo) c.text = request.echoed[prompt];
        if (request.tools) c.calls.emplace(request.tools);
        if (request.prompt_logprobs >= 0) c.prompt_logprobs = "null";
        if (!request.echo || request.chat || request.logprobs < 0) return;
        Writer::add_token(c, writer.token_text(ids[0]), "null", "null");
    }

    // One delivery becomes text and logprobs of its choice.
    void take(std::string& out, const Delivery& d) {
        Choice& c = choices[size_t(d.choice)];
        if (c.finished) return;  // computed before the scheduler dropped what a stop string ended
        if (d.of_prompt) {
            Writer::append(c.prompt_logprobs, writer.ranked(d.result));
            if (request.echo && !request.chat && request.logprobs >= 0)
                writer.add_logprobs(c, d.result);
            return;
        }
        Finish finish = d.finish;
        if (request.max_tokens != 0) {  // 0: the text was only scored, and this is its end
            c.tokens++;
            if (request.logprobs >= 0) writer.add_logprobs(c, d.result);
            if (finish == Finish::stop && d.result.id != Tokenizer::eos)  // <eos>: null, as vLLM
                c.stop_reason = std::to_string(d.result.id);
            if (finish != Finish::stop || request.include_stop)
                c.held += c.detokenizer.push(d.result.id);
        }
        finish = release_text(c, finish);
        observe(c, d, finish != Finish::none);
        send(out, d.choice, finish);
    }

    // Moves to c.text what can be sent of the text held. The earliest stop string that ends behind
    // the first min_tokens tokens cuts the text and ends the choice; what could be the start of one
    // stays held. Returns how the choice ends now.
    Finish release_text(Choice& c, Finish finish) const {
        if (finish != Finish::none) c.held += c.detokenizer.flush();
        if (c.tokens <= request.min_tokens) c.early = c.held.size();
        size_t first = std::string::npos, cut = 0, keep = 0;
        for (const std::string& stop : request.stop) {
            const size_t at = c.held.find(stop, c.early - std::min(c.early, stop.size() - 1));
            if (at < first) {
                first = at;
                cut = at + (request.include_stop ? stop.size() : 0);
                c.stop_reason = quote(stop);
            }
            // The longest end of held that starts `stop`, which is never empty.
            for (size_t n = std::min(stop.size() - 1, c.held.size()); n > keep; n--) {
                if (c.held.ends_with(std::string_view(stop).substr(0, n))) keep = n;
            }
        }
        if (first != std::string::npos)
            finish = Finish::stop;
        else
            cut = c.held.size() - (finish == Finish::none ? keep : 0);
        const std::string released = c.held.substr(0, cut);
        c.text += c.calls ? c.calls->push(released, finish, first != c.held.npos) : released;
        c.held.erase(0, cut);
        c.early -= std::min(c.early, cut);
        return finish;
    }

    void end(int index, Finish finish) {
        Choice& c = choices[size_t(index)];
        c.finished = true;
        c.finish_reason = Writer::reason(c, finish);
        // A stop string is text, and the scheduler knows ids only: cancelling makes it drop the
        // sequence when it plans the next step.
        sequences[size_t(index)]->cancelled = true;
        unfinished--;
        service.metrics->change([&](Figures& m) {
            if (finish == Finish::stop) m.stopped++;
            if (finish == Finish::length) m.reached_length++;
            if (finish == Finish::abort) m.aborted++;
            m.observe_sizes(c.prompt_size, c.tokens, sequences[size_t(index)]->max_tokens);
            m.preempted.observe(c.preemptions);
        });
    }

    // In a stream, what has come for the choice is an event.
    void send(std::string& out, int index, Finish finish) {
        if (finish != Finish::none) end(index, finish);
        Choice& c = choices[size_t(index)];
        if (request.stream)
            writer.event(out, writer.take_choice_json(c, index), writer.usage_so_far(c));
    }

    void observe(Choice& c, const Delivery& d, bool is_last) {
        const bool is_first = c.tokens <= 1;
        c.preemptions = d.preemptions;
        if (is_first) {
            c.first = d.at;
            c.cached = d.cached_tokens;
        }
        if (queued < 0) {
            queued = d.started - visit->begun;
            first_token = d.at - visit->begun;
        }
        service.metrics->change([&](Figures& m) {
            const TokenTimes times{sequences[size_t(d.choice)]->arrived, d.started, c.first, c.last,
                                   d.at};
            m.observe_token(times, is_first, is_last);
            if (c.tokens > 0) m.generated_tokens++;
            if (is_first) m.cache_queries += c.prompt_size;
            if (is_first) m.cache_hits += d.cached_tokens;
        });
        c.last = d.at;
    }

    std::string whole() {
        std::string list;
        for (size_t i = 0; i < choices.size(); i++)
            Writer::append(list, writer.take_choice_json(choices[i], int(i)));
        return writer.whole(list, usage(), choices[0]);
    }

    // Of the whole: a prompt counts once, whatever its number of choices.
    std::string usage() const {
        int made = 0, cached = 0;
        for (size_t i = 0; i < choices.size(); i++) {
            made += choices[i].tokens;
            if (i % size_t(request.n) == 0) cached += choices[i].cached;
        }
        return Writer::usage_json(prompt_tokens, made,
                                  service.options.prompt_tokens_details ? cached : -1);
    }
};

// Once the Answer is made nothing may be refused: ~Answer logs and counts the request. Once the
// sequences are posted nothing may be thrown: their places would be given back twice.
HttpReply start_answer(std::shared_ptr<Visit> visit, Request request, std::shared_ptr<Inbox> inbox,
                       Sequences sequences) {
    Engine& engine = *visit->service.engine;
    const auto answer =
        std::make_shared<Answer>(std::move(visit), std::move(request), std::move(inbox), sequences);
    HttpReply reply = answer->reply(answer);
    engine.post(sequences);
    return reply;
}

}  // namespace

// [3] Engine --------------------------------------------------------------------------------------

void Inbox::put(Delivery delivery) {
    {
        const std::lock_guard lock(mutex);
        deliveries.push_back(std::move(delivery));
    }
    changed.notify_one();
}

std::deque<Delivery> Inbox::take() {
    std::unique_lock lock(mutex);
    changed.wait_for(lock, std::chrono::milliseconds(50), [&] { return !deliveries.empty(); });
    return std::exchange(deliveries, {});
}

Engine::Engine(std::unique_ptr<Model> m, const Limits& limits, int max_queue, Metrics& of_service,
               Grammars& also)
    : most_places(limits.max_num_seqs + max_queue),
      model(std::move(m)),
      scheduler(limits),
      metrics(of_service),
      grammars(also),
      thread([this] { run(); }) {}

Engine::~Engine() {
    {
        const std::lock_guard lock(mutex);
        stopping = true;
    }
    changed.notify_all();
    thread.join();
}

void Engine::enter(int count) {
    const std::lock_guard lock(mutex);
    if (places_taken + count > most_places) {
        metrics.change([](Figures& f) { f.rejected++; });
        throw Refusal{429,
                      text("the queue is full: %d sequences run or wait, of at most %d, and this "
                           "request has %d: try again soon",
                           places_taken, most_places, count),
                      ""};
    }
    places_taken += count;
}

void Engine::give_back(int count) {
    const std::lock_guard lock(mutex);
    places_taken -= count;
}

void Engine::post(const Sequences& sequences) {
    {
        const std::lock_guard lock(mutex);
        posted.insert(posted.end(), sequences.begin(), sequences.end());
    }
    changed.notify_all();
}

bool Engine::rests(std::chrono::milliseconds wait) {
    std::unique_lock lock(mutex);
    return changed.wait_for(lock, wait, [&] { return resting; });
}

// A turn: take what was posted, plan a step, run it, deliver its results.
void Engine::run() {
    bool idle = true;
    while (auto news = wait_for_work(idle)) {
        const int before = present() + int(news->size());
        for (auto& sequence : *news) scheduler.add(std::move(sequence));
        grammars.settle(std::chrono::milliseconds(1));
        const Batch& batch = scheduler.next(seconds());
        idle = present() == 0;
        show();
        std::vector<Delivery> deliveries;
        if (idle) check_books();
        if (!batch.tokens.empty()) {
            deliveries = scheduler.finish(model->step(batch));
            show();
            count(deliveries);
        }
        const int ended = before - present();
        give_back(ended);  // before the clients know: their next request must find the place
        deliver(std::move(deliveries));
    }
}

// The sequences that were posted; with nothing else to do, waits for some.
std::optional<Sequences> Engine::wait_for_work(bool idle) {
    std::unique_lock lock(mutex);
    if (idle) {
        resting = true;
        changed.notify_all();
        changed.wait(lock, [&] { return !posted.empty() || stopping; });
        resting = false;
    }
    if (stopping) return std::nullopt;
    return std::exchange(posted, {});
}

void Engine::deliver(std::vector<Delivery> deliveries) const {
    const double now = seconds();
    for (Delivery& d : deliveries) {
        d.at = now;
        const auto sequence = std::exchange(d.sequence, nullptr);  // an Inbox must not hold it
        sequence->inbox->put(std::move(d));
    }
}

// vLLM counts a prompt in the step that makes its first token; so does this.
void Engine::count(const std::vector<Delivery>& deliveries) const {
    size_t sum = 0;
    for (const Delivery& d : deliveries) {
        if (d.of_prompt) continue;
        const Sequence& s = *d.sequence;
        const size_t made = s.tokens.size() - size_t(s.prompt_tokens);
        sum += made <= 1 ? s.tokens.size() : 1;  // the prompt and its first token; later one each
    }
    metrics.change([&](Figures& f) { f.step_tokens.observe(double(sum)); });
}

void Engine::show() const {
    double used = 0;  // of the pool that is fuller
    for (const Pool pool : pools) {
        const PoolUse use = scheduler.use(pool);
        used = std::max(used, double(use.held) / (use.held + use.cached + use.free));
    }
    metrics.change([&](Figures& f) {
        f.running = scheduler.running();
        f.waiting = scheduler.waiting();
        f.preemptions = scheduler.preemptions();
        f.pages_used = used;
    });
}

// With nothing to do, no page may be held: a leak would otherwise show days later.
void Engine::check_books() const {
    for (const Pool pool : pools) {
        const PoolUse use = scheduler.use(pool);
        if (use.held == 0 && present() == 0) continue;
        say(text("BUG: idle, but pool %d holds %d pages (%d cached, %d free); %d waiting", pool,
                 use.held, use.cached, use.free, scheduler.waiting()),
            Severity::error);
        std::abort();
    }
}

// [4] Service -------------------------------------------------------------------------------------

Service::Service(const Options& o) : options(o), seeds(uint64_t(o.seed)) {
    served.names = options.served_model_name;
}
Service::~Service() = default;

void Service::open(const Checkpoint& checkpoint, const Tokenizer& tokenizer,
                   std::unique_ptr<Model> model, const Limits& limits, int max_model_len) {
    served.checkpoint = &checkpoint;
    served.tokenizer = &tokenizer;
    served.limits = limits;
    served.max_model_len = max_model_len;
    cache_config = cache_labels(limits, max_model_len);
    metrics.emplace(max_model_len);
    grammars.emplace(tokenizer, checkpoint.config.eos, checkpoint.config.vocab);
    engine.emplace(std::move(model), limits, int(options.max_queue), *metrics, *grammars);
    locked([&] { ready = true; });
}

uint64_t Service::draw_seed() {
    return locked([&] { return seeds(); });
}

std::string Service::draw_hex() {
    return locked([&] { return text("%016lx%016lx", long(ids()), long(ids())); });
}

bool Service::leave() {
    return locked([&] {
        leaving = true;
        return ready;
    });
}

bool Service::drained(std::chrono::milliseconds at_most) {
    std::unique_lock lock(mutex);
    return changed.wait_for(lock, at_most, [&] { return in_flight == 0; });
}

bool Service::rests(std::chrono::milliseconds at_most) { return engine->rests(at_most); }

}  // namespace gemma
