"""Pictures of a report as inline SVG: intervals on a scale, and bars. Every text in them is escaped."""

from collections.abc import Sequence
from html import escape

_WIDTH, _ROW = 800, 30
_MOST_CHARACTERS = 30  # of a label and of a value
_CHARACTER = 7.7  # width of one in the page's font, at most on average


def intervals(
    rows: Sequence[tuple[str, float, float, float, str]], *, low: float, high: float, line: float, title: str
) -> str:
    """One row for each (label, value, low end, high end, text at the right); a line at `line`, which means "equal"."""
    span = high - low or 1.0
    left, plot = _columns([row[0] for row in rows], [row[4] for row in rows])

    def x(value: float) -> float:
        return round(left + plot * (min(max(value, low), high) - low) / span, 1)

    bottom = _ROW * len(rows) + 8
    parts = [f'<line class="equal" x1="{x(line)}" y1="2" x2="{x(line)}" y2="{bottom}"/>']
    for i, (label, value, start, end, text) in enumerate(rows):
        y = _ROW * i + _ROW // 2 + 4
        parts += [
            _label(label, left, y),
            f'<line class="bar" x1="{x(start)}" y1="{y}" x2="{x(end)}" y2="{y}"/>',
            f'<circle class="dot" cx="{x(value)}" cy="{y}" r="5"/>',
            _value(text, left + plot, y),
        ]
    parts.append(f'<text class="axis" x="{left}" y="{bottom + 16}">{low:g}</text>')
    parts.append(f'<text class="axis end" x="{left + plot}" y="{bottom + 16}">{high:g}</text>')
    return _svg(parts, bottom + 22, title)


def bars(rows: Sequence[tuple[str, float, str]], *, title: str) -> str:
    """One bar from zero for each (label, value, text at the right)."""
    most = max((value for _, value, _ in rows), default=0) or 1.0
    left, plot = _columns([row[0] for row in rows], [row[2] for row in rows])
    parts = []
    for i, (label, value, text) in enumerate(rows):
        y = _ROW * i + _ROW // 2 + 4
        width = round(plot * max(0.0, value) / most, 1)
        parts += [
            _label(label, left, y),
            f'<rect class="fill" x="{left}" y="{y - 7}" width="{width}" height="14" rx="2"/>',
            _value(text, left + plot, y),
        ]
    return _svg(parts, _ROW * len(rows) + 10, title)


def _columns(labels: Sequence[str], values: Sequence[str]) -> tuple[int, int]:
    """Where the plot begins, and its width: labels and values take what the longest of them needs."""
    needed = [
        round(_CHARACTER * min(_MOST_CHARACTERS, max(map(len, texts), default=0))) + 16 for texts in (labels, values)
    ]
    return needed[0], _WIDTH - sum(needed)


def _label(text: str, right: int, y: int) -> str:
    short = text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
    return f'<text class="label" x="{right - 12}" y="{y + 5}">{escape(short)}</text>'


def _value(text: str, left: int, y: int) -> str:
    return f'<text class="value" x="{left + 12}" y="{y + 5}">{escape(text)}</text>'


def _svg(parts: Sequence[str], height: int, title: str) -> str:
    inner = "\n".join(parts)
    picture = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">\n{inner}\n</svg>'
    return f'<div class="scroll" tabindex="0">{picture}</div>'
