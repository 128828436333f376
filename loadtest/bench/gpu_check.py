#!/usr/bin/env python3
"""Check the `triton` provider on a machine with an NVIDIA GPU, and time it.

    make install && .venv/bin/python loadtest/bench/gpu_check.py [--out loadtest/results] [--sizes 7b,13b,33b,65b]

Without a GPU the same flow runs in Triton's interpreter, on tiny shapes (about a minute): nothing about speed can be
learnt from that. Writes one JSON file and one Markdown table; the exit code is 1 if a check failed. Needs no network,
no model and no pytest; a part that raises is reported and the others still run.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests" / "importable")]
HAS_GPU = torch.cuda.is_available()
if HAS_GPU:
    os.environ.pop("TRITON_INTERPRET", None)
else:
    if shutil.which("nvidia-smi"):
        print(
            f"THERE IS A GPU, but torch {torch.__version__} can't use it: make install with a CUDA build of torch first"
        )
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is first imported
    from support.kernels import fast_interpreter, triton_patches

    triton_patches.install()
    fast_interpreter.install()

from gpu_kernels import RANKS, Check, attention_checks, layer_checks, product_checks  # noqa: E402
from gpu_models import BLOCK_SIZE, SIZES, Streams, random_adapters, random_model  # noqa: E402

from guanaco.kernels import load_ops  # noqa: E402
from guanaco.kernels.triton.ops import HAS_RUN  # noqa: E402
from guanaco.models.architectures.kv_cache import block_bytes  # noqa: E402
from support.server.answers import Answers, distance  # noqa: E402

DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
# The cases: real shapes on a GPU, and in the interpreter the smallest ones that take every path.
FULL: dict[str, Any] = {
    "shapes": [(4096, 4096), (11008, 4096), (1000, 320)],
    "rows": [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 65, 100, 512],
    "adapters": [0, 1, 3, 8],
    "layer": {"hidden": 4096, "head_dim": 128, "heads": 32, "kv_heads": 8},
    "attention": [(1, 1), (17, 5), (1000, 1000), (333, 100), (64, 64)],
    "groups": [1, 3, 4, 8],
    "head_dim": 128,
    "block_sizes": [8, 16, 64],
    "engine": {"num_seqs": 8, "max_tokens": 32, "prompt": 40, "ranks": RANKS},
    "speed": {
        "batches": [1, 2, 4, 8, 16, 32, 64],
        "prompt": 128,
        "steps": 48,
        "long_prompt": 1024,
        "long_streams": 16,
        "warm_up": 4,
    },
    "ranks": [(), (16,) * 8, (64,) * 8],
}
# Few steps of few rows: the interpreter takes longest over the kernel for 1 to 4 rows, which `products` tries alone.
TINY: dict[str, Any] = {
    "shapes": [(72, 128)],
    "rows": [1, 5, 65],
    "adapters": [2],
    "layer": {"hidden": 72, "head_dim": 16, "heads": 4, "kv_heads": 2},
    "attention": [(1, 1), (17, 5), (40, 9)],
    "groups": [1, 3],
    "head_dim": 16,
    "block_sizes": [8],
    "engine": {"num_seqs": 5, "max_tokens": 2, "prompt": 3, "ranks": (4, 8, 2)},
    "speed": {"batches": [5], "prompt": 2, "steps": 1, "long_prompt": 20, "long_streams": 5, "warm_up": 0},
    "ranks": [(8,)],
}


class Report:
    """The findings so far, written to the two files after each part."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.environment = _environment()
        self.stem = out / f"gpu-check-{self.environment.get('target', 'interpreter')}-{datetime.date.today()}"
        self.is_broken = False
        self.checks: list[dict[str, Any]] = []
        self.speed: list[dict[str, Any]] = []
        self.kernels: list[dict[str, Any]] = []
        self.failures: list[dict[str, str]] = []

    def add(self, part: str, check: Check) -> None:
        row = {"part": part, "what": check.what, "error": check.error, "allowed": check.allowed, "ok": check.ok}
        self.checks.append(row)
        if not check.ok:
            print(f"  WRONG: {part}: {check.what}: {check.error:.3g} (allowed: {check.allowed:.3g})", flush=True)

    def run(self, part: str, work: Callable[[], None]) -> None:
        """Run one part, and write the files. An error of it is recorded, and the next parts still run."""
        if self.is_broken:
            self.failures.append({"part": part, "error": "not tried: the GPU's context is lost (see above)"})
            return
        print(f"== {part}", flush=True)
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.failures.append({"part": part, "error": f"{type(error).__name__}: {error}"})
            if isinstance(error, torch.AcceleratorError):  # nothing runs in this process after an illegal access
                self.is_broken = True
        if HAS_GPU and not self.is_broken:
            torch.cuda.empty_cache()
        self.write()

    def write(self) -> None:
        parts = ("environment", "checks", "failures", "kernels", "speed")
        content = json.dumps({p: getattr(self, p) for p in parts}, indent=1) + "\n"
        self.stem.with_suffix(".json").write_text(content)
        self.stem.with_suffix(".md").write_text(markdown(self))

    @property
    def ok(self) -> bool:
        return not self.failures and all(check["ok"] for check in self.checks)


