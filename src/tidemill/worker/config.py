"""What an operator sets for one worker process, prefill or decode alike."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from tidemill.engine import EngineConfig
from tidemill.kv.cache_client import CacheClientConfig
from tidemill.policy import FetchConfig
from tidemill.rpc.server import ServerConfig

MOST_IN_PLACE_TOKENS = 1 << 20


class Role(Enum):
    """What a worker does; BOTH prefills in place as well as for others."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    @property
    def prefills(self) -> bool:
        """Whether it serves PrefillService."""
        return self is not Role.DECODE

    @property
    def decodes(self) -> bool:
        """Whether it serves DecodeService."""
        return self is not Role.PREFILL


@dataclass(frozen=True)
class HandoverConfig:
    """Leases and messages of hand-overs.

    `offer_timeout_s` is how long decode waits for a prefill worker's first answer. `shm_dir` is a
    folder in shared memory, of this user's own: workers of one host with the same folder move
    latents through it. Unset: always by gRPC.
    """

    lease_s: float = 30.0
    max_message_bytes: int = 2 << 20
    offer_timeout_s: float = 5.0
    shm_dir: Path | None = None

    def __post_init__(self) -> None:
        if not 65_536 <= self.max_message_bytes <= 4 << 20:
            raise ValueError("max_message_bytes must be between 65536 and 4194304")
        if not 0 < self.lease_s <= 3600:
            raise ValueError("lease_s must be above 0 and at most 3600")


@dataclass(frozen=True)
class CacheConfig:
    """The context cache: one node's host:port, and how many blocks may wait to be stored."""

    address: str
    store_queue_blocks: int = 1024
    client: CacheClientConfig = field(default_factory=CacheClientConfig)


@dataclass(frozen=True)
class RegistryConfig:
    """The worker registry in the cache Redis; `url` holds user and password."""

    url: str
    heartbeat_s: float = 1.0
    ttl_s: float = 5.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("registry url must begin with redis://, rediss:// or unix://")
        if not 0 < self.heartbeat_s < self.ttl_s:
            raise ValueError("registry heartbeat_s must be above 0 and below ttl_s")


@dataclass(frozen=True)
class WorkerConfig:
    """Sections [prefill] and [decode].

    `model` is the name under which `model_dir` is served; `advertise` the host:port that others
    dial (unset: the address bound). A prompt is refused when `max_queued_tokens` uncached tokens
    wait already, so one prompt of any length always fits an idle worker. Decode pauses for
    `fund_wait_s` at the end of its funds; a step older than `stall_s` fails readiness. `peers`
    bounds calls to other workers for their blocks, `fetch` what fetching from anywhere may cost.
    `accelerators` is how many of them this process occupies, for which its owner pays by the hour.
    A worker that only decodes prefills prompts in place of which at most `in_place_tokens` are to
    be computed, 0: none; unset: as many as it measures at its start to take `in_place_stall_s`, by
    which they may delay the others' next tokens.
    """

    worker_id: str
    model: str
    model_dir: Path
    engine: EngineConfig
    server: ServerConfig = field(default_factory=ServerConfig)
    handover: HandoverConfig = field(default_factory=HandoverConfig)
    cache: CacheConfig | None = None
    peers: CacheClientConfig = field(default_factory=CacheClientConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    registry: RegistryConfig | None = None
    advertise: str | None = None
    max_queued_tokens: int = 65_536
    max_attempts: int = 256
    fund_wait_s: float = 2.0
    stall_s: float = 30.0
    accelerators: int = 1
    in_place_tokens: int | None = None
    in_place_stall_s: float = 0.01

    def __post_init__(self) -> None:
        if not 1 <= self.accelerators <= 65_536:
            raise ValueError("accelerators must be between 1 and 65536")
        if not 0 <= (self.in_place_tokens or 0) <= MOST_IN_PLACE_TOKENS:
            raise ValueError(f"in_place_tokens must be between 0 and {MOST_IN_PLACE_TOKENS}")
        if not 0 <= self.in_place_stall_s <= 60:
            raise ValueError("in_place_stall_s must be between 0 and 60")

    @property
    def final_retention_s(self) -> float:
        """How long a Final is kept for whoever has not acknowledged it: two leases."""
        return 2 * self.handover.lease_s
