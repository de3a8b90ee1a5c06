"""`tidemill receipts`: show and export them, and verify an export without asking anybody."""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from tidemill.api.billing.v1.receipt_pb2 import Receipt as ReceiptMessage
from tidemill.billing import PriceBook, decode_book, format_amount, load_price_book
from tidemill.billing.canonical import sha256_hex
from tidemill.billing.signature import load_public_key, parse_public_key, signing_key_id
from tidemill.billing.verification import Document, Verdict, verify_documents
from tidemill.client import convert
from tidemill.client.account import SettledReceipt
from tidemill.client.cli_account import span, span_parser
from tidemill.client.cli_admin import connect
from tidemill.client.cli_table import instant, table
from tidemill.errors import ConfigError


def add(commands: Any, connection: argparse.ArgumentParser) -> None:
    """The commands' arguments."""
    receipts = commands.add_parser("receipts", help="show, export and verify receipts")
    actions = receipts.add_subparsers(required=True, metavar="ACTION")
    one = actions.add_parser("show", parents=[connection], help="one receipt and its refunds")
    one.add_argument("request_id", metavar="REQUEST_ID")
    one.set_defaults(run=show)
    exporting = actions.add_parser(
        "export", parents=[connection, span_parser()], help="all receipts of a span of time"
    )
    exporting.add_argument("--format", choices=("jsonl", "csv"), default="jsonl")
    exporting.add_argument("--out", type=Path, metavar="FILE", help="default: stdout")
    exporting.set_defaults(run=export)
    book = actions.add_parser("book", parents=[connection], help="a price book, as canonical JSON")
    book.add_argument("digest", nargs="?", help="as receipts name it (default: that in force)")
    book.set_defaults(run=show_book)
    keys = actions.add_parser("keys", parents=[connection], help="public keys of the signatures")
    keys.set_defaults(run=show_keys)
    checking = actions.add_parser("verify", help="check an export (jsonl) offline")
    checking.add_argument("file", metavar="FILE", help="-: from stdin")
    checking.add_argument(
        "--book",
        dest="books",
        type=Path,
        action="append",
        required=True,
        metavar="PATH",
        help="price book, TOML or canonical JSON; may be repeated",
    )
    checking.add_argument(
        "--public-key",
        dest="public_keys",
        action="append",
        metavar="FILE|HEX",
        help="check signatures by this Ed25519 key, PEM or as `receipts keys` says; repeatable",
    )
    checking.add_argument("--json", action="store_true", help="print one JSON object")
    checking.set_defaults(run=verify)


def show(args: argparse.Namespace) -> int:
    """Print one receipt."""
    with connect(args) as client:
        found = client.receipt(args.request_id)
    print(json.dumps(found.to_dict()) if args.json else _describe(found))
    return 0


def export(args: argparse.Namespace) -> int:
    """Write the receipts of a span, one a line."""
    since, until = span(args)
    with connect(args) as client, _opened(args.out) as out:
        receipts = client.receipts(since, until, key_id=args.key_id, model=args.model)
        if args.format == "csv":
            writer = csv.DictWriter(out, list(convert.receipt(ReceiptMessage()).to_dict()))
            writer.writeheader()
            writer.writerows(receipt.to_dict() for receipt in receipts)
        else:
            for receipt in receipts:
                print(json.dumps(receipt.to_dict(), separators=(",", ":")), file=out)
    return 0


def show_book(args: argparse.Namespace) -> int:
    """Print a price book's canonical JSON."""
    with connect(args) as client:
        book = client.price_book(args.digest)
    print(book.canonical_bytes.decode())
    return 0


def show_keys(args: argparse.Namespace) -> int:
    """Print the public keys, the present one first."""
    with connect(args) as client:
        keys = {key.signing_key_id: key.public_key.hex() for key in client.signing_keys()}
    if args.json:
        print(json.dumps({"keys": keys}))
    else:
        for key_id, public_key in keys.items():
            print(f"{key_id}\t{public_key}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Check every receipt of an export; 1 if one is at fault, or there is none."""
    books = {book.digest: book for book in map(_book, args.books)}
    keys = {signing_key_id(key): key for key in map(_public_key, args.public_keys or ())}
    verdict = verify_documents(_documents(args.file), books, keys or None)
    if args.json:
        print(json.dumps(asdict(verdict)))
    else:
        _say(verdict)
    return 1 if verdict.faults or not verdict.num_receipts else 0


def _say(verdict: Verdict) -> None:
    if not verdict.num_receipts:
        print("there is no receipt in this file: nothing was verified")
        return
    for fault in verdict.faults:
        if not fault.field:
            print(f"line {fault.line} {fault.problem}")
            continue
        receipt = f"receipt {fault.request_id}" if fault.request_id else "receipt"
        print(f"{receipt} (line {fault.line}): {fault.field} {fault.problem}")
    for gap in verdict.gaps:
        print(f"chain of {gap.tenant_id}: positions {gap.first} to {gap.last} are not in this file")
    num_at_fault = len({fault.line for fault in verdict.faults})
    outcome = f"{num_at_fault} at fault" if num_at_fault else "all verify"
    signed = "checked" if verdict.signatures_checked else "not checked: no --public-key"
    print(f"{verdict.num_receipts} receipts, {outcome}; signatures {signed}")


def _documents(path: str) -> Iterator[Document | None]:
    """One object a line; None for a line that is none."""
    try:
        with sys.stdin if path == "-" else Path(path).open(encoding="utf-8") as lines:
            for line in filter(str.strip, lines):
                yield _document(line)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _document(line: str) -> Document | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _book(path: Path) -> PriceBook:
    try:
        content = path.read_bytes()
        if not content.startswith(b"{"):
            return load_price_book(path)
        content = content.removesuffix(b"\n")
        return decode_book(content, digest=sha256_hex(content))
    except (OSError, ConfigError) as error:
        raise ConfigError(f"price book {path} cannot be read: {error}") from error


def _public_key(argument: str) -> bytes:
    if "-----BEGIN" in argument:  # PEM itself, too long for the name of a file
        return parse_public_key(argument)
    path = Path(argument)
    if path.exists():
        return load_public_key(path)
    try:
        return parse_public_key(argument)
    except ConfigError as error:
        raise ConfigError(f"--public-key {argument}: no such file, and {error}") from error


@contextmanager
def _opened(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    try:
        with path.open("w", encoding="utf-8", newline="") as out:
            yield out
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error


def _describe(found: SettledReceipt) -> str:
    receipt = found.receipt
    rows = [(name, value) for name, value in receipt.to_dict().items() if value != ""]
    lines = [f"{receipt.amount} ({receipt.window}, {receipt.state}), saved {receipt.saved}"]
    lines += [
        f"{format_amount(refund.amount_nano, receipt.currency)} given back "
        f"{instant(refund.at_ms)} ({refund.operation_id}) {refund.note}".rstrip()
        for refund in found.refunds
    ]
    return "\n".join(lines) + "\n\n" + table(("field", "value"), rows)
