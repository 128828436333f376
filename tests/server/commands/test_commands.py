"""The verbs beside `serve`, each run as it is typed, on a tiny model."""

import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from guanaco.adapters.peft.weights import BASE_FINGERPRINT_KEY, WEIGHTS_NAME
from guanaco.kernels.cpu import library as cpu_native
from guanaco.models.architectures.config_json import read_config
from guanaco.models.architectures.registry import projection_shapes
from guanaco.models.loading.checkpoint import open_checkpoint
from guanaco.server.bootstrap.runtime import _load_provider
from guanaco.server.commands.doctor_fit import weights_bytes
from guanaco.server.commands.main import app
from guanaco.server.commands.setting_options import setting_options
from guanaco.server.config import ENV_PREFIX, load_settings
from support.adapters.tiny_adapters import make_adapter
from support.models.tiny_models import make_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", kind="gqa")


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR with a0, a1, a2, as the peers' adapter maker lays them out."""
    folder, config = tmp_path_factory.mktemp("adapters"), read_config(model)
    targets = {
        f"layers.{i}.{name}": (k, n)
        for i in range(config.num_layers)
        for name, (n, k) in projection_shapes(config).items()
    }
    for number in range(3):
        make_adapter(folder / f"a{number}", targets, 4 + number, 8, seed=number)
    return folder


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GUANACO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GUANACO_THREADS", "1")
    monkeypatch.setenv("GUANACO_OFFLINE", "1")
    monkeypatch.setenv("GUANACO_KV_CACHE_MEMORY", "4MiB")


def _guanaco(*arguments: object, input: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=input, catch_exceptions=False)


def test_bench_prints_the_keys_of_the_peers_drivers(model: Path) -> None:
    done = _guanaco("bench", "engine", "--model", model, "--prompt", 64, "--batches", "1,3", "--json")
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.strip().splitlines()
    result = json.loads(line)
    assert list(result) == ["engine", "model", "threads", "pp64", "tg1", "tg3"]
    assert (result["engine"], result["model"], result["threads"]) == ("guanaco cpu", str(model), 1)
    assert min(result["pp64"], result["tg1"], result["tg3"]) > 0


def test_bench_with_adapters(model: Path, adapters: Path) -> None:
    done = _guanaco(
        "bench", "engine", "--model", model, "--adapters", f"{adapters}:3", "--prompt", 8, "--batches", "4", "--json"
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tg4"] > 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--batches", "1,x"), "--batches 1,x"),
        (("--batches", "0"), "--batches 0"),
        (("--adapters", "nowhere"), "--adapters nowhere"),
        (("--prompt", "5000"), "tokens are needed"),
        (("--max-num-batched-tokens", "3", "--max-num-seqs", "3", "--adapters", "/nowhere:2"), "no directory"),
    ],
)
def test_bench_refuses_what_it_cannot_run(model: Path, arguments: tuple[str, ...], problem: str) -> None:
    done = _guanaco("bench", "engine", "--model", model, *arguments)
    assert done.exit_code == 2
    assert problem in done.stderr.strip().splitlines()[-1]


def test_bench_has_commands_and_the_engine_is_meant_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(
        "guanaco.server.commands.bench.engine.measure_engine", lambda *_, **options: called.append(options)
    )
    for arguments in (("--prompt", 7), ("engine", "--prompt", 7)):
        assert _guanaco("bench", *arguments).exit_code == 0
    assert called[0] == called[1]
    assert _guanaco("bench").exit_code == 0
    assert len(called) == 3
    told = _guanaco("bench", "--help").stdout
    assert "engine" in told
    assert "kernels" in told
    assert "--prompt" not in told
    for command, own, other in (("engine", "--prompt", "--targets"), ("kernels", "--targets", "--prompt")):
        told = _guanaco("bench", command, "--help").stdout
        assert (own in told, other in told) == (True, False)
    wrong = _guanaco("bench", "kernel")
    assert (wrong.exit_code, "kernels" in wrong.stderr) == (2, True)
    assert len(called) == 3


def test_generate_is_repeatable_and_knows_adapters(model: Path, adapters: Path) -> None:
    def answer(*arguments: object) -> str:
        done = _guanaco("generate", "hello", "--model", model, "--max-tokens", 12, *arguments)
        assert done.exit_code == 0, done.output
        return done.stdout

    assert answer() == answer() != ""
    assert answer("--temperature", 1, "--seed", 3) == answer("--temperature", 1, "--seed", 3)
    assert answer("--adapter", f"x={adapters}/a0", "--name", "x") != answer()
    assert answer("--raw") != answer()


