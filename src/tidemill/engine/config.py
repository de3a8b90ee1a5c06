"""What an operator sets for one engine."""

from dataclasses import dataclass

from tidemill.kernels.choice import PATHS, Path


@dataclass(frozen=True)
class EngineConfig:
    """`num_threads` 0 leaves torch's own choice; `max_context` (tokens) None takes the model's.

    On a GPU `num_blocks` may be None: what fits beside the model in `memory_share` of its memory.
    """

    num_blocks: int | None = None
    max_batch: int = 32  # sequences in one decode step
    step_tokens: int = 512  # rows of one step: running sequences, the rest prompts
    max_context: int | None = None
    dtype: str = "auto"  # "auto" (the checkpoint's), "float32", "bfloat16" or "float16"
    num_threads: int = 0
    swap_blocks: int | None = None  # host memory for running sequences; None: as many as num_blocks
    host_cache_blocks: int = 0  # blocks in host memory for what the pool evicts; 0: none
    device: str = "auto"  # "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"
    kernels: Path = "auto"  # "auto" (Triton on a GPU), "reference" (torch) or "triton"
    memory_share: float = 0.9  # of a GPU's memory, for weights and latents

    def __post_init__(self) -> None:
        least = {"num_blocks": 1, "max_batch": 1, "step_tokens": 2, "swap_blocks": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} is {value}, expected at least {bound}")
        if self.kernels not in PATHS:
            raise ValueError(f"kernels is {self.kernels!r}, expected one of {', '.join(PATHS)}")
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"memory_share is {self.memory_share}, expected in (0, 1]")
