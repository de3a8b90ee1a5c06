"""Which sequences an engine may take on, so that swapping always finds room for the rest."""

from tidemill.blocks import BLOCK_TOKENS
from tidemill.engine.sequence import Sequence


def blocks_for(
    num_prompt_tokens: int, max_tokens: int, max_context: int, *, choices: int = 1
) -> int:
    """Most blocks that a prompt and so many completions of it ever hold together.

    The last generated token has no latent. Full blocks of the prompt are shared by all choices.
    """
    positions = min(num_prompt_tokens + max_tokens - 1, max_context)
    each = -(-positions // BLOCK_TOKENS)
    shared = min(num_prompt_tokens // BLOCK_TOKENS, each)
    return shared + choices * (each - shared)


def blocks_of(seq: Sequence, max_context: int) -> tuple[int, int]:
    """Most blocks that the largest of a sequence and its forks, and all together, ever hold."""
    sizes = [
        blocks_for(each.num_prompt_tokens, each.sampling.max_tokens, max_context)
        for each in (seq, *seq.forks)
    ]
    shared = seq.num_prompt_tokens // BLOCK_TOKENS
    together = sum(sizes) - shared * len(seq.forks)
    return max(sizes), max(together, len(seq.block_table))


class Admission:
    """Sums what every sequence may come to hold: never more than device and swap space together.

    Then whatever the device has no room for fits into the swap space. One sequence alone must fit
    the device. The engine's lock guards it.
    """

    def __init__(self, *, device_blocks: int, swap_blocks: int) -> None:
        self.device_blocks = device_blocks
        self.swap_blocks = swap_blocks
        self._promised: dict[str, int] = {}

    def __contains__(self, seq_id: str) -> bool:
        return seq_id in self._promised

    @property
    def num_promised(self) -> int:
        """Blocks that the sequences admitted so far may come to hold."""
        return sum(self._promised.values())

    def fits(self, *, each: int, together: int) -> bool:
        """Whether the empty engine could hold it: `each` choice alone and all of them."""
        return each <= self.device_blocks and together <= self.device_blocks + self.swap_blocks

    def admits(self, *, each: int, together: int) -> bool:
        """Whether it fits beside those admitted already."""
        return self.fits(each=each, together=together + self.num_promised)

    def promise(self, seq_id: str, num_blocks: int) -> None:
        """Count a sequence, its forks included, until `withdraw`."""
        self._promised[seq_id] = num_blocks

    def withdraw(self, seq_id: str) -> None:
        """It is over, or will not come; safe to repeat."""
        self._promised.pop(seq_id, None)
