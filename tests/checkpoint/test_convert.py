"""Conversion between Hugging Face directories: dtypes, FP8 blocks, copied files, errors."""

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
from mla_moe.checkpoint.hf_mapping import tensor_mappings
from mla_moe.checkpoint.pretrained import load_pretrained, save_pretrained
from mla_moe.checkpoint.quantization import E4M3, FP8_BLOCKS
from mla_moe.checkpoint.safetensors_reader import SafetensorsReader
from mla_moe.nn.abstract_model import model_arrays

GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHT = "model.layers.0.self_attn.o_proj.weight"
SCALE = WEIGHT + "_scale_inv"


def tensors(directory):
    reader = SafetensorsReader(directory)
    return {name: (str(reader[name].dtype), reader[name].shape, reader[name].tobytes()) for name in reader.stored}


@pytest.fixture(scope="module")
def wide(cfg):
    """A model whose matrices have several FP8 blocks, the last ones partial."""
    wide = dataclasses.replace(cfg, hidden_size=160, kv_lora_rank=130, intermediate_size=200)
    return Transformer(wide, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def saved_fp8(wide, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "fp8"
    save_pretrained(wide, path, jnp.bfloat16, quantize="fp8", max_shard_bytes=100_000)
    return path


@pytest.fixture
def fp8_directory(saved_fp8, tmp_path):
    """A checkpoint with FP8 blocks, in several files."""
    return shutil.copytree(saved_fp8, tmp_path / "fp8")


def test_hidden_files_and_byte_order_marks_make_no_difference(tmp_path):
    source, golden = tmp_path / "source", GOLDEN / "v3"
    source.mkdir()
    shutil.copyfile(golden / "model.safetensors", source / "part-1.safetensors")
    (source / "config.json").write_bytes(b"\xef\xbb\xbf" + (golden / "config.json").read_bytes())
    for name in (".DS_Store", "._part-1.safetensors", "._config.json", "._README.md"):
        (source / name).write_bytes(b"\0\5\26\7")
    convert(source, tmp_path / "out")
    assert tensors(tmp_path / "out") == tensors(golden)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("inside", ["hf/sub", "hf/a/b", "link/sub", "hf/../hf/sub"])
def test_nothing_is_written_into_the_source(tmp_path, inside):
    shutil.copytree(GOLDEN / "v3", tmp_path / "hf")
    (tmp_path / "link").symlink_to("hf")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"path = .* is inside .*hf"):
        convert(tmp_path / "hf", tmp_path / inside)
    for existing in ("hf", "link", "."):
        with pytest.raises(ConfigError, match="exists already"):
            convert(GOLDEN / "v3", tmp_path / existing)
    assert sorted(tmp_path.rglob("*")) == before


def test_by_default_nothing_changes(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "v3", source)
    copied_names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenization_x.py", "LICENSE")
    for name in copied_names:
        (source / name).write_text("raise SystemExit")
    (source / "optimizer.bin").write_text("not part of a model")
    convert(source, tmp_path / "out", max_shard_bytes=20_000)
    assert tensors(tmp_path / "out") == tensors(source)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    copied = {p.name for p in (tmp_path / "out").iterdir() if ".safetensors" not in p.name}
    assert copied == {"config.json", *copied_names}


def test_dtype_is_changed_and_restored(tmp_path):
    convert(GOLDEN / "k2", tmp_path / "out", dtype=jnp.float32)
    before, after = SafetensorsReader(GOLDEN / "k2"), SafetensorsReader(tmp_path / "out")
    for name in before.stored:
        assert after[name].dtype == np.float32
        np.testing.assert_array_equal(after[name], before[name].astype(np.float32))
    convert(tmp_path / "out", tmp_path / "back", dtype=jnp.bfloat16)
    assert tensors(tmp_path / "back") == tensors(GOLDEN / "k2")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_tensors_that_released_checkpoints_quantize_are_quantized(fp8_directory, wide):
    reader = SafetensorsReader(fp8_directory)
    assert {name for name in reader.stored if reader[name].dtype == E4M3} == {
        mapping.name for mapping in tensor_mappings(wide.cfg) if FP8_BLOCKS.selects(mapping.name)
    }
    assert reader["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (2, 2)
    config = json.loads((fp8_directory / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert ModelConfig.from_hf(config) == wide.cfg


def test_fp8_weights_load_directly_and_are_close_to_the_original(fp8_directory, wide):
    again = model_arrays(load_pretrained(fp8_directory))
    for path, x in model_arrays(wide).items():
        assert again[path].dtype == (jnp.float32 if "router" in path else jnp.bfloat16)
        error = np.abs(np.asarray(again[path], np.float32) - np.asarray(x, np.float32))
        assert (error <= np.abs(x) / 14 + np.abs(x).max() / 1e5).all(), path


def test_dequantized_weights_equal_the_weights_loaded_from_fp8(fp8_directory, tmp_path):
    convert(fp8_directory, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {str(t[0]) for t in tensors(tmp_path / "out").values()} == {"bfloat16", "float32"}
    a, b = (model_arrays(load_pretrained(d)) for d in (fp8_directory, tmp_path / "out"))
    for path, x in a.items():
        np.testing.assert_array_equal(x, b[path], err_msg=path)


def test_convert_and_save_pretrained_quantize_to_the_same_bytes(fp8_directory, wide, tmp_path, monkeypatch):
    """The result does not depend on the number of rows read at a time."""
    save_pretrained(wide, tmp_path / "plain", max_shard_bytes=300_000)
    monkeypatch.setattr("mla_moe.checkpoint.hf_mapping.READ_BYTES", 1)
    convert(tmp_path / "plain", tmp_path / "out", dtype=jnp.bfloat16, quantize="fp8")
    assert tensors(tmp_path / "out") == tensors(fp8_directory)


def test_fp8_blocks_are_kept_unchanged(fp8_directory, tmp_path):
    convert(fp8_directory, tmp_path / "out", quantize="fp8")
    assert tensors(tmp_path / "out") == tensors(fp8_directory)


def test_modules_that_a_checkpoint_in_fp8_excludes_are_not_quantized(fp8_directory, tmp_path):
    config = json.loads((fp8_directory / "config.json").read_text())
    given_config = config["quantization_config"] | {"modules_to_not_convert": ["model.layers.0.self_attn.o_proj"]}
    (fp8_directory / "config.json").write_text(json.dumps(config | {"quantization_config": given_config}))
    change(fp8_directory, SCALE, lambda given: {n: x for n, x in given.items() if n != SCALE})
    change(fp8_directory, WEIGHT, lambda given: given | {WEIGHT: given[WEIGHT].astype(np.float32)})
    convert(fp8_directory, tmp_path / "kept", quantize="fp8")
    assert tensors(tmp_path / "kept") == tensors(fp8_directory)
    found = json.loads((tmp_path / "kept" / "config.json").read_text())
    assert found["quantization_config"] == given_config


@pytest.mark.slow
def test_scales_may_be_powers_of_two(fp8_directory, tmp_path):
    """As in V3.1: stored as float32, or as float8_e8m0fnu."""
    model = {}
    for scale_dtype in (np.float32, ml_dtypes.float8_e8m0fnu):
        out = tmp_path / np.dtype(scale_dtype).name
        shutil.copytree(fp8_directory, out)
        for file in out.glob("*.safetensors"):
            given = {name: np.array(SafetensorsReader(out)[name]) for name in tensor_names(file)}
            power = {
                n: np.exp2(np.ceil(np.log2(x))).astype(scale_dtype)
                for n, x in given.items()
                if n.endswith("_scale_inv")
            }
            write(file, given | power)
        model[scale_dtype] = model_arrays(load_pretrained(out))
    a, b = model.values()
    for path, x in a.items():
        np.testing.assert_array_equal(x, b[path], err_msg=path)


def tensor_names(file):
    raw = file.read_bytes()
    return [n for n in json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]) if n != "__metadata__"]


def write(file, given):
    from mla_moe.checkpoint.safetensors_writer import TensorEntry, write_file

    write_file(file, [TensorEntry(n, x.dtype, x.shape, lambda x=x: [x]) for n, x in given.items()], lambda _: None)


def file_of(directory, name):
    return next(file for file in directory.glob("*.safetensors") if name in tensor_names(file))


def change(directory, name, edit):
    file = file_of(directory, name)
    given = {n: np.array(SafetensorsReader(directory)[n]) for n in tensor_names(file)}
    write(file, edit(given))


def test_a_scale_may_be_in_another_file_than_its_weight(fp8_directory):
    before = model_arrays(load_pretrained(fp8_directory))
    scale = np.array(SafetensorsReader(fp8_directory)[SCALE])
    change(fp8_directory, SCALE, lambda given: {n: x for n, x in given.items() if n != SCALE})
    save_file({SCALE: scale}, fp8_directory / "scales.safetensors")
    index = json.loads((fp8_directory / "model.safetensors.index.json").read_text())
    index["weight_map"][SCALE] = "scales.safetensors"
    (fp8_directory / "model.safetensors.index.json").write_text(json.dumps(index))
    after = model_arrays(load_pretrained(fp8_directory))
    assert (before["dense_layers/attention/o"] == after["dense_layers/attention/o"]).all()


DAMAGED = {
    "missing": (lambda g: {n: x for n, x in g.items() if n != SCALE}, f"{SCALE} is missing"),
    "another shape": (lambda g: g | {SCALE: g[SCALE][:, :0]}, r"has shape \[2, 0\], not \[2, 1\]"),
    "another dtype": (lambda g: g | {SCALE: g[SCALE].astype(np.int32)}, "has type int32, not float32"),
    "not finite": (lambda g: g | {SCALE: g[SCALE] * np.nan}, "is not finite"),
    "without FP8 weight": (lambda g: g | {WEIGHT: g[WEIGHT].astype(np.float32)}, f"{SCALE} is unknown"),
}


@pytest.mark.parametrize("action", [load_pretrained, lambda path: convert(path, path.parent / "out")])
@pytest.mark.parametrize(("edit", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_scale_is_an_error(fp8_directory, action, edit, message):
    change(fp8_directory, SCALE, edit)
    with pytest.raises(ConfigError, match=message):
        action(fp8_directory)
    assert [p.name for p in fp8_directory.parent.iterdir()] == ["fp8"]


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_link_to_a_file_outside_the_directory_is_an_error(tmp_path, to, monkeypatch):
    """It is raised before anything is written."""
    shutil.copytree(GOLDEN / "v3", tmp_path / "source")
    (tmp_path / "secret").write_text("password")
    (tmp_path / "source" / "tokenizer.json").symlink_to(tmp_path / "secret")
    monkeypatch.setattr("orbax.checkpoint.Checkpointer", None)
    with pytest.raises(ConfigError, match="out of the directory"):
        convert(tmp_path / "source", tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_dangling_link_at_the_destination_is_an_error(tmp_path, to):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists already"):
        convert(GOLDEN / "v3", tmp_path / "out", to=to)


@pytest.mark.parametrize("dtype", ["bf16", "int8", "float8_e4m3fn", np.float64])
def test_only_floating_point_dtypes_of_weights_are_accepted(tmp_path, dtype):
    source = GOLDEN / "v3"
    actions = (
        lambda: load_pretrained(source, dtype),
        lambda: convert(source, tmp_path / "out", dtype=dtype),
        lambda: save_pretrained(load_pretrained(source), tmp_path / "out", dtype),
    )
    for action in actions:
        with pytest.raises(ConfigError, match=r"dtype = .*: must be one of float32, float16, bfloat16"):
            action()
    with pytest.raises(ConfigError, match="to = 'huggingface': must be one of hf, orbax"):
        convert(source, tmp_path / "out", to="huggingface")
    assert not list(tmp_path.iterdir())
