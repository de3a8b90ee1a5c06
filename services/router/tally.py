"""Counting one request's tokens over all its attempts, as its workers report them (U1-U3, M4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from services.router.finish import Finish, PrefillSite
from tidemill.api.common.v1.logprobs_pb2 import TokenLogprobs
from tidemill.billing import BusyPart, Reuse, Unbilled, Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefilled:
    """A prompt's KV is there and each choice's first token drawn.

    Counts and seconds of compute are the prefilling worker's. `logprobs` are the first tokens',
    `prompt_logprobs` those of the prompt from its second token on; both are empty unless asked for.
    """

    token_ids: tuple[int, ...]
    prompt_tokens: int
    computed_tokens: int
    reused: Reuse
    site: PrefillSite
    prefill_us: int
    busy_seconds: float = 0.0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Generated(NamedTuple):
    """One choice's tokens after the first; `logprobs` is empty unless asked for."""

    choice: int
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceEnded:
    """One of several choices has ended; `generated_tokens` includes its first token."""

    choice: int
    finish: Finish
    generated_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """An attempt's last word; `generated_tokens` are all choices', the first tokens included.

    Seconds are of the decoding and of the prefilling worker's compute, `prefill_worker_id` names
    the latter.
    """

    finish: Finish
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    busy_seconds: float
    prefill_busy_seconds: float = 0.0
    prefill_worker_id: str = ""


class Told(NamedTuple):
    """What has been generated so far: plain numbers, since every chunk carries its own."""

    completion_tokens: int
    reasoning_tokens: int
    generated_tokens: int
    unbilled: Unbilled
    drafted_tokens: int
    accepted_tokens: int


_NOTHING_UNBILLED = Unbilled()


@dataclass(slots=True)
class Counts:
    """One choice's tokens over all its attempts.

    `received` by the router, `unseen` beyond those by its last attempt's own account, `kept` where
    a stop string ended it (None: nothing was cut off), `reasoning` among those that are billed.
    """

    max_tokens: int
    received: int = 0
    unseen: int = 0
    kept: int | None = None
    reasoning: int = 0

    @property
    def billed(self) -> int:
        """Those that the client pays for, if the choice ended here."""
        generated = self.received + self.unseen
        if self.kept is not None and self.kept < generated:
            generated = self.kept
        return generated if generated < self.max_tokens else self.max_tokens


class Run:
    """What one attempt generates of `choices`; each choice is one run's at a time."""

    def __init__(self, choices: Sequence[Counts], worker_id: str) -> None:
        self.choices = choices
        self.worker_id = worker_id
        self.relayed = [choice.received for choice in choices]
        self._relayed = sum(self.relayed)
        self.ended: Ended | None = None
        self.prefill_worker_id = ""
        self.prefill_busy_seconds = 0.0
        self._generated: int | None = None

    @property
    def generated(self) -> int:
        """Tokens that it is known to have generated."""
        if self._generated is not None:
            return self._generated
        counted = -self._relayed
        for choice in self.choices:
            counted += choice.received + choice.unseen
        if self.ended is None:
            return counted
        return max(counted, self.ended.generated_tokens)

    def report(self, choice: int, generated: int) -> None:
        """By its own account it generated so many of one choice."""
        counts = self.choices[choice]
        counts.unseen = max(generated - (counts.received - self.relayed[choice]), 0)

    def close(self) -> int:
        """Another run has its choices from now on; returns how many of its tokens nobody got."""
        self._generated = self.generated
        for choice in self.choices:
            choice.unseen = 0
        return self._generated - self._received

    def end(self, ended: Ended) -> None:
        """Its Final has come."""
        self.ended = ended
        if ended.prefill_worker_id:
            self.prefill_worker_id = ended.prefill_worker_id
            self.prefill_busy_seconds = ended.prefill_busy_seconds

    def learn(self, generated: int) -> int:
        """It generated so many, as is known after it was closed; returns how many are news."""
        known = self.generated
        self._generated = max(known, generated)
        return self._generated - known

    @property
    def is_closed(self) -> bool:
        """Whether another run may have its choices."""
        return self._generated is not None

    @property
    def _received(self) -> int:
        return sum(choice.received for choice in self.choices) - self._relayed


