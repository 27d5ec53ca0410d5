# SPDX-License-Identifier: Apache-2.0
"""Measures how good the demo model is, with figures and samples, using Hugging Face transformers.

    python demo/check.py [--model demo/model] [--device cuda] [--only-tools]

Prints 20 samples for the codelab's prompt at temperature 0.9, then three for every other opening of
prompts.txt and for some foreign ones, the greedy answer to every question of chat.txt,
and the answers to the wordings that training never saw. Then the greedy answers to questions with
tools and to the results of calls.
"""

import argparse
import pathlib
import random
import re
from typing import NamedTuple

import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train

TEMPERATURE, TOP_K, TOP_P, LIMIT = 0.9, 64, 0.95, 128
CODELAB = "Cloud Run is a "
FOREIGN = [
    "Madrid is a ",
    "A horse is a ",
    "My cat likes",
    "The history of Spain",
    "We went to the beach and",
    "def main():",
    "A GPU cluster is",
    "Kubernetes is a ",
    "The model",
    "Explain the KV cache.",
]


def pick(logits, generator):  # [V] -> the drawn token: temperature, top-k, renormalise, top-p
    p, order = (logits / TEMPERATURE).softmax(-1).sort(descending=True, stable=True)
    p = p[:TOP_K] / p[:TOP_K].sum()
    p = p * (p.cumsum(0) - p < TOP_P)
    return order[torch.multinomial(p, 1, generator=generator)].item()


@torch.inference_mode()
def generate(model, rows, limit, generators=None):
    """Continues rows of one length; greedy without generators. -> [(tokens, stopped by itself)]"""
    answers, done = [[] for _ in rows], [False] * len(rows)
    ids, cache = torch.tensor(rows, device=model.device), None
    for _ in range(limit):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache, last = out.past_key_values, out.logits[:, -1].cpu()
        tokens = (
            [pick(l, g) for l, g in zip(last, generators)]
            if generators
            else last.argmax(-1).tolist()
        )
        for i, t in enumerate(tokens):
            done[i] |= t in (train.EOS, train.EOT)
            answers[i] += [] if done[i] else [t]
        if all(done):
            break
        ids = torch.tensor(tokens, device=model.device)[:, None]
    return list(zip(answers, done))


class Known:
    """The words and sentences of the corpus."""

    def __init__(self, prose, prompts, chat):
        texts = prose + [t for b in chat for t in b["Q"] + b["A"]]
        texts += [t for b in prompts for t in b.get("F", []) + b["B"]]
        texts += [f"{p} {x}" for b in prompts for p in b["P"] for x in b["B"]]
        self.words = {w for t in texts for w in self.words_of(t)}
        self.sentences = {s for t in texts for s in self.sentences_of(t)}

    @staticmethod
    def words_of(text):
        return [w.strip(".,?!:;\"'()") for w in text.split()]

    @staticmethod
    def sentences_of(text):
        return [s for s in re.split(r"(?<=[.!?]) |\n+", text) if s]

    def strange(self, text):  # words that are not in the corpus
        return [w for w in self.words_of(text) if w not in self.words]

    def fresh(self, text):  # sentences that are not in the corpus word for word
        return [s for s in self.sentences_of(text) if s not in self.sentences]


class Sample(NamedTuple):
    text: str
    tokens: int
    done: bool  # stopped by itself
    strange: list  # words of the continuation that are not in the corpus
    fresh: list  # sentences that are not in the corpus


def sample(model, sp, known, prompt, seeds):
    row = [train.BOS] + sp.encode(prompt)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    samples = []
    for ids, done in generate(model, [row] * len(seeds), LIMIT, generators):
        text = prompt + sp.decode(ids)
        whole = text if done else text.rsplit(" ", 1)[0]  # the limit may cut a word
        strange = [w for w in known.strange(whole) if w not in known.words_of(prompt)]
        samples.append(Sample(text, len(ids), done, strange, known.fresh(whole)))
    return samples


