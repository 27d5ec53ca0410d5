#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run openai-python against three servers: its documented behaviour must hold with this server.

    openai_client.py PLAIN KEYED KEY SMALL    # SMALL has room for one sequence, and no queue
"""
import asyncio
import enum
import json
import math
import re
import sys
import threading
import time
import traceback

import openai
import pydantic
from openai import AsyncOpenAI, OpenAI

import checks
from checks import check

PLAIN, KEYED, KEY, SMALL = sys.argv[1:]
MODEL, ALIAS = "gemma-demo", "google/gemma-3-1b-it"
PROMPT = "The KV cache is a"
QUESTION = [{"role": "user", "content": "What is a token?"}]
ANSWER = ("A token is a small piece of text, often a word or a part of a word. "
          "A model reads and writes tokens, one after the other.")
ENDLESS = {"prompt": "Cloud Run is a", "max_tokens": 32000, "extra_body": {"ignore_eos": True}}


def raises(kind, call, *words, param=None):
    try:
        call()
    except openai.OpenAIError as error:
        check(type(error) is kind, error)
        for word in words:
            check(word in error.message, word, error.message)
        if issubclass(kind, openai.APIStatusError):
            check(error.code == str(error.status_code) and error.type, error.code, error.type)
            check(error.body["message"] in error.message, error.body)
            check(param is None or error.param == param, error.param)
        return error
    raise AssertionError(f"no {kind.__name__}")


def client(address, key="none", **options):
    return OpenAI(base_url=f"{address}/v1", api_key=key, **{"max_retries": 0, **options})


plain = client(PLAIN)


def complete(prompt=PROMPT, **fields):
    return plain.completions.create(model=MODEL, prompt=prompt, **{"temperature": 0, **fields})


def chat(messages=None, **fields):
    return plain.chat.completions.create(
        model=MODEL, messages=messages or QUESTION, **{"temperature": 0, **fields})


def join(stream, choices=1):
    """texts, finish reasons and the usage of a completion's stream, and its chunks"""
    texts, reasons, usage, chunks = [""] * choices, [None] * choices, None, list(stream)
    check(len({chunk.id for chunk in chunks}) == 1)
    for chunk in chunks:
        if not chunk.choices:
            check(chunk is chunks[-1] and chunk.usage)
            usage = chunk.usage
        for choice in chunk.choices:
            check(reasons[choice.index] is None, "a chunk after the last")
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    return texts, reasons, usage, chunks


# ---- models -------------------------------------------------------------------------------------


def models():
    listed = plain.models.list()
    check([model.id for model in listed] == [MODEL, ALIAS], listed)
    check(all(model.object == "model" and model.created > 1e9 for model in listed))
    for name in (MODEL, ALIAS):
        check(plain.models.retrieve(name).id == name)
    raises(openai.NotFoundError, lambda: plain.models.retrieve("nobody"), "`nobody`")


# ---- completions --------------------------------------------------------------------------------


def completions():
    answer = complete(max_tokens=12)
    check(answer.object == "text_completion" and answer.id.startswith("cmpl-"), answer)
    check(answer.model == MODEL and abs(answer.created - time.time()) < 60)
    (choice,) = answer.choices
    check(choice.index == 0 and choice.text and choice.logprobs is None, choice)
    check(choice.finish_reason == "length", choice.finish_reason)
    usage = answer.usage
    check(usage.completion_tokens == 12)
    check(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage)
    check(complete(max_tokens=12).choices[0].text == choice.text, "greedy text changes")
    check(plain.completions.create(model=ALIAS, prompt=PROMPT, max_tokens=1).model == ALIAS)

    whole = complete(max_tokens=200)
    check(whole.choices[0].finish_reason == "stop" and whole.choices[0].text.endswith("."), whole)
    check(whole.choices[0].text.startswith(choice.text))
    stopped = complete(max_tokens=200, stop=["?", whole.choices[0].text[5:9]]).choices[0]
    check(stopped.text == whole.choices[0].text[:5] and stopped.finish_reason == "stop", stopped)
    check(stopped.model_extra["stop_reason"] == whole.choices[0].text[5:9], stopped)

    # a batch of texts as prompts, then the same as ids
    texts = [PROMPT, "A GPU is a"]
    ids = [plain.post("/../tokenize", cast_to=object, body={"prompt": text})["tokens"]
           for text in texts]
    batch, same = complete(texts, max_tokens=8), complete(ids, max_tokens=8)
    check([choice.index for choice in batch.choices] == [0, 1])
    check([c.text for c in batch.choices] == [c.text for c in same.choices], batch, same)
    check(batch.choices[0].text == complete(max_tokens=8).choices[0].text)
    check(batch.usage.prompt_tokens == sum(map(len, ids)) and batch.usage.completion_tokens == 16)
    check(complete(ids[0], max_tokens=8).choices[0].text == batch.choices[0].text)

    # logit_bias, and the request's id
    forced = complete(max_tokens=3, logit_bias={"1000": 100}, logprobs=0)
    check(len(set(forced.choices[0].logprobs.tokens)) == 1, forced)
    named = complete(max_tokens=1, extra_headers={"X-Request-Id": "client-7"})
    check(named.id == "cmpl-client-7", named.id)


