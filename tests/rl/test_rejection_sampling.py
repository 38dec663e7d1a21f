"""Rejection sampling: sampling, selection, and fine-tuning on the selected completions."""

import dataclasses
import json
import signal

import pytest

from mla_moe import ConfigError
from mla_moe.config import OptimizerConfig, RejectionConfig, ScheduleConfig, SFTConfig
from mla_moe.rl import rejection_sampling
from mla_moe.rl.rejection_sampling import choose, train_rejection
from mla_moe.rl.rollout import Rollout
from mla_moe.training.console import Console
from mla_moe.training.errors import InterruptedRun
from mla_moe.training.metrics import read_rows
from mla_moe.training.run_directory import open_run_directory


@pytest.fixture
def start(recipe, base, tmp_path):
    optimizer = OptimizerConfig(
        schedule=ScheduleConfig(peak_lr=1e-2, warmup_fraction=0.0, decay_fraction=0.0), weight_decay=0.0
    )
    settings = dataclasses.replace(
        recipe,
        run_dir=str(tmp_path / "run"),
        init_from=base,
        data=dataclasses.replace(recipe.data, streams=1),
        sft=SFTConfig(batch_size=8, sequence_length=32, optimizer=optimizer),
        rl=dataclasses.replace(recipe.rl, steps=0),
        rejection=RejectionConfig(steps=2, prompts=6, samples=3, keep=2, prefer="shortest"),
    )
    return lambda: train_rejection(settings, open_run_directory(settings), Console(enabled=True))


@pytest.mark.slow
def test_correct_completions_are_kept_and_trained_on(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rejection_sampling, "_is_correct", lambda completion: True)
    start()
    pairs = [json.loads(line) for line in (tmp_path / "run" / "rejection.jsonl").read_text().splitlines()]
    questions = [pair["question"] for pair in pairs]
    assert 0 < len(set(questions)) <= 6
    assert max(map(questions.count, questions)) <= 2
    steps = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in steps] == [("rejection", 1), ("rejection", 2), ("rejection", 2)]
    assert "eval/accuracy" in steps[-1]
    before = (tmp_path / "run" / "rejection.jsonl").read_bytes()
    start()
    assert "all 2 steps are done already" in capsys.readouterr().out
    assert (tmp_path / "run" / "rejection.jsonl").read_bytes() == before


def test_no_correct_completion_is_an_error(start, tmp_path):
    with pytest.raises(
        ConfigError, match=r"rejection.prompts = 6: none of 18 completions is correct and in the correct format"
    ):
        start()
    assert not (tmp_path / "run" / "rejection.jsonl").exists()


def test_selection_is_repeatable_and_has_no_duplicates():
    texts = {"long one": 8, "b": 1, "mid": 3}
    assert choose(texts, RejectionConfig(keep=2, prefer="shortest"), "0") == ["b", "mid"]
    drawn = choose(texts, RejectionConfig(keep=5), "0 a")
    assert sorted(drawn) == ["b", "long one", "mid"]
    assert choose(texts, RejectionConfig(keep=5), "0 a") == drawn
    assert {choose(texts, RejectionConfig(), f"{seed} a")[0] for seed in range(20)} == {"b", "long one", "mid"}


@pytest.mark.slow
def test_interrupted_sampling_resumes_after_the_saved_chunks(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rejection_sampling, "_is_correct", lambda completion: True)
    monkeypatch.setattr(rejection_sampling, "PROMPTS_PER_CHUNK", 2)
    start()
    path, parts = (tmp_path / "run" / name for name in (rejection_sampling.FILE, rejection_sampling.PARTIAL_FILE))
    complete = path.read_bytes()
    path.unlink()

    generate = Rollout.generate

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return generate(*args, **kwargs)

    monkeypatch.setattr(Rollout, "generate", interrupted)
    with pytest.raises(InterruptedRun, match="stopped after 2 of 6 prompts by SIGTERM; completions saved"):
        start()
    key = json.loads(parts.read_text().splitlines()[-1])["key"]
    with parts.open("a") as file:  # a part of a chunk, and of a line, that a kill left
        file.write(json.dumps({"key": key, "correct": {"another question": {"text": 1}}}) + '\n{"key": 1')
    counts = []
    monkeypatch.setattr(
        Rollout,
        "generate",
        lambda self, prompts, *a, **k: counts.append(len(prompts)) or generate(self, prompts, *a, **k),
    )
    start()
    assert counts == [2, 2]
    assert path.read_bytes() == complete
    assert not parts.exists()
