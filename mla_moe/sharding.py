"""The mesh, and one table from what an axis means to the mesh axis that splits it.

Parameters name their axes (`nn.param.matrix`); nothing else in the model knows of a mesh.
"""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mla_moe import recipe
from mla_moe.config import ConfigError

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")

RULES: Mapping[str, str | None] = {
    # logical axis of a parameter -> mesh axis; an axis that is not listed is whole on every device
    "embed": "fsdp",
    "experts": "expert",
    "heads": "tensor",
    "hidden": "tensor",
    "expert_hidden": "tensor",
    "vocab": "tensor",
}

# Tokens: sequences over every axis that has its own data, time over `context`.
BATCH = P(("data", "fsdp", "expert"), "context")


def make_mesh(sizes: recipe.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh over `devices` (all by default). Raises `ConfigError` when the sizes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    shape = [getattr(sizes, axis) for axis in MESH_AXES]
    given = math.prod(size for size in shape if size != -1)
    if -1 in shape and len(devices) % given == 0:
        shape[shape.index(-1)] = len(devices) // given
    if math.prod(shape) != len(devices):
        wanted = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, shape, strict=True))
        raise ConfigError("mesh", wanted, f"the sizes must multiply to the number of devices, {len(devices)}")
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def spec(axes: Sequence[str], shape: Sequence[int], mesh: jax.sharding.Mesh) -> P:
    """How an array with these logical axes lies on the mesh. A mesh axis is used once, and only where it divides."""
    used: set[str] = set()
    entries: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        mesh_axis = RULES.get(axis)
        fits = mesh_axis is not None and mesh_axis not in used and size % mesh.shape[mesh_axis] == 0
        entries.append(mesh_axis if fits else None)
        used |= {mesh_axis} if fits else set()
    return P(*entries)


def sharding(axes: Sequence[str], shape: Sequence[int], mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec(axes, shape, mesh))


def check_divisible(run: recipe.Recipe, mesh: jax.sharding.Mesh) -> None:
    """Raise `ConfigError` for a batch, a length, or a model that the mesh cannot split evenly."""
    rows = math.prod(mesh.shape[axis] for axis in BATCH[0])
    part = run.training.batch_size // run.training.accumulation
    checks = (
        ("training.batch_size", part, rows, "sequences of one accumulation step over mesh data x fsdp x expert"),
        ("training.sequence_length", run.training.sequence_length, mesh.shape["context"], "tokens over mesh.context"),
        ("model.num_attention_heads", run.model.num_attention_heads, mesh.shape["tensor"], "heads over mesh.tensor"),
        ("model.n_routed_experts", run.model.n_routed_experts, mesh.shape["expert"], "experts over mesh.expert"),
    )
    for field, value, parts, what in checks:
        if value % parts:
            raise ConfigError(field, value, f"must be a multiple of {parts}: {what}")