def _environment() -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "provider": HAS_RUN,
        "ran_on": "a GPU" if HAS_GPU else "Triton's interpreter, on the CPU",
    }
    import triton

    found["triton"] = triton.__version__
    if HAS_GPU:
        free, total = torch.cuda.mem_get_info(0)
        major, minor = torch.cuda.get_device_capability(0)
        found |= {"gpu": torch.cuda.get_device_name(0), "target": f"sm_{major}{minor}", "cuda": torch.version.cuda}
        found |= {"memory_bytes": total, "free_bytes": free, "bitsandbytes": find_spec("bitsandbytes") is not None}
    return found


def dtypes() -> list[torch.dtype]:
    """float32, which shows the kernels' own errors, and the 16-bit dtype that is served."""
    half = torch.bfloat16 if not HAS_GPU or torch.cuda.get_device_capability(0) >= (8, 0) else torch.float16
    return [torch.float32, half]


# ---- right?

# Allowed error of a logit, relative to the largest logit of its step, by the cache's dtype. The model is tiny, and its
# NF4 products are off by up to 4e-3. If that moves a number over the edge between two 8-bit codes, the error grows:
# 3e-2 was seen with int8 in 64 tokens of eight streams, in the interpreter. The tight checks are those of the ops.
ENGINE = {torch.float32: 1e-2, torch.int8: 1e-1, torch.float8_e4m3fn: 3e-1}


def check_kernels(report: Report, sizes: dict[str, Any]) -> None:
    for dtype in dtypes():
        name = str(dtype).removeprefix("torch.")
        ops = load_ops("triton", device=DEVICE, dtype=dtype)

        def products(name: str = name, ops: Any = ops) -> None:
            for check in product_checks(ops, sizes["shapes"], sizes["rows"], sizes["adapters"]):
                report.add(f"products, {name}", check)

        def layers(name: str = name, ops: Any = ops) -> None:
            for check in layer_checks(ops, **sizes["layer"]):
                report.add(f"layers, {name}", check)

        def attention(name: str = name, ops: Any = ops) -> None:
            arguments = (sizes["attention"], sizes["groups"], sizes["head_dim"], sizes["block_sizes"])
            for check in attention_checks(ops, *arguments):
                report.add(f"attention, {name}", check)

        report.run(f"products, {name}", products)
        report.run(f"layers, {name}", layers)
        report.run(f"attention, {name}", attention)


def check_engine(report: Report, sizes: dict[str, Any], folder: Path) -> None:
    """Compare a tiny model with adapters to the reference's logits, with and without graphs, for all cache dtypes."""
    engine = sizes["engine"]
    model = random_model("tiny", load_ops("triton", device=DEVICE, dtype=torch.float32))
    oracle = random_model("tiny", load_ops("reference", device=DEVICE, dtype=torch.float32))

    def answers(model: Any, cache: torch.dtype, *, graphs: bool = False) -> Answers:
        name = f"{model.ops.name}-{cache}-{graphs}"
        registry = random_adapters(folder / name, model, engine["ranks"])
        streams = Streams.over(
            model, registry, num_seqs=engine["num_seqs"], context=128, chunk=32, graphs=graphs, cache=cache
        )
        streams.keep_logits = True
        names: list[tuple[str, ...]] = [(), *((f"a{i}",) for i in range(len(engine["ranks"]))), ("a0", "a1")]
        for i, adapters in enumerate(names):
            streams.request(engine["prompt"] + i, engine["max_tokens"], *adapters)
        found = streams.answers()
        if streams.graphs is not None:
            report.add("engine", Check("CUDA graphs were made", 0.0 if streams.graphs.num_graphs else 1.0, 0.0))
        return found

    for cache in (model.ops.dtype, *model.ops.cache_dtypes):
        expected = answers(oracle, cache)
        for graphs in (False, True) if cache == model.ops.dtype or HAS_GPU else (True,):
            found = distance(answers(model, cache, graphs=graphs), expected)
            total = sum(len(steps) for steps in expected.values())
            what = f"{'graphs' if graphs else 'eager'}, cache of {cache}: largest error of a logit, {total} tokens"
            report.add(
                "engine", Check(f"{what}, {found.num_steps} before they part", found.largest_error, ENGINE[cache])
            )


