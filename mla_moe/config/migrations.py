"""Format versions of what a run writes (`recipe.json`, checkpoints, `metrics.jsonl`), and migrations between them.

Files of an older version are read through the table `MIGRATIONS`, so that a run keeps working when a field or a metric
is renamed. Version 1 had no `format_version` in its files.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mla_moe.config.errors import ConfigError, require

FORMAT_VERSION = 2
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

    def recipe(self, recipe: dict[str, Any]) -> dict[str, Any]:
        recipe = _copy(recipe)
        for old, new in self.fields.items():
            section = _section(recipe, old)
            if (name := old.rpartition(".")[2]) in section:
                section[new.rpartition(".")[2]] = section.pop(name)
        for name, renamed in self.values.items():
            section, key = _section(recipe, name), name.rpartition(".")[2]
            if isinstance(section.get(key), str):
                section[key] = renamed.get(section[key], section[key])
        return recipe

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {self._metric(key): value for key, value in row.items()}

    def _metric(self, key: str) -> str:
        for old, new in self.metrics.items():
            if key == old or (old.endswith("/") and key.startswith(old)):
                return new + key.removeprefix(old)
        return key


_OPTIMIZER = {
    "clip": "max_grad_norm",
    "muon_peak": "muon_peak_lr",
    "schedule.peak": "schedule.peak_lr",
    "schedule.warmup": "schedule.warmup_fraction",
    "schedule.decay": "schedule.decay_fraction",
    "schedule.final": "schedule.final_lr_fraction",
    "schedule.tail": "schedule.tail_fraction",
}

MIGRATIONS: dict[int, Migration] = {
    1: Migration(
        fields={
            f"{section}.{old}": f"{section}.{new}"
            for section, renamed in {
                "data": {"malformed": "max_malformed_fraction", "shuffle_window": "shuffle_buffer_size"},
                "optimizer": _OPTIMIZER,
                "kernels": {"exchange": "dispatch", "expert_buffer": "capacity_factor"},
                "training": {
                    "accumulation": "gradient_accumulation_steps",
                    "mtp_weight": "mtp_loss_weight",
                    "balance_weight": "aux_loss_weight",
                    "bias_update": "router_bias_update_rate",
                    "bias_freeze": "router_bias_freeze_fraction",
                    "skip_limit": "max_skipped_steps",
                    "spike": "loss_spike_threshold",
                },
                "task": {
                    "format": "format_weight",
                    "accuracy": "accuracy_weight",
                    "function": "reward_function",
                    "function_weight": "reward_function_weight",
                },
                "sft": {
                    "accumulation": "gradient_accumulation_steps",
                    "bias_update": "router_bias_update_rate",
                    "malformed": "max_malformed_fraction",
                },
                "sft.optimizer": _OPTIMIZER,
                "rl": {
                    "prompts": "prompts_per_step",
                    "rounds": "max_resample_rounds",
                    "clip_low": "clip_ratio_low",
                    "clip_high": "clip_ratio_high",
                    "kl": "kl_coef",
                    "reference_every": "ref_sync_steps",
                    "off_policy_limit": "off_policy_mask_threshold",
                    "importance_limit": "tis_clip",
                    "overlong": "overlong_buffer",
                    "bias_update": "router_bias_update_rate",
                    "row_tokens": "packed_length",
                    "rows": "micro_batch_size",
                    "slots": "max_num_seqs",
                },
                "rl.optimizer": _OPTIMIZER,
                "rejection": {"questions": "prompts"},
                "checkpoint": {"keep": "max_to_keep"},
            }.items()
            for old, new in renamed.items()
        },
        values={"init_parts": {"parameters": "params", "whole": "full_state"}},
        metrics={
            "balance_loss": "aux_loss",
            "clip_low": "clip_ratio/low",
            "clip_high": "clip_ratio/high",
            "mismatch": "sampler_logprob_diff",
            "mismatch_max": "sampler_logprob_diff_max",
            "importance": "tis_weight",
            "importance_truncated": "tis_clipped",
            "off_policy_answers": "off_policy_masked",
            "groups_left_out": "filtered_groups",
            "judge/": "verifier/",
            "eval/judge/": "eval/verifier/",
        },
    )
}
"""By the version from which they lead to the next."""


def migrate_recipe(recipe: Mapping[str, Any], file: str = "recipe.json") -> dict[str, Any]:
    """The contents of a `recipe.json` of any version, as those of the current version, without `format_version`.

    Raises `ConfigError` for a newer version.
    """
    current = {key: value for key, value in recipe.items() if key != KEY}
    for migration in _migrations(recipe.get(KEY, 1), file):
        current = migration.recipe(current)
    return current


def migrate_row(row: Mapping[str, Any], file: str = "metrics.jsonl") -> dict[str, Any]:
    """A row of `metrics.jsonl` of any version, with the current metric names and without `format_version`.

    Raises `ConfigError` for a newer version.
    """
    current = {key: value for key, value in row.items() if key != KEY}
    for migration in _migrations(row.get(KEY, 1), file):
        current = migration.row(current)
    return current


def require_known_version(version: Any, file: str) -> None:
    """Raise `ConfigError` for a file of a newer version, or whose version is not a positive integer."""
    require(type(version) is int and version >= 1, f"{file}.{KEY}", version, "must be a positive integer")
    if version > FORMAT_VERSION:
        message = f"written by a newer mla_moe; install a newer version (this one reads up to {FORMAT_VERSION})"
        raise ConfigError(f"{file}.{KEY}", version, message)


def renamed_flag(flags: Sequence[str]) -> tuple[str, str] | None:
    """The first of some command-line arguments that is a recipe field's flag by an old name, and the current flag."""
    current: dict[str, str] = {}
    for _, migration in sorted(MIGRATIONS.items()):
        current = {old: migration.fields.get(new, new) for old, new in current.items()} | dict(migration.fields)
    for flag in (flag.partition("=")[0] for flag in flags if flag.startswith("--")):
        new = current.get(flag.removeprefix("--").replace("-", "_"))
        if new is not None:
            return flag, "--" + new.replace("_", "-")
    return None


def _migrations(version: Any, file: str) -> Iterator[Migration]:
    require_known_version(version, file)
    return (MIGRATIONS[step] for step in range(version, FORMAT_VERSION))


def _copy(value: Any) -> Any:
    return {name: _copy(inner) for name, inner in value.items()} if isinstance(value, dict) else value


def _section(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """The object that a dotted name's last part is looked up in; an empty one if there is none."""
    value: Any = recipe
    for part in name.split(".")[:-1]:
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}
