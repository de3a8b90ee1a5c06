"""Who is calling: whose key it is, and a guard that lets nobody through without one."""

import hmac
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from enum import Enum

from services.router.keys import Caller, KeyRecord, KeyStore, Tenant
from tidemill.errors import PermissionDenied, Unauthenticated
from tidemill.rpc.interceptors import Call

_AUTHORIZATION = "authorization"
_SCHEME = "bearer "
_MAX_KEY_CHARS = 128

_caller: ContextVar[Caller] = ContextVar("caller")


class Authenticator:
    """Says whose a key is, asking the ledger at most every `cache_s` seconds for each key.

    A revoked key therefore stops working within `cache_s`, and the keys in use outlive a ledger
    that is away for less than that.
    """

    def __init__(
        self,
        store: KeyStore,
        *,
        cache_s: float,
        clock: Callable[[], float],
        max_entries: int = 10_000,
    ) -> None:
        self._store = store
        self._cache_s = cache_s
        self._clock = clock
        self._max_entries = max_entries
        self._cache: dict[str, tuple[float, KeyRecord]] = {}

    async def caller_of(self, api_key: str | None) -> Caller:
        """Who has the key; Unauthenticated for a missing, unknown, wrong or revoked key."""
        if not api_key:
            raise Unauthenticated("no API key was sent", reason="API_KEY_MISSING")
        key_id = _key_id_of(api_key)
        record = await self._record(key_id) if key_id else None
        digest = self._store.digest(api_key)
        expected = record.digest if record else bytes(len(digest))
        if not hmac.compare_digest(digest, expected) or record is None:
            raise Unauthenticated("this API key is not known", reason="API_KEY_UNKNOWN")
        if record.key.revoked:
            raise Unauthenticated("this API key was revoked", reason="API_KEY_REVOKED")
        return Caller(record.tenant, record.key.id)

    async def _record(self, key_id: str) -> KeyRecord | None:
        asked_at = self._clock()
        cached = self._cache.get(key_id)
        if cached is not None and asked_at - cached[0] < self._cache_s:
            return cached[1]
        self._cache.pop(key_id, None)
        record = await self._store.find(key_id)
        if record is not None:
            while len(self._cache) >= self._max_entries:
                self._cache.pop(next(iter(self._cache)))
            self._cache[key_id] = (asked_at, record)
        return record


class Access(Enum):
    """Whose key opens a method."""

    TENANT = "tenant"
    ADMIN = "admin"


def current_caller() -> Caller:
    """Whose key opened the call that is being handled."""
    return _caller.get()


def current_tenant() -> Tenant:
    """The tenant whose key it is."""
    return _caller.get().tenant


def current_tenant_id() -> str | None:
    """As current_tenant, its id; None where no tenant's key opened the call."""
    caller = _caller.get(None)
    return None if caller is None else caller.tenant.id


class KeyGuard:
    """Guard: each method in `access` opens to its kind of key, all others to nobody.

    Health is exempt. Raises Unauthenticated, PermissionDenied, LedgerUnavailable.
    """

    def __init__(
        self, access: Mapping[str, Access], authenticator: Authenticator, admin_key: str
    ) -> None:
        self._access = access
        self._authenticator = authenticator
        self._admin_key = admin_key.encode()

    def __call__(self, call: Call) -> AbstractAsyncContextManager[None]:
        """Check before the handler runs."""
        return self._checked(call)

    @asynccontextmanager
    async def _checked(self, call: Call) -> AsyncIterator[None]:
        if call.is_health:
            yield
            return
        access = self._access.get(call.method)
        if access is None:
            raise PermissionDenied(f"{call.method} is open to nobody")
        key = _bearer(call)
        is_admin = key is not None and hmac.compare_digest(key.encode(), self._admin_key)
        if access is Access.TENANT and is_admin:
            raise Unauthenticated("the admin key has no account", reason="ADMIN_KEY_HAS_NO_ACCOUNT")
        if access is Access.TENANT:
            _caller.set(await self._authenticator.caller_of(key))
        elif not is_admin:
            raise Unauthenticated("this call needs the admin key", reason="ADMIN_KEY_REQUIRED")
        yield


def _bearer(call: Call) -> str | None:
    for name, value in call.context.invocation_metadata() or ():
        if name != _AUTHORIZATION or not isinstance(value, str):
            continue
        if value[: len(_SCHEME)].lower() == _SCHEME:
            return value[len(_SCHEME) :].strip()
    return None


def _key_id_of(api_key: str) -> str | None:
    head, dot, secret = api_key.partition(".")
    key_id = head.removeprefix("tm_")
    well_formed = (
        len(api_key) <= _MAX_KEY_CHARS
        and head.startswith("tm_")
        and key_id.isascii()
        and key_id.isalnum()
        and bool(dot and secret)
    )
    return key_id if well_formed else None
