import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from mla_moe import ConfigError, ModelConfig, Transformer
from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.fp8 import E4M3, QUANTIZATION_CONFIG, is_quantised
from mla_moe.checkpoint.hf_mapping import tensor_mappings
from mla_moe.checkpoint.pretrained import load_pretrained, save_pretrained
from mla_moe.checkpoint.safetensors_reader import SafetensorsReader
from mla_moe.nn.abstract_model import AbstractModel, model_arrays

GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHT = "model.layers.0.self_attn.o_proj.weight"
SCALE = WEIGHT + "_scale_inv"


def tensors(directory):
    reader = SafetensorsReader(directory)
    return {name: (str(reader[name].dtype), reader[name].shape, reader[name].tobytes()) for name in reader.stored}


@pytest.fixture(scope="module")
def wide(cfg):
    """Matrices of several blocks, the last ones partial."""
    wide = dataclasses.replace(cfg, hidden_size=160, kv_lora_rank=130, intermediate_size=200)
    return Transformer(wide, rngs=nnx.Rngs(0))


@pytest.fixture
def blocks(wide, tmp_path):
    """A checkpoint in FP8 blocks, in several files."""
    save_pretrained(wide, tmp_path / "fp8", jnp.bfloat16, fp8=True, max_shard_bytes=100_000)
    return tmp_path / "fp8"


def test_without_a_wish_nothing_changes(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "v3", source)
    carried = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenization_x.py", "LICENSE")
    for name in carried:
        (source / name).write_text("raise SystemExit")
    (source / "optimizer.bin").write_text("not part of a model")
    convert(source, tmp_path / "out", max_shard_bytes=20_000)
    assert tensors(tmp_path / "out") == tensors(source)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    copied = {p.name for p in (tmp_path / "out").iterdir() if ".safetensors" not in p.name}
    assert copied == {"config.json", *carried}


