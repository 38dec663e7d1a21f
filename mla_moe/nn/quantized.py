"""Quantized matrices of a model (QLoRA, arXiv 2305.14314): quantized values (codes) in place of a weight, and
scales beside it.

The weight `q_a` of a module then has codes (`ops.quantized_matrix`), with the metadata that it had, and its scales are
`module.quantized["q_a"]`. What multiplies by a weight takes it by `weight_of`. No gradient is computed of either.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mla_moe.config import require
from mla_moe.config.lora import QuantizedFormat
from mla_moe.nn.param import BATCH_AXES, STACK_AXES
from mla_moe.ops.quantized_matrix import BLOCKS, CODE_DTYPES, SCALE_DTYPES, scale_shape
from mla_moe.parallel.quantized_weight import QuantizedWeight, Weight
from mla_moe.parallel.sharding import axis_metadata, logical_axes


def weight_of(module: nnx.Module, name: str) -> Weight:
    """A module's weight, quantized or not."""
    weight, scales = getattr(module, name), getattr(module, "quantized", {})
    return QuantizedWeight(weight, scales[name]) if name in scales else weight


def value_of(module: nnx.Module, name: str) -> Float[Array, "*axes"]:
    """The array of a module's weight; of a quantized one in float32."""
    weight = weight_of(module, name)
    return weight.matrix.dequantize(jnp.float32) if isinstance(weight, QuantizedWeight) else weight[...]


def scale_path(path: str) -> str:
    """The path of the scales of the weight with this path."""
    module, _, name = path.rpartition("/")
    return f"{module}/quantized/{name}"


def is_quantized(model: nnx.Module) -> bool:
    """Whether any weight is quantized."""
    return any("quantized" in path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)))


def is_codes_or_scales(variable: nnx.Variable) -> bool:
    """Whether a variable holds codes or scales."""
    codes = variable.get_metadata("role", None) == "matrix" and jnp.issubdtype(variable.get_value().dtype, jnp.integer)
    return codes or variable.get_metadata("block", None) is not None


def quantizable(model: nnx.Module) -> Iterator[tuple[tuple[Any, ...], nnx.Param]]:
    """The matrices that can be quantized, by path: those of attention and MLPs, of the MTP module too."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        axes = variable.get_metadata("out_sharding")
        matrix = variable.get_metadata("role", None) == "matrix" and not variable.get_metadata("frozen", False)
        if matrix and "lora" not in path and not {"router", "mtp_in"} & set(axes):
            yield path, variable


def quantize_shapes(model: nnx.Module, formats: Mapping[str, QuantizedFormat]) -> None:
    """Replace weights by codes and scales, in place, in a model of shapes (`nnx.eval_shape`). Raises `ConfigError` for
    a width that a format does not divide."""
    for path, weight in list(quantizable(model)):
        if (quantized_format := formats.get("/".join(map(str, path)))) is None:
            continue
        axes, shape = logical_axes(weight), list(weight.get_value().shape)
        block, last_input = _block(axes, shape, weight.get_metadata("contracts"), quantized_format)
        scale: Any = jax.ShapeDtypeStruct(scale_shape(shape, block), SCALE_DTYPES[quantized_format])
        packed_axis = last_input - len(axes) if quantized_format == "int4" else None
        metadata: dict[str, Any] = {"role": "scale", "contracts": (), "block": block, "packed_axis": packed_axis}
        module = module_at(model, path[:-1])
        if not hasattr(module, "quantized"):
            module.quantized = nnx.Dict()
        module.quantized[path[-1]] = nnx.Param(scale, **metadata, **axis_metadata(axes))
        if packed_axis is not None:
            shape[packed_axis] //= 2
        getattr(module, path[-1]).set_value(jax.ShapeDtypeStruct(tuple(shape), CODE_DTYPES[quantized_format]))


def _block(
    axes: Sequence[str], shape: Sequence[int], contracts: Sequence[str], quantized_format: QuantizedFormat
) -> tuple[tuple[int, ...], int]:
    """Elements of a block along each axis, and the last axis of the inputs.

    Blocks of a checkpoint are of the matrix [outputs, inputs]. Of inputs or outputs with two axes, such as heads and
    their widths, a block here is within one index of the first, so that heads can be sharded: a part of a checkpoint's
    block, which has its scale.
    """
    inputs = [i for i, axis in enumerate(axes) if axis in contracts]
    outputs = [i for i, axis in enumerate(axes) if axis not in (*contracts, *BATCH_AXES)]
    block = [1] * len(axes)
    for sides, size in zip((inputs, outputs), BLOCKS[quantized_format], strict=True):
        width = shape[sides[-1]]
        if size is None:
            for i in sides:
                block[i] = shape[i]
        else:
            block[sides[-1]] = math.gcd(size, width) if len(sides) > 1 else min(size, width)
    last, group = inputs[-1], BLOCKS[quantized_format][0]
    fix = f"groups of {group} inputs do not divide the axis {axes[last]} of {shape[last]}; use int8 or fp8"
    ok = quantized_format != "int4" or (block[last] == group and shape[last] % group == 0)
    require(ok, "lora.quantize_base", quantized_format, fix)
    return tuple(block), last


def dequantize_weights(model: nnx.Module, dtype: DTypeLike) -> None:
    """Replace codes and scales by weights in `dtype`, in place, a layer at a time."""
    for path, weight in list(quantizable(model)):
        module = module_at(model, path[:-1])
        quantized = weight_of(module, path[-1])
        if not isinstance(quantized, QuantizedWeight):
            continue
        matrix = quantized.matrix
        dequantize = lambda matrix: matrix.dequantize(dtype)  # noqa: E731
        run = partial(jax.lax.map, dequantize) if logical_axes(weight)[0] in STACK_AXES else dequantize
        getattr(module, path[-1]).set_value(jax.jit(run, out_shardings=matrix.codes.sharding)(matrix))
    for _, module in list(nnx.iter_graph(model)):
        if isinstance(module, nnx.Module) and hasattr(module, "quantized"):
            del module.quantized


def module_at(model: nnx.Module, path: Sequence[Any]) -> Any:
    """The module of a model with this path."""
    for name in path:
        model = getattr(model, name)
    return model
