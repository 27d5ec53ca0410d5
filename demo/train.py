# SPDX-License-Identifier: Apache-2.0
r"""Trains the demo model: a Gemma 3 of 3.9 million parameters that has read only demo/corpus.

    python demo/train.py [--steps N] [--out demo/model] [--device cuda] [--new-tokenizer]

It recites; it does not reason. It gives the server and its tests real weights to serve.
Fixed seeds, and sums in a fixed order: the same machine and packages should give the same bytes.
The tokenizer is the one in demo/model, because tests know its ids. --new-tokenizer trains another.

The corpus has four files. "#" starts a comment. In the last three, blank lines separate blocks, and
the first letter of a line is its kind.

  prose.txt    paragraphs of plain text, one a line.
  prompts.txt  P  an opening that people type, such as "Cloud Run is a"
               B  a continuation; every B of a block fits every P of the block
               F  a sentence about the same thing, true wherever it stands
               A document is P, then B, then one to three F in any order. The codelab's prompt ends
               in a space, which the tokenizer turns into a separate piece U+2581; ordinary text
               never has that piece before a word. So half the documents encode "P " first and then
               B without its leading space: a server would see these ids. The first block is drawn
               most often.
  chat.txt     Q  one wording of a question
               H  a wording that training does not use, for check.py
               A  the answer, in which \n is a new line
  tools.txt    C  a city               X  a city that training does not use, for check.py
               S  a condition of the weather
               G  a text that a user may send together with the results of calls
               F  the name of a function, then either what a client may write of it, any or none:
                  D  its description   L  of its first parameter   U  of its second, the unit
                  or what it gives back and the model's sentence about that:
                  R  a result          A  the sentence
               Q, H  as in chat.txt, asked when tools are offered
               A  the calls, or a plain text
               N  the answer when the tool is not offered
               {a} and {b} stand for cities, {u} for a unit, {t} for a temperature, {c} for a
               condition, {h} for a time. The first parameter is called city or location, as the
               client likes. Many cities in training are made up of parts of others: the model has
               to copy a name, not to know it.
"""

import argparse
import contextlib
import io
import json
import math
import os
import pathlib
import random
import re
import shutil
import time

import sentencepiece as spm
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch.nn.attention import SDPBackend, sdpa_kernel

from network import Gemma

HERE = pathlib.Path(__file__).resolve().parent
BOS, EOS, SOT, EOT = 2, 1, 105, 106
ROWS, LENGTH = 16, 1024  # tokens a step: 16,384. A request with two tools has up to 700.

CONFIG = {  # the fields of google/gemma-3-1b-it, smaller numbers
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 64,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 64,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 2048,
}

GENERATION = {
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "do_sample": True,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
    "temperature": 0.7,  # Gemma has 1.0; small models make more errors when sampled
    "top_k": 64,
    "top_p": 0.95,
    "transformers_version": "4.50.0.dev0",
}

