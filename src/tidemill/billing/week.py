"""From the spans of a tariff's windows to a timetable of the week, each second exactly once."""

import datetime as dt
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import NoReturn

from tidemill.billing.calendars import Day
from tidemill.billing.prices import Turn

_DAY_S = 24 * 60 * 60


@dataclass(frozen=True, slots=True)
class Span:
    """When a window is in force: from `start` until before `end` on each of `days`.

    An `end` that is not after `start` wraps midnight, and the span covers the beginning and the
    end of each of its dates; equal times are the whole day. `where` is its key in the file.
    """

    window: str
    days: frozenset[Day]
    start: dt.time
    end: dt.time
    where: str


@dataclass(frozen=True, slots=True, order=True)
class _Piece:
    """Seconds of one local day."""

    start: int
    end: int
    window: str
    where: str


def lay_out(
    spans: Iterable[Span], days: Iterable[Day], refuse: Callable[[str], NoReturn]
) -> Mapping[Day, tuple[Turn, ...]]:
    """The turns of each of `days`; `refuse` is told of the first gap or overlap."""
    spans = list(spans)
    week = {}
    for day in days:
        pieces = sorted(piece for span in spans if day in span.days for piece in _pieces(span))
        _require_whole_day(day, pieces, refuse)
        by_window = groupby(pieces, key=lambda piece: piece.window)
        week[day] = tuple(Turn(_clock(next(run).start), window) for window, run in by_window)
    return MappingProxyType(week)


def _pieces(span: Span) -> Iterator[_Piece]:
    start, end = _second(span.start), _second(span.end)
    if start < end:
        yield _Piece(start, end, span.window, span.where)
        return
    yield _Piece(start, _DAY_S, span.window, span.where)
    if end > 0:
        yield _Piece(0, end, span.window, span.where)


def _require_whole_day(day: Day, pieces: list[_Piece], refuse: Callable[[str], NoReturn]) -> None:
    until, last = 0, None
    for piece in pieces:
        if piece.start > until:
            refuse(f"leave {day} without a price from {_text(until)} to {_text(piece.start)}")
        if last is not None and piece.start < until:
            refuse(
                f"overlap on {day} from {_text(piece.start)} to {_text(min(until, piece.end))}: "
                f"{last.window!r} ({last.where}) and {piece.window!r} ({piece.where})"
            )
        until, last = piece.end, piece
    if until < _DAY_S:
        refuse(f"leave {day} without a price from {_text(until)} to 24:00:00")


def _second(time: dt.time) -> int:
    return (time.hour * 60 + time.minute) * 60 + time.second


def _clock(second: int) -> dt.time:
    return dt.time(second // 3600, second // 60 % 60, second % 60)


def _text(second: int) -> str:
    return "24:00:00" if second == _DAY_S else _clock(second).isoformat()
