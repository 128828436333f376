#!/usr/bin/env python3
"""A fine-tuning job on the demo model through the `openai` client, and what it costs the traffic beside it.

    beside.py [--rows 12] [--epochs 8] [--requests 8] [--threads 2] [--train-threads 1] [--transcript FILE]

Starts `guanaco serve` with the demo and its two fine-tunes, and asks them the same questions one after the other: first
while nothing else happens, then while a job trains. The answers are greedy, so they must be the same ones. Then it
chats with the new model, trains it once more under the same name, and rolls back. In the end one JSON line: medians of
the first token (seconds) and of the tokens a second in both phases, whether all answers are unchanged, and memory:
proportional set sizes (Pss) of server and trainer, and how much of the file with the packed base each of them counts.
Exits with 1 if an answer changed, or if the first token took more than twice as long.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from guanaco.server.config import Settings

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "guanaco-says.jsonl"
GUANACO = Path(sys.executable).with_name("guanaco")
KEY = "sesame"
MODELS = ("pirate", "terse")
QUESTIONS = ("How do I boil an egg?", "Why is the sky blue?", "What is a comet?", "Tell me about elephants.")
MAX_TOKENS = 32
WAIT = 1800.0


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--rows", type=int, default=12)
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--requests", type=int, default=8, help="of each phase")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--train-threads", type=int, default=1)
    p.add_argument("--transcript", type=Path, help="what was done and said, as a file")
    return p.parse_args()


@contextmanager
def served(args: argparse.Namespace, folder: Path) -> Iterator[tuple[int, str]]:
    """(process id, address) of a server that is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    flags = {"port": port, "threads": args.threads, "train-threads": args.train_threads, "train-dir": folder / "jobs"}
    command = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    with (folder / "server.log").open("wb") as log:
        environment = {**os.environ, "GUANACO_ADMIN_KEY": KEY}
        server = subprocess.Popen([GUANACO, "serve", *command], stdout=log, stderr=log, env=environment)
        try:
            for _ in range(3000):
                assert server.poll() is None, (folder / "server.log").read_text()
                try:
                    if httpx.get(f"{url}/health/ready", timeout=5).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(0.1)
            yield server.pid, url
        finally:
            server.terminate()
            server.wait(120)


def ask(client: OpenAI, model: str, question: str) -> tuple[float, float, str]:
    """(seconds to the first token, tokens a second after it, the text)."""
    started, first, number, text = time.perf_counter(), 0.0, 0, ""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and (piece := chunk.choices[0].delta.content):
            first, number, text = first or time.perf_counter(), number + 1, text + piece
    return first - started, (number - 1) / max(1e-9, time.perf_counter() - first), text


