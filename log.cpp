// SPDX-License-Identifier: Apache-2.0
//
// log.cpp: writes the lines of the log. Beside the path. Field names and severities are Cloud
// Logging's ("Structured logging" in its documentation).
#include "log.h"

#include <cctype>
#include <cmath>
#include <chrono>
#include <cstdlib>
#include <ctime>
#include <mutex>

#include <nlohmann/json.hpp>

namespace gemma {

namespace {

using nlohmann::ordered_json;

std::mutex project_mutex;
std::string project;  // guarded by project_mutex

const char* name_of(Severity severity) {
    if (severity == Severity::error) return "ERROR";
    return severity == Severity::warning ? "WARNING" : "INFO";
}

// One call of fputs for each line, so that the lines of two threads never mix.
void write_line(const std::string& line) { std::fputs((line + "\n").c_str(), stderr); }

void write_json(const ordered_json& line) {
    write_line(line.dump(-1, ' ', false, ordered_json::error_handler_t::replace));
}

// Finds TRACE, 32 hexadecimal digits, in "TRACE/SPAN;o=1" (X-Cloud-Trace-Context) or in
// "00-TRACE-SPAN-FLAGS" (traceparent, W3C Trace Context); "" if it is missing.
std::string trace_id(const std::string& header) {
    const size_t start = header.starts_with("00-") ? 3 : 0;
    const std::string id = header.substr(start, header.find_first_of("-/", start) - start);
    for (const char c : id) {
        if (!std::isxdigit(static_cast<unsigned char>(c))) return "";
    }
    return id.size() == 32 ? id : "";
}

double milliseconds(double s) { return std::round(s * 1e4) / 10; }  // rounded to 0.1

ordered_json as_json(const Generation& g, Severity severity) {
    ordered_json line{{"severity", name_of(severity)}, {"message", "generation"}};
    if (!g.id.empty()) line["id"] = g.id;
    if (!g.model.empty()) line["model"] = g.model;
    line["status"] = g.status;
    if (!g.param.empty()) line["param"] = g.param;
    if (!g.finish_reason.empty()) {
        line["finish_reason"] = g.finish_reason;
        line["prompt_tokens"] = g.prompt_tokens;
        line["completion_tokens"] = g.completion_tokens;
    }
    if (g.queued >= 0) line["queued_ms"] = milliseconds(g.queued);
    if (g.first_token >= 0) line["first_token_ms"] = milliseconds(g.first_token);
    line["total_ms"] = milliseconds(g.total);
    const std::lock_guard lock(project_mutex);
    const std::string trace = project.empty() ? "" : trace_id(g.trace);
    if (!trace.empty())
        line["logging.googleapis.com/trace"] = "projects/" + project + "/traces/" + trace;
    return line;
}

std::string as_text(const Generation& g) {
    char time[32];
    const std::time_t now = std::time(nullptr);
    std::tm local;
    std::strftime(time, sizeof time, "%F %T", localtime_r(&now, &local));
    std::string line = text("%s generation: status %d", time, g.status);
    if (!g.param.empty()) line += ", refused for " + g.param;
    if (!g.finish_reason.empty())
        line += text(", %d prompt tokens, %d completion tokens, %s", g.prompt_tokens,
                     g.completion_tokens, g.finish_reason.c_str());
    if (g.queued >= 0) line += text(", queued %.1f ms", g.queued * 1e3);
    if (g.first_token >= 0) line += text(", first token %.1f ms", g.first_token * 1e3);
    return line + text(", total %.1f ms", g.total * 1e3) + (g.id.empty() ? "" : ", " + g.id);
}

}  // namespace

bool logs_json() {
    static const bool json = std::getenv("K_SERVICE") != nullptr;
    return json;
}

void say(const std::string& message, Severity severity) {
    if (logs_json()) return write_json({{"severity", name_of(severity)}, {"message", message}});
    if (severity == Severity::error) return write_line("error: " + message);
    write_line((severity == Severity::warning ? "warning: " : "") + message);
}

double seconds_since_start() {
    using namespace std::chrono;
    const double now = duration<double>(steady_clock::now().time_since_epoch()).count();
    static const double first = now;  // for programs that are not the server
    const char* const started = std::getenv("GEMMA_STARTED");  // main.cpp sets it
    return now - (started ? std::atof(started) : first);
}

void say_step(const std::string& message) {
    say(text("%6.2f s  %s", seconds_since_start(), message.c_str()));
}

void say(const Generation& g) {
    const Severity severity = g.status >= 500   ? Severity::error
                              : g.status >= 400 ? Severity::warning
                                                : Severity::info;
    if (logs_json())
        write_json(as_json(g, severity));
    else
        write_line(as_text(g));
}

void set_trace_project(const std::string& id) {
    const std::lock_guard lock(project_mutex);
    project = id;
}

}  // namespace gemma
