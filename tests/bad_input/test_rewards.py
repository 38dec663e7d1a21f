"""Reward functions that return anything: rewards stay finite, and stay with their completions."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_moe.config import TaskConfig
from mla_moe.rl.rewards import MAX_REWARD, Reward, RewardInput
from mla_moe.rl.tasks import open_task

from .json_values import VALUES

FUNCTIONS = '''
import json

def one(prompt, completion, example):
    """Returns what the completion says."""
    return json.loads(completion)

def several(prompts, completions, **columns):
    """Returns what the first completion says, in place of a list."""
    return json.loads(completions[0])
'''
NUMBERS = st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from([1e308, -1e308, 10**400])
PARTS = st.dictionaries(st.text(max_size=6), NUMBERS | st.lists(NUMBERS, max_size=3), max_size=3)


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    path = tmp_path_factory.mktemp("functions") / "functions.py"
    path.write_text(FUNCTIONS)
    config = TaskConfig(reward_functions=(f"{path}:one", f"{path}:several"), reward_weights=(1.0, 0.5))
    with Reward(config, open_task(config), 1, log=lambda _: None) as reward:
        yield reward


@given(st.lists(NUMBERS | PARTS | st.lists(NUMBERS, max_size=3) | VALUES, min_size=1, max_size=3))
def test_any_reward(reward, values):
    texts = [json.dumps(value) for value in values]
    example = open_task(TaskConfig()).example("train", 0)
    scores = reward([RewardInput(str(number), text, example) for number, text in enumerate(texts)])
    assert len(scores) == len(texts)
    for value, score in zip(values, scores, strict=True):
        assert all(map(math.isfinite, [score.total, *score.components.values()]))
        assert all(len(failure.message) < 1000 for failure in score.failures)
        if isinstance(value, int | float):
            is_reward = abs(value) <= MAX_REWARD
            assert score.components["one"] == (float(value) if is_reward else 0)
            assert any(f.kind in ("not_finite", "raised") for f in score.failures) or is_reward
