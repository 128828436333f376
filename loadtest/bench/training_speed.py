#!/usr/bin/env python3
"""Compare tokens a second of QLoRA training, ours and PEFT with bitsandbytes, on the same bytes, data and recipe.

    training_speed.py [MODEL] [--batch 4] [--length 128] [--threads 2] [--checkpointing] [--dtype float32] [--rounds 5]

MODEL is a directory of safetensors; the demo model by default. Both train on one NF4 checkpoint: MODEL itself, or what
`guanaco quantize` makes of a dense one. Their steps alternate in one process, so that a slower minute of the machine
affects both; the first step of each is not counted. Each loss is computed as in real use: ours by the training loop of
`guanaco train`, theirs by the model of transformers.

The floor is the time of the products alone: 4 FLOP for each weight and token (6 with checkpointing, which computes the
forward pass twice) at the rate of torch's matrix product of that dtype, measured between the steps. --cpu-time counts
the processor time of all threads instead of the clock's, for a machine that does other things too. One JSON line at the
end.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import peft
import torch

from guanaco.models.loading.checkpoint import open_checkpoint
from guanaco.models.loading.demo import ensure_demo_model
from guanaco.models.loading.quantize import quantize_checkpoint
from guanaco.server.config import Settings
from guanaco.server.training.loop import summed_loss
from guanaco.server.training.quantized import load_base

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("model", nargs="?", type=Path)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--length", type=int, default=128)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--checkpointing", action="store_true")
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--cpu-time", action="store_true", help="for a busy machine")
    p.add_argument("--only", choices=("ours", "peer"), help="for a profile of one")
    return p.parse_args()


def nf4_checkpoint(source: Path, destination: Path) -> Path:
    """`source` if it is already in NF4, as the demo is; otherwise its quantised form, written to `destination`."""
    with closing(open_checkpoint(source)) as checkpoint:
        is_quantized = checkpoint.is_quantized
    if not is_quantized:
        quantize_checkpoint(source, destination)
    return source if is_quantized else destination


def peer_base(path: Path, dtype: torch.dtype) -> Any:
    """The NF4 checkpoint with bitsandbytes' layers, as PEFT's users train on it."""
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, quantization_config=quantisation, device_map="cpu", attn_implementation="sdpa"
    )
    # Tensors of a 16-bit checkpoint stay in 16 bits, and so do decoded weights. A quantised checkpoint sets its own
    # compute dtype, bfloat16, whatever the call above asks for. Here everything gets one dtype.
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.weight.quant_state.dtype = dtype
            module.compute_dtype, module.compute_type_is_set = dtype, True
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False)


def our_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The mean loss of next tokens, as `guanaco train` computes it."""
    total, count = summed_loss(
        model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    )
    return total / count


def their_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The mean loss of next tokens, as transformers computes it."""
    loss: torch.Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


def trainer(
    base: Any, args: argparse.Namespace, tokens: torch.Tensor, loss_of: Callable[[Any, torch.Tensor], torch.Tensor]
) -> Callable[[], float]:
    """A function that makes one optimiser step on the batch and returns its loss. tokens: int64 [batch, length]."""
    config = peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config)
    if args.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def seconds(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    started = clock()
    work()
    return clock() - started


def flop_rate(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """FLOP a second of one large matrix product, the best of three."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    return 2 * 2048**3 / min(seconds(lambda: torch.mm(a, b), clock) for _ in range(3))


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype]
    settings = Settings()
    source = args.model or ensure_demo_model(settings.cache_dir, offline=settings.offline)
    with tempfile.TemporaryDirectory() as folder:
        nf4, cache = nf4_checkpoint(source, Path(folder) / "nf4"), Path(folder) / "cache"
        for _ in range(2):  # the first call packs the weights, the second maps the packed file, as beside a server
            base = load_base(nf4, cache_dir=cache, dtype=dtype, threads=args.threads)
        weights = sum(m.in_features * m.out_features for m in base.modules() if isinstance(m, torch.nn.Linear))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, base.config.vocab_size, (args.batch, args.length), generator=generator)
        steps = {}
        if args.only != "peer":
            steps["ours"] = trainer(base, args, tokens, our_loss)
        if args.only != "ours":
            steps["peer"] = trainer(peer_base(nf4, dtype), args, tokens, their_loss)
        print(json.dumps(compare(steps, args, weights, tokens.numel(), dtype)))


def compare(
    steps: dict[str, Callable[[], float]], args: argparse.Namespace, weights: int, tokens: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The result as JSON data. Times are medians over the rounds; so are shares and the ratio within each round."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    first = {name: step() for name, step in steps.items()}
    flop = (6 if args.checkpointing else 4) * weights * tokens
    floors: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        floors.append(flop / flop_rate(dtype, clock))
        for name, step in steps.items():
            times[name].append(seconds(step, clock))
    result: dict[str, Any] = {
        "model": str(args.model or "demo"), "dtype": args.dtype, "batch": args.batch, "length": args.length,
        "threads": args.threads, "rank": args.rank, "checkpointing": args.checkpointing, "weights": weights,
        "cpu_time": args.cpu_time,
        "gflops": round(flop / statistics.median(floors) / 1e9, 1),
        "floor_tokens_per_second": round(tokens / statistics.median(floors), 1),
    }  # fmt: skip
    for name, mine in times.items():
        shares = [floor / t for floor, t in zip(floors, mine, strict=True)]
        result[f"{name}_tokens_per_second"] = round(tokens / statistics.median(mine), 1)
        result[f"{name}_share_of_floor"] = round(statistics.median(shares), 3)
        result[f"{name}_first_loss"] = round(first[name], 4)
    if len(times) == 2:
        ratios = [peer / ours for ours, peer in zip(times["ours"], times["peer"], strict=True)]
        result["ours_over_peer"] = round(statistics.median(ratios), 3)
    return result


if __name__ == "__main__":
    main()
