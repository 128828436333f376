"""A flood on one adapter against the others: how many steps, and how much computing, until their first token.

All in steps of the real engine over the arithmetic model; every token and every invariant is checked by the simulator
on the way. "Solo" is the same request alone in the same engine.
"""

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest

from guanaco.server.engine.request import LoraRef, Request, SamplingParams, Sequence
from guanaco.server.engine.scheduler import MAX_PASSED_OVER_STEPS
from guanaco.server.engine.step_share import PREFILL_SHARE_WHILE_DECODING, StepShare
from guanaco.server.engine.turns import Turns
from support.simulation.simulator import Simulation, World

WORLD = World(
    block_size=8,
    num_blocks=400,
    max_model_len=200,
    max_num_seqs=16,
    max_num_batched_tokens=64,
    num_slots=4,
    num_adapters=0,
    queue_timeout_seconds=0.0,
    fault_chance=0.0,
)
SHARE = int(WORLD.max_num_batched_tokens * PREFILL_SHARE_WHILE_DECODING)  # of a step, for prompts while others decode
SHORT = replace(WORLD, flood_step_tokens=8)  # steps for the flood
TIGHT = replace(WORLD, num_blocks=60)  # sixteen sequences never fit
FLOODS = {
    "long answers": (5, 150),
    "long prompts": (150, 1),
    "long prompts and answers": (100, 90),
    "many little ones": (3, 2),
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("guanaco.server.engine.engine").disabled = True


class Race:
    """One adapter's flood (`num_open` requests of it are always open), and others whose first tokens are timed."""

    def __init__(
        self, world: World, flood: tuple[int, int] | None, *, flooder: str = "flood", num_open: int = 40
    ) -> None:
        self.simulation = Simulation(1, world)
        self.flood, self.flooder, self.num_open = flood, flooder, num_open
        self.started: dict[str, tuple[int, int]] = {}  # request id → steps and tokens computed when it came
        self.first: dict[str, tuple[int, int]] = {}  # … between that and its first token
        self._number = 0
        self._last_ran: dict[str, int] = {}

    def submit(self, adapters: str, length: int, max_tokens: int) -> str:
        """adapters: versions, comma-separated."""
        self._number += 1
        name = f"{adapters or 'base'}-{self._number}"
        prompt = tuple((self._number * 7 + i) % 23 for i in range(length))  # no prefix is shared
        loras = tuple(LoraRef(version) for version in adapters.split(",") if version)
        params = SamplingParams(max_tokens=max_tokens, seed=self._number, ignore_eos=True)
        assert self.simulation.submit(Request(name, prompt, params, loras, arrival_seconds=self.simulation.now))
        report = self.simulation.report
        self.started[name] = (report.num_steps, report.num_tokens)
        return name

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            clients = self.simulation.clients
            while self.flood is not None and sum(c.startswith(self.flooder) for c in clients) < self.num_open:
                self.submit(self.flooder.removeprefix("base"), *self.flood)
            open_before = {name: client.num_tokens for name, client in clients.items()}
            self.simulation.step()
            report = self.simulation.report
            running = self.simulation.scheduler.running
            self._last_ran.update({",".join(sequence.versions): report.num_steps for sequence in running})
            for name, num_tokens in open_before.items():
                client = clients.get(name)
                if num_tokens == 0 and (client is None or client.num_tokens) and name not in self.first:
                    steps, tokens = self.started[name]
                    self.first[name] = (report.num_steps - steps, report.num_tokens - tokens)

    def last_ran(self, adapters: str) -> int:
        """The step at which something of these adapters ran last."""
        return self._last_ran.get(adapters, 0)

    def first_token(self, adapters: str, length: int, max_tokens: int = 4) -> tuple[int, int]:
        """Steps, and tokens computed for anybody, until the first token of a request that comes now."""
        name = self.submit(adapters, length, max_tokens)
        while name not in self.first:
            self.step()
        return self.first[name]


def solo(world: World, length: int) -> tuple[int, int]:
    return Race(world, None).first_token("light", length)


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
@pytest.mark.parametrize("world", [WORLD, TIGHT, SHORT], ids=["room", "tight", "short steps"])
@pytest.mark.parametrize("flooder", ["flood", "base"])
def test_a_flood_leaves_the_others_first_token_within_three_times_of_solo(
    world: World, flood: tuple[int, int], flooder: str
) -> None:
    """In steps, for prompts that fit into the prompts' share of a step. The flood itself goes on all the time."""
    race = Race(world, flood, flooder=flooder)
    race.step(60)
    for turn in range(12):
        for light in ("light", "" if flooder != "base" else "other"):
            steps, _ = race.first_token(light, 1 + turn * SHARE // 12)
            assert steps <= 3 * solo(world, 1 + turn * SHARE // 12)[0]
            race.step(turn)
    before = race.simulation.report.counts["ended length"]
    race.step(200)
    assert race.simulation.report.counts["ended length"] > before, "the flood does not get on"


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
@pytest.mark.parametrize("num_open", [40, 6])
def test_long_prompts_in_a_flood_take_three_times_the_computing_of_solo(flood: tuple[int, int], num_open: int) -> None:
    """A long prompt takes more steps while others decode, but smaller ones: what counts is the time that they take,
    which is about their tokens'. It shares the prompts' part with the flood half and half."""
    race = Race(WORLD, flood, num_open=num_open)  # six are too few for newcomers to get steps of their own
    race.step(60)
    for length in (64, 100, 150, 190):
        _, tokens = race.first_token("light", length)
        slack = WORLD.max_num_batched_tokens + 2 * SHARE  # the step that runs, and the rest of the first and the last
        assert tokens <= 3 * solo(WORLD, length)[1] + slack
        race.step(10)


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_a_short_prompt_does_not_wait_for_a_step_of_the_whole_flood(flood: tuple[int, int]) -> None:
    """Its adapter's first request is computed without the others: within three times the tokens of solo, once the step
    has ended that ran when it came."""
    race = Race(WORLD, flood)
    race.step(60)
    for length in (2, 5, SHARE // 2, SHARE):
        _, tokens = race.first_token("light", length, 1)
        assert tokens <= 3 * solo(WORLD, length)[1]
        race.step(3)
    assert race.simulation.scheduler.num_newcomers, "they got no step"


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
@pytest.mark.parametrize("num_open", [40, 9])
def test_a_flood_has_short_steps(flood: tuple[int, int], num_open: int) -> None:
    """Whoever comes waits for the step that runs: it is no longer than the limit, and the flood uses all of it, each of
    its sequences as much as the others. Who else decodes gets a token in every step that is not for newcomers."""
    race = Race(SHORT, flood, num_open=num_open)
    race.submit("other", 5, 150)
    race.step(40)
    clients, scheduler = race.simulation.clients, race.simulation.scheduler
    before = {name: client.num_tokens for name, client in clients.items()}
    tokens, newcomers = race.simulation.report.num_tokens, scheduler.num_newcomers
    race.step(48)
    computed = race.simulation.report.num_tokens - tokens
    assert clients["other-1"].num_tokens - before["other-1"] == 48 - (scheduler.num_newcomers - newcomers)
    assert computed <= 48 * (SHORT.flood_step_tokens + 1)
    assert computed >= 40 * SHORT.flood_step_tokens, "it does not use what it may"
    if flood == FLOODS["long answers"] and num_open == 9:
        got = [client.num_tokens - before[name] for name, client in clients.items() if name != "other-1"]
        assert max(got) - min(got) <= 2
        assert min(got) >= 40


def test_the_flood_decodes_in_every_other_step_at_least() -> None:
    """However many newcomers there are, each with an adapter of its own."""
    race = Race(replace(WORLD, num_slots=16, max_num_seqs=32), FLOODS["long answers"], num_open=12)
    race.step(40)
    before = {name: client.num_tokens for name, client in race.simulation.clients.items()}
    for number in range(20):
        race.submit(f"a{number % 12}", SHARE, 1)
        race.step()
    assert race.simulation.scheduler.num_newcomers >= 8
    for name, num_tokens in before.items():
        client = race.simulation.clients.get(name)
        assert client is None or client.num_tokens - num_tokens >= 10


def test_several_light_adapters_at_once_each_get_their_turn() -> None:
    race = Race(WORLD, FLOODS["long prompts and answers"])
    race.step(50)
    names = [race.submit(adapter, SHARE // 2, 4) for adapter in ("a", "b", "")]
    race.step(4)
    assert [race.first.get(name, (99, 0))[0] <= 3 for name in names] == [True] * 3


def test_two_floods_share_evenly() -> None:
    """Places, whoever came first and with how many."""
    race = Race(WORLD, FLOODS["long answers"])
    race.step(40)
    for _ in range(30):
        race.submit("other", 5, 150)
    race.step(40)
    running = [sequence.versions for sequence in race.simulation.scheduler.running]
    assert sorted((running.count(("flood",)), running.count(("other",)))) == [8, 8]


def test_alone_an_adapter_has_everything() -> None:
    """Nothing is kept free for others that might come, and nobody is put out for its own kind."""
    race = Race(WORLD, FLOODS["long answers"])
    race.step(30)
    assert len(race.simulation.scheduler.running) == WORLD.max_num_seqs
    assert race.simulation.report.counts["preempted"] == 0


def test_an_adapter_that_answers_two_already_is_still_within_three_times_of_solo() -> None:
    """Prompts take turns by adapter, however many of its requests decode."""
    race = Race(WORLD, FLOODS["long prompts"])
    race.step(20)
    for _ in range(2):
        race.first_token("light", 5, 150)
    for length in (3, SHARE, 7):
        assert race.first_token("light", length)[0] <= 3


def test_no_adapter_starves() -> None:
    """Thirteen adapters and mixtures over four slots and six places, all in constant use: whoever waits is let in
    within a bound. At worst it lets others have the slots for so many steps, and then those that run, and the five that
    came before it, finish: each takes as many steps as it writes, and some for its prompt."""
    world = replace(WORLD, max_num_seqs=6, num_blocks=200)
    race = Race(world, None)
    adapters = [f"a{number}" for number in range(10)] + ["a0,a1", "a2,a3,a4", ""]
    longest = 30
    bound = MAX_PASSED_OVER_STEPS + 6 * (longest + 6)
    worst = 0
    for turn in range(3000):
        clients = race.simulation.clients
        adapter = adapters[turn % len(adapters)]
        if sum(name.startswith(f"{adapter or 'base'}-") for name in clients) < 3:
            race.submit(adapter, 1 + turn % 20, 1 + turn % longest)
        race.step()
        now = race.simulation.report.num_steps
        oldest: dict[str, int] = {}  # of each adapter that has nothing running
        for sequence in race.simulation.scheduler.waiting:
            if all(other.versions != sequence.versions for other in race.simulation.scheduler.running):
                started = race.started[sequence.request.request_id][0]
                oldest.setdefault(",".join(sequence.versions), started)
        worst = max([worst, *(now - max(started, race.last_ran(key)) for key, started in oldest.items())])
        assert worst <= bound
    assert worst > MAX_PASSED_OVER_STEPS, "nobody had to wait for anything"
    assert {name.rsplit("-", 1)[0] for name in race.first} == {adapter or "base" for adapter in adapters}
    race.simulation.finish()


# What the tests above are worth: each of these rules, taken away, is missed.


def _no_ranks(self: Turns, running, waiting, last, _original=Turns.in_order):
    """First come, first served, and nobody counts who has how many."""
    turns = sorted(_original(self, running, waiting, last), key=lambda turn: turn[1].arrival_number)
    self.num_open.clear()
    return turns


def _youngest_first(running, _original=Turns.put_out_first):
    return 0, list(running)[-1]


def _wastes(self: StepShare, sequence: Sequence, *, leave_room: bool, _original=StepShare.has_turn) -> bool:
    """What a flood's prompts leave of its part, nobody gets."""
    return leave_room and _original(self, sequence, leave_room=leave_room)


PLANTED: dict[str, tuple[type, str, object, Callable[[], None]]] = {
    "first come, first served": (
        Turns,
        "in_order",
        _no_ranks,
        lambda: test_a_flood_leaves_the_others_first_token_within_three_times_of_solo(
            WORLD, FLOODS["many little ones"], "flood"
        ),
    ),
    "who has a place keeps it": (
        Turns,
        "put_out_first",
        staticmethod(_youngest_first),
        lambda: test_a_flood_leaves_the_others_first_token_within_three_times_of_solo(
            WORLD, FLOODS["long answers"], "flood"
        ),
    ),
    "newcomers share the flood's steps": (
        Turns,
        "newcomers",
        staticmethod(lambda *_: []),
        lambda: test_a_short_prompt_does_not_wait_for_a_step_of_the_whole_flood(FLOODS["long answers"]),
    ),
    "a flood's part goes to waste": (
        StepShare,
        "has_turn",
        _wastes,
        lambda: test_a_flood_has_short_steps(FLOODS["long answers"], 9),
    ),
    "a flood takes all": (
        StepShare,
        "take_decoding",
        lambda *_: None,
        lambda: test_a_flood_has_short_steps(FLOODS["long answers"], 40),
    ),
    "no turns among equals": (
        Turns,
        "serve",
        lambda *_: None,
        lambda: test_long_prompts_in_a_flood_take_three_times_the_computing_of_solo(FLOODS["long prompts"], 6),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_unfairness_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, attribute, bug, check = PLANTED[name]
    monkeypatch.setattr(where, attribute, bug)
    monkeypatch.setattr("support.simulation.simulator.CheckedScheduler._check_order", lambda *_: None)
    with pytest.raises(AssertionError):
        check()
