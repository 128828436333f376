"""The commands about adapters and aliases: `guanaco adapters …`, `guanaco aliases …`. Used by `main`.

The work is in `adapter_actions.py`; heavy imports happen inside a command.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from guanaco.server.commands.classes import Command, Group

adapters_app = typer.Typer(
    cls=Group, help="Adapters: their files here, and those of a running server.", no_args_is_help=True
)
aliases_app = typer.Typer(
    cls=Group, help="Aliases of a running server: names that lead to adapters.", no_args_is_help=True
)

_Url = Annotated[str, typer.Option(help="address of the running server, with or without /v1")]
_AdminKey = Annotated[str | None, typer.Option(envvar="GUANACO_ADMIN_KEY", help="the server's admin key")]
_AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table")]
_URL = "http://127.0.0.1:8000"


def _admin(
    url: str, admin_key: str | None, as_json: bool, method: str, path: str, body: dict[str, Any] | None = None
) -> None:
    from guanaco.server.commands.adapter_actions import AdminClient, show

    show(AdminClient(url, admin_key).call(method, path, body), as_json=as_json)


def _of(collection: str, name: str, rest: str = "") -> str:
    """The path of one adapter or alias on the server. Raises AdapterError for an invalid name, since it becomes a part
    of the path."""
    from guanaco.adapters.versions.names import check_name

    check_name(name)
    return f"/{collection}/{name}{rest}"


def _given(text: str, what: str, advice: str) -> str:
    """The text of an option or argument. Raises CommandError if it is empty, as an unset variable of a script makes it:
    it must not count as an option that was left out."""
    from guanaco.server.errors import CommandError

    if not text.strip():
        raise CommandError(f"{what} is empty: {advice}")
    return text


@adapters_app.command("list", cls=Command)
def adapters_list(url: _Url = _URL, admin_key: _AdminKey = None, as_json: _AsJson = False) -> None:
    """List the adapters of a running server with their state."""
    _admin(url, admin_key, as_json, "GET", "/adapters")


@adapters_app.command("inspect", cls=Command)
def adapters_inspect(
    path: Annotated[Path, typer.Argument(help="directory of the adapter")], as_json: _AsJson = False
) -> None:
    """Show what an adapter's files hold. Needs no server and no model."""
    from guanaco.server.commands.adapter_actions import inspect_path, show

    show(inspect_path(path), as_json=as_json)


@adapters_app.command("convert", cls=Command)
def adapters_convert(
    src: Annotated[Path, typer.Argument(help="directory of the old adapter: pickled or float32 weights, old config")],
    dst: Annotated[Path, typer.Argument(help="directory to write; must not exist")],
    dtype: Annotated[str, typer.Option(help="keep, float32, float16 or bfloat16")] = "keep",
) -> None:
    """Convert an old adapter to the format that the server reads. A pickle is read in a restricted process."""
    from guanaco.adapters.convert.conversion import convert_adapter
    from guanaco.server.commands.adapter_actions import show_conversion

    show_conversion(convert_adapter(src, dst, dtype=dtype), dst)


@adapters_app.command("pull", cls=Command)
def adapters_pull(
    source: Annotated[str, typer.Argument(help="ORG/NAME, or ORG/NAME@REVISION")],
    directory: Annotated[
        Path | None, typer.Argument(help="directory to write; must not exist (none: only the hub's cache)")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="the cache directory (none: the configured one)")] = None,
    hub_token: Annotated[str | None, typer.Option(help="token for gated or private ones (none: HF_TOKEN)")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="only what was downloaded before")] = False,
) -> None:
    """Download an adapter: config, safetensors weights and guanaco.json, at one commit."""
    from guanaco.server.commands.adapter_actions import pull_adapter
    from guanaco.server.commands.setting_options import settings_with

    settings = settings_with(cache=cache, hub_token=hub_token, offline=offline or None)
    pull_adapter(settings, source, directory)


@adapters_app.command("check", cls=Command)
def adapters_check(
    name: Annotated[str, typer.Argument(help="the name it would get")],
    source: Annotated[str, typer.Argument(help="path below the server's --adapter-root, or ORG/NAME@REVISION")],
    url: _Url = _URL,
    admin_key: _AdminKey = None,
    as_json: _AsJson = False,
) -> None:
    """Ask a running server whether it would load an adapter, and how much memory that needs."""
    _admin(
        url,
        admin_key,
        as_json,
        "POST",
        _of("adapters", name, "/check"),
        {"source": _given(source, "SOURCE", "give a path or ORG/NAME@REVISION")},
    )


@adapters_app.command("load", cls=Command)
def adapters_load(
    name: Annotated[str, typer.Argument(help="the name that clients will use")],
    source: Annotated[str, typer.Argument(help="path below the server's --adapter-root, or ORG/NAME@REVISION")],
    expected_version: Annotated[str | None, typer.Option(help="replace only this version")] = None,
    profile: Annotated[
        str | None, typer.Option(help="how to serve it: guanaco, or a JSON file (none: the guanaco.json beside it)")
    ] = None,
    url: _Url = _URL,
    admin_key: _AdminKey = None,
    as_json: _AsJson = False,
) -> None:
    """Load an adapter into a running server, or replace the one of that name."""
    from guanaco.adapters.versions.profile import profile_fields

    body: dict[str, Any] = {"source": _given(source, "SOURCE", "give a path or ORG/NAME@REVISION")}
    if expected_version is not None:
        advice = "give the version that `guanaco adapters list` shows, or leave the option out"
        body["expected_version"] = _given(expected_version, "--expected-version", advice)
    body |= {} if profile is None else {"profile": profile_fields(profile)}
    _admin(url, admin_key, as_json, "PUT", _of("adapters", name), body)


