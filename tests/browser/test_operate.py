"""Mix and Operate over the real adapter manager: load, refuse, replace, roll back, pin, remove, aliases, drain."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from support.browser.access import reach
from support.server.adapter_client import put
from support.server.adapter_server import ADMIN, AdapterServer, make_adapter_server


@pytest.fixture
def adapters(tmp_path: Path) -> Iterator[AdapterServer]:
    with make_adapter_server(tmp_path) as server:
        with server.client(headers=ADMIN) as client:
            put(client, "alpha", server.source("alpha", 1))
            put(client, "beta", server.source("beta", 2))
        yield server


def enter_admin_key(tab) -> None:
    tab.page.get_by_role("button", name="Enter the admin key").click()
    tab.page.get_by_label("Admin key").fill("sesame")
    tab.page.get_by_role("button", name="Use these keys").click()


def load(tab, name: str, source: str) -> None:
    tab.page.locator("#load-name").fill(name)
    tab.page.locator("#load-source").fill(source)
    tab.page.locator("#load-source").press("Enter")


def test_a_mixture_is_sent_as_the_sliders_stand(adapters, visit) -> None:
    tab = visit(adapters).go("mix")
    slider = tab.page.get_by_label("alpha")
    slider.fill("0.5")
    tab.page.get_by_label("beta").fill("-1.25")
    expect(tab.page.locator(".bar")).to_contain_text("0.5 × alpha − 1.25 × beta")
    with tab.page.expect_request("**/v1/chat/completions") as asked:
        tab.say("Hello")
    body = json.loads(asked.value.post_data)
    assert body["adapters"] == [{"name": "alpha", "scale": 0.5}, {"name": "beta", "scale": -1.25}]
    answer = tab.done()
    expect(answer.locator("header")).to_contain_text("0.5 × alpha − 1.25 × beta")
    tab.page.get_by_role("button", name="All to 0").click()
    with tab.page.expect_request("**/v1/chat/completions") as asked:
        answer.get_by_role("button", name="Retry").click()
    assert "adapters" not in json.loads(asked.value.post_data)
    expect(tab.done()).to_contain_text("2 / 2")


def test_without_the_admin_key_it_shows_what_the_api_key_may_see(adapters, visit) -> None:
    tab = visit(adapters).go("operate")
    expect(tab.page.locator("main")).to_contain_text("need the server's admin key")
    expect(tab.page.locator("main")).to_contain_text("alpha")
    expect(tab.page.locator("main")).to_contain_text("KV cache in use")
    expect(tab.page.locator("#load-name")).to_have_count(0)


def test_load_refuse_replace_roll_back_pin_remove(adapters, visit) -> None:
    tab = visit(adapters).go("operate")
    enter_admin_key(tab)

    def row(name: str):
        rows = tab.page.locator("section[aria-labelledby=adapters] tbody tr")
        return rows.filter(has=tab.page.locator(f"th:has-text('{name}')"))

    expect(row("alpha")).to_contain_text("ready")
    load(tab, "gamma", adapters.source("gamma", 3))
    expect(row("gamma")).to_contain_text("ready")
    expect(tab.page.locator(".note", has_text="gamma is served")).to_be_visible()
    load(tab, "bad", "no/such/folder")
    expect(tab.page.locator(".failure")).to_contain_text("status 404 · not_found")
    load(tab, "gamma", adapters.source("gamma", 4))
    button = row("gamma").get_by_role("button", name="Roll back gamma")
    expect(button).to_be_visible()
    second = adapters.registry.resolve("gamma").version
    button.click()
    expect(tab.page.locator(".note", has_text="again")).to_be_visible()
    assert adapters.registry.resolve("gamma").version != second
    row("gamma").get_by_role("button", name="Pin gamma").click()
    expect(row("gamma")).to_contain_text("pinned")
    row("gamma").get_by_role("button", name="Remove gamma").click()
    tab.page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    expect(row("gamma")).to_have_count(0)
    assert adapters.registry.resolve("gamma") is None
    tab.page.get_by_role("link", name="Chat").click()
    assert "gamma" not in tab.page.locator("#model").inner_text()


def test_load_and_remove_by_keyboard_alone(adapters, visit) -> None:
    source = adapters.source("gamma", 3)
    tab = visit(adapters).go("operate")
    keyboard = tab.page.keyboard
    tab.page.get_by_role("button", name="Enter the admin key").wait_for()
    reach(tab, "Enter the admin key")
    keyboard.press("Enter")
    expect(tab.page.get_by_label("Admin key")).to_be_focused()
    keyboard.type("sesame")
    keyboard.press("Enter")
    tab.page.locator("#load-name").wait_for()
    reach(tab, id="load-name")
    keyboard.type("gamma")
    keyboard.press("Tab")
    keyboard.type(source)
    keyboard.press("Enter")
    expect(tab.page.locator(".note", has_text="gamma is served")).to_be_visible()
    reach(tab, "Remove gamma")
    keyboard.press("Enter")
    expect(tab.page.get_by_role("dialog")).to_be_visible()
    keyboard.press("Escape")
    expect(tab.page.get_by_role("dialog")).to_have_count(0)
    expect(tab.page.get_by_role("button", name="Remove gamma")).to_be_focused()
    keyboard.press("Enter")
    tab.page.get_by_role("dialog").wait_for()
    reach(tab, "Remove")
    keyboard.press("Enter")
    expect(tab.page.locator(".note", has_text="gamma is removed")).to_be_visible()
    assert adapters.registry.resolve("gamma") is None


def test_an_alias_by_weight(adapters, visit) -> None:
    tab = visit(adapters).go("operate")
    enter_admin_key(tab)
    tab.page.locator("#alias-name").fill("prod")
    tab.page.locator("#target-0").fill("alpha")
    tab.page.locator("#weight-0").fill("90")
    tab.page.get_by_role("button", name="Add a target").click()
    tab.page.locator("#target-1").fill("beta")
    tab.page.locator("#weight-1").fill("10")
    tab.page.get_by_role("button", name="Save").click()
    expect(tab.page.locator("section[aria-labelledby=aliases] tbody tr")).to_contain_text("alpha 90 %")
    with adapters.client(headers=ADMIN) as client:
        assert client.get("/v1/aliases/prod").json()["split"] == {"alpha": 90, "beta": 10}
    tab.page.locator("#alias-name").fill("loop")
    tab.page.locator("#target-0").fill("nobody")
    tab.page.get_by_role("button", name="Save").click()
    expect(tab.page.locator(".failure")).to_contain_text("status 4")
    tab.page.get_by_role("button", name="Change prod").click()
    tab.page.locator("#weight-1").fill("0")
    tab.page.get_by_role("button", name="Save").click()
    expect(tab.page.locator("section[aria-labelledby=aliases] tbody tr")).to_contain_text("alpha 100 %")


def test_drain_by_click(adapters, visit) -> None:
    tab = visit(adapters).go("operate")
    enter_admin_key(tab)
    tab.page.get_by_role("button", name="Drain and stop").click()
    tab.page.get_by_role("dialog").get_by_role("button", name="Drain and stop").click()
    adapters.join()
    assert adapters.server.exit_code == 0
    expect(tab.page.get_by_role("alert")).to_contain_text("can't be reached")
