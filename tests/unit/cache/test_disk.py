import asyncio
import hashlib
import shutil
import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.cache.disk import NUM_READERS, QUEUE_BYTES, DiskTier
from services.cache.disk_files import PAGE_BYTES, BlockFolder, Cause, Header
from services.cache.store import StoredBlock
from tidemill.kv.pieces import sha256

CAPACITY = 5 * PAGE_BYTES
HASHES = [bytes([n]) * 32 for n in range(8)]
NAMESPACES = [b"a" * 32, b"b" * 32]

a_hash = st.sampled_from(HASHES)
a_namespace = st.sampled_from(NAMESPACES)


class Heard:
    """What the tier said about its blocks."""

    def __init__(self) -> None:
        self.held: set[bytes] = set()
        self.faults: Counter[Cause] = Counter()

    def kept(self, header: Header) -> None:
        self.held.add(header.block_hash)

    def lost(self, header: Header) -> None:
        self.held.discard(header.block_hash)

    def fault(self, cause: Cause, number: int = 1) -> None:
        self.faults[cause] += number


def block(namespace: bytes, num_bytes: int) -> StoredBlock:
    payload = hashlib.shake_128(namespace).digest(num_bytes)
    return StoredBlock(namespace, payload, sha256(payload))


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the tier tells nobody
            await asyncio.sleep(0.001)


async def settled(tier: DiskTier) -> None:
    await eventually(lambda: tier.scanned and not tier.num_waiting)


def make_tier(root: Path, heard: Heard, capacity_bytes: int = CAPACITY) -> DiskTier:
    return DiskTier(BlockFolder(root), capacity_bytes, heard, timeout_s=20)


@asynccontextmanager
async def disk_tier(
    root: Path, heard: Heard | None = None, capacity_bytes: int = 1 << 20
) -> AsyncIterator[DiskTier]:
    tier = make_tier(root, heard or Heard(), capacity_bytes)
    await tier.start()
    await settled(tier)
    try:
        yield tier
    finally:
        await tier.close()


async def keep(tier: DiskTier, block_hash: bytes, kept: StoredBlock) -> bool:
    taken = tier.offer(block_hash, kept)
    await settled(tier)
    return taken


