"""The router's guess at which worker still holds which blocks, from what it sent where."""

from collections import OrderedDict
from collections.abc import Sequence


class PrefixAffinity:
    """A bounded map from block hash to the workers that computed it.

    A guess: workers evict without telling, so a wrong overlap costs a recompute and nothing
    else. At most `max_blocks` hashes are kept, the least recently recorded go first, and of one
    prompt its end before its beginning.
    """

    def __init__(self, max_blocks: int = 1_000_000) -> None:
        if max_blocks < 1:
            raise ValueError(f"max_blocks must be at least 1, got {max_blocks}")
        self._max_blocks = max_blocks
        self._holders: OrderedDict[bytes, set[str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def record(self, worker_id: str, hashes: Sequence[bytes]) -> None:
        """Note that the worker computed or fetched the chain `hashes`, from block 0 on."""
        for block_hash in reversed(hashes):
            self._holders.setdefault(block_hash, set()).add(worker_id)
            self._holders.move_to_end(block_hash)
        while len(self._holders) > self._max_blocks:
            self._holders.popitem(last=False)

    def overlap(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """Leading blocks of the chain that each worker holds; workers with none are left out."""
        counts: dict[str, int] = {}
        for length, block_hash in enumerate(hashes, start=1):
            # A block outlives those that follow it, so who holds it holds all before it.
            holders = self._holders.get(block_hash)
            if not holders:
                break
            counts.update(dict.fromkeys(holders, length))
        return counts

    def forget(self, worker_id: str) -> None:
        """Drop a worker that is gone or restarted empty; O(blocks), as restarts are rare."""
        for block_hash, holders in list(self._holders.items()):
            holders.discard(worker_id)
            if not holders:
                del self._holders[block_hash]
