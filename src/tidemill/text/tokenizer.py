"""A model folder's tokeniser: text and conversations to token ids, with bounds."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Tokenizer as HfTokenizer

from tidemill.errors import CheckpointError, InvalidRequest
from tidemill.text.chat_template import ChatMessage, ChatTemplate
from tidemill.text.detokenizer import Detokenizer, byte_table
from tidemill.text.reasoning import OPENING
from tidemill.vocabulary import vocabulary_digest

MAX_PROMPT_BYTES = 1 << 20

_TAIL_TOKENS = 8  # "<think>" and a newline, even spelt letter by letter


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What the model's `generation_config.json` advises; what it leaves out is switched off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, fits in (
            ("temperature", 0 <= self.temperature <= 2),
            ("top_p", 0 < self.top_p <= 1),
            ("top_k", 0 <= self.top_k <= 1 << 20),
            ("min_p", 0 <= self.min_p <= 1),
            ("repetition_penalty", 0 < self.repetition_penalty <= 10),
        ):
            if not fits:
                raise ValueError(f"{name} is out of range: {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Byte-level BPE with the model's chat template and end tokens; made by `load`.

    Its methods may be called from several threads; encoding lets go of the GIL.
    `token_bytes[i]` holds the bytes of id `i`, empty for special tokens. `digest` is 32 bytes,
    equal for folders that turn the same input into the same ids; `vocabulary_digest` is that of
    `token_bytes`.
    """

    token_bytes: Sequence[bytes]
    eos_ids: frozenset[int]
    defaults: SamplingDefaults
    digest: bytes
    vocabulary_digest: bytes
    _encoder: HfTokenizer
    _leading_id: int | None
    _template: ChatTemplate | None

    @classmethod
    def load(cls, model_dir: Path | str) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json.

        Only the first must be there. CheckpointError names the file that is at fault.
        """
        folder = Path(model_dir)
        encoder, content = _load_encoder(folder / "tokenizer.json")
        config_path = folder / "tokenizer_config.json"
        config = _read_object(config_path)
        special = _special_tokens(config)
        template_source, origin = _template_source(config, folder)
        template = None
        if template_source is not None:
            template = ChatTemplate(template_source, special_tokens=special, origin=str(origin))
        generation_path = folder / "generation_config.json"
        generation = _read_object(generation_path)
        leading_id = _leading_id(encoder, config, special, config_path)
        identity = [content.decode(), template_source, sorted(special.items()), leading_id]
        token_bytes = byte_table(encoder)
        return cls(
            token_bytes=token_bytes,
            eos_ids=_eos_ids(encoder, generation, special, generation_path),
            defaults=_sampling_defaults(generation, generation_path),
            digest=hashlib.sha256(json.dumps(identity).encode()).digest(),
            vocabulary_digest=vocabulary_digest(token_bytes),
            _encoder=encoder,
            _leading_id=leading_id,
            _template=template,
        )

    @property
    def vocab_size(self) -> int:
        """Largest id plus one."""
        return len(self.token_bytes)

    def encode(
        self, text: str, *, max_bytes: int = MAX_PROMPT_BYTES, field: str = "prompt"
    ) -> list[int]:
        """Ids of a prompt, after the model's begin token where it has one.

        InvalidRequest naming `field` if the text is empty, not UTF-8, or longer than `max_bytes`.
        """
        if not text:
            _refuse(field, "is empty")
        _count_bytes([text], max_bytes, field)
        ids: list[int] = self._encoder.encode(text, add_special_tokens=True).ids
        if self._leading_id is not None and ids[:1] != [self._leading_id]:
            ids.insert(0, self._leading_id)
        return ids

    def encode_chat(
        self, messages: Sequence[ChatMessage], *, max_bytes: int = MAX_PROMPT_BYTES
    ) -> list[int]:
        """Ids of a conversation as the chat template lays it out for the assistant to go on.

        InvalidRequest as in `ChatTemplate.render`, if the contents together are longer than
        `max_bytes` or not UTF-8, or if the model has no template.
        """
        if self._template is None:
            _refuse("messages", "need a chat template and this model has none: send a prompt")
        _count_bytes([message.content for message in messages], max_bytes, "messages")
        text = self._template.render(messages)
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids

    def check_ids(self, token_ids: Sequence[int], *, field: str = "token_ids") -> None:
        """InvalidRequest naming `field` if there are no ids, or one that is no token."""
        if not token_ids:
            _refuse(field, "is empty")
        for extreme in (min(token_ids), max(token_ids)):
            if not 0 <= extreme < self.vocab_size:
                _refuse(
                    field, f"holds {extreme}, which is no token: ids end at {self.vocab_size - 1}"
                )
        for token_id in set(token_ids):
            if self._encoder.id_to_token(token_id) is None:
                _refuse(field, f"holds {token_id}, which is no token")

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids, special tokens skipped."""
        detokenizer = Detokenizer(self.token_bytes)
        parts = [detokenizer.push(token_id) for token_id in token_ids]
        return "".join(parts) + detokenizer.finish()

    def opens_reasoning(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the prompt ends with `<think>`, so that the completion starts inside it."""
        return self.decode(prompt_ids[-_TAIL_TOKENS:]).rstrip().endswith(OPENING)


def _refuse(field: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"{field} {problem}", violations=[(field, problem)])


def _count_bytes(texts: Sequence[str], max_bytes: int, field: str) -> None:
    num_chars = sum(map(len, texts))
    if num_chars > max_bytes:
        _refuse(field, f"has {num_chars} characters, at most {max_bytes} bytes are allowed")
    try:
        num_bytes = sum(len(text.encode()) for text in texts)
    except UnicodeEncodeError:
        _refuse(field, "is not valid Unicode: it holds a lone surrogate")
    if num_bytes > max_bytes:
        _refuse(field, f"has {num_bytes} bytes, at most {max_bytes} are allowed")


def _load_encoder(path: Path) -> tuple[HfTokenizer, bytes]:
    try:
        content = path.read_bytes()
        encoder = HfTokenizer.from_str(content.decode())
        decoder = json.loads(content).get("decoder") or {}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # the tokenizers library raises no narrower type
        raise CheckpointError(f"{path} is no tokeniser: {error}") from error
    if decoder.get("type") != "ByteLevel":
        raise CheckpointError(
            f"{path}: decoder is {decoder.get('type')!r}, only 'ByteLevel' is supported"
        )
    encoder.no_padding()
    encoder.no_truncation()
    return encoder, content


def _read_object(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and kin; an entry is the text or an object that holds it as `content`."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _template_source(config: Mapping[str, Any], folder: Path) -> tuple[str | None, Path]:
    """The template and the file it stands in: a file of its own wins, as in transformers."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8"), path
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    path = folder / "tokenizer_config.json"
    template = config.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: chat_template must be text")
    return template, path


