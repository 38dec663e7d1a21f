"""Weights in the layout of inference: in the compute dtype already, so that no decode step converts or copies them."""

from functools import partial

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from mla_moe.nn.param import Embedding, Matrix, logical_axes
from mla_moe.nn.transformer import Transformer, unstack_layers
from mla_moe.ops.moe_inference_cpu import pack_bfloat16
from mla_moe.parallel.sharding import DECODE_RULES, partition_spec


class ModelGraph:
    """A model without its arrays, as a static argument. Its hash is computed once: hashing a graph takes 2 ms."""

    def __init__(self, graph: nnx.GraphDef[Transformer]):
        self.graph, self._hash = graph, hash(graph)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, ModelGraph) and self.graph == other.graph)

    def merge(self, state: nnx.State) -> Transformer:
        return nnx.merge(self.graph, state)


def prepare_for_inference(model: Transformer) -> tuple[ModelGraph, nnx.State]:
    """Matrices in the compute dtype, routers in float32. On one CPU layers are unstacked, and experts keep the dtype
    of their parameters: memory bandwidth limits decoding there.

    On a mesh weights are sharded by `DECODE_RULES`; elsewhere arrays that need no change are shared with `model`.
    """
    mesh, compute = mesh_of(model), model.precision.compute
    one_cpu = mesh is None and jax.default_backend() == "cpu"
    graph, state = nnx.split(model)
    if mesh is not None:
        return ModelGraph(graph), _shard(state, compute, mesh)

    def convert(variable: nnx.Variable) -> nnx.Variable:
        if one_cpu and "experts" in variable.get_metadata("axes"):
            return variable.replace(pack_bfloat16(variable.get_value()))
        return variable.replace(_cast(variable, compute) if one_cpu else inference_layout(variable, compute, None))

    model = nnx.merge(graph, jax.tree.map(convert, state, is_leaf=_is_variable))
    graph, state = nnx.split(unstack_layers(model) if one_cpu else model)
    return ModelGraph(graph), state


def inference_layout(variable: nnx.Variable, compute: DTypeLike, mesh: Mesh | None) -> jax.Array:
    """A weight in the compute dtype, sharded for decoding. The gate and up projections of experts become one axis, as
    the grouped matmul takes them: each device's columns of both are next to each other."""
    value = _cast(variable, compute)
    if {"experts", "gate_up"} <= set(variable.get_metadata("axes")):
        shards = 1 if mesh is None else mesh.shape["tensor"]
        value = _join_gate_up(value, 1 if value.shape[-1] % shards else shards)  # otherwise it is replicated
    return value if mesh is None else jax.lax.with_sharding_constraint(value, decode_sharding(variable, mesh))


@partial(jax.jit, static_argnames=("compute", "mesh"))
def _shard(state: nnx.State, compute: DTypeLike, mesh: Mesh) -> nnx.State:
    """One program for all weights: with one program each, several would run at a time, and processes on CPUs would
    deadlock, each waiting for the others in a different program."""
    return jax.tree.map(lambda v: v.replace(inference_layout(v, compute, mesh)), state, is_leaf=_is_variable)


def _is_variable(x: object) -> bool:
    return isinstance(x, nnx.Variable)


def decode_sharding(variable: nnx.Variable, mesh: Mesh) -> NamedSharding:
    """The sharding of an array in `inference_layout`."""
    axes, shape = logical_axes(variable), variable.get_value().shape
    if {"experts", "gate_up"} <= set(axes):
        kept = [i for i, axis in enumerate(axes) if axis != "gate_up"]
        axes, shape = [axes[i] for i in kept], [shape[i] for i in kept]
    return NamedSharding(mesh, partition_spec(axes, shape, mesh, DECODE_RULES))


def _cast(variable: nnx.Variable, compute: DTypeLike) -> jax.Array:
    converted = isinstance(variable, Matrix | Embedding) and "router" not in variable.get_metadata("axes")
    return _astype(variable.get_value(), compute) if converted else variable.get_value()


@partial(jax.jit, static_argnames="dtype")
def _astype(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    return x.astype(dtype)


@partial(jax.jit, static_argnames="shards")
def _join_gate_up(x: jax.Array, shards: int) -> jax.Array:
    *leading, _, F = x.shape
    return x.reshape(*leading, 2, shards, F // shards).swapaxes(-3, -2).reshape(*leading, 2 * F)


def mesh_of(model: Transformer) -> Mesh | None:
    """The mesh that the model is sharded over, if it has more than one device."""
    sharding = model.embed.get_value().sharding
    mesh = getattr(sharding, "mesh", None)
    return mesh if mesh is not None and mesh.size > 1 else None
