"""From the arguments of `generate` and `chat` to one GenerateRequest."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypedDict, Unpack
from uuid import uuid4

from tidemill.api.common.v1.sampling_pb2 import Sampling
from tidemill.api.router.v1 import router_service_pb2 as pb
from tidemill.client.types import MaxCost, Message
from tidemill.errors import InvalidRequest
from tidemill.rpc.options import PUBLIC_MESSAGE_BYTES

Conversation = str | Sequence[Message | Mapping[str, str]]

DEFAULT_TIMEOUT_S: Final = 1800.0
_MOST_GRACE_S: Final = 2.0
_ROLES: Final = {
    "system": pb.CHAT_ROLE_SYSTEM,
    "user": pb.CHAT_ROLE_USER,
    "assistant": pb.CHAT_ROLE_ASSISTANT,
}

_PRIORITIES: Final = {
    None: pb.PRIORITY_UNSPECIFIED,
    "standard": pb.PRIORITY_STANDARD,
    "batch": pb.PRIORITY_BATCH,
}

_NUMBERS: Final = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
    "prompt_logprobs",
    "n",
)


class Options(TypedDict, total=False):
    """Options of one request; what is left out takes the router's default.

    max_tokens: most completion tokens. min_tokens: neither a stop token nor a stop string ends
    the completion before. temperature: 0 is greedy. top_p: nucleus mass in (0, 1]. top_k: 0 is
    off. min_p: least share of the likeliest token's probability. seed: of the noise; drawn by the
    router and reported when left out. stop: texts that end the completion and are not part of it.
    stop_token_ids: beside the model's own. ignore_eos: go on after the model's own.

    repetition_penalty: on tokens of prompt and completion, 1 is off. presence_penalty and
    frequency_penalty: on those of the completion, 0 is off. logit_bias: added by token id.
    logprobs, prompt_logprobs: tell how likely each token of completion or prompt was, with so
    many alternatives. n: completions of the one prompt, which is billed once. response_format:
    "json" for any JSON object, or a JSON schema.

    max_cost: refuse a request that could cost more. request_id: idempotency key, a UUID by
    default. timeout: seconds for the whole answer, 1800 by default; the router ends a late one
    with its bill. first_token_timeout: seconds to the first token; the router refuses at once
    what it expects to be later. priority: "batch" gets what standard requests leave, and a small
    share beside them.
    """

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    min_tokens: int | None
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    n: int | None
    response_format: Literal["json"] | Mapping[str, Any] | None
    max_cost: MaxCost | None
    request_id: str | None
    timeout: float | None
    first_token_timeout: float | None
    priority: Literal["standard", "batch"] | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to be sent, as often as need be: every attempt has the same body.

    `timeout_s` bounds all attempts together. It is a little more than the router was told, so
    that the router's own end, which carries the bill, arrives first.
    """

    message: pb.GenerateRequest
    timeout_s: float


def prepare_prompt(
    model: str,
    prompt: str | None,
    token_ids: Sequence[int] | None,
    options: Options,
) -> Prepared:
    """A request to continue `prompt`, or the prompt that `token_ids` are; exactly one of them.

    InvalidRequest where a value cannot even be written down; all other judgement is the
    router's.
    """
    if (prompt is None) == (token_ids is None):
        raise TypeError("give either a prompt or token_ids")
    message = pb.GenerateRequest(model=model)
    if prompt is not None:
        with _Field("prompt"):
            message.prompt = prompt
    else:
        with _Field("tokens.token_ids"):
            message.tokens.SetInParent()
            message.tokens.token_ids.extend(token_ids or ())
    return _prepare(message, **options)


def prepare_chat(model: str, messages: Conversation, options: Options) -> Prepared:
    """A request to answer a conversation; a plain string is one message of the user."""
    if isinstance(messages, str):
        messages = [Message("user", messages)]
    request = pb.GenerateRequest(model=model)
    request.chat.SetInParent()
    for index, item in enumerate(messages):
        entry = item if isinstance(item, Message) else _message(item, index)
        if entry.role not in _ROLES:
            path = f"chat.messages[{index}].role"
            description = f"{entry.role!r} is none of {', '.join(_ROLES)}"
            raise InvalidRequest(f"{path}: {description}", violations=[(path, description)])
        with _Field(f"chat.messages[{index}].content"):
            request.chat.messages.add(role=_ROLES[entry.role], content=entry.content)
    return _prepare(request, **options)


