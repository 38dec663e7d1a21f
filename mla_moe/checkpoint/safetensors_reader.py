"""Read safetensors files from untrusted sources: every header field is checked before data are read.

Tensors are memory-mapped at each access: only the bytes that are used are read, and memory is freed with the view.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from mla_moe.checkpoint.files import CheckpointError, read_json
from mla_moe.config import ConfigError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
}
WEIGHT_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
MAX_HEADER_BYTES = 100 << 20  # the limit of the format


def weight_dtype(dtype: DTypeLike) -> np.dtype:
    """A dtype that parameters can have. Raises `ConfigError` for any other, and for an unknown name."""
    with contextlib.suppress(TypeError):
        if (known := np.dtype(dtype)) in WEIGHT_DTYPES:
            return known
    raise ConfigError("dtype", str(dtype), f"one of {', '.join(map(str, WEIGHT_DTYPES))}")


class TensorLocation(NamedTuple):
    """The position of a tensor in its file, its dtype and shape."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


class SafetensorsReader:
    """The tensors of a directory's safetensors files by name. All headers are read and checked when it is created."""

    def __init__(self, directory: Path):
        """Raises `CheckpointError` for invalid files."""
        self.directory = directory
        self.stored: dict[str, TensorLocation] = {}
        for path in _files(directory):
            for name, location in _read_header(path).items():
                if name in self.stored:
                    raise CheckpointError(path.name, name, "is in two files; keep one")
                self.stored[name] = location

    def __getitem__(self, name: str) -> np.ndarray:
        """A read-only view into the file."""
        stored = self.stored[name]
        if 0 in stored.shape:
            return np.zeros(stored.shape, stored.dtype)
        data = np.memmap(stored.path, np.uint8, "r", stored.offset, (stored.nbytes,))
        return data.view(np.ndarray).view(stored.dtype).reshape(stored.shape)


def _files(directory: Path) -> list[Path]:
    """The files of a checkpoint. As in transformers, `model.safetensors` has priority over an index, which may be left
    from an earlier save. Links to another disk are followed."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
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


def _read_header(path: Path) -> dict[str, TensorLocation]:
    """The tensors of a file. They must be within the file, of the right size, and must not overlap."""
    size = path.stat().st_size
    if size < 8:
        raise CheckpointError(path.name, f"{size} bytes", "is truncated; fetch it again")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
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
    tensors, ranges = {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _parse_entry(path, name, entry)
        if end > size - start:
            raise CheckpointError(
                path.name, name, f"ends at byte {end} of {size - start}; the file is truncated; fetch it again"
            )
        if end - begin != int(np.prod(shape, dtype=object)) * dtype.itemsize:
            raise CheckpointError(path.name, name, f"has {end - begin} bytes, which is not {dtype} {list(shape)}")
        ranges.append((begin, end, name))
        tensors[name] = TensorLocation(path, start + begin, dtype, shape)
    for (_, end, _), (begin, _, name) in zip(sorted(ranges), sorted(ranges)[1:], strict=False):
        if begin < end:
            raise CheckpointError(path.name, name, "overlaps another tensor")
    return tensors


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Dtype, shape, and the range of bytes."""

    def sizes(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)

    ok = isinstance(entry, dict) and sizes(entry.get("shape")) and sizes(entry.get("data_offsets"))
    if not ok or len(entry["data_offsets"]) != 2 or entry["data_offsets"][0] > entry["data_offsets"][1]:
        raise CheckpointError(path.name, name, "needs a dtype, a shape and two data_offsets")
    if not isinstance(entry.get("dtype"), str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(path.name, name, f"has type {entry.get('dtype')!r}; known are {', '.join(DTYPES)}")
    return DTYPES[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"]
