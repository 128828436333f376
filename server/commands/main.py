"""The command line: verbs, options, and one line for what the caller got wrong. The work is in the modules beside it.

Heavy imports (torch and all that follows) happen inside a verb, so that `--help` answers at once.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer
from typer.core import TyperGroup

from guanaco.server.commands.adapters import adapters_app, aliases_app
from guanaco.server.commands.common import one_line_errors, typed_text
from guanaco.server.commands.streams import end_interrupted, end_unwritable
from guanaco.server.config import Settings, load_settings


class _Interruptible(TyperGroup):
    """Ends every command, those of the groups below too, with one line for Ctrl-C and for a full disk."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # the library would say "Aborted!" and exit with 1
            end_interrupted()
        except OSError as error:
            end_unwritable(error)


class _EngineIsMeant(TyperGroup):
    """`guanaco bench --json` is short for `guanaco bench engine --json`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_short = not args or (args[0].startswith("-") and args[0] not in _HELP_FLAGS)
        return super().parse_args(ctx, ["engine", *args] if is_short else args)


_HELP_FLAGS = ["-h", "--help"]

app = typer.Typer(
    name="guanaco",
    cls=_Interruptible,
    help="One 4-bit LLaMA, many LoRA adapters in one batch, behind an OpenAI-compatible endpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": _HELP_FLAGS},
)
bench_app = typer.Typer(help="Measure the engine on this machine, or count GPU kernels.", cls=_EngineIsMeant)
models_app = typer.Typer(help="The cache of downloaded and quantised models.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
app.add_typer(models_app, name="models")
app.add_typer(adapters_app, name="adapters")
app.add_typer(aliases_app, name="aliases")


def _option(name: str) -> inspect.Parameter:
    """The command-line twin of one setting. Values stay text: `Settings` parses them, and errors name the flag."""
    info = Settings.model_fields[name]
    default = info.get_default()
    shown = "" if default in (None, (), False) else f" (default {default})"
    flag = "--" + name.replace("_", "-")
    if info.annotation is bool:
        annotation: Any = Annotated[
            bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", help=f"{info.description}{shown}")
        ]
    elif get_origin(info.annotation) is tuple:
        annotation = Annotated[list[str] | None, typer.Option(flag, help=f"{info.description}")]
    else:
        annotation = Annotated[str | None, typer.Option(flag, metavar="VALUE", help=f"{info.description}{shown}")]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _with_settings(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb one option for every setting, `--config` and `--print-config`; call it with `Settings`."""
    own = [p for p in inspect.signature(verb, eval_str=True).parameters.values() if p.name != "settings"]
    config = Annotated[Path | None, typer.Option("--config", help="YAML file with any of these settings")]
    show = Annotated[bool, typer.Option("--print-config", help="print the settings that would be used, and stop")]

    def command(**given: Any) -> None:
        arguments = {p.name: given.pop(p.name) for p in own}
        config_file, print_config = given.pop("config"), given.pop("print_config")
        flags = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v not in (None, [])}
        with one_line_errors():
            settings = load_settings(flags, config_file)
            if print_config:
                print(json.dumps(settings.public(), indent=2))
                return
            verb(settings=settings, **arguments)

    command.__doc__ = verb.__doc__
    command.__name__ = verb.__name__
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own),
            inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=config),
            inspect.Parameter("print_config", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=show),
            *(_option(name) for name in Settings.model_fields),
        ]
    )
    return command


@app.command()
@_with_settings
def serve(settings: Settings) -> None:
    """Serve the model and its adapters over HTTP (no --model: the demo model with its two adapters)."""
    from guanaco.server.commands.serve import run_server

    raise SystemExit(run_server(settings))


@app.command()
@_with_settings
def generate(
    settings: Settings,
    prompt: Annotated[str, typer.Argument(help="the user's message (with --raw: the text to continue)")],
    name: Annotated[str | None, typer.Option("--name", "-n", help="the base or an adapter, by its served name")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="most tokens to write")] = 256,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 takes the most likely token each time (none: the profile's, or 0)")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="makes sampling repeatable")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="no chat template")] = False,
) -> None:
    """Answer one message and stop: no server, the text goes to standard output as it comes."""
    from guanaco.server.commands.terminal import generate_once

    prompt = typed_text(prompt, "PROMPT")
    generate_once(settings, prompt, name=name, max_tokens=max_tokens, temperature=temperature, seed=seed, raw=raw)


