"""The page of a report: its style, a policy under which nothing loads, runs or is sent, and tables."""

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from html import escape

_NUMBER = re.compile(r"-?[\d.,]+( %)?( (to|of) -?[\d.,]+( %)?)?")
STYLE = (
    """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #59636e; --rule: #d4d9df; --accent: #0b62c4;
  --c0: #0b62c4; --c1: #c25700; --c2: #17823b; --c3: #a0348f; --c4: #8a6d00; --c5: #00808a;
  --c6: #b3261e; --c7: #7a7f87; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --paper: #14171b; --soft: #9aa4af; --rule: #363d45; --accent: #6cb0ff;
    --c0: #6cb0ff; --c1: #ff9a4d; --c2: #5fce82; --c3: #e58fd8; --c4: #dcc04a; --c5: #4ecfd9;
    --c6: #ff8a80; --c7: #a7adb5; }
}
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.conditions { color: var(--soft); }
.words { font-size: 1.15rem; font-weight: 600; }
.warning { border-left: 4px solid #c77700; padding-left: .7rem; }
.scroll { overflow-x: auto; }
.number { white-space: nowrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
svg { width: 100%; max-width: 47.5rem; height: auto; display: block; }
svg text { font: 14px system-ui, sans-serif; fill: var(--ink); }
svg .label { text-anchor: end; } svg .axis { fill: var(--soft); font-size: 12px; } svg .end { text-anchor: end; }
@media (max-width: 44rem) { .scroll svg { min-width: 32rem; } }
svg .middle { text-anchor: middle; }
svg .equal { stroke: var(--soft); stroke-dasharray: 4 4; } svg .bar { stroke: var(--accent); stroke-width: 4; }
svg .dot, svg .fill { fill: var(--accent); }
svg .grid { stroke: var(--rule); } svg .curve { fill: none; stroke-width: 2; } svg .area { stroke: none; opacity: .85; }
"""
    + "".join(f"svg .s{i} {{ stroke: var(--c{i}); }} svg .f{i} {{ fill: var(--c{i}); }}\n" for i in range(8))
    + """
details { border: 1px solid var(--rule); border-radius: 6px; padding: .4rem .8rem; margin: .4rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; font: .9rem/1.45 ui-monospace, monospace;
  border-left: 3px solid var(--rule); padding-left: .8rem; margin: .3rem 0 1rem; }
"""
)


def policy_of(style: str) -> str:
    """A Content-Security-Policy under which only this one style sheet applies."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page. title: plain text. parts: HTML, whose texts are escaped already."""
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy_of(STYLE))}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style></head><body><main>",
        f"<h1>{escape(title)}</h1>",
        *parts,
        "</main></body></html>",
    ]
    return "\n".join(lines) + "\n"


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table below its title. All cells are plain text."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heads)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{escape(title)}</h2><div class="scroll" tabindex="0">{whole}</div>'


def _cell(text: str) -> str:
    """Numbers and intervals stay on one line."""
    is_number = _NUMBER.fullmatch(text) is not None
    return f'<td class="number">{escape(text)}</td>' if is_number else f"<td>{escape(text)}</td>"
