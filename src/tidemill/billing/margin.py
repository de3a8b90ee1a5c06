"""What work cost and what it earned: accelerator time, its price, and who they belong to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from tidemill.billing.integers import require_int

PREFILL = "prefill"
DECODE = "decode"


@dataclass(frozen=True, slots=True)
class BusyPart:
    """Microseconds of one worker's compute that one attempt used, prompt and output apart.

    The worker's owner pays for `accelerators` of them by the hour. Raises ValueError for another
    phase or a figure below its least, TypeError for what is no int.
    """

    worker_id: str
    phase: str  # "prefill" or "decode"
    busy_us: int
    accelerators: int = 1

    def __post_init__(self) -> None:
        if self.phase not in (PREFILL, DECODE):
            raise ValueError(f"phase is {self.phase!r}, not {PREFILL} or {DECODE}")
        if require_int(self.busy_us, "busy_us") < 0:
            raise ValueError(f"busy_us is negative: {self.busy_us}")
        if require_int(self.accelerators, "accelerators") < 1:
            raise ValueError(f"accelerators is {self.accelerators}, at least 1 computed it")

    @property
    def accelerator_us(self) -> int:
        """Time of all its accelerators together."""
        return self.busy_us * self.accelerators

    def to_json(self) -> dict[str, str | int]:
        """For the journal."""
        return {
            "worker_id": self.worker_id,
            "phase": self.phase,
            "busy_us": self.busy_us,
            "accelerators": self.accelerators,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """As `to_json` wrote it."""
        return cls(
            found["worker_id"], found["phase"], int(found["busy_us"]), int(found["accelerators"])
        )
