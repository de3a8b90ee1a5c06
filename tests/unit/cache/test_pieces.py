import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.api.common.v1.kv_pb2 import BlockPiece
from tidemill.errors import InvalidRequest
from tidemill.kv.pieces import PIECE_BYTES, Assembly, sha256, split

HASH = b"h" * 32


@pytest.mark.parametrize(
    "num_bytes", [1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES]
)
def test_pieces_put_together_are_the_payload(num_bytes: int) -> None:
    payload = bytes(range(256)) * (num_bytes // 256) + bytes(num_bytes % 256)
    first, *rest = split(HASH, payload, sha256(payload))
    assembly = Assembly(first, max_bytes=num_bytes)
    for piece in rest:
        assert not assembly.complete
        assert len(piece.data) <= PIECE_BYTES
        assembly.add(piece)
    assert assembly.complete
    assert assembly.payload() == payload


@given(st.lists(st.tuples(st.integers(0, 12), st.binary(max_size=6)), max_size=6))
def test_only_gapless_pieces_are_taken(pieces: list[tuple[int, bytes]]) -> None:
    whole = b"0123456789"
    digest = sha256(whole)

    def piece(offset: int, data: bytes) -> BlockPiece:
        return BlockPiece(
            block_hash=HASH, offset=offset, total_bytes=10, data=data, payload_sha256=digest
        )

    assembly = Assembly(piece(0, whole[:3]), max_bytes=10)
    taken = whole[:3]
    for offset, data in pieces:
        fits = offset == len(taken) and data and len(taken) + len(data) <= 10
        try:
            assembly.add(piece(offset, data))
        except InvalidRequest:
            assert not fits
        else:
            assert fits
            taken += data
    assert assembly.num_bytes == len(taken)
    if assembly.complete:
        assert assembly.payload() == taken


def test_a_block_larger_than_the_bound_is_refused_at_its_first_piece() -> None:
    (piece,) = split(HASH, b"12345", sha256(b"12345"))
    with pytest.raises(InvalidRequest, match="total_bytes"):
        Assembly(piece, max_bytes=4)


def test_an_unwanted_block_is_followed_but_not_kept() -> None:
    pieces = list(split(HASH, bytes(PIECE_BYTES + 1), b"d" * 32))
    assembly = Assembly(pieces[0], max_bytes=2 * PIECE_BYTES, keep=False)
    assembly.add(pieces[1])
    assert assembly.complete
    assert assembly.num_bytes == PIECE_BYTES + 1
