// SPDX-License-Identifier: Apache-2.0
//
// openai-node and Vercel's AI SDK against a server, each as its documents begin: objects of a
// schema, and tools. As in frameworks_client.py, objects must be valid and answers whole.
//
//     node clients.mjs URL    # in a directory in which package-lock.json is installed
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateObject, generateText, Output, stepCountIs, streamObject, streamText,
         tool } from 'ai';
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import OpenAI from 'openai';
import { zodFunction, zodResponseFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const baseURL = `${process.argv[2]}/v1`;
const model = 'gemma-demo';
const question = 'What is the weather in Paris?';
const messages = [{ role: 'user', content: question }];
const Place = z.object({ city: z.string().max(20) });
const Stop = z.object({ place: z.string().max(12), minutes: z.number().int().min(0).max(90) });
const Trip = z.object({ by: z.enum(['bus', 'train']), note: z.string().max(12).nullable(),
                        stops: z.array(Stop).max(2) });
const sunny = ({ city }) => `It is sunny in ${city}.`;
globalThis.AI_SDK_LOG_WARNINGS = false;

let checks = 0;
function check(condition, ...why) {
    checks++;
    assert(condition, why.map(x => JSON.stringify(x)).join(' '));
}

const isTrip = value => check(Trip.safeParse(value).success, value);
const isPlace = value => check(Place.safeParse(value).success, value);

// ---- openai-node --------------------------------------------------------------------------------

async function openaiNode() {
    const chat = new OpenAI({ baseURL, apiKey: 'none', maxRetries: 0 }).chat.completions;
    const strict = { model, messages, seed: 1, tools: [
        zodFunction({ name: 'get_weather', parameters: Place }),
        zodFunction({ name: 'plan_trip', parameters: Trip })] };
    const named = name => ({ type: 'function', function: { name } });
    const shapes = { get_weather: Place, plan_trip: Trip };
    const isCall = ({ id, type, function: called }) => check(
        id && type === 'function' && shapes[called.name].safeParse(called.parsed_arguments).success,
        called);

    const parsed = await chat.parse(
        { model, messages, seed: 1, response_format: zodResponseFormat(Trip, 'trip') });
    isTrip(parsed.choices[0].message.parsed);
    for (const tool_choice of ['required', named('get_weather'), named('plan_trip')]) {
        const { message } = (await chat.parse({ ...strict, tool_choice })).choices[0];
        check(message.tool_calls.length > 0 && !message.content, message);
        message.tool_calls.forEach(isCall);
        const stream = chat.stream({ ...strict, tool_choice });
        const final = (await stream.finalChatCompletion()).choices[0].message;
        final.tool_calls.forEach(isCall);
        const text = m => m.tool_calls.map(({ function: f }) => [f.name, f.arguments]);
        assert.deepEqual(text(final), text(message));
        // the objects of an answer, and the results, go back
        const results = final.tool_calls.map(
            ({ id }) => ({ role: 'tool', tool_call_id: id, content: 'sunny' }));
        const next = await chat.create({ ...strict, messages: [...messages, final, ...results] });
        check(next.choices[0].message.content || next.choices[0].message.tool_calls, next);
    }
    const none = await chat.create({ ...strict, tool_choice: 'none' });
    check(none.choices[0].message.content && !none.choices[0].message.tool_calls?.length, none);

    // runTools calls functions until there is an answer
    for (const stream of [false, true]) {
        const cities = [];
        const weather = {
            name: 'get_weather', description: 'Says what the weather is in a city.',
            parameters: z.toJSONSchema(Place), parse: JSON.parse,
            function: place => { cities.push(place.city); return sunny(place); } };
        const runner = chat.runTools(
            { model, messages, temperature: 0, stream,
              tools: [{ type: 'function', function: weather }] },
            { maxChatCompletions: 5 });
        check(await runner.finalContent(), 'runTools says nothing');
        check(runner.messages.filter(({ role }) => role === 'tool').length === cities.length);
    }
    const wrong = await chat.create({ ...strict, tool_choice: named('nobody') }).catch(e => e);
    check(wrong instanceof OpenAI.BadRequestError && /tool_choice/.test(wrong.message), wrong);
}

// ---- Vercel's AI SDK ----------------------------------------------------------------------------

async function aiSdk() {
    const provider = fields => createOpenAICompatible(
        { name: 'gemma', baseURL, apiKey: 'none', ...fields })(model);
    const plain = { model: provider(), prompt: question, seed: 1, maxRetries: 0 };
    const schemas = { ...plain, model: provider({ supportsStructuredOutputs: true }) };

    // Without supportsStructuredOutputs it asks for any JSON object, and says no schema.
    let free;
    for (let seed = 0; !free && seed < 20; seed++)
        free = (await generateObject({ ...plain, seed, maxOutputTokens: 500,
                                       schema: z.looseObject({}) }).catch(() => ({}))).object;
    check(typeof free === 'object', free);
    isTrip((await generateObject({ ...schemas, schema: Trip })).object);
    const kind = { ...schemas, output: 'enum', enum: ['sunny', 'rainy'] };
    check(['sunny', 'rainy'].includes((await generateObject(kind)).object));
    isTrip((await generateText({ ...schemas, output: Output.object({ schema: Trip }) })).output);
    const partial = streamObject({ ...schemas, schema: Trip });
    let parts = 0;
    for await (const _ of partial.partialObjectStream) parts++;
    isTrip(await partial.object);
    check(parts > 1, parts);

    const tools = {
        get_weather: tool({ description: 'Says what the weather is in a city.', inputSchema: Place,
                            execute: async place => sunny(place) }),
        plan_trip: tool({ description: 'Plans a trip.', inputSchema: Trip,
                          execute: async ({ stops }) => ({ stops: stops.length }) }) };
    const areCalls = (calls, results) => {
        for (const { toolName, input, invalid } of calls)
            check(!invalid && tools[toolName].inputSchema.safeParse(input).success, input);
        check(results.length === calls.length, results);
    };
    for (const toolChoice of ['required', { type: 'tool', toolName: 'get_weather' },
                              { type: 'tool', toolName: 'plan_trip' }]) {
        const answer = await generateText({ ...plain, tools, toolChoice });
        check(answer.toolCalls.length > 0, answer.text);
        areCalls(answer.toolCalls, answer.toolResults);
        // the second turn, in the form in which the SDK keeps a conversation
        const prompt = undefined;
        const turns = [...messages, ...answer.response.messages];
        const next = await generateText({ ...plain, prompt, messages: turns, tools });
        check(next.text || next.toolCalls.length > 0, next);
        const stream = streamText({ ...plain, tools, toolChoice });
        await stream.consumeStream();
        areCalls(await stream.toolCalls, await stream.toolResults);
        assert.deepEqual((await stream.toolCalls).map(call => call.input),
                         answer.toolCalls.map(call => call.input));
    }
    // steps, until there is an answer; the model itself chooses
    const steps = { ...plain, temperature: 0, tools: { get_weather: tools.get_weather },
                    stopWhen: stepCountIs(5) };
    const last = await generateText(steps);
    check(last.text && last.finishReason === 'stop', last.steps.length, last.finishReason);
    const stream = streamText(steps);
    check(await stream.text === last.text && (await stream.steps).length === last.steps.length);
    // tools and a schema in one request: an answer is calls, or an object
    const either = await generateText(
        { ...schemas, tools: steps.tools, output: Output.object({ schema: Trip }) });
    areCalls(either.toolCalls, either.toolResults);
    if (either.finishReason === 'stop') isTrip(either.output);
    else check(either.toolCalls.length > 0, either.finishReason);
}

const versions = JSON.parse(readFileSync('package.json', 'utf8')).dependencies;
for (const [name, test] of [['openai', openaiNode], ['ai', aiSdk]]) {
    const before = checks;
    try {
        await test();
        console.log(`${name} (npm) ${versions[name]}: ${checks - before} checks`);
    } catch (error) {
        console.error(`${name} (npm) failed`, error);
        process.exitCode = 1;
    }
}
