"""Usage, price books, charges and receipts: pure, and integers only (M1)."""

from tidemill.billing.charge import Charge, clamp_decided_at, compute_charge
from tidemill.billing.integers import format_amount
from tidemill.billing.price_file import load_price_book, parse_price_book
from tidemill.billing.prices import Decides, PriceBook, Prices, Rounding, Tariff, Window
from tidemill.billing.receipt import Receipt, issue_receipt, verify
from tidemill.billing.usage import Reuse, Unbilled, Usage

__all__ = [
    "Charge",
    "Decides",
    "PriceBook",
    "Prices",
    "Receipt",
    "Reuse",
    "Rounding",
    "Tariff",
    "Unbilled",
    "Usage",
    "Window",
    "clamp_decided_at",
    "compute_charge",
    "format_amount",
    "issue_receipt",
    "load_price_book",
    "parse_price_book",
    "verify",
]