# Gemma 3's template for text: a system message opens the first turn, roles must alternate.
TEMPLATE = """{{ bos_token }}
{%- set system = messages[0]['role'] == 'system' -%}
{%- if system and messages[0]['content'] is string -%}
    {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
{%- elif system -%}
    {%- set prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
{%- else -%}
    {%- set prefix = '' -%}
{%- endif -%}
{%- for message in (messages[1:] if system else messages) -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = message['role'].replace('assistant', 'model') -%}
    {{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}
            {{ part['text'] | trim }}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception('Invalid content type') }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""

TOKENIZER = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<bos>",
    "chat_template": TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<eos>",
    "model_max_length": CONFIG["max_position_embeddings"],
    "pad_token": "<pad>",
    "tokenizer_class": "GemmaTokenizer",
    "unk_token": "<unk>",
}


# ---- corpus


def blocks(name):
    """The blocks of a corpus file, each {letter: [texts]}."""
    for block in (HERE / "corpus" / name).read_text().split("\n\n"):
        found = {}
        for line in block.splitlines():
            if line and not line.startswith("#"):
                letter, text = line.split(" ", 1)
                found.setdefault(letter, []).append(text.strip().replace("\\n", "\n"))
        if found:
            yield found


def read_corpus():
    lines = (HERE / "corpus/prose.txt").read_text().splitlines()
    prose = [line for line in lines if line and line[0] != "#"]
    prompts, chat, tools = (list(blocks(f"{n}.txt")) for n in ("prompts", "chat", "tools"))
    assert all(set(b) <= {"P", "B", "F"} and b["P"] and b["B"] for b in prompts)
    assert all(set(b) <= {"Q", "H", "A"} and b["Q"] and len(b["A"]) == 1 for b in chat)
    assert all(set(b) <= {*"CXSGFDLURQHAN"} and len(b.get("A", "1")) == 1 for b in tools)
    return prose, prompts, chat, Tools(tools)


# ---- tokenizer


def train_tokenizer(out, prose, prompts, chat, tools):
    """BPE with every special piece at Gemma 3's id, bytes at 238..493 and merges from 494."""
    lines = list(prose)
    for b in prompts:
        lines += [f"{p} {x}" for p in b["P"] for x in b["B"][:3]] + b["B"] + b.get("F", [])
    for b in chat:
        lines += (b["Q"] + b["A"][0].split("\n")) * 4
    lines += ["user", "model", "Cloud Run is a"] * 50
    defined = ["<mask>", "[multimodal]"] + [f"<unused{i}>" for i in range(99)]  # 4..104
    defined += ["<start_of_turn>", "<end_of_turn>"]  # 105, 106
    defined += ["\n" * n for n in range(1, 32)]  # 107..137
    defined += ["\u2581" * n for n in range(2, 32)]  # 138..167
    defined += [f"<unused{i}>" for i in range(99, 169)]  # 168..237, HTML tags in Gemma
    assert len(defined) == 234  # any other length shifts the bytes
    file = io.BytesIO()  # with a file name, the model would contain that name
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=file,
        vocab_size=CONFIG["vocab_size"],
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=defined,
        num_threads=1,
        minloglevel=2,
    )
    (out / "tokenizer.model").write_bytes(file.getvalue())


def read_tokenizer(out):
    sp = spm.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    pieces = {
        0: "<pad>",
        1: "<eos>",
        2: "<bos>",
        3: "<unk>",
        4: "<mask>",
        105: "<start_of_turn>",
        106: "<end_of_turn>",
        107: "\n",
        137: "\n" * 31,
        138: "\u2581" * 2,
        167: "\u2581" * 31,
        238: "<0x00>",
        493: "<0xFF>",
    }
    for i, piece in pieces.items():
        assert (
            sp.id_to_piece(i) == piece
        ), f"{sp.id_to_piece(i)!r} has the id {i} of Gemma's {piece!r}"
    assert sp.get_piece_size() == CONFIG["vocab_size"]
    assert sp.id_to_piece(sp.encode("Cloud Run is a ")[-1]) == "\u2581"
    return sp


# ---- tools

CALLING = (
    "You have access to functions. If you decide to invoke any of the function(s), you MUST put it"
    " in the format of [func_name1(params_name1=params_value1, params_name2=params_value2...),"
    " func_name2(params)]\n\n"
    "You SHOULD NOT include any other text in the response if you call a function\n"
)


def tools_prompt(functions):
    """What stands before the first question when tools are offered, as the server writes it."""
    return CALLING + json.dumps(functions, indent=2, ensure_ascii=False) + "\n\n"


def results_text(results):
    """The user's turn that brings the results of calls."""
    return "\n".join(f"```tool_output\n{result}\n```" for result in results)


def fill(text, values):
    for letter, value in values.items():
        text = text.replace("{" + letter + "}", value)
    return text


