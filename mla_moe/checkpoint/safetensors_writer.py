"""Write safetensors shard by shard, and a directory all at once or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mla_moe.checkpoint import fp8 as blocks
from mla_moe.checkpoint.progress import progress
from mla_moe.checkpoint.safetensors_reader import DTYPES, CheckpointError

SHARD_BYTES = 5 << 30
_FLUSH_BYTES = 128 << 20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorEntry(NamedTuple):
    """A tensor to be written; its parts, rows after rows, are asked for when their turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[np.ndarray]]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


Parts = Callable[[], Iterable[np.ndarray]]


def tensor_entries(name: str, dtype: np.dtype, shape: tuple[int, ...], parts: Parts, *, fp8: bool) -> list[TensorEntry]:
    """A tensor to be written as it is, or with `fp8` in blocks and followed by its scale, if it is one that released
    checkpoints have in blocks. Parts must be whole blocks then."""
    if not (fp8 and blocks.is_quantised(name)):
        return [TensorEntry(name, dtype, shape, parts)]
    scales: list[np.ndarray] = []

    def weight() -> Iterable[np.ndarray]:
        for part in parts():
            numbers, scale = blocks.quantise(part)
            scales.append(scale)
            yield numbers

    return [
        TensorEntry(name, blocks.E4M3, shape, weight),
        TensorEntry(blocks.scale_name(name), np.dtype(np.float32), blocks.scale_shape(shape), lambda: scales),
    ]


def write_checkpoint(
    path: Path, config: dict[str, Any], entries: Sequence[TensorEntry], max_bytes: int, others: Mapping[str, Path]
) -> None:
    """Tensors, their config.json, and copies of `others` by name: a directory that is whole or does not exist."""
    with atomic_directory(path) as directory, progress("Writing", sum(e.bytes for e in entries)) as advance:
        write_shards(directory, entries, max_bytes, advance)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name, other in others.items():
            shutil.copyfile(other, directory / name)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Generator[Path]:
    """A directory beside `path` that becomes `path` when the block ends well, and vanishes when it does not."""
    if os.path.lexists(path):
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


def write_shards(
    directory: Path, entries: Sequence[TensorEntry], max_bytes: int, advance: Callable[[int], None]
) -> None:
    """`model.safetensors`, or numbered shards of at most `max_bytes` and their index. `advance` is
    told of bytes written."""
    shards: list[list[TensorEntry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.bytes
    if len(shards) == 1:
        _write(directory / "model.safetensors", shards[0], advance)
        return
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        _write(directory / file, shard, advance)
    weight_map = {entry.name: file for file, shard in zip(files, shards, strict=True) for entry in shard}
    index = {"metadata": {"total_size": sum(e.bytes for e in entries)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write(path: Path, entries: Sequence[TensorEntry], advance: Callable[[int], None]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        span = [offset, offset := offset + entry.bytes]
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, ThreadPoolExecutor(1) as pool:
        file.write(len(text).to_bytes(8, "little") + text)
        flushed, unflushed = pool.submit(int), 0
        for raw in _ahead(_raw(entries)):
            file.write(raw.data)
            advance(raw.size)
            unflushed += raw.size
            if unflushed > _FLUSH_BYTES and flushed.done():
                file.flush()
                flushed, unflushed = pool.submit(flush, file.fileno()), 0
        flushed.result()
        file.flush()
        flush(file.fileno())


def flush(file: int) -> None:
    """To the disk, and out of memory: what is written is not read again, and a file larger than the host would push
    everything else out."""
    os.fsync(file)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _raw(entries: Sequence[TensorEntry]) -> Iterator[np.ndarray]:
    for entry in entries:
        for part in entry.parts():
            yield np.ascontiguousarray(part, dtype=entry.dtype).reshape(-1).view(np.uint8)


def _ahead(items: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same items, the next one made while the last one is used."""

    def take() -> np.ndarray | None:
        return next(items, None)

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(take)
        while (item := coming.result()) is not None:
            coming = pool.submit(take)
            yield item
