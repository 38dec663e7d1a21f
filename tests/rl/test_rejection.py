"""Sampling, choosing, and learning what was chosen."""

import dataclasses
import json

import pytest
from flax import nnx

import mla_moe
from mla_moe import ConfigError
from mla_moe.inference.request import Completion, Request
from mla_moe.recipe import SFT, Optimizer, Rejection, Schedule
from mla_moe.rl import rejection
from mla_moe.rl.judge_worker import Example
from mla_moe.rl.rejection import choose, learn_from_the_best
from mla_moe.rl.rewards import Score
from mla_moe.rl.rollout import Answer, Question
from mla_moe.training.console import Console
from mla_moe.training.metrics import read_rows
from mla_moe.training.run import open_run


@pytest.fixture
def start(recipe, tmp_path):
    base = tmp_path / "base"
    mla_moe.save_pretrained(mla_moe.Transformer(recipe.model, rngs=nnx.Rngs(0)), base)
    optimizer = Optimizer(schedule=Schedule(peak=1e-2, warmup=0.0, decay=0.0), weight_decay=0.0)
    whole = dataclasses.replace(
        recipe,
        run_dir=str(tmp_path / "run"),
        init_from=str(base),
        data=dataclasses.replace(recipe.data, streams=1),
        sft=SFT(batch_size=8, sequence_length=32, optimizer=optimizer),
        rl=dataclasses.replace(recipe.rl, steps=0),
        rejection=Rejection(steps=2, questions=6, samples=3, keep=2, prefer="shortest"),
    )
    return lambda: learn_from_the_best(whole, open_run(whole), Console(enabled=True))


def test_the_best_answers_are_kept_and_learned(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rejection, "_is_best", lambda answer: True)
    start()
    pairs = [json.loads(line) for line in (tmp_path / "run" / "rejection.jsonl").read_text().splitlines()]
    asked = [pair["question"] for pair in pairs]
    assert 0 < len(set(asked)) <= 6
    assert max(map(asked.count, asked)) <= 2
    steps = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in steps] == [("rejection", 1), ("rejection", 2), ("rejection", 2)]
    assert "eval/accuracy" in steps[-1]
    before = (tmp_path / "run" / "rejection.jsonl").read_bytes()
    start()
    assert "all 2 steps are done already" in capsys.readouterr().out
    assert (tmp_path / "run" / "rejection.jsonl").read_bytes() == before


def test_nothing_right_is_an_error(start, tmp_path):
    with pytest.raises(ConfigError, match=r"rejection.questions = 6: none of 18 answers is right and in form"):
        start()
    assert not (tmp_path / "run" / "rejection.jsonl").exists()


def test_choosing_is_repeatable_and_takes_no_text_twice():
    question = Question(Example("1+1", "2", {}), [1])

    def answer(text):
        return Answer(question, Completion(Request([1], 1), tokens=[0] * len(text)), text, Score(0.0, {}, ()))

    answers = [answer(text) for text in ("long one", "b", "mid", "b")]
    assert choose(answers, Rejection(keep=2, prefer="shortest"), "0") == ["b", "mid"]
    drawn = choose(answers, Rejection(keep=5), "0 a")
    assert sorted(drawn) == ["b", "long one", "mid"]
    assert choose(answers, Rejection(keep=5), "0 a") == drawn
    assert {choose(answers, Rejection(), f"{seed} a")[0] for seed in range(20)} == {"b", "long one", "mid"}
