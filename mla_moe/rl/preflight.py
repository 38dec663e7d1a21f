"""Preflight: checks what later stages need before the first stage starts, so that hours of training are not lost."""

from collections.abc import Collection

from mla_moe.config import Recipe
from mla_moe.data.sources import find_files
from mla_moe.rl.rewards import Reward
from mla_moe.rl.tasks import open_task, require_enough_examples


def preflight(recipe: Recipe, started: Collection[str]) -> None:
    """Raises `ConfigError` if files, the task or the reward of a stage that has not `started` cannot be opened."""
    if recipe.sft.steps and "sft" not in started:
        for pattern in recipe.sft.data:
            find_files(pattern, "sft.data")
    if (recipe.rl.steps and "rl" not in started) or (recipe.rejection.steps and "rejection" not in started):
        task = open_task(recipe.task)
        require_enough_examples(task, recipe.rl.eval_split, "rl.eval_prompts", recipe.rl.eval_prompts)
        Reward(recipe.task, task, workers=1).close()
