"""`tidemill balance`, `usage` and `quote`; for the operator `topup`, `grant`, `refund`, `limits`
and `journal`.
"""

import argparse
import json
import sys
import time
from typing import Any

from tidemill.billing import format_amount
from tidemill.billing.integers import format_per_million
from tidemill.billing.ledger import Limits
from tidemill.client.account import (
    Balance,
    JournalEntry,
    LimitState,
    Operation,
    Quote,
    QuotedWindow,
    UsageRow,
    set_limits,
)
from tidemill.client.account_calls import UsageBy
from tidemill.client.cli_admin import connect
from tidemill.client.cli_answer import served_model
from tidemill.client.cli_options import options
from tidemill.client.cli_table import identifier, instant, instant_ms, names_of, nano, table
from tidemill.client.types import Message
from tidemill.errors import ConfigError

Commands = Any  # argparse's, which has no public name


def add(commands: Commands, connection: argparse.ArgumentParser) -> None:
    """The tenant's commands, then the operator's."""
    _add_reading(commands, connection)
    _add_money(commands, connection)
    _add_limits(commands, connection)
    journal = commands.add_parser(
        "journal", parents=[connection], help="every posting of an account (operator)"
    )
    journal.add_argument("tenant_id", metavar="TENANT")
    journal.set_defaults(run=show_journal)


def span_parser() -> argparse.ArgumentParser:
    """`--from`, `--to`, `--key`, `--model` and `--zone`, to be a parent."""
    parent = argparse.ArgumentParser(add_help=False)
    when = "date or ISO 8601 instant"
    parent.add_argument("--from", dest="since", metavar="TIME", help=f"{when} (default: all)")
    parent.add_argument("--to", dest="until", metavar="TIME", help=f"{when}, excluded (now)")
    parent.add_argument("--key", dest="key_id", metavar="KEY_ID", help="only this key's")
    parent.add_argument("--model", help="only this model's")
    parent.add_argument("--zone", help="IANA time zone of dates without an offset (default: UTC)")
    return parent


def span(args: argparse.Namespace) -> tuple[int, int]:
    """(from_ms, to_ms) of the arguments."""
    since = 0 if args.since is None else instant_ms("--from", args.since, args.zone)
    now_ms = time.time_ns() // 1_000_000
    until = now_ms + 1 if args.until is None else instant_ms("--to", args.until, args.zone)
    return since, until


def show_balance(args: argparse.Namespace) -> int:
    """Print what the account holds, and what its limits leave."""
    with connect(args) as client:
        balance = client.balance()
    if args.json:
        print(json.dumps(balance.to_dict()))
    else:
        print(_describe(balance))
        if balance.limits:
            rows = [_limit(state, balance.currency) for state in balance.limits]
            print("\n" + table(("of", "limit", "is", "left", "whole again"), rows))
    return 0


def show_usage(args: argparse.Namespace) -> int:
    """Print usage, added up."""
    since, until = span(args)
    with connect(args) as client:
        rows = client.usage(
            since, until, by=args.by, key_id=args.key_id, model=args.model, zone=args.zone
        )
    if args.json:
        print(json.dumps({"rows": [row.to_dict() for row in rows]}))
    else:
        print(_usage_table(args.by, rows))
    return 0


def show_quote(args: argparse.Namespace) -> int:
    """Print what a request would cost."""
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    messages = [Message("system", args.system)] if args.system else []
    chat = args.chat or args.system is not None
    with connect(args) as client:
        quote = client.quote(
            None if chat else text,
            messages=[*messages, Message("user", text)] if chat else None,
            model=served_model(client, args),
            expected_completion_tokens=args.expect,
            **options(args),
        )
    if args.json:
        print(json.dumps(quote.to_dict()))
    else:
        print(_describe_quote(quote))
    return 0


def top_up(args: argparse.Namespace) -> int:
    """Add money that was paid."""
    with connect(args, admin=True) as client:
        made = client.admin.top_up(
            args.tenant_id, args.amount, operation_id=args.operation_id, note=args.note
        )
    return _show_operation(args, made, "paid in")


def grant(args: argparse.Namespace) -> int:
    """Add money that is given."""
    with connect(args, admin=True) as client:
        made = client.admin.grant(
            args.tenant_id, args.amount, operation_id=args.operation_id, note=args.note
        )
    return _show_operation(args, made, "granted")


