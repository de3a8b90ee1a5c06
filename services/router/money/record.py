"""What the ledger keeps of a settled request beside its charge: one JSON object.

The receipt's flat content (tidemill.billing.receipt) with `content_sha256`, and beside it what only
the operator knows or what a repeated call is answered with: `finish`, `site`, `timing`, `seed`,
`num_choices` and `busy`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from services.router.finish import Completed, Finish, PrefillSite, Timing
from tidemill.billing import BusyPart, Chained, Receipt, Unbilled
from tidemill.billing.ledger import Posted

_BESIDE = ("content_sha256", "finish", "site", "timing", "seed", "num_choices", "busy")


@dataclass(frozen=True, slots=True)
class Record:
    """How a request ended, and who computed for how long."""

    completed: Completed
    busy: Sequence[BusyPart]


def encode(completed: Completed, *, busy: Sequence[BusyPart]) -> str:
    """The record of a request that is about to be settled."""
    return json.dumps(
        {
            **completed.receipt.to_fields(),
            "content_sha256": completed.receipt.content_sha256,
            "finish": int(completed.finish),
            "site": asdict(completed.site),
            "timing": asdict(completed.timing),
            "seed": completed.seed,
            "num_choices": completed.num_choices,
            "busy": [part.to_json() for part in busy],
        },
        separators=(",", ":"),
    )


def encode_release(
    unbilled: Unbilled, *, model: str, decided_at_ms: int, busy: Sequence[BusyPart]
) -> str:
    """What is told of a request that nothing is billed for: its unbilled tokens by class."""
    return json.dumps(
        {
            **asdict(unbilled),
            "model": model,
            "decided_at_ms": decided_at_ms,
            "busy": [part.to_json() for part in busy],
        },
        separators=(",", ":"),
    )


def decode(text: str) -> Record:
    """A record as `encode` wrote it; its receipt has no place in the chain yet.

    ReceiptError for a record that contradicts itself.
    """
    found: Mapping[str, Any] = json.loads(text)
    content = {name: value for name, value in found.items() if name not in _BESIDE}
    receipt = Receipt.from_fields(content, content_sha256=found["content_sha256"])
    completed = Completed(
        finish=Finish(found["finish"]),
        usage=receipt.usage,
        site=PrefillSite(**found["site"]),
        receipt=receipt,
        seed=found["seed"],
        timing=Timing(**found["timing"]),
        num_choices=found["num_choices"],
    )
    return Record(completed, [BusyPart.from_json(part) for part in found["busy"]])


def settled(posted: Posted) -> Record:
    """What was posted, read back: with its place in the chain."""
    record = decode(posted.record)
    return replace(record, completed=chained(record.completed, posted))


def chained(completed: Completed, posted: Posted) -> Completed:
    """`completed` as the ledger has it."""
    return replace(
        completed,
        pending=False,
        chained=Chained(
            position=posted.position,
            previous_chain=posted.previous_chain,
            chain=posted.chain,
            granted_nano=posted.granted_nano,
            topped_up_nano=posted.topped_up_nano,
        ),
    )
