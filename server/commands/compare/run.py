"""`guanaco compare A B`: answers, checks, a judge, the reports, and the alias that follows the winner."""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from guanaco.server.commands.adapter_actions import AdminClient
from guanaco.server.commands.common import server_root
from guanaco.server.commands.compare.ask_people import ask_people
from guanaco.server.commands.compare.options import Options
from guanaco.server.errors import CommandError
from guanaco.server.judging.contestants import Answers, Contestant, find_model, split_address
from guanaco.server.judging.endpoints import Endpoint, RequestRefused, origin_of, read_keys
from guanaco.server.judging.folder import WorkFolder, digest
from guanaco.server.judging.judges import Judge, ModelJudge
from guanaco.server.judging.page_report import html_report
from guanaco.server.judging.report import headline, markdown, tables
from guanaco.server.judging.study import (
    Plan,
    add_judgements,
    answer_and_check,
    family_warnings,
    judge_all,
    store,
)


def run_compare(options: Options) -> None:
    """Run a whole comparison, write its reports and print the result. Raises CommandError for a wrong option, a server
    that does not answer, and a folder that can't be used."""
    options.check_all()
    prompts, benchmark = options.read_prompts()
    checks, prices, regex, keys = options.checks, options.prices, options.regex_judge, read_keys(options.key or ())
    with WorkFolder(options.out) as folder:
        result, answers, plan = asyncio.run(_study(options, folder, prompts, benchmark, checks, prices, regex, keys))
        if options.human:
            judged = ask_people(plan, answers, folder)
            add_judgements(result, plan, judged, judge="people", answers=answers)
            store(result, judged, folder)
        if options.promote is not None:
            result["promoted"] = _promote(options, result, plan)
        paths = [
            folder.write("report.json", json.dumps(result, indent=1) + "\n"),
            folder.write("report.md", markdown(result)),
            folder.write("report.html", html_report(result, prompts, answers)),
        ]
    if options.as_json:
        print(json.dumps(result))
        return
    _show(result)
    print("\n".join(f"written: {path}" for path in paths))


async def _study(
    options: Options, folder: WorkFolder, prompts: Any, benchmark: str, checks: Any, prices: Any, regex: Any, keys: Any
) -> tuple[dict[str, Any], Answers, Plan]:
    """Collect the answers, check them, and have them judged if the judge is a model or a regex."""
    async with contextlib.AsyncExitStack() as stack:
        contestants = await stack.enter_async_context(_contestants(options, keys))
        plan = Plan(
            contestants, tuple(prompts), benchmark, options.sampling, checks, options.reference, options.seed, prices,
            with_perplexity=options.perplexity,
        )  # fmt: skip
        answers, result = await answer_and_check(plan, folder, _progress)
        judge: Judge | None = regex
        endpoint = None
        if options.judge_url is not None and options.judge_model is not None:
            key = keys.get(origin_of(options.judge_url, "--judge-url"))
            pace, parallel = options.judge_per_minute, options.parallel
            endpoint = await stack.enter_async_context(
                Endpoint(options.judge_url, key, per_minute=pace, parallel=parallel)
            )
            judge = ModelJudge(endpoint, options.judge_model, options.judge_mode)
            result["warnings"] += family_warnings(options.judge_model, contestants)
        if judge is not None:
            judged = await judge_all(plan, judge, answers, folder, _progress)
            usage = None if endpoint is None else vars(endpoint.usage).copy()
            add_judgements(result, plan, judged, judge=judge.name, answers=answers, usage=usage)
            store(result, judged, folder)
        return result, answers, plan


@contextlib.asynccontextmanager
async def _contestants(options: Options, keys: dict[str, str]) -> AsyncIterator[tuple[Contestant, ...]]:
    """The contestants with their endpoints. A version (`NAME@VERSION`) gets an alias of its own until the end."""
    url = server_root(options.url)
    endpoints: dict[str, Endpoint] = {}
    aliases: dict[str, str] = {}
    admin = None
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for name in options.contestants or ():
            at, model = split_address(name)
            where = url if at is None else at
            if where not in endpoints:
                endpoint = Endpoint(where, keys.get(origin_of(where, "--url")), parallel=options.parallel)
                endpoints[where] = await stack.enter_async_context(endpoint)
            pinned = None
            if at is None and "@" in model:
                admin = admin or AdminClient(url, options.admin_key)
                pinned = model
                model = f"compare-{digest(pinned)[:12]}"
                admin.call("PUT", f"/aliases/{model}", {"split": {pinned: 1}})
                aliases[model] = pinned
                stack.callback(_remove_alias, admin, model)
            found.append(await _contestant(name, endpoints[where], model))
        yield tuple(found)


