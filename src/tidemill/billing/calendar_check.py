"""A second opinion on a calendar: the `holidays` package, where it is installed."""

import datetime as dt

from tidemill.billing.calendars import Calendar


def doubts(calendar: Calendar) -> list[str]:
    """Phrases on each date that the package sees otherwise, or on why there was no comparison.

    A calendar named by a country code (`cn`) is compared with that country's: every weekday off
    work must be listed and no listed date may be a working day, so weekends may be listed or not.
    """
    try:
        import holidays  # noqa: PLC0415 - no part of any install but the developer's
    except ModuleNotFoundError:
        return ["not compared: the package holidays is not installed"]
    try:
        country = holidays.country_holidays(calendar.name.upper(), years=calendar.years)
    except NotImplementedError:
        return [f"not compared: the package holidays has no country {calendar.name.upper()!r}"]
    found = []
    for year in sorted(calendar.years):
        for date in _dates(year):
            listed, works = date in calendar.holidays, country.is_working_day(date)
            if listed and works:
                found.append(f"{date} is listed, and a working day by the package holidays")
            elif not listed and not works and date.weekday() < 5:
                name = country.get(date)
                found.append(f"{date} is not listed, and {name!r} by the package holidays")
    return found


def _dates(year: int) -> list[dt.date]:
    first, last = dt.date(year, 1, 1).toordinal(), dt.date(year, 12, 31).toordinal()
    return [dt.date.fromordinal(day) for day in range(first, last + 1)]
