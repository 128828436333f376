"""Where this machine's Chromium is. Needs no Playwright."""

import shutil

PROGRAMS = ("chromium", "chromium-headless-shell", "google-chrome")


def find_browser() -> str | None:
    """The program's path; None where there is none."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)