def refund(args: argparse.Namespace) -> int:
    """Give a charge back."""
    with connect(args, admin=True) as client:
        made = client.admin.refund(
            args.tenant_id,
            args.request_id,
            amount_nano=args.amount,
            operation_id=args.operation_id,
            note=args.note,
        )
    return _show_operation(args, made, "given back")


def change_limits(args: argparse.Namespace) -> int:
    """Replace all limits of a tenant or a key by those given."""
    try:
        limits = Limits(
            requests_per_minute=args.requests_per_minute,
            tokens_per_minute=args.tokens_per_minute,
            concurrency=args.concurrency,
            daily_budget_nano=args.daily_budget,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with connect(args, admin=True) as client:
        applied = client.admin.set_limits(
            args.tenant_id, limits, key_id=args.key_id, operation_id=args.operation_id
        )
    if args.json:
        print(json.dumps({"applied": applied, "limits": set_limits(limits)}))
    else:
        print("limits set" if applied else "limits had been set by this operation before")
    return 0


def show_limits(args: argparse.Namespace) -> int:
    """Print an account: balances, limits, live holds."""
    with connect(args, admin=True) as client:
        account = client.admin.account(args.tenant_id)
    if args.json:
        print(json.dumps(account.to_dict()))
        return 0
    print(_describe(account.balance))
    holds = ", ".join(f"{count} {state}" for state, count in account.holds.items() if count)
    print(f"holds: {holds or 'none'}")
    limits = {"tenant": account.limits, **account.key_limits}
    rows = [
        (scope, name, _limit_value(name, value, account.balance.currency))
        for scope, each in limits.items()
        for name, value in set_limits(each).items()
    ]
    print("\n" + table(("of", "limit", "is"), rows) if rows else "limits: none")
    return 0


def show_journal(args: argparse.Namespace) -> int:
    """Print every posting; with --json one object a line."""
    with connect(args, admin=True) as client:
        for entry in client.admin.journal(args.tenant_id):
            print(json.dumps(entry.to_dict()) if args.json else _posting(entry))
    return 0


def _show_operation(args: argparse.Namespace, made: Operation, what: str) -> int:
    if args.json:
        print(json.dumps(made.to_dict()))
    else:
        amount = format_amount(made.amount_nano, made.balance.currency)
        again = "" if made.applied else ", by this operation, before"
        print(f"{amount} {what}{again}; {made.balance.available} to spend")
    return 0


def _describe(balance: Balance) -> str:
    def amount(value: int) -> str:
        return format_amount(value, balance.currency)

    return (
        f"{balance.available} to spend ({amount(balance.granted_nano)} granted, "
        f"{amount(balance.topped_up_nano)} topped up); {amount(balance.held_nano)} held"
    )


def _limit(state: LimitState, currency: str) -> tuple[str, ...]:
    resets = "as requests end" if state.resets_at_ms is None else instant(state.resets_at_ms)
    return (
        state.scope,
        state.limit,
        _limit_value(state.limit, state.value, currency),
        _limit_value(state.limit, state.remaining, currency),
        resets,
    )


def _limit_value(limit: str, value: int, currency: str) -> str:
    return format_amount(value, currency) if limit == "daily_budget_nano" else f"{value}"


def _usage_table(by: list[str], rows: list[UsageRow]) -> str:
    columns = {UsageBy.KEY: "key_id"}
    header = (
        *by, "requests", "hit", "miss", "output", "device", "host", "cache ram", "cache disk",
        "peer", "unbilled", "amount", "refunded", "saved",
    )  # fmt: skip
    cells = [
        (
            *(getattr(row, columns.get(UsageBy(each), each)) for each in by),
            row.requests,
            row.cache_hit_tokens,
            row.cache_miss_tokens,
            row.completion_tokens,
            row.reuse.device,
            row.reuse.host,
            row.reuse.cache_ram,
            row.reuse.cache_disk,
            row.reuse.peer,
            row.unbilled_tokens,
            row.amount,
            format_amount(row.refunded_nano, row.currency),
            format_amount(row.saved_nano, row.currency),
        )
        for row in rows
    ]
    return table(header, cells)


def _describe_quote(quote: Quote) -> str:
    def amount(value: int) -> str:
        return format_amount(value, quote.currency)

    def window(priced: QuotedWindow, lead: str) -> str:
        prices = priced.prices
        end = "" if priced.ends_at_ms is None else f" until {instant(priced.ends_at_ms)}"
        return (
            f"{lead}: {amount(priced.expected_nano)} ({priced.window}{end}: "
            f"hit {format_per_million(prices.hit)}, miss {format_per_million(prices.miss)}, "
            f"output {format_per_million(prices.output)} {quote.currency}/1M tokens)"
        )

    lines = [
        f"prompt {quote.prompt_tokens} tokens, {quote.expected_hit_tokens} of them likely hits; "
        f"at most {quote.max_tokens} tokens of output",
        window(quote.now, "now"),
    ]
    if quote.cheaper is not None:
        lines.append(window(quote.cheaper, f"from {instant(quote.cheaper.starts_at_ms)}"))
    lines.append(f"at most {amount(quote.max_nano)}; {amount(quote.hold_nano)} held at first")
    return "\n".join(lines)


def _posting(entry: JournalEntry) -> str:
    postings = ", ".join(f"{name} {value:+d}" for name, value in sorted(entry.postings.items()))
    return f"{entry.entry_id}\t{instant(entry.at_ms)}\t{entry.kind}\t{entry.subject}\t{postings}"


def _add_reading(commands: Commands, connection: argparse.ArgumentParser) -> None:
    balance = commands.add_parser("balance", parents=[connection], help="money left, and limits")
    balance.set_defaults(run=show_balance)
    usage = commands.add_parser(
        "usage", parents=[connection, span_parser()], help="tokens and charges, added up"
    )
    usage.add_argument(
        "--by",
        type=names_of(UsageBy),
        default=[],
        metavar="DIMENSIONS",
        help=f"comma-separated, of {', '.join(UsageBy)}",
    )
    usage.set_defaults(run=show_usage)


def add_quote(
    commands: Commands, connection: argparse.ArgumentParser, sampling: argparse.ArgumentParser
) -> None:
    """`quote`, which takes what `generate` and `chat` take."""
    quote = commands.add_parser(
        "quote", parents=[connection, sampling], help="what a request would cost; nothing is run"
    )
    quote.add_argument("prompt", nargs="?", default="-", help="text; - or nothing: from stdin")
    quote.add_argument("--chat", action="store_true", help="the text is a message")
    quote.add_argument("--system", metavar="TEXT", help="as for chat, and implies --chat")
    quote.add_argument(
        "--expect", type=int, metavar="N", help="completion tokens expected (default: max_tokens)"
    )
    quote.set_defaults(run=show_quote)


def _add_money(commands: Commands, connection: argparse.ArgumentParser) -> None:
    kinds = (
        ("topup", top_up, "add money that a tenant paid"),
        ("grant", grant, "give a tenant money, spent first"),
        ("refund", refund, "give a settled charge back"),
    )
    for name, run, description in kinds:
        command = commands.add_parser(name, parents=[connection], help=f"{description} (operator)")
        command.add_argument("tenant_id", metavar="TENANT")
        if name == "refund":
            command.add_argument("request_id", metavar="REQUEST_ID")
            command.add_argument("amount", type=nano, nargs="?", help="default: all that is left")
        else:
            command.add_argument("amount", type=nano, help="in the account's currency: 12.50")
        command.add_argument("--note", default="", help="for people")
        _add_operation_id(command)
        command.set_defaults(run=run)


def _add_limits(commands: Commands, connection: argparse.ArgumentParser) -> None:
    limits = commands.add_parser("limits", help="bounds on use (operator)")
    actions = limits.add_subparsers(required=True, metavar="ACTION")
    change = actions.add_parser(
        "set", parents=[connection], help="replace all limits; those not given: none"
    )
    change.add_argument("tenant_id", metavar="TENANT")
    change.add_argument("--key", dest="key_id", metavar="KEY_ID", help="of this key alone")
    change.add_argument("--requests-per-minute", type=int, metavar="N")
    change.add_argument("--tokens-per-minute", type=int, metavar="N")
    change.add_argument("--concurrency", type=int, metavar="N", help="requests at once")
    change.add_argument("--daily-budget", type=nano, metavar="AMOUNT", help="a UTC day: 12.50")
    _add_operation_id(change)
    change.set_defaults(run=change_limits)
    show = actions.add_parser("show", parents=[connection], help="an account and its limits")
    show.add_argument("tenant_id", metavar="TENANT")
    show.set_defaults(run=show_limits)


def _add_operation_id(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--operation-id",
        type=identifier,
        metavar="ID",
        help="idempotency key (default: a new one each time)",
    )
