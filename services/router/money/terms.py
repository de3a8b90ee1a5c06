"""What the ledger keeps of a request for whoever has to finish it: its terms, and how far it came.

Both travel as JSON that the ledger does not read. The terms never change after the hold was
granted; the progress is the checkpoint.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
        return _json(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Self:
        """The inverse of `encode`."""
        return cls(**json.loads(text))


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a request has come.

    `usage` counts all attempts so far, as if the request ended here. `attempts` numbers the latest
    one begun. `running` says of each attempt without a Final yet, by its number, how many of
    `usage.generated_tokens` it generated. `fence` is the owner's; the hold fills it in.
    """

    usage: Usage
    site: PrefillSite
    attempts: int
    running: Mapping[int, int]
    fence: int = 0

    def encode(self) -> str:
        """As the ledger keeps it."""
        return _json({**asdict(self), "running": dict(self.running)})

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
            running={int(attempt): tokens for attempt, tokens in found["running"].items()},
            fence=found["fence"],
        )


def _json(content: object) -> str:
    return json.dumps(content, separators=(",", ":"), sort_keys=True)
