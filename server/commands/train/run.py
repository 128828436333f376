"""`guanaco train`: makes an adapter from a data file, and publishes it at a server with --publish.

The work is in `server/training`. With --json the last line on standard output is one JSON object. On success its fields
are adapter, train_loss, eval_loss, tokens_per_second, seconds, steps and trained_tokens; on failure `command.py` prints
it. Everything else goes to standard error. A training that was stopped ends with exit code 130.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from guanaco.adapters.versions.names import check_name
from guanaco.models.error_codes import ErrorCode
from guanaco.server.commands.adapter_actions import AdminClient
from guanaco.server.commands.streams import EXIT_INTERRUPTED
from guanaco.server.config import Settings
from guanaco.server.errors import CommandError
from guanaco.server.training.data.rows import DataError
from guanaco.server.training.errors import TrainingError, TrainingStopped
from guanaco.server.training.extra import check_extra, quiet_and_offline
from guanaco.server.training.recipes import ALL_LINEAR, RECIPES, SCHEDULES, Recipe

_CHOICES = {
    "recipe": RECIPES,
    "schedule": SCHEDULES,
    "train_on": ("answers", "all"),
    "too_long": ("skip", "cut", "refuse"),
    "train_dtype": ("float32", "bfloat16"),
    "train_device": ("cpu", "cuda"),
    "save_dtype": ("float32", "bfloat16", "float16"),
    "format": ("messages", "alpaca", "sharegpt", "completion", "text", "guanaco"),
}
# Options that are fields of a recipe, and those that are fields of TrainOptions. The others are TrainingRequest's.
_OF_RECIPE = frozenset(Recipe.__dataclass_fields__) - {"name"}
_OWN = ("data", "name", "out", "work", "publish", "resume", "as_json")


@dataclass(frozen=True)
class TrainOptions:
    """The options of `guanaco train` besides the settings."""

    data: Path
    name: str
    given: Mapping[str, Any]  # fields of the recipe
    more: Mapping[str, Any]  # further fields of TrainingRequest
    out: Path | None = None
    work: Path | None = None
    publish: str | None = None
    resume: bool = False
    as_json: bool = False


def options_of(params: Mapping[str, Any]) -> TrainOptions:
    """The parsed command line as options. Raises CommandError if an option has a value that is not one of its words."""
    values = {name: value for name, value in params.items() if value is not None}
    for name, words in _CHOICES.items():
        if name in values and values[name] not in words:
            flag = "--" + name.replace("_", "-")
            raise CommandError(f"{flag} {values[name]}: write one of {', '.join(words)}")
    if not values["rslora"]:
        del values["rslora"]  # the recipe's own
    if "targets" in values:
        targets = tuple(part.strip() for part in values["targets"].split(",") if part.strip())
        values["targets"] = ALL_LINEAR if targets == ("all",) else targets
    given = {name: value for name, value in values.items() if name in _OF_RECIPE}
    more = {name: value for name, value in values.items() if name not in _OF_RECIPE and name not in _OWN}
    return TrainOptions(given=given, more=more, **{name: values[name] for name in _OWN if name in values})


def run_train(settings: Settings, options: TrainOptions) -> int:
    """Train, publish, and return the exit code. Raises OperatorError, which `TrainCommand` prints."""
    console = Console(stderr=True, highlight=False)
    try:
        with _signals():
            answer = _run(settings, options, console)
    except TrainingStopped as stopped:
        print(f"guanaco: {stopped}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except DataError as error:
        raise TrainingError(ErrorCode.INVALID_TRAINING_DATA, str(error)) from None
    if options.as_json:
        print(json.dumps(answer), flush=True)
    else:
        held_out = "" if answer["eval_loss"] is None else f", {answer['eval_loss']:.4f} on held-out rows"
        console.print(f"{answer['adapter']}: loss {answer['train_loss']:.4f}{held_out}", markup=False, soft_wrap=True)
    return 0


def _run(settings: Settings, options: TrainOptions, console: Console) -> dict[str, Any]:
    check_name(options.name)
    check_extra()
    root = None if settings.adapter_root is None else Path(os.path.abspath(os.path.expanduser(settings.adapter_root)))
    out = options.out or (root or settings.cache_dir / "trained") / options.name
    out = Path(os.path.abspath(os.path.expanduser(out)))
    publish = None if options.publish is None else _Publishing(settings, options, out, root)
    work = options.work or settings.cache_dir / "training" / options.name
    quiet_and_offline()
    from guanaco.server.training.job import TrainingRequest, run_training

    request = TrainingRequest(
        data=options.data,
        name=options.name,
        out=out,
        work=Path(os.path.abspath(os.path.expanduser(work))),
        given=dict(options.given),
        resume=options.resume,
        **options.more,
    )
    answer = run_training(settings, request, console)
    if publish is not None:
        publish.publish(console)
    return answer


class _Publishing:
    """The running server that gets the adapter. The constructor finds a wrong folder, address or key before the
    training; it raises CommandError."""

    def __init__(self, settings: Settings, options: TrainOptions, out: Path, root: Path | None) -> None:
        assert options.publish is not None
        if root is None or not out.is_relative_to(root):
            where = "--adapter-root is not given" if root is None else f"{out} is not below --adapter-root {root}"
            raise CommandError(
                f"--publish: {where}; a server loads adapters from its --adapter-root alone: give the same one here, "
                "and an --out below it or none"
            )
        key = None if settings.admin_key is None else settings.admin_key.get_secret_value()
        self._client = AdminClient(options.publish, key)
        self._name, self._source = options.name, str(out.relative_to(root))
        self._url = options.publish
        self._client.call("GET", "/adapters")  # the server answers, and the key is right

    def publish(self, console: Console) -> None:
        """Have the server check the adapter and load it under its name. Raises CommandError with the server's words."""
        card = self._client.call("PUT", f"/adapters/{self._name}", {"source": self._source})
        version = str(card.get("version", ""))[:12]
        console.print(f"published {self._name} ({version}) at {self._url}", markup=False, soft_wrap=True)


@contextmanager
def _signals() -> Iterator[None]:
    """Outside the training's steps, which catch signals themselves, let SIGTERM interrupt as Ctrl-C does."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
