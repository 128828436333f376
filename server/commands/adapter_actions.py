"""The work of `guanaco adapters` and `guanaco aliases`: adapter files on this machine, and a running server's routes.

`inspect`, `convert` and `pull` need no server. The other commands call the admin routes through `AdminClient`. It uses
httpx2, as the hub's client does. `compare` and `train` call those routes too.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from guanaco.adapters.convert.conversion import ConvertReport
from guanaco.adapters.peft.config import CONFIG_NAME, MAX_CONFIG_BYTES, parse_config
from guanaco.adapters.peft.files import AdapterFiles
from guanaco.adapters.peft.safetensors import AdapterTensors
from guanaco.adapters.peft.weights import BASE_FINGERPRINT_KEY, WEIGHTS_NAME, AdapterLimits, check_weights_exist
from guanaco.server.adapters.hub import AdapterHub, HubAddress
from guanaco.server.bootstrap.memory_plan import human_bytes
from guanaco.server.commands.common import bearer, server_root
from guanaco.server.config import Settings
from guanaco.server.errors import CommandError

_TIMEOUT_SECONDS = 600.0  # reading and probing a large adapter from a slow disk takes long
_MOST_ANSWER_BYTES = 64 << 20  # a list of many thousand adapters is far smaller


class AdminClient:
    """The admin routes of one running server. Every failure is a CommandError, with the server's own message."""

    def __init__(self, url: str, admin_key: str | None) -> None:
        if not admin_key:
            raise CommandError("give the server's admin key: --admin-key, or the variable GUANACO_ADMIN_KEY")
        self._url = server_root(url)
        headers = {b"Authorization": bearer(admin_key, "--admin-key")}
        self._http = httpx2.Client(timeout=_TIMEOUT_SECONDS, headers=headers)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON answer to one request. path: below /v1, such as /adapters."""
        try:
            with self._http.stream(method, f"{self._url}/v1{path}", json=body) as response:
                content = bytearray()
                for piece in response.iter_bytes():
                    content += piece
                    if len(content) > _MOST_ANSWER_BYTES:
                        most = _MOST_ANSWER_BYTES >> 20
                        raise CommandError(f"{self._url} answered with more than {most} MiB: it is no guanaco server")
        except httpx2.HTTPError as error:
            raise CommandError(f"no answer from {self._url} ({error}): is the server running there?") from None
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            raise CommandError(f"{self._url} answered {response.status_code}: it is not a guanaco server") from None
        if response.is_error:
            told = answer.get("error") if isinstance(answer, dict) else None
            if not isinstance(told, dict):
                raise CommandError(f"{self._url} answered {response.status_code}: it is not a guanaco server")
            raise CommandError(f"{told.get('code')}: {told.get('message')}")
        return answer


def show(answer: Any, *, as_json: bool) -> None:
    """Print an answer about one adapter or alias, or a list of them, as a table or as JSON."""
    console = Console(highlight=False)
    if as_json:
        console.print_json(json.dumps(answer))
        return
    if "data" in answer:
        is_of_aliases = any(card["object"] == "alias" for card in answer["data"])
        console.print(_list_aliases(answer["data"]) if is_of_aliases else _list(answer["data"]))
        return
    table = Table.grid(padding=(0, 2))
    for key, value in answer.items():
        if key != "object" and value not in (None, [], ""):
            table.add_row(f"[dim]{'where' if key == 'tier' else escape(key)}[/]", escape(_shown(key, value)))
    console.print(table)


def _shown(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return human_bytes(value)
    if key == "tier":
        return _WHERE[value]
    if isinstance(value, list) and value and isinstance(value[0], dict):  # an alias's earlier revisions
        return "\n".join(", ".join(f"{k} {_shown(k, v)}" for k, v in item.items()) for item in value)
    if key == "split":
        return ", ".join(f"{_short(target)} {weight}" for target, weight in value.items())
    if key in ("loaded_at", "last_used", "changed_at"):
        return f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M:%S} UTC"
    return str(value)


def parse_split(targets: list[str]) -> dict[str, int]:
    """Target → weight, from `TARGET=WEIGHT …` or from one target alone. Raises CommandError."""
    split = {}
    for text in targets:
        target, separator, weight = text.partition("=")
        if not (weight.isascii() and weight.isdecimal() if separator else len(targets) == 1):
            raise CommandError(f"{text!r}: write NAME=WEIGHT or NAME@VERSION=WEIGHT, the weight a whole number")
        if target in split:
            raise CommandError(f"{target} is there twice: add the weights up")
        split[target] = int(weight) if separator else 1
    return split


def _list_aliases(aliases: list[dict[str, Any]]) -> Table:
    table = Table("name", "state", "leads to", "revision", "uses", box=None)
    for card in aliases:
        total = sum(card["split"].values())
        shares = [(_short(target), weight) for target, weight in card["split"].items()]
        leads_to = ", ".join(name if len(shares) == 1 else f"{name} {weight / total:.0%}" for name, weight in shares)
        cells = (card["name"], card["state"], leads_to, card["revision"], card["num_uses"])
        table.add_row(*(escape(str(cell)) for cell in cells))
    return table


def _short(target: str) -> str:
    name, separator, version = target.partition("@")
    return f"{name}{separator}{version[:12]}"


_WHERE = {"device": "ready to use", "host": "in memory", "disk": "on disk"}


def _list(adapters: list[dict[str, Any]]) -> Table:
    table = Table(
        "name", "state", "version", "rank", "modules", "size", "where", "requests", "uses", "aliases", box=None
    )
    for card in adapters:
        if card["state"] == "broken":
            table.add_row(
                escape(card["name"]), "[red]broken[/]", card["version"][:12], escape(card["error"]["message"])
            )
            continue
        if card["state"] == "loading":
            table.add_row(escape(card["name"]), "loading", "", escape(card["source"]))
            continue
        table.add_row(
            escape(card["name"]),
            card["state"],
            card["version"][:12],
            str(card["rank"]),
            f"{card['modules_applied']}/{card['modules_possible']}",
            human_bytes(card["num_bytes"]),
            _WHERE[card["tier"]],
            str(card["pins"]),
            str(card["num_uses"]),
            escape(", ".join(card["aliases"])),
        )
    return table


def show_conversion(report: ConvertReport, target: Path) -> None:
    """Print what `convert` did, one line each."""
    console = Console(highlight=False)
    dtypes = ", ".join(f"{count} in {dtype}" for dtype, count in report.dtypes.items())
    sizes = f"{human_bytes(report.source_bytes)} → {human_bytes(report.target_bytes)}"
    console.print(f"{report.source} → {target}: {report.num_tensors} tensors ({dtypes}), {sizes}", markup=False)
    if report.num_renamed:
        console.print(f"{report.num_renamed} tensors got the names that PEFT uses today")
    for note in report.notes:
        console.print(note, markup=False)


def pull_adapter(settings: Settings, source: str, directory: Path | None) -> None:
    """Download an adapter from the hub, and print its commit. Raises AdapterError or CommandError.

    source: ORG/NAME or ORG/NAME@REVISION. directory: written, so it must not exist; None: the hub's cache only.
    """
    address = HubAddress.parse(source if "@" in source else f"{source}@main")
    if address is None:
        raise CommandError(f"{source} is no adapter of the hub: write ORG/NAME or ORG/NAME@REVISION")
    hub = AdapterHub.of(settings)
    if directory is None:
        path, pinned = hub.fetch(address)
    else:
        path, pinned = directory, hub.pull(address, directory)
    Console(highlight=False).print(f"{pinned} → {path}", markup=False, soft_wrap=True)


def inspect_path(path: Path) -> dict[str, Any]:
    """The contents of an adapter's files, for JSON. Needs no base model. Raises AdapterError."""
    files = AdapterFiles.find(path, "default", CONFIG_NAME)
    config = parse_config(files.read(CONFIG_NAME, MAX_CONFIG_BYTES))
    check_weights_exist(files)
    with files.open(WEIGHTS_NAME) as handle:
        file = AdapterTensors(handle, WEIGHTS_NAME, AdapterLimits().max_file_bytes)
        ranks = sorted({t.shape[0] for name, t in file.tensors.items() if ".lora_A" in name and len(t.shape) == 2})
        return {
            "path": str(files.directory),
            "tensors": len(file.tensors),
            "ranks": ranks,
            "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in file.tensors.values()}),
            "num_bytes": sum(t.num_bytes for t in file.tensors.values()),
            "base_fingerprint": file.metadata.get(BASE_FINGERPRINT_KEY),
            "notes": list(config.notes),
        }
