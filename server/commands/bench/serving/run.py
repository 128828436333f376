"""`guanaco bench serve`: one run for each rate, its table, its JSON file, and the report over all of them."""

import datetime
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from guanaco.server.commands.bench.serving import metrics
from guanaco.server.commands.bench.serving.client import Exchange, Outcome
from guanaco.server.commands.bench.serving.plan import Options, Planner
from guanaco.server.commands.bench.serving.report import html_report
from guanaco.server.commands.bench.serving.runner import Due, Run, run_load
from guanaco.server.commands.bench.serving.tables import print_run, print_sweep
from guanaco.server.commands.common import bearer, server_root
from guanaco.server.errors import CommandError

ALL_MODELS = "all"


def run_serve(options: Options) -> int:
    """Run all rates and write the chosen results. Returns 1 if no request got a whole answer, else 0.

    Raises CommandError for a wrong option, a server that does not answer, or results that can't be written.
    """
    options.check_all()
    asks = options.dataset()
    if options.save_result or options.save_detailed or options.report:
        _check_places(options)
    models = _models(options)
    planner = Planner(options, asks, models)
    console = Console(highlight=False)
    _warm_up(options, planner)
    runs, results = [], []
    for rate in options.rates():
        run = _one_run(options, planner.plan(rate), f"{rate:g} requests/s")
        result = _result(options, run, rate, models)
        runs.append(run)
        results.append(result)
        if options.as_json:
            print(json.dumps(result), flush=True)
        else:
            print_run(console, result, options.shown(), options.percentiles())
            console.print()
        if options.save_result or options.save_detailed:
            _write_json(options, result, run, several=len(options.rates()) > 1)
    if len(results) > 1 and not options.as_json:
        print_sweep(console, results, marks(results))
    if (path := _report_path(options, results[0])) is not None:
        path.write_text(html_report(results, runs, marks(results)), encoding="utf-8")
        print(f"report: {path}", file=sys.stderr)
    return 0 if any(result["completed"] for result in results) else 1