def prepare_quote(
    model: str,
    prompt: str | None,
    token_ids: Sequence[int] | None,
    messages: Conversation | None,
    options: Options,
) -> Prepared:
    """A request to be quoted: one of the three is what `generate` or `chat` would be given."""
    if messages is None:
        return prepare_prompt(model, prompt, token_ids, options)
    if prompt is not None or token_ids is not None:
        raise TypeError("give a prompt, token_ids or messages, only one of them")
    return prepare_chat(model, messages, options)


def _message(item: Mapping[str, str], index: int) -> Message:
    if item.keys() != {"role", "content"}:
        raise TypeError(f"messages[{index}] must have role and content, has {sorted(item)}")
    return Message(item["role"], item["content"])


def _prepare(message: pb.GenerateRequest, **options: Unpack[Options]) -> Prepared:
    if unknown := options.keys() - Options.__annotations__.keys():
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    timeout_s, first_token_s = options.get("timeout"), options.get("first_token_timeout")
    stop = options.get("stop") or ()
    with _Field("request_id"):
        message.request_id = options.get("request_id") or str(uuid4())
    with _Field("stop"):
        message.stop.extend([stop] if isinstance(stop, str) else stop)
    with _Field("max_cost"):
        if max_cost := options.get("max_cost"):
            message.max_cost.currency, message.max_cost.nano = max_cost.currency, max_cost.nano
    with _Field("total_timeout_ms"):
        if timeout_s is not None:
            message.total_timeout_ms = round(timeout_s * 1000)
    with _Field("first_token_timeout_ms"):
        if first_token_s is not None:
            message.first_token_timeout_ms = round(first_token_s * 1000)
    message.priority = _priority(options.get("priority"))
    _sampling(message.sampling, options)
    _response_format(message, options.get("response_format"))
    if message.ByteSize() > PUBLIC_MESSAGE_BYTES:
        raise InvalidRequest(
            f"the request takes {message.ByteSize()} bytes, more than {PUBLIC_MESSAGE_BYTES}",
            reason="MESSAGE_TOO_LARGE",
            request_id=message.request_id,
        )
    allowed_s = DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s
    return Prepared(message, allowed_s + min(_MOST_GRACE_S, allowed_s))


def _priority(name: str | None) -> "pb.Priority.ValueType":
    if name not in _PRIORITIES:
        description = f"{name!r} is neither 'standard' nor 'batch'"
        raise InvalidRequest(f"priority: {description}", violations=[("priority", description)])
    return _PRIORITIES[name]


def _sampling(sampling: Sampling, options: Options) -> None:
    for name in _NUMBERS:
        value = options.get(name)
        if value is not None:
            with _Field(f"sampling.{name}"):
                setattr(sampling, name, value)
    with _Field("sampling.stop_token_ids"):
        if stop_token_ids := options.get("stop_token_ids"):
            sampling.stop_token_ids.extend(stop_token_ids)
    with _Field("sampling.logit_bias"):
        if logit_bias := options.get("logit_bias"):
            sampling.logit_bias.update(logit_bias)
    if options.get("ignore_eos"):
        sampling.ignore_eos = True


def _response_format(
    message: pb.GenerateRequest, wanted: Literal["json"] | Mapping[str, Any] | None
) -> None:
    if wanted is None:
        return
    if wanted == "json":
        message.response_format.json_object.SetInParent()
        return
    if not isinstance(wanted, Mapping):
        raise TypeError(f'response_format must be "json" or a JSON schema, is {wanted!r:.40}')
    with _Field("response_format.json_schema.schema"):
        message.response_format.json_schema.schema = json.dumps(wanted, allow_nan=False)


class _Field:
    """Names the field whose value protobuf refuses: out of its type's range, or not UTF-8."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (ValueError, OverflowError)):
            raise InvalidRequest(
                f"{self._path}: {error}", violations=[(self._path, str(error))]
            ) from error