class DiskAgainstModel(RuleBasedStateMachine):
    """The model: an ordered dictionary, oldest use first. It knows nothing of restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.root = Path(tempfile.mkdtemp())
        self.model: OrderedDict[bytes, StoredBlock] = OrderedDict()
        self.begin()

    def begin(self) -> None:
        self.heard = Heard()
        self.runner.run(self._begin())

    async def _begin(self) -> None:
        self.tier = make_tier(self.root, self.heard)
        await self.tier.start()
        await settled(self.tier)

    def teardown(self) -> None:
        self.runner.run(self.tier.close())
        self.runner.close()
        shutil.rmtree(self.root)

    def pages(self) -> int:
        return sum(-(-(len(each.payload) + 148) // PAGE_BYTES) for each in self.model.values())

    @rule(key=a_hash, namespace=a_namespace, num_bytes=st.integers(1, CAPACITY + 20))
    def offer(self, key: bytes, namespace: bytes, num_bytes: int) -> None:
        new = block(namespace, num_bytes)
        fits = num_bytes + 148 <= CAPACITY
        assert self.runner.run(keep(self.tier, key, new)) == (key in self.model or fits)
        if key in self.model:
            if self.model[key].namespace == namespace:
                self.model.move_to_end(key)
        elif fits:
            self.model[key] = new
            while self.pages() > CAPACITY // PAGE_BYTES:
                self.model.popitem(last=False)

    @rule(key=a_hash, namespace=a_namespace)
    def read(self, key: bytes, namespace: bytes) -> None:
        held = self.model.get(key)
        mine = held is not None and held.namespace == namespace
        assert self.runner.run(self.tier.read(namespace, key)) == (held if mine else None)

    @rule(chain=st.lists(a_hash, unique=True), namespace=a_namespace)
    def use_chain(self, chain: list[bytes], namespace: bytes) -> None:
        self.tier.touch_chain(namespace, chain)
        for key in reversed(chain):
            if key in self.model and self.model[key].namespace == namespace:
                self.model.move_to_end(key)
        for key in chain:  # only what was read is remembered as used beyond this life
            self.read(key, namespace)

    @rule()
    def restart(self) -> None:
        self.runner.run(self.tier.close())
        self.begin()

    @rule(key=a_hash, damage=st.sampled_from([b"", b"x" * 200]))
    def damage(self, key: bytes, damage: bytes) -> None:
        held = self.model.pop(key, None)
        if held is None:
            return
        (self.root / "v1" / key.hex()[:2] / key.hex()).write_bytes(damage)
        outcome = self.runner.run(self.tier.read(held.namespace, key))
        assert outcome is (Cause.CORRUPT if damage else Cause.TRUNCATED)

    @invariant()
    def agrees(self) -> None:
        self.tier.check_integrity()
        assert [each.block_hash for each in self.tier.headers()] == list(self.model)
        assert self.heard.held == set(self.model)
        assert self.tier.num_bytes == sum(len(each.payload) for each in self.model.values())


TestDiskAgainstModel = DiskAgainstModel.TestCase
TestDiskAgainstModel.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


async def test_all_readers_are_there_from_the_start_so_that_none_looks_like_a_leak(
    tmp_path: Path,
) -> None:
    async with disk_tier(tmp_path):
        names = [each.name for each in threading.enumerate()]
        assert sum(name.startswith("disk-read") for name in names) == NUM_READERS


async def test_a_block_can_be_read_while_it_waits_to_be_written(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        new = block(NAMESPACES[0], 1000)
        assert tier.offer(HASHES[0], new)
        assert tier.peek(NAMESPACES[0], HASHES[0]) is new
        assert tier.peek(NAMESPACES[1], HASHES[0]) is None
        await settled(tier)
        assert isinstance(tier.peek(NAMESPACES[0], HASHES[0]), Header)


async def test_a_full_queue_drops_blocks_and_counts_them(tmp_path: Path) -> None:
    heard = Heard()
    async with disk_tier(tmp_path, heard, capacity_bytes=1 << 30) as tier:
        large = block(NAMESPACES[0], QUEUE_BYTES // 2 - 100)
        assert [tier.offer(each, large) for each in HASHES[:4]] == [True, True, False, False]
        assert heard.faults == {Cause.QUEUE: 2}
        await settled(tier)
        assert heard.held == set(HASHES[:2])


async def test_what_memory_holds_at_the_end_is_written_down_newest_first(tmp_path: Path) -> None:
    heard = Heard()
    tier = make_tier(tmp_path, heard, capacity_bytes=4 * PAGE_BYTES)
    await tier.start()
    await settled(tier)
    await keep(tier, HASHES[7], block(NAMESPACES[0], 1000))
    await keep(tier, HASHES[2], block(NAMESPACES[0], 1000))
    await tier.close([(each, block(NAMESPACES[0], 1000)) for each in HASHES[:5]])
    async with disk_tier(tmp_path, capacity_bytes=4 * PAGE_BYTES) as again:
        assert {each.block_hash for each in again.headers()} == set(HASHES[1:5])


async def test_a_smaller_capacity_lets_the_oldest_go_at_start(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        for each in HASHES:
            await keep(tier, each, block(NAMESPACES[0], 1000))
    async with disk_tier(tmp_path, capacity_bytes=3 * PAGE_BYTES) as tier:
        assert [each.block_hash for each in tier.headers()] == HASHES[-3:]
    assert len(list(tmp_path.glob("v1/*/*"))) == 3


async def test_a_removed_folder_loses_its_blocks_once_and_is_used_again(
    tmp_path: Path,
) -> None:
    heard = Heard()
    async with disk_tier(tmp_path / "d", heard) as tier:
        for each in HASHES[:4]:
            await keep(tier, each, block(NAMESPACES[0], 1000))
        shutil.rmtree(tmp_path / "d")
        assert await tier.read(NAMESPACES[0], HASHES[0]) is Cause.FOLDER
        assert not tier.up
        assert heard.held == set()
        assert heard.faults == {Cause.FOLDER: 1}
        assert await tier.read(NAMESPACES[0], HASHES[1]) is None  # nobody asks the disk
        assert await keep(tier, HASHES[5], block(NAMESPACES[0], 1000))
        await eventually(lambda: tier.peek(NAMESPACES[0], HASHES[5]) is not None)
        assert isinstance(await tier.read(NAMESPACES[0], HASHES[5]), StoredBlock)
        await eventually(lambda: tier.up)
        assert tier.failure is None


async def test_a_disk_that_hangs_is_waited_for_once_and_then_left_alone(tmp_path: Path) -> None:
    heard = Heard()
    tier = DiskTier(BlockFolder(tmp_path), 1 << 20, heard, timeout_s=0.2)
    await tier.start()
    await settled(tier)
    for each in HASHES[:2]:
        await keep(tier, each, block(NAMESPACES[0], 1000))
    hanging = threading.Event()
    for _ in range(NUM_READERS):
        tier._readers.submit(hanging.wait)
    assert await tier.read(NAMESPACES[0], HASHES[0]) is Cause.SLOW
    assert not tier.up
    with pytest.raises(StopIteration) as at_once:  # it waits for nothing
        tier.read(NAMESPACES[0], HASHES[1]).send(None)
    assert at_once.value.value is None
    assert tier.peek(NAMESPACES[0], HASHES[1]) is None
    assert not tier.serves(HASHES[1])  # so it may be stored in memory again
    assert tier.holds(HASHES[1])  # and need not be written again
    assert tier.failure is None
    hanging.set()
    await eventually(lambda: tier.peek(NAMESPACES[0], HASHES[0]) is not None)
    assert isinstance(await tier.read(NAMESPACES[0], HASHES[0]), StoredBlock)
    await tier.close()


async def test_a_surprise_in_the_writer_fails_readiness(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        del tier._folder._partials  # what it needs to write
        tier.offer(HASHES[0], block(NAMESPACES[0], 1000))
        await eventually(lambda: tier.failure is not None)
        assert tier.failure == "the disk tier has failed"
