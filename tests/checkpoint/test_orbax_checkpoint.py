"""Conversion to the Orbax layout and back, and damaged checkpoints."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from mla_moe import ConfigError, Transformer
from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.hf_checkpoint import HFCheckpoint
from mla_moe.checkpoint.orbax_layout import run_directory
from mla_moe.checkpoint.pretrained import load_pretrained, save_pretrained
from mla_moe.checkpoint.reader import open_checkpoint
from mla_moe.checkpoint.safetensors_reader import SafetensorsReader
from mla_moe.config import MeshConfig
from mla_moe.nn.abstract_model import model_arrays
from mla_moe.parallel.mesh import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["v2_greedy", "v2_group_limited", "v3", "k2", "moonlight"]


def tensors(directory):
    reader = SafetensorsReader(directory)
    return {name: (str(reader[name].dtype), reader[name].shape, reader[name].tobytes()) for name in reader.stored}


def files(directory):
    """The bytes of each file of a checkpoint, without those that hold the time of writing."""
    chosen = [p for p in directory.rglob("*") if p.is_file() and "commit" not in p.name and "CHECKPOINT" not in p.name]
    return {str(path.relative_to(directory)): path.read_bytes() for path in chosen}


@pytest.mark.parametrize("read_bytes", [16 << 20, 300])
@pytest.mark.parametrize("case", CASES)
def test_conversion_to_orbax_and_back_is_lossless(case, read_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr("mla_moe.checkpoint.hf_mapping.READ_BYTES", read_bytes)
    monkeypatch.setattr("mla_moe.checkpoint.hf_mapping.BLOCK_ROWS", 1)  # or tensors this small are read at once
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / case, source)
    (source / "tokenizer.json").write_text("{}")
    convert(source, tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "hf")
    assert tensors(tmp_path / "hf") == tensors(source)
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (tmp_path / "hf" / "tokenizer.json").exists()
    convert(tmp_path / "hf", tmp_path / "again", to="orbax")
    assert files(tmp_path / "again") == files(tmp_path / "orbax")


def test_it_loads_as_the_original_on_any_mesh_and_with_orbax_itself(tmp_path):
    convert(GOLDEN / "v3", tmp_path / "orbax", to="orbax")
    original = model_arrays(load_pretrained(GOLDEN / "v3"))
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4))
    for model in (load_pretrained(tmp_path / "orbax"), load_pretrained(tmp_path / "orbax", mesh=mesh)):
        for path, x in model_arrays(model).items():
            assert x.dtype == original[path].dtype
            np.testing.assert_array_equal(x, original[path], err_msg=path)
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore((tmp_path / "orbax" / "state").absolute())
    for path, x in (tree["params"] | tree["biases"]).items():
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(original[path], np.float32), err_msg=path)
    save_pretrained(load_pretrained(tmp_path / "orbax"), tmp_path / "hf", like=GOLDEN / "v3")
    assert tensors(tmp_path / "hf") == tensors(GOLDEN / "v3")


def test_dtype_and_fp8_conversion(tmp_path):
    convert(GOLDEN / "v3", tmp_path / "wide", to="orbax", dtype=jnp.dtype("float32"))
    convert(GOLDEN / "v3", tmp_path / "fp8", quantize="fp8")
    convert(tmp_path / "fp8", tmp_path / "dequantized", to="orbax")
    convert(tmp_path / "wide", tmp_path / "again", quantize="fp8", dtype=jnp.dtype("bfloat16"))
    wide = open_checkpoint(tmp_path / "wide")
    assert wide.dtype("embed") == wide.dtype("moe_layers/moe/router/bias") == jnp.float32
    assert open_checkpoint(tmp_path / "dequantized").dtype("moe_layers/moe/down") == jnp.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "dequantized" / "config.json").read_text())
    assert tensors(tmp_path / "again") == tensors(tmp_path / "fp8")
    with pytest.raises(ConfigError, match="not quantized"):
        convert(GOLDEN / "v3", tmp_path / "x", to="orbax", quantize="fp8")


@pytest.mark.slow
def test_an_mtp_module_with_its_own_embedding(cfg, tmp_path):
    model = Transformer(dataclasses.replace(cfg, mtp_shares_embedding=False), rngs=nnx.Rngs(0))
    save_pretrained(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert tensors(tmp_path / "back") == tensors(tmp_path / "hf")
    assert load_pretrained(tmp_path / "orbax").cfg == model.cfg


def test_a_checkpoint_is_found_through_relative_paths_and_links(tmp_path):
    """`..` in the path, and links to a run's checkpoints or to one of them."""
    (tmp_path / "side").mkdir()
    convert(GOLDEN / "v3", tmp_path / "side" / ".." / "orbax", to="orbax")
    assert load_pretrained(tmp_path / "side" / ".." / "orbax").cfg == load_pretrained(GOLDEN / "v3").cfg
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.json").write_text("{}")
    (elsewhere / "pretrain").mkdir(parents=True)
    (tmp_path / "orbax").rename(elsewhere / "pretrain" / "1")
    (run / "checkpoints" / "pretrain").symlink_to(elsewhere / "pretrain")
    assert run_directory(run / "checkpoints" / "pretrain" / "1") == run
    (run / "checkpoints" / "pretrain").unlink()
    (elsewhere / "pretrain").rename(run / "checkpoints" / "pretrain")
    (tmp_path / "link").symlink_to(run / "checkpoints" / "pretrain" / "1")
    for path in (tmp_path / "link", tmp_path / "side" / ".." / "run" / "checkpoints" / "pretrain" / "1"):
        assert run_directory(path) == run


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    path = tmp_path_factory.mktemp("converted") / "orbax"
    convert(GOLDEN / "v3", path, to="orbax")
    return path


