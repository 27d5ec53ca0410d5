#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""GuideLLM against the server at URL: 64 streaming requests at a time. No request may fail, and
each must have brought all its tokens. The throughput is a figure of this machine, not a test.

    load_client.py URL DIRECTORY
"""
import json
import os
import subprocess
import sys
from pathlib import Path

URL, DIRECTORY = sys.argv[1], Path(sys.argv[2]).resolve()
MODEL = Path(__file__).resolve().parents[2] / "demo/model"
TOKENS = 16


def load(route, requests):
    output = DIRECTORY / f"{route}.json"
    output.unlink(missing_ok=True)
    run = subprocess.run(
        [Path(sys.executable).parent / "guidellm", "benchmark", "run", "--target", URL,
         "--model", "gemma-demo", "--processor", MODEL, "--random-seed", "1",
         "--data", json.dumps({"prompt_tokens": 32, "output_tokens": TOKENS}),
         "--rate-type", "concurrent", "--rate", "64", "--max-requests", str(requests),
         "--disable-progress", "--output-path", output],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        env={**os.environ, "HF_HOME": str(DIRECTORY / "cache"), "HF_HUB_OFFLINE": "1",
             "GUIDELLM__PREFERRED_ROUTE": route, "GUIDELLM__MAX_WORKER_PROCESSES": "2"})
    if run.returncode:
        sys.exit(f"guidellm: status {run.returncode}\n{run.stdout[-4000:]}")
    (benchmark,) = json.loads(output.read_text(encoding="utf-8"))["benchmarks"]
    made = benchmark["run_stats"]["requests_made"]
    assert made == {"successful": requests, "errored": 0, "incomplete": 0, "total": requests}, made
    answers = benchmark["requests"]["successful"]
    assert len(answers) == requests
    # The server's usage must count TOKENS for each request (ignore_eos), and each must have text.
    assert {answer["output_tokens"] for answer in answers} == {TOKENS}
    assert all(answer["output"] and answer["prompt_tokens"] > 16 for answer in answers)
    metrics = benchmark["metrics"]
    mean = {name: metrics[name]["successful"]["mean"] for name in (
        "requests_per_second", "request_concurrency", "output_tokens_per_second",
        "time_to_first_token_ms")}
    print(f"GuideLLM, {route}: {requests} of {requests} streams whole, {TOKENS * requests} tokens; "
          f"{mean['request_concurrency']:.0f} at a time, {mean['requests_per_second']:.0f} "
          f"requests/s, {mean['output_tokens_per_second']:.0f} tokens/s, "
          f"{mean['time_to_first_token_ms']:.0f} ms to the first")


DIRECTORY.mkdir(parents=True, exist_ok=True)
load("text_completions", 256)
load("chat_completions", 128)
