"""The shortest look: the page opens, everybody is there, and an answer comes."""

from playwright.sync_api import expect

from support.server.api_server import BASE, PIRATE, TERSE


def test_the_page_opens_and_answers(server, visit) -> None:
    server.script(reply="Ahoy, **matey**!")
    tab = visit(server).go()
    tab.page.locator(f"button:has-text('{PIRATE}')").wait_for()
    text = tab.page.content()
    assert all(name in text for name in (BASE, PIRATE, TERSE))
    tab.choose(PIRATE)
    tab.say("Hello")
    answer = tab.done()
    expect(answer.locator("strong", has_text="matey")).to_be_visible()
    expect(answer).to_contain_text("aaaaaaaa")  # the adapter's version
    expect(answer).to_contain_text("tokens/s")
    for view in ("compare", "mix", "operate"):
        tab.go(view)
        expect(tab.page.locator("main")).to_contain_text(
            {"compare": "Who answers", "mix": "Mixture", "operate": "Load"}[view]
        )
