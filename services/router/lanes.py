"""Choices that are generated together, and how several such groups share what is paid for."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from services.router.attempt import Attempt
from services.router.relay import Choice
from services.router.tally import Run
from services.router.ticket import Ticket
from tidemill.errors import WorkerLost


@dataclass(eq=False, slots=True)
class Lane:
    """Choices that one attempt after the other generates, and the attempt that does so now.

    They may come to `funded_tokens`, those that were relayed before included.
    """

    choices: Sequence[Choice]
    ticket: Ticket
    funded_tokens: int = 0
    num_lost: int = 0
    lost: WorkerLost | None = None
    num_refused: int = 0
    attempt: Attempt | None = None
    number: int = 0
    run: Run | None = None
    patience: asyncio.Timeout | None = None
    successors: "Sequence[Lane]" = ()

    @property
    def going_on(self) -> list[Choice]:
        """Its choices that have not ended."""
        return [choice for choice in self.choices if choice.finish is None]

    @property
    def received(self) -> int:
        """Tokens of its choices that have come."""
        return sum(choice.counts.received for choice in self.choices)

    def await_final(self, within_s: float) -> None:
        """From now on the attempt's Final is due."""
        if self.patience is not None:
            self.patience.reschedule(asyncio.get_running_loop().time() + within_s)


def share(lanes: Sequence[Lane], spare: int, *, max_tokens: int) -> list[Lane]:
    """Give out `spare` tokens, alike for each choice that goes on; returns the lanes that got some.

    No choice can use more than `max_tokens`, so the lanes with the least room come first and leave
    the rest to the others.
    """
    got = []
    num_choices = sum(len(lane.going_on) for lane in lanes)
    spare = max(spare, 0)
    for lane in sorted(lanes, key=lambda lane: _room(lane, max_tokens) / len(lane.going_on)):
        wanted = spare * len(lane.going_on) // num_choices
        given = min(wanted, max(_room(lane, max_tokens), 0))
        spare -= given
        num_choices -= len(lane.going_on)
        if given:
            lane.funded_tokens += given
            got.append(lane)
    return got


def _room(lane: Lane, max_tokens: int) -> int:
    return len(lane.choices) * max_tokens - lane.funded_tokens
