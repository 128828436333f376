"""Users who stream chats from a running server's base and adapters: TTFT, ITL and E2E per model as locust rows.

Measures from outside, through `requests`, and knows only OpenAI's protocol. loadtest/README.md says how to run it and
what the rows mean.
"""

import argparse
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from locust import HttpUser, events, task
from locust.clients import ResponseContextManager
from locust.env import Environment

PROMPTS = (
    "How do I boil an egg?",
    "Name three rivers in Europe and the seas they flow into.",
    "Explain to a child why the sky is blue.",
    "Write two lines of verse about a lighthouse in winter.",
    "What is the difference between a virus and a bacterium?",
    "My bicycle chain keeps falling off. What should I check first?",
    "Suggest a name for a bakery that opens at midnight, and say why.",
    "Summarise in one sentence what a database index is good for.",
    "Which is heavier, a litre of water or a litre of oil, and how could I show it at home?",
    "Give me a packing list for three days of walking in the rain.",
    "Translate 'good morning, how did you sleep?' into French, Spanish and German.",
    "I have 20 minutes, rice, two eggs and half a cabbage. What can I cook, and in which order do I do things?",
)
CONNECT_SECONDS, READ_SECONDS = 10, 300

_numbers = itertools.count(1)
_tokens: Counter[str] = Counter()  # output tokens per model, as the server's usage counts them
_requests: Counter[str] = Counter()


@events.init_command_line_parser.add_listener
def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--api-key", env_var="GUANACO_LOADTEST_KEY", default="", help="API key of the server")
    parser.add_argument("--models", default="", help="model names, comma-separated (none: all of /v1/models)")
    parser.add_argument("--popularity", type=float, default=0.0, help="Zipf exponent over the models; 0: all alike")
    parser.add_argument("--prompts-file", default="", help="JSONL with prompt, text, input or messages in each line")
    parser.add_argument("--max-tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--ignore-eos", action="store_true", help="every answer has --max-tokens tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token each time")
    parser.add_argument("--think", type=float, default=0.0, help="seconds a user waits between two requests")
    parser.add_argument(
        "--shared-prompts", action="store_true", help="do not make each prompt different from the others"
    )


def read_prompts(path: str) -> list[list[dict[str, str]]]:
    """The message lists to send: PROMPTS, or one from each line of a JSONL file. Raises SystemExit for a wrong line."""
    if not path:
        return [[{"role": "user", "content": text}] for text in PROMPTS]
    prompts = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        fields = json.loads(line)
        text = next((fields[key] for key in ("prompt", "text", "input") if fields.get(key)), None)
        if text is None and not fields.get("messages"):
            raise SystemExit(f"{path}, line {number}: none of prompt, text, input, messages")
        prompts.append(fields.get("messages") or [{"role": "user", "content": text}])
    if not prompts:
        raise SystemExit(f"{path} has no prompts")
    return prompts


class StreamError(Exception):
    """The answer was not a complete stream. The message becomes a row of locust's failures."""


def read_events(response: ResponseContextManager) -> Iterator[dict[str, Any]]:
    """The JSON of each event up to [DONE], as soon as it arrives.

    chunk_size=1: with a larger one, requests waits for that many bytes, and the first token would seem to arrive with
    the tenth. Raises StreamError for an error event and for a stream that ends without [DONE].
    """
    for line in response.iter_lines(chunk_size=1):
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise StreamError(f"error event: {event['error'].get('code') or event['error'].get('type')}")
        yield event
    raise StreamError("the stream ended without [DONE]")


class ChatUser(HttpUser):
    """Asks one streamed question after another, each of a random model."""

    def on_start(self) -> None:
        """Read the options."""
        self.options = self.environment.parsed_options
        self.prompts = read_prompts(self.options.prompts_file)
        if self.options.api_key:
            self.client.headers["Authorization"] = f"Bearer {self.options.api_key}"
        self.models = [name for name in self.options.models.split(",") if name]

    def wait_time(self) -> float:
        """Seconds of thought before the next question."""
        return float(self.options.think)

    @task
    def chat(self) -> None:
        """One streamed chat completion, from the moment it is sent to [DONE]."""
        if not self.models and not self._find_models():
            time.sleep(1)
            return
        weights = [(rank + 1) ** -self.options.popularity for rank in range(len(self.models))]
        model = random.choices(self.models, weights)[0]
        messages = [dict(message) for message in random.choice(self.prompts)]
        if not self.options.shared_prompts:  # a prefix cache would make every prompt but the first one free
            messages[0]["content"] = f"({next(_numbers)}) {messages[0]['content']}"
        body = {
            "model": model,
            "messages": messages,
            "max_tokens": self.options.max_tokens,
            "temperature": self.options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.options.ignore_eos else {}),
        }
        started = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions",
            json=body,
            name=model,
            stream=True,
            catch_response=True,
            timeout=(CONNECT_SECONDS, READ_SECONDS),
        ) as response:
            response.request_meta["request_type"] = "E2E"
            try:
                num_tokens = self._follow(response, model, started)
            except (StreamError, OSError, ValueError) as error:  # requests' own errors are OSErrors
                response.failure(str(error) or type(error).__name__)
            else:
                response.request_meta["response_length"] = num_tokens
                _tokens[model] += num_tokens
                _requests[model] += 1
                response.success()
            response.request_meta["response_time"] = 1000 * (time.perf_counter() - started)

    def _find_models(self) -> bool:
        """Ask the server for its models. A failure is counted, and the user tries again."""
        with self.client.get("/v1/models", catch_response=True, timeout=CONNECT_SECONDS) as response:
            if response.status_code == 200:
                self.models = [card["id"] for card in response.json()["data"]]
            else:  # 0: no connection
                response.failure(str(response.error or f"status {response.status_code}"))
        return bool(self.models)

    def _follow(self, response: ResponseContextManager, model: str, started: float) -> int:
        """Read the stream, add an entry to the TTFT or ITL row for each piece of text, and return the token count."""
        if response.error is not None:
            raise StreamError(f"no connection: {type(response.error).__name__}")
        if response.status_code != 200:
            raise StreamError(f"status {response.status_code}")
        last, finished, num_tokens = None, False, 0
        for event in read_events(response):
            if usage := event.get("usage"):
                num_tokens = usage["completion_tokens"]
            for choice in event["choices"]:
                finished = finished or choice["finish_reason"] is not None
                if choice["delta"].get("content"):  # the role alone is no token
                    now = time.perf_counter()
                    self._fire("TTFT" if last is None else "ITL", model, now - (last or started))
                    last = now
        if not finished:
            raise StreamError("no finish_reason")
        return num_tokens

    def _fire(self, row: str, model: str, seconds: float) -> None:
        self.environment.events.request.fire(
            request_type=row, name=model, response_time=1000 * seconds, response_length=0, exception=None, context={}
        )


@events.test_start.add_listener
def _reset(**_: Any) -> None:
    _tokens.clear()
    _requests.clear()


@events.test_stop.add_listener
def _summarise(environment: Environment, **_: Any) -> None:
    """Print tokens per second, for which locust has no row. With several processes each worker prints its own."""
    stats = environment.stats
    seconds = (stats.last_request_timestamp or 0) - stats.start_time if _requests else 0
    if seconds > 0:
        for model in sorted(_requests):
            print(f"{model}: {_requests[model]} answers, {_tokens[model]} tokens")
        print(f"all: {_tokens.total()} tokens in {seconds:.1f} s, {_tokens.total() / seconds:.1f} tokens/s")
