"""Trackers get what a run writes, once each; one that fails is left out. The libraries themselves: where installed."""

import json
import sqlite3

import pytest

from mla_moe import ConfigError
from mla_moe.config import Recipe
from mla_moe.training import trackers
from mla_moe.training.errors import InterruptedRun
from mla_moe.training.metrics import MetricsWriter, read_rows
from mla_moe.training.trackers import Trackers, require_installed


class Recorder:
    calls: list = []  # noqa: RUF012

    def __init__(self, *arguments):
        self.calls.append(("open", arguments[-1]))

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


class Failing(Recorder):
    def log(self, stage, step, metrics):
        raise ConnectionError("no route to host")


def test_rows_and_samples_reach_all_trackers_but_one_that_fails(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trackers, "MLflowTracker", Failing)
    monkeypatch.setattr(trackers, "WandbTracker", lambda name, *arguments: Recorder(*arguments))
    monkeypatch.setattr(Recorder, "calls", [])
    recipe = Recipe(run_dir=str(tmp_path), track=("mlflow", "wandb"))
    with MetricsWriter(tmp_path, None, "pretrain", Trackers(recipe, tmp_path)) as writer:
        writer.write(1, {"loss": 2.5, "grad_norm": float("inf")})
        writer.write(2, {"loss": 2.0})
        writer.append_samples({"step": 2, "prompt": "a", "completion": completion} for completion in "bc")
    (_, run_id), *calls = Recorder.calls
    samples = [{"step": 2, "prompt": "a", "completion": completion} for completion in "bc"]
    assert calls == [
        ("open", run_id), ("log", "pretrain", 1, {"loss": 2.5}), ("log", "pretrain", 2, {"loss": 2.0}),
        ("log_samples", "pretrain", samples), ("close", "finished"),
    ]  # fmt: skip
    assert caplog.text.count("mlflow gets no more of this run: ConnectionError: no route to host") == 1
    assert len(read_rows(tmp_path / "metrics.jsonl")) == len(read_rows(tmp_path / "samples.jsonl")) == 2
    with pytest.raises(InterruptedRun), Trackers(recipe, tmp_path):
        raise InterruptedRun
    opened, closed = Recorder.calls[-4:-2], Recorder.calls[-2:]
    assert opened == [("open", run_id)] * 2, "a run that resumes has the same name"
    assert closed == [("close", "interrupted")] * 2


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"track = 'trackio': is not installed; pip install 'mla_moe\[trackio\]'"):
        require_installed(("trackio",))


@pytest.fixture
def run(tmp_path):
    """Track two starts of a run, the second of which resumes after step 1."""

    def start(name):
        recipe = Recipe(run_dir=str(tmp_path / "run"), track=(name,))
        (tmp_path / "run").mkdir()
        report = tmp_path / "run" / "report.html"
        report.write_text("<p>report</p>")
        for first in (1, 2):
            with Trackers(recipe, tmp_path / "run") as opened:
                for step in (first, first + 1):
                    opened.log("pretrain", step, {"loss": 3.0 - step, "eval/loss/a*.txt": 1.0})
                opened.log_samples("pretrain", [{"step": first, "prompt": "a", "completion": "b"}])
                opened.log_file(report)
                assert name in opened._open, "it has failed"

    return start


def test_mlflow(run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_ARTIFACT_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run("mlflow")
    (found,) = mlflow.search_runs(output_format="list")
    assert found.data.params["training.steps"] == "1000"
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "pretrain/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.0), (2, 1.0), (2, 1.0), (3, 0.0)]
    assert {file.path for file in mlflow.MlflowClient().list_artifacts(found.info.run_id)} == {"report.html", "samples"}


def test_wandb_offline(run, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run("wandb")
    run_id = json.loads((tmp_path / "run" / "trackers.json").read_text())["run_id"]
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}"))) == 2


def test_trackio(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    run("trackio")
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, metrics from metrics order by id").fetchall()
    logged = [json.loads(text) for _, text in rows]
    assert [row["pretrain/loss"] for row in logged if "pretrain/loss" in row] == [2.0, 1.0, 1.0, 0.0]
    assert len({name for name, _ in rows}) == 1
