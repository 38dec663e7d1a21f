"""The table of sharding rules, from a parameter's logical axes to mesh axes, and sharding constraints.

Parameters name their logical axes in Flax's metadata `out_sharding` (`nn.param`). `partition_spec` and this table
decide which mesh axes each of them is sharded over, as Flax's `logical_axis_rules` do in MaxText.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from flax.nnx.bridge.variables import NNXMeta
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mla_moe.config import ModelConfig, Recipe, require
from mla_moe.parallel.collectives import all_gather, shard_map
from mla_moe.parallel.mesh import (
    BATCH_SPEC,
    MESH_AXES,
    MeshView,
    current_mesh,
    dividing_axes,
    mesh_axes,
    physical_axes,
    spec_entry,
    token_mesh,
)

ShardingRules = Mapping[str, str | tuple[str, ...] | None]
"""The mesh axes of each logical axis; one that is not listed, or has None, is replicated."""

TRAINING_RULES: ShardingRules = {
    "embed": ("fsdp", "expert"),  # fsdp alone for the experts' weights, which are sharded over expert already
    "q_latent": "fsdp",
    "kv_latent": "fsdp",
    "mtp_in": ("fsdp", "expert"),
    "layers": "pipeline",
    "experts": "expert",
    # pipeline for layers that are not among its stages: the dense ones and the MTP module
    "heads": ("tensor", "expert", "pipeline"),
    "hidden": ("tensor", "expert", "pipeline"),
    # fsdp where `embed` does not use it, which is in the experts' second matrix
    "expert_hidden": ("tensor", "fsdp", "pipeline"),
    "vocab": "tensor",
    **dict.fromkeys(("dense_layers", "gate_up", "router", "qk", "kv", "v", "index_heads", "index_weights", "rank")),
}
"""The default rules (`mla_moe.sharding_rules`). Of several axes of an array the first takes a mesh axis."""

DECODE_RULES: ShardingRules = {
    # A decode step has few tokens and reads all weights: weights stay where they are, and activations are moved.
    "experts": "expert",
    "heads": ("expert", "tensor"),
    "hidden": ("expert", "tensor"),
    "expert_hidden": "tensor",
    "vocab": ("expert", "tensor"),
}


def rules_with_overrides(overrides: Sequence[str]) -> ShardingRules:
    """`TRAINING_RULES` with a recipe's `mesh.rules` applied. Raises `ConfigError` for an axis that is not known."""
    table = dict(TRAINING_RULES)
    for override in overrides:
        axis, equals, joined = override.partition("=")
        chosen = tuple(joined.split("+")) if joined else ()
        known = axis in TRAINING_RULES and set(chosen) <= set(MESH_AXES)
        names = f"axes are {', '.join(TRAINING_RULES)}; mesh axes are {', '.join(MESH_AXES)}"
        fix = f"write axis=mesh_axis, or axis= for replicated; {names}"
        require(bool(equals) and known, "mesh.rules", override, fix)
        fix = "experts are always sharded over expert, along which tokens are dispatched; drop this rule"
        require(axis != "experts", "mesh.rules", override, fix)
        fix = "layers are always sharded over pipeline, whose stages they are; drop this rule"
        require(axis != "layers", "mesh.rules", override, fix)
        table[axis] = chosen or None
    return table


def partition_spec(
    axes: Sequence[str],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh | MeshView,
    rules: ShardingRules = TRAINING_RULES,
) -> P:
    """The sharding of an array with these logical axes. A mesh axis is used at most once, and only where it divides; a
    pipeline only if it has several stages."""
    used: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        rule = dict.fromkeys(mesh_axes(rules.get(axis)))
        free = [name for name in rule if name in mesh.shape and name not in used]
        free = [name for name in free if name != "pipeline" or mesh.shape[name] > 1]
        chosen = dividing_axes(mesh, size, free)
        used.update(chosen)
        entries.append(spec_entry(chosen))
    return P(*entries)


