"""Weights in the layout of inference: in the compute dtype already, so that no decode step converts or copies them."""

from collections.abc import Sequence
from functools import partial

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.typing import DTypeLike

from mla_moe.config import require
from mla_moe.nn.lora import merge_adapters
from mla_moe.nn.quantized import is_codes_or_scales, is_quantized
from mla_moe.nn.stacked_lora import AdapterWeights, stack_adapters
from mla_moe.nn.transformer import Transformer, unstack_layers
from mla_moe.ops.kernel_choice import target_platform
from mla_moe.ops.moe_inference_cpu import pack_bfloat16
from mla_moe.parallel.mesh import MESH_AXES, MeshView
from mla_moe.parallel.sharding import DECODE_RULES, logical_axes, partition_spec


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


def prepare_for_inference(model: Transformer, adapters: Sequence[AdapterWeights] = ()) -> tuple[ModelGraph, nnx.State]:
    """Matrices in the compute dtype, routers and the head weights of indexers in float32. On one CPU layers are
    unstacked, and experts keep the dtype of their parameters: memory bandwidth limits decoding there.

    Adapters of the model are merged into their weights, unless any of these are quantized: then all stay as they are.
    `adapters` stay beside the weights, and each sequence has one of them or none. On a mesh weights are sharded by
    `DECODE_RULES`; elsewhere arrays that need no change are shared with `model`.
    """
    mesh, compute = mesh_of(model), model.precision.compute
    model = stack_adapters(model if is_quantized(model) else merge_adapters(model), adapters)
    one_cpu = mesh is None and target_platform() == "cpu"
    packs = one_cpu and not is_quantized(model)  # beside quantized matrices experts are multiplied as on a mesh
    graph, state = nnx.split(model)
    if mesh is not None:
        return ModelGraph(graph), _shard(state, compute, mesh)

    def convert(_: object, variable: nnx.Variable) -> nnx.Variable:
        if is_codes_or_scales(variable):
            return variable
        if packs and "experts" in variable.get_metadata("out_sharding"):
            return variable.replace(pack_bfloat16(variable.get_value()))
        return variable.replace(_cast(variable, compute) if one_cpu else inference_layout(variable, compute, None))

    model = nnx.merge(graph, nnx.map_state(convert, state))
    graph, state = nnx.split(unstack_layers(model) if one_cpu else model)
    return ModelGraph(graph), state


def inference_layout(variable: nnx.Variable, compute: DTypeLike, mesh: Mesh | None) -> jax.Array:
    """A weight in the compute dtype, sharded for decoding. The gate and up projections of experts become one axis, as
    the grouped matmul takes them: each device's columns of both are next to each other."""
    value = _cast(variable, compute)
    if _is_joined(variable):
        shards = 1 if mesh is None else MeshView(mesh).shape["tensor"]
        value = _join_gate_up(value, 1 if value.shape[-1] % shards else shards)  # otherwise it is replicated
    return value if mesh is None else jax.lax.with_sharding_constraint(value, decode_sharding(variable, mesh))


@partial(jax.jit, static_argnames=("compute", "mesh"))
def _shard(state: nnx.State, compute: DTypeLike, mesh: Mesh) -> nnx.State:
    """One program for all weights: with one program each, several would run at a time, and processes on CPUs would
    deadlock, each waiting for the others in a different program."""
    return nnx.map_state(lambda _, v: v.replace(inference_layout(v, compute, mesh)), state)


def decode_sharding(variable: nnx.Variable, mesh: Mesh) -> NamedSharding:
    """The sharding of an array in `inference_layout`."""
    axes, shape, view = logical_axes(variable), variable.get_value().shape, MeshView(mesh)
    if _is_joined(variable):
        kept = [i for i, axis in enumerate(axes) if axis != "gate_up"]
        axes, shape = [axes[i] for i in kept], [shape[i] for i in kept]
    return view.sharding(partition_spec(axes, shape, view, DECODE_RULES))


def _is_joined(variable: nnx.Variable) -> bool:
    """Whether a weight is of experts' gate and up projection; codes and scales keep the axis of both."""
    return {"experts", "gate_up"} <= set(variable.get_metadata("out_sharding")) and not is_codes_or_scales(variable)


def _cast(variable: nnx.Variable, compute: DTypeLike) -> jax.Array:
    if is_codes_or_scales(variable):
        return variable.get_value()
    matrix = variable.get_metadata("role", None) in ("matrix", "embedding")
    converted = matrix and not {"router", "index_weights"} & set(variable.get_metadata("out_sharding"))
    return variable.get_value().astype(compute) if converted else variable.get_value()


@partial(jax.jit, static_argnames="shards")
def _join_gate_up(x: jax.Array, shards: int) -> jax.Array:
    *leading, _, F = x.shape
    return x.reshape(*leading, 2, shards, F // shards).swapaxes(-3, -2).reshape(*leading, 2 * F)


def mesh_of(model: Transformer) -> Mesh | None:
    """The mesh that the model is sharded over, if it has more than one device. Raises `ConfigError` for axes of other
    names than `MESH_AXES` and for Explicit ones: the engine's programs constrain shardings by name."""
    mesh = getattr(model.embed.get_value().sharding, "mesh", None)
    if mesh is None or mesh.size == 1:
        return None
    ok = set(mesh.axis_names) <= set(MESH_AXES) and all(kind == AxisType.Auto for kind in mesh.axis_types)
    names = ", ".join(MESH_AXES)
    require(ok, "mesh", str(mesh), f"the engine needs axes of {names} of type Auto: shard the model by make_mesh")
    return mesh
