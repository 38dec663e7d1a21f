"""Initialization from a Hugging Face checkpoint, from a run's checkpoint, and from another run's full state."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe import ConfigError
from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.manager import CheckpointManager
from mla_moe.checkpoint.pretrained import load_pretrained
from mla_moe.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    TrainingConfig,
)
from mla_moe.nn.abstract_model import model_arrays
from mla_moe.training.console import Console
from mla_moe.training.metrics import read_rows
from mla_moe.training.pretrain import pretrain
from mla_moe.training.run_directory import open_run_directory

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def recipe(cfg, tmp_path_factory):
    text = tmp_path_factory.mktemp("text")
    random = np.random.default_rng(0)
    for i in range(8):
        (text / f"{i}.txt").write_text(" ".join(random.choice(["ab", "cde", "fgh"], 300)))
    return Recipe(
        run_dir="",
        model=dataclasses.replace(cfg, vocab_size=258),
        data=DataConfig(train=(f"{text}/*.txt",), heldout=(), shuffle_buffer_size=4, prefetch=2),
        optimizer=OptimizerConfig("adamw", ScheduleConfig(peak_lr=5e-3)),
        mesh=MeshConfig(data=1, fsdp=2, expert=4),
        training=TrainingConfig(steps=4, batch_size=8, sequence_length=32, loss_chunk=32),
        checkpoint=CheckpointConfig(every=2, max_to_keep=4),
    )


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    start(recipe, run_dir)
    return run_dir


def start(recipe, run_dir, **changes):
    recipe = dataclasses.replace(recipe, run_dir=str(run_dir), **changes)
    pretrain(recipe, open_run_directory(recipe), Console(enabled=True))


def rows(run_dir):
    timings = ("tokens_per_s", "step_seconds", "mfu")
    return [{k: v for k, v in r.items() if k not in timings} for r in read_rows(run_dir / "metrics.jsonl")]


@pytest.mark.slow
def test_full_state_of_another_run_resumes_with_the_same_rows(recipe, run, tmp_path, capsys):
    data = dataclasses.replace(recipe.data, prefetch=1)
    start(recipe, tmp_path, init_from=str(run / "checkpoints" / "pretrain" / "2"), init_parts="full_state", data=data)
    assert "step 2" in capsys.readouterr().out
    assert rows(tmp_path) == rows(run)[2:]


@pytest.mark.slow
def test_full_state_is_taken_from_pretraining_if_the_run_has_later_stages(recipe, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "tuned")
    later = tmp_path / "tuned" / "checkpoints" / "sft" / "9"
    shutil.copytree(run / "checkpoints" / "pretrain" / "2", later)
    (later / "_CHECKPOINT_METADATA").write_text(json.dumps({"commit_timestamp_nsecs": 1 << 62}))
    (tmp_path / "up").mkdir()
    source = str(tmp_path / "up" / ".." / "tuned")
    training = dataclasses.replace(recipe.training, steps=5)
    start(recipe, tmp_path / "on", init_from=source, init_parts="full_state", training=training)
    assert "step 4" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.thorough
def test_parameters_alone_start_at_step_one(recipe, run, tmp_path):
    """From a run, and after conversion to Hugging Face and back: the same rows."""
    convert(run, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "orbax", to="orbax")
    seen = []
    for source in (run, tmp_path / "hf", tmp_path / "orbax"):
        training = dataclasses.replace(recipe.training, steps=1)
        start(recipe, tmp_path / f"from-{source.name}", init_from=str(source), training=training)
        seen.append(rows(tmp_path / f"from-{source.name}"))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][0]["step"] == 1
    assert seen[0][0]["loss"] < rows(run)[0]["loss"]


@pytest.mark.slow
def test_loaded_and_converted_run_has_the_same_arrays(recipe, run, tmp_path):
    model = model_arrays(load_pretrained(run))
    convert(run, tmp_path / "hf")
    for path, x in model_arrays(load_pretrained(tmp_path / "hf")).items():
        np.testing.assert_array_equal(x, model[path], err_msg=path)
    older = model_arrays(load_pretrained(run / "checkpoints" / "pretrain" / "2"))
    assert not np.array_equal(older["embed"], model["embed"])
    assert model["moe_layers/moe/router/bias"].any()


@pytest.mark.slow
def test_large_arrays_are_chunked_by_layer_and_expert(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("mla_moe.checkpoint.manager._CHUNK_BYTES", 2 << 10)
    start(recipe, tmp_path, training=dataclasses.replace(recipe.training, steps=1))
    from mla_moe.checkpoint.reader import open_checkpoint

    store = open_checkpoint(tmp_path)._store("moe_layers/moe/gate_up")
    assert store.chunk_layout.read_chunk.shape[:2] == (1, 1)
    with CheckpointManager(tmp_path, "pretrain", recipe.checkpoint) as checkpoints:
        assert checkpoints.latest == 1
    assert load_pretrained(tmp_path).cfg == recipe.model


REFUSED = {
    "another model": (
        {"init_from": str(GOLDEN / "v3")}, "model.vocab_size = 258: .* has 32"
    ),
    "parameters only": ({"init_from": "hf", "init_parts": "full_state"}, "parameters only"),
    "nothing there": ({"init_from": "/nowhere"}, "no such directory"),
    "all steps done": ({"init_from": "run", "init_parts": "full_state"}, "has done 4 already"),
    "other data": ({"init_from": "run", "init_parts": "full_state", "seed": 1}, "seed = 1: .* had 0"),
    "another shuffle buffer": (
        {"init_from": "run", "init_parts": "full_state", "data": {"shuffle_buffer_size": 8}},
        "data.shuffle_buffer_size = 8: .* had 4;",
    ),
    "another optimizer": (
        {"init_from": "run", "init_parts": "full_state", "optimizer": {"name": "muon"}},
        "optimizer.name = .* had 'adamw'",
    ),
    "MTP module dropped": (
        {"init_from": "run", "init_parts": "full_state", "model": {"num_nextn_predict_layers": 0}},
        "model.num_nextn_predict_layers = 0: .* had 1",
    ),
    "another stage": ({"init_from": "sft", "init_parts": "full_state"}, "sft/4 is of a later stage"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.slow
def test_mismatch_with_the_checkpoint_is_an_error(recipe, run, tmp_path, changes, message):
    if changes["init_from"] == "hf":
        convert(run, tmp_path / "hf")
    later = tmp_path / "tuned" / "checkpoints" / "sft"
    if changes["init_from"] == "sft":
        shutil.copytree(run / "checkpoints" / "pretrain", later)
        shutil.copy(run / "recipe.json", tmp_path / "tuned")
    sources = {"hf": str(tmp_path / "hf"), "run": str(run), "sft": str(later)}
    changes = changes | {"init_from": sources.get(changes["init_from"], changes["init_from"])}
    sections = {name: value for name, value in changes.items() if isinstance(value, dict)}
    changes |= {name: dataclasses.replace(getattr(recipe, name), **value) for name, value in sections.items()}
    with pytest.raises(ConfigError, match=message):
        start(recipe, tmp_path / "new", **changes)


@pytest.mark.slow
@pytest.mark.thorough
def test_run_inherits_the_tokenizer_of_its_checkpoint(recipe, run, tmp_path):
    """Even with other text, on which a new tokenizer would have other ids. Later the checkpoint may be deleted."""
    for name, letters in ("a", "abcdefgh"), ("b", "ijklmnop"):
        words = np.random.default_rng(0).choice(list(letters), (400, 5))
        (tmp_path / f"{name}.txt").write_text(" ".join(map("".join, words)))
    data = dataclasses.replace(recipe.data, train=(f"{tmp_path}/a.txt",), streams=1, tokenizer="bpe:300")
    with pytest.raises(ConfigError, match=r"data.tokenizer = 'bpe:300': .* has no tokenizer"):
        start(recipe, tmp_path / "byte-model", init_from=str(run), data=data)
    with pytest.raises(ConfigError, match="no such directory"):
        start(recipe, tmp_path / "no-model", init_from="/nowhere", data=data)
    once = {"model": dataclasses.replace(recipe.model, vocab_size=300)}
    once |= {"training": dataclasses.replace(recipe.training, steps=1)}
    start(recipe, tmp_path / "first", data=data, **once)
    other = once | {"data": dataclasses.replace(data, train=(f"{tmp_path}/b.txt",))}
    other["init_from"] = str(tmp_path / "first")
    start(recipe, tmp_path / "second", **other)
    files = [tmp_path / name / "tokenizer.json" for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()
    (tmp_path / "first").rename(tmp_path / "moved")
    start(recipe, tmp_path / "second", **other)  # all steps are done already


@pytest.mark.slow
@pytest.mark.thorough
def test_mtp_module_may_be_dropped(recipe, run, tmp_path):
    model = dataclasses.replace(recipe.model, num_nextn_predict_layers=0, max_position_embeddings=256)
    training = dataclasses.replace(recipe.training, steps=1)
    start(recipe, tmp_path / "without", init_from=str(run), model=model, training=training)
    assert "mtp_loss" not in rows(tmp_path / "without")[0]
    own = dataclasses.replace(recipe.model, mtp_shares_embedding=False)
    start(recipe, tmp_path / "own", model=own, training=training)
    start(recipe, tmp_path / "dropped", init_from=str(tmp_path / "own"), model=model, training=training)
    assert load_pretrained(tmp_path / "dropped").cfg == model
    with pytest.raises(ConfigError, match="has no MTP module"):
        start(recipe, tmp_path / "with", init_from=str(tmp_path / "without"))
    assert load_pretrained(tmp_path / "without", dtype=jnp.bfloat16).cfg == model
