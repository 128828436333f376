"""Pictures of a report as inline SVG: intervals on a scale, and bars. Every text in them is escaped."""

from collections.abc import Sequence
from html import escape

_WIDTH, _LABEL, _VALUE, _ROW = 800, 230, 210, 30
_PLOT = _WIDTH - _LABEL - _VALUE


def intervals(
    rows: Sequence[tuple[str, float, float, float, str]], *, low: float, high: float, line: float, title: str
) -> str:
    """One row for each (label, value, low end, high end, text at the right); a line at `line`, which means "equal"."""
    span = high - low or 1.0

    def x(value: float) -> float:
        return round(_LABEL + _PLOT * (min(max(value, low), high) - low) / span, 1)

    bottom = _ROW * len(rows) + 8
    parts = [f'<line class="equal" x1="{x(line)}" y1="2" x2="{x(line)}" y2="{bottom}"/>']
    for i, (label, value, start, end, text) in enumerate(rows):
        y = _ROW * i + _ROW // 2 + 4
        parts += [
            _label(label, y),
            f'<line class="bar" x1="{x(start)}" y1="{y}" x2="{x(end)}" y2="{y}"/>',
            f'<circle class="dot" cx="{x(value)}" cy="{y}" r="5"/>',
            _value(text, y),
        ]
    parts.append(f'<text class="axis" x="{_LABEL}" y="{bottom + 16}">{low:g}</text>')
    parts.append(f'<text class="axis end" x="{_LABEL + _PLOT}" y="{bottom + 16}">{high:g}</text>')
    return _svg(parts, bottom + 22, title)


def bars(rows: Sequence[tuple[str, float, str]], *, title: str) -> str:
    """One bar from zero for each (label, value, text at the right)."""
    most = max((value for _, value, _ in rows), default=0) or 1.0
    parts = []
    for i, (label, value, text) in enumerate(rows):
        y = _ROW * i + _ROW // 2 + 4
        width = round(_PLOT * max(0.0, value) / most, 1)
        parts += [
            _label(label, y),
            f'<rect class="fill" x="{_LABEL}" y="{y - 7}" width="{width}" height="14" rx="2"/>',
            _value(text, y),
        ]
    return _svg(parts, _ROW * len(rows) + 10, title)


def _label(text: str, y: int) -> str:
    short = text if len(text) <= 30 else text[:29] + "…"
    return f'<text class="label" x="{_LABEL - 12}" y="{y + 5}">{escape(short)}</text>'


def _value(text: str, y: int) -> str:
    return f'<text class="value" x="{_LABEL + _PLOT + 12}" y="{y + 5}">{escape(text)}</text>'


def _svg(parts: Sequence[str], height: int, title: str) -> str:
    inner = "\n".join(parts)
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">\n{inner}\n</svg>'
