"""`guanaco generate` over an engine that gives several tokens in one step."""

from types import SimpleNamespace
from typing import Any

import pytest

from guanaco.adapters.versions.profile import Profile
from guanaco.server.bootstrap import runtime
from guanaco.server.commands.terminal import generate_once
from guanaco.server.config import Settings
from guanaco.server.engine.request import TokenOutput


class Letters:
    """A tokenizer whose token ids are code points."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(map(chr, token_ids))

    def control_id(self, text: str) -> None:
        return None

    def holds_control(self, text: str) -> bool:
        return False


def test_tokens_after_a_stop_string_in_the_same_step_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = [TokenOutput("generate", (ord(letter),)) for letter in "abcde"]
    engine = SimpleNamespace(handle=lambda message: None, has_work=True, step=lambda: SimpleNamespace(outputs=outputs))
    made: Any = SimpleNamespace(
        base=SimpleNamespace(tokenizer=Letters(), template=None),
        plan=SimpleNamespace(max_model_len=100),
        adapter=lambda name: SimpleNamespace(profile=Profile(stop=("cd",)), version="v1"),
        engine=engine,
    )
    monkeypatch.setattr(runtime, "build_runtime", lambda *arguments: made)
    generate_once(Settings(), "hi", name="x", max_tokens=9, temperature=None, seed=1, raw=True)
    assert capsys.readouterr().out == "ab\n"
