"""`mla-moe eval`."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Literal

import tyro

from mla_moe.checkpoint.hub import local_checkpoint
from mla_moe.checkpoint.orbax_layout import find_step, run_directory
from mla_moe.cli.generate import load_model_and_tokenizer
from mla_moe.config import Recipe, RLConfig, TaskConfig, load_recipe, require
from mla_moe.config.errors import MAX_SIZE, require_between
from mla_moe.config.hub import is_hub
from mla_moe.training.console import Console


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluate a model on held-out prompts of a task: greedy accuracy, greedy accuracy prefilled with <think>, and
    pass@k and majority@k of several samples per prompt."""

    checkpoint: tyro.conf.Positional[Path]
    """A Hugging Face directory, hf://ORG/NAME, s3://… or gs://…, or a run's directory or checkpoint. Without a
    tokenizer, tokens are bytes."""
    adapter: Path | None = None
    """LoRA adapters of this model, which are merged into it: a directory in PEFT's layout, or a run's, whose task and
    limits are then the defaults."""
    task: str | None = None
    """arithmetic; reasoning_gym:NAME; or a JSON Lines file with the keys question and answer. By default the run's."""
    options: tuple[str, ...] | None = None
    """Task options, each key=value. By default the run's, if the task is the run's."""
    template: str | None = None
    """r1_zero, chat, or a text that contains {question}. By default the run's, else r1_zero."""
    answer_format: str | None = None
    """answer_tags, boxed, last_number, choice, regex:PATTERN, or auto, which tries several. By default the run's, else
    auto."""
    split: Literal["test", "validation", "all"] | None = None
    """Split of the prompts, by default test; all for a JSON Lines file that is not the run's."""
    prompts: int = 128
    """Number of prompts: the first of the split. If it has fewer, all of them."""
    samples: int = 4
    """Completions sampled per prompt for pass@k and majority@k, besides the greedy ones; 0 samples none."""
    max_prompt_tokens: int | None = None
    """Longer prompts are skipped and counted. By default the run's, else 512 or what the model's length leaves."""
    max_new_tokens: int | None = None
    """Longest completion in tokens. By default the run's, else 1024 or what the model's length leaves."""
    temperature: float | None = None
    """Temperature of the sampled completions. By default the run's, else 1."""
    max_num_seqs: int = 64
    """Sequences decoded at the same time (sequence slots)."""
    seed: int = 0
    json: bool = False
    """Print the metrics as one JSON object instead of a table."""

    def __post_init__(self):
        require_between(self, "", "prompts", 1, 1_000_000)
        require_between(self, "", "samples", 0, 1_000)
        require_between(self, "", "max_num_seqs", 1, 4096)
        require_between(self, "", "max_prompt_tokens max_new_tokens", 1, MAX_SIZE)
        require_between(self, "", "temperature", 0, 100)
        require_between(self, "", "seed", 0, MAX_SIZE)

    def run(self) -> None:
        import rich.console

        from mla_moe.rl.evaluate import evaluate, table
        from mla_moe.rl.rewards import Reward
        from mla_moe.rl.rollout import Rollout
        from mla_moe.rl.tasks import open_task

        settings, recipe = self._settings()
        task, split = open_task(settings), self.split or self._default_split(settings, recipe)
        fix = "only a task from a .jsonl file has it; use test or validation"
        require(split != "all" or settings.name.endswith(".jsonl"), "split", split, fix)
        model, tokenizer = load_model_and_tokenizer(self.checkpoint, self.adapter)
        rl = self._sampling(recipe.rl, model.cfg.max_position_embeddings)
        with Reward(settings, task) as reward, rich.console.Console(stderr=True).status("compiling") as status:
            rollout = Rollout(rl, settings.template, task, reward, tokenizer)
            rollout.load_weights(model)
            result = evaluate(rollout, split, self.prompts, self.samples, self.seed, status.update)
        metrics = result.metrics() | {"prompts_too_long": rollout.prompts_too_long}
        if self.json:
            data = {"task": settings.name, "options": settings.options, "split": split, "prompts": len(result.greedy)}
            print(json.dumps(data | {"answer_format": settings.answer_format, "found_by": result.found_by()} | metrics))
        else:
            task_and_options = " ".join((settings.name, *settings.options))
            rows = [("task", task_and_options), (f"{split} prompts", f"{len(result.greedy)}")]
            found = ", ".join(f"{name} {count}" for name, count in result.found_by().items())
            rows.append(("answer format", f"{settings.answer_format}; found by: {found}"))
            Console(enabled=True).result_table("held-out prompts", rows + table(metrics))

    def _settings(self) -> tuple[TaskConfig, Recipe]:
        """The task: flags first, then the run's recipe, then defaults; and that recipe.

        Reward functions that the recipe names are ignored, because importing them would execute code from the run.
        Raises `ConfigError` if there is neither a run nor `task`.
        """
        of_adapter = _run(self.adapter) if self.adapter else None
        run = of_adapter or _run(self.checkpoint)
        require(run is not None or self.task is not None, "task", self.task, "name one; only a run has a default")
        recipe = load_recipe(run / "recipe.json") if run else Recipe(run_dir="", task=TaskConfig(answer_format="auto"))
        own = recipe.task
        if self.task is not None and not _same_task(self.task, own.name):
            own = TaskConfig(name=self.task, template=own.template, answer_format=own.answer_format)
        flags = {"options": self.options, "template": self.template, "answer_format": self.answer_format}
        given = {name: value for name, value in flags.items() if value is not None}
        return dataclasses.replace(own, reward_functions=(), reward_weights=(), **given), recipe

    def _default_split(self, settings: TaskConfig, recipe: Recipe) -> Literal["test", "all"]:
        foreign = settings.name.endswith(".jsonl") and not _same_task(settings.name, recipe.task.name)
        return "all" if foreign else "test"

    def _sampling(self, rl: RLConfig, limit: int) -> RLConfig:
        """The sampling limits: flags first, then those of `rl`, as far as `limit`, the model's length, allows."""
        for name in ("max_prompt_tokens", "max_new_tokens"):
            value = getattr(self, name)
            fix = f"must be at least 1, and below the model's max_position_embeddings = {limit}"
            require(value is None or 1 <= value < limit, name, value, fix)
        prompt = min(rl.max_prompt_tokens, limit // 2) if self.max_prompt_tokens is None else self.max_prompt_tokens
        new = min(rl.max_new_tokens, limit - prompt) if self.max_new_tokens is None else self.max_new_tokens
        if self.max_prompt_tokens is None:
            prompt = min(rl.max_prompt_tokens, limit - new)
        fix = f"with max_prompt_tokens = {prompt} above the model's max_position_embeddings = {limit}"
        require(prompt + new <= limit, "max_new_tokens", new, f"{fix}; lower one of them")
        temperature = rl.temperature if self.temperature is None else self.temperature
        return RLConfig(
            max_prompt_tokens=prompt,
            max_new_tokens=new,
            temperature=temperature,
            max_num_seqs=self.max_num_seqs,
            routing_replay=False,
        )


def _run(path: Path) -> Path | None:
    """The run's directory that has this checkpoint, if one has it."""
    step = None if is_hub(path) else find_step(local_checkpoint(path))
    return run_directory(step) if step else None


def _same_task(name: str, other: str) -> bool:
    """Whether two names are the same task, files by whatever path."""
    are_files = name.endswith(".jsonl") and other.endswith(".jsonl")
    return name == other or (are_files and os.path.realpath(name) == os.path.realpath(other))
