"""Draws the dashboard's panels from Prometheus' answers. Called by `watch_server.py`; this is not Grafana's drawing."""

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

COLUMNS = 4
MOST_LINES = 9  # lines of a panel that its legend names


def _bytes(value: float, _: object = None) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}"
        value /= 1024
    raise AssertionError


def _seconds(value: float, _: object = None) -> str:
    return f"{value * 1000:.0f} ms" if abs(value) < 1 else f"{value:.1f} s"


FORMATS: dict[str, Callable[..., str]] = {
    "bytes": _bytes,
    "s": _seconds,
    "percentunit": lambda value, _=None: f"{value * 100:.0f} %",
    "reqps": lambda value, _=None: f"{value:.2g}/s",
    "short": lambda value, _=None: f"{value:.3g}",
}


def _with_gaps(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points, with a break wherever a series was absent for more than two seconds."""
    result = points[:1]
    for (before, _), (at, value) in pairwise(points):
        if at - before > 2:
            result.append((before, math.nan))
        result.append((at, value))
    return result


def _legend(line: dict[str, Any]) -> str:
    return re.sub(r"{{(\w+)}}", lambda match: line["labels"].get(match.group(1), "?"), line["legend"])


def _stat(axes: Any, panel: dict[str, Any]) -> None:
    axes.axis("off")
    text = FORMATS[panel["unit"]](panel["lines"][-1]["points"][-1][1]) if panel["lines"] else "no data"
    axes.text(0.5, 0.45, text, ha="center", va="center", fontsize=20, transform=axes.transAxes)
    axes.set_title(panel["title"], fontsize=10)


def _graph(axes: Any, panel: dict[str, Any], start: float) -> None:
    for number, line in enumerate(panel["lines"]):
        times, values = zip(*_with_gaps(line["points"]), strict=True)
        label = _legend(line) if number < MOST_LINES else None
        axes.plot([at - start for at in times], values, linewidth=1, label=label)
    axes.set_title(panel["title"], fontsize=10)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FORMATS[panel["unit"]])
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if panel["lines"]:
        axes.legend(fontsize=6, ncols=2, loc="upper left", framealpha=0.6)
    else:
        axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes)


def draw(panels: Sequence[dict[str, Any]], path: Path, about: str) -> None:
    """Write one PNG with all panels. panels: as `watch_server.evaluate` returns them. about: the conditions, on top."""
    stats = [panel for panel in panels if panel["type"] == "stat"]
    graphs = [panel for panel in panels if panel["type"] != "stat"]
    num_rows = -(-len(graphs) // COLUMNS)
    figure = plt.figure(figsize=(16, 1.2 + 2.3 * num_rows), layout="constrained")
    figure.suptitle(f"Guanaco's dashboard, drawn from Prometheus' answers ({about}; seconds)", fontsize=11)
    top, below = figure.subfigures(2, 1, height_ratios=(1, 2.3 * num_rows))
    for axes, panel in zip(top.subplots(1, len(stats), squeeze=False)[0], stats, strict=True):
        _stat(axes, panel)
    start = min((line["points"][0][0] for panel in graphs for line in panel["lines"]), default=0.0)
    cells = below.subplots(num_rows, COLUMNS).flatten()
    for axes in cells[len(graphs) :]:
        axes.axis("off")
    for axes, panel in zip(cells, graphs, strict=False):
        _graph(axes, panel, start)
    figure.savefig(path, dpi=75)
    plt.close(figure)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(200)
    small.save(path, optimize=True)  # a third of the size, for a picture of thin lines
