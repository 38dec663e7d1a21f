"""A run's directory may hold files of others: they are named, and neither overwritten nor removed."""

import dataclasses
import json

import pytest

from mla_moe import ConfigError
from mla_moe.config import DataConfig, Recipe, ScheduleConfig, TrainingConfig
from mla_moe.training.run_directory import add_summary, open_run_directory, read_summary

BPE = DataConfig(tokenizer="bpe:300")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("recipe.json", '{"dependencies": {"react": "^19.0.0"}}'),
        ("recipe.json", "tomatoes, basil"),
        ("summary.json", '["a list"]'),
        ("metrics.jsonl", '{"epoch": 1}\n{"epoch": 2}\n'),
    ],
)
def test_files_of_others_are_named_and_kept(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        open_run_directory(Recipe(run_dir=str(tmp_path)))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, content)]


def test_a_tokenizer_is_removed_only_if_a_start_of_this_run_has_written_it(tmp_path):
    recipe = Recipe(run_dir=str(tmp_path), data=BPE)
    (tmp_path / "tokenizer.json").write_text("of another program")
    open_run_directory(recipe)
    assert (tmp_path / "tokenizer.json").exists()
    open_run_directory(dataclasses.replace(recipe, seed=1))  # a start that failed leaves a recipe and no rows
    assert not (tmp_path / "tokenizer.json").exists()
    (tmp_path / "metrics.jsonl").write_text('{"stage": "pretrain", "step": 1}\n')
    (tmp_path / "tokenizer.json").write_text("of this run")
    open_run_directory(dataclasses.replace(recipe, seed=1))
    assert (tmp_path / "tokenizer.json").exists()


def test_the_summary_grows_and_can_be_read(tmp_path):
    assert read_summary(tmp_path) == {}
    add_summary(tmp_path, {"a": "1", "b": "2"})
    add_summary(tmp_path, {"b": "3"})
    assert read_summary(tmp_path) == {"a": "1", "b": "3"}


def test_a_run_needs_a_name():
    with pytest.raises(ConfigError, match=r"^run_dir = ''"):
        open_run_directory(Recipe(run_dir=""))


def changed(recipe, stated=(), **sections):
    """Open the directory of `recipe` again with other values in some sections."""
    sections = {name: dataclasses.replace(getattr(recipe, name), **values) for name, values in sections.items()}
    open_run_directory(dataclasses.replace(recipe, resume_changes=stated, **sections))


@pytest.fixture
def started(tmp_path):
    """The recipe of a run that has done three steps of pretraining."""
    recipe = Recipe(run_dir=str(tmp_path), data=DataConfig(train=("a", "b"), weights=(1.0, 2.0)))
    open_run_directory(recipe)
    (tmp_path / "metrics.jsonl").write_text('{"stage": "pretrain", "step": 3}\n')
    return recipe


def test_stated_changes_are_allowed_logged_and_kept(started, tmp_path, caplog):
    sections = {
        "training": {"steps": 2000, "batch_size": 64},
        "optimizer": {"schedule": ScheduleConfig(peak_lr=1e-4)},
        "data": {"weights": (2.0, 1.0)},
    }
    changed(started, ("training.steps", "training.batch_size", "optimizer.schedule", "data.weights"), **sections)
    assert "training.batch_size = 64 instead of 32 after step 3 of pretrain" in caplog.text
    (row,) = map(json.loads, (tmp_path / "history.jsonl").read_text().splitlines())
    assert (row["stage"], row["step"]) == ("pretrain", 3)
    assert row["changes"] == {
        "data.weights": [[1.0, 2.0], [2.0, 1.0]],
        "optimizer.schedule.peak_lr": [2.2e-4, 1e-4],
        "training.batch_size": [32, 64],
        "training.steps": [1000, 2000],
    }
    assert Recipe.from_json(json.dumps(row["recipe"])) == started
    now = Recipe.from_json((tmp_path / "recipe.json").read_text())
    assert (now.training.batch_size, now.data.weights) == (64, (2.0, 1.0))
    open_run_directory(now)  # the same command again changes nothing
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("stated", "sections", "message"),
    [
        ((), {"training": {"steps": 2000}}, r"^training.steps = 2000: .* with 1000; .*--resume-changes training"),
        (("training.steps",), {"training": {"batch_size": 64}}, r"^training.batch_size = 64: .* state the change"),
        (("training",), {"training": {"sequence_length": 512}}, r"^training.sequence_length = 512: .*; keep that"),
        (("data.weights",), {"data": {"weights": ()}}, r"^data.weights = \(\): .* all documents shuffled"),
    ],
)
def test_other_changes_are_refused_by_name(started, tmp_path, stated, sections, message):
    with pytest.raises(ConfigError, match=message):
        changed(started, stated, **sections)
    assert not (tmp_path / "history.jsonl").exists()
    assert Recipe.from_json((tmp_path / "recipe.json").read_text()) == started


