#!/usr/bin/env python3
"""Computes the memory and the time of `--recipe guanaco-2023` for the four sizes of LLaMA. Nothing is measured.

    cost.py [--cpu-flops 180e9] [--gpu-flops 312e12] [--cpu-share 0.65] [--gpu-share 0.3]

Memory, in GB: weights of the projections (4 bits and a 16-bit scale for 64 of them), embedding and head (16 bits), the
adapter (rank 64; four float32 numbers a parameter: itself, its gradient, AdamW's two), and activations of one sequence
of 513 tokens with checkpointing: the input of every layer, and all of one layer, in float32 on a CPU and bfloat16 on a
GPU, with 160 MiB for logits and a decoded weight. Time: 6 FLOP for each weight and token, 8 for each parameter of the
adapter, at a share of the machine's rate. The recipe's 1,875 steps of 16 rows are at most 15.4 million tokens.
"""

import argparse

SHAPES = {"7B": (32, 4096, 11008), "13B": (40, 5120, 13824), "33B": (60, 6656, 17920), "65B": (80, 8192, 22016)}
VOCABULARY, RANK, TOKENS, ALL_TOKENS = 32000, 64, 513, 1875 * 16 * 513


def cost(layers: int, hidden: int, inner: int) -> tuple[float, float, float, float, float]:
    """(GB of the base, GB of adapter and optimiser, GB of activations in float32, in bfloat16, FLOP a token)."""
    weights = layers * (4 * hidden**2 + 3 * hidden * inner)
    adapter = layers * RANK * (8 * hidden + 3 * (hidden + inner))
    base = weights * (0.5 + 2 / 64) + 2 * VOCABULARY * hidden * 2
    kept = TOKENS * (layers * hidden + 20 * hidden + 8 * inner)  # numbers
    buffers = 160 * 2**20
    flop = 6 * (weights + VOCABULARY * hidden) + 8 * adapter
    return base / 1e9, adapter * 16 / 1e9, (kept * 4 + buffers) / 1e9, (kept * 2 + buffers) / 1e9, float(flop)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("cpu-flops", 180e9), ("gpu-flops", 312e12), ("cpu-share", 0.65), ("gpu-share", 0.3)):
        p.add_argument(f"--{name}", type=float, default=default)
    args = p.parse_args()
    heads = (
        "",
        "base",
        "adapter, optimiser",
        "all on a CPU",
        "all on a GPU",
        "CPU",
        "recipe on it",
        "GPU",
        "recipe on it",
    )
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for name, shape in SHAPES.items():
        base, adapter, wide, narrow, flop = cost(*shape)
        rates = args.cpu_flops * args.cpu_share / flop, args.gpu_flops * args.gpu_share / flop
        days, hours = ALL_TOKENS / rates[0] / 86400, ALL_TOKENS / rates[1] / 3600
        sizes = (base, adapter, base + adapter + wide, base + adapter + narrow)
        times = (f"{rates[0]:.1f} tokens/s", f"{days:,.0f} days", f"{rates[1]:,.0f} tokens/s", f"{hours:.1f} h")
        print("| " + " | ".join((name, *(f"{size:.1f} GB" for size in sizes), *times)) + " |")


if __name__ == "__main__":
    main()