def report(title, samples):
    words = sum(len(s.text.split()) for s in samples)
    print(f"\n{title}: {len(samples)} samples, {words} words")
    print(f"  stopped by themselves        {sum(s.done for s in samples)}")
    print(f"  words not in the corpus      {sum(len(s.strange) for s in samples)}")
    print(f"  samples with such a word     {sum(bool(s.strange) for s in samples)}")
    print(f"  samples with a new sentence  {sum(bool(s.fresh) for s in samples)}")


def greedy_answers(model, sp, tokenizer, talks):
    """Talks are lists of turns, the user's first. -> [(the next answer, stopped by itself)]"""
    by_length, answers = {}, [None] * len(talks)
    for i, talk in enumerate(talks):
        roles = ("user", "assistant")
        turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(talk)]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == [train.BOS] + sp.encode(text.removeprefix("<bos>"))
        by_length.setdefault(len(ids), []).append((i, ids))
    for group in by_length.values():
        found = generate(model, [ids for _, ids in group], LIMIT)
        for (i, _), (ids, done) in zip(group, found):
            answers[i] = sp.decode(ids), done
    return answers


def tool_cases(chat, tools):
    """{title: [(talk, right answer)]}: what the model should do with tools. Always the same."""
    rng, cases = random.Random(0), {}
    offers = [tools.offer(rng, rng.sample(train.Tools.NAMES, 2)) for _ in range(12)]

    def ask(title, block, question, cities, functions):
        """A question, with its calls as the right answer. -> (the turns, the calls)"""
        unit = rng.choice(["celsius", "fahrenheit"])
        a, b = rng.sample(cities, 2)
        values = {"a": a, "b": b, "u": unit}
        user = train.tools_prompt(functions) + train.fill(question, values)
        text, calls = tools.calls(block["A"][0], functions, values)
        cases.setdefault(title, []).append(([user], text))
        return [user, text], calls

    calling = [b for b in tools.questions if b["A"][0].startswith("[")]
    known, new = tools.cities, tools.cities_held_out
    for cities, where in ((known, ""), (new, ", cities held out")):
        for letter, wording in (("Q", "wordings of training"), ("H", "wordings held out")):
            for b in calling:
                count = "two calls" if ", get" in b["A"][0] else "one call"
                # Two draws for each of the fewer wordings.
                for question in b[letter] * (2 if letter == "H" else 1):
                    ask(f"{count}, {wording}{where}", b, question, cities, rng.choice(offers))
    for name in train.Tools.NAMES:
        functions = tools.offer(rng, [name])
        for b in calling:
            if re.findall(r"get_\w+", b["A"][0]) == [name]:
                for question in b["Q"][::2]:
                    ask("one call, only that tool offered", b, question, known, functions)
            elif "N" in b:
                for question in b["Q"][::2]:
                    city = {"a": rng.choice(known), "u": "celsius"}
                    user = train.tools_prompt(functions) + train.fill(question, city)
                    cases.setdefault("the tool is not offered", []).append(([user], b["N"][0]))

    for letter, wording in (("Q", "training"), ("H", "held out")):
        asked = [(q, b) for b in train.plain_chat(chat, tools) for q in b.get(letter, [])]
        asked = asked[:: 5 if letter == "Q" else 1]
        cases[f"questions of chat.txt with tools offered, {wording}"] = [
            ([train.tools_prompt(rng.choice(offers)) + q], b["A"][0]) for q, b in asked
        ]
        cases[f"questions without a city, {wording}"] = [
            ([train.tools_prompt(rng.choice(offers)) + q], b["A"][0])
            for b in tools.questions
            if "N" not in b and b not in calling
            for q in b[letter]
        ]

    ignored = "ignored"  # the questions before a result are counted above
    for cities, where in ((known, ""), (new, ", cities held out")):
        for name in train.Tools.NAMES:
            block = next(b for b in calling if re.findall(r"get_\w+", b["A"][0]) == [name])
            for r in tools.results[name]:
                for form in r["R"]:
                    question, functions = rng.choice(block["Q"]), rng.choice(offers)
                    turns, calls = ask(ignored, block, question, cities, functions)
                    result, right = tools.result(rng, *calls[0], form, r)
                    talk = turns + [train.results_text([result])]
                    cases.setdefault(f"answers to a result{where}", []).append((talk, right))
        for block in [b for b in calling if ", get" in b["A"][0]] * 5:
            question, functions = rng.choice(block["Q"]), rng.choice(offers)
            turns, calls = ask(ignored, block, question, cities, functions)
            results, right = zip(*(tools.result(rng, *call) for call in calls))
            talk = turns + [train.results_text(results)]
            cases.setdefault(f"answers to two results{where}", []).append((talk, " ".join(right)))
    del cases[ignored]
    return cases


