"""Counts the answers to unseen prompts that have the trained pattern: a trained adapter's, and the base's.

    guanaco train --data docs/examples/guanaco-says.jsonl --name says --out /tmp/says
    .venv/bin/python loadtest/bench/training_example.py /tmp/says

The demo model answers the prompts of `docs/examples/guanaco-says-prompts.txt` greedily, through the server's engine.
None of the prompts is in the training data. Ends with 1 unless at least 27 of 30
answers of the adapter have the pattern, and at most one of the base's.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from rich.console import Console

from guanaco.server.bootstrap.runtime import Runtime, build_runtime
from guanaco.server.config import load_settings
from guanaco.server.engine.awake_clock import awake_seconds
from guanaco.server.engine.request import LoraRef, Request, SamplingParams, Submit

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PATTERN = re.compile(r"^\s*Guanaco says: \w")
AT_LEAST, AT_MOST = 27, 1
MAX_TOKENS = 48


def answers(runtime: Runtime, prompts: list[str], name: str | None) -> list[str]:
    """The greedy answer to each prompt, all of them in one batch."""
    tokenizer, entry = runtime.base.tokenizer, runtime.adapter(name)
    loras = () if entry is None else (LoraRef(entry.version),)
    stop_ids = tuple(runtime.base.eos_ids)
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, stop_token_ids=stop_ids)
    written: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        ids = tokenizer.encode_chat([{"role": "user", "content": prompt}], template=runtime.base.template)
        written[str(number)] = []
        runtime.engine.handle(Submit(Request(str(number), tuple(ids), params, loras, arrival_seconds=awake_seconds())))
    while runtime.engine.has_work:
        for output in runtime.engine.step().outputs:
            written[output.request_id] += output.token_ids
    return [tokenizer.decode(ids) for ids in written.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path, help="folder of the trained adapter")
    parser.add_argument("--show", action="store_true", help="print the answers")
    arguments = parser.parse_args()
    prompts = (EXAMPLES / "guanaco-says-prompts.txt").read_text(encoding="utf-8").split("\n")
    prompts = [prompt for prompt in prompts if prompt]
    settings = load_settings({"adapter": (f"trained={arguments.adapter}",), "offline": True})
    runtime = build_runtime(settings, Console(stderr=True))
    told = {}
    for name in ("trained", None):
        texts = answers(runtime, prompts, name)
        told[name or "base"] = sum(PATTERN.search(text) is not None for text in texts)
        for prompt, text in zip(prompts, texts, strict=True):
            if arguments.show:
                print(f"{name or 'base'} | {prompt} | {text!r}")
    print(json.dumps({"prompts": len(prompts), **told}))
    sys.exit(told["trained"] < AT_LEAST or told["base"] > AT_MOST)


if __name__ == "__main__":
    main()
