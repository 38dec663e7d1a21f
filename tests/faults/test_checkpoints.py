"""Truncated and corrupted checkpoints are detected, quarantined, and the previous one is restored."""

import dataclasses
import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe import ConfigError
from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.data_position import FixedPosition
from mla_moe.checkpoint.manager import CheckpointManager
from mla_moe.checkpoint.pretrained import load_pretrained
from mla_moe.config import CheckpointConfig, MeshConfig
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.parallel.mesh import make_mesh
from mla_moe.training.console import Console
from mla_moe.training.metrics import read_rows
from mla_moe.training.optimizer import make_optimizer
from mla_moe.training.pretrain import PretrainTrainer, pretrain
from mla_moe.training.run_directory import open_run_directory
from mla_moe.training.step import abstract_state, init_state
from tests.checkpoint.position import Position

KEEP = CheckpointConfig(every=1, max_to_keep=4)


@pytest.fixture(scope="module")
def saved(recipe, tmp_path_factory):
    """A run with two checkpoints, their states, and the abstract state to restore into."""
    abstract_model, mesh = AbstractModel(recipe.model), make_mesh(MeshConfig(), jax.devices()[:1])
    tx = make_optimizer(recipe.optimizer, 10, abstract_model)
    run_dir, states = tmp_path_factory.mktemp("run"), {}
    with CheckpointManager(run_dir, "pretrain", KEEP) as checkpoints:
        for step in (1, 2):
            state = init_state(abstract_model, tx, step, mesh)
            checkpoints.save(step, state, Position(step), abstract_model)
            states[step] = jax.tree.map(np.asarray, state)
    (run_dir / "recipe.json").write_text(recipe.to_json())
    return run_dir, states, abstract_state(abstract_model, tx, mesh)


def restore(run_dir, abstract):
    """Restore: the state, the data position, and the logged lines."""
    position, logged = Position(), []
    with CheckpointManager(run_dir, "pretrain", KEEP) as checkpoints:
        state = checkpoints.restore(abstract, position, logged.append)
        assert checkpoints.latest == position.number
    return state, position.number, logged


def flip_bit(path, draw):
    raw = bytearray(path.read_bytes())
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


def truncate(path, draw):
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def remove(path, draw):
    path.unlink()


def files(step):
    """The files of a checkpoint, the largest first: arrays, then metadata."""
    return sorted((p for p in step.rglob("*") if p.is_file() and p.stat().st_size), key=lambda p: -p.stat().st_size)


NEEDED = {"data/stream_0.json", "digests/metadata", "state/manifest.ocdbt"}


@pytest.mark.parametrize("damage", [flip_bit, truncate, pytest.param(remove, marks=pytest.mark.thorough)])
@pytest.mark.slow
def test_a_damaged_file_is_detected_or_makes_no_difference(saved, tmp_path, damage, thorough):
    run_dir, states, abstract = saved
    draw, detected = random.Random(0), set()
    wanted = [p.relative_to(run_dir) for p in files(run_dir / "checkpoints" / "pretrain" / "2")]
    needed = [p for p in wanted if "/".join(p.parts[3:]) in NEEDED]
    for file in wanted * 20 if thorough else [*wanted[:2], *needed]:
        copy = tmp_path / "copy"
        shutil.copytree(run_dir, copy)
        damage(copy / file, draw)
        state, step, logged = restore(copy, abstract)
        for found, expected in zip(jax.tree.leaves(state), jax.tree.leaves(states[step]), strict=True):
            np.testing.assert_array_equal(found, expected, err_msg=str(file))
        if step == 1:
            detected.add(file)
            assert len(logged) == 1
            assert "pretrain/2': is damaged" in logged[0]
            assert (copy / "checkpoints" / "pretrain" / "2.damaged").is_dir()
        shutil.rmtree(copy)
    assert detected >= set(needed)
    assert len(detected) > len(needed)  # arrays too


@pytest.mark.slow
def test_a_run_resumes_from_the_previous_checkpoint(recipe, tmp_path, capsys):
    """With the same losses, from the same position in the data."""

    def start():
        settings = dataclasses.replace(recipe, run_dir=str(tmp_path))
        pretrain(settings, open_run_directory(settings), Console(enabled=True))
        return {row["step"]: row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")}

    before, folder = start(), tmp_path / "checkpoints" / "pretrain"
    flip_bit(array_file(folder / "8"), random.Random(0))  # of a finished run
    truncate(folder / "6" / "digests" / "metadata", random.Random(0))
    assert start() == before
    assert "resumed from the checkpoint of step 4" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} >= {"6.damaged", "8.damaged", "6", "8"}


