"""A checkpoint as the quantized base of adapters: codes and scales of `lora.quantize_base`, by parameter path.

A matrix that the checkpoint has in the same format is taken as it is, from its file. Others are quantized when they are
read, each block from its own elements, so that a process reads its shards and no more than the blocks at their edges.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from mla_moe.checkpoint import compressed_tensors, fp8
from mla_moe.checkpoint.files import check
from mla_moe.checkpoint.hf_mapping import Index
from mla_moe.checkpoint.quantization import StoredMatrix
from mla_moe.config import LoRAConfig
from mla_moe.config.lora import QuantizedFormat
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.nn.param import BATCH_AXES
from mla_moe.nn.quantized import scale_path
from mla_moe.ops.quantized_matrix import SCALE_DTYPES, QuantizedMatrix
from mla_moe.parallel.sharding import logical_axes

if TYPE_CHECKING:
    from mla_moe.checkpoint.reader import Checkpoint

MatrixIndex = tuple[int, ...]
"""The index of a matrix in a parameter: a layer, an expert, and gate or up projection."""
Region = tuple[slice, ...]
"""Elements of a matrix: a slice for each axis of its inputs and outputs."""


class _Layout(NamedTuple):
    """How a parameter is quantized in memory."""

    quantized_format: QuantizedFormat
    shape: tuple[int, ...]
    """Shape of the parameter before it was quantized."""
    block: tuple[int, ...]
    packed_axis: int | None
    batch: tuple[int, ...]
    """The axes that index matrices."""
    inputs: int
    """How many of the other axes, which come first, are inputs."""

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of a matrix."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.batch)

    def packing(self, axis: int) -> int:
        """Codes in a byte along an axis of the parameter."""
        return 1 if self.packed_axis is None or axis != len(self.shape) + self.packed_axis else 2


class QuantizedBase:
    """Reads codes and scales of the matrices that `lora.quantize_base` names, and all other arrays as the checkpoint
    has them."""

    def __init__(self, checkpoint: "Checkpoint", lora: LoRAConfig):
        self._checkpoint, self._model = checkpoint, AbstractModel(checkpoint.cfg, lora=lora)
        self._scale_paths = {scale_path(path): path for path in self.formats}
        self._scales: dict[tuple[str, MatrixIndex, str], np.ndarray] = {}
        """The scales of matrices whose codes were quantized, until they are read."""

    @property
    def formats(self) -> Mapping[str, QuantizedFormat]:
        """Formats of the quantized matrices, by path."""
        return self._model.formats

    @cached_property
    def _layouts(self) -> Mapping[str, _Layout]:
        shapes = {path: v.get_value().shape for path, v in AbstractModel(self._checkpoint.cfg).variables.items()}

        def layout(path: str, quantized_format: QuantizedFormat) -> _Layout:
            variable, scale = self._model.variables[path], self._model.variables[scale_path(path)]
            names = logical_axes(variable)
            batch = tuple(axis for axis, name in enumerate(names) if name in BATCH_AXES)
            inputs = sum(name in variable.get_metadata("contracts") for name in names)
            block, packed_axis = (scale.get_metadata(name) for name in ("block", "packed_axis"))
            return _Layout(quantized_format, shapes[path], block, packed_axis, batch, inputs)

        return {path: layout(path, quantized_format) for path, quantized_format in self.formats.items()}

    def read(self, path: str, dtype: DTypeLike, index: tuple[slice, ...]) -> np.ndarray:
        """A shard of codes, of scales, or of another array: `index` has a slice for each axis."""
        if path in self.formats:
            return self._by_matrix(path, index, "codes").astype(dtype, copy=False)
        if path in self._scale_paths:
            return self._by_matrix(self._scale_paths[path], index, "scale").astype(dtype, copy=False)
        return self._checkpoint.read(path, dtype, index)

    def dequantized(self, path: str, index: Index) -> np.ndarray:
        """A part of a matrix that is quantized in memory, dequantized to float32; a number removes its axis."""
        slices = tuple(slice(i, i + 1) if isinstance(i, int) else i for i in index)
        values = self._by_matrix(path, slices, "values")
        return values[tuple(0 if isinstance(i, int) else slice(None) for i in index)]

    def _by_matrix(self, path: str, index: tuple[slice, ...], what: str) -> np.ndarray:
        layout, block = self._layouts[path], self._layouts[path].block
        unit = {
            "codes": [layout.packing(axis) for axis in range(len(layout.shape))],
            "scale": block,
            "values": [1] * len(layout.shape),
        }[what]
        sizes = [-(-n // u) for n, u in zip(layout.shape, unit, strict=True)]
        ranges = [range(*i.indices(n)) for i, n in zip(index, sizes, strict=True)]
        region, wanted = [], []
        for axis in layout.axes:  # whole blocks, and within them what is wanted
            b, n = block[axis], layout.shape[axis]
            start = ranges[axis].start * unit[axis] // b * b
            region.append(slice(start, min(-(-ranges[axis].stop * unit[axis] // b) * b, n)))
            wanted.append(slice(ranges[axis].start - start // unit[axis], ranges[axis].stop - start // unit[axis]))
        dtypes = {
            "codes": self._model.variables[path].get_value().dtype,
            "scale": SCALE_DTYPES[layout.quantized_format],
        }
        shard = np.empty([len(r) for r in ranges], dtypes.get(what, np.float32))

        def fill(at: MatrixIndex) -> None:
            matrix_index = tuple(ranges[axis][i] for axis, i in zip(layout.batch, at, strict=True))
            numbers = dict(zip(layout.batch, at, strict=True))
            target = tuple(numbers.get(axis, slice(None)) for axis in range(len(ranges)))
            shard[target] = self._part(path, layout, matrix_index, tuple(region), what)[tuple(wanted)]

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy works in parallel
            for _ in pool.map(fill, np.ndindex(*(len(ranges[axis]) for axis in layout.batch))):
                pass
        return shard

    def _part(self, path: str, layout: _Layout, matrix_index: MatrixIndex, region: Region, what: str) -> np.ndarray:
        """Codes, scales or values of whole blocks of one matrix."""
        key = path, matrix_index, str(region)
        if what == "scale" and key in self._scales:
            return self._scales.pop(key)
        stored = self._checkpoint.stored_matrix(path, matrix_index)
        if stored is not None and _same_format(stored, layout.quantized_format):
            scale = _scale_of(stored, layout, region)
            if what == "scale":
                return scale
            codes = _codes_of(stored, layout, region)
        else:
            codes, scale = self._quantize(path, layout, matrix_index, region)
            if what == "codes":
                self._scales[key] = scale
        if what != "values":
            return codes if what == "codes" else scale
        block = tuple(layout.block[axis] for axis in layout.axes)
        packed = [i - len(block) for i, axis in enumerate(layout.axes) if layout.packing(axis) > 1]
        return QuantizedMatrix(codes, scale, block, packed[0] if packed else None).dequantize_on_host()

    def _quantize(
        self, path: str, layout: _Layout, matrix_index: MatrixIndex, region: Region
    ) -> tuple[np.ndarray, np.ndarray]:
        numbers = dict(zip(layout.batch, matrix_index, strict=True))
        slices = dict(zip(layout.axes, region, strict=True))
        index = tuple(
            slice(numbers[a], numbers[a] + 1) if a in numbers else slices[a] for a in range(len(layout.shape))
        )
        shape = [r.stop - r.start for r in region]
        width = int(np.prod(shape[: layout.inputs]))
        matrix = self._checkpoint.read(path, np.float32, index).reshape(width, -1)
        fix = f"{path} has NaN or infinity; use another base"
        check(bool(np.isfinite(matrix).all()), "lora.quantize_base", layout.quantized_format, fix)
        blocks = [layout.block[axis] for axis in layout.axes]
        codes, scale = _QUANTIZE[layout.quantized_format](matrix, (blocks[layout.inputs - 1], blocks[-1]))
        scale_shape = [-(-n // b) for n, b in zip(shape, blocks, strict=True)]
        shape[layout.inputs - 1] //= layout.packing(layout.axes[layout.inputs - 1])
        return codes.reshape(shape), scale.reshape(scale_shape)


def _quantize_int4(matrix: np.ndarray, _: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a matrix [inputs, outputs]."""
    words, scale = compressed_tensors.quantize_int4(np.ascontiguousarray(matrix.T))
    return np.ascontiguousarray(words.view(np.uint8).T), np.ascontiguousarray(scale.T)