def _remove_alias(admin: AdminClient, alias: str) -> None:
    try:
        admin.call("DELETE", f"/aliases/{alias}")
    except CommandError as error:
        print(f"guanaco: the alias {alias} is still there ({error}): remove it", file=sys.stderr)


async def _contestant(name: str, endpoint: Endpoint, model: str) -> Contestant:
    """A contestant with all that decides its answers: the version of its adapter, and the base's fingerprint."""
    card = await find_model(endpoint, model)
    if model == "base":
        if not card.get("id"):
            raise CommandError(f"{endpoint.origin} does not say what its base is called: name it instead of `base`")
        model = str(card["id"])
    version = card.get("version")
    if version is None and card.get("parent"):  # an alias: its card does not say which version answers
        version = await _probed_version(endpoint, model)
    parts = [str(part) for part in (version, card.get("base_fingerprint")) if part]
    family = tuple(str(card[field]) for field in ("root", "parent") if card.get(field))
    is_base = bool(card.get("id")) and not (card.get("parent") or version)
    return Contestant(name, endpoint, model, "/".join(parts) or None, family, is_base)


async def _probed_version(endpoint: Endpoint, model: str) -> str | None:
    """The adapter version that an alias leads to now: asks for one token, and reads the version from the headers. None
    if they name none."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    try:
        _, headers = await endpoint.chat(body)
    except RequestRefused:
        return None
    return headers.get("x-adapter-version")


def _promote(options: Options, result: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Point the alias at the contestant that is better than every other one, if there is one."""
    names = [card["name"] for card in result["contestants"]]
    beaten: dict[str, set[str]] = {name: set() for name in names}
    for benchmark in result["benchmarks"].values():
        for pair in benchmark["pairs"]:
            if pair["is_better"]:
                beaten[pair["player"]].add(pair["other"])
            elif pair["is_worse"]:
                beaten[pair["other"]].add(pair["player"])
    winner = next((name for name in names if len(beaten[name]) == len(names) - 1), None)
    if winner is None:
        why = "no contestant is better than all others by its interval: the alias stays as it is"
        return {"alias": options.promote, "target": None, "why": why}
    if "://" in winner:
        return {"alias": options.promote, "target": None, "why": f"{winner} is not on {options.url}"}
    if (base := next((c for c in plan.contestants if c.name == winner and c.is_base), None)) is not None:
        why = f"{winner} is better than every other contestant, and an alias leads to adapters only: it stays as it is"
        return {"alias": options.promote, "target": None, "why": f"{why}; clients reach the base as {base.model}"}
    if winner == options.promote:
        return {"alias": options.promote, "target": None, "why": f"{winner} is this alias: it stays as it is"}
    try:
        AdminClient(options.url, options.admin_key).call("PUT", f"/aliases/{options.promote}", {"split": {winner: 1}})
    except CommandError as error:  # the comparison took long: its reports are written all the same
        return {
            "alias": options.promote,
            "target": None,
            "why": f"{winner} is better, but the alias was refused: {error}",
        }
    return {"alias": options.promote, "target": winner, "why": "it is better than every other contestant"}


def _progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what}: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _show(result: dict[str, Any]) -> None:
    console = Console(highlight=False)
    for title, heads, rows in tables(result):
        table = Table(*map(escape, heads), title=escape(title), title_justify="left", box=None)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    for warning in result["warnings"]:
        console.print(f"warning: {escape(warning)}", soft_wrap=True)
    for sentence in headline(result):
        console.print(f"[bold]{escape(sentence)}[/]", soft_wrap=True)
    if promoted := result.get("promoted"):
        target = promoted["target"] or "nothing new"
        console.print(f"{escape(promoted['alias'])} leads to {escape(target)}: {escape(promoted['why'])}")
