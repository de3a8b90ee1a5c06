"""Where an engine computes, and how many blocks of latents fit there."""

import torch
from torch import Tensor

from tidemill.errors import ConfigError
from tidemill.models.config import ModelConfig
from tidemill.models.prompt_rows import MOST_CONTEXT

# Beside a step's own tensors: recorded steps, workspaces of libraries, what allocating rounds up.
SPARE_BYTES = 1 << 30


def find_device(wanted: str) -> torch.device:
    """ "auto" is the first GPU, else the CPU; ConfigError for a device that is not there."""
    if wanted == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"device is {wanted!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {wanted!r}, but there are {torch.cuda.device_count()} CUDA devices"
        )
    return torch.device("cuda", device.index or 0)


def refuse_widths(config: ModelConfig) -> None:
    """ConfigError for a model whose attention has widths that the Triton kernels do not take."""
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"):
        width: int = getattr(config, name)
        if width < 16 or width & (width - 1):
            raise ConfigError(
                f"the model's {name} is {width}, and the kernels take powers of two from 16 on; "
                'with kernels = "reference" plain torch computes'
            )


def use(device: torch.device) -> None:
    """Have this thread's launches go to `device`: Triton asks the thread, not the tensors."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def wait_for(device: torch.device) -> None:
    """Until what this thread has launched there is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def send(values: Tensor, device: torch.device) -> Tensor:
    """`values` of the host on `device`, in the order of its launches: the host does not wait."""
    if device.type != "cuda":
        return values.to(device)
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return pinned.copy_(values).to(device, non_blocking=True)


def step_bytes(
    config: ModelConfig, *, value_bytes: int, step_tokens: int, max_batch: int, max_context: int
) -> int:
    """What a step takes beside weights and latents at the most, in one layer after the other.

    Of long contexts the most are the keys and values that are made of their latents.
    """
    heads, rows = config.num_attention_heads, max(step_tokens, max_batch)
    of_context = config.latent_dim + config.kv_lora_rank  # gathered, and as kv_b takes them
    of_context += heads * (config.qk_nope_head_dim + config.v_head_dim)
    of_row = 8 * config.hidden_size + heads * (config.qk_head_dim + config.v_head_dim)
    of_row += 2 * config.intermediate_size
    of_row += config.num_experts_per_tok * (config.moe_intermediate_size + config.hidden_size)
    values = max(max_context, MOST_CONTEXT) * of_context + rows * of_row
    # Logits, with each row's table of penalties (int32) and of bias (fp64).
    return value_bytes * values + max_batch * config.vocab_size * (value_bytes + 4 + 8)


def blocks_that_fit(
    *, total_bytes: int, free_bytes: int, memory_share: float, step_bytes: int, block_bytes: int
) -> int:
    """Blocks for what the model leaves of `memory_share` of a GPU's memory.

    `free_bytes` is taken after the weights are loaded; beyond the share lie a step's tensors,
    graphs and other processes. It is less where a step takes more than the share leaves.
    ConfigError where not even one block fits.
    """
    used = total_bytes - free_bytes
    allowed = min(int(total_bytes * memory_share), total_bytes - step_bytes)
    if allowed - used < block_bytes:
        raise ConfigError(
            f"no room for latents: {used} of {total_bytes} bytes are taken, {memory_share:.0%} may "
            f"be, a step takes {step_bytes} and a block {block_bytes}"
        )
    return (allowed - used) // block_bytes
