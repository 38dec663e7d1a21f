"""`mla-moe eval`."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import tyro

from mla_moe.checkpoint.orbax_layout import find_step, run_directory
from mla_moe.cli.generate import load_model_and_tokenizer
from mla_moe.config import Recipe, RLConfig, TaskConfig, load_recipe, require
from mla_moe.training.console import Console


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluate a model on held-out prompts of a task: greedy accuracy, greedy accuracy prefilled with <think>, and
    pass@k and majority@k of several samples per prompt."""

    checkpoint: tyro.conf.Positional[Path]
    """A Hugging Face directory, or a run's directory or checkpoint. Without a tokenizer, tokens are bytes."""
    task: str | None = None
    """arithmetic; reasoning_gym:NAME; or a JSON Lines file with the keys question and answer. By default the run's."""
    options: tuple[str, ...] | None = None
    """Task options, each key=value. By default the run's, if the task is the run's."""
    template: str | None = None
    """r1_zero, chat, or a text that contains {question}. By default the run's, else r1_zero."""
    split: Literal["test", "validation"] = "test"
    prompts: int = 128
    """Number of prompts: the first of the split."""
    samples: int = 4
    """Completions sampled per prompt for pass@k and majority@k, besides the greedy ones; 0 samples none."""
    max_prompt_tokens: int | None = None
    """Longer prompts are skipped and counted. By default the run's, else 512."""
    max_new_tokens: int | None = None
    """By default the run's, else 1024."""
    temperature: float | None = None
    """Of the sampled completions. By default the run's, else 1."""
    max_num_seqs: int = 64
    """Sequences decoded at the same time (sequence slots)."""
    seed: int = 0
    json: bool = False
    """Print the metrics as one JSON object instead of a table."""

    def run(self) -> None:
        import rich.console

        from mla_moe.rl.evaluate import evaluate, table
        from mla_moe.rl.rewards import Reward
        from mla_moe.rl.rollout import Rollout
        from mla_moe.rl.tasks import open_task, require_enough_examples

        require(self.prompts >= 1, "prompts", self.prompts, "at least 1")
        require(self.samples >= 0, "samples", self.samples, "0 or more")
        settings, rl = self._settings()
        task = open_task(settings)
        require_enough_examples(task, self.split, "prompts", self.prompts)
        model, tokenizer = load_model_and_tokenizer(self.checkpoint)
        limit, length = model.cfg.max_position_embeddings, rl.max_prompt_tokens + rl.max_new_tokens
        fix = f"at most the model's max_position_embeddings = {limit}"
        require(length <= limit, "max_prompt_tokens + max_new_tokens", length, fix)
        with Reward(settings, task) as reward, rich.console.Console(stderr=True).status("compiling") as status:
            rollout = Rollout(rl, settings.template, task, reward, tokenizer)
            rollout.load_weights(model)
            result = evaluate(rollout, self.split, self.prompts, self.samples, self.seed, status.update)
        metrics = result.metrics() | {"prompts_too_long": rollout.prompts_too_long}
        if self.json:
            data = {"task": settings.name, "options": settings.options, "split": self.split, "prompts": self.prompts}
            print(json.dumps(data | metrics))
        else:
            data = [
                ("task", " ".join((settings.name, *settings.options))),
                (f"{self.split} prompts", f"{self.prompts}"),
            ]
            Console(enabled=True).result_table("held-out prompts", data + table(metrics))

    def _settings(self) -> tuple[TaskConfig, RLConfig]:
        """The task and the sampling limits: flags first, then the run's recipe, then defaults.

        The reward function that the recipe names is ignored, because importing it would execute code from the run.
        Raises `ConfigError` if there is neither a run nor `task`.
        """
        step = find_step(self.checkpoint)
        run = run_directory(step) if step else None
        require(run is not None or self.task is not None, "task", self.task, "name one; only a run has a default")
        recipe = load_recipe(run / "recipe.json") if run else Recipe(run_dir="")
        own = recipe.task if self.task in (None, recipe.task.name) else TaskConfig(template=recipe.task.template)
        overrides = self._given("options", "template") | ({"name": self.task} if self.task else {})
        rl = RLConfig(
            max_prompt_tokens=recipe.rl.max_prompt_tokens,
            max_new_tokens=recipe.rl.max_new_tokens,
            temperature=recipe.rl.temperature,
            max_num_seqs=self.max_num_seqs,
            routing_replay=False,
        )
        limits = self._given("max_prompt_tokens", "max_new_tokens", "temperature")
        return dataclasses.replace(own, reward_function=None, **overrides), dataclasses.replace(rl, **limits)

    def _given(self, *names: str) -> dict[str, Any]:
        """The flags among `names` that are set."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