def sampled():
    def texts(n, **fields):
        answer = complete(n=n, max_tokens=20, temperature=0.9, **fields)
        check([choice.index for choice in answer.choices] == list(range(n)))
        check(answer.usage.completion_tokens <= 20 * n)
        return [choice.text for choice in answer.choices]

    three = texts(3, seed=7)
    check(three == texts(3, seed=7), "a seed does not repeat")
    check(three[:1] == texts(1, seed=7) and len({*three, *texts(3, seed=70)}) > 1)
    stream = complete(n=3, max_tokens=20, temperature=0.9, seed=7, stream=True)
    streamed, reasons, usage, _ = join(stream, 3)
    check(streamed == three and all(reasons) and usage is None, streamed, three)
    check(len(texts(2, presence_penalty=0.5, frequency_penalty=0.5, top_p=0.5)) == 2)


def logprobs():
    answer = complete(max_tokens=6, logprobs=3).choices[0]
    got = answer.logprobs
    check(len(got.tokens) == len(got.token_logprobs) == len(got.top_logprobs) == 6, got)
    check("".join(got.tokens) == answer.text, got.tokens, answer.text)
    for token, logprob, top in zip(got.tokens, got.token_logprobs, got.top_logprobs):
        check(3 <= len(top) <= 4 and max(top.values()) == top[token] == logprob <= 0, top)
    check([offset - got.text_offset[0] for offset in got.text_offset] ==
          [len("".join(got.tokens[:i])) for i in range(6)], got.text_offset)

    # echo: the prompt's own logprobs; the first token has none
    echo = complete(max_tokens=2, logprobs=1, echo=True)
    got, prompt_tokens = echo.choices[0].logprobs, echo.usage.prompt_tokens
    check(echo.choices[0].text == PROMPT + complete(max_tokens=2).choices[0].text, echo)
    check(len(got.tokens) == len(got.token_logprobs) == prompt_tokens + 2, got)
    check(got.token_logprobs[0] is None and got.top_logprobs[0] is None)
    check(all(value <= 0 for value in got.token_logprobs[1:]))
    only = complete(max_tokens=0, logprobs=1, echo=True)
    check(only.choices[0].text == PROMPT and only.usage.completion_tokens == 0, only)
    check(only.choices[0].logprobs.token_logprobs == got.token_logprobs[:prompt_tokens])

    # chat
    answer = chat(max_tokens=6, logprobs=True, top_logprobs=2).choices[0]
    content = answer.logprobs.content
    check("".join(token.token for token in content) == answer.message.content)
    for token in content:
        check(bytes(token.bytes).decode() == token.token and token.logprob <= 0, token)
        check([top.token for top in token.top_logprobs][0] == token.token)
        check(len(token.top_logprobs) == 2)
        check(sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1.0001)


