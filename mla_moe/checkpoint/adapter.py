"""A checkpoint of LoRA adapters: those of a run or of a PEFT directory, over the checkpoint of their base."""

import copy
import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import DTypeLike

from mla_moe.checkpoint.files import CheckpointError, check
from mla_moe.checkpoint.hf_mapping import Index, TensorMapping
from mla_moe.checkpoint.orbax_checkpoint import OrbaxCheckpoint, mapped_checkpoint
from mla_moe.checkpoint.quantization import Scheme, StoredMatrix
from mla_moe.checkpoint.quantized_base import QuantizedBase
from mla_moe.checkpoint.safetensors_writer import TensorEntry
from mla_moe.config import ConfigError, LoRAConfig, ModelConfig
from mla_moe.nn.abstract_model import AbstractModel, Arrays, is_adapter
from mla_moe.nn.lora import RANK, adapter_axes
from mla_moe.nn.param import BATCH_AXES
from mla_moe.nn.stacked_lora import AdapterWeights
from mla_moe.parallel.sharding import logical_axes

if TYPE_CHECKING:
    from mla_moe.checkpoint.reader import Checkpoint

ALL = slice(None)


class AdapterCheckpoint:
    """Adapters and their base, by parameter path. Reads the merged weights, `W + scale · A B` computed in float32, or
    with `unmerged` the weights of the base and the adapters. Merged with is the base as it was in training: dequantized
    where `lora.quantize_base` quantizes it."""

    full_state_run: Path | None = None

    def __init__(
        self,
        base: "Checkpoint",
        base_name: str,
        lora: LoRAConfig,
        directory: Path,
        own: Mapping[str, Callable[[], np.ndarray]],
    ):
        """`base_name` is the directory or the URL that `base` was opened from. `own` reads the arrays that are not the
        base's, by path: adapters, and router biases that were trained."""
        self.base, self.base_name, self.lora, self.directory, self._own = base, base_name, lora, directory, own
        self.cfg: ModelConfig = base.cfg
        self._arrays: dict[str, np.ndarray] = {}
        self._merged = True

    def unmerged(self) -> "AdapterCheckpoint":
        other = copy.copy(self)
        other._merged = False
        return other

    @cached_property
    def _model(self) -> AbstractModel:
        return AbstractModel(self.cfg, lora=dataclasses.replace(self.lora, quantize_base=()))

    @cached_property
    def _quantized(self) -> QuantizedBase:
        """The base as it was while the adapters were trained."""
        return QuantizedBase(self.base, self.lora)

    @cached_property
    def _scales(self) -> dict[str, float]:
        sizes = self.lora.sizes(self._model.adaptable_paths)
        return {path: self.lora.scale(size) for path, size in sizes.items()}

    @property
    def paths(self) -> Sequence[str]:
        """Paths of the arrays that are not the base's."""
        return tuple(self._own)

    def array(self, path: str) -> np.ndarray:
        """An array that is not the base's."""
        if path not in self._arrays:
            self._arrays[path] = self._own[path]()
        return self._arrays[path]

    def changed_biases(self) -> list[str]:
        """The router biases that differ from the base's."""

        def differs(path: str) -> bool:
            array = self.array(path)
            base = self.base.read(path, array.dtype, tuple(slice(0, n) for n in array.shape))
            return not np.array_equal(array, base)

        return [path for path in self._own if not is_adapter(path) and differs(path)]

    def weights(self) -> AdapterWeights:
        """The adapters alone, for inference beside others. Raises `CheckpointError` if they do not fit the base, are
        not finite, or if router biases were updated, which all adapters share."""
        wanted = self._model.variables
        fix = f"does not fit the base {self.base_name}; name the base with which {self.directory} was trained"
        nan = f"has NaN or infinity in {self.directory}; use an earlier checkpoint"
        for path in self._model.adapter_paths:
            check(path in self._own and self.array(path).shape == wanted[path].shape, "adapter", path, fix)
            check(bool(np.isfinite(self.array(path)).all()), "adapter", path, nan)
        moved, fix = self.changed_biases(), "were updated in training, and adapters share them; serve it alone"
        check(not moved, "adapter", ", ".join(moved), fix)
        return AdapterWeights(self._scales, {path: self.array(path) for path in self._model.adapter_paths})

    def dtype(self, path: str) -> np.dtype:
        """The dtype of an array as stored; of a merged weight that of the base."""
        return self.array(path).dtype if path in self._own else self.base.dtype(path)

    def read(self, path: str, dtype: DTypeLike, index: tuple[slice, ...]) -> np.ndarray:
        """A shard of an array: `index` has a slice for each axis."""
        if path in self._own:
            return self.array(path)[index].astype(dtype, copy=False)
        if not self._is_merged(path):
            return self.base.read(path, dtype, index)
        variable = self._model.variables[path]
        ranges = [range(*i.indices(n)) for i, n in zip(index, variable.get_value().shape, strict=True)]
        shard = np.empty([len(r) for r in ranges], dtype)
        # Matrix by matrix: in float32 all of them would take twice the memory of the result.
        batch = next(i for i, axis in enumerate(logical_axes(variable)) if axis not in BATCH_AXES)
        for at in np.ndindex(*shard.shape[:batch]):
            matrix = tuple(r[i] for r, i in zip(ranges, at, strict=False))
            one = *(slice(i, i + 1) for i in matrix), *index[batch:]
            if path in self._quantized.formats:
                values = self._quantized.dequantized(path, one)
            else:
                values = self.base.read(path, np.float32, one)
            values = values.reshape(shard.shape[batch:])
            if path in self._scales:
                values = values + self._product(path, (*matrix, *index[batch:]))
            shard[at] = values.astype(dtype)
        return shard

    def stored_matrix(self, path: str, matrix_index: tuple[int, ...]) -> StoredMatrix | None:
        """A matrix of the base as it is stored, if it is quantized."""
        return None if self._is_merged(path) else self.base.stored_matrix(path, matrix_index)

    def read_rows(self, mapping: TensorMapping, dtype: DTypeLike, rows: slice, index: Index) -> np.ndarray:
        """Some rows of a tensor in the Hugging Face layout; see `TensorMapping.row_slices`."""
        path = mapping.path
        if path in self._own:
            return mapping.to_hf_tensor(self.array(path)[index].astype(dtype, copy=False))
        if not self._is_merged(path):
            return self.base.read_rows(mapping, dtype, rows, index)
        if path in self._quantized.formats:
            values = mapping.to_hf_tensor(self._quantized.dequantized(path, index))
        else:
            values = self.base.read_rows(mapping, np.float32, rows, index)
        if path in self._scales:
            values = values + mapping.to_hf_tensor(self._product(path, index))
        return values.astype(dtype)

    def _is_merged(self, path: str) -> bool:
        """Whether a matrix is not the base's: it has an adapter, or was trained with as it is quantized."""
        return self._merged and (path in self._scales or path in self._quantized.formats)

    def _product(self, path: str, index: Index) -> np.ndarray:
        """`scale · A B` at an index of the weight."""
        weight = self._model.variables[path]
        names, axes = logical_axes(weight), adapter_axes(weight)
        at = dict(zip(names, index, strict=True)) | {RANK: ALL}
        letters = {axis: chr(ord("a") + i) for i, axis in enumerate([*names, RANK]) if not isinstance(at[axis], int)}

        def spelled(axes: tuple[str, ...]) -> str:
            return "".join(letters.get(axis, "") for axis in axes)

        module, _, name = path.rpartition("/")

        def factor(letter: str, axes: tuple[str, ...]) -> np.ndarray:
            part = self.array(f"{module}/lora/{name}/{letter}")[tuple(at[axis] for axis in axes)]
            return part.astype(np.float32)

        a, b = factor("a", axes.a), factor("b", axes.b)
        equation = f"{spelled(axes.a)},{spelled(axes.b)}->{spelled(names)}"
        return np.einsum(equation, a, np.float32(self._scales[path]) * b, optimize=True)

    def verify(self, arrays: Arrays) -> None:
        """Raise `CheckpointError` if an array of the base does not match its checksum. The adapters are checked when
        they are read."""
        if not isinstance(self.base, OrbaxCheckpoint):
            return
        self.base.verify({p: x for p, x in arrays.items() if p not in self._own and not self._is_merged(p)})

    def unused_tensors(self) -> list[TensorEntry]:
        """The tensors beside the base that are no part of the model."""
        return self.base.unused_tensors()

    def hf_checkpoint(
        self, dtype: np.dtype | None, quantize: Scheme | None = None
    ) -> tuple[list[TensorEntry], dict[str, Any]]:
        """All tensors of the merged model, cast to `dtype` except for router biases, and its `config.json`."""
        return mapped_checkpoint(self, self.base.directory, dtype, quantize)


