"""The options of `guanaco compare` as values, checked before anything is generated."""

from dataclasses import dataclass
from pathlib import Path

from guanaco.server.errors import CommandError
from guanaco.server.judging.checks import Check, compiled, read_check
from guanaco.server.judging.contestants import GUANACO_STOPS, MAX_CONTESTANTS, Sampling
from guanaco.server.judging.judges import CLASSES, SCORES, RegexJudge
from guanaco.server.judging.prompts import Prompt, read_benchmark, read_prompts
from guanaco.server.judging.prompts import sample as sample_of

_MOST_STOPS = 4  # OpenAI's limit


@dataclass(frozen=True)
class Options:
    """The command's options by their names. A property raises CommandError for an option that it can't read."""

    contestants: list[str] | None
    url: str
    key: list[str] | None
    admin_key: str | None
    prompts: Path | None
    benchmark: str | None
    benchmark_file: str | None
    sample: int | None
    temperature: float
    top_p: float
    max_tokens: int
    stop: list[str] | None
    seed: int
    parallel: int
    check: list[str] | None
    perplexity: bool
    judge_url: str | None
    judge_model: str | None
    judge_mode: str
    judge_regex: str | None
    judge_per_minute: float | None
    judge_price: str | None
    human: bool
    reference: str | None
    out: Path
    promote: str | None
    as_json: bool

    def check_all(self) -> None:
        """Raises CommandError for the first option that is missing or contradicts another."""
        names = self.contestants or []
        if len(set(names)) < 2 or len(set(names)) != len(names):
            raise CommandError("name two or more different contestants: guanaco compare A B --prompts FILE")
        if len(names) > MAX_CONTESTANTS:
            raise CommandError(f"{len(names)} contestants: at most {MAX_CONTESTANTS} are compared at once")
        if (self.prompts is None) == (self.benchmark is None):
            raise CommandError("name the prompts: --prompts FILE or --benchmark vicuna, one of both")
        if (self.judge_url is None) != (self.judge_model is None):
            raise CommandError("a judge needs both --judge-url and --judge-model")
        if sum((self.judge_url is not None, self.judge_regex is not None, self.human)) > 1:
            raise CommandError("choose one judge: --judge-url, --judge-regex or --human")
        if self.judge_mode not in (CLASSES, SCORES):
            raise CommandError(f"--judge-mode {self.judge_mode}: there are {CLASSES} and {SCORES}")
        if self.judge_mode == SCORES and self.judge_url is not None and self.reference is None:
            raise CommandError("--judge-mode scores compares with one system: name it with --reference")
        if self.reference is not None and self.reference not in names:
            raise CommandError(f"--reference {self.reference}: it is not among the contestants")
        if self.promote is not None and not self.has_judge:
            raise CommandError("--promote needs a judge: --judge-url, --judge-regex or --human")
        if self.promote is not None and not self.admin_key:
            raise CommandError("--promote changes an alias: give --admin-key or the variable GUANACO_ADMIN_KEY")
        if self.top_p <= 0:
            raise CommandError("--top-p 0: a nucleus of 0 has no tokens; --temperature 0 is greedy")
        if len(self.stop or ()) > _MOST_STOPS:
            raise CommandError(f"--stop: at most {_MOST_STOPS} texts")

    @property
    def has_judge(self) -> bool:
        """Whether a judge was chosen."""
        return self.judge_url is not None or self.judge_regex is not None or self.human

    @property
    def sampling(self) -> Sampling:
        """How answers are sampled."""
        stop = GUANACO_STOPS if self.stop is None else tuple(text for text in self.stop if text)
        return Sampling(self.temperature, self.top_p, self.max_tokens, stop, self.seed)

    @property
    def checks(self) -> tuple[Check, ...]:
        """The exact checks."""
        return tuple(read_check(text) for text in self.check or ())

    @property
    def regex_judge(self) -> RegexJudge | None:
        """The judge of --judge-regex."""
        return None if self.judge_regex is None else RegexJudge(compiled(self.judge_regex, "--judge-regex"))

    @property
    def prices(self) -> tuple[float, float] | None:
        """The judge's prices of a million prompt tokens and of a million answer tokens; None if they are not given."""
        if self.judge_price is None:
            return None
        try:
            given, made = (float(part) for part in self.judge_price.split(","))
        except ValueError:
            given = made = -1.0
        if not (0 <= given < 1e9 and 0 <= made < 1e9):
            raise CommandError(f"--judge-price {self.judge_price}: write two prices, such as 2.5,10")
        return given, made

    def read_prompts(self) -> tuple[list[Prompt], str]:
        """The prompts, and the name under which reports and CSV files have them."""
        if self.benchmark is not None:
            return sample_of(read_benchmark(self.benchmark, self._file()), self.sample, self.seed), self.benchmark
        if self.prompts is None or self.benchmark_file is not None:
            raise CommandError("--benchmark-file goes with --benchmark")
        return sample_of(read_prompts(self.prompts), self.sample, self.seed), self.prompts.stem

    def _file(self) -> Path | None:
        place = self.benchmark_file
        if place is None or Path(place).exists() or "@" not in place:
            return None if place is None else Path(place)
        return _from_hub(place)


def _from_hub(place: str) -> Path:
    """The local copy of `ORG/NAME@COMMIT/FILE` of a hub dataset; only a full commit is a pinned revision."""
    from huggingface_hub import hf_hub_download

    repo, _, rest = place.partition("@")
    commit, _, file = rest.partition("/")
    is_commit = len(commit) == 40 and all(c in "0123456789abcdef" for c in commit)
    if repo.count("/") != 1 or not is_commit or not file:
        raise CommandError(f"--benchmark-file {place}: no such file, and not ORG/NAME@COMMIT/FILE with a full commit")
    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset", revision=commit))
    except Exception as error:  # the hub's client raises a dozen kinds; all mean that the file cannot be had
        raise CommandError(
            f"--benchmark-file {place}: cannot be had from the hub ({type(error).__name__}): name a local copy"
        ) from None
