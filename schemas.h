// SPDX-License-Identifier: Apache-2.0
//
// schemas.h: what the JSON schemas of one document say together: $ref, allOf, oneOf. Beside the
// path; schema.cpp makes languages of them.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

namespace gemma {

class Schemas {
  public:
    using ordered = nlohmann::ordered_json;  // objects keep the order of their members

    // param: the field that a Refusal names. `whole` must outlive this.
    Schemas(const ordered& whole, const char* of_request) : root(whole), param(of_request) {}

    // Each may throw a Refusal that names the place.
    [[noreturn]] void fail(const std::string& place, const std::string& what) const;
    void check_keywords(const ordered& schema, const std::string& place) const;
    const ordered& resolve(const ordered& schema, const std::string& place) const;  // its $ref
    std::vector<std::string> types_of(const ordered& schema, const std::string& place) const;
    // The schema of the values that fit both.
    ordered merged(const ordered& left, const ordered& right, const std::string& place);
    // Can no value fit both? False also where that is not seen.
    bool exclusive(const ordered& left, const ordered& right, const std::string& place,
                   int levels = 10);
    // The same schema, with null among its types or branches in the place of "nullable".
    ordered without_nullable(const ordered& schema) const;
    // Work that grows with a schema and not with its text. A hostile one is refused.
    void charge(size_t nodes, const std::string& place);

    // A member of an object; null, of static storage, if there is none.
    static const ordered& member(const ordered& object, std::string_view name);
    static bool has(const ordered& list, const ordered& value);  // is the value in the list?
    // What is left of a schema without a keyword, and without those that only describe.
    static ordered without(const ordered& schema, const std::string& keyword);

  private:
    bool share_no_type(const ordered& a, const ordered& b, const std::string& place) const;
    void merge_keyword(ordered& out, const std::string& keyword, const ordered& value,
                       const std::string& place);
    void merge_properties(ordered& out, const ordered& a, const ordered& b,
                          const std::string& place);
    void merge_items(ordered& out, const ordered& a, const ordered& b, const std::string& place);

    const ordered& root;
    const char* const param;
    size_t work = 0;
    int depth = 0;
};

}  // namespace gemma
