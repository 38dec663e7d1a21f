"""Tensors of released checkpoints that are no part of the model, such as a vision tower: conversions carry them."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from mla_moe.checkpoint.files import check
from mla_moe.checkpoint.quantization import E4M3
from mla_moe.checkpoint.safetensors_reader import SafetensorsReader
from mla_moe.checkpoint.safetensors_writer import TensorEntry
from mla_moe.config import ModelConfig

QUANTIZED = "is quantized and no part of the model; convert a release whose other modules are not quantized"
UNUSED = "unused"
"""The directory in a converted Orbax checkpoint that holds them in a safetensors file."""


def unused_tensors(directory: Path, cfg: ModelConfig) -> list[TensorEntry]:
    """Those that `directory`, a Hugging Face directory or a step of Orbax, has beside the model `cfg`, as stored.
    Raises `CheckpointError` for quantized ones, which another `config.json` would not describe."""
    files = directory / UNUSED if (directory / UNUSED).is_dir() else directory
    if not any(files.glob("*.safetensors")):
        return []
    tensors, architecture = SafetensorsReader(files), cfg.architecture
    names = [name for name in tensors.stored if architecture.is_unused(cfg, name)]
    for name in names:
        quantized = tensors.stored[name].dtype in (E4M3, np.int8) or name.endswith("_packed")
        check(not quantized, "checkpoint", name, QUANTIZED)
    return stored_tensors(tensors, names)


def stored_tensors(tensors: SafetensorsReader, names: Iterable[str]) -> list[TensorEntry]:
    """Tensors to write as they are stored."""
    locations = ((name, tensors.stored[name]) for name in sorted(names))
    return [TensorEntry(name, t.dtype, t.shape, partial(tensors.parts, name)) for name, t in locations]
