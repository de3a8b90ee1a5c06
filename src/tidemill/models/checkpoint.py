"""Weights of a Hugging Face folder: safetensors files, one or many, mapped tensor by tensor."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tidemill.errors import CheckpointError
from tidemill.models.config import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DIGEST_SAMPLE_BYTES = 64 * 1024


class Checkpoint:
    """Named tensors of one model folder. Opening reads headers; `tensor` maps one tensor's pages.

    Raises CheckpointError, which names the tensor and both shapes, for a tensor that is missing,
    mis-shaped, not floating point, or cut off because its file was truncated.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self._file_of = _locate_tensors(model_dir)
        self._files = {path: _open(path) for path in sorted(set(self._file_of.values()))}
        held = {path: frozenset(_names(file)) for path, file in self._files.items()}
        for name, path in self._file_of.items():
            if name not in held[path]:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is in the index but not in the file"
                )

    @property
    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """The tensor `name`, sharing the file's pages; it must have exactly `shape`."""
        path = self._file_of.get(name)
        if path is None:
            raise CheckpointError(
                f"{self.model_dir}: tensor {name!r} is missing, expected shape {list(shape)}",
                tensor=name,
                expected=tuple(shape),
            )
        value: Tensor = _get(self._files[path], name)
        if tuple(value.shape) != tuple(shape):
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {list(value.shape)}, expected {list(shape)}",
                tensor=name,
                shape=tuple(value.shape),
                expected=tuple(shape),
            )
        if not value.is_floating_point() or value.element_size() < 2:
            raise CheckpointError(
                f"{path}: tensor {name!r} of shape {list(shape)} is {value.dtype}, "
                "expected bfloat16, float16 or float32",
                tensor=name,
                shape=tuple(value.shape),
                expected=tuple(shape),
            )
        return value

    def digest(self) -> bytes:
        """SHA-256 that identifies the model: 32 bytes.

        Over `config.json`, then for every tensor in name order its name, dtype, shape and the first
        and last 64 KiB of its bytes. Sampled, so that a 600 GB model is identified in seconds: it
        tells models and fine-tunes apart, it does not prove that no byte was altered.
        """
        sha = hashlib.sha256(b"tidemill.model.v1")
        _update(sha, (self.model_dir / "config.json").read_bytes())
        for name in self.names:
            value: Tensor = _get(self._files[self._file_of[name]], name)
            _update(sha, f"{name} {value.dtype} {list(value.shape)}".encode())
            raw = value.contiguous().view(-1).view(torch.uint8)
            _update(sha, raw[:DIGEST_SAMPLE_BYTES].numpy().tobytes())
            _update(sha, raw[-DIGEST_SAMPLE_BYTES:].numpy().tobytes())
        return sha.digest()


def _update(sha: "hashlib._Hash", part: bytes) -> None:
    sha.update(len(part).to_bytes(8, "little"))
    sha.update(part)


def _locate_tensors(model_dir: Path) -> dict[str, Path]:
    if (model_dir / INDEX_FILE).exists():
        weight_map = read_json(model_dir / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{model_dir / INDEX_FILE}: key 'weight_map' is missing or empty")
        for file in set(weight_map.values()):
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{model_dir / INDEX_FILE}: {file!r} is not a file name")
        return {name: model_dir / file for name, file in weight_map.items()}
    path = model_dir / SINGLE_FILE
    return dict.fromkeys(_names(_open(path)), path)


def _open(path: Path) -> safe_open:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {_first_cut_tensor(path) or error}") from error


def _names(file: safe_open) -> list[str]:
    return list(file.keys())  # type: ignore[no-untyped-call]  # safetensors has no types


def _get(file: safe_open, name: str) -> Tensor:
    tensor: Tensor = file.get_tensor(name)  # type: ignore[no-untyped-call]  # no types either
    return tensor


def _first_cut_tensor(path: Path) -> str | None:
    """What a truncated file lacks, from its own header; None if the header itself is unreadable."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if length > size:
            return f"truncated inside its header ({size} bytes, header of {length})"
        try:
            header = json.loads(file.read(length))
            entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
            for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"][1]):
                end = 8 + length + entry["data_offsets"][1]
                if end > size:
                    return (
                        f"truncated: tensor {name!r} of shape {entry['shape']} ends at byte {end}, "
                        f"the file at {size}"
                    )
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
    return None
