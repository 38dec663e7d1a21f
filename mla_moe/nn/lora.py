"""LoRA adapters (arXiv 2106.09685): a trained product of low rank beside a frozen matrix, `x W + scale · (x A) B`.

An adapter of the weight `q_a` of a module is `module.lora["q_a"]`, so its parameters have paths such as
`moe_layers/attention/lora/q_a/a`. Axes follow from the weight's: A has those that a product contracts, B the outputs,
and both have those in `BATCH_AXES` that index separate matrices. Experts have an A and a B each, and gate and up
projection share an expert's A, as in PEFT; in other MLPs they are separate matrices.

A and B are sharded as the weight, and multiplied as the weight is: by `sharded_einsum`, as grouped matmuls of the
experts (`ops.experts`), or of `kv_b` within the sharding of attention. No gradient is computed of a weight with an
adapter.
"""

import math
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from mla_moe.config import LoRAConfig, require
from mla_moe.nn.param import BATCH_AXES, STACK_AXES, uniform
from mla_moe.nn.quantized import dequantize_weights, is_quantized, module_at, weight_of
from mla_moe.ops.dropout import FeatureDropout, token_numbers
from mla_moe.ops.lora import LoRAFactors, keep_own
from mla_moe.parallel.quantized_weight import QuantizedWeight
from mla_moe.parallel.sharded_einsum import Einsum
from mla_moe.parallel.sharding import axis_metadata, logical_axes

RANK = "rank"
_RANK_LETTER = "r"  # no equation of the modules has it


class AdapterAxes(NamedTuple):
    """The logical axes of the two factors."""

    a: tuple[str, ...]
    b: tuple[str, ...]


def adapter_axes(weight: nnx.Variable) -> AdapterAxes:
    """The axes of the adapter of a weight, from its metadata."""
    axes, contracts = logical_axes(weight), weight.get_metadata("contracts")
    # An expert's gate and up projection are one matrix.
    matrices = ("layers", "experts") if "experts" in axes else BATCH_AXES
    batch = tuple(axis for axis in axes if axis in matrices)
    inputs = tuple(axis for axis in axes if axis in (*contracts, *batch))
    outputs = tuple(axis for axis in axes if axis not in inputs)
    return AdapterAxes((*inputs, RANK), (*batch, RANK, *outputs))


class DropoutKey(nnx.Variable):
    """The words of the key of an adapter's dropout, of each layer."""


class LoRA(nnx.Module):
    """The adapter of one weight, which may be stacked over layers. A is initialised as PEFT does, by a Kaiming-uniform
    distribution with a = √5, which is uniform in ± 1 / √inputs; B is 0. Dropout is off until there is a
    `dropout_key`."""

    def __init__(
        self,
        weight: nnx.Param,
        rank: int,
        scale: float,
        *,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ):
        axes = adapter_axes(weight)
        sizes = dict(zip(logical_axes(weight), weight.get_value().shape, strict=True)) | {RANK: rank}
        contracts = weight.get_metadata("contracts")
        bound = 1 / math.sqrt(math.prod(sizes[axis] for axis in contracts))
        a_shape, b_shape = (tuple(sizes[axis] for axis in names) for names in axes)
        metadata: dict[str, Any] = {"role": "matrix", "contracts": contracts, "bound": bound}
        self.a = nnx.Param(uniform(rngs, a_shape, bound, dtype), **metadata, **axis_metadata(axes.a))
        metadata = {"role": "matrix", "contracts": (RANK,), "fill": 0.0}
        self.b = nnx.Param(jnp.zeros(b_shape, dtype), **metadata, **axis_metadata(axes.b))
        self.scale, self.dropout = scale, dropout

    def feature_dropout(self, rows: UInt32[Array, "*rows"]) -> FeatureDropout | None:
        """The dropout of the adapter's input, for tokens with these numbers; None if dropout is off."""
        key = getattr(self, "dropout_key", None)
        return None if key is None else FeatureDropout(key[...], rows, rate=self.dropout)

    def factors(self, dtype: DTypeLike, adapter_ids: Int[Array, "*N"] | None = None) -> LoRAFactors:
        """A and scale · B."""
        a, b = self.a[...].astype(dtype), (self.scale * self.b[...]).astype(dtype)
        return LoRAFactors(a, b, self.own(adapter_ids))

    def own(self, adapter_ids: Int[Array, "*N"] | None) -> Bool[Array, "*N r"] | None:
        """`LoRAFactors.own_Nr`: every sequence has this adapter. Of several adapters see `nn.stacked_lora`."""
        return None

    def product(self, weight: nnx.Variable) -> Float[Array, "*axes"]:
        """`scale · A B`, with the axes of the weight."""
        names = logical_axes(weight)
        letters = dict(zip(names, "abcdefgh", strict=False)) | {RANK: _RANK_LETTER}
        factors = ["".join(letters[axis] for axis in logical_axes(factor)) for factor in (self.a, self.b)]
        out = "".join(letters[axis] for axis in names)
        return jnp.einsum(f"{','.join(factors)}->{out}", *self.factors(jnp.float32)[:2])


def adapter(module: nnx.Module, name: str) -> LoRA | None:
    """The adapter of a module's weight, if it has one."""
    adapters = getattr(module, "lora", None)
    return adapters[name] if adapters is not None and name in adapters else None


