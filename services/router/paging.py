"""Page tokens: where an answer was broken off, bound to the question that it answers.

A token is opaque to its holder and holds nothing that is not the holder's own: places in his own
pages. One that was made for another question is refused; one that he makes up himself leads to no
other pages than his.
"""

import base64
import binascii
import hashlib
import json
from typing import Any

from google.protobuf.message import Message

from tidemill.errors import InvalidRequest

_PAGING = ("page_token", "page_size")


def page_token(request: Message, state: dict[str, int | str]) -> str:
    """A token for the page that follows, to be sent with the same request."""
    content = json.dumps({**state, "q": _question(request)}, separators=(",", ":"))
    return base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")


def page_state(request: Any, **kinds: type) -> dict[str, Any] | None:
    """The state in a request's page token, of these names and types; None for the first page.

    InvalidRequest for a token that is not of this request.
    """
    token: str = request.page_token
    if not token:
        return None
    try:
        state = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    except (ValueError, binascii.Error, RecursionError):
        state = None
    if not isinstance(state, dict) or state.pop("q", None) != _question(request):
        raise _refusal()
    if {name: type(value) for name, value in state.items()} != kinds:
        raise _refusal()
    if any(isinstance(value, int) and not 0 <= value < 1 << 63 for value in state.values()):
        raise _refusal()
    return state


def _refusal() -> InvalidRequest:
    return InvalidRequest(
        "page_token is not of this request",
        violations=[("page_token", "must be the last answer's, with all else unchanged")],
    )


def _question(request: Message) -> str:
    """Stands for everything in the request but its paging."""
    asked = type(request)()
    asked.CopyFrom(request)
    for name in _PAGING:
        asked.ClearField(name)
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).hexdigest()[:16]
