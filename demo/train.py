# SPDX-License-Identifier: Apache-2.0
r"""Trains the demo model: a Gemma 3 of 3.9 million parameters that has read only demo/corpus.

    python demo/train.py [--steps N] [--out demo/model]

It recites; it does not reason. It gives the server and its tests real weights to serve.
One thread and fixed seeds: the same machine and packages give the same bytes.

The corpus has three files. "#" starts a comment. In the last two, blank lines separate blocks, and
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
"""

import argparse
import io
import json
import math
import pathlib
import random
import re
import time

import sentencepiece as spm
import torch
import torch.nn.functional as F
from safetensors.torch import save

from network import Gemma

HERE = pathlib.Path(__file__).resolve().parent
BOS, EOS, SOT, EOT = 2, 1, 105, 106
ROWS, LENGTH = 8, 256  # tokens a step: 2,048

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
    prompts, chat = list(blocks("prompts.txt")), list(blocks("chat.txt"))
    assert all(set(b) <= {"P", "B", "F"} and b["P"] and b["B"] for b in prompts)
    assert all(set(b) <= {"Q", "H", "A"} and b["Q"] and len(b["A"]) == 1 for b in chat)
    return prose, prompts, chat


# ---- tokenizer


def train_tokenizer(out, prose, prompts, chat):
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


class Corpus:
    """Draws documents: lists of (token, weight in the loss), which begin with <bos>, weight 0."""

    def __init__(self, sp, prose, prompts, chat, seed=1):
        self.sp, self.prose, self.prompts, self.chat = sp, prose, prompts, chat
        self.rng = random.Random(seed)
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

    def batch(self):
        """[ROWS, LENGTH + 1] tokens, loss weights, document numbers; a row starts with <bos>."""
        draw = [self.chat_doc, self.prose_doc, self.prompt_doc]
        rows = []
        for _ in range(ROWS):
            row, n = [], 0
            while len(row) <= LENGTH:
                row += [(t, w, n) for t, w in self.rng.choices(draw, [0.45, 0.2, 0.35])[0]()]
                n += 1
            rows.append(row[: LENGTH + 1])
        ids, weight, doc = zip(*(zip(*row) for row in rows))
        return torch.tensor(ids), torch.tensor(weight), torch.tensor(doc)


# ---- training


def train(corpus, steps, rate=4e-3):
    torch.manual_seed(1)
    model = Gemma(CONFIG)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    start, mean = time.time(), None
    for step in range(steps):
        for group in optimizer.param_groups:  # warm-up, then a cosine down to 3 %
            cosine = 0.03 + 0.97 * (1 + math.cos(math.pi * step / steps)) / 2
            group["lr"] = rate * min((step + 1) / 60, cosine)
        ids, weight, doc = corpus.batch()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1], doc[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = weight[:, 1:].flatten().float()
        loss = (loss * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {mean:.4f}  {time.time() - start:6.0f} s", flush=True)
    return model


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "model")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the order of every sum is fixed
    args.out.mkdir(parents=True, exist_ok=True)

    files = {"config": CONFIG, "generation_config": GENERATION, "tokenizer_config": TOKENIZER}
    for name, content in files.items():
        (args.out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    texts = read_corpus()
    sp = train_tokenizer(args.out, *texts)
    model = train(Corpus(sp, *texts), args.steps)

    tensors = {"model." + name: p.detach().bfloat16() for name, p in model.named_parameters()}
    (args.out / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    size = (args.out / "model.safetensors").stat().st_size
    assert size < 8_000_000
    print(f"{sum(t.numel() for t in tensors.values()):,} parameters, {size:,} bytes")


if __name__ == "__main__":
    main()
