import dataclasses
import json

import pytest

from mla_moe import ConfigError
from mla_moe.config import FORMAT_VERSION, Recipe, with_overrides
from mla_moe.config.migrations import MIGRATIONS, Migration, migrate_recipe, migrate_row
from mla_moe.config.resume import leaves

V1 = {
    "run_dir": "runs/x",
    "init_from": "runs/y",
    "init_parts": "whole",
    "data": {"malformed": 0.5, "shuffle_window": 4},
    "optimizer": {"clip": 2.0, "muon_peak": 0.1, "schedule": {"peak": 0.3, "warmup": 0.1, "final": 0.2, "tail": 0.05}},
    "kernels": {"exchange": "ragged", "expert_buffer": 1.5},
    "training": {"accumulation": 4, "bias_freeze": 0.1, "skip_limit": 3, "spike": 2.0, "balance_weight": 0.5},
    "task": {"format": 0.25, "accuracy": 0.75, "function": "a:b", "function_weight": 0.1},
    "sft": {"accumulation": 2, "malformed": 0.0, "optimizer": {"clip": 3.0, "schedule": {"decay": 0.6}}},
    "rl": {"prompts": 6, "rounds": 3, "kl": 0.5, "rows": 5, "slots": 7, "importance_limit": None, "overlong": 9},
    "rejection": {"questions": 11},
    "checkpoint": {"keep": 3},
}


def test_recipe_of_version_1_is_read():
    recipe = Recipe.from_json(json.dumps(V1))
    assert recipe.init_parts == "full_state"
    assert (recipe.data.max_malformed_fraction, recipe.data.shuffle_buffer_size) == (0.5, 4)
    assert (recipe.optimizer.max_grad_norm, recipe.optimizer.muon_peak_lr) == (2.0, 0.1)
    schedule = recipe.optimizer.schedule
    assert (schedule.peak_lr, schedule.warmup_fraction, schedule.final_lr_fraction) == (0.3, 0.1, 0.2)
    assert schedule.tail_fraction == 0.05
    assert (recipe.kernels.dispatch, recipe.kernels.capacity_factor) == ("ragged", 1.5)
    training = recipe.training
    assert (training.gradient_accumulation_steps, training.router_bias_freeze_fraction) == (4, 0.1)
    assert (training.max_skipped_steps, training.loss_spike_threshold, training.aux_loss_weight) == (3, 2.0, 0.5)
    assert (recipe.task.format_weight, recipe.task.accuracy_weight) == (0.25, 0.75)
    assert (recipe.task.reward_functions, recipe.task.reward_weights) == (("a:b",), (0.1,))
    assert (recipe.sft.gradient_accumulation_steps, recipe.sft.max_malformed_fraction) == (2, 0.0)
    assert (recipe.sft.optimizer.max_grad_norm, recipe.sft.optimizer.schedule.decay_fraction) == (3.0, 0.6)
    rl = recipe.rl
    assert (rl.prompts_per_step, rl.max_resample_rounds, rl.kl_coef, rl.micro_batch_size) == (6, 3, 0.5, 5)
    assert (rl.max_num_seqs, rl.tis_clip, rl.overlong_buffer) == (7, None, 9)
    assert (recipe.rejection.prompts, recipe.checkpoint.max_to_keep) == (11, 3)
    assert json.loads(recipe.to_json())["format_version"] == FORMAT_VERSION == 3


def test_one_reward_function_of_version_2_becomes_a_list():
    old = {"format_version": 2, "run_dir": "x", "task": {"reward_function": "a:b", "reward_function_weight": 0.5}}
    task = Recipe.from_json(json.dumps(old)).task
    assert (task.reward_functions, task.reward_weights) == (("a:b",), (0.5,))
    old["task"]["reward_function_weight"] = 1.0
    assert Recipe.from_json(json.dumps(old)).task == dataclasses.replace(task, reward_weights=()), "as if not given"
    old["task"]["reward_function"] = None
    task = Recipe.from_json(json.dumps(old)).task
    assert (task.reward_functions, task.reward_weights) == ((), ())


