"""Windows where clocks are changed, and for any week at all: exactly one, ending when it says."""

import datetime as dt
from collections.abc import Iterator
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.billing import Tariff, parse_price_book

HEAD = """
schema = 2
id = "clocks"
version = 1
rounding = "half-up-nano"
currencies = ["USD"]
[calendars.some]
covers = [2024, 2025, 2026]
holidays = [2024-02-29, 2025-03-30, 2025-10-26, 2025-11-02, 2025-12-25]
[[models.m.tariffs]]
effective_from = 2024-01-02T00:00:00Z
decides = "completion"
calendar = "some"
zone = "{zone}"
"""
WINDOW = """
[[models.m.tariffs.windows]]
name = "{name}"
spans = [{spans}]
prices.USD = {{ hit = 1, miss = 2, output = 3 }}
"""
MINUTE_MS = 60_000
DAY_MS = 24 * 60 * MINUTE_MS


def tariff(zone: str, windows: dict[str, list[str]]) -> Tariff:
    text = HEAD.format(zone=zone) + "".join(
        WINDOW.format(name=name, spans=", ".join(f"{{ {span} }}" for span in spans))
        for name, spans in windows.items()
    )
    return parse_price_book(text, source="clocks.toml").models["m"][0]


def two(zone: str, start: str, end: str) -> Tariff:
    """`in` from start to end each day, `out` for the rest of it."""
    return tariff(
        zone, {"in": [f"start = {start}, end = {end}"], "out": [f"start = {end}, end = {start}"]}
    )


def utc(instant: str) -> int:
    parsed = dt.datetime.fromisoformat(instant).replace(tzinfo=dt.UTC)
    return (parsed - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(milliseconds=1)


def changes(tariff: Tariff, start: str, *, count: int) -> list[tuple[str, str]]:
    """The next changes after an instant in UTC: when, and the window that then begins."""

    def found() -> Iterator[tuple[str, str]]:
        instant: int | None = utc(start)
        for _ in range(count):
            assert instant is not None
            instant = tariff.window_ends_at(instant)
            assert instant is not None
            when = dt.datetime.fromtimestamp(instant / 1000, dt.UTC)
            yield f"{when:%m-%d %H:%M}", tariff.window_at(instant).name

    return list(found())


@pytest.mark.parametrize(
    ("zone", "start", "end", "from_utc", "expected"),
    [
        # Berlin skips 02:00-03:00 on 30 March 2025, at 01:00 UTC, and repeats it on 26 October.
        ("Europe/Berlin", "02:30:00", "03:30:00", "2025-03-29 12:00",
         [("03-30 01:00", "in"), ("03-30 01:30", "out"), ("03-31 00:30", "in")]),
        ("Europe/Berlin", "02:15:00", "02:45:00", "2025-03-29 12:00",
         [("03-31 00:15", "in"), ("03-31 00:45", "out")]),  # none at all on the 30th
        ("Europe/Berlin", "02:15:00", "02:45:00", "2025-10-25 12:00",
         [("10-26 00:15", "in"), ("10-26 00:45", "out"),
          ("10-26 01:15", "in"), ("10-26 01:45", "out"), ("10-27 01:15", "in")]),  # twice
        ("Europe/Berlin", "02:30:00", "08:00:00", "2025-10-25 12:00",
         [("10-26 00:30", "in"), ("10-26 01:00", "out"), ("10-26 01:30", "in"),
          ("10-26 07:00", "out")]),
        # New York skips 02:00-03:00 on 9 March 2025, at 07:00 UTC, and repeats 01:00-02:00 on
        # 2 November, at 06:00 UTC.
        ("America/New_York", "22:00:00", "02:00:00", "2025-03-08 12:00",
         [("03-09 03:00", "in"), ("03-09 07:00", "out"), ("03-10 02:00", "in")]),
        ("America/New_York", "22:00:00", "01:30:00", "2025-11-01 12:00",
         [("11-02 02:00", "in"), ("11-02 05:30", "out"), ("11-02 06:00", "in"),
          ("11-02 06:30", "out"), ("11-03 03:00", "in")]),
        # Havana changes at midnight: 9 March 2025 begins at 01:00.
        ("America/Havana", "00:00:00", "00:30:00", "2025-03-08 12:00",
         [("03-10 04:00", "in"), ("03-10 04:30", "out")]),
        # Lord Howe Island moves by half an hour.
        ("Australia/Lord_Howe", "01:45:00", "02:15:00", "2025-04-05 06:00",
         [("04-05 14:45", "in"), ("04-05 15:00", "out"), ("04-05 15:15", "in"),
          ("04-05 15:45", "out")]),
    ],
)  # fmt: skip
def test_the_clock_on_the_wall_decides_where_it_skips_or_repeats(
    zone: str, start: str, end: str, from_utc: str, expected: list[tuple[str, str]]
) -> None:
    assert changes(two(zone, start, end), from_utc, count=len(expected)) == expected


def test_a_leap_day_is_a_day_like_any_other_and_may_be_a_holiday() -> None:
    leap = tariff(
        "UTC",
        {
            "working": ['days = ["mon","tue","wed","thu","fri"], start = 00:00:00, end = 00:00:00'],
            "free": ['days = ["sat", "sun", "holiday"], start = 00:00:00, end = 00:00:00'],
        },
    )
    assert changes(leap, "2024-02-27 00:00", count=3) == [
        ("02-29 00:00", "free"),
        ("03-01 00:00", "working"),
        ("03-02 00:00", "free"),
    ]


def test_a_span_that_wraps_midnight_belongs_to_both_ends_of_its_own_dates() -> None:
    fridays = tariff(
        "UTC",
        {
            "late": ['days = ["fri"], start = 22:00:00, end = 06:00:00'],
            "else": [
                'days = ["fri"], start = 06:00:00, end = 22:00:00',
                'days = ["mon","tue","wed","thu","sat","sun","holiday"], '
                "start = 00:00:00, end = 00:00:00",
            ],
        },
    )
    assert changes(fridays, "2025-06-05 12:00", count=4) == [
        ("06-06 00:00", "late"),  # the beginning of Friday, not of Saturday
        ("06-06 06:00", "else"),
        ("06-06 22:00", "late"),
        ("06-07 00:00", "else"),
    ]


def test_a_window_that_holds_all_week_never_ends() -> None:
    text = HEAD.replace('calendar = "some"\n', "").format(zone="UTC")
    text = text.replace("[calendars.some]\ncovers = [2024, 2025, 2026]\n", "")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("holidays"))
    text += WINDOW.format(name="always", spans="{ start = 00:00:00, end = 00:00:00 }")
    always = parse_price_book(text, source="always.toml").models["m"][0]
    assert always.window_ends_at(utc("2025-01-01 00:00")) is None


