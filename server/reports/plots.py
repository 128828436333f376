"""Curves and stacked areas over two axes, as inline SVG. Every text in them is escaped."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

NUM_COLOURS = 8
_WIDTH, _LEFT, _RIGHT, _TOP, _HEIGHT = 800, 70, 20, 12, 300
_PLOT = _WIDTH - _LEFT - _RIGHT
_LEGEND_ROW, _LETTER = 20, 8.4  # pixels

Curve = tuple[str, Sequence[tuple[float, float]]]  # name, points


@dataclass(frozen=True)
class Axis:
    """From low to high; a logarithmic one needs low above 0."""

    title: str
    low: float
    high: float
    is_log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high one."""
        value = min(max(value, self.low), self.high)
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values, about six; powers of ten with 2 and 5 on a logarithmic axis."""
        if self.is_log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first <= 3 else (1,)
            found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
            return [t for t in found if self.low <= t <= self.high * 1.000001]
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * f for f in (1, 2, 5, 10) if power * f >= rough)
        return [step * i for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def axis_for(title: str, values: Sequence[float], *, log: bool = False) -> Axis:
    """An axis that holds all values: from 0, or logarithmic from the smallest above 0."""
    above = [v for v in values if v > 0 and math.isfinite(v)]
    high = max(above, default=1.0)
    if not log:
        return Axis(title, 0.0, high * 1.05)
    low = min(above, default=0.1)
    return Axis(title, low / 1.1, max(high, low * 2) * 1.1, is_log=True)


def curves(
    series: Sequence[Curve],
    *,
    x: Axis,
    y: Axis,
    title: str,
    dots: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """A curve for each series. marks: vertical dashed lines with a word at their top."""
    parts = _axes(x, y)
    for at, word in marks:
        px = _x(x, at)
        parts.append(f'<line class="equal" x1="{px}" y1="{_TOP}" x2="{px}" y2="{_TOP + _HEIGHT}"/>')
        side, shift = ("end ", -5) if x.share(at) > 0.5 else ("", 5)
        parts.append(f'<text class="{side}axis" x="{px + shift}" y="{_TOP + 12}">{escape(word)}</text>')
    for i, (_, points) in enumerate(series):
        colour = i % NUM_COLOURS
        places = [(_x(x, px), _y(y, py)) for px, py in points]
        parts.append(f'<polyline class="curve s{colour}" points="{_points(places)}"/>')
        if dots:
            parts += [f'<circle class="f{colour}" cx="{px}" cy="{py}" r="4"/>' for px, py in places]
    return _svg(parts, [name for name, _ in series], title)


def areas(
    xs: Sequence[float], series: Sequence[tuple[str, Sequence[float]]], *, x: Axis, y_title: str, title: str
) -> str:
    """Areas on top of each other: the upper edge is the sum."""
    sums = [sum(values[i] for _, values in series) for i in range(len(xs))]
    y = axis_for(y_title, sums)
    parts = _axes(x, y)
    floor = [0.0] * len(xs)
    for i, (_, values) in enumerate(series):
        top = [a + b for a, b in zip(floor, values, strict=True)]
        upper = [(_x(x, t), _y(y, v)) for t, v in zip(xs, top, strict=True)]
        lower = [(_x(x, t), _y(y, v)) for t, v in zip(xs, floor, strict=True)]
        parts.append(f'<polygon class="area f{i % NUM_COLOURS}" points="{_points([*upper, *reversed(lower)])}"/>')
        floor = top
    return _svg(parts, [name for name, _ in series], title)


def cumulative(values: Sequence[float], most_points: int = 200) -> list[tuple[float, float]]:
    """(value, percent of the values that are at most that), thinned to a few hundred points."""
    ordered = sorted(values)
    count = len(ordered)
    step = max(1, count // most_points)
    chosen = [*range(0, count, step), *range(max(0, count - 20), count)]  # the slow end in full
    return [(ordered[i], 100 * (i + 1) / count) for i in sorted(set(chosen))]


def _axes(x: Axis, y: Axis) -> list[str]:
    bottom = _TOP + _HEIGHT
    parts = []
    for tick in y.ticks():
        py = _y(y, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{py}" x2="{_LEFT + _PLOT}" y2="{py}"/>')
        parts.append(f'<text class="axis end" x="{_LEFT - 8}" y="{py + 4}">{_number(tick)}</text>')
    for tick in x.ticks():
        px = _x(x, tick)
        parts.append(f'<line class="grid" x1="{px}" y1="{_TOP}" x2="{px}" y2="{bottom}"/>')
        parts.append(f'<text class="axis middle" x="{px}" y="{bottom + 18}">{_number(tick)}</text>')
    parts.append(f'<text class="axis end" x="{_LEFT + _PLOT}" y="{bottom + 36}">{escape(x.title)}</text>')
    parts.append(f'<text class="axis" x="{_LEFT}" y="{bottom + 36}">↑ {escape(y.title)}</text>')
    return parts


def _svg(parts: Sequence[str], names: Sequence[str], title: str) -> str:
    base = _TOP + _HEIGHT + 62
    legend, px, row = [], float(_LEFT), 0
    for i, name in enumerate(names):
        short = name if len(name) <= 40 else name[:39] + "…"
        width = 26 + _LETTER * len(short)
        if px + width > _WIDTH and px > _LEFT:
            px, row = float(_LEFT), row + 1
        y = base + row * _LEGEND_ROW
        legend.append(f'<rect class="f{i % NUM_COLOURS}" x="{px:.0f}" y="{y - 10}" width="12" height="12" rx="2"/>')
        legend.append(f'<text x="{px + 18:.0f}" y="{y}">{escape(short)}</text>')
        px += width
    height = base + row * _LEGEND_ROW + 12 if names else base - 14
    inner = "\n".join([*parts, *legend])
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">\n{inner}\n</svg>'


def _x(axis: Axis, value: float) -> float:
    return round(_LEFT + _PLOT * axis.share(value), 1)


def _y(axis: Axis, value: float) -> float:
    return round(_TOP + _HEIGHT * (1 - axis.share(value)), 1)


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{px},{py}" for px, py in places)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{round(value, 6):g}"
