"""A checkpoint of either kind, Hugging Face's or this project's, as arrays by path."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mla_moe.checkpoint.hf_mapping import ShardSlice, Slices, TensorMapping, tensor_mappings
from mla_moe.checkpoint.hf_weights import open_hf_weights
from mla_moe.checkpoint.orbax_arrays import OrbaxCheckpoint, step_directory
from mla_moe.config import ModelConfig
from mla_moe.nn.abstract_model import AbstractModel, Arrays


class Checkpoint(Protocol):
    """What loading and conversion need. Nothing is read before it is asked for."""

    directory: Path
    cfg: ModelConfig

    def dtype(self, path: str) -> np.dtype:
        """The type that holds the array as it is stored; bfloat16 for FP8 blocks."""
        ...

    def bytes(self, path: str) -> int:
        """What is read for it."""
        ...

    def read(self, path: str, dtype: DTypeLike, index: Slices) -> np.ndarray:
        """A part of the array, of a slice for each of its axes."""
        ...

    def rows(self, piece: TensorMapping, dtype: DTypeLike, cut: ShardSlice) -> np.ndarray:
        """Some rows of a tensor in the layout of Hugging Face."""
        ...

    def check(self, arrays: Arrays) -> None:
        """Raise `CheckpointError` for arrays that are not what was written, as far as the files tell."""
        ...


def open_any_checkpoint(path: str | Path) -> Checkpoint:
    """A Hugging Face directory, or a run's, a stage's or a step's. Raises `CheckpointError` for anything else."""
    path = Path(path)
    step = step_directory(path)
    return HFCheckpoint(path) if step is None else OrbaxCheckpoint(step)


class HFCheckpoint:
    """A Hugging Face directory, whose tensors are pieces of our arrays."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.config, self.cfg, self.weights = open_hf_weights(directory)
        abstract_model = AbstractModel(self.cfg)
        self._shapes = {path: variable.get_value().shape for path, variable in abstract_model.variables.items()}
        self.pieces: Mapping[str, list[TensorMapping]] = {path: [] for path in self._shapes}
        for piece in without_copies(tensor_mappings(abstract_model)):
            self.pieces[piece.path].append(piece)

    def dtype(self, path: str) -> np.dtype:
        return np.dtype(jnp.result_type(*{self.weights.dtype(piece.name) for piece in self.pieces[path]}))

    def bytes(self, path: str) -> int:
        return sum(self.weights.bytes(piece.name) for piece in self.pieces[path])

    def rows(self, piece: TensorMapping, dtype: DTypeLike, cut: ShardSlice) -> np.ndarray:
        return self.weights.read(piece.name, dtype, cut.rows)

    def check(self, arrays: Arrays) -> None:
        """The format keeps no digests."""

    def read(self, path: str, dtype: DTypeLike, index: Slices) -> np.ndarray:
        ranges = [range(*i.indices(n)) for i, n in zip(index, self._shapes[path], strict=True)]
        out = np.empty([len(r) for r in ranges], dtype)
        for piece in self.pieces[path]:
            if any(isinstance(i, int) and i not in r for i, r in zip(piece.index, ranges, strict=True)):
                continue
            target = tuple(i - r.start if isinstance(i, int) else i for i, r in zip(piece.index, ranges, strict=True))
            kept = tuple(s for i, s in zip(piece.index, index, strict=True) if not isinstance(i, int))
            out[target] = piece.from_hf_tensor(self.weights.read(piece.name, dtype, *piece.window(kept)))
        return out


def without_copies(all_pieces: Iterable[TensorMapping]) -> Iterator[TensorMapping]:
    """Each part of an array once: a prediction module's copies of embedding and head are left out."""
    seen = set()
    for piece in all_pieces:
        if (key := (piece.path, str(piece.index))) not in seen:
            seen.add(key)
            yield piece