ZONES = [
    "UTC",
    "Asia/Shanghai",
    "Europe/Berlin",
    "America/New_York",
    "America/Havana",
    "Africa/Casablanca",
    "Australia/Lord_Howe",
    "Asia/Kathmandu",
    "Pacific/Chatham",
]
# When some of these zones change their clocks, in UTC.
CHANGES = [
    utc(f"2025-{change}")
    for change in ("03-09 05:00", "03-09 07:00", "03-30 01:00", "04-05 14:00", "04-05 15:00",
                   "04-06 02:00", "10-26 01:00", "11-02 05:00", "11-02 06:00")
]  # fmt: skip
STARTS = st.one_of(
    st.integers(utc("2024-01-02 12:00"), utc("2026-12-20 00:00")),
    st.builds(int.__add__, st.sampled_from(CHANGES), st.integers(-DAY_MS, DAY_MS)),
)
DAYS = ["mon", "tue", "wed", "thu", "fri", "sat", "sun", "holiday"]


@st.composite
def timetables(draw: st.DrawFn) -> tuple[Tariff, dict[str, list[tuple[int, int, str]]]]:
    """A tariff and, for each type of day, its minutes: from, until, window."""
    table = {}
    spans: dict[str, list[str]] = {"a": [], "b": [], "c": []}
    for day in DAYS:
        cuts = sorted(draw(st.sets(st.integers(1, 24 * 60 - 1), max_size=3)))
        edges = list(zip([0, *cuts], [*cuts, 24 * 60], strict=True))
        names = draw(st.lists(st.sampled_from("abc"), min_size=len(edges), max_size=len(edges)))
        table[day] = [(start, end, name) for (start, end), name in zip(edges, names, strict=True)]
        for start, end, name in table[day]:
            times = [f"{minute // 60 % 24:02}:{minute % 60:02}:00" for minute in (start, end)]
            spans[name].append(f'days = ["{day}"], start = {times[0]}, end = {times[1]}')
    zone = draw(st.sampled_from(ZONES))
    return tariff(zone, {name: its for name, its in spans.items() if its}), table


@given(timetable=timetables(), start=STARTS)
def test_any_instant_has_the_one_window_that_its_local_clock_shows(
    timetable: tuple[Tariff, dict[str, list[tuple[int, int, str]]]], start: int
) -> None:
    found, table = timetable
    local = dt.datetime.fromtimestamp(start / 1000, ZoneInfo(found.zone))
    assert found.calendar is not None
    free = local.date() in found.calendar.holidays
    minute = local.hour * 60 + local.minute
    rows = table["holiday" if free else DAYS[local.weekday()]]
    assert [name for begin, end, name in rows if begin <= minute < end] == [
        found.window_at(start).name
    ]


@given(timetable=timetables(), start=STARTS)
def test_a_window_ends_at_the_first_instant_that_has_another(
    timetable: tuple[Tariff, dict[str, list[tuple[int, int, str]]]], start: int
) -> None:
    found, _ = timetable
    name = found.window_at(start).name
    end = found.window_ends_at(start)
    minute = start // MINUTE_MS * MINUTE_MS + MINUTE_MS  # windows change on whole minutes only
    for instant in range(minute, minute + 3 * DAY_MS, MINUTE_MS):
        if not found.knows(instant) or found.window_at(instant).name != name:
            assert end == instant
            return
    assert end is None or end >= minute + 3 * DAY_MS
