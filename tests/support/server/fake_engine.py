"""An engine and a tokenizer without a model: deterministic, with delays and faults that a test chooses.

The tokenizer's tokens are the bytes of UTF-8, so that every text can be worked out by hand. The engine answers with
`reply_of(request)`, one character at a time; tests compute the same and compare every byte.
"""

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from guanaco.models.errors import TemplateError
from guanaco.models.text.template_tools import ToolSupport
from guanaco.server.engine.async_engine import EngineOverloaded, EngineUnavailable, Health
from guanaco.server.engine.request import FinishReason, Request, TokenLogprob
from guanaco.server.engine.request_stream import TextOutput

BOS, EOS, USER, ASSISTANT, SYSTEM, END = range(256, 262)
SPECIAL_TEXTS = {BOS: "<bos>", EOS: "<eos>", USER: "<user>", ASSISTANT: "<assistant>", SYSTEM: "<system>", END: "<end>"}
VOCAB_SIZE = 262

WORDS = ("alpha", "bravo", "cañon", "delta", "écho", "f€", "golf", "🦙")


class TemplateProblem(TemplateError):
    """What the fake chat template raises: it wants the first message not to come from the assistant."""


NO_TOOLS = ToolSupport(tools=False, calls=False, results=False, many_calls=False, system=True)


@dataclass(frozen=True)
class FakeTemplate:
    """Without tools of its own, as the demo's is, unless `tool_support` says so."""

    stop_strings: tuple[str, ...] = ()
    source: str = ""
    tool_support: ToolSupport = NO_TOOLS


class FakeTokenizer:
    """Byte-level, with six special tokens. The chat template puts a role token before each message and END behind."""

    bos_id: int | None = BOS
    eos_ids = (EOS,)
    vocab_size = VOCAB_SIZE
    special_ids = frozenset(SPECIAL_TEXTS)

    def __init__(self) -> None:
        self.chat_template: FakeTemplate | None = FakeTemplate()
        self.tool_template: FakeTemplate | None = None

    def encode(
        self, text: str, *, add_bos: bool | None = None, parse_control: bool = False, max_tokens: int | None = None
    ) -> list[int]:
        bos = [BOS] * (add_bos is not False)
        if not parse_control:
            return bos + list(text.encode())
        names = {name: token for token, name in SPECIAL_TEXTS.items()}
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        ids = [i for part in parts for i in ([names[part]] if part in names else part.encode())]
        return ids if ids[:1] == [BOS] else bos + ids

    def control_id(self, text: str) -> int | None:
        return next((token for token, name in SPECIAL_TEXTS.items() if name == text), None)

    def holds_control(self, text: str) -> bool:
        return any(name in text for name in SPECIAL_TEXTS.values())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        kept = [i for i in ids if not (skip_special_tokens and i in SPECIAL_TEXTS)]
        return b"".join(self.token_bytes(i) for i in kept).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        if token_id >= VOCAB_SIZE:
            return b""  # as the real one has it: rows that only pad a model's embeddings
        return SPECIAL_TEXTS[token_id].encode() if token_id in SPECIAL_TEXTS else bytes([token_id])

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
        template: Any = None,
        max_chars: int = 1 << 24,
        tools: Sequence[dict[str, Any]] | None = None,
        max_tokens: int | None = None,
    ) -> list[int]:
        if messages[0]["role"] == "assistant":
            raise TemplateProblem("SECRET: a conversation can't begin with " + messages[0]["content"])
        roles = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": USER}
        ids = [BOS, *(json.dumps(dict(variables)).encode() if variables else b"")]
        if tools is not None:
            ids += [SYSTEM, *json.dumps(tools).encode(), END]
        for message in messages:
            calls = json.dumps(message["tool_calls"]) if message.get("tool_calls") else ""
            ids += [roles[message["role"]], *message["content"].encode(), *calls.encode(), END]
        if continue_final_message:
            return ids[:-1]
        return ids + [ASSISTANT] * add_generation_prompt


