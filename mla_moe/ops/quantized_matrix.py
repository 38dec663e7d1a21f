"""Matrices in FP8, INT8 or INT4: quantized values (codes) with a scale for each block, dequantized where they are
multiplied (QLoRA, arXiv 2305.14314).

    weight = code · scale

Formats are those of checkpoints: FP8 (E4M3) in blocks of 128 × 128 as DeepSeek releases it, and of compressed-tensors
INT4 in groups of 32 inputs, and INT8 with a scale for each output. Codes have the axes of the matrix. A byte of INT4
has two codes with an offset of 8, of which that of the even input is the lower one.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mla_moe.config.lora import QuantizedFormat

CODE_DTYPES: dict[QuantizedFormat, Any] = {"fp8": jnp.uint8, "int8": jnp.int8, "int4": jnp.uint8}
"""FP8 is stored by its bits: where a device has no FP8, XLA would convert the matrices of all layers to floats before
it takes one of them."""
SCALE_DTYPES: dict[QuantizedFormat, Any] = {"fp8": jnp.float32, "int8": jnp.float32, "int4": jnp.bfloat16}
BLOCKS: dict[QuantizedFormat, tuple[int | None, int]] = {"fp8": (128, 128), "int8": (None, 1), "int4": (32, 1)}
"""Inputs and outputs of a block; None: all inputs."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """Codes, scales, and how many elements a scale is of along each axis, counted from the last. Scales of length 1
    along an axis are of all its elements."""

    codes: Any
    """An array, or its sharding."""
    scale: Any
    block: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    packed_axis: int | None = dataclasses.field(metadata={"static": True})
    """The axis, counted from the last as −1, along which a byte has two codes."""

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        shape = list(self.codes.shape)
        if self.packed_axis is not None:
            shape[self.packed_axis] *= 2
        return tuple(shape)

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "*axes"]:
        """`code · scale`, computed in float32 and rounded once."""
        return self._dequantize(jnp).astype(dtype)

    def dequantize_on_host(self) -> Float[np.ndarray, "*axes"]:
        """The same for NumPy arrays, in float32."""
        return self._dequantize(np)

    def _dequantize(self, xp: Any) -> Any:
        codes = self.codes
        if self.packed_axis is not None:
            axis = codes.ndim + self.packed_axis
            codes = xp.stack([codes & 15, codes >> 4], axis=axis + 1).reshape(self.shape).astype(xp.float32) - 8
        elif codes.dtype == xp.uint8:
            fp8 = jnp.float8_e4m3fn
            codes = codes.view(fp8) if xp is np else jax.lax.bitcast_convert_type(codes, fp8)
        scale = self.scale.astype(xp.float32)
        for axis, size in enumerate(self.shape):
            if scale.shape[axis] > 1 and (block := self.block_of(axis)) > 1:
                scale = xp.repeat(scale, block, axis)[(slice(None),) * axis + (slice(size),)]
        return codes.astype(xp.float32) * scale

    def shard(self, axis: int, start: Array) -> "QuantizedMatrix":
        """The matrix with the scales of one shard alone, where so far its codes are a shard along `axis`, from element
        `start` on, and its scales those of the complete matrix. Shards have one size, so blocks of their greatest
        common divisor fit."""
        size, from_last = self.shape[axis], axis - self.ndim
        fits = math.gcd(self.block_of(axis), size)
        scale = jnp.repeat(self.scale, self.block_of(axis) // fits, axis)
        scale = jax.lax.dynamic_slice_in_dim(scale, start // fits, size // fits, axis)
        block = *self.block[:from_last], fits, *self.block[len(self.block) + from_last + 1 :]
        return dataclasses.replace(self, scale=scale, block=block)

    def block_of(self, axis: int) -> int:
        """Elements of a block along an axis, counted from the first. Leading axes may be missing or more than in
        `block`: those of layers, which are stacked or one of a stack."""
        from_last = axis - self.ndim
        return self.block[from_last] if -from_last <= len(self.block) else 1


Matrix = Array | QuantizedMatrix


def scale_shape(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """The shape of a matrix's scales. The last block along an axis may be partial."""
    return tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
