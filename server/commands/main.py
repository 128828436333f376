"""The command line: its commands and options. The work is in the modules beside it.

Heavy imports (torch, the settings and what they import) happen inside a command, so that `--help` answers at once.
"""

from pathlib import Path
from typing import Annotated

import typer

from guanaco.server.bootstrap.early import begin_checks, undisturbed_imports
from guanaco.server.commands.adapters import adapters_app, aliases_app
from guanaco.server.commands.bench.serving.options import bench_serve
from guanaco.server.commands.classes import (
    HELP_FLAGS,
    BenchGroup,
    Command,
    Group,
    OfflineCommand,
    Program,
    SettingsCommand,
)
from guanaco.server.commands.common import typed_text
from guanaco.server.commands.compare.command import compare
from guanaco.server.commands.train.command import TrainCommand
from guanaco.server.commands.train.options import train

app = typer.Typer(
    name="guanaco",
    cls=Program,
    help="One 4-bit LLaMA, many LoRA adapters in one batch, behind an OpenAI-compatible endpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": HELP_FLAGS},
)
bench_app = typer.Typer(
    help="Measure the engine on this machine, load a running server, or count GPU kernels.", cls=BenchGroup
)
models_app = typer.Typer(cls=Group, help="The cache of downloaded and quantised models.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
app.add_typer(models_app, name="models")
app.add_typer(adapters_app, name="adapters")
app.add_typer(aliases_app, name="aliases")
app.command("compare", cls=Command)(compare)
bench_app.command("serve", cls=Command)(bench_serve)


@app.command(cls=SettingsCommand)
def serve(ctx: typer.Context) -> None:
    """Serve a model and its adapters over HTTP.

    Without --model it serves the demo model with its two adapters. Each setting is also a variable (GUANACO_PORT for
    --port) and a key of the YAML file (port). A flag goes before a variable, a variable before the file.
    """
    from guanaco.server.commands.setting_options import settings_of

    settings = settings_of(ctx)
    begin_checks(settings.model, settings.cache_dir)
    with undisturbed_imports():
        from guanaco.server.commands.serve import run_server
    raise SystemExit(run_server(settings))


@app.command(cls=OfflineCommand)
def generate(
    ctx: typer.Context,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="the user's message (with --raw: the text to continue)")
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", "-n", metavar="NAME", help="which answers: an adapter by its name (none: the base)"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="most tokens to write")] = 256,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 takes the most likely token each time (none: the profile's, or 0)")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="makes sampling repeatable")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="no chat template")] = False,
) -> None:
    """Answer one message and stop: no server, the text goes to standard output as it comes."""
    from guanaco.server.commands.setting_options import settings_of

    prompt, settings = typed_text(prompt, "PROMPT"), settings_of(ctx)
    begin_checks(settings.model, settings.cache_dir)
    from guanaco.server.commands.terminal import generate_once

    generate_once(settings, prompt, name=name, max_tokens=max_tokens, temperature=temperature, seed=seed, raw=raw)


@app.command(cls=Command)
def chat(
    url: Annotated[
        str, typer.Option(help="address of a running server, with or without /v1")
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="the base, an adapter or an alias (none: the server's first)")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="the server's API key")] = None,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="most tokens per answer")] = 512,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="none: the model's own")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="show answers as they are, not as Markdown")] = False,
    history: Annotated[bool, typer.Option(help="keep what was typed for the next conversation")] = True,
) -> None:
    """Talk to a running server in the terminal.

    /adapter NAME switches between the base and its adapters. Without a terminal each line of the input is answered, and
    only the answers are printed.
    """
    from guanaco.server.commands.chat.client import ChatClient
    from guanaco.server.commands.chat.session import ChatSession
    from guanaco.server.config import chat_history_file

    system = None if system is None else typed_text(system, "--system")
    options = {"max_tokens": max_tokens} | ({} if temperature is None else {"temperature": temperature})
    client = ChatClient(url, api_key=api_key, options=options)
    ChatSession(client, system=system, plain=plain, history=chat_history_file() if history else None).run(model)


