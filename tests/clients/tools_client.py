#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""openai-python's `tools` against the server at URL: what its documents show must hold.

    tools_client.py URL

The demo model's words mean little, so a call is asked for with tool_choice wherever one must come;
with "auto" an answer may be text or calls, and either must be whole.
"""
import json
import sys
from typing import Literal

import openai
import pydantic
from openai import OpenAI, pydantic_function_tool

from checks import check, run

URL = sys.argv[1]
MODEL = "gemma-demo"
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
api = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)


class Weather(pydantic.BaseModel):
    """Says what the weather is in a city."""
    city: str = pydantic.Field(max_length=20, description="the city's name")


class Stop(pydantic.BaseModel):
    place: str = pydantic.Field(max_length=12)
    minutes: int = pydantic.Field(ge=0, le=90)


class Trip(pydantic.BaseModel):
    """Nested, optional and enumerated: what pydantic writes as $ref, anyOf and enum."""
    by: Literal["bus", "train"]
    note: str | None = pydantic.Field(max_length=12)
    stops: list[Stop] = pydantic.Field(max_length=2)


KINDS = {"get_weather": Weather, "plan_trip": Trip}
TOOLS = [{"type": "function", "function": {
    "name": name, "description": kind.__doc__, "parameters": kind.model_json_schema()}}
    for name, kind in KINDS.items()]
STRICT = [pydantic_function_tool(kind, name=name) for name, kind in KINDS.items()]


def ask(messages=None, **fields):
    return api.chat.completions.create(
        model=MODEL, messages=messages or QUESTION, **{"tools": TOOLS, "seed": 1, **fields})


def named(name):
    return {"type": "function", "function": {"name": name}}


def valid(calls):
    """Each call names a tool, and its arguments are what that tool takes."""
    check(calls and len({call.id for call in calls}) == len(calls), calls)
    for call in calls:
        check(call.id and call.type == "function", call)
        check(KINDS[call.function.name].model_validate_json(call.function.arguments), call)
    return calls


def pairs(calls):
    return [(call.function.name, call.function.arguments) for call in calls]


def choices():
    names = set()
    for seed in range(4):
        (choice,) = ask(tool_choice="required", seed=seed).choices
        check(choice.finish_reason == "tool_calls" and not choice.message.content, choice)
        names |= {call.function.name for call in valid(choice.message.tool_calls)}
    check(names <= set(KINDS), names)
    for name in KINDS:
        (choice,) = ask(tool_choice=named(name)).choices
        (call,) = valid(choice.message.tool_calls)
        check(call.function.name == name and not choice.message.content, choice)
        check(choice.finish_reason in ("stop", "tool_calls"), choice)
    (one,) = valid(ask(tool_choice="required", parallel_tool_calls=False)
                   .choices[0].message.tool_calls)
    check(one.function.name in KINDS)
    for choice in ask(tool_choice="required", n=2).choices:
        valid(choice.message.tool_calls)
    same = [pairs(ask(tool_choice="required", seed=7).choices[0].message.tool_calls)
            for _ in range(2)]
    check(same[0] == same[1], "a seed does not repeat", same)

    message = ask(tool_choice="none").choices[0].message
    check(message.content and not message.tool_calls, message)
    for fields in ({}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}):
        (choice,) = ask(temperature=0, **fields).choices
        if choice.message.tool_calls:
            valid(choice.message.tool_calls)
        check(bool(choice.message.tool_calls) == (choice.finish_reason == "tool_calls"), choice)
        check(choice.message.content or choice.message.tool_calls, choice)


def streams():
    for fields in ({"tool_choice": "required"}, {"tool_choice": named("plan_trip")},
                   {"tool_choice": "auto", "temperature": 0}, {"tool_choice": "none"}):
        whole = ask(**fields).choices[0]
        chunks = list(ask(stream=True, stream_options={"include_usage": True}, **fields))
        check(chunks[-1].usage and not chunks[-1].choices, chunks[-1])
        text, calls, reasons = "", [], []
        for chunk in chunks[:-1]:
            (choice,) = chunk.choices
            reasons.append(choice.finish_reason)
            text += choice.delta.content or ""
            for part in choice.delta.tool_calls or []:
                if part.index == len(calls):  # a call begins: it has an id and a name
                    check(part.id and part.type == "function" and part.function.name, part)
                    calls.append([part.function.name, ""])
                else:
                    check(part.index == len(calls) - 1 and not part.function.name, part)
                calls[-1][1] += part.function.arguments or ""
        check(chunks[0].choices[0].delta.role == "assistant", chunks[0])
        check(reasons[-1] == whole.finish_reason and not any(reasons[:-1]), reasons, whole)
        check(text == (whole.message.content or ""), text, whole)
        check([tuple(call) for call in calls] == pairs(whole.message.tool_calls or []), calls)


def helpers():
    """.parse() and .stream(), which make objects of the arguments"""
    fields = {"model": MODEL, "messages": QUESTION, "tools": STRICT, "seed": 3}
    for name, kind in KINDS.items():
        message = api.chat.completions.parse(tool_choice=named(name), **fields).choices[0].message
        check(isinstance(message.tool_calls[0].function.parsed_arguments, kind), message)
    with api.chat.completions.stream(tool_choice="required", **fields) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0].message
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    check([event.name for event in done] == [call.function.name for call in final.tool_calls])
    for event, call in zip(done, valid(final.tool_calls)):
        check(isinstance(event.parsed_arguments, KINDS[event.name]), event)
        check(call.function.parsed_arguments == event.parsed_arguments, call)
    return final


def second_turn():
    """Calls and their results go back, as openai's objects, and as JSON that others write."""
    results = {"role": "tool", "content": '{"weather": "sunny"}'}
    plain = ask(tool_choice="required").choices[0].message
    bare = {"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": text}}
        for text in ['{"city":"Paris"}']]}
    for message, ids in ((plain, [call.id for call in plain.tool_calls]), (bare, ["1"]),
                         ((final := helpers()), [call.id for call in final.tool_calls])):
        turns = QUESTION + [message] + [{**results, "tool_call_id": one} for one in ids]
        answer = ask(turns, temperature=0)
        check(answer.usage.prompt_tokens > ask(max_tokens=1).usage.prompt_tokens, answer.usage)
        check(answer.choices[0].message.content or answer.choices[0].message.tool_calls, answer)
        check(valid(ask(turns, tool_choice="required").choices[0].message.tool_calls))
        check(ask(turns, tool_choice="none").choices[0].message.content)
        check(ask(turns, tools=openai.omit).choices[0].message.content, "tools are not repeated")
        more = turns + [{"role": "assistant", "content": "It is sunny."}, QUESTION[0]]
        check(ask(more, max_tokens=5).choices)
    parts = {**results, "tool_call_id": "1", "content": [{"type": "text", "text": "sunny"}]}
    check(ask(QUESTION + [bare, parts], max_tokens=5).choices)
    two = {**bare, "tool_calls": bare["tool_calls"] + [{**bare["tool_calls"][0], "id": "2"}]}
    both = [{**results, "tool_call_id": one} for one in "12"]
    check(ask(QUESTION + [two, *both], max_tokens=5).choices)


def refused():
    broken = [{"type": "function", "function": {"name": "f", "parameters": {"type": "thing"}}}]
    for fields, word in (({"tool_choice": named("nothing")}, "tool_choice"),
                         ({"tool_choice": "required", "tools": openai.omit}, "tools"),
                         ({"tool_choice": "sometimes"}, "tool_choice"),
                         ({"tool_choice": "required", "tools": broken}, "thing")):
        try:
            check(False, ask(**fields))
        except openai.BadRequestError as error:
            check(word in error.message, fields, error.message)


def tools():
    choices()
    streams()
    helpers()
    second_turn()
    refused()
    return openai.__version__


run(openai_python_tools=tools)
