"""What an operator sets for one engine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineConfig:
    """`num_threads` 0 leaves torch's own choice; `max_context` (tokens) None takes the model's."""

    num_blocks: int
    max_batch: int = 32  # sequences in one decode step
    prefill_chunk_tokens: int = 512  # tokens in one prefill step
    max_context: int | None = None
    dtype: str = "auto"  # "auto" (the checkpoint's), "float32" or "bfloat16"
    num_threads: int = 0
    host_cache_blocks: int = 0  # blocks in host memory for what the pool evicts; 0: none
