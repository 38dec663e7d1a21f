"""Read safetensors without trusting them: every claim of a header is checked before a byte of it is used.

A tensor is mapped anew each time it is asked for: only what is looked at is read, and its memory goes with the view.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mla_moe.config import ConfigError

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
}
MAX_HEADER = 100 << 20  # bytes, the limit of the format


class CheckpointError(ConfigError):
    """A file, what is wrong with it, and the fix."""


class TensorLocation(NamedTuple):
    """Where a tensor lies in its file, and what it is."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


class SafetensorsReader:
    """The tensors of a directory's safetensors files, by name. All headers are read and checked at once."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.stored: dict[str, TensorLocation] = {}
        for path in _files(directory):
            for name, stored in _open(path).items():
                if name in self.stored:
                    raise CheckpointError(path.name, name, "is in two files; keep one")
                self.stored[name] = stored

    def __getitem__(self, name: str) -> np.ndarray:
        """A read-only view into the file."""
        path, offset, dtype, shape = self.stored[name]
        if 0 in shape:
            return np.zeros(shape, dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        return np.memmap(path, np.uint8, "r", offset, (size,)).view(np.ndarray).view(dtype).reshape(shape)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("checkpoint", str(path), "no such file") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError("checkpoint", str(path), f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError("checkpoint", str(path), "must hold a JSON object")
    return value


def _files(directory: Path) -> list[Path]:
    """As transformers chooses: one file goes before an index, which may be left of an earlier save. Links to another
    disk are followed."""
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError("checkpoint", str(directory), "holds no .safetensors file")
        return files
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(index.name, "weight_map", "must map tensor names to file names")
    files = []
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(index.name, name, "must name a .safetensors file in the directory itself")
        if not (directory / name).is_file():
            raise CheckpointError(index.name, name, "is missing; fetch it again")
        files.append(directory / name)
    return files


def leaves(path: Path) -> bool:
    """Whether a link points out of the directory, other than into a download cache's `blobs` beside it."""
    target, home = path.resolve(), path.parent.resolve()
    return target.parent != home and target.parent != home.parent.parent / "blobs"


def _open(path: Path) -> dict[str, TensorLocation]:
    size = path.stat().st_size
    if size < 8:
        raise CheckpointError(path.name, f"{size} bytes", "is cut short; fetch it again")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER):
            raise CheckpointError(
                path.name, f"header of {length} bytes", "is longer than the file or the format allows"
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise CheckpointError(path.name, "header", "is not JSON; fetch the file again") from None
    if not isinstance(header, dict):
        raise CheckpointError(path.name, "header", "must be a JSON object")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        if end > size - start:
            raise CheckpointError(path.name, name, f"ends at byte {end} of {size - start}; the file is cut short")
        if end - begin != int(np.prod(shape, dtype=object)) * dtype.itemsize:
            raise CheckpointError(path.name, name, f"has {end - begin} bytes, which is not {dtype} {list(shape)}")
        spans.append((begin, end, name))
        tensors[name] = TensorLocation(path, start + begin, dtype, shape)
    for (_, end, _), (begin, _, name) in zip(sorted(spans), sorted(spans)[1:], strict=False):
        if begin < end:
            raise CheckpointError(path.name, name, "overlaps another tensor")
    return tensors


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    def whole(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)

    ok = isinstance(entry, dict) and whole(entry.get("shape")) and whole(entry.get("data_offsets"))
    if not ok or len(entry["data_offsets"]) != 2 or entry["data_offsets"][0] > entry["data_offsets"][1]:
        raise CheckpointError(path.name, name, "needs a dtype, a shape and two data_offsets")
    if not isinstance(entry.get("dtype"), str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(path.name, name, f"has type {entry.get('dtype')!r}; known are {', '.join(DTYPES)}")
    return DTYPES[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"]
