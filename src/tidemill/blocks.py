"""The identity of KV blocks: a SHA-256 chain over 64-token blocks.

Router, cache and engines name a block by the hash of everything that its content depends on:
the model, the KV format, the scope that may share it, and every token up to its end. Equal hash
means equal content; there are no collisions to reason about.
"""

import hashlib
import struct
import sys
from array import array
from collections.abc import Sequence

BLOCK_TOKENS = 64
HASH_BYTES = 32

_DOMAIN = b"tidemill.blocks.v1"
_UINT32_TYPECODE = "I"  # four bytes on every platform that torch runs on


def root_hash(model_digest: bytes, kv_format: str, scope: bytes) -> bytes:
    """Start of a chain [32 bytes]: what block 0 hangs on.

    `model_digest` identifies the weights, `kv_format` the layout and dtype of the latents,
    `scope` who may share blocks: a tenant's salt, or that of a scope that tenants opted into.
    """
    digest = hashlib.sha256()
    for part in (_DOMAIN, model_digest, kv_format.encode(), scope):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def chain_hashes(root: bytes, token_ids: Sequence[int]) -> list[bytes]:
    """Hash of each full block of `token_ids`: h_i = SHA256(h_{i-1} || tokens as u32-LE).

    A trailing part of a block has no hash. Raises OverflowError for an id outside u32.
    """
    words = array(_UINT32_TYPECODE, token_ids)
    if sys.byteorder == "big":
        words.byteswap()
    data = words.tobytes()
    block_bytes = BLOCK_TOKENS * words.itemsize
    hashes = []
    previous = root
    for start in range(0, len(data) - block_bytes + 1, block_bytes):
        previous = hashlib.sha256(previous + data[start : start + block_bytes]).digest()
        hashes.append(previous)
    return hashes


def block_names(hashes: Sequence[bytes]) -> list[int]:
    """Short names of blocks, for an index in memory: the first 8 bytes of each hash, as u64-LE.

    Two blocks of a fleet's millions share one with a chance of about one in a million: good enough
    for a hint, never to claim a block by.
    """
    words = struct.unpack(f"<{len(hashes) * HASH_BYTES // 8}Q", b"".join(hashes))
    return list(words[:: HASH_BYTES // 8])


def max_hit_tokens(num_prompt_tokens: int) -> int:
    """Most tokens of a prompt that are billed as hits: whole blocks, and never its last token.

    The last token is always computed, since its logits choose the first token of the answer. Its
    latent may be reused all the same (ADR 14): usage then says one token less than its block has.
    """
    return max(num_prompt_tokens - 1, 0) // BLOCK_TOKENS * BLOCK_TOKENS
