// SPDX-License-Identifier: Apache-2.0
//
// log.h: the log, one whole line on stderr for each event, from any thread. On Cloud Run (which
// sets K_SERVICE) a line is a JSON object with Cloud Logging's field names; elsewhere it is text
// for people. No prompt, no answer and no key is ever logged. Beside the path.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <string>

namespace gemma {

[[gnu::format(printf, 1, 2)]] inline std::string text(const char* format, ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    std::string s(static_cast<size_t>(std::vsnprintf(nullptr, 0, format, args)), '\0');
    std::vsnprintf(s.data(), s.size() + 1, format, again);
    va_end(again);
    va_end(args);
    return s;
}

enum class Severity { info, warning, error };
void say(const std::string& message, Severity severity = Severity::info);

// Logs a step of the start; its line begins with the seconds since the process started.
void say_step(const std::string& message);
double seconds_since_start();

// One request for text, answered or refused. Times are in seconds since it came; below 0: the
// request did not get so far.
struct Generation {
    int status = 200;  // of HTTP; 499: the client left before its answer was whole
    std::string id, model;
    std::string finish_reason;  // of each choice, or one word if all have the same
    std::string param;          // the name of the refused field, never its value
    std::string trace;          // the header X-Cloud-Trace-Context or traceparent
    int prompt_tokens = 0, completion_tokens = 0;
    double queued = -1, first_token = -1, total = 0;
};
void say(const Generation& generation);

// A trace's name begins with its Google Cloud project. Without a project, lines have no trace.
void set_trace_project(const std::string& project);
bool logs_json();

}  // namespace gemma
