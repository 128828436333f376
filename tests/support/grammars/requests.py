"""Requests for structured output, and what tests read from their answers."""

from typing import Any

import httpx

from support.server.real_server import BASE

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "boss": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/boss"}]},
    },
    "required": ["name", "age", "tags", "boss"],
    "additionalProperties": False,
    "$defs": {
        "boss": {
            "type": "object",
            "properties": {"id": {"type": ["integer", "null"], "minimum": 0, "maximum": 9}},
            "required": ["id"],
            "additionalProperties": False,
        }
    },
}


def chat(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    return {"model": BASE, "messages": messages, "max_tokens": 200, "seed": 1, **fields}


def json_schema(schema: Any, name: str = "x", **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, **fields}}


def answer(client: httpx.Client, body: dict[str, Any], path: str = CHAT) -> list[dict[str, Any]]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def content(choice: dict[str, Any]) -> str:
    assert choice["finish_reason"] == "stop", choice
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def error_of(client: httpx.Client, body: dict[str, Any], status: int = 400) -> dict[str, Any]:
    response = client.post(CHAT, json=body)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error
