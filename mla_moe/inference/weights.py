"""A model's arrays as decoding wants them: in the compute type, and laid out so that no step copies them."""

from functools import partial

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from mla_moe.nn.param import Embedding, Matrix, logical_axes
from mla_moe.nn.transformer import Transformer, unstack_layers
from mla_moe.ops.moe_inference_cpu import is_packed
from mla_moe.parallel.sharding import DECODE_RULES, partition_spec


class ModelGraph:
    """A model without its arrays, as a static argument. Its hash is taken once: hashing a graph takes 2 ms."""

    def __init__(self, graph: nnx.GraphDef[Transformer]):
        self.graph, self._hash = graph, hash(graph)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, ModelGraph) and self.graph == other.graph)

    def merge(self, state: nnx.State) -> Transformer:
        return nnx.merge(self.graph, state)


def prepare_for_inference(model: Transformer) -> tuple[ModelGraph, nnx.State]:
    """The same model with matrices in the compute type; on one CPU, its layers one by one.

    Routers stay in float32, and on one CPU experts in as many bytes as they have: reading them from memory is what
    takes the time there. On a mesh weights lie so that tokens travel; elsewhere arrays that need no change are shared
    with `model`.
    """
    mesh, compute = mesh_of(model), model.precision.compute
    one_cpu = mesh is None and jax.default_backend() == "cpu"
    graph, state = nnx.split(model)
    if mesh is not None:
        return ModelGraph(graph), _arrange(state, compute, mesh)

    def convert(variable):
        if one_cpu and "experts" in variable.get_metadata("axes"):
            return variable.replace(is_packed(variable.get_value()))
        return variable.replace(_cast(variable, compute) if one_cpu else inference_layout(variable, compute, None))

    model = nnx.merge(graph, jax.tree.map(convert, state, is_leaf=_is_variable))
    graph, state = nnx.split(unstack_layers(model) if one_cpu else model)
    return ModelGraph(graph), state


def inference_layout(variable: nnx.Variable, compute: DTypeLike, mesh: Mesh | None) -> jax.Array:
    """In the type of computation and in its place; experts' gate and up as one axis, as a kernel takes them, each
    device's columns of both side by side."""
    value = _cast(variable, compute)
    if {"experts", "gate_up"} <= set(variable.get_metadata("axes")):
        parts = 1 if mesh is None else mesh.shape["tensor"]
        value = _side_by_side(value, 1 if value.shape[-1] % parts else parts)  # a width that is not split is whole
    return value if mesh is None else jax.lax.with_sharding_constraint(value, decode_sharding(variable, mesh))


@partial(jax.jit, static_argnames=("compute", "mesh"))
def _arrange(state, compute, mesh):
    """All in one program: of many, several would be under way at a time, and processes on CPUs wait for each other in
    different ones for ever."""
    return jax.tree.map(lambda v: v.replace(inference_layout(v, compute, mesh)), state, is_leaf=_is_variable)


def _is_variable(x: object) -> bool:
    return isinstance(x, nnx.Variable)


def decode_sharding(variable: nnx.Variable, mesh: Mesh) -> NamedSharding:
    """Where an `arranged` array lies."""
    axes, shape = logical_axes(variable), variable.get_value().shape
    if {"experts", "gate_up"} <= set(axes):
        kept = [i for i, axis in enumerate(axes) if axis != "gate_up"]
        axes, shape = [axes[i] for i in kept], [shape[i] for i in kept]
    return NamedSharding(mesh, partition_spec(axes, shape, mesh, DECODE_RULES))


def _cast(variable, compute):
    held = isinstance(variable, Matrix | Embedding) and "router" not in variable.get_metadata("axes")
    return _astype(variable.get_value(), compute) if held else variable.get_value()


@partial(jax.jit, static_argnames="dtype")
def _astype(x, dtype):
    return x.astype(dtype)


@partial(jax.jit, static_argnames="parts")
def _side_by_side(x, parts):
    *front, _, F = x.shape
    return x.reshape(*front, 2, parts, F // parts).swapaxes(-3, -2).reshape(*front, 2 * F)


def mesh_of(model: Transformer) -> Mesh | None:
    """The mesh that the model lies on, if it is more than one device."""
    sharding = model.embed.get_value().sharding
    mesh = getattr(sharding, "mesh", None)
    return mesh if mesh is not None and mesh.size > 1 else None
