import tomllib
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from services.stack.toml import dumps, merged

keys = st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True)
# Lone surrogates are no text in TOML, and the newlines that Python knows are more than TOML's.
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=20)
scalars = (
    text
    | st.integers(-(2**63), 2**63 - 1)
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
)
tables = st.recursive(
    st.dictionaries(keys, scalars | st.lists(st.integers(0, 9), max_size=3), max_size=4),
    lambda inner: st.dictionaries(keys, inner | st.lists(inner, min_size=1, max_size=2)),
    max_leaves=8,
)


@given(tables)
def test_what_is_written_reads_back(document: dict[str, Any]) -> None:
    assert tomllib.loads(dumps(document)) == document


def test_none_leaves_the_key_out_and_paths_are_strings() -> None:
    document = {"a": None, "b": Path('/x y/"z"'), "t": {"c": None}}
    assert tomllib.loads(dumps(document)) == {"b": '/x y/"z"', "t": {}}


def test_changes_are_laid_over_table_by_table_and_none_takes_a_key_out() -> None:
    document = {"a": {"x": 1, "y": 2}, "b": 3}
    assert merged(document, {"a": {"y": None, "z": 4}, "b": {"c": 5}}) == {
        "a": {"x": 1, "z": 4},
        "b": {"c": 5},
    }
    assert document == {"a": {"x": 1, "y": 2}, "b": 3}