def test_a_stage_changes_only_while_it_is_the_newest(started, tmp_path):
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl", "step": 1}\n')
    with pytest.raises(ConfigError, match=r"^training.steps = 2000: .*; a later stage has started from what it gave"):
        changed(started, ("training",), training={"steps": 2000})
    with pytest.raises(ConfigError, match=r"^rl.kl_coef = 0.0: .* no reference policy"):
        changed(started, ("rl.kl_coef",), rl={"kl_coef": 0.0})
    changed(started, ("rl.kl_coef",), rl={"kl_coef": 0.1})


def test_another_batch_size_is_refused_with_epochs(tmp_path):
    """The steps that are done would count as ones of the new size."""
    training = TrainingConfig(steps=0, epochs=2.0)
    recipe = Recipe(run_dir=str(tmp_path), training=training)
    open_run_directory(recipe)
    (tmp_path / "metrics.jsonl").write_text('{"stage": "pretrain", "step": 3}\n')
    with pytest.raises(ConfigError, match=r"^training.batch_size = 64: .* training.epochs = 2.0 would count"):
        changed(recipe, ("training",), training={"batch_size": 64})
    changed(recipe, ("training",), training={"batch_size": 64, "steps": 900, "epochs": None})


def test_epochs_are_refused_after_another_batch_size(started, tmp_path):
    changed(started, ("training.batch_size",), training={"batch_size": 64})
    now, rows = Recipe.from_json((tmp_path / "recipe.json").read_text()), (tmp_path / "history.jsonl").read_text()
    now = dataclasses.replace(now, data=dataclasses.replace(now.data, weights=()))
    (tmp_path / "recipe.json").write_text(now.to_json())
    message = r"^training.epochs = 2.0: training.batch_size was 32 and then 64 in .*; set training.steps$"
    with pytest.raises(ConfigError, match=message):
        changed(now, ("training",), training={"steps": 0, "epochs": 2.0})
    assert (tmp_path / "history.jsonl").read_text() == rows


def test_a_stage_without_rows_has_started_with_its_checkpoint_or_its_data(tmp_path):
    """Rows are written every `log_every` steps only, and rejection sampling has none before its data are complete."""
    recipe = Recipe(run_dir=str(tmp_path))
    open_run_directory(recipe)
    (tmp_path / "checkpoints" / "pretrain" / "5").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"^training.steps = 2000: .* state the change"):
        changed(recipe, (), training={"steps": 2000})
    (tmp_path / "rejection.jsonl").touch()
    changed(recipe, ("rejection.steps",), rejection={"steps": 7})
    row = json.loads((tmp_path / "history.jsonl").read_text())
    assert (row["stage"], row["step"], row["changes"]) == ("rejection", 0, {"rejection.steps": [0, 7]})


def test_what_can_change_is_named():
    with pytest.raises(ConfigError, match=r"^resume_changes = 'seed': cannot change .*data.weights"):
        Recipe(run_dir="x", resume_changes=("training", "seed"))
