"""Run by the Python of an environment: import every module, ask every command for help, run the command lines of stdin.

    python every_command.py MISSING < command-lines.json

MISSING is a package that this environment does without (`-` for none): a module may fail to import by that alone.
Writes one JSON object: `modules` and `commands` (the names that worked), `failed` (a line for each that did not), and
`runs` (exit code and output of each command line).
"""

import importlib
import json
import pkgutil
import sys
import traceback
from typing import Any

from typer.main import get_command
from typer.testing import CliRunner

from guanaco.server.commands.main import app

# Their classes derive from the libraries' of the extra `train`; the command imports them when these were found.
OF_AN_EXTRA = {f"guanaco.server.training.{name}" for name in ("job", "loop", "watching")}
EXTRA = {"transformers", "peft"}
PACKAGES = ("guanaco.adapters", "guanaco.kernels", "guanaco.models", "guanaco.server")


def import_all(missing: str) -> tuple[list[str], list[str]]:
    names = [
        module.name
        for package in PACKAGES
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
        if not module.name.rpartition(".")[2].startswith("_native") and ".demo." not in module.name
    ]
    worked, failed = [], []
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package != missing and not (name in OF_AN_EXTRA and package in EXTRA):
                failed.append(f"{name}: {error}")
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
        else:
            worked.append(name)
    return worked, failed


def paths_of(command: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and group below `command`, as the words that lead to it."""
    below = getattr(command, "commands", {})
    return [path, *(found for name in below for found in paths_of(below[name], (*path, name)))]


def run(words: list[str]) -> dict[str, Any]:
    done = CliRunner().invoke(app, words)
    trace = "".join(traceback.format_exception(done.exception)) if done.exc_info and done.exception else ""
    crashed = done.exception is not None and not isinstance(done.exception, SystemExit)
    return {"words": words, "code": done.exit_code, "output": done.output, "crash": trace if crashed else ""}


def main() -> None:
    runs = [run(words) for words in json.load(sys.stdin)]
    helped = [(path, run([*path, "-h"])) for path in paths_of(get_command(app))]
    helped += [(path, run([*path, "--help"])) for path, _ in helped if len(path) < 2]
    modules, failed = import_all(sys.argv[1])
    failed += [f"{' '.join(d['words'])}: {d['output']}{d['crash']}" for _, d in helped if d["code"] != 0]
    commands = sorted({" ".join(path) for path, _ in helped})
    print(json.dumps({"modules": modules, "commands": commands, "failed": failed, "runs": runs}))


if __name__ == "__main__":
    main()
