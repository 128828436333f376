"""`guanaco bench serve`: what it counts as an answer, from when it counts, and what its results say."""

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from guanaco.server.commands.bench.serving import arrivals
from guanaco.server.commands.bench.serving.client import Exchange, Outcome, Target
from guanaco.server.commands.bench.serving.metrics import (
    by_prompt_length,
    capacity,
    is_good,
    knee,
    summarise,
    tokens_over_time,
)
from guanaco.server.commands.bench.serving.runner import Due, Run, run_load
from guanaco.server.commands.main import app
from support.load.stream_stub import NUM_PIECES, StreamStub


@pytest.fixture(scope="module")
def stub() -> Iterator[StreamStub]:
    with StreamStub() as running:
        yield running


def target(url: str) -> Target:
    return Target(url, "/v1/chat/completions", {})


def ask(url: str, *models: str, timeout: float = 30, **options: Any) -> list[Exchange]:
    plan = [Due(0.0, model, {"model": model}) for model in models]
    return run_load(target(url), plan, timeout=timeout, **options).exchanges


def bench(stub: StreamStub, *arguments: object) -> Result:
    words = ["bench", "serve", "--base-url", stub.url, *map(str, arguments)]
    return CliRunner().invoke(app, words, catch_exceptions=False)


@pytest.mark.parametrize(
    ("model", "outcome", "error"),
    [
        ("good", Outcome.COMPLETED, ""),
        ("silent", Outcome.COMPLETED, ""),
        ("no end", Outcome.CUT_OFF, "no_finish_reason"),
        ("no done", Outcome.CUT_OFF, "no_done"),
        ("two ends", Outcome.CUT_OFF, "several_finish_reasons"),
        ("two done", Outcome.CUT_OFF, "several_done"),
        ("after done", Outcome.CUT_OFF, "event_after_done"),
        ("error", Outcome.CUT_OFF, "engine_dead"),
        ("failed", Outcome.CUT_OFF, "finish_reason_error"),
        ("not json", Outcome.CUT_OFF, "unreadable_event"),
        ("no text", Outcome.CUT_OFF, "unreadable_event"),
        ("busy", Outcome.REFUSED, "server_overloaded"),
        ("limited", Outcome.REFUSED, "rate_limit"),
        ("unknown", Outcome.FAILED, "model_not_found"),
        ("broken", Outcome.FAILED, "status_500"),
        ("no http", Outcome.FAILED, "not_http"),
    ],
)
def test_each_kind_of_answer_is_counted_as_what_it_is(
    stub: StreamStub, model: str, outcome: Outcome, error: str
) -> None:
    (exchange,) = ask(stub.url, model)
    assert (exchange.outcome, exchange.error) == (outcome, error)


@pytest.mark.parametrize("model", ["reset", "reset late"])
def test_a_connection_that_breaks_is_a_cut_answer(stub: StreamStub, model: str) -> None:
    (exchange,) = ask(stub.url, model)
    assert exchange.outcome is Outcome.CUT_OFF
    assert exchange.error in ("connection_reset", "connection_closed", "no_finish_reason")


def test_no_server_and_no_answer(stub: StreamStub) -> None:
    (exchange,) = ask("http://127.0.0.1:9", "good")
    assert (exchange.outcome, exchange.error) == (Outcome.FAILED, "ConnectionRefusedError")
    (exchange,) = ask(stub.url, "never", timeout=0.05)
    assert (exchange.outcome, exchange.error, exchange.status) == (Outcome.FAILED, "timeout", 0)
    (exchange,) = run_load(
        target(stub.url), [Due(0.0, "never", {"model": "never"}, leave_after=0.02)], timeout=30
    ).exchanges
    assert (exchange.outcome, exchange.error) == (Outcome.CANCELLED, "")


