"""The router's configuration: section [router]."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from tidemill.policy import BalancerConfig, QueueLimits
from tidemill.rpc.server import ServerConfig
from tidemill.rpc.tls import TlsFiles

_ROUTER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One served model.

    `path` is its Hugging Face folder, of which the router reads the tokeniser, the chat template
    and generation_config.json. `context_tokens` unset: what the workers announce.
    `model_digest` in hexadecimal pins the weights; unset: that of the first worker seen.
    """

    name: str
    path: Path
    price_model: str
    default_max_tokens: int = 4096
    max_output_tokens: int = 32_768
    context_tokens: int | None = None
    model_digest: str | None = None
    reasoning: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.default_max_tokens <= self.max_output_tokens:
            raise ValueError("default_max_tokens must lie between 1 and max_output_tokens")
        if self.model_digest is not None and len(bytes.fromhex(self.model_digest)) != 32:
            raise ValueError("model_digest must be 64 hexadecimal digits")


@dataclass(frozen=True, kw_only=True)
class LedgerConfig:
    """Where accounts and keys are kept, and what guards them.

    `pepper_file` and `admin_key_file` hold at least 32 characters each. `timeout_s` is how long a
    reply may take; that the router itself stood still meanwhile does not count. `key_cache_s` is
    how long a key may be used after its last look-up, hence how late a revocation may take effect.
    """

    url: str
    pepper_file: Path
    admin_key_file: Path
    timeout_s: float = 2.0
    max_connections: int = 32
    key_cache_s: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.key_cache_s <= 2.0:
            raise ValueError("key_cache_s must be above 0 and at most 2")


@dataclass(frozen=True, kw_only=True)
class MoneyConfig:
    """How this router holds and settles money.

    `router_id` unset: one of its own for each process. `spool_dir` keeps, in a folder for each
    router, what could not be settled while the ledger was away; it must outlive the process, and
    routers that share it settle for those that died. A hold is let go to other routers `lease_s`
    seconds after its router was last heard of. `signing_key_file` is a private key (PEM, PKCS8,
    Ed25519), `signing_keys_dir` holds older public ones. `accelerator_hour_nano` is what an hour of
    an accelerator costs, nano-units by currency.
    """

    signing_key_file: Path
    spool_dir: Path
    router_id: str | None = None
    lease_s: float = 15.0
    signing_keys_dir: Path | None = None
    accelerator_hour_nano: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.lease_s >= 0.2:
            raise ValueError("lease_s must be at least 0.2")
        if self.router_id is not None and not _ROUTER_ID.fullmatch(self.router_id):
            raise ValueError("router_id must be 1 to 64 letters, digits, dots, dashes, underscores")
        if not all(0 <= nano < 2**53 for nano in self.accelerator_hour_nano.values()):
            raise ValueError("accelerator_hour_nano must be nano-units from 0 to below 2^53")


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """Where the workers are.

    `cache_url` is the cache Redis in which they register; `workers` are further ones, each
    "role@host:port" with role prefill, decode or both. `tls` is the router's own identity.
    """

    tls: TlsFiles
    cache_url: str | None = None
    workers: tuple[str, ...] = ()
    discover_interval_s: float = 1.0
    load_interval_ms: int = 100

    def __post_init__(self) -> None:
        if self.cache_url is None and not self.workers:
            raise ValueError("neither cache_url nor workers is set: there would be no worker")


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Bounds on one request, and patience in seconds.

    A request whose worker was lost before its first token is placed anew `max_lost_attempts`
    times, and fails if after `lost_patience_s` there is no worker at all that could take it.
    """

    max_prompt_bytes: int = 1 << 20
    first_token_timeout_s: float = 600.0
    total_timeout_s: float = 1800.0
    slow_reader_s: float = 60.0
    final_wait_s: float = 2.0
    coalesce_tokens: int = 8
    coalesce_s: float = 0.05
    max_lost_attempts: int = 2
    lost_patience_s: float = 1.5
    tokenizer_threads: int = 2


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Everything that `python -m services.router` reads.

    `own_cores`: nothing else runs on its cores. Its threads then do not interrupt one another as
    they wake (SCHED_BATCH), which is worth a quarter of a core under load; beside other processes
    it would wait for those.
    """

    ledger: LedgerConfig
    money: MoneyConfig
    fleet: FleetConfig
    models: tuple[ModelConfig, ...]
    price_book: Path
    own_cores: bool = False
    server: ServerConfig = field(default_factory=ServerConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    queue: QueueLimits = field(default_factory=QueueLimits)
    balancer: BalancerConfig = field(default_factory=BalancerConfig)

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if not names or len(set(names)) != len(names):
            raise ValueError("models must name at least one model, and none twice")
