"""Pydantic AI: https://ai.pydantic.dev, "OpenAI-compatible models", "Output" and "Function tools"."""

from typing import Literal

from checks import MODEL, QUESTION, URL, check, run_checks
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, PromptedOutput, RunContext, ToolDefinition, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
model = OpenAIChatModel(MODEL, provider=provider)
SETTINGS = {"temperature": 0, "max_tokens": 400}
BRIEF = {"temperature": 0, "max_tokens": 20}


class CityLocation(BaseModel):
    city: Literal["London", "Lima"]
    country: Literal["UK", "Peru"]
    people: int = Field(ge=1, le=20_000_000)


@check("run_sync, message_history")
def run_sync() -> str:
    agent = Agent(model, instructions="Be brief.", model_settings=BRIEF)
    first = agent.run_sync(QUESTION)
    second = agent.run_sync("And then?", message_history=first.all_messages())
    assert first.output
    assert second.output
    return first.output


@check("run_stream")
async def run_stream() -> str:
    async with Agent(model, model_settings=BRIEF).run_stream(QUESTION) as result:
        text = "".join([part async for part in result.stream_text(delta=True)])
    assert text
    return text


# The model is only told of the schema of a prompted output. So the question shows a small model what to write.
WHERE = 'Where were the Olympics held in 2012? Answer {"city": "London", "country": "UK", "people": 9000000}'

for kind in (ToolOutput, NativeOutput, PromptedOutput):

    @check(kind.__name__)
    def output(kind: type = kind) -> CityLocation:
        agent = Agent(model, output_type=kind(CityLocation), model_settings=SETTINGS)
        found = agent.run_sync(WHERE).output
        assert isinstance(found, CityLocation)
        return found


@check("function tools")
def tools() -> str:
    asked = []
    agent = Agent(model, output_type=ToolOutput(CityLocation), model_settings=SETTINGS)

    async def once(_: RunContext, definition: ToolDefinition) -> ToolDefinition | None:
        return None if asked else definition

    @agent.tool_plain(prepare=once)
    def get_temperature(city: Literal["London", "Lima"]) -> str:
        """Get the current temperature of a city."""
        asked.append(city)
        return "14 degrees"

    # An agent with an output type has to call some tool in every turn. The small model would ask for ever.
    found = agent.run_sync("What is the temperature in London?").output
    assert asked
    assert isinstance(found, CityLocation)
    return f"{len(asked)} calls, {found}"


@check("responses API, NativeOutput")
def responses() -> CityLocation:
    agent = Agent(
        OpenAIResponsesModel(MODEL, provider=provider),
        output_type=NativeOutput(CityLocation),
        model_settings=SETTINGS,
    )
    found = agent.run_sync("Where were the Olympics held in 2012?").output
    assert isinstance(found, CityLocation)
    return found


if __name__ == "__main__":
    run_checks()