def test_generate_heeds_a_profile(model: Path, adapters: Path, tmp_path: Path) -> None:
    """Template, sampling and stop strings, as the server does."""

    def answer(*arguments: object, profile: dict[str, object] | None = None) -> str:
        given = ["generate", "hello", "--model", model, "--adapter", f"x={adapters}/a0", "--name", "x", "--seed", 3]
        if profile is not None:
            (tmp_path / "profile.json").write_text(json.dumps(profile))
            given += ["--adapter-profile", f"x={tmp_path / 'profile.json'}"]
        done = _guanaco(*given, "--max-tokens", 12, *arguments)
        assert done.exit_code == 0, done.output
        return done.stdout

    plain = answer()
    assert answer(profile={"chat_template": "guanaco"}) != plain
    assert answer(profile={"temperature": 1.5}) == answer("--temperature", 1.5) != plain
    assert answer("--temperature", 0, profile={"temperature": 1.5}) == plain, "what is asked for goes first"
    stop = plain[2:4]
    assert answer(profile={"stop": [stop]}) == plain[: plain.index(stop)] + "\n"
    assert answer("--raw", profile={"chat_template": "guanaco"}) == answer("--raw")


def test_another_base_is_a_note_or_refused(model: Path, adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "a0", tmp_path / "other")
    weights = tmp_path / "other" / WEIGHTS_NAME
    save_file(load_file(weights), weights, metadata={BASE_FINGERPRINT_KEY: "0" * 64})
    given = ("generate", "hello", "--model", model, "--adapter", f"o={tmp_path / 'other'}", "--max-tokens", 1)
    assert _guanaco(*given).exit_code == 0
    refused = _guanaco(*given, "--strict-base")
    assert (refused.exit_code, "fingerprint 0000" in refused.output) == (2, True), refused.output


def test_generate_refuses_an_unknown_name_and_a_prompt_that_is_too_long(model: Path) -> None:
    for arguments, problem in ((("hi", "--name", "y"), "nothing is called 'y'"), (("a " * 600,), "the context 512")):
        done = _guanaco("generate", *arguments, "--model", model)
        assert done.exit_code == 2
        assert problem in done.stderr


def test_quantize_writes_what_serve_loads(model: Path, tmp_path: Path) -> None:
    done = _guanaco("quantize", model, tmp_path / "nf4")
    assert done.exit_code == 0, done.output
    assert "14 matrices in NF4" in done.stdout
    assert open_checkpoint(tmp_path / "nf4").is_quantized
    again = _guanaco("quantize", model, tmp_path / "nf4")
    assert again.exit_code == 2
    assert len(again.stderr.strip().splitlines()) == 1
    base = _guanaco("generate", "hello", "--model", model, "--max-tokens", 9).stdout
    assert _guanaco("generate", "hello", "--model", tmp_path / "nf4", "--max-tokens", 9).stdout == base


def test_models_list_and_prune(model: Path) -> None:
    assert "nothing is cached" in _guanaco("models", "list").stdout
    _guanaco("generate", "hello", "--model", model, "--max-tokens", 1)
    listed = _guanaco("models", "list").stdout
    assert str(model) in listed
    assert "KiB in 2 models" in listed, "in NF4, and packed for the processor"
    name, packed = (line.split()[0] for line in listed.splitlines()[1:3])
    assert _guanaco("models", "prune", "0123nothing", "--yes").exit_code == 2
    for names in ([""], [" "], [name, ""]):
        refused = _guanaco("models", "prune", *names, "--yes")
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
        assert "a name is empty" in refused.stderr
    assert "in 2 models" in _guanaco("models", "list").stdout, "an empty name deletes nothing"
    assert "nothing was deleted" in _guanaco("models", "prune", name, input="n\n").stdout
    assert "deleted 1 models" in _guanaco("models", "prune", name, "--yes").stdout
    assert "deleted 1 models" in _guanaco("models", "prune", packed, "--yes").stdout
    assert "nothing is cached" in _guanaco("models", "list").stdout


def test_doctor_says_what_would_run(model: Path) -> None:
    done = _guanaco("doctor", "--model", model, "--json")
    findings = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    assert done.exit_code == 0
    assert "reference" in findings["kernel providers"]["value"]
    assert findings["model"]["ok"]
    assert "processor" in findings
    assert "ok" in _guanaco("doctor").stdout


def test_without_native_kernels_the_reference_serves_and_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_native.importlib.util, "find_spec", lambda _: None)
    cpu_native.library.cache_clear()
    try:
        findings = json.loads(_guanaco("doctor", "--json").stdout)["findings"]
        (found,) = (f for f in findings if f["name"] == "kernel providers")
        assert "`auto` takes it, and it is slow" in found["value"]
        assert "install a C++ compiler" in found["advice"]
        ops, why = _load_provider(load_settings({}), 1)
        assert (ops.name, "install a C++ compiler" in why) == ("reference", True)
        asked = _guanaco("generate", "hello", "--model", model, "--provider", "cpu")
        assert asked.exit_code == 2
        assert "install a C++ compiler" in asked.output
    finally:
        monkeypatch.undo()
        cpu_native.library.cache_clear()


