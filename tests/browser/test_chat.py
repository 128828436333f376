"""Chat: send, stream, stop, retry, edit, switch, settings, probabilities, errors in words."""

import json

import pytest
from playwright.sync_api import expect

from support.server.api_server import BASE, PIRATE, TERSE, LiveServer, make_state

ENGINE_FULL = "the server has too much to do"


def test_a_stream_shows_as_it_comes_and_escape_stops_it(server, visit) -> None:
    server.script(reply="word " * 400, step_seconds=0.01)
    tab = visit(server).go()
    tab.say("Go on")
    answer = tab.answers.first
    expect(answer).to_contain_text("word word word")
    expect(answer).to_have_attribute("aria-busy", "true")
    tab.page.keyboard.press("Escape")
    expect(tab.done()).to_contain_text("stopped")
    server.until(lambda engine: not engine.running)
    expect(tab.message).to_be_focused()


@pytest.mark.parametrize("view", ["chat", "mix"])
def test_a_message_may_be_sent_before_the_models_are_known(server, visit, view: str) -> None:
    tab = visit(server)
    held = []
    tab.page.route("**/v1/models", lambda route: held.append(route))
    tab.go(view)
    tab.say("Hello")
    expect(tab.answers).to_contain_text("Waiting")
    for route in held:
        route.continue_()
    tab.page.unroute("**/v1/models")
    answer = tab.done()
    expect(answer.locator(".failure")).to_have_count(0)
    expect(answer.locator("header strong")).to_have_text(PIRATE if view == "chat" else BASE)


def test_the_stop_button(server, visit) -> None:
    server.script(reply="word " * 400, step_seconds=0.01)
    tab = visit(server).go()
    tab.say("Go on")
    tab.page.get_by_role("button", name="Stop").click()
    expect(tab.done()).to_contain_text("stopped")
    server.until(lambda engine: not engine.running)


def test_retry_and_edit_make_branches(server, visit) -> None:
    server.script(reply="first")
    tab = visit(server).go()
    tab.say("One question")
    expect(tab.done()).to_contain_text("first")
    server.script(reply="second")
    tab.page.get_by_role("button", name="Retry").click()
    expect(tab.done().locator(".text")).to_have_text("second")
    tab.page.get_by_role("button", name="Branch before").click()
    expect(tab.done().locator(".text")).to_have_text("first")
    tab.page.get_by_role("button", name="Edit").click()
    server.script(reply="third")
    box = tab.page.get_by_label("Change your message")
    expect(box).to_be_focused()
    box.fill("Another question")
    box.press("Enter")
    expect(tab.done().locator(".text")).to_have_text("third")
    expect(tab.page.locator(".bubble")).to_have_text("Another question")
    tab.page.get_by_role("button", name="Branch before").first.click()
    expect(tab.page.locator(".bubble")).to_have_text("One question")
    expect(tab.done().locator(".text")).to_have_text("first")


def test_who_answers_can_change_in_the_middle(server, visit) -> None:
    tab = visit(server).go()
    tab.choose(PIRATE)
    tab.say("Hello")
    expect(tab.done(0).locator("header")).to_contain_text(PIRATE)
    tab.choose(TERSE)
    tab.say("Hello again")
    expect(tab.done(1).locator("header")).to_contain_text(TERSE)
    tab.choose(BASE)
    tab.say("And you?")
    expect(tab.done(2).locator("header strong")).to_have_text(BASE)


def test_settings_are_sent_and_defaults_are_shown(server, visit) -> None:
    tab = visit(server).go()
    tab.page.get_by_role("button", name="Settings").click()
    expect(tab.page.get_by_label("Temperature")).to_have_attribute("placeholder", "default 1")
    tab.page.get_by_label("Temperature").fill("0.5")
    tab.page.get_by_label("Max tokens").fill("7")
    tab.page.get_by_label("System prompt").fill("Be brief.")
    tab.page.get_by_label("System prompt").press("Tab")
    with tab.page.expect_request("**/v1/chat/completions") as asked:
        tab.say("Hello")
    body = json.loads(asked.value.post_data)
    assert (body["temperature"], body["max_tokens"]) == (0.5, 7)
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert "top_p" not in body
    assert "seed" not in body
    expect(tab.done()).to_contain_text("cut at its limit of tokens")


