"""Training jobs in Operate, over the real routes and the trainer without a model: curve, cancel, the new adapter in the picker."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, expect

from support.browser.access import assert_axe_is_content
from support.server.adapter_server import BASE
from support.training.training_server import ADMIN, ALICE, TrainingServer, make_training_server

ROW = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}]}\n'


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """The trainer waits at step 2 until this file is there."""
    return tmp_path / "gate"


@pytest.fixture
def training(tmp_path: Path, gate: Path) -> Iterator[TrainingServer]:
    with make_training_server(tmp_path, env={"FAKE_GATE": str(gate)}) as server:
        yield server


def create(server: TrainingServer, key: str, suffix: str) -> str:
    with server.http(key) as client:
        file = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("chat.jsonl", ROW * 12)}).json()
        body = {"model": BASE, "training_file": file["id"], "suffix": suffix}
        return str(client.post("/v1/fine_tuning/jobs", json=body).json()["id"])


def with_keys(tab, *, api: str = "", admin: str = ""):
    tab.page.add_init_script(
        f"sessionStorage['guanaco.apiKey'] ??= '{api}'; sessionStorage['guanaco.adminKey'] ??= '{admin}'"
    )
    return tab.go("operate")


def row(tab, job: str) -> Locator:
    return tab.page.locator("section[aria-labelledby=jobs] tbody tr").filter(has_text=job)


def test_a_job_from_its_curve_to_the_picker(training: TrainingServer, gate: Path, visit) -> None:
    job = create(training, ALICE, "made")
    tab = with_keys(visit(training), api=ALICE)
    expect(row(tab, job)).to_contain_text("running")
    row(tab, job).get_by_role("button", name=f"Loss of {job}").click()
    chart = tab.page.get_by_role("img", name=f"Loss of {job}")
    expect(chart).to_have_attribute(
        "aria-label", f"Loss of {job}: training loss from 4.000 to 4.000; validation loss from 5.000 to 5.000"
    )
    tab.page.get_by_role("link", name="Chat").click()
    expect(tab.page.locator("#model option", has_text="made")).to_have_count(0)
    tab.page.get_by_role("link", name="Operate").click()
    expect(row(tab, job)).to_contain_text("running")
    gate.touch()
    expect(row(tab, job)).to_contain_text("succeeded")
    row(tab, job).get_by_role("button", name=f"Loss of {job}").click()
    expect(chart).to_have_attribute(
        "aria-label", f"Loss of {job}: training loss from 4.000 to 1.000; validation loss from 5.000 to 1.250"
    )
    expect(tab.page.locator("section[aria-labelledby=jobs]")).to_contain_text("the model made answers now")
    tab.page.get_by_role("link", name="Chat").click()
    expect(tab.page.locator("#model option", has_text="made")).to_have_count(1)
    tab.choose("made")
    tab.say("Hello")
    expect(tab.done().locator("header")).to_contain_text("made")


def test_a_job_is_cancelled_by_the_key_that_it_belongs_to(training: TrainingServer, visit) -> None:
    """With both keys in the tab, the jobs of both are listed: a server shows each key its own."""
    mine, the_admins = create(training, ALICE, "mine"), create(training, ADMIN, "theirs")
    tab = with_keys(visit(training), api=ALICE, admin=ADMIN)
    expect(row(tab, mine)).to_contain_text("mine")
    expect(row(tab, the_admins)).to_contain_text("theirs")
    for job in (the_admins, mine):
        row(tab, job).get_by_role("button", name=f"Cancel {job}").click()
        expect(row(tab, job)).to_contain_text("cancelled")
    expect(tab.page.locator("section[aria-labelledby=jobs] .note")).to_have_text("The job is cancelled.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_with_all_keys(training: TrainingServer, gate: Path, visit, scheme: str) -> None:
    """Adapters, aliases, a job that runs and its curve."""
    job = create(training, ALICE, "mine")
    training.source("other", seed=3)
    with training.http(ADMIN) as client:
        client.put("/v1/adapters/other", json={"source": "other"})
        client.put("/v1/aliases/prod", json={"split": {"other": 1}})
    tab = with_keys(
        visit(training, color_scheme=scheme, bypass_csp=True, reduced_motion="reduce"), api=ALICE, admin=ADMIN
    )
    row(tab, job).get_by_role("button", name=f"Loss of {job}").click()
    tab.page.locator(".plot").wait_for()
    expect(tab.page.locator("section[aria-labelledby=aliases]")).to_contain_text("other 100 %")
    assert_axe_is_content(tab)
    gate.touch()


def test_what_the_server_says_where_it_cannot_train(tmp_path: Path, visit) -> None:
    with make_training_server(tmp_path, is_available=False) as server:
        tab = with_keys(visit(server), api=ALICE, admin=ADMIN)
        expect(tab.page.locator("main")).to_contain_text("`train` extra is not installed")
        assert tab.page.locator("section[aria-labelledby=jobs]").count() == 0
