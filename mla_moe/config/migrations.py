"""Format versions of what a run writes (`recipe.json`, checkpoints, `metrics.jsonl`), and migrations between them.

Files of an older version are read through the table `MIGRATIONS`, so that a run keeps working when a field or a metric
is renamed. Version 1 had no `format_version` in its files.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mla_moe.config.errors import require

FORMAT_VERSION = 3
KEY = "format_version"


@dataclasses.dataclass(frozen=True)
class Migration:
    """Renames from one format version to the next."""

    fields: Mapping[str, str]
    """Dotted names of recipe fields, old to new. Both are in the same section."""
    values: Mapping[str, Mapping[str, str]]
    """For a recipe field, by its new name: old values to new ones."""
    metrics: Mapping[str, str]
    """Keys of `metrics.jsonl`, old to new. A name that ends in `/` is a prefix."""
    adjust: Callable[[dict[str, Any]], None] = lambda recipe: None
    """Changes the renamed recipe where it needs more than new names."""

    def recipe(self, recipe: Mapping[str, Any], section: str = "") -> dict[str, Any]:
        """The recipe, or the `section` of it whose name ends in a dot, with the new names."""
        migrated = {}
        for key, value in recipe.items():
            name = self.fields.get(section + key, section + key)
            if isinstance(value, dict):
                value = self.recipe(value, f"{section}{key}.")
            elif isinstance(value, str):
                value = self.values.get(name, {}).get(value, value)
            migrated[name.removeprefix(section)] = value
        if not section:
            self.adjust(migrated)
        return migrated

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of `metrics.jsonl` with the new names."""
        return {self._metric(key): value for key, value in row.items()}

    def _metric(self, key: str) -> str:
        for old, new in self.metrics.items():
            if key == old or (old.endswith("/") and key.startswith(old)):
                return new + key.removeprefix(old)
        return key


_OPTIMIZER = {
    "clip": "max_grad_norm", "muon_peak": "muon_peak_lr", "schedule.peak": "schedule.peak_lr",
    "schedule.warmup": "schedule.warmup_fraction", "schedule.decay": "schedule.decay_fraction",
    "schedule.final": "schedule.final_lr_fraction", "schedule.tail": "schedule.tail_fraction",
}  # fmt: skip
_SECTIONS = {
    "data": {"malformed": "max_malformed_fraction", "shuffle_window": "shuffle_buffer_size"},
    "optimizer": _OPTIMIZER,
    "kernels": {"exchange": "dispatch", "expert_buffer": "capacity_factor"},
    "training": {
        "accumulation": "gradient_accumulation_steps", "mtp_weight": "mtp_loss_weight",
        "balance_weight": "aux_loss_weight", "bias_update": "router_bias_update_rate",
        "bias_freeze": "router_bias_freeze_fraction", "skip_limit": "max_skipped_steps",
        "spike": "loss_spike_threshold",
    },
    "task": {
        "format": "format_weight", "accuracy": "accuracy_weight", "function": "reward_function",
        "function_weight": "reward_function_weight",
    },
    "sft": {
        "accumulation": "gradient_accumulation_steps", "bias_update": "router_bias_update_rate",
        "malformed": "max_malformed_fraction",
    },
    "sft.optimizer": _OPTIMIZER,
    "rl": {
        "prompts": "prompts_per_step", "rounds": "max_resample_rounds", "clip_low": "clip_ratio_low",
        "clip_high": "clip_ratio_high", "kl": "kl_coef", "reference_every": "ref_sync_steps",
        "off_policy_limit": "off_policy_mask_threshold", "importance_limit": "tis_clip", "overlong": "overlong_buffer",
        "bias_update": "router_bias_update_rate", "row_tokens": "packed_length", "rows": "micro_batch_size",
        "slots": "max_num_seqs",
    },
    "rl.optimizer": _OPTIMIZER,
    "rejection": {"questions": "prompts"},
    "checkpoint": {"keep": "max_to_keep"},
}  # fmt: skip
_METRICS = {
    "balance_loss": "aux_loss", "clip_low": "clip_ratio/low", "clip_high": "clip_ratio/high",
    "mismatch": "sampler_logprob_diff", "mismatch_max": "sampler_logprob_diff_max", "importance": "tis_weight",
    "importance_truncated": "tis_clipped", "off_policy_answers": "off_policy_masked",
    "groups_left_out": "filtered_groups", "judge/": "verifier/", "eval/judge/": "eval/verifier/",
}  # fmt: skip


def _list_reward_functions(recipe: dict[str, Any]) -> None:
    """Several reward functions with weights, in place of one."""
    task = recipe.get("task")
    if isinstance(task, dict):
        function, weight = task.get("reward_functions"), task.get("reward_weights", 1.0)
        task["reward_functions"] = [] if function is None else [function]
        task["reward_weights"] = [] if function is None or weight == 1.0 else [weight]


MIGRATIONS: dict[int, Migration] = {
    1: Migration(
        {f"{name}.{old}": f"{name}.{new}" for name, renamed in _SECTIONS.items() for old, new in renamed.items()},
        values={"init_parts": {"parameters": "params", "whole": "full_state"}},
        metrics=_METRICS,
    ),
    2: Migration(
        {"task.reward_function": "task.reward_functions", "task.reward_function_weight": "task.reward_weights"},
        values={},
        metrics={},
        adjust=_list_reward_functions,
    ),
}
"""By the version from which they lead to the next."""


def migrate_recipe(recipe: Mapping[str, Any], file: str = "recipe.json") -> dict[str, Any]:
    """A `recipe.json` of any version, as of the current one. Raises `ConfigError` for a newer version."""
    return _migrate(recipe, file, Migration.recipe)


def migrate_row(row: Mapping[str, Any], file: str = "metrics.jsonl") -> dict[str, Any]:
    """A row of `metrics.jsonl` of any version, as of the current one. Raises `ConfigError` for a newer version."""
    return _migrate(row, file, Migration.row)


def _migrate(value: Mapping[str, Any], file: str, step: Callable[[Migration, Any], dict[str, Any]]) -> dict[str, Any]:
    version = value.get(KEY, 1)
    require_known_version(version, file)
    migrated = {name: inner for name, inner in value.items() if name != KEY}
    for older in range(version, FORMAT_VERSION):
        migrated = step(MIGRATIONS[older], migrated)
    return migrated


def require_known_version(version: Any, file: str) -> None:
    """Raise `ConfigError` for a file of a newer version, or whose version is not a positive integer."""
    require(type(version) is int and version >= 1, f"{file}.{KEY}", version, "must be a positive integer")
    message = f"written by a newer mla_moe; install a newer version (this one reads up to {FORMAT_VERSION})"
    require(version <= FORMAT_VERSION, f"{file}.{KEY}", version, message)


def renamed_flag(flags: Sequence[str]) -> tuple[str, str] | None:
    """The first of some command-line arguments that is a recipe field's flag by an old name, and the current flag."""
    for flag in (flag.partition("=")[0] for flag in flags if flag.startswith("--")):
        name = old = flag.removeprefix("--").replace("-", "_")
        for _, migration in sorted(MIGRATIONS.items()):
            name = migration.fields.get(name, name)
        if name != old:
            return flag, "--" + name.replace("_", "-")
    return None
