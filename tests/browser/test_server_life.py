"""The server drains, dies and comes back while somebody reads; the page is loaded anew in the middle of an answer."""

import signal

from playwright.sync_api import expect

from support.server.api_server import PIRATE, LiveServer, make_state


def test_the_server_drains_in_the_middle(visit) -> None:
    with LiveServer(make_state(drain_timeout=20.0)) as server:
        server.script(reply="word " * 60, step_seconds=0.02)
        tab = visit(server).go()
        tab.say("Go on")
        expect(tab.answers.first).to_contain_text("word")
        server.server.handle_exit(signal.SIGTERM, None)
        answer = tab.done()
        expect(answer).not_to_contain_text("failed")
        assert answer.locator(".text").inner_text().count("word") == 60
        expect(tab.page.get_by_role("alert")).to_contain_text("can't be reached")
        tab.say("One more")
        expect(tab.done(1)).to_contain_text("can't be reached")


def test_the_server_restarts(visit) -> None:
    first = LiveServer(make_state())
    with first:
        tab = visit(first).go()
        tab.say("Before")
        tab.done()
    expect(tab.page.get_by_role("alert")).to_contain_text("can't be reached")
    tab.say("Meanwhile")
    expect(tab.done(1)).to_contain_text("can't be reached")
    state = make_state()
    object.__setattr__(state, "settings", state.settings.model_copy(update={"port": first.port}))
    with LiveServer(state) as second:
        assert second.port == first.port
        expect(tab.page.get_by_role("alert")).to_have_count(0)
        tab.done(1).get_by_role("button", name="Try again").click()
        expect(tab.done(1).locator(".failure")).to_have_count(0)
        expect(tab.answers).to_have_count(2)


def test_a_reload_in_the_middle_loses_nothing_that_was_said(server, visit) -> None:
    server.script(reply="word " * 2000, step_seconds=0.005)
    tab = visit(server).go()
    tab.choose(PIRATE)
    tab.say("A long one")
    expect(tab.answers.first).to_contain_text("word " * 30)
    tab.page.wait_for_timeout(2500)  # it is saved every second and a half
    tab.page.reload()
    expect(tab.page.locator(".bubble")).to_have_text("A long one")
    answer = tab.done()
    expect(answer).to_contain_text("word word")
    expect(answer).to_contain_text("page was closed before")
    server.until(lambda engine: not engine.running)
    server.script(reply="again")
    answer.get_by_role("button", name="Try again").click()
    expect(tab.done().locator(".text")).to_have_text("again")
