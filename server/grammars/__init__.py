"""Structured output: the grammar that a request sets for its answer, and which tokens may follow at each place.

May import `models.formats.restricted_process` and the errors of `models`, and nothing else of ours. The only room that
imports llguidance, and not before it is needed. Start with `spec.py`: it makes a `Grammar` of JSON schemas, regular
expressions, choices, grammars and parts of tool calls. `compiler.py` compiles it, and makes a `GrammarMatcher` for each
sequence.

How a route uses it: `serving.grammar_of(body)` in the API gives the `Grammar` of the request's fields, or None. The
route puts it into `Prepared.grammar`; `serving` compiles it and gives each choice a matcher. The grammar of a tool call
is made of parts, as in `server/api/tools/forced.py`:

    call = in_order(literal('{"name": "get_weather", "arguments": '), schema(parameters), literal("}"))
    named = grammar_of_parts(in_order(literal("<tool_call>"), call, literal("</tool_call>")))
    required = grammar_of_parts(repeated(one_of(call, other_call), separator="\\n", most=8))
"""