@app.command()
def chat(
    url: Annotated[
        str, typer.Option(help="address of a running server, with or without /v1")
    ] = "http://127.0.0.1:8000",
    name: Annotated[
        str | None, typer.Option("--name", "-n", help="the base or an adapter (none: the server's first)")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="the server's API key")] = None,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="most tokens per answer")] = 512,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="none: the model's own")] = None,
) -> None:
    """Talk to a running server in the terminal; /model NAME switches between the base and its adapters.
    Without a terminal each line of the input is answered, and only the answers are printed."""
    from guanaco.server.commands.terminal import ChatClient

    with one_line_errors():
        system = None if system is None else typed_text(system, "--system")
        ChatClient(url, api_key=api_key, system=system, max_tokens=max_tokens, temperature=temperature).loop(name)


@app.command()
def quantize(
    src: Annotated[Path, typer.Argument(help="checkpoint directory with safetensors")],
    dst: Annotated[Path, typer.Argument(help="directory to write; must not exist")],
    double_quant: Annotated[
        bool, typer.Option(help="quantise the scales too (4.13 instead of 4.5 bits a weight)")
    ] = True,
) -> None:
    """Write a bitsandbytes-format NF4 checkpoint, which transformers loads as well."""
    from guanaco.server.commands.quantize import run_quantize

    with one_line_errors():
        run_quantize(src, dst, double_quant=double_quant)


@app.command()
@_with_settings
def doctor(
    settings: Settings,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
) -> None:
    """Say what this machine can do, which provider would run, and whether the model would fit."""
    from guanaco.server.commands.doctor import run_doctor

    raise SystemExit(run_doctor(settings, as_json=as_json))


@bench_app.command("engine")
@_with_settings
def bench_engine(
    settings: Settings,
    adapters: Annotated[str | None, typer.Option(help="DIR:N, stream i uses DIR/a(i mod N)")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="length of the prompt that ppN measures")] = 512,
    batches: Annotated[str, typer.Option(help="numbers of streams, comma-separated")] = "1,4,8,16",
    context: Annotated[int, typer.Option(min=1, help="context of each stream before its tokens are timed")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON line, with the keys of the peers' drivers")] = False,
) -> None:
    """Time the engine without HTTP (also: `guanaco bench` alone): tokens/s of a prompt, and of several streams."""
    from guanaco.server.commands.bench.engine import measure_engine

    measure_engine(settings, adapters=adapters, prompt=prompt, batches=batches, context=context, as_json=as_json)


@bench_app.command("kernels")
def bench_kernels(
    targets: Annotated[str | None, typer.Option(help="only these, such as sm_80,sm_90 (none: all)")] = None,
    kernels: Annotated[str | None, typer.Option(help="only these, comma-separated (none: all)")] = None,
    bitsandbytes: Annotated[Path | None, typer.Option(help="count this libbitsandbytes_cuda*.so too")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="time tiles on this GPU instead, for servers to use")] = False,
    cache: Annotated[Path | None, typer.Option(help="where --tune writes (none: the configured cache)")] = None,
) -> None:
    """Compile the GPU kernels for every GPU generation and count their machine code. No GPU is needed, Triton is."""
    from guanaco.server.commands.bench.kernels import count_kernels, tune_kernels

    with one_line_errors():
        if tune:
            tune_kernels(load_settings({"cache": cache} if cache else {}))
        else:
            count_kernels(targets=targets, kernels=kernels, bitsandbytes=bitsandbytes, as_json=as_json)


@models_app.command("list")
def models_list(
    cache: Annotated[Path | None, typer.Option(help="the cache directory (none: the configured one)")] = None,
) -> None:
    """List the cached models with their sizes."""
    from guanaco.server.commands.models import list_models

    with one_line_errors():
        list_models(load_settings({"cache": cache} if cache else {}).cache_dir)


@models_app.command("prune")
def models_prune(
    names: Annotated[list[str] | None, typer.Argument(help="which, as `models list` names them (none: all)")] = None,
    cache: Annotated[Path | None, typer.Option(help="the cache directory (none: the configured one)")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="don't ask")] = False,
) -> None:
    """Delete cached models; they are made again when needed."""
    from guanaco.server.commands.models import prune_models

    with one_line_errors():
        prune_models(load_settings({"cache": cache} if cache else {}).cache_dir, names or [], yes=yes)


@app.command()
def version() -> None:
    """Print the version."""
    print(_installed_version())


def _installed_version() -> str:
    from importlib.metadata import version as installed

    return installed("guanaco")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"guanaco {_installed_version()}")
        raise typer.Exit


@app.callback()
def _of_every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version, and stop")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Parse the command line, and run what it says."""
    app()