def _leading_id(
    encoder: HfTokenizer, config: Mapping[str, Any], special: Mapping[str, str], path: Path
) -> int | None:
    if not config.get("add_bos_token"):
        return None
    token = special.get("bos_token", "")
    token_id: int | None = encoder.token_to_id(token)
    if token_id is None:
        raise CheckpointError(f"{path}: bos_token {token!r} is no token of the vocabulary")
    return token_id


def _eos_ids(
    encoder: HfTokenizer, generation: Mapping[str, Any], special: Mapping[str, str], path: Path
) -> frozenset[int]:
    value = generation.get("eos_token_id", encoder.token_to_id(special.get("eos_token", "")))
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if type(token_id) is not int or encoder.id_to_token(token_id) is None:
            raise CheckpointError(f"{path}: eos_token_id {token_id!r} is no token")
    return frozenset(ids)


def _sampling_defaults(generation: Mapping[str, Any], path: Path) -> SamplingDefaults:
    given = {
        entry.name: generation[entry.name]
        for entry in fields(SamplingDefaults)
        if generation.get(entry.name) is not None
    }
    try:
        numbers: dict[str, Any] = {name: float(value) for name, value in given.items()}
        if "top_k" in numbers:
            numbers["top_k"] = int(numbers["top_k"])
        return SamplingDefaults(**numbers)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: a sampling value is wrong: {error}") from error
