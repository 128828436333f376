#!/usr/bin/env python3
"""Time this server's engine and its peers on one checkpoint, in turns, because the machine's speed may drift.

Medians, the ratios within each round, and read bandwidth go to a file with their conditions.

    .venv/bin/python loadtest/bench/compare_peers.py --model M1B --gguf M1B.gguf --adapters A16:8 \\
      --peers PEERS/bin/python --bench-dir DRIVERS

--bench-dir names the folder with the drivers of llama.cpp, transformers and mistral.rs, which are not in this
repository (`peer_NAME.py`: each prints one JSON line with pp512, tg1, …), and with the bandwidth meter, compiled as
`bandwidth`. Leave out a peer with --without NAME.
"""

import argparse
import datetime
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from guanaco.server.bootstrap.machine import look

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
OURS, WITH_ADAPTERS = "guanaco", "guanaco, an adapter per stream"
Samples = dict[str, dict[str, list[float]]]


def engines(args: argparse.Namespace) -> dict[str, list[str]]:
    """Name → command. Each prints one JSON object as its last line."""
    guanaco = [str(Path(sys.executable).parent / "guanaco"), "bench", "engine", "--model", args.model, "--json"]
    guanaco += ["--threads", str(args.threads)]
    commands = {OURS: guanaco}
    if args.adapters:
        commands[WITH_ADAPTERS] = [*guanaco, "--adapters", args.adapters, "--batches", "8"]
    commands["guanaco, context 1900"] = [*guanaco, "--batches", "1", "--context", "1900", "--prompt", "64"]
    peers, bench = args.peers, Path(args.bench_dir)
    if args.gguf:
        commands["llama.cpp IQ4_NL"] = [peers, str(bench / "peer_llamacpp.py"), args.gguf]
        commands["llama.cpp IQ4_NL"] += ["--threads", str(args.threads)]
    commands["transformers + bitsandbytes"] = [peers, str(bench / "peer_hf_bnb.py"), args.model, "--batches", "1"]
    commands["mistral.rs Q4K"] = [peers, str(bench / "peer_mistralrs.py"), args.model]
    commands["dequantise, then multiply (2023)"] = [peers, str(HERE / "peer_dequantize.py"), args.model]
    return {name: command for name, command in commands.items() if not any(name.startswith(w) for w in args.without)}


def run(command: list[str]) -> dict[str, float] | str:
    """The numbers in a command's last JSON line, or its error as a text."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/tmp")
    for line in reversed(done.stdout.strip().splitlines()):
        if line.startswith("{"):
            return {key: value for key, value in json.loads(line).items() if re.fullmatch(r"(pp|tg)\d+", key)}
    return f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['nothing on standard error'])[-1]}"


def bandwidth(args: argparse.Namespace) -> float | None:
    meter = Path(args.bandwidth or Path(args.bench_dir) / "bandwidth")
    if not meter.exists():
        return None
    return float(subprocess.run([str(meter)], capture_output=True, text=True, check=True).stdout)


def step_bytes(model: Path) -> int:
    """Bytes that one decode step of one stream must read: NF4 projections with our scales, and a 16-bit head."""
    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv = config.get("head_dim", hidden // heads) * config["num_key_value_heads"]
    q = config.get("head_dim", hidden // heads) * heads
    layer = 2 * q * hidden + 2 * kv * hidden + 3 * hidden * config["intermediate_size"]
    return int(config["num_hidden_layers"] * layer * 34 / 64) + config["vocab_size"] * hidden * 2


def table(samples: Samples) -> tuple[str, dict[str, dict[str, float]]]:
    """(Markdown table of medians and our ratios to each engine, the ratios). A ratio is the median over the rounds."""
    keys = sorted({k for s in samples.values() for k in s}, key=lambda k: (k[:2] != "pp", int(k[2:])))
    ratios: dict[str, dict[str, float]] = defaultdict(dict)
    lines = ["| tokens/s (ours ÷ theirs) | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, values in samples.items():
        cells = []
        for key in keys:
            if key not in values:
                cells.append("–")
                continue
            text = f"{statistics.median(values[key]):.1f}"
            mine = samples[OURS].get(key)
            if name != OURS and mine:
                ratios[name][key] = round(statistics.median(a / b for a, b in zip(mine, values[key], strict=False)), 3)
                text += f" ({ratios[name][key]:.2f}×)"
            cells.append(text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines), ratios


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="directory; absolute, since commands run in /tmp")
    p.add_argument("--gguf", help="the same model for llama.cpp, output head in 16 bit")
    p.add_argument("--adapters", help="DIR:N of PEFT adapters DIR/a0 …")
    p.add_argument("--peers", default=sys.executable, help="Python with the peers installed")
    p.add_argument("--bench-dir", required=True, help="where the peers' drivers are")
    p.add_argument("--bandwidth", help="the compiled bandwidth meter")
    p.add_argument("--without", action="append", default=[], metavar="NAME")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path, default=HERE.parent / "results")
    args = p.parse_args()
    commands = engines(args)
    samples: Samples = {name: defaultdict(list) for name in commands}
    failures: dict[str, str] = {}
    read: list[float] = []
    started = datetime.datetime.now(datetime.UTC)
    for number in range(args.rounds):
        if (rate := bandwidth(args)) is not None:
            read.append(rate)
        for name, command in commands.items():
            result = run(command)
            if isinstance(result, str):
                failures[name] = result
                print(f"round {number + 1}: {name} FAILED, {result}", file=sys.stderr, flush=True)
                continue
            for key, value in result.items():
                samples[name][key].append(value)
            print(f"round {number + 1}: {name} {result}", file=sys.stderr, flush=True)
    text, ratios = table(samples)
    print(text)
    num_bytes = step_bytes(Path(args.model))
    share = None
    if read and samples[OURS].get("tg1"):
        shares = [rate * num_bytes / 1e9 / meter for rate, meter in zip(samples[OURS]["tg1"], read, strict=False)]
        share = round(statistics.median(shares), 3)
        print(f"read bandwidth {read} GB/s; tg1 reads {num_bytes / 1e6:.0f} MB a step: {share:.0%} of it")
    result = {
        "date": started.isoformat(timespec="seconds"),
        "command": "compare_peers.py " + shlex.join(sys.argv[1:]),
        "machine": f"{look().cpu_name}, Python {platform.python_version()}",
        "threads": args.threads,
        "read_bandwidth_gb_s": read,
        "step_bytes": num_bytes,
        "tg1_share_of_bandwidth": share,
        "ratios": ratios,
        "failures": failures,
        "samples": samples,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"compare-{Path(args.model).name}-{started:%Y-%m-%d}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
