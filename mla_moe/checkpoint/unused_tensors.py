"""Tensors of released checkpoints that are no part of the model, such as a vision tower: conversions carry them."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from mla_moe.checkpoint.safetensors_reader import SafetensorsReader
from mla_moe.checkpoint.safetensors_writer import TensorEntry
from mla_moe.config import ModelConfig

UNUSED = "unused"
"""The directory in a converted Orbax checkpoint that holds them in a safetensors file."""


def unused_tensors(directory: Path, cfg: ModelConfig) -> list[TensorEntry]:
    """Those that `directory`, a Hugging Face directory or a step of Orbax, has beside the model `cfg`, as stored."""
    files = directory / UNUSED if (directory / UNUSED).is_dir() else directory
    if not any(files.glob("*.safetensors")):
        return []
    tensors, architecture = SafetensorsReader(files), cfg.architecture
    return stored_tensors(tensors, (name for name in tensors.stored if architecture.is_unused(cfg, name)))


def stored_tensors(tensors: SafetensorsReader, names: Iterable[str]) -> list[TensorEntry]:
    """Tensors to write as they are stored."""
    locations = ((name, tensors.stored[name]) for name in sorted(names))
    return [TensorEntry(name, t.dtype, t.shape, partial(tensors.parts, name)) for name, t in locations]
