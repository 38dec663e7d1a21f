"""Read safetensors files from untrusted sources: every header field is checked before data are read.

Tensors are memory-mapped at each access: only the bytes that are used are read, and memory is freed with the view.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from mla_moe.checkpoint.files import CheckpointError, check, read_json
from mla_moe.checkpoint.hf_mapping import READ_BYTES
from mla_moe.config import ConfigError
from mla_moe.config.files import MAX_JSON_BYTES

if TYPE_CHECKING:
    from mla_moe.checkpoint.remote import RemoteCheckpoint

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
    "I8": np.dtype(np.int8),
}
WEIGHT_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
MAX_HEADER_BYTES = MAX_JSON_BYTES
"""Largest size of the headers of all files; those of Kimi-K2 have half. The format allows more."""
MAX_DIMENSIONS = 8


def weight_dtype(dtype: DTypeLike) -> np.dtype:
    """A dtype that parameters can have. Raises `ConfigError` for any other, and for an unknown name."""
    with contextlib.suppress(TypeError):
        if (known := np.dtype(dtype)) in WEIGHT_DTYPES:
            return known
    raise ConfigError("dtype", str(dtype), f"must be one of {', '.join(map(str, WEIGHT_DTYPES))}")


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
    """The tensors of a directory's safetensors files by name. Creating it reads and checks all headers, and raises
    `CheckpointError` for invalid files."""

    def __init__(self, directory: Path, remote: "RemoteCheckpoint | None" = None):
        """With `remote`, the weights are not in `directory`, and downloaded where data are read."""
        self.directory, self._remote = directory, remote
        self.stored: dict[str, TensorLocation] = {}
        left = MAX_HEADER_BYTES
        for path in remote.headers if remote else _files(directory):
            length, tensors = _read_header(path, left)
            left -= length
            for name, location in tensors.items():
                check(name not in self.stored, path.name, name, "is in two files; keep one")
                self.stored[name] = location

    def __getitem__(self, name: str) -> np.ndarray:
        """A read-only view into the file."""
        stored = self.stored[name]
        if 0 in stored.shape:
            return np.zeros(stored.shape, stored.dtype)
        path = self._remote.fetch(stored.path) if self._remote else stored.path
        data = np.memmap(path, np.uint8, "r", stored.offset, (stored.nbytes,))
        return data.view(np.ndarray).view(stored.dtype).reshape(stored.shape)

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """The elements in order, some at a time: pages of a mapped file count as this process's memory."""
        for start in range(0, int(np.prod(self.stored[name].shape)), READ_BYTES):
            yield self[name].reshape(-1)[start : start + READ_BYTES]


def _files(directory: Path) -> list[Path]:
    """The files of a checkpoint. As in transformers, `model.safetensors` has priority over an index, which may be left
    from an earlier save. Links to another disk are followed."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.exists():
        files = sorted(directory.glob("[!.]*.safetensors"))  # without hidden files
        check(len(files) > 0, "checkpoint", str(directory), "holds no .safetensors file")
        return files
    weight_map: Any = read_json(index).get("weight_map")
    valid = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    check(valid, index.name, "weight_map", "must map tensor names to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        local = Path(name).name == name and name.endswith(".safetensors")
        check(local, index.name, name, "must name a .safetensors file in the directory itself")
        check((directory / name).is_file(), index.name, name, "is missing; fetch it again")
    return [directory / name for name in names]


def _read_header(path: Path, max_bytes: int) -> tuple[int, dict[str, TensorLocation]]:
    """The size of a file's header, and its tensors: within the file, of the right size, without overlap."""
    check(path.is_file(), "checkpoint", str(path), "is not a file; fetch it again")
    size = path.stat().st_size
    check(size >= 8, path.name, f"{size} bytes", "is truncated; fetch it again")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        fix = f"is longer than the file, or than {MAX_HEADER_BYTES >> 20} MB with those of the other files"
        check(length <= min(size - 8, max_bytes), path.name, f"header of {length} bytes", fix)
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise CheckpointError(path.name, "header", "is not JSON; fetch the file again") from None
    check(isinstance(header, dict), path.name, "header", "must be a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _location(path, 8 + length, size, name, entry) for name, entry in header.items()}
    ranges = sorted((tensor.offset, tensor.offset + tensor.nbytes, name) for name, tensor in tensors.items())
    for (_, end, _), (begin, _, name) in itertools.pairwise(ranges):
        check(begin >= end, path.name, name, "overlaps another tensor")
    return length, tensors


def _location(path: Path, start: int, size: int, name: str, entry: Any) -> TensorLocation:
    """A tensor of a file of `size` bytes, whose data begin at byte `start`."""

    def sizes(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)

    ok = isinstance(entry, dict) and sizes(entry.get("shape")) and sizes(entry.get("data_offsets"))
    ok = ok and len(entry["shape"]) <= MAX_DIMENSIONS  # the product of a million sizes takes hours
    ok = ok and len(entry["data_offsets"]) == 2 and entry["data_offsets"][0] <= entry["data_offsets"][1]
    check(ok, path.name, name, "needs a dtype, a shape and two data_offsets")
    (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
    known = isinstance(entry.get("dtype"), str) and entry["dtype"] in DTYPES
    check(known, path.name, name, f"has type {entry.get('dtype')!r}; known are {', '.join(DTYPES)}")
    dtype = DTYPES[entry["dtype"]]
    fix = f"ends at byte {end} of {size - start}; the file is truncated; fetch it again"
    check(end <= size - start, path.name, name, fix)
    exact = end - begin == int(np.prod(shape, dtype=object)) * dtype.itemsize
    check(exact, path.name, name, f"has {end - begin} bytes, which is not {dtype} {list(shape)}")
    return TensorLocation(path, start + begin, dtype, shape)
