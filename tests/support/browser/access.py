"""How a reader without a mouse or without eyes finds a view: Tab until something has the focus, and axe-core."""

from pathlib import Path

import pytest

from support.browser.visit import Visit

AXE = Path(__file__).resolve().parents[3] / "build" / "browser" / "axe.min.js"  # `make browser` fetches it
MOST_TABS = 120
FOCUSED = """(({ innerText, ariaLabel, id }) =>
  [innerText || ariaLabel || '', ariaLabel || '', id])(document.activeElement)"""
IS_VISIBLE = "getComputedStyle(document.activeElement).outlineStyle !== 'none'"


def reach(tab: Visit, name: str = "", id: str = "") -> None:
    """Tab until something of this name or id has the focus. The focus must be visible."""
    for _ in range(MOST_TABS):
        tab.page.keyboard.press("Tab")
        text, label, found = tab.page.evaluate(FOCUSED)
        if (id and found == id) or (name and name in (text.strip(), label)):
            assert tab.page.evaluate(IS_VISIBLE), "the focus can be seen"
            return
    raise AssertionError(f"the keyboard does not reach {name or id}")


def assert_axe_is_content(tab: Visit) -> None:
    """Nothing serious in what the tab shows now. The visit needs `bypass_csp=True`, because axe is an inline script."""
    if not AXE.exists():
        pytest.skip("axe-core is not here: `make browser` fetches it")
    tab.page.add_script_tag(content=AXE.read_text())
    found = tab.page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    told = [(v["id"], v["impact"], [n["html"][:160] for n in v["nodes"]]) for v in found["violations"]]
    assert [t for t in told if t[1] in ("serious", "critical")] == []
