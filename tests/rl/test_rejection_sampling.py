"""Sampling, choosing, and learning what was chosen."""

import dataclasses
import json
import signal

import pytest
from flax import nnx

import mla_moe
from mla_moe import ConfigError
from mla_moe.config import OptimizerConfig, RejectionConfig, ScheduleConfig, SFTConfig
from mla_moe.rl import rejection_sampling
from mla_moe.rl.rejection_sampling import choose, train_rejection
from mla_moe.rl.rollout import Rollout
from mla_moe.training.console import Console
from mla_moe.training.metrics import read_rows
from mla_moe.training.run_context import InterruptedRun
from mla_moe.training.run_directory import open_run_directory


@pytest.fixture
def start(recipe, tmp_path):
    base = tmp_path / "base"
    mla_moe.save_pretrained(mla_moe.Transformer(recipe.model, rngs=nnx.Rngs(0)), base)
    optimizer = OptimizerConfig(
        schedule=ScheduleConfig(peak_lr=1e-2, warmup_fraction=0.0, decay_fraction=0.0), weight_decay=0.0
    )
    whole = dataclasses.replace(
        recipe,
        run_dir=str(tmp_path / "run"),
        init_from=str(base),
        data=dataclasses.replace(recipe.data, streams=1),
        sft=SFTConfig(batch_size=8, sequence_length=32, optimizer=optimizer),
        rl=dataclasses.replace(recipe.rl, steps=0),
        rejection=RejectionConfig(steps=2, prompts=6, samples=3, keep=2, prefer="shortest"),
    )
    return lambda: train_rejection(whole, open_run_directory(whole), Console(enabled=True))


def test_the_best_answers_are_kept_and_learned(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rejection_sampling, "_is_best", lambda answer: True)
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
    with pytest.raises(ConfigError, match=r"rejection.prompts = 6: none of 18 answers is right and in form"):
        start()
    assert not (tmp_path / "run" / "rejection.jsonl").exists()


def test_choosing_is_repeatable_and_takes_no_text_twice():
    texts = {"long one": 8, "b": 1, "mid": 3}
    assert choose(texts, RejectionConfig(keep=2, prefer="shortest"), "0") == ["b", "mid"]
    drawn = choose(texts, RejectionConfig(keep=5), "0 a")
    assert sorted(drawn) == ["b", "long one", "mid"]
    assert choose(texts, RejectionConfig(keep=5), "0 a") == drawn
    assert {choose(texts, RejectionConfig(), f"{seed} a")[0] for seed in range(20)} == {"b", "long one", "mid"}


def test_stopped_while_it_asks_it_goes_on_behind_what_was_answered(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rejection_sampling, "_is_best", lambda answer: True)
    monkeypatch.setattr(rejection_sampling, "AT_ONCE", 2)
    start()
    path, parts = (tmp_path / "run" / name for name in (rejection_sampling.FILE, rejection_sampling.PARTIAL_FILE))
    whole = path.read_bytes()
    path.unlink()

    asked = Rollout.answers

    def stopped(*args, **how):
        signal.raise_signal(signal.SIGTERM)
        return asked(*args, **how)

    monkeypatch.setattr(Rollout, "answers", stopped)
    with pytest.raises(InterruptedRun, match="stopped after 2 of 6 questions by SIGTERM; answers saved"):
        start()
    with parts.open("a") as file:
        file.write('{"key": 1')  # a kill cut it short
    counts = []
    monkeypatch.setattr(
        Rollout,
        "answers",
        lambda self, questions, *a, **h: counts.append(len(questions)) or asked(self, questions, *a, **h),
    )
    start()
    assert counts == [2, 2]
    assert path.read_bytes() == whole
    assert not parts.exists()
