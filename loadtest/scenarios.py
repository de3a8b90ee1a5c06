"""What customers ask, and when: the kinds of load that `--scenario` names.

chat          conversations under one system message; half the requests go on with an earlier one
long_prompt   a document of half to nine tenths of the context each, and a short answer
shared_prefix eight long system messages of Zipf popularity under short questions
burst         chat, arriving in groups of eight on average
diurnal       chat, at a rate that follows a day pressed into the run
replay        a trace's arrivals, lengths and shared blocks, or a look-alike's

All arrive open loop: a slow service is sent no less. Conversations go on with what was answered,
so their text depends on the answers; everything else follows from the seed.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Protocol

from loadtest import arrivals
from loadtest.arrivals import Arrivals
from loadtest.prompts import Vocabulary
from loadtest.traces import TRACE_BLOCK_TOKENS, Lengths, Row, look_alike, look_alike_trace
from tidemill.client import Message, Model

_GO_ON = 0.5
_KEPT_CONVERSATIONS = 64
_NUM_PREFIXES = 8


@dataclass(frozen=True, slots=True)
class Question:
    """One request."""

    messages: Sequence[Message]
    max_tokens: int


class Asker(Protocol):
    """Writes a run's questions, one after the other."""

    def ask(self, rng: Random) -> Question:
        """The next one."""

    def answered(self, question: Question, text: str) -> None:
        """A question's whole answer has come."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a run's questions are written under. `scale` multiplies all lengths of a trace."""

    model: Model
    vocabulary: Vocabulary
    scale: float
    shared_tokens: int
    trace: Sequence[Row]
    rng: Random

    def fitting(self, lengths: Lengths) -> Lengths:
        """Scaled, and within the context with room for the template and a wrong guess of words."""
        scaled = lengths.scaled(self.scale)
        context = self.model.context_tokens
        output = min(scaled.num_output_tokens, self.model.max_output_tokens, context // 4)
        return Lengths(min(scaled.num_prompt_tokens, (context - output) * 3 // 4), output)


@dataclass(frozen=True, slots=True)
class Scenario:
    """`rate` is requests a second where none is given: what a laptop with the demo model bears."""

    asker: type["Chat"] | type["LongPrompts"] | type["SharedPrefixes"] | type["Replay"]
    arrivals: Arrivals
    rate: float


class Chat:
    """Conversations that all begin with one system message, of the Azure trace's lengths."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        text = terms.vocabulary.text(terms.shared_tokens, terms.rng)
        self._system = Message("system", text)
        self._open: deque[Sequence[Message]] = deque(maxlen=_KEPT_CONVERSATIONS)

    def ask(self, rng: Random) -> Question:
        """Go on with a conversation that had its answer, or begin one."""
        terms = self._terms
        drawn = rng.choice(terms.trace).lengths if terms.trace else look_alike(rng)
        lengths = terms.fitting(drawn)
        before: Sequence[Message] = (self._system,)
        if self._open and rng.random() < _GO_ON:
            before = self._open.popleft()
        num_tokens = min(lengths.num_prompt_tokens, terms.model.context_tokens // 4)
        text = terms.vocabulary.text(num_tokens, rng)
        return Question((*before, Message("user", text)), lengths.num_output_tokens)

    def answered(self, question: Question, text: str) -> None:
        """Keep the conversation while another turn fits half the context."""
        messages = (*question.messages, Message("assistant", text or "..."))
        if self._terms.vocabulary.num_tokens(messages) < self._terms.model.context_tokens / 2:
            self._open.append(messages)


class LongPrompts:
    """Documents that nobody asked about before."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms

    def ask(self, rng: Random) -> Question:
        """Half to nine tenths of the context in, at most 32 tokens out."""
        context = self._terms.model.context_tokens
        text = self._terms.vocabulary.text(rng.uniform(0.5, 0.9) * context, rng)
        return Question((Message("user", text),), min(32, context // 32))

    def answered(self, question: Question, text: str) -> None:
        """Nothing follows."""


class SharedPrefixes:
    """A few long system messages, the first asked under most."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        num_tokens = terms.model.context_tokens / 4
        texts = [terms.vocabulary.text(num_tokens, terms.rng) for _ in range(_NUM_PREFIXES)]
        self._prefixes = [Message("system", text) for text in texts]
        self._weights = [1 / rank for rank in range(1, _NUM_PREFIXES + 1)]

    def ask(self, rng: Random) -> Question:
        """A question of some thirty tokens."""
        (prefix,) = rng.choices(self._prefixes, self._weights)
        text = self._terms.vocabulary.text(rng.uniform(10, 50), rng)
        return Question((prefix, Message("user", text)), 32)

    def answered(self, question: Question, text: str) -> None:
        """Nothing follows."""


class Replay:
    """A trace's requests in order; equal blocks become equal text."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._seed = terms.rng.random()
        self._next = 0

    def ask(self, rng: Random) -> Question:
        """The next row. Its last block is text of its own, as much as the length leaves."""
        row = self._terms.trace[self._next % len(self._terms.trace)]
        self._next += 1
        lengths = self._terms.fitting(row.lengths)
        block_tokens = TRACE_BLOCK_TOKENS * self._terms.scale
        num_blocks = int(lengths.num_prompt_tokens / block_tokens)
        known = [self._block(each, block_tokens) for each in row.blocks[:num_blocks]]
        rest = max(lengths.num_prompt_tokens - len(known) * block_tokens, 1)
        text = " ".join([*known, self._terms.vocabulary.text(rest, rng)])
        return Question((Message("user", text),), lengths.num_output_tokens)

    def answered(self, question: Question, text: str) -> None:
        """Nothing follows."""

    def _block(self, block: int, num_tokens: float) -> str:
        return self._terms.vocabulary.text(num_tokens, Random(f"{self._seed}/{block}"))


SCENARIOS = {
    "chat": Scenario(Chat, arrivals.poisson, 2.0),
    "long_prompt": Scenario(LongPrompts, arrivals.poisson, 0.2),
    "shared_prefix": Scenario(SharedPrefixes, arrivals.poisson, 2.0),
    "burst": Scenario(Chat, arrivals.bursts, 2.0),
    "diurnal": Scenario(Chat, arrivals.diurnal, 2.0),
    "replay": Scenario(Replay, arrivals.poisson, 1.0),
}


def instants(
    scenario: Scenario, trace: Sequence[Row], rate: float, run_s: float, rng: Random
) -> Iterator[float]:
    """When the run's requests are due: in seconds from its start, none after `run_s`."""
    come: Arrivals = scenario.arrivals
    if scenario.asker is Replay:
        come = partial(_replayed, [row.at_s for row in trace])
    for at_s in come(rate, run_s, rng):
        if at_s >= run_s:
            return
        yield at_s


def trace_of(scenario: Scenario, given: Sequence[Row], rng: Random) -> Sequence[Row]:
    """The trace given; a replay without one has the look-alike."""
    return look_alike_trace(rng) if scenario.asker is Replay and not given else given


def _replayed(
    instants_s: Sequence[float], rate: float, run_s: float, rng: Random
) -> Iterator[float]:
    del run_s, rng
    return arrivals.replay(instants_s, rate)
