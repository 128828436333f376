"""The layout of `--help`: panels of two columns; in a narrow terminal each option's text is below its name.

Typer's own panels give a column to types and cut names off: at 40 columns `--served-model-name` is `--se…`. Imports
nothing of ours. Called by the classes of `classes.py`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_NARROW = 64  # columns; a terminal with fewer gets one column
_WIDEST = 110  # columns; longer lines are hard to read
_TYPES = {"int": "NUMBER", "float": "NUMBER", "str": "TEXT", "path": "PATH"}

Row = tuple[Text, Text]


def print_help(command: Any, ctx: Any, *, below: Sequence[Any] = (), parameters: Iterable[Any]) -> None:
    """Print usage, description, a panel of commands and one panel for each group of options.

    below: the commands of a group. parameters: the parameters to show.
    """
    console = Console(highlight=False)
    console.width = min(console.width, _WIDEST)
    console.print(Text.assemble(("Usage: ", "bold"), " ".join([ctx.command_path, *_usage(command, ctx, below)])))
    for paragraph in (command.help or "").split("\n\n"):
        console.print()
        console.print(Text(_one_line(paragraph)))
    panels = _panels(parameters, below)
    longest = max(name.cell_len for rows in panels.values() for name, _ in rows)
    for title, rows in panels.items():
        console.print()
        console.print(Text(title, style="bold"))
        _print_rows(console, rows, longest)
    if command.epilog:
        console.print()
        console.print(Text(_one_line(command.epilog), style="dim"))


def _usage(command: Any, ctx: Any, below: Sequence[Any]) -> list[str]:
    arguments = [p for p in command.get_params(ctx) if p.param_type_name == "argument"]
    words = [_name(p).plain if p.required else f"[{_name(p).plain}]" for p in arguments]
    return ["[OPTIONS]", *(["COMMAND …"] if below else words)]


def _panels(parameters: Iterable[Any], below: Sequence[Any]) -> dict[str, list[Row]]:
    """Panel's title → rows. Commands first, then arguments, then a command's own options."""
    panels: dict[str, list[Row]] = {"Commands": [], "Arguments": [], "Options": []}
    for command in below:
        summary = _one_line((command.help or "").split("\n\n")[0])
        panels["Commands"].append((Text(command.name, style="bold cyan"), Text(summary)))
    for parameter in parameters:
        if not parameter.hidden:
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            panels.setdefault(parameter.rich_help_panel or usual, []).append((_name(parameter), _told(parameter)))
    return {title: rows for title, rows in panels.items() if rows}


def _print_rows(console: Console, rows: list[Row], longest: int) -> None:
    if console.width < _NARROW:
        for name, told in rows:
            console.print(Padding(name, (0, 0, 0, 1)))
            console.print(Padding(told, (0, 0, 0, 5)))
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=longest, no_wrap=True)
    table.add_column()
    for name, told in rows:
        table.add_row(name, told)
    console.print(Padding(table, (0, 0, 0, 2)))


def _name(parameter: Any) -> Text:
    """An option's name in the help: `-n, --name TEXT`, or `--[no-]offline` for a switch that can be turned off."""
    if parameter.param_type_name == "argument":
        many = "" if parameter.nargs == 1 else " …"
        return Text((parameter.metavar or parameter.name.upper()) + many, style="bold cyan")
    flags = sorted(parameter.opts, key=len)
    if parameter.secondary_opts:
        flags = [f"--[no-]{flag.removeprefix('--')}" for flag in parameter.opts]
    name = Text(", ".join(flags), style="bold cyan")
    return name if parameter.is_flag else name.append(f" {_metavar(parameter)}", style="not bold yellow")


def _metavar(parameter: Any) -> str:
    if parameter.metavar:
        return str(parameter.metavar)
    kind = parameter.display_type(None).strip("<>").removesuffix(" range")
    return _TYPES.get(kind, "VALUE")


def _told(parameter: Any) -> Text:
    """An option's help, followed by whether it is required, its default, its limits and its variable."""
    notes = ["required"] if parameter.required else []
    if isinstance(parameter.show_default, str):
        notes.append(f"default: {parameter.show_default}")
    elif parameter.default not in (None, False, [], ()):
        notes.append(f"default: {'on' if parameter.default is True else parameter.default}")
    if parameter.min is not None:
        notes.append(f"{parameter.min:g} " + ("or more" if parameter.max is None else f"to {parameter.max:g}"))
    if parameter.envvar:
        notes.append(f"variable: {parameter.envvar}")
    told = Text(_one_line(parameter.help or ""))
    return told.append(f" [{'; '.join(notes)}]", style="dim") if notes else told


def _one_line(text: str) -> str:
    return " ".join(text.split())
