"""Experts over several devices compute what one device computes, with either kernel of token dispatch."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mla_moe.config import KernelConfig, ModelConfig
from mla_moe.config.parallelism import DispatchKernel
from mla_moe.ops.experts import experts, reference
from mla_moe.parallel.dispatch_plan import (
    PAIRS_PER_CHUNK,
    PAIRS_PER_EXPERT,
    DispatchPlan,
    dispatch_plan,
    expected_device_fraction,
)
from mla_moe.parallel.expert_parallel import dispatch_routes, expert_parallel_experts

E, K, D, F, N = 16, 3, 8, 5, 8 * 40


def inputs(routing: str) -> tuple[jax.Array, ...]:
    """x, experts, weights, gate_up and down."""
    keys = jax.random.split(jax.random.key(0), 5)
    x, w = jax.random.normal(keys[0], (N, D)), jax.random.uniform(keys[1], (N, K))
    gate_up, down = 0.3 * jax.random.normal(keys[2], (E, D, 2, F)), 0.3 * jax.random.normal(keys[3], (E, F, D))
    score = jax.random.normal(keys[4], (N, E))
    if routing == "half":  # one expert gets half of the tokens, and four get none
        score = score.at[: N // 2, 3].add(100.0).at[:, 10:14].add(-100.0)
    selected = jax.lax.top_k(score, K)[1]
    if routing == "half":
        selected = selected.at[::7, 1].set(E)  # unassigned
    return x, selected, w, gate_up, down


def value_and_grads(f: Callable[..., jax.Array], x: jax.Array, selected: jax.Array, *rest: jax.Array) -> Any:
    def loss(x: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = f(x, selected, *rest)
        return jnp.sin(y).sum(), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(x, *rest)


def assert_close(actual: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("routing", ["even", "half"])
def test_experts_equal_reference_and_unassigned_pairs_add_nothing(routing: str) -> None:
    x, selected, *rest = inputs(routing)
    selected = jnp.where(jnp.arange(N)[:, None] % 3 == 0, E, selected)
    assert_close(value_and_grads(experts, x, selected, *rest), value_and_grads(reference, x, selected, *rest))


def ragged_by_padding(
    operand: jax.Array, output: jax.Array, *, input_offsets: jax.Array, send_sizes: jax.Array,
    output_offsets: jax.Array, recv_sizes: jax.Array, axis_name: str,
) -> jax.Array:  # fmt: skip
    """`ragged_all_to_all`, which XLA:CPU lacks, by an all-to-all of padded buffers of one size."""
    buffers = operand.reshape(len(send_sizes), -1, *operand.shape[1:])
    sent = jnp.arange(buffers.shape[1]) < send_sizes[:, None]
    buffers = jnp.where(jnp.expand_dims(sent, range(2, buffers.ndim)), buffers, jnp.nan)
    received = jax.lax.all_to_all(buffers, axis_name, split_axis=0, concat_axis=0).reshape(operand.shape)
    return jnp.where(jnp.isnan(received), output, received)


def make_dispatch_plan(cfg: ModelConfig, tokens: int, devices: int, dispatch: DispatchKernel) -> DispatchPlan:
    return dispatch_plan(cfg.moe, tokens, devices, KernelConfig(dispatch=dispatch))


@pytest.mark.parametrize("dispatch", ["all_to_all", "ragged"])
def test_chunks_have_little_more_capacity_than_an_even_routing_needs(
    cfg: ModelConfig, dispatch: DispatchKernel
) -> None:
    tokens, devices = 1 << 16, 4
    plan = make_dispatch_plan(cfg, tokens, devices, dispatch)
    ragged, K = dispatch == "ragged", cfg.num_experts_per_tok
    even = tokens * (K if ragged else devices * expected_device_fraction(cfg.moe, devices))  # pairs, or tokens
    assert 1 <= plan.num_chunks * plan.devices * plan.chunk_capacity / even <= 1.3
    # A ragged chunk has a fixed number of pairs; padded buffers bound the pairs if every token brings the most.
    assert plan.num_chunks == (
        round(tokens * K / PAIRS_PER_CHUNK)
        if ragged
        else math.ceil(devices * expected_device_fraction(cfg.moe, devices) * plan.max_local_experts / K)
    )
    assert plan.num_chunks > 1
    # A token is added while the chunk is not full, and may then have more pairs than are left.
    capacity, most = plan.chunk_capacity, plan.max_local_experts
    assert plan.max_pairs == devices * (capacity + most - 1 if ragged else capacity * most)
    for pairs, chunks in (2 * PAIRS_PER_CHUNK, 3), (PAIRS_PER_CHUNK, 2), (PAIRS_PER_CHUNK // 3, 1):
        fewer = make_dispatch_plan(cfg, pairs // K, devices, dispatch)
        assert fewer.num_chunks == (chunks if ragged else plan.num_chunks)
    few = make_dispatch_plan(cfg, 2, devices, dispatch)
    assert few.chunk_capacity <= 2
    assert few.num_chunks == (1 if ragged else plan.num_chunks)


def test_with_many_experts_on_a_device_chunks_are_larger_and_weights_come_first(cfg: ModelConfig) -> None:
    cfg = dataclasses.replace(cfg, n_routed_experts=32 * 8, num_experts_per_tok=K, n_group=1, topk_group=1)
    tokens = 10 * 32 * PAIRS_PER_EXPERT // K
    of_32, of_8 = (make_dispatch_plan(cfg, tokens, devices, "ragged") for devices in (8, 32))
    assert (of_32.num_chunks, of_8.num_chunks) == (10, round(10 * 32 * PAIRS_PER_EXPERT / PAIRS_PER_CHUNK))
    assert (of_32.weights_before_routes, of_8.weights_before_routes) == (True, False)


@pytest.mark.parametrize("dispatch", ["all_to_all", "ragged"])
@pytest.mark.parametrize("routing", ["even", "half"])
@pytest.mark.parametrize("devices", [2, 8])
def test_expert_parallel_experts_equal_those_of_one_device(
    cfg: ModelConfig, dispatch: DispatchKernel, routing: str, devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_by_padding)
    cfg = dataclasses.replace(cfg, n_routed_experts=E, num_experts_per_tok=K, n_group=1, topk_group=1)
    mesh = jax.make_mesh((8 // devices, devices), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    plan = make_dispatch_plan(cfg, N // 8, devices, dispatch)
    if devices == 2:  # as on GPU, and with many experts on a device
        plan = plan._replace(pipelined=False, weights_before_routes=True)
    tokens, weights = P(("data", "expert")), P("expert")
    expert_parallel = jax.shard_map(
        lambda *args: expert_parallel_experts(*args, plan)[0],
        mesh=mesh, in_specs=(tokens, tokens, tokens, weights, weights), out_specs=tokens, check_vma=False,
    )  # fmt: skip
    args = inputs(routing)
    assert_close(value_and_grads(expert_parallel, *args), value_and_grads(reference, *args))


def test_unassigned_pairs_are_not_counted_as_dropped_at_capacity(cfg: ModelConfig) -> None:
    """Every token has one pair for the first device, which takes half of them, and one that is unassigned."""
    cfg = dataclasses.replace(cfg, n_routed_experts=E, num_experts_per_tok=2, n_group=1, topk_group=1)
    plan = dispatch_plan(cfg.moe, 16, 2, KernelConfig(dispatch="all_to_all", capacity_factor=1.0))
    capacity = plan.device_capacity
    assert capacity is not None
    assert capacity < 16
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    count = lambda experts: dispatch_routes(experts, plan).dropped[None]  # noqa: E731
    run = jax.shard_map(count, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
    experts_NK = jnp.stack([jnp.zeros(32, jnp.int32), jnp.full(32, E)], axis=1)
    assert jax.jit(run)(experts_NK).tolist() == [16 - capacity] * 2
