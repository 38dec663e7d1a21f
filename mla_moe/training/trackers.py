"""Trackers of experiments (Weights & Biases, Trackio, MLflow): copies of what a run writes to its directory.

Where they send it, and offline modes, are set by their own environment variables. The run's directory stays complete: a
tracker that fails is logged and left out, and does not end the run.
"""

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from mla_moe.config import Recipe, require
from mla_moe.config.files import read_json_object
from mla_moe.config.resume import leaves
from mla_moe.training.errors import InterruptedRun

logger = logging.getLogger(__name__)
_PROJECT = "mla_moe"
End = Literal["finished", "interrupted", "failed"]
"""How a run, or a stage of it, ended. An interrupted one has saved its state, and is to be resumed."""


class Tracker(Protocol):
    """What a tracker of experiments gets of a run."""

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """A row of `metrics.jsonl`, without values that are not finite."""

    def log_samples(self, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of `samples.jsonl`, as a table."""

    def log_file(self, path: Path) -> None:
        """A file, as an artifact of the run."""

    def close(self, end: End) -> None:
        """Send what is left, and how the run ended."""


class WandbTracker:
    """Weights & Biases, or Trackio, whose functions are the same. Each stage counts its own steps, which are the
    horizontal axis of its metrics: a run that resumes repeats some, which a step of the whole run could not."""

    def __init__(self, library: str, recipe: Recipe, run_dir: Path, run_id: str):
        self._library = importlib.import_module(library)
        options: dict[str, Any] = {"name": f"{run_dir.name}-{run_id}"}
        if library == "wandb":
            options = {"name": run_dir.name, "id": run_id, "dir": str(run_dir)}
        project = os.environ.get(f"{library.upper()}_PROJECT", _PROJECT)
        config = {name: leaf.value for name, leaf in leaves(recipe).items()}
        self._run = self._library.init(project=project, config=config, resume="allow", **options)
        self._stages: set[str] = set()

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if stage not in self._stages and hasattr(self._run, "define_metric"):
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._stages.add(stage)
        self._run.log({f"{stage}/{name}": value for name, value in {"step": step, **metrics}.items()})

    def log_samples(self, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = list(rows[0])
        data = [[row.get(column) for column in columns] for row in rows]
        self._run.log({f"{stage}/samples": self._library.Table(columns=columns, data=data)})

    def log_file(self, path: Path) -> None:
        artifact = self._library.Artifact(re.sub(r"[^\w.-]", "_", f"{path.parent.name}-{path.name}"), type="report")
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def close(self, end: End) -> None:
        # Trackio has no status for failed runs; an interrupted run can be resumed.
        options: dict[str, Any] = {"exit_code": int(end == "failed")} if self._library.__name__ == "wandb" else {}
        self._run.finish(**options)


class MLflowTracker:
    """MLflow. Parameters cannot change there: they are those of the first start."""

    def __init__(self, recipe: Recipe, run_dir: Path, run_id: str):
        self._mlflow = mlflow = importlib.import_module("mlflow")
        found = mlflow.search_runs(
            filter_string=f"tags.mla_moe_run = '{run_id}'", output_format="list", search_all_experiments=True
        )
        run = found[0] if found else None
        mlflow.start_run(run_id=run.info.run_id if run else None, run_name=None if run else run_dir.name)
        if run is None:
            mlflow.set_tag("mla_moe_run", run_id)
            mlflow.log_params({name: str(leaf.value)[:500] for name, leaf in leaves(recipe).items()})

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        named = {re.sub(r"[^\w. /:-]", "_", f"{stage}/{name}"): value for name, value in metrics.items()}
        self._mlflow.log_metrics(named, step=step, synchronous=False)  # no step waits for the server

    def log_samples(self, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = {column: [row.get(column) for row in rows] for column in rows[0]}
        self._mlflow.log_dict(columns, f"samples/{stage}-{rows[0]['step']}.json")

    def log_file(self, path: Path) -> None:
        self._mlflow.log_artifact(str(path))

    def close(self, end: End) -> None:
        self._mlflow.flush_async_logging()
        self._mlflow.end_run({"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}[end])


def require_installed(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a tracker whose package is not installed."""
    for name in names:
        ok = importlib.util.find_spec(name) is not None
        require(ok, "track", name, f"is not installed; pip install 'mla_moe[{name}]'")


class Trackers(contextlib.ExitStack[None]):
    """The trackers of a recipe. One that raises an error is logged once, and gets nothing more."""

    def __init__(self, recipe: Recipe, run_dir: Path):
        super().__init__()
        self._open: dict[str, Tracker] = {}
        run_id = _run_id(run_dir) if recipe.track else ""
        for name in recipe.track:
            create = MLflowTracker if name == "mlflow" else partial(WandbTracker, name)
            self._try(name, lambda create=create, name=name: self._open.update({name: create(recipe, run_dir, run_id)}))
        self.push(self._close)

    def _close(self, kind: type[BaseException] | None, *_: object) -> None:
        end: End = "finished" if kind is None else "interrupted" if issubclass(kind, InterruptedRun) else "failed"
        self._for_each(lambda tracker: tracker.close(end))

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self._for_each(lambda tracker: tracker.log(stage, step, metrics))

    def log_samples(self, stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            self._for_each(lambda tracker: tracker.log_samples(stage, rows))

    def log_file(self, path: Path) -> None:
        self._for_each(lambda tracker: tracker.log_file(path))

    def _for_each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: call(tracker))

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # of a service that may be absent, and of whatever type
            self._open.pop(name, None)
            logger.warning("%s gets no more of this run: %s: %s", name, type(error).__name__, error)


def _run_id(run_dir: Path) -> str:
    """Identifies the run to trackers in each restart: a random name in `trackers.json`."""
    path = run_dir / "trackers.json"
    if not path.exists():
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"run_id": uuid.uuid4().hex[:12]}) + "\n")
        os.replace(unfinished, path)
    return str(read_json_object(path, "run_dir")["run_id"])
