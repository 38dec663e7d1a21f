"""Tasks: examples with verifiable answers, in splits that never overlap."""

import difflib

from mla_moe.config import ConfigError, TaskConfig, require
from mla_moe.rl.tasks import reasoning_gym
from mla_moe.rl.tasks.generated import GeneratedTask, arithmetic_task
from mla_moe.rl.tasks.json_lines import JsonLinesTask
from mla_moe.rl.tasks.task import Task


def open_task(config: TaskConfig) -> Task:
    """The task of a recipe. Raises `ConfigError` on `task.name` or `task.options` for an unknown task, invalid options,
    a library that is not installed, or a malformed file."""
    name = config.name
    options = dict(option.split("=", 1) for option in config.options)
    if name == "arithmetic":
        return arithmetic_task(options)
    if name.startswith(reasoning_gym.PREFIX):
        source = reasoning_gym.ReasoningGymTask(name.removeprefix(reasoning_gym.PREFIX), options)
        return GeneratedTask(name, source.draw, verifier=source.verifier)
    if name.endswith(".jsonl"):
        require(not options, "task.options", config.options, "JSON-lines tasks have no options; remove them")
        return JsonLinesTask(name, config.heldout)
    known = {full.removeprefix(reasoning_gym.PREFIX): full for full in ("arithmetic", *reasoning_gym.names())}
    near = " or ".join(known[key] for key in difflib.get_close_matches(name, known))
    fix = f"did you mean {near}?" if near else "use arithmetic, reasoning_gym:NAME or the path of a .jsonl"
    raise ConfigError("task.name", name, fix)
