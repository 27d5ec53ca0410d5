// SPDX-License-Identifier: Apache-2.0
//
// log.h: the log, one line on stderr for each thing that happened, whole, from any thread. Where
// Cloud Run runs the server (it sets K_SERVICE) a line is a JSON object with the field names of
// Cloud Logging; elsewhere it is text for people. No prompt, no answer and no key is ever logged.
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

// A step of the start is done: its line begins with the seconds since the process started.
void say_step(const std::string& message);
double seconds_since_start();

// One request for text, answered or refused. Times in seconds since it came; below 0: not reached.
struct Generation {
    int status = 200;  // of HTTP; 499: the client left before its answer was whole
    std::string id, model;
    std::string finish_reason;  // of each choice; one word where all have the same
    std::string param;          // the field that was refused, never its value
    std::string trace;          // the header X-Cloud-Trace-Context or traceparent, as it came
    int prompt_tokens = 0, completion_tokens = 0;
    double queued = -1, first_token = -1, total = 0;
};
void say(const Generation& generation);

// The Google Cloud project that a trace's name begins with. Without it a trace is left out.
void set_trace_project(const std::string& project);
bool logs_json();

}  // namespace gemma
