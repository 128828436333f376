"""What `make clients` found: the file of a day in loadtest/results, and the table of docs/clients.md."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN = "<!-- table of results: written by `make clients` -->"
END = "<!-- end of the table -->"
HEAD = "| client | versions | what was run | result | date |\n|---|---|---|---|---|\n"

Result = dict[str, Any]


def newest(folder: Path) -> Path | None:
    """The newest results file of a folder: their names end in their dates."""
    files = sorted(folder.glob("clients-????-??-??.json"))
    return files[-1] if files else None


def merged(old: Sequence[Result], new: Sequence[Result], order: Sequence[str]) -> list[Result]:
    """The results of each client: the new ones, and the older ones of clients that were not asked for."""
    found = {result["client"]: result for result in (*old, *new)}
    return [found[name] for name in order if name in found]


def outcome(result: Result) -> str:
    """The result of one client in words."""
    if result["not_run"]:
        return f"not run: {result['not_run']}"
    failed = [check["check"] for check in result["checks"] if not check["ok"]]
    if failed:
        return f"{len(failed)} of {len(result['checks'])} failed: {'; '.join(failed)}"
    return f"all {len(result['checks'])} passed"


def passed(result: Result) -> bool:
    """Whether the client ran and all its checks held."""
    return not result["not_run"] and all(check["ok"] for check in result["checks"])


def table(clients: Sequence[Result]) -> str:
    """The results as Markdown."""
    rows = [
        (
            result["title"],
            ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
            "; ".join(check["check"] for check in result["checks"]),
            outcome(result),
            result["date"],
        )
        for result in clients
    ]
    return HEAD + "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in rows)


def with_table(page: str, clients: Sequence[Result]) -> str:
    """The page with the table between its two markers replaced."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no line `{BEGIN}` with a line `{END}` below it")
    return f"{before}{begin}\n{table(clients)}{end}{after}"


def write(path: Path, about: Result, clients: Sequence[Result]) -> None:
    """Write one results file."""
    path.write_text(json.dumps({**about, "clients": clients}, indent=1, ensure_ascii=False) + "\n")