def _truncate(directory):
    for path in (directory / "state" / "params.embed").iterdir():
        if path.name != ".zarray":
            path.write_bytes(path.read_bytes()[:-1])


DAMAGED = {
    "missing array": (lambda d: _edit_tree(d, lambda tree: tree.pop("('params', 'embed')")), "embed is missing"),
    "another shape": (lambda d: _edit(d / "state/params.embed/.zarray", shape=[31, 24]), r"has shape \[31, 24\]"),
    "truncated": (_truncate, "cannot be read"),
    "missing files": (lambda d: shutil.rmtree(d / "state" / "params.head"), "cannot be opened"),
    "another model": (lambda d: _edit(d / "model/metadata", hidden_size=8), "has shape"),
    "missing model": (lambda d: (d / "model" / "metadata").unlink(), "no such file"),
    "invalid model": (lambda d: _edit(d / "model/metadata", hidden_size="8"), "must be of type int"),
    "no list of arrays": (lambda d: (d / "state" / "_METADATA").write_text("{}"), "no list of its arrays"),
}


def _edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _edit_tree(directory, change):
    path = directory / "state" / "_METADATA"
    given = json.loads(path.read_text())
    change(given["tree_metadata"])
    path.write_text(json.dumps(given))


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_checkpoints_are_rejected(converted, damage, message, tmp_path):
    damage(shutil.copytree(converted, tmp_path / "orbax"))
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "orbax", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["orbax"]


def test_a_failed_conversion_leaves_no_files(tmp_path, monkeypatch):
    reads = itertools.count()
    read = HFCheckpoint.read_rows

    def full(*arguments):
        if next(reads) == 3:  # in the middle, while writes are pending
            raise OSError("no space left on device")
        return read(*arguments)

    monkeypatch.setattr(HFCheckpoint, "read_rows", full)
    with pytest.raises(OSError, match="no space"):
        convert(GOLDEN / "v3", tmp_path / "out", to="orbax")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no such directory"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no such file"):
        open_checkpoint(tmp_path)
