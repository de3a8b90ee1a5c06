"""`tidemill margin`: what the fleet cost, what it earned, and what is left (operator)."""

import argparse
import json
import time
from typing import Any

from tidemill.billing import format_amount
from tidemill.billing.margin import HOUR_MS
from tidemill.client.cli_admin import connect
from tidemill.client.cli_table import instant, instant_ms, names_of, nano, table
from tidemill.client.margin import MarginBy, MarginReport, MarginRow

Commands = Any  # argparse's, which has no public name

_DAY_MS = 24 * HOUR_MS
_HOUR_US = 3_600_000_000
_FIELDS = {
    MarginBy.TENANT: "tenant_id",
    MarginBy.MODEL: "model",
    MarginBy.HOUR: "hour_ms",
    MarginBy.PHASE: "phase",
    MarginBy.TIER: "tier",
}


def add(commands: Commands, connection: argparse.ArgumentParser) -> None:
    """The one command."""
    margin = commands.add_parser(
        "margin", parents=[connection], help="cost, revenue and margin of whole hours (operator)"
    )
    when = "full hour: date or ISO 8601 instant"
    margin.add_argument(
        "--from", dest="since", metavar="TIME", help=f"{when} (default: today, 00:00 UTC)"
    )
    margin.add_argument(
        "--to", dest="until", metavar="TIME", help=f"{when}, excluded (default: this hour's end)"
    )
    margin.add_argument("--zone", help="IANA time zone of dates without an offset (default: UTC)")
    margin.add_argument(
        "--by",
        type=names_of(MarginBy),
        default=[],
        metavar="DIMENSIONS",
        help=f"comma-separated, of {', '.join(MarginBy)}",
    )
    margin.add_argument("--currency", default="USD", help="of the accounts (default: USD)")
    margin.add_argument(
        "--accelerator-hour-price",
        type=nano,
        metavar="AMOUNT",
        help="in that currency, e.g. 2.00 (default: the router's)",
    )
    margin.set_defaults(run=show)


def show(args: argparse.Namespace) -> int:
    """Print margin."""
    since, until = _span(args)
    with connect(args, admin=True) as client:
        report = client.admin.margin(
            since,
            until,
            by=args.by,
            currency=args.currency,
            accelerator_hour_nano=args.accelerator_hour_price,
        )
    print(json.dumps(report.to_dict()) if args.json else _describe(report, args.by))
    return 0


def _span(args: argparse.Namespace) -> tuple[int, int]:
    now_ms = time.time_ns() // 1_000_000
    today, next_hour = now_ms - now_ms % _DAY_MS, now_ms - now_ms % HOUR_MS + HOUR_MS
    since = today if args.since is None else instant_ms("--from", args.since, args.zone)
    until = next_hour if args.until is None else instant_ms("--to", args.until, args.zone)
    return since, until


def _describe(report: MarginReport, by: list[MarginBy]) -> str:
    columns = by if MarginBy.PHASE in by else [*by, MarginBy.PHASE]  # it names what is nobody's
    header = (*columns, "tokens", "accelerator hours", "cost", "revenue", "margin")
    rows = [
        (*_names(row, columns), *_figures(row, report.currency))
        for row in (*report.rows, report.total)
    ]
    rows[-1] = ("total", *rows[-1][1:])
    over_cost = _over_cost(report.total)
    price = format_amount(report.accelerator_hour_nano, report.currency)
    return f"{table(header, rows)}\n{over_cost}at {price} an accelerator-hour"


def _names(row: MarginRow, columns: list[MarginBy]) -> list[str]:
    names = {column: getattr(row, _FIELDS[column]) for column in columns}
    if MarginBy.HOUR in names:
        names[MarginBy.HOUR] = instant(row.hour_ms)[:16] + "Z" if row.hour_ms else ""
    return list(names.values())


def _figures(row: MarginRow, currency: str) -> tuple[str, ...]:
    amounts = (row.cost_nano, row.revenue_nano, row.margin_nano)
    return (
        str(row.tokens),
        f"{row.accelerator_us / _HOUR_US:.6f}",
        *(format_amount(amount, currency) for amount in amounts),
    )


def _over_cost(total: MarginRow) -> str:
    if not total.cost_nano:
        return ""
    # In tenths of a per cent, halves away from zero.
    tenths = (abs(total.margin_nano) * 2000 + total.cost_nano) // (2 * total.cost_nano)
    sign = "-" if total.margin_nano < 0 and tenths else ""
    return f"margin is {sign}{tenths // 10}.{tenths % 10} % of cost, "
