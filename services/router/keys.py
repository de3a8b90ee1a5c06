"""Tenants and API keys, as kept in the ledger Redis.

tm:tenant:<id>   hash: currency, salt (32 bytes), created_at_ms
tm:key:<key id>  hash: tenant, digest, label, created_at_ms, revoked ("0" or "1")
tm:keys, tm:keys:<tenant>   sorted sets of key ids, all scores 0: listing in order

A key reads "tm_<key id>.<secret>". Only HMAC-SHA-256(pepper, key) is stored, so a copy of the
ledger lets nobody in.
"""

import hashlib
import hmac
import secrets
import string
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from services.router.money.ledger import Ledger
from tidemill.errors import AlreadyExists, NotFound

SALT_BYTES = 32
SECRET_BYTES = 24  # 192 bits
_KEY_ID_CHARS = 12
_SCRIPTS = Path(__file__).parent
_ALPHABET = string.ascii_letters + string.digits

Arguments = list[str | bytes | int]


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who pays. `salt` [32 bytes] is the scope within which KV may be shared."""

    id: str
    currency: str
    salt: bytes


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret."""

    id: str
    tenant_id: str
    label: str
    created_at_ms: int
    revoked: bool


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: a tenant by one of its keys."""

    tenant: Tenant
    key_id: str


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What authentication needs to know of a key."""

    key: ApiKey
    digest: bytes
    tenant: Tenant


class KeyStore:
    """Tenants and keys in the ledger."""

    def __init__(self, ledger: Ledger, pepper: bytes, now_ms: Callable[[], int]) -> None:
        self._ledger = ledger
        self._pepper = pepper
        self._now_ms = now_ms
        self._create_tenant = ledger.script(_SCRIPTS / "create_tenant.lua")
        self._create_key = ledger.script(_SCRIPTS / "create_key.lua")
        self._revoke_key = ledger.script(_SCRIPTS / "revoke_key.lua")

    def digest(self, api_key: str) -> bytes:
        """What is stored in place of the key [32 bytes]."""
        return hmac.digest(self._pepper, api_key.encode(), hashlib.sha256)

    async def create_tenant(self, tenant_id: str, currency: str) -> bool:
        """Make a tenant with a fresh salt; False if it exists already with this currency.

        AlreadyExists if it exists with another.
        """
        arguments: Arguments = [currency, secrets.token_bytes(SALT_BYTES), self._now_ms()]
        made = await self._ledger.run(
            lambda _: self._create_tenant(keys=[_tenant_key(tenant_id)], args=arguments)
        )
        if made < 0:
            raise AlreadyExists(f"tenant {tenant_id} exists with another currency")
        return bool(made)

    async def tenant(self, tenant_id: str) -> Tenant:
        """NotFound if there is none of that name."""
        fields = await self._ledger.run(lambda redis: _read(redis, _tenant_key(tenant_id)))
        if not fields:
            raise NotFound(f"there is no tenant {tenant_id}", reason="TENANT_NOT_FOUND")
        return Tenant(tenant_id, fields[b"currency"].decode(), fields[b"salt"])

    async def create_key(self, tenant_id: str, label: str) -> tuple[str, str]:
        """(key id, key) of a new key; NotFound without the tenant."""
        key_id = "".join(secrets.choice(_ALPHABET) for _ in range(_KEY_ID_CHARS))
        api_key = f"tm_{key_id}.{secrets.token_urlsafe(SECRET_BYTES)}"
        names = [_tenant_key(tenant_id), _key_key(key_id), "tm:keys", f"tm:keys:{tenant_id}"]
        arguments: Arguments = [key_id, tenant_id, self.digest(api_key), label, self._now_ms()]
        made = await self._ledger.run(lambda _: self._create_key(keys=names, args=arguments))
        if made == 0:
            raise NotFound(f"there is no tenant {tenant_id}", reason="TENANT_NOT_FOUND")
        if made < 0:
            raise AlreadyExists("the key id drawn is taken; try again")
        return key_id, api_key

    async def revoke_key(self, key_id: str) -> bool:
        """Whether the key was in force until now; NotFound without it."""
        revoked = await self._ledger.run(
            lambda _: self._revoke_key(keys=[_key_key(key_id)], args=[])
        )
        if revoked < 0:
            raise NotFound(f"there is no key {key_id}", reason="KEY_NOT_FOUND")
        return bool(revoked)

    async def list_keys(
        self, tenant_id: str | None, *, after: str, limit: int
    ) -> tuple[list[ApiKey], str]:
        """(up to `limit` keys whose id follows `after`, the last id or "" if no more follow)."""
        index = "tm:keys" if tenant_id is None else f"tm:keys:{tenant_id}"
        start = f"({after}" if after else "-"
        ids = await self._ledger.run(lambda redis: _ids(redis, index, start, limit + 1))
        page = [key_id.decode() for key_id in ids[:limit]]
        records = await self._ledger.run(lambda redis: _read_all(redis, page))
        keys = [_api_key(key_id, fields) for key_id, fields in zip(page, records, strict=True)]
        return keys, page[-1] if len(ids) > limit else ""

    async def find(self, key_id: str) -> KeyRecord | None:
        """The record of a key, revoked or not."""
        fields = await self._ledger.run(lambda redis: _read(redis, _key_key(key_id)))
        if not fields:
            return None
        key = _api_key(key_id, fields)
        tenant = await self._ledger.run(lambda redis: _read(redis, _tenant_key(key.tenant_id)))
        if not tenant:
            return None
        return KeyRecord(
            key,
            fields[b"digest"],
            Tenant(key.tenant_id, tenant[b"currency"].decode(), tenant[b"salt"]),
        )


def _tenant_key(tenant_id: str) -> str:
    return f"tm:tenant:{tenant_id}"


def _key_key(key_id: str) -> str:
    return f"tm:key:{key_id}"


def _read(redis: Redis, name: str) -> Awaitable[dict[bytes, bytes]]:
    answer: Any = redis.hgetall(name)
    return answer  # type: ignore[no-any-return]  # redis-py types one method for both stacks


def _ids(redis: Redis, index: str, start: str, limit: int) -> Awaitable[list[bytes]]:
    answer: Any = redis.zrangebylex(index, start, "+", start=0, num=limit)
    return answer  # type: ignore[no-any-return]  # as below


async def _read_all(redis: Redis, key_ids: Sequence[str]) -> list[dict[bytes, bytes]]:
    return [await _read(redis, _key_key(key_id)) for key_id in key_ids]


def _api_key(key_id: str, fields: dict[bytes, bytes]) -> ApiKey:
    return ApiKey(
        id=key_id,
        tenant_id=fields[b"tenant"].decode(),
        label=fields[b"label"].decode(),
        created_at_ms=int(fields[b"created_at_ms"]),
        revoked=fields[b"revoked"] == b"1",
    )
