"""How a request ends, decided and not to be changed: what is settled once, now or later.

An intent is stored before anybody hears of it. Its instant and its amount are fixed (M6), so
settling it late or twice charges what it says, once.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

from tidemill.billing import ledger as rules

_COMMANDS = {"settle": rules.Settle, "release": rules.Release}


@dataclass(frozen=True, kw_only=True, slots=True)
class Intent:
    """Settle or release one tenant's request; `body_sha256` (hex) tells it from others."""

    tenant_id: str
    body_sha256: str
    command: rules.Settle | rules.Release

    @property
    def key(self) -> tuple[str, str]:
        """(tenant id, request id)."""
        return self.tenant_id, self.command.request_id

    def encode(self) -> bytes:
        """One line of JSON, without its end."""
        kind = "settle" if isinstance(self.command, rules.Settle) else "release"
        content = {
            "tenant_id": self.tenant_id,
            "body_sha256": self.body_sha256,
            "kind": kind,
            "command": asdict(self.command),
        }
        return json.dumps(content, separators=(",", ":"), sort_keys=True).encode()

    @classmethod
    def decode(cls, line: bytes) -> Self:
        """The inverse of `encode`."""
        found: dict[str, Any] = json.loads(line)
        return cls(
            tenant_id=found["tenant_id"],
            body_sha256=found["body_sha256"],
            command=_COMMANDS[found["kind"]](**found["command"]),
        )
