#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Judge schemas, regular expressions and choices that the server compiles, by jsonschema and re.

    tests/grammar_check.py JUDGE VOCABULARY [--schemas N] [--seed S]

JUDGE is a build of tests/grammar_judge.cpp. Needs Debian's python3-jsonschema and nothing else.
Schemas come in pairs: the one that is given to the server, and the `plain` one that says the same
in standard words: with the deviations that schema.cpp documents (types named, objects closed) and
without `nullable`. Texts that the judge generates must be valid; documents made here are accepted
if they are valid and refused if not. Prints each kind of failure with its shortest examples.
"""
import argparse
import collections
import copy
import datetime
import ipaddress
import json
import os
import random
import re
import select
import signal
import string
import subprocess
import sys
import time
import uuid
import warnings

try:
    import jsonschema
except ImportError:
    print("skipped: grammar_check: there is no python3-jsonschema")
    sys.exit(0)

warnings.simplefilter("ignore")
try:
    from re import _parser as sre
except ImportError:  # before Python 3.11
    import sre_parse as sre

sys.setrecursionlimit(30000)  # for the nested cases
rng = random.Random()
failures = collections.defaultdict(list)
counts = collections.Counter()
times = []  # (seconds, "compile" or "set", case)
KINDS = ("schema", "regex", "choices", "object")
ENDED = ("DEAD END", "ENDLESS")
POOL = "abcxyzABZ0189_ -./:@{}[]\"\\\n\t\x01\x7féß漢😀"
NAMES = ["a", "b", "name", "age", "x y", "é", 'q"', "a/b", "ab"]


def fault(kind, **details):
    counts["failures"] += 1
    failures[kind].append(json.dumps(details, ensure_ascii=False))


class Judge:
    """The child. It is started anew where it died, which is a failure."""

    def __init__(self, command):
        self.command, self.child, self.peak = command, None, 0

    def ask(self, case="", limit=100, **request):
        if self.child is None:
            self.child = subprocess.Popen(self.command, stdin=-1, stdout=-1, stderr=-1)
        counts["requests"] += 1
        begun = time.monotonic()
        line = b""
        try:
            self.child.stdin.write(json.dumps(request).encode() + b"\n")
            self.child.stdin.flush()
            while not line.endswith(b"\n"):
                left = begun + limit - time.monotonic()
                if not select.select([self.child.stdout], [], [], max(0, left))[0]:
                    return self.lost("the judge does not answer", case, request)
                part = self.child.stdout.read1(1 << 20)
                if not part:
                    return self.lost("the judge died", case, request)
                line += part
        except BrokenPipeError:
            return self.lost("the judge died", case, request)
        answer = json.loads(line)
        case = case or json.dumps(request)[:100]
        if "error" in answer and request.get("generate"):  # a request must be refused at once
            again = self.ask(case=case, **{k: v for k, v in request.items() if k in KINDS})
            if "error" not in again and "too complex" in answer["error"]:
                counts["hostile: refused where a text is made"] += 1  # its text ends early
            elif "error" not in again:
                fault("compiled, and refused only where a text is made", case=case, **answer)
        times.append((answer.get("compiled", time.monotonic() - begun), "compile", case))
        times.extend((s, "set", case) for s in answer.get("seconds") or [] if s > 4e-6)
        return answer

    def lost(self, kind, case, request):
        self.measure()
        self.child.kill()
        status = self.child.wait()
        errors = self.child.stderr.read().decode(errors="replace")[-200:]
        self.child = None
        fault(kind, case=case, request=json.dumps(request)[:300], status=status, errors=errors)
        return {"error": kind}

    def measure(self):
        try:
            status = open(f"/proc/{self.child.pid}/status").read()
            self.peak = max(self.peak, int(re.search(r"VmHWM:\s*(\d+)", status)[1]) >> 10)
        except (OSError, TypeError, AttributeError):
            pass


# Formats -----------------------------------------------------------------------------------------

def is_time(s):
    return bool(re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?"
                             r"([Zz]|[+-]([01]\d|2[0-3]):[0-5]\d)", s, re.ASCII))


def is_date(s):
    return bool(re.fullmatch(r"\d{4}-\d\d-\d\d", s, re.ASCII) and datetime.date.fromisoformat(s))


ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
PCHAR = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"
URI = (r"[A-Za-z][A-Za-z0-9+.-]*:"  # RFC 3986
       r"(//((?:[A-Za-z0-9._~!$&'()*+,;=:-]|%[0-9A-Fa-f]{2})*@)?"
       r"(\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)(:\d*)?(/P*)*"
       r"|/(P+(/P*)*)?|P+(/P*)*|)(\?(P|[/?])*)?(#(P|[/?])*)?").replace("P", PCHAR)
FORMATS = {
    "date": is_date,
    "time": is_time,
    "date-time": lambda s: s[10:11] in ("T", "t") and is_date(s[:10]) and is_time(s[11:]),
    "uuid": lambda s: re.fullmatch("[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}", s),
    "email": lambda s: re.fullmatch(rf"{ATOM}(\.{ATOM})*@{LABEL}(\.{LABEL})*", s),
    "ipv4": lambda s: ipaddress.IPv4Address(s) and re.fullmatch(r"[0-9.]+", s),
    "ipv6": lambda s: ipaddress.IPv6Address(s) and "%" not in s,
    "uri": lambda s: re.fullmatch(URI, s),
}
checker = jsonschema.FormatChecker(formats=())
for name, check in FORMATS.items():
    checker.checks(name, raises=ValueError)(
        lambda s, check=check: not isinstance(s, str) or bool(check(s)))


def of_format(name):
    day = datetime.date.fromordinal(rng.randint(1, 3652059)).isoformat()
    clock = "%02d:%02d:%02d" % (rng.randrange(24), rng.randrange(60), rng.randrange(60))
    clock += rng.choice(["", ".5", ".123456"]) + rng.choice(["Z", "+01:00", "-23:59"])
    words = ["a", "Bob", "x-1", "mail", "example"]
    host = ".".join(rng.choices(words, k=rng.randint(1, 3)) + ["com"])
    address = ipaddress.IPv6Address(rng.getrandbits(128) & rng.getrandbits(128))
    return {"date": day, "time": clock, "date-time": day + "T" + clock,
            "uuid": str(uuid.UUID(int=rng.getrandbits(128))),
            "email": ".".join(rng.choices(words + ["a_b", "x+y"], k=2)) + "@" + host,
            "ipv4": str(ipaddress.IPv4Address(rng.getrandbits(32))),
            "ipv6": rng.choice([str(address), "::1", "::", address.exploded, "fe80::1"]),
            "uri": rng.choice([f"https://{host}/a/b?q=1#x", f"http://{host}:8080", "urn:isbn:1",
                               f"mailto:bob@{host}", f"ftp://bob@{host}/%20a/",
                               f"https://{host}//x/", "http://[::1]/"])}[name]


# Regular expressions -----------------------------------------------------------------------------

def random_regex(depth=0):
    """Full-match semantics; without anchors."""
    if depth == 0 or rng.random() < 0.2:
        options = rng.choice([1, 1, 1, 2, 3])
    else:
        options = 1
    return "|".join("".join(random_atom(depth) for _ in range(rng.choice([0, 1, 2, 2, 3, 4])))
                    for _ in range(options))


def random_atom(depth):
    one = lambda: re.escape(rng.choice("abcxyz019 _-/.:\"\\é漢😀<&"))
    kind = rng.randrange(10)
    if kind < 4:
        atom = one()
    elif kind < 6:
        atom = "\\" + rng.choice("dwsdwsDWSnt.") if rng.random() < 0.8 else rng.choice([
            r"\x41", r"\u00e9", r"\-", "."])
    elif kind < 8 or depth > 2:
        atom = "[" + rng.choice(["", "", "^"]) + "".join(rng.choice([
            "a-f", "0-9", "x", "_", r"\d", r"\w", r"\s", r"\]", r"\-", "é", "à-ü", ".", r"\D",
            "\"", r"\\", r"\W"]) for _ in range(rng.randint(1, 3)))
        atom += rng.choice(["", "", "-"]) + "]"
    else:
        opening = rng.choice(["(", "(?:", f"(?P<g{rng.getrandbits(30)}>"])
        atom = opening + "|".join(random_regex(depth + 1) for _ in range(rng.randint(1, 3))) + ")"
    if rng.random() < 0.35:
        atom += rng.choice(["*", "+", "?", "{2}", "{1,3}", "{2,}", "{,2}", "{0}", "{0,1}", "{,}"])
        atom += rng.choice(["", "", "?"])
    return atom


def random_pattern():
    """Search semantics: each alternative has its anchors."""
    parts = []
    for _ in range(rng.choice([1, 1, 2])):
        inner = random_regex(1)
        inner = f"({inner})" if "|" in inner else inner
        parts.append(rng.choice(["^", "^", ""]) + inner + rng.choice(["$", "$", ""]))
    return "|".join(parts)


def sample(tree):
    out = ""
    for op, arg in tree:
        op = str(op)
        if op == "LITERAL":
            out += chr(arg)
        elif op in ("NOT_LITERAL", "ANY", "IN"):
            out += rng.choice([c for c in POOL + "df\x0b" if member(op, arg, c)] or ["\0"])
        elif op in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, inner = arg
            out += "".join(sample(inner) for _ in range(rng.randint(low, min(high, low + 3))))
        elif op == "SUBPATTERN":
            out += sample(arg[-1])
        elif op == "BRANCH":
            out += sample(rng.choice(arg[1]))
    return out


def member(op, arg, c):
    if op != "IN":
        return c != "\n" if op == "ANY" else ord(c) != arg
    negated, found = False, False
    for kind, value in arg:
        kind = str(kind)
        negated |= kind == "NEGATE"
        found |= kind == "LITERAL" and ord(c) == value
        found |= kind == "RANGE" and value[0] <= ord(c) <= value[1]
        if kind == "CATEGORY":
            name = str(value).split("_")
            letter = {"DIGIT": "d", "WORD": "w", "SPACE": "s"}[name[-1]]
            found |= bool(re.match("\\" + (letter.upper() if "NOT" in name else letter), c, re.A))
    return found != negated


def matches(pattern, text, search=False):
    """None: it took Python more than a second."""
    def alarm(*_):
        raise TimeoutError
    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        if search:  # $ means the end, not a \n before it
            whole = re.sub(r"\$(?=$|\|)", r"\\Z", pattern)
            return bool(re.search(whole, text, re.ASCII))
        return bool(re.fullmatch(pattern, text, re.ASCII))
    except TimeoutError:
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def mutated_text(text):
    at = rng.randint(0, len(text))
    return rng.choice([text[:at] + text[at + 1:], text[:at] + rng.choice(POOL) + text[at:],
                       text[:at] + rng.choice(POOL) + text[at + 1:], text + text, text[:at]])


def check_regex(judge, in_json):
    pattern = random_pattern() if in_json else random_regex()
    try:
        tree = sre.parse(pattern, re.ASCII)
    except re.error:
        return
    texts = [sample(tree) for _ in range(8)]
    texts += [mutated_text(rng.choice(texts)) for _ in range(16)]
    texts += [rng.choice(POOL) + t + rng.choice(POOL) for t in texts[:3]]
    quoted = [json.dumps(t, ensure_ascii=False) for t in texts] if in_json else texts
    ask = {"schema": {"type": "string", "pattern": pattern}} if in_json else {"regex": pattern}
    answer = judge.ask(accept=quoted, generate=4, seed=rng.getrandbits(32), **ask)
    kind = "pattern" if in_json else "regex"
    if "error" in answer:
        if "no text" not in answer["error"] and "no document" not in answer["error"]:
            fault(f"{kind}: refused", pattern=pattern, error=answer["error"])
        elif any(matches(pattern, t, in_json) for t in texts):
            fault(f"{kind}: refused as without a text", pattern=pattern)
        return
    counts[f"{kind} texts"] += len(texts) + len(answer["texts"])
    narrow = re.search(r"\\[DWS]|\[\^.*\\[dws]", pattern)  # of ASCII only, as documented
    for text, accepted in zip(texts, answer["accepted"]):
        expected = matches(pattern, text, in_json)
        if accepted and expected is False:
            fault(f"{kind}: accepted, does not match", pattern=pattern, text=text)
        if not accepted and expected and (text.isascii() or not narrow):
            fault(f"{kind}: matches, not accepted", pattern=pattern, text=text)
    for text in answer["texts"]:
        if text.startswith("ENDLESS"):
            counts["endless: a pattern's rare character"] += 1
            continue
        if text.startswith("DEAD END"):
            fault(f"{kind}: DEAD END", pattern=pattern, text=text[:200])
            continue
        try:
            inner = json.loads(text) if in_json else text
        except ValueError:
            fault("pattern: generated text is no JSON", pattern=pattern, text=text)
            continue
        if matches(pattern, inner, in_json) is False:
            fault(f"{kind}: generated text does not match", pattern=pattern, text=text)


def check_choices(judge):
    choices = ["".join(rng.choices(POOL, k=rng.randint(1, 6))) for _ in range(rng.randint(1, 30))]
    choices += [c[:-1] for c in choices[:5] if len(c) > 1]
    texts = choices + [mutated_text(c) for c in choices]
    answer = judge.ask(choices=choices, accept=texts, generate=5, seed=rng.getrandbits(32))
    wrong = [t for t, is_in in zip(texts, answer["accepted"]) if is_in != (t in choices)]
    wrong += [t for t in answer["texts"] if t not in choices]
    if wrong:
        fault("choices: wrong", choices=choices, texts=wrong)


# Schemas -----------------------------------------------------------------------------------------

def any_value(depth=0):
    kinds = [None, True, False, 0, 1, -7, 12345, 1.5, -0.25, 1e30, "", "a", "b\"c", "é\n", "漢"]
    if depth < 2 and rng.random() < 0.15:
        return [any_value(depth + 1) for _ in range(rng.randrange(3))]
    if depth < 2 and rng.random() < 0.15:
        return {rng.choice(NAMES): any_value(depth + 1) for _ in range(rng.randrange(3))}
    return rng.choice(kinds)


class Schemas:
    """Makes pairs (given, plain)."""

    def __init__(self):
        self.given_defs, self.plain_defs = {}, {}
        for i in range(rng.choice([0, 0, 0, 1, 2])):
            ref = {"$ref": f"#/$defs/n{i}"}
            leaf, plain = self.leaf()
            if rng.random() < 0.3:
                given, plain = self.schema(1)
            elif rng.random() < 0.5:
                end = {"anyOf": [ref, {"type": "null"}]}
                given = {"type": "object", "properties": {"v": leaf, "next": end},
                         "required": rng.choice([["v"], ["v", "next"], []])}
                plain = dict(given, properties={"v": plain, "next": end},
                             additionalProperties=False)
            else:
                given = {"anyOf": [leaf, {"type": "array", "items": ref, "maxItems": 3}]}
                plain = {"anyOf": [plain, given["anyOf"][1]]}
            self.given_defs[f"n{i}"], self.plain_defs[f"n{i}"] = given, plain

    def whole(self):
        given, plain = self.schema(0)
        if not isinstance(given, dict):
            given, plain = {}, {}
        if self.given_defs:
            given = dict(given, **{"$defs": self.given_defs})
            plain = dict(plain, **{"$defs": self.plain_defs})
        return given, plain

    def leaf(self):
        return rng.choice([self.string, self.string, self.integer, self.simple, self.values])()

    def schema(self, depth):
        makers = [self.object] * 5 + [self.array] * 4 + [self.any_of] * 2 + [
            self.one_of, self.one_of, self.all_of, self.all_raw, self.several, self.ref]
        if depth > 2 or rng.random() < 0.3:
            given, plain = self.leaf()
        else:
            given, plain = rng.choice(makers)(depth + 1)
        if isinstance(given, dict) and rng.random() < 0.06:
            given, plain = dict(given, nullable=True), {"anyOf": [plain, {"type": "null"}]}
        if isinstance(given, dict) and rng.random() < 0.1:
            given = dict(given, **rng.choice([
                {"title": "T"}, {"description": "d", "default": 1}, {"$comment": "c"},
                {"examples": [1, {}]}, {"deprecated": True, "readOnly": False}]))
        return given, plain

    def unnamed(self, plain):
        """The type may be left out where other keywords speak of it."""
        speaking = set(plain) & {"properties", "required", "items", "prefixItems", "minItems",
                                 "maxItems", "pattern", "minLength", "maxLength", "format"}
        given = dict(plain)
        if speaking and rng.random() < 0.2:
            del given["type"]
        return given

    def string(self):
        plain = {"type": "string"}
        kind = rng.randrange(6)
        if kind == 0:
            plain["pattern"] = random_pattern()
        elif kind == 1:
            plain["format"] = rng.choice(list(FORMATS))
        elif kind == 2:
            plain["pattern"] = rng.choice(["^[a-z]+$", "^[A-Z][a-z]*$", r"^\d{2,5}$", "^.*$", "é"])
        if kind in (0, 1, 2, 3) and rng.random() < 0.4 or kind == 3:
            plain["minLength"] = rng.randint(0, 6)
        if rng.random() < 0.4 and kind in (0, 1, 2, 3):
            plain["maxLength"] = rng.randint(0, 12) + plain.get("minLength", 0) - rng.randint(0, 1)
            plain["maxLength"] = max(0, plain["maxLength"])
        try:
            re.compile(plain.get("pattern", ""))
        except re.error:
            del plain["pattern"]
        return self.unnamed(plain), plain

    def integer(self):
        plain = {"type": "integer"}
        low = rng.choice([0, 1, -5, 17, -1000, -99999, 10**12, rng.randint(-10**6, 10**6)])
        if rng.random() < 0.5:
            plain[rng.choice(["minimum", "exclusiveMinimum"])] = rng.choice([low, low, low + 0.5])
        if rng.random() < 0.5:
            plain[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.choice(
                [0, 1, 2, 9, 50, 12345, 0.5, -1])
        return plain, plain

    def simple(self):
        plain = rng.choice([{"type": "number"}, {"type": "boolean"}, {"type": "null"}, {}, True,
                            {"type": "string"}, {"type": "object"}, {"type": "array"}])
        return plain, plain

    def values(self):
        if rng.random() < 0.4:
            given = {"const": any_value()}
        else:
            given = {"enum": [any_value() for _ in range(rng.randint(1, 6))]}
        if rng.random() < 0.2:
            given["type"] = rng.choice(["string", "integer", "number", ["string", "null"]])
        if rng.random() < 0.1:  # all keywords must hold
            word = rng.choice([{"minLength": 1}, {"maxLength": 1}, {"pattern": "^a"},
                               {"minItems": 1}, {"required": ["a"]}])
            of = {"minItems": "array", "required": "object"}.get(*word, "string")
            given.update(word)
            return given, dict({"type": of}, **given)
        return given, given

    def object(self, depth, leaves=False):
        make = self.leaf if leaves else lambda: self.schema(depth)
        names = rng.sample(NAMES, rng.choice([0, 1, 2, 2, 3, 4]))
        pairs = {n: make() for n in names}
        given, plain = {"type": "object"}, {"type": "object"}
        if names or rng.random() < 0.2:
            given["properties"] = {n: pairs[n][0] for n in names}
            plain["properties"] = {n: pairs[n][1] for n in names}
        required = [n for n in names if rng.random() < 0.5]
        if rng.random() < 0.1:
            required.append("other")
        if required or rng.random() < 0.1:
            given["required"] = plain["required"] = required
        more = rng.choice([None, None, False, True, "schema"])
        if more is not None:
            given["additionalProperties"], plain["additionalProperties"] = (
                make() if more == "schema" else (more, more))
        elif "properties" in given:
            plain["additionalProperties"] = False
        if "properties" in given and rng.random() < 0.1:
            del given["type"]
        return given, plain

    def array(self, depth):
        given, plain = {"type": "array"}, {"type": "array"}
        if rng.random() < 0.3:
            first = [self.schema(depth) for _ in range(rng.randint(1, 3))]
            given["prefixItems"] = [g for g, _ in first]
            plain["prefixItems"] = [p for _, p in first]
        if rng.random() < 0.8:
            given["items"], plain["items"] = (
                (False, False) if rng.random() < 0.1 else self.schema(depth))
        if rng.random() < 0.4:
            given["minItems"] = plain["minItems"] = rng.randint(0, 4)
        if rng.random() < 0.4:
            given["maxItems"] = plain["maxItems"] = rng.randint(0, 5)
        if len(given) > 1 and rng.random() < 0.1:
            del given["type"]
        return given, plain

    def any_of(self, depth):
        if rng.random() < 0.3:
            given, plain = self.object(depth)
            names = list(given.get("properties", {})) or ["other"]
            some = [{"required": [rng.choice(names)]} for _ in range(2)]
            return dict(given, anyOf=some), dict(plain, anyOf=some)
        pairs = [self.schema(depth) for _ in range(rng.randint(1, 3))]
        return {"anyOf": [g for g, _ in pairs]}, {"anyOf": [p for _, p in pairs]}

    def one_of(self, depth):
        kind = rng.randrange(3)
        if kind == 0:  # told apart by a property
            pairs = [self.object(depth, leaves=True) for _ in range(rng.randint(2, 3))]
            for i, pair in enumerate(pairs):
                for one in pair:
                    one["type"] = "object"
                    one["properties"] = {"tag": {"const": f"t{i}"}, **one.get("properties", {})}
                    one["required"] = ["tag"] + one.get("required", [])
                pair[1].setdefault("additionalProperties", False)
        elif kind == 1:  # by type
            pairs = rng.sample([self.string(), self.integer(), self.object(depth),
                                self.array(depth), ({"type": "null"},) * 2], rng.randint(2, 3))
        else:
            pairs = [self.schema(depth), self.schema(depth)]
        return {"oneOf": [g for g, _ in pairs]}, {"oneOf": [p for _, p in pairs]}

    def all_of(self, depth):
        """One schema, its keywords dealt out."""
        maker = rng.choice([self.string, self.integer, lambda: self.object(depth)])
        given, plain = maker()
        parts = [{}, {}]
        for keyword, value in given.items():
            together = "additionalProperties" in given and keyword != "type"
            parts[0 if together else rng.randrange(2)][keyword] = value
        if "type" in given:
            rng.choice(parts)["type"] = given["type"]
        base = parts.pop() if rng.random() < 0.4 else {}
        return dict(base, allOf=parts), plain

    def all_raw(self, depth):
        """Two that know nothing of each other."""
        kind = rng.randrange(4)
        maker = [self.string, self.integer, lambda: self.array(3),
                 lambda: self.object(depth, leaves=True)][kind]
        pairs = [maker(), maker()]
        given, plain = {"allOf": [g for g, _ in pairs]}, {"allOf": [p for _, p in pairs]}
        if kind == 3:  # what is not named in either is closed, unless one speaks of it
            if any("additionalProperties" in g for g, _ in pairs):
                plain["allOf"] = [p if "additionalProperties" in g else
                                  {k: v for k, v in p.items() if k != "additionalProperties"}
                                  for g, p in pairs]
            elif any("properties" in g for g, _ in pairs):
                names = {n: {} for g, _ in pairs for n in g.get("properties", {})}
                plain["allOf"] = [{k: v for k, v in p.items() if k != "additionalProperties"}
                                  for _, p in pairs]
                plain["allOf"].append({"properties": names, "additionalProperties": False})
        return given, plain

    def several(self, depth):
        (one, plain_one), (other, plain_other) = rng.choice([
            (self.string(), self.integer()), (self.object(depth), self.string()),
            (self.array(depth), ({"type": "null"},) * 2),
            (({"type": "number"},) * 2, self.string())])
        types = {"type": [plain_one["type"], plain_other["type"]]}
        return {**one, **other, **types}, {**plain_one, **plain_other, **types}

    def ref(self, depth):
        if not self.given_defs:
            return self.schema(depth)
        ref = {"$ref": "#/$defs/" + rng.choice(list(self.given_defs))}
        return ref, ref


class Impossible(Exception):
    pass


def instance(s, root, depth=0):
    """A document that may fit `s`, which is plain."""
    if s is False or depth > 14:
        raise Impossible
    if s is True or not set(s) - {"$defs"}:
        return any_value(2)
    if "$ref" in s:
        return instance(root["$defs"][s["$ref"].split("/")[-1]], root, depth + 1)
    for keyword in ("anyOf", "oneOf"):
        if keyword in s and "type" not in s:
            branches = s[keyword]
            small = [b for b in branches if isinstance(b, dict) and b.get("type") == "null"]
            return instance(rng.choice(small if small and depth > 6 else branches), root, depth + 1)
    if "allOf" in s:
        return instance_all(s["allOf"], root, depth)
    if "const" in s or "enum" in s:
        return rng.choice(s.get("enum", [s.get("const")]))
    kind = s.get("type")
    kind = rng.choice(kind) if isinstance(kind, list) else kind
    if kind == "string":
        return some_string(s)
    if kind == "integer":
        low, high = s.get("minimum", s.get("exclusiveMinimum")), s.get(
            "maximum", s.get("exclusiveMaximum"))
        near = [int(v) + d for v in (low, high) if v is not None for d in (-1, 0, 1)]
        if len(near) == 6 and low <= high:
            near.append(rng.randint(int(low), int(high)))
        return rng.choice(near or [0, -1, 7, 10**9])
    if kind == "number":
        return rng.choice([0, 1.5, -2, 1e-9, 123456.789, 2.5e120, -7e-05])
    if kind == "array":
        return some_array(s, root, depth)
    if kind == "object":
        return some_object(s, root, depth)
    return None if kind == "null" else rng.random() < 0.5


def instance_all(parts, root, depth):
    if not any(p.get("type") == "object" for p in parts):
        return instance(rng.choice(parts), root, depth + 1)
    whole = {"type": "object", "properties": {}, "required": [], "additionalProperties": True}
    for p in parts:
        for name, value in p.get("properties", {}).items():
            old = whole["properties"].get(name)
            whole["properties"][name] = value if not isinstance(old, dict) or not old else (
                {"allOf": [old, value]} if isinstance(value, dict) and value else old)
        whole["required"] += p.get("required", [])
        if whole["additionalProperties"] is True:
            whole["additionalProperties"] = p.get("additionalProperties", True)
    return some_object(whole, root, depth)


def some_string(s):
    if "format" in s:
        return of_format(s["format"])
    low, high = s.get("minLength", 0), s.get("maxLength", 20)
    if "pattern" not in s:
        return "".join(rng.choices(POOL, k=rng.randint(low, max(low, high))))
    tree = sre.parse(s["pattern"], re.ASCII)
    for _ in range(20):
        text = sample(tree)
        if not s["pattern"].startswith("^"):
            text = rng.choice(["", "x", "é\n", " "]) + text
        if not s["pattern"].endswith("$"):
            text += rng.choice(["", "y", '"', "z" * low])
        if low <= len(text) <= high:
            return text
    raise Impossible


def some_array(s, root, depth):
    low, high = s.get("minItems", 0), s.get("maxItems", s.get("minItems", 0) + 3)
    prefix = s.get("prefixItems", [])
    if depth > 6:
        high = low
    elif s.get("items") is False:
        high = min(high, len(prefix))
    out = []
    for i in range(rng.randint(low, max(low, high))):
        item = prefix[i] if i < len(prefix) else s.get("items", True)
        out.append(instance(item, root, depth + 1))
    return out


def some_object(s, root, depth):
    """In the order of the schema: properties, then others that are required, then others."""
    out, required = {}, s.get("required", [])
    for name, value in s.get("properties", {}).items():
        if name in required or (rng.random() < 0.5 and depth < 6):
            try:
                out[name] = instance(value, root, depth + 1)
            except Impossible:
                if name in required:
                    raise
    more = s.get("additionalProperties", True)
    extra = [n for n in rng.choice([[], [], ["zz", "p\"q"], ["漢"]]) if more is not False]
    for name in required + extra:
        if name not in s.get("properties", {}):
            out[name] = instance(more, root, depth + 1)
    return out


# Judging schemas ---------------------------------------------------------------------------------

def ascii_pattern(validator, pattern, value, schema):
    if isinstance(value, str) and matches(pattern, value, search=True) is False:
        yield jsonschema.ValidationError("pattern")


Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator,
                                         {"pattern": ascii_pattern})


def without_nullable(s):
    """The given schema in standard words, closed or not."""
    if isinstance(s, list):
        return [without_nullable(one) for one in s]
    if not isinstance(s, dict):
        return s
    out = {k: v if k in ("const", "enum", "default", "examples") else without_nullable(v)
           for k, v in s.items()}
    if out.pop("nullable", None) is True:
        defs = {"$defs": out.pop("$defs")} if "$defs" in out else {}
        return {"anyOf": [out, {"type": "null"}], **defs}
    return out


def mutated(value):
    """Another document, which is often invalid."""
    value = copy.deepcopy(value)
    if isinstance(value, dict) and value and rng.random() < 0.7:
        name = rng.choice(list(value))
        kind = rng.randrange(4)
        if kind == 0:
            del value[name]
        elif kind == 1:
            value["unknown"] = rng.choice([1, "a", None])
        else:
            value[name] = mutated(value[name])
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return rng.choice([value[:at], value + value, value + [None],
                           value[:at] + [mutated(value[at])] + value[at + 1:]])
    if isinstance(value, str) and rng.random() < 0.7:
        return mutated_text(value)
    if isinstance(value, int) and rng.random() < 0.7:
        return value + rng.choice([-1, 1, 10**6, -10**6, 0.5])
    return any_value(1)


def written(value):
    return [json.dumps(value, ensure_ascii=False, **how)
            for how in ({}, {"separators": (",", ":")}, {"indent": 2})]


def documents(plain, valid, wanted=20):
    out = []
    for _ in range(3 * wanted):
        try:
            value = instance(plain, plain)
        except (Impossible, IndexError):
            continue
        if len(json.dumps(value)) < 5000 and valid(value):
            out.append(value)
        if len(out) == wanted:
            break
    return out


def negatives(good, valid):
    """Texts of no valid document: other documents, and texts with an error in writing."""
    texts = []
    for value in good[:15]:
        other = mutated(value)
        if not valid(other):
            texts += written(other)
        text = mutated_text(rng.choice(written(value)))
        try:
            wrong = not valid(json.loads(text))
        except ValueError:
            wrong = True
        if wrong:
            texts.append(text)
    return texts


EXPECTED = {"overlapping oneOf": "use anyOf", "twice in allOf": "stands twice",
            "no document": "no document fits", "endless $ref": "would have no end"}


def check_schema(judge):
    given, plain = Schemas().whole()
    validator = Validator(plain, format_checker=checker)
    valid = lambda value: validator.is_valid(value)
    good = documents(plain, valid)
    positive = [t for value in good for t in written(value)]
    negative = negatives(good, valid)
    answer = judge.ask(schema=given, accept=positive + negative, generate=4,
                       seed=rng.getrandbits(32))
    counts["schemas"] += 1
    counts["documents"] += len(good)
    counts["invalid texts"] += len(negative)
    if "error" in answer:
        kinds = [k for k, part in EXPECTED.items() if part in answer["error"]]
        for kind in kinds or ["other"]:
            counts["refused: " + kind] += 1
        if not kinds:
            fault("schema: refused", schema=given, error=answer["error"])
        elif kinds[0] in ("no document", "endless $ref") and good:
            fault("schema: refused as without a document", schema=given, document=good[0])
        return
    counts["schemas without documents of mine"] += not good
    accepted = answer.get("accepted") or []
    # Of ASCII only, as documented.
    narrow = re.search(r"\\\\[DWS]|\[\^.*\\\\[dws]", json.dumps(given))
    for text, is_in in zip(positive, accepted):
        if not is_in and (text.isascii() or not narrow):
            fault("schema: valid, not accepted", schema=given, text=text)
            break
    for text, is_in in zip(negative, accepted[len(positive):]):
        if is_in:
            fault("schema: invalid, accepted", schema=given, text=text)
            break
    literal = Validator(without_nullable(given), format_checker=checker)
    for text in answer["texts"]:
        check_generated(text, given, valid,
                        valid if "oneOf" in json.dumps(given) else literal.is_valid)


def check_generated(text, given, valid, literally):
    counts["generated texts"] += 1
    if text.startswith("ENDLESS") and "pattern" in json.dumps(given):
        counts["endless: a pattern's rare character"] += 1
        return None
    if text.startswith(ENDED):
        return fault("schema: " + text[:7], schema=given, text=text[:300])
    try:
        value = json.loads(text)
    except ValueError:
        return fault("schema: generated text is no JSON", schema=given, text=text[:500])
    if not literally(value):
        fault("schema: generated text is invalid", schema=given, text=text[:500])
    elif not valid(value):
        fault("schema: generated text is invalid but for deviations", schema=given, text=text[:500])


UNSUPPORTED = {"not": {}, "if": {}, "uniqueItems": True, "multipleOf": 2, "minProperties": 1,
               "patternProperties": {"^a": {}}, "contains": {}, "propertyNames": {},
               "dependentRequired": {"a": ["b"]}, "unevaluatedProperties": False,
               "$dynamicRef": "#", "contentEncoding": "base64", "additionalItems": False}


def check_unsupported(judge):
    """Somewhere in a schema where it is reached, it is refused and named."""
    given, _ = Schemas().whole()
    places = []

    def visit(s):
        if not isinstance(s, dict):
            return
        places.append(s)
        for one in list(s.get("properties", {}).values()) + s.get("anyOf", []):
            visit(one)
        most = s.get("maxItems", 9)
        if most > len(s.get("prefixItems", [])) and most >= s.get("minItems", 0):
            visit(s.get("items"))

    visit(given)
    keyword = rng.choice(list(UNSUPPORTED))
    given = copy.deepcopy(given)  # equal schemas were one object
    places.clear()
    visit(given)
    rng.choice(places)[keyword] = UNSUPPORTED[keyword]
    error = judge.ask(schema=given).get("error", "")
    counts["unsupported"] += 1
    if not error:
        fault("schema: unsupported keyword passed", schema=given, keyword=keyword)
    elif keyword not in error and not any(p in error for p in EXPECTED.values()):
        fault("schema: unsupported keyword not named", schema=given, error=error)


# Fixed cases -------------------------------------------------------------------------------------

def nested(depth, make, inner):
    for _ in range(depth):
        inner = make(inner)
    return inner


def hostile_schemas():
    deep = nested(99, lambda s: {"type": "array", "items": s}, {"type": "string"})
    own = {"$ref": "#/$defs/n"}
    loop = {"type": "object", "properties": {"n": own}, "required": ["n"]}
    bomb = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}
    bomb["d30"] = {"type": "string"}
    pairs = {f"d{i}": {"type": "object", "required": ["a", "b"], "properties": {
        n: {"$ref": f"#/$defs/d{i + 1}"} for n in "ab"}} for i in range(40)}
    pairs["d40"] = {"type": "integer"}
    fields = {f"p{i:04}": {"type": "integer"} for i in range(5000)}
    return {
        "99 arrays": deep,
        "300 objects": nested(300, lambda s: {"type": "object", "properties": {"a": s}}, {}),
        "20,000 strings": {"enum": ["%030x" % random.Random(i).getrandbits(120)
                                    for i in range(20000)]},
        "long const": {"const": "x" * 70000}, "very long const": {"const": "x" * 2000000},
        "5,000 properties": {"type": "object", "properties": fields},
        "5,000 required": {"type": "object", "properties": fields, "required": list(fields)},
        "1,000 optional": {"type": "object", "properties": dict(list(fields.items())[:1000])},
        "300 optional, open": {"type": "object", "properties": dict(list(fields.items())[:300]),
                               "additionalProperties": {"type": "integer"}},
        "own $ref": {"$ref": "#"}, "own $ref in allOf": {"allOf": [{"$ref": "#"}]},
        "own $ref in anyOf": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        "own $ref and type": {"$ref": "#", "type": "string"},
        "endless $ref": {**own, "$defs": {"n": loop}},
        "oneOf of endless": {"oneOf": [own, own], "$defs": {"n": loop}},
        "oneOf of lists": {"oneOf": [own, {"$ref": "#/$defs/m"}], "$defs": {
            "n": loop, "m": {"type": "object", "properties": {"n": {"$ref": "#/$defs/m"}},
                             "required": ["n"]}}},
        "allOf bomb": {"$ref": "#/$defs/d0", "$defs": bomb},
        "anyOf bomb": {"$ref": "#/$defs/d0", "$defs": json.loads(
            json.dumps(bomb).replace("allOf", "anyOf"))},
        "oneOf bomb": {"$ref": "#/$defs/d0", "$defs": json.loads(
            json.dumps(bomb).replace("allOf", "oneOf"))},
        "oneOf of pairs": {"oneOf": [{"$ref": "#/$defs/d0"}, {"$ref": "#/$defs/d0"}],
                           "$defs": pairs},
        "pairs of pairs": {"$ref": "#/$defs/d0", "$defs": pairs},
        "1,000 oneOf": {"oneOf": [{"type": "object", "properties": {"t": {"const": i}},
                                   "required": ["t"]} for i in range(1000)]},
        "1,000 anyOf": {"anyOf": [{"type": "object", "properties": {f"t{i}": {"const": i}},
                                   "required": [f"t{i}"]} for i in range(1000)]},
        "maxItems 10^9": {"type": "array", "minItems": 10**9, "maxItems": 10**9},
        "minLength 10^9": {"type": "string", "minLength": 10**9},
        "pattern and lengths": {"type": "string", "pattern": "^(a|b)*c.*d(x|yz)+$",
                                "minLength": 1000, "maxLength": 2000},
        "many prefixItems": {"type": "array", "prefixItems": [{"type": "integer"}] * 5000},
        "nested optionals": {"type": "string", "pattern": "a?" * 3000},
        "format and pattern": {"type": "string", "format": "uri", "pattern": "(a.*b.*c.*)+",
                               "maxLength": 100},
        "long names": {"type": "object", "properties": {"é" * 3000: {}, "é" * 2999 + "x": {}},
                       "additionalProperties": True},
    }


def hostile():
    patterns = ["(" * 60 + "a" + ")*" * 60, "(" * 5000 + "a" + ")" * 5000, "a{1000000000}",
                "a{999999999}", "((a{100000000}){10})b", "((a{1,1000}){1,1000}){1,1000}",
                "(.*a){20}.{20}", "((.{0,1000}){0,1000}){0,1000}x", "(a|a)*", "(a|aa)*b",
                "(a*)*", "(a?){500}a{500}", "(.*){100}x", "a?" * 450, ".*a.{300}", "(x+x+)+y",
                "[^a]{0,5000}z",
                "(" + "|".join(map(str, range(5000))) + ")*", "a?" * 2000, "a*" * 2000,
                "(a|b|ab)*(bc|c|a.)*" * 10, "(.{1,50}a|b.{1,50}){30}", ".{0,20000}x" * 3,
                "((a|b)*a(a|b){12})", "((a|b)*a(a|b){30})", "(?:" * 65 + ")" * 65, "a" * 100000,
                r"(\d+\.)*\d+" * 50, "(a{0,100}b{0,100}){0,100}c", "(((a?b?){9}c?){9}d?){9999}e"]
    for name, schema in hostile_schemas().items():
        yield name, {"schema": schema}
    for pattern in patterns:
        yield pattern[:60], {"regex": pattern}
        yield "pattern " + pattern[:60], {"schema": {"type": "string", "pattern": pattern}}
    yield "20,000 choices", {"choices": [str(i * 7919) for i in range(20000)]}


def check_objects(judge):
    """Any JSON object, and nothing else."""
    texts, expected = [], []
    for _ in range(50):
        value = any_value()
        texts += written(value)
        expected += [isinstance(value, dict)] * 3
    answer = judge.ask(object=True, accept=texts, generate=10)
    for text, is_in, wanted in zip(texts, answer["accepted"], expected):
        if is_in != wanted:
            fault("object: wrong", text=text)
    for text in answer["texts"]:
        check_generated(text, "any object", lambda v: isinstance(v, dict),
                        lambda v: isinstance(v, dict))


def report(judge):
    for kind, examples in sorted(failures.items()):
        print(f"\nFAILED: {kind} ({len(examples)} times)")
        for example in sorted(examples, key=len)[:6]:
            print("   ", example[:700])
    for what in ("compile", "set"):
        print(f"\nslowest of {what}:")
        best = {}  # of each case
        for seconds, of, case in times:
            if of == what:
                best[case] = max(best.get(case, 0), seconds)
        for case in sorted(best, key=best.get, reverse=True)[:10]:
            print(f"    {best[case] * 1e3:9.2f} ms  {case}")
    seconds = sorted(t for t, of, _ in times if of == "set")
    print()
    for name, count in sorted(counts.items()):
        print(f"{name:36}{count:10}")
    for percent in (50, 99):
        if seconds:
            value = seconds[len(seconds) * percent // 100] * 1e3
            print(f"{f'new set, p{percent}, ms':36}{value:10.3f}")
    print(f"{'new sets':36}{len(seconds):10}\n{'peak memory, MiB':36}{judge.peak:10}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("judge")
    parser.add_argument("vocabulary")
    scale = int(os.environ.get("GEMMA_SCALE", "100"))  # percent, as attack_test's
    parser.add_argument("--schemas", type=int, default=20 * scale)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    judge = Judge([args.judge, args.vocabulary])
    tasks = [(check_schema, args.schemas), (check_unsupported, args.schemas // 10),
             (lambda j: check_regex(j, False), args.schemas // 5),
             (lambda j: check_regex(j, True), args.schemas // 5), (check_choices, 20),
             (check_objects, 1)]
    for i, (task, count) in enumerate(tasks):
        for number in range(count):
            rng.seed(args.seed * 1000003 + i * 100003 + number)
            task(judge)
    judge.measure()
    print(f"peak memory before the hostile cases: {judge.peak} MiB")
    for name, request in hostile():
        answer = judge.ask(case=name, generate=2, **request)
        print(f"{name:62} {answer.get('error') or ''}"[:160], flush=True)
        judge.measure()
    report(judge)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