def test_migrations_lead_to_existing_fields():
    assert set(MIGRATIONS) == set(range(1, FORMAT_VERSION))
    names = {name for migration in MIGRATIONS.values() for name in migration.fields.values()}
    for migration in MIGRATIONS.values():
        names = {migration.fields.get(name, name) for name in names}
    assert names <= set(leaves(Recipe("x")))
    assert not {name for migration in MIGRATIONS.values() for name in migration.fields} & set(leaves(Recipe("x")))


def test_old_name_in_a_recipe_of_the_current_version_is_an_error():
    with pytest.raises(ConfigError, match=r"recipe.rl.kl = 0.5: no such field"):
        Recipe.from_json(json.dumps({"format_version": 3, "run_dir": "x", "rl": {"kl": 0.5}}))


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (4, r"^recipe\.json\.format_version = 4: written by a newer mla_moe; install a newer version"),
        (0, "positive integer"),
        ("2", "positive integer"),
        (True, "positive integer"),
        (None, "positive integer"),
    ],
)
def test_unknown_versions_are_errors(version, message):
    with pytest.raises(ConfigError, match=message):
        Recipe.from_json(json.dumps({"format_version": version, "run_dir": "x"}))


@pytest.mark.parametrize("value", [{"rl": 3}, {"optimizer": {"schedule": []}}, {"init_parts": ["whole"]}])
def test_wrong_types_in_version_1_are_errors_of_their_field(value):
    with pytest.raises(ConfigError, match=r"^recipe\."):
        Recipe.from_json(json.dumps({"run_dir": "x"} | value))


def test_rows_of_all_versions_have_the_current_metric_names():
    old = {"step": 1, "stage": "rl", "clip_low": 0.1, "mismatch_max": 2.0, "judge/hung": 1, "eval/judge/raised": 2}
    new = {"clip_ratio/low": 0.1, "sampler_logprob_diff_max": 2.0, "verifier/hung": 1, "eval/verifier/raised": 2}
    assert migrate_row(old) == {"step": 1, "stage": "rl"} | new
    current = {"format_version": FORMAT_VERSION, "step": 1, "clip_low": 0.1}
    assert migrate_row(current) == {"step": 1, "clip_low": 0.1}
    with pytest.raises(ConfigError, match=r"^metrics\.jsonl\.format_version = 4: written by a newer mla_moe"):
        migrate_row({"format_version": 4})


def test_migrations_apply_in_order(monkeypatch):
    again = Migration(fields={"rl.kl_coef": "rl.kl_weight"}, values={}, metrics={"verifier/": "grader/"})
    monkeypatch.setitem(MIGRATIONS, 3, again)
    monkeypatch.setattr("mla_moe.config.migrations.FORMAT_VERSION", 4)
    assert migrate_recipe({"rl": {"kl": 0.5}}) == {"rl": {"kl_weight": 0.5}}
    assert migrate_recipe({"format_version": 2, "rl": {"kl_coef": 0.5}}) == {"rl": {"kl_weight": 0.5}}
    assert migrate_row({"judge/hung": 1}) == {"grader/hung": 1}


@pytest.mark.parametrize(
    ("flag", "new"),
    [
        (["--training.accumulation", "2"], "--training.gradient-accumulation-steps"),
        (["--rl.kl", "0.1"], "--rl.kl-coef"),
        (["--rl.clip-low=0.1"], "--rl.clip-ratio-low"),
        (["--rl.clip_high", "0.1"], "--rl.clip-ratio-high"),
        (["--sft.optimizer.schedule.peak", "1"], "--sft.optimizer.schedule.peak-lr"),
    ],
)
def test_flag_by_its_old_name_is_one_line_with_the_new_name(flag, new, capsys):
    with pytest.raises(SystemExit) as stop:
        with_overrides(Recipe("x"), ["--seed", "1", *flag], "train.py")
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"{flag[0].partition('=')[0]}: renamed; use {new}\n"
