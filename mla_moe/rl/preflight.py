"""Preflight: checks what later stages need before the first stage starts, so that hours of training are not lost."""

from collections.abc import Collection
from pathlib import Path

from mla_moe.checkpoint.reader import open_checkpoint
from mla_moe.config import Recipe, require
from mla_moe.data.sources import find_files
from mla_moe.rl.rewards import Reward
from mla_moe.rl.tasks import open_task
from mla_moe.rl.teacher import check_teacher


def preflight(recipe: Recipe, started: Collection[str]) -> None:
    """Raises `ConfigError` if files, the task, the reward or the teacher of a stage that has not `started` cannot be
    opened."""
    for section in (recipe.sft, recipe.dpo):
        if section.active and section.section not in started:
            for name in ("data", "heldout"):
                for pattern in getattr(section, name):
                    find_files(pattern, f"{section.section}.{name}")
    runs = {stage for stage in ("rl", "rejection") if getattr(recipe, stage).steps and stage not in started}
    of_rl = None if recipe.rl.teacher_is_endpoint else recipe.rl.teacher  # an endpoint is checked when RL starts
    if "rl" in runs and of_rl is not None:
        own = Path(recipe.run_dir).resolve()
        is_own = Path(of_rl).resolve() in (own, own / "checkpoints" / "rl")
        fix = "is the student's own run, whose newest checkpoint changes; name another"
        require(not is_own, "rl.teacher", of_rl, fix)
    for stage, field, teacher in (
        ("rl", "rl.teacher", of_rl),
        ("rejection", "rejection.sampler", recipe.rejection.sampler),
    ):
        if stage in runs and teacher is not None:
            check_teacher(open_checkpoint(teacher).cfg, field, teacher, recipe)
    if runs:
        task = open_task(recipe.task)
        counts = {split: task.count(split) for split in ("train", recipe.rl.eval_split)}
        for split, count in counts.items():
            fix = f"has no {split} question: add lines, or name a file of held-out questions with task.heldout"
            require(count != 0, "task.name", recipe.task.name, fix)
        with Reward(recipe.task, task, workers=1) as reward:
            reward.check([task.example("train", number) for number in range(2)])
