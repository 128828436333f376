"""LlamaIndex's OpenAILike: https://docs.llamaindex.ai, "OpenAI-like LLM", "Structured outputs" and "Tools"."""

import gc
from typing import Literal

from checks import MODEL, QUESTION, URL, becomes_idle, check, run_checks
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

SETTINGS = {
    "model": MODEL,
    "api_base": f"{URL}/v1",
    "api_key": "none",
    "context_window": 8192,
    "temperature": 0,
    "max_tokens": 400,
}
chat_llm = OpenAILike(**SETTINGS, is_chat_model=True, is_function_calling_model=True)
brief_llm = OpenAILike(**{**SETTINGS, "max_tokens": 20}, is_chat_model=True, is_function_calling_model=True)
json_llm = OpenAILike(**SETTINGS, is_chat_model=True, should_use_structured_outputs=True)
text_llm = OpenAILike(**{**SETTINGS, "max_tokens": 8})
MESSAGES = [ChatMessage(role="user", content=QUESTION)]


class Song(BaseModel):
    """A song."""

    mood: Literal["sad", "happy"]
    seconds: int = Field(ge=1, le=600)


def weather(city: Literal["Paris", "Lima", "Oslo"]) -> str:
    """Get the current temperature of a city."""
    return f"{city}: 14 degrees"


@check("chat")
def chat() -> str:
    answer = brief_llm.chat(MESSAGES)
    assert answer.message.content
    return answer.message.content


@check("stream_chat")
def stream_chat() -> str:
    parts = [part.delta or "" for part in brief_llm.stream_chat(MESSAGES)]
    assert "".join(parts) == brief_llm.chat(MESSAGES).message.content
    return "".join(parts)


@check("complete, stream_complete")
def complete() -> str:
    whole = text_llm.complete("One, two,").text
    assert whole
    assert "".join(part.delta for part in text_llm.stream_complete("One, two,")) == whole
    return whole


@check("structured_predict, by a tool")
def structured_by_tool() -> Song:
    song = chat_llm.structured_predict(Song, PromptTemplate("Write a song about {topic}."), topic="eggs")
    assert isinstance(song, Song)
    return song


@check("structured_predict, by a response format")
def structured_by_format() -> Song:
    song = json_llm.structured_predict(Song, PromptTemplate("Write a song about {topic}."), topic="eggs")
    assert isinstance(song, Song)
    return song


@check("as_structured_llm")
def as_structured_llm() -> Song:
    song = chat_llm.as_structured_llm(Song).chat(MESSAGES).raw
    assert isinstance(song, Song)
    return song


@check("tools: call, result, answer")
def tools() -> str:
    tool = FunctionTool.from_defaults(weather)
    question = ChatMessage(role="user", content="What is the weather like in Paris?")
    first = chat_llm.chat_with_tools([tool], chat_history=[question], tool_required=True)
    calls = chat_llm.get_tool_calls_from_response(first)
    results = [
        ChatMessage(
            role="tool", content=str(tool(**call.tool_kwargs)), additional_kwargs={"tool_call_id": call.tool_id}
        )
        for call in calls
    ]
    assert results
    second = brief_llm.chat_with_tools([tool], chat_history=[question, first.message, *results])
    assert second.message.content or second.message.additional_kwargs
    return f"{len(calls)} calls"


@check("predict_and_call")
def predict_and_call() -> str:
    answer = chat_llm.predict_and_call(
        [FunctionTool.from_defaults(weather)], user_msg="What is the weather like in Paris?", tool_required=True
    )
    assert "14 degrees" in str(answer)
    return str(answer)


@check("cancellation of a stream")
def cancel() -> None:
    parts = OpenAILike(**{**SETTINGS, "max_tokens": 4000}, is_chat_model=True).stream_chat(MESSAGES)
    for _ in range(4):
        next(parts)
    # Closing the generator does not close LlamaIndex's connection: it goes with the last reference to it.
    parts.close()
    del parts
    gc.collect()
    assert becomes_idle(), "the request goes on after its client left"


if __name__ == "__main__":
    run_checks()