def test_a_finished_stage_whose_last_checkpoint_is_damaged_is_not_done(saved, recipe, tmp_path, monkeypatch, capsys):
    starts, run_dir = [], tmp_path / "copy"
    monkeypatch.setattr(PretrainTrainer, "position", FixedPosition())
    monkeypatch.setattr(PretrainTrainer, "prepare", lambda self: None)
    monkeypatch.setattr(PretrainTrainer, "close", lambda self: None)
    monkeypatch.setattr(PretrainTrainer, "_train", lambda self, state, checkpoints, start, _: starts.append(start))
    settings = dataclasses.replace(recipe, run_dir="", training=dataclasses.replace(recipe.training, steps=2))
    shutil.copytree(saved[0], run_dir)
    pretrain(settings, run_dir, Console(enabled=True))
    assert starts == []
    assert "done already" in capsys.readouterr().out
    truncate(run_dir / "checkpoints" / "pretrain" / "2" / "digests" / "metadata", random.Random(0))
    pretrain(settings, run_dir, Console(enabled=True))
    assert starts == [1]
    out = capsys.readouterr().out
    assert "pretrain/2': is damaged" in out
    assert "done already" not in out
    assert (run_dir / "checkpoints" / "pretrain" / "2.damaged").is_dir()


def test_a_finished_stage_is_not_read_again_once_a_later_stage_has_a_checkpoint(saved, recipe, tmp_path, capsys):
    run_dir = tmp_path / "copy"
    settings = dataclasses.replace(recipe, run_dir="", training=dataclasses.replace(recipe.training, steps=2))
    shutil.copytree(saved[0], run_dir)
    for step in (1, 2):
        truncate(run_dir / "checkpoints" / "pretrain" / str(step) / "digests" / "metadata", random.Random(0))
    (run_dir / "checkpoints" / "sft" / "3.orbax-checkpoint-tmp").mkdir(parents=True)  # cut short by a kill
    with pytest.raises(ConfigError, match="all its checkpoints are damaged"):
        pretrain(settings, run_dir, Console(enabled=True))
    (run_dir / "checkpoints" / "rl" / "3").mkdir(parents=True)
    pretrain(settings, run_dir, Console(enabled=True))
    assert "all 2 steps are done already" in capsys.readouterr().out


def test_if_all_are_damaged_none_is_renamed(saved, tmp_path):
    run_dir, _, abstract = saved
    shutil.copytree(run_dir, tmp_path / "copy")
    for step in (1, 2):
        (tmp_path / "copy" / "checkpoints" / "pretrain" / str(step) / "data" / "stream_0.json").write_text("7\n0")
    with pytest.raises(ConfigError, match="all its checkpoints are damaged"):
        restore(tmp_path / "copy", abstract)
    assert {p.name for p in (tmp_path / "copy" / "checkpoints" / "pretrain").iterdir()} == {"1", "2"}


def array_file(step):
    return max((step / "state").glob("ocdbt.process_*/d/*"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    "file",
    [array_file, lambda step: step / "state" / "_METADATA", lambda step: step / "model" / "metadata"],
    ids=["arrays", "metadata", "model"],
)
def test_load_pretrained_detects_damage(saved, tmp_path, file):
    run_dir, _, _ = saved
    shutil.copytree(run_dir, tmp_path / "copy")
    step = tmp_path / "copy" / "checkpoints" / "pretrain" / "2"
    load_pretrained(step)
    raw = file(step).read_bytes()
    quarter = len(raw) // 4
    zeroed = raw[:quarter] + bytes(2 * quarter) + raw[3 * quarter :]
    file(step).write_bytes(raw.replace(b"10000.0", b"10001.0") if b"10000.0" in raw else zeroed)
    with pytest.raises(ConfigError, match=r"is damaged|cannot be read|is not JSON"):
        load_pretrained(step)


READERS = {
    "loaded": load_pretrained,
    "in another dtype": lambda step: load_pretrained(step, jnp.bfloat16),
    "on a mesh": lambda step: load_pretrained(step, jnp.bfloat16, make_mesh(MeshConfig(data=2, fsdp=2, expert=2))),
    "converted": lambda step: convert(step, step.with_name("out")),
    "converted to orbax": lambda step: convert(step, step.with_name("out"), to="orbax", dtype=jnp.bfloat16),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_each_reader_verifies_each_array(saved, tmp_path, read):
    run_dir, _, _ = saved
    step = tmp_path / "copy" / "checkpoints" / "pretrain" / "2"
    shutil.copytree(run_dir, tmp_path / "copy")
    read(step)
    shutil.rmtree(step.with_name("out"), ignore_errors=True)
    file = step / "digests" / "metadata"
    good = json.loads(file.read_text())
    for path in ("params.embed", "params.moe_layers/moe/gate_up", "biases.moe_layers/moe/router/bias"):
        changed = good["arrays"] | {path: good["arrays"][path] ^ 1}
        file.write_text(json.dumps(good | {"arrays": changed}))
        with pytest.raises(ConfigError, match=f"is damaged: {path.partition('.')[2]} does not match its checksum"):
            read(step)
    assert {path.name for path in step.parent.iterdir()} == {"1", "2"}


def test_a_checkpoint_whose_removal_was_interrupted_is_ignored(saved, tmp_path):
    run_dir, states, _ = saved
    shutil.copytree(run_dir, tmp_path / "copy")
    newest = tmp_path / "copy" / "checkpoints" / "pretrain" / "2"
    (newest / "_CHECKPOINT_METADATA").unlink()
    np.testing.assert_array_equal(load_pretrained(tmp_path / "copy").embed[...], states[1].params["embed"])