def logical_axes(variable: nnx.Variable) -> tuple[Any, ...]:
    """The names of all axes of a variable. Inside a scan over stacked layers the array has one axis less than names,
    and layers that were stacked without Flax's metadata have one more, the first, so names count from the right."""
    names, ndim = tuple(variable.get_metadata("out_sharding")), variable.get_value().ndim
    return ("layers",) * (ndim - len(names)) + names[max(len(names) - ndim, 0) :]


class WeightRules(tuple):
    """One weight's metadata `sharding_rules`, from which `nnx.get_partition_spec` takes the mesh axes of its logical
    axes: pairs of both.

    They are defaults: rules of `nnx.logical_axis_rules` win, where Flax would refuse two rules for one name. Within
    `use_mesh_axes` they name the axes of that mesh.
    """

    def __iter__(self) -> Iterator[tuple[str, str | tuple[str, ...] | None]]:
        given = {name for name, _ in get_logical_axis_rules()}
        return ((axis, spec_entry(physical_axes(chosen))) for axis, chosen in super().__iter__() if axis not in given)


def weight_rules(axes: Sequence[str], rules: ShardingRules = TRAINING_RULES) -> WeightRules:
    """The rules for a weight with these logical axes, of which the first takes a mesh axis that more could have. They
    name no pipeline: most meshes have none."""
    used = {"pipeline"}
    pairs = []
    for axis in ("layers", "dense_layers", *axes):
        chosen = tuple(name for name in mesh_axes(rules.get(axis)) if name not in used)
        used.update(chosen)
        pairs.append((axis, chosen))
    return WeightRules(pairs)


def axis_metadata(axes: tuple[str, ...]) -> dict[str, Any]:
    """Flax's sharding metadata of a weight with these logical axes. Creating the weight needs no mesh."""
    return {"out_sharding": axes, "sharding_rules": weight_rules(axes), "eager_sharding": False}


def set_sharding_rules(model: nnx.Module, rules: ShardingRules) -> None:
    """Make the model follow other rules than `TRAINING_RULES`: its metadata, and what its modules all-gather."""
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Variable) and isinstance(
            variable.get_metadata("sharding_rules", None), WeightRules
        ):
            axes = variable.get_metadata("out_sharding")
            variable.set_metadata(rules=tuple(rules.items()), sharding_rules=weight_rules(axes, rules))


def is_weight(node: Any) -> bool:
    """Whether a node of a tree is an array with Flax's metadata, of NNX or, through the bridge, of Linen."""
    return isinstance(node, nnx.Variable | NNXMeta)


def named_shardings(model: Any, mesh: Mesh | AbstractMesh, rules: ShardingRules | None = None) -> Any:
    """The `NamedSharding` of each array of a model, for `jax.device_put(nnx.state(model), …)` and `out_shardings`.

    `model` is a module, of this package or with its modules inside, an `nnx.Optimizer`, a state, or another tree of
    Flax's variables; the result has the tree of `nnx.state(model)`, or of `model` if it is not a module. The names in
    the metadata `out_sharding` are looked up in `rules`, then in `nnx.logical_axis_rules`, then in `sharding_rules` (or
    in the rules of `set_sharding_rules`); a name found in none of them is a mesh axis, or replicated. Rules name axes
    of the mesh, or those of `MESH_AXES`, to which `use_mesh_axes` gives the mesh's names. A mesh axis is used once per
    array, by the first dimension that it divides; arrays without metadata are replicated. Raises `ConfigError` for a
    rule that names another axis.
    """
    for name, axes in (rules or {}).items():
        for axis in mesh_axes(axes):
            known = axis in (*mesh.axis_names, *MESH_AXES)
            require(known, f"rules.{name}", axis, f"the mesh has {', '.join(map(str, mesh.axis_names))}")
    given = {**dict(get_logical_axis_rules()), **(rules or {})}

    def sharding(node: Any) -> Any:
        if not is_weight(node):
            return NamedSharding(mesh, P())
        variable = node.to_nnx_variable() if isinstance(node, NNXMeta) else node
        array, spec = variable.get_value(), P()
        if variable.get_metadata("out_sharding", None):
            names, table = logical_axes(variable), {**dict(variable.get_metadata("rules", TRAINING_RULES)), **given}
            entries = (physical_axes(mesh_axes(table[n]), mesh) if n in table else mesh_axes(n) for n in names)
            axes = {str(i): entry for i, entry in enumerate(entries)}
            spec = partition_spec(tuple(axes), array.shape, mesh, axes)
        found = NamedSharding(mesh, spec)
        return node.replace(value=found) if isinstance(node, NNXMeta) else node.replace(found)

    return jax.tree.map(sharding, nnx.state(model) if isinstance(model, nnx.Pytree) else model, is_leaf=is_weight)


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
                flat = all_gather(flat, axis, axis=dimension)
                weight = flat.reshape(*flat.shape[: dimension + 1], *trailing)
    return weight


