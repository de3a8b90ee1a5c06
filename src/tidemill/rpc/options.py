"""gRPC channel arguments by role, chosen for long silences and long streams.

gRPC's own defaults close a connection that is pinged while a model thinks, and let one peer open
streams without bound. Each set is a tuple of (name, value), to be passed as `options=`.
"""

import json
from typing import Any, Final

Options = tuple[tuple[str, str | int], ...]

PUBLIC_MESSAGE_BYTES: Final = 4 << 20
INTERNAL_MESSAGE_BYTES: Final = 8 << 20  # a hand-over chunk is at most 4 MiB
METADATA_BYTES: Final = 16 << 10

# The ports are not shared unless a service asks for it: on Linux gRPC would otherwise let a second
# process listen where the first one does, instead of failing.
_EXCLUSIVE_PORT: Final = ("grpc.so_reuseport", 0)

# Calls that nobody has taken up yet. By its own defaults gRPC cancels some at random above 1000 of
# them, and all after 30 s; their callers learn nothing. Taken up, they are told when to come again.
_WAITING_CALLS: Final[Options] = (
    ("grpc.server.max_pending_requests", 16_384),
    ("grpc.server.max_pending_requests_hard_limit", 32_768),
    ("grpc.server_max_unrequested_time_in_server", 600),  # seconds
)


def _message_limit(limit: int) -> Options:
    return (
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", limit),
        ("grpc.max_metadata_size", METADATA_BYTES),
    )


def _keepalive(time_ms: int, timeout_ms: int) -> Options:
    return (
        ("grpc.keepalive_time_ms", time_ms),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )


def _retries(methods: list[dict[str, str]], attempts: int, backoff_s: float) -> tuple[str, str]:
    """Retry UNAVAILABLE; gRPC itself stops once response headers have arrived.

    CANCELLED too: so a server that shuts down ends calls that it has not begun (grpc/grpc#41785).
    """
    config: dict[str, Any] = {
        "methodConfig": [
            {
                "name": methods,
                "retryPolicy": {
                    "maxAttempts": attempts,
                    "initialBackoff": f"{backoff_s}s",
                    "maxBackoff": f"{10 * backoff_s}s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
                },
            }
        ],
        "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
    }
    return ("grpc.service_config", json.dumps(config))


PUBLIC_SERVER: Final[Options] = (
    *_message_limit(PUBLIC_MESSAGE_BYTES),
    *_keepalive(60_000, 20_000),
    *_WAITING_CALLS,
    _EXCLUSIVE_PORT,
    ("grpc.max_concurrent_streams", 256),
    ("grpc.http2.min_ping_interval_without_data_ms", 15_000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.max_connection_age_ms", 600_000),
    ("grpc.max_connection_age_grace_ms", 1_800_000),  # the longest stream there can be
)

# Several processes listen on one port and the kernel deals connections out among them.
SHARED_PUBLIC_SERVER: Final[Options] = (
    *(each for each in PUBLIC_SERVER if each != _EXCLUSIVE_PORT),
    ("grpc.so_reuseport", 1),
)

INTERNAL_SERVER: Final[Options] = (
    *_message_limit(INTERNAL_MESSAGE_BYTES),
    *_keepalive(20_000, 5_000),
    *_WAITING_CALLS,
    _EXCLUSIVE_PORT,
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)

# Only reads are retried below the router: it re-dispatches work itself.
INTERNAL_CLIENT: Final[Options] = (
    *_message_limit(INTERNAL_MESSAGE_BYTES),
    *_keepalive(20_000, 5_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.http2.bdp_probe", 0),  # caps read-ahead near 0.1 MB a stream
    _retries(
        [
            {"service": "tidemill.api.cache.v1.CacheService", "method": "LookupBlocks"},
            {"service": "tidemill.api.cache.v1.CacheService", "method": "GetCacheStats"},
            {"service": "tidemill.api.worker.v1.WorkerService", "method": "DescribeWorker"},
            {"service": "tidemill.api.decode.v1.DecodeService", "method": "GetFinal"},
            {"service": "tidemill.api.decode.v1.DecodeService", "method": "ListFinals"},
        ],
        attempts=3,
        backoff_s=0.05,
    ),
)

# Between workers and caches, where blocks and hand-overs pass: enough may be on its way to fill a
# link whose far end is milliseconds away, in frames that are worth a system call.
BULK_CLIENT: Final[Options] = (
    *(each for each in INTERNAL_CLIENT if each[0] != "grpc.http2.bdp_probe"),
    ("grpc.http2.lookahead_bytes", 4 << 20),
    ("grpc.http2.max_frame_size", 1 << 20),
)

# Each channel has connections of its own: one shared by all would be one router process for all.
# Behind a name, routers that came since are looked up when one goes, at most every two seconds.
SDK_CLIENT: Final[Options] = (
    *_message_limit(PUBLIC_MESSAGE_BYTES),
    *_keepalive(30_000, 10_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
    _retries([{"service": "tidemill.api.router.v1.RouterService"}], attempts=3, backoff_s=0.2),
)
