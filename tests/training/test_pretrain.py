import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

import mla_moe
import mla_moe.training.trainer as trainer
from mla_moe import ConfigError
from mla_moe.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    SampleConfig,
    ScheduleConfig,
    TrainingConfig,
)
from mla_moe.parallel.mesh import make_mesh
from mla_moe.text.isolated import text_worker
from mla_moe.training.console import Console
from mla_moe.training.errors import InterruptedRun
from mla_moe.training.metrics import NullWriter, read_rows
from mla_moe.training.pretrain import PretrainTrainer, pretrain
from mla_moe.training.run_context import RunContext
from mla_moe.training.run_directory import open_run_directory

STEPS = 8
TIMES = ("tokens_per_s", "step_seconds", "mfu")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents of random words, for training and held out."""
    folder = tmp_path_factory.mktemp("text")
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), random.integers(2, 7))) for _ in range(40)]
    for i in range(44):
        name = f"{'train' if i < 40 else 'heldout'}-{i}.txt"
        (folder / name).write_text(" ".join(random.choice(words, random.integers(5, 200))))
    return folder


@pytest.fixture(scope="module")
def recipe(cfg, text):
    return Recipe(
        run_dir="",
        model=dataclasses.replace(cfg, vocab_size=258),
        data=DataConfig(
            train=(f"{text}/train-[01]*.txt", f"{text}/train-[2-9]*.txt"),
            heldout=(f"{text}/heldout-*.txt",),
            shuffle_buffer_size=4,
            prefetch=2,
        ),
        optimizer=OptimizerConfig("muon", ScheduleConfig(peak_lr=5e-3, warmup_fraction=0.2, decay_fraction=0.5)),
        mesh=MeshConfig(),
        training=TrainingConfig(steps=STEPS, batch_size=8, sequence_length=64, loss_chunk=32, eval_every=4),
        checkpoint=CheckpointConfig(every=3, max_to_keep=2),
        sample=SampleConfig(prompts=("ab",), max_new_tokens=4),
    )


def start(recipe, run_dir, **changes):
    recipe = dataclasses.replace(recipe, run_dir=str(run_dir), **changes)
    pretrain(recipe, open_run_directory(recipe), Console(enabled=True))


def rows(run_dir, drop=TIMES):
    return [{k: v for k, v in row.items() if k not in drop} for row in read_rows(run_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def finished_run(recipe, tmp_path_factory):
    """The directory of an uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    start(recipe, run_dir)
    return run_dir