def vocab_axes(mesh: MeshView, size: int, candidates: Sequence[str]) -> tuple[str, ...]:
    """The mesh axes over which the output head's `size` columns are sharded when logits are computed."""
    return tuple(axis for axis in dividing_axes(mesh, size, candidates) if mesh.shape[axis] > 1)


def constrain_activations(x: jax.Array) -> jax.Array:
    """Constrain activations `[B, T, …]` of training to the sharding of tokens, if there is a mesh."""
    mesh = token_mesh(x.shape)
    return x if mesh is None else jax.lax.with_sharding_constraint(x, mesh.sharding(BATCH_SPEC))


def constrain_slots(x: jax.Array) -> jax.Array:
    """Constrain an array over the KV cache's sequence slots `[B, …]` to their sharding, over all batch axes."""
    return _constrain(x, BATCH_SPEC[0])


def map_slots(
    kernel: Callable[..., jax.Array],
    q_B: jax.Array,
    cache_LB: jax.Array,
    positions_B: jax.Array,
    layer: jax.Array | int,
) -> jax.Array:
    """`kernel(q, cache, positions, layer)` on each device, for the sequence slots B that it holds: XLA cannot partition
    a kernel by itself."""
    mesh = current_mesh()
    if mesh is None:
        return kernel(q_B, cache_LB, positions_B, layer)
    slots = P(dividing_axes(mesh, q_B.shape[0], BATCH_SPEC[0]))
    return shard_map(kernel, (slots, P(None, *slots), slots, P()), slots)(q_B, cache_LB, positions_B, layer)


DECODE_BATCH_AXES = ("pipeline", "data", "fsdp")
"""The mesh axes over which the tokens of a decode step are sharded; over the others the work on a token is sharded."""


def constrain_decode_activations(x: jax.Array) -> jax.Array:
    """Constrain activations `[b, …]` of a decode step to `DECODE_BATCH_AXES`, if there is a mesh."""
    return _constrain(x, DECODE_BATCH_AXES)


def constrain_decode_heads(x: jax.Array) -> jax.Array:
    """Constrain the output of attention `[b, T, H, V]` in a decode step: heads are sharded as in the projection that
    comes next, which otherwise may be all-gathered."""
    return _constrain(x, DECODE_BATCH_AXES, (), ("expert", "tensor"))


def constrain_decode_logits(logits: jax.Array) -> jax.Array:
    """Constrain logits `[b, V]` of a decode step: the vocabulary is sharded as the output head is."""
    return _constrain(logits, DECODE_BATCH_AXES, ("expert", "tensor"))