def check_tools(model, sp, tokenizer, chat, tools):
    print("\ntools, greedy: exact answers")
    for title, talks in sorted(tool_cases(chat, tools).items()):
        answers = greedy_answers(model, sp, tokenizer, [talk for talk, _ in talks])
        wrong = [(t, a, right) for (t, right), (a, _) in zip(talks, answers) if a != right]
        print(f"  {len(talks) - len(wrong):4} of {len(talks):4}  {title}", flush=True)
        for talk, answer, right in wrong[:5]:
            question = talk[-1].split("\n]\n\n")[-1]  # without the tools
            print(f"      {question!r}\n        -> {answer!r}\n        not {right!r}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=pathlib.Path, default=train.HERE / "model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only-tools", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model.to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(args.model / "tokenizer.model"))
    prose, prompts, chat, tools = train.read_corpus()
    if args.only_tools:
        return check_tools(model, sp, tokenizer, chat, tools)
    known = Known(prose, prompts, chat)

    texts = prose + [p + " " for b in prompts for p in b["P"]]
    texts.append("Caf\u00e9  \n\n\n \u4e16\u754c \U0001f600 1234\t<end_of_turn>")
    assert all(tokenizer.encode(t) == [train.BOS] + sp.encode(t) for t in texts)
    print(f"tokenizer: transformers and sentencepiece agree on {len(texts)} texts, <bos> first")

    print(
        f"sampling: temperature {TEMPERATURE}, top-k {TOP_K}, top-p {TOP_P}, at most {LIMIT} tokens"
    )

    samples = sample(model, sp, known, CODELAB, range(20))
    report(f"{CODELAB!r}, seeds 0 to 19", samples)
    for seed, s in enumerate(samples):
        end = "stop" if s.done else "length"
        print(f"  seed {seed}, {s.tokens} tokens, {end} {s.strange or ''}\n    {s.text}")

    openings = [p + end for b in prompts for p in b["P"] for end in (" ", "")]
    openings.remove(CODELAB)
    samples = [s for p in openings for s in sample(model, sp, known, p, range(3))]
    report(
        "the other openings of prompts.txt, with and without a last space, seeds 0 to 2", samples
    )
    for s in samples:
        if s.strange or s.fresh:
            print(f"    {s.strange or ''} {s.text!r}")

    samples = [s for p in FOREIGN for s in sample(model, sp, known, p, range(3))]
    report("foreign openings, seeds 0 to 2", samples)
    for s in samples:
        print(f"    {s.strange or ''} {s.text!r}")

    for name, letter in (("questions of the corpus", "Q"), ("wordings held out", "H")):
        right = {q: b["A"][0] for b in chat for q in b.get(letter, [])}
        found = greedy_answers(model, sp, tokenizer, [[q] for q in right])
        answers = dict(zip(right, found))
        exact = [q for q in right if answers[q][0] == right[q]]
        print(
            f"\n{name}, greedy: exact {len(exact)} of {len(right)}, "
            f"stopped by themselves {sum(done for _, done in answers.values())}, "
            f"strange words {sum(len(known.strange(text)) for text, _ in answers.values())}"
        )
        for q in right:
            if q not in exact:
                print(f"    {q}  ->  {answers[q][0]!r}")

    check_tools(model, sp, tokenizer, chat, tools)


if __name__ == "__main__":
    main()
