// The AI SDK with @ai-sdk/openai-compatible: https://ai-sdk.dev/providers/openai-compatible-providers.

import assert from 'node:assert/strict'

import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { Output, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from 'ai'
import { z } from 'zod'

import { MODEL, QUESTION, URL, becomesIdle, check } from './checks.mjs'

const guanaco = createOpenAICompatible({ name: 'guanaco', baseURL: `${URL}/v1`, includeUsage: true })
const structured = createOpenAICompatible({ name: 'guanaco', baseURL: `${URL}/v1`, supportsStructuredOutputs: true })
const schema = z.object({ dish: z.enum(['egg', 'soup']), minutes: z.number().int().min(1).max(60) })

function weather(asked) {
  return tool({
    description: 'Get the weather in a location',
    inputSchema: z.object({ location: z.enum(['Paris', 'Lima', 'Oslo']) }),
    execute: async ({ location }) => {
      asked.push(location)
      return { location, temperature: 14 }
    },
  })
}

await check('generateText', async () => {
  const { text, usage, finishReason } = await generateText({ model: guanaco(MODEL), prompt: QUESTION, maxOutputTokens: 20 })
  assert.ok(text)
  assert.equal(usage.outputTokens, 20)
  assert.equal(finishReason, 'length')
  return text
})

await check('streamText', async () => {
  const { textStream, usage } = streamText({ model: guanaco(MODEL), prompt: QUESTION, maxOutputTokens: 20 })
  let text = ''
  for await (const part of textStream) text += part
  assert.ok(text)
  assert.equal((await usage).outputTokens, 20)
  return text
})

await check('completionModel', async () => {
  const { text } = await generateText({ model: guanaco.completionModel(MODEL), prompt: 'One, two,', maxOutputTokens: 5 })
  assert.ok(text)
  return text
})

await check('generateObject', async () => {
  const { object } = await generateObject({ model: structured(MODEL), schema, prompt: QUESTION, temperature: 0 })
  return schema.parse(object)
})

await check('generateObject, json_object', async () => {
  const { object } = await generateObject({
    model: guanaco(MODEL),
    output: 'no-schema',
    prompt: 'Answer in JSON, for example {"minutes": 7}. How long does an egg boil?',
    temperature: 0,
    maxOutputTokens: 200,
  })
  assert.equal(typeof object, 'object')
  return object
})

await check('streamObject', async () => {
  const result = streamObject({ model: structured(MODEL), schema, prompt: QUESTION, temperature: 0 })
  let parts = 0
  for await (const _ of result.partialObjectStream) parts++
  assert.ok(parts > 0)
  return schema.parse(await result.object)
})

await check('generateText with Output.object', async () => {
  const { output } = await generateText({
    model: structured(MODEL),
    output: Output.object({ schema }),
    prompt: QUESTION,
    temperature: 0,
  })
  return schema.parse(output)
})

await check('tools', async () => {
  const asked = []
  const { steps } = await generateText({
    model: guanaco(MODEL),
    tools: { weather: weather(asked) },
    toolChoice: { type: 'tool', toolName: 'weather' },
    stopWhen: stepCountIs(2),
    prompt: 'What is the weather in Paris?',
    temperature: 0,
    maxOutputTokens: 200,
  })
  assert.equal(steps.length, 2)
  assert.equal(steps[0].toolResults[0].output.temperature, 14)
  return asked.join(', ')
})

await check('tools, streamed', async () => {
  const asked = []
  const result = streamText({
    model: guanaco(MODEL),
    tools: { weather: weather(asked) },
    toolChoice: 'required',
    prompt: 'What is the weather in Paris?',
    temperature: 0,
    maxOutputTokens: 400,
  })
  const kinds = new Set()
  for await (const part of result.fullStream) kinds.add(part.type)
  assert.ok(kinds.has('tool-call') && kinds.has('tool-result'), [...kinds].join(' '))
  assert.ok(asked.length > 0)
  return asked.join(', ')
})

await check('errors', async () => {
  await assert.rejects(generateText({ model: guanaco('gpt-4o'), prompt: QUESTION }), (error) => {
    assert.equal(error.statusCode, 404)
    return true
  })
})

await check('cancellation of a stream', async () => {
  const abort = new AbortController()
  const { textStream } = streamText({
    model: guanaco(MODEL),
    prompt: QUESTION,
    maxOutputTokens: 4000,
    abortSignal: abort.signal,
  })
  let parts = 0
  for await (const _ of textStream) if (++parts === 5) abort.abort()
  assert.ok(await becomesIdle(), 'the request goes on after its client left')
})
