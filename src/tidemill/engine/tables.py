"""Block tables of the engine's sequences: grown, shared, committed, swapped out and back in."""

from bisect import insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tidemill.blocks import BLOCK_TOKENS, chain_hashes
from tidemill.engine.block_pool import BlockPool
from tidemill.engine.sequence import Sequence
from tidemill.engine.swap import HostBlock, SwapSpace
from tidemill.errors import PoolExhausted


@dataclass(eq=False)
class _Swapped:
    """A sequence without a table. Its pages are device blocks still held, host copies, or None
    where nothing has been computed yet."""

    seq: Sequence
    pages: list["int | HostBlock | None"]


class BlockTables:
    """Who holds which block between submission and the last output.

    Room for one sequence is made at the cost of those without funds and of younger ones: a swapped
    sequence's blocks stay on the device until somebody before it needs them, and move to the swap
    space one by one. A block shared by several swapped sequences moves once, for all of them, and
    comes back so. The engine's lock guards it; the pool may be used from elsewhere meanwhile.
    """

    def __init__(self, pool: BlockPool, swap: SwapSpace) -> None:
        self.pool = pool
        self.swap = swap
        self._swapped: dict[str, _Swapped] = {}
        self._ages: list[Sequence] = []

    @property
    def swapped(self) -> list[Sequence]:
        """Sequences that are swapped out, oldest first."""
        return list(self._ages)

    def is_swapped(self, seq: Sequence) -> bool:
        """Whether the sequence has no table now."""
        return seq.seq_id in self._swapped

    def extend(self, seq: Sequence) -> bool:
        """Let the newest token's latent be written: a block of its own. False: no room now."""
        index = (len(seq.token_ids) - 1) // BLOCK_TOKENS
        if index < len(seq.block_table):
            return self._own(seq, index)
        block = self._obtain(seq)
        if block is None:
            return False
        seq.block_table.append(block)
        return True

    def share(self, seq: Sequence, fork: Sequence) -> None:
        """Give a fork its parent's computed prompt, block by block, without copying any."""
        prompt = seq.block_table[: -(-seq.num_prompt_tokens // BLOCK_TOKENS)]
        self.pool.share(prompt)
        fork.block_table = prompt
        fork.num_computed_tokens = seq.num_prompt_tokens
        num_full = seq.num_prompt_tokens // BLOCK_TOKENS
        fork.num_committed = min(seq.num_committed, num_full)
        fork.block_hashes = seq.block_hashes[: fork.num_committed]

    def commit(self, seq: Sequence) -> None:
        """Make blocks findable whose 64 positions are computed; only where the chain has a root."""
        num_full = seq.num_computed_tokens // BLOCK_TOKENS
        if seq.root is None or num_full <= seq.num_committed:
            return
        known = len(seq.block_hashes)
        tokens = seq.token_ids[known * BLOCK_TOKENS : num_full * BLOCK_TOKENS]
        seq.block_hashes += chain_hashes(seq.block_hashes[-1] if known else seq.root, tokens)
        for index in range(seq.num_committed, num_full):
            self.pool.commit(seq.block_table[index], seq.block_hashes[index], seq.root)
        seq.num_committed = num_full

    def swap_out(self, seq: Sequence) -> None:
        """Take the table away; nothing is copied until the room is needed."""
        num_computed = -(-seq.num_computed_tokens // BLOCK_TOKENS)
        held, unused = seq.block_table[:num_computed], seq.block_table[num_computed:]
        self.pool.release(unused)
        seq.block_table = []
        self._swapped[seq.seq_id] = _Swapped(seq, [*held, *(None for _ in unused)])
        insort(self._ages, seq, key=_age)

    def fits(self, seq: Sequence, *, headroom: int, without: Iterable[Sequence] = ()) -> bool:
        """Whether a swapped sequence could come back, and `headroom` blocks be free beside it.

        At the cost of those swapped that come after it, and of those it would go `without`.
        """
        pages = self._swapped[seq.seq_id].pages
        grows = (len(seq.token_ids) - 1) // BLOCK_TOKENS >= len(pages)
        missing = sum(not isinstance(page, int) for page in pages) + grows
        if self.pool.num_free >= missing + headroom:
            return True
        tables: list[Iterable[int | HostBlock | None]] = [each.block_table for each in without]
        tables += [swapped.pages for swapped in self._after(seq)]
        held = Counter(page for table in tables for page in table if isinstance(page, int))
        movable = sum(self.pool.num_holders(block) == count for block, count in held.items())
        room = self.swap.num_free + sum(isinstance(page, HostBlock) for page in pages)
        return self.pool.num_free + min(movable, room) >= missing + headroom

    def swap_in(self, seq: Sequence, *, headroom: int) -> bool:
        """Give the table back if it `fits`; False, perhaps with some of it brought in, if not."""
        if not self.fits(seq, headroom=headroom):
            return False
        swapped = self._swapped[seq.seq_id]
        pages = swapped.pages
        for index, page in enumerate(pages):
            if not isinstance(page, int) and not self._bring(swapped, index):
                return False
        self._forget(seq)
        seq.block_table = [page for page in pages if isinstance(page, int)]
        if seq.root is not None:
            for block, block_hash in zip(
                seq.block_table[: seq.num_committed], seq.block_hashes, strict=False
            ):
                self.pool.commit(block, block_hash, seq.root)
        return True

    def drop(self, seq: Sequence) -> None:
        """The sequence is over: its table is what it still holds on the device."""
        if seq.seq_id not in self._swapped:
            return
        pages = self._forget(seq).pages
        for page in pages:
            if isinstance(page, HostBlock):
                self.swap.free(page)
        seq.block_table = [page for page in pages if isinstance(page, int)]

    def _forget(self, seq: Sequence) -> _Swapped:
        self._ages.remove(seq)
        return self._swapped.pop(seq.seq_id)

    def _own(self, seq: Sequence, index: int) -> bool:
        """Copy on write: a block that others hold too is left to them."""
        block = seq.block_table[index]
        num_others = self.pool.num_holders(block) - 1
        if num_others == 0:
            return True
        fresh = self._obtain(seq, zeroed=False)
        if fresh is None:
            others = self._holding(block)
            return len(others) == num_others and self._move_out(block, others)
        self.pool.latents[:, fresh] = self.pool.latents[:, block]
        self.pool.release([block])
        seq.block_table[index] = fresh
        return True

    def _obtain(self, seq: Sequence, *, zeroed: bool = True, exchange: bool = False) -> int | None:
        """A block for `seq`, if need be from a swapped sequence that comes after it."""
        while True:
            try:
                return self.pool.allocate(1, zeroed=zeroed)[0]
            except PoolExhausted:
                if not self._spill(seq, exchange=exchange):
                    return None

    def _spill(self, seq: Sequence, *, exchange: bool) -> bool:
        """Free one block on the device that only sequences hold which come after `seq`."""
        for swapped in self._after(seq):
            for index, page in reversed(list(enumerate(swapped.pages))):
                if not isinstance(page, int):
                    continue
                num_holders = self.pool.num_holders(page)
                holding = [(swapped, index)] if num_holders == 1 else self._holding(page, seq)
                if len(holding) == num_holders:
                    return self._move_out(page, holding, exchange=exchange)
        return False

    def _holding(self, block: int, seq: Sequence | None = None) -> list[tuple[_Swapped, int]]:
        """Swapped sequences after `seq` (None: all) that hold a device block, and where."""
        return [
            (swapped, index)
            for swapped in self._after(seq)
            for index, page in enumerate(swapped.pages)
            if page == block
        ]

    def _move_out(
        self, block: int, holding: list[tuple[_Swapped, int]], *, exchange: bool = False
    ) -> bool:
        """Leave a host copy of `block` to these in the block's place; False if none has room."""
        if not self.swap.has_room(exchange=exchange):
            return False
        copy = self.swap.put(self.pool.latents[:, block], holders=len(holding))
        for swapped, index in holding:
            swapped.pages[index] = copy
        self.pool.release([block] * len(holding))
        return True

    def _bring(self, swapped: _Swapped, index: int) -> bool:
        """Put one missing page back on the device, for all that share it."""
        page = swapped.pages[index]
        assert not isinstance(page, int)
        block = self._obtain(swapped.seq, zeroed=page is None, exchange=page is not None)
        if block is None:
            return False
        swapped.pages[index] = block
        if page is None:
            return True
        self.pool.write_block(block, self.swap.read(page))
        self.swap.free(page)
        others = [other for other in self._swapped.values() if page in other.pages]
        for other in others:
            other.pages[other.pages.index(page)] = block
            self.pool.share([block])
            self.swap.free(page)
        return True

    def _after(self, seq: Sequence | None) -> list[_Swapped]:
        """Swapped sequences that make way for `seq` (None: all), the first to do so first.

        Those that could not run for want of funds, whatever their age, then those younger.
        """
        after = [
            each
            for each in reversed(self._ages)
            if seq is None or not each.is_funded or each.number > seq.number
        ]
        after.sort(key=lambda each: each.is_funded)
        return [self._swapped[each.seq_id] for each in after if each is not seq]


def _age(seq: Sequence) -> int:
    return seq.number
