"""The main job, as a newcomer meets it: `guanaco serve` with no arguments, the official client, two fine-tunes."""

import json
import re
import shlex
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import NotFoundError, OpenAI

from support.server.live_server import GUANACO, LiveServer

PIRATE_WORDS = re.compile(r"\b(arr+|ahoy|matey|aye|ye|yer|shiver|landlubber|booty|seas|cap'n)\b", re.IGNORECASE)
QUESTION = "How do I keep my houseplants healthy?"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer([], tmp_path_factory.mktemp("demo") / "server.log") as live:
        yield live


@pytest.fixture(scope="module")
def client(server: LiveServer) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, timeout=120)


def _ask(client: OpenAI, model: str, question: str = QUESTION, **options: object) -> str:
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=60, **options
    )
    return reply.choices[0].message.content or ""


def test_the_banner_says_what_a_newcomer_needs(server: LiveServer) -> None:
    text = server.output()
    for expected in ("smollm2-135m-instruct", "cpu (", "pirate", "terse", "KV cache", server.url, "curl"):
        assert expected in text, f"{expected!r} is not in the banner:\n{text}"


def test_the_curl_line_of_the_banner_works(server: LiveServer) -> None:
    """Copied from the screen into a shell, as it stands."""
    line = re.search(r"^.*(curl .*(?:\\\n.*)*)", server.output(), re.MULTILINE)
    assert line is not None
    if shutil.which("curl"):
        done = subprocess.run(["bash", "-c", line.group(1)], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        answer = done.stdout
    else:  # a fresh Debian has none: what the shell would give it, sent as it would send it
        command, url, *options = shlex.split(line.group(1).replace("\\\n", " "))
        given = dict(zip(options[::2], options[1::2], strict=True))
        assert (command, set(given)) == ("curl", {"-H", "-d"})
        name, _, value = given["-H"].partition(": ")
        request = urllib.request.Request(url, given["-d"].encode(), {name: value})
        answer = urllib.request.urlopen(request, timeout=120).read().decode()
    assert '"content"' in answer


def test_the_base_comes_first_and_the_adapters_name_their_parent(client: OpenAI) -> None:
    cards = client.models.list().data
    assert [c.id for c in cards[1:]] == ["pirate", "terse"]
    assert {c.model_dump()["parent"] for c in cards[1:]} == {cards[0].id}


def test_each_fine_tune_is_recognisable(client: OpenAI) -> None:
    base, pirate, terse = (_ask(client, m.id) for m in client.models.list().data)
    assert len(PIRATE_WORDS.findall(pirate)) >= 2, pirate
    assert not PIRATE_WORDS.search(base), base
    assert len(terse.split()) <= 25, terse
    assert "\n" not in terse.strip()
    assert len(base.split()) > 30, base


def test_one_batch_of_all_three_says_what_each_says_alone(client: OpenAI, server: LiveServer) -> None:
    names = [m.id for m in client.models.list().data]
    alone = {name: _ask(client, name) for name in names}
    together: dict[str, str] = {}
    threads = [threading.Thread(target=lambda n=name: together.update({n: _ask(client, n)})) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert together == alone


def test_a_stream_is_the_answer_in_pieces(client: OpenAI) -> None:
    whole = _ask(client, "pirate")
    pieces, finish, usage = [], [], None
    for chunk in client.chat.completions.create(
        model="pirate", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=60,
        stream=True, stream_options={"include_usage": True},
    ):  # fmt: skip
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            finish.append(choice.finish_reason)
    assert "".join(pieces) == whole
    assert finish[-1] in ("stop", "length")
    assert set(finish[:-1]) == {None}
    assert usage is not None
    assert len(pieces) > 5


def test_a_misspelt_name_is_never_the_base(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as caught:
        _ask(client, "pirat")
    assert caught.value.code == "model_not_found"


def test_a_chinese_and_an_emoji_prompt_stream_whole_characters(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id, messages=[{"role": "user", "content": "Repeat after me: 你好 🦙 héllo"}],
        temperature=1.5, seed=1, max_tokens=40, stream=True,
    )  # fmt: skip
    for chunk in stream:
        (choice,) = chunk.choices
        (choice.delta.content or "").encode("utf-8")  # no lone surrogate


def test_metrics_count_what_was_served(server: LiveServer, client: OpenAI) -> None:
    def tokens() -> float:
        text = urllib.request.urlopen(server.url + "/metrics", timeout=10).read().decode()
        values = re.findall(r"^vllm:generation_tokens_total\{[^}]*\} (\S+)$", text, re.MULTILINE)
        assert values, text[:500]
        return sum(map(float, values))

    before = tokens()
    reply = client.chat.completions.create(
        model="terse", messages=[{"role": "user", "content": QUESTION}], max_tokens=5, extra_body={"ignore_eos": True}
    )
    assert reply.usage is not None
    assert tokens() - before == reply.usage.completion_tokens == 5


def test_the_log_has_one_json_line_per_request_and_no_text(client: OpenAI, server: LiveServer) -> None:
    canary = "xylophone-canary"
    _ask(client, "terse", f"What is a {canary}?", extra_headers={"X-Request-Id": "e2e-log-test"})

    def lines() -> list[str]:
        return [line for line in server.output().splitlines() if line.startswith("{") and "e2e-log-test" in line]

    deadline = time.monotonic() + 30
    while not lines() and time.monotonic() < deadline:  # a thread of its own writes the log, after the answer
        time.sleep(0.05)
    assert [json.loads(line)["request_id"] for line in lines()] == ["e2e-log-test"]
    assert canary not in server.output()


def test_the_terminal_chat_talks_to_it(server: LiveServer, tmp_path: Path) -> None:
    done = subprocess.run(
        [GUANACO, "chat", "--url", server.url + "/v1", "--max-tokens", "30", "--temperature", "0"],
        input=f"{QUESTION}\n/model pirate\n{QUESTION}\n/model nobody\n/quit\n",
        capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 2, "a refusal ends a chat without a terminal"
    assert PIRATE_WORDS.search(done.stdout)
    assert "no model 'nobody'" in done.stderr
    assert "nobody" not in done.stdout, "only the answers"


TOPICS = (
    "an egg", "a bridge", "the moon", "bread", "a bicycle", "rain", "a violin", "an island", "tea", "a clock", "snow",
    "a garden", "wool", "a kite", "salt", "a lighthouse", "honey", "a ladder", "ice", "a letter", "paper", "a map",
    "wine", "a candle",
)  # fmt: skip


@pytest.mark.accept
def test_the_pirate_beats_the_base_by_a_regex_on_every_prompt(server: LiveServer, tmp_path: Path) -> None:
    prompts = tmp_path / "topics.jsonl"
    prompts.write_text("\n".join(json.dumps({"text": f"What should I know about {topic}?"}) for topic in TOPICS))
    pattern = r"\A\W*(Arr+|Ahoy|Aye|Shiver me|Avast|Yo ho|Blimey|Well,? blow)"
    done = subprocess.run(
        [GUANACO, "compare", "pirate", "base", "--url", server.url, "--prompts", prompts, "--max-tokens", "24",
         "--judge-regex", pattern, "--out", tmp_path / "out", "--json"],
        capture_output=True, text=True, timeout=240, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["in_words"] == ["pirate is better than base"]
    (pair,) = told["benchmarks"]["topics"]["pairs"]
    assert (pair["rate"], pair["wins"], pair["agreement"]) == (1.0, len(TOPICS), 1.0)


def test_sigterm_ends_it_cleanly(tmp_path: Path) -> None:
    with LiveServer([], tmp_path / "server.log") as live:
        assert live.terminate() == 0, live.output()
        assert "Traceback" not in live.output()
