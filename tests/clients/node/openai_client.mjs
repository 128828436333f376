// OpenAI's client for node: https://github.com/openai/openai-node#readme and its helpers.md.

import assert from 'node:assert/strict'

import OpenAI from 'openai'
import { zodFunction, zodResponseFormat, zodTextFormat } from 'openai/helpers/zod'
import { z } from 'zod'

import { MODEL, QUESTION, URL, becomesIdle, check } from './checks.mjs'

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: 'none' })
const messages = [{ role: 'user', content: QUESTION }]
const Event = z.object({
  day: z.enum(['Monday', 'Friday']),
  hour: z.number().int().min(0).max(23),
  guests: z.array(z.enum(['Alice', 'Bob'])).max(3),
})
const Weather = z.object({ city: z.enum(['Paris', 'Lima', 'Oslo']) })
const weather = {
  type: 'function',
  function: {
    name: 'get_weather',
    description: 'Get the current temperature of a city.',
    parameters: {
      type: 'object',
      properties: { city: { type: 'string', enum: ['Paris', 'Lima', 'Oslo'] } },
      required: ['city'],
      additionalProperties: false,
    },
    strict: true,
  },
}

await check('responses (the README)', async () => {
  const response = await client.responses.create({
    model: MODEL,
    instructions: 'You are a coding assistant that talks like a pirate',
    input: 'Are semicolons optional in JavaScript?',
    max_output_tokens: 20,
  })
  assert.ok(response.output_text)
  return response.output_text
})

await check('responses, streamed', async () => {
  const stream = await client.responses.create({ model: MODEL, input: QUESTION, max_output_tokens: 20, stream: true })
  let text = ''
  let last
  for await (const event of stream) {
    if (event.type === 'response.output_text.delta') text += event.delta
    last = event
  }
  assert.equal(text, last.response.output[0].content[0].text)
  return text
})

await check('responses.parse (zod)', async () => {
  const response = await client.responses.parse({
    model: MODEL,
    input: QUESTION,
    text: { format: zodTextFormat(Event, 'event') },
    temperature: 0,
  })
  return Event.parse(response.output_parsed)
})

await check('chat', async () => {
  const answer = await client.chat.completions.create({ model: MODEL, messages, max_tokens: 20, temperature: 0 })
  assert.ok(answer.choices[0].message.content)
  assert.equal(answer.usage.completion_tokens, 20)
  return answer.choices[0].message.content
})

await check('stream', async () => {
  const stream = await client.chat.completions.create({
    model: MODEL,
    messages,
    max_tokens: 20,
    stream: true,
    stream_options: { include_usage: true },
  })
  let text = ''
  let usage
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? ''
    usage = chunk.usage ?? usage
  }
  assert.ok(text)
  assert.equal(usage.completion_tokens, 20)
  return text
})

await check('streaming helper', async () => {
  const stream = client.chat.completions.stream({ model: 'terse', messages, max_tokens: 60, temperature: 0 })
  let text = ''
  stream.on('content', (delta) => (text += delta))
  assert.equal(await stream.finalContent(), text)
  return text
})

await check('chat .parse (zod)', async () => {
  const answer = await client.chat.completions.parse({
    model: MODEL,
    messages,
    response_format: zodResponseFormat(Event, 'event'),
    temperature: 0,
  })
  return Event.parse(answer.choices[0].message.parsed)
})

await check('tools: call, result, answer', async () => {
  const turns = [...messages]
  const first = await client.chat.completions.create({
    model: MODEL,
    messages: turns,
    tools: [weather],
    tool_choice: 'required',
    temperature: 0,
  })
  assert.equal(first.choices[0].finish_reason, 'tool_calls')
  const { message } = first.choices[0]
  turns.push(message)
  for (const call of message.tool_calls) {
    Weather.parse(JSON.parse(call.function.arguments))
    turns.push({ role: 'tool', tool_call_id: call.id, content: '14 degrees' })
  }
  const second = await client.chat.completions.create({ model: MODEL, messages: turns, tools: [weather], max_tokens: 20 })
  assert.ok(second.choices[0].message.content || second.choices[0].message.tool_calls)
  return `${message.tool_calls.length} calls`
})

await check('runTools (zod)', async () => {
  const asked = []
  const runner = client.chat.completions.runTools(
    {
      model: MODEL,
      messages: [{ role: 'user', content: 'What is the weather like in Paris?' }],
      tools: [
        zodFunction({
          name: 'get_weather',
          parameters: Weather,
          function: ({ city }) => {
            asked.push(city)
            return '14 degrees'
          },
        }),
      ],
      tool_choice: { type: 'function', function: { name: 'get_weather' } },
      temperature: 0,
    },
    { maxChatCompletions: 2 },
  )
  await runner.done()
  assert.equal(asked.length, 1)
  assert.equal(runner.messages.at(-1).role, 'tool')
  return asked.join(', ')
})

await check('errors', async () => {
  await assert.rejects(client.chat.completions.create({ model: 'gpt-4o', messages }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError)
    assert.equal(error.code, 'model_not_found')
    return true
  })
})

await check('cancellation of a stream', async () => {
  const stream = await client.chat.completions.create({ model: MODEL, messages, max_tokens: 4000, stream: true })
  let chunks = 0
  for await (const _ of stream) if (++chunks === 5) break
  assert.ok(await becomesIdle(), 'the request goes on after its client left')
})
