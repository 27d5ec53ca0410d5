#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run lm-evaluation-harness's own command line against the server at URL: its model is
local-completions (token ids, echo, logprobs), its tasks are those in tasks/. Each number must be
that of Hugging Face, frozen in golden.json.

    lm_eval_client.py URL DIRECTORY    # lm_eval writes to DIRECTORY
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
URL, DIRECTORY = sys.argv[1], Path(sys.argv[2]).resolve()


def samples(task):
    (path,) = DIRECTORY.rglob(f"samples_{task}_*.jsonl")
    found = [json.loads(line) for line in path.open(encoding="utf-8")]
    return sorted(found, key=lambda sample: sample["doc_id"])


def main():
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    arguments = {"model": "gemma-demo", "base_url": f"{URL}/v1/completions",
                 "tokenizer": HERE.parents[1] / "demo/model", "tokenizer_backend": "huggingface",
                 "add_bos_token": True, "num_concurrent": 4, "max_retries": 1}
    run = subprocess.run(
        [Path(sys.executable).parent / "lm_eval", "run", "--model", "local-completions",
         "--model_args", ",".join(f"{key}={value}" for key, value in arguments.items()),
         "--batch_size", "4", "--tasks", "tasks/facts.yaml,tasks/answers.yaml", "--log_samples",
         "--output_path", DIRECTORY],
        cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        env={**os.environ, "HF_HOME": str(DIRECTORY / "cache"), "HF_HUB_OFFLINE": "1"})
    if run.returncode:
        sys.exit(f"lm_eval: status {run.returncode}\n{run.stdout[-4000:]}")
    golden = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))

    worst, count, right = 0.0, 0, 0
    facts = samples("demo_facts")
    assert len(facts) == len(golden["facts"])
    for sample, want in zip(facts, golden["facts"]):
        assert sample["doc"]["opening"] == want["opening"]
        assert len(sample["resps"]) == len(want["ends"])
        for (response,), end in zip(sample["resps"], want["ends"]):
            loglikelihood, greedy = response
            part = abs(float(loglikelihood) - end["loglikelihood"]) / (
                end["tokens"] * golden["tolerance"])
            assert part <= 1, (want["opening"], response, end)
            assert str(greedy) == str(end["greedy"]), (want["opening"], response, end)
            worst, count = max(worst, part), count + 1
        best = [end["loglikelihood"] for end in want["ends"]]
        expected = best.index(max(best)) == sample["doc"]["right"]
        assert sample["acc"] == expected, sample
        right += expected

    answers = samples("demo_answers")
    assert len(answers) == len(golden["answers"])
    for sample, want in zip(answers, golden["answers"]):
        assert sample["doc"]["question"] == want["question"]
        assert sample["resps"] == [[want["text"]]], (sample["resps"], want)
    exact = sum(sample["exact_match"] for sample in answers)

    (path,) = DIRECTORY.rglob("results_*.json")
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert results["demo_facts"]["acc,none"] == right / len(facts), results
    assert results["demo_answers"]["exact_match,none"] == exact / len(answers), results
    print(f"lm-evaluation-harness: {count} loglikelihoods, at most {100 * worst:.0f}% of the "
          f"tolerance from Hugging Face's, with the same greedy flags; {len(answers)} greedy "
          f"answers the same; acc {right}/{len(facts)}, exact_match {exact:.0f}/{len(answers)}")


main()
