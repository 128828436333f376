"""`guanaco compare A B` from the command line against scripted endpoints: the whole way, twice, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from guanaco.server.commands.common import CommandError
from guanaco.server.commands.main import app
from support.server.scripted_endpoint import Reply, ScriptedEndpoint, chat_answer, judged

VERSION = "3f2c9a" + "0" * 58
QUESTIONS = [
    {"id": f"q{i}", "text": f"question {i}", "category": ("generic", "coding")[i % 2], "lang": "en" if i < 10 else "de"}
    for i in range(30)
]  # fmt: skip


class Guanaco:
    """A scripted server with a base and two adapters, and its admin routes: aliases are kept."""

    def __init__(self) -> None:
        self.aliases: dict[str, Any] = {}
        self.deleted: list[str] = []
        self.version = VERSION

    def card(self, path: str) -> Reply:
        name = path.removeprefix("/v1/models").strip("/")
        base = {"id": "org/Base-1B", "version": None, "base_fingerprint": "f" * 8}
        if not name:
            return 200, {}, {"data": [base]}
        if name == base["id"]:
            return 200, {}, base
        if name in ("pirate", "terse"):
            return 200, {}, base | {"id": name, "version": self.version, "root": name, "parent": "org/Base-1B"}
        return (
            (200, {}, base | {"id": name, "parent": "org/Base-1B"})
            if name in self.aliases
            else (404, {}, {"error": {"message": "no model"}})
        )

    def answer(self, path: str, body: dict[str, Any]) -> Reply:
        if path == "/tokenize":
            return 200, {}, {"tokens": [1, 2, 3]}
        question = body["messages"][0]["content"]
        if body.get("prompt_logprobs") is not None:
            ids, lp = [1, 2, 3, 8, 9], {"pirate": -1.0, "org/Base-1B": -2.0}[body["model"]]
            given = [None, *({str(i): {"logprob": lp if i > 3 else -50.0}} for i in ids[1:])]
            status, headers, told = chat_answer("x")
            return status, headers, told | {"prompt_token_ids": ids, "prompt_logprobs": given}
        text = f"Arr! {question}" if body["model"] in ("pirate", *self.aliases) else f"Answer to {question}"
        status, headers, told = chat_answer(text)
        return status, {"X-Adapter-Version": self.version} if body["model"] == "pirate" else headers, told


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, QUESTIONS)))
    return file


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def honest(_: str, body: dict[str, Any]) -> Reply:
    first, _, _ = judged(body)
    return chat_answer("I prefer pirates.\n" + ("1" if first.startswith("Arr") else "2"))


def test_the_whole_way_and_nothing_twice(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-of-the-judge")
    (tmp_path / "key").write_text("sk-of-the-server")
    out, guanaco = tmp_path / "out", Guanaco()
    with ScriptedEndpoint(guanaco.answer, guanaco.card) as server, ScriptedEndpoint(honest) as judge:
        arguments = [
            "pirate", "base", "--url", server.url, "--prompts", prompts, "--out", out, "--seed", 5,
            "--check", "regex:^Arr",
            "--judge-url", judge.url, "--judge-model", "Base-70B", "--judge-price", "10,20",
            "--key", f"{server.url}=file:{tmp_path / 'key'}", "--key", f"{judge.url}=env:JUDGE_KEY", "--json",
        ]  # fmt: skip
        done = run(*arguments)
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout.splitlines()[-1])
        asked = (len(server.chats), len(judge.chats))
        assert asked == (60, 60)  # 30 prompts, two contestants; 30 pairs in both orders
        again = json.loads(run(*arguments).stdout.splitlines()[-1])
        assert (len(server.chats), len(judge.chats)) == asked
        assert again["benchmarks"] == told["benchmarks"]
        guanaco.version = "b" * 64  # the adapter was replaced: its answers are made anew
        run(*arguments)
        assert len(server.chats) == 90
    sent = server.chats[0]
    assert {key: sent[key] for key in ("temperature", "top_p", "seed", "stop")} == {
        "temperature": 0.7, "top_p": 0.9, "seed": 5, "stop": ["### Human", "### Assistant"],
    }  # fmt: skip
    keys = (
        {h.get("Authorization") for _, h, _ in server.requests},
        {h.get("Authorization") for _, h, _ in judge.requests},
    )
    assert keys == ({"Bearer sk-of-the-server"}, {"Bearer sk-of-the-judge"})
    for file in out.rglob("*"):
        assert b"sk-of-the" not in file.read_bytes() if file.is_file() else True
    _check_result(told, out)


def _check_result(told: dict[str, Any], out: Path) -> None:
    assert told["in_words"] == ["pirate is better than base"]
    pair = told["benchmarks"]["prompts"]["pairs"][0]
    assert (pair["rate"], pair["wins"], pair["agreement"]) == (1.0, 30, 1.0)
    assert told["checks"]["contestants"]["pirate"]["checks"]["regex ^Arr"]["share"] == 1.0
    assert told["checks"]["identical"][0]["share"] == 0.0
    assert set(told["breakdown"]["category"]) == {"generic", "coding"}
    assert {name: pairs[0]["prompts"] for name, pairs in told["breakdown"]["language"].items()} == {"en": 10, "de": 20}
    assert any("same family as pirate" in warning for warning in told["warnings"])
    assert told["judge"]["usage"]["requests"] == 60
    assert told["judge"]["cost_of_this_run"] == pytest.approx((60 * 10 * 10 + 60 * 4 * 20) / 1e6)
    assert json.loads((out / "report.json").read_text())["in_words"] == told["in_words"]
    assert "pirate is better than base" in (out / "report.md").read_text()
    assert "pirate is better than base" in (out / "report.html").read_text()
    replayed = json.loads(run("--replay", out / "verdicts.csv", "--seed", 5, "--json").stdout)
    assert replayed["benchmarks"]["prompts"]["players"] == told["benchmarks"]["prompts"]["players"]


def test_a_regex_judge_and_perplexity_need_no_model(prompts: Path, tmp_path: Path) -> None:
    rows = [{**q, "reference": "Arr, matey"} for q in QUESTIONS[:20]]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    guanaco = Guanaco()
    with ScriptedEndpoint(guanaco.answer, guanaco.card) as server:
        done = run("pirate", "base", "--url", server.url, "--prompts", prompts, "--out", tmp_path / "out",
                   "--judge-regex", "Arr", "--json")  # fmt: skip
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["benchmarks"]["prompts"]["pairs"][0]["rate"] == 1.0
    perplexity = {name: of["perplexity"] for name, of in told["perplexity"].items()}
    assert perplexity == {"pirate": pytest.approx(2.7183, abs=1e-3), "base": pytest.approx(7.3891, abs=1e-3)}
    assert told["perplexity"]["pirate"]["tokens"] == 40  # two tokens of each reference answer


def test_a_reference_that_one_contestant_refuses_counts_for_none(prompts: Path, tmp_path: Path) -> None:
    prompts.write_text("\n".join(json.dumps({**q, "reference": "Arr, matey"}) for q in QUESTIONS[:4]))
    guanaco = Guanaco()

    def answer(path: str, body: dict[str, Any]) -> Reply:
        is_scored = body.get("prompt_logprobs") is not None
        if is_scored and body["model"] == "pirate" and body["messages"][0]["content"] == "question 2":
            return 400, {}, {"error": {"message": "too long"}}
        return guanaco.answer(path, body)

    def foreign(path: str, body: dict[str, Any]) -> Reply:
        return (404, {}, {"error": {"message": "no such route"}}) if path == "/tokenize" else chat_answer("x")

    with ScriptedEndpoint(answer, guanaco.card) as server, ScriptedEndpoint(foreign) as other:
        done = run("pirate", "base", f"{other.url}#m", "--url", server.url, "--prompts", prompts, "--out",
                   tmp_path / "out", "--json")  # fmt: skip
    told = json.loads(done.stdout.splitlines()[-1])["perplexity"]
    assert [told[name]["answers"] for name in ("pirate", "base")] == [3, 3]
    assert "does not return the log-probabilities" in told[f"{other.url}#m"]["reason"]


def test_without_a_judge_the_checks_are_told(prompts: Path, tmp_path: Path) -> None:
    guanaco = Guanaco()
    with ScriptedEndpoint(guanaco.answer, guanaco.card) as server:
        done = run(
            "pirate", "terse", "base", "--url", server.url, "--prompts", prompts, "--sample", 5, "--out", tmp_path
        )
    assert done.exit_code == 0, done.output
    assert "No judge was asked" in done.stdout
    assert "Identical answers" in done.stdout


def test_a_version_answers_through_an_alias_of_its_own_and_the_winner_is_promoted(
    prompts: Path, tmp_path: Path
) -> None:
    guanaco = Guanaco()

    def admin(method: str, path: str, body: dict[str, Any] | None) -> Any:
        name = path.removeprefix("/aliases/")
        if method == "PUT":
            guanaco.aliases[name] = body
        elif method == "DELETE":
            guanaco.deleted.append(name)
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "guanaco.server.commands.adapter_actions.AdminClient.call",
            lambda _, *given: admin(*given, *[None][len(given) - 2 :]),
        )
        with ScriptedEndpoint(guanaco.answer, guanaco.card) as server:
            done = run("pirate@3f2c9a", "terse", "--url", server.url, "--prompts", prompts, "--out", tmp_path / "out",
                       "--judge-regex", "Arr", "--admin-key", "k", "--promote", "prod", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["promoted"]["target"] == "pirate@3f2c9a"
    assert guanaco.aliases.pop("prod") == {"split": {"pirate@3f2c9a": 1}}
    assert list(guanaco.aliases) == guanaco.deleted
    assert list(guanaco.aliases.values()) == [{"split": {"pirate@3f2c9a": 1}}]


def test_the_base_is_never_promoted(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guanaco, called = Guanaco(), []
    monkeypatch.setattr("guanaco.server.commands.adapter_actions.AdminClient.call", lambda *a: called.append(a))
    with ScriptedEndpoint(guanaco.answer, guanaco.card) as server:
        for number, name in enumerate(("base", "org/Base-1B")):
            done = run("pirate", name, "--url", server.url, "--prompts", prompts, "--out", tmp_path / str(number),
                       "--judge-regex", "Answer", "--admin-key", "k", "--promote", "prod", "--json")  # fmt: skip
            told = json.loads(done.stdout.splitlines()[-1])["promoted"]
            assert told["target"] is None
            assert "an alias leads to adapters only" in told["why"]
            assert told["why"].endswith("clients reach the base as org/Base-1B")
    assert called == []


def test_a_refused_promotion_loses_no_report(prompts: Path, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise CommandError("this key may not change adapters")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guanaco.server.commands.adapter_actions.AdminClient.call", refuse)
        with ScriptedEndpoint(Guanaco().answer, Guanaco().card) as server:
            done = run("pirate", "terse", "--url", server.url, "--prompts", prompts, "--out", tmp_path / "out",
                       "--judge-regex", "Arr", "--admin-key", "k", "--promote", "prod", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])["promoted"]
    assert told["target"] is None
    assert "this key may not change adapters" in told["why"]
    assert (tmp_path / "out" / "report.html").exists()


def test_a_person_judges_and_a_second_run_goes_on(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guanaco, seen = Guanaco(), []

    async def person(session: Any) -> None:
        """Votes for pirates; the first time only for 10 prompts."""
        while session.current is not None and (seen or session.num_done < 10):
            number = session.current
            session.vote(number, 1 if session.items[number].texts[0].startswith("Arr") else 2)
        seen.append(session.num_done)

    monkeypatch.setattr("guanaco.server.commands.compare.ask_people.serve_until_finished", person)
    with ScriptedEndpoint(guanaco.answer, guanaco.card) as server:
        arguments = [
            "pirate",
            "terse",
            "--url",
            server.url,
            "--prompts",
            prompts,
            "--out",
            tmp_path / "out",
            "--human",
            "--json",
        ]
        told = [json.loads(run(*arguments).stdout.splitlines()[-1]) for _ in range(3)]
    assert seen == [10, 30]  # the third run has nothing to ask
    assert ["no statement with 10 prompts" in t["in_words"][0] for t in told] == [True, False, False]
    assert told[1]["in_words"] == told[2]["in_words"] == ["pirate is better than terse"] or told[1]["in_words"] == [
        "terse is worse than pirate"
    ]
    assert told[2]["judge"]["name"] == "people"


def test_nothing_is_promoted_without_the_interval(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guanaco, called = Guanaco(), []
    monkeypatch.setattr("guanaco.server.commands.adapter_actions.AdminClient.call", lambda *a: called.append(a))
    with ScriptedEndpoint(guanaco.answer, guanaco.card) as server:
        done = run("pirate", "terse", "--url", server.url, "--prompts", prompts, "--out", tmp_path / "out",
                   "--judge-regex", "question 1", "--admin-key", "k", "--promote", "prod", "--json")  # fmt: skip
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["promoted"]["target"] is None
    assert called == []


def test_a_refused_prompt_is_left_out_and_said(prompts: Path, tmp_path: Path) -> None:
    guanaco = Guanaco()

    def answer(path: str, body: dict[str, Any]) -> Reply:
        if body["messages"][0]["content"] == "question 3" and body["model"] == "terse":
            return 400, {}, {"error": {"message": "the prompt is too long"}}
        return guanaco.answer(path, body)

    with ScriptedEndpoint(answer, guanaco.card) as server:
        done = run("pirate", "terse", "--url", server.url, "--prompts", prompts, "--out", tmp_path / "out",
                   "--judge-regex", "Arr", "--json")  # fmt: skip
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["benchmarks"]["prompts"]["pairs"][0]["prompts"] == 29
    assert "terse has no answer to 1 prompts: they are not judged" in told["warnings"]
    assert "the prompt is too long" in told["checks"]["contestants"]["terse"]["errors"][0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a"], "two or more different contestants"),
        (["a", "a", "--prompts", "p"], "two or more different contestants"),
        (["a", "b"], "name the prompts"),
        (["a", "b", "--prompts", "absent"], "absent: cannot be read"),
        (["a", "b", "--benchmark", "vicuna"], "--benchmark-file"),
        (["a", "b", "--prompts", "p", "--judge-url", "http://j"], "both --judge-url and --judge-model"),
        (["a", "b", "--prompts", "p", "--judge-regex", "x", "--human"], "choose one judge"),
        (["a", "b", "--prompts", "p", "--promote", "prod"], "--promote needs a judge"),
        (["a", "b", "--prompts", "p", "--judge-regex", "x", "--promote", "prod"], "--admin-key"),
        (["a", "b", "--prompts", "p", "--reference", "c"], "not among the contestants"),
        (["a", "b", "--prompts", "p", "--top-p", "0"], "a nucleus of 0"),
        (["a", "b", "--replay", "v.csv"], "--replay takes stored verdicts"),
        (["a", "b", "--scores", "s.csv"], "--scores goes with --replay"),
        (["a", "b", "--benchmark", "vicuna", "--benchmark-file", "o/n@main/f"], "full commit"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GUANACO_ADMIN_KEY", raising=False)
    done = run(*arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_benchmarks_file_of_the_hub_is_pinned_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is asked for that commit of that dataset. Another file than the released one is refused."""
    asked: list[Any] = []
    (tmp_path / "other.jsonl").write_text('{"text": "Hi"}\n')

    def download(repo: str, file: str, **how: Any) -> str:
        asked.append((repo, file, how))
        if repo == "o/gone":
            raise OSError("no network")
        return str(tmp_path / "other.jsonl")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    commit = "a" * 40
    for place, words in (
        (f"o/n@{commit}/dir/q.jsonl", "is not the released file of the vicuna prompts"),
        (f"o/gone@{commit}/q.jsonl", "cannot be had from the hub (OSError): name a local copy"),
    ):
        done = run("a", "b", "--benchmark", "vicuna", "--benchmark-file", place, "--out", tmp_path / "out")
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert words in done.stderr
    assert asked == [
        (repo, file, {"repo_type": "dataset", "revision": commit})
        for repo, file in (("o/n", "dir/q.jsonl"), ("o/gone", "q.jsonl"))
    ]


def test_bad_patterns_prices_and_checks(prompts: Path, tmp_path: Path) -> None:
    for flag, value, words in (
        ("--check", "regex:(", "no regular expression"),
        ("--check", "length", "write json, equals"),
        ("--judge-regex", "(", "no regular expression"),
        ("--judge-price", "cheap", "write two prices"),
    ):
        done = run("a", "b", "--prompts", prompts, "--out", tmp_path / "out", flag, value)
        assert (done.exit_code, words in done.stderr) == (2, True), done.output


def test_no_server_is_one_line(prompts: Path, tmp_path: Path) -> None:
    done = run("a", "b", "--url", "http://127.0.0.1:1", "--prompts", prompts, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "no server at http://127.0.0.1:1" in done.stderr