def streams():
    whole = complete(max_tokens=20)
    (text,), (reason,), usage, chunks = join(complete(max_tokens=20, stream=True))
    check(text == whole.choices[0].text and reason == whole.choices[0].finish_reason, text)
    check(usage is None and len(chunks) > 5 and chunks[0].object == "text_completion")

    options = {"include_usage": True}
    (text,), _, usage, chunks = join(complete(max_tokens=20, stream=True, stream_options=options))
    check(text == whole.choices[0].text)
    check(usage and usage.total_tokens == whole.usage.total_tokens, usage)
    check(all(chunk.usage is None for chunk in chunks[:-1]))

    options["continuous_usage_stats"] = True
    _, _, usage, chunks = join(complete(max_tokens=20, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    check(counts == sorted(counts) and counts[-1] == usage.completion_tokens, counts)

    # closes a stream in the middle
    with complete(max_tokens=5000, stream=True, extra_body={"ignore_eos": True}) as stream:
        check(next(iter(stream)).choices)


# ---- chat ---------------------------------------------------------------------------------------


def chats():
    answer = chat()
    check(answer.object == "chat.completion" and answer.id.startswith("chatcmpl-"), answer)
    (choice,) = answer.choices
    check(choice.message.role == "assistant" and choice.message.content == ANSWER, choice)
    check(choice.finish_reason == "stop" and not choice.message.tool_calls, choice)
    check(answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens)
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is a token?"}]}]
    check(chat(parts).choices[0].message.content == ANSWER)
    turns = QUESTION + [{"role": "assistant", "content": ANSWER},
                        {"role": "user", "content": "What is prefill?"}]
    check(chat(turns).choices[0].message.content)
    system = [{"role": "system", "content": "Be short."}] + QUESTION
    check(chat(system).usage.prompt_tokens > answer.usage.prompt_tokens)
    check(chat(max_tokens=3).usage.completion_tokens == 3)
    short = chat(max_completion_tokens=3)
    check(short.choices[0].finish_reason == "length" and ANSWER.startswith(
        short.choices[0].message.content))
    check(len(chat(n=2, temperature=0.8, seed=1).choices) == 2)
    check(chat(stop=", often").choices[0].message.content == "A token is a small piece of text")

    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    check(chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices == [], chunks)
    check(all(chunk.object == "chat.completion.chunk" for chunk in chunks))
    check(chunks[-1].usage.total_tokens == answer.usage.total_tokens, chunks[-1])
    deltas = [chunk.choices[0] for chunk in chunks[:-1]]
    check("".join(choice.delta.content or "" for choice in deltas) == ANSWER)
    check(all(choice.delta.role is None for choice in deltas[1:]))
    check([choice.finish_reason for choice in deltas][-1] == "stop")
    check(all(choice.finish_reason is None for choice in deltas[:-1]))

    # openai's own helper, which accumulates chunks
    with plain.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    check(final.message.content == ANSWER and final.finish_reason == "stop", final)
    check({"chunk", "content.delta", "content.done"} <= kinds, kinds)


# ---- around the answers -------------------------------------------------------------------------


def responses():
    raw = plain.completions.with_raw_response.create(model=MODEL, prompt=PROMPT, max_tokens=1)
    check(raw.status_code == 200 and raw.headers["content-type"] == "application/json", raw.headers)
    check(raw.parse().usage.completion_tokens == 1 and raw.retries_taken == 0)
    with plain.chat.completions.with_streaming_response.create(
            model=MODEL, messages=QUESTION, temperature=0, stream=True) as raw:
        check(raw.headers["content-type"].startswith("text/event-stream"), raw.headers)
        lines = [line for line in raw.iter_lines() if line]
    check(all(line.startswith("data: {") for line in lines[:-1]) and lines[-1] == "data: [DONE]")

    text = "A token is a small piece of text. " * 12
    first, again = complete(text, max_tokens=1).usage, complete(text, max_tokens=1).usage
    check(again.prompt_tokens == first.prompt_tokens > 64)
    check(again.prompt_tokens_details.cached_tokens >= 64, again)


def errors():
    bad = openai.BadRequestError
    for field, value in (("temperature", -1), ("top_p", 2), ("max_tokens", 0), ("n", 0),
                         ("logprobs", 21), ("presence_penalty", 3), ("seed", 2 ** 70),
                         ("best_of", 2), ("suffix", "x"), ("temperature", "hot")):
        raises(bad, lambda f=field, v=value: complete(**{f: v}), field, param=field)
        raises(bad, lambda f=field, v=value: complete(**{f: v}, stream=True), field, param=field)
    raises(bad, lambda: complete(n=2), "greedy")
    raises(bad, lambda: complete([[999999]]), "999999")
    raises(bad, lambda: complete([]))
    raises(bad, lambda: complete(max_tokens=40000), "32768")
    raises(bad, lambda: complete(logit_bias={"5000": 1}), "5000", "2048")
    raises(bad, lambda: chat([{"role": "assistant", "content": "x"}]), "alternate")
    raises(bad, lambda: chat(top_logprobs=2), "logprobs")
    raises(bad, lambda: chat(tools=[{"type": "function"}]), "tools[0].function", param="tools")
    nobody = raises(openai.NotFoundError, lambda: plain.completions.create(
        model="nobody", prompt=PROMPT), "The model `nobody` does not exist.")
    check(nobody.type == "NotFoundError", nobody.type)
    raises(openai.NotFoundError, lambda: plain.embeddings.create(model=MODEL, input="x"))
    large = raises(openai.APIStatusError, lambda: complete("x" * 5_000_000))
    check(large.status_code == 413, large)
    check(complete(max_tokens=1).choices, "the server lives")


def keys():
    right = client(KEYED, KEY)
    check(right.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1).choices)
    check(client(KEYED, "other-secret").models.list().data)
    wrong = client(KEYED, KEY + "x")
    calls = (wrong.models.list, lambda: wrong.completions.create(model=MODEL, prompt=PROMPT),
             lambda: wrong.chat.completions.create(model=MODEL, messages=QUESTION, stream=True))
    for call in calls:
        error = raises(openai.AuthenticationError, call)
        check(error.response.headers["www-authenticate"] == "Bearer", error.response.headers)
    check(client(PLAIN, "any").models.list().data, "without a key any will do")


def overload():
    small = client(SMALL)

    def short(api=small, **fields):
        return api.completions.with_raw_response.create(
            model=MODEL, prompt=PROMPT, max_tokens=3, **fields)

    stream = small.completions.create(model=MODEL, stream=True, **ENDLESS)
    next(iter(stream))
    begun = time.monotonic()
    full = raises(openai.RateLimitError, short)
    check(time.monotonic() < begun + 0.5, "refused, but late")
    check(full.status_code == 429 and full.response.headers["retry-after"] == "1", full.response)
    # With retries a request gets in, once the long stream is closed.
    threading.Timer(0.3, stream.close).start()
    patient = short(client(SMALL, max_retries=5))
    check(patient.parse().usage.completion_tokens == 3 and patient.retries_taken >= 1, patient)

    # A request that times out frees its place too.
    raises(openai.APITimeoutError, lambda: small.completions.create(
        model=MODEL, timeout=0.5, **ENDLESS))
    left = time.monotonic()
    while True:
        try:
            check(short().parse().usage.completion_tokens == 3)
            break
        except openai.RateLimitError:
            assert time.monotonic() < left + 1, "a client that left still holds its place"
            time.sleep(0.05)


class Kind(enum.Enum):
    small = "small"
    large = "large"


class Part(pydantic.BaseModel):
    kind: Kind
    weight: float | None


class Thing(pydantic.BaseModel):
    """Nested, optional and enumerated: what pydantic writes as $ref, anyOf and enum."""
    label: str = pydantic.Field(max_length=20)
    count: int
    parts: list[Part] = pydantic.Field(max_length=2)


def structured():
    for seed in range(5):
        answer = plain.chat.completions.parse(model=MODEL, messages=QUESTION, seed=seed,
                                              response_format=Thing, max_completion_tokens=1000)
        thing = answer.choices[0].message.parsed
        check(isinstance(thing, Thing) and len(thing.parts) <= 2, answer)
    with plain.chat.completions.stream(model=MODEL, messages=QUESTION, seed=9,
                                       response_format=Thing) as stream:
        for _ in stream:
            pass
        check(isinstance(stream.get_final_completion().choices[0].message.parsed, Thing))
    answer = chat(response_format={"type": "json_object"}, max_tokens=400)
    if answer.choices[0].finish_reason == "stop":
        check(isinstance(json.loads(answer.choices[0].message.content), dict), answer)
    pattern = r"[A-Z][a-z]{2,6} \d{4}"
    answer = complete(max_tokens=40, extra_body={"guided_regex": pattern})
    check(re.fullmatch(pattern, answer.choices[0].text), answer)
    answer = chat(extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    check(answer.choices[0].message.content in ("yes", "no"), answer)
    raises(openai.BadRequestError, lambda: chat(response_format={"type": "json_schema"}),
           "'json_schema' field must be provided", param="response_format")


def together():
    async def ask(api, number):
        answer = await api.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, stream=number % 2 == 1)
        if number % 2 == 0:
            return answer.choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

    async def all_of():
        async with AsyncOpenAI(base_url=f"{PLAIN}/v1", api_key="none", max_retries=0) as api:
            return await asyncio.gather(*(ask(api, number) for number in range(32)))

    check(set(asyncio.run(all_of())) == {ANSWER})


def main():
    failed = 0
    for test in (models, completions, sampled, logprobs, streams, chats, responses, errors, keys,
                 structured, overload, together):
        try:
            test()
        except Exception:  # run the others too
            failed += 1
            print(f"openai-python: {test.__name__} failed", file=sys.stderr)
            traceback.print_exc()
    if failed:
        sys.exit(1)
    print(f"openai-python {openai.__version__}: {checks.count} checks")


main()
