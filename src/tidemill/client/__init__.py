"""The SDK: call a Tidemill router from Python.

>>> from tidemill.client import Client
>>> with Client("127.0.0.1:7443", api_key="tm_...", ca="ca.pem") as client:
...     answer = client.chat("What does itertools.chain do?", model="demo", max_tokens=64)
...     print(answer.text, answer.usage.cache_hit_tokens, answer.receipt.amount)

Its errors are those of tidemill.errors.
"""

from tidemill.billing import Prices, Reuse, Unbilled
from tidemill.client.aio import AsyncAdmin, AsyncClient, AsyncStream
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
    "Admin",
    "AsyncAdmin",
    "AsyncClient",
    "AsyncStream",
    "Choice",
    "ChoiceEnd",
    "Client",
    "Completed",
    "Completion",
    "Event",
    "FinishReason",
    "Key",
    "MaxCost",
    "Message",
    "Model",
    "NewKey",
    "Options",
    "Prices",
    "PromptScored",
    "Queued",
    "Receipt",
    "RetryPolicy",
    "Reuse",
    "Stream",
    "TextChunk",
    "Timing",
    "TokenLogprobs",
    "Unbilled",
    "Usage",
]
