"""Write safetensors shard by shard, and a directory all at once or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mla_moe.interop.reader import DTYPES, CheckpointError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor to be written; its value is asked for when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    value: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


@contextlib.contextmanager
def whole_directory(path: Path) -> Generator[Path]:
    """A directory beside `path` that becomes `path` when the block ends well, and vanishes when it does not."""
    if path.exists():
        raise CheckpointError("path", str(path), "exists already; choose another or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        os.rename(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished)
        raise


def write_shards(directory: Path, entries: Sequence[Entry], max_bytes: int) -> None:
    """`model.safetensors`, or numbered shards of at most `max_bytes` and their index."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.bytes for e in shards[-1]) + entry.bytes > max_bytes:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        _write(directory / "model.safetensors", shards[0])
        return
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        _write(directory / file, shard)
    weight_map = {entry.name: file for file, shard in zip(files, shards, strict=True) for entry in shard}
    index = {"metadata": {"total_size": sum(e.bytes for e in entries)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write(path: Path, entries: Sequence[Entry]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        span = [offset, offset := offset + entry.bytes]
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            value = np.ascontiguousarray(entry.value(), dtype=entry.dtype)
            file.write(value.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
