"""One request and what its customer does about the answer."""

import time
from collections.abc import Callable
from random import Random

from loadtest.checks import check
from loadtest.records import Asked, Behaviour, End
from loadtest.scenarios import Question
from tidemill.client import Accepted, Client, Completed, TextChunk
from tidemill.client.sync import Stream
from tidemill.errors import (
    ReceiptError,
    RequestInProgress,
    ResourceExhausted,
    TidemillError,
    UsageError,
)

TIMEOUT_S = 120.0  # one call
_PAUSE_S = 0.2  # of one who reads slowly, after each message
_MOST_PAUSES_S = 10.0
_PATIENCE_S = 30.0  # of one who asks again while the first call still ends
_AGAIN_S = 0.2


class Customer:
    """Asks one question and fills in `asked`; `clock` is seconds since the run's start."""

    def __init__(
        self,
        client: Client,
        asked: Asked,
        question: Question,
        *,
        model: str,
        rng: Random,
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._model = model
        self._question = question
        self._asked = asked
        self._clock = clock
        leaves = asked.behaviour in (Behaviour.CANCELS, Behaviour.HANGS_UP)
        if asked.behaviour is Behaviour.ASKS_AGAIN:
            leaves = rng.random() < 0.5
        self._leave_at = rng.randrange(question.max_tokens + 1) if leaves else None

    def run(self) -> str:
        """Ask, and ask again if that is the custom; the answer's text.

        Raises TidemillError as the SDK does, and UsageError or ReceiptError where what came
        cannot be true.
        """
        asked = self._asked
        try:
            text = self._call(self._leave_at)
            if asked.behaviour is Behaviour.ASKS_AGAIN:
                text = self._again() or text
        except ResourceExhausted:
            asked.end = End.FAILED if asked.prompt_tokens else End.REFUSED
            raise
        finally:
            asked.ended_s = self._clock()
        return text

    def _again(self) -> str:
        give_up_at = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return self._call(None)
            except RequestInProgress as error:
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(error.retry_after_s or _AGAIN_S)

    def _call(self, leave_at: int | None) -> str:
        stream = self._client.chat(
            self._question.messages,
            model=self._model,
            stream=True,
            max_tokens=self._question.max_tokens,
            request_id=self._asked.request_id,
            timeout=TIMEOUT_S,
        )
        with stream:
            try:
                self._read(stream, leave_at)
            finally:
                self._asked.received_tokens = max(
                    self._asked.received_tokens, len(stream.token_ids)
                )
        if stream.completed is None:
            self._asked.end = End.HUNG_UP
        else:
            self._take(stream, stream.completed)
        return stream.text

    def _read(self, stream: Stream, leave_at: int | None) -> None:
        paused_s, last = 0.0, None
        for event in stream:
            if isinstance(event, Accepted):
                self._asked.prompt_tokens = event.prompt_tokens
                self._asked.times_accepted += 1
            if isinstance(event, TextChunk) and event.token_ids:
                now = time.monotonic()
                if last is not None:
                    self._asked.gaps_s.append(now - last)
                last = now
            due = leave_at is not None and len(stream.token_ids) >= leave_at
            if due and isinstance(event, Accepted | TextChunk):
                leave_at = None
                if self._asked.behaviour is not Behaviour.CANCELS:
                    return
                stream.cancel()
            if self._asked.behaviour is Behaviour.READS_SLOWLY and paused_s < _MOST_PAUSES_S:
                time.sleep(_PAUSE_S)
                paused_s += _PAUSE_S

    def _take(self, stream: Stream, completed: Completed) -> None:
        """The end has come, with its bill."""
        asked = self._asked
        asked.end = End.WHOLE
        asked.usage = completed.usage
        asked.ttft_s = asked.ttft_s or stream.ttft_s
        if completed.receipt is not None:
            asked.receipts.append(completed.receipt)
        replayed = stream.accepted is None
        if not replayed:
            check(stream, completed)
        elif completed.receipt is None:
            raise ReceiptError("the answer came again without its receipt")
        else:
            completed.usage.check()


def failure(asked: Asked, error: TidemillError) -> str:
    """One line for people."""
    name = "" if isinstance(error, UsageError | ReceiptError) else f"{error.reason}: "
    return f"{name}{error} (request {asked.request_id}, {asked.behaviour})"