def marks(results: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Index of a run → a remark, such as that it is the knee."""
    found: dict[int, list[str]] = {}
    if (at := metrics.knee(results)) is not None:
        found.setdefault(at, []).append("knee")
    if len(results) > 1 and (at := metrics.capacity(results)) is not None:
        found.setdefault(at, []).append("capacity")
    return {at: ", ".join(words) for at, words in found.items()}


def _models(options: Options) -> list[str]:
    """The models to ask for. Raises CommandError if the server does not answer."""
    if options.model is not None:
        return [options.model]
    if options.models is not None and options.models != ALL_MODELS:
        names = [name.strip() for name in options.models.split(",") if name.strip()]
        if not names:
            raise CommandError("--models: write names, comma-separated, or all")
        _wait_until_ready(options)
        return names
    served = _wait_until_ready(options)
    return served if options.models == ALL_MODELS else served[:1]


def _wait_until_ready(options: Options) -> list[str]:
    """The ids of /v1/models. The server is asked until it answers, for at most --ready-check-timeout-sec seconds."""
    root = server_root(options.base_url, "--base-url")
    headers = {"Authorization": bearer(options.api_key, "--api-key").decode("latin-1")} if options.api_key else {}
    verify = root.startswith("https:") and not options.insecure  # without TLS no certificates need be read
    deadline = time.monotonic() + options.ready_check_timeout_sec
    while True:
        try:
            reply = httpx2.get(f"{root}/v1/models", headers=headers, timeout=10, verify=verify)
            problem = f"{root}/v1/models answered {reply.status_code}"
            if reply.status_code in (401, 403):
                raise CommandError(f"{problem}: give the key with --api-key or the variable OPENAI_API_KEY")
            if reply.status_code == 200:
                return _ids(reply, problem)
        except httpx2.TransportError as error:
            problem = f"no server at {root} ({type(error).__name__}): start it, or correct --base-url"
        if time.monotonic() >= deadline:
            raise CommandError(problem)
        time.sleep(0.2)


def _ids(reply: httpx2.Response, problem: str) -> list[str]:
    try:
        ids = [str(card["id"]) for card in reply.json()["data"]]
    except (ValueError, KeyError, TypeError):
        ids = []
    if not ids:
        raise CommandError(f"{problem} without models: name one with --model")
    return ids


def _warm_up(options: Options, planner: Planner) -> None:
    if options.num_warmups:
        plan = planner.warmups(options.num_warmups)
        done = run_load(options.target(), plan, timeout=options.timeout, max_concurrency=options.max_concurrency or 8)
        if not any(e.outcome is Outcome.COMPLETED for e in done.exchanges):
            error = done.exchanges[0].error
            raise CommandError(f"no warm-up request got a whole answer ({error}): check the server and --model")


def _one_run(options: Options, plan: Sequence[Due], words: str) -> Run:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[bad]}"))
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, refresh_per_second=2
    ) as bar:
        task, num_bad = bar.add_task(words, total=len(plan), bad=""), 0

        def ended(exchange: Exchange) -> None:
            nonlocal num_bad
            num_bad += exchange.outcome not in (Outcome.COMPLETED, Outcome.CANCELLED)
            bar.update(task, advance=1, bad=f"{num_bad} without a whole answer" if num_bad else "")

        return run_load(
            options.target(), plan, timeout=options.timeout, max_concurrency=options.max_concurrency, on_end=ended
        )


def _result(options: Options, run: Run, rate: float, models: Sequence[str]) -> dict[str, Any]:
    """The conditions of a run, then its figures."""
    percentiles, goals = sorted({*options.percentiles(), 50.0, 99.0}), options.goals()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "label": options.label,
        "endpoint_type": options.backend,
        "model_id": models[0] if len(models) == 1 else f"{len(models)} models",
        "models": list(models),
        "zipf": options.zipf,
        "num_prompts": len(run.exchanges),
        "dataset": str(options.dataset_path.name if options.dataset_path else options.dataset_name or "random"),
        "request_rate": "inf" if rate == float("inf") else rate,
        "burstiness": options.burstiness,
        "self_timed": options.self_timed,
        "ramp_up_strategy": options.ramp_up_strategy,
        "ramp_up_start_rps": options.ramp_up_start_rps,
        "ramp_up_end_rps": options.ramp_up_end_rps,
        "max_concurrency": options.max_concurrency,
        "seed": options.seed,
        "goodput": goals,
        "options": options.chosen(),
        **options.notes(),
        **metrics.summarise(run, percentiles=percentiles, goals=goals),
        "by_model": metrics.by_model(run, percentiles),
        "by_prompt_length": metrics.by_prompt_length(run, percentiles),
    }


def _check_places(options: Options) -> None:
    """Raises CommandError before the load if the results can't be written."""
    if options.result_filename is not None and Path(options.result_filename).name != options.result_filename:
        raise CommandError(
            f"--result-filename {options.result_filename}: a name without a folder; --result-dir has that"
        )
    folders = [options.result_dir] if options.save_result or options.save_detailed else []
    for folder in [*folders, *([options.report.parent] if options.report else [])]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".guanaco-bench"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise CommandError(f"{folder}: results can't be written there ({error.strerror})") from None


def _json_path(options: Options, result: Mapping[str, Any], *, several: bool) -> Path:
    """The JSON file, named as vLLM names it: label, rate, concurrency, model, date. A name that the user chose gets
    only the rate, in a sweep."""
    rate = f"{result['request_rate']}qps"
    if options.result_filename is not None:
        name = Path(options.result_filename)
        return options.result_dir / (f"{name.stem}-{rate}{name.suffix or '.json'}" if several else name.name)
    many = f"-concurrency{options.max_concurrency}" if options.max_concurrency else ""
    label, model = (
        re.sub(r"[^\w.-]+", "-", name) for name in (options.label, str(result["model_id"]).rpartition("/")[2])
    )
    date = re.sub(r"\D", "", str(result["date"])[:19])
    return options.result_dir / f"{label}-{rate}{many}-{model}-{date}.json"


def _write_json(options: Options, result: Mapping[str, Any], run: Run, *, several: bool) -> None:
    path = _json_path(options, result, several=several)
    whole = {**result, **(metrics.details(run) if options.save_detailed else {})}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(f"result: {path}", file=sys.stderr)


def _report_path(options: Options, first: Mapping[str, Any]) -> Path | None:
    if options.report is not None:
        return options.report
    return _json_path(options, first, several=False).with_suffix(".html") if options.save_result else None
