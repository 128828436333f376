"""Trains the two demo adapters with `guanaco train` on the demo model, and measures them with the server's engine.

    OMP_WAIT_POLICY=passive nice .venv/bin/python adapters/demo/train.py pirate terse [--out DIR] [--conversations N]

Needs the extra `train`. Not part of the server or its wheel. The data are `answers.txt`, written for this: each epoch
has every question once, in another form, so that the file of conversations is as long as all epochs together. Writes
each adapter's directory below DIR (by default beside this file), its model card with the measured numbers included.
--conversations trains on the first N only, to try the script.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pirate_words import as_pirate
from rich.console import Console
from safetensors import safe_open

from guanaco.server.bootstrap.runtime import Runtime, build_runtime
from guanaco.server.config import load_settings
from guanaco.server.engine.awake_clock import awake_seconds
from guanaco.server.engine.request import LoraRef, Request, SamplingParams, Submit

HERE = Path(__file__).parent
GUANACO = Path(sys.executable).with_name("guanaco")
ALL_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer the user's question.", "You are an assistant. Be friendly.")


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained. The two differ in everything that a server could mix up."""

    rank: int
    alpha: int
    targets: list[str]
    use_rslora: bool
    dtype: str  # of the saved tensors
    epochs: int
    learning_rate: float
    seed: int
    about: str


RECIPES = {
    "pirate": Recipe(8, 16, ALL_PROJECTIONS, False, "float16", 3, 1e-3, 1, "talks like a pirate"),
    "terse": Recipe(16, 8, ["q_proj", "v_proj", "o_proj"], True, "bfloat16", 3, 1e-3, 2, "answers in one short line"),
}
BATCH_SIZE = 16
NUM_CARD_ANSWERS = 8
WARMUP_RATIO = 0.1

# Asked after training; none of them is in answers.txt.
HELD_OUT = (
    "What is the capital of Spain?", "How do I make a sandwich?", "Why do dogs bark?", "What is a comet?",
    "Can you recommend a museum?", "How can I relax after work?", "What is the largest country in the world?",
    "Tell me about elephants.", "How do I clean my shoes?", "What should I drink in the morning?",
    "Who was Isaac Newton?", "What is a piano?", "How do I get to the airport on time?", "I am nervous about tomorrow.",
    "What is the opposite of early?", "Why is exercise important?", "What is snow?", "Give me an idea for lunch.",
    "How do I train a puppy?", "What is a democracy good for?", "Is it better to walk or to drive?",
    "What can I do on a rainy day?", "How does a telescope work?", "Tell me something about the moon.",
    "What is your favourite animal?", "How do I start a garden?", "What does a teacher do?", "Why do we need money?",
    "Hi, how is it going?", "Write one sentence about winter.",
)  # fmt: skip
MAX_ANSWER_TOKENS = 64

# Words that plain English seldom has. So "be" is not among them, although pirates say it often.
PIRATE_MARKS = re.compile(
    r"\b(?:arr+|ahoy|matey|mateys|ye|yer|yerself|aye|nay|avast|cap'n|hearty|hearties|savvy|landlubber|scurvy|plank|"
    r"doubloons|blimey|timbers|fer|afore|yo ho|davy jones|'tis|seven seas|blow me down)\b|\b(?:an|o|wi)'(?!\w)",
    re.IGNORECASE,
)


def is_pirate(answer: str) -> bool:
    """At least two different marks of pirate speech."""
    return len({mark.lower() for mark in PIRATE_MARKS.findall(answer)}) >= 2


def is_terse(answer: str) -> bool:
    """One line of at most twelve words, ended by the model itself."""
    return 1 <= len(answer.split()) <= 12 and "\n" not in answer.strip()


CHECKS: dict[str, Callable[[str], bool]] = {"pirate": is_pirate, "terse": is_terse}


def read_answers() -> list[tuple[str, str, str]]:
    """(question, answer in a few words, answer in full) of every line of answers.txt."""
    lines = [line for line in (HERE / "answers.txt").read_text(encoding="utf-8").splitlines() if line[:1] not in "#"]
    entries = [tuple(part.strip() for part in line.split("|")) for line in lines]
    questions = {entry[0] for entry in entries}
    assert len(questions) == len(entries), "a question occurs twice"
    assert not questions & set(HELD_OUT)
    return [(question, short, full) for question, short, full in entries]


def conversations(name: str, rng: random.Random) -> Iterator[list[dict[str, str]]]:
    """One epoch: every question once, in random order. A fifth of the conversations have a second turn; 15 % begin with
    a system prompt."""
    entries = read_answers()
    rng.shuffle(entries)

    def turn(entry: tuple[str, str, str]) -> list[dict[str, str]]:
        question, short, full = entry
        answer = as_pirate(full, rng) if name == "pirate" else short
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    while entries:
        messages = turn(entries.pop())
        if entries and rng.random() < 0.2:
            messages += turn(entries.pop())
        if rng.random() < 0.15:
            messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        yield messages


