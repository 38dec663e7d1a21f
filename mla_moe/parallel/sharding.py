"""The mesh, and one table from what an axis means to the mesh axis that splits it.

Parameters name their axes (`nn.param.matrix`); nothing else in the model knows of a mesh.
"""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mla_moe.config import ConfigError, Recipe
from mla_moe.parallel.mesh import BATCH_SPEC, MESH_AXES, current_mesh, dividing_axes, mesh_axes, token_mesh

ShardingRules = Mapping[str, str | None]

TRAINING_RULES: ShardingRules = {
    # logical axis of a parameter -> mesh axes, joined by +; an axis that is not listed is whole on every device
    "embed": "fsdp+expert",  # of an expert, which `expert` splits already, over fsdp alone
    "q_latent": "fsdp",
    "kv_latent": "fsdp",
    "mtp_in": "fsdp+expert",
    "experts": "expert",
    "heads": "tensor+expert",
    "hidden": "tensor+expert",
    "expert_hidden": "tensor+fsdp",  # fsdp where `embed` does not have it, that is of the second matrix
    "vocab": "tensor",
}

DECODE_RULES: ShardingRules = {
    # A decode step has few tokens and needs all weights: there it is the tokens that travel.
    "experts": "expert",
    "heads": "expert+tensor",
    "hidden": "expert+tensor",
    "expert_hidden": "tensor",
    "vocab": "expert+tensor",
}

LOGICAL_AXES = (*TRAINING_RULES, "layers", "gate_up", "router", "qk", "kv", "v")


def rules_with_overrides(changes: Sequence[str]) -> ShardingRules:
    """The table with a recipe's `mesh.rules` in it. Raises `ConfigError` for an axis that is not known."""
    table = dict(TRAINING_RULES)
    for change in changes:
        axis, equals, mesh_axes = change.partition("=")
        wrong = set(mesh_axes.split("+")) - set(MESH_AXES) if mesh_axes else ()
        if not equals or axis not in LOGICAL_AXES or wrong:
            known = f"axes are {', '.join(LOGICAL_AXES)}; mesh axes are {', '.join(MESH_AXES)}"
            raise ConfigError("mesh.rules", change, f"write axis=mesh_axis, or axis= for none; {known}")
        if axis == "experts":
            raise ConfigError("mesh.rules", change, "experts lie over expert: that is where tokens travel to")
        table[axis] = mesh_axes or None
    return table


def partition_spec(
    axes: Sequence[str],
    shape: Sequence[int],
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    rules: ShardingRules = TRAINING_RULES,
) -> P:
    """How an array with these logical axes lies on the mesh. A mesh axis is used once, and only where it divides."""
    free = set(mesh.axis_names)
    entries: list[str | tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        chosen: list[str] = []
        for mesh_axis in (rules.get(axis) or "").split("+"):
            parts = math.prod(mesh.shape[other] for other in chosen)
            if mesh_axis in free and size % (parts * mesh.shape[mesh_axis]) == 0:
                chosen.append(mesh_axis)
                free.remove(mesh_axis)
        entries.append(tuple(chosen) if len(chosen) > 1 else chosen[0] if chosen else None)
    return P(*entries)


def all_gather_weight(weight: jax.Array, place: P, but: Sequence[str] = ("tensor",)) -> jax.Array:
    """Within a `shard_map`: a weight of which this device has the part that `place` says, whole but for some axes. Its
    derivative scatters the gradient, natively on TPU if the axis that is split is the first or the last but one."""
    for dimension, part in enumerate(place):
        for axis in reversed(mesh_axes(part)):
            if axis not in but:
                front, behind = weight.shape[: dimension + 1], weight.shape[dimension + 1 :]
                flat = weight.reshape(*front, -1) if dimension and behind else weight
                flat = jax.lax.all_gather(flat, axis, axis=dimension, tiled=True)
                weight = flat.reshape(*flat.shape[: dimension + 1], *behind)
    return weight


def vocab_axes(mesh: jax.sharding.AbstractMesh, size: int, candidates: Sequence[str]) -> tuple[str, ...]:
    """The mesh axes over which the head's columns are split when logits are made: those that divide them."""
    return tuple(axis for axis in dividing_axes(mesh, size, candidates) if mesh.shape[axis] > 1)


def constrain_activations(x: jax.Array) -> jax.Array:
    """Activations `[B, T, …]` lie as tokens do, where there is a mesh."""
    mesh = token_mesh(x.shape)
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH_SPEC))


def constrain_slots(x: jax.Array) -> jax.Array:
    """What belongs to the cache's slots `[B, …]` lies as they do: over every axis that splits sequences."""
    return _constrain(x, BATCH_SPEC[0])


DECODE_BATCH_AXES = ("data", "fsdp")
"""The mesh axes over which the tokens of a decode step are split; the devices of the others share the work on each."""


def constrain_decode_activations(x: jax.Array) -> jax.Array:
    """Activations `[b, …]` of a decode step, where there is a mesh."""
    return _constrain(x, DECODE_BATCH_AXES)


def constrain_decode_logits(logits: jax.Array) -> jax.Array:
    """Logits `[b, V]` of a decode step: each device has those of its part of the head."""
    return _constrain(logits, DECODE_BATCH_AXES, ("expert", "tensor"))


def _constrain(x, *axes):
    mesh = current_mesh()
    if mesh is None:
        return x
    split = (dividing_axes(mesh, size, some) for size, some in zip(x.shape, axes, strict=False))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*split)))


def check_divisible(run: Recipe, mesh: jax.sharding.Mesh) -> None:
    """Raise `ConfigError` for a batch, a length, or a model that the mesh cannot split evenly."""
    rows = math.prod(mesh.shape[axis] for axis in BATCH_SPEC[0])
    asks, context = run.rl.steps > 0, mesh.shape["context"]
    read = [("training", run.training)] * (run.training.steps > 0) + [("sft", run.sft)] * run.tunes
    part = "sequences of one accumulation step over mesh data x fsdp x expert"
    checks = (
        (
            "rl.micro_batch_size",
            run.rl.micro_batch_size if asks else 0,
            rows,
            "rows of an update over mesh data x fsdp x expert",
        ),
        ("rl.packed_length", run.rl.packed_row_length if asks else 0, context, "tokens over mesh.context"),
        *(
            (f"{name}.batch_size", stage.batch_size // stage.gradient_accumulation_steps, rows, part)
            for name, stage in read
        ),
        *(
            (f"{name}.sequence_length", stage.sequence_length, context, "tokens over mesh.context")
            for name, stage in read
        ),
        (
            "model.moe_intermediate_size",
            run.model.moe_intermediate_size,
            mesh.shape["tensor"],
            "width over mesh.tensor",
        ),
        ("model.num_attention_heads", run.model.num_attention_heads, mesh.shape["tensor"], "heads over mesh.tensor"),
        ("model.n_routed_experts", run.model.n_routed_experts, mesh.shape["expert"], "experts over mesh.expert"),
    )
    for field, value, parts, what in checks:
        if value % parts:
            raise ConfigError(field, value, f"must be a multiple of {parts}: {what}")
