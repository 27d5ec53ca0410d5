#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Freeze results of Hugging Face transformers, with which the tests compare both engines.

    pip install -r tests/requirements.txt  # torch (CPU), transformers, sentencepiece, ...
    python tests/make_golden.py branches   # tiny random checkpoints, for every branch of the family
    python tests/make_golden.py demo       # the demo model of this repository
    python tests/make_golden.py real DIR   # the real google/gemma-3-270m in DIR (it stays there)

Everything goes to tests/golden/. Each JSON file is one golden, its .f32 file has the logits:

    checkpoints        folders that give these numbers: under tests/golden/, or demo/model
    logits_file        raw little-endian float32, rows of vocab_size logits (absent for `real`)
    embed_scale        sqrt(hidden_size) rounded to bf16; transformers in fp32 was made to use it
    fp64_max_abs_diff  max |fp32 - fp64| over the fp32 rows: transformers against the float64
                       forward in this file. It is the error of fp32 arithmetic here; a tolerance
                       is a small multiple of it.
    bf16_max_abs_diff  the same for transformers entirely in bf16 against fp32, over the bf16 rows
                       (real: over the 20 likeliest logprobs at each prompt's last position)
    broken             how far the last fp32 row moves (max abs) when one rule is broken; a test
                       whose tolerance is smaller finds that bug
    prompts[]          each is a sequence; together they are one ragged batch:
      ids              prompt token ids, with BOS
      greedy           ids of the fp32 greedy continuation, which EOS does not end
      positions        fp32 logits were kept at these positions of ids + greedy (0 = the BOS)
      first_row        the row of positions[0] in logits_file; the others follow
      bf16_row         the row of the bf16 logits at the prompt's last position (not real)
      gaps             top-1 minus top-2 logit for each greedy token; min_gap is the smallest
      near_ties        {index, gap, ids}: greedy tokens with a gap below 0.05, both candidates
      text, greedy_text  the same as text (demo and real; SentencePiece's own decode)
      top              {index, ids, logprobs}: the 20 likeliest tokens (raw log-softmax) of the
                       distribution that chose greedy[index] (real)

Everything runs on one thread. The last bits of a golden still depend on the machine: hence
tolerances.
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden"
MADE_WITH = f"torch {torch.__version__}, transformers {transformers.__version__}, eager attention"
BOS, START, END, NEWLINE = 2, 105, 106, 107  # ids of <bos>, <start_of_turn>, <end_of_turn>, "\n"
NEAR_TIE = 0.05


def bf16(x):
    return torch.tensor(x).bfloat16().float().item()


# ---- the model in Hugging Face ------------------------------------------------------------------


def load(folder, dtype):
    """Loads a folder with transformers. The embedding scale is rounded to bf16, as when Gemma was
    trained (in fp32 transformers would keep the square root unrounded)."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], (folder, problem, info[problem])
    model.get_input_embeddings().embed_scale.fill_(bf16(text_config(model).hidden_size ** 0.5))
    return model.eval()


def text_config(model):
    return model.config.get_text_config()


@torch.no_grad()
def logits(model, ids, positions):
    """[len(positions), V] in float32, by one forward over all of ids"""
    out = model(input_ids=torch.tensor([ids]), use_cache=False,
                logits_to_keep=torch.tensor(positions))
    return out.logits[0].float()


@torch.no_grad()
def greedy(model, ids, count):
    out, cache, step = [], None, ids
    for _ in range(count):
        answer = model(input_ids=torch.tensor([step]), past_key_values=cache, use_cache=True,
                       logits_to_keep=1)
        cache = answer.past_key_values
        step = [answer.logits[0, -1].argmax().item()]
        out += step
    return out


# ---- the model in float64, written out ----------------------------------------------------------


def forward64(folder, config, ids, positions, broken=""):
    """Gemma 3 in numpy float64: to check transformers, and to break single rules on purpose."""
    E, H, G = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    T, eps = len(ids), config.rms_norm_eps
    files = sorted(Path(folder).glob("*.safetensors"))
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    tails = {}
    for name, tensor in stored.items():
        for prefix in ("model.language_model.", "language_model.model.", "model."):
            if name.startswith(prefix):
                tails[name[len(prefix):]] = tensor
                break

    def weight(tail):
        return tails[tail + ".weight"].double().numpy()

    def rmsnorm(x, tail):
        plus = 0 if broken == "norm weight without 1 +" else 1
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (plus + weight(tail))

    def gelu(z):
        if broken == "gelu by erf":
            return z * 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
        return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))

    def rope(x, kind):  # x [T, heads, E]
        if broken == "rope bases swapped":
            kind = "full_attention" if kind == "sliding_attention" else "sliding_attention"
        rule = config.rope_parameters[kind]
        frequency = rule["rope_theta"] ** (-2 * np.arange(E // 2) / E)
        if broken != "rope factor ignored":
            frequency = frequency / rule.get("factor", 1.0)
        angle = np.arange(T)[:, None, None] * frequency
        a, b, cos, sin = x[..., :E // 2], x[..., E // 2:], np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    scalar = E if broken == "attention scale from head_dim" else config.query_pre_attn_scalar
    window = config.sliding_window
    window += {"window one longer": 1, "window one shorter": -1}.get(broken, 0)
    query, key = np.arange(T)[:, None], np.arange(T)[None, :]
    causal = key <= query
    recent = causal & (key > query - window)

    root = config.hidden_size ** 0.5
    embedding = tails["embed_tokens.weight"]
    x = embedding[torch.tensor(ids)].double().numpy()
    x = x * (root if broken == "embedding scale not bf16" else bf16(root))
    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}."
        kind = config.layer_types[layer]
        if broken == "layer_types ignored":
            kind = "sliding_attention" if (layer + 1) % 6 else "full_attention"
        h = rmsnorm(x, name + "input_layernorm")
        q = (h @ weight(name + "self_attn.q_proj").T).reshape(T, H, E)
        k = (h @ weight(name + "self_attn.k_proj").T).reshape(T, G, E)
        v = (h @ weight(name + "self_attn.v_proj").T).reshape(T, G, E)
        q = rope(rmsnorm(q, name + "self_attn.q_norm"), kind)
        k = rope(rmsnorm(k, name + "self_attn.k_norm"), kind)
        mask = recent if kind == "sliding_attention" and broken != "no window" else causal
        heads = []
        for head in range(H):
            g = head % G if broken == "kv head by modulo" else head // (H // G)
            score = np.where(mask, q[:, head] @ k[:, g].T * scalar ** -0.5, -np.inf)
            p = np.exp(score - score.max(-1, keepdims=True))
            heads.append(p / p.sum(-1, keepdims=True) @ v[:, g])
        a = np.concatenate(heads, -1) @ weight(name + "self_attn.o_proj").T
        x = x + rmsnorm(a, name + "post_attention_layernorm")
        h = rmsnorm(x, name + "pre_feedforward_layernorm")
        gate, up = h @ weight(name + "mlp.gate_proj").T, h @ weight(name + "mlp.up_proj").T
        m = (gelu(gate) * up) @ weight(name + "mlp.down_proj").T
        x = x + rmsnorm(m, name + "post_feedforward_layernorm")
    return rmsnorm(x[positions], "norm") @ embedding.double().numpy().T


def ways_to_break(config):
    ways = ["window one longer", "window one shorter", "no window", "rope bases swapped",
            "norm weight without 1 +", "gelu by erf"]
    if "factor" in config.rope_parameters["full_attention"]:
        ways.append("rope factor ignored")
    if config.query_pre_attn_scalar != config.head_dim:
        ways.append("attention scale from head_dim")
    if config.num_key_value_heads > 1:
        ways.append("kv head by modulo")
    if config.hidden_size ** 0.5 != bf16(config.hidden_size ** 0.5):
        ways.append("embedding scale not bf16")
    if any((kind == "full_attention") != ((layer + 1) % 6 == 0)
           for layer, kind in enumerate(config.layer_types)):
        ways.append("layer_types ignored")
    return ways


# ---- one golden ---------------------------------------------------------------------------------


def short(value):
    return float(f"{value:.4g}")


def follow(model, ids, count):
    """The greedy continuation through the KV cache, checked by one forward over the whole, whose
    logits it returns beside the fields of the golden."""
    out = greedy(model, ids, count)
    whole = logits(model, ids + out[:-1], list(range(len(ids) - 1, len(ids) + count - 1)))
    best = whole.topk(2)
    gaps = (best.values[:, 0] - best.values[:, 1]).tolist()
    assert best.indices[:, 0].tolist() == out, "a tie: cache and whole differ; change the prompt"
    fields = {"greedy": out, "gaps": [short(gap) for gap in gaps], "min_gap": short(min(gaps))}
    fields["near_ties"] = [{"index": i, "gap": short(gap), "ids": best.indices[i].tolist()}
                           for i, gap in enumerate(gaps) if gap < NEAR_TIE]
    return fields, whole


def make_golden(name, folder, checkpoints, prompts, count, keep, extra=()):
    """Writes the logits and returns what `write` puts beside them. prompts: lists of ids;
    keep(ids): positions of ids + greedy; extra: fields to add to each prompt."""
    model, half = load(folder, torch.float32), load(folder, torch.bfloat16)
    config = text_config(model)
    rows, entries, fp64_differs, bf16_differs = [], [], 0.0, 0.0
    for number, ids in enumerate(prompts):
        fields, _ = follow(model, ids, count)
        everything, positions = ids + fields["greedy"], keep(ids)
        fp32 = logits(model, everything, positions).numpy()
        low = logits(half, ids, [len(ids) - 1]).numpy()
        fp64 = forward64(folder, config, everything, positions)
        fp64_differs = max(fp64_differs, np.abs(fp32 - fp64).max())
        bf16_differs = max(bf16_differs, np.abs(low - fp32[positions.index(len(ids) - 1)]).max())
        entry = {**(extra[number] if extra else {}), "ids": ids, "positions": positions}
        entry |= {"first_row": len(rows), "bf16_row": len(rows) + len(positions)}
        entries.append({**entry, **fields})
        rows += [*fp32, *low]
    broken = {way: forward64(folder, config, everything, positions, way) - fp64
              for way in ways_to_break(config)}
    rows = np.stack(rows).astype("<f4")
    rows.tofile(GOLDEN / f"{name}.f32")
    return {"checkpoints": checkpoints, "made_with": MADE_WITH, "vocab_size": config.vocab_size,
            "embed_scale": bf16(config.hidden_size ** 0.5), "logits_file": f"{name}.f32",
            "logits_std": short(rows.std()), "fp64_max_abs_diff": short(fp64_differs),
            "bf16_max_abs_diff": short(bf16_differs),
            "broken": {way: short(np.abs(moved[-1]).max()) for way, moved in broken.items()},
            "prompts": entries}


def write(name, golden):
    """One field a line; lists stay on one line. Prints the report."""
    def line(value):
        return json.dumps(value, ensure_ascii=False)
    prompts = [",\n".join(f"  {line(key)}: {line(value)}" for key, value in prompt.items())
               for prompt in golden["prompts"]]
    head = "".join(f" {line(key)}: {line(value)},\n" for key, value in golden.items()
                   if key != "prompts")
    body = ' "prompts": [{\n' + "\n }, {\n".join(prompts) + "\n }]\n"
    path = GOLDEN / f"{name}.json"
    path.write_text("{\n" + head + body + "}\n", encoding="utf-8")

    size = (GOLDEN / golden["logits_file"]).stat().st_size if "logits_file" in golden else 0
    print(f"{name}: {path.stat().st_size:,} bytes of JSON, {size:,} of logits")
    for key, value in golden.items():
        if key not in ("prompts", "broken", "made_with"):
            print(f"    {key}: {value}")
    for way, moved in golden.get("broken", {}).items():
        times = moved / golden["fp64_max_abs_diff"]
        print(f"    {way}: moves logits by {moved}, {times:,.0f} x fp64_max_abs_diff")
    for prompt in golden["prompts"]:
        ties = ", ".join(f"{t['gap']} at {t['index']}" for t in prompt["near_ties"])
        out = prompt["greedy"]
        print(f"    {len(prompt['ids'])} ids, {len(set(out))} different of {len(out)} greedy, "
              f"smallest gap {prompt['min_gap']}" + (f", near ties: {ties}" if ties else ""))


# ---- branches: tiny random checkpoints ----------------------------------------------------------

# Configurations as on the hub, with all their differences: real spellings, small numbers.
FLAT = {  # google/gemma-3-1b-it
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 32, "initializer_range": 0.02,
    "intermediate_size": 96, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "num_attention_heads": 4, "num_hidden_layers": 7, "num_key_value_heads": 1, "pad_token_id": 0,
    "query_pre_attn_scalar": 64, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 32, "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True,
    "vocab_size": 512,
}
FLAT_455 = {  # google/gemma-3-270m-it: layer_types, an underscore; the last layer is global
    "_sliding_window_pattern": 6, **FLAT, "head_dim": 256, "intermediate_size": 64,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"], "num_attention_heads": 2,
    "num_hidden_layers": 6, "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0, "transformers_version": "4.55.0.dev0",
    "use_bidirectional_attention": False,
}
del FLAT_455["sliding_window_pattern"]
VISION = {
    "hidden_size": 16, "image_size": 8, "intermediate_size": 32,
    "model_type": "siglip_vision_model", "num_attention_heads": 2, "num_hidden_layers": 1,
    "patch_size": 4, "vision_use_head": False,
}
SPARSE = {  # google/gemma-3-4b-it: text_config has only what differs from the defaults
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
    "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
    "initializer_range": 0.02, "mm_tokens_per_image": 4, "model_type": "gemma3",
    "text_config": {  # (and head_dim, both head counts, vocab_size, whose defaults are not tiny)
        "head_dim": 64, "hidden_size": 64, "intermediate_size": 64, "model_type": "gemma3_text",
        "num_attention_heads": 4, "num_hidden_layers": 7, "num_key_value_heads": 2,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 64,
        "vocab_size": 512},
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "vision_config": VISION,
}
SPARSE_27B = {**SPARSE, "text_config": {  # google/gemma-3-27b-it; layers 6 and 7 are local
    **SPARSE["text_config"], "head_dim": 128, "hidden_size": 32, "num_hidden_layers": 8,
    "query_pre_attn_scalar": 168}}
TRANSFORMERS_5 = {  # as transformers 5 saves it; layer_types differ from the usual pattern
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
    "dtype": "bfloat16", "eoi_token_index": 256000, "eos_token_id": [1, 106],
    "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 4,
    "model_type": "gemma3",
    "text_config": {
        "_sliding_window_pattern": 6, "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": None, "bos_token_id": 2, "dtype": "bfloat16", "eos_token_id": 1,
        "final_logit_softcapping": None, "head_dim": 64, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 96, "initializer_range": 0.02, "intermediate_size": 32,
        "layer_types": ["full_attention" if layer in (2, 5) else "sliding_attention"
                        for layer in range(7)],
        "max_position_embeddings": 131072, "model_type": "gemma3_text", "num_attention_heads": 2,
        "num_hidden_layers": 7, "num_key_value_heads": 1, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {"factor": 8.0, "rope_theta": 1000000.0, "rope_type": "linear"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}},
        "sliding_window": 32, "tie_word_embeddings": True, "use_bidirectional_attention": False,
        "use_cache": True, "vocab_size": 512},
    "tie_word_embeddings": True, "transformers_version": "5.0.0", "vision_config": VISION,
}
GENERATION = {
    "bos_token_id": 2, "cache_implementation": "hybrid", "do_sample": True,
    "eos_token_id": [1, 106], "pad_token_id": 0, "top_k": 64, "top_p": 0.95,
    "transformers_version": "4.50.0.dev0",
}


def random_text_weights(text, random):
    """Tail of the name -> float32 tensor of bf16 values. The spreads make every part of the model
    matter: peaked attention, norm offsets of both signs, and a final norm whose signs keep the
    tied lm_head from repeating its input."""
    D, F, E = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    H, G = text["num_attention_heads"], text["num_key_value_heads"]
    scalar = text.get("query_pre_attn_scalar", 256)
    peak = math.sqrt(1.5 * math.sqrt(scalar / E))  # attention scores then spread over about 1.5
    weights = {}

    def put(tail, shape, mean, spread):
        w = torch.tensor(random.normal(mean, spread, shape), dtype=torch.float32).bfloat16().float()
        weights[tail + ".weight"] = torch.where(w.abs() < 2 ** -14, 0, w)  # fp16 holds it exactly

    put("embed_tokens", (text["vocab_size"], D), 0, 3 / math.sqrt(D))
    for layer in range(text["num_hidden_layers"]):
        name = f"layers.{layer}."
        put(name + "input_layernorm", (D,), 0.2, 0.3)
        put(name + "self_attn.q_proj", (H * E, D), 0, D ** -0.5)
        put(name + "self_attn.k_proj", (G * E, D), 0, D ** -0.5)
        put(name + "self_attn.v_proj", (G * E, D), 0, D ** -0.5)
        put(name + "self_attn.o_proj", (D, H * E), 0, (H * E) ** -0.5)
        put(name + "self_attn.q_norm", (E,), peak - 1, 0.3)
        put(name + "self_attn.k_norm", (E,), peak - 1, 0.3)
        put(name + "post_attention_layernorm", (D,), 0, 0.3)
        put(name + "pre_feedforward_layernorm", (D,), 0.2, 0.3)
        put(name + "mlp.gate_proj", (F, D), 0, D ** -0.5)
        put(name + "mlp.up_proj", (F, D), 0, D ** -0.5)
        put(name + "mlp.down_proj", (D, F), 0, F ** -0.5)
        put(name + "post_feedforward_layernorm", (D,), 0, 0.3)
    put("norm", (D,), -1, 1)
    return weights


def vision_tensors(random, width):
    """A whole SigLIP tower of one layer and the projector: a text server must skip all of it."""
    V, F, patch = VISION["hidden_size"], VISION["intermediate_size"], VISION["patch_size"]
    tower = "vision_tower.vision_model."
    layer = tower + "encoder.layers.0."
    shapes = {tower + "embeddings.patch_embedding.weight": (V, 3, patch, patch),
              tower + "embeddings.patch_embedding.bias": (V,),
              tower + "embeddings.position_embedding.weight": (4, V),
              layer + "mlp.fc1.weight": (F, V), layer + "mlp.fc1.bias": (F,),
              layer + "mlp.fc2.weight": (V, F), layer + "mlp.fc2.bias": (V,),
              "multi_modal_projector.mm_input_projection_weight": (V, width),
              "multi_modal_projector.mm_soft_emb_norm.weight": (V,)}
    for norm in (layer + "layer_norm1", layer + "layer_norm2", tower + "post_layernorm"):
        shapes |= {norm + ".weight": (V,), norm + ".bias": (V,)}
    for part in ("q", "k", "v", "out"):
        name = f"{layer}self_attn.{part}_proj"
        shapes |= {name + ".weight": (V, V), name + ".bias": (V,)}
    return {name: torch.tensor(random.normal(0, 0.1, shape), dtype=torch.bfloat16).float()
            for name, shape in shapes.items()}


def write_checkpoint(name, config, tensors, dtype=torch.bfloat16, shards=1):
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    stored = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        assert torch.equal(stored[key].float(), tensor), f"{key} is not exact in {dtype}"
    where, names = {}, sorted(stored)
    for shard in range(shards):
        file = "model.safetensors"
        if shards > 1:
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[len(names) * shard // shards:len(names) * (shard + 1) // shards]
        save_file({key: stored[key] for key in part}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        where |= {key: file for key in part}
    if shards > 1:
        size = sum(tensor.nbytes for tensor in stored.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def branches():
    for name, config, prefix, seed in [  # seeds: varied greedy texts, no close ties
            ("1b", FLAT, "model.", 40), ("270m", FLAT_455, "model.", 11),
            ("4b", SPARSE, "language_model.model.", 2),
            ("27b", SPARSE_27B, "language_model.model.", 23),
            ("v5", TRANSFORMERS_5, "model.language_model.", 44)]:
        random = np.random.default_rng(seed)
        text = config.get("text_config", config)
        weights = random_text_weights(text, random)
        tensors = {prefix + tail: tensor for tail, tensor in weights.items()}
        if "text_config" in config:
            root = "model." if name == "v5" else ""
            vision = vision_tensors(random, text["hidden_size"])
            tensors |= {root + key: tensor for key, tensor in vision.items()}
        if name == "4b":  # fine-tunes often contain the tied lm_head again
            tensors["language_model.lm_head.weight"] = weights["embed_tokens.weight"].clone()
        write_checkpoint(name, config, tensors, shards=2 if name == "4b" else 1)
        checkpoints = [name]
        if name == "1b":  # the same values in the two dtypes that a loader must convert
            for suffix, dtype in (("f16", torch.float16), ("f32", torch.float32)):
                spelled = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
                write_checkpoint(f"1b-{suffix}", spelled, tensors, dtype)
                checkpoints.append(f"1b-{suffix}")
        prompts = [[BOS] + random.integers(5, text["vocab_size"], length - 1).tolist()
                   for length in (1, 40, 150)]
        W, count = text["sliding_window"], 40

        def keep(ids):
            wanted = {0, W - 1, W, W + 1, len(ids) // 2, len(ids) - 1, len(ids) + count - 2}
            return sorted(p for p in wanted if p <= len(ids) + count - 2)

        golden = make_golden(name, GOLDEN / name, checkpoints, prompts, count, keep)
        write(name, golden)
        assert min(golden["broken"].values()) > 30 * golden["fp64_max_abs_diff"], "sees no bugs"


# ---- demo and real ------------------------------------------------------------------------------


def chat(encode, *turns):
    """Gemma's template in ids: markers are ids, the rest is text; turns: user, model, user, ..."""
    ids = [BOS]
    for i, content in enumerate(turns):
        ids += [START] + encode(("user\n", "model\n")[i % 2] + content) + [END, NEWLINE]
    return ids + [START] + encode("model\n")


def demo():
    folder = HERE.parent / "demo" / "model"
    words = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = ["Cloud Run is a ", "A token is", "The server"]
    chats = [["What is the KV cache?"], ["What is Cloud Run?"],
             ["Hello!", "Hello! How can I help you?", "What is a GPU?"]]
    prompts = [[BOS] + words.encode(text) for text in texts]
    prompts += [chat(words.encode, *turns) for turns in chats]
    texts += [words.decode(ids) for ids in prompts[len(texts):]]
    window = json.loads((folder / "config.json").read_text())["sliding_window"]
    count = 240

    def keep(ids):
        return sorted({len(ids) - 1, window, window + 1, 2 * window + 1, len(ids) + count - 2})

    golden = make_golden("demo", folder, ["demo/model"], prompts, count, keep,
                         [{"text": text} for text in texts])
    for prompt in golden["prompts"]:
        prompt["greedy_text"] = words.decode(prompt["greedy"])
    write("demo", golden)


def long_text(random, sentences):
    """Plain sentences by the hundred, none of them from anywhere."""
    who = ["Anna", "Minh", "the baker", "a young engineer", "my neighbour", "the old captain",
           "Lucia", "our teacher"]
    did = ["walked to", "wrote about", "painted", "repaired", "dreamed of", "drew a map of", "sold",
           "talked about"]
    what = ["the stone bridge", "a red bicycle", "the harbour", "two wooden boats",
            "a small garden", "the last train", "a house with green windows", "the market",
            "an old radio", "the river"]
    when = ["On Monday", "Before sunrise", "In the spring of 1998", "After the rain", "Last week",
            "Every summer", "At seven o'clock", "When the shop closed"]
    after = ["and nobody noticed.", "because it was cheaper than expected.", "and then went home.",
             "but the weather was cold.", "while the children slept.", "and paid 25 coins for it.",
             "so everyone was happy.", "although the road was long."]

    def pick(words):
        return words[random.integers(len(words))]
    lines = [f"{pick(when)}, {pick(who)} {pick(did)} {pick(what)} {pick(after)}"
             for _ in range(sentences)]
    return " ".join(lines) + " That is the whole story of the village. In short,"


def real(folder):
    texts = [
        "Cloud Run is a ",
        "The capital of Vietnam is",
        "Hà Nội là",
        "Sài Gòn vào buổi sáng, tôi thường uống cà phê và",
        "def fibonacci(n):\n",
        "#include <vector>\n\nint sum(const std::vector<int>& v) {\n",
        "SELECT name, COUNT(*) FROM orders",
        "Once upon a time, in a small village by the sea,",
        "To make bread you need flour, water, salt and",
        "Q: What is 17 + 25?\nA:",
        "The water in the kettle began to boil, so she",
        '{"name": "Alice", "age": 31, "city": "Paris"}\n{"name":',
        long_text(np.random.default_rng(2026), 118),
    ]
    count, kept = 48, [0, 1, 8, 16, 24, 32, 40, 47]
    words = sentencepiece.SentencePieceProcessor(model_file=str(Path(folder) / "tokenizer.model"))
    model, half = load(folder, torch.float32), load(folder, torch.bfloat16)
    config = text_config(model)
    entries, fp64_differs, bf16_differs = [], 0.0, 0.0
    for text in texts:
        ids = [BOS] + words.encode(text)
        fields, whole = follow(model, ids, count)
        likely = whole.log_softmax(-1).topk(20)
        positions = [len(ids) - 1, len(ids) + count - 2]
        fp64 = forward64(folder, config, ids + fields["greedy"][:-1], positions)
        fp64_differs = max(fp64_differs, np.abs(whole[[0, count - 1]].numpy() - fp64).max())
        low = logits(half, ids, [len(ids) - 1])[0].log_softmax(-1)[likely.indices[0]]
        bf16_differs = max(bf16_differs, (low - likely.values[0]).abs().max().item())
        top = [{"index": i, "ids": likely.indices[i].tolist(),
                "logprobs": [round(v, 6) for v in likely.values[i].tolist()]} for i in kept]
        entries.append({"text": text, "ids": ids, **fields,
                        "greedy_text": words.decode(fields["greedy"]), "top": top})
        print(f"{len(ids)} ids {text[-60:]!r} -> {entries[-1]['greedy_text'][:90]!r}", flush=True)
    write("real-270m", {
        "model": "google/gemma-3-270m (from its Q4_K_M GGUF, dequantized to bf16)",
        "made_with": MADE_WITH, "vocab_size": config.vocab_size,
        "embed_scale": bf16(config.hidden_size ** 0.5), "fp64_max_abs_diff": short(fp64_differs),
        "bf16_max_abs_diff": short(bf16_differs), "prompts": entries})


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    GOLDEN.mkdir(exist_ok=True)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("branches")
    commands.add_parser("demo")
    commands.add_parser("real").add_argument("dir")
    arguments = parser.parse_args()
    {"branches": branches, "demo": demo,
     "real": lambda: real(arguments.dir)}[arguments.command]()
