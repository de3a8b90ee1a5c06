"""The SDK: call a Tidemill router from Python.

>>> from tidemill.client import Client
>>> with Client("127.0.0.1:7443", api_key="tm_...", ca="ca.pem") as client:
...     answer = client.chat("What does itertools.chain do?", model="demo", max_tokens=64)
...     print(answer.text, answer.usage.cache_hit_tokens, answer.receipt.amount)

Its errors are those of tidemill.errors.
"""

from tidemill.billing import Prices, Reuse, Unbilled
from tidemill.billing.ledger import Limits
from tidemill.client.account import (
    Account,
    Balance,
    JournalEntry,
    LimitState,
    Operation,
    Quote,
    QuotedWindow,
    Refund,
    SettledReceipt,
    SigningKey,
    UsageRow,
)
from tidemill.client.account_calls import UsageBy
from tidemill.client.aio import AsyncAdmin, AsyncClient, AsyncStream
from tidemill.client.margin import MarginBy, MarginReport, MarginRow
from tidemill.client.request import Options
from tidemill.client.retry import RetryPolicy
from tidemill.client.sync import Admin, Client, Stream
from tidemill.client.types import (
    Accepted,
    Choice,
    ChoiceEnd,
    Completed,
    Completion,
    Event,
    FinishReason,
    Key,
    MaxCost,
    Message,
    Model,
    NewKey,
    PromptScored,
    Queued,
    Receipt,
    TextChunk,
    Timing,
    TokenLogprobs,
    Usage,
)

__all__ = [
    "Accepted",
    "Account",
    "Admin",
    "AsyncAdmin",
    "AsyncClient",
    "AsyncStream",
    "Balance",
    "Choice",
    "ChoiceEnd",
    "Client",
    "Completed",
    "Completion",
    "Event",
    "FinishReason",
    "JournalEntry",
    "Key",
    "LimitState",
    "Limits",
    "MarginBy",
    "MarginReport",
    "MarginRow",
    "MaxCost",
    "Message",
    "Model",
    "NewKey",
    "Operation",
    "Options",
    "Prices",
    "PromptScored",
    "Queued",
    "Quote",
    "QuotedWindow",
    "Receipt",
    "Refund",
    "RetryPolicy",
    "Reuse",
    "SettledReceipt",
    "SigningKey",
    "Stream",
    "TextChunk",
    "Timing",
    "TokenLogprobs",
    "Unbilled",
    "Usage",
    "UsageBy",
    "UsageRow",
]
