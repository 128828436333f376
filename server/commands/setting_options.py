"""Settings as options of the command line: one option for each setting of `server/config.py`.

Commands of the class `SettingsCommand` have these options besides their own. Their functions call `settings_of`.
"""

import json
from dataclasses import dataclass, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.main import get_command

from guanaco.server import setting_types as types
from guanaco.server.config import SECTIONS, Settings, load_settings

_METAVARS = {
    "adapter": "NAME=PATH",
    "adapter_profile": "NAME=PROFILE",
    "chat_template": "NAME|FILE",
    "host": "ADDRESS",
    "max_train_hours_per_key": "HOURS",
    "model": "PATH|ID",
    "served_model_name": "NAME",
}
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


@dataclass(kw_only=True)
class _Sources:
    """The options that are no settings: a file to read settings from, and printing them."""

    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="YAML file with any of these settings")
    ] = None
    print_config: Annotated[
        bool, typer.Option("--print-config", help="print the settings that would be used, and stop")
    ] = False


@cache
def setting_options() -> tuple[Any, ...]:
    """`--config`, `--print-config`, and one option for each setting, with its help, default and panel.

    Typer makes options of the parameters of a callable. The callable here is a dataclass with one field for each
    setting, so that a setting is declared in `server/config.py` and nowhere else. Values stay text: `Settings` parses
    them, whether they come from a flag, a variable or a file, and its errors name the flag.
    """
    fields = [
        (name, _annotation(name, hint, section, panel), None)
        for panel, section in SECTIONS.items()
        for name, hint in get_type_hints(section, include_extras=True).items()
        if name in section.model_fields
    ]
    one_command = typer.Typer(add_completion=False)
    one_command.command()(make_dataclass("SettingsAsOptions", fields, bases=(_Sources,), kw_only=True))
    return tuple(get_command(one_command).params)


def _annotation(name: str, hint: Any, section: Any, panel: str) -> Any:
    """The type annotation of one option, for typer. hint: the type of the setting."""
    field = section.model_fields[name]
    flag = "--" + name.replace("_", "-")
    told: dict[str, Any] = {"help": field.description, "rich_help_panel": panel}
    if (default := _shown(field.get_default(), _metavar(name, hint))) is not None:
        told["show_default"] = default
    if field.annotation is bool:
        return Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", **told)]
    if get_origin(field.annotation) is Literal:
        choices = ", ".join(get_args(field.annotation))
        told["help"] = f"{field.description} ({choices})"
    values = list[str] if get_origin(field.annotation) is tuple else str
    return Annotated[values | None, typer.Option(flag, metavar=_metavar(name, hint), **told)]


def _metavar(name: str, hint: Any) -> str:
    """The word for the value in the help."""
    if name in _METAVARS:
        return _METAVARS[name]
    kinds = _parts(hint)
    for kind, metavar in (
        (types.Bytes, "SIZE"),
        (types.Key, "KEY"),
        (types.Keys, "KEY"),
        (types.HostNames, "HOST"),
        (types.Origins, "ORIGIN"),
        (float, "SECONDS"),
        (int, "NUMBER"),
        (types.Count, "NUMBER"),
        (Path, "PATH"),
    ):
        if kind in kinds:
            return metavar
    return "NAME"


def _parts(hint: Any) -> list[Any]:
    """A type and all types inside it, for example those in `Annotated[int, …] | None`."""
    return [hint, *(part for argument in get_args(hint) for part in _parts(argument))]


def _shown(default: Any, metavar: str) -> str | None:
    """A default as one would type it; None if there is none (then the help says what happens)."""
    if default is None or default == ():
        return None
    if isinstance(default, bool):
        return "on" if default else "off"
    if metavar == "SIZE":
        return next((f"{default // size} {unit}" for unit, size in _UNITS if default % size == 0), f"{default} bytes")
    return f"{default:g}" if isinstance(default, float) else str(default)


def read_settings(ctx: typer.Context) -> bool:
    """Read the settings from the parsed options and keep them for `settings_of`. Returns False if they were only
    printed.

    Raises SettingsError.
    """
    given = {option.name: ctx.params.pop(option.name) for option in setting_options()}
    config, print_config = given.pop("config"), given.pop("print_config")
    flags = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v not in (None, [], ())}
    settings = load_settings(flags, config)
    if print_config:
        print(json.dumps(settings.public(), indent=2))
        return False
    ctx.obj = settings
    return True


def settings_of(ctx: typer.Context) -> Settings:
    """The settings of a command of the class `SettingsCommand`."""
    assert isinstance(ctx.obj, Settings)
    return ctx.obj


def settings_with(**given: Any) -> Settings:
    """The settings of the environment, with those in `given` replaced; a value of None replaces nothing.

    For commands with few options.

    Raises SettingsError.
    """
    return load_settings({name: value for name, value in given.items() if value is not None})