def reply_of(request: Request) -> str:
    """The whole text that the fake engine would write for this request: words chosen by all that may matter to it."""
    params = request.params
    parts = (request.prompt_token_ids, [lora.version for lora in request.loras], params.seed, params.temperature)
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return " ".join(WORDS[byte % len(WORDS)] for byte in digest)


@dataclass
class Script:
    """What the engine does next, chosen by a test. The defaults: answer at once, in full."""

    step_seconds: float = 0.0
    gate: asyncio.Event | None = None  # every token waits for it
    fail_after: int | None = None  # tokens, then `failure`
    failure: str = "internal"
    raise_on_submit: Exception | None = None
    hide_every: int = 0  # every so many tokens one comes without its text, which comes with the next
    cached_tokens: int = 0
    reply: str | None = None  # what is written; None: `reply_of`


class FakeStream:
    """One request's outputs. Like the real one: closing it aborts what is unfinished."""

    def __init__(self, engine: "FakeEngine", request: Request) -> None:
        self.engine = engine
        self.request = request
        self.failure: str | None = None
        self.failed = asyncio.Event()
        self._work: asyncio.Task[None] | None = None

    def listen(self, listener: Callable[[TextOutput], None]) -> None:
        async def work() -> None:
            async for output in self._run():
                listener(output)

        self._work = asyncio.ensure_future(work())

    async def aclose(self) -> None:
        if self.request.request_id in self.engine.running:
            self.engine.aborted.append(self.request.request_id)
            self._leave()
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)

    def _leave(self) -> None:
        self.engine.running.pop(self.request.request_id, None)
        self.engine.changed.set()

    def end_with(self, failure: str) -> None:
        self.failure = failure
        self.failed.set()

    async def _run(self) -> AsyncIterator[TextOutput]:
        script, params = self.engine.script, self.request.params
        tokens = _tokens_of(self.request, script.reply)
        text = held = ""
        prompt_logprobs: tuple[TokenLogprob, ...] = ()
        if params.prompt_logprobs is not None:
            prompt_logprobs = tuple(logprob_of(i, params.prompt_logprobs) for i in self.request.prompt_token_ids[1:])
        for position, (token_ids, piece, finish, stop) in enumerate(tokens):
            await self._pace(script)
            if script.fail_after == position and self.failure is None:
                self.failure = script.failure
            if self.failure is not None:
                self._leave()
                yield self._output("", (), (), (), FinishReason.ERROR, None, self.failure, position)
                return
            held += piece
            hide = script.hide_every and position % script.hide_every == 0 and finish is None
            text, held = ("", held) if hide else (held, "")
            logprobs = tuple(logprob_of(i, params.logprobs) for i in token_ids) if params.logprobs is not None else ()
            self.engine.num_tokens += len(token_ids)
            if finish is not None:
                self._leave()
            yield self._output(
                text, token_ids, logprobs, prompt_logprobs, finish, stop, None, position + bool(token_ids)
            )
            prompt_logprobs = ()

    async def _pace(self, script: Script) -> None:
        """Wait as the script says, but for a failure no longer than until it comes."""
        waits = [asyncio.sleep(script.step_seconds)] if script.step_seconds else []
        if script.gate is not None:
            waits.append(script.gate.wait())
        for wait in waits:
            both = [asyncio.ensure_future(wait), asyncio.ensure_future(self.failed.wait())]
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in both:
                    task.cancel()
        await asyncio.sleep(0)

    def _output(self, text, token_ids, logprobs, prompt_logprobs, finish, stop, error, num_output) -> TextOutput:
        return TextOutput(
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish,
            stop_reason=stop,
            error=error,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_cached_tokens=self.engine.script.cached_tokens,
            num_output_tokens=num_output,
        )


def logprob_of(token_id: int, num_top: int) -> TokenLogprob:
    """Made up but exact: the token itself is the likeliest, its neighbours follow."""
    top = tuple(((token_id + i) % VOCAB_SIZE, -0.125 * (i + 1)) for i in range(num_top))
    return TokenLogprob(token_id, -0.125, top, rank=1)


