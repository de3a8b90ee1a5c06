"""`tidemill prices`: what a price book says, in the units that people know."""

import argparse
import datetime as dt
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from zoneinfo import ZoneInfo

from tidemill.billing import Day, PriceBook, Tariff, Turn, Window, load_price_book
from tidemill.billing.calendar_check import doubts
from tidemill.billing.calendars import WEEKDAYS
from tidemill.billing.integers import format_per_million
from tidemill.errors import ConfigError

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `prices` with its actions; none of them needs a router."""
    prices = commands.add_parser("prices", help="read and check price books")
    actions = prices.add_subparsers(required=True, metavar="ACTION")

    showing = actions.add_parser("show", help="print a book's tariffs per million tokens")
    showing.add_argument("book", metavar="BOOK", help="its TOML file")
    showing.set_defaults(run=show)

    checking = actions.add_parser("check", help="refuse books that are not sound; exit status 1")
    checking.add_argument("books", metavar="BOOK", nargs="+", help="their TOML files")
    checking.set_defaults(run=check)

    asking = actions.add_parser("at", help="print the prices of an instant and when they end")
    asking.add_argument("time", metavar="TIME", help="ISO 8601 with an offset: 2026-10-08T09:00Z")
    asking.add_argument("book", metavar="BOOK", help="its TOML file")
    asking.add_argument("--model", help="only this one; the book's name of it")
    asking.add_argument("--currency", metavar="CODE", help="only this one")
    asking.set_defaults(run=at)


def show(args: argparse.Namespace) -> int:
    """Print every tariff of a book."""
    book = load_price_book(args.book)
    print(f"{book.id}, version {book.version}, amounts rounded {book.rounding}")
    print(f"digest {book.digest}")
    for calendar in book.calendars.values():
        years = ", ".join(str(year) for year in sorted(calendar.years))
        print(f"calendar {calendar.name}: {len(calendar.holidays)} holidays of {years}")
    for model, tariffs in book.models.items():
        print(f"\n{model}, per million tokens")
        for tariff in tariffs:
            start = _local(tariff.effective_from_ms, tariff.zone)
            calendar_name = f", calendar {tariff.calendar.name}" if tariff.calendar else ""
            print(f"  from {start}, {tariff.zone}{calendar_name}, {tariff.decides} decides")
            for window in tariff.windows:
                print(f"    {window.name}: {_when(tariff, window)}")
                print(*_price_lines(window, sorted(window.prices)), sep="\n")
    return 0


def check(args: argparse.Namespace) -> int:
    """Read each book strictly and compare its calendars; 1 if one is refused."""
    status = 0
    for path in args.books:
        try:
            book = load_price_book(path)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
            continue
        models = ", ".join(book.models)
        print(f"{path}: {book.id}, version {book.version}, digest {book.digest}, sells {models}")
        for calendar in book.calendars.values():
            last = max(calendar.years)
            print(f"{path}: calendar {calendar.name} ends with {last}: no price is known after it")
            for doubt in doubts(calendar):
                print(f"warning: {path}: calendar {calendar.name}: {doubt}", file=sys.stderr)
    return status


def at(args: argparse.Namespace) -> int:
    """Print the window and prices of an instant, for one model or all; 1 if one has none."""
    book, instant = load_price_book(args.book), _instant_ms(args.time)
    if args.model is not None:
        book.tariff_at(args.model, instant)  # refuses one that is not sold
    status = 0
    for model in book.models if args.model is None else [args.model]:
        if book.models[model][0].effective_from_ms > instant:
            print(f"{model}: not sold yet")
            continue
        try:
            lines = list(_lines_at(book, model, instant, args.currency))
        except ConfigError as error:
            print(f"error: {model}: {error}", file=sys.stderr)
            status = 1
        else:
            print(*lines, sep="\n")
    return status


def _lines_at(book: PriceBook, model: str, instant_ms: int, currency: str | None) -> Iterator[str]:
    window = book.tariff_at(model, instant_ms).window_at(instant_ms)
    yield f"{model}: {window.name}, {_until(book, model, instant_ms)}"
    yield from _price_lines(window, [currency] if currency else sorted(window.prices))


def _until(book: PriceBook, model: str, instant_ms: int) -> str:
    end = book.window_ends_at(model, instant_ms)
    if end is None:
        return "no end in sight"
    after = book.tariff_at(model, end)
    if not after.knows(end):
        return f"until {_local(end, after.zone)}, where the calendar ends"
    return f"until {_local(end, after.zone)}, then {after.window_at(end).name}"


def _price_lines(window: Window, currencies: Sequence[str]) -> Iterator[str]:
    for currency in currencies:
        prices = window.prices_in(currency)
        cells = {"hit": prices.hit, "miss": prices.miss, "output": prices.output}
        row = "  ".join(f"{name} {format_per_million(pico):>7}" for name, pico in cells.items())
        yield f"      {currency}  {row}"


def _when(tariff: Tariff, window: Window) -> str:
    """The times of a window: `mon-fri 09:00-12:00, 14:00-18:00; sat-sun 10:00-12:00`."""
    days_by_times: dict[str, list[Day]] = {}
    for day, turns in tariff.week.items():
        if times := ", ".join(_times(turns, window.name)):
            days_by_times.setdefault(times, []).append(day)
    if list(days_by_times.values()) == [list(tariff.week)]:
        return next(iter(days_by_times))
    return "; ".join(f"{_days(days)} {times}" for times, days in days_by_times.items())


def _times(turns: Sequence[Turn], window: str) -> Iterator[str]:
    if len(turns) == 1 and turns[0].window == window:
        yield "all day"
        return
    ends = [*(_clock(turn.start) for turn in turns[1:]), "24:00"]
    for turn, end in zip(turns, ends, strict=True):
        if turn.window == window:
            yield f"{_clock(turn.start)}-{end}"


def _days(days: Iterable[Day]) -> str:
    """`mon-fri, sun`: runs of neighbours by their ends."""
    order = {day: index for index, day in enumerate(WEEKDAYS)}
    numbered = ((order.get(day, 99) - index, day) for index, day in enumerate(days))
    runs = [[day for _, day in run] for _, run in groupby(numbered, key=lambda pair: pair[0])]
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _clock(time: dt.time) -> str:
    return time.isoformat("seconds" if time.second else "minutes")


def _local(instant_ms: int, zone: str) -> str:
    instant = _EPOCH + instant_ms * dt.timedelta(milliseconds=1)
    return instant.astimezone(ZoneInfo(zone)).isoformat()


def _instant_ms(text: str) -> int:
    try:
        instant = dt.datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"TIME is no ISO 8601 time: {text!r}") from error
    if instant.tzinfo is None:
        raise ConfigError(f"TIME needs an offset from UTC, such as {text}Z or {text}+08:00")
    return (instant - _EPOCH) // dt.timedelta(milliseconds=1)
