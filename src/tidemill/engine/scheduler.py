"""Who runs in the next step: one token for every running sequence, and chunks of prompts."""

from bisect import insort
from dataclasses import dataclass, field

from tidemill.engine.sequence import Sequence
from tidemill.engine.tables import BlockTables


@dataclass(frozen=True)
class PrefillChunk:
    """Compute positions [start, end) of the sequence's prompt."""

    seq: Sequence
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        """Positions to compute."""
        return self.end - self.start

    @property
    def write_start(self) -> int:
        """Latents before this position are there already, perhaps for others too: not written."""
        return max(self.start, self.seq.num_cached_tokens)

    @property
    def completes_prompt(self) -> bool:
        """Whether the first token can be drawn after it."""
        return self.end == self.seq.num_prompt_tokens


@dataclass(frozen=True)
class Step:
    """One forward: each of `decodes` gets one more token, each chunk's positions are computed."""

    decodes: list[Sequence] = field(default_factory=list)
    chunks: list[PrefillChunk] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Rows of the batch."""
        return len(self.decodes) + sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def seq_ids(self) -> list[str]:
        """Whose tokens it computes."""
        return [seq.seq_id for seq in (*self.decodes, *(chunk.seq for chunk in self.chunks))]

    @property
    def longest_context(self) -> int:
        """Most positions that one row attends to."""
        ends = [len(seq.token_ids) for seq in self.decodes] + [chunk.end for chunk in self.chunks]
        return max(ends, default=0)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)


class Scheduler:
    """First come, first served in both phases, within `step_tokens` a step.

    Every running sequence decodes in every step, as far as `max_batch` and its block allow, the
    oldest first; prompts share what is left of the budget, and at least one token of it. When
    blocks run out, paused sequences are swapped out, then the youngest; they come back, the oldest
    first, when there is room again. Not thread-safe: the engine's lock guards it.
    """

    def __init__(self, tables: BlockTables, *, max_batch: int, step_tokens: int) -> None:
        self.max_batch = max_batch
        self.step_tokens = step_tokens
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []
        self.paused: dict[str, Sequence] = {}
        self._tables = tables

    @property
    def has_work(self) -> bool:
        """Whether somebody wants a step, even if no block is free for it now."""
        return bool(self.prefilling or self.running or self._resumable())

    def add(self, seq: Sequence) -> None:
        """Take a sequence on by its state: to prefill, to decode, or to wait for funds."""
        if seq.num_uncomputed_prompt_tokens:
            insort(self.prefilling, seq, key=_age)
        elif seq.is_funded:
            insort(self.running, seq, key=_age)
        else:
            self.paused[seq.seq_id] = seq

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence, wherever it is, or whether it is anywhere yet."""
        if self._tables.is_swapped(seq):
            self._tables.drop(seq)
        else:
            self._leave(seq)

    def pause(self, seq: Sequence) -> None:
        """Set a running sequence aside until `resume`."""
        self.running.remove(seq)
        self.paused[seq.seq_id] = seq

    def resume(self, seq: Sequence) -> None:
        """Let a paused sequence run again; nothing happens to one that is not paused."""
        if self.paused.pop(seq.seq_id, None) is not None:
            self.add(seq)

    def prefill_done(self, seq: Sequence) -> None:
        """Move a sequence whose prompt is computed on to decode."""
        self.prefilling.remove(seq)
        self.add(seq)

    def next_step(self) -> Step:
        """Plan one step; empty when nothing can run now."""
        self._swap_in()
        most = self.step_tokens - 1 if self.prefilling else self.step_tokens
        decodes = self._writable(min(self.max_batch, most))
        return Step(decodes, self._pack_chunks(self.step_tokens - len(decodes)))

    def _writable(self, most: int) -> list[Sequence]:
        """The oldest running sequences, each with a block to write its newest token to."""
        ready: list[Sequence] = []
        for seq in self.running[:most]:
            if self._tables.is_swapped(seq):
                break  # what is left is younger and swapped out as well
            while not self._tables.extend(seq):
                victim = self._yielding()[-1]
                self._swap_out(victim)
                if victim is seq:
                    break
            else:
                ready.append(seq)
        return ready

    def _yielding(self) -> list[Sequence]:
        """Whom to swap out, the last one first: whoever waits for funds, then the youngest.

        Never those whose blocks are handed over while they are computed.
        """
        prefilling = [seq for seq in self.prefilling if not seq.prefill_only]
        paused = sorted(self.paused.values(), key=_age)
        return [*sorted([*self.running, *prefilling], key=_age), *paused]

    def _swap_in(self) -> None:
        for seq in self._resumable():
            yielding = [
                each for each in self._yielding() if each.number > seq.number or not each.is_funded
            ]
            headroom = sum(each.number < seq.number for each in self.running)
            if not self._tables.fits(seq, headroom=headroom, without=yielding):
                return
            while not self._tables.swap_in(seq, headroom=headroom):
                if not yielding:
                    return
                self._swap_out(yielding.pop())
            self.add(seq)

    def _swap_out(self, seq: Sequence) -> None:
        self._leave(seq)
        self._tables.swap_out(seq)

    def _resumable(self) -> list[Sequence]:
        return [seq for seq in self._tables.swapped if seq.is_funded]

    def _pack_chunks(self, room: int) -> list[PrefillChunk]:
        chunks: list[PrefillChunk] = []
        for seq in self.prefilling:
            if room == 0:
                break
            start = seq.num_computed_tokens
            end = min(seq.num_prompt_tokens, start + room)
            chunks.append(PrefillChunk(seq, start, end))
            room -= end - start
        return chunks

    def _leave(self, seq: Sequence) -> None:
        self.paused.pop(seq.seq_id, None)
        for group in (self.prefilling, self.running):
            if seq in group:
                group.remove(seq)


def _age(seq: Sequence) -> int:
    return seq.number
