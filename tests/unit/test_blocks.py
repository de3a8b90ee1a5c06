import hashlib
import struct

import pytest

from tidemill.blocks import BLOCK_TOKENS, block_names, chain_hashes, max_hit_tokens, root_hash

ROOT = root_hash(b"\x01" * 32, "latent-bf16-576", b"tenant-a")


def test_root_hash_has_its_published_value() -> None:
    assert ROOT.hex() == "4d1f170f1eafbc6826797913ab5302a68046a991d597b25b31165d95cf515d41"


def test_chain_has_its_published_values() -> None:
    hashes = chain_hashes(ROOT, range(130))
    assert [value.hex() for value in hashes] == [
        "787095e14c6336be59dc3a8eb943b6285dbd9a4150073fd10bf8e25fe7b1759e",
        "4135e1c15e292bd52ee6e5447b3c40f93c52e3ebb929f5c6dcb61b719a0fc8e2",
    ]


def test_each_hash_is_sha256_of_its_parent_and_little_endian_tokens() -> None:
    tokens = [7, 70_000, 4_294_967_295, 0] * 16
    expected = hashlib.sha256(ROOT + struct.pack("<64I", *tokens)).digest()
    assert chain_hashes(ROOT, tokens) == [expected]


def test_a_part_of_a_block_has_no_hash() -> None:
    assert chain_hashes(ROOT, []) == []
    assert chain_hashes(ROOT, [1] * 63) == []
    assert len(chain_hashes(ROOT, [1] * 64)) == 1
    assert len(chain_hashes(ROOT, [1] * 127)) == 1


def test_a_changed_token_changes_its_block_and_all_after_it() -> None:
    tokens = list(range(256))
    before = chain_hashes(ROOT, tokens)
    tokens[100] += 1
    after = chain_hashes(ROOT, tokens)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False, False]


@pytest.mark.parametrize(
    "other",
    [
        (b"\x02" * 32, "latent-bf16-576", b"tenant-a"),
        (b"\x01" * 32, "latent-fp32-576", b"tenant-a"),
        (b"\x01" * 32, "latent-bf16-576", b"tenant-b"),
        (b"\x01" * 32, "latent-bf16-576t", b"enant-a"),
    ],
)
def test_model_format_and_scope_each_separate_chains(other: tuple[bytes, str, bytes]) -> None:
    assert root_hash(*other) != ROOT


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_outside_u32_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        chain_hashes(ROOT, [token] * BLOCK_TOKENS)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "hit"),
    [(0, 0), (1, 0), (64, 0), (65, 64), (128, 64), (129, 128), (1000, 960)],
)
def test_most_billed_hits_are_whole_blocks_without_the_last_token(
    num_prompt_tokens: int, hit: int
) -> None:
    assert max_hit_tokens(num_prompt_tokens) == hit


def test_a_blocks_name_is_the_start_of_its_hash() -> None:
    hashes = chain_hashes(ROOT, list(range(3 * BLOCK_TOKENS)))
    assert block_names(hashes) == [int.from_bytes(each[:8], "little") for each in hashes]
    assert block_names([]) == []
