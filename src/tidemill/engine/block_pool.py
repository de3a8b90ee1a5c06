"""Paged latents of one worker and who holds which block. Thread-safe: one lock, short sections."""

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from tidemill.blocks import BLOCK_TOKENS
from tidemill.engine.host_tier import HostTier
from tidemill.engine.reservation import Found, Move, OnChange, PoolTier, Reservation
from tidemill.errors import PoolCorrupted, PoolExhausted


class BlockPool:
    """Blocks of 64 positions, all layers: free, referenced (by one or more), or evictable.

    A block whose content is final may be committed under its chain hash. Once nobody references
    it, a committed block stays findable, and is evicted, least recently used first, when
    `allocate` runs out of free ones. With a host tier an evicted block's bytes move there, and a
    chain that is claimed continues from there. Releasing what one does not hold raises
    PoolCorrupted.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        latent_dim: int,
        dtype: torch.dtype,
        device: str = "cpu",
        host_blocks: int = 0,
    ) -> None:
        self.num_blocks = num_blocks
        self.latents: Tensor = torch.zeros(
            num_layers, num_blocks, BLOCK_TOKENS, latent_dim, dtype=dtype, device=device
        )
        self._host = HostTier(
            num_blocks=host_blocks, num_layers=num_layers, latent_dim=latent_dim, dtype=dtype
        )
        self._lock = threading.Lock()
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._root_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._on_change: OnChange | None = None

    def listen(self, on_change: OnChange) -> None:
        """From now on tell `on_change`, the only listener, which blocks come and go."""
        with self._lock:
            self._on_change = self._host.on_change = on_change

    def findable(self) -> dict[PoolTier, list[bytes]]:
        """Hashes of all blocks that can be found, by tier; some may be in both."""
        with self._lock:
            return {PoolTier.DEVICE: list(self._block_of), PoolTier.HOST: self._host.hashes()}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out now, evictable ones included."""
        with self._lock:
            return len(self._free) + len(self._evictable)

    @property
    def num_referenced(self) -> int:
        """Blocks that somebody holds."""
        with self._lock:
            return self.num_blocks - len(self._free) - len(self._evictable)

    @property
    def num_host_blocks(self) -> int:
        """Blocks that the host tier has room for; 0: there is none."""
        return self._host.num_blocks

    @property
    def num_host_free(self) -> int:
        """Of those, free or evictable ones."""
        with self._lock:
            return self._host.num_free

    @property
    def num_host_held(self) -> int:
        """Blocks that can be found in the host tier."""
        with self._lock:
            return len(self._host)

    def allocate(self, n: int, *, zeroed: bool = True) -> list[int]:
        """Take n blocks, each referenced once; PoolExhausted, with nothing taken, if too few.

        They come zeroed: nothing of an earlier owner, not even a NaN, outlives its release. Who
        overwrites them whole before anyone reads them may go without.
        """
        reservation = self.reserve((), n)
        if not zeroed:
            reservation.fresh.clear()
        self.settle(reservation)
        return reservation.block_table

    def claim(self, hashes: Sequence[bytes]) -> list[int]:
        """Reference the longest held start of the chain; returns its blocks, perhaps none.

        What the host tier holds of it comes to the device, as far as there is room.
        """
        reservation = self.reserve_held(hashes)
        self.settle(reservation)
        return reservation.block_table

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many blocks of the chain's start are held, on the device or in the host tier."""
        return len(self.locate(hashes))

    def locate(self, hashes: Sequence[bytes], *, root: bytes | None = None) -> list[PoolTier]:
        """Where the held start of the chain lies; only blocks under `root`, if given."""
        with self._lock:
            return [found.tier for found in self._walk(hashes, root)]

    def gap(self, hashes: Sequence[bytes]) -> int:
        """How many blocks of the chain are missing before the first that is held, or the end."""
        with self._lock:
            held = (
                index
                for index, block_hash in enumerate(hashes)
                if block_hash in self._block_of or block_hash in self._host
            )
            return next(held, len(hashes))

    def reserve(self, hashes: Sequence[bytes], num_blocks: int) -> Reservation:
        """Claim the held start of `hashes` and take fresh blocks up to `num_blocks` in all.

        PoolExhausted, with nothing taken, if there are too few. Only the books change here, so it
        is quick; the bytes follow in `settle`, and until then no block but those that lay on the
        device may be read or written.
        """
        with self._lock:
            found = self._walk(hashes[:num_blocks])
            available, wanted = self._room_beside(found), num_blocks - _num_on_device(found)
            if wanted > available:
                raise PoolExhausted(
                    f"{wanted} blocks wanted, {available} of {self.num_blocks} free"
                )
            return self._take(found, num_blocks)

    def reserve_held(self, hashes: Sequence[bytes]) -> Reservation:
        """`reserve` of no more than the held start, cut where blocks to promote it to run out."""
        with self._lock:
            found = self._walk(hashes)
            while len(found) - _num_on_device(found) > self._room_beside(found):
                found.pop()
            return self._take(found, len(found))

    def settle(self, reservation: Reservation) -> None:
        """Move the bytes that a reservation owes. For a thread when it may be many."""
        for move in reservation.demoted:
            self._host.latents[move.slot].copy_(self.latents[:, move.block])
        if reservation.fresh:
            self.latents[:, reservation.fresh] = 0
        for move in reservation.promoted:
            self.latents[:, move.block].copy_(self._host.latents[move.slot])
        with self._lock:
            for move in reservation.demoted:
                self._host.keep(move.slot, move.block_hash, move.root)
            for move in reversed(reservation.promoted):
                self._host.unpin(move.block_hash)
                self._commit(move.block, move.block_hash, move.root)
            reservation.fresh, reservation.demoted, reservation.promoted = [], [], []

    def cancel(self, reservation: Reservation) -> None:
        """Drop the moves that are due, if any; the blocks stay the holder's, to be released."""
        with self._lock:
            for move in reservation.demoted:
                self._host.drop(move.slot)
            for move in reversed(reservation.promoted):
                self._host.unpin(move.block_hash)
            reservation.fresh, reservation.demoted, reservation.promoted = [], [], []

    def release(self, block_ids: Sequence[int]) -> None:
        """Give up one reference to each block, in chain order: a chain's tail is evicted first."""
        with self._lock:
            for block in reversed(block_ids):
                if not 0 <= block < self.num_blocks or self._references[block] == 0:
                    raise PoolCorrupted(f"block {block} is released but not referenced")
                self._references[block] -= 1
                if self._references[block]:
                    continue
                if block in self._hash_of:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def share(self, block_ids: Sequence[int]) -> None:
        """Reference held blocks once more each."""
        with self._lock:
            for block in block_ids:
                if self._references[block] == 0:
                    raise PoolCorrupted(f"block {block} is shared but not referenced")
                self._references[block] += 1

    def num_holders(self, block_id: int) -> int:
        """References to a block, those of passing readers included."""
        with self._lock:
            return self._references[block_id]

    def commit(self, block_id: int, block_hash: bytes, root: bytes = b"") -> None:
        """Make a referenced block findable: its 64 positions are final and `block_hash` names them.

        `root` is what the chain hangs on; blocks without one are not for other workers. A no-op
        if another block already holds that hash.
        """
        with self._lock:
            self._commit(block_id, block_hash, root)

    def read_committed(self, block_hash: bytes, root: bytes | None = None) -> Tensor | None:
        """Copy of a findable block [num_layers, 64, latent_dim], wherever it lies; else None.

        With `root`, only a block that was committed under it.
        """
        with self._lock:
            held = self._walk([block_hash], root)
            if not held:
                return None
            block = held[0].block
            if block is None:
                slot = self._host.pin(block_hash)
            else:
                self._reference(block)
        if block is not None:
            values = self.read_block(block)
            self.release([block])
            return values
        values = self._host.latents[slot].clone()
        with self._lock:
            self._host.unpin(block_hash)
        return values

    def read(self, layer: int, block_table: Sequence[int], start: int, end: int) -> Tensor:
        """Copy of one layer's latents at positions [start, end): [end - start, latent_dim]."""
        rows = self._rows(block_table, start, end)
        return self.latents[layer].view(-1, self.latents.shape[-1]).index_select(0, rows)

    def write(self, layer: int, block_table: Sequence[int], start: int, values: Tensor) -> None:
        """Store values [n, latent_dim] at positions [start, start + n) of one layer."""
        rows = self._rows(block_table, start, start + len(values))
        self.latents[layer].view(-1, self.latents.shape[-1]).index_copy_(0, rows, values)

    def read_block(self, block_id: int) -> Tensor:
        """Copy of one block over all layers: [num_layers, 64, latent_dim]."""
        return self.latents[:, block_id].clone()

    def write_block(self, block_id: int, values: Tensor) -> None:
        """Store [num_layers, 64, latent_dim] into one block."""
        self.latents[:, block_id].copy_(values)

    def check_idle(self) -> None:
        """`check_integrity`, and PoolCorrupted if anything is held, as nothing is when idle."""
        self.check_integrity()
        if held := self.num_referenced:
            raise PoolCorrupted(f"{held} blocks are held while idle")
        with self._lock:
            if busy := self._host.num_busy:
                raise PoolCorrupted(f"{busy} host blocks are held while idle")

    def check_integrity(self) -> None:
        """Raise PoolCorrupted unless every block is in exactly one state and the index is sound."""
        with self._lock:
            free = set(self._free)
            if len(free) != len(self._free):
                raise PoolCorrupted("a block is free twice")
            for block in range(self.num_blocks):
                states = (
                    (block in free) + (block in self._evictable) + (self._references[block] > 0)
                )
                if states != 1 or self._references[block] < 0:
                    raise PoolCorrupted(
                        f"block {block} is in {states} states: free={block in free}, evictable="
                        f"{block in self._evictable}, references={self._references[block]}"
                    )
            for block in self._evictable:
                if block not in self._hash_of:
                    raise PoolCorrupted(f"block {block} is evictable but not committed")
            if any(block in self._hash_of for block in free):
                raise PoolCorrupted("a free block is still committed")
            if {block: key for key, block in self._block_of.items()} != self._hash_of:
                raise PoolCorrupted("the hash index and the blocks disagree")
            if self._root_of.keys() != self._hash_of.keys():
                raise PoolCorrupted("the roots and the committed blocks disagree")
            self._host.check_integrity()

    def _walk(self, hashes: Sequence[bytes], root: bytes | None = None) -> list[Found]:
        """The chain's held start."""
        found: list[Found] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is not None:
                known = self._root_of[block]
            elif block_hash in self._host:
                _, known = self._host.where(block_hash)
            else:
                break
            if root is not None and known != root:
                break
            found.append(Found(block_hash, block))
        return found

    def _room_beside(self, found: Sequence[Found]) -> int:
        """Blocks that could be taken once the found ones are referenced."""
        claimed = sum(each.block in self._evictable for each in found)
        return len(self._free) + len(self._evictable) - claimed

    def _take(self, found: Sequence[Found], num_blocks: int) -> Reservation:
        """Reference what was found, and take fresh blocks: to promote to, and up to num_blocks."""
        for each in found:  # all of them before any eviction
            if each.block is not None:
                self._reference(each.block)
            else:
                self._host.pin(each.block_hash)
        taken = Reservation([], [each.tier for each in found], [])
        for each in found:
            block = each.block
            if block is None:
                block = self._take_free(taken)
                slot, root = self._host.where(each.block_hash)
                taken.promoted.append(Move(block, slot, each.block_hash, root))
            taken.block_table.append(block)
        taken.fresh = [self._take_free(taken) for _ in range(num_blocks - len(found))]
        taken.block_table += taken.fresh
        return taken

    def _take_free(self, reservation: Reservation) -> int:
        if not self._free:
            self._evict_oldest(reservation)
        block = self._free.pop()
        self._references[block] = 1
        return block

    def _reference(self, block: int) -> None:
        self._references[block] += 1
        self._evictable.pop(block, None)

    def _commit(self, block_id: int, block_hash: bytes, root: bytes) -> None:
        if self._references[block_id] == 0:
            raise PoolCorrupted(f"block {block_id} is committed but not referenced")
        held = self._hash_of.get(block_id)
        if held is not None and held != block_hash:
            raise PoolCorrupted(f"block {block_id} is committed under two hashes")
        if block_hash not in self._block_of:
            self._hash_of[block_id] = block_hash
            self._root_of[block_id] = root
            self._block_of[block_hash] = block_id
            if self._on_change is not None:
                self._on_change(PoolTier.DEVICE, block_hash, True)

    def _evict_oldest(self, reservation: Reservation) -> None:
        """Forget the least recently used block; the host tier gets its bytes in `settle`."""
        block, _ = self._evictable.popitem(last=False)
        block_hash, root = self._hash_of.pop(block), self._root_of.pop(block)
        del self._block_of[block_hash]
        self._free.append(block)
        if self._on_change is not None:
            self._on_change(PoolTier.DEVICE, block_hash, False)
        if block_hash in self._host:
            self._host.touch(block_hash)
        elif (slot := self._host.reserve()) is not None:
            reservation.demoted.append(Move(block, slot, block_hash, root))

    def _rows(self, block_table: Sequence[int], start: int, end: int) -> Tensor:
        positions = torch.arange(start, end)
        blocks = torch.tensor(block_table, dtype=torch.int64)
        rows = blocks[positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS
        return rows.to(self.latents.device)


def _num_on_device(found: Sequence[Found]) -> int:
    return sum(each.block is not None for each in found)