def fingerprint(base: "Checkpoint") -> int:
    """A checksum of a few elements of the first and the last matrix of each parameter: cheap, and other weights have
    another one."""
    number = 0
    for path, variable in AbstractModel(base.cfg).variables.items():
        names, shape = logical_axes(variable), variable.get_value().shape
        sides = {True: 1, False: 16}  # inputs and outputs: an input of some outputs, all widths of a head
        for last in (False, True):
            index, left = [], dict(sides)
            for name, size in zip(names, shape, strict=True):
                start = size - 1 if last else 0
                if name in BATCH_AXES:
                    index.append(slice(start, start + 1))
                else:
                    count = left.pop(name in variable.get_metadata("contracts"), size)
                    index.append(slice(0, min(count, size)))
            part = base.read(path, np.float32, tuple(index))
            number = zlib.crc32(np.ascontiguousarray(part).tobytes(), number)
    return number


def open_adapters(adapters: OrbaxCheckpoint, open_base: Callable[[str], "Checkpoint"]) -> AdapterCheckpoint:
    """The adapters of a run's checkpoint over their base. Raises `CheckpointError` for another base than theirs."""
    base = open_base_of(adapters.directory, adapters.base, open_base)
    fix = f"has changed since the adapters in {adapters.directory} were trained; restore it"
    check(adapters.base_fingerprint in (None, fingerprint(base)), "base", adapters.base, fix)
    own = {path: partial(adapters.array, path) for path in adapters.paths}
    return AdapterCheckpoint(base, adapters.base, adapters.lora, adapters.directory, own)


def open_base_of(adapters: Path, base: str, open_base: Callable[[str], "Checkpoint"]) -> "Checkpoint":
    """The base of adapters. Raises `CheckpointError` that names both if it cannot be opened."""
    try:
        return open_base(base)
    except ConfigError as error:
        fix = f"is the base of the adapters in {adapters} and cannot be opened: {error.message}"
        raise CheckpointError("base", base, fix) from None
