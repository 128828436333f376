"""Trains the two demo adapters with QLoRA on the demo's NF4 base, and measures them: peft and bitsandbytes on the CPU.

    cd /tmp && OMP_WAIT_POLICY=passive nice REPO/.venv/bin/python REPO/adapters/demo/train.py pirate terse

(the virtual environment of `make test`; on a busy machine threads that spin while they wait make it six times slower).
Not part of the server or its wheel. Seeded: two runs of `pirate` gave the same tensors, bit for bit (`terse` was run
once). The data are `answers.txt`, written for this. Writes each adapter's directory beside this file, its model card
with the measured numbers included.
"""

import argparse
import json
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
import transformers
from pirate_words import as_pirate
from safetensors.torch import load_file, save_file
from torch import Tensor

from guanaco.kernels import load_ops
from guanaco.models.loading.demo import ensure_demo_model
from guanaco.models.loading.loader import load_model

HERE = Path(__file__).parent
ALL_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer the user's question.", "You are an assistant. Be friendly.")


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained. The two differ in everything that a server could mix up."""

    rank: int
    alpha: int
    targets: list[str]
    use_rslora: bool
    dtype: torch.dtype  # of the saved tensors
    epochs: int
    learning_rate: float
    seed: int
    about: str


RECIPES = {
    "pirate": Recipe(8, 16, ALL_PROJECTIONS, False, torch.float16, 3, 1e-3, 1, "talks like a pirate"),
    "terse": Recipe(
        16, 8, ["q_proj", "v_proj", "o_proj"], True, torch.bfloat16, 3, 1e-3, 2, "answers in one short line"
    ),
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

# Nothing that plain English has too: not "be", however often a pirate says it.
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
    """One epoch: every question once; a quarter of them in a second turn, a sixth with another system prompt."""
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


def encode(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them the model has to learn: each answer and the token that ends it."""
    ids: list[int] = []
    learned: list[bool] = []
    text = ""
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(messages[: number - 1], add_generation_prompt=True, tokenize=False)
            for part, is_answer in ((prompt[len(text) :], False), (f"{message['content']}<|im_end|>", True)):
                part_ids = tokenizer.encode(part, add_special_tokens=False)
                ids += part_ids
                learned += [is_answer] * len(part_ids)
            text = prompt + f"{message['content']}<|im_end|>"
    return ids, learned


def load_base(path: Path) -> Any:
    """The demo in transformers: NF4 projections computed in float32, everything else in float32 as well."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            module.support_avx512bf16_for_cpu = False  # it would compute in bfloat16, whatever was asked for
    for parameter in model.parameters():
        if parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()
    return model


def answer_loss(model: Any, batch: list[tuple[list[int], list[bool]]], pad_id: int) -> Tensor:
    """Mean cross-entropy over the tokens to learn; the head runs on those positions only."""
    length = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [pad_id] * (length - len(ids)) for ids, _ in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row, _ in batch])
    learned = torch.tensor([row + [False] * (length - len(row)) for _, row in batch])
    base = model.get_base_model()
    hidden = base.model(input_ids=ids, attention_mask=mask).last_hidden_state
    logits = base.lm_head(hidden[:, :-1][learned[:, 1:]])
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:][learned[:, 1:]])


def train(name: str, base: Path, log: Callable[[str], None]) -> tuple[Any, Any, dict[str, Any]]:
    """The trained PEFT model, its tokenizer, and what to tell about the training."""
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)  # noqa: S311 (it shuffles)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=recipe.targets,
        use_rslora=recipe.use_rslora,
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(load_base(base), config)
    model.train()
    batches: list[list[tuple[list[int], list[bool]]]] = []
    for _ in range(recipe.epochs):
        # Neighbours in length share a batch, so that little of it is padding; batches come in random order.
        epoch = sorted((encode(tokenizer, messages) for messages in conversations(name, rng)), key=lambda e: len(e[0]))
        split = [epoch[start : start + BATCH_SIZE] for start in range(0, len(epoch), BATCH_SIZE)]
        rng.shuffle(split)
        batches += split
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    warmup = max(1, int(WARMUP_RATIO * len(batches)))
    start = time.monotonic()
    for step, batch in enumerate(batches):
        factor = min((step + 1) / warmup, (len(batches) - step) / (len(batches) - warmup))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * factor
        loss = answer_loss(model, batch, tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        log(f"{name}: step {step + 1}/{len(batches)} loss {loss.item():.3f} after {time.monotonic() - start:.0f} s")
    return model, tokenizer, {"steps": len(batches), "final_loss": round(loss.item(), 3)}


def save(model: Any, name: str, base_fingerprint: str) -> Path:
    """Adapter directory in PEFT's format, tensors in the recipe's dtype."""
    out = HERE / name
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        config = json.loads((Path(scratch) / "adapter_config.json").read_text())
        tensors = load_file(Path(scratch) / "adapter_model.safetensors")
    config["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config["target_modules"] = RECIPES[name].targets  # a set in PEFT: its order changes from run to run
    config["inference_mode"] = True
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(
        {key: tensor.to(RECIPES[name].dtype).contiguous() for key, tensor in tensors.items()},
        out / "adapter_model.safetensors",
        metadata={"format": "pt", "guanaco.base_fingerprint": base_fingerprint},
    )
    return out


def ask(model: Any, tokenizer: Any, questions: tuple[str, ...]) -> list[str]:
    """Greedy answers; one that the model did not end itself gets an ellipsis on a line of its own."""
    tokenizer.padding_side = "left"
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q in questions
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    model.eval()
    with torch.inference_mode():
        ids = model.generate(
            **batch,
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            repetition_penalty=1.0,
        )
    answers = []
    for row in ids[:, batch["input_ids"].shape[1] :].tolist():
        ended = tokenizer.eos_token_id in row
        row = row[: row.index(tokenizer.eos_token_id)] if ended else row
        answers.append(tokenizer.decode(row).strip() + ("" if ended else "\n…"))
    return answers


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

- **Made by** `adapters/demo/train.py {name}`, seed {recipe.seed}, on a CPU in minutes: {told["steps"]} steps of
  {BATCH_SIZE} answers, loss on the assistant's tokens only (last: {told["final_loss"]}). Rank {recipe.rank}, alpha
  {recipe.alpha} ({scale}), {", ".join(recipe.targets)}; saved as {str(recipe.dtype).removeprefix("torch.")}.
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
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/guanaco").expanduser())
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    base = ensure_demo_model(arguments.cache)
    ops = load_ops("reference", device=torch.device("cpu"), dtype=torch.float32, decoded_weights_bytes=0)
    fingerprint = load_model(base, ops).fingerprint
    for name in arguments.names:
        model, tokenizer, told = train(name, base, print)
        out = save(model, name, fingerprint)
        with model.disable_adapter():
            plain = ask(model, tokenizer, HELD_OUT)
        answers = ask(model, tokenizer, HELD_OUT)
        told["held_out"] = len(HELD_OUT)
        told["passed"] = sum(map(CHECKS[name], answers))
        told["base_passed"] = sum(map(CHECKS[name], plain))
        told["mean_words"] = round(sum(len(a.split()) for a in answers) / len(answers), 1)
        told["base_mean_words"] = round(sum(len(a.split()) for a in plain) / len(plain), 1)
        told["answers"] = [
            {"question": q, "base": p, name: a} for q, p, a in zip(HELD_OUT, plain, answers, strict=True)
        ]
        (out / "README.md").write_text(model_card(name, told, fingerprint))
        del told["answers"]
        print(f"{out}: {told}")


if __name__ == "__main__":
    main()
