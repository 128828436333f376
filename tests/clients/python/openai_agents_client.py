"""OpenAI's Agents SDK: https://openai.github.io/openai-agents-python, "Quickstart", "Tools" and "Models"."""

from typing import Literal

from agents import (
    Agent,
    Model,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from checks import MODEL, QUESTION, URL, check, run_checks
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

set_tracing_disabled(True)
# The SDK raises when an answer is cut; this adapter's answers are short.
SHORT = "terse"
SETTINGS = ModelSettings(temperature=0, max_tokens=100)


class CalendarEvent(BaseModel):
    day: Literal["Monday", "Friday"]
    hour: int = Field(ge=0, le=23)


def model(kind: type[Model], name: str = MODEL) -> Model:
    return kind(model=name, openai_client=AsyncOpenAI(base_url=f"{URL}/v1", api_key="none"))


def check_all(kind: type[Model], name: str) -> None:
    """The same agents over one of the two APIs."""

    @check(f"{name}: agent")
    async def agent() -> str:
        result = await Runner.run(
            Agent(name="Assistant", instructions="Be brief.", model=model(kind, SHORT), model_settings=SETTINGS),
            QUESTION,
        )
        assert result.final_output
        return result.final_output

    @check(f"{name}: streamed")
    async def streamed() -> str:
        result = Runner.run_streamed(
            Agent(name="Assistant", model=model(kind, SHORT), model_settings=SETTINGS), QUESTION
        )
        kinds = [event.type async for event in result.stream_events()]
        assert "raw_response_event" in kinds
        assert result.final_output
        return result.final_output

    @check(f"{name}: a tool")
    async def tool() -> str:
        asked = []

        @function_tool
        def get_weather(city: Literal["Paris", "Tokyo"]) -> str:
            """Get the weather of a city."""
            asked.append(city)
            return f"The weather in {city} is sunny."

        # The SDK asks for the tool in the first turn, and leaves the second to the model.
        settings = ModelSettings(temperature=0, max_tokens=400, tool_choice="required")
        agent = Agent(
            name="Hello world",
            instructions="You are a helpful agent.",
            tools=[get_weather],
            model=model(kind),
            model_settings=settings,
        )
        result = await Runner.run(agent, "What's the weather in Tokyo?")
        assert asked
        assert result.final_output is not None
        return f"{len(asked)} calls, {result.final_output}"

    @check(f"{name}: output_type")
    async def output_type() -> CalendarEvent:
        agent = Agent(name="Calendar", output_type=CalendarEvent, model=model(kind), model_settings=SETTINGS)
        result = await Runner.run(agent, "Dinner with Ann on Friday at 8.")
        assert isinstance(result.final_output, CalendarEvent)
        return result.final_output


check_all(OpenAIResponsesModel, "responses")
check_all(OpenAIChatCompletionsModel, "chat completions")

if __name__ == "__main__":
    run_checks()
