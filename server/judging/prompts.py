"""Prompts: the user's JSONL file, or one of the QLoRA paper's two benchmarks, whose files are known by their hashes."""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guanaco.server.errors import CommandError

MAX_BYTES = 256 << 20
MAX_PROMPTS = 100_000
MAX_MESSAGES = 512
_ROLES = frozenset({"system", "user", "assistant", "developer"})
_TURN = re.compile(r"\s*### (Human|Assistant):\s*")


@dataclass(frozen=True)
class Prompt:
    """One prompt: messages, category, language (None: unknown), and a known good answer (None: none)."""

    id: str
    messages: tuple[tuple[str, str], ...]  # role, content
    category: str = "all"
    language: str | None = None
    reference: str | None = None

    @property
    def shown(self) -> str:
        """The messages as one text, for judges and people."""
        if len(self.messages) == 1:
            return self.messages[0][1]
        return "\n\n".join(f"[{role}]\n{content}" for role, content in self.messages)

    def body(self) -> list[dict[str, str]]:
        """The messages as the API takes them."""
        return [{"role": role, "content": content} for role, content in self.messages]


@dataclass(frozen=True)
class Benchmark:
    """A released file of prompts. count: its prompts. home: where a copy is, in words."""

    name: str
    sha256: str
    count: int
    home: str


BENCHMARKS = {
    b.name: b
    for b in (
        Benchmark(
            "vicuna",
            "590c39157bc561eadd7f03cad4be18c2b597f93029780af65f86718f39eafa87",
            80,
            "chatserver/eval/table/question.jsonl of github.com/lm-sys/FastChat at "
            "ab5cfcadd61921c08d8d4f8fbea96be6c1e90fc1",
        ),
        Benchmark(
            "openassistant",
            "6fb3b5d42975bd72c5a22612435d9daee2de29fdf1fe595d65754b18a4dc57f4",
            953,
            "eval/prompts/oa_questions.jsonl of github.com/artidoro/qlora at 05daee4ead5387636f6caf06a7941db789e75900",
        ),
    )
}


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSONL file. Raises CommandError, which names the wrong line.

    Each line has `messages`, `text` or `prompt`. It may have `id` (or `question_id`), `category`, `language` (or
    `lang`) and `reference` (or `output`).
    """
    return _parse(read_bytes(path), str(path))


def read_benchmark(name: str, path: Path | None) -> list[Prompt]:
    """The prompts of a benchmark, from a copy of its released file. Raises CommandError if the hash differs."""
    benchmark = BENCHMARKS.get(name)
    if benchmark is None:
        raise CommandError(f"--benchmark {name}: there are {' and '.join(BENCHMARKS)}; for other files use --prompts")
    if path is None:
        raise CommandError(
            f"the {name} prompts do not come with guanaco: name a copy with --benchmark-file PATH (or a pinned hub "
            f"revision, ORG/NAME@COMMIT/FILE). The released file is {benchmark.home}; its SHA-256 is {benchmark.sha256}"
        )
    data = read_bytes(path)
    found = hashlib.sha256(data).hexdigest()
    if found != benchmark.sha256:
        raise CommandError(
            f"{path} is not the released file of the {name} prompts (SHA-256 {found[:12]}…, not "
            f"{benchmark.sha256[:12]}…): fetch {benchmark.home}, or pass your file with --prompts"
        )
    return _parse(data, str(path))


def sample(prompts: Sequence[Prompt], count: int | None, seed: int) -> list[Prompt]:
    """`count` of the prompts, chosen by the seed, in the file's order; all of them if count is None."""
    if count is None or count >= len(prompts):
        return list(prompts)
    chosen = random.Random(seed).sample(range(len(prompts)), count)  # noqa: S311 (a repeatable choice, no secret)
    return [prompts[i] for i in sorted(chosen)]


def hash_of(prompts: Sequence[Prompt]) -> str:
    """SHA-256 over the prompts' ids and messages: two comparisons with the same hash asked the same."""
    text = json.dumps([[p.id, p.messages] for p in prompts], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_bytes(path: Path) -> bytes:
    """A file of prompts, MAX_BYTES at most. Raises CommandError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CommandError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_BYTES:
        raise CommandError(f"{path}: more than {MAX_BYTES >> 20} MiB of prompts: split the file")
    return data


def lines_of(data: bytes, where: str) -> list[str]:
    """The lines of a file of prompts, with or without a byte order mark. Raises CommandError if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise CommandError(f"{where}: not UTF-8 at byte {error.start}: save the file as UTF-8") from None


def _parse(data: bytes, where: str) -> list[Prompt]:
    prompts, seen = [], set()
    for number, line in enumerate(lines_of(data, where), 1):
        if not line.strip():
            continue
        prompt = _prompt(line, number, f"{where}, line {number}")
        if prompt.id in seen:
            raise CommandError(f"{where}, line {number}: the id {prompt.id[:80]!r} is there twice")
        seen.add(prompt.id)
        prompts.append(prompt)
        if len(prompts) > MAX_PROMPTS:
            raise CommandError(f"{where}: more than {MAX_PROMPTS:,} prompts: use --sample on a part of the file")
    if not prompts:
        raise CommandError(f"{where}: no prompts: write one JSON object with messages or text in each line")
    return prompts


def _prompt(line: str, number: int, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise CommandError(f"{where}: not a JSON object")
    messages = messages_of(row, where)
    if messages[-1][0] != "user":
        raise CommandError(f"{where}: the last message must be the user's, because the contestants answer it")
    return Prompt(
        id=str(_first(row, ("id", "question_id"), number)),
        messages=messages,
        category=_text(row, ("category",), where) or "all",
        language=_text(row, ("language", "lang"), where),
        reference=_text(row, ("reference", "output"), where),
    )


def messages_of(row: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    """(role, content) of each message of a row with `messages`, `text` or `prompt`. where: begins error messages.

    Raises CommandError.
    """
    given = row.get("messages")
    if given is None:
        text = _text(row, ("text", "prompt"), where)
        if not text or not text.strip():
            raise CommandError(f"{where}: neither messages nor text")
        return _turns(text)
    if not isinstance(given, list) or not 0 < len(given) <= MAX_MESSAGES:
        raise CommandError(f"{where}: messages must be a list of 1 to {MAX_MESSAGES} messages")
    messages = []
    for message in given:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in _ROLES or not isinstance(content, str) or not isinstance(role, str):
            raise CommandError(
                f"{where}: each message needs a role ({', '.join(sorted(_ROLES))}) and a text as content"
            )
        messages.append((role, content))
    return tuple(messages)


def _turns(text: str) -> tuple[tuple[str, str], ...]:
    """A text as one user message, or cut at its headings if it is `### Human: … ### Assistant:`, as the OpenAssistant
    benchmark has it."""
    if not text.startswith("### Human:") or not text.rstrip().endswith("### Assistant:"):
        return (("user", text),)
    pieces = _TURN.split(text)[1:-2]  # role, content, role, content, …; the last assistant's turn is the answer
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple((roles[role], content.strip()) for role, content in zip(pieces[::2], pieces[1::2], strict=True))


def _text(row: dict[str, Any], names: Sequence[str], where: str) -> str | None:
    value = _first(row, names, None)
    if value is not None and not isinstance(value, str):
        raise CommandError(f"{where}: {names[0]} must be a text")
    return value


def _first(row: dict[str, Any], names: Sequence[str], default: Any) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), default)
