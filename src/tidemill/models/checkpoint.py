"""Weights of a Hugging Face folder: safetensors files, one or many, read tensor by tensor."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tidemill.errors import CheckpointError
from tidemill.models.config import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DIGEST_SAMPLE_BYTES = 64 * 1024

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies: bytes [start, start + size) of the file at `path`."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class Checkpoint:
    """Named tensors of one model folder. Opening reads headers; `tensor` reads one tensor.

    Read, not mapped: pages of a mapped file stay in the process's memory beside the copies that
    packing and fusing make. Raises CheckpointError, which names the tensor and both shapes, for a
    tensor that is missing, mis-shaped, of another dtype, or cut off because its file was truncated.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self._entries = _read_headers(model_dir)

    @property
    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def size(self, name: str) -> int:
        """Bytes of the tensor `name` on disk."""
        return self._entries[name].size

    def dtype(self, name: str) -> torch.dtype | None:
        """What the tensor `name` is stored as; None without one."""
        entry = self._entries.get(name)
        return None if entry is None else entry.dtype

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtypes: Sequence[torch.dtype] = PLAIN_DTYPES,
    ) -> Tensor:
        """The tensor `name` in memory of its own; it must have exactly `shape`, one of `dtypes`."""
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(
                f"{self.model_dir}: tensor {name!r} is missing, expected shape {list(shape)}",
                tensor=name,
                expected=tuple(shape),
            )
        problem = None
        if entry.shape != tuple(shape):
            problem = f"has shape {list(entry.shape)}, expected {list(shape)}"
        elif entry.dtype not in dtypes:
            expected = " or ".join(_short(dtype) for dtype in dtypes)
            problem = f"of shape {list(shape)} is {_short(entry.dtype)}, expected {expected}"
        if problem is not None:
            raise CheckpointError(
                f"{entry.path}: tensor {name!r} {problem}",
                tensor=name,
                shape=entry.shape,
                expected=tuple(shape),
            )
        value = torch.empty(entry.shape, dtype=entry.dtype)
        _read(entry, 0, value.view(-1).view(torch.uint8))
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
            entry = self._entries[name]
            _update(sha, f"{name} {entry.dtype} {list(entry.shape)}".encode())
            sample = torch.empty(min(entry.size, DIGEST_SAMPLE_BYTES), dtype=torch.uint8)
            for offset in (0, entry.size - len(sample)):
                _read(entry, offset, sample)
                _update(sha, sample.numpy().tobytes())
        return sha.digest()


def _read(entry: _Entry, offset: int, into: Tensor) -> None:
    """Fill `into` (bytes) from `offset` of the tensor on."""
    view = into.numpy().data
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.start + offset)
        while view:
            count = file.readinto(view)
            if not count:
                raise CheckpointError(f"{entry.path}: shorter than when it was opened")
            view = view[count:]


def _update(sha: "hashlib._Hash", part: bytes) -> None:
    sha.update(len(part).to_bytes(8, "little"))
    sha.update(part)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_headers(model_dir: Path) -> dict[str, _Entry]:
    """Every tensor's place, by its name: as the index says, or all of the only file."""
    if not (model_dir / INDEX_FILE).exists():
        return _read_header(model_dir / SINGLE_FILE)
    weight_map = read_json(model_dir / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{model_dir / INDEX_FILE}: key 'weight_map' is missing or empty")
    for file in set(weight_map.values()):
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{model_dir / INDEX_FILE}: {file!r} is not a file name")
    headers = {file: _read_header(model_dir / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(
                f"{model_dir / file}: tensor {name!r} is in the index but not in the file"
            )
    return {name: headers[file][name] for name, file in weight_map.items()}


def _read_header(path: Path) -> dict[str, _Entry]:
    """The tensors of one file, after safetensors found its header whole and its ranges sound."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {_first_cut_tensor(path) or error}") from error
    length, header = _parse_header(path)
    entries: dict[str, _Entry] = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} of shape {entry['shape']} is {entry['dtype']}, "
                f"expected one of {', '.join(_DTYPES)}",
                tensor=name,
                shape=tuple(entry["shape"]),
            )
        begin, end = entry["data_offsets"]
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        assert end - begin == math.prod(shape) * dtype.itemsize  # safetensors has checked it
        entries[name] = _Entry(path, dtype, shape, 8 + length + begin, end - begin)
    return entries


def _parse_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Length of the JSON header and its tensors; ValueError if it is none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return length, header


def _first_cut_tensor(path: Path) -> str | None:
    """What a truncated file lacks, from its own header; None if the header itself is unreadable."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > size:
        return f"truncated inside its header ({size} bytes, header of {length})"
    try:
        _, header = _parse_header(path)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][1]):
            end = 8 + length + entry["data_offsets"][1]
            if end > size:
                return (
                    f"truncated: tensor {name!r} of shape {entry['shape']} ends at byte {end}, "
                    f"the file at {size}"
                )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return None
