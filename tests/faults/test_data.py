"""Data that are malformed, change or vanish."""

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


def opened(path, malformed=0.0):
    return open_documents([str(path)], field="data.train", text_field="text", malformed=malformed)


def start(recipe, run_dir, path, **changes):
    text = dataclasses.replace(recipe.data, train=(str(path),), **changes)
    recipe = dataclasses.replace(recipe, run_dir=str(run_dir), data=text)
    pretrain(recipe, open_run_directory(recipe), Console(enabled=True))


def write(path, lines):
    path.write_text("\n".join(lines))
    return path


def spoilt(path, *numbers):
    return write(path, ["{" if i in numbers else line for i, line in enumerate(GOOD)])


def test_malformed_records_are_left_out_named_and_counted(tmp_path, caplog):
    source = opened(spoilt(tmp_path / "a.jsonl", 3, 30), malformed=0.05)
    texts = [*source, *source]
    assert [i for i, text in enumerate(texts) if not text] == [3, 30, 43, 70]
    assert source.malformed == 2
    assert [record.message.split(":")[0] for record in caplog.records] == ["left out"] * 2
    assert "a.jsonl, line 4'" in caplog.text
    assert "a.jsonl, line 31'" in caplog.text


def test_more_than_a_share_of_them_is_an_error(tmp_path):
    source = opened(spoilt(tmp_path / "a.jsonl", 3, 30, 31), malformed=0.05)
    with pytest.raises(
        ConfigError, match=r"line 32'.*with it 3 of 40 records are malformed; data.max_malformed_fraction may"
    ):
        list(source)


def test_a_run_says_how_many_it_left_out_or_ends(recipe, tmp_path, capsys):
    start(recipe, tmp_path / "some", spoilt(tmp_path / "a.jsonl", 3), malformed=0.05)
    assert "1 left out" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="records are malformed"):
        start(recipe, tmp_path / "many", spoilt(tmp_path / "b.jsonl", *range(3, 40)), malformed=0.05)


def vanish(path):
    path.unlink()


def change(path):
    write(path, [line.replace("document", "DOCUMENT") for line in GOOD])
    os.utime(path, (1, 1))


def shrink(path):
    write(path, GOOD[:-1])


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
@pytest.mark.parametrize(("happens", "said"), [(vanish, "is gone"), (change, "has changed"), (shrink, "has changed")])
def test_a_file_that_does_not_stay_is_named(tmp_path, kind, happens, said):
    source = opened(write(tmp_path / f"a.{kind}", GOOD))
    happens(tmp_path / f"a.{kind}")
    with pytest.raises(ConfigError, match=said) as error:
        source[0]
    assert error.value.value == str(tmp_path / f"a.{kind}")


def test_a_run_whose_data_vanish_ends_and_goes_on_when_they_are_back(recipe, tmp_path, monkeypatch):
    path, prepare = write(tmp_path / "a.jsonl", GOOD), Batches.prepare

    def lose_and_prepare(self):
        path.unlink()
        prepare(self)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "prepare", lose_and_prepare)
        with pytest.raises(ConfigError, match="is gone"):
            start(recipe, tmp_path / "run", path)
    start(recipe, tmp_path / "run", write(path, GOOD))
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 9))


def test_a_checkpoint_does_not_go_on_with_other_files(tmp_path):
    def batches(path):
        return Batches(lambda number: Still(), slice(0, 4), 4, 1, opened(path).fingerprint)

    states = batches(write(tmp_path / "a.jsonl", GOOD)).states()
    batches(write(tmp_path / "b.jsonl", GOOD)).restore(states.__getitem__)  # the same elsewhere
    with pytest.raises(ConfigError, match=r"data = 'other files': number or sizes"):
        batches(write(tmp_path / "c.jsonl", GOOD[1:])).restore(states.__getitem__)


class Still:
    """A stream whose place is of no interest."""

    def get_state(self):
        return {}

    def set_state(self, state):
        pass

    def start_prefetch(self):
        pass


def test_a_share_is_a_share():
    with pytest.raises(ConfigError, match=r"data.max_malformed_fraction"):
        DataConfig(max_malformed_fraction=2.0)
