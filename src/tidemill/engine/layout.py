"""What two workers must agree on before latents may pass between them."""

import hashlib
from dataclasses import dataclass

from tidemill.blocks import BLOCK_TOKENS


@dataclass(frozen=True)
class KvLayout:
    """Shape and meaning of a block: [num_layers, block_tokens, latent_dim] of `dtype`."""

    dtype: str  # "bfloat16", "float16" or "float32"
    num_layers: int
    latent_dim: int
    model_digest: bytes
    block_tokens: int = BLOCK_TOKENS
    mtp: bool = False

    @property
    def kv_format(self) -> str:
        """Names layout without model, for the root of the block hash chain."""
        shape = f"{self.num_layers}x{self.block_tokens}x{self.latent_dim}"
        return f"mla.{self.dtype}.{shape}.mtp{self.mtp:d}"

    @property
    def value_bytes(self) -> int:
        """Bytes of one value of a latent."""
        return {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.num_layers * self.block_tokens * self.latent_dim * self.value_bytes

    def fingerprint(self) -> bytes:
        """SHA-256 of every field, 32 bytes: equal iff latents mean the same on both sides."""
        return hashlib.sha256(
            b"tidemill.kv-layout.v1" + self.kv_format.encode() + b"\0" + self.model_digest
        ).digest()
