#!/usr/bin/env python3
"""Time answers with drafts and without, in turns in one process: texts that repeat their prompt, JSON, and chat.

    .venv/bin/python loadtest/bench/speculation.py                                   # the demo model
    .venv/bin/python loadtest/bench/speculation.py --model M1B --kinds edits,quotes --gguf M1B.gguf --peers PYTHON
    .venv/bin/python loadtest/bench/speculation.py --kinds chat --prompts QUESTIONS.jsonl

Edits and quotes are made from this repository's files. Their answers, and those of JSON, are given: at each place only
the answer's token may be sampled. So the text decides how good drafts are, not how well a small model copies; the steps
are those of a model that would write this text. Chat is written freely. Every answer is compared: drafts must not
change a token. Rates count from the first token on. --peers also times llama.cpp's own lookup on the same answers.
"""

import argparse
import datetime
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from guanaco.models.error_codes import ErrorCode
from guanaco.server.bootstrap.machine import look
from guanaco.server.bootstrap.runtime import Runtime, build_runtime
from guanaco.server.config import load_settings
from guanaco.server.engine.awake_clock import awake_seconds
from guanaco.server.engine.request import Request, SamplingParams, Submit
from guanaco.server.grammars.compiler import GrammarCompiler
from guanaco.server.grammars.spec import json_schema
from guanaco.server.grammars.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
KINDS = ("edits", "quotes", "json", "chat")
FILES = ("server/engine/stops.py", "server/engine/loading_queue.py", "server/metrics/histogram.py", "docs/gpu.md")
FILES += ("server/engine/step_share.py", "docs/page.md", "server/errors.py", "docs/limits.md")
SCHEMA = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "maxLength": 40},
        "order_number": {"type": "integer"},
        "priority": {"enum": ["low", "normal", "high"]},
        "products": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"product_name": {"type": "string"}, "quantity": {"type": "integer"}},
                "required": ["product_name", "quantity"],
            },
        },
        "delivery_address": {"type": "string"},
    },
    "required": ["customer_name", "order_number", "priority", "products", "delivery_address"],
}
QUESTIONS = ("How do I boil an egg?", "Why is the sky blue?", "Write a short story about a lighthouse.")


