"""FP8 blocks: quantize and dequantize."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_moe import ConfigError
from mla_moe.checkpoint import fp8
from mla_moe.checkpoint.quantization import FP8_BLOCKS

SHAPES = [(1, 1), (128, 128), (576, 200), (130, 257), (64, 300)]


def random(shape, scale=1.0):
    return (scale * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


def reference(weight, scale, block=fp8.BLOCK):
    """The definition: each value times the scale of its block."""
    r, c = np.indices(weight.shape)
    return weight.astype(np.float32) * scale.astype(np.float32)[r // block[0], c // block[1]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float16])
@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.float8_e8m0fnu])
def test_dequantize_multiplies_each_value_by_the_scale_of_its_block(shape, dtype, scale_dtype):
    weight = random(shape, 50).astype(fp8.E4M3)
    scale = np.abs(random(FP8_BLOCKS.scale_shape(shape))).astype(scale_dtype)
    got = fp8.dequantize(weight, scale, dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, reference(weight, scale).astype(dtype))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_dequantize_of_a_submatrix_equals_that_part_of_the_full_result(data):
    block = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    shape = data.draw(st.tuples(st.integers(1, 30), st.integers(1, 30)))
    weight = random(shape).astype(fp8.E4M3)
    scale = 1 + np.abs(random(FP8_BLOCKS._replace(block=block).scale_shape(shape)))
    r, c = (sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in shape)
    got = fp8.dequantize(weight[slice(*r), slice(*c)], scale, np.float32, block, (r[0], c[0]))
    np.testing.assert_array_equal(got, reference(weight, scale, block)[slice(*r), slice(*c)])


@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_keeps_three_mantissa_bits(shape):
    x = random(shape, 0.02)
    weight, scale = fp8.quantize(x)
    assert scale.dtype == np.float32
    assert scale.shape == FP8_BLOCKS.scale_shape(shape)
    peak = reference(np.ones(shape), scale) * 448
    assert (np.abs(reference(weight, scale) - x) <= np.maximum(np.abs(x) / 16, peak * 2**-18) * 1.0001).all()
    assert np.abs(weight.astype(np.float32)).max() == 448


def test_rounding_equals_astype():
    """Every E4M3 value, every midpoint between two, their neighbors, and random values."""
    e4m3 = np.arange(0x7F, dtype=np.uint8).view(fp8.E4M3).astype(np.float32)
    middle = (e4m3[1:] + e4m3[:-1]) / 2
    x = np.concatenate([e4m3, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(448))])
    x = np.concatenate([x, -x, random(100_000, 30).clip(-448, 448), random(100_000, 0.01)])
    np.testing.assert_array_equal(fp8._round_to_e4m3(x).view(np.uint8), x.astype(fp8.E4M3).view(np.uint8))


def test_a_block_of_zeros_stays_zero():
    weight, scale = fp8.quantize(np.zeros((3, 200), np.float32))
    assert not reference(weight, scale).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_quantize_rejects_values_that_are_not_finite(bad):
    with pytest.raises(ConfigError, match="FP8"):
        fp8.quantize(np.array([[1, bad]], np.float32))
