"""Who runs in the next step: one packed prefill chunk, or one token for every running sequence."""

from collections import deque
from dataclasses import dataclass

from tidemill.engine.sequence import Sequence


@dataclass(frozen=True)
class PrefillChunk:
    """Compute positions [start, end) of the sequence's prompt."""

    seq: Sequence
    start: int
    end: int


@dataclass(frozen=True)
class PrefillStep:
    """Chunks of one or more prompts, at most `prefill_chunk_tokens` together."""

    chunks: list[PrefillChunk]


@dataclass(frozen=True)
class DecodeStep:
    """Sequences that each get one more token."""

    seqs: list[Sequence]


class Scheduler:
    """First come, first served in both phases; prefill and decode steps alternate when both wait.

    Not thread-safe: the engine's lock guards it.
    """

    def __init__(self, *, max_batch: int, prefill_chunk_tokens: int) -> None:
        self.max_batch = max_batch
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.prefilling: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.paused: dict[str, Sequence] = {}
        self._last_was_prefill = False

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return bool(self.prefilling or self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence for prefill, or for decode if its prompt is computed."""
        if seq.num_uncomputed_prompt_tokens:
            self.prefilling.append(seq)
        else:
            self.running.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence, wherever it is."""
        if self.paused.pop(seq.seq_id, None) is None:
            (self.prefilling if seq in self.prefilling else self.running).remove(seq)

    def pause(self, seq: Sequence) -> None:
        """Set a running sequence aside until `resume`."""
        self.running.remove(seq)
        self.paused[seq.seq_id] = seq

    def resume(self, seq: Sequence) -> None:
        """Let a paused sequence run again; nothing happens to one that is not paused."""
        if self.paused.pop(seq.seq_id, None) is not None:
            self.running.append(seq)

    def prefill_done(self, seq: Sequence) -> None:
        """Move a sequence whose prompt is computed on to decode."""
        self.prefilling.remove(seq)
        self.running.append(seq)

    def next_step(self) -> PrefillStep | DecodeStep | None:
        """Plan one step; None when nothing can run."""
        if self.prefilling and not (self.running and self._last_was_prefill):
            self._last_was_prefill = True
            return PrefillStep(self._pack_chunks())
        if self.running:
            self._last_was_prefill = False
            return DecodeStep(self.running[: self.max_batch])
        return None

    def _pack_chunks(self) -> list[PrefillChunk]:
        chunks: list[PrefillChunk] = []
        room = self.prefill_chunk_tokens
        for seq in self.prefilling:
            if room == 0:
                break
            start = seq.num_computed_tokens
            end = min(seq.num_prompt_tokens, start + room)
            chunks.append(PrefillChunk(seq, start, end))
            room -= end - start
        return chunks
