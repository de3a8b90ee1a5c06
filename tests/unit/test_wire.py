from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tidemill.api.cache.v1 import cache_service_pb2 as cache
from tidemill.api.prefill.v1.prefill_service_pb2 import PullKvResponse
from tidemill.kv.pieces import PIECE_BYTES, split
from tidemill.kv.wire import SegmentsWriter, Wire, fetch_responses, serialize, store_requests

BIG = bytes(range(256)) * 5000
SEGMENT = st.fixed_dictionaries(
    {
        "layer": st.integers(0, 1023),
        "first_token": st.integers(0, 1 << 20),
        "num_tokens": st.integers(1, 1 << 20),
        "xxh3": st.integers(0, 2**64 - 1),
        "data": st.lists(st.binary(max_size=300), max_size=4),
    }
)


@given(st.lists(SEGMENT, min_size=1, max_size=4))
def test_segments_are_written_as_protobuf_writes_them(segments: list[dict[str, Any]]) -> None:
    writer, expected = SegmentsWriter(), PullKvResponse()
    for segment in segments:
        chunks = segment.pop("data")
        writer.add(**segment, data=[memoryview(each) for each in chunks])
        expected.segments.add(**segment, data=b"".join(chunks))
    written = writer.finish()
    assert PullKvResponse.FromString(written) == expected
    if all(segment.data for segment in expected.segments):  # an empty field is left out there
        assert written == expected.SerializeToString()


@given(
    st.sampled_from([1, 127, 128, 300, PIECE_BYTES, PIECE_BYTES + 1]),
    st.integers(0, 3),
)
def test_pieces_are_written_as_protobuf_writes_them(num_bytes: int, tier: int) -> None:
    block = b"h" * 32, BIG[:num_bytes], b"s" * 32
    pieces = list(split(*block))
    fetched = [
        cache.FetchBlocksResponse(piece=piece, tier=cache.CacheTier.ValueType(tier))
        for piece in pieces
    ]
    stored = [cache.StoreBlocksRequest(piece=piece) for piece in pieces]
    assert list(fetch_responses(*block, tier)) == [each.SerializeToString() for each in fetched]
    assert list(store_requests(*block)) == [each.SerializeToString() for each in stored]


def test_messages_and_what_is_written_already_are_both_sent() -> None:
    message = cache.StoreBlocksRequest(namespace=cache.BlockNamespace(tenant_id="a"))
    written = message.SerializeToString()
    assert serialize(message) == serialize(Wire(written)) == written
