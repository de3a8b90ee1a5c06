"""What the ledger keeps of a request for whoever has to finish it: its terms, and how far it came.

Both travel as JSON that the ledger does not read. The terms never change after the hold was
granted; the progress is the checkpoint.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from services.router.finish import PrefillSite
from tidemill.billing import Reuse, Unbilled, Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """On what terms a request was let in.

    `wire_id` is its name among workers, `max_tokens` each choice's, `cap_nano` its max_cost. No
    window after `deadline_ms` may decide its price.
    """

    key_id: str
    model: str
    price_model: str
    currency: str
    book_digest: str
    wire_id: str
    seed: int
    choices: int
    prompt_tokens: int
    max_tokens: int
    cap_nano: int | None
    deadline_ms: int

    def encode(self) -> str:
        """As the ledger keeps them."""
        return _json({each.name: getattr(self, each.name) for each in fields(self)})

    @classmethod
    def decode(cls, text: str) -> Self:
        """The inverse of `encode`."""
        return cls(**json.loads(text))


# Of one owner: the latest attempt it began, and of each without a Final how much is counted.
Heard = tuple[int, Mapping[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a request has come.

    `usage` counts all attempts so far, as if the request ended here. `attempts` numbers the latest
    one begun. `running` says of each attempt without a Final yet, by its number, how many of
    `usage.generated_tokens` it generated. The hold fills in its `fence`, and what its checkpoints
    say of the owners up to it, by fence.
    """

    usage: Usage
    site: PrefillSite
    attempts: int
    running: Mapping[int, int]
    fence: int = 0
    owners: Mapping[int, Heard] = field(default_factory=dict)

    def under(self, fence: int, before: "Progress | None") -> "Progress":
        """As the owner with this fence writes it down, after those before it."""
        owners = dict(before.owners) if before else {}
        return replace(self, fence=fence, owners={**owners, fence: (self.attempts, self.running)})

    def counted(self, fence: int, attempt: int) -> int | None:
        """How many tokens of an attempt are in `usage`; None: all, its Final was read."""
        attempts, running = self.owners.get(fence, (0, {}))
        return 0 if attempt > attempts else running.get(attempt)

    def encode(self) -> str:
        """As the ledger keeps it."""
        owners = {
            fence: (number, dict(running)) for fence, (number, running) in self.owners.items()
        }
        return _json({**_plain(self), "running": dict(self.running), "owners": owners})

    @classmethod
    def decode(cls, text: str) -> Self:
        """The inverse of `encode`; UsageError for counts that cannot be true."""
        found: dict[str, Any] = json.loads(text)
        usage = found["usage"]
        reused, unbilled = Reuse(**usage.pop("reused")), Unbilled(**usage.pop("unbilled"))
        return cls(
            usage=Usage(**usage, reused=reused, unbilled=unbilled),
            site=PrefillSite(**found["site"]),
            attempts=found["attempts"],
            running=_by_number(found["running"]),
            fence=found["fence"],
            owners={
                int(fence): (number, _by_number(running))
                for fence, (number, running) in found["owners"].items()
            },
        )


def _plain(progress: Progress) -> dict[str, object]:
    return {
        "usage": asdict(progress.usage),
        "site": asdict(progress.site),
        "attempts": progress.attempts,
        "fence": progress.fence,
    }


def _by_number(found: Mapping[str, int]) -> dict[int, int]:
    return {int(number): tokens for number, tokens in found.items()}


def _json(content: object) -> str:
    return json.dumps(content, separators=(",", ":"), sort_keys=True)
