# SPDX-License-Identifier: Apache-2.0
"""Gemma 3's text model in plain PyTorch, for training only: Hugging Face's class has no dropout.

Letters: B rows, T tokens, D hidden, H query heads, E head dim. One key/value head. The parameters
carry Hugging Face's names, so that "model." + name is the tensor in model.safetensors.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class RMSNorm(nn.Module):
    """y = x / rms(x) * (1 + w), in fp32. w starts at 0 and is stored as it is, an offset."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight, 1e-6)


def rope(x, base):  # [B, H, T, E] -> the same, rotated by position
    half = x.shape[-1] // 2
    t, e = (torch.arange(n, device=x.device) for n in (x.shape[2], half))
    angle = torch.outer(t, base ** (-e / half))  # [T, E/2]
    c, s, (a, b) = angle.cos(), angle.sin(), x.chunk(2, -1)
    return torch.cat((a * c - b * s, b * c + a * s), -1)


class Attention(nn.Module):
    def __init__(self, c, base):
        super().__init__()
        D, H, E = c["hidden_size"], c["num_attention_heads"], c["head_dim"]
        self.E, self.base, self.scale = E, base, c["query_pre_attn_scalar"] ** -0.5
        self.q_proj = nn.Linear(D, H * E, bias=False)
        self.k_proj = nn.Linear(D, E, bias=False)
        self.v_proj = nn.Linear(D, E, bias=False)
        self.o_proj = nn.Linear(H * E, D, bias=False)
        self.q_norm, self.k_norm = RMSNorm(E), RMSNorm(E)

    def forward(self, x, mask):  # [B, T, D], [B, 1, T, T] -> [B, T, D]
        heads = lambda y: y.unflatten(-1, (-1, self.E)).transpose(1, 2)  # -> [B, heads, T, E]
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        q = rope(self.q_norm(q), self.base).to(v.dtype)
        k = rope(self.k_norm(k), self.base).to(v.dtype)
        k, v = k.expand_as(q), v.expand_as(q)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.o_proj(a.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, F_ = c["hidden_size"], c["intermediate_size"]
        self.gate_proj, self.up_proj = nn.Linear(D, F_, bias=False), nn.Linear(D, F_, bias=False)
        self.down_proj = nn.Linear(F_, D, bias=False)

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c, i):
        super().__init__()
        self.is_global = (i + 1) % c["sliding_window_pattern"] == 0
        base = c["rope_theta"] if self.is_global else c["rope_local_base_freq"]
        self.self_attn = Attention(c, base)
        self.mlp = MLP(c)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            setattr(self, name + "_layernorm", RMSNorm(c["hidden_size"]))

    def forward(self, x, masks, drop):
        a = self.self_attn(self.input_layernorm(x), masks[self.is_global])
        x = x + F.dropout(self.post_attention_layernorm(a), drop, self.training)
        m = self.mlp(self.pre_feedforward_layernorm(x))
        return x + F.dropout(self.post_feedforward_layernorm(m), drop, self.training)


class Gemma(nn.Module):
    def __init__(self, c, drop=0.1):
        super().__init__()
        self.c, self.drop = c, drop
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(c["hidden_size"])
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=c["hidden_size"] ** -0.5)

    def forward(self, ids, doc):  # [B, T] tokens, [B, T] document numbers -> logits [B, T, V]
        t = torch.arange(ids.shape[1], device=ids.device)
        back = t[:, None] - t  # [T, T] how far key lies behind query
        own = ((doc[:, :, None] == doc[:, None, :]) & (back >= 0))[:, None]  # [B, 1, T, T]
        masks = {True: own, False: own & (back < self.c["sliding_window"])}
        x = self.embed_tokens(ids) * self.c["hidden_size"] ** 0.5
        for layer in self.layers:
            x = layer(x, masks, self.drop)
        return F.linear(self.norm(x), self.embed_tokens.weight)
