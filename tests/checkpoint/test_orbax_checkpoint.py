import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from mla_moe import ConfigError, Transformer
from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.orbax_arrays import run_directory
from mla_moe.checkpoint.pretrained import load_pretrained, save_pretrained
from mla_moe.checkpoint.safetensors_reader import SafetensorsReader
from mla_moe.checkpoint.source import open_any_checkpoint
from mla_moe.config import MeshConfig
from mla_moe.nn.abstract_model import model_arrays
from mla_moe.parallel.mesh import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["v2_greedy", "v2_group_limited", "v3", "k2", "moonlight"]


def tensors(directory):
    reader = SafetensorsReader(directory)
    return {name: (str(reader[name].dtype), reader[name].shape, reader[name].tobytes()) for name in reader.stored}


def files(directory):
    """Every stored byte of a checkpoint, but for the times of writing."""
    chosen = [p for p in directory.rglob("*") if p.is_file() and "commit" not in p.name and "CHECKPOINT" not in p.name]
    return {str(path.relative_to(directory)): path.read_bytes() for path in chosen}


@pytest.mark.parametrize("part_bytes", [16 << 20, 300])
@pytest.mark.parametrize("case", CASES)
def test_there_and_back_and_there_is_lossless(case, part_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["mla_moe.checkpoint.convert"], "PART_BYTES", part_bytes)
    monkeypatch.setattr(
        "mla_moe.checkpoint.hf_mapping.BLOCK_ROWS", 1
    )  # parts smaller than a block, so that there are some
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


def test_it_is_loaded_as_the_original_on_any_mesh_and_by_orbax_itself(tmp_path):
    convert(GOLDEN / "v3", tmp_path / "orbax", to="orbax")
    theirs = model_arrays(load_pretrained(GOLDEN / "v3"))
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4))
    for ours in (load_pretrained(tmp_path / "orbax"), load_pretrained(tmp_path / "orbax", mesh=mesh)):
        for path, x in model_arrays(ours).items():
            assert x.dtype == theirs[path].dtype
            np.testing.assert_array_equal(x, theirs[path], err_msg=path)
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore((tmp_path / "orbax" / "state").absolute())
    for path, x in (tree["params"] | tree["biases"]).items():
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(theirs[path], np.float32), err_msg=path)
    save_pretrained(load_pretrained(tmp_path / "orbax"), tmp_path / "hf", like=GOLDEN / "v3")
    assert tensors(tmp_path / "hf") == tensors(GOLDEN / "v3")


def test_other_types_and_blocks(tmp_path):
    convert(GOLDEN / "v3", tmp_path / "wide", to="orbax", dtype=jnp.dtype("float32"))
    convert(GOLDEN / "v3", tmp_path / "blocks", fp8=True)
    convert(tmp_path / "blocks", tmp_path / "undone", to="orbax")
    convert(tmp_path / "wide", tmp_path / "again", fp8=True, dtype=jnp.dtype("bfloat16"))
    wide = open_any_checkpoint(tmp_path / "wide")
    assert wide.dtype("embed") == wide.dtype("moe_layers/moe/router/bias") == jnp.float32
    assert open_any_checkpoint(tmp_path / "undone").dtype("moe_layers/moe/down") == jnp.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "undone" / "config.json").read_text())
    assert tensors(tmp_path / "again") == tensors(tmp_path / "blocks")
    with pytest.raises(ConfigError, match="no FP8 blocks"):
        convert(GOLDEN / "v3", tmp_path / "x", to="orbax", fp8=True)


def test_a_module_with_its_own_embedding(cfg, tmp_path):
    model = Transformer(dataclasses.replace(cfg, mtp_shares_embedding=False), rngs=nnx.Rngs(0))
    save_pretrained(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert tensors(tmp_path / "back") == tensors(tmp_path / "hf")
    assert load_pretrained(tmp_path / "orbax").cfg == model.cfg


def test_any_way_to_a_directory_will_do(tmp_path):
    """Up and down again, and over links: to a run's checkpoints, or to one of them."""
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


def _truncate(directory):
    for path in (directory / "state" / "params.embed").iterdir():
        if path.name != ".zarray":
            path.write_bytes(path.read_bytes()[:-1])


SPOILT = {
    "an array too few": (lambda d: _edit_tree(d, lambda tree: tree.pop("('params', 'embed')")), "embed is missing"),
    "another shape": (lambda d: _edit(d / "state/params.embed/.zarray", shape=[31, 24]), r"has shape \[31, 24\]"),
    "cut short": (_truncate, "cannot be read"),
    "files gone": (lambda d: shutil.rmtree(d / "state" / "params.head"), "cannot be opened"),
    "another model": (lambda d: _edit(d / "model/metadata", hidden_size=8), "has shape"),
    "no model": (lambda d: (d / "model" / "metadata").unlink(), "no such file"),
    "a model that is none": (lambda d: _edit(d / "model/metadata", hidden_size="8"), "must be of type int"),
    "no list": (lambda d: (d / "state" / "_METADATA").write_text("{}"), "no list of its arrays"),
}


def _edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _edit_tree(directory, change):
    path = directory / "state" / "_METADATA"
    given = json.loads(path.read_text())
    change(given["tree_metadata"])
    path.write_text(json.dumps(given))


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT)
def test_spoilt_checkpoints_are_refused(spoil, message, tmp_path):
    convert(GOLDEN / "v3", tmp_path / "orbax", to="orbax")
    spoil(tmp_path / "orbax")
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "orbax", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["orbax"]


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("mla_moe.checkpoint.orbax_arrays.OrbaxWriter.write", full)
    with pytest.raises(OSError, match="no space"):
        convert(GOLDEN / "v3", tmp_path / "out", to="orbax")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(ConfigError, match="no such directory"):
        open_any_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no such file"):
        open_any_checkpoint(tmp_path)
