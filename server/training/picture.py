"""The loss picture: training loss and held-out loss by step, as a PNG file. Used by `job`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_losses(lines: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the losses in the lines of a `train.jsonl` to a PNG file at `path`. No display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], label="training", linewidth=1)
    held_out = [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]
    if held_out:
        axes.plot([step for step, _ in held_out], [loss for _, loss in held_out], "o-", label="held-out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per learned token")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
