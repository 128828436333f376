"""The command that asks a real Prometheus for every panel: what it calls wrong, and that it draws."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("matplotlib")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "loadtest" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


watch_server, watch_picture = load("watch_server"), load("watch_picture")


def answering(monkeypatch: pytest.MonkeyPatch, value: dict[str, float], missing: str = "-") -> None:
    """Prometheus' answers: one series each, with the value of the first name that the expression has, else 1."""

    def ask(url: str, expression: str, start: float, end: float) -> list[dict[str, Any]]:
        if missing in expression:
            return []
        number = next((number for name, number in value.items() if name in expression), 1.0)
        return [{"labels": {"adapter": "pirate"}, "points": [(start + second, number) for second in (0, 1, 9)]}]

    monkeypatch.setattr(watch_server, "ask_prometheus", ask)


def test_an_empty_panel_and_one_that_never_moves_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, {})
    assert watch_server.evaluate("", 0, 9)[1] == []
    answering(monkeypatch, {"num_preemptions": 0.0}, missing="guanaco_adapter_bytes")
    wrong = watch_server.evaluate("", 0, 9)[1]
    assert [text.partition(":")[0] for text in wrong] == ["Preemptions", "Memory of adapters"]


def test_what_must_move_are_panels() -> None:
    titles = {
        panel["title"]
        for panel in json.loads((ROOT / "docker/monitoring/grafana/dashboards/guanaco.json").read_text())["panels"]
    }
    assert {*watch_server.MOVES, "Fine-tuning jobs"} <= titles


def test_values_that_are_no_numbers_count_as_absent() -> None:
    assert watch_server.finite([[1, "NaN"], [2, "+Inf"], [3, "0.5"]]) == [(3.0, 0.5)]


def test_the_picture_has_every_panel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answering(monkeypatch, {}, missing="vllm:spec_decode_")
    shown = watch_server.evaluate("", 0, 9)[0]
    titles = []
    for name in ("_stat", "_graph"):
        draw = getattr(watch_picture, name)
        monkeypatch.setattr(
            watch_picture,
            name,
            lambda axes, panel, *rest, draw=draw: (titles.append(panel["title"]), draw(axes, panel, *rest)),
        )
    watch_picture.draw(shown, tmp_path / "all.png", "a test")
    assert sorted(titles) == sorted(panel["title"] for panel in shown)
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert {panel["unit"] for panel in shown} <= set(watch_picture.FORMATS)
    assert re.fullmatch(
        r"p90 pirate", watch_picture._legend({"labels": {"adapter": "pirate"}, "legend": "p90 {{adapter}}"})
    )


def test_a_picture_of_panels_without_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answering(monkeypatch, {}, missing="")
    shown, wrong = watch_server.evaluate("", 0, 9)
    assert shown
    assert wrong
    assert not any(panel["lines"] for panel in shown)
    few = [next(panel for panel in shown if (panel["type"] == "stat") is is_stat) for is_stat in (True, False)]
    watch_picture.draw(few, tmp_path / "none.png", "a test")
    assert (tmp_path / "none.png").read_bytes().startswith(b"\x89PNG")