def test_doctor_fails_for_a_model_that_cannot_run(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | {"model_type": "gpt2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = _guanaco("doctor", "--model", tmp_path, "--json")
    assert done.exit_code == 1
    assert "model_type" in json.loads(done.stdout)["findings"][-1]["advice"]


def test_doctors_estimate_is_what_a_7b_takes(model: Path, tmp_path: Path) -> None:
    """3.60 GiB: guanaco.md 1.6, computed independently."""
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 32000, **shape}))
    assert abs(weights_bytes(read_config(tmp_path)) / 2**30 - 3.60) < 0.01


def test_chat_says_how_to_start_a_server() -> None:
    done = _guanaco("chat", "--url", "http://127.0.0.1:9/v1")
    assert done.exit_code == 2
    assert "guanaco serve" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--adapter", "x=/nope"), "there is no directory /nope"),
        (("--adapter", "x"), "NAME=PATH"),
        (("--adapter", "x={adapters}"), "has no adapter_config.json"),
        (("--adapter", "tiny={adapters}/a0"), "the base model's name too"),
        (("--adapter", "x={adapters}/a0", "--adapter", "x={adapters}/a1"), "the name of two adapters"),
        (("--adapter-profile", "x=guanaco"), "no --adapter has this name"),
        (("--adapter", "x={adapters}/a0", "--adapter-profile", "x=/nope.json"), "neither a built-in profile"),
        (("--chat-template", "/nope.jinja"), "/nope.jinja"),
        (("--adapter-root", "/nope"), "--adapter-root /nope"),
        (("--max-model-len", "100000"), "positions that the model knows"),
        (("--max-num-batched-tokens", "3"), "must be at least"),
        (("--speculation-memory", "1MiB"), "only suffix does"),
        (("--name", "nope"), "nothing is called 'nope' here; there are: tiny"),
    ],
)
def test_what_can_be_known_is_refused_before_the_model_is_loaded(
    model: Path, adapters: Path, arguments: tuple[str, ...], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("guanaco.server.bootstrap.runtime.load_model", load)
    given = [argument.format(adapters=adapters) for argument in arguments]
    done = _guanaco("generate", "hi", "--model", model, *given)
    assert (done.exit_code, problem in done.stderr) == (2, True), done.stderr
    assert len(done.stderr.splitlines()) == 1


class _Streams(BaseHTTPRequestHandler):
    """A server with one model, which answers every chat with one text."""

    asked: ClassVar[list[tuple[str, dict[str, object]]]] = []

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "tiny"}]}))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, json.loads(body)))
        events = [f'data: {{"choices": [{{"delta": {{"content": "{t}"}}}}]}}\n\n' for t in ("[b]A", "hoy")]
        self._send("".join(events) + "data: [DONE]\n\n")

    def _send(self, text: str) -> None:
        assert self.path.startswith("/v1/")
        assert not self.path.startswith("/v1/v1")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_a_piped_chat_prints_the_answer_alone_and_has_an_end(end: str) -> None:
    _Streams.asked.clear()
    with HTTPServer(("127.0.0.1", 0), _Streams) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}{end}"
            done = _guanaco("chat", "--url", url, input="Hello\n\nWho are you?\n")
        finally:
            server.shutdown()
            thread.join()
    assert (done.exit_code, done.stdout) == (0, "[b]Ahoy\n[b]Ahoy\n"), done.output
    (path, first), (_, second) = _Streams.asked
    assert (path, first["max_tokens"], len(first["messages"])) == ("/v1/chat/completions", 512, 1)
    assert len(second["messages"]) == 3
    assert "temperature" not in first, "the model's own"


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost:8000/v1", "ftp://x", "http://", "http://x:99999", ""])
@pytest.mark.parametrize("command", [["chat"], ["adapters", "list"], ["aliases", "list"]])
def test_what_is_no_address_is_refused_by_every_command(command: list[str], url: str) -> None:
    done = _guanaco(*command, "--url", url, *(["--admin-key", "k"] if command != ["chat"] else []))
    assert (done.exit_code, "expected an address" in done.stderr) == (2, True), done.output


def test_a_setting_that_says_seconds_has_seconds() -> None:
    timed = {o.name: o.help or "" for o in setting_options() if getattr(o, "metavar", None) == "SECONDS"}
    assert len(timed) > 5
    assert [name for name, told in timed.items() if "seconds" not in told] == []
