import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.ops.kv_quantization import SCALE_BYTES, dequantize, quantize

C, R = 6, 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_quantization_error_is_at_most_half_a_scale(dtype):
    """Latent and key each have a scale of their own, from their largest value."""
    entries = jax.random.normal(jax.random.key(0), (4, 5, C + R), dtype) * jnp.array([1e-3] * C + [50.0] * R, dtype)
    packed = jax.jit(lambda x: quantize(x, C))(entries)
    assert packed.shape == (4, 5, C + R + SCALE_BYTES)
    assert packed.dtype == jnp.int8
    back = dequantize(packed, C, jnp.float32)
    for part in (np.s_[..., :C], np.s_[..., C:]):
        exact = np.asarray(entries[part], np.float32)
        step = np.abs(exact).max(axis=-1, keepdims=True) / 127
        assert (np.abs(back[part] - exact) <= 0.501 * step).all()
        np.testing.assert_allclose(np.abs(back[part]).max(axis=-1), np.abs(exact).max(axis=-1), rtol=1e-6)


def test_zeros_are_exact():
    np.testing.assert_array_equal(dequantize(quantize(jnp.zeros((2, C + R)), C), C, jnp.float32), 0)
    np.testing.assert_array_equal(dequantize(jnp.zeros((2, C + R + SCALE_BYTES), jnp.int8), C, jnp.float32), 0)
