"""Pictures of every view of the page on a running server, in light, dark and phone width.

    guanaco serve --admin-key KEY --adapter-root FOLDER
    PYTHONPATH=tests:tests/importable python tests/browser/pictures.py --admin-key KEY --out build/pictures

`--only NAME` takes one of them. The names and versions that the pictures show are those of the server.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from support.browser.program import find_browser
from support.browser.visit import Visit, launch, visiting

LOOKS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 720}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 720}},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True},
}
QUESTION = "How do I boil an egg?"
SLOW_MS = 120_000


def chat_empty(tab: Visit, _: str) -> None:
    tab.go()
    tab.page.locator(".cards li").first.wait_for()


def chat(tab: Visit, _: str) -> None:
    tab.go()
    tab.page.locator(".cards li").first.wait_for()
    tab.choose("pirate")
    limit(tab.page)
    say(tab, QUESTION)
    tab.choose("terse")
    say(tab, "And how long for a soft one?")


def chat_settings(tab: Visit, key: str) -> None:
    chat(tab, key)
    tab.done().get_by_role("button", name="Probabilities").click()
    tab.page.get_by_role("button", name="Settings").click()


def chat_error(tab: Visit, _: str) -> None:
    tab.go()
    tab.page.locator(".cards li").first.wait_for()
    tab.page.route("**/v1/chat/completions", lambda route: route.fulfill(
        status=429, headers={"Retry-After": "42", "X-Request-Id": "5f3a"}, json={"error": {
            "message": "this API key has 4 requests at a time and all are in use", "code": "too_many_requests"}}))  # fmt: skip
    tab.say(QUESTION)
    tab.done()


def unreachable(tab: Visit, key: str) -> None:
    chat(tab, key)
    tab.page.route("**/health/ready", lambda route: route.abort())
    tab.page.evaluate("import('/page/app/api.js').then((m) => m.checkHealth())")
    tab.page.get_by_role("alert").wait_for()


def keys(tab: Visit, _: str) -> None:
    tab.go()
    tab.page.get_by_role("button", name="Keys").click()


def compare(tab: Visit, _: str) -> None:
    tab.go("compare")
    tab.page.locator(".names select").nth(2).wait_for()
    ask(tab, QUESTION)
    expect(tab.page.locator("article.column[aria-busy=false]")).to_have_count(3, timeout=SLOW_MS)
    tab.page.locator("mark").first.wait_for()


def compare_empty(tab: Visit, _: str) -> None:
    tab.go("compare")
    tab.page.locator(".names select").nth(2).wait_for()


def blind(tab: Visit, _: str) -> None:
    tab.go("compare")
    tab.page.locator(".names select").nth(2).wait_for()
    tab.page.get_by_label("Blind").check()
    tab.page.locator("#prompt").fill(f"{QUESTION}\nWhat is a lighthouse for?\nName three trees.")
    tab.page.get_by_role("button", name="Ask blind").click()
    for verdict in ("1", "3"):
        vote(tab, verdict)
        tab.page.get_by_role("button", name="Next prompt").click()
    vote(tab, "2")


def mix(tab: Visit, _: str) -> None:
    tab.go("mix")
    tab.page.get_by_role("slider", name="pirate").fill("0.8")
    tab.page.get_by_role("slider", name="terse").fill("0.5")
    limit(tab.page)
    say(tab, QUESTION)
    tab.page.get_by_role("slider", name="terse").fill("-0.5")
    say(tab, "And a soft one?")


def mix_empty(tab: Visit, _: str) -> None:
    tab.go("mix")
    tab.page.get_by_role("slider", name="pirate").wait_for()


def operate(tab: Visit, _: str) -> None:
    tab.go("operate")
    watch(tab)


def operate_admin(tab: Visit, key: str) -> None:
    tab.page.add_init_script(f"sessionStorage.setItem('guanaco.adminKey', '{key}')")
    tab.go("operate")
    watch(tab)


def refused(tab: Visit, key: str) -> None:
    operate_admin(tab, key)
    tab.page.locator("#load-name").fill("bad")
    tab.page.locator("#load-source").fill("no/such/folder")
    tab.page.locator("#load-source").press("Enter")
    tab.page.locator(".failure").scroll_into_view_if_needed()


def jobs(tab: Visit, key: str) -> None:
    operate_admin(tab, key)
    tab.page.get_by_role("button", name="Loss").last.click()
    tab.page.locator(".plot").wait_for()
    tab.page.locator("#jobs").scroll_into_view_if_needed()


def watch(tab: Visit) -> None:
    """Some answers, so that the charts have something to show."""
    tab.page.locator(".spark").first.wait_for()
    for _ in range(2):
        tab.page.evaluate(
            """(text) => { for (const model of ['pirate', 'terse']) fetch('v1/chat/completions', { method: 'POST',
          headers: { 'Content-Type': 'application/json' },
          body: JSON.stringify({ model, max_tokens: 60, messages: [{ role: 'user', content: text }] }) }); }""",
            QUESTION,
        )
        tab.page.wait_for_timeout(6000)


def limit(page: Page, tokens: int = 90) -> None:
    page.evaluate(f"""() => import('/page/chat/conversations.js').then((m) => {{
      m.current.get().conversation.sampling.max_tokens = {tokens}; }})""")


def say(tab: Visit, text: str) -> None:
    tab.say(text)
    expect(tab.answers.last).to_have_attribute("aria-busy", "false", timeout=SLOW_MS)


def ask(tab: Visit, text: str) -> None:
    tab.page.locator("#prompt").fill(text)
    tab.page.locator("summary").click()
    tab.page.locator("#compare-max_tokens").fill("60")
    tab.page.locator("#compare-max_tokens").press("Tab")
    tab.page.locator("summary").click()
    tab.page.locator("#prompt").press("Enter")


def vote(tab: Visit, verdict: str) -> None:
    button = tab.page.get_by_role("button", name="Left is better")
    expect(button).to_be_enabled(timeout=SLOW_MS)
    tab.page.keyboard.press(verdict)
    tab.page.get_by_text("Take it back").wait_for()


VIEWS: dict[str, Callable[[Visit, str], None]] = {
    view.__name__: view
    for view in (
        chat_empty, chat, chat_settings, chat_error, unreachable, keys, compare_empty, compare, blind, mix_empty, mix,
        operate, operate_admin, refused, jobs,
    )
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--admin-key", default="")
    parser.add_argument("--out", type=Path, default=Path("build/pictures"))
    parser.add_argument("--only", choices=VIEWS, action="append")
    parser.add_argument("--look", choices=LOOKS, action="append")
    given = parser.parse_args()
    program = find_browser()
    if program is None:
        raise SystemExit("no Chromium is on the PATH: apt install chromium")
    given.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = launch(playwright, program)
        for look in given.look or LOOKS:
            for name in given.only or VIEWS:
                with visiting(browser, given.url, **LOOKS[look]) as tab:
                    VIEWS[name](tab, given.admin_key)
                    tab.page.wait_for_timeout(300)
                    tab.page.screenshot(path=given.out / f"{name}-{look}.png")
                    print(given.out / f"{name}-{look}.png", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
