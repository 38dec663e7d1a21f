"""Recipes and config.json: read, or refused with the field's name."""

import contextlib
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mla_moe import ConfigError, ModelConfig
from mla_moe.config import Recipe, load_recipe

from .json_values import VALUES, changed

GOLDEN = Path(__file__).parents[1] / "golden"
RECIPE = json.loads(load_recipe(Path(__file__).parents[2] / "configs" / "quickstart.py").to_json())
CONFIGS = [json.loads(path.read_text()) for path in sorted(GOLDEN.glob("*/config.json"))]


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
