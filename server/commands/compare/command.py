"""The options of `guanaco compare`. Used by `main`; heavy imports happen inside the verb."""

from pathlib import Path
from typing import Annotated

import typer

Option = typer.Option
_Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="CONTESTANT", help="adapters, aliases, NAME@VERSION, base, or URL#MODEL; two or more"),
]
_Url = Annotated[str, Option(help="the server of the contestants, with or without /v1")]
_Key = Annotated[
    list[str] | None,
    Option(metavar="URL=PLACE", help="an endpoint's key; PLACE is env:VARIABLE or file:PATH; repeatable"),
]
_AdminKey = Annotated[str | None, Option(envvar="GUANACO_ADMIN_KEY", help="for NAME@VERSION and --promote")]
_Prompts = Annotated[Path | None, Option(metavar="FILE", help="JSONL with messages or text in each line")]
_Benchmark = Annotated[str | None, Option(help="vicuna or openassistant, instead of --prompts")]
_BenchmarkFile = Annotated[
    str | None, Option(metavar="PLACE", help="its released file: a path, or ORG/NAME@COMMIT/FILE of a hub dataset")
]
_Sample = Annotated[int | None, Option(min=1, help="so many of the prompts, chosen by --seed")]
_Stop = Annotated[list[str] | None, Option(help="ends an answer; repeatable (none: ### Human and ### Assistant)")]
_Seed = Annotated[int, Option(min=0, help="of sampling, of --sample, orders and resampling")]
_Parallel = Annotated[int, Option(min=1, max=256, help="most requests at a time to one endpoint")]
_Check = Annotated[list[str] | None, Option(help="json, equals (the reference answer) or regex:PATTERN; repeatable")]
_Perplexity = Annotated[bool, Option(help="of the prompts' reference answers; it takes a pass over each of them")]
_JudgeUrl = Annotated[str | None, Option(help="an OpenAI-compatible endpoint that judges")]
_JudgeModel = Annotated[str | None, Option(metavar="NAME", help="the model that judges there")]
_JudgeMode = Annotated[str, Option(help="classes (first, second, tie) or scores (1 to 10, against --reference)")]
_JudgeRegex = Annotated[str | None, Option(metavar="PATTERN", help="a matching answer is better")]
_JudgePace = Annotated[float | None, Option(min=0.1, help="most requests a minute to the judge")]
_JudgePrice = Annotated[str | None, Option(metavar="IN,OUT", help="of a million tokens of its prompts and answers")]
_Human = Annotated[bool, Option("--human", help="a blind page on this machine asks a person")]
_Reference = Annotated[
    str | None, Option(metavar="PLAYER", help="judge all others against this one; its scores are 100 %")
]
_Out = Annotated[Path, Option(metavar="DIR", help="answers, judgements and reports; a run goes on there")]
_Promote = Annotated[
    str | None, Option(metavar="ALIAS", help="point it at the winner, if the interval says there is one")
]
_Replay = Annotated[
    Path | None,
    Option(metavar="FILE", help="no contestants: recompute the statistics of a CSV file of verdicts (.gz too)"),
]
_Scores = Annotated[Path | None, Option(metavar="FILE", help="with --replay: a CSV file of scores")]


def compare(
    contestants: _Names = None,
    url: _Url = "http://127.0.0.1:8000",
    key: _Key = None,
    admin_key: _AdminKey = None,
    prompts: _Prompts = None,
    benchmark: _Benchmark = None,
    benchmark_file: _BenchmarkFile = None,
    sample: _Sample = None,
    temperature: Annotated[float, Option(min=0.0, max=2.0, help="of the answers")] = 0.7,
    top_p: Annotated[float, Option(min=0.0, max=1.0, help="of the answers")] = 0.9,
    max_tokens: Annotated[int, Option(min=1, help="most tokens of an answer")] = 512,
    stop: _Stop = None,
    seed: _Seed = 0,
    parallel: _Parallel = 8,
    check: _Check = None,
    perplexity: _Perplexity = True,
    judge_url: _JudgeUrl = None,
    judge_model: _JudgeModel = None,
    judge_mode: _JudgeMode = "classes",
    judge_regex: _JudgeRegex = None,
    judge_per_minute: _JudgePace = None,
    judge_price: _JudgePrice = None,
    human: _Human = False,
    reference: _Reference = None,
    out: _Out = Path("guanaco-compare"),
    promote: _Promote = None,
    replay: _Replay = None,
    scores: _Scores = None,
    as_json: Annotated[bool, Option("--json", help="one JSON object instead of tables")] = False,
) -> None:
    """Say which of several adapters is better, and how sure that is.

    All contestants answer the same prompts with the same seed. Lengths, exact checks and perplexity need no judge. A
    judge (a model, a regex or a person) compares the answers; models judge each pair in both orders. The reports are
    report.json, report.md and report.html in --out.
    """
    from guanaco.server.commands.compare.options import Options
    from guanaco.server.commands.compare.run import run_compare
    from guanaco.server.commands.compare.stored import run_replay
    from guanaco.server.errors import CommandError

    if replay is not None:
        if contestants or judge_url or judge_regex or human or promote:
            raise CommandError("--replay takes stored verdicts: it goes with --scores, --reference, --seed and --json")
        run_replay(replay, scores, reference=reference, seed=seed, as_json=as_json)
        return
    if scores is not None:
        raise CommandError("--scores goes with --replay")
    given = {name: value for name, value in locals().items() if name in Options.__dataclass_fields__}
    run_compare(Options(**given))
