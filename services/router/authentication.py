"""Who is calling: a guard that lets nobody through without a key."""

import hmac
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from enum import Enum

from services.router.keys import Authenticator, Tenant
from tidemill.errors import PermissionDenied, Unauthenticated
from tidemill.rpc.interceptors import Call

_AUTHORIZATION = "authorization"
_SCHEME = "bearer "

_tenant: ContextVar[Tenant] = ContextVar("tenant")


class Access(Enum):
    """Whose key opens a method."""

    TENANT = "tenant"
    ADMIN = "admin"


def current_tenant() -> Tenant:
    """The tenant whose key opened the call that is being handled."""
    return _tenant.get()


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
        if access is Access.TENANT:
            _tenant.set(await self._authenticator.tenant_of(key))
        elif not key or not hmac.compare_digest(key.encode(), self._admin_key):
            raise Unauthenticated("this call needs the admin key", reason="ADMIN_KEY_REQUIRED")
        yield


def _bearer(call: Call) -> str | None:
    for name, value in call.context.invocation_metadata() or ():
        if name != _AUTHORIZATION or not isinstance(value, str):
            continue
        if value[: len(_SCHEME)].lower() == _SCHEME:
            return value[len(_SCHEME) :].strip()
    return None
