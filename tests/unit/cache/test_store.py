from collections import OrderedDict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.cache.store import BlockStore, StoredBlock, namespace_digest
from tidemill.kv.pieces import sha256

CAPACITY = 100
HASHES = [bytes([n]) * 32 for n in range(8)]
NAMESPACES = [b"a" * 32, b"b" * 32]

a_hash = st.sampled_from(HASHES)
a_namespace = st.sampled_from(NAMESPACES)


def block(namespace: bytes, num_bytes: int) -> StoredBlock:
    payload = bytes(num_bytes)
    return StoredBlock(namespace, payload, sha256(payload))


class StoreAgainstModel(RuleBasedStateMachine):
    """The model: an ordered dictionary, oldest use first, and nothing clever."""

    def __init__(self) -> None:
        super().__init__()
        self.store = BlockStore(CAPACITY)
        self.model: OrderedDict[bytes, StoredBlock] = OrderedDict()

    @rule(key=a_hash, namespace=a_namespace, num_bytes=st.integers(1, CAPACITY + 20))
    def put(self, key: bytes, namespace: bytes, num_bytes: int) -> None:
        new = block(namespace, num_bytes)
        put = self.store.put(key, new)
        taken = key not in self.model and num_bytes <= CAPACITY
        gone = []
        if taken:
            self.model[key] = new
            while sum(len(each.payload) for each in self.model.values()) > CAPACITY:
                gone.append(self.model.popitem(last=False))
        assert (put.taken, list(put.evicted)) == (taken, gone)

    @rule(key=a_hash, namespace=a_namespace)
    def get(self, key: bytes, namespace: bytes) -> None:
        expected = self.model.get(key)
        if expected is not None and expected.namespace != namespace:
            expected = None
        assert self.store.get(namespace, key) is expected
        if expected is not None:
            self.model.move_to_end(key)

    @rule(key=a_hash, namespace=a_namespace)
    def peek(self, key: bytes, namespace: bytes) -> None:
        held = self.model.get(key)
        mine = held is not None and held.namespace == namespace
        assert self.store.peek(namespace, key) is (held if mine else None)

    @rule(key=a_hash)
    def drop(self, key: bytes) -> None:
        held = self.model.get(key)
        assert not self.store.drop(key, block(NAMESPACES[0], 1))
        if held is not None:
            assert self.store.drop(key, held)
            del self.model[key]

    @rule(chain=st.lists(a_hash, unique=True), namespace=a_namespace)
    def touch_chain(self, chain: list[bytes], namespace: bytes) -> None:
        self.store.touch_chain(namespace, chain)
        for key in reversed(chain):
            if key in self.model and self.model[key].namespace == namespace:
                self.model.move_to_end(key)

    @invariant()
    def agrees(self) -> None:
        self.store.check_integrity()
        assert list(self.store) == list(self.model.items())
        assert self.store.num_bytes == sum(len(each.payload) for each in self.model.values())


TestStoreAgainstModel = StoreAgainstModel.TestCase
TestStoreAgainstModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_spared_block_does_not_go_for_another() -> None:
    store = BlockStore(CAPACITY)
    old, head, new = HASHES[:3]
    for key in (old, head):
        store.put(key, block(NAMESPACES[0], 40))
    put = store.put(new, block(NAMESPACES[0], 90), spare={head})
    assert (put.taken, [key for key, _ in put.evicted]) == (False, [old])
    assert head in store
    assert new not in store


def test_namespace_digest_depends_on_both_parts_and_their_border() -> None:
    digests = {
        namespace_digest(scope, layout)
        for scope, layout in [(b"ab", b"c"), (b"a", b"bc"), (b"ab", b"d"), (b"", b"abc")]
    }
    assert len(digests) == 4