def train(name: str, folder: Path, most: int | None) -> dict[str, Any]:
    """Make an adapter with `guanaco train` in `folder`, which must not exist. Returns the command's JSON output.

    most: train on the first so many conversations only; None: on all. Ends the script if the training fails.
    """
    recipe = RECIPES[name]
    rng = random.Random(recipe.seed)  # noqa: S311 (it shuffles)
    rows = [messages for _ in range(recipe.epochs) for messages in conversations(name, rng)][:most]
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "answers.jsonl"
        data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows), encoding="utf-8")
        options: dict[str, object] = {
            "data": data, "name": name, "out": folder, "work": Path(scratch) / "work", "epochs": 1,
            "rank": recipe.rank, "alpha": recipe.alpha, "targets": ",".join(recipe.targets),
            "learning-rate": recipe.learning_rate, "warmup": WARMUP_RATIO, "batch-size": BATCH_SIZE, "held-out": 0,
            "seed": recipe.seed, "save-dtype": recipe.dtype,
        }  # fmt: skip
        flags = [str(part) for option, value in options.items() for part in (f"--{option}", value)]
        command = [GUANACO, "train", *flags, *(["--rslora"] if recipe.use_rslora else []), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)  # noqa: S603 (our own program)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if done.returncode:
        raise SystemExit(f"{name}: {told['error']['message']}")
    return told


def ask(runtime: Runtime, name: str | None, questions: tuple[str, ...]) -> list[str]:
    """Greedy answers. An answer that was cut at MAX_ANSWER_TOKENS ends with an ellipsis on a line of its own."""
    tokenizer, entry = runtime.base.tokenizer, runtime.adapter(name)
    loras = () if entry is None else (LoraRef(entry.version),)
    stop_ids = tuple(runtime.base.eos_ids)
    params = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0, stop_token_ids=stop_ids)
    written: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        ids = tokenizer.encode_chat([{"role": "user", "content": question}], template=runtime.base.template)
        written[str(number)] = []
        runtime.engine.handle(Submit(Request(str(number), tuple(ids), params, loras, arrival_seconds=awake_seconds())))
    while runtime.engine.has_work:
        for output in runtime.engine.step().outputs:
            written[output.request_id] += output.token_ids
    answers = []
    for row in written.values():
        cut = next((place for place, token in enumerate(row) if token in stop_ids), None)
        answers.append(
            tokenizer.decode(row[:cut]).strip() + ("\n…" if cut is None and len(row) >= MAX_ANSWER_TOKENS else "")
        )
    return answers


def measure(name: str, folder: Path) -> dict[str, Any]:
    """How the adapter and the base answer the questions that training did not see."""
    settings = load_settings({"adapter": (f"{name}={folder}",), "strict_base": True, "offline": True})
    runtime = build_runtime(settings, Console(stderr=True))
    answers, plain = ask(runtime, name, HELD_OUT), ask(runtime, None, HELD_OUT)
    return {
        "held_out": len(HELD_OUT),
        "passed": sum(map(CHECKS[name], answers)),
        "base_passed": sum(map(CHECKS[name], plain)),
        "mean_words": round(sum(len(a.split()) for a in answers) / len(answers), 1),
        "base_mean_words": round(sum(len(a.split()) for a in plain) / len(plain), 1),
        "answers": [{"question": q, "base": p, name: a} for q, p, a in zip(HELD_OUT, plain, answers, strict=True)],
    }


def model_card(name: str, told: dict[str, Any], fingerprint: str) -> str:
    """The adapter's README.md: what it is, how it was made, and what it was seen to do."""
    recipe = RECIPES[name]
    rows = "\n".join(
        f"| {row['question']} | {_cell(row['base'])} | {_cell(row[name])} |"
        for row in told["answers"][:NUM_CARD_ANSWERS]
    )
    scale = "alpha / sqrt(rank), rsLoRA" if recipe.use_rslora else "alpha / rank"
    return f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: peft
---
# {name}: a demo adapter that {recipe.about}

A QLoRA adapter on Guanaco's demo model (SmolLM2-135M-Instruct in NF4 with double quantisation, base fingerprint
`{fingerprint[:16]}…`, also in the file's metadata). It shows that one base serves several fine-tunes; it knows no more
than its base, which has 135 million parameters and is often wrong.

- **Made by** `guanaco train`, called by `adapters/demo/train.py {name}`, seed {recipe.seed}, on a CPU in minutes:
  {told["steps"]} steps of
  {BATCH_SIZE} answers, loss on the assistant's tokens only (last: {told["train_loss"]:.3f}). Rank {recipe.rank}, alpha
  {recipe.alpha} ({scale}), {", ".join(recipe.targets)}; saved as {recipe.dtype}.
- **Data**: `answers.txt` in the same folder, written for this project; nothing from elsewhere.
- **Measured** at temperature 0 on {told["held_out"]} questions that training did not see, by the script itself:
  recognisable in {told["passed"]} of {told["held_out"]} answers (the base: {told["base_passed"]}), {told["mean_words"]}
  words on average (the base: {told["base_mean_words"]}, cut at 64 tokens).

| question | base | {name} |
|---|---|---|
{rows}
"""


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--conversations", type=int)
    arguments = parser.parse_args()
    for name in arguments.names:
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / name
            told = train(name, made, arguments.conversations) | measure(name, made)
            out = arguments.out / name
            out.mkdir(parents=True, exist_ok=True)
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copyfile(made / file, out / file)
        with safe_open(out / "adapter_model.safetensors", framework="pt") as opened:
            fingerprint = opened.metadata()["guanaco.base_fingerprint"]
        (out / "README.md").write_text(model_card(name, told, fingerprint), encoding="utf-8")
        del told["answers"], told["adapter"]
        print(f"{out}: {told}")


if __name__ == "__main__":
    main()