@adapters_app.command("unload", cls=Command)
def adapters_unload(
    name: Annotated[str, typer.Argument(help="name of the adapter")],
    force: Annotated[bool, typer.Option("--force", help="end the requests that use it")] = False,
    timeout: Annotated[float, typer.Option(min=0, max=300, help="seconds to wait for those requests")] = 10.0,
    url: _Url = _URL,
    admin_key: _AdminKey = None,
    as_json: _AsJson = False,
) -> None:
    """Remove an adapter from a running server; requests that use it may finish."""
    query = f"?timeout={timeout:.3f}&force={str(force).lower()}"
    _admin(url, admin_key, as_json, "DELETE", _of("adapters", name, query))


@adapters_app.command("rollback", cls=Command)
def adapters_rollback(
    name: Annotated[str, typer.Argument(help="name of the adapter")],
    to: Annotated[str | None, typer.Option("--to", help="a version of its history (none: the one before)")] = None,
    url: _Url = _URL,
    admin_key: _AdminKey = None,
    as_json: _AsJson = False,
) -> None:
    """Let a name stand for its version before the last change, or for an earlier one."""
    advice = "give a version, or leave the option out for the version before"
    body = {} if to is None else {"version": _given(to, "--to", advice)}
    _admin(url, admin_key, as_json, "POST", _of("adapters", name, "/rollback"), body)


@adapters_app.command("pin", cls=Command)
def adapters_pin(
    name: Annotated[str, typer.Argument(help="name of the adapter")],
    off: Annotated[bool, typer.Option("--off", help="do so no longer")] = False,
    url: _Url = _URL,
    admin_key: _AdminKey = None,
    as_json: _AsJson = False,
) -> None:
    """Keep an adapter in the server's memory, however many others are used."""
    _admin(url, admin_key, as_json, "POST", _of("adapters", name, "/pin"), {"pinned": not off})


@aliases_app.command("list", cls=Command)
def aliases_list(url: _Url = _URL, admin_key: _AdminKey = None, as_json: _AsJson = False) -> None:
    """List the aliases of a running server, and where they lead."""
    _admin(url, admin_key, as_json, "GET", "/aliases")


@aliases_app.command("show", cls=Command)
def aliases_show(
    name: Annotated[str, typer.Argument(help="name of the alias")],
    url: _Url = _URL,
    admin_key: _AdminKey = None,
    as_json: _AsJson = False,
) -> None:
    """Show one alias with its history."""
    _admin(url, admin_key, as_json, "GET", _of("aliases", name))


@aliases_app.command("set", cls=Command)
def aliases_set(
    name: Annotated[str, typer.Argument(help="the name that clients will use")],
    targets: Annotated[list[str], typer.Argument(help="NAME or NAME@VERSION; of several, each with =WEIGHT")],
    expected_revision: Annotated[
        int | None, typer.Option(min=0, help="change only this revision; 0: a new one")
    ] = None,
    url: _Url = _URL,
    admin_key: _AdminKey = None,
    as_json: _AsJson = False,
) -> None:
    """Point an alias to an adapter or one version of it, or split it: set prod new=10 old@3f2c9a=90."""
    from guanaco.server.commands.adapter_actions import parse_split

    body: dict[str, Any] = {"split": parse_split(targets)}
    if expected_revision is not None:
        body["expected_revision"] = expected_revision
    _admin(url, admin_key, as_json, "PUT", _of("aliases", name), body)


@aliases_app.command("rename", cls=Command)
def aliases_rename(
    name: Annotated[str, typer.Argument(help="name of the alias")],
    new: Annotated[str, typer.Argument(help="its new name")],
    url: _Url = _URL,
    admin_key: _AdminKey = None,
    as_json: _AsJson = False,
) -> None:
    """Give an alias another name, in other aliases that lead to it too."""
    _admin(url, admin_key, as_json, "POST", _of("aliases", name, "/rename"), {"name": new})


@aliases_app.command("rollback", cls=Command)
def aliases_rollback(
    name: Annotated[str, typer.Argument(help="name of the alias")],
    to: Annotated[
        int | None, typer.Option("--to", min=1, help="a revision of its history (none: the one before)")
    ] = None,
    url: _Url = _URL,
    admin_key: _AdminKey = None,
    as_json: _AsJson = False,
) -> None:
    """Give an alias the targets that it had before its last change, or at an earlier revision."""
    _admin(url, admin_key, as_json, "POST", _of("aliases", name, "/rollback"), {"revision": to} if to else {})


@aliases_app.command("remove", cls=Command)
def aliases_remove(
    name: Annotated[str, typer.Argument(help="name of the alias")],
    url: _Url = _URL,
    admin_key: _AdminKey = None,
    as_json: _AsJson = False,
) -> None:
    """Remove an alias. The adapters to which it leads stay."""
    _admin(url, admin_key, as_json, "DELETE", _of("aliases", name))
