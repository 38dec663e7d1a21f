import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mla_moe.ops.experts import experts, reference
from mla_moe.parallel.expert_parallel import (
    TOKENS_PER_CHUNK,
    dispatch_plan,
    expected_device_fraction,
    expert_parallel_experts,
)

E, K, D, F, N = 16, 3, 8, 5, 8 * 40


def inputs(routing):
    keys = jax.random.split(jax.random.key(0), 5)
    x, w = jax.random.normal(keys[0], (N, D)), jax.random.uniform(keys[1], (N, K))
    gate_up, down = 0.3 * jax.random.normal(keys[2], (E, D, 2, F)), 0.3 * jax.random.normal(keys[3], (E, F, D))
    score = jax.random.normal(keys[4], (N, E))
    if routing == "half":  # one expert has half of the tokens, and four have none
        score = score.at[: N // 2, 3].add(100.0).at[:, 10:14].add(-100.0)
    return x, jax.lax.top_k(score, K)[1], w, gate_up, down


def value_and_grads(f, x, chosen, *rest):
    def loss(x, *rest):
        y = f(x, chosen, *rest)
        return jnp.sin(y).sum(), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(x, *rest)


def assert_close(got, wanted):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("routing", ["even", "half"])
def test_experts_equal_reference_and_nobodys_choices_add_nothing(routing):
    x, chosen, *rest = inputs(routing)
    chosen = jnp.where(jnp.arange(N)[:, None] % 3 == 0, E, chosen)
    assert_close(value_and_grads(experts, x, chosen, *rest), value_and_grads(reference, x, chosen, *rest))


def ragged_by_buffers(operand, output, *, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name):
    """What XLA:CPU lacks, for parts of one size: rows beyond those that are sent arrive as nonsense."""
    P_ = len(send_sizes)
    parts = operand.reshape(P_, -1, operand.shape[1])
    sent = jnp.arange(parts.shape[1]) < send_sizes[:, None]
    parts = jnp.where(sent[..., None], parts, jnp.nan)
    came = jax.lax.all_to_all(parts, axis_name, split_axis=0, concat_axis=0).reshape(operand.shape)
    return jnp.where(jnp.isnan(came), output, came)


@pytest.mark.parametrize("exchange", ["all_to_all", "ragged"])
def test_rounds_bring_what_an_even_routing_sends_and_little_more(cfg, exchange):
    tokens, devices = 1 << 16, 4
    s = dispatch_plan(cfg, tokens, devices, buffer=None, exchange=exchange, multiply=None)
    ragged, K = exchange == "ragged", cfg.num_experts_per_tok
    even = tokens * (K if ragged else devices * expected_device_fraction(cfg, devices))  # choices, or rows
    assert 1 <= s.rounds * s.devices * s.capacity / even <= 1.3
    # A round is of one size in choices; rows are as many as may bring the choices of all tokens, if each brings all.
    assert s.rounds == (
        round(tokens * K / TOKENS_PER_CHUNK)
        if ragged
        else math.ceil(devices * expected_device_fraction(cfg, devices) * s.local / K)
    )
    assert s.rounds > 1
    # Another row is sent while the last one's choices do not fill the round.
    assert s.most == devices * (s.capacity + s.local - 1 if ragged else s.capacity * s.local)
    few = dispatch_plan(cfg, 2, devices, buffer=None, exchange=exchange, multiply=None)
    assert few.capacity <= 2
    assert few.rounds == (1 if ragged else s.rounds)


@pytest.mark.parametrize("exchange", ["all_to_all", "ragged"])
@pytest.mark.parametrize("routing", ["even", "half"])
@pytest.mark.parametrize("devices", [2, 8])
def test_exchanged_experts_equal_those_of_one_device(cfg, exchange, routing, devices, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_by_buffers)
    cfg = dataclasses.replace(cfg, n_routed_experts=E, num_experts_per_tok=K, n_group=1, topk_group=1)
    mesh = jax.make_mesh((8 // devices, devices), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    s = dispatch_plan(cfg, N // 8, devices, buffer=None, exchange=exchange, multiply=None)
    tokens, held = P(("data", "expert")), P("expert")
    spread = jax.shard_map(
        lambda *args: expert_parallel_experts(*args, s, "expert")[0],
        mesh=mesh, in_specs=(tokens, tokens, tokens, held, held), out_specs=tokens, check_vma=False,
    )  # fmt: skip
    args = inputs(routing)
    assert_close(value_and_grads(spread, *args), value_and_grads(reference, *args))