def test_another_type_but_for_the_biases(tmp_path):
    convert(GOLDEN / "k2", tmp_path / "out", dtype=jnp.float32)
    before, after = SafetensorsReader(GOLDEN / "k2"), SafetensorsReader(tmp_path / "out")
    for name in before.stored:
        assert after[name].dtype == np.float32
        np.testing.assert_array_equal(after[name], before[name].astype(np.float32))
    convert(tmp_path / "out", tmp_path / "back", dtype=jnp.bfloat16)
    assert tensors(tmp_path / "back") == tensors(GOLDEN / "k2")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_blocks_are_what_released_checkpoints_have_in_blocks(blocks, wide):
    reader = SafetensorsReader(blocks)
    assert {name for name in reader.stored if reader[name].dtype == E4M3} == {
        piece.name for piece in tensor_mappings(AbstractModel(wide.cfg)) if is_quantised(piece.name)
    }
    assert reader["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (2, 2)
    config = json.loads((blocks / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert ModelConfig.from_hf(config) == wide.cfg


def test_blocks_are_close_and_do_not_need_another_reader(blocks, wide):
    again = model_arrays(load_pretrained(blocks))
    for path, x in model_arrays(wide).items():
        assert again[path].dtype == (jnp.float32 if "router" in path else jnp.bfloat16)
        error = np.abs(np.asarray(again[path], np.float32) - np.asarray(x, np.float32))
        assert (error <= np.abs(x) / 14 + np.abs(x).max() / 1e5).all(), path


def test_undone_blocks_are_what_is_loaded_from_them(blocks, tmp_path):
    convert(blocks, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {str(t[0]) for t in tensors(tmp_path / "out").values()} == {"bfloat16", "float32"}
    a, b = (model_arrays(load_pretrained(d)) for d in (blocks, tmp_path / "out"))
    for path, x in a.items():
        np.testing.assert_array_equal(x, b[path], err_msg=path)


def test_blocks_made_by_conversion_are_those_made_by_saving(blocks, wide, tmp_path, monkeypatch):
    """And they do not depend on how many rows are read at a time."""
    save_pretrained(wide, tmp_path / "plain", max_shard_bytes=300_000)
    monkeypatch.setattr("mla_moe.checkpoint.hf_weights.PART_BYTES", 1)
    convert(tmp_path / "plain", tmp_path / "out", dtype=jnp.bfloat16, fp8=True)
    assert tensors(tmp_path / "out") == tensors(blocks)


def test_blocks_are_kept_as_they_are(blocks, tmp_path):
    convert(blocks, tmp_path / "out", fp8=True)
    assert tensors(tmp_path / "out") == tensors(blocks)


def test_new_blocks_among_old_ones_are_described_anew(blocks, tmp_path):
    """Or transformers would take their numbers for weights, where the old description leaves a module out."""
    config = json.loads((blocks / "config.json").read_text())
    theirs = config["quantization_config"] | {"modules_to_not_convert": ["model.layers.0.self_attn"]}
    (blocks / "config.json").write_text(json.dumps(config | {"quantization_config": theirs}))
    convert(blocks, tmp_path / "kept", fp8=True)
    change(blocks, SCALE, lambda given: {n: x for n, x in given.items() if n != SCALE})
    change(blocks, WEIGHT, lambda given: given | {WEIGHT: given[WEIGHT].astype(np.float32)})
    convert(blocks, tmp_path / "anew", fp8=True)
    found = [json.loads((tmp_path / d / "config.json").read_text())["quantization_config"] for d in ("kept", "anew")]
    assert found == [theirs, dict(QUANTIZATION_CONFIG)]
    assert SafetensorsReader(tmp_path / "anew")[WEIGHT].dtype == E4M3


def test_scales_that_are_powers_of_two(blocks, tmp_path):
    """V3.1's: stored as float32, or in eight bits of exponent."""
    model = {}
    for kind in (np.float32, ml_dtypes.float8_e8m0fnu):
        out = tmp_path / np.dtype(kind).name
        shutil.copytree(blocks, out)
        for file in out.glob("*.safetensors"):
            given = {name: np.array(SafetensorsReader(out)[name]) for name in load_names(file)}
            power = {n: np.exp2(np.ceil(np.log2(x))).astype(kind) for n, x in given.items() if n.endswith("_scale_inv")}
            write(file, given | power)
        model[kind] = model_arrays(load_pretrained(out))
    a, b = model.values()
    for path, x in a.items():
        np.testing.assert_array_equal(x, b[path], err_msg=path)


def load_names(file):
    raw = file.read_bytes()
    return [n for n in json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]) if n != "__metadata__"]


def write(file, given):
    from mla_moe.checkpoint.safetensors_writer import TensorEntry, _write

    _write(file, [TensorEntry(n, x.dtype, x.shape, lambda x=x: [x]) for n, x in given.items()], lambda _: None)


def holding(directory, name):
    return next(file for file in directory.glob("*.safetensors") if name in load_names(file))


def change(directory, name, edit):
    file = holding(directory, name)
    given = {n: np.array(SafetensorsReader(directory)[n]) for n in load_names(file)}
    write(file, edit(given))


def test_a_scale_in_another_file_than_its_weight(blocks):
    before = model_arrays(load_pretrained(blocks))
    scale = np.array(SafetensorsReader(blocks)[SCALE])
    change(blocks, SCALE, lambda given: {n: x for n, x in given.items() if n != SCALE})
    save_file({SCALE: scale}, blocks / "scales.safetensors")
    index = json.loads((blocks / "model.safetensors.index.json").read_text())
    index["weight_map"][SCALE] = "scales.safetensors"
    (blocks / "model.safetensors.index.json").write_text(json.dumps(index))
    after = model_arrays(load_pretrained(blocks))
    assert (before["dense_layers/attention/o"] == after["dense_layers/attention/o"]).all()


SPOILT = {
    "missing": (lambda g: {n: x for n, x in g.items() if n != SCALE}, f"{SCALE} is missing"),
    "another shape": (lambda g: g | {SCALE: g[SCALE][:, :0]}, r"has shape \[2, 0\], not \[2, 1\]"),
    "another type": (lambda g: g | {SCALE: g[SCALE].astype(np.int32)}, "has type int32, not float32"),
    "not finite": (lambda g: g | {SCALE: g[SCALE] * np.nan}, "is not finite"),
    "of no block": (lambda g: g | {WEIGHT: g[WEIGHT].astype(np.float32)}, f"{SCALE} is unknown"),
}


@pytest.mark.parametrize("action", [load_pretrained, lambda path: convert(path, path.parent / "out")])
@pytest.mark.parametrize(("edit", "message"), SPOILT.values(), ids=SPOILT)
def test_a_spoilt_scale_is_an_error(blocks, action, edit, message):
    change(blocks, SCALE, edit)
    with pytest.raises(ConfigError, match=message):
        action(blocks)
    assert [p.name for p in blocks.parent.iterdir()] == ["fp8"]


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_link_out_of_the_directory_is_not_copied(tmp_path, to, monkeypatch):
    """Nor is anything written before it is found."""
    shutil.copytree(GOLDEN / "v3", tmp_path / "source")
    (tmp_path / "secret").write_text("password")
    (tmp_path / "source" / "tokenizer.json").symlink_to(tmp_path / "secret")
    monkeypatch.setattr("mla_moe.checkpoint.orbax_arrays.OrbaxWriter.write", None)
    with pytest.raises(ConfigError, match="out of the directory"):
        convert(tmp_path / "source", tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_link_to_nowhere_is_in_the_way(tmp_path, to):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists already"):
        convert(GOLDEN / "v3", tmp_path / "out", to=to)


@pytest.mark.parametrize("dtype", ["bf16", "int8", "float8_e4m3fn", np.float64])
def test_only_types_of_weights_can_be_asked_for(tmp_path, dtype):
    source = GOLDEN / "v3"
    actions = (
        lambda: load_pretrained(source, dtype),
        lambda: convert(source, tmp_path / "out", dtype=dtype),
        lambda: save_pretrained(load_pretrained(source), tmp_path / "out", dtype),
    )
    for action in actions:
        with pytest.raises(ConfigError, match=r"dtype = .*: one of float32, float16, bfloat16"):
            action()
    with pytest.raises(ConfigError, match="to = 'huggingface': one of hf, orbax"):
        convert(source, tmp_path / "out", to="huggingface")
    assert not list(tmp_path.iterdir())
