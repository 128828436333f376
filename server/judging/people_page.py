"""The HTML of the blind page: one item at a time, with forms. The policy allows one style sheet and one script."""

import base64
import hashlib
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #59636e; --rule: #c9d0d7; --accent: #0b62c4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --paper: #14171b; --soft: #9aa4af; --rule: #424b55; --accent: #6cb0ff; }
}
body { margin: 1.2rem auto; max-width: 80rem; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.2rem; margin: 0; } h2 { font-size: 1rem; color: var(--soft); }
header { display: flex; flex-wrap: wrap; gap: 1rem; align-items: center; justify-content: space-between; }
progress { width: 14rem; accent-color: var(--accent); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; font: inherit; margin: 0; }
.prompt, .answer { border: 1px solid var(--rule); border-radius: 8px; padding: .8rem 1rem; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
@media (max-width: 44rem) { .sides { grid-template-columns: 1fr; } }
.votes { position: sticky; bottom: 0; background: var(--paper); display: flex; flex-wrap: wrap; gap: .8rem;
  padding: 1rem 0; }
button { font: inherit; padding: .55rem 1.1rem; border: 1px solid var(--rule); border-radius: 8px; background: none;
  color: inherit; cursor: pointer; }
button:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.main button { border-color: var(--accent); }
kbd { border: 1px solid var(--rule); border-radius: 4px; padding: 0 .35rem; }
"""
SCRIPT = """
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const button = document.querySelector(`button[data-key="${CSS.escape(event.key.toLowerCase())}"]`);
  if (button) { event.preventDefault(); button.click(); }
});
"""
Item = tuple[str, str, str]  # prompt, left answer, right answer; all are escaped HTML


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def policy() -> str:
    """The Content-Security-Policy: this style sheet, this script, forms to this origin, nothing else."""
    return (
        f"default-src 'none'; style-src 'sha256-{_digest(STYLE)}'; script-src 'sha256-{_digest(SCRIPT)}'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )


def page_of(item: Item | None, *, number: int | None, done: int, total: int, ended: bool) -> str:
    """The page for one item; without an item, or when the person has finished, the last page."""
    body = _end(done, total, ended) if item is None or number is None or ended else _voting(item, number)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><title>Which answer is better?</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{STYLE}</style></head><body>",
            "<header><h1>Which answer is better?</h1>",
            f'<span role="status"><progress max="{max(1, total)}" value="{done}" aria-label="progress"></progress> '
            f"{done} of {total}</span></header>",
            body,
            f"<script>{SCRIPT}</script></body></html>",
        ]
    )


def _voting(item: Item, number: int) -> str:
    prompt, left, right = item
    buttons = "".join(
        f'<form method="post" action="vote" class="main"><input type="hidden" name="number" value="{number}">'
        f'<input type="hidden" name="choice" value="{choice}">'
        f'<button data-key="{choice}"><kbd>{choice}</kbd> {escape(words)}</button></form>'
        for choice, words in (("1", "left is better"), ("2", "right is better"), ("3", "a tie"))
    )
    return (
        f'<h2>Prompt</h2><section class="prompt" aria-label="prompt"><pre>{prompt}</pre></section>'
        f'<main class="sides"><section aria-label="left answer"><h2>Left</h2>'
        f'<div class="answer"><pre>{left}</pre></div></section>'
        f'<section aria-label="right answer"><h2>Right</h2><div class="answer"><pre>{right}</pre></div>'
        f'</section></main><div class="votes">{buttons}{_undo()}{_finish("finish early")}</div>'
    )


def _end(done: int, total: int, ended: bool) -> str:
    if ended:
        return f"<main><h2>Thank you. {done} of {total} votes are kept; this page can be closed.</h2></main>"
    return f'<main><h2>That was the last one.</h2><div class="votes">{_finish("finish")}{_undo()}</div></main>'


def _undo() -> str:
    return '<form method="post" action="undo"><button data-key="u"><kbd>u</kbd> undo</button></form>'


def _finish(words: str) -> str:
    key = ' data-key="enter"' if words == "finish" else ""
    return f'<form method="post" action="finish"><button{key}>{words}</button></form>'
