"""LangChain's ChatOpenAI: https://docs.langchain.com/oss/python/integrations/chat/openai."""

from typing import Literal

from checks import MODEL, QUESTION, URL, becomes_idle, check, run_checks
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

llm = ChatOpenAI(base_url=f"{URL}/v1", api_key="none", model=MODEL, temperature=0, max_tokens=200)
brief = llm.model_copy(update={"max_tokens": 20})


class Joke(BaseModel):
    """Joke to tell the user."""

    subject: Literal["cat", "dog", "egg"] = Field(description="What the joke is about")
    rating: int = Field(description="How funny the joke is, from 1 to 10", ge=1, le=10)


@tool
def get_weather(city: Literal["Paris", "Lima", "Oslo"]) -> str:
    """Get the current temperature of a city."""
    return f"{city}: 14 degrees"


@check("invoke")
def invoke() -> str:
    answer = brief.invoke(QUESTION)
    assert answer.content
    assert answer.usage_metadata["output_tokens"] == 20
    assert answer.response_metadata["finish_reason"] == "length"
    return answer.content


@check("stream")
def stream() -> str:
    chunks = list(brief.stream(QUESTION, stream_usage=True))
    text = "".join(chunk.content for chunk in chunks)
    assert text == brief.invoke(QUESTION).content
    assert [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata] == [20]
    return text


@check("batch")
def batch() -> None:
    answers = brief.batch(["Hi", "Who are you?", QUESTION])
    assert all(answer.content for answer in answers)


for method in ("json_schema", "function_calling", "json_mode"):

    @check(f"with_structured_output, {method}")
    def structured(method: str = method) -> Joke:
        structured_llm = llm.with_structured_output(Joke, method=method)
        question = "Tell me a joke about cats."
        if method == "json_mode":  # its documentation: the prompt has to say what the JSON is like
            question += ' Respond in JSON with the keys "subject" and "rating", like {"subject": "cat", "rating": 7}'
        joke = structured_llm.invoke(question)
        assert isinstance(joke, Joke)
        return joke


@check("bind_tools: call, result, answer")
def bind_tools() -> list:
    messages: list = [HumanMessage("What is the weather like in Paris?")]
    answer = llm.bind_tools([get_weather], tool_choice="any").invoke(messages)
    assert answer.tool_calls, answer
    assert not answer.invalid_tool_calls
    messages.append(answer)
    for call in answer.tool_calls:
        result = get_weather.invoke(call)
        assert isinstance(result, ToolMessage)
        messages.append(result)
    assert brief.bind_tools([get_weather]).invoke(messages) is not None
    return [call["args"] for call in answer.tool_calls]


@check("bind_tools, streamed")
def bind_tools_streamed() -> dict:
    whole = None
    for chunk in llm.bind_tools([get_weather], tool_choice="get_weather").stream("What is the weather like in Paris?"):
        whole = chunk if whole is None else whole + chunk
    [call] = whole.tool_calls
    assert get_weather.invoke(call).content
    return call["args"]


@check("responses API")
def responses() -> str:
    answer = brief.model_copy(update={"use_responses_api": True}).invoke(QUESTION)
    assert answer.text
    return answer.text


@check("completions")
def completions() -> str:
    llm = OpenAI(base_url=f"{URL}/v1", api_key="none", model=MODEL, max_tokens=8, temperature=0)
    whole = llm.invoke("The capital of France is")
    assert whole == "".join(llm.stream("The capital of France is"))
    return whole


@check("cancellation of a stream")
def cancel() -> None:
    chunks = llm.bind(max_tokens=4000, extra_body={"ignore_eos": True}).stream(QUESTION)
    for _ in range(4):
        next(chunks)
    chunks.close()
    assert becomes_idle(), "the request goes on after its client left"


if __name__ == "__main__":
    run_checks()