@app.command(cls=Command)
def quantize(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="checkpoint directory with safetensors")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="directory to write; must not exist")],
    double_quant: Annotated[
        bool, typer.Option(help="quantise the scales too (4.13 instead of 4.5 bits a weight)")
    ] = True,
) -> None:
    """Write a bitsandbytes-format NF4 checkpoint, which transformers loads as well."""
    from guanaco.server.commands.quantize import run_quantize

    run_quantize(src, dst, double_quant=double_quant)


app.command(cls=TrainCommand)(train)


@app.command(cls=OfflineCommand)
def doctor(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
) -> None:
    """Say what this machine can do, which provider would run, and whether the model would fit."""
    from guanaco.server.commands.doctor import run_doctor
    from guanaco.server.commands.setting_options import settings_of

    raise SystemExit(run_doctor(settings_of(ctx), as_json=as_json))


@bench_app.command("engine", cls=OfflineCommand)
def bench_engine(
    ctx: typer.Context,
    adapters: Annotated[str | None, typer.Option(help="DIR:N, stream i uses DIR/a(i mod N)")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="length of the prompt that ppN measures")] = 512,
    batches: Annotated[str, typer.Option(help="numbers of streams, comma-separated")] = "1,4,8,16",
    context: Annotated[int, typer.Option(min=1, help="context of each stream before its tokens are timed")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON line, with the keys of the peers' drivers")] = False,
) -> None:
    """Time the engine without HTTP (also: `guanaco bench` alone): tokens/s of a prompt, and of several streams."""
    with undisturbed_imports():
        from guanaco.server.commands.bench.engine import measure_engine
    from guanaco.server.commands.setting_options import settings_of

    measure_engine(
        settings_of(ctx), adapters=adapters, prompt=prompt, batches=batches, context=context, as_json=as_json
    )


@bench_app.command("rows", cls=OfflineCommand)
def bench_rows(
    ctx: typer.Context,
    most: Annotated[int, typer.Option(min=2, max=256, help="the largest number of rows")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="how often each is timed; the shortest time counts")] = 20,
    isas: Annotated[
        str, typer.Option(metavar="NAMES", help="instruction sets in turns, such as avx2,avx512vnni (none: --cpu-isa)")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON line instead of a table")] = False,
) -> None:
    """Time a step by its number of rows: streams, or tokens of a prompt. Names each step that is slower than a larger
    one."""
    with undisturbed_imports():
        from guanaco.server.commands.bench.rows import measure_rows
    from guanaco.server.commands.setting_options import settings_of

    measure_rows(settings_of(ctx), most=most, rounds=rounds, isas=isas, as_json=as_json)


@bench_app.command("kernels", cls=Command)
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
    from guanaco.server.commands.setting_options import settings_with

    if tune:
        tune_kernels(settings_with(cache=cache))
    else:
        count_kernels(targets=targets, kernels=kernels, bitsandbytes=bitsandbytes, as_json=as_json)


@models_app.command("list", cls=Command)
def models_list(
    cache: Annotated[Path | None, typer.Option(help="the cache directory (none: the configured one)")] = None,
) -> None:
    """List the cached models with their sizes."""
    from guanaco.server.commands.models import list_models
    from guanaco.server.commands.setting_options import settings_with

    list_models(settings_with(cache=cache).cache_dir)


@models_app.command("prune", cls=Command)
def models_prune(
    names: Annotated[list[str] | None, typer.Argument(help="which, as `models list` names them (none: all)")] = None,
    cache: Annotated[Path | None, typer.Option(help="the cache directory (none: the configured one)")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="don't ask")] = False,
) -> None:
    """Delete cached models; they are made again when needed."""
    from guanaco.server.commands.models import prune_models
    from guanaco.server.commands.setting_options import settings_with

    prune_models(settings_with(cache=cache).cache_dir, names or [], yes=yes)


@app.command(cls=Command)
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
    """Parse the command line, and run the command."""
    app()