# ---- fast?


def measure(report: Report, size: str, sizes: dict[str, Any], folder: Path) -> None:
    """Time one size of Guanaco: decode steps with and without graphs and adapters, prompts, and memory."""
    speed = sizes["speed"]
    ops = load_ops("triton", device=DEVICE, dtype=dtypes()[1])
    if HAS_GPU:
        torch.cuda.reset_peak_memory_stats()
    model = random_model(size, ops)
    report.speed.append(prompt_speed(model, size, speed, folder))
    context = speed["prompt"] + speed["steps"] + 8 + max(speed["batches"])
    batches = [count for count in speed["batches"] if kv_fits(model, count * context)]
    for ranks in sizes["ranks"]:
        if max(ranks, default=0) > 16 and size != "7b":
            continue  # eight adapters of rank 64 are 2.5 GB on the host for 7B, 13 GB for 65B
        registry = random_adapters(folder / f"{size}-{len(ranks)}-{max(ranks, default=0)}", model, ranks)
        names = [f"a{i}" for i in range(len(ranks))]
        for graphs in (False, True):
            streams = Streams.over(model, registry, num_seqs=max(batches), context=context, chunk=512, graphs=graphs)
            for count in batches:
                if speed["warm_up"]:  # compiles, captures
                    streams.step_seconds(count, speed["prompt"], speed["warm_up"], names)
                seconds = streams.step_seconds(count, speed["prompt"], speed["steps"], names)
                adapters = names[:count]
                num_bytes = step_bytes(model, count, speed["prompt"], registry, adapters)
                report.speed.append(
                    {
                        "size": size, "streams": count, "graphs": graphs, "adapters": len(adapters),
                        "rank": max(ranks, default=0), "step_ms": round(seconds * 1e3, 3),
                        "tokens_per_second": round(count / seconds, 1), "step_bytes": num_bytes,
                        "roofline_share": share(num_bytes, seconds),
                    }
                )  # fmt: skip
            del streams
    report.speed += [cache_speed(model, size, speed, folder, cache) for cache in (ops.dtype, *ops.cache_dtypes)]
    memory = torch.cuda.max_memory_allocated() if HAS_GPU else None
    report.speed.append({"size": size, "weights_bytes": model.weights_bytes, "peak_bytes": memory})


def cache_speed(model: Any, size: str, speed: dict[str, Any], folder: Path, cache: torch.dtype) -> dict[str, Any]:
    """Time decode steps with contexts so long that reading keys and values takes time, for one dtype of the cache."""
    count, prompt = speed["long_streams"], speed["long_prompt"]
    context = prompt + speed["steps"] + 8 + count
    row = {"size": size, "streams": count, "context": prompt, "cache": str(cache).removeprefix("torch.")}
    if not kv_fits(model, count * context):
        return row | {"skipped": "does not fit in the memory that is free"}
    registry = random_adapters(folder / f"{size}-{row['cache']}", model, ())
    streams = Streams.over(model, registry, num_seqs=count, context=context, chunk=512, graphs=HAS_GPU, cache=cache)
    if speed["warm_up"]:
        streams.step_seconds(count, prompt, speed["warm_up"])
    seconds = streams.step_seconds(count, prompt, speed["steps"])
    num_bytes = step_bytes(model, count, prompt, registry, [], cache)
    return row | {
        "step_ms": round(seconds * 1e3, 3),
        "step_bytes": num_bytes,
        "roofline_share": share(num_bytes, seconds),
    }


