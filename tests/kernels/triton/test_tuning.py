"""Tiles that are timed on the card: with a made-up clock, in Triton's interpreter; and the file that keeps them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.kernels.product_cases import make_product

pytest.importorskip("triton")

from guanaco.kernels.triton import configs as triton_configs
from guanaco.kernels.triton import tuning as triton_tuning
from guanaco.kernels.triton.configs import DotConfig, dot_config
from guanaco.kernels.triton.products import nf4_dot
from guanaco.kernels.triton.tuning import candidates, card_key, load, save, tune

CPU = torch.device("cpu")
N, K = 64, 128
USUAL = dot_config("sm_80", 8, K)
KEY = card_key("NVIDIA L4", "sm_89")


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_tuning, "COLUMNS", (8, 16))
    monkeypatch.setitem(triton_tuning._CHOICES, "num_stages", (3, 4))
    yield
    assert triton_configs._tuned == {}, "a tile stayed"


def clock(seconds_of: Callable[[DotConfig], float]) -> Callable[[Callable[[], None]], float]:
    """Runs what it is to time, and makes its seconds up from the tile that is in use."""

    def seconds(launch: Callable[[], None]) -> float:
        launch()
        (config,) = triton_configs._tuned.values()
        return seconds_of(config)

    return seconds


def test_the_fastest_tile_is_taken_and_the_usual_one_not_written_down() -> None:
    tiles = tune([(N, K)], CPU, clock(lambda c: c.block_n + c.num_warps if c.columns == 8 else 1.0))
    assert set(tiles) == {(8, K)}, "nothing is faster than the usual one for 16"
    assert (tiles[8, K].block_n, tiles[8, K].num_warps) == (64, 2)


@pytest.mark.parametrize("columns", [8, 16])
def test_every_candidate_multiplies_within_the_tolerance(columns: int) -> None:
    case = make_product(columns - 1, [N], K)
    tried = candidates(dot_config("sm_80", columns, K), K)
    assert len(tried) == len(set(tried)) == 2**4
    for config in tried:
        with triton_configs.tuned({(columns, K): config}):
            assert case.error(nf4_dot.product) < 1.5e-3, config


def test_what_is_wrong_or_does_not_run_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    product: Any = nf4_dot.product

    def faulty(x: torch.Tensor, ones: torch.Tensor, weight: Any, y: torch.Tensor) -> None:
        config = dot_config("sm_80", x.shape[0], K)
        if config.block_n == 64 and config.num_warps == 2:
            raise RuntimeError("another grouping than was proven")
        product(x, ones, weight, y)
        if config.block_n == 64:
            y[0] += 1.0

    monkeypatch.setattr(nf4_dot, "product", faulty)
    tiles = tune([(N, K)], CPU, clock(lambda c: c.block_n + c.num_stages / 10))
    assert all(config.block_n == 128 and config.num_stages == 3 for config in tiles.values())
    assert tiles


def test_tiles_of_this_card_do_not_show_in_what_is_recorded_for_others() -> None:
    other = replace(USUAL, block_n=64)
    with triton_configs.tuned({(8, K): other}):
        assert dot_config("sm_80", 7, K) == other
        with triton_configs.pretending("sm_90", 132):
            assert dot_config("sm_80", 7, K) == USUAL


def test_the_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, tiles = tmp_path / "cache" / "tuned.json", {(8, K): replace(USUAL, block_n=64, num_warps=4)}
    assert load(path, KEY) == ({}, "")
    save(path, KEY, tiles)
    found, note = load(path, KEY)
    assert found == tiles
    assert note.startswith("1 tiles as they were timed on this card")
    save(path, KEY, {})
    assert load(path, KEY)[0] == {}
    assert [p.name for p in path.parent.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize("name", ["card", "target", "triton", "kernel"])
def test_a_file_for_something_else_is_ignored(name: str, tmp_path: Path) -> None:
    save(tmp_path / "t.json", KEY | {name: "other"}, {(8, K): USUAL})
    tiles, note = load(tmp_path / "t.json", KEY)
    assert tiles == {}
    assert "another card, Triton or kernel" in note


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"block_n": 128', '"block_n": 96'),
        lambda text: text.replace('"block_n": 128', '"block_n": "128"'),
        lambda text: text.replace('"columns": 8', '"columns": 7'),
        lambda text: text.replace(f'"k": {K}', '"k": 65'),
        lambda text: text.replace('"num_warps": 2,', ""),
    ],
)
def test_a_damaged_file_is_ignored_with_a_note(damage: Callable[[str], str], tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    save(path, KEY, {(8, K): USUAL})
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    tiles, note = load(path, KEY)
    assert tiles == {}
    assert "is damaged" in note
    assert json.loads(text)["key"] == KEY