@pytest.mark.parametrize("cut", [1, 7])
def test_an_answer_may_come_in_any_pieces(cut: int) -> None:
    with StreamStub(cut=cut) as stub:
        (exchange,) = ask(stub.url, "good")
    assert exchange.outcome is Outcome.COMPLETED, exchange.error
    assert (exchange.text, len(exchange.pieces)) == ("word " * NUM_PIECES, NUM_PIECES)
    assert (exchange.prompt_tokens, exchange.completion_tokens, exchange.cached_tokens) == (7, 8, 2)
    assert exchange.due <= exchange.first <= exchange.ended


def test_a_server_that_stands_still_is_seen_by_all_requests_that_are_due_meanwhile() -> None:
    """The open loop: they are sent all the same, and their time counts from when they were due."""
    frozen, per_second, count = 0.6, 100, 80
    with StreamStub() as stub:
        plan = [Due(i / per_second, "good", {"model": "good"}) for i in range(count)]
        stub.freeze(frozen)  # before the first request is due; it ends later than `frozen` from here
        end = time.perf_counter() + frozen
        start = time.perf_counter()
        run = run_load(target(stub.url), plan, timeout=30)
    waited = [e for e in run.exchanges if start + e.due < end - 0.1]
    assert len(waited) >= 40
    for exchange in waited:
        assert exchange.outcome is Outcome.COMPLETED
        assert exchange.first is not None
        assert exchange.first - exchange.due >= end - start - exchange.due - 0.1
    figures = summarise(run, percentiles=[90, 99], goals={})
    assert figures["p99_ttft_ms"] >= 1000 * (frozen - 0.2)
    assert figures["max_concurrent_requests"] >= 40, "a closed loop would have waited with one"


def test_requests_beyond_the_concurrency_wait_here_and_it_counts() -> None:
    """One at a time, and each takes a while: the last one's time has the waiting for all the others in it."""
    most = now = 0

    async def begun(_: Any) -> None:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1

    with StreamStub(begun=begun) as stub:
        exchanges = ask(stub.url, *["good"] * 6, max_concurrency=1)
    assert most == 1
    last = max(exchanges, key=lambda e: e.sent or 0.0)
    assert last.first is not None
    assert last.first - last.due >= 6 * 0.02
    assert last.sent is not None
    assert last.sent >= 5 * 0.02


def test_arrivals_have_the_rate_and_the_spread() -> None:
    rng = np.random.default_rng(0)
    for burstiness, cv in ((1.0, 1.0), (1 / 16, 4.0), (4.0, 0.5)):
        times = arrivals.arrival_times(20_000, rate=50, burstiness=burstiness, rng=rng)
        assert times == sorted(times)
        assert times[-1] == pytest.approx(20_000 / 50)
        gaps = np.diff([0.0, *times])
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    even = arrivals.arrival_times(4, rate=2, burstiness=math.inf, rng=rng)
    assert even == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert arrivals.arrival_times(3, rate=math.inf, burstiness=1.0, rng=rng) == [0.0] * 3


@pytest.mark.parametrize(
    ("kind", "start"), [(arrivals.LINEAR, 0.0), (arrivals.LINEAR, 5.0), (arrivals.EXPONENTIAL, 5.0)]
)
def test_a_ramp_begins_and_ends_at_its_rates(kind: str, start: float) -> None:
    ramp = arrivals.Ramp(kind, start, 50.0)
    rng = np.random.default_rng(0)
    times = arrivals.arrival_times(10_000, rate=1, burstiness=math.inf, rng=rng, ramp=ramp)
    assert times[-1] == pytest.approx(10_000 / ramp.mean)
    assert times[-1] - times[-51] == pytest.approx(1.0, rel=0.02)
    if start:
        assert times[4] == pytest.approx(1.0, rel=0.05)


def test_popularity_of_models() -> None:
    rng = np.random.default_rng(0)
    names = [f"a{i}" for i in range(64)]
    counts = Counter(arrivals.choose_models(names, 100_000, zipf=1.0, rng=rng))
    assert counts["a0"] / 100_000 == pytest.approx(0.21, abs=0.01)
    assert sum(counts[name] for name in names[:8]) / 100_000 == pytest.approx(0.57, abs=0.01)
    assert arrivals.choose_models(["a", "b"], 3, zipf=9.0, rng=rng, assignment="round-robin") == ["a", "b", "a"]