@pytest.mark.smoke
def test_run_writes_its_documented_files(finished_run, recipe):
    steps = [row for row in read_rows(finished_run / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    documented = {"stage", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "moe/load_max", "moe/dropped", "mtp_loss"}
    assert all(documented <= set(row) for row in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    evals = [row for row in read_rows(finished_run / "metrics.jsonl") if "eval/bits_per_byte" in row]
    assert [row["step"] for row in evals] == [4, 8]
    assert evals[1]["eval/bits_per_byte"] < evals[0]["eval/bits_per_byte"] < 9
    assert evals[0]["eval/gzip_bits_per_byte"] > 0
    sources = [f"eval/loss/{name}" for name in (*recipe.data.train, *recipe.data.heldout)]
    assert [name for name in evals[1] if name.startswith("eval/loss/")] == sources
    assert evals[1][sources[2]] == evals[1]["eval/loss"]
    assert all(abs(evals[1][name] - steps[-1]["loss"]) < 0.2 for name in sources)  # all of the same words
    epochs = [[row[f"data/epochs/{name}"] for name in recipe.data.train] for row in steps]
    assert min(epochs[0]) > 0
    assert all(x <= y for before, after in itertools.pairwise(epochs) for x, y in zip(before, after, strict=True))
    assert Recipe.from_json((finished_run / "recipe.json").read_text()).training == recipe.training
    assert [row["prompt"] for row in read_rows(finished_run / "samples.jsonl")] == ["ab"]
    assert len(read_rows(finished_run / "expert_load.jsonl")) == STEPS
    assert sorted(p.name for p in (finished_run / "checkpoints" / "pretrain").iterdir()) == ["6", "8"]
    assert "held-out bits per byte" in json.loads((finished_run / "summary.json").read_text())


def stop_at(step):
    """`StepMetrics.record` that a signal follows at a step."""
    record = trainer.StepMetrics.record

    def then_stop(self, number, metrics, batch):
        record(self, number, metrics, batch)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return then_stop


@pytest.mark.slow
@pytest.mark.smoke
def test_interrupted_run_resumes_with_the_same_rows(finished_run, recipe, tmp_path, monkeypatch):
    """Stopped by a signal after step 2, then at step 5 without a save, then resumed: the same rows, bit for bit."""
    with monkeypatch.context() as patch:
        patch.setattr(trainer.StepMetrics, "record", stop_at(2))
        with pytest.raises(InterruptedRun, match="stopped at step 2 by SIGTERM"):
            start(recipe, tmp_path)
    with monkeypatch.context() as patch:  # like a kill: rows of steps 3 to 5, but no checkpoint of steps 4 and 5
        patch.setattr(trainer.StepMetrics, "record", stop_at(5))
        save = trainer.CheckpointManager.save
        patch.setattr(
            trainer.CheckpointManager, "save", lambda self, step, *a: save(self, step, *a) if step < 5 else None
        )
        with pytest.raises(InterruptedRun):
            start(recipe, tmp_path)
    start(recipe, tmp_path)
    assert rows(tmp_path) == rows(finished_run)
    assert read_rows(tmp_path / "samples.jsonl") == read_rows(finished_run / "samples.jsonl")
    assert read_rows(tmp_path / "expert_load.jsonl") == read_rows(finished_run / "expert_load.jsonl")


@pytest.mark.slow
@pytest.mark.thorough
def test_a_run_resumes_on_any_number_of_pipeline_stages(finished_run, recipe, tmp_path, monkeypatch):
    """Two stages to step 3, none to step 6, and two to the end: the rows of the run without, within rounding."""
    training = dataclasses.replace(recipe.training, gradient_accumulation_steps=2)
    meshes = MeshConfig(pipeline=2, data=2, expert=2), MeshConfig(data=2, tensor=2, expert=2)
    for mesh, step in ((meshes[0], 3), (meshes[1], 6)):
        with monkeypatch.context() as patch:
            patch.setattr(trainer.StepMetrics, "record", stop_at(step))
            with pytest.raises(InterruptedRun):
                start(recipe, tmp_path, training=training, mesh=mesh)
    start(recipe, tmp_path, training=training, mesh=meshes[0])
    for found, expected in zip(rows(tmp_path), rows(finished_run), strict=True):
        assert set(found) == set(expected)
        for name in {"loss", "mtp_loss", "aux_loss", "moe/load_max", "eval/loss"} & set(found):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), (expected["step"], name)
    assert len(read_rows(tmp_path / "samples.jsonl")) == 1


def test_finished_run_is_not_changed(finished_run, recipe, capsys):
    before = (finished_run / "metrics.jsonl").read_bytes()
    start(recipe, finished_run)
    assert "done already" in capsys.readouterr().out
    assert (finished_run / "metrics.jsonl").read_bytes() == before


def test_bytes_that_the_tokenizer_loses(finished_run, recipe, tmp_path, capsys):
    """They are refused above a fraction, and cost 8 bits each; a held-out file of the training text is named."""
    letters = {name: i for i, name in enumerate(["<s>", "</s>", *"abcdefgh ."])}
    tokenizers.Tokenizer(tokenizers.models.BPE(letters, [])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (tmp_path / "a.txt").write_text("abc 三三")
    heldout, path = (str(tmp_path / "a.txt"),), str(tmp_path / "tokenizer.json")
    data = dataclasses.replace(recipe.data, train=(*heldout, *recipe.data.train), heldout=heldout, tokenizer=path)
    with pytest.raises(ConfigError, match=r"data\.tokenizer = .*: loses 60\.00% of the bytes of .*a\.txt"):
        start(recipe, tmp_path / "run", data=data)
    assert "data.heldout: 1 of its files are training text too" in capsys.readouterr().out
    settings = dataclasses.replace(recipe, data=dataclasses.replace(data, max_lost_bytes_fraction=0.6))
    trainer = PretrainTrainer(RunContext.create(settings, tmp_path, Console(enabled=True)))
    assert text_worker()._process is None, "it would keep 0.3 GB during the run"
    trainer.describe()
    scores = trainer.evaluate(0, trainer.initial_state(trainer.position)[0], NullWriter())
    assert scores["eval/bits_per_byte"] == pytest.approx((scores["eval/loss"] * 5 / math.log(2) + 8 * 6) / 10)


@pytest.mark.slow
def test_a_resumed_run_changes_what_it_states(finished_run, recipe, tmp_path):
    """More steps with twice the batch and another learning rate: state, place and rows stay, and it is written down."""
    shutil.copytree(finished_run, tmp_path / "run")
    training = dataclasses.replace(recipe.training, steps=10, batch_size=16, gradient_accumulation_steps=2)
    schedule = ScheduleConfig(peak_lr=1e-3, warmup_fraction=0.0, decay_fraction=0.0)
    changes = {"training": training, "optimizer": dataclasses.replace(recipe.optimizer, schedule=schedule)}
    start(recipe, tmp_path / "run", **changes, resume_changes=("training", "optimizer.schedule"))
    before, found = rows(finished_run), rows(tmp_path / "run")
    assert found[: len(before)] == before
    old, new = ([row for row in some if "loss" in row] for some in (before, found))
    assert [(row["step"], row["lr"]) for row in new[STEPS:]] == [(9, pytest.approx(1e-3)), (10, pytest.approx(1e-3))]
    assert new[-1]["tokens"] > 1.8 * old[-1]["tokens"]
    assert new[-1]["loss"] < old[0]["loss"] - 0.1
    assert all(new[-1][name] > old[-1][name] > 0 for name in new[-1] if name.startswith("data/epochs/"))
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 1
    fewer = changes | {"training": dataclasses.replace(training, steps=9)}
    with pytest.raises(ConfigError, match=r"^training.steps = 9: 10 are done"):
        start(recipe, tmp_path / "run", **fewer, resume_changes=("training",))


def test_epochs_in_place_of_steps(recipe, tmp_path, capsys):
    """The steps in which every document is trained on three times, counted once; a repeated source is named."""
    training = dataclasses.replace(recipe.training, steps=0, epochs=3.0)
    context = RunContext.create(
        dataclasses.replace(recipe, training=training, data=dataclasses.replace(recipe.data, shuffle_buffer_size=1)),
        tmp_path,
        Console(enabled=True),
    )
    trainer = PretrainTrainer(context)
    steps = trainer.training.steps
    assert json.loads((tmp_path / "steps_of_epochs.json").read_text())["steps"] == steps > 10
    first = second = {}
    with contextlib.closing(trainer):
        for step in range(1, steps + 1):
            second = trainer.epochs(next(trainer.position)["documents"])
            first = second if step == steps // 3 else first
    names = [f"data/epochs/{name}" for name in recipe.data.train]
    assert [first[name] for name in names] == pytest.approx([1, 1], abs=0.4)
    assert sum(second[name] for name in names) / 2 == pytest.approx(3, abs=0.2)
    assert "tokenizing" in (out := capsys.readouterr().out)
    assert all(name in out.partition("documents of")[2] for name in recipe.data.train)
    assert 1 <= out.count("now they repeat") <= 2
    assert PretrainTrainer(context).training.steps == steps
    assert "tokenizing" not in capsys.readouterr().out


def test_each_held_out_set_has_its_own_bits_per_byte(recipe, text, tmp_path, monkeypatch):
    """Those of all together are their mean by bytes."""
    heldout = (f"{text}/heldout-4[0-1].txt", f"{text}/heldout-4[2-3].txt")
    data = dataclasses.replace(recipe.data, heldout=heldout)
    settings = dataclasses.replace(recipe, data=data, sample=SampleConfig())
    monkeypatch.setattr("mla_moe.training.run_context.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    with contextlib.closing(PretrainTrainer(RunContext.create(settings, tmp_path, Console(enabled=True)))) as trainer:
        scores = trainer.evaluate(0, trainer.initial_state(trainer.position)[0], NullWriter())
    each = [scores[f"eval/bits_per_byte/{name}"] for name in heldout]
    sizes = [sum(path.stat().st_size for path in text.glob(Path(name).name)) for name in heldout]
    assert each[0] != each[1]
    assert scores["eval/bits_per_byte"] == pytest.approx(np.average(each, weights=sizes), rel=1e-5)


def test_token_ids_without_a_tokenizer_have_a_loss_and_no_bits_per_byte(recipe, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    for name in ("train", "heldout"):
        documents = [[*random.integers(0, 250, random.integers(1, 90)), 257] for _ in range(30)]
        np.concatenate(documents).astype("<u2").tofile(tmp_path / f"{name}.bin")
    files = {name: (str(tmp_path / f"{name}.bin"),) for name in ("train", "heldout")}
    data = dataclasses.replace(recipe.data, **files, tokenizer="ids:257")
    settings = dataclasses.replace(recipe, data=data, sample=SampleConfig())
    monkeypatch.setattr("mla_moe.training.run_context.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    trainer = PretrainTrainer(RunContext.create(settings, tmp_path, Console(enabled=True)))
    rows = dict(trainer.describe())
    assert rows["held-out text"] == "token ids; their bytes are not known"
    assert rows["token ids in"] == f"{files['train'][0]}; eos is 257"
    with contextlib.closing(trainer):
        scores = trainer.evaluate(0, trainer.initial_state(trainer.position)[0], NullWriter())
        assert next(trainer.position)["tokens"].max() < 250
    assert scores == {"eval/loss": pytest.approx(math.log(258), rel=0.05)}


@pytest.mark.slow
def test_one_device_and_eight_have_the_same_losses(finished_run, recipe, tmp_path, monkeypatch):
    start_on_one_device(monkeypatch, recipe, tmp_path, sample=SampleConfig())
    for one, eight in zip(rows(tmp_path), rows(finished_run), strict=True):
        for name in {"loss", "mtp_loss", "eval/loss"} & set(one):
            assert one[name] == pytest.approx(eight[name], rel=1e-4), (one["step"], name)


def start_on_one_device(monkeypatch, *args, **changes):
    monkeypatch.setattr("mla_moe.training.run_context.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    start(*args, **changes)


def test_directory_of_another_run_is_an_error(finished_run, recipe):
    changed = dataclasses.replace(recipe.optimizer, weight_decay=0.7)
    with pytest.raises(ConfigError, match=r"optimizer.weight_decay = 0.7: .* holds a run with 0.1"):
        start(recipe, finished_run, optimizer=changed)
    open_run_directory(dataclasses.replace(recipe, run_dir=str(finished_run), checkpoint=CheckpointConfig(every=1)))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"training": TrainingConfig(batch_size=12, sequence_length=64)}, "training.batch_size"),
        ({"mesh": MeshConfig(data=3)}, "mesh"),
        ({"data": DataConfig(train=("nowhere/*.txt",))}, "data.train"),
        ({"data": DataConfig(heldout=("nowhere/*.txt",))}, "data.heldout"),
        ({"data": DataConfig(tokenizer="no/tokenizer.json")}, "data.tokenizer"),
        ({"sample": SampleConfig(prompts=("ab", "abc"), max_new_tokens=125)}, "sample.max_new_tokens"),
    ],
)
def test_invalid_recipe_is_an_error_before_compiling(recipe, tmp_path, changes, field, capsys):
    with pytest.raises(ConfigError) as error:
        start(recipe, tmp_path / "run", **changes)
    assert error.value.field == field
    assert "compiled" not in capsys.readouterr().out


def test_recipe_can_be_corrected_after_a_failed_start(recipe, tmp_path):
    with pytest.raises(ConfigError):
        start(recipe, tmp_path, data=DataConfig(train=("nowhere/*.txt",)))
    assert open_run_directory(dataclasses.replace(recipe, run_dir=str(tmp_path))) == tmp_path


def test_sections_of_later_stages_may_change_until_those_stages_start(recipe, tmp_path):
    def reopen(**task):
        rl = dataclasses.replace(recipe.rl, kl_coef=task.pop("kl_coef", 0.0))
        open_run_directory(
            dataclasses.replace(recipe, run_dir=str(tmp_path), rl=rl, task=dataclasses.replace(recipe.task, **task))
        )

    rows = tmp_path / "metrics.jsonl"
    reopen()
    rows.write_text('{"stage": "pretrain", "step": 1}\n')
    reopen(format_weight=2.0, kl_coef=1.0)
    rows.write_text('{"stage": "pretrain", "step": 1}\n{"stage": "sft", "step": 1}\n')
    reopen(format_weight=2.0, kl_coef=2.0)
    with pytest.raises(ConfigError, match=r"task.format_weight = 3.0: .* holds a run with 2.0"):
        reopen(format_weight=3.0, kl_coef=2.0)
    (tmp_path / "rejection.jsonl").touch()
    with pytest.raises(ConfigError, match=r"rl.kl_coef = 0.0"):
        reopen(format_weight=2.0)


def test_run_dir_with_glob_characters_is_an_error(recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"run_dir = '.*lr\[3e-4\]': checkpoints cannot be written below"):
        open_run_directory(dataclasses.replace(recipe, run_dir=str(tmp_path / "lr[3e-4]")))
    assert not list(tmp_path.iterdir())


def test_second_process_in_a_run_directory_is_an_error(recipe, tmp_path):
    open_run_directory(dataclasses.replace(recipe, run_dir=str(tmp_path)))
    code = f"from mla_moe.training.run_directory import _lock; from pathlib import Path; _lock(Path({str(tmp_path)!r}))"
    environment = os.environ | {"PYTHONPATH": str(Path(mla_moe.__file__).parents[1])}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "another process trains there" in other.stderr


@pytest.mark.slow
def test_one_document_suffices(recipe, tmp_path):
    text = tmp_path / "input.txt"
    text.write_text("to be or not to be, that is the question. " * 100)
    training = dataclasses.replace(recipe.training, steps=1, eval_every=0)
    data = dataclasses.replace(recipe.data, train=(str(text),), heldout=(), streams=None)
    start(recipe, tmp_path / "run", data=data, training=training, sample=SampleConfig())
    assert len(rows(tmp_path / "run")) == 1
    with pytest.raises(ConfigError, match=r"data.streams = 2: there are only 1 documents"):
        start(recipe, tmp_path / "two", data=dataclasses.replace(data, streams=2), training=training)


def test_vocabulary_smaller_than_the_tokenizer_is_an_error(recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"model.vocab_size = 64"):
        start(recipe, tmp_path, model=dataclasses.replace(recipe.model, vocab_size=64))


@pytest.mark.slow
@pytest.mark.thorough
def test_router_bias_balances_the_experts(recipe, tmp_path, monkeypatch):
    """The max load ratio at the end is near 1 with router bias updates, and clearly larger without."""
    long = dataclasses.replace(recipe.training, steps=60, eval_every=0, aux_loss_weight=0.0)
    optimizer = OptimizerConfig("adamw", ScheduleConfig(peak_lr=1e-2, warmup_fraction=0.1, decay_fraction=0.5))
    load_ratio = {}
    for gamma in (0.02, 0.0):
        training = dataclasses.replace(long, router_bias_update_rate=gamma)
        data = dataclasses.replace(recipe.data, streams=1)  # this little text mixes badly in several streams
        changes = {"data": data, "training": training, "optimizer": optimizer, "sample": SampleConfig()}
        start_on_one_device(monkeypatch, recipe, tmp_path / str(gamma), **changes)
        loads = [row["moe/load_max"] for row in read_rows(tmp_path / str(gamma) / "metrics.jsonl") if "loss" in row]
        load_ratio[gamma] = np.mean(loads[-6:])
    assert load_ratio[0.02] < 1.6
    assert load_ratio[0.0] > 1.2 * load_ratio[0.02]
