"""What a worker answers to one attempt, put in order: its call's words and its channel's chunks."""

from collections import deque
from collections.abc import Callable

from services.router.reports import Report, ReportReader
from services.router.tally import Ended
from tidemill.api.decode.v1 import decode_service_pb2 as decode_pb2

Take = Callable[[Report], None]


class Answers:
    """Hands `take` each report when its turn has come.

    Neither stream waits for the other: chunks may come before PrefillDone, and the end of a choice
    or of the attempt before the last of its tokens, which it counts. Of an attempt that is not
    `routed` all comes in its call, in order.
    """

    def __init__(self, reader: ReportReader, take: Take, *, routed: bool) -> None:
        self.ended: Ended | None = None
        self._reader = reader
        self._take = take
        self._routed = routed
        self._words: deque[decode_pb2.DecodeResponse] = deque()
        self._chunks: deque[decode_pb2.Chunk] = deque()

    def word(self, response: decode_pb2.DecodeResponse) -> None:
        """From the call. Raises Internal `WORKER_FAULT` for what cannot be true."""
        self._words.append(response)
        self._go_on()

    def chunk(self, chunk: decode_pb2.Chunk) -> None:
        """From the channel. Raises as `word` does."""
        if not self._reader.prefilled:
            self._chunks.append(chunk)
            return
        self._take(self._reader.generated(chunk))
        if self._words:
            self._go_on()

    def give_up(self) -> bool:
        """No chunk comes any more; returns whether any was waited for.

        Of the words that wait only Final is still true.
        """
        words, self._words = self._words, deque()
        for response in words:
            if response.HasField("final"):
                self._read(response)
        return bool(words)

    def _go_on(self) -> None:
        while self._words and (not self._routed or self._reader.is_due(self._words[0])):
            self._read(self._words.popleft())
            while self._chunks and self._reader.prefilled:
                self._take(self._reader.generated(self._chunks.popleft()))

    def _read(self, response: decode_pb2.DecodeResponse) -> None:
        report = self._reader.read(response)
        if isinstance(report, Ended):
            self.ended = report
        self._take(report)
