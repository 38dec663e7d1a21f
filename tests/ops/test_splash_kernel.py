"""The blocks that splash attention computes, from the indices of queries, are those that JAX finds in the mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from mla_moe.ops import splash_kernel
from mla_moe.ops.attention import attention
from mla_moe.ops.masking import CAUSAL, Masking


@pytest.mark.parametrize("masking", [CAUSAL, Masking(window=700), Masking(causal=False, window=300)], ids=str)
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_blocks_are_those_that_jax_finds_in_the_mask(masking, devices):
    S = 1536
    T, chunk = S // devices, S // devices // (2 if devices > 1 else 1)
    starts = [[2 * i, 2 * devices - 1 - 2 * i] for i in range(devices)] if devices > 1 else [[0]]
    index = (np.array(starts)[..., None] * chunk + np.arange(chunk)).reshape(devices, T).astype(np.int32)
    causal = masking == CAUSAL
    mask = splash.CausalMask((S, S)) if causal else splash.LocalMask((S, S), masking.reach, offset=0)
    mask.q_sequence = index.ravel()
    ours = [splash_kernel.splash_kernel(index[0] if devices == 1 else jnp.array(i), S, masking, chunk) for i in index]
    sizes = ours[0].kwargs["block_sizes"]
    theirs = splash.make_splash_mha(
        splash.MultiHeadMask([mask]), block_sizes=sizes, head_shards=1, q_seq_shards=devices
    )
    assert (sizes.block_q, sizes.block_kv, sizes.block_kv_dkv) == ({1: 512, 2: 128, 3: 256}[devices], 512, 512)
    for name in ("fwd_mask_info", "dkv_mask_info"):
        for device, kernel in enumerate(ours):
            rows = slice(device * T // sizes.block_q, (device + 1) * T // sizes.block_q)
            assert seen(getattr(kernel, name)) == seen(getattr(theirs, name), rows)


def seen(info, rows=slice(None)):
    """The blocks that are computed, by row and in order. A step without one may load any, and where a sliding window
    takes fewer steps than there are blocks, they are not at the same steps."""
    blocks, computed = (np.asarray(x)[0, rows] for x in (info.data_next, info.block_mask))
    return [row[runs > 0].tolist() for row, runs in zip(blocks, computed, strict=True)]


@pytest.mark.slow
def test_few_heads_at_a_time_compute_the_same(monkeypatch):
    """As with long sequences, whose backward kernel would write too much at once."""
    from jax.experimental.pallas import tpu as pltpu

    q, k, v = (jax.random.normal(jax.random.key(i), (1, 256, 4, width)) for i, width in enumerate((24, 24, 16)))

    def run(implementation):
        def loss(q, k, v):
            y = attention(q, k, v, None, scale=0.2, implementation=implementation)
            return jnp.sin(y).sum(), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    monkeypatch.setattr(splash_kernel, "MAX_GRADIENT_BYTES", 2 * 256 * 24 * 4)  # of two heads
    wanted = run("reference")
    with pltpu.force_tpu_interpret_mode(), jax.numpy_dtype_promotion("standard"):
        got = run("splash")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
