"""Open a checkpoint of any kind: a Hugging Face directory, a run, or an Orbax checkpoint."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mla_moe.checkpoint.adapter import AdapterCheckpoint, fingerprint, open_adapters
from mla_moe.checkpoint.bucket_run import read_run
from mla_moe.checkpoint.files import check, progress_bar, read_json
from mla_moe.checkpoint.hf_checkpoint import HFCheckpoint
from mla_moe.checkpoint.hub import local_checkpoint
from mla_moe.checkpoint.orbax_checkpoint import OrbaxCheckpoint
from mla_moe.checkpoint.orbax_layout import find_step
from mla_moe.checkpoint.peft import is_peft, open_peft
from mla_moe.checkpoint.quantized_base import QuantizedBase
from mla_moe.config import ModelConfig
from mla_moe.config.storage import is_bucket, is_url, local_file
from mla_moe.nn.abstract_model import AbstractModel, Arrays
from mla_moe.nn.quantized import scale_path

Checkpoint = HFCheckpoint | OrbaxCheckpoint | AdapterCheckpoint


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face directory, of this host, a bucket or the Hub, or the newest checkpoint of a run, of a stage,
    or a step's directory. LoRA adapters, of a run or in PEFT's layout, open as their base with the adapters merged.

    Raises `CheckpointError` for anything else.
    """
    path = local_checkpoint(path)
    step = find_step(path)
    if step is None and is_peft(path):
        return open_peft(path, _open_base)
    if step is None:
        return HFCheckpoint(path)
    checkpoint = OrbaxCheckpoint(step)
    return open_adapters(checkpoint, _open_base) if checkpoint.lora.rank else checkpoint


def open_adapter(path: str | Path, base: Checkpoint) -> AdapterCheckpoint:
    """The adapters of a run or of a directory in PEFT's layout over `base`, whatever base they name. Raises
    `CheckpointError` for anything else, and if `base` has adapters itself."""
    check(not isinstance(base, AdapterCheckpoint), "checkpoint", str(base.directory), "has adapters itself; merge them")
    path = local_checkpoint(path)
    if (step := find_step(path)) is None:
        fix = "is neither a run nor a directory in PEFT's layout; name one that has an adapter_config.json"
        check(is_peft(path), "adapter", str(path), fix)
        return open_peft(path, lambda _: base)
    checkpoint = OrbaxCheckpoint(step)
    check(checkpoint.lora.rank > 0, "adapter", str(path), "has no adapters: it is a complete model")
    fix = f"was trained with other weights, of {checkpoint.base}, than those of {base.directory}; serve it with its own"
    check(checkpoint.base_fingerprint in (None, fingerprint(base)), "adapter", str(path), fix)
    return open_adapters(checkpoint, lambda _: base)


def _open_base(path: str | Path) -> Checkpoint:
    """A complete model. Adapters of adapters are refused: they could be their own base."""
    path = local_checkpoint(path)
    step = find_step(path)
    checkpoint = None if step is None else OrbaxCheckpoint(step)
    complete = not is_peft(path) if checkpoint is None else not checkpoint.lora.rank
    check(complete, "checkpoint", str(path), "has adapters itself; merge them: mla-moe convert --merge-adapter")
    return HFCheckpoint(path) if checkpoint is None else checkpoint


def read_model_config(path: Path) -> ModelConfig:
    """The model of a checkpoint, or of a `config.json` or its directory, or of the base of adapters in PEFT's layout.
    Weights of a model need not be there, and those at a URL are not downloaded."""
    if is_url(path):
        path = (read_run(path, "model") if is_bucket(path) else None) or local_file(path, "model", "config.json")
    if path.is_dir() and (step := find_step(path)) is not None:
        return OrbaxCheckpoint(step).cfg
    if is_peft(path):
        return open_checkpoint(path).cfg
    return ModelConfig.from_hf(read_json(path if path.is_file() else path / "config.json"))


def load_arrays(
    checkpoint: Checkpoint,
    abstract_model: AbstractModel,
    mesh: Mesh,
    *,
    keep_dtypes: bool = False,
    paths: Iterable[str] | None = None,
) -> Arrays:
    """Load all arrays, or those of `paths`, sharded over a mesh: each process reads its own shards only.

    Dtypes are the abstract model's. With `keep_dtypes` they are the checkpoint's, except for routers. What the model
    quantizes is quantized, unless the checkpoint has it in that format.
    """
    quantized = {name for path in abstract_model.formats for name in (path, scale_path(path))}
    source = QuantizedBase(checkpoint, abstract_model.lora) if quantized else checkpoint
    arrays, abstract_arrays = {}, abstract_model.abstract(mesh)
    abstract_arrays = {path: abstract_arrays[path] for path in (abstract_arrays if paths is None else paths)}
    nbytes = {
        path: x.size * (x.dtype if path in quantized else checkpoint.dtype(path)).itemsize
        for path, x in abstract_arrays.items()
    }
    with progress_bar("Loading", sum(nbytes.values())) as advance:
        for path, abstract in abstract_arrays.items():
            dtype = checkpoint.dtype(path) if keep_dtypes and not is_router(path) else abstract.dtype
            read: Any = partial(source.read, path, dtype)
            arrays[path] = jax.make_array_from_callback(abstract.shape, abstract.sharding, read)
            advance(nbytes[path])
    if not isinstance(checkpoint, HFCheckpoint):  # safetensors have no checksums
        checkpoint.verify({path: x for path, x in arrays.items() if path not in quantized})
    return arrays


def is_router(path: str) -> bool:
    """Whether a parameter path is a router's weight or bias, which are float32 in any model."""
    return "/router/" in path
