"""Tensors of released checkpoints that are no part of the model, such as a vision tower: conversions carry them."""

from functools import partial
from pathlib import Path

import numpy as np

from mla_moe.checkpoint.safetensors_reader import SafetensorsReader
from mla_moe.checkpoint.safetensors_writer import TensorEntry
from mla_moe.config import ModelConfig

UNUSED = "unused"
"""The directory in a converted Orbax checkpoint that holds them in a safetensors file."""


def unused_tensors(directory: Path, cfg: ModelConfig, tensors: SafetensorsReader | None = None) -> list[TensorEntry]:
    """Those that `directory`, a Hugging Face directory or a step of Orbax, has beside the model `cfg`, as stored.
    `tensors` are its own, if they are open already."""
    if tensors is None:
        files = directory / UNUSED if (directory / UNUSED).is_dir() else directory
        if not any(files.glob("*.safetensors")):
            return []
        tensors = SafetensorsReader(files)
    architecture = cfg.architecture
    names = sorted(name for name in tensors.stored if architecture.is_unused(cfg, name))
    locations = ((name, tensors.stored[name]) for name in names)
    return [TensorEntry(name, t.dtype, t.shape, partial(_whole, tensors, name)) for name, t in locations]


def _whole(tensors: SafetensorsReader, name: str) -> list[np.ndarray]:
    return [tensors[name]]