class Item(NamedTuple):
    """A prompt, and the given answer (None: the model writes freely)."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...] | None
    has_grammar: bool = False


class Given:
    """A constraint that allows only a given answer, within a grammar if there is one."""

    def __init__(self, answer: Sequence[int], matcher: Any = None) -> None:
        self.error: ErrorCode | None = None
        self.is_complete = False
        self._answer, self._matcher, self._done = answer, matcher, 0

    def is_end(self, _token_id: int) -> bool:
        return False

    def _only(self, row: Any, place: int) -> None:
        if place < len(self._answer):
            token = self._answer[place]
            row[:] = 0
            row[token // 32] = np.uint32(1 << token % 32).astype(np.int32)

    def fill(self, row: Any) -> None:
        if self._matcher is not None:
            self._matcher.fill(row)
        self._only(row, self._done)

    def fill_ahead(self, draft: Sequence[int], rows: Any) -> None:
        if self._matcher is not None:
            self._matcher.fill_ahead(draft, rows)
        for place, row in enumerate(rows):
            self._only(row, self._done + place)

    def num_allowed(self, draft: Sequence[int]) -> int:
        """As for a model that writes freely: only the grammar limits a draft, not the given answer."""
        return len(draft) if self._matcher is None else self._matcher.num_allowed(draft)

    def forced(self) -> bytes:
        return b"" if self._matcher is None else self._matcher.forced()

    def accept(self, token_id: int) -> None:
        assert token_id == self._answer[self._done], "the given token"
        self._done += 1
        if self._matcher is not None:
            self._matcher.accept(token_id)
            self.error = self._matcher.error


class Bench:
    """One engine that runs items with drafts or without."""

    def __init__(self, args: argparse.Namespace) -> None:
        flags = {"speculation": args.speculation, "threads": args.threads, "max_model_len": 2048}
        if args.model:
            flags["model"] = args.model
        self.runtime: Runtime = build_runtime(load_settings(flags), Console(stderr=True))
        self.max_tokens = args.max_tokens
        self._number = 0
        base = self.runtime.base
        num_ids = base.loaded.config.vocab_size
        never = base.tokenizer.special_ids | base.eos_ids
        self._grammars = GrammarCompiler(lambda: Vocabulary.of(base.tokenizer.token_bytes, num_ids, never))

    def run(self, items: list[Item], *, drafts: bool) -> tuple[float, list[list[int]], int]:
        """(tokens/s of all items together while all run, each item's tokens, number of accepted draft tokens)."""
        engine, outputs, accepted = self.runtime.engine, {}, 0
        for item in items:
            self._number += 1
            outputs[f"r{self._number}"] = []
            engine.handle(Submit(self._request(f"r{self._number}", item, drafts=drafts)))
        started, stopped, counted = 0.0, 0.0, 0
        while engine.has_work:
            step = engine.step()
            accepted += sum(outcome.num_accepted for outcome in step.stats.drafts)
            for output in step.outputs:
                assert output.error is None, output.error
                outputs[output.request_id] += output.token_ids
            if started and not stopped:
                counted += sum(len(output.token_ids) for output in step.outputs)
                if any(output.finish_reason for output in step.outputs):
                    stopped = time.perf_counter()
            elif not started and all(outputs.values()):
                started = time.perf_counter()
        return counted / max(1e-9, stopped - started), list(outputs.values()), accepted

    def _request(self, name: str, item: Item, *, drafts: bool) -> Request:
        matcher = self._grammars.compile(json_schema(SCHEMA)).matcher(()) if item.has_grammar else None
        constraint = None if item.answer is None else Given(item.answer, matcher)
        most = self.max_tokens if item.answer is None else len(item.answer)
        params = SamplingParams(max_tokens=most, temperature=0.0, seed=1, ignore_eos=True, speculation=drafts)
        # Each request has a salt of its own, so the prefix cache never helps.
        return Request(
            name, item.prompt, params, cache_salt=name, arrival_seconds=awake_seconds(), constraint=constraint
        )


def corpus(kind: str, bench: Bench, args: argparse.Namespace) -> list[Item]:
    """The items of one kind."""
    tokenizer, random_ = bench.runtime.base.tokenizer, random.Random(kind)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text))

    if kind == "chat":
        lines = Path(args.prompts).read_text().splitlines() if args.prompts else []
        found = [_question(json.loads(line)) for line in lines if line.strip()] or list(QUESTIONS)
        turns = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
        return [
            Item(tuple(tokenizer.encode(turns.format(text), parse_control=True)), None) for text in found[: args.most]
        ]
    items = []
    for name in FILES[: args.most]:
        text = (ROOT / name).read_text()[:2400]
        text = text[: len(text) * 700 // max(700, len(ids(text)))]  # at most about 700 tokens, in any vocabulary
        if kind == "edits":
            words = sorted({word for word in text.split() if word.isidentifier() and len(word) > 4})
            old = random_.choice(words)
            lines = text.replace(old, f"{old}_new").splitlines(keepends=True)
            del lines[random_.randrange(len(lines))]
            prompt = f"Rename {old} to {old}_new in this file:\n\n{text}\n\nThe file after the change:\n\n"
            items.append(Item(ids(prompt), ids("".join(lines))[: args.answer]))
        elif kind == "quotes":
            parts = [part for part in text.split("\n\n") if len(part) > 80]
            chosen = random_.sample(parts, min(3, len(parts)))
            answer = "".join(f"\nThe text says:\n\n> {part}\n\nThat is part {i}." for i, part in enumerate(chosen, 1))
            items.append(Item(ids(f"{text}\n\nQuote the parts that matter:\n"), ids(answer)[: args.answer]))
        else:
            goods = [
                {"product_name": random_.choice(words_of(text)), "quantity": random_.randrange(99)} for _ in range(4)
            ]
            value = {
                "customer_name": " ".join(random_.sample(words_of(text), 2)),
                "order_number": random_.randrange(10**6),
                "priority": random_.choice(["low", "normal", "high"]),
                "products": goods,
                "delivery_address": " ".join(random_.sample(words_of(text), 5)),
            }
            answer = json.dumps(value)
            items.append(Item(ids(f"Order number {name}. As JSON:\n"), ids(answer), has_grammar=True))
    return items


def words_of(text: str) -> list[str]:
    return [word for word in text.split() if word.isalpha() and len(word) > 3]


def _question(line: dict[str, Any]) -> str:
    return str(line.get("text") or line.get("prompt") or line["turns"][0])


def measure(bench: Bench, items: list[Item], streams: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds of tokens/s without and with drafts, and of their ratio in the same round."""
    groups = [items[i : i + streams] for i in range(0, len(items) - streams + 1, streams)] or [items]
    if len(groups[0]) < streams:
        groups = [(items * streams)[:streams]]
    plain, drafted, ratios, same, num_tokens, num_accepted = [], [], [], 0, 0, 0
    for number in range(rounds):
        rates: dict[bool, list[float]] = {False: [], True: []}
        for place, group in enumerate(groups):
            order = (False, True) if (place + number) % 2 else (True, False)
            answers = {}
            for drafts in order:
                rate, answers[drafts], accepted = bench.run(group, drafts=drafts)
                rates[drafts].append(rate)
                num_accepted += accepted
            same += answers[False] == answers[True]
            num_tokens += sum(map(len, answers[True]))
        for drafts, found in ((False, plain), (True, drafted)):
            found.append(statistics.harmonic_mean(rates[drafts]))
        ratios.append(drafted[-1] / plain[-1])
    return {
        "plain": round(statistics.median(plain), 2),
        "drafts": round(statistics.median(drafted), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "same answers": f"{same} of {len(groups) * rounds}",
        "tokens from drafts": round(num_accepted / max(1, num_tokens), 3),
    }


def peer(items: list[Item], args: argparse.Namespace) -> dict[str, float] | str:
    """llama.cpp's rates for the same answers in one stream, without and with its lookup; or its error as a text."""
    wanted = [{"prompt": item.prompt, "answer": item.answer} for item in items]
    command = [
        args.peers,
        str(HERE / "peer_llamacpp_lookup.py"),
        args.gguf,
        "--threads",
        str(args.threads or look().cpu_count),
    ]
    done = subprocess.run(command, input=json.dumps(wanted), capture_output=True, text=True, check=False)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return dict(json.loads(line))
    return (done.stderr.strip().splitlines() or ["nothing"])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the model; none: the demo")
    parser.add_argument("--speculation", default="lookup", help="the method")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--prompts", help="JSONL of questions for chat (text, prompt or turns)")
    parser.add_argument("--most", type=int, default=8, help="most items of a kind")
    parser.add_argument("--answer", type=int, default=300, help="most tokens of a given answer")
    parser.add_argument("--max-tokens", type=int, default=120, help="tokens of a chat answer")
    parser.add_argument("--gguf", help="the model as GGUF, for llama.cpp")
    parser.add_argument("--peers", help="a Python with llama-cpp-python")
    parser.add_argument("--out", help="file for the result")
    args = parser.parse_args()
    bench = Bench(args)
    drafting = bench.runtime.engine.scheduler.drafting
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": look().cpu_name,
        "threads": bench.runtime.num_threads,
        "model": args.model or bench.runtime.base.name,
        "speculation": args.speculation,
        "step seconds by rows": [(rows, round(s, 5)) for rows, s in drafting.costs.points],
        "kinds": {},
    }
    print("step seconds by rows:", result["step seconds by rows"])
    for kind in args.kinds.split(","):
        items = corpus(kind, bench, args)
        for streams in map(int, args.streams.split(",")):
            found = measure(bench, items, streams, args.rounds)
            result["kinds"][f"{kind}, {streams}"] = found
            print(f"{kind:7} {streams} streams: {found}", flush=True)
        if args.peers and args.gguf and kind != "chat":
            result["kinds"][f"{kind}, llama.cpp"] = found_there = peer(items, args)
            print(f"{kind:7} llama.cpp: {found_there}", flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(main())
