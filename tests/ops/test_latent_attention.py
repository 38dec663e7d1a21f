"""The decode kernel for NVIDIA GPUs, interpreted on CPU. `tests/test_gpu_compile.py` compiles it for one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.config import MeshConfig
from mla_moe.ops import cached_attention as module
from mla_moe.ops import kernel_choice
from mla_moe.ops.cached_attention import cached_attention
from mla_moe.ops.kv_quantization import quantize
from mla_moe.ops.latent_attention import latent_attention
from mla_moe.parallel.mesh import make_mesh
from mla_moe.parallel.sharding import map_slots

L, B, S, C, R, H, N, V = 2, 4, 544, 32, 16, 3, 5, 7
"""Two programs divide a sequence, one of them with an odd number of blocks."""
POSITIONS = [[0, 1], [31, 32], [300, 301], [S - 2, S - 1]]


@pytest.fixture(scope="module")
def arrays() -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    cache = jax.random.normal(keys[0], (L, B, S, C + R))
    return cache, jax.random.normal(keys[1], (C, H, N + V)), jax.random.normal(keys[2], (B, 2, H, N + R))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_latent_kernel", lambda *_, **__: True)
    monkeypatch.setattr(module, "latent_attention", partial(latent_attention, interpret=True))


def run(arrays: tuple[jax.Array, ...], form: str, window: int | None = None) -> jax.Array:
    cache, kv_b, q = arrays
    positions = jnp.array(POSITIONS)
    return cached_attention(q, cache, kv_b, positions, layer=1, slots_b=None, scale=0.3, form=form, window=window)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("quantized", [False, True])
def test_it_equals_the_reference(arrays: tuple[jax.Array, ...], window: int | None, quantized: bool) -> None:
    """At the first position, across blocks and programs, and at the last position."""
    cache, *others = arrays
    arrays = (quantize(cache, C) if quantized else cache, *others)
    assert "latent_attention" in str(jax.make_jaxpr(lambda: run(arrays, "absorbed", window))())
    np.testing.assert_allclose(run(arrays, "absorbed", window), run(arrays, "reference", window), rtol=2e-5, atol=2e-5)


def test_only_blocks_that_a_sequence_attends_to_are_read(arrays: tuple[jax.Array, ...]) -> None:
    q_bTHW = jax.random.normal(jax.random.key(1), (B, 1, H, C + R))
    positions_bT = jnp.array([[40], [1 << 30], [127], [S + 1]])
    blocks = [range(1, 2), (), range(3, 4), ()]
    poisoned = np.full((L, B, S, C + R), np.nan, np.float32)
    for slot, numbers in enumerate(blocks):
        for number in numbers:
            poisoned[1, slot, 32 * number : 32 * number + 32] = arrays[0][1, slot, 32 * number : 32 * number + 32]
    kernel = partial(latent_attention, latent=C, scale=0.3, window=8, interpret=True)
    y_bTHC = kernel(q_bTHW, jnp.asarray(poisoned), positions_bT, 1)
    assert jnp.isfinite(y_bTHC).all()
    np.testing.assert_array_equal(y_bTHC[::2], kernel(q_bTHW, arrays[0], positions_bT, 1)[::2])


@pytest.mark.usefixtures("interpreted")
def test_each_device_computes_its_slots(arrays: tuple[jax.Array, ...]) -> None:
    expected = run(arrays, "absorbed")
    cache, kv_b, q = arrays
    sharded = partial(cached_attention, slots_b=None, scale=0.3, form="absorbed", map_slots=map_slots)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, expert=2), jax.devices()[:4])):
        y = jax.jit(lambda *arrays, layer: sharded(*arrays, layer=layer))(q, cache, kv_b, jnp.array(POSITIONS), layer=1)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)


def test_where_it_does_not_run_the_reason_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def chosen(wanted: str | None = None, cache: str = "bfloat16", dtype: str = "bfloat16", **sizes: int) -> bool:
        sizes = {"latent": 512, "rotary": 64, "capacity": 4096} | sizes
        return kernel_choice.has_latent_kernel(wanted, jnp.dtype(dtype), jnp.dtype(cache), **sizes)

    assert not chosen()  # on CPU, without a word
    monkeypatch.setattr(kernel_choice, "target_platform", lambda: "gpu")
    monkeypatch.setattr(kernel_choice, "compute_capability", lambda: 9.0)
    kernel_choice.log_fallback.cache_clear()
    assert all([chosen(), chosen("tokamax"), chosen(cache="int8")])
    assert not chosen("blockwise")
    assert not caplog.messages
    assert not any([chosen(cache="float32"), chosen(dtype="float32"), chosen(latent=96), chosen(capacity=16)])
    assert not any([chosen(selected=True), chosen(all_slots=False)])
    assert len(caplog.messages) == 5
    assert caplog.messages[2].endswith("latent 96, rotary key 64: needs powers of two, at least 16")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("quantized", [False, True])
def test_on_a_gpu_it_equals_the_reference(heads: int, quantized: bool) -> None:
    """With the widths of V2-Lite and V3."""
    keys = jax.random.split(jax.random.key(0), 3)
    cache = jax.random.normal(keys[0], (2, 4, 4096, 576), jnp.bfloat16)
    kv_b = (jax.random.normal(keys[1], (512, heads, 256)) / 512**0.5).astype(jnp.bfloat16)
    q = jax.random.normal(keys[2], (4, 1, heads, 192), jnp.bfloat16)
    arrays = q, quantize(cache, 512) if quantized else cache, kv_b, jnp.array([[0], [1000], [2049], [4095]])
    run = partial(cached_attention, layer=1, slots_b=None, scale=192**-0.5)
    y = jax.jit(partial(run, form="absorbed"))(*arrays)
    expected = run(
        *(x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arrays), form="reference"
    )
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2e-2, atol=2e-2)
