"""The command-line tool `llm`: https://llm.datasette.io, "OpenAI-compatible models", "Schemas" and "Tools"."""

import json
import os
import subprocess
import sys
from pathlib import Path

from checks import MODEL, QUESTION, URL, check, run_checks

LLM = Path(sys.executable).parent / "llm"
HOME = Path(os.environ["GUANACO_SCRATCH"]) / "user"
ENV = os.environ | {"LLM_USER_PATH": str(HOME)}
MODELS = f"""
- model_id: demo
  model_name: {MODEL}
  api_base: "{URL}/v1"
  supports_schema: true
  supports_tools: true
- model_id: pirate
  model_name: pirate
  api_base: "{URL}/v1"
- model_id: text
  model_name: {MODEL}
  api_base: "{URL}/v1"
  completion: true
"""
TOOL = """
def weather(city: str) -> str:
    "Get the current temperature of a city."
    return "14 degrees"
"""
# llm's short form, "name, age int", allows other properties: the demo model adds them until the context is full.
DOG = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "enum": ["Rex", "Cleo"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 20},
        "good": {"type": "boolean"},
    },
    "required": ["name", "age", "good"],
    "additionalProperties": False,
}


def llm(*arguments: str) -> str:
    done = subprocess.run([LLM, *arguments], env=ENV, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@check("prompt, streamed")
def prompt() -> str:
    text = llm("-m", "pirate", QUESTION, "-o", "max_tokens", "20", "-o", "temperature", "0")
    assert text.strip()
    return text


@check("prompt, not streamed")
def not_streamed() -> str:
    text = llm("-m", "pirate", "--no-stream", QUESTION, "-o", "max_tokens", "20", "-s", "Be brief.")
    assert text.strip()
    return text


@check("conversation")
def conversation() -> None:
    assert llm("-c", "And then?", "-o", "max_tokens", "8").strip()


@check("completion")
def completion() -> str:
    text = llm("-m", "text", "One, two,", "-o", "max_tokens", "8")
    assert text.strip()
    return text


@check("--schema")
def schema() -> dict:
    text = llm("-m", "demo", "--schema", json.dumps(DOG), "Invent a good dog", "-o", "temperature", "0")
    found = json.loads(text)
    assert list(found) == ["name", "age", "good"]
    assert found["name"] in ("Rex", "Cleo")
    assert 0 <= found["age"] <= 20
    assert isinstance(found["good"], bool)
    return found


@check("-T / --functions")
def tools() -> str:
    """The model decides by itself whether it calls a tool: --td shows that it was told of it."""
    asked = ["--functions", TOOL, "What is the weather in Paris?", "--td", "--cl", "2"]
    text = llm("-m", "demo", *asked, "-o", "temperature", "0", "-o", "max_tokens", "60")
    assert text.strip()
    return text


@check("-T with a tool of llm's own")
def own_tool() -> str:
    asked = ["-T", "llm_version", "What version of LLM is this?", "--td", "--cl", "2"]
    text = llm("-m", "demo", *asked, "-o", "temperature", "0", "-o", "max_tokens", "60")
    assert text.strip()
    return text


if __name__ == "__main__":
    HOME.mkdir(exist_ok=True)
    (HOME / "extra-openai-models.yaml").write_text(MODELS)
    (HOME / "keys.json").write_text('{"openai": "none"}')
    run_checks()