def _quantize_int8(matrix: np.ndarray, _: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    peak = np.abs(matrix).max(axis=0, keepdims=True)
    scale = np.maximum(peak / 127, np.finfo(np.float32).tiny)
    return np.rint(matrix / scale).astype(np.int8), scale


def _quantize_fp8(matrix: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    codes, scale = fp8.quantize(matrix, block)
    return codes.view(np.uint8), scale


_QUANTIZE: Mapping[QuantizedFormat, Any] = {"fp8": _quantize_fp8, "int8": _quantize_int8, "int4": _quantize_int4}


def _same_format(stored: StoredMatrix, quantized_format: QuantizedFormat) -> bool:
    """Whether codes and scales are what the format has in memory."""
    kind, bits, packed = stored.scheme.kind, stored.scheme.bits, stored.scheme.packed
    if quantized_format == "fp8":
        return kind == "float" and stored.scheme.block == fp8.BLOCK
    if quantized_format == "int8":
        return (kind, bits, packed) == ("int", 8, False) and stored.scale.shape == (len(stored.codes), 1)
    group = stored.scheme.block == (1, 32) and stored.scale.dtype == SCALE_DTYPES["int4"]
    return (kind, bits, packed) == ("int", 4, True) and group


def _codes_of(stored: StoredMatrix, layout: _Layout, region: Region) -> np.ndarray:
    mapping, codes, last = stored.mapping, stored.codes, layout.inputs - 1
    if layout.packed_axis is not None:
        *outer, width = mapping.column_sizes
        mapping, codes = mapping._replace(column_sizes=(*outer, width // 2)), codes.view(np.uint8)
        packed = slice(region[last].start // 2, region[last].stop // 2)
        region = *region[:last], packed, *region[last + 1 :]
    rows, columns = mapping.hf_slices(region)
    codes = mapping.from_hf_tensor(codes[rows, columns])
    return codes if layout.quantized_format == "int8" else codes.view(np.uint8)


def _scale_of(stored: StoredMatrix, layout: _Layout, region: Region) -> np.ndarray:
    """The scale of each block in memory, which is that of the stored block around it."""
    blocks, n = [layout.block[axis] for axis in layout.axes], layout.inputs

    def numbers(region: Region, blocks: list[int], sizes: tuple[int, ...], stored_block: int) -> np.ndarray:
        """Numbers of the stored blocks that each block is in, along the inputs or the outputs."""
        starts: Any = 0
        for part, block, size in zip(region, blocks, sizes, strict=True):
            starts = np.add.outer(starts * size, np.arange(part.start, part.stop, block))
        return starts // stored_block

    rows, columns = stored.scheme.block
    inputs = numbers(region[:n], blocks[:n], stored.mapping.column_sizes, columns)
    outputs = numbers(region[n:], blocks[n:], stored.mapping.row_sizes, rows)
    scale = stored.scale[np.ix_(outputs.ravel(), inputs.ravel())].T
    return scale.reshape(*inputs.shape, *outputs.shape).astype(SCALE_DTYPES[layout.quantized_format])
