"""Load a model from a checkpoint of any kind, and save it in the layout of Hugging Face."""

from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mla_moe.checkpoint.hf_mapping import TensorMapping, by_tensor, tensor_mappings
from mla_moe.checkpoint.hub import local_checkpoint
from mla_moe.checkpoint.orbax_layout import find_step
from mla_moe.checkpoint.quantization import Quantize, target_scheme
from mla_moe.checkpoint.reader import Checkpoint, is_router, load_arrays, open_checkpoint
from mla_moe.checkpoint.safetensors_reader import weight_dtype
from mla_moe.checkpoint.safetensors_writer import SHARD_BYTES, tensor_entries, with_quantization, write_checkpoint
from mla_moe.checkpoint.tokenizer_files import files_to_copy, hf_config
from mla_moe.checkpoint.unused_tensors import unused_tensors
from mla_moe.config import MeshConfig
from mla_moe.config.hub import is_hub_id
from mla_moe.nn.abstract_model import AbstractModel, model_variables
from mla_moe.nn.lora import merge_adapters
from mla_moe.nn.param import Precision, RouterBias
from mla_moe.nn.transformer import Transformer
from mla_moe.parallel.mesh import make_mesh

_FILE_DTYPE = "file_dtype"
"""Metadata of a router's variable: its dtype in the loaded file, for saving. In memory it is float32."""


def load_pretrained(path: str | Path, dtype: DTypeLike | None = None, mesh: Mesh | None = None) -> Transformer:
    """Load the model of a Hugging Face directory, of a run (its newest checkpoint), or of the Hub: `ORG/NAME`, unless
    there is such a directory here, or `hf://ORG/NAME@REVISION`; or of a bucket, `s3://…` or `gs://…`.

    Parameters keep the files' dtypes unless `dtype` is set, and quantized matrices are dequantized to bfloat16; routers
    are always float32. With a mesh the parameters are sharded over it, and a process reads its own shards only;
    otherwise they are on the first device. Code in a checkpoint is never executed. Raises `CheckpointError` for invalid
    or damaged files, and for missing or unknown tensors, and `ConfigError` if the Hub has no such model or cannot be
    reached.
    """
    return load_model(open_checkpoint(f"hf://{path}" if is_hub_id(path) else path), dtype, mesh)


def load_model(checkpoint: Checkpoint, dtype: DTypeLike | None = None, mesh: Mesh | None = None) -> Transformer:
    """`load_pretrained` of an open checkpoint."""
    param = checkpoint.dtype("embed") if dtype is None else weight_dtype(dtype)
    precision = Precision(param=param, compute=Precision.default().compute)
    abstract_model = AbstractModel(checkpoint.cfg, precision=precision)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1]) if mesh is None else mesh
    arrays = load_arrays(checkpoint, abstract_model, mesh, keep_dtypes=dtype is None)
    if dtype is None:
        for name, variable in abstract_model.variables.items():
            if is_router(name):
                variable.set_metadata(_FILE_DTYPE, checkpoint.dtype(name).name)
    return abstract_model.merge(arrays)


def save_pretrained(
    model: Transformer,
    path: str | Path,
    dtype: DTypeLike | None = None,
    *,
    like: str | Path | None = None,
    quantize: Quantize | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Save a directory that transformers, vLLM and SGLang load. It appears only when it is complete. `hf://ORG/NAME` is
    a commit to the Hub, in a repository that is private if it is new.

    Weights keep the model's dtypes, and a loaded router its file's, unless `dtype` is set; router biases are then
    float32. Adapters are merged into their weights. `like` is a checkpoint or run whose tokenizer, chat template, token
    ids and vision tower are copied. With `quantize`, matrices are quantized as in `convert`. All processes must call
    this; the first one writes. Raises `CheckpointError` if `path` exists.
    """
    dtype, scheme = None if dtype is None else weight_dtype(dtype), target_scheme(quantize, model.cfg)
    variables, entries = model_variables(merge_adapters(model)), []
    for parts in by_tensor(tensor_mappings(model.cfg)):
        mapping, variable = parts[0], variables[parts[0].path]
        array = variable.get_value()
        target = np.float32 if isinstance(variable, RouterBias) else dtype
        target = np.dtype(variable.get_metadata(_FILE_DTYPE, array.dtype) if dtype is None else target)
        read, shape = partial(_full_tensor, array, parts), mapping.stacked_shape or mapping.shape
        entries += tensor_entries(mapping.name, array.dtype, target, shape, read, scheme)
    if jax.process_index() > 0:
        for entry in entries:
            deque(entry.chunks(), maxlen=0)  # take part in the all-gathers of the first process
        return
    like = local_checkpoint(like) if like else None
    beside = (find_step(like) or like) if like else None
    if beside:
        entries += unused_tensors(beside, model.cfg)
    config = hf_config(model.cfg, dtype or model.precision.param, beside=beside)
    config = with_quantization(config, scheme, entries, model.cfg)
    write_checkpoint(path, config, entries, max_shard_bytes, files_to_copy(beside) if beside else {})


def _full_tensor(array: jax.Array, parts: list[TensorMapping], dtype: np.dtype) -> Iterator[np.ndarray]:
    for mapping in parts:
        part = array[mapping.index]
        full = part if part.is_fully_addressable else multihost_utils.process_allgather(part, tiled=True)
        yield mapping.to_hf_tensor(np.asarray(full, dtype))