def prompt_speed(model: Any, size: str, speed: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The rate of a long prompt. The first of two is not counted."""
    registry, length = random_adapters(folder / f"{size}-none", model, ()), speed["long_prompt"]
    streams = Streams.over(model, registry, num_seqs=1, context=length + 8, chunk=512, graphs=False)
    streams.prompt_rate(length)
    return {"size": size, "prompt": length, "tokens_per_second": round(streams.prompt_rate(length), 1)}


def kv_fits(model: Any, num_tokens: int) -> bool:
    """Whether the keys and values of `num_tokens` tokens take less than half of the free memory."""
    return not HAS_GPU or num_tokens * _token_bytes(model) < torch.cuda.mem_get_info(0)[0] / 2


def _token_bytes(model: Any, cache: torch.dtype | None = None) -> float:
    return block_bytes(model.config, BLOCK_SIZE, cache or model.ops.dtype) / BLOCK_SIZE


def step_bytes(
    model: Any, count: int, context: int, registry: Any, adapters: list[str], cache: torch.dtype | None = None
) -> int:
    """Bytes that a decode step must read: weights without the embedding, each adapter once, and all keys and values."""
    config = model.config
    embedding = config.vocab_size * config.hidden_size * 2
    entries = [registry.resolve(name) for name in adapters]
    adapters_bytes = sum(entry.num_bytes for entry in entries)
    return int(model.weights_bytes - embedding + adapters_bytes + count * context * _token_bytes(model, cache))


def share(num_bytes: int, seconds: float) -> float | None:
    """The share of the card's bandwidth, 0 to 1; None without a GPU."""
    if not HAS_GPU:
        return None
    from guanaco.server.commands.bench.kernels_gpu import roofline_share

    return roofline_share(num_bytes, seconds)


def fits(size: str) -> bool:
    """Whether the free memory holds 1.25 times the weights and 2 GiB."""
    if not HAS_GPU:
        return True
    from guanaco.server.commands.doctor_fit import weights_bytes

    return weights_bytes(SIZES[size]) * 1.25 + (2 << 30) < torch.cuda.mem_get_info(0)[0]


def time_kernels(report: Report) -> None:
    """Time each product alone, beside bitsandbytes and a 16-bit product."""
    if not HAS_GPU:
        return
    from guanaco.server.commands.bench.kernels_gpu import product_times

    report.kernels = product_times()


# ---- the report


def markdown(report: Report) -> str:
    env = report.environment
    lines = [f"# Guanaco's Triton provider: {env.get('gpu', env['ran_on'])}", ""]
    lines += [f"- {key}: {value}" for key, value in env.items()]
    wrong = [check for check in report.checks if not check["ok"]]
    lines += ["", f"{len(report.checks)} checks, {len(wrong)} wrong, {len(report.failures)} parts that raised.", ""]
    lines += ["| part | checks | largest error | allowed |", "|---|---|---|---|"]
    for part in dict.fromkeys(check["part"] for check in report.checks):
        rows = [check for check in report.checks if check["part"] == part]
        errors = [row["error"] for row in rows]
        lines.append(f"| {part} | {len(rows)} | {max(errors):.2g} | {max(row['allowed'] for row in rows):.2g} |")
    lines += [f"\n**{failure['part']} raised** {failure['error']}" for failure in report.failures]
    for title, rows in (("Speed", report.speed), ("Kernels", report.kernels)):
        keys = list(dict.fromkeys(key for row in rows for key in row))
        if rows:
            lines += ["", f"## {title}", "", f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
            lines += [
                f"| {' | '.join('' if row.get(key) is None else str(row[key]) for key in keys)} |" for row in rows
            ]
    if not HAS_GPU:
        lines += ["", "Nothing here was timed on a GPU: the interpreter's seconds say nothing."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results", help="folder for the two files")
    parser.add_argument("--sizes", default="7b,13b,33b,65b" if HAS_GPU else "tiny", help=f"of {', '.join(SIZES)}")
    args = parser.parse_args(arguments)
    sizes = FULL if HAS_GPU else TINY
    report = Report(args.out)
    with tempfile.TemporaryDirectory(prefix="guanaco-gpu-") as name:
        folder = Path(name)
        check_kernels(report, sizes)
        report.run("engine", lambda: check_engine(report, sizes, folder))
        report.run("kernels alone", lambda: time_kernels(report))
        for size in args.sizes.split(","):
            if fits(size):
                report.run(f"speed, {size}", lambda size=size: measure(report, size, sizes, folder))  # type: ignore[misc]
            else:
                report.speed.append({"size": size, "skipped": "does not fit in the memory that is free"})
    report.write()
    print(f"{'all is right' if report.ok else 'SOMETHING IS WRONG'}: {report.stem}.json, {report.stem}.md")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
