"""The options of `guanaco train`, as typer reads them. Used by `main`; `run.py` checks them."""

from pathlib import Path
from typing import Annotated

import typer

_Device = Annotated[
    str, typer.Option(help="cpu, or cuda (never tried on a GPU; without one it is the CPU, with a note)")
]
_TooLong = Annotated[str, typer.Option(help="a longer row: skip, cut (whole exchanges at its end) or refuse")]
_Alpha = Annotated[int | None, typer.Option(min=1, help="LoRA alpha (none: the recipe's; default twice the rank)")]
_Dropout = Annotated[
    float | None, typer.Option(min=0.0, max=0.95, help="LoRA dropout (none: the recipe's; default 0.05)")
]
_Epochs = Annotated[
    float | None, typer.Option(min=0.001, help="how often each row is learned (none: the recipe's; default 3)")
]
_BatchSize = Annotated[int | None, typer.Option(min=1, help="rows of one step (none: the recipe's; default 4)")]
_MicroBatch = Annotated[
    int | None,
    typer.Option(
        min=1, help="rows computed together; the others of a step are accumulated (none: the recipe's; default 4)"
    ),
]
_LearningRate = Annotated[
    float | None,
    typer.Option(min=0.0, help="(none: the recipe's; default 1e-3 below a billion weights, else 2e-4)"),
]
_Schedule = Annotated[str | None, typer.Option(help="cosine or constant (none: the recipe's; default cosine)")]
_Warmup = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="share of the steps (none: the recipe's; default 0.05)")
]
_TrainOn = Annotated[str | None, typer.Option(help="answers, or all tokens (none: the recipe's; default answers)")]
_MaxLength = Annotated[int | None, typer.Option(min=2, help="most tokens of a row (none: the recipe's; default 1024)")]
_HeldOut = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=0.9, help="share of rows that only measure (none: the recipe's; default 0.1, at most 200 rows)"
    ),
]
_Patience = Annotated[
    int | None,
    typer.Option(
        min=0, help="evaluations without a better loss before it stops; 0: never (none: the recipe's; default 3)"
    ),
]
_EvalEvery = Annotated[
    int | None, typer.Option(min=1, help="steps (none: the recipe's; default a tenth of them, at most 250)")
]
_SaveEvery = Annotated[
    int | None, typer.Option(min=1, help="steps between checkpoints (none: the recipe's; default as --eval-every)")
]
_GradientCheckpointing = Annotated[
    bool | None,
    typer.Option(
        help="compute activations twice to save memory (none: the recipe's; default from a billion weights on)"
    ),
]
_Seed = Annotated[int | None, typer.Option(min=0, help="of everything random (none: the recipe's; default 0)")]


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
    recipe: Annotated[
        str, typer.Option(help="default, or guanaco-2023: docs/training.md has their numbers")
    ] = "default",
    rank: Annotated[int | None, typer.Option(min=1, help="LoRA rank (none: the recipe's; default 16)")] = None,
    alpha: _Alpha = None,
    dropout: _Dropout = None,
    targets: Annotated[str | None, typer.Option(help="projections, comma-separated (none: all of a layer)")] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="scale by alpha / sqrt(rank), not alpha / rank")] = False,
    epochs: _Epochs = None,
    steps: Annotated[int | None, typer.Option(min=1, help="optimiser steps, instead of epochs")] = None,
    batch_size: _BatchSize = None,
    micro_batch: _MicroBatch = None,
    learning_rate: _LearningRate = None,
    schedule: _Schedule = None,
    warmup: _Warmup = None,
    train_on: _TrainOn = None,
    max_length: _MaxLength = None,
    too_long: _TooLong = "skip",
    skip_refused: Annotated[bool, typer.Option("--skip-refused", help="leave faulty rows out, and count them")] = False,
    held_out: _HeldOut = None,
    patience: _Patience = None,
    eval_every: _EvalEvery = None,
    save_every: _SaveEvery = None,
    gradient_checkpointing: _GradientCheckpointing = None,
    group_by_length: Annotated[bool | None, typer.Option(help="rows of one length together (none: yes)")] = None,
    seed: _Seed = None,
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