def traffic(client: OpenAI, number: int) -> list[tuple[float, float, str]]:
    """`number` questions to the two demo adapters, one after the other, with the results of `ask`."""
    return [ask(client, MODELS[n % 2], QUESTIONS[n // 2 % len(QUESTIONS)]) for n in range(number)]


def memory(pid: int) -> dict[str, float]:
    """MiB of one process: resident, proportional (Pss), and both for the mapped files of packed weights."""
    base = Path(f"/proc/{pid}")
    fields = dict(re.findall(r"^(\w+): +(\d+) kB", (base / "smaps_rollup").read_text(), re.MULTILINE))
    packed = {"Rss": 0, "Pss": 0}
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", (base / "smaps").read_text()):
        if str(Settings().cache_dir / "models") in entry.splitlines()[0]:
            for name, value in re.findall(r"^(Rss|Pss): +(\d+) kB", entry, re.MULTILINE):
                packed[name] += int(value)
    found = {"rss": fields["Rss"], "pss": fields["Pss"], "base_rss": packed["Rss"], "base_pss": packed["Pss"]}
    return {name: round(int(value) / 1024, 1) for name, value in found.items()}


def trainer_of(server: int) -> int | None:
    """The id of the process that trains, a child of the server; None if none runs."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == server and b"\0train\0" in (path / "cmdline").read_bytes():
                return int(path.name)
        except (OSError, ValueError):
            continue
    return None


def circle(args: argparse.Namespace, pid: int, url: str, data: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the whole sequence on a server. say: prints a line of the transcript."""
    with OpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=WAIT, max_retries=0) as client:
        base = next(model.id for model in client.models.list() if model.id not in MODELS)
        traffic(client, len(MODELS))  # the first questions bring the adapters into memory
        idle = traffic(client, args.requests)
        alone = memory(pid)
        file = client.files.create(file=data, purpose="fine-tune")
        say(f'client.files.create(file="{data.name}", purpose="fine-tune")  → {file.id}, {file.bytes} bytes')
        job = _create(client, base, file.id, args.epochs, say)
        while client.fine_tuning.jobs.retrieve(job).status == "validating_files" or not _steps(client, job):
            time.sleep(0.2)
        busy = traffic(client, args.requests)
        trainer = trainer_of(pid)
        beside = {"server": memory(pid), "trainer": None if trainer is None else memory(trainer)}
        still = client.fine_tuning.jobs.retrieve(job).status == "running"
        model = _wait(client, job, say)
        question = "How do I boil an egg?"
        for name in (base, model):
            say(f'chat with {name}: "{question}"  → "{ask(client, name, question)[2]}"')
        _wait(client, _create(client, base, file.id, 1, say), say)
        admin = httpx.Client(base_url=f"{url}/v1/adapters", headers={"Authorization": f"Bearer {KEY}"}, timeout=WAIT)
        with admin:
            card = admin.get(f"/{model}").json()
            back = admin.post(f"/{model}/rollback", json={}).json()
        say(f"POST /v1/adapters/{model}/rollback  → version {card['version'][:12]} becomes {back['version'][:12]}")
        say(f'chat with {model}: "{question}"  → "{ask(client, model, question)[2]}"')
        say(f'client.models.delete("{model}")  → {client.models.delete(model).deleted}')
    return {"idle": idle, "busy": busy, "alone": alone, "beside": beside, "job_ran_until_the_last_answer": still}


def _create(client: OpenAI, base: str, file: str, epochs: int, say: Callable[[str], None]) -> str:
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=file,
        suffix="says",
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs}}},
    )
    say(f'client.fine_tuning.jobs.create(model="{base}", suffix="says", n_epochs={epochs})  → {job.id}, {job.status}')
    return job.id


def _steps(client: OpenAI, job: str) -> int:
    return sum(event.type == "metrics" for event in client.fine_tuning.jobs.list_events(job, limit=100).data)


def _wait(client: OpenAI, job_id: str, say: Callable[[str], None]) -> str:
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in ("succeeded", "failed"):
        time.sleep(0.5)
    events = [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100).data][::-1]
    for message in (*events[:5], "…", *events[-3:]):
        say(f"  event: {message}")
    assert job.fine_tuned_model is not None, job.error
    say(f"  → {job.status}: {job.fine_tuned_model}, {job.trained_tokens} tokens")
    return job.fine_tuned_model


def main() -> int:
    args, said = arguments(), []

    def say(text: str) -> None:
        print(text, flush=True)
        said.append(text)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "chat.jsonl"
        data.write_text("".join(EXAMPLE.read_text(encoding="utf-8").splitlines(keepends=True)[: args.rows]))
        with served(args, folder) as (pid, url):
            found = circle(args, pid, url, data, say)
    result: dict[str, Any] = {name: found[name] for name in ("alone", "beside", "job_ran_until_the_last_answer")}
    for name in ("idle", "busy"):
        result[f"{name}_first_token_s"] = round(statistics.median(first for first, _, _ in found[name]), 4)
        result[f"{name}_tokens_per_s"] = round(statistics.median(rate for _, rate, _ in found[name]), 1)
    result["first_token_ratio"] = round(result["busy_first_token_s"] / result["idle_first_token_s"], 2)
    result["unchanged"] = [text for _, _, text in found["idle"]] == [text for _, _, text in found["busy"]]
    if args.transcript is not None:
        args.transcript.write_text("\n".join(said) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0 if result["unchanged"] and result["first_token_ratio"] <= 2 else 1


if __name__ == "__main__":
    sys.exit(main())