class Tools:
    """Draws tools, calls and results from the blocks of tools.txt."""

    NAMES = ["get_weather", "get_time"]

    def __init__(self, blocks):
        lists = {letter: b[letter] for b in blocks for letter in "CXSG" if letter in b}
        self.conditions, self.more = lists["S"], lists["G"]
        self.cities = [line for b in blocks for line in b.get("C", [])]
        self.cities_held_out = [line for b in blocks for line in b.get("X", [])]
        self.questions = [b for b in blocks if "Q" in b]
        self.functions = {b["F"][0]: b for b in blocks if "D" in b}
        self.results = {n: [b for b in blocks if "R" in b and b["F"] == [n]] for n in self.NAMES}

    def function(self, rng, name, key):
        """The function object of a client; its first parameter is called key."""
        b, chance = self.functions[name], lambda p: rng.random() < p
        city = {"type": "string"} | ({"description": rng.choice(b["L"])} if chance(0.4) else {})
        properties = {key: city}
        if "U" in b and chance(0.4):
            properties["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
            if chance(0.4):
                properties["unit"]["description"] = rng.choice(b["U"])
        parameters = {"type": "object", "properties": properties, "required": [key]}
        if chance(0.3):
            parameters["additionalProperties"] = False
        if chance(0.25):  # as pydantic writes it
            for k in properties:
                properties[k] = dict(sorted((properties[k] | {"title": k.capitalize()}).items()))
            parameters["title"] = name.title().replace("_", "")
            parameters = dict(sorted(parameters.items()))
        function = {"name": name}
        if chance(0.8):
            function["description"] = rng.choice(b["D"])
        function["parameters"] = parameters
        if chance(0.25):
            function["strict"] = chance(0.8)
        if chance(0.2):
            function = dict(rng.sample(list(function.items()), len(function)))
        return function

    def offer(self, rng, names):
        key = rng.choice(["city", "location"])
        other = key if rng.random() < 0.8 else rng.choice(["city", "location"])
        return [self.function(rng, name, k) for name, k in zip(names, (key, other))]

    def make_up(self, rng, names):
        """A word of parts of names. It has pieces in an order that no name has."""
        parts = ""
        for _ in range(rng.randint(2, 4)):
            name = rng.choice(names)
            start = rng.randrange(len(name) - 1)
            parts += name[start : start + rng.randint(2, 4)]
        return " ".join(parts.split())

    def city(self, rng):
        if rng.random() < 0.4:
            name = rng.choice(self.cities)
            return name if rng.random() < 0.9 else name.lower()  # a call keeps the user's spelling
        return self.make_up(rng, self.cities).title()

    def calls(self, answer, functions, values):
        """-> (the text of the calls, [(name, city)]), with the parameters that are offered."""
        text, calls = [], []
        keys = {f["name"]: list(f["parameters"]["properties"]) for f in functions}
        for name, letter, unit in re.findall(r'(\w+)\(city="{(\w)}"(, unit="{u}")?\)', answer):
            key = next(k for k in keys[name] if k != "unit")
            unit = unit if "unit" in keys[name] else ""
            text.append(f'{name}({key}="{{{letter}}}"{unit})')
            calls.append((name, values[letter]))
        return fill("[" + ", ".join(text) + "]", values), calls

    def result(self, rng, name, city, form=None, block=None):
        """-> (what the function gives back, the model's sentence about it)"""
        blocks = self.results[name]
        b = block or rng.choices(blocks, [len(b["R"]) for b in blocks])[0]
        t = str(rng.randint(-20, 45) if rng.random() < 0.8 else rng.randint(46, 110))
        if rng.random() < 0.15:
            t += f".{rng.randint(0, 9)}"
        c = rng.choice(self.conditions)
        if rng.random() < 0.15:
            c = self.make_up(rng, self.conditions)
        h = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
        if rng.random() < 0.2:
            h = f"{rng.randint(1, 12)}:{rng.randint(0, 59):02} "
            h += rng.choice(["am", "pm", "AM", "PM"])
        values = {"a": city, "t": t, "c": c, "h": h}
        return fill(form or rng.choice(b["R"]), values), fill(b["A"][0], values)


# ---- rows

PREFIXES = [
    "Please: ",
    "Hello. ",
    "Hi, ",
    "Tell me: ",
    "A question: ",
    "Quick question: ",
    "I want to know: ",
]
SYSTEMS = [
    "You are a helpful assistant.\n\n",
    "You are a helpful AI assistant.\n\n",
    "Be brief.\n\n",
    "Answer in one sentence.\n\n",
]


def plain_chat(chat, tools):
    """The blocks of chat.txt whose answers are the same when tools are offered."""
    other = {b["N"][0] for b in tools.questions if "N" in b}
    return [b for b in chat if b["A"][0] not in other]


class Corpus(torch.utils.data.Dataset):
    """Draws documents: lists of (token, weight in the loss), which begin with <bos>, weight 0."""

    def __init__(self, sp, prose, prompts, chat, tools, steps):
        self.sp, self.prose, self.prompts, self.chat = sp, prose, prompts, chat
        self.tools, self.steps, self.rng = tools, steps, None
        # With tools, the questions about weather and time have other answers.
        self.plain = plain_chat(chat, tools)
        # Blocks are drawn in proportion to their size; the first, the codelab's prompt, in a third
        # of all draws.
        need = [len(b["P"]) / 4 + len(b["B"]) for b in prompts[1:]]
        self.prompt_weights = [sum(need) / 2] + need

    def text_of(self, q):
        """The question q as a user may type it: case, punctuation, politeness, typing errors."""
        rng = self.rng
        if rng.random() < 0.2:
            q = q.lower()
        if rng.random() < 0.2:
            q = q.rstrip("?.!")
        if rng.random() < 0.1:
            q = rng.choice(PREFIXES) + q
        if rng.random() < 0.1 and len(q) > 8:
            i = rng.randrange(1, len(q) - 1)
            slips = [
                q[i + 1 :],
                q[i + 1] + q[i] + q[i + 2 :],
                q[i] + q[i:],
            ]  # a letter left out, swapped, doubled
            q = q[:i] + rng.choice(slips)
        return q

    def encode_cut(self, text, p):
        """Encodes text in parts, cut before each letter with probability p: gives unusual pieces, as
        BPE dropout does. (SentencePiece's own dropout ignores its seed here.)"""
        ids, start = [], 0
        for i in range(1, len(text) + 1):
            if i == len(text) or self.rng.random() < p:
                ids += self.sp.encode(text[start:i])
                start = i
        return ids

    def chat_doc(self):
        rng, sp, doc = self.rng, self.sp, [(BOS, 0)]
        if rng.random() < 0.06:  # a question in a raw completion is answered too
            b = rng.choice(self.chat)
            doc += [(t, 0.1) for t in sp.encode(rng.choice(b["Q"]))]
            return doc + [(t, 1) for t in sp.encode("\n" + b["A"][0]) + [EOS]]
        system = rng.choice(SYSTEMS) if rng.random() < 0.1 else ""
        for _ in range(rng.choice([1, 1, 2, 3])):
            b = rng.choice(self.chat)
            user = "user\n" + system + self.text_of(rng.choice(b["Q"]))
            cut = 0.1 if rng.random() < 0.3 else 0  # elsewhere the model would learn misspelling
            user = self.encode_cut(user, cut)
            doc += [(t, 0.2) for t in [SOT] + user + [EOT, 107, SOT] + sp.encode("model\n")]
            doc += [(t, 1) for t in sp.encode(b["A"][0]) + [EOT]] + [(107, 0.2)]
            system = ""
        return doc

    def template_text(self, q):
        """As text_of, but the {letters} stay whole."""
        text, letters = self.text_of(q), re.compile(r"{\w}|[{}]")
        return text if letters.findall(text) == letters.findall(q) else q

    def tool_question(self, functions):
        """The turns (user, model) of a question that is in tools.txt."""
        rng, tools, names = self.rng, self.tools, {f["name"] for f in functions}
        while True:
            b = rng.choice(tools.questions)
            missing = set(re.findall(r"get_\w+", b["A"][0])) - names
            # Without a tool, only the questions that have an answer for that.
            if "N" in b if missing else names:
                break
        unit = rng.choice(["celsius", "fahrenheit"])
        values = {"a": tools.city(rng), "b": tools.city(rng), "u": unit}
        spoken = {"u": rng.choice([unit, unit.capitalize()])}
        question = fill(self.template_text(rng.choice(b["Q"])), values | spoken)
        if missing or b["A"][0][0] != "[":
            return [(question, b["N" if missing else "A"][0])]
        text, calls = tools.calls(b["A"][0], functions, values)
        results, sentences = zip(*(tools.result(rng, *call) for call in calls))
        more = "\n\n" + rng.choice(tools.more) if rng.random() < 0.1 else ""
        return [(question, text), (results_text(results) + more, " ".join(sentences))]

    def tools_doc(self):
        rng, sp, doc, turns = self.rng, self.sp, [(BOS, 0)], []
        names = rng.sample(Tools.NAMES, rng.choice([0, 1, 1, 2, 2, 2, 2, 2]))
        functions = self.tools.offer(rng, names)
        for _ in range(rng.choice([1, 1, 2, 2, 3])):
            if rng.random() < 0.25:
                b = rng.choice(self.plain)
                turns.append((self.text_of(rng.choice(b["Q"])), b["A"][0]))
            else:
                turns += self.tool_question(functions)
        # A newline ends the prefix, so its tokens are the same with and without the question.
        prefix = "user\n" + (rng.choice(SYSTEMS) if rng.random() < 0.15 else "")
        prefix += tools_prompt(functions) if functions else ""
        for user, model in turns:
            cut = 0.1 if rng.random() < 0.2 and "```" not in user else 0
            user = sp.encode(prefix) + self.encode_cut(user, cut)
            doc += [(t, 0.02) for t in [SOT] + user + [EOT, 107, SOT] + sp.encode("model\n")]
            # A call has few tokens, and none may be wrong.
            doc += [(t, 2) for t in sp.encode(model) + [EOT]] + [(107, 0.2)]
            prefix = "user\n"
        return doc

    def prose_doc(self):
        rng = self.rng
        text = rng.choice(self.prose)
        if rng.random() < 0.25:
            sentences = re.split(r"(?<=[.!?]) ", text)
            text = " ".join(sentences[rng.randrange(len(sentences)) :])
        if rng.random() < 0.25:
            text += "\n\n" + rng.choice(self.prose)
        return [(BOS, 0)] + [(t, 1) for t in self.sp.encode(text) + [EOS]]

    def prompt_doc(self):
        rng, sp = self.rng, self.sp
        b = rng.choices(self.prompts, self.prompt_weights)[0]
        p, facts = rng.choice(b["P"]), b.get("F", [])
        if rng.random() < 0.05:
            p = p.lower()
        way, count = rng.choice(b["B"]), rng.choice([1, 2, 2, 3, 3])
        rest = " ".join([way] + rng.sample(facts, min(len(facts), count)))
        if rng.random() < 0.5:
            prompt, rest = sp.encode(p + " "), sp.encode(rest)
        else:
            prompt, rest = sp.encode(p), sp.encode(" " + rest)
        return [(BOS, 0)] + [(t, 0.1) for t in prompt] + [(t, 1) for t in rest + [EOS]]

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        """[ROWS, LENGTH + 1] tokens, loss weights, document numbers; a row starts with <bos>.

        A row is one document with tools, and others as far as they fit."""
        self.rng = random.Random(step)  # so the batch is the same whichever process draws it
        draw = [self.chat_doc, self.prose_doc, self.prompt_doc]
        rows = []
        for _ in range(ROWS):
            row, n = [(t, w, 0) for t, w in self.tools_doc()], 0
            while len(row) <= LENGTH:
                n += 1
                row += [(t, w, n) for t, w in self.rng.choices(draw, [0.45, 0.2, 0.35])[0]()]
            rows.append(row[: LENGTH + 1])
        ids, weight, doc = zip(*(zip(*row) for row in rows))
        return torch.tensor(ids), torch.tensor(weight, dtype=torch.float32), torch.tensor(doc)


# ---- training


def train(corpus, steps, device, rate=4e-3):
    torch.manual_seed(1)
    model = Gemma(CONFIG).to(device)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=device == "cuda")
    # Other processes draw the batches: a GPU is faster than one of them.
    workers = max(1, min(15, len(os.sched_getaffinity(0)) - 1))
    loader = torch.utils.data.DataLoader(
        corpus, batch_size=None, num_workers=workers, prefetch_factor=4
    )
    start, mean = time.time(), None
    for step, batch in enumerate(loader):
        for group in optimizer.param_groups:  # warm-up, then a cosine down to 3 %
            cosine = 0.03 + 0.97 * (1 + math.cos(math.pi * step / steps)) / 2
            group["lr"] = rate * min((step + 1) / 200, cosine)
        ids, weight, doc = (x.to(device) for x in batch)
        with torch.autocast(device, torch.bfloat16):
            logits = model(ids[:, :-1], doc[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = weight[:, 1:].flatten()
        loss = (loss * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach() if mean is None else mean.lerp(loss.detach(), 0.02)
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {mean:.4f}  {time.time() - start:6.0f} s", flush=True)
    return model.cpu()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--new-tokenizer", action="store_true")
    args = parser.parse_args()
    # The order of every sum is fixed: one thread, or no atomic additions on a GPU.
    torch.set_num_threads(1)
    if args.device == "cuda":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    args.out.mkdir(parents=True, exist_ok=True)

    files = {"config": CONFIG, "generation_config": GENERATION, "tokenizer_config": TOKENIZER}
    for name, content in files.items():
        (args.out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    texts = read_corpus()
    if args.new_tokenizer:
        train_tokenizer(args.out, *texts)
    elif args.out.resolve() != HERE / "model":
        shutil.copy(HERE / "model/tokenizer.model", args.out)
    corpus = Corpus(read_tokenizer(args.out), *texts, args.steps)
    # The other kernels for attention may add in another order each time.
    with sdpa_kernel(SDPBackend.MATH) if args.device == "cuda" else contextlib.nullcontext():
        model = train(corpus, args.steps, args.device)

    tensors = {"model." + name: p.detach().bfloat16() for name, p in model.named_parameters()}
    (args.out / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    size = (args.out / "model.safetensors").stat().st_size
    assert size < 8_000_000
    print(f"{sum(t.numel() for t in tensors.values()):,} parameters, {size:,} bytes")


if __name__ == "__main__":
    main()
