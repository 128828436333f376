"""Compiles grammars and keeps them. Each is compiled first in a process that can be replaced, so that no grammar can
stop the server.

There a grammar's time and memory are limited (`GrammarLimits`). One that passes is compiled again in this process, with
the interpreter's lock released. One that fails is remembered, so that repeating it costs nothing. All methods except
`ready` block: they are for worker threads. Called by `serving` in the API.
"""

import contextlib
import hashlib
import json
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

from guanaco.models.formats.restricted_process import ProcessEnded, ProcessTimeout, RestrictedProcess
from guanaco.server.grammars.building import build
from guanaco.server.grammars.errors import GrammarError, GrammarUnavailable
from guanaco.server.grammars.matcher import GrammarMatcher
from guanaco.server.grammars.spec import Grammar
from guanaco.server.grammars.vocabulary import Vocabulary

logger = logging.getLogger("guanaco.grammars")

_WORKER = "guanaco.server.grammars.worker"
_MAX_ANSWER_BYTES = 1 << 24
_MAX_REFUSED = 256  # grammars that failed and are remembered
_RENEWED_AFTER = 256  # matchers of one compiled grammar
_KILLED = "the process that compiles grammars was killed; try again, the log has the reason"
_MISSING = "this server has no structured output: the package llguidance is not installed on it"


class _TooSlow(GrammarError):
    """Compiling took too long, perhaps only because the machine was busy."""


@dataclass(frozen=True)
class GrammarLimits:
    """The limits of compiling, and of the kept grammars."""

    seconds: float = 2.0  # of one grammar
    grammar_bytes: int = 256 << 10  # of one grammar's text
    memory_bytes: int = 1 << 30  # address space of the process, with its interpreter and the vocabulary
    start_seconds: float = 60.0  # for the start of the process; that is our own code, so only a busy machine is slow
    kept: int = 128  # how many compiled grammars are kept
    kept_bytes: int = 2 << 20  # … and the size of all their texts
    slow_seconds: float = 60.0  # how long a grammar that took too long is refused at once, before it is tried again


class CompiledGrammar:
    """A compiled grammar. Each choice of an answer gets a matcher of its own.

    All matchers share one automaton, which grows with each new state up to a limit. The compiler renews it when the
    limit is reached, and after _RENEWED_AFTER matchers.
    """

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary, lark: str) -> None:
        """Raises GrammarError."""
        self.grammar = grammar
        self.vocabulary = vocabulary
        self._lark = lark
        self._prototype = build(lark, vocabulary, grammar.kind)  # an LLMatcher in its first state
        self._num_matchers = 0
        self._has_reached_limit = False

    @property
    def is_worn(self) -> bool:
        return self._has_reached_limit or self._num_matchers >= _RENEWED_AFTER

    def renewed(self) -> "CompiledGrammar":
        """The same grammar, compiled again with a new automaton."""
        return CompiledGrammar(self.grammar, self.vocabulary, self._lark)

    def matcher(self, ends: Collection[int]) -> GrammarMatcher:
        """A matcher for one sequence. ends: the token ids that may end its answer when the grammar is complete."""
        self._num_matchers += 1
        return GrammarMatcher(self._prototype, self.vocabulary, ends, self._reach_limit, kind=self.grammar.kind)

    def _reach_limit(self) -> None:
        self._has_reached_limit = True


