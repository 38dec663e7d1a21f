"""Open a checkpoint of any kind: one interface to Hugging Face directories, runs, and Orbax checkpoints."""

from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mla_moe.checkpoint.files import progress_bar, read_json
from mla_moe.checkpoint.hf_checkpoint import HFCheckpoint
from mla_moe.checkpoint.hf_mapping import RowSlice, Slices, TensorMapping
from mla_moe.checkpoint.orbax_checkpoint import OrbaxCheckpoint
from mla_moe.checkpoint.orbax_layout import find_step
from mla_moe.checkpoint.safetensors_writer import TensorEntry
from mla_moe.config import ModelConfig
from mla_moe.nn.abstract_model import AbstractModel, Arrays


class Checkpoint(Protocol):
    """Parameters and router biases of a checkpoint, by parameter path. Opening it reads only metadata."""

    directory: Path
    cfg: ModelConfig

    @property
    def full_state_run(self) -> Path | None:
        """The directory of the run whose full training state this is; None if there are parameters only."""

    def dtype(self, path: str) -> np.dtype:
        """The dtype of an array as stored; bfloat16 for FP8 blocks."""

    def nbytes(self, path: str) -> int:
        """Bytes to read for an array."""

    def read(self, path: str, dtype: DTypeLike, index: Slices) -> np.ndarray:
        """A shard of an array: `index` has a slice for each axis."""

    def read_rows(self, mapping: TensorMapping, dtype: DTypeLike, rows: RowSlice) -> np.ndarray:
        """Some rows of a tensor in the Hugging Face layout."""

    def verify(self, arrays: Arrays) -> None:
        """Raise `CheckpointError` for arrays that do not match their checksums. Safetensors have none."""

    def hf_tensors(self, dtype: np.dtype | None, *, fp8: bool) -> list[TensorEntry]:
        """All tensors for a Hugging Face checkpoint, cast to `dtype` except for router biases."""

    def hf_config(self, dtype: np.dtype | None, *, fp8: bool) -> dict[str, Any]:
        """The `config.json` that goes with `hf_tensors`."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face directory, or the newest checkpoint of a run, of a stage, or a step's directory.

    Raises `CheckpointError` for anything else.
    """
    path = Path(path)
    step = find_step(path)
    return HFCheckpoint(path) if step is None else OrbaxCheckpoint(step)


def read_model_config(path: Path) -> ModelConfig:
    """The model of a checkpoint, or of a `config.json` or its directory. Weights need not be there."""
    if path.is_dir() and (step := find_step(path)) is not None:
        return OrbaxCheckpoint(step).cfg
    return ModelConfig.from_hf(read_json(path if path.is_file() else path / "config.json"))


def load_arrays(
    checkpoint: Checkpoint, abstract_model: AbstractModel, mesh: Mesh, *, keep_dtypes: bool = False
) -> Arrays:
    """Load all arrays, sharded over a mesh: each process reads its own shards only.

    Dtypes are the abstract model's. With `keep_dtypes` they are the checkpoint's, except for routers.
    """
    arrays = {}
    with progress_bar("Loading", sum(map(checkpoint.nbytes, abstract_model.variables))) as advance:
        for path, abstract in abstract_model.abstract(mesh).items():
            dtype = checkpoint.dtype(path) if keep_dtypes and not is_router(path) else abstract.dtype
            read: Any = partial(checkpoint.read, path, dtype)
            arrays[path] = jax.make_array_from_callback(abstract.shape, abstract.sharding, read)
            advance(checkpoint.nbytes(path))
    checkpoint.verify(arrays)
    return arrays


def is_router(path: str) -> bool:
    """Whether a parameter path is a router's weight or bias, which are float32 in any model."""
    return "/router/" in path
