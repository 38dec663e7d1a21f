"""Convert a checkpoint between the Hugging Face and the Orbax layout, or to another dtype, in bounded memory."""

import json
import shutil
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jax.typing import DTypeLike

from mla_moe.checkpoint.files import CheckpointError, atomic_directory, progress_bar
from mla_moe.checkpoint.hf_mapping import TensorMapping, unique_tensor_mappings
from mla_moe.checkpoint.orbax_layout import ArraySpec, create_step
from mla_moe.checkpoint.reader import Checkpoint, open_checkpoint
from mla_moe.checkpoint.safetensors_reader import weight_dtype
from mla_moe.checkpoint.safetensors_writer import SHARD_BYTES, write_checkpoint
from mla_moe.checkpoint.tokenizer_files import files_to_copy, hf_config
from mla_moe.config import require
from mla_moe.nn.abstract_model import AbstractModel

Layout = Literal["hf", "orbax"]


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: Layout = "hf",
    dtype: DTypeLike | None = None,
    fp8: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Convert the checkpoint `src` to the new directory `dst`, which appears only when it is complete.

    `src` is a Hugging Face directory, a run or one of its checkpoints, of which only parameters and router biases are
    taken. Peak memory does not depend on the size of the checkpoint. Tensors keep their dtypes unless `dtype` is set;
    router biases always do. FP8 blocks are dequantized to bfloat16 or `dtype`. With `fp8` they stay as they are, and
    the other matrices that DeepSeek releases in FP8 are quantized. Tokenizer, chat template, generation settings and
    code are copied and never executed. Raises `CheckpointError` if `dst` exists or `src` is not valid.
    """
    require(to in get_args(Layout), "to", to, f"one of {', '.join(get_args(Layout))}")
    source, target = open_checkpoint(src), Path(dst)
    dtype = None if dtype is None else weight_dtype(dtype)
    if to == "orbax":
        if fp8:
            raise CheckpointError("fp8", True, "Orbax checkpoints have no FP8 blocks; convert with --to hf")
        _write_orbax(source, target, dtype)
    else:
        tensors, config = source.hf_tensors(dtype, fp8=fp8), source.hf_config(dtype, fp8=fp8)
        write_checkpoint(target, config, tensors, max_shard_bytes, files_to_copy(source.directory))


def _write_orbax(source: Checkpoint, target: Path, dtype: np.dtype | None) -> None:
    """Write a step's directory. An array is stored in chunks of the size in which it is read: none is written twice."""
    abstract_model = AbstractModel(source.cfg)
    keeps_dtype = abstract_model.variables if dtype is None else abstract_model.bias_paths
    dtypes = {path: source.dtype(path) if path in keeps_dtype else np.dtype(dtype) for path in abstract_model.variables}
    shapes = {path: variable.get_value().shape for path, variable in abstract_model.variables.items()}
    mappings = list(unique_tensor_mappings(abstract_model))
    specs = {m.path: ArraySpec(dtypes[m.path], shapes[m.path], _chunk_shape(m, shapes[m.path])) for m in mappings}
    others = files_to_copy(source.directory)
    config = hf_config(source.cfg, dtypes["embed"], beside=source.directory)
    total_bytes = sum(int(np.prod(spec.shape)) * spec.dtype.itemsize for spec in specs.values())
    with atomic_directory(target) as directory:
        with create_step(directory / "step", source.cfg, specs) as writer, progress_bar("Writing", total_bytes) as done:
            for mapping in mappings:
                for rows in mapping.row_slices():
                    chunk = mapping.from_hf_tensor(source.read_rows(mapping, dtypes[mapping.path], rows))
                    writer.write(mapping.path, rows.index, chunk)
                    done(chunk.nbytes)
        for path in (directory / "step").iterdir():
            path.rename(directory / path.name)
        (directory / "step").rmdir()
        for name, path in others.items():
            shutil.copyfile(path, directory / name)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _chunk_shape(mapping: TensorMapping, shape: tuple[int, ...]) -> tuple[int, ...]:
    first = next(mapping.row_slices()).index
    return tuple(1 if isinstance(i, int) else len(range(*i.indices(n))) for i, n in zip(first, shape, strict=True))
