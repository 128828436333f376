"""Tools: what a request may say of them, how a prompt tells the model, and how its calls are found in what it writes.

Start with `plan`: `plan_tools` turns OpenAI-chat-shaped `tools`, `tool_choice` and `parallel_tool_calls` into a
`ToolPlan`, which any route can use that has messages in the shape of OpenAI's chat:

- `plan.prompt(messages)` gives the messages and the tools that the chat template is rendered with.
- `plan.visible_ids` are the control tokens that the engine has to show, because calls begin with them.
- `plan.grammar(content)` is what an answer must look like: calls where it has to be calls, or None.
- `plan.reader()` is a `ToolCallReader` for one choice, or None where all of its text is content. `feed(text)`
  and `finish()` return events, `Content`, `CallBegins` and `CallArguments`: the same however the text is cut.
- `calls.ChoiceCalls` collects events into OpenAI's `tool_calls`, or makes the deltas of a stream of them.

`definitions` checks tools and choices, `history` the messages about calls, `default_prompt` writes for templates
without tools, `formats` has one file for each way of writing calls. This room knows nothing of bodies, engines
and routes: it may import `http.errors` and `server.grammars`, and is imported by `generation` and the routes.
"""
