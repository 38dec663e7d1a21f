"""Data files that are malformed, change or disappear."""

import dataclasses
import json
import os

import pytest

from mla_moe import ConfigError
from mla_moe.config import DataConfig
from mla_moe.data import Batches, open_documents
from mla_moe.training.console import Console
from mla_moe.training.metrics import read_rows
from mla_moe.training.pretrain import pretrain
from mla_moe.training.run_directory import open_run_directory

GOOD = [json.dumps({"text": f"document {i} " * 9}) for i in range(40)]


def opened(path, max_malformed_fraction=0.0):
    return open_documents(
        [str(path)], field="data.train", text_field="text", max_malformed_fraction=max_malformed_fraction
    )


def start(recipe, run_dir, path, **changes):
    text = dataclasses.replace(recipe.data, train=(str(path),), **changes)
    recipe = dataclasses.replace(recipe, run_dir=str(run_dir), data=text)
    pretrain(recipe, open_run_directory(recipe), Console(enabled=True))


def write(path, lines):
    path.write_text("\n".join(lines))
    return path


def with_malformed(path, *numbers):
    return write(path, ["{" if i in numbers else line for i, line in enumerate(GOOD)])


def test_malformed_records_are_skipped_logged_and_counted(tmp_path, caplog):
    source = opened(with_malformed(tmp_path / "a.jsonl", 3, 30), max_malformed_fraction=0.05)
    texts = [*source, *source]
    assert [i for i, text in enumerate(texts) if not text] == [3, 30, 43, 70]
    assert source.malformed == 2
    assert [record.message.split(":")[0] for record in caplog.records] == ["skipped"] * 2
    assert "a.jsonl, line 4'" in caplog.text
    assert "a.jsonl, line 31'" in caplog.text


def test_more_malformed_records_than_allowed_is_an_error(tmp_path):
    source = opened(with_malformed(tmp_path / "a.jsonl", 3, 30, 31), max_malformed_fraction=0.05)
    with pytest.raises(
        ConfigError, match=r"line 32'.*with it 3 of 40 records are malformed; raise data.max_malformed_fraction"
    ):
        list(source)


@pytest.mark.slow
def test_run_prints_how_many_records_it_skipped_or_fails(recipe, tmp_path, capsys):
    start(recipe, tmp_path / "some", with_malformed(tmp_path / "a.jsonl", 3), max_malformed_fraction=0.05)
    assert "1 skipped" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="records are malformed"):
        start(
            recipe, tmp_path / "many", with_malformed(tmp_path / "b.jsonl", *range(3, 40)), max_malformed_fraction=0.05
        )


def delete(path):
    path.unlink()


def change(path):
    write(path, [line.replace("document", "DOCUMENT") for line in GOOD])
    os.utime(path, (1, 1))


def shrink(path):
    write(path, GOOD[:-1])


def replace_by_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
@pytest.mark.parametrize(
    ("modify", "message"),
    [
        (delete, "is missing"),
        (change, "has changed"),
        (shrink, "has changed"),
        (replace_by_a_pipe, "has changed"),
    ],
)
def test_changed_or_deleted_file_is_named(tmp_path, kind, modify, message):
    source = opened(write(tmp_path / f"a.{kind}", GOOD))
    modify(tmp_path / f"a.{kind}")
    with pytest.raises(ConfigError, match=message) as error:
        source[0]
    assert error.value.value == str(tmp_path / f"a.{kind}")


@pytest.mark.slow
def test_run_fails_without_its_data_and_resumes_when_they_are_restored(recipe, tmp_path, monkeypatch):
    path, prepare = write(tmp_path / "a.jsonl", GOOD), Batches.prepare

    def delete_and_prepare(self):
        path.unlink()
        prepare(self)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "prepare", delete_and_prepare)
        with pytest.raises(ConfigError, match="is missing"):
            start(recipe, tmp_path / "run", path)
    start(recipe, tmp_path / "run", write(path, GOOD))
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 9))


def test_resume_with_other_files_is_an_error(tmp_path):
    def batches(path):
        return Batches(lambda number: EmptyStream(), slice(0, 4), 4, 1, opened(path).fingerprint, patterns=(str(path),))

    states = batches(write(tmp_path / "a.jsonl", GOOD)).states()
    batches(write(tmp_path / "b.jsonl", GOOD)).restore(states.__getitem__)  # the same data at another path
    with pytest.raises(
        ConfigError, match=r"data.train = .*c.jsonl.* files differ from the checkpoint's in number, size or"
    ):
        batches(write(tmp_path / "c.jsonl", GOOD[1:])).restore(states.__getitem__)


class EmptyStream:
    """A stream without a position."""

    def get_state(self):
        return {}

    def set_state(self, state):
        pass

    def start_prefetch(self):
        pass


def test_malformed_fraction_above_one_is_an_error():
    with pytest.raises(ConfigError, match=r"data.max_malformed_fraction"):
        DataConfig(max_malformed_fraction=2.0)