@dataclass
class Tally:
    """What has been reported so far, over all attempts.

    `prefilled` is the split that counts: the first that was read (U2), by this router or by the
    one that it took the request over from.
    """

    choices: Sequence[Counts]
    prefilled: Prefilled | None = None
    _runs: list[Run] = field(default_factory=list, init=False)
    _redone: int = field(default=0, init=False)
    _lost: int = field(default=0, init=False)
    _failed: bool = field(default=False, init=False)

    @property
    def site(self) -> PrefillSite:
        """Who prefilled, as far as is known."""
        return self.prefilled.site if self.prefilled else PrefillSite()

    @property
    def received(self) -> int:
        """Tokens of all choices that the router has read."""
        received = 0
        for choice in self.choices:
            received += choice.received
        return received

    def busy(self, accelerators: Mapping[str, int]) -> list[BusyPart]:
        """Compute of every attempt, prompt and output apart; a worker not named has one."""
        parts = []
        for run in self._runs:
            if run.prefill_worker_id:
                parts.append((run.prefill_worker_id, "prefill", run.prefill_busy_seconds))
            if run.ended is not None:
                parts.append((run.worker_id, "decode", run.ended.busy_seconds))
        return [
            BusyPart(worker_id, phase, _microseconds(seconds), accelerators.get(worker_id, 1))
            for worker_id, phase, seconds in parts
        ]

    @property
    def busy_seconds(self) -> float:
        """Decode compute of all attempts."""
        return sum(run.ended.busy_seconds for run in self._runs if run.ended)

    def begin(self, choices: Sequence[Counts], *, worker_id: str) -> Run:
        """An attempt at that decode worker takes these choices up where they are."""
        run = Run(choices, worker_id)
        self._runs.append(run)
        return run

    def prefill(self, run: Run, prefilled: Prefilled) -> None:
        """Take in an attempt's PrefillDone."""
        run.prefill_worker_id = prefilled.site.worker_id
        run.prefill_busy_seconds = prefilled.busy_seconds
        if self.prefilled is None:
            self.prefilled = prefilled

    def end(self, run: Run, ended: Ended) -> None:
        """Take in an attempt's Final; what it counts beyond the tokens received is a choice's."""
        run.end(ended)
        if len(run.choices) == 1:
            run.report(0, ended.generated_tokens)

    def lose(self, run: Run) -> None:
        """The attempt is over before its choices are: what was received stands, the rest does not.

        That is generated again where its Final told of it, and lost where none came.
        """
        unreceived = run.close()
        if run.ended is None:
            self._lost += unreceived
        else:
            self._redone += unreceived

    def recover(self, run: Run, ended: Ended) -> None:
        """The Final of an attempt whose call broke: once it was lost, its news are redone."""
        if not run.is_closed:
            self.end(run, ended)
            return
        run.end(ended)
        self._redone += run.learn(ended.generated_tokens)

    def discard(self, run: Run) -> None:
        """The attempt was refused: it never began."""
        self._runs.remove(run)

    def fail(self) -> None:
        """The request failed by our fault: nobody pays for its prompt or its tokens."""
        self._failed = True

    def usage(self) -> Usage:
        """The usage if the request ended here; without a first token nothing is billed.

        Tokens that only the whole attempt's count knows belong to no choice and are overrun.
        """
        prompt = None if self._failed else self.prefilled
        told = self.told()
        return Usage(
            prompt_tokens=prompt.prompt_tokens if prompt else 0,
            computed_tokens=prompt.computed_tokens if prompt else 0,
            reused=prompt.reused if prompt else Reuse(),
            **told._asdict(),
        )

    def told(self) -> Told:
        """The part of `usage` that grows with every token."""
        billed = reasoning = generated = drafted = accepted = 0
        if self.prefilled is not None and not self._failed:
            for choice in self.choices:
                its = choice.billed
                billed += its
                reasoning += choice.reasoning if choice.reasoning < its else its
        for run in self._runs:
            generated += run.generated
            if run.ended is not None:
                drafted += run.ended.drafted_tokens
                accepted += run.ended.accepted_tokens
        unbilled = _NOTHING_UNBILLED
        if generated != billed or self._redone or self._lost:
            unbilled = self._unbilled(generated, billed)
        return Told(billed, reasoning, generated, unbilled, drafted, accepted)

    def _unbilled(self, generated: int, billed: int) -> Unbilled:
        if self._failed:
            counted = sum(run.generated for run in self._runs if run.ended)
            return Unbilled(lost=generated - counted, server_fault=counted)
        return Unbilled(
            overrun=generated - billed - self._redone - self._lost,
            failover_redo=self._redone,
            lost=self._lost,
        )


def _microseconds(seconds: float) -> int:
    """Whole ones, rounded down from whole nanoseconds, as workers round theirs."""
    return round(seconds * 1e9) // 1000
