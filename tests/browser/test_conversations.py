"""Conversations in the browser: 200 of them, search, rename, delete, export, import."""

import json
from pathlib import Path

from playwright.sync_api import expect

MAKE_MANY = """async (count) => {
  const { saveAll } = await import('/page/chat/store.js');
  const { newConversation, addNode } = await import('/page/chat/tree.js');
  const many = [];
  for (let i = 0; i < count; i += 1) {
    const made = newConversation('chat', 'pirate');
    made.title = `Conversation ${i}`;
    made.updated = i + 1;
    const question = addNode(made, 'root', { role: 'user', text: `Question ${i}` });
    addNode(made, question.id, { role: 'assistant', text: `Answer ${i} `.repeat(50), state: 'done', model: 'pirate', tokens: [] });
    many.push(made);
  }
  await saveAll(many);
}"""


def test_two_hundred_conversations(server, visit) -> None:
    tab = visit(server).go()
    tab.page.evaluate(MAKE_MANY, 200)
    tab.page.reload()
    entries = tab.page.locator(".conversations li")
    expect(entries.first).to_contain_text("Conversation 199")
    tab.page.get_by_role("button", name="Show 140 more").click()
    expect(entries).to_have_count(200)
    tab.page.get_by_label("Search conversations").fill("conversation 123")
    expect(entries).to_have_count(1)
    entries.get_by_role("link").click()
    expect(tab.answers).to_contain_text("Answer 123")
    tab.say("And now?")
    tab.done(1)
    tab.page.get_by_label("Search conversations").fill("")
    expect(entries.first).to_contain_text("Conversation 123")
    tab.page.get_by_role("link", name="New conversation").click()
    expect(tab.answers).to_have_count(0)
    expect(tab.page.get_by_text("Who should answer?")).to_be_visible()


def test_rename_delete_export_import(server, visit, tmp_path: Path) -> None:
    server.script(reply="An answer with **weight**.")
    tab = visit(server).go()
    tab.say("What is this?")
    tab.done()
    tab.page.get_by_role("button", name="Rename What is this?").click()
    tab.page.get_by_label("Title").fill("Weighty")
    tab.page.get_by_label("Title").press("Enter")
    entry = tab.page.locator(".conversations li")
    expect(entry).to_contain_text("Weighty")
    with tab.page.expect_download() as downloading:
        tab.page.get_by_role("button", name="Export").click()
    kept = tmp_path / "kept.json"
    downloading.value.save_as(kept)
    (conversation,) = json.loads(kept.read_text())["conversations"]
    assert [node["text"] for node in conversation["nodes"].values() if node.get("text")] == [
        "What is this?",
        "An answer with **weight**.",
    ]
    tab.page.get_by_role("button", name="Delete Weighty").click()
    tab.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(entry).to_have_count(0)
    tab.page.locator("#import-file").set_input_files(kept)
    expect(entry).to_contain_text("Weighty")
    entry.get_by_role("link").click()
    expect(tab.done().locator("strong", has_text="weight")).to_be_visible()


def test_damaged_files_are_told(server, visit, tmp_path: Path) -> None:
    tab = visit(server).go()
    for number, (text, words) in enumerate(
        (
            ("not JSON", "not JSON"),
            ('{"format": "other"}', "no conversations of this page"),
            (
                '{"format": "guanaco-conversations", "conversations": [{"id": "x", "nodes": {"root": {"id": "root", "children": ["a"]}}}]}',
                "1 were damaged",
            ),
        )
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        tab.page.locator("#import-file").set_input_files(path)
        expect(tab.page.locator(".sidebar .note")).to_contain_text(words)
