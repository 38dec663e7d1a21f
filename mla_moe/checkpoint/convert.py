"""From one directory to another, Hugging Face's layout or this project's: types changed, FP8 blocks undone or made, a
few rows at a time."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jax.typing import DTypeLike

from mla_moe.checkpoint import fp8 as blocks
from mla_moe.checkpoint.hf_mapping import TensorMapping, tensor_mappings
from mla_moe.checkpoint.hf_weights import PART_BYTES, HFWeights, weight_dtype
from mla_moe.checkpoint.orbax_arrays import ArraySpec, create
from mla_moe.checkpoint.progress import progress
from mla_moe.checkpoint.safetensors_reader import CheckpointError
from mla_moe.checkpoint.safetensors_writer import (
    SHARD_BYTES,
    TensorEntry,
    atomic_directory,
    tensor_entries,
    write_checkpoint,
)
from mla_moe.checkpoint.source import Checkpoint, HFCheckpoint, open_any_checkpoint, without_copies
from mla_moe.checkpoint.tokenizer_files import carried_files, hf_config
from mla_moe.config import require
from mla_moe.nn.abstract_model import AbstractModel

Layout = Literal["hf", "orbax"]
_BIAS = ".e_score_correction_bias"


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: Layout = "hf",
    dtype: DTypeLike | None = None,
    fp8: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the checkpoint `src` to `dst`, all of it or nothing, in memory that does not grow with it.

    `src` is a Hugging Face directory, or one of a run or its checkpoints, of which parameters and router biases are
    taken; `to` says what `dst` becomes. Tensors keep their types unless `dtype` gives another; router biases keep
    theirs in any case. FP8 blocks become bfloat16 or `dtype`; with `fp8` they stay as they are, and other matrices that
    DeepSeek releases so join them. What lies beside the weights (tokenizer, chat template, generation settings, code)
    is copied and never run.
    """
    require(to in get_args(Layout), "to", to, f"one of {', '.join(get_args(Layout))}")
    source, target = open_any_checkpoint(src), Path(dst)
    dtype = None if dtype is None else weight_dtype(dtype)
    if to == "orbax":
        if fp8:
            raise CheckpointError("fp8", True, "this project's checkpoints have no FP8 blocks; convert with --to hf")
        _to_native(source, target, dtype)
    elif isinstance(source, HFCheckpoint):
        _between_hubs(source, target, dtype, fp8, max_shard_bytes)
    else:
        entries = [
            entry for piece in tensor_mappings(AbstractModel(source.cfg)) for entry in _rows(source, piece, dtype, fp8)
        ]
        config = hf_config(source.cfg, dtype or source.dtype("embed"), fp8=fp8, beside=source.directory)
        write_checkpoint(target, config, entries, max_shard_bytes, carried_files(source.directory))


def _between_hubs(source: HFCheckpoint, dst: Path, dtype: DTypeLike | None, fp8: bool, max_shard_bytes: int) -> None:
    weights, config = source.weights, dict(source.config)
    if fp8 and weights.quantised and weights.block != blocks.BLOCK:
        fix = f"of {list(weights.block)} cannot be mixed with blocks of {list(blocks.BLOCK)}: write bfloat16 first"
        raise CheckpointError("checkpoint", "FP8 blocks", fix)
    entries = [entry for name in weights.reader.stored for entry in _entries(weights, name, dtype, fp8)]
    blocked = config.pop("quantization_config", None)
    if fp8:  # theirs may leave out matrices that are in blocks now, or speak of other scales
        anew = any(blocks.is_quantised(name) for name in weights.names - weights.quantised)
        config["quantization_config"] = dict(blocks.QUANTIZATION_CONFIG) if anew or not blocked else blocked
    if dtype is not None:
        config = {k: v for k, v in config.items() if k != "dtype"} | {"torch_dtype": np.dtype(dtype).name}
    write_checkpoint(dst, config, entries, max_shard_bytes, carried_files(source.directory))


def _entries(weights: HFWeights, name: str, dtype: DTypeLike | None, fp8: bool) -> list[TensorEntry]:
    """A tensor of a Hugging Face directory as one of another, in names and order as it stands there."""
    kept = weights.reader.stored[name]
    as_it_is = TensorEntry(
        name, kept.dtype, kept.shape, lambda: (weights.reader[name][rows] for rows in weights.parts(name))
    )
    if name not in weights.names:  # a scale, or a computed buffer
        return [as_it_is] if fp8 or name in weights.computed else []
    if name.endswith(_BIAS) or (fp8 and name in weights.quantised):
        return [as_it_is]
    kind = np.dtype(weights.dtype(name) if dtype is None else dtype)

    def parts() -> Iterator[np.ndarray]:
        # Blocks are made of all that the file knows, not of what is left of it in `dtype`.
        read_as = weights.dtype(name) if fp8 and blocks.is_quantised(name) else kind
        return (weights.read(name, read_as, rows) for rows in weights.parts(name))

    return tensor_entries(name, kind, kept.shape, parts, fp8=fp8)


def _rows(source: Checkpoint, piece: TensorMapping, dtype: DTypeLike | None, fp8: bool) -> list[TensorEntry]:
    """A tensor of a Hugging Face directory, out of our array."""
    stored = source.dtype(piece.path)
    kind = stored if dtype is None or piece.name.endswith(_BIAS) else np.dtype(dtype)
    read_as = stored if fp8 and blocks.is_quantised(piece.name) else kind

    def parts() -> Iterator[np.ndarray]:
        return (source.rows(piece, read_as, cut) for cut in piece.cuts(PART_BYTES))

    return tensor_entries(piece.name, kind, piece.shape, parts, fp8=fp8)


def _to_native(source: Checkpoint, dst: Path, dtype: DTypeLike | None) -> None:
    """Fill a step's directory. Pieces of our arrays are stored in chunks of their own: none is written twice."""
    abstract_model = AbstractModel(source.cfg)
    kinds = {
        path: source.dtype(path) if dtype is None or path in abstract_model.bias_paths else np.dtype(dtype)
        for path in abstract_model.variables
    }
    all_pieces = list(without_copies(tensor_mappings(abstract_model)))
    shapes = {path: variable.get_value().shape for path, variable in abstract_model.variables.items()}
    plan = {p.path: ArraySpec(kinds[p.path], shapes[p.path], _chunk(p, shapes[p.path])) for p in all_pieces}
    others = carried_files(source.directory)
    config = hf_config(source.cfg, dtype if dtype is not None else kinds["embed"], beside=source.directory)
    with atomic_directory(dst) as directory:
        with create(directory / "step", source.cfg, plan) as writer, progress("Writing", _size(plan)) as advance:
            for piece in all_pieces:
                for cut in piece.cuts(PART_BYTES):
                    part = piece.from_hf_tensor(source.rows(piece, kinds[piece.path], cut))
                    writer.write(piece.path, cut.index, part)
                    advance(part.nbytes)
        for path in (directory / "step").iterdir():
            path.rename(directory / path.name)
        (directory / "step").rmdir()
        for name, path in others.items():
            shutil.copyfile(path, directory / name)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _chunk(piece: TensorMapping, shape: tuple[int, ...]) -> tuple[int, ...]:
    first = next(piece.cuts(PART_BYTES)).index
    return tuple(1 if isinstance(i, int) else len(range(*i.indices(n))) for i, n in zip(first, shape, strict=True))


def _size(plan: dict[str, ArraySpec]) -> int:
    return sum(int(np.prod(p.shape)) * p.dtype.itemsize for p in plan.values())
