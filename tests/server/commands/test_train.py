"""`guanaco train` as a command: options, refusals before anything is loaded, the last line, publishing."""

import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from typer.testing import CliRunner, Result

from guanaco.models.error_codes import ErrorCode
from guanaco.server.commands.main import app
from guanaco.server.commands.train import run
from guanaco.server.commands.train.options import train
from guanaco.server.errors import CommandError
from guanaco.server.training import extra, job
from guanaco.server.training.data.rows import DataError
from guanaco.server.training.errors import TrainingError, TrainingStopped
from guanaco.server.training.recipes import recipe_for

ANSWER = {"adapter": "/a", "train_loss": 1.0, "eval_loss": None, "tokens_per_second": 2.0, "seconds": 3.0, "steps": 4}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": []}\n')
    return path


def call(data: Path, *arguments: object) -> Result:
    cache = data.parent / "cache"
    fixed = ["train", "--data", data, "--name", "support", "--cache", cache, "--offline"]
    return CliRunner().invoke(app, [str(part) for part in (*fixed, *arguments)])


def run_with(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[job.TrainingRequest]:
    asked: list[job.TrainingRequest] = []

    def run_training(_settings: Any, request: job.TrainingRequest, _console: Any) -> Any:
        asked.append(request)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(job, "run_training", run_training)
    return asked


def test_without_the_extra_one_line_names_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra, "LIBRARIES", ("transformers", "no_such_library"))
    done = call(data)
    assert done.exit_code == 2
    assert "no_such_library" in done.stderr
    assert "make install EXTRAS=train" in done.stderr
    assert "pip install 'guanaco[train]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_options_become_the_recipes_fields(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = run_with(monkeypatch, ANSWER)
    flags = (
        "--rank 8 --epochs 2 --batch-size 6 --learning-rate 0.001 --seed 3 --rslora --targets q_proj,v_proj --resume"
    )
    done = call(data, *flags.split(), "--no-group-by-length", "--json", "--work", data.parent / "work")
    assert (done.exit_code, json.loads(done.stdout)) == (0, ANSWER)
    (request,) = asked
    assert request.given == {
        "rank": 8, "epochs": 2.0, "batch_size": 6, "learning_rate": 0.001, "seed": 3, "rslora": True,
        "targets": ("q_proj", "v_proj"), "group_by_length": False,
    }  # fmt: skip
    assert (request.resume, request.recipe, request.work) == (True, "default", data.parent / "work")
    assert request.out == data.parent / "cache" / "trained" / "support"
    assert call(data, "--adapter-root", data.parent).exit_code == 0
    assert asked[1].out == data.parent / "support"
    assert asked[1].given == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "secret"], "--recipe secret: write one of default, guanaco-2023"),
        (["--too-long", "maybe"], "skip, cut, refuse"),
        (["--train-on", "questions"], "answers, all"),
        (["--publish", "http://127.0.0.1:9"], "--adapter-root is not given"),
        (["--publish", "http://127.0.0.1:9", "--adapter-root", "/root", "--out", "/tmp/x"], "is not below"),
    ],
)
def test_what_can_be_known_before_is_said_before(
    data: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    asked = run_with(monkeypatch, ANSWER)
    done = call(data, *arguments)
    assert (done.exit_code, asked) == (2, [])
    assert words in " ".join(done.stderr.split())


def test_the_end_of_a_training_that_fails_or_is_stopped(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_with(monkeypatch, TrainingError(ErrorCode.TRAINING_DIVERGED, "lower it"))
    done = call(data, "--json")
    told = {"error": {"code": "training_diverged", "message": "lower it", "param": None}}
    assert (done.exit_code, json.loads(done.stdout.splitlines()[-1])) == (1, told)
    done = call(data)
    assert (done.exit_code, done.stderr) == (2, "guanaco: lower it\n")
    run_with(monkeypatch, TrainingStopped("stopped at step 3"))
    done = call(data, "--json")
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "guanaco: stopped at step 3\n")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--recipe", "secret"], "bad_option", "--recipe secret: write one of default, guanaco-2023"),
        (["--rank", "many"], "bad_option", "--rank"),
        (["--no-such-option"], "bad_option", "--no-such-option"),
        (["--threads", "-3"], "bad_option", "--threads"),
        (["--publish", "http://127.0.0.1:9"], "bad_option", "--adapter-root is not given"),
    ],
)
def test_with_json_a_wrong_option_is_an_object_too(
    data: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: str, words: str
) -> None:
    asked = run_with(monkeypatch, ANSWER)
    done = call(data, *arguments, "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.exit_code, error["code"], asked) == (1, code, [])
    assert words in error["message"]
    plain = call(data, *arguments)
    assert (plain.exit_code, plain.stdout) == (2, "")


def test_data_that_can_not_be_trained_on_have_a_code(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_with(monkeypatch, DataError("line 1: mend it"))
    done = call(data, "--json")
    assert json.loads(done.stdout)["error"]["code"] == "invalid_training_data"


class FakeClient:
    calls: list[tuple[Any, ...]] = []
    problem: str | None = None

    def __init__(self, url: str, key: str | None) -> None:
        self.calls.append((url, key))

    def call(self, *arguments: Any) -> dict[str, Any]:
        if self.problem is not None:
            raise CommandError(self.problem)
        self.calls.append(arguments)
        return {"version": "v1"}


def test_publishing_is_tried_before_and_done_after(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeClient, "calls", [])
    monkeypatch.setattr(run, "AdminClient", FakeClient)
    asked = run_with(monkeypatch, ANSWER)
    url, root = "http://127.0.0.1:9", str(data.parent)
    publish = ["--publish", url, "--admin-key", "sesame", "--adapter-root", root, "--out", f"{root}/new/support-2"]
    assert call(data, *publish).exit_code == 0
    assert FakeClient.calls == [
        (url, "sesame"), ("GET", "/adapters"), ("PUT", "/adapters/support", {"source": "new/support-2"})
    ]  # fmt: skip
    monkeypatch.setattr(FakeClient, "problem", "invalid_admin_key: no")
    done = call(data, *publish)
    assert (done.exit_code, len(asked)) == (2, 1), "the key is wrong: nothing is trained"


def test_the_help_says_what_the_recipe_decides_and_the_default_recipes_value() -> None:
    recipes = [recipe_for(name, 10**8, {}).public() for name in ("default", "guanaco-2023")]
    decided = {name for name in recipes[0] if recipes[0][name] != recipes[1][name]} | {"epochs"}
    hints = get_type_hints(train, include_extras=True)
    helps = {name: hint.__metadata__[0].help for name, hint in hints.items() if hasattr(hint, "__metadata__")}
    in_words = {
        "alpha": "twice the rank",
        "eval_every": "a tenth of them, at most 250",
        "save_every": "as --eval-every",
        "learning_rate": "1e-3 below a billion weights, else 2e-4",
        "seed": "0",
        "held_out": "0.1, at most 200 rows",
        "gradient_checkpointing": "from a billion weights on",
    }
    options = ((decided | {"held_out", "seed"}) & set(helps)) - {"steps", "name"}
    assert len(options) == 17
    for name in options:
        value = in_words.get(name, recipes[0][name])
        shown = f"{value:g}" if isinstance(value, float) else value
        assert f"(none: the recipe's; default {shown})" in helps[name], name
