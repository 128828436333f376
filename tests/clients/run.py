"""`make clients`: run real clients against a live demo server, each in its own environment, and keep what they found.

The catalogue says which clients there are. A script prints one JSON line for each of its checks. The results go to
loadtest/results/clients-DATE.json and into the table of docs/clients.md. The exit code is 1 if a check failed or a
client did not run.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import environments
import results
from catalogue import CLIENTS, Client

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/importable"))

from support.server.live_server import LiveServer  # noqa: E402 - the line above makes it importable

BUILD = ROOT / "build/clients"
RESULTS = ROOT / "loadtest/results"
PAGE = ROOT / "docs/clients.md"
MODEL = "smollm2-135m-instruct"


def checks_in(output: str) -> list[results.Result]:
    """The checks that a script printed, one JSON object a line, among anything else that its client prints."""
    lines = [line for line in output.splitlines() if line.startswith('{"check"')]
    return [json.loads(line) for line in lines]


def run_script(command: Sequence[str], url: str, folder: Path, seconds: float) -> list[results.Result]:
    """Run one client's script; its checks, with one more that failed if the script did not end well."""
    env = os.environ | {"GUANACO_URL": url, "GUANACO_MODEL": MODEL, "GUANACO_SCRATCH": str(folder)}
    log = folder / "output.log"
    problem = ""
    with log.open("wb") as out:
        try:
            code = subprocess.run(command, stdout=out, stderr=out, env=env, timeout=seconds, check=False).returncode
            problem = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            problem = f"not done after {seconds:g} s"
    output = log.read_text(errors="replace")
    checks = checks_in(output)
    if problem or not checks:
        last = " / ".join(output.strip().splitlines()[-3:])
        checks.append({"check": "the script ends", "ok": False, "detail": f"{problem or 'no checks'}: {last}"})
    return checks


def did_not_run(client: Client, why: str, today: str) -> results.Result:
    """The result of a client without any check."""
    about = {"client": client.name, "title": client.title, "versions": {}, "date": today}
    return {**about, "not_run": why, "checks": []}


def run_client(client: Client, url: str, seconds: float, today: str) -> results.Result:
    """Install one client and run its script."""
    folder = BUILD / client.script
    result = did_not_run(client, "", today)
    try:
        command = environments.prepare(client, folder)
        result["versions"] = environments.versions(client, folder)
    except environments.NotInstalled as error:
        result["not_run"] = str(error)
    else:
        result["checks"] = run_script(command, url, folder, seconds)
    print(f"{client.name}: {results.outcome(result)}", flush=True)
    for check in result["checks"]:
        print(f"  {'ok  ' if check['ok'] else 'FAIL'} {check['check']}: {check['detail']}", flush=True)
    return result


def run_all(clients: Sequence[Client], url: str, seconds: float, today: str) -> Iterator[results.Result]:
    """Run the clients, with one server for all that need the same flags. What fails keeps none of the others back."""
    if url:
        yield from (run_client(client, url, seconds, today) for client in clients)
        return
    BUILD.mkdir(parents=True, exist_ok=True)
    by_flags = sorted(clients, key=lambda client: client.server_flags)
    for flags, group in itertools.groupby(by_flags, key=lambda client: client.server_flags):
        left = list(group)
        try:
            with LiveServer(flags, BUILD / "server.log") as server:
                while left:
                    yield run_client(left.pop(0), server.url, seconds, today)
        except AssertionError as error:
            last = str(error).strip().splitlines()[-1]
            yield from (did_not_run(client, f"the server did not start: {last}", today) for client in left)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of clients, with commas between them")
    parser.add_argument("--url", default="", help="use the demo server at this URL instead of starting one")
    parser.add_argument("--seconds", type=float, default=900, help="most time for one client's script")
    parser.add_argument("--no-results", action="store_true", help="write neither the results file nor the page")
    options = parser.parse_args()
    names = [client.name for client in CLIENTS]
    asked = options.only.split(",") if options.only else names
    if unknown := sorted(set(asked) - set(names)):
        parser.error(f"no such client: {', '.join(unknown)}; there are {', '.join(names)}")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    chosen = [client for client in CLIENTS if client.name in asked]
    found: list[results.Result] = []
    try:
        for result in run_all(chosen, options.url.rstrip("/"), options.seconds, today):
            found.append(result)
    finally:  # what was found before an interrupt is kept, too
        print(results.table(found), end="", flush=True)
        if found and not options.no_results:
            keep(found, names, today)
    return 0 if all(results.passed(result) for result in found) else 1


def keep(found: Sequence[results.Result], names: Sequence[str], today: str) -> None:
    """Write the file of the day and the table of the page; clients that did not run now keep their older results."""
    before = results.newest(RESULTS)
    old = json.loads(before.read_text())["clients"] if before else []
    clients = results.merged(old, found, names)
    about = {"command": "make clients", "machine": f"{platform.machine()}, Python {platform.python_version()}"}
    results.write(RESULTS / f"clients-{today}.json", about, clients)
    PAGE.write_text(results.with_table(PAGE.read_text(), clients))


if __name__ == "__main__":
    sys.exit(main())
