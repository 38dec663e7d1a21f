"""FP8 weights as DeepSeek releases them: E4M3 values, and one scale for each block of 128 x 128 of a matrix.

    weight = fp8 · weight_scale_inv

NumPy quantizes and dequantizes on any host, a few rows at a time. The embedding, the head, router gates, norms and the
MTP module's projection are not quantized. Source: DeepSeek-V3 technical report, section 3.3, and its `weight_dequant`.
"""

from collections.abc import Iterator

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped

from mla_moe.checkpoint.files import check
from mla_moe.checkpoint.quantization import E4M3, FP8_BLOCKS

Matrix = Shaped[np.ndarray, "rows columns"]
Scales = Shaped[np.ndarray, "block_rows block_columns"]

BLOCK = FP8_BLOCKS.block

_MAX = 448.0
_E4M3_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)


def dequantize(
    weight: Matrix, scale: Scales, dtype: DTypeLike, block: tuple[int, int] = BLOCK, offset: tuple[int, int] = (0, 0)
) -> Matrix:
    """`weight · scale` of a submatrix that starts at row and column `offset`; `scale` is the full matrix's.

    A block has 256 possible values: they are scaled and rounded once, then looked up.
    """
    out = np.empty(weight.shape, dtype)
    as_bits = np.dtype(f"u{out.itemsize}")
    codes, bits = weight.view(np.uint8), out.view(as_bits)
    for i, rows in _block_slices(weight.shape[0], block[0], offset[0]):
        tables = (_E4M3_VALUES * scale[i].astype(np.float32)[:, None]).astype(dtype).view(as_bits)
        for j, columns in _block_slices(weight.shape[1], block[1], offset[1]):
            bits[rows, columns] = np.take(tables[j], codes[rows, columns], mode="clip")
    return out


def quantize(weight: Matrix, block: tuple[int, int] = BLOCK) -> tuple[Matrix, Scales]:
    """FP8 values, and float32 scales with which the largest value of each block is 448. Raises `CheckpointError` for
    values that are not finite."""
    scheme = FP8_BLOCKS._replace(block=block)
    out, scale = np.empty(weight.shape, E4M3), np.empty(scheme.scale_shape(weight.shape), np.float32)
    starts = np.arange(0, weight.shape[1], block[1])
    for i, rows in _block_slices(weight.shape[0], block[0], 0):
        x = weight[rows].astype(np.float32)
        peaks = np.maximum.reduceat(np.abs(x).max(axis=0), starts)
        fix = "cannot be quantized to FP8; write another dtype"
        check(bool(np.isfinite(peaks).all()), "weight", "nan or infinity", fix)
        scale[i] = np.maximum(peaks / _MAX, np.finfo(np.float32).tiny)
        x /= np.repeat(scale[i], block[1])[: weight.shape[1]]
        out[rows] = _round_to_e4m3(x)
    return out, scale


def _block_slices(size: int, block: int, offset: int) -> Iterator[tuple[int, slice]]:
    """The blocks that `size` rows from row `offset` on overlap: each block's number, and its slice of these rows."""
    for number in range(offset // block, -(-(offset + size) // block)):
        yield number, slice(max(number * block - offset, 0), min((number + 1) * block - offset, size))


def _round_to_e4m3(x: np.ndarray) -> np.ndarray:
    """Round float32 of at most 448 to the nearest E4M3, ties to even: as `astype`, but four times as fast."""
    magnitude = np.abs(x)
    bits = magnitude.view(np.uint32)
    # Normal numbers: drop 20 of 23 mantissa bits, and change the exponent's bias from 127 to 7.
    out = bits >> 20
    out &= 1
    out += 0x7FFFF
    out += bits
    out >>= 20
    out -= 120 << 3
    # Subnormal numbers, below 2^-6, are multiples of 2^-9, which is the spacing of float32 just above 2^14.
    small = (magnitude + np.float32(2**14)).view(np.uint32) - np.float32(2**14).view(np.uint32)
    np.copyto(out, small, where=magnitude < 2**-6)
    out |= (x.view(np.uint32) >> 24) & 0x80
    return out.astype(np.uint8).view(E4M3)
