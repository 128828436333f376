"""`guanaco chat` and `guanaco generate`: text in the terminal, as it comes.

`chat` is a plain HTTP client of any OpenAI-compatible server; `generate` runs the offline engine in this process.
"""

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape

from guanaco.server.commands.common import bearer, server_root
from guanaco.server.config import Settings
from guanaco.server.engine.awake_clock import awake_seconds
from guanaco.server.errors import CommandError

_HELP = "/model NAME switches · /models lists · /system TEXT · /new starts over · /quit (or Ctrl-D) ends"
_TIMEOUT_SECONDS = 600.0
_NOT_TEXT = "the input is not valid UTF-8: send UTF-8"


def write_text(text: str) -> None:
    """To standard output as it is, at once: no markup, no line breaks of our own."""
    sys.stdout.write(text)
    sys.stdout.flush()


class ChatClient:
    """A conversation with a running server; CommandError says what the server or the network refuses."""

    def __init__(
        self, url: str, *, api_key: str | None, system: str | None, max_tokens: int, temperature: float | None
    ) -> None:
        self._url = f"{server_root(url)}/v1"
        self._headers: dict[str, Any] = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = bearer(api_key, "--api-key")
        self._options: dict[str, Any] = {"max_tokens": max_tokens}
        if temperature is not None:
            self._options["temperature"] = temperature
        self._system = system
        self._turns: list[dict[str, str]] = []
        self._console = Console(highlight=False)
        self._is_piped = not (sys.stdin.isatty() and sys.stdout.isatty())

    def loop(self, name: str | None) -> None:
        """Read lines until the end of input; every line that is no command is sent as the user's turn."""
        model = self._choose(name)
        if self._is_piped:
            self._answer_all(model)
            return
        self._console.print(f"[bold]{escape(model)}[/] at {escape(self._url)}\n[dim]{_HELP}[/]")
        while True:
            try:
                line = self._console.input(f"[bold cyan]{escape(model)} ›[/] ").strip()
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return
            except UnicodeDecodeError:
                self._console.print(f"[red]{escape(_NOT_TEXT)}[/]")
                continue
            if line in ("/quit", "/exit"):
                return
            try:
                model = self._command(line, model) if line.startswith("/") else self._say(line, model)
            except CommandError as error:
                self._console.print(f"[red]{escape(str(error))}[/]")

    def _answer_all(self, model: str) -> None:
        """Without a terminal: every line of the input is a turn, and nothing but the answers is written. What a command
        says goes to standard error; the first refusal ends the program, so that a script notices it."""
        self._console = Console(highlight=False, stderr=True)
        for raw in _lines(sys.stdin):
            line = raw.strip()
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                model = self._command(line, model)
            elif line:
                self._say(line, model)

    def _command(self, line: str, model: str) -> str:
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command == "/model" and rest:
            return self._choose(rest)
        if command in ("/model", "/models"):
            self._console.print("  ".join(f"[bold]{escape(n)}[/]" if n == model else escape(n) for n in self._models()))
        elif command == "/system":
            self._system = rest or None
        elif command == "/new":
            self._turns.clear()
        else:
            self._console.print(f"[dim]{_HELP}[/]")
        return model

    def _say(self, line: str, model: str) -> str:
        if not line:
            return model
        turns = [*self._turns, {"role": "user", "content": line}]
        answer = ""
        try:
            for piece in self._stream(model, turns):
                answer += piece
                write_text(piece)
        except KeyboardInterrupt:
            if self._is_piped:
                raise
            self._console.print(" [dim](stopped)[/]", end="")
        write_text("\n")
        self._turns = [*turns, {"role": "assistant", "content": answer}]
        return model

    def _choose(self, name: str | None) -> str:
        names = self._models()
        if name is None:
            return names[0]
        if name not in names:
            raise CommandError(f"the server has no model {name!r}; it has: {', '.join(names)}")
        return name

    def _models(self) -> list[str]:
        with self._open("/models") as reply:
            return [card["id"] for card in json.load(reply)["data"]]

    def _stream(self, model: str, turns: list[dict[str, str]]) -> Iterator[str]:
        system = [{"role": "system", "content": self._system}] if self._system else []
        body = {"model": model, "messages": system + turns, "stream": True, **self._options}
        with self._open("/chat/completions", body) as reply:
            for raw in reply:
                line = raw.decode("utf-8").strip()
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise CommandError(event["error"]["message"])
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data=data, headers=self._headers)  # noqa: S310  `server_root` lets http and https pass only
        try:
            return urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)  # noqa: S310
        except urllib.error.HTTPError as error:
            raise CommandError(_error_message(error)) from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise CommandError(
                f"no server at {self._url} ({reason}): start one with `guanaco serve`, or pass --url"
            ) from None


