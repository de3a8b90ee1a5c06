"""Counting one request's tokens over all its attempts, as its workers report them (U1-U3, M4)."""

from dataclasses import dataclass

from services.router.finish import Finish, PrefillSite
from tidemill.billing import Reuse, Unbilled, Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefilled:
    """A prompt's KV is there and the first token drawn; counts are the prefilling worker's."""

    token_id: int
    prompt_tokens: int
    computed_tokens: int
    reused: Reuse
    site: PrefillSite
    prefill_us: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """Tokens after the first; `first_index` counts within the attempt."""

    first_index: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """An attempt's last word; `generated_tokens` includes the first token."""

    finish: Finish
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    busy_seconds: float


@dataclass
class Tally:
    """What has been reported so far. `received_tokens` counts those of the attempt that runs."""

    prefilled: Prefilled | None = None
    received_tokens: int = 0
    ended: Ended | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    busy_seconds: float = 0.0
    _lost: int = 0
    _server_fault: int = 0

    @property
    def site(self) -> PrefillSite:
        """Who prefilled, as far as is known."""
        return self.prefilled.site if self.prefilled else PrefillSite()

    def end(self, ended: Ended) -> None:
        """Take in an attempt's Final."""
        self.ended = ended
        self.drafted_tokens += ended.drafted_tokens
        self.accepted_tokens += ended.accepted_tokens
        self.busy_seconds += ended.busy_seconds

    def write_off(self) -> None:
        """The attempt failed by our fault: nobody pays for its prompt or its tokens."""
        if self.ended is None:
            self._lost += self.received_tokens
        else:
            self._server_fault += self._generated
        self.prefilled = None
        self.received_tokens = 0
        self.ended = None

    def usage(self, *, kept_tokens: int | None, reasoning_tokens: int, max_tokens: int) -> Usage:
        """The usage if the request ended here.

        `kept_tokens` is where a stop string ended the completion; None: nothing was cut off, and
        all that was generated is billed, up to `max_tokens`. Without a first token nothing is.
        """
        generated = self._generated
        billed = 0
        if self.prefilled is not None:
            billed = min(generated if kept_tokens is None else kept_tokens, generated, max_tokens)
        unbilled = Unbilled(
            overrun=generated - billed, lost=self._lost, server_fault=self._server_fault
        )
        prompt = self.prefilled
        return Usage(
            prompt_tokens=prompt.prompt_tokens if prompt else 0,
            computed_tokens=prompt.computed_tokens if prompt else 0,
            reused=prompt.reused if prompt else Reuse(),
            completion_tokens=billed,
            reasoning_tokens=min(reasoning_tokens, billed),
            generated_tokens=generated + unbilled.lost + unbilled.server_fault,
            unbilled=unbilled,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
        )

    @property
    def _generated(self) -> int:
        reported = self.ended.generated_tokens if self.ended else 0
        return max(self.received_tokens, reported)
