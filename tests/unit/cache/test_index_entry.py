import pytest

from services.cache.config import CacheConfig
from services.cache.index import Entry, Node
from tidemill.config import load
from tidemill.errors import ConfigError


def test_an_entry_survives_packing() -> None:
    entry = Entry(b"n" * 32, 4_497_408, 1, 1_700_000_000_000, Node("cache-0", 17).mark)
    assert Entry.unpack(entry.pack()) == entry
    assert entry.pack().endswith(Node("cache-0", 17).mark)


@pytest.mark.parametrize("packed", [b"", b"\x01", b"\x02" + bytes(80), b"\x01" + bytes(45)])
def test_an_entry_of_another_form_is_no_entry(packed: bytes) -> None:
    assert Entry.unpack(packed) is None


def test_marks_of_two_lives_differ() -> None:
    marks = {Node("a", 1).mark, Node("a", 2).mark, Node("b", 1).mark}
    assert len(marks) == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CAPACITY_BYTES", "0"),
        ("MAX_BLOCK_BYTES", "536870912"),
        ("NODE_ID", "x" * 65),
        ("REDIS_TIMEOUT_S", "0"),
        ("ENTRY_TTL_S", "nan"),
        ("CAPACITY", "5"),
    ],
)
def test_bad_settings_are_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"(?i){name}"):
        load(CacheConfig, "cache", None, {f"TIDEMILL_CACHE_{name}": value})