class GrammarCompiler:
    """The grammars of one model. Safe to use from several threads. Starts no process before the first grammar."""

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        limits: GrammarLimits | None = None,
        observe: Callable[[float, bool], None] = lambda _seconds, _hit: None,
    ) -> None:
        """vocabulary: makes the model's vocabulary; called once. observe: called for each grammar that a request needs,
        with (seconds of compiling, whether it was kept from before)."""
        self.limits = limits or GrammarLimits()
        self._make_vocabulary = vocabulary
        self._observe = observe
        self._vocabulary: Vocabulary | None = None
        self._kept: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._refused: OrderedDict[bytes, tuple[str, float]] = OrderedDict()  # digest → (why, until when)
        self._process: RestrictedProcess | None = None
        self._turn = threading.Lock()  # one grammar is compiled at a time
        self._books = threading.Lock()  # guards _kept and _refused
        self._closed = False

    def warm_up(self) -> None:
        """Give llguidance the vocabulary. That holds the interpreter's lock for tenths of a second, so it is done at
        the start, when it delays no tokens. A missing library is only reported for the first grammar."""
        with self._turn, contextlib.suppress(GrammarUnavailable):
            _ = self._its_vocabulary().tokenizer

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """The grammar, ready for matchers. Raises GrammarError or GrammarUnavailable."""
        started = time.monotonic()
        if len(grammar.text.encode()) > self.limits.grammar_bytes:
            text = f"it is larger than {self.limits.grammar_bytes} bytes (--max-grammar-bytes): use a smaller one"
            raise GrammarError(text, grammar.param)
        found = self._look_up(grammar)
        if found is None:
            with self._turn:
                found = self._look_up(grammar) or self._compile(grammar)
            self._observe(time.monotonic() - started, False)
        else:
            self._observe(0.0, True)
        return found

    def ready(self, grammar: Grammar) -> CompiledGrammar | None:
        """The compiled grammar if it is kept, otherwise None. For the event loop: a request whose grammar is kept need
        not wait while others are compiled."""
        with self._books:
            found = self._kept.get(grammar)
            if found is None or found.is_worn:
                return None
            self._kept.move_to_end(grammar)
        self._observe(0.0, True)
        return found

    def close(self) -> None:
        """End the process. A grammar that it is compiling ends with an error."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()

    @property
    def pid(self) -> int | None:
        """The id of the compiling process; None if none runs."""
        process = self._process
        return None if process is None else process.pid

    def _look_up(self, grammar: Grammar) -> CompiledGrammar | None:
        digest = _digest(grammar)
        with self._books:
            problem, until = self._refused.get(digest, ("", 0.0))
            if time.monotonic() < until:
                raise GrammarError(problem, grammar.param)
            found = self._kept.get(grammar)
            if found is None or found.is_worn:
                return None
            self._kept.move_to_end(grammar)
            return found

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        with self._books:
            worn = self._kept.pop(grammar, None)
        try:
            if worn is not None:
                compiled = worn.renewed()
            else:
                vocabulary = self._its_vocabulary()
                compiled = CompiledGrammar(grammar, vocabulary, self._checked(grammar, vocabulary))
        except GrammarError as error:
            seconds = self.limits.slow_seconds if isinstance(error, _TooSlow) else math.inf
            digest = _digest(grammar)
            with self._books:
                self._refused[digest] = str(error), time.monotonic() + seconds
                while len(self._refused) > _MAX_REFUSED:
                    self._refused.popitem(last=False)
            raise GrammarError(str(error), grammar.param) from None
        with self._books:
            self._kept[grammar] = compiled
            while len(self._kept) > self.limits.kept or self._kept_bytes() > self.limits.kept_bytes:
                self._kept.popitem(last=False)
        return compiled

    def _kept_bytes(self) -> int:
        return sum(len(grammar.text) for grammar in self._kept)

    def _its_vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            try:
                import llguidance  # noqa: F401
            except ImportError:
                raise GrammarUnavailable(_MISSING, is_here=False) from None
            self._vocabulary = self._make_vocabulary()
        return self._vocabulary

    def _checked(self, grammar: Grammar, vocabulary: Vocabulary) -> str:
        """The grammar in Lark, once the process has compiled it. Raises GrammarError or GrammarUnavailable."""
        message = json.dumps({"kind": grammar.kind, "text": grammar.text}).encode()
        seconds = self.limits.seconds
        for is_last in (False, True):
            process = self._running(vocabulary)
            try:
                answer = json.loads(process.exchange(message, seconds=seconds, max_bytes=_MAX_ANSWER_BYTES))
                break
            except ProcessTimeout:
                self._process = None
                logger.warning("a grammar (%s) was stopped after %g s", grammar.kind, seconds)
                raise _TooSlow(f"compiling it took more than {seconds:g} s: simplify it") from None
            except ProcessEnded as error:
                self._process = None
                logger.warning("the process that compiled a grammar (%s) ended (%s)", grammar.kind, error)
                if not error.was_killed:
                    raise GrammarError("it is too large or too deeply nested for this server: simplify it") from None
                if is_last:  # the process was killed from outside, which is not the grammar's fault
                    raise GrammarUnavailable(_KILLED, is_here=True) from None
        if (problem := answer.get("problem")) is not None:
            raise GrammarError(problem)
        return str(answer["lark"])

    def _running(self, vocabulary: Vocabulary) -> RestrictedProcess:
        if self._process is not None and not self._process.has_ended:
            return self._process
        if self._process is not None:
            self._process.close()
        if self._closed:
            raise GrammarUnavailable("the server is shutting down", is_here=True)
        limits = self.limits
        try:
            process = RestrictedProcess(_WORKER, (str(limits.memory_bytes), str(math.ceil(limits.seconds))))
            process.exchange(vocabulary.packed(), seconds=limits.start_seconds, max_bytes=_MAX_ANSWER_BYTES)
        except (OSError, ProcessEnded, ProcessTimeout) as error:
            self._process = None
            logger.error("no process to compile grammars could be started (%s): check memory and processes", error)
            text = "the server could not start the process that compiles grammars; its log has the reason"
            raise GrammarUnavailable(text, is_here=True) from None
        self._process = process
        return process


def _digest(grammar: Grammar) -> bytes:
    """The key under which a refused grammar is remembered: its own text may be large."""
    return hashlib.sha256(f"{grammar.kind}\0{grammar.text}".encode()).digest()
