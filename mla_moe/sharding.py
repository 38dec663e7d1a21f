"""The mesh, and one table from what an axis means to the mesh axis that splits it.

Parameters name their axes (`nn.param.matrix`); nothing else in the model knows of a mesh.
"""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mla_moe import recipe
from mla_moe.config import ConfigError

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")

Rules = Mapping[str, str | None]

RULES: Rules = {
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

DECODE_RULES: Rules = {
    # A decode step has few tokens and needs all weights: there it is the tokens that travel.
    "experts": "expert",
    "heads": "expert+tensor",
    "hidden": "expert+tensor",
    "expert_hidden": "tensor",
    "vocab": "expert+tensor",
}

LOGICAL_AXES = (*RULES, "layers", "gate_up", "router", "qk", "kv", "v")

# Tokens: sequences over every axis that has its own data, time over `context`.
BATCH = P(("data", "fsdp", "expert"), "context")
TOKENS = ("data", "fsdp", "expert", "context")
"""The mesh axes over which tokens are split."""


def make_mesh(sizes: recipe.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh over `devices` (all by default); where they come in slices with a slow network between, slices lie along
    `data`. Raises `ConfigError` when the sizes do not multiply to the number of devices, or `data` to that of slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [getattr(sizes, axis) for axis in MESH_AXES]
    given = math.prod(size for size in shape if size != -1)
    if -1 in shape and len(devices) % given == 0:
        shape[shape.index(-1)] = len(devices) // given
    if math.prod(shape) != len(devices):
        wanted = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, shape, strict=True))
        raise ConfigError("mesh", wanted, f"the sizes must multiply to the number of devices, {len(devices)}")
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(grid, MESH_AXES, axis_types=kinds)
    data, *inner = shape
    if data % slices:
        raise ConfigError("mesh.data", data, f"must be a multiple of the {slices} slices, which lie along it")
    between = (slices, *(1 for _ in inner))
    shape = data // slices, *inner
    grid = mesh_utils.create_hybrid_device_mesh(shape, between, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, MESH_AXES, axis_types=kinds)


def rules_of(changes: Sequence[str]) -> Rules:
    """The table with a recipe's `mesh.rules` in it. Raises `ConfigError` for an axis that is not known."""
    table = dict(RULES)
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


def spec(
    axes: Sequence[str],
    shape: Sequence[int],
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    rules: Rules = RULES,
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


def mesh_axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a `PartitionSpec`."""
    return (part,) if isinstance(part, str) else part or ()


def gathered(weight: jax.Array, place: P, but: Sequence[str] = ("tensor",)) -> jax.Array:
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


def current_mesh(shape: Sequence[int]) -> jax.sharding.AbstractMesh | None:
    """The mesh around the present code (`jax.set_mesh`) if tokens `[B, T, …]` of this shape can be split over it.

    XLA then partitions other tokens on a mesh as it sees fit.
    """
    mesh = mesh_around()
    if mesh is None:
        return None
    rows = math.prod(mesh.shape[axis] for axis in BATCH[0])
    return mesh if shape[0] % rows == 0 and shape[1] % mesh.shape[BATCH[1]] == 0 else None


def mesh_around() -> jax.sharding.AbstractMesh | None:
    """The mesh around the present code. None for a single device, for a mesh of other axes, and within a `shard_map`,
    where all is local already."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(MESH_AXES) <= set(mesh.axis_names) or mesh.size == 1:
        return None
    return mesh if all(kind == AxisType.Auto for kind in mesh.axis_types) else None


def left_to_xla(x: jax.Array) -> None:
    """Raise `ConfigError` for an array that a mesh of Explicit axes splits: here XLA says where arrays lie."""
    split = any(part is not None for part in jax.typeof(x).sharding.spec)
    fix = "its axes must be left to XLA: jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))"
    if split:
        raise ConfigError("mesh", "of AxisType.Explicit", fix)


def vocabulary_axes(mesh: jax.sharding.AbstractMesh, size: int, candidates: Sequence[str]) -> tuple[str, ...]:
    """The mesh axes over which the head's columns are split when logits are made: those that divide them."""
    return tuple(axis for axis in dividing(mesh, size, candidates) if mesh.shape[axis] > 1)


def constrain(x: jax.Array) -> jax.Array:
    """Activations `[B, T, …]` lie as tokens do, where there is a mesh."""
    mesh = current_mesh(x.shape)
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH))


def dividing(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, rows: int, axes: Sequence[str]) -> tuple[str, ...]:
    """As many of the mesh axes as divide `rows`."""
    chosen: list[str] = []
    for axis in axes:
        if rows % math.prod(mesh.shape[other] for other in (*chosen, axis)) == 0:
            chosen.append(axis)
    return tuple(chosen)


def as_slots(x: jax.Array) -> jax.Array:
    """What belongs to the cache's slots `[B, …]` lies as they do: over every axis that splits sequences."""
    return _lie(x, BATCH[0])


ROWS = ("data", "fsdp")
"""The mesh axes over which the tokens of a decode step are split; the devices of the others share the work on each."""


def as_rows(x: jax.Array) -> jax.Array:
    """Activations `[b, …]` of a decode step, where there is a mesh."""
    return _lie(x, ROWS)


def as_columns(logits: jax.Array) -> jax.Array:
    """Logits `[b, V]` of a decode step: each device has those of its part of the head."""
    return _lie(logits, ROWS, ("expert", "tensor"))


def _lie(x, *axes):
    mesh = mesh_around()
    if mesh is None:
        return x
    split = (dividing(mesh, size, some) for size, some in zip(x.shape, axes, strict=False))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*split)))


def check_divisible(run: recipe.Recipe, mesh: jax.sharding.Mesh) -> None:
    """Raise `ConfigError` for a batch, a length, or a model that the mesh cannot split evenly."""
    rows = math.prod(mesh.shape[axis] for axis in BATCH[0])
    asks, context = run.rl.steps > 0, mesh.shape["context"]
    read = [("training", run.training)] * (run.training.steps > 0) + [("sft", run.sft)] * run.tunes
    part = "sequences of one accumulation step over mesh data x fsdp x expert"
    checks = (
        ("rl.rows", run.rl.rows if asks else 0, rows, "rows of an update over mesh data x fsdp x expert"),
        ("rl.row_tokens", run.rl.row_length if asks else 0, context, "tokens over mesh.context"),
        *((f"{name}.batch_size", stage.batch_size // stage.accumulation, rows, part) for name, stage in read),
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
