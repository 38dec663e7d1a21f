"""Preflight reports what later stages lack before the first stage starts."""

import dataclasses
import json

import pytest

from mla_moe import ConfigError
from mla_moe.config import RejectionConfig
from mla_moe.rl.preflight import preflight


def test_missing_sft_files(recipe, tmp_path):
    missing = dataclasses.replace(
        recipe, sft=dataclasses.replace(recipe.sft, steps=1, data=(str(tmp_path / "nope.jsonl"),))
    )
    with pytest.raises(ConfigError, match=r"sft\.data = .*nope\.jsonl"):
        preflight(missing, {"pretrain"})
    preflight(missing, {"pretrain", "sft"})


@pytest.mark.parametrize("stage", ["rl", "rejection"])
def test_reward_function_that_cannot_be_loaded(recipe, stage):
    steps = (
        {"rl": dataclasses.replace(recipe.rl, steps=1)} if stage == "rl" else {"rejection": RejectionConfig(steps=1)}
    )
    wrong = dataclasses.replace(
        recipe, task=dataclasses.replace(recipe.task, reward_function="nowhere:reward"), **steps
    )
    with pytest.raises(ConfigError, match=r"task\.reward_function = 'nowhere:reward': cannot be loaded"):
        preflight(wrong, set())
    preflight(wrong, {"rl", "rejection"})


def test_more_evaluation_prompts_than_the_file_has(recipe, tmp_path):
    pytest.importorskip("math_verify", reason="pip install 'mla_moe[rl]'")
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}?", "answer": i}) + "\n" for i in range(60)))
    task = dataclasses.replace(recipe.task, name=str(path), options=())
    few = dataclasses.replace(recipe, task=task, rl=dataclasses.replace(recipe.rl, eval_prompts=40))
    with pytest.raises(ConfigError, match=r"rl\.eval_prompts = 40: the task has \d test questions, a tenth of all"):
        preflight(few, set())
