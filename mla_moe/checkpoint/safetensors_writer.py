"""Write safetensors files shard by shard, computing and flushing to disk in the background."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mla_moe.checkpoint import fp8 as fp8_blocks
from mla_moe.checkpoint.destination import new_directory
from mla_moe.checkpoint.files import flush_to_disk, progress_bar, write_side_files
from mla_moe.checkpoint.safetensors_reader import DTYPES

SHARD_BYTES = 5 << 30
_FLUSH_BYTES = 128 << 20
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Read = Callable[[np.dtype], Iterable[np.ndarray]]
"""Computes the rows of a tensor in a dtype, some at a time, in order."""


class TensorEntry(NamedTuple):
    """A tensor to write. Its chunks, some rows each, are computed one by one when it is written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def tensor_entries(
    name: str, stored: np.dtype, dtype: np.dtype, shape: tuple[int, ...], read: Read, *, fp8: bool
) -> list[TensorEntry]:
    """A tensor to write in `dtype`; with `fp8`, if released checkpoints quantize it, in FP8 blocks and followed by its
    scales. Chunks must then be complete blocks. Quantized are the `stored` values, without rounding to `dtype`."""
    if not (fp8 and fp8_blocks.is_quantized(name)):
        return [TensorEntry(name, dtype, shape, partial(read, dtype))]
    scales: list[np.ndarray] = []

    def quantized() -> Iterable[np.ndarray]:
        for chunk in read(stored):
            values, scale = fp8_blocks.quantize(chunk)
            scales.append(scale)
            yield values

    scale_shape = fp8_blocks.scale_shape(shape)
    return [
        TensorEntry(name, fp8_blocks.E4M3, shape, quantized),
        TensorEntry(fp8_blocks.scale_name(name), np.dtype(np.float32), scale_shape, lambda: scales),
    ]


def write_checkpoint(
    path: str | Path,
    config: dict[str, Any],
    entries: Sequence[TensorEntry],
    max_shard_bytes: int,
    files: Mapping[str, Path],
) -> None:
    """Write tensors as `model.safetensors`, or as numbered shards of at most `max_shard_bytes` and their index, their
    `config.json`, and copies of `files` by name. The directory appears only when it is complete; a URL
    of the Hub is one commit. Raises `CheckpointError` if the directory exists, and `ConfigError` if the Hub refuses."""
    shards: list[list[TensorEntry]] = [[]]
    filled, total = 0, sum(entry.nbytes for entry in entries)
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    with new_directory(path) as (directory, finish), progress_bar("Writing", total) as advance:
        for name, shard in zip(names, shards, strict=True):
            write_file(directory / name, shard, advance)
            finish(directory / name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        write_side_files(directory, config, files)


def write_file(path: Path, entries: Sequence[TensorEntry], advance: Callable[[int], None]) -> None:
    """Write a safetensors file; `advance` is told the bytes of each chunk."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        offsets = [offset, offset := offset + entry.nbytes]
        header[entry.name] = {"dtype": _DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, ThreadPoolExecutor(1) as pool:
        file.write(len(text).to_bytes(8, "little") + text)
        flushed, unflushed_bytes = pool.submit(int), 0
        chunks = (np.ascontiguousarray(chunk, dtype=e.dtype) for e in entries for chunk in e.chunks())
        for chunk in _prefetched(chunks):
            raw = chunk.reshape(-1).view(np.uint8)
            file.write(raw.data)
            advance(raw.size)
            unflushed_bytes += raw.size
            if unflushed_bytes > _FLUSH_BYTES and flushed.done():
                file.flush()
                flushed, unflushed_bytes = pool.submit(flush_to_disk, file.fileno()), 0
        flushed.result()
        file.flush()
        flush_to_disk(file.fileno())


def _prefetched(items: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same items. The next one is computed in a thread while the last one is used."""
    take: Callable[[], np.ndarray | None] = partial(next, items, None)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(take)
        while (item := pending.result()) is not None:
            pending = pool.submit(take)
            yield item
