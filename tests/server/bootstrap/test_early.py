"""What a start begins before its imports: it is used once, it hides no error, and the imports stay few."""

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guanaco.models.errors import ModelError
from guanaco.models.loading import demo
from guanaco.models.text import template_renderer, tokenizer_check
from guanaco.models.text.chat_template import ChatTemplate
from guanaco.models.text.template_renderer import TemplateLimits, TemplateRenderer
from guanaco.server.bootstrap import early, machine
from guanaco.server.bootstrap.early import begin_checks, undisturbed_imports
from guanaco.server.bootstrap.model_path import find_model
from guanaco.server.config import load_settings
from support.models.tiny_tokenizers import write_byte_level

# Of the libraries' modules in this process: torch's library is not loaded by `--help`, and is before torch is imported.
IS_MAPPED = "any('libtorch_cpu' in line for line in open('/proc/self/maps'))"


def in_python(code: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_torch_is_opened_beside_the_imports_and_works() -> None:
    told = in_python(
        "import sys; from guanaco.server.bootstrap.early import begin_loading_torch\n"
        f"begin_loading_torch().join(); print({IS_MAPPED}, 'torch' in sys.modules)\n"
        "import torch; print(int((torch.ones(3) @ torch.ones(3)).item()), begin_loading_torch())"
    )
    assert told.splitlines() == ["True False", "3 None"]


def test_a_torch_in_another_form_is_left_to_its_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a zip file, or as a package of a distribution that keeps its libraries elsewhere."""
    (tmp_path / "torch.py").write_text("")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.syspath_prepend(tmp_path)
    assert early.begin_loading_torch() is None
    early._open([(tmp_path / "torch.py", 0)])  # cannot be opened: no error, since the import will say it


def test_only_commands_that_need_it_open_torch() -> None:
    code = (
        "import sys; from guanaco.server.commands.entry import main\n"
        "sys.argv = ['guanaco', *sys.argv[1:]]\n"
        f"try: main()\nexcept SystemExit: print('mapped', {IS_MAPPED})"
    )
    assert in_python(code, "serve", "--help").splitlines()[-1] == "mapped False"


def test_a_server_imports_no_library_that_it_does_without() -> None:
    """The hub's and GGUF's: a start from the cache needs none. jinja2 runs in a process of its own."""
    code = "import sys, json, guanaco.server.commands.serve as _; print(json.dumps(list(sys.modules)))"
    loaded = set(json.loads(in_python(code)))
    assert loaded >= {"torch", "fastapi"}
    assert not loaded & {"huggingface_hub", "httpx2", "gguf", "jinja2", "transformers", "peft", "triton"}


def test_the_collector_waits_for_imports_and_leaves_them_alone() -> None:
    before = gc.get_freeze_count()
    try:
        with undisturbed_imports():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
        with pytest.raises(ImportError), undisturbed_imports():
            raise ImportError
        assert gc.isenabled()
    finally:
        gc.unfreeze()


@pytest.fixture
def renderer(monkeypatch: pytest.MonkeyPatch) -> Iterator[TemplateRenderer]:
    made = TemplateRenderer(TemplateLimits(seconds=60))
    monkeypatch.setattr(template_renderer, "shared_renderer", lambda: made)
    yield made
    made.close()


def test_what_was_begun_is_used(tmp_path: Path, renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Path] = []
    monkeypatch.setattr(tokenizer_check, "_try_out", lambda file, *_: tried.append(file))
    write_byte_level(tmp_path)
    with (tmp_path / "tokenizer.json").open("a") as file:
        file.write(" " * 11)  # a content that was not tried
    begin_checks(str(tmp_path), tmp_path)
    tokenizer_check.check_tokenizer(tmp_path)
    assert tried == [tmp_path / "tokenizer.json"]
    assert (
        ChatTemplate("{{ messages[0].content }}", renderer=renderer).render([{"role": "user", "content": "q"}]) == "q"
    )
    assert len(renderer.pids) == 1


def test_a_check_that_failed_ahead_is_repeated_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_byte_level(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[1, 2, 3]")
    tokenizer_check.begin_check(tmp_path)
    with pytest.raises(ModelError, match="cannot be used as a tokenizer"):
        tokenizer_check.check_tokenizer(tmp_path)


def test_a_process_that_cannot_be_started_ahead_is_started_later(
    renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = template_renderer._Worker, []

    def worker(limits: TemplateLimits) -> Any:
        if not failed:
            failed.append(True)
            raise OSError("no process")
        return real(limits)

    monkeypatch.setattr(template_renderer, "_Worker", worker)
    renderer.begin_start()
    assert ChatTemplate("fine", renderer=renderer).render([]) == "fine"
    assert failed


def test_the_demo_is_checked_once(tmp_path: Path, renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Path] = []
    monkeypatch.setattr(demo, "is_intact", lambda path: not checked.append(path))  # type: ignore[func-returns-value]
    begin_checks(None, tmp_path)
    path = demo.ensure_demo_model(tmp_path, offline=True)
    assert checked == [path]
    demo.ensure_demo_model(tmp_path, offline=True)
    assert checked == [path, path]


def test_a_damaged_demo_that_was_checked_ahead_is_not_served(tmp_path: Path) -> None:
    demo.begin_check(tmp_path)
    with pytest.raises(demo.DemoUnavailable):
        demo.ensure_demo_model(tmp_path, offline=True)


def test_a_local_model_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "guanaco.models.loading.hub", None)
    assert find_model(load_settings({"model": str(tmp_path)}), None) == tmp_path  # type: ignore[arg-type]


def test_a_look_at_the_machine_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`platform.processor` would run `uname`, which every start would wait for."""
    monkeypatch.setattr(machine.platform, "processor", None)
    assert machine.look().cpu_name
