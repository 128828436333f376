"""200 hostile texts as answers: none runs a script, loads anything, or changes the page around it."""

from urllib.parse import urlsplit

from playwright.sync_api import expect

from support.browser.hostile import hostile_texts

TEXTS = hostile_texts()
POLLED = {"/v1/models", "/health/ready", "/v1/chat/completions", "/"}
SAFE = {
    "DIV", "A", "BLOCKQUOTE", "BR", "CODE", "DEL", "EM", "H1", "H2", "H3", "H4", "H5", "H6", "HR", "LI", "OL", "P", "PRE",
    "STRONG", "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "UL",
}  # fmt: skip
LOOK = """() => [...document.querySelectorAll('.text *')].map((node) => ({
  name: node.nodeName, href: node.getAttribute('href'), type: node.getAttribute('type'),
  attributes: node.getAttributeNames().filter((name) => !['href', 'rel', 'target', 'align', 'start',
    'tabindex', 'class'].includes(name)) }))"""
SHOW_EACH_ALONE = """async (texts) => {
  const { newConversation, addNode } = await import('/page/chat/tree.js');
  const { saveAll } = await import('/page/chat/store.js');
  const made = newConversation('chat', 'pirate');
  made.title = 'Hostile';
  let parent = 'root';
  for (const text of texts) {
    const question = addNode(made, parent, { role: 'user', text });
    parent = addNode(made, question.id, { role: 'assistant', text, state: 'done', model: 'pirate', tokens: [] }).id;
  }
  await saveAll([made]);
  location.hash = `#/chat/${made.id}`;
}"""


def test_there_are_two_hundred() -> None:
    assert len(set(TEXTS)) == 200


def check(tab) -> None:
    found = tab.page.evaluate(LOOK)
    assert len(found) > 50
    for node in found:
        assert node["name"] in SAFE, node
        assert node["attributes"] == [], node
        assert node["href"] is None or urlsplit(node["href"]).scheme in ("http", "https", "mailto"), node
    assert tab.page.evaluate("window.wasRun ?? 0") == 0
    assert tab.page.locator("#app").count() == tab.page.locator("#announcements").count() == 1
    asked = {urlsplit(url).path for url in tab.requests}
    assert {path for path in asked if not path.startswith("/page/")} <= POLLED


def test_each_alone(server, visit) -> None:
    tab = visit(server)
    tab.page.add_init_script("window.pwned = () => { window.wasRun = (window.wasRun ?? 0) + 1; }")
    tab.go()
    tab.page.evaluate(SHOW_EACH_ALONE, TEXTS)
    expect(tab.answers).to_have_count(200)
    tab.page.mouse.move(600, 400)
    tab.page.wait_for_timeout(500)
    check(tab)


def test_streamed_character_by_character(server, visit) -> None:
    tab = visit(server)
    tab.page.add_init_script("window.pwned = () => { window.wasRun = (window.wasRun ?? 0) + 1; }")
    tab.go()
    for start in range(0, 200, 20):
        server.script(reply="\n\n".join(TEXTS[start : start + 20]), step_seconds=0.0001)
        tab.say(f"Texts from {start}")
        tab.done()
    tab.page.wait_for_timeout(300)
    check(tab)