def test_probabilities_by_pointer_and_by_key(server, visit) -> None:
    server.script(reply="abc")
    tab = visit(server).go()
    tab.say("Hello")
    tab.done().get_by_role("button", name="Probabilities").click()
    tokens = tab.page.locator(".sequence span")
    expect(tokens.first).to_have_text("a")
    tokens.nth(2).hover()
    detail = tab.page.locator("#token-detail")
    expect(detail).to_contain_text("Token 3: c had 88.2 %")
    expect(detail.locator("tr")).to_have_count(5)
    tab.page.locator(".sequence").press("ArrowLeft")
    expect(detail).to_contain_text("Token 2: b")


def test_the_context_that_is_used(server, visit) -> None:
    server.script(reply="abc")
    tab = visit(server).go()
    tab.say("Hello")
    tab.done()
    expect(tab.page.locator(".context")).to_contain_text("of 4,096 tokens")


def test_a_refusal_in_words_with_its_seconds_counted_down(server, visit) -> None:
    from guanaco.server.engine.async_engine import EngineOverloaded

    server.script(raise_on_submit=EngineOverloaded(3.0))
    tab = visit(server).go()
    tab.say("Hello")
    failure = tab.page.locator(".failure")
    expect(failure).to_contain_text("status 503")
    expect(failure).to_contain_text("Try again (the server asks to wait")
    server.script(reply="here you are")
    expect(failure.get_by_role("button", name="Try again", exact=True)).to_be_visible()
    failure.get_by_role("button").click()
    expect(tab.done().locator(".text")).to_have_text("here you are")


@pytest.mark.parametrize(
    ("failure", "words"), [("adapter_unloaded", "adapter was removed"), ("internal", "server failed")]
)
def test_a_stream_that_breaks_keeps_what_came(server, visit, failure, words) -> None:
    server.script(reply="half of the answer", fail_after=9, failure=failure)
    tab = visit(server).go()
    tab.say("Hello")
    answer = tab.done()
    expect(answer).to_contain_text("half of t")
    expect(answer).to_contain_text(words)


def test_a_name_that_is_gone(visit, server, shared) -> None:
    tab = visit(server).go()
    tab.page.locator(f"button:has-text('{PIRATE}')").wait_for()
    tab.page.evaluate(
        """() => import('/page/chat/conversations.js').then((m) => { m.current.get().conversation.model = 'gone'; })"""
    )
    tab.say("Hello")
    expect(tab.page.locator(".failure")).to_contain_text("model_not_found")


def test_keys_are_asked_for_and_stay_in_the_tab(visit) -> None:
    with LiveServer(make_state(keys=("sesame",))) as server:
        tab = visit(server).go()
        dialog = tab.page.get_by_role("dialog")
        expect(dialog).to_contain_text("asks for an API key")
        dialog.get_by_label("API key").fill("wrong")
        dialog.get_by_role("button", name="Use these keys").click()
        expect(tab.page.get_by_role("dialog")).to_contain_text("asks for an API key")
        tab.page.get_by_label("API key").fill("sesame")
        tab.page.get_by_role("button", name="Use these keys").click()
        tab.page.locator(f"button:has-text('{PIRATE}')").wait_for()
        tab.say("Hello")
        tab.done()
        stored = tab.page.evaluate(
            """async () => JSON.stringify([localStorage, await new Promise((done) => { const open = indexedDB.open('guanaco');
            open.onsuccess = () => { const all = open.result.transaction('bodies').objectStore('bodies').getAll();
            all.onsuccess = () => done(all.result); }; })])"""
        )
        assert "Hello" in stored
        assert "sesame" not in stored
        assert "sesame" not in tab.page.url