def _constrain(x: jax.Array, *candidates: Sequence[str]) -> jax.Array:
    """Shard each leading dimension over those of its candidate mesh axes that divide it."""
    mesh = current_mesh()
    if mesh is None:
        return x
    entries = (dividing_axes(mesh, size, axes) for size, axes in zip(x.shape, candidates, strict=False))
    return jax.lax.with_sharding_constraint(x, mesh.sharding(P(*entries)))


def bytes_per_device(tree: Any) -> float:
    """Bytes of a tree of sharded arrays on one device; the arrays may be abstract."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def check_divisible(recipe: Recipe, mesh: Mesh) -> None:
    """Raise `ConfigError` for a batch size, a length or a model width that the mesh does not divide; it names one that
    fits."""
    batch_shards = math.prod(mesh.shape[axis] for axis in BATCH_SPEC[0])
    context, pipeline = mesh.shape["context"], mesh.shape["pipeline"]
    rl = recipe.rl
    remat = recipe.training.remat
    require(remat != "stage" or pipeline > 1, "training.remat", remat, "is for a pipeline; choose full")
    fix = "has no key for each microbatch of a pipeline; set mesh.pipeline = 1"
    require(pipeline == 1 or not recipe.lora.dropout, "lora.dropout", recipe.lora.dropout, fix)
    microbatch, over_context = "sequences of a microbatch over mesh data x fsdp x expert", "tokens over mesh.context"
    groups = microbatch + (" x pipeline" if pipeline > 1 else "")  # where each microbatch is split for a pipeline
    checks = []
    if rl.steps > 0:
        checks += [("rl.micro_batch_size", rl.micro_batch_size, batch_shards, f"packed {groups}")]
        checks += [("rl.packed_length", rl.packed_sequence_length, context, over_context)]
    training, sft, dpo = recipe.training, recipe.sft, recipe.dpo
    active = {"training": training.active, "sft": recipe.fine_tunes, "dpo": dpo.active}
    stages = [(name, stage) for (name, runs), stage in zip(active.items(), (training, sft, dpo), strict=True) if runs]
    for name, stage in stages:
        steps, split = stage.gradient_accumulation_steps, name == "dpo"
        if not split:
            through = "microbatches over the stages of mesh.pipeline"
            checks += [(f"{name}.gradient_accumulation_steps", steps, pipeline, through)]
        shards = steps * (batch_shards if split else batch_shards // pipeline)
        what = f"gradient_accumulation_steps x {groups if split else microbatch}"
        checks += [(f"{name}.batch_size", stage.batch_size, shards, what)]
    checks += [(f"{name}.sequence_length", stage.sequence_length, context, over_context) for name, stage in stages]
    for field, value, shards, what in checks:
        fix = f"must be a multiple of {shards}: {what}; {max(value // shards, 1) * shards} fits"
        require(value % shards == 0, field, value, fix)
    check_model_divisible(recipe.model, mesh, "model")


def check_model_divisible(model: ModelConfig, mesh: Mesh, name: str) -> None:
    """Raise `ConfigError` for a width of a model, which errors call `name`, that the mesh does not divide."""
    checks = [("num_attention_heads", "tensor", "heads")]
    if model.has_experts:
        checks += [("moe_intermediate_size", "tensor", "width"), ("n_routed_experts", "expert", "experts")]
    for field, axis, what in checks:
        value, shards = getattr(model, field), mesh.shape[axis]
        fix = f"must be a multiple of {shards}: {what} over mesh.{axis}; mesh.{axis} = {math.gcd(value, shards)} fits"
        require(value % shards == 0, f"{name}.{field}", value, fix)
    stages, layers = mesh.shape["pipeline"], model.num_moe_layers
    if stages > 1:
        fix = f"{name} has {layers} MoE layers, of which each stage needs at least one; set at most {max(layers, 1)}"
        require(stages <= layers, "mesh.pipeline", stages, fix)
        fix = f"layers of {name} that share the keys of an indexer cannot be in different stages; set 1"
        require(not any(model.shared_indexers), "mesh.pipeline", stages, fix)
