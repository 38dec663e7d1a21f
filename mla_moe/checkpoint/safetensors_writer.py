"""Write safetensors files shard by shard, computing and flushing to disk in the background."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mla_moe.checkpoint import compressed_tensors, fp8
from mla_moe.checkpoint.destination import new_directory
from mla_moe.checkpoint.files import flush_to_disk, progress_bar, write_side_files
from mla_moe.checkpoint.quantization import Scheme, written_config
from mla_moe.checkpoint.safetensors_reader import BFLOAT16, DTYPES, WEIGHT_DTYPES
from mla_moe.config import ModelConfig

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
    name: str, stored: np.dtype, dtype: np.dtype, shape: tuple[int, ...], read: Read, quantize: Scheme | None
) -> list[TensorEntry]:
    """A tensor to write in `dtype`; one that `quantize` selects as its codes, followed by its scales. Chunks must then
    be complete FP8 blocks. Quantized are the `stored` values, without rounding to `dtype`."""
    if quantize is None or not quantize.selects(name):
        return [TensorEntry(name, dtype, shape, partial(read, dtype))]
    function = compressed_tensors.quantize_int4 if quantize.packed else fp8.quantize
    scales: list[np.ndarray] = []

    def codes() -> Iterable[np.ndarray]:
        for chunk in read(stored):
            values, scale = function(chunk)
            scales.append(scale)
            yield values

    def written_once() -> Iterable[np.ndarray]:
        while scales:  # not kept: a ninth of the checkpoint for INT4
            yield scales.pop(0)

    scale_dtype = BFLOAT16 if quantize.packed else np.dtype(np.float32)
    entries = [
        TensorEntry(quantize.code_name(name), quantize.code_dtype, quantize.code_shape(shape), codes),
        TensorEntry(quantize.scale_name(name), scale_dtype, quantize.scale_shape(shape), written_once),
    ]
    if quantize.packed:
        sizes = np.array(shape, np.int64)
        entries.append(TensorEntry(quantize.shape_name(name), sizes.dtype, sizes.shape, lambda: [sizes]))
    return entries


def with_quantization(
    config: dict[str, Any], quantize: Scheme | None, entries: Iterable[TensorEntry], cfg: ModelConfig
) -> dict[str, Any]:
    """`config` as that of `entries`, some of which `quantize` has quantized."""
    if quantize is None:
        return config
    matrices = (e.name for e in entries if len(e.shape) > 1 and e.dtype in WEIGHT_DTYPES)
    plain = [name.removesuffix(".weight") for name in matrices if name.endswith(".weight")]
    return config | {"quantization_config": written_config(quantize, plain, cfg)}


def write_checkpoint(
    path: str | Path,
    config: dict[str, Any],
    entries: Sequence[TensorEntry],
    max_shard_bytes: int,
    files: Mapping[str, Path],
) -> None:
    """Write tensors as `model.safetensors`, or as numbered shards of at most `max_shard_bytes` and their index, their
    `config.json`, and copies of `files` by name. The directory appears only when it is complete; a URL
    of the Hub is one commit. Raises `CheckpointError` if the directory exists, and `ConfigError` if the Hub rejects
    it."""
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
