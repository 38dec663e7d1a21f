"""Quantized checkpoints: compressed-tensors (`tests/golden/make_quantized.py`), what is written, what is refused."""

import dataclasses
import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_moe import ConfigError, ModelConfig, Transformer, load_pretrained, save_pretrained
from mla_moe.checkpoint import compressed_tensors
from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.hf_mapping import tensor_mappings
from mla_moe.checkpoint.quantization import E4M3, FP8_BLOCKS, INT4_GROUPS, read_schemes, target_scheme, written_config
from mla_moe.checkpoint.safetensors_reader import BFLOAT16, SafetensorsReader
from mla_moe.checkpoint.safetensors_writer import TensorEntry, tensor_entries, write_checkpoint
from mla_moe.nn.abstract_model import model_arrays
from tests.checkpoint.test_family import write as write_case
from tests.golden.family import CASES as FAMILY

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "quantized.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN})
EXPERT = "model.layers.1.mlp.experts.0.down_proj.weight"


def entry(case):
    """The `quantization_config` of a golden case."""
    config = json.loads(str(GOLDEN[f"{case}/config"]))
    group = {"targets": ["Linear"], "weights": config["weights"]}
    return {"quant_method": "compressed-tensors", "format": config["format"], "config_groups": {"group_0": group}}


def stored(case):
    """Its codes, scales and scheme."""
    (scheme,) = read_schemes({"quantization_config": entry(case)})
    codes = GOLDEN[f"{case}/{scheme.code_name('weight')}"].view(scheme.code_dtype)
    scale = GOLDEN[f"{case}/weight_scale"].astype(np.dtype(str(GOLDEN[f"{case}/scale_dtype"])))
    return codes, scale.reshape(scheme.scale_shape(GOLDEN[f"{case}/original"].shape)), scheme


@pytest.mark.parametrize("case", CASES)
def test_dequantize_equals_the_library(case):
    codes, scale, scheme = stored(case)
    want = GOLDEN[f"{case}/decompressed"]
    assert scheme.code_shape(want.shape) == codes.shape
    got = compressed_tensors.dequantize(codes, scale, scheme, scale.dtype, 0, (0, want.shape[1]))
    np.testing.assert_array_equal(got.astype(np.float32), want)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_dequantize_of_a_submatrix_equals_that_part_of_the_full_result(data):
    case = data.draw(st.sampled_from(CASES))
    codes, scale, scheme = stored(case)
    want = GOLDEN[f"{case}/decompressed"]
    r, c = (sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in want.shape)
    got = compressed_tensors.dequantize(codes[slice(*r)], scale, scheme, scale.dtype, r[0], tuple(c))
    np.testing.assert_array_equal(got.astype(np.float32), want[slice(*r), slice(*c)])


@pytest.mark.parametrize("case", ["int4_groups", "int4_groups_of_16", "int4_rows"])
def test_rounding_and_packing_equal_the_library(case):
    original, packed = GOLDEN[f"{case}/original"], GOLDEN[f"{case}/weight_packed"]
    _, scale, _ = stored(case)
    groups = original.reshape(scale.size, -1)
    ours, _ = compressed_tensors._rounded(groups, scale.reshape(-1), np.dtype(np.float32))
    np.testing.assert_array_equal(compressed_tensors.pack_int4(ours.reshape(original.shape)), packed)


