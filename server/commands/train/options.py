"""The options of `guanaco train`, as typer reads them. Used by `main`; `run.py` checks them."""

from pathlib import Path
from typing import Annotated

import typer

_Device = Annotated[
    str, typer.Option(help="cpu, or cuda (never tried on a GPU; without one it is the CPU, with a note)")
]
_TooLong = Annotated[str, typer.Option(help="a longer row: skip, cut (whole exchanges at its end) or refuse")]


def train(
    ctx: typer.Context,
    data: Annotated[Path, typer.Option(metavar="FILE", help="conversations or texts to learn (docs/training.md)")],
    name: Annotated[str, typer.Option(metavar="NAME", help="the adapter's name")],
    validation_data: Annotated[Path | None, typer.Option(metavar="FILE", help="held-out rows of their own")] = None,
    format: Annotated[
        str | None, typer.Option(help="messages, alpaca, sharegpt, completion, text or guanaco (none: found)")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="the adapter's folder (none: NAME below --adapter-root or the cache)"),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="log and checkpoints (none: below the cache)")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint in --work")] = False,
    recipe: Annotated[str, typer.Option(help="default, or guanaco-2023")] = "default",
    rank: Annotated[int | None, typer.Option(min=1, help="LoRA rank (none: 16)")] = None,
    alpha: Annotated[int | None, typer.Option(min=1, help="LoRA alpha (none: twice the rank)")] = None,
    dropout: Annotated[float | None, typer.Option(min=0.0, max=0.95, help="LoRA dropout (none: 0.05)")] = None,
    targets: Annotated[str | None, typer.Option(help="projections, comma-separated (none: all of a layer)")] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="scale by alpha / sqrt(rank), not alpha / rank")] = False,
    epochs: Annotated[float | None, typer.Option(min=0.001, help="how often each row is learned (none: 3)")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="optimiser steps, instead of epochs")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="rows of one step (none: 4)")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="rows that are computed together; the others of a step are accumulated")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="(none: 1e-3 for a base below a billion weights, else 2e-4)")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine or constant (none: cosine)")] = None,
    warmup: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="share of the steps (none: 0.05)")] = None,
    train_on: Annotated[str | None, typer.Option(help="answers, or all tokens (none: answers)")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="most tokens of a row (none: 1024)")] = None,
    too_long: _TooLong = "skip",
    skip_refused: Annotated[bool, typer.Option("--skip-refused", help="leave faulty rows out, and count them")] = False,
    held_out: Annotated[
        float | None,
        typer.Option(min=0.0, max=0.9, help="share of rows that only measure (none: 0.1, at most 200 rows)"),
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=0, help="evaluations without a better loss before it stops; 0: never (none: 3)")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(min=1, help="steps (none: a tenth of them, at most 250)")] = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="steps between checkpoints (none: as --eval-every)")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="compute activations twice to save memory (none: from a billion weights on)")
    ] = None,
    group_by_length: Annotated[bool | None, typer.Option(help="rows of one length together (none: yes)")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="of everything random (none: 0)")] = None,
    train_dtype: Annotated[str, typer.Option(help="of the computation: float32 or bfloat16")] = "float32",
    train_device: _Device = "cpu",
    save_dtype: Annotated[str, typer.Option(help="of the adapter: float32, bfloat16 or float16")] = "float32",
    publish: Annotated[
        str | None, typer.Option(metavar="URL", help="a running server that gets the adapter (needs --admin-key)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON object on standard output")] = False,
) -> None:
    """Train an adapter on the base as it is served, from a file of conversations. Needs the extra `train`.

    Ctrl-C writes a checkpoint; --resume goes on from it. docs/training.md describes the data and the recipes.
    """
    from guanaco.server.commands.setting_options import settings_of
    from guanaco.server.commands.train.run import options_of, run_train

    raise SystemExit(run_train(settings_of(ctx), options_of(ctx.params)))
