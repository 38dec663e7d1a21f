"""Pipeline parallelism: stacked layers are sharded over the mesh axis `pipeline`, and microbatches pass through its
stages one after the other (GPipe, arXiv 1811.06965), each stage's output going to the next by a collective-permute.

The schedule is one scan over M + S − 1 ticks for M microbatches and S stages. At tick t stage s runs microbatch t − s.
In the bubble, where there is no such microbatch, a stage runs other real activations and discards the result: equal
tokens would all be routed to the same experts.

Outside of the pipeline its stages have their own sequences, as over `data`: nothing is computed twice. M microbatches
are G microbatch groups of S, one for each stage. A group is loaded when the one before has been used up, and moves
towards stage 0, one stage per tick; its outputs are passed back from the last stage, one stage per tick.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from mla_moe.config import require
from mla_moe.parallel.mesh import BATCH_SPEC, batch_shards, current_mesh, physical_axes, without_axis

StageFunction = Callable[[Any, Float[Array, "b T D"], Any, Int[Array, ""]], tuple[Float[Array, "b T D"], Any]]
"""`(layers, x_bTD, sequences, stage) -> (x_bTD, sums)`: the layers of a stage on a microbatch. `sums` are sums over its
tokens, with a leading axis of layers."""
Result = TypeVar("Result")


def pipeline_stages() -> int:
    """Number of pipeline stages of the current mesh; 1 without one."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape["pipeline"]


def pipeline_groups(sequences: int, microbatches: int | None) -> int:
    """Number of microbatch groups in a batch; a group has one microbatch per stage, and by default there is one group.
    Raises `ConfigError` for numbers that cannot be split evenly."""
    stages, shards = pipeline_stages(), batch_shards()
    microbatches = stages if microbatches is None else microbatches
    require(microbatches % stages == 0, "microbatches", microbatches, f"must be a multiple of mesh.pipeline = {stages}")
    groups = microbatches // stages
    fix = f"must be a multiple of {shards * groups}: {groups} microbatches for each device of the batch's mesh axes"
    require(sequences % (shards * groups) == 0, "sequences", sequences, fix)
    return groups


def split_groups(x: Shaped[Array, "B *rest"], groups: int) -> Shaped[Array, "G n *rest"]:
    """Split a batch into microbatch groups, each device the sequences that it has."""
    if groups == 1:
        return x[None]
    x = x.reshape(batch_shards(), groups, -1, *x.shape[1:])
    return _constrain(x.swapaxes(0, 1).reshape(groups, -1, *x.shape[3:]), 1)


def merge_groups(x: Shaped[Array, "G n *rest"]) -> Shaped[Array, "B *rest"]:
    """The inverse of `split_groups`."""
    if len(x) == 1:
        return x[0]
    split = x.reshape(len(x), batch_shards(), -1, *x.shape[2:])
    return _constrain(split.swapaxes(0, 1).reshape(-1, *x.shape[2:]), 0)


def _constrain(x: Array, leading: int) -> Array:
    mesh = current_mesh()
    assert mesh is not None
    return jax.lax.with_sharding_constraint(x, mesh.sharding(P(*[None] * leading, *BATCH_SPEC)))


def in_groups(run: Callable[..., tuple[Any, Any]], groups: int, *batch: Any) -> tuple[Any, Any]:
    """`run(*batch) -> (per_token, sums)` on one microbatch group after the other, so that no more than a group's
    activations are in memory. Arrays of `batch` are `[B, …]`."""
    if groups == 1:
        return run(*batch)
    split = jax.tree.map(lambda x: split_groups(x, groups), batch)
    _, (per_token, sums) = jax.lax.scan(lambda _, group: (None, run(*group)), None, split)
    return jax.tree.map(merge_groups, per_token), jax.tree.map(_sum, sums)


def _sum(x: Array) -> Array:
    return x.sum(axis=0, dtype=x.dtype)


def run_pipeline(
    stage: StageFunction, layers: Any, x_BTD: Float[Array, "B T D"], sequences: Any, groups: int
) -> tuple[Float[Array, "B T D"], Any]:
    """Run stacked `layers`, a tree of arrays with a leading axis that the stages divide, on a batch of `groups`
    microbatch groups.

    `sequences` is a tree of integers `[B, …]` that a layer needs beside the activations; every stage has those of all
    microbatches. Returns the outputs, and the sums over the microbatches, of all layers.
    """
    stages = pipeline_stages()
    (axis,) = physical_axes("pipeline")
    x_GnTD = split_groups(x_BTD, groups)

    def of_microbatches(x_B: Array) -> Array:
        x_Gn = split_groups(x_B, groups)
        return x_Gn.reshape(groups * stages, -1, *x_Gn.shape[2:])

    def local(layers: Any, x_GbTD: Array, sequences_M: Any) -> tuple[Array, Any]:
        with without_axis("pipeline"):
            return _schedule(stage, layers, x_GbTD, sequences_M, axis, stages)

    specs = P(axis), P(None, axis), P()
    run = jax.shard_map(
        local, in_specs=specs, out_specs=(P(None, axis), P(axis)), axis_names=frozenset({axis}), check_vma=False
    )
    x_GnTD, sums = run(layers, x_GnTD, jax.tree.map(of_microbatches, sequences))
    return merge_groups(x_GnTD), sums


def _schedule(
    stage: StageFunction, layers: Any, x_GbTD: Float[Array, "G b T D"], sequences_M: Any, axis: str, stages: int
) -> tuple[Float[Array, "G b T D"], Any]:
    """All ticks of one stage, whose own microbatch of each group is `x_GbTD`."""
    index, groups = jax.lax.axis_index(axis), len(x_GbTD)
    microbatches = groups * stages
    to_next = [(i, i + 1) for i in range(stages - 1)]
    to_previous = [(i + 1, i) for i in range(stages - 1)]

    def tick(carry: tuple[Array, ...], t: Array) -> tuple[tuple[Array, ...], Any]:
        x_bTD, waiting_bTD, done_bTD, outputs_GbTD = carry
        loaded_bTD = x_GbTD[jnp.minimum(t // stages, groups - 1)]
        waiting_bTD = jnp.where(t % stages == 0, loaded_bTD, waiting_bTD)
        x_bTD = jnp.where(index == 0, waiting_bTD, x_bTD)
        microbatch = t - index
        is_bubble = (microbatch < 0) | (microbatch >= microbatches)
        clipped = jnp.clip(microbatch, 0, microbatches - 1)
        x_bTD, sums = stage(layers, x_bTD, jax.tree.map(lambda a: a[clipped], sequences_M), index)
        sums = jax.tree.map(lambda s: jnp.where(is_bubble, jnp.zeros_like(s), s), sums)
        # The outputs of a group are all at their stages at its last tick, when they are written for the last time.
        done_bTD = jnp.where(index == stages - 1, x_bTD, jax.lax.ppermute(done_bTD, axis, to_previous))
        group = jnp.maximum(t - (stages - 1), 0) // stages
        outputs_GbTD = jax.lax.dynamic_update_index_in_dim(outputs_GbTD, done_bTD, group, 0)
        x_bTD = jax.lax.ppermute(x_bTD, axis, to_next)
        return (x_bTD, jax.lax.ppermute(waiting_bTD, axis, to_previous), done_bTD, outputs_GbTD), sums

    start = x_GbTD[0], x_GbTD[0], jnp.zeros_like(x_GbTD[0]), jnp.zeros_like(x_GbTD)
    (*_, outputs_GbTD), sums = jax.lax.scan(tick, start, jnp.arange(microbatches + stages - 1))
    return outputs_GbTD, jax.tree.map(_sum, sums)
