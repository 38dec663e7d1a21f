"""A run's directory may hold files of others: they are named, and neither overwritten nor removed."""

import dataclasses

import pytest

from mla_moe import ConfigError
from mla_moe.config import DataConfig, Recipe
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
