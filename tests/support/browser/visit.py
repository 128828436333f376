"""One reader of the page: a tab of its own, and everything that it asked for or complained about.

Chromium comes from the system (`apt install chromium`), since Playwright's own download is of another origin.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, Locator, Page, Playwright, expect

# The browser reports every answer with an error status. The tests look at what the page makes of it.
_EXPECTED = ("Failed to load resource",)
WAIT_MS = 15_000
NARROW, WIDE = {"width": 320, "height": 640}, {"width": 1280, "height": 800}


def launch(playwright: Playwright, program: str) -> Browser:
    expect.set_options(timeout=WAIT_MS)
    # No sandbox: containers have no user namespaces. Nothing may look for updates or anything else.
    arguments = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-gpu"]
    return playwright.chromium.launch(executable_path=program, args=arguments)


@dataclass
class Visit:
    """A tab. `problems` is what must stay empty: errors of scripts, of the security policy, foreign requests."""

    page: Page
    context: BrowserContext
    url: str
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.set_default_timeout(WAIT_MS)
        self.page.on("pageerror", lambda error: self.problems.append(f"script: {error}"))
        self.page.on("console", lambda message: self._said(message.type, message.text))
        self.page.on("dialog", lambda dialog: (self.problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.context.on("request", lambda request: self._asked(request.url))

    def _said(self, kind: str, text: str) -> None:
        if kind == "error" and not text.startswith(_EXPECTED):
            self.problems.append(f"console: {text}")

    def _asked(self, url: str) -> None:
        self.requests.append(url)
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob") and parts.hostname not in ("127.0.0.1", "localhost"):
            self.problems.append(f"foreign request: {url}")

    def go(self, view: str = "chat") -> "Visit":
        self.page.goto(f"{self.url}/#/{view}")
        return self

    @property
    def message(self) -> Locator:
        return self.page.get_by_label("Your message")

    @property
    def answers(self) -> Locator:
        return self.page.locator("article.answer")

    def say(self, text: str) -> None:
        """Write and send, and wait until the answer has begun."""
        before = self.answers.count()
        self.message.fill(text)
        self.message.press("Enter")
        expect(self.answers).to_have_count(before + 1)

    def done(self, index: int = -1) -> Locator:
        """The answer, once it is complete."""
        answer = self.answers.nth(index)
        expect(answer).to_have_attribute("aria-busy", "false")
        return answer

    def choose(self, name: str) -> None:
        self.page.get_by_label("Model", exact=True).select_option(name)


@contextmanager
def visiting(browser: Browser, url: str, **options: Any) -> Iterator[Visit]:
    """A fresh tab with a storage of its own, for `with`. Fails at the end where something went wrong in it."""
    context = browser.new_context(**{"viewport": WIDE, **options})
    visit = Visit(context.new_page(), context, url)
    visit.watch()
    try:
        yield visit
        assert visit.problems == [], visit.problems
    finally:
        context.close()
