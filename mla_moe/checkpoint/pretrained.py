"""Models from checkpoints of either kind, and to directories in the layout of Hugging Face."""

from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mla_moe.checkpoint.hf_mapping import TensorMapping, tensor_mappings
from mla_moe.checkpoint.hf_weights import weight_dtype
from mla_moe.checkpoint.orbax_arrays import step_directory
from mla_moe.checkpoint.progress import progress
from mla_moe.checkpoint.safetensors_writer import SHARD_BYTES, TensorEntry, tensor_entries, write_checkpoint
from mla_moe.checkpoint.source import Checkpoint, open_any_checkpoint
from mla_moe.checkpoint.tokenizer_files import carried_files, hf_config
from mla_moe.config import MeshConfig as MeshSizes
from mla_moe.nn.abstract_model import AbstractModel, Arrays, model_arrays, model_variables
from mla_moe.nn.param import Precision, RouterBias
from mla_moe.nn.transformer import Transformer
from mla_moe.parallel.mesh import make_mesh

_FILE_TYPE = "file_type"
"""Metadata of a router that was loaded: it is float32 here, and is written back in the type it came in."""


def load_pretrained(path: str | Path, dtype: DTypeLike | None = None, mesh: Mesh | None = None) -> Transformer:
    """The model in a Hugging Face directory or in one of a run (its newest checkpoint), each parameter read straight
    into its place.

    Parameters keep the files' types unless `dtype` gives another, and FP8 blocks become bfloat16; routers are float32
    in any case. With a mesh, a process reads only the bytes of its own shards; without, everything is on the first
    device. Nothing that a checkpoint brings is executed. Raises `CheckpointError` for files that are not what they
    claim, and for tensors missing or unknown.
    """
    source = open_any_checkpoint(path)
    param = source.dtype("embed") if dtype is None else weight_dtype(dtype)
    abstract_model = AbstractModel(source.cfg, precision=Precision(param=param, compute=Precision.default().compute))
    if mesh is None:
        mesh = make_mesh(MeshSizes(), jax.devices()[:1])
    arrays = read_arrays(source, abstract_model, mesh, keep_types=dtype is None)
    if dtype is None:
        for path_, variable in abstract_model.variables.items():
            if _is_router(path_):
                variable.set_metadata(_FILE_TYPE, source.dtype(path_).name)
    return abstract_model.merge(arrays)


def read_arrays(source: Checkpoint, abstract_model: AbstractModel, mesh: Mesh, *, keep_types: bool = False) -> Arrays:
    """A checkpoint's arrays in their places on a mesh, in the skeleton's types or, but for routers, in the files'."""
    arrays = {}
    with progress("Loading", sum(map(source.bytes, abstract_model.variables))) as advance:
        for path, place in abstract_model.abstract(mesh).items():
            dtype = source.dtype(path) if keep_types and not _is_router(path) else place.dtype
            read: Any = partial(source.read, path, dtype)
            arrays[path] = jax.make_array_from_callback(place.shape, place.sharding, read)
            advance(source.bytes(path))
    source.check(arrays)
    return arrays


def save_pretrained(
    model: Transformer,
    path: str | Path,
    dtype: DTypeLike | None = None,
    *,
    like: str | Path | None = None,
    fp8: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a directory that transformers, vLLM and SGLang load, all of it or nothing.

    Weights keep the model's types, and a loaded router its file's, unless `dtype` gives another; router biases stay
    float32 then. `like` is a directory, or a run, whose tokenizer, chat template and token ids are carried along. With
    `fp8`, matrices go into FP8 blocks as in DeepSeek's releases. Of many processes all must call this, and the first
    writes. Raises `CheckpointError` if `path` exists.
    """
    dtype = None if dtype is None else weight_dtype(dtype)
    abstract_model, arrays = AbstractModel(model.cfg, precision=model.precision), model_arrays(model)
    file_types = {p: v.get_metadata(_FILE_TYPE, arrays[p].dtype) for p, v in model_variables(model).items()}
    entries: list[TensorEntry] = []
    for piece in tensor_mappings(abstract_model):
        kind = file_types[piece.path] if dtype is None else dtype
        if dtype is not None and isinstance(abstract_model.variables[piece.path], RouterBias):
            kind = np.float32
        parts = partial(_whole, arrays[piece.path], piece)
        entries += tensor_entries(piece.name, np.dtype(kind), piece.shape, parts, fp8=fp8)
    if jax.process_index() > 0:
        for entry in entries:
            deque(entry.parts(), maxlen=0)  # join in what the first process gathers
        return
    beside = (step_directory(Path(like)) or Path(like)) if like else None
    config = hf_config(model.cfg, dtype or model.precision.param, fp8=fp8, beside=beside)
    write_checkpoint(Path(path), config, entries, max_shard_bytes, carried_files(beside) if beside else {})


def _is_router(path: str) -> bool:
    return "/router/" in path


def _whole(array: jax.Array, piece: TensorMapping) -> list[np.ndarray]:
    part = array[piece.index]
    whole = part if part.is_fully_addressable else multihost_utils.process_allgather(part, tiled=True)
    return [piece.to_hf_tensor(np.asarray(whole))]
