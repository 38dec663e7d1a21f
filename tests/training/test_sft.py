"""The SFT stage: what it learns, what it skips, and that it resumes exactly."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from flax import nnx

import mla_moe
from mla_moe import ConfigError
from mla_moe.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    SFTConfig,
    TaskConfig,
    TrainingConfig,
)
from mla_moe.parallel.mesh import make_mesh
from mla_moe.text.tokenizer import ByteTokenizer
from mla_moe.training.console import Console
from mla_moe.training.errors import InterruptedRun
from mla_moe.training.metrics import read_rows
from mla_moe.training.run_directory import open_run_directory
from mla_moe.training.sft import train_sft

BYTE = ByteTokenizer()
TIMES = ("tokens_per_s", "step_seconds", "mfu")
PAIRS = {"red": "apple pie", "green": "pear", "blue": "sky.", "white": "rice & salt", "black": "tea"}
STEPS = 60


@pytest.fixture(scope="module")
def folder(cfg, tmp_path_factory):
    """Examples in two files, and an untrained model."""
    folder = tmp_path_factory.mktemp("sft")
    lines = [json.dumps({"question": q, "completion": c}) for q, c in PAIRS.items()]
    (folder / "a.jsonl").write_text("\n".join(lines[:2]) + "\n\n")
    (folder / "b.jsonl").write_text("\n".join(lines[2:]))
    model = dataclasses.replace(cfg, vocab_size=258)
    mla_moe.save_pretrained(mla_moe.Transformer(model, rngs=nnx.Rngs(0)), folder / "base")
    return folder


@pytest.fixture(scope="module")
def recipe(cfg, folder):
    return Recipe(
        run_dir="",
        init_from=str(folder / "base"),
        model=dataclasses.replace(cfg, vocab_size=258),
        data=DataConfig(train=("nothing is read",), heldout=(), shuffle_buffer_size=2, prefetch=2),
        training=TrainingConfig(steps=0, loss_chunk=16),
        task=TaskConfig(template="{question}="),
        sft=SFTConfig(
            steps=STEPS,
            data=(f"{folder}/*.jsonl",),
            batch_size=8,
            sequence_length=32,
            optimizer=OptimizerConfig(
                schedule=ScheduleConfig(peak_lr=1e-2, warmup_fraction=0.1, decay_fraction=0.5), weight_decay=0.0
            ),
        ),
        checkpoint=CheckpointConfig(every=4),
    )


def start(recipe, run_dir, **changes):
    recipe = dataclasses.replace(recipe, run_dir=str(run_dir), sft=dataclasses.replace(recipe.sft, **changes))
    train_sft(recipe, open_run_directory(recipe), Console(enabled=True))
    return rows(run_dir)


def rows(run_dir):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(run_dir / "metrics.jsonl")]


def completions(model):
    prompts = [[BYTE.bos_id, *BYTE.encode(f"{question}=").tolist()] for question in PAIRS]
    new = mla_moe.generate(model, prompts, max_new_tokens=16, eos_id=BYTE.eos_id)
    return [BYTE.decode(tokens) for tokens in new]


@pytest.fixture(scope="module")
def finished_run(recipe, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    start(recipe, run_dir, heldout=(f"{recipe.init_from}/../a.jsonl",), eval_every=40, eval_samples=1)
    return run_dir


@pytest.mark.smoke
@pytest.mark.slow
def test_model_learns_the_completions_and_their_end(finished_run, recipe):
    steps = [row for row in rows(finished_run) if "loss" in row]
    assert [(row["stage"], row["step"]) for row in steps] == [("sft", n) for n in range(1, STEPS + 1)]
    assert steps[-1]["loss"] < 0.05 < 3 < steps[0]["loss"]
    assert {"lr", "grad_norm", "moe/load_max", "mtp_loss"} <= set(steps[0])
    assert read_rows(finished_run / "expert_load.jsonl")[0]["stage"] == "sft"
    assert [path.name for path in (finished_run / "checkpoints").iterdir()] == ["sft"]
    assert "sft loss" in json.loads((finished_run / "summary.json").read_text())
    assert completions(mla_moe.load_pretrained(finished_run)) == list(PAIRS.values())


@pytest.mark.slow
def test_heldout_examples_are_evaluated_and_sampled(finished_run):
    """Also before the first step. Two epochs of five pairs, packed, are as many steps as they fill."""
    found = {row["step"]: row["eval/loss"] for row in rows(finished_run) if "eval/loss" in row}
    assert list(found) == [0, 40, STEPS]
    assert found[STEPS] < 0.05 < 3 < found[0]
    samples = read_rows(finished_run / "samples.jsonl")
    assert [row["step"] for row in samples] == [0, 40, STEPS]
    assert (samples[-1]["prompt"], samples[-1]["completion"], samples[-1]["expected"]) == (
        "red=", "apple pie", "apple pie",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.thorough
def test_interrupted_run_resumes_with_the_same_rows(finished_run, recipe, tmp_path, monkeypatch):
    from mla_moe.training.trainer import StepMetrics

    record = StepMetrics.record

    def then_stop(self, number, metrics, batch):
        record(self, number, metrics, batch)
        if number == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StepMetrics, "record", then_stop)
        with pytest.raises(InterruptedRun, match="stopped at step 6"):
            start(recipe, tmp_path)
    assert start(recipe, tmp_path) == [row for row in rows(finished_run) if "loss" in row]


@pytest.mark.thorough  # the loop is the same as in pretraining
@pytest.mark.slow
def test_one_device_and_eight_have_the_same_losses(finished_run, recipe, tmp_path, monkeypatch):
    """With gradient accumulation on the one device."""
    monkeypatch.setattr("mla_moe.training.run_context.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    one = start(recipe, tmp_path, gradient_accumulation_steps=2)
    for name in ("loss", "mtp_loss", "grad_norm"):
        np.testing.assert_allclose(
            [row[name] for row in one[:3]], [row[name] for row in rows(finished_run)[:3]], rtol=1e-3
        )


@pytest.mark.slow
def test_router_bias_is_frozen_by_default(finished_run, recipe, folder, tmp_path):
    from mla_moe.nn.abstract_model import model_arrays

    def biases(path):
        return {k: v for k, v in model_arrays(mla_moe.load_pretrained(path)).items() if k.endswith("bias")}

    start(recipe, tmp_path, steps=1, router_bias_update_rate=0.5)
    before, frozen, moved = biases(folder / "base"), biases(finished_run), biases(tmp_path)
    assert before
    for path in before:
        np.testing.assert_array_equal(frozen[path], before[path])
        assert np.abs(np.asarray(moved[path]) - np.asarray(before[path])).max() > 0


@pytest.mark.slow
def test_skipped_and_truncated_examples_are_counted_and_printed(recipe, folder, tmp_path, capsys):
    text = "\n".join([
        (folder / "b.jsonl").read_text(),
        "not json",
        json.dumps({"question": "q" * 40, "completion": "too long"}),
        json.dumps({"question": "long", "completion": "c" * 40}),
    ])  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text(text)
    data = (str(tmp_path / "pairs.jsonl"),)
    start(recipe, tmp_path / "run", steps=1, data=data, max_malformed_fraction=0.2)
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 malformed lines are skipped, the first at" in printed
    assert "line 4: Expecting value" in printed
    assert "1 examples are skipped: prompts fill 32 tokens" in printed
    assert "1 completions are truncated at 32 tokens" in printed
    with pytest.raises(
        ConfigError, match=r"sft.data = .* 1 of 6 lines are malformed, the first at .*pairs.jsonl, line 4"
    ):
        start(recipe, tmp_path / "strict", steps=1, data=data)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sft": SFTConfig(steps=1, data=("nowhere/*.jsonl",), sequence_length=32)}, "sft.data"),
        ({"sft": SFTConfig(steps=1, data=("a.jsonl",), sequence_length=4096)}, "sft.sequence_length"),
        ({"sft": SFTConfig(steps=1, data=("a.jsonl",), sequence_length=32, batch_size=12)}, "sft.batch_size"),
        ({"init_from": None}, "init_from"),
        ({"mesh": MeshConfig(data=3)}, "mesh"),
        ({"data": DataConfig(streams=8, heldout=())}, "data.streams"),
    ],
)
def test_invalid_recipe_is_an_error_before_compiling(recipe, tmp_path, changes, field, capsys):
    with pytest.raises(ConfigError) as error:
        start(dataclasses.replace(recipe, **changes), tmp_path / "run")
    assert error.value.field == field
    assert "compiled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: SFTConfig(steps=1), "sft.data"),
        (lambda: SFTConfig(batch_size=10, gradient_accumulation_steps=3), "sft.gradient_accumulation_steps"),
        (lambda: SFTConfig(max_malformed_fraction=2.0), "sft.max_malformed_fraction"),
        (lambda: SFTConfig(router_bias_update_rate=-1.0), "sft.router_bias_update_rate"),
    ],
)
def test_invalid_values_name_their_field(make, field):
    with pytest.raises(ConfigError) as error:
        make()
    assert error.value.field == field
