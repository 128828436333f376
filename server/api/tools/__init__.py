"""Tools: checks a request's tools, writes them into the prompt, and finds the calls in the model's output.

Start with `plan`: `plan_tools` turns OpenAI-chat-shaped `tools`, `tool_choice` and `parallel_tool_calls` into a
`ToolPlan`, which any route can use that has messages in the shape of OpenAI's chat:

- `plan.prompt(messages)` gives the messages and the tools that the chat template is rendered with.
- `plan.visible_ids` are the control tokens that the engine has to show, because calls are written with them.
- `plan.grammar(content)` is the grammar of the answer, for example if it must be calls; None: any text.
- `plan.reader()` is a `ToolCallReader` for one choice, or None if all of its text is content. `feed(text)`
  and `finish()` return events, `Content`, `CallBegins` and `CallArguments`: the same however the text is cut.
- `calls.ChoiceCalls` collects events into OpenAI's `tool_calls`, or makes the deltas of a stream of them.

`definitions` checks tools and choices, `history` checks the messages about calls, `default_prompt` writes the tools
into the messages for templates without tools, `formats` has one file for each way of writing calls. This room knows
nothing of bodies, engines and routes. It may import `http.errors`, `server.grammars` and `models.text`.
"""
