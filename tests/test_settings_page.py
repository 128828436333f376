"""docs/settings.md has every setting with its default.

To write the page's tables anew after a change: `.venv/bin/python tests/test_settings_page.py`.
"""

from pathlib import Path

from guanaco.server.commands.setting_options import setting_options
from guanaco.server.config import SECTIONS, Settings

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
START, END = "<!-- tables -->\n", "<!-- end -->\n"


def tables() -> str:
    """One table for each panel of `guanaco serve --help`."""
    options = {option.name: option for option in setting_options()}
    text = ""
    for panel, section in SECTIONS.items():
        text += f"\n### {panel}\n\n| flag | default | meaning |\n|---|---|---|\n"
        for name in section.model_fields:
            option = options[name]
            shown = getattr(option, "show_default", None)
            default = shown if isinstance(shown, str) else ""
            meaning = (option.help or "").replace("|", "\\|")
            text += f"| `--{name.replace('_', '-')}` | {default} | {meaning} |\n"
    return text + "\n"


def _parts() -> tuple[str, str, str]:
    before, _, rest = PAGE.read_text().partition(START)
    old, _, after = rest.partition(END)
    return before + START, old, END + after


def test_the_page_has_every_setting() -> None:
    shown = tables()
    assert _parts()[1] == shown, "run .venv/bin/python tests/test_settings_page.py"
    assert all(f"| `--{name.replace('_', '-')}` |" in shown for name in Settings.model_fields)


if __name__ == "__main__":
    before, _, after = _parts()
    PAGE.write_text(before + tables() + after)