def _lines(stream: TextIO) -> Iterator[str]:
    try:
        yield from stream
    except UnicodeDecodeError:
        raise CommandError(_NOT_TEXT) from None


def _error_message(error: urllib.error.HTTPError) -> str:
    """The server's own words where it sent the OpenAI error envelope, else the status."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {error.code} {error.reason}"


def generate_once(
    settings: Settings,
    prompt: str,
    *,
    name: str | None,
    max_tokens: int,
    temperature: float | None,
    seed: int | None,
    raw: bool,
) -> None:
    """Answer `prompt` with the offline engine and write the text to standard output as it comes, as the server would:
    by the adapter's profile. temperature: None: the profile's, or 0."""
    from guanaco.adapters.versions.profile import Profile
    from guanaco.models.text.chat_template import load_template
    from guanaco.server.bootstrap.runtime import build_runtime
    from guanaco.server.engine.detokenizer import Detokenizer
    from guanaco.server.engine.request import FinishReason, LoraRef, Request, SamplingParams, Submit
    from guanaco.server.engine.stops import Stops

    runtime = build_runtime(settings, Console(stderr=True), name)
    adapter = runtime.adapter(name)
    profile = (adapter.profile if adapter is not None else None) or Profile()
    tokenizer, room, template = runtime.base.tokenizer, runtime.plan.max_model_len, runtime.base.template
    if profile.chat_template is not None:
        template = load_template(profile.chat_template)
    stops, ids = profile.stop, tokenizer.encode(prompt)
    if not raw:
        ids = tokenizer.encode_chat([{"role": "user", "content": prompt}], template=template)
        used = template or tokenizer.chat_template
        stops = (*stops, *(used.stop_strings if used is not None else ()))
    if len(ids) >= room:
        raise CommandError(f"the prompt has {len(ids)} tokens and the context {room}: nothing is left to write")
    sampling: dict[str, Any] = {"temperature": 0.0, **profile.sampling}
    if temperature is not None:
        sampling["temperature"] = temperature
    found = Stops.of(stops, tokenizer)
    params = SamplingParams(
        max_tokens=min(max_tokens, room - len(ids)),
        seed=seed,
        stop_token_ids=found.token_ids,
        stop_strings=found.strings,
        stops_see_control=found.see_control,
        **sampling,
    )
    detokenizer = Detokenizer(tokenizer, params, ids)
    loras = () if adapter is None else (LoraRef(adapter.version),)
    try:
        request = Request("generate", tuple(ids), params, loras, arrival_seconds=awake_seconds())
        runtime.engine.handle(Submit(request))
    except ValueError as error:  # a token that the model has no embedding row for
        raise CommandError(str(error)) from None
    while runtime.engine.has_work and detokenizer.stop_reason is None:
        for output in runtime.engine.step().outputs:
            if output.finish_reason is FinishReason.ERROR:
                raise CommandError(f"the engine ended the request: {output.error}")
            shown = output.token_ids[:-1] if output.finish_reason is FinishReason.STOP else output.token_ids
            write_text(detokenizer.append(shown, finished=output.finish_reason is not None))
    write_text("\n")