def exchange_of(due: float, pieces: list[float], ended: float, **fields: Any) -> Exchange:
    given = {"outcome": Outcome.COMPLETED, "completion_tokens": len(pieces), "prompt_tokens": 10, "sent": due, **fields}
    return Exchange(0, given.pop("model", "a"), due, ended=ended, pieces=pieces, **given)


def test_the_figures_of_a_run_that_is_known() -> None:
    exchanges = [
        exchange_of(1.0, [1.1, 1.2, 1.4], 1.5, sent=1.05),
        exchange_of(2.0, [3.0], 3.0, model="b", prompt_tokens=100),
        exchange_of(2.5, [], 2.52, outcome=Outcome.REFUSED, error="full", retry_after=True),
        exchange_of(2.5, [2.6], 2.7, outcome=Outcome.CUT_OFF, error="no_done"),
        exchange_of(2.5, [], 2.6, outcome=Outcome.CANCELLED),
    ]
    goals = {"ttft": 200.0, "itl": 250.0}
    result = summarise(Run(exchanges, 4.0, 0.1), percentiles=[50, 100], goals=goals)
    counts = ("completed", "failed", "refused", "cut_off", "no_answer", "cancelled", "refused_without_retry_after")
    assert [result[name] for name in counts] == [2, 2, 1, 1, 0, 1, 0]
    assert result["error_counts"] == {"full": 1, "no_done": 1}
    assert (result["request_throughput"], result["output_throughput"]) == (0.5, 1.0)
    assert (result["request_goodput"], result["goodput_share"], result["goodput_share_of_accepted"]) == (
        0.25,
        0.25,
        1 / 3,
    )
    assert result["mean_ttft_ms"] == pytest.approx((100 + 1000) / 2)
    assert result["p100_itl_ms"] == pytest.approx(200)
    assert result["mean_tpot_ms"] == pytest.approx(1000 * 0.4 / 2), "answers of one token have none"
    assert result["p100_e2el_ms"] == pytest.approx(1000)
    assert result["p100_refusal_ms"] == pytest.approx(20)
    assert result["max_concurrent_requests"] == 4
    assert not is_good(exchanges[0], {"tpot": 100.0})
    rows = by_prompt_length(Run(exchanges, 4.0, 0.1), [99])
    assert [(row["from"], row["to"], row["requests"]) for row in rows] == [(1, 16, 1), (65, 128, 1)]
    assert rows[0]["prompt_tokens_per_s"] == pytest.approx(100)
    xs, series = tokens_over_time(Run(exchanges, 4.0, 0.1))
    assert list(series) == ["a", "b"]
    assert sum(series["a"]) * (xs[1] - xs[0]) == pytest.approx(4)


def test_the_busiest_second_counts_tokens_and_not_pieces() -> None:
    exchanges = [
        exchange_of(0.0, [0.1, 0.2, 1.1], 1.2, completion_tokens=12),  # with drafts: four tokens a piece
        exchange_of(0.0, [1.5, 1.6], 1.7, completion_tokens=None),  # no usage: a token a piece
        exchange_of(0.0, [], 1.9, completion_tokens=1),  # its only token ends it
        exchange_of(0.0, [1.2], 1.3, completion_tokens=50, outcome=Outcome.CUT_OFF),
    ]
    assert summarise(Run(exchanges, 2.0, 0.1), percentiles=[], goals={})["max_output_tokens_per_s"] == pytest.approx(8)
    assert summarise(Run(exchanges[1:], 2.0, 0.1), percentiles=[], goals={})["max_output_tokens_per_s"] == 3
    assert summarise(Run([], 2.0, 0.1), percentiles=[], goals={})["max_output_tokens_per_s"] == 0


