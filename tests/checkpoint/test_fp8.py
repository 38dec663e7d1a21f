import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_moe import ConfigError
from mla_moe.checkpoint import fp8

SHAPES = [(1, 1), (128, 128), (576, 200), (130, 257), (64, 300)]


def random(shape, scale=1.0):
    return (scale * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


def plain(weight, scale, block=fp8.BLOCK):
    """The definition: each number times the scale of its block."""
    r, c = np.indices(weight.shape)
    return weight.astype(np.float32) * scale.astype(np.float32)[r // block[0], c // block[1]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float16])
@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.float8_e8m0fnu])
def test_every_number_times_the_scale_of_its_block(shape, dtype, kind):
    weight = random(shape, 50).astype(fp8.E4M3)
    scale = np.abs(random(fp8.scale_shape(shape))).astype(kind)
    got = fp8.dequantise(weight, scale, dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, plain(weight, scale).astype(dtype))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_rectangle_is_that_part_of_the_whole(data):
    block = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    shape = data.draw(st.tuples(st.integers(1, 30), st.integers(1, 30)))
    weight = random(shape).astype(fp8.E4M3)
    scale = 1 + np.abs(random(fp8.scale_shape(shape, block)))
    r, c = (sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in shape)
    got = fp8.dequantise(weight[slice(*r), slice(*c)], scale, np.float32, block, (r[0], c[0]))
    np.testing.assert_array_equal(got, plain(weight, scale, block)[slice(*r), slice(*c)])


@pytest.mark.parametrize("shape", SHAPES)
def test_quantising_keeps_three_bits_of_mantissa(shape):
    x = random(shape, 0.02)
    weight, scale = fp8.quantise(x)
    assert scale.dtype == np.float32
    assert scale.shape == fp8.scale_shape(shape)
    peak = plain(np.ones(shape), scale) * 448
    assert (np.abs(plain(weight, scale) - x) <= np.maximum(np.abs(x) / 16, peak * 2**-18) * 1.0001).all()
    assert np.abs(weight.astype(np.float32)).max() == 448


def test_rounding_is_that_of_the_type():
    """All float32 that matter: every E4M3 number, every midpoint between two, and their neighbours."""
    e4m3 = np.arange(0x7F, dtype=np.uint8).view(fp8.E4M3).astype(np.float32)
    middle = (e4m3[1:] + e4m3[:-1]) / 2
    x = np.concatenate([e4m3, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(448))])
    x = np.concatenate([x, -x, random(100_000, 30).clip(-448, 448), random(100_000, 0.01)])
    np.testing.assert_array_equal(fp8._round(x).view(np.uint8), x.astype(fp8.E4M3).view(np.uint8))


def test_a_block_of_zeros_stays_so():
    weight, scale = fp8.quantise(np.zeros((3, 200), np.float32))
    assert not plain(weight, scale).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(ConfigError, match="FP8"):
        fp8.quantise(np.array([[1, bad]], np.float32))


@pytest.mark.parametrize(
    "config", [{"quant_method": "awq"}, {"fmt": "e5m2"}, {"weight_block_size": [128]}, {"weight_block_size": [0, 1]}]
)
def test_other_quantisation_is_refused(config):
    with pytest.raises(ConfigError, match="quantization_config"):
        fp8.block_shape({"quantization_config": dict(fp8.QUANTIZATION_CONFIG) | config})


def test_projections_are_quantised_and_nothing_else():
    layer = "model.layers.3"
    yes = ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "mlp.gate_proj", "mlp.experts.7.down_proj"]
    no = ["mlp.gate", "eh_proj", "input_layernorm", "self_attn.kv_a_layernorm", "shared_head.head", "embed_tokens"]
    assert all(fp8.is_quantised(f"{layer}.{name}.weight") for name in yes)
    assert not any(fp8.is_quantised(f"{layer}.{name}.weight") for name in no)