def _tokens_of(
    request: Request, reply: str | None = None
) -> list[tuple[tuple[int, ...], str, FinishReason | None, str | None]]:
    """(token ids, text, finish, stop reason) of each step. A character counts as one token, its first byte's id."""
    params, reply = request.params, reply_of(request) if reply is None else reply
    if params.max_tokens == 0:
        return [((), "", FinishReason.LENGTH, None)]
    steps: list[tuple[tuple[int, ...], str, FinishReason | None, str | None]] = []
    for position, character in enumerate(reply[: params.max_tokens]):
        last = position + 1 == params.max_tokens
        steps.append(((character.encode()[0],), character, FinishReason.LENGTH if last else None, None))
        for stop in params.stop_strings:
            so_far = reply[: position + 1]
            if so_far.endswith(stop):
                kept = [*steps[: len(steps) - len(stop)]]
                hidden = [((ids[0],), "", None, None) for ids, *_ in steps[len(kept) :]]
                hidden[-1] = (hidden[-1][0], "", FinishReason.STOP, stop)
                return [*kept, *hidden]
    if not steps or steps[-1][2] is None:
        steps.append(((EOS,), "", FinishReason.STOP, None))
    return steps


@dataclass
class FakeEngine:
    """Duck-typed `AsyncEngine`. Single-threaded: everything happens on the loop that `start` ran on."""

    script: Script = field(default_factory=Script)
    max_running: int = 10_000
    max_prompt_tokens: int = 10**9

    def __post_init__(self) -> None:
        self.requests: list[Request] = []
        self.running: dict[str, FakeStream] = {}
        self.aborted: list[str] = []
        self.num_tokens = 0
        self.changed = asyncio.Event()
        self.dead = False
        self.draining = False
        self.started = self.stopped = False

    def start(self) -> None:
        self.started = True

    async def stop(self) -> None:
        self.stopped = True
        self._end_all("server_shutting_down")

    def submit_all(self, requests: Sequence[Request]) -> list[FakeStream]:
        """All or none."""
        is_full = len(self.running) + len(requests) > self.max_running
        if is_full and self.script.raise_on_submit is None and not (self.dead or self.draining):
            raise EngineOverloaded(retry_after_seconds=2.5)
        return [self.submit(request) for request in requests]

    def submit(self, request: Request) -> FakeStream:
        if self.script.raise_on_submit is not None:
            raise self.script.raise_on_submit
        if self.dead or self.draining:
            raise EngineUnavailable("draining" if self.draining else "dead", draining=self.draining)
        if len(self.running) >= self.max_running:
            raise EngineOverloaded(retry_after_seconds=2.5)
        if len(request.prompt_token_ids) > self.max_prompt_tokens:
            raise ValueError(f"{len(request.prompt_token_ids)} tokens never fit into {self.max_prompt_tokens}")
        assert request.request_id not in self.running, "request ids must be unique"
        self.requests.append(request)
        stream = FakeStream(self, request)
        self.running[request.request_id] = stream
        self.changed.set()
        return stream

    def health(self) -> Health:
        return Health(live=not self.dead, ready=not self.dead and not self.draining, reason="")

    async def drain(self, deadline_seconds: float) -> None:
        self.draining = True
        self.changed.set()
        try:
            await asyncio.wait_for(self.until(lambda: not self.running), deadline_seconds)
        except TimeoutError:
            self._end_all("server_shutting_down")

    def die(self) -> None:
        """As when the engine thread dies: everything open gets an error, and nothing new is taken."""
        self.dead = True
        self._end_all("engine_dead")

    def _end_all(self, failure: str) -> None:
        for stream in list(self.running.values()):
            stream.end_with(failure)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition on the engine's public fields."""
        while not condition():
            self.changed.clear()
            await self.changed.wait()