def project(
    einsum: Einsum,
    equation: str,
    x: Float[Array, "*x"],
    module: nnx.Module,
    name: str,
    dtype: DTypeLike,
    adapter_ids: Int[Array, "*N"] | None = None,
    dropout: FeatureDropout | None = None,
    numbers: UInt32[Array, "*N"] | None = None,
) -> Float[Array, "*y"]:
    """`einsum(equation, x, W)` of activations and a module's weight, plus `scale · (x A) B` if it has an adapter. Of
    several adapters (`nn.stacked_lora`), `adapter_ids` are those of the first axes of `x`. `dropout` of the input of A
    is by default the adapter's, for tokens with these `numbers`, by default those that they have in `x`."""
    weight, lora = getattr(module, name), adapter(module, name)
    frozen = weight_of(module, name)
    if isinstance(frozen, QuantizedWeight):
        # Dequantized again for the backward pass, which would otherwise keep the matrices of all layers.
        y = jax.checkpoint(lambda x: einsum(equation, x, frozen, dtype))(x)
    else:
        frozen = weight if lora is None else weight.replace(jax.lax.stop_gradient(weight.get_value()))
        y = einsum(equation, x, frozen, dtype)
    if lora is None:
        return y
    (x_letters, weight_letters), y_letters = equation.split("->")[0].split(","), equation.split("->")[1]
    letters = dict(zip(logical_axes(weight)[-len(weight_letters) :], weight_letters, strict=True))
    letters |= {RANK: _RANK_LETTER}
    a, b = ("".join(letters[axis] for axis in logical_axes(factor) if axis in letters) for factor in (lora.a, lora.b))
    tokens = sum(letter not in weight_letters for letter in x_letters)
    numbers = token_numbers(*x.shape[:tokens]) if numbers is None else numbers
    dropout = dropout or lora.feature_dropout(numbers)
    x = x if dropout is None else dropout(x)
    kept = "".join(letter for letter in a if letter not in x_letters)
    z_letters = "".join(letter for letter in x_letters if letter not in weight_letters) + kept
    z = keep_own(einsum(f"{x_letters},{a}->{z_letters}", x, lora.a, dtype), lora.own(adapter_ids))
    return y + lora.scale * einsum(f"{z_letters},{b}->{y_letters}", z, lora.b, dtype)


def seed_dropout(model: nnx.Module, key: Key[Array, ""]) -> None:
    """Turn on the dropout of a model's adapters for one forward pass: each adapter of each layer gets a key of its own
    from `key`."""
    for path, module in list(nnx.iter_graph(model)):
        if isinstance(module, LoRA) and module.dropout:
            own = jax.random.fold_in(key, zlib.crc32("/".join(map(str, path)).encode()))
            axes = logical_axes(module.a)
            stacked = axes[0] in STACK_AXES
            keys = jax.random.split(own, module.a.shape[0]) if stacked else own
            module.dropout_key = DropoutKey(jax.random.key_data(keys)[..., -2:])


def adaptable(model: nnx.Module) -> Iterator[tuple[tuple[Any, ...], nnx.Param]]:
    """The matrices of a `Transformer` that can have an adapter, by path. The MTP module's cannot, because
    PEFT has no module for it, nor those that no gradient reaches."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        trained = variable.get_metadata("role", None) == "matrix" and not variable.get_metadata("frozen", False)
        if trained and path[0] != "mtp" and "lora" not in path:
            yield path, variable


def add_adapters(model: nnx.Module, lora: LoRAConfig, *, rngs: nnx.Rngs) -> None:
    """Give a `Transformer` the adapters that `lora` names, in place. Raises `ConfigError` for a target without a
    matrix, for a model that has adapters, and for the default rank, which is 0."""
    require(lora.rank > 0, "lora.rank", lora.rank, "adapters need a rank, such as 16")
    weights = {"/".join(map(str, path)): (path, weight) for path, weight in adaptable(model)}
    for path, size in lora.sizes(weights).items():
        keys, weight = weights[path]
        module = module_at(model, keys[:-1])
        if not hasattr(module, "lora"):
            module.lora = nnx.Dict()
        require(keys[-1] not in module.lora, "lora", path, "has an adapter already; merge_adapters first")
        module.lora[keys[-1]] = LoRA(weight, size.rank, lora.scale(size), dropout=lora.dropout, rngs=rngs)


def merge_adapters(model: Any) -> Any:
    """A copy of a model in which quantized weights are dequantized and each adapter is added to its weight, so that it
    has none. Without either the model itself."""
    paths = [path for path, _ in adaptable(model) if adapter(module_at(model, path[:-1]), path[-1]) is not None]
    if not paths and not is_quantized(model):
        return model
    graph, state = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(lambda x: x, state))  # new variables of the same arrays
    dequantize_weights(model, model.precision.compute)
    for path in paths:
        module = module_at(model, path[:-1])
        weight, lora = getattr(module, path[-1]), adapter(module, path[-1])
        assert lora is not None
        weight.set_value(_merge(weight, lora))
    for path in paths:
        module = module_at(model, path[:-1])
        if hasattr(module, "lora"):
            del module.lora
    return model


def _merge(weight: nnx.Param, lora: LoRA) -> Array:
    """Layer by layer, so that no second copy of all layers is in memory, in float32."""
    graph, state = nnx.split((nnx.Param(weight.get_value(), **weight.get_metadata()), lora))

    def merged(state: nnx.State) -> Array:
        weight, lora = nnx.merge(graph, state)
        return (weight[...].astype(jnp.float32) + lora.product(weight)).astype(weight[...].dtype)

    stacked = logical_axes(weight)[0] in STACK_AXES
    run = partial(jax.lax.map, merged) if stacked else merged
    return jax.jit(run, out_shardings=weight.get_value().sharding)(state)
