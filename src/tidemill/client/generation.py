"""The two ways to ask for a completion, and what is known of one on its way.

Both stacks share these: where the sync client returns a Completion or a Stream, the asyncio
client returns an awaitable of one.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, Literal, TypeVar, Unpack, overload

from tidemill.client.exchange import Exchange
from tidemill.client.request import (
    Conversation,
    Options,
    Prepared,
    prepare_chat,
    prepare_prompt,
)
from tidemill.client.types import Accepted, Choice, Completed, Usage

CompletionT = TypeVar("CompletionT")
StreamT = TypeVar("StreamT")


class Generation(ABC, Generic[CompletionT, StreamT]):
    """`generate` and `chat`; see Options for what both take beside their prompt.

    With `stream` they return once the request has a place in the queue, else once it is complete.
    InvalidRequest, before anything is sent, where a value cannot even be written down; all other
    judgement is the router's.
    """

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        model: str,
        token_ids: Sequence[int] | None = None,
        stream: Literal[False] = False,
        **options: Unpack[Options],
    ) -> CompletionT: ...
    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        model: str,
        token_ids: Sequence[int] | None = None,
        stream: Literal[True],
        **options: Unpack[Options],
    ) -> StreamT: ...
    def generate(
        self,
        prompt: str | None = None,
        *,
        model: str,
        token_ids: Sequence[int] | None = None,
        stream: bool = False,
        **options: Unpack[Options],
    ) -> CompletionT | StreamT:
        """Continue a prompt, given as text or as token ids of the model's vocabulary."""
        prepared = prepare_prompt(model, prompt, token_ids, options)
        return self._stream(prepared) if stream else self._complete(prepared)

    @overload
    def chat(
        self,
        messages: Conversation,
        *,
        model: str,
        stream: Literal[False] = False,
        **options: Unpack[Options],
    ) -> CompletionT: ...
    @overload
    def chat(
        self,
        messages: Conversation,
        *,
        model: str,
        stream: Literal[True],
        **options: Unpack[Options],
    ) -> StreamT: ...
    def chat(
        self,
        messages: Conversation,
        *,
        model: str,
        stream: bool = False,
        **options: Unpack[Options],
    ) -> CompletionT | StreamT:
        """Answer a conversation: Message objects, {"role", "content"} dicts, or one question."""
        prepared = prepare_chat(model, messages, options)
        return self._stream(prepared) if stream else self._complete(prepared)

    @abstractmethod
    def _stream(self, prepared: Prepared) -> StreamT:
        """Send the request, again where that is safe, until it is accepted."""

    @abstractmethod
    def _complete(self, prepared: Prepared) -> CompletionT:
        """Send the request and read its stream to the end."""


class Progress:
    """What is known of a completion on its way."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self._exchange.request_id

    @property
    def accepted(self) -> Accepted | None:
        """The first event: the place in the queue that the request was given."""
        return self._exchange.accepted

    @property
    def completed(self) -> Completed | None:
        """The last event, once it has come."""
        return self._exchange.completed

    @property
    def text(self) -> str:
        """Answer text so far, of the first choice."""
        return self._exchange.text

    @property
    def reasoning(self) -> str:
        """Reasoning text so far, of the first choice."""
        return self._exchange.reasoning

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Completion tokens so far, of the first choice."""
        return self._exchange.token_ids

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All choices as far as they have come."""
        return self._exchange.choices

    @property
    def usage(self) -> Usage:
        """Usage so far: what a broken stream still tells of its cost."""
        return self._exchange.usage

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the first attempt's sending to the first token here; None before it."""
        return self._exchange.ttft_s
