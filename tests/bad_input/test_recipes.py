"""Recipes and config.json: read, or refused with the field's name."""

import contextlib
import functools
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_moe import ConfigError, ModelConfig
from mla_moe.config import Recipe, load_recipe
from mla_moe.config.resume import leaves

from .json_values import VALUES, changed

GOLDEN = Path(__file__).parents[1] / "golden"
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"
RECIPE = json.loads(load_recipe(QUICKSTART).to_json())
CONFIGS = [json.loads(path.read_text()) for path in sorted(GOLDEN.glob("*/config.json"))]


MAY_BE_LARGE = {
    "training.loss_chunk", "training.log_every", "training.eval_every", "training.max_skipped_steps",
    "checkpoint.every", "checkpoint.max_to_keep", "rl.eval_every", "rl.ref_sync_steps", "rl.max_resample_rounds",
    "rejection.keep", "data.max_record_bytes",
}  # fmt: skip
"""Integers that are no size of an array: a large one means never, or all."""
MAY_BE_INFINITE = {
    "optimizer.max_grad_norm", "sft.optimizer.max_grad_norm", "dpo.optimizer.max_grad_norm",
    "rl.optimizer.max_grad_norm", "rl.tis_clip", "rl.clip_ratio_low",
    "rl.clip_ratio_high", "rl.off_policy_mask_threshold", "training.loss_spike_threshold",
}  # fmt: skip
"""Limits; an infinite one limits nothing."""


def recipe_with(name, value):
    *sections, field = name.split(".")
    recipe = json.loads(json.dumps(RECIPE))
    functools.reduce(dict.__getitem__, sections, recipe)[field] = value
    return Recipe.from_json(json.dumps(recipe))


def test_every_numeric_field_refuses_what_no_number_of_a_run_is():
    """Each in turn: NaN, infinities, and a large integer, where it can mean nothing."""
    fields = leaves(load_recipe(QUICKSTART))
    assert fields.keys() >= MAY_BE_LARGE | MAY_BE_INFINITE
    for name, leaf in fields.items():
        wrong = {int: [1 << 63, -(1 << 31)], float: [math.nan, -math.inf]}.get(type(leaf.value), [])
        wrong += [1 << 31] * (type(leaf.value) is int and name not in MAY_BE_LARGE)
        wrong += [math.inf] * (type(leaf.value) is float and name not in MAY_BE_INFINITE)
        for value in wrong:
            with pytest.raises(ConfigError):
                recipe_with(name, value)
    for names, value in ((MAY_BE_LARGE, 10**11), (MAY_BE_INFINITE, math.inf)):
        for name in names:
            recipe = recipe_with(name, value)
            assert leaves(recipe)[name].value == value
            assert Recipe.from_json(recipe.to_json()) == recipe


def read(text):
    """A recipe that is read is whole: it is written and read as the same."""
    with contextlib.suppress(ConfigError):
        recipe = Recipe.from_json(text)
        assert Recipe.from_json(recipe.to_json()) == recipe


@given(changed(RECIPE) | VALUES)
def test_any_recipe(value):
    read(json.dumps(value))


@given(st.text(max_size=200) | st.integers(1, 10**5).map(lambda depth: "[" * depth))
def test_any_text_in_place_of_a_recipe(text):
    read(text)


@given(st.sampled_from(CONFIGS).flatmap(changed) | st.dictionaries(st.sampled_from(sorted(CONFIGS[0])), VALUES))
def test_any_config(value):
    if isinstance(value, dict):
        with contextlib.suppress(ConfigError):
            cfg = ModelConfig.from_hf(value)
            assert ModelConfig.from_hf(cfg.to_hf()) == cfg