def test_knee_and_capacity() -> None:
    rows = [(1, 1.0, 100, 1.0), (2, 2.0, 110, 0.995), (4, 3.9, 150, 0.98), (8, 4.1, 900, 0.1)]
    results = [
        {"request_rate": rate, "request_throughput": done, "mean_e2el_ms": took, "goodput_share": good}
        for rate, done, took, good in rows
    ]
    assert (knee(results), capacity(results)) == (2, 1)
    assert (knee(results[:2]), capacity([{**r, "goodput_share": None} for r in results])) == (None, None)


def test_a_sweep_end_to_end(stub: StreamStub, tmp_path: Path) -> None:
    done = bench(
        stub, "--models", "good,busy,no end,<b>x</b>", "--zipf", "0.5", "--request-rate", "500,250", "--num-prompts",
        "40", "--random-input-len", "5", "--goodput", "ttft:60000 itl:60000", "--save-result", "--save-detailed",
        "--result-dir", tmp_path / "out", "--result-filename", "r.json", "--api-key", "sesame", "--metadata",
        "machine=here", "--ignore-eos", "--extra-body", '{"top_k": 5}', "--output-len", "9",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    results = [json.loads((tmp_path / "out" / f"r-{rate}qps.json").read_text()) for rate in ("250.0", "500.0")]
    for result in results:
        assert result["num_prompts"] == result["completed"] + result["refused"] + result["cut_off"] == 40
        assert result["error_counts"] == {"server_overloaded": result["refused"], "no_finish_reason": result["cut_off"]}
        assert result["total_output_tokens"] == 8 * result["completed"]
        assert result["goodput_share"] == result["completed"] / 40
        assert result["machine"] == "here"
        assert {len(result[name]) for name in ("ttfts", "itls", "errors", "output_lens", "generated_texts")} == {40}
    assert "requests/s" in done.stdout
    assert "cut off" in done.stdout
    page = (tmp_path / "out" / "r.html").read_text()
    assert "<b>x" not in page
    assert "&lt;b&gt;x" in page
    assert page.count("<svg") >= 6
    assert "sesame" not in page + json.dumps(results) + done.output
    chosen = results[0]["options"]
    assert (chosen["random_input_len"], chosen["request_rate"]) == (5, "500,250")
    assert not {"api_key", "header", "burstiness"} & chosen.keys(), "neither secrets nor defaults"
    asked = [body for body in stub.bodies if body.get("top_k") == 5]
    assert len(asked) == 80
    assert {(body["max_tokens"], body["ignore_eos"], body["stream"]) for body in asked} == {(9, True, True)}
    assert len({body["messages"][0]["content"] for body in asked}) == 80, "the second run asks nothing that is cached"
    assert "Authorization: Bearer sesame\r\n" in stub.heads[-1]


def test_a_file_and_the_servers_log(stub: StreamStub, tmp_path: Path) -> None:
    lines = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "max_tokens": 3},
        {"text": "### Human: one ### Assistant: two ### Human: three ### Assistant:"},
        {"logger": "guanaco.server", "message": "not a request"},
        {"logger": "guanaco.access", "route": "/health"},
        {"logger": "guanaco.access", "prompt_tokens": 12, "completion_tokens": 5, "model": "other",
         "time": "2026-01-01T00:00:01.500+00:00", "e2e_seconds": 0.5},
    ]  # fmt: skip
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    stub.bodies.clear()
    assert bench(stub, "--dataset-path", path, "--num-prompts", 4, "--max-concurrency", 1, "--json").exit_code == 0
    first, second, third, again = stub.bodies
    assert (first["messages"], first["max_tokens"]) == ([{"role": "user", "content": "q"}], 3)
    assert [m["role"] for m in second["messages"]] == ["user", "assistant", "user"]
    assert (third["model"], third["max_tokens"]) == ("other", 5)
    assert len(third["messages"][0]["content"].split()) == 12
    assert again["messages"][0]["content"] == "(1) q"
    stub.bodies.clear()
    path.write_text("\n".join(json.dumps({"text": t, "timestamp": 100 + at}) for t, at in (("b", 0.05), ("a", 0.0))))
    done = bench(stub, "--dataset-path", path, "--self-timed", "--save-detailed", "--result-dir", tmp_path,
                 "--result-filename", "t.json", "--backend", "openai")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert [body["prompt"] for body in stub.bodies] == ["a", "b"]
    assert json.loads((tmp_path / "t.json").read_text())["start_times"] == pytest.approx([0.0, 0.05])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--request-rate", "0"), "--request-rate 0"),
        (("--request-rate", "1,x"), "--request-rate 1,x"),
        (("--request-rate", "nan"), "--request-rate nan"),
        (("--request-rate", "2,2"), "different rates"),
        (("--burstiness", "0"), "--burstiness 0"),
        (("--burstiness", "nan"), "--burstiness nan"),
        (("--goodput", "speed:1"), "--goodput speed:1"),
        (("--goodput", "ttft"), "--goodput ttft"),
        (("--percentile-metrics", "ttft,x"), "--percentile-metrics x"),
        (("--metric-percentiles", "101"), "from 0 to 100"),
        (("--backend", "tgi"), "--backend tgi"),
        (("--endpoint", "v1"), "--endpoint v1"),
        (("--model", "a", "--models", "b"), "not both"),
        (("--num-prompts", "1", "--duration", "1", "--request-rate", "1"), "not both"),
        (("--duration", "1"), "needs a rate"),
        (("--duration", "1e9", "--request-rate", "9"), "at most 1,000,000"),
        (("--ramp-up-strategy", "linear"), "needs --ramp-up-start-rps"),
        (("--ramp-up-end-rps", "4"), "go with --ramp-up-strategy"),
        (("--ramp-up-strategy", "exponential", "--ramp-up-start-rps", "0", "--ramp-up-end-rps", "4"), "above 0"),
        (("--extra-body", "[]"), "--extra-body"),
        (("--metadata", "x"), "--metadata x"),
        (("--header", "A=é"), "--header A"),
        (("--dataset-name", "sonnet"), "--dataset-name sonnet"),
        (("--dataset-name", "custom"), "needs --dataset-path"),
        (("--dataset-name", "openassistant"), "oa_questions.jsonl"),
        (("--dataset-path", "/nowhere"), "cannot be read"),
        (("--self-timed",), "time or timestamp"),
        (("--save-result", "--result-filename", "a/b"), "--result-filename a/b"),
        (("--save-result", "--result-dir", "/dev/null/x"), "can't be written"),
        (("--base-url", "ftp://x"), "--base-url ftp://x"),
        (("--base-url", "http://127.0.0.1:9"), "no server at http://127.0.0.1:9"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is_sent(
    stub: StreamStub, arguments: tuple[str, ...], problem: str
) -> None:
    stub.bodies.clear()
    done = bench(stub, "--random-input-len", 2, *arguments)
    assert done.exit_code == 2, done.output
    assert problem in done.stderr.strip().splitlines()[-1]
    assert stub.bodies == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[]", "line 2: not a JSON object"),
        ("{}", "neither messages nor text"),
        ('{"text": "a", "max_tokens": -1}', "max_tokens must be a whole number"),
        ('{"text": "a", "model": 3}', "model must be a text"),
        ('{"text": "a", "time": "now"}', "time must be seconds"),
        ('{"prompt_tokens": 99999999}', "prompt_tokens must be"),
    ],
)
def test_a_faulty_line_is_named(stub: StreamStub, tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n' + line)
    done = bench(stub, "--dataset-path", path)
    assert (done.exit_code, problem in done.stderr) == (2, True), done.stderr


def test_nothing_answered_is_exit_code_1(stub: StreamStub) -> None:
    assert bench(stub, "--model", "busy", "--num-prompts", 3, "--random-input-len", 2).exit_code == 1
