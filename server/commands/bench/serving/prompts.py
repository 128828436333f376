"""The prompts of a load: conversations of a file or a log, a benchmark's prompts, or made-up words."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from guanaco.server.errors import CommandError
from guanaco.server.judging.prompts import BENCHMARKS, lines_of, messages_of, read_benchmark, read_bytes

RANDOM, CUSTOM = "random", "custom"
DATASETS = (RANDOM, CUSTOM, *BENCHMARKS)
MAX_LINES = 1_000_000
MAX_RANDOM_TOKENS = 1_000_000
ACCESS_LOGGER = "guanaco.access"
# Words that are one token each in LLaMA's, Qwen's and SmolLM's vocabularies, with the space before them.
_TEXT = (
    "the and for with from that this not you all one time year people way day man thing woman life child world school "
    "state family student group country problem hand part place case week company system program question work number "
    "night point home water room mother area money story fact month lot right study book eye job word business side"
)
_WORDS = tuple(_TEXT.split())


@dataclass(frozen=True)
class Ask:
    """One prompt of the data. A field that is None is set by the command's options."""

    messages: tuple[tuple[str, str], ...]  # role, content
    output_tokens: int | None = None
    model: str | None = None
    at: float | None = None  # seconds from the first line of the data

    def chat(self, number: int) -> list[dict[str, str]]:
        """The messages for /v1/chat/completions. number: above 0, it is put in front, so that no cached prefix fits."""
        texts = [_numbered(content, number if i == 0 else 0) for i, (_, content) in enumerate(self.messages)]
        return [{"role": role, "content": text} for (role, _), text in zip(self.messages, texts, strict=True)]

    def text(self, number: int) -> str:
        """The prompt for /v1/completions: all messages, one after the other."""
        return _numbered("\n\n".join(content for _, content in self.messages), number)


def _numbered(text: str, number: int) -> str:
    return f"({number}) {text}" if number else text


def read_dataset(
    name: str, path: Path | None, *, input_tokens: int, range_ratio: float, count: int, seed: int
) -> list[Ask]:
    """The prompts of --dataset-name. Raises CommandError for an unknown name, and for a file that can't be read.

    input_tokens, range_ratio and count are only for `random`: prompts have about input_tokens · (1 ± range_ratio)
    tokens. seed: of made-up words.
    """
    if name == RANDOM:
        if path is not None:
            raise CommandError("--dataset-path goes with --dataset-name custom, or with a benchmark's name")
        rng = random.Random(seed)  # noqa: S311 (a repeatable load, no secret)
        low, high = int(input_tokens * (1 - range_ratio)), int(input_tokens * (1 + range_ratio))
        return [made_up(rng.randint(max(1, low), max(1, high)), rng) for _ in range(count)]
    if name in BENCHMARKS:
        if path is None:
            home = BENCHMARKS[name].home
            raise CommandError(f"--dataset-name {name} needs --dataset-path FILE: a copy of {home}")
        return [Ask(prompt.messages) for prompt in read_benchmark(name, path)]
    if name != CUSTOM:
        raise CommandError(f"--dataset-name {name}: there are {', '.join(DATASETS)}")
    if path is None:
        raise CommandError("--dataset-name custom needs --dataset-path FILE")
    return read_file(path, seed)


def made_up(tokens: int, rng: random.Random) -> Ask:
    """A prompt of `tokens` words, so of about as many tokens. The usage in the answer has the exact number."""
    return Ask((("user", " ".join(rng.choice(_WORDS) for _ in range(tokens))),))


def read_file(path: Path, seed: int) -> list[Ask]:
    """The prompts of a JSONL file or log. CommandError names the line that can't be read.

    A line has `messages`, `text` or `prompt`. A line with `prompt_tokens` alone, as in the server's access log, becomes
    that number of words. A line may also have `output_tokens` (or `completion_tokens`, `max_tokens`,
    `max_completion_tokens`), `model`, and `timestamp` or `time` (seconds or ISO 8601). With `e2e_seconds` this is the
    time of the request's end, as in the access log. Other lines of the server's log are left out.
    """
    rng = random.Random(seed)  # noqa: S311 (as above)
    asks = [_ask(row, where, rng) for row, where in _rows(path) if not _is_other_log_line(row)]
    if not asks:
        raise CommandError(f"{path}: no prompts: write one JSON object with messages or text in each line")
    timed = [ask.at for ask in asks if ask.at is not None]
    if not timed:
        return asks
    first = min(timed)
    return [Ask(a.messages, a.output_tokens, a.model, None if a.at is None else a.at - first) for a in asks]


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    lines = lines_of(read_bytes(path), str(path))
    if len(lines) > MAX_LINES:
        raise CommandError(f"{path}: more than {MAX_LINES:,} lines: split the file")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise CommandError(f"{path}, line {number}: not a JSON object")
            yield row, f"{path}, line {number}"


def _is_other_log_line(row: Mapping[str, Any]) -> bool:
    return "logger" in row and not (row["logger"] == ACCESS_LOGGER and _count(row, ("prompt_tokens",), ""))


def _ask(row: dict[str, Any], where: str, rng: random.Random) -> Ask:
    tokens = _count(row, ("prompt_tokens",), where)
    if tokens is not None and not any(row.get(name) for name in ("messages", "text", "prompt")):
        messages = made_up(max(1, tokens), rng).messages
    else:
        messages = messages_of(row, where)
        while len(messages) > 1 and messages[-1][0] == "assistant":  # a log's answer
            messages = messages[:-1]
    model = row.get("model")
    if model is not None and not isinstance(model, str):
        raise CommandError(f"{where}: model must be a text")
    output = _count(row, ("output_tokens", "completion_tokens", "max_tokens", "max_completion_tokens"), where)
    at, took = _seconds(row, where), row.get("e2e_seconds")
    if at is not None and isinstance(took, int | float):
        at -= took  # the server's log has a line when a request has ended
    return Ask(messages, output or None, model, at)


def _count(row: Mapping[str, Any], names: Sequence[str], where: str) -> int | None:
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_RANDOM_TOKENS:
            raise CommandError(f"{where}: {name} must be a whole number from 0 to {MAX_RANDOM_TOKENS:,}")
        return value
    return None


def _seconds(row: Mapping[str, Any], where: str) -> float | None:
    for name in ("timestamp", "time"):
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15:
            return float(value)
        try:
            return datetime.fromisoformat(str(value)).timestamp()
        except (ValueError, OverflowError, OSError):
            raise CommandError(f"{where}: {name} must be seconds, or a date and time of ISO 8601") from None
    return None
