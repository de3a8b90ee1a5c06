"""Types of days: weekdays, and the holidays that a price book lists itself (ADR 15)."""

import datetime as dt
from dataclasses import dataclass
from enum import StrEnum

from tidemill.errors import ConfigError


class Day(StrEnum):
    """The type of a local date: its weekday, or a holiday where the calendar has it."""

    MON = "mon"
    TUE = "tue"
    WED = "wed"
    THU = "thu"
    FRI = "fri"
    SAT = "sat"
    SUN = "sun"
    HOLIDAY = "holiday"


ALL_DAYS = tuple(Day)
WEEKDAYS = ALL_DAYS[:7]


def weekday(date: dt.date) -> Day:
    """The day of the week."""
    return WEEKDAYS[date.weekday()]


@dataclass(frozen=True, slots=True)
class Calendar:
    """Local dates that count as holidays, complete for each of `years`."""

    name: str
    years: frozenset[int]
    holidays: frozenset[dt.date]

    def covers(self, date: dt.date) -> bool:
        """Whether this calendar knows what type of day `date` is."""
        return date.year in self.years

    def day(self, date: dt.date) -> Day:
        """The type of a date; ConfigError in a year that nobody has listed the holidays of."""
        if not self.covers(date):
            raise ConfigError(
                f"calendar {self.name!r} does not cover {date.year}, asked for {date}"
            )
        return Day.HOLIDAY if date in self.holidays else weekday(date)
