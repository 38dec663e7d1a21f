"""INT4, INT8 and FP8 weights in the layout of the library compressed-tensors (0.20.1), as Kimi-K2.5's INT4 experts.

    weight = code · weight_scale

with a scale for a tensor, a row, a group of columns or a block. Packed codes are offset by half of their range, and
fill an int32 from its lowest bits. NumPy does it a few rows at a time; bits and rounding are the library's.
"""

from typing import Any

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int, Shaped

from mla_moe.checkpoint.files import check
from mla_moe.checkpoint.quantization import E4M3, INT4_GROUPS, Scheme
from mla_moe.checkpoint.safetensors_reader import BFLOAT16

_ELEMENTS = 1 << 16
"""About as many are computed at a time: they stay in the processor's cache."""
_E4M3_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
_NIBBLES = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=-1).astype(np.float32) - 8
"""The two values of INT4 in a byte."""


def dequantize(
    codes: Shaped[np.ndarray, "rows stored_columns"],
    scale: Shaped[np.ndarray, "block_rows block_columns"],
    scheme: Scheme,
    dtype: DTypeLike,
    first_row: int,
    columns: tuple[int, int],
) -> Shaped[np.ndarray, "rows columns"]:
    """`code · scale` of some columns, from the first to before the last. `codes` are all columns of the rows from
    `first_row` on, and `scale` is the full matrix's."""
    start, stop = columns
    out = np.empty((len(codes), stop - start), dtype)
    block_rows, block_columns = scheme.block
    first, last = start // block_columns, max(stop - 1, 0) // block_columns
    step = max(_ELEMENTS // max(stop - start, 1), 1)
    for r in range(0, len(codes), step):
        rows = slice(r, min(r + step, len(codes)))
        values = _decode(codes[rows], scheme, start, stop)
        s = scale[np.arange(first_row + rows.start, first_row + rows.stop) // block_rows, first : last + 1]
        s = s.astype(np.float32)
        if last > first:
            offset = start - first * block_columns
            s = np.repeat(s, block_columns, axis=1)[:, offset : offset + stop - start]
        out[rows] = np.multiply(values, s, out=values)
    return out


def _decode(codes: np.ndarray, scheme: Scheme, start: int, stop: int) -> Float32[np.ndarray, "rows columns"]:
    if not scheme.packed:
        part = codes[:, start:stop]
        floats = scheme.kind == "float"
        return np.take(_E4M3_VALUES, part.view(np.uint8), mode="clip") if floats else part.astype(np.float32)
    raw = np.ascontiguousarray(codes).view(np.uint8)
    if scheme.bits == 8:
        return raw[:, start:stop].astype(np.float32) - 128
    first = start // 2
    pairs = np.take(_NIBBLES, raw[:, first : -(-stop // 2)], axis=0)  # ten times as fast as by an index
    return pairs.reshape(len(raw), -1)[:, start - 2 * first : stop - 2 * first]


def pack_int4(codes: Int[np.ndarray, "rows columns"]) -> Int[np.ndarray, "rows words"]:
    """Codes from −8 to 7, eight to an int32; the last one of a row is filled up with zeros."""
    rows, columns = codes.shape
    padded = np.zeros((rows, -(-columns // 8) * 8), np.uint8)
    padded[:, :columns] = codes + 8
    return (padded[:, ::2] | padded[:, 1::2] << 4).view(np.int32)


def quantize_int4(
    weight: Float[np.ndarray, "rows columns"],
) -> tuple[Int[np.ndarray, "rows words"], Float[np.ndarray, "rows groups"]]:
    """Packed codes, and the bfloat16 scale of each group of 32 columns: a 7th of the group's largest magnitude, or what
    is next to it, or an 8th if the largest is negative; the one with the least squared error.

    So the values of dequantized groups whose largest code is 7 or −8 come back unchanged, also after rounding to
    bfloat16. Raises `CheckpointError` for values that are not finite.
    """
    rows, columns = weight.shape
    group = INT4_GROUPS.block[1]
    packed = np.empty((rows, columns // 8), np.int32)
    scales = np.empty((rows, columns // group), BFLOAT16)
    step = max(_ELEMENTS // max(columns, 1), 1)
    for start in range(0, rows, step):
        x = weight[start : start + step].astype(np.float32).reshape(-1, group)
        codes, scale = _nearest(x, weight.dtype)
        packed[start : start + step] = pack_int4(codes.reshape(-1, columns))
        scales[start : start + step] = scale.reshape(-1, columns // group)
    return packed, scales


def _nearest(x: Float32[np.ndarray, "groups 32"], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    across = np.ascontiguousarray(x.T)  # a minimum over 32 neighbours is four times as slow
    low, high = across.min(axis=0), across.max(axis=0)
    peak = np.maximum(-low, high)
    fix = "cannot be quantized to INT4; write another dtype"
    check(bool(np.isfinite(peak).all()), "weight", "nan or infinity", fix)
    scale = (peak / 7).astype(BFLOAT16)
    scale[scale == 0] = 2**-7  # as the library: 0 / 0 has no code
    codes, error = _rounded(x, scale, dtype)
    eighth = (peak / 8).astype(BFLOAT16)
    options = [(eighth, (-low == peak) & (eighth > 0))]
    for neighbor in (-1, 1):
        near = (scale.view(np.int16) + np.int16(neighbor)).view(BFLOAT16)
        options.append((near, (near.astype(np.float32) * 7).astype(dtype).astype(np.float32) == peak))
    for option, fits in options:
        i = np.flatnonzero(fits & (error > 0))
        new_codes, new_error = _rounded(x[i], option[i], dtype)
        better = new_error < error[i]
        j = i[better]
        codes[j], error[j], scale[j] = new_codes[better], new_error[better], option[j]
    return codes, scale


def _rounded(x: np.ndarray, scale: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The nearest codes, and the squared error of each group as it is read in `dtype`."""
    s = scale.astype(np.float32)[:, None]
    codes: Any = x / s
    np.rint(codes, out=codes).clip(-8, 7, out=codes)
    read = codes * s
    if dtype != np.float32:
        read = read.astype(dtype).astype(np.float32)
    read -= x
    return codes.astype(np.int8), np.einsum("gc,gc->g", read, read)