def random(shape, scale=0.02, seed=0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def read_int4(packed, scale, dtype):
    return compressed_tensors.dequantize(packed, scale, INT4_GROUPS, dtype, 0, (0, packed.shape[1] * 8))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_values_of_int4_come_back(dtype):
    """Groups with 7 or -8 as the library and Kimi write them, of scales of any mantissa, and a group of zeros."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-7, 8, (512, 96))
    codes[:, ::32] = 7
    codes[::2, ::32] = -8
    codes[3, :32] = 0
    scale = np.exp2(rng.uniform(-8, -5, (512, 3))).astype(BFLOAT16)
    values = read_int4(compressed_tensors.pack_int4(codes), scale, dtype)
    packed, new_scale = compressed_tensors.quantize_int4(values)
    np.testing.assert_array_equal(read_int4(packed, new_scale, dtype), values)
    np.testing.assert_array_equal(packed, compressed_tensors.pack_int4(codes))
    if dtype == np.float32:
        np.testing.assert_array_equal(np.delete(new_scale, 3, axis=0), np.delete(scale, 3, axis=0))


def test_quantize_to_int4_is_within_half_a_step_and_better_than_a_scale_of_a_7th():
    x = random((33, 160))
    x[5, :32] = 0
    packed, scale = compressed_tensors.quantize_int4(x)
    assert (packed.dtype, packed.shape, scale.dtype, scale.shape) == (np.int32, (33, 20), BFLOAT16, (33, 5))
    error = np.abs(read_int4(packed, scale, np.float32) - x).reshape(33, 5, 32)
    peak = np.abs(x).reshape(33, 5, 32).max(axis=2)
    assert (error.max(axis=2) <= np.maximum(peak / 7 / 2, peak / 8) * 1.01).all()
    plain = (peak / 7).astype(BFLOAT16)
    plain[plain == 0] = 1
    _, of_a_7th = compressed_tensors._rounded(x.reshape(-1, 32), plain.reshape(-1), np.dtype(np.float32))
    assert (np.square(error).sum(axis=2).reshape(-1) <= of_a_7th * 1.0001).all()
    with pytest.raises(ConfigError, match="INT4"):
        compressed_tensors.quantize_int4(np.full((1, 32), np.nan, np.float32))


@pytest.fixture(scope="module")
def model(cfg):
    return Transformer(dataclasses.replace(cfg, hidden_size=64, moe_intermediate_size=32), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def int4(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "int4"
    save_pretrained(model, path, BFLOAT16, quantize="int4", max_shard_bytes=50_000)
    return path


def tensors(directory):
    reader = SafetensorsReader(directory)
    return {name: (str(reader[name].dtype), reader[name].shape, reader[name].tobytes()) for name in reader.stored}


def config(directory):
    return json.loads((directory / "config.json").read_text())


def test_routed_experts_are_quantized_as_in_kimi(int4, model):
    reader = SafetensorsReader(int4)
    assert reader.stored[f"{EXPERT}_packed"][2:] == (np.int32, (64, 4))
    assert reader.stored[f"{EXPERT}_scale"][2:] == (BFLOAT16, (64, 1))
    assert reader[f"{EXPERT}_shape"].tolist() == [64, 32]
    others = [name for name in reader.stored if ".experts." not in name]
    assert {reader.stored[name].dtype for name in others} == {BFLOAT16, np.dtype(np.float32)}
    assert read_schemes(config(int4)) == [INT4_GROUPS]
    loaded = model_arrays(load_pretrained(int4))
    for path, x in model_arrays(model).items():
        step = np.abs(x).max() / 7 if path.endswith(("moe/gate_up", "moe/down")) else np.abs(x).max() / 128
        assert np.abs(np.asarray(loaded[path], np.float32) - np.asarray(x, np.float32)).max() <= step, path


def test_int4_stays_as_it_is_and_comes_back_from_bfloat16_and_orbax(int4, tmp_path):
    convert(int4, tmp_path / "kept", quantize="int4")
    assert tensors(tmp_path / "kept") == tensors(int4)
    assert config(tmp_path / "kept") == config(int4)
    convert(int4, tmp_path / "bfloat16")
    assert not any("_packed" in name or "_scale" in name for name in SafetensorsReader(tmp_path / "bfloat16").stored)
    assert "quantization_config" not in config(tmp_path / "bfloat16")
    convert(int4, tmp_path / "orbax", to="orbax")
    values = model_arrays(load_pretrained(int4))
    for source in ("bfloat16", "orbax"):
        convert(tmp_path / source, tmp_path / f"from_{source}", quantize="int4")
        assert config(tmp_path / f"from_{source}")["quantization_config"] == config(int4)["quantization_config"]
        again = model_arrays(load_pretrained(tmp_path / f"from_{source}"))
        for path, x in values.items():
            np.testing.assert_array_equal(np.asarray(x), np.asarray(again[path]), err_msg=path)
    convert(tmp_path / "bfloat16", tmp_path / "fp8", quantize="fp8")
    convert(int4, tmp_path / "fp8_of_int4", quantize="fp8")
    assert tensors(tmp_path / "fp8_of_int4") == tensors(tmp_path / "fp8")


QUANTIZED = "model.layers.0.self_attn.o_proj.weight"


def requantized(directory, target, case, dropped=(), other_groups=None):
    """A checkpoint with one matrix as the library stores one of its shape, by the last of several groups."""
    codes, scale, scheme = stored(case)
    shape = GOLDEN[f"{case}/original"].shape
    plain = SafetensorsReader(directory)
    arrays = {n: plain[n] for n in plain.stored if n != QUANTIZED}
    arrays[scheme.code_name(QUANTIZED)] = codes
    arrays[scheme.scale_name(QUANTIZED)] = GOLDEN[f"{case}/weight_scale"].astype(scale.dtype)
    arrays[QUANTIZED.replace("weight", "input_scale")] = np.ones(1, np.float32)
    if scheme.packed:
        arrays[scheme.shape_name(QUANTIZED)] = np.array(shape, np.int32)
    entries = [TensorEntry(n, x.dtype, x.shape, lambda x=x: [x]) for n, x in arrays.items() if n not in dropped]
    given = entry(case)
    given["config_groups"] = (other_groups or {}) | given["config_groups"]
    write_checkpoint(target, config(directory) | {"quantization_config": given}, entries, 1 << 30, {})


@pytest.mark.parametrize("case", ["int4_rows", "int8_packed", "int8_groups", "fp8_tensor"])
def test_matrices_of_the_library_are_read_in_a_checkpoint(cfg, case, tmp_path):
    """Also beside experts in INT4, whose packed codes have the same name and type."""
    rows, columns = GOLDEN[f"{case}/original"].shape
    heads = next(h for h in (3, 4, 1) if columns % h == 0)
    sizes = dict(hidden_size=rows, num_attention_heads=heads, v_head_dim=columns // heads)
    save_pretrained(Transformer(dataclasses.replace(cfg, **sizes), rngs=nnx.Rngs(0)), tmp_path / "plain")
    experts = {"experts": INT4["config_groups"]["group_0"] | {"format": "pack-quantized"}}
    requantized(tmp_path / "plain", tmp_path / "quantized", case, other_groups=experts)
    convert(tmp_path / "quantized", tmp_path / "out", dtype=np.float32)
    codes, scale, scheme = stored(case)
    want = compressed_tensors.dequantize(codes, scale, scheme, np.float32, 0, (0, columns))
    got = SafetensorsReader(tmp_path / "out")
    np.testing.assert_array_equal(got[QUANTIZED], want)
    assert set(got.stored) == set(SafetensorsReader(tmp_path / "plain").stored)
    for part in (scheme.scale_name(QUANTIZED), scheme.shape_name(QUANTIZED)) if scheme.packed else ():
        requantized(tmp_path / "plain", tmp_path / part, case, dropped=(part,))
        with pytest.raises(ConfigError, match=part):
            convert(tmp_path / part, tmp_path / "none")


def test_a_vision_tower_is_named_as_not_quantized(tmp_path):
    """Readers take every other matrix for quantized."""
    extra = {"vision_tower.encoder.blocks.0.mlp.fc0.weight": (8, 8), "mm_projector.linear_1.weight": (8, 8)}
    write_case("kimi_k25_1", tmp_path / "released", extra)
    convert(tmp_path / "released", tmp_path / "fp8", quantize="fp8")
    excluded = config(tmp_path / "fp8")["quantization_config"]["modules_to_not_convert"]
    assert {name.removesuffix(".weight") for name in extra} | {"language_model.lm_head"} <= set(excluded)
    written = SafetensorsReader(tmp_path / "fp8")
    assert not any(written.stored[f"{name}.weight"].dtype == E4M3 for name in excluded)
    convert(tmp_path / "fp8", tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "again", quantize="fp8")
    assert config(tmp_path / "again")["quantization_config"]["modules_to_not_convert"] == excluded
    with pytest.raises(ConfigError, match="no multiple of the group of 32"):
        convert(tmp_path / "released", tmp_path / "int4", quantize="int4")
    cfg = load_pretrained(tmp_path / "released").cfg
    ignore = written_config(INT4_GROUPS, [], cfg)["ignore"]
    assert {"re:.*self_attn.*", "re:.*vision_tower.*", "re:.*mm_projector.*"} <= set(ignore)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fc.weight", E4M3), ("fc.weight", np.int8), ("fc.weight_packed", np.int32)]
)
def test_a_quantized_vision_tower_is_not_copied_beside_other_weights(name, dtype, tmp_path):
    """Its codes would be taken for weights: the written config.json does not describe them."""
    write_case("kimi_k25_1", tmp_path / "released")
    reader = SafetensorsReader(tmp_path / "released")
    tower = TensorEntry(f"vision_tower.{name}", np.dtype(dtype), (8, 8), lambda: [np.zeros((8, 8), dtype)])
    entries = [TensorEntry(n, t.dtype, t.shape, lambda n=n: [reader[n]]) for n, t in reader.stored.items()]
    write_checkpoint(tmp_path / "mixed", config(tmp_path / "released"), [*entries, tower], 1 << 30, {})
    with pytest.raises(ConfigError, match="no part of the model"):
        save_pretrained(load_pretrained(tmp_path / "released"), tmp_path / "saved", like=tmp_path / "mixed")


def test_int4_excludes_every_plain_projection_also_of_an_mtp_module(int4):
    """All but embeddings and routers, which are no linear layers in readers."""
    ignored = [re.compile(rule.removeprefix("re:")) for rule in config(int4)["quantization_config"]["ignore"]]
    plain = [name for name, t in SafetensorsReader(int4).stored.items() if len(t.shape) > 1 and t.dtype != np.int32]
    rest = {name for name in plain if not any(rule.match(name) for rule in ignored) and "_scale" not in name}
    assert any("shared_head.head" in name for name in plain)
    assert all(name.endswith(("embed_tokens.weight", "mlp.gate.weight")) for name in rest), rest


INT4 = entry("int4_groups")
WEIGHTS = INT4["config_groups"]["group_0"]["weights"]
REFUSED = {
    "awq": ({"quant_method": "awq"}, "AWQ is not read; use the release in bfloat16"),
    "gptq": ({"quant_method": "gptq"}, "GPTQ is not read"),
    "mxfp4": ({"quant_method": "mxfp4"}, "MXFP4 is not read"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4.* is not read"),
    "other": ({"quant_method": "x"}, "only 'fp8' and 'compressed-tensors'"),
    "e5m2": ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt"),
    "one size": ({"quant_method": "fp8", "weight_block_size": [128]}, "two positive"),
    "no size": ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "two positive"),
    "no object": ("fp8", "must be an object"),
    "nvfp4": (INT4 | {"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized.*write bfloat16 with compressed-t"),
    "mxfp4 format": (INT4 | {"format": "mxfp4-pack-quantized"}, "mxfp4-pack-quantized"),
    "no groups": (INT4 | {"config_groups": {}}, "config_groups"),
}


@pytest.mark.parametrize(("given_entry", "message"), REFUSED.values(), ids=REFUSED)
def test_other_quantization_is_refused_by_its_name(given_entry, message):
    for given_config in ({"quantization_config": given_entry}, {"text_config": {"quantization_config": given_entry}}):
        with pytest.raises(ConfigError, match=message):
            read_schemes(given_config)


@pytest.mark.parametrize(
    "change",
    [{"symmetric": False}, {"actorder": "group"}, {"num_bits": 3}, {"strategy": "tensor_group"}, {"strategy": None},
     {"group_size": 0}, {"type": "float"}, {"strategy": "block"}, {"num_bits": 4.0}],
)  # fmt: skip
def test_other_weights_of_compressed_tensors_are_refused(change):
    group = {"config_groups": {"group_0": {"weights": WEIGHTS | change}}}
    with pytest.raises(ConfigError, match="quantization_config"):
        read_schemes({"quantization_config": INT4 | group})


def test_what_does_not_fit_a_model_is_refused_before_anything_is_written(cfg):
    assert target_scheme(None, cfg) is None
    with pytest.raises(ConfigError, match="one of fp8, int4"):
        target_scheme("int8", cfg)
    dense = dataclasses.replace(cfg, first_k_dense_replace=cfg.num_hidden_layers)
    with pytest.raises(ConfigError, match="no routed experts"):
        target_scheme("int4", dense)


def test_only_projections_are_quantized():
    layer = "model.layers.3"
    yes = ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "mlp.gate_proj", "mlp.experts.7.down_proj"]
    no = ["mlp.gate", "eh_proj", "input_layernorm", "self_attn.kv_a_layernorm", "shared_head.head", "embed_tokens"]
    assert all(FP8_BLOCKS.selects(f"{layer}.{name}.weight") for name in yes)
    assert not any(FP8_BLOCKS.selects(f"{layer}.{name}.weight") for name in no)
    assert [name for name in yes + no if INT4_GROUPS.selects(f"{layer}.{name}.weight")] == ["mlp.experts.7.down_proj"]


def test_scales_are_not_kept_after_they_are_written():
    """They are a ninth of a checkpoint in INT4."""
    x = random((8, 32))
    codes, scale, _ = tensor_entries(EXPERT, x.dtype, x.dtype, x.shape, lambda _: [x], INT4_GROUPS)
    assert (len(list(codes.chunks())), len(list(scale.chunks())), len(list(scale.chunks()))) == (1, 1, 0)


@pytest.mark.parametrize("case", [case for case in FAMILY if case.endswith("_1")])
def test_fp8_quantizes_every_projection_and_int4_names_what_it_leaves_alone(case):
    """Whatever an architecture calls them. Routers and embeddings are no linear layers in transformers, but for
    LongCat-Flash's router."""
    cfg = ModelConfig.from_hf(FAMILY[case])
    plain = re.compile(r"(embed_tokens|lm_head|mlp\.gate|router\.classifier|eh_proj|shared_head\.head|weights_proj)$")
    ignored = [pattern.removeprefix("re:") for pattern in written_config(INT4_GROUPS, [], cfg)["ignore"]]
    matrices = [m.name for m in tensor_mappings(cfg) if m.column_sizes and not m.stacked_shape]
    assert matrices
    for name in matrices:
        module = name.removesuffix(".weight")
        assert FP8_BLOCKS.selects(name) == (plain.search(module) is None), name
        linear = re.search(r"(embed_tokens|mlp\.gate)$", module) is None
        if linear and not INT4_GROUPS.selects(name):
            assert any(re.match(pattern, module) for pattern in ignored), name
