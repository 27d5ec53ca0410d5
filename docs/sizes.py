#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Print the codelab's tables of sizes, from the numbers of the models' config.json.

    docs/sizes.py [en|vi] [models] [gpus] [costs]

`models` prints the bytes of each size, `gpus` which sizes fit a GPU of Cloud Run and their
predicted speed, `costs` the price of a running instance. tests/codelab_test.py compares both pages
with this.

Memory follows split_memory in main.cpp and CudaModel's constructor in gemma.cu: 0.9 of the GPU,
less the weights of the text part and the working memory of a step, is for pages of K and V. Speed
is a prediction: a step takes the time to read its bytes at the memory's nominal bandwidth, plus
2 us for each kernel. Neither was measured on these GPUs. For an H100 at 3,174 GB/s the formula
predicts 942 and 7,290 tok/s for 1 and 8 streams of the 1B, where 961 and 7,165 were measured
(README.md); for 64 streams it predicts 1.6 times the measured speed, so the table ends at 8.
"""
import math
import sys
from dataclasses import dataclass


@dataclass
class Model:
    name: str
    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    positions: int
    rows: int  # of the embedding
    vision: int = 0  # parameters of the image part: in the checkpoint, never on the GPU

    @property
    def parameters(self):
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim * self.hidden
        norms = 4 * self.hidden + 2 * self.head_dim
        layer = attention + 3 * self.ffn * self.hidden + norms
        return self.rows * self.hidden + self.layers * layer + self.hidden

    @property
    def weights(self):  # bytes on the GPU
        return 2 * self.parameters

    @property
    def checkpoint(self):  # bytes in the image or the bucket
        return 2 * (self.parameters + self.vision)

    @property
    def token(self):  # bytes of K and V for a token in one layer, bf16
        return 2 * 2 * self.kv_heads * self.head_dim

    @property
    def global_layers(self):
        return self.layers // 6

    @property
    def local_layers(self):
        return self.layers - self.global_layers


SIGLIP = 416_866_032  # the projector adds a norm of 1152 and a matrix of 1152 x hidden


def image_part(hidden):
    return SIGLIP + 1152 + 1152 * hidden


MODELS = [
    Model("270M", 640, 18, 2048, 4, 1, 256, 512, 32768, 262144),
    Model("1B", 1152, 26, 6912, 4, 1, 256, 512, 32768, 262144),
    Model("4B", 2560, 34, 10240, 8, 4, 256, 1024, 131072, 262208, image_part(2560)),
    Model("12B", 3840, 48, 15360, 16, 8, 256, 1024, 131072, 262208, image_part(3840)),
    Model("27B", 5376, 62, 21504, 32, 16, 128, 1024, 131072, 262208, image_part(5376)),
]


@dataclass
class Gpu:
    name: str
    memory: float  # bytes that CUDA reports; a low estimate for the nominal 24 and 96 GB
    driver: float  # bytes in use before the server allocates any
    bandwidth: float  # nominal, bytes a second
    step: int  # --max-num-batched-tokens by default


GPUS = [
    Gpu("L4", 23.0e9, 0.5e9, 300e9, 2048),
    Gpu("RTX PRO 6000", 100.0e9, 0.6e9, 1597e9, 8192),
]
# Dollars a second in us-central1, as the Cloud Billing API gave them in August 2026.
L4_SECOND = {"single": 0.0001867, "redundant": 0.0002909}
CPU_SECOND, GIB_SECOND = 0.000018, 0.000002
CPUS, MEMORY = 4, 16  # of the instance in step 7

PAGE = 32  # tokens
MOST_SEQUENCES = 256  # --max-num-seqs by default
USUAL = 4096  # tokens of a sequence for which split_memory sizes the pools


def groups(k):  # groups_of in linear.cuh
    steps = next((s for s in (10, 9, 8) if k // 32 % s == 0), 1)
    slices = k // 32 // steps
    return math.gcd(slices, 4) if slices >= 16 else 1


def workspace(m, gpu):  # bytes
    he, ge = m.heads * m.head_dim, m.kv_heads * m.head_dim
    parts = max(groups(m.ffn), groups(he))
    token = m.hidden * 4 * (1 + parts) + 2 * m.head_dim * 4 + m.hidden * 2
    token += (he + 2 * ge) * 2 + he * 2 + m.ffn * 2
    outputs = 256 * (m.rows * 4 + m.rows // 256 * 8)
    return gpu.step * token + 16384 * (he * 4 + m.heads * 8) + outputs


def sequences(m, gpu):
    """How many sequences of 4,096 tokens have their K and V in memory at once; 0: does not load."""
    room = 0.9 * gpu.memory - gpu.driver - m.weights - workspace(m, gpu)
    page = PAGE * m.token
    window = (m.window + PAGE - 2) // PAGE + 1
    step = math.ceil(gpu.step / PAGE) + 1
    room -= step * m.local_layers * page
    one = window * m.local_layers * page + USUAL // PAGE * m.global_layers * page
    return max(0, min(MOST_SEQUENCES, int(room // one)))


def speed(m, gpu, batch, context=1024):
    """Tokens a second of `batch` sequences that have `context` tokens each."""
    kv = m.token * (m.global_layers * context + m.local_layers * min(context, m.window))
    kernels = 8 * m.layers + 5
    return batch / ((m.weights + batch * kv) / gpu.bandwidth + kernels * 2e-6)


def rounded(n):  # to two digits, since it is a prediction
    digits = max(0, len(str(int(n))) - 2)
    return f"{round(n / 10**digits) * 10**digits:,}"


WORDS = {
    "en": {
        "models": ["size", "checkpoint", "weights on the GPU", "K and V, each token",
                   "K and V of the window, each sequence", "longest context"],
        "gpus": ["size", "GPU", "fits", "sequences of 4,096 tokens at once",
                 "predicted: 1 stream", "predicted: 8 streams, in all"],
        "costs": ["instance", "an hour", "10 minutes", "a day", "30 days"],
        "yes": "yes", "no": "no", "redundant": "zonal redundancy", "single": "no zonal redundancy",
    },
    "vi": {
        "models": ["kích thước", "checkpoint", "trọng số trên GPU", "K và V, mỗi token",
                   "K và V của cửa sổ, mỗi chuỗi", "ngữ cảnh dài nhất"],
        "gpus": ["kích thước", "GPU", "vừa bộ nhớ", "số chuỗi 4.096 token cùng lúc",
                 "dự đoán: 1 luồng", "dự đoán: 8 luồng, tổng cộng"],
        "costs": ["instance", "một giờ", "10 phút", "một ngày", "30 ngày"],
        "yes": "có", "no": "không", "redundant": "có dự phòng vùng",
        "single": "không dự phòng vùng",
    },
}


def table(language, which):
    words = WORDS[language]

    def number(text):  # Vietnamese writes 1.024,5
        return text.translate(str.maketrans(",.", ".,")) if language == "vi" else text

    rows = [words[which], ["---"] * len(words[which])]
    if which == "costs":
        for kind in ("single", "redundant"):
            hour = 3600 * (L4_SECOND[kind] + CPUS * CPU_SECOND + MEMORY * GIB_SECOND)
            rows.append([f"L4, {CPUS} vCPU, {MEMORY} GiB, {words[kind]}"]
                        + ["$" + number(f"{hour * hours:.2f}") for hours in (1, 1 / 6, 24, 720)])
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
    for m in MODELS:
        if which == "models":
            local = m.token * m.local_layers * m.window
            rows.append([m.name, number(f"{m.checkpoint / 1e9:.2f} GB"),
                         number(f"{m.weights / 1e9:.2f} GB"),
                         number(f"{m.token * m.global_layers / 1024:.0f} KiB"),
                         number(f"{local / 2**20:.0f} MiB"),
                         number(f"{m.positions:,}")])
            continue
        for gpu in GPUS:
            held = sequences(m, gpu)
            cells = [number(rounded(speed(m, gpu, b))) + " tok/s" if held >= b else "-"
                     for b in (1, 8)]
            rows.append([m.name, gpu.name, words["yes"] if held else words["no"],
                         str(held) if held else "-", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(arguments):
    language, *which = arguments or ["en"]
    print("\n\n".join(table(language, name) for name in which or ["models", "gpus", "costs"]))


if __name__ == "__main__":
    main(sys.argv[1:])
