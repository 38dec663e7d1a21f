"""The matrix products of a compiled instruction: their FLOPs, and the fraction of the peak that they are assumed to
reach."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mla_moe.plan.flops import ExpectedRouting, gpu_kernel_flops, kernel_flops
from mla_moe.plan.hlo import HloComputation, HloInstruction, HloModule

SUSTAINED = {"matmul": 0.85, "experts": 0.85, "attention": 0.65}
"""The assumed fraction of the peak, by kind of product, if its shape fills whole tiles.

Large products in bfloat16 reach 80 to 90 % on H100 (FlashAttention-3, arXiv 2407.08608, section 1) and on TPU v5e
(JAX's guide "Matrix multiplication" for Pallas on TPU); grouped products of experts 98.6 % of the dense ones
(MegaBlocks, arXiv 2211.15841). Attention on H100 reaches 75 % in the forward pass, and less in the backward pass
(FlashAttention-3); no measurement of a TPU's attention kernel with the widths of MLA was found.
"""

_GPU_KERNEL = re.compile(r"jit\((_ragged_dot\w*|_flash_attention\w*|_latent_attention)\)")
_SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")


class Product(NamedTuple):
    """One matrix product, or the products of one kernel."""

    kind: str
    """`matmul`, `attention` or `experts`."""
    flops: float
    tile_fraction: float
    """The fraction of the FLOPs of whole tiles that it uses."""

    def seconds(self, peak: float, sustained: dict[str, float] | None) -> float:
        """At the peak if `sustained` is None, else at these fractions of it and with tiles filled up."""
        return (
            self.flops / peak if sustained is None else self.flops / (peak * sustained[self.kind] * self.tile_fraction)
        )


def products(
    module: HloModule, computation: HloComputation, instruction: HloInstruction, expected: ExpectedRouting, tile: int
) -> Iterator[Product]:
    """The products of one run of an instruction, with those of a fusion. `tile` is the width of a matrix unit."""
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")[0]]
        for nested in inner.instructions.values():
            yield from products(module, inner, nested, expected, tile)
    elif instruction.opcode == "convolution":
        yield _convolution(computation, instruction, tile)
    elif instruction.opcode == "dot":
        contracted = [int(i) for i in _attribute(instruction, r"lhs_contracting_dims=\{([\d,]*)\}").split(",") if i]
        batch = [int(i) for i in _attribute(instruction, r"lhs_batch_dims=\{([\d,]*)\}").split(",") if i]
        yield _dot(computation, instruction, contracted, batch, tile)
    elif instruction.opcode == "custom-call" and "gemm_backend_config" in instruction.rest:  # cuBLAS
        dims = [_attribute(instruction, rf'"lhs_{kind}_dimensions":\[([\d",]*)\]') for kind in ("contracting", "batch")]
        yield _dot(computation, instruction, *([int(i) for i in re.findall(r"\d+", d)] for d in dims), tile)
    elif instruction.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.rest:
        arrays = [_shape(computation.instructions[name].type) for name in instruction.operands]
        estimate = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.rest)
        kind, flops = kernel_flops(instruction.name, arrays, float(estimate.group(1)) if estimate else None, expected)
        yield Product(kind, flops, 1.0)
    elif instruction.opcode == "custom-call" and (function := _GPU_KERNEL.search(instruction.scope)):
        shapes = [_shape(computation.instructions[name].type)[0] for name in instruction.operands]
        results = [_shape(found.group())[0] for found in _SHAPE.finditer(instruction.type)]
        found = gpu_kernel_flops(function.group(1), shapes, results, expected)
        if found is not None:
            yield Product(*found, 1.0)


def _convolution(computation: HloComputation, instruction: HloInstruction, tile: int) -> Product:
    """XLA:TPU writes every product as a convolution. Its spatial axes are batch axes, or axes that are multiplied or
    contracted one by one; so for each axis the pairs of output and window positions inside the array are counted."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    assert labels is not None
    (lhs, rhs), out = (
        (_shape(computation.instructions[n].type)[0] for n in instruction.operands[:2]),
        _shape(instruction.type)[0],
    )
    left, right, result = (
        dict(zip(names, shape, strict=True)) for names, shape in zip(labels.groups(), (lhs, rhs, out), strict=True)
    )
    window = _attribute(instruction, r"window=\{([^}]*)\}")
    settings = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\w\-]+)", window)}
    rows, depth = result["b"], right["i"]
    flops = 2.0 * result["b"] * result["f"] * right["i"]
    for i, axis in enumerate(sorted(name for name in result if name.isdigit())):
        pairs = _window_pairs(left[axis], right[axis], result[axis], {k: v[i] for k, v in settings.items()})
        flops *= pairs
        contracted = pairs / result[axis]
        rows, depth = rows * result[axis], depth * contracted
    return Product("matmul", flops, _tile_fraction(rows, depth, result["f"], tile))


def _window_pairs(size: int, window: int, out: int, settings: dict[str, str]) -> float:
    """Pairs of an output position and a window position that meet an element of the array."""
    low = int(settings.get("pad", "0_0").split("_")[0])
    stride, lhs_dilate, rhs_dilate = (int(settings.get(k, 1)) for k in ("stride", "lhs_dilate", "rhs_dilate"))
    position = np.arange(out)[:, None] * stride + np.arange(window) * rhs_dilate - low
    inside = (position >= 0) & (position <= (size - 1) * lhs_dilate) & (position % lhs_dilate == 0)
    return float(inside.sum())


def _dot(
    computation: HloComputation, instruction: HloInstruction, contracted: list[int], batch: list[int], tile: int
) -> Product:
    lhs = _shape(computation.instructions[instruction.operands[0]].type)[0]
    out = _shape(instruction.type)[0]
    depth, count = (math.prod(lhs[axis] for axis in axes) for axes in (contracted, batch))
    rows = math.prod(lhs) / depth / count
    columns = math.prod(out) / rows / count
    return Product("matmul", 2.0 * math.prod(out) * depth, _tile_fraction(rows, depth, columns, tile))


def _tile_fraction(rows: float, depth: float, columns: float, tile: int) -> float:
    """The matrix unit holds a tile of one operand while the other streams through it: the depth and one of the two
    other extents fill tiles; the compiler selects the better one."""
    fill = [n / (tile * math.ceil(n / tile)) for n in (rows, depth, columns)]
    return fill[1] * max(fill[0], fill[2])


def _shape(type_: str) -> tuple[tuple[int, ...], bool]:
    """Shape of the first array of a type, and whether it has a floating dtype."""
    found = _SHAPE.search(type_)
    if found is None:
        return (), False
    return tuple(int(n) for n in found.group(2).split(",") if n), found.group(1)[0] in "bf"


def _attribute(instruction: HloInstruction, pattern: str) -> str:
    found = re.search(pattern, instruction.rest)
    return found.group(1) if found else ""
