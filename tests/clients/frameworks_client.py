#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Frameworks over openai-python, each as its documents begin: objects of a schema, and tools.

    frameworks_client.py URL

The demo model's words mean little: objects must be valid, and answers whole, whatever they say.
Strings and lists are bounded, since that model would go on for long.
"""
import asyncio
import os
import sys
import warnings
from typing import Annotated, Literal

import pydantic
from openai import OpenAI

from checks import check, run

URL = sys.argv[1] + "/v1"
MODEL, KEY = "gemma-demo", "none"
QUESTION = "What is the weather in Paris?"
os.environ["LANGSMITH_TRACING"] = "false"
City = Annotated[str, pydantic.Field(max_length=20)]


class Stop(pydantic.BaseModel):
    """A place on the way."""
    place: City
    minutes: int = pydantic.Field(ge=0, le=90)


class Trip(pydantic.BaseModel):
    by: Literal["bus", "train"]
    note: str | None = pydantic.Field(default=None, max_length=12)
    stops: list[Stop] = pydantic.Field(max_length=2)


class Free(pydantic.BaseModel):
    """Any object will do: json_object promises JSON, and not a schema."""
    model_config = pydantic.ConfigDict(extra="allow")
    title: object = None


def is_trip(trip):
    check(isinstance(trip, Trip) and len(trip.stops) <= 2 and trip.by in ("bus", "train"), trip)


def first_whole(ask, cut):
    """ask(SEED) for the first seed with which the demo model comes to an end"""
    for seed in range(20):
        try:
            return ask(seed)
        except cut:
            pass
    raise AssertionError("no answer comes to an end")


# ---- instructor ---------------------------------------------------------------------------------


def with_instructor():
    import instructor
    from instructor.core.exceptions import IncompleteOutputException

    def create(response_model, mode=None, seed=1, **fields):
        client = instructor.from_openai(
            OpenAI(base_url=URL, api_key=KEY), **({"mode": mode} if mode else {}))
        return client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": QUESTION}], seed=seed,
            response_model=response_model, **fields)

    for seed in range(3):
        is_trip(create(Trip, seed=seed))  # its default is TOOLS
    is_trip(create(Trip, instructor.Mode.JSON_SCHEMA))
    free = first_whole(lambda seed: create(Free, instructor.Mode.JSON, seed, max_tokens=500),
                       IncompleteOutputException)
    check(isinstance(free, Free), free)
    # stream: parts of an object, of which the last is whole
    *some, last = create(instructor.Partial[Trip], stream=True)
    check(some and last.by and last.stops is not None, last)

    # an object that is refused goes back as a call and its error, and another is asked for
    refused = []

    class Picky(Stop):
        @pydantic.field_validator("place")
        @classmethod
        def never_the_first(cls, value):
            if not refused:
                refused.append(value)
                raise ValueError("another place, please")
            return value

    check(isinstance(create(Picky, max_retries=2), Picky) and len(refused) == 1, refused)
    return instructor.__version__


# ---- LangChain ----------------------------------------------------------------------------------


def with_langchain():
    import langchain_openai
    from langchain_core.exceptions import OutputParserException
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool

    def model(seed=1, **fields):
        return langchain_openai.ChatOpenAI(
            model=MODEL, base_url=URL, api_key=KEY, seed=seed, **fields)

    is_trip(model().with_structured_output(Trip).invoke(QUESTION))
    for method in ("json_schema", "function_calling"):
        is_trip(model().with_structured_output(Trip, method=method).invoke(QUESTION))
    free = first_whole(lambda seed: model(seed, max_tokens=500).with_structured_output(
        Free, method="json_mode").invoke(QUESTION + " Answer in JSON."), OutputParserException)
    check(isinstance(free, Free), free)
    raw = model().with_structured_output(Trip, method="function_calling", include_raw=True)
    raw = raw.invoke(QUESTION)
    check(raw["parsing_error"] is None and raw["raw"].tool_calls, raw)

    @tool
    def get_weather(city: City) -> str:
        """Says what the weather is in a city."""
        return f"It is sunny in {city}."

    @tool
    def plan(stops: Annotated[list[Stop], pydantic.Field(max_length=2)]) -> str:
        """Plans a trip."""
        return f"{len(stops)} stops"

    tools = {"get_weather": get_weather, "plan": plan}
    for choice in ("any", "get_weather", "plan"):
        turns = [HumanMessage(QUESTION)]
        forced = model().bind_tools(list(tools.values()), tool_choice=choice)
        turns.append(forced.invoke(turns))
        check(turns[-1].tool_calls and not turns[-1].invalid_tool_calls, turns)
        check(choice == "any" or turns[-1].tool_calls[0]["name"] == choice, turns)
        turns += [tools[call["name"]].invoke(call) for call in turns[-1].tool_calls]
        check(turns[-1].status == "success" and turns[-1].content, turns)
        answer = model(temperature=0).bind_tools(list(tools.values())).invoke(turns)
        check(answer.content or answer.tool_calls, answer)
        chunks = list(forced.stream(QUESTION))
        whole = sum(chunks[1:], chunks[0])
        check([(call["name"], call["args"]) for call in whole.tool_calls] ==
              [(call["name"], call["args"]) for call in turns[1].tool_calls], whole)
    answer = model(temperature=0).bind_tools([get_weather]).invoke(QUESTION)
    check((answer.content or answer.tool_calls) and not answer.invalid_tool_calls, answer)
    from importlib.metadata import version
    return version("langchain-openai")


# ---- pydantic-ai --------------------------------------------------------------------------------


def with_pydantic_ai():
    import pydantic_ai
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider
    from pydantic_ai.usage import UsageLimits

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key=KEY))
    limits = UsageLimits(request_limit=5)

    def agent(**fields):
        return Agent(model, model_settings={"seed": 2, "temperature": 0.5}, **fields)

    first = agent(output_type=Trip).run_sync(QUESTION)
    is_trip(first.output)
    # a conversation goes on: a question straight after a tool's result
    again = agent(output_type=Trip).run_sync("And in Rome?", message_history=first.all_messages())
    is_trip(again.output)
    either = agent(output_type=[Stop, Trip]).run_sync(QUESTION).output
    check(type(either) in (Stop, Trip), either)
    is_trip(agent(output_type=NativeOutput(Trip)).run_sync(QUESTION).output)

    async def streamed():
        async with agent(output_type=Trip).run_stream(QUESTION) as stream:
            return await stream.get_output()

    is_trip(asyncio.run(streamed()))

    cities = []
    helper = agent(instructions="Be short.")

    @helper.tool_plain
    def get_weather(city: City) -> str:
        """Says what the weather is in a city.

        Args:
            city: the city's name
        """
        cities.append(city)
        return f"It is sunny in {city}."

    result = helper.run_sync(QUESTION, usage_limits=limits)
    check(isinstance(result.output, str) and result.output, result)
    check(len(cities) == result.usage.tool_calls, cities, result.usage)
    result = helper.run_sync("What is a token?", message_history=result.all_messages(),
                             usage_limits=limits)
    check(result.output, result)
    return pydantic_ai.__version__


# ---- LlamaIndex ---------------------------------------------------------------------------------


def with_llama_index():
    from importlib.metadata import version

    from llama_index.core.agent.workflow import FunctionAgent
    from llama_index.core.llms import ChatMessage
    from llama_index.core.prompts import PromptTemplate
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    class Place(pydantic.BaseModel):
        city: City

    def get_weather(city: str) -> str:
        """Says what the weather is in a city."""
        return f"It is sunny in {city}."

    tool = FunctionTool.from_defaults(get_weather, fn_schema=Place)
    llm = OpenAILike(model=MODEL, api_base=URL, api_key=KEY, is_chat_model=True,
                     is_function_calling_model=True, additional_kwargs={"seed": 1})
    prompt = PromptTemplate("What is the weather in {city}?")
    is_trip(llm.structured_predict(Trip, prompt, city="Paris"))
    is_trip(llm.as_structured_llm(Trip).complete(QUESTION).raw)

    question = ChatMessage(QUESTION)
    answer = llm.chat_with_tools([tool], chat_history=[question], tool_required=True)
    (call,) = llm.get_tool_calls_from_response(answer)
    check(call.tool_name == "get_weather" and Place(**call.tool_kwargs), call)
    result = ChatMessage(tool(**call.tool_kwargs).content, role="tool",
                         additional_kwargs={"tool_call_id": call.tool_id})
    last = llm.chat_with_tools([tool], chat_history=[question, answer.message, result])
    check(last.message.content or llm.get_tool_calls_from_response(last), last)
    *_, streamed = llm.stream_chat_with_tools([tool], chat_history=[question], tool_required=True)
    (same,) = llm.get_tool_calls_from_response(streamed)
    check(same.tool_kwargs == call.tool_kwargs, same, call)
    done = llm.predict_and_call([tool], chat_history=[question], tool_required=True)
    check(done.response == get_weather(**call.tool_kwargs), done)

    async def agent():
        return await FunctionAgent(tools=[tool], llm=llm).run(QUESTION, max_iterations=5)

    check(str(asyncio.run(agent())), "the agent says nothing")
    return version("llama-index-llms-openai-like")


warnings.simplefilter("ignore")
run(instructor=with_instructor, langchain_openai=with_langchain, pydantic_ai=with_pydantic_ai,
    llama_index_llms_openai_like=with_llama_index)
