// SPDX-License-Identifier: Apache-2.0
//
// fields.h: one table drives parsing, null, ranges, error texts and help, for the fields of
// requests (request.cpp) and for flags (main.cpp). Sitting 3. Every number from outside passes
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

inline std::string quote(const json& value) {  // JSON text, valid UTF-8 whatever the bytes
    return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

// A value in an error: cut, so that an answer is never much longer than its request.
inline std::string show(const json& value) {
    const std::string s = quote(value);
    return s.size() <= 100 ? s : s.substr(0, 97) + "...";
}

template <class T>
struct Field {
    const char* name;
    std::variant<bool T::*, int64_t T::*, double T::*, std::string T::*, std::vector<int> T::*,
                 std::vector<std::string> T::*, std::map<int, double> T::*>
        member;
    double low = 0, high = 0;  // of a number, or of the members of a list; of strings: how many
    const char* help = "";
    bool without_effect = false;  // read and checked, and said so
};

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

// The integer that a value is, within a range. 2^63 is the first double, and the first uint64, that
// an int64 cannot hold.
inline std::optional<int64_t> as_integer(const json& v, double low, double high) {
    const double number = as_number(v);
    const bool fits =
        number == std::floor(number) && number >= -0x1p63 &&
        (v.is_number_unsigned() ? v.get<uint64_t>() <= uint64_t(INT64_MAX) : number < 0x1p63);
    if (!fits || number < low || number > high) return {};
    return v.is_number_integer() ? v.get<int64_t>() : int64_t(number);
}

template <class T>
void assign(T& out, const Field<T>& field, const json& value) {
    const auto need = [&](bool met, const std::string& allowed) {
        if (met) return;
        refuse(field.name, "%s must be %s, got %s", field.name, allowed.c_str(),
               show(value).c_str());
    };
    const std::string range =
        (field.low == above_zero ? " above 0" : text(" of at least %.15g", field.low)) +
        (field.high == no_limit ? "" : text(" and at most %.15g", field.high));
    const double number = as_number(value);
    std::visit(
        [&](auto member) {
            using M = std::decay_t<decltype(out.*member)>;
            if constexpr (std::is_same_v<M, bool>) {
                const bool yes = value == "true" || number == 1;
                need(yes || value == "false" || number == 0, "true or false");
                out.*member = yes;
            } else if constexpr (std::is_same_v<M, int64_t>) {
                const auto integer = as_integer(value, field.low, field.high);
                need(integer.has_value(), "an integer" + range);
                out.*member = *integer;
            } else if constexpr (std::is_same_v<M, double>) {
                need(number >= field.low && number <= field.high && !value.is_boolean(),
                     "a number" + range);
                out.*member = number;
            } else if constexpr (std::is_same_v<M, std::string>) {
                need(value.is_string(), "a string");
                out.*member = value;
            } else if constexpr (std::is_same_v<M, std::vector<int>>) {
                need(value.is_array(), "a list of integers" + range);
                for (const json& one : value) {
                    const auto integer = as_integer(one, field.low, field.high);
                    need(integer.has_value() && one.is_number(), "a list of integers" + range);
                    (out.*member).push_back(int(*integer));
                }
            } else if constexpr (std::is_same_v<M, std::vector<std::string>>) {
                const json list = value.is_string() ? json::array({value}) : value;
                const auto good = [](const json& s) { return s.is_string() && s != ""; };
                need(list.is_array() && double(list.size()) <= field.high &&
                         std::all_of(list.begin(), list.end(), good),
                     text("a string or a list of at most %.0f, none of them empty", field.high));
                out.*member = list;
            } else {
                need(value.is_object(), "an object of token ids and numbers");
                for (const auto& [id, amount] : value.items()) {
                    const auto integer = as_integer(id, field.low, field.high);
                    const bool good = std::isfinite(as_number(amount)) && !amount.is_boolean();
                    need(integer && good, "an object of token ids and numbers");
                    (out.*member)[int(*integer)] = as_number(amount);
                }
            }
        },
        field.member);
}

template <class T>
void assign_all(T& out, const std::vector<Field<T>>& fields, const json& body) {
    for (const auto& field : fields) {
        const auto value = body.find(field.name);
        if (value != body.end() && !value->is_null()) assign(out, field, *value);
    }
}

}  // namespace gemma
