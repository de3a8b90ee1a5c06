"""Block payloads in memory, bounded in bytes, least recently used first to go."""

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

_DOMAIN = b"tidemill.cache.namespace.v1"


def namespace_digest(cache_scope: bytes, layout_fingerprint: bytes) -> bytes:
    """Who may read a block [32 bytes], in a form that gives the scope's salt away to nobody."""
    digest = hashlib.sha256(_DOMAIN)
    for part in (cache_scope, layout_fingerprint):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


@dataclass(frozen=True)
class StoredBlock:
    """A whole payload, and what it must hash to whenever it is delivered."""

    namespace: bytes
    payload: bytes
    payload_sha256: bytes


@dataclass(frozen=True)
class Put:
    """Whether a block was taken, and the hashes and blocks that had to go."""

    taken: bool
    evicted: tuple[tuple[bytes, StoredBlock], ...] = ()


class BlockStore:
    """Whole blocks by hash. For one event loop: no method suspends, so none is seen half done.

    A block is found only under the namespace that stored it. Whoever puts a block in has
    compared its checksum; whoever delivers one compares it again.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.num_bytes = 0
        self.num_evicted = 0
        self._blocks: OrderedDict[bytes, StoredBlock] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._blocks

    def __iter__(self) -> Iterator[tuple[bytes, StoredBlock]]:
        """All blocks as they are now, the one used longest ago first."""
        return iter(list(self._blocks.items()))

    def fits(self, num_bytes: int) -> bool:
        """Whether a payload of that size can ever be held."""
        return num_bytes <= self.capacity_bytes

    def peek(self, namespace: bytes, block_hash: bytes) -> StoredBlock | None:
        """The block if this namespace stored it, without counting as a use."""
        block = self._blocks.get(block_hash)
        return block if block is not None and block.namespace == namespace else None

    def get(self, namespace: bytes, block_hash: bytes) -> StoredBlock | None:
        """The block if this namespace stored it, now the most recently used."""
        block = self.peek(namespace, block_hash)
        if block is not None:
            self._blocks.move_to_end(block_hash)
        return block

    def put(self, block_hash: bytes, block: StoredBlock, *, spare: Collection[bytes] = ()) -> Put:
        """Hold a block, letting others go for it.

        Not taken: a hash that is held already, by whichever namespace; a payload larger than the
        whole store; a block for which one of `spare` would have to go next.
        """
        if block_hash in self._blocks or not self.fits(len(block.payload)):
            return Put(taken=False)
        evicted = []
        taken = True
        while self.num_bytes + len(block.payload) > self.capacity_bytes:
            oldest = next(iter(self._blocks))
            if oldest in spare:
                taken = False
                break
            gone = self._blocks.pop(oldest)
            self.num_bytes -= len(gone.payload)
            evicted.append((oldest, gone))
        if taken:
            self._blocks[block_hash] = block
            self.num_bytes += len(block.payload)
        self.num_evicted += len(evicted)
        return Put(taken, tuple(evicted))

    def touch_chain(self, namespace: bytes, block_hashes: Sequence[bytes]) -> None:
        """Count a chain's held blocks as used now, its end first to go: an end without its start
        is of no use to anybody.
        """
        for block_hash in reversed(block_hashes):
            self.get(namespace, block_hash)

    def drop(self, block_hash: bytes, block: StoredBlock) -> bool:
        """Forget this very block; False if it is gone, or another took its place."""
        if self._blocks.get(block_hash) is not block:
            return False
        del self._blocks[block_hash]
        self.num_bytes -= len(block.payload)
        return True

    def check_integrity(self) -> None:
        """Raises AssertionError unless the sizes add up and the bound holds."""
        total = sum(len(block.payload) for block in self._blocks.values())
        assert self.num_bytes == total <= self.capacity_bytes
