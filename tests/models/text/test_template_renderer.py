"""Templates that loop, allocate or print without end: each is stopped, and none disturbs the others or the end."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guanaco.models.text import template_renderer
from guanaco.models.text.chat_template import ChatTemplate, TemplateError, load_template
from guanaco.models.text.template_renderer import TemplateLimits, TemplateRenderer

QUESTION = [{"role": "user", "content": "q"}]
GOOD = "{{ messages[0].content }}!"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
SHORT, ROOMY = TemplateLimits(seconds=0.2), TemplateLimits(seconds=60)
WAIT = 30.0


@pytest.fixture
def renderer() -> Iterator[TemplateRenderer]:
    made = TemplateRenderer(ROOMY)
    yield made
    made.close()


def template(source: str, renderer: TemplateRenderer) -> ChatTemplate:
    return ChatTemplate(source, renderer=renderer)


def code_of(source: str, renderer: TemplateRenderer, **options: Any) -> str:
    with pytest.raises(TemplateError) as caught:
        template(source, renderer).render(QUESTION, **options)
    return caught.value.code


@pytest.mark.parametrize(
    ("source", "code"),
    [
        pytest.param(LOOP, "template_timeout", id="loops"),
        pytest.param(
            "{% macro f(n) %}{% for i in range(99) %}{{ f(n + 1) if n < 9 }}{% endfor %}{% endmacro %}{{ f(0) }}",
            "template_timeout",
            id="recursion",
        ),
        pytest.param("{{ 'x'.ljust(999999999) }}", "template_too_large", id="one long text"),
        pytest.param("{{ '{:999999999}'.format(1) }}", "template_too_large", id="format"),
        pytest.param(
            "{% set ns = namespace(s='x' * 999999) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
            "template_too_large",
            id="doubled",
        ),
        pytest.param("{{ messages | tojson(indent=99999999) }}", "template_too_large", id="tojson"),
        pytest.param("{% for i in range(99999) %}xxxxxxxxxx{% endfor %}", "template_too_large", id="prints"),
    ],
)
def test_a_template_that_takes_too_much_is_stopped_and_the_next_one_is_rendered(
    source: str, code: str, renderer: TemplateRenderer
) -> None:
    if code == "template_timeout":
        renderer.limits = SHORT
    assert code_of(source, renderer, max_chars=500_000) == code
    renderer.limits = ROOMY
    assert template(GOOD, renderer).render(QUESTION) == "q!"


def test_output_is_held_to_the_context(renderer: TemplateRenderer) -> None:
    """Characters are counted, not bytes."""
    made = template("{{ 'é' * 100 }}", renderer)
    assert made.render(QUESTION, max_chars=100) == "é" * 100
    with pytest.raises(TemplateError, match="exceeds 99 characters"):
        made.render(QUESTION, max_chars=99)


def test_a_source_of_megabytes_is_refused_or_stopped(renderer: TemplateRenderer, tmp_path: Path) -> None:
    with pytest.raises(TemplateError):
        template("{{ a" + " + a" * 20_000 + " }}", renderer)
    with pytest.raises(TemplateError):
        template("{% if a %}" * 20_000, renderer)
    file = tmp_path / "large.jinja"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(TemplateError, match="bytes"):
        load_template(str(file))


def test_a_file_is_tried_once_when_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = TemplateRenderer(SHORT)
    ChatTemplate(GOOD, renderer=made)
    monkeypatch.setattr("guanaco.models.text.chat_template.shared_renderer", lambda: made)
    file = tmp_path / "own.jinja"
    file.write_text(LOOP)
    with pytest.raises(TemplateError, match="stopped after"):
        load_template(str(file))
    made.limits = ROOMY
    file.write_text("{{ raise_exception('a system message, please') }}")
    assert "a system message, please" in load_template(str(file)).notes[0]
    made.close()


def test_half_a_surrogate_pair_comes_back_as_it_went(renderer: TemplateRenderer) -> None:
    assert template(GOOD, renderer).render([{"role": "user", "content": "\ud83d\x00🦙"}]) == "\ud83d\x00🦙!"


def test_a_process_keeps_its_templates_and_is_told_those_that_it_dropped(renderer: TemplateRenderer) -> None:
    made = [template(f"{number}{GOOD}", renderer) for number in range(40)]  # more than a process keeps
    assert [one.render(QUESTION) for one in made] == [f"{number}q!" for number in range(40)]
    assert len(renderer.pids) == 1


def test_a_process_that_was_killed_is_replaced(renderer: TemplateRenderer) -> None:
    made = template(GOOD, renderer)
    (before,) = renderer.pids
    os.kill(before, 9)
    wait_for(lambda: not alive(before))
    assert made.render(QUESTION) == "q!"
    assert renderer.pids != (before,)


# --- one template's renderings and the others' ---------------------------------------------------------------------


class Looping:
    """A template that is being rendered, and does not end by itself within a test."""

    def __init__(self, source: str, renderer: TemplateRenderer) -> None:
        self.error: TemplateError | None = None
        self._made = template(source, renderer)
        self._thread = threading.Thread(target=self._render, daemon=True)
        self._thread.start()
        wait_for(lambda: bool(renderer._busy.get(digest_of(source))))

    def _render(self) -> None:
        try:
            self._made.render(QUESTION)
        except TemplateError as error:
            self.error = error

    def join(self) -> str:
        self._thread.join(WAIT)
        assert self.error is not None
        return self.error.code


def digest_of(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def test_others_are_rendered_while_one_loops_and_its_flood_does_not_wait() -> None:
    """A template that was slow holds one process, and who asks for it meanwhile is refused at once."""
    renderer = TemplateRenderer(ROOMY)
    other = "{# another #}" + LOOP
    good, second, again = (template(source, renderer) for source in (GOOD, other, LOOP))
    for source in (LOOP, other):
        renderer._remember_slow(digest_of(source))
    looping = Looping(LOOP, renderer)
    for made in (again, second):  # the same template, and another slow one: the other process is not for them
        with pytest.raises(TemplateError) as caught:
            made.render(QUESTION)
        assert caught.value.code == "template_busy"
    assert good.render(QUESTION) == "q!"
    renderer.close()
    assert looping.join() == "template_unavailable"


def test_a_process_that_somebody_kills_says_nothing_of_its_template(renderer: TemplateRenderer) -> None:
    """It did not run out of time: the client may try again, and the template does not count as slow."""
    looping = Looping(LOOP, renderer)
    (pid,) = renderer.pids
    os.kill(pid, 9)
    assert looping.join() == "template_unavailable"
    assert not renderer._is_slow(digest_of(LOOP), time.monotonic())


@pytest.mark.parametrize(("name", "code"), [("SIGXCPU", "template_timeout"), ("SIGSEGV", "template_crashed")])
def test_a_process_that_its_template_ended(name: str, code: str, renderer: TemplateRenderer) -> None:
    looping = Looping(LOOP, renderer)
    (pid,) = renderer.pids
    os.kill(pid, getattr(signal, name))
    assert looping.join() == code
    assert renderer._is_slow(digest_of(LOOP), time.monotonic())


def test_a_process_that_ends_while_it_starts_is_started_once_more(
    renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    real = template_renderer.RestrictedProcess

    class Killed(real):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            if len(killed) < num_kills:
                killed.append(self.pid)
                self.kill()

    monkeypatch.setattr(template_renderer, "RestrictedProcess", Killed)
    num_kills = 1
    assert template(GOOD, renderer).render(QUESTION) == "q!"
    assert len(killed) == 1
    renderer.close()
    num_kills = 99
    assert code_of(GOOD, renderer) == "template_unavailable"
    assert len(killed) == 3


def test_a_template_that_ran_out_of_time_counts_as_slow(renderer: TemplateRenderer) -> None:
    renderer.limits = SHORT
    assert code_of(LOOP, renderer) == "template_timeout"
    assert renderer._is_slow(digest_of(LOOP), time.monotonic())
    assert not renderer._is_slow(digest_of(GOOD), time.monotonic())


def test_processor_time_makes_a_template_slow_before_it_runs_out_of_time() -> None:
    renderer = TemplateRenderer(TemplateLimits(seconds=30, slow_seconds=0.01))
    busy = "{% for i in range(99999) %}{% set x = i * i %}{% endfor %}"
    template(busy, renderer).render(QUESTION)
    template(GOOD, renderer).render(QUESTION)
    assert renderer._is_slow(digest_of(busy), time.monotonic())
    assert not renderer._is_slow(digest_of(GOOD), time.monotonic())
    renderer.close()


def test_no_process_remains_when_the_parent_is_killed() -> None:
    """The template loops and never looks at its pipes."""
    program = f"""
import threading, time
from guanaco.models.text.chat_template import ChatTemplate
from guanaco.models.text.template_renderer import TemplateLimits, TemplateRenderer
renderer = TemplateRenderer(TemplateLimits(seconds=60))
made = ChatTemplate({LOOP!r}, renderer=renderer)
threading.Thread(target=made.render, args=([],), daemon=True).start()
while not any(renderer._busy.values()):
    time.sleep(0.01)
print(*renderer.pids, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        (child,) = map(int, parent.stdout.readline().split())
        assert alive(child)
        parent.kill()
    wait_for(lambda: not alive(child))


def test_the_process_has_no_torch_and_may_open_nothing(renderer: TemplateRenderer) -> None:
    template(GOOD, renderer)
    (pid,) = renderer.pids
    assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    soft = {line[:26].strip(): line[26:].split()[0] for line in limits[1:]}
    assert soft["Max open files"] == soft["Max core file size"] == soft["Max file size"] == "0"
    assert soft["Max address space"] == str(256 << 20)
    assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()
