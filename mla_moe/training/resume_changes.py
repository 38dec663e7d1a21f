"""Changes of a recipe when its run resumes: which are allowed, and the run's history of them, `history.jsonl`."""

import json
import logging
import time
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from mla_moe.config import FORMAT_VERSION, ConfigError, Recipe
from mla_moe.config.resume import STAGES, leaves
from mla_moe.training.metrics import read_rows

logger = logging.getLogger(__name__)
Changes = Mapping[str, tuple[Any, Any]]
"""Values before and after, by the dotted name of the field."""


def stated_changes(former: Recipe, recipe: Recipe, stages: Set[str]) -> Changes:
    """The changes that `recipe.resume_changes` states, of a run of which `stages` have started.

    Raises `ConfigError` for any other change but of fields that may always change (`config.resume`), and for one that
    would need another state: a KL weight from or to 0, weights of sources that had none, and another batch size where
    steps follow from epochs.
    """
    old, new = leaves(former), leaves(recipe)
    changes: dict[str, tuple[Any, Any]] = {}
    for name in old | new:  # fields of an optional section may be in one of them only
        before, after = (side[name].value if name in side else None for side in (old, new))
        leaf = (new | old)[name]
        if before == after or leaf.may_change(stages):
            continue
        holds = f"{recipe.run_dir} holds a run with {before!r}"
        if not leaf.may_change_if_stated(stages):
            later = "; a later stage has started from what it gave" if leaf.may_be_stated else ""
            raise ConfigError(name, after, f"{holds}{later}; keep that value or give another --run-dir")
        if not any(f"{name}.".startswith(f"{stated}.") for stated in recipe.resume_changes):
            fix = f"keep that value, state the change with --resume-changes {name}, or give another --run-dir"
            raise ConfigError(name, after, f"{holds}; {fix}")
        if name in ("rl.kl_coef", "data.weights") and bool(before) != bool(after):
            without = {"rl.kl_coef": "no reference policy", "data.weights": "all documents shuffled together"}[name]
            fix = f"without it a run has {without}, so it cannot begin or end; give another --run-dir"
            raise ConfigError(name, after, f"{holds}; {fix}")
        section, _, field = name.rpartition(".")
        if field == "batch_size" and (epochs := new[f"{section}.epochs"].value) is not None:
            fix = f"{section}.epochs = {epochs} would count the steps that are done as ones of this size"
            raise ConfigError(name, after, f"{holds}; {fix}; set {section}.steps and {section}.epochs = None")
        changes[name] = before, after
    return changes


def require_steps_of_one_size(run_dir: Path, recipe: Recipe) -> None:
    """Raise `ConfigError` for epochs of a stage that had another batch size before: its steps would count as ones of
    the present size."""
    fields = leaves(recipe)
    for row in read_rows(run_dir / "history.jsonl"):
        for name, (before, after) in row["changes"].items():
            section, _, field = name.rpartition(".")
            if field == "batch_size" and (epochs := fields[f"{section}.epochs"].value) is not None:
                fix = f"{name} was {before} and then {after} in {recipe.run_dir}, so steps of it are no count of epochs"
                raise ConfigError(f"{section}.epochs", epochs, f"{fix}; set {section}.steps")


def record_changes(run_dir: Path, former: Recipe, changes: Changes, stages: Set[str]) -> None:
    """Log the changes, and append them to `history.jsonl` with the recipe before, and the last step in the metrics."""
    stage = max(stages, key=STAGES.index)
    steps = [row["step"] for row in read_rows(run_dir / "metrics.jsonl", stage)]
    at = {"stage": stage, "step": steps[-1] if steps else 0}
    for name, (before, after) in changes.items():
        logger.warning("%s = %r instead of %r after step %d of %s", name, after, before, at["step"], at["stage"])
    if "data.weights" in changes:
        note = "data.weights: up to data.shuffle_buffer_size packed sequences may repeat, or be left out, at the change"
        logger.warning(note)
    row = {"format_version": FORMAT_VERSION, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **at, "changes": changes}
    with (run_dir / "history.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row | {"recipe": json.loads(former.to_json())}) + "\n")
