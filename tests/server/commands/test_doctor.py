"""`guanaco doctor`: the hub, and what fits into memory. What it finds about kernels is in test_commands."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from guanaco.server.bootstrap.gpu import Gpu
from guanaco.server.bootstrap.machine import look
from guanaco.server.bootstrap.memory_plan import KvRequest, plan_memory
from guanaco.server.commands import doctor, doctor_fit
from guanaco.server.commands.main import app
from guanaco.server.config import Settings, load_settings
from support.models.tiny_models import make_tiny_llama

GIB = 1 << 30
MACHINE = replace(look(), memory_bytes=32 * GIB, memory_available_bytes=16 * GIB)


@contextmanager
def hub(status: int) -> Iterator[str]:
    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def told(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, ["doctor", "--json", *arguments], catch_exceptions=False)
    return done.exit_code, json.loads(done.stdout)


def about_hub(report: dict[str, Any]) -> dict[str, Any]:
    (finding,) = (f for f in report["findings"] if f["name"] == "hub")
    return finding


def test_a_hub_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with hub(200) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        code, report = told("--model", "org/name")
    assert (code, about_hub(report)["value"]) == (0, f"{url} answers")


@pytest.mark.parametrize("status", [None, 503])
def test_a_hub_that_does_not_answer_fails_only_where_it_is_needed(
    status: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub(status or 200) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url if status else "http://127.0.0.1:9")
        code, report = told()
        assert (code, about_hub(report)["ok"]) == (0, True)
        for needs in (["--model", "org/name"], ["--hub-adapters"]):
            code, report = told(*needs)
            assert (code, report["ok"], about_hub(report)["ok"]) == (1, False, False)
            assert "--offline" in about_hub(report)["advice"]
        monkeypatch.setattr(doctor.httpx2, "head", lambda *_, **__: pytest.fail("the hub was asked"))
        code, report = told("--model", "org/name", "--offline")
    assert (code, about_hub(report)["value"]) == (0, "not asked: offline")


def test_predictions_are_the_servers_own_plan() -> None:
    """An 8B by hand; less room in half the memory; what does not fit is left out."""
    settings = Settings()
    fits = {fit.model: fit for fit in doctor_fit.predict_known(settings, MACHINE, None)}
    fit = fits["Llama-3.1-8B"]
    assert fit.weights_bytes / GIB == pytest.approx(5.3, abs=0.1)
    assert fit.adapter_bytes == 32 * 16 * 4 * (2 * (4096 + 4096) + 2 * (1024 + 4096) + 3 * (4096 + 14336))
    none, one, *_ = fit.rooms
    plan = plan_memory(
        KvRequest(2 * 32 * 16 * 8 * 128 * 2, 16, None, None, 131072, 64),
        weights_bytes=0, adapters_bytes=0, free_bytes=16 * GIB - fit.weights_bytes,
    )  # fmt: skip
    assert (none.adapters, none.kv_tokens, none.context) == (0, plan.kv_tokens, plan.max_model_len)
    assert (one.adapters, one.kv_tokens < none.kv_tokens) == (1, True)
    assert fits["Llama-3.1-70B"].rooms == ()
    assert [len(f.rooms) for f in fits.values()] == [4] * 7 + [0]
    small = replace(MACHINE, memory_available_bytes=8 * GIB)
    for fewer, more in zip(doctor_fit.predict_known(settings, small, None), fits.values(), strict=True):
        assert sum(room.kv_tokens for room in fewer.rooms) <= sum(room.kv_tokens for room in more.rooms)


def test_settings_change_what_fits() -> None:
    def tokens(gpu: Gpu | None = None, **given: str) -> list[int]:
        fits = doctor_fit.predict_known(load_settings(given), MACHINE, gpu)
        return [room.kv_tokens for room in fits[5].rooms]

    assert tokens(kv_cache_memory="12GiB") == [], "more than there is beside the weights"
    assert tokens(max_model_len="100000") == [], "the cache does not hold one such request"
    assert tokens(adapter_host_memory="1MiB")[0] - tokens(adapter_host_memory="1MiB")[-1] <= 16
    card = Gpu("a card", (8, 9), 24 * GIB, 24 * GIB)
    assert len(set(tokens(card))) == 1, "a GPU's room for adapters is set aside"
    assert tokens(card)[0] > tokens()[0]
    assert tokens(replace(card, free_bytes=6 * GIB)) == []


def test_the_chosen_model_stands_first_and_a_failure_is_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_llama(tmp_path / "tiny", kind="gqa")
    code, report = told("--model", str(model), "--offline")
    assert (code, report["fits"][0]["model"], len(report["fits"])) == (0, "tiny", 9)
    table = CliRunner().invoke(app, ["doctor", "--offline", "--model", str(model)], env={"COLUMNS": "100"}).stdout
    assert [line for line in table.splitlines() if line.startswith("tiny ") and "512 × 64" in line]
    monkeypatch.setattr(doctor, "look", lambda: replace(MACHINE, memory_available_bytes=1000))
    code, report = told("--model", str(model), "--offline")
    assert (code, report["fits"][0]["rooms"]) == (1, [])
    assert "more memory than is available" in report["findings"][-1]["advice"]
