"""What an operator sets for one engine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineConfig:
    """`num_threads` 0 leaves torch's own choice; `max_context` (tokens) None takes the model's."""

    num_blocks: int
    max_batch: int = 32  # sequences in one decode step
    step_tokens: int = 512  # rows of one step: running sequences, the rest prompts
    max_context: int | None = None
    dtype: str = "auto"  # "auto" (the checkpoint's), "float32", "bfloat16" or "float16"
    num_threads: int = 0
    swap_blocks: int | None = None  # host memory for running sequences; None: as many as num_blocks
    host_cache_blocks: int = 0  # blocks in host memory for what the pool evicts; 0: none

    def __post_init__(self) -> None:
        least = {"num_blocks": 1, "max_batch": 1, "step_tokens": 2, "swap_blocks": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} is {value}, expected at least {bound}")

    @property
    def num_swap_blocks(self) -> int:
        """Blocks that the swap space holds."""
        return self.num_blocks if self.swap_blocks is None else self.swap_blocks
