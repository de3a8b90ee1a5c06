"""Where an engine computes, and how many blocks of latents fit there."""

import torch

from tidemill.errors import ConfigError


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


def blocks_that_fit(
    *, total_bytes: int, free_bytes: int, memory_share: float, block_bytes: int
) -> int:
    """Blocks for what the model leaves of `memory_share` of a GPU's memory.

    `free_bytes` is taken after the weights are loaded; beyond the share lie a step's activations,
    graphs and other processes. ConfigError where not even one block fits.
    """
    used = total_bytes - free_bytes
    room = int(total_bytes * memory_share) - used
    if room < block_bytes:
        raise ConfigError(
            f"no room for latents: {used} of {total_bytes} bytes are taken, {memory_share:.0%} may "
            f"be, and a block takes {block_bytes}"
        )
    return room // block_bytes
