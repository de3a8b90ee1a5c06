"""The completions of one attempt in the engine: their funds, stops and ends."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tidemill.api.common.v1.lifecycle_pb2 import FinishReason
from tidemill.engine import FinishedOutput, Output, PausedOutput, PrefilledOutput, Sequence
from tidemill.engine import FinishReason as EngineReason
from tidemill.errors import FailedPrecondition, Internal, TidemillError
from tidemill.worker.engine_thread import EngineThread
from tidemill.worker.outbox import Outbox

Reason: TypeAlias = FinishReason.ValueType

_PREFIX = "FINISH_REASON_"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ending:
    """How an attempt ends: why its last choice did."""

    reason: Reason
    error: TidemillError | None = None


class Choices:
    """Runs the completions of one attempt, which share its prompt, and tells its outbox of them.

    Funds are of all choices together: each may use an equal share of what those that have ended
    leave. Once none of them has any left for `fund_wait_s`, all end. `on_ended` gets each sequence
    after its last output. `ending` comes when all have ended; an Internal is its exception if the
    engine has failed.
    """

    def __init__(
        self,
        num_choices: int,
        outbox: Outbox,
        thread: EngineThread,
        *,
        funded_tokens: int | None,
        fund_wait_s: float,
        on_prefilled: Callable[[PrefilledOutput], None],
        on_ended: Callable[[Sequence], None],
    ) -> None:
        self.num_choices = num_choices
        self.ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._outbox = outbox
        self._thread = thread
        self._funded = funded_tokens
        self._fund_wait_s = fund_wait_s
        self._on_prefilled = on_prefilled
        self._on_ended = on_ended
        self._seqs: list[Sequence] = []
        self._stops: dict[int, tuple[Reason, int | None]] = {}
        self._ended: dict[int, Reason] = {}
        self._failure: TidemillError | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def submitted(self) -> bool:
        """Whether they are the engine's."""
        return bool(self._seqs)

    @property
    def prefill_ns(self) -> int:
        """Compute that the prompt has used here; all of it once it is prefilled."""
        return sum(seq.prefill_ns for seq in self._seqs)

    @property
    def decode_ns(self) -> int:
        """Compute that tokens after the first have used; all of it once all have ended."""
        return sum(seq.decode_ns for seq in self._seqs)

    def submit(self, seq: Sequence) -> None:
        """Hand a sequence and its forks to the engine, funded and stopped as told until now."""
        self._seqs = [seq, *seq.forks]
        if self._funded is not None:
            for each, share in zip(self._seqs, self._shares(self._funded), strict=True):
                each.num_funded_tokens = share
        try:
            self._thread.submit(seq, self._on_output)
        except TidemillError:
            self._seqs = []
            raise
        for index, (reason, keep_tokens) in self._stops.items():
            self._thread.stop(self._seqs[index].seq_id, name_of(reason), keep_tokens)

    def fund(self, total_tokens: int) -> None:
        """All choices together may come to so many tokens; never fewer than before."""
        if self._funded is None or total_tokens <= self._funded:
            return
        self._funded = total_tokens
        self._share_funds()

    def stop(self, index: int, reason: Reason, keep_tokens: int | None = None) -> None:
        """End one choice; the first reason given stands."""
        if index in self._stops or index in self._ended:
            return
        self._stops[index] = reason, keep_tokens
        if self._seqs:
            self._thread.stop(self._seqs[index].seq_id, name_of(reason), keep_tokens)

    def stop_all(self, reason: Reason, keep_tokens: int | None = None) -> None:
        """End every choice that goes on; `keep_tokens` is said of the only one."""
        for index in range(self.num_choices):
            self.stop(index, reason, keep_tokens if self.num_choices == 1 else None)

    @property
    def all_stopped(self) -> bool:
        """Whether each was told to end."""
        return len(self._stops) == self.num_choices

    def close(self, reason: Reason) -> None:
        """Nothing more comes: say of those that the engine has not ended that they have."""
        self._cancel_timer()
        for index in range(self.num_choices):
            if index not in self._ended:
                self._tell_end(index, self._stops.get(index, (reason, None))[0])

    def _on_output(self, output: Output | Internal) -> None:
        """What the engine computed; a surprise here ends the attempt, not the other sequences."""
        try:
            self._relay(output)
        except Exception as error:
            logger.exception("attempt failed", extra={"sequence": self._seqs[0].seq_id})
            failure = Internal(f"the attempt failed: {type(error).__name__}")
            if isinstance(output, FinishedOutput) and not self.ending.done():
                self.ending.set_exception(failure)
            self._fail(failure)

    def _relay(self, output: Output | Internal) -> None:
        if isinstance(output, Internal):
            if not self.ending.done():
                self.ending.set_exception(output)
        elif isinstance(output, PrefilledOutput):
            self._on_prefilled(output)
        elif isinstance(output, PausedOutput):
            self._watch_funds()
        else:
            index = next(i for i, seq in enumerate(self._seqs) if seq.seq_id == output.seq_id)
            if isinstance(output, FinishedOutput):
                self._end(index, output)
            else:
                self._outbox.tokens(
                    output.first_index, output.token_ids, output.logprobs, choice=index
                )

    def _end(self, index: int, output: FinishedOutput) -> None:
        self._on_ended(self._seqs[index])
        if output.reason == EngineReason.DEAD_END.value:
            self._fail(dead_end())
            reason = FinishReason.FINISH_REASON_SERVER_FAULT
        else:
            reason = FinishReason.Value(_PREFIX + output.reason.upper())
        self._tell_end(index, reason)
        if len(self._ended) == len(self._seqs):
            self._cancel_timer()
            if not self.ending.done():
                self.ending.set_result(Ending(reason, self._failure))
        elif self._funded is not None:
            self._share_funds()

    def _tell_end(self, index: int, reason: Reason) -> None:
        self._ended[index] = reason
        if self.num_choices > 1 and self._outbox.num_generated:
            self._outbox.choice_ended(index, reason)

    def _fail(self, error: TidemillError) -> None:
        """End all choices because of one."""
        self._failure = self._failure or error
        self.stop_all(FinishReason.FINISH_REASON_SERVER_FAULT)

    @property
    def _going_on(self) -> list[Sequence]:
        return [seq for index, seq in enumerate(self._seqs) if index not in self._ended]

    def _shares(self, funded: int) -> list[int]:
        """Tokens that each choice that goes on may come to, of what the others have left."""
        used = sum(self._seqs[index].num_generated for index in self._ended)
        share, rest = divmod(funded - used, len(self._going_on))
        return [share + (rank < rest) for rank in range(len(self._going_on))]

    def _share_funds(self) -> None:
        if self._funded is None or not self._going_on:
            return
        for seq, share in zip(self._going_on, self._shares(self._funded), strict=True):
            self._thread.fund(seq.seq_id, share)
        self._watch_funds()

    def _watch_funds(self) -> None:
        """Out of funds: more within fund_wait_s, or the end."""
        self._cancel_timer()
        if self._funded is None:
            return
        shares = self._shares(self._funded)
        if all(
            seq.num_generated >= share for seq, share in zip(self._going_on, shares, strict=True)
        ):
            self._timer = asyncio.get_running_loop().call_later(
                self._fund_wait_s, self.stop_all, FinishReason.FINISH_REASON_BUDGET
            )

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def dead_end() -> FailedPrecondition:
    """The grammar, with the rest of the sampling, leaves no token to draw."""
    return FailedPrecondition(
        "the format allows no token that could follow", reason="GRAMMAR_DEAD_END"
    )


def name_of(reason: Reason) -> str:
    """As the engine has it, e.g. "stop"."""
    return FinishReason.Name(reason).removeprefix(_PREFIX).lower()
