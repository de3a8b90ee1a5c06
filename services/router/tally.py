"""Counting one request's tokens over all its attempts, as its workers report them (U1-U3, M4)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.router.finish import Finish, PrefillSite
from tidemill.api.common.v1.logprobs_pb2 import TokenLogprobs
from tidemill.billing import Reuse, Unbilled, Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefilled:
    """A prompt's KV is there and each choice's first token drawn.

    Counts are the prefilling worker's. `logprobs` are the first tokens', `prompt_logprobs` those
    of the prompt from its second token on; both are empty unless asked for.
    """

    token_ids: tuple[int, ...]
    prompt_tokens: int
    computed_tokens: int
    reused: Reuse
    site: PrefillSite
    prefill_us: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """One choice's tokens after the first; `logprobs` is empty unless asked for."""

    choice: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceEnded:
    """One of several choices has ended; `generated_tokens` includes its first token."""

    choice: int
    finish: Finish
    generated_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """An attempt's last word; `generated_tokens` are all choices', the first tokens included."""

    finish: Finish
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    busy_seconds: float


@dataclass(slots=True)
class Counts:
    """One choice's tokens in the attempt that runs.

    `received` by the router, `reported` by the worker when the choice ended, `kept` where a stop
    string ended it (None: nothing was cut off), `reasoning` among those that are billed.
    """

    max_tokens: int
    received: int = 0
    reported: int = 0
    kept: int | None = None
    reasoning: int = 0

    @property
    def generated(self) -> int:
        """Tokens known to have been generated."""
        return max(self.received, self.reported)

    @property
    def billed(self) -> int:
        """Those that the client pays for, if the choice ended here."""
        generated = self.generated
        return min(generated if self.kept is None else self.kept, generated, self.max_tokens)

    def reset(self) -> None:
        """The attempt has come to nothing."""
        self.received = self.reported = self.reasoning = 0
        self.kept = None


@dataclass
class Tally:
    """What has been reported so far. `choices` count those of the attempt that runs."""

    choices: Sequence[Counts]
    prefilled: Prefilled | None = None
    ended: Ended | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    busy_seconds: float = 0.0
    _lost: int = field(default=0, init=False)
    _server_fault: int = field(default=0, init=False)

    @property
    def site(self) -> PrefillSite:
        """Who prefilled, as far as is known."""
        return self.prefilled.site if self.prefilled else PrefillSite()

    def end(self, ended: Ended) -> None:
        """Take in an attempt's Final; what it counts beyond the tokens received is a choice's."""
        self.ended = ended
        self.drafted_tokens += ended.drafted_tokens
        self.accepted_tokens += ended.accepted_tokens
        self.busy_seconds += ended.busy_seconds
        if len(self.choices) == 1:
            self.choices[0].reported = ended.generated_tokens

    def write_off(self) -> None:
        """The attempt failed by our fault: nobody pays for its prompt or its tokens."""
        if self.ended is None:
            self._lost += sum(choice.received for choice in self.choices)
        else:
            self._server_fault += self._generated
        self.prefilled = None
        self.ended = None
        for choice in self.choices:
            choice.reset()

    def usage(self) -> Usage:
        """The usage if the request ended here; without a first token nothing is billed.

        Tokens that only the whole attempt's count knows belong to no choice and are overrun.
        """
        generated = self._generated
        prompt = self.prefilled
        billed = reasoning = 0
        if prompt is not None:
            for choice in self.choices:
                billed += choice.billed
                reasoning += min(choice.reasoning, choice.billed)
        unbilled = Unbilled(
            overrun=generated - billed, lost=self._lost, server_fault=self._server_fault
        )
        return Usage(
            prompt_tokens=prompt.prompt_tokens if prompt else 0,
            computed_tokens=prompt.computed_tokens if prompt else 0,
            reused=prompt.reused if prompt else Reuse(),
            completion_tokens=billed,
            reasoning_tokens=reasoning,
            generated_tokens=generated + unbilled.lost + unbilled.server_fault,
            unbilled=unbilled,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
        )

    @property
    def _generated(self) -> int:
        reported = self.ended.generated_tokens if self.ended else 0
        return max(sum(choice.generated for choice in self.choices), reported)
