#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Freeze the results of Hugging Face transformers on the tasks in tasks/ in golden.json.

    pip install -r tests/requirements.txt
    python tests/clients/golden.py

For each ending of each sentence in facts.jsonl: the sum of its tokens' logprobs, their number, and
whether every token is the likeliest (greedy). For each question in answers.jsonl: the greedy answer
up to the stop string. fp32 on one thread, with functions of tests/make_golden.py.

tolerance is for one token's logprob, derived as in tests/engine_test.cpp: both sides compute in
fp32, so they differ by the roundings of their sums. The error of transformers is measured here
against float64 (fp64_max_abs_diff); the server's may be as large, and a factor of 4 covers the
extremes of other inputs. Log softmax adds the rounding of a logprob near -32, and V probabilities
rounded to 2^-40. A sum over n tokens may be off by n times as much. Where a greedy choice decides,
the two best logits must be further apart than twice the tolerance (checked here), so that the
server chooses the same token.
"""
import json
import sys
from pathlib import Path

import numpy as np
import sentencepiece
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.dont_write_bytecode = True
import make_golden  # noqa: E402
from make_golden import BOS, END, START  # noqa: E402

MODEL = HERE.parents[1] / "demo/model"
MAX_TOKENS, STOP, EOS = 64, ". ", (1, END)  # as in answers.yaml and generation_config.json


def read(name):
    return [json.loads(line) for line in (HERE / "tasks" / name).open(encoding="utf-8")]


def main():
    torch.set_num_threads(1)
    model = make_golden.load(MODEL, torch.float32)
    sp = sentencepiece.SentencePieceProcessor(str(MODEL / "tokenizer.model"))
    vocabulary, roundings, gaps = model.config.vocab_size, 0.0, []

    def rows_of(ids, positions):
        """logits at the positions, and how far float64 is from them"""
        nonlocal roundings
        fp32 = make_golden.logits(model, ids, positions).numpy()
        fp64 = make_golden.forward64(MODEL, model.config, ids, positions)
        roundings = max(roundings, float(np.abs(fp32 - fp64).max()))
        return fp32.astype(np.float64)

    facts = []
    for doc in read("facts.jsonl"):
        ends = []
        for end in doc["ends"]:
            opening = [BOS] + sp.encode(doc["opening"])
            ids = [BOS] + sp.encode(doc["opening"] + " " + end)
            assert ids[:len(opening)] == opening, "the end joins a token of the opening"
            rows = rows_of(ids, list(range(len(opening) - 1, len(ids) - 1)))
            logprobs = rows - np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(
                -1, keepdims=True)) - rows.max(-1, keepdims=True)
            tokens = ids[len(opening):]
            chosen = logprobs[np.arange(len(tokens)), tokens]
            others = logprobs.copy()
            others[np.arange(len(tokens)), tokens] = -np.inf
            lead = chosen - others.max(-1)  # above 0: the token is the likeliest
            # Either every token is the likeliest by this gap, or one is clearly not.
            gaps.append(float(lead.min() if (lead > 0).all() else -lead.min()))
            ends.append({"loglikelihood": float(chosen.sum()), "tokens": len(tokens),
                         "greedy": bool((lead > 0).all())})
        facts.append({"opening": doc["opening"], "ends": ends})

    answers = []
    for doc in read("answers.jsonl"):
        ids = [BOS, START] + sp.encode("user\n" + doc["question"]) + [END] + sp.encode("\n")
        ids += [START] + sp.encode("model\n")
        out = make_golden.greedy(model, ids, MAX_TOKENS)
        out = out[:next((i for i, token in enumerate(out) if token in EOS), MAX_TOKENS)]
        text = sp.decode(ids + out)[len(sp.decode(ids)):].split(STOP)[0]
        while len(out) > 1 and STOP in sp.decode(out[:-1]):
            out.pop()
        best = np.sort(rows_of(ids + out, list(range(len(ids) - 1, len(ids) + len(out)))), -1)
        gaps.append(float((best[:, -1] - best[:, -2]).min()))
        answers.append({"question": doc["question"], "text": text})

    tolerance = 8 * roundings + 2 ** -19 + vocabulary * 2 ** -40
    assert min(gaps) > 2 * tolerance, (min(gaps), tolerance)
    head = {"made_with": make_golden.MADE_WITH, "fp64_max_abs_diff": make_golden.short(roundings),
            "tolerance": make_golden.short(tolerance), "min_gap": make_golden.short(min(gaps))}
    print(head, sum(end["greedy"] for fact in facts for end in fact["ends"]), "greedy ends")

    def lines(entries):
        return ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in entries)
    fields = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    (HERE / "golden.json").write_text(
        f'{{\n{fields} "facts": [\n{lines(facts)}\n ],\n "answers": [\n{lines(answers)}\n ]\n}}\n',
        encoding="utf-8")


main()
