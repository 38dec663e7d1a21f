"""The table of sharding rules, from a parameter's logical axes to mesh axes, and sharding constraints.

Parameters name their logical axes (`nn.param.matrix`). `partition_spec` and this table decide which mesh axes each of
them is sharded over, as Flax's `logical_axis_rules` do in MaxText.
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
    # logical axis of a parameter -> mesh axes, joined by +; an axis that is not listed is replicated
    "embed": "fsdp+expert",  # fsdp alone for the experts' weights, which are sharded over expert already
    "q_latent": "fsdp",
    "kv_latent": "fsdp",
    "mtp_in": "fsdp+expert",
    "experts": "expert",
    "heads": "tensor+expert",
    "hidden": "tensor+expert",
    "expert_hidden": "tensor+fsdp",  # fsdp where `embed` does not use it, which is in the experts' second matrix
    "vocab": "tensor",
}

DECODE_RULES: ShardingRules = {
    # A decode step has few tokens and reads all weights: weights stay where they are, and activations are moved.
    "experts": "expert",
    "heads": "expert+tensor",
    "hidden": "expert+tensor",
    "expert_hidden": "tensor",
    "vocab": "expert+tensor",
}

LOGICAL_AXES = (*TRAINING_RULES, "layers", "gate_up", "router", "qk", "kv", "v")


def rules_with_overrides(overrides: Sequence[str]) -> ShardingRules:
    """`TRAINING_RULES` with a recipe's `mesh.rules` applied. Raises `ConfigError` for an axis that is not known."""
    table = dict(TRAINING_RULES)
    for override in overrides:
        axis, equals, mesh_axes = override.partition("=")
        unknown = set(mesh_axes.split("+")) - set(MESH_AXES) if mesh_axes else ()
        if not equals or axis not in LOGICAL_AXES or unknown:
            known = f"axes are {', '.join(LOGICAL_AXES)}; mesh axes are {', '.join(MESH_AXES)}"
            raise ConfigError("mesh.rules", override, f"write axis=mesh_axis, or axis= for replicated; {known}")
        if axis == "experts":
            fix = "experts are always sharded over expert, along which tokens are dispatched; drop this rule"
            raise ConfigError("mesh.rules", override, fix)
        table[axis] = mesh_axes or None
    return table


def partition_spec(
    axes: Sequence[str],
    shape: Sequence[int],
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    rules: ShardingRules = TRAINING_RULES,
) -> P:
    """The sharding of an array with these logical axes. A mesh axis is used at most once, and only where it divides."""
    free = set(mesh.axis_names)
    entries: list[str | tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        chosen: list[str] = []
        for mesh_axis in (rules.get(axis) or "").split("+"):
            shards = math.prod(mesh.shape[other] for other in chosen)
            if mesh_axis in free and size % (shards * mesh.shape[mesh_axis]) == 0:
                chosen.append(mesh_axis)
                free.remove(mesh_axis)
        entries.append(tuple(chosen) if len(chosen) > 1 else chosen[0] if chosen else None)
    return P(*entries)


def all_gather_weight(weight: jax.Array, spec: P, keep_sharded: Sequence[str] = ("tensor",)) -> jax.Array:
    """Inside a `shard_map`: all-gather the local shard of a weight with sharding `spec`, over all but some mesh axes.

    The derivative reduce-scatters the gradient. On TPU that is a native reduce-scatter if the sharded dimension is the
    first or the last but one; trailing dimensions are flattened to make it so.
    """
    for dimension, entry in enumerate(spec):
        for axis in reversed(mesh_axes(entry)):
            if axis not in keep_sharded:
                leading, trailing = weight.shape[: dimension + 1], weight.shape[dimension + 1 :]
                flat = weight.reshape(*leading, -1) if dimension and trailing else weight
                flat = jax.lax.all_gather(flat, axis, axis=dimension, tiled=True)
                weight = flat.reshape(*flat.shape[: dimension + 1], *trailing)
    return weight


def vocab_axes(mesh: jax.sharding.AbstractMesh, size: int, candidates: Sequence[str]) -> tuple[str, ...]:
    """The mesh axes over which the output head's `size` columns are sharded when logits are computed."""
    return tuple(axis for axis in dividing_axes(mesh, size, candidates) if mesh.shape[axis] > 1)


def constrain_activations(x: jax.Array) -> jax.Array:
    """Constrain activations `[B, T, …]` of training to the sharding of tokens, if there is a mesh."""
    mesh = token_mesh(x.shape)
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH_SPEC))


def constrain_slots(x: jax.Array) -> jax.Array:
    """Constrain an array over the KV cache's sequence slots `[B, …]` to their sharding, over all batch axes."""
    return _constrain(x, BATCH_SPEC[0])


DECODE_BATCH_AXES = ("data", "fsdp")
"""The mesh axes over which the tokens of a decode step are sharded; over the others the work on a token is sharded."""


def constrain_decode_activations(x: jax.Array) -> jax.Array:
    """Constrain activations `[b, …]` of a decode step to `DECODE_BATCH_AXES`, if there is a mesh."""
    return _constrain(x, DECODE_BATCH_AXES)


def constrain_decode_logits(logits: jax.Array) -> jax.Array:
    """Constrain logits `[b, V]` of a decode step: the vocabulary is sharded as the output head is."""
    return _constrain(logits, DECODE_BATCH_AXES, ("expert", "tensor"))


def _constrain(x: jax.Array, *candidates: Sequence[str]) -> jax.Array:
    """Shard each leading dimension over those of its candidate mesh axes that divide it."""
    mesh = current_mesh()
    if mesh is None:
        return x
    entries = (dividing_axes(mesh, size, axes) for size, axes in zip(x.shape, candidates, strict=False))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*entries)))


def check_divisible(recipe: Recipe, mesh: jax.sharding.Mesh) -> None:
    """Raise `ConfigError` for a batch size, a length or a model width that the mesh does not divide."""
    batch_shards = math.prod(mesh.shape[axis] for axis in BATCH_SPEC[0])
    context, tensor, expert = (mesh.shape[axis] for axis in ("context", "tensor", "expert"))
    model, rl = recipe.model, recipe.rl
    microbatch, over_context = "sequences of a microbatch over mesh data x fsdp x expert", "tokens over mesh.context"
    checks = []
    if rl.steps > 0:
        what = "packed sequences of a microbatch over mesh data x fsdp x expert"
        checks += [("rl.micro_batch_size", rl.micro_batch_size, batch_shards, what)]
        checks += [("rl.packed_length", rl.packed_row_length, context, over_context)]
    stages = [("training", recipe.training)] * (recipe.training.steps > 0) + [("sft", recipe.sft)] * recipe.fine_tunes
    for name, stage in stages:
        size = stage.batch_size // stage.gradient_accumulation_steps
        checks += [(f"{name}.batch_size", size, batch_shards, microbatch)]
    checks += [(f"{name}.sequence_length", stage.sequence_length, context, over_context) for name, stage in stages]
    checks += [
        ("model.moe_intermediate_size", model.moe_intermediate_size, tensor, "width over mesh.tensor"),
        ("model.num_attention_heads", model.num_attention_heads, tensor, "heads over mesh.tensor"),
        ("model.n_routed_experts", model.n_routed_experts, expert, "experts over mesh.expert"),
    ]
    for field, value, shards, what in checks:
        if value % shards:
            raise ConfigError(field, value, f"must be a multiple of {shards}: {what}")
