// SPDX-License-Identifier: Apache-2.0
//
// fields.h: one table drives parsing, null, ranges, error texts and help, for the fields of
// requests (request.cpp) and for flags (flags.cpp). Sitting 3. Every number from outside passes
// `assign` once, with its range, before it can become a size or an index.
#pragma once

#include <charconv>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <variant>

#include <nlohmann/json.hpp>

#include "http.h"
#include "log.h"

namespace gemma {

using nlohmann::json;

[[noreturn, gnu::format(printf, 2, 3)]] inline void refuse(const char* param, const char* format,
                                                           ...) {
    char message[1000];
    va_list args;
    va_start(args, format);
    std::vsnprintf(message, sizeof message, format, args);
    va_end(args);
    throw Refusal{400, message, param};
}

// JSON text, valid UTF-8 whatever the bytes. U+0085, U+2028 and U+2029 are escaped, because clients
// that divide a stream by Python's splitlines() would break an event there. In linear time: a text
// may be megabytes of them.
inline std::string quote(const json& value) {
    const std::string s = value.dump(-1, ' ', false, json::error_handler_t::replace);
    std::string escaped;
    for (size_t at = 0; at < s.size();) {
        const auto next = std::string_view(s).substr(at, 3);
        const bool nel = next.starts_with("\xc2\x85"), line = next == "\xe2\x80\xa8";
        const bool ends = nel || line || next == "\xe2\x80\xa9";
        escaped += nel ? "\\u0085" : line ? "\\u2028" : ends ? "\\u2029" : next.substr(0, 1);
        at += nel ? 2 : ends ? 3 : 1;
    }
    return escaped;
}

// A value in an error: cut, so that an answer is never much longer than its request.
inline std::string show(const json& value) {
    const std::string s = quote(value);
    return s.size() <= 100 ? s : s.substr(0, 97) + "...";
}

constexpr double no_limit = std::numeric_limits<double>::infinity();
constexpr double above_zero = std::numeric_limits<double>::min();
constexpr double any_id = std::numeric_limits<int>::max();  // the vocabulary is checked behind it

// As pydantic reads numbers: "16" is 16, true is 1. Not a number: NaN.
inline double as_number(const json& v) {
    if (v.is_boolean()) return v.get<bool>();
    if (v.is_number()) return v.get<double>();
    const std::string s = v.is_string() ? v.get<std::string>() : "";
    double d = 0;
    const auto [end, error] = std::from_chars(s.data(), s.data() + s.size(), d);
    return error == std::errc() && end == s.data() + s.size() ? d : std::nan("");
}

// The integer that a value is, if an int64 can hold it: of 16, 16.0, "16" and true, not of "1e2".
// JSON's parser rounds an integer below -2^63 to -2^63, as a double, so that double is refused.
inline std::optional<int64_t> as_integer(const json& v) {
    if (v.is_string()) {
        const auto& s = v.get_ref<const std::string&>();
        int64_t integer = 0;
        const auto [end, error] = std::from_chars(s.data(), s.data() + s.size(), integer);
        if (error != std::errc() || end != s.data() + s.size()) return {};
        return integer;
    }
    if (v.is_number_unsigned() && v.get<uint64_t>() > uint64_t(INT64_MAX)) return {};
    if (v.is_number_integer()) return v.get<int64_t>();
    const double number = as_number(v);
    if (number != std::floor(number) || std::fabs(number) >= 0x1p63) return {};
    return int64_t(number);
}

// What a field's value may be.
struct Allowed {
    const char* name;
    double low = 0, high = 0;  // of a number, or of the members of a list; of strings: how many

    std::string range() const {
        // A limit of int64 has pydantic's name for its error, which vLLM's clients look for.
        const auto print = [](double limit) {
            if (std::fabs(limit) < 0x1p63) return text("%.15g", limit);
            return limit < 0 ? std::to_string(INT64_MIN) + " (greater_than_equal)"
                             : std::to_string(INT64_MAX) + " (less_than_equal)";
        };
        return (low == above_zero ? " above 0" : " of at least " + print(low)) +
               (high == no_limit ? "" : " and at most " + print(high));
    }
    std::optional<int64_t> integer(const json& value) const {
        const auto integer = as_integer(value);
        const bool within = integer && double(*integer) >= low && double(*integer) <= high;
        return within ? integer : std::nullopt;
    }
    void need(bool met, const json& value, const std::string& wanted) const {
        if (met) return;
        refuse(name, "%s must be %s, got %s", name, wanted.c_str(), show(value).c_str());
    }
};

// One overload for each type of a member: checks a value, and puts it there.
inline void assign(bool& out, const Allowed& allowed, const json& value) {
    const double number = as_number(value);
    const bool yes = value == "true" || number == 1;
    allowed.need(yes || value == "false" || number == 0, value, "true or false");
    out = yes;
}
inline void assign(int64_t& out, const Allowed& allowed, const json& value) {
    const auto integer = allowed.integer(value);
    allowed.need(integer.has_value(), value, "an integer" + allowed.range());
    out = *integer;
}
inline void assign(double& out, const Allowed& allowed, const json& value) {
    const double number = as_number(value);
    const bool within = number >= allowed.low && number <= allowed.high;
    allowed.need(within && !value.is_boolean(), value, "a number" + allowed.range());
    out = number;
}
inline void assign(std::string& out, const Allowed& allowed, const json& value) {
    allowed.need(value.is_string(), value, "a string");
    out = value;
}
inline void assign(std::vector<int>& out, const Allowed& allowed, const json& value) {
    const std::string wanted = "a list of integers" + allowed.range();
    allowed.need(value.is_array(), value, wanted);
    for (const json& one : value) {
        const auto integer = allowed.integer(one);
        allowed.need(integer.has_value() && one.is_number(), value, wanted);
        out.push_back(int(*integer));
    }
}
inline void assign(std::vector<std::string>& out, const Allowed& allowed, const json& value) {
    const json list = value.is_string() ? json::array({value}) : value;
    const auto good = [](const json& s) { return s.is_string() && s != ""; };
    const bool met = list.is_array() && double(list.size()) <= allowed.high &&
                     std::all_of(list.begin(), list.end(), good);
    allowed.need(met, value,
                 text("a string or a list of at most %.0f, none of them empty", allowed.high));
    out = list;
}
inline void assign(std::map<int, double>& out, const Allowed& allowed, const json& value) {
    const char* const wanted = "an object of token ids and numbers";
    allowed.need(value.is_object(), value, wanted);
    for (const auto& [id, amount] : value.items()) {
        const auto integer = allowed.integer(id);
        const bool good = std::isfinite(as_number(amount)) && !amount.is_boolean();
        allowed.need(integer && good, value, wanted);
        out[int(*integer)] = as_number(amount);
    }
}

template <class T>
struct Field {
    const char* name;
    std::variant<bool T::*, int64_t T::*, double T::*, std::string T::*, std::vector<int> T::*,
                 std::vector<std::string> T::*, std::map<int, double> T::*>
        member;
    double low = 0, high = 0;  // as Allowed's
    const char* help = "";
};

template <class T>
void assign(T& out, const Field<T>& field, const json& value) {
    const Allowed allowed{field.name, field.low, field.high};
    std::visit([&](auto member) { assign(out.*member, allowed, value); }, field.member);
}

template <class T>
void assign_all(T& out, const std::vector<Field<T>>& fields, const json& body) {
    for (const auto& field : fields) {
        const auto value = body.find(field.name);
        if (value != body.end() && !value->is_null()) assign(out, field, *value);
    }
}

}  // namespace gemma
