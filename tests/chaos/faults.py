"""What may go wrong in a round: every named crash point, and every process killed at any moment."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random

from services.router.crash_points import POINTS
from tests.chaos.customers import Habits
from tests.chaos.fleet import LEDGER, WORKERS, Fleet

_WITHOUT_LEDGER_S = 3.0
_WITHOUT_OTHER_S = 8.0  # leases
_IN_PLACE_EVERY = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Where a fault strikes: `victim` is the router that dies, `other` the one beside it."""

    fleet: Fleet
    rng: Random
    victim: str
    other: str

    async def pause(self, least_s: float, most_s: float) -> None:
        """Let time pass, nobody knows how much."""
        await asyncio.sleep(self.rng.uniform(least_s, most_s))


Strike = Callable[[Scene], Awaitable[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Under load `strike` lets it happen, and returns when it has.

    `point` is the crash point at which the victim dies, one of its first `passages` times there.
    `kills` is the worker whose counters die with it.
    """

    name: str
    strike: Strike
    point: str = ""
    passages: int = 1
    kills: str = ""
    habits: Habits = Habits()  # noqa: RUF009 - frozen

    def armed(self, rng: Random) -> str:
        """The point for TIDEMILL_CRASH_AT; "" for none."""
        return f"{self.point}:{rng.randint(1, self.passages)}" if self.point else ""


async def _dies_by_itself(scene: Scene) -> None:
    await scene.fleet.dies(scene.victim)


async def _dies_without_ledger(scene: Scene) -> None:
    """Die while the ledger is away, or when it has come back; until then it comes and goes."""
    dying = asyncio.ensure_future(scene.fleet.dies(scene.victim))
    while not dying.done():
        await scene.pause(0.3, 0.8)
        scene.fleet[LEDGER].kill()
        await asyncio.wait([dying], timeout=scene.rng.uniform(0.5, 1.0))
        await scene.fleet.restart(LEDGER)
        await asyncio.wait([dying], timeout=_WITHOUT_LEDGER_S)
    dying.result()


async def _dies_of_the_other_s_death(scene: Scene) -> None:
    """Die over what the other router left behind, which may take several of its deaths."""
    dying = asyncio.ensure_future(scene.fleet.dies(scene.victim))
    await scene.pause(0.3, 0.8)
    while not dying.done():
        scene.fleet[scene.other].kill()
        await asyncio.wait([dying], timeout=_WITHOUT_OTHER_S)
        await scene.fleet.restart(scene.other)
        if not dying.done():
            await scene.pause(2.0, 4.0)  # for customers to come back to it
    dying.result()


async def _is_killed(scene: Scene) -> None:
    await scene.pause(0.1, 1.0)
    scene.fleet[scene.victim].kill()


def _kill(worker: str) -> Strike:
    async def strike(scene: Scene) -> None:
        await scene.pause(0.1, 1.0)
        scene.fleet[worker].kill()
        await scene.pause(0.5, 0.5)

    return strike


async def _kill_ledger(scene: Scene) -> None:
    await scene.pause(0.1, 1.0)
    scene.fleet[LEDGER].kill()
    await scene.pause(0.1, 1.5)
    await scene.fleet.restart(LEDGER)
    await scene.pause(0.5, 0.5)


_LEAVE = Habits(insist=False)
_LONG = Habits(long=True)


def _at(point: str) -> Fault:
    match point.partition(".")[0]:
        case "spool" | "replay":
            return Fault(name=point, point=point, strike=_dies_without_ledger)
        case "takeover":
            return Fault(name=point, point=point, strike=_dies_of_the_other_s_death)
        case "orphan" | "resolve":
            # Nobody asks again, or the request would be taken over rather than resolved.
            strike = _dies_of_the_other_s_death
            return Fault(name=point, point=point, strike=strike, habits=_LEAVE)
        case "fund":
            return Fault(name=point, point=point, strike=_dies_by_itself, habits=_LONG)
        case _:
            return Fault(name=point, point=point, passages=8, strike=_dies_by_itself)


FAULTS = (
    *(_at(point) for point in sorted(POINTS)),
    *(Fault(name=f"kill-{each}", strike=_kill(each), kills=each) for each in WORKERS),
    Fault(name="kill-router", strike=_is_killed),
    Fault(name="kill-router-nobody-asks-again", strike=_is_killed, habits=_LEAVE),
    Fault(name="kill-ledger", strike=_kill_ledger),
    Fault(name="kill-ledger-under-long-answers", strike=_kill_ledger, habits=_LONG),
)


@dataclass(frozen=True, slots=True)
class Round:
    """One fault; all that is random about it follows from `tag`.

    `in_place`: decode workers prefill the short rests of prompts themselves.
    """

    tag: str
    fault: Fault
    in_place: bool

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.tag}-{self.fault.name}{'-in-place' if self.in_place else ''}"


def rounds(count: int, *, seed: int) -> Sequence[Round]:
    """`count` rounds in random order; every fault is among each len(FAULTS) of them.

    Each fourth is one with prefill in place.
    """
    rng = Random(seed)
    made: list[Round] = []
    while len(made) < count:
        cycle = list(FAULTS)
        rng.shuffle(cycle)
        made += [
            Round(f"{seed}-{number:03d}", fault, in_place=number % _IN_PLACE_EVERY == 0)
            for number, fault in enumerate(cycle, start=len(made))
        ]
    return made[:count]
