"""Preflight reports what later stages lack before the first stage starts."""

import dataclasses
import json

import pytest

from mla_moe import ConfigError
from mla_moe.config import RejectionConfig
from mla_moe.data.arithmetic import split_of
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
        recipe, task=dataclasses.replace(recipe.task, reward_functions=("nowhere:reward",)), **steps
    )
    with pytest.raises(ConfigError, match=r"task\.reward_functions = 'nowhere:reward': cannot be loaded"):
        preflight(wrong, set())
    preflight(wrong, {"rl", "rejection"})


def test_a_file_of_questions_needs_training_and_held_out_ones(recipe, tmp_path):
    pytest.importorskip("math_verify", reason="pip install 'mla_moe[rl]'")
    path, heldout = tmp_path / "questions.jsonl", tmp_path / "heldout.jsonl"
    lines = [json.dumps({"question": f"{i}?", "answer": i}) + "\n" for i in range(60)]
    path.write_text("".join(line for line in lines if split_of(json.loads(line)["question"]) == "train"))
    task = dataclasses.replace(recipe.task, name=str(path), options=())
    few = dataclasses.replace(recipe, task=task, rl=dataclasses.replace(recipe.rl, eval_prompts=40))
    with pytest.raises(ConfigError, match=r"^task\.name = .*questions\.jsonl': has no test question: add lines, or"):
        preflight(few, set())
    heldout.write_text("".join(lines[:5]))
    preflight(dataclasses.replace(few, task=dataclasses.replace(task, heldout=str(heldout))), set())
