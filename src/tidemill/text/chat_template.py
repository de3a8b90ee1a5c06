"""Renders a model's chat template as Hugging Face does (`apply_chat_template`), sandboxed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tidemill.errors import CheckpointError, InvalidRequest

ROLES = ("system", "user", "assistant")
MAX_MESSAGES = 1024


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


class ChatTemplate:
    """A compiled template; safe to render from several threads.

    `special_tokens` are its variables (`bos_token`, `eos_token`, ...). CheckpointError if it is
    no template; `origin` is the file that errors name.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str], origin: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"{origin}: the chat template is broken: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt text, ending where the assistant is to go on.

        InvalidRequest if there is no message, a role is unknown, a user message is empty, or
        the template itself refuses the conversation.
        """
        _require_conversation(messages)
        try:
            return self._template.render(
                messages=[asdict(message) for message in messages],
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except TemplateError as error:
            problem = f"the model's chat template refuses the conversation: {error}"
            raise InvalidRequest(problem, violations=[("messages", problem)]) from error


def _require_conversation(messages: Sequence[ChatMessage]) -> None:
    if not 1 <= len(messages) <= MAX_MESSAGES:
        problem = f"{len(messages)} messages, must be 1 to {MAX_MESSAGES}"
        raise InvalidRequest(problem, violations=[("messages", problem)])
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            _refuse(index, "role", f"must be one of {', '.join(ROLES)}, got {message.role!r:.40}")
        if message.role == "user" and not message.content:
            _refuse(index, "content", "is empty")


def _refuse(index: int, part: str, problem: str) -> NoReturn:
    field = f"messages[{index}].{part}"
    raise InvalidRequest(f"{field} {problem}", violations=[(field, problem)])


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: object, indent: int | None = None) -> str:
    """As Hugging Face's filter: unlike Jinja's own it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
