"""Attention whose queries are sharded: devices share the causal triangle evenly, and compute what one device does."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import MLAttention
from mla_moe.config import KernelConfig, MeshConfig
from mla_moe.config.parallelism import AttentionKernel
from mla_moe.ops.kernel_choice import log_fallback
from mla_moe.ops.masking import CAUSAL, Masking
from mla_moe.parallel.collectives import shard_map
from mla_moe.parallel.context_parallel import needs_balance, query_starts, swap_queries
from mla_moe.parallel.mesh import BATCH_SPEC, make_mesh

slow = pytest.mark.slow


@pytest.mark.parametrize("n", [2, 3, 4])
def test_devices_attend_to_equally_many_keys_and_swap_back(n: int) -> None:
    T = 12 * n
    index = jnp.arange(T, dtype=jnp.int32)[None]
    mesh = make_mesh(MeshConfig(data=1, context=n), jax.devices()[:n])
    with jax.set_mesh(mesh):
        assert needs_balance(index.shape, CAUSAL)
        swapped = jax.jit(swap_queries)(index)
        back = jax.jit(swap_queries)(swapped)
        local = shard_map(lambda x: query_starts(x.shape[1], n, True)[None], (BATCH_SPEC,), BATCH_SPEC)
        starts = jax.jit(local)(index)
    np.testing.assert_array_equal(back, index)
    by_device = np.asarray(swapped).reshape(n, -1)
    chunks = np.asarray(starts).reshape(2 * n, 1) + np.arange(T // n // 2)
    np.testing.assert_array_equal(by_device.reshape(2 * n, -1), chunks)
    assert len({(row + 1).sum() for row in by_device}) == 1
    np.testing.assert_array_equal(np.sort(by_device.ravel()), np.arange(T))


@pytest.mark.parametrize(
    ("T", "masking", "wanted"),
    [
        (64, CAUSAL, True),
        (64, Masking(window=17), True),
        (64, Masking(window=16), False),  # every query attends to as many keys, but for the first ones
        (64, Masking(causal=False), False),
        (60, CAUSAL, False),  # 15 tokens of a device have no halves
    ],
)
def test_devices_swap_queries_where_their_work_differs(T: int, masking: Masking, wanted: bool) -> None:
    assert not needs_balance((2, T, 8), masking)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, expert=2, context=4))):
        assert needs_balance((2, T, 8), masking) == wanted


@pytest.mark.parametrize(
    ("kernel", "sizes", "options"),
    [
        pytest.param("blockwise", MeshConfig(data=2, context=4), {}, marks=slow),
        pytest.param("splash", MeshConfig(data=1, fsdp=2, context=2), {}, marks=slow),
        pytest.param("splash", MeshConfig(data=1, tensor=2, context=2), {"sliding_window": 300}, marks=slow),
        pytest.param("splash", MeshConfig(data=1, context=4), {"sliding_window": 100}, marks=slow),
        pytest.param("blockwise", MeshConfig(data=1, context=3), {"dropout": 0.3}, marks=slow),
        pytest.param("blockwise", MeshConfig(data=1, context=4), {"causal": False}, marks=slow),
    ],
)
def test_attention_over_context_equals_that_of_one_device(
    kernel: AttentionKernel, sizes: MeshConfig, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Values, and gradients of inputs and weights; packed, with padding at the end; the TPU kernel interpreted."""
    from jax.experimental.pallas import tpu as pltpu

    T, D = (512 if kernel == "splash" and sizes.context < 4 else 1024 if kernel == "splash" else 96), 32
    settings: dict[str, Any] = {
        "hidden_size": D,
        "num_heads": 2,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 16,
    }
    settings |= {"qk_rope_head_dim": 8, "v_head_dim": 16, **options}
    B = sizes.data * sizes.fsdp  # the interpreter cannot run several sequences of a device
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    segments = jnp.array([[1] * (T // 4) + [2] * (T // 2) + [0] * (T // 4), [1] * T])[:B]
    positions = jnp.stack([jnp.arange(T) % (T // 4), jnp.arange(T)])[:B]
    log_fallback.cache_clear()

    def run(kernel: AttentionKernel, devices: MeshConfig) -> Any:
        attention = MLAttention(**settings, kernels=KernelConfig(attention=kernel), rngs=nnx.Rngs(0))
        graph, state = nnx.split(attention)

        def loss(state: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            key = jax.random.key(5) if settings.get("dropout") else None
            y = nnx.merge(graph, state)(x, segment_ids=segments, positions=positions, rngs=key)
            return jnp.sin(y).sum(), y

        with jax.set_mesh(make_mesh(devices, jax.devices()[: math.prod(dataclasses.astuple(devices)[:6])])):
            return jax.device_get(jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(state, x))

    wanted = run("reference", MeshConfig(data=1))
    with pltpu.force_tpu_interpret_mode(), jax.numpy_dtype_promotion("standard"):
        got = run(kernel, sizes)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())
    assert not caplog.records, "the kernel is not replaced"
