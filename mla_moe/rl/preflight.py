"""What stages to come need, looked at before the first begins: missing later, it would cost the hours before."""

from collections.abc import Collection

from mla_moe.config import Recipe
from mla_moe.data.sources import find_files
from mla_moe.rl.rewards import Reward
from mla_moe.rl.tasks.task import open_task, require_questions


def preflight(recipe: Recipe, begun: Collection[str]) -> None:
    """Raises `ConfigError` for files, a task or a reward that cannot be opened, of stages that have not `begun`."""
    if recipe.sft.steps and "sft" not in begun:
        for pattern in recipe.sft.data:
            find_files(pattern, "sft.data")
    if (recipe.rl.steps and "rl" not in begun) or (recipe.rejection.steps and "rejection" not in begun):
        task = open_task(recipe.task)
        require_questions(task, recipe.rl.eval_split, "rl.eval_prompts", recipe.rl.eval_prompts)
        Reward(recipe.task, task, workers=1).close()
