import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from flax import nnx

import mla_moe
from mla_moe import ConfigError
from mla_moe.config import MeshConfig, OptimizerConfig, RLConfig, ScheduleConfig, TaskConfig
from mla_moe.parallel.mesh import make_mesh
from mla_moe.rl.trainer import RLTrainer, train_rl
from mla_moe.training.console import Console
from mla_moe.training.loss_monitor import TrainingHaltedError
from mla_moe.training.metrics import read_rows
from mla_moe.training.optimizer import learning_rate
from mla_moe.training.run_context import InterruptedRun
from mla_moe.training.run_directory import PreemptionSignals, open_run_directory

TIMES = ("tokens_per_s", "sample_seconds", "step_seconds")
REWARD = '''
def short(prompt, completion, example):
    """More for fewer letters; a model that has learned nothing has something to learn."""
    assert prompt.endswith("=") and example.question in prompt
    return -len(completion) / 8


def fails(prompt, completion, example):
    raise ValueError("no")
'''


@pytest.fixture(scope="module")
def base(recipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model"
    mla_moe.save_pretrained(mla_moe.Transformer(recipe.model, rngs=nnx.Rngs(0)), path)
    return str(path)


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARD)
    return str(path)


@pytest.fixture
def start(recipe, base, rewards):
    def start(run_dir, task=None, **rl):
        task = {"function": f"{rewards}:short", "format": 0.0, "accuracy": 0.0} if task is None else task
        whole = dataclasses.replace(
            recipe,
            run_dir=str(run_dir),
            init_from=base,
            task=dataclasses.replace(recipe.task, **task),
            rl=dataclasses.replace(recipe.rl, **rl),
        )
        train_rl(whole, open_run_directory(whole), Console(enabled=True))
        return rows(run_dir)

    return start


def rows(run_dir):
    found = read_rows(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in found]


@pytest.fixture(scope="module")
def whole(recipe, base, rewards, tmp_path_factory):
    """A stage from its first step to its last, over eight devices."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    task = dataclasses.replace(recipe.task, reward_function=f"{rewards}:short", format_weight=0.0, accuracy_weight=0.0)
    settings = dataclasses.replace(recipe, run_dir=str(run_dir), init_from=base, task=task)
    train_rl(settings, open_run_directory(settings), Console(enabled=True))
    return run_dir


def test_a_stage_leaves_what_it_promises(whole, recipe):
    found = read_rows(whole / "metrics.jsonl")
    steps = [row for row in found if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    promised = {"reward", "accuracy", "format_rate", "reward/short", "response_length", "kl", "entropy", "loss", "lr"}
    promised |= {
        "clip_ratio/low",
        "clip_ratio/high",
        "sampler_logprob_diff",
        "grad_norm",
        "moe/load_max",
        "moe/dropped",
        *TIMES,
    }
    assert all(promised <= set(row) for row in steps)
    assert {row["stage"] for row in found} == {"rl"}
    evals = [row for row in found if "eval/accuracy" in row]
    assert [row["step"] for row in evals] == [0, 2, 3]
    promised = {"accuracy", "forced_accuracy", "format_rate", "response_length", "pass@1", "pass@2", "majority@2"}
    assert all({f"eval/{name}" for name in promised} <= set(row) for row in evals)
    assert len(read_rows(whole / "expert_load.jsonl")) == 3
    samples = read_rows(whole / "samples.jsonl")
    assert len(samples) == 3 * 2 * recipe.rl.eval_prompts
    assert {sample["kind"] for sample in samples} == {"greedy", "forced"}
    assert all(sample["completion"].startswith("<think>") == (sample["kind"] == "forced") for sample in samples)
    assert sorted(path.name for path in (whole / "checkpoints" / "rl").iterdir()) == ["2", "3"]
    summary = json.loads((whole / "summary.json").read_text())
    first, last = (f"{row['eval/response_length']:.1f}" for row in (evals[0], evals[-1]))
    assert summary["tokens of a sampled answer"] == f"{first} -> {last}"
    rate = learning_rate(recipe.rl.optimizer.schedule, 6)
    assert [row["lr"] for row in steps] == pytest.approx([float(rate(update)) for update in (1, 3, 5)])
    # Sampler and trainer compute the same, with the same experts.
    assert all(row["sampler_logprob_diff_max"] < 1e-4 for row in steps)
    assert all(row["kl"] > 1e-5 for row in steps)
    assert steps[0]["reward"] == pytest.approx(steps[0]["reward/short"])


def test_rewards_rise(whole, start, tmp_path):
    found = [row["reward"] for row in start(tmp_path, steps=10, prompts=8, kl=0.0, eval_samples=0) if "reward" in row]
    assert np.mean(found[-2:]) > found[0] + 0.1


@pytest.mark.thorough
def test_a_stage_that_blows_up_ends_and_leaves_the_answers(recipe, base, tmp_path):
    rl = dataclasses.replace(
        recipe.rl, eval_samples=0, optimizer=OptimizerConfig("adamw", ScheduleConfig(peak_lr=1e38, warmup_fraction=0.0))
    )
    settings = dataclasses.replace(
        recipe,
        run_dir=str(tmp_path),
        init_from=base,
        rl=rl,
        training=dataclasses.replace(recipe.training, max_skipped_steps=1),
    )
    with pytest.raises(TrainingHaltedError, match=r"not finite in \d updates in a row"):
        train_rl(settings, open_run_directory(settings), Console(enabled=True))
    (file,) = tmp_path.glob("skipped_rl_*.npz")
    with np.load(file) as rows:
        assert {"tokens", "advantage_BT", "answer_BT"} <= set(rows)


def test_what_was_learned_is_what_is_loaded(whole):
    model = mla_moe.load_pretrained(whole)
    path, _ = "checkpoints/rl/3", None
    again = mla_moe.load_pretrained(whole / path)
    np.testing.assert_array_equal(model.head[...], again.head[...])


def test_stopped_and_run_again_is_never_stopped(whole, start, tmp_path, monkeypatch):
    evaluate, learn = RLTrainer._evaluate, RLTrainer.model

    def stop(self, state):
        if int(state.step) == 2:  # two updates: before the second step
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(RLTrainer, "model", stop)
        with pytest.raises(InterruptedRun, match="stopped at step 2"):
            start(tmp_path)
    assert RLTrainer._evaluate is evaluate
    assert start(tmp_path) == rows(whole)
    assert read_rows(tmp_path / "samples.jsonl") == read_rows(whole / "samples.jsonl")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    start(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_one_device_and_eight_learn_the_same(whole, start, tmp_path, monkeypatch):
    monkeypatch.setattr("mla_moe.training.run_context.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    for one, eight in zip(start(tmp_path), rows(whole), strict=True):
        assert one.keys() == eight.keys()
        for name in ("reward", "response_length", "loss", "grad_norm", "kl", "entropy", "eval/accuracy"):
            if name in one:
                assert one[name] == pytest.approx(eight[name], rel=1e-3, abs=1e-5), (one["step"], name)


# Their mathematics is in test_objective.py; dapo is the one that samples anew.
@pytest.mark.parametrize("name", ["dapo", *(pytest.param(n, marks=pytest.mark.thorough) for n in ("dr_grpo", "gspo"))])
def test_other_objectives_run(start, rewards, tmp_path, name):
    task = {"function": f"{rewards}:short", "format": 0.0, "accuracy": float(name == "dapo")}
    how = {
        "steps": 1,
        "objective": name,
        "minibatches": 1,
        "eval_samples": 0,
        "overlong_buffer": 4,
        "routing_replay": False,
    }
    found = start(tmp_path, task, **how)
    step = next(row for row in found if "reward" in row)
    assert np.isfinite(step["loss"])
    assert step["reward"] <= step["reward/short"], "the penalty for length is in the reward"
    assert step["kl"] == pytest.approx(0, abs=1e-6), "before the first update model and reference are one"
    if name == "dapo":
        assert step["filtered_groups"] == 7 * 4, "no answer is ever right: eight rounds, of which one is taken"


def test_failures_of_a_reward_are_counted_and_told_once(start, rewards, tmp_path, capsys):
    found = start(tmp_path, task={"function": f"{rewards}:fails"}, steps=1, eval_samples=0)
    step = next(row for row in found if "reward" in row)
    assert step["verifier/raised"] == 16
    assert step["reward/fails"] == 0
    assert capsys.readouterr().out.count("task.reward_function raised: ValueError: no") == 1
    samples = read_rows(tmp_path / "samples.jsonl")
    assert all({"format", "accuracy", "reward/fails"} <= row.keys() for row in samples)


def test_a_stage_goes_on_with_its_own_questions_alone(start, tmp_path, monkeypatch):
    pytest.importorskip("math_verify", reason="pip install 'mla_moe[rl]'")
    questions = tmp_path / "questions.jsonl"

    def ask(count):
        lines = (json.dumps({"question": f"{i}+{i}", "answer": 2 * i}) for i in range(count))
        questions.write_text("\n".join(lines))
        return start(tmp_path / "run", {"name": str(questions), "options": ()}, eval_prompts=2, eval_samples=0)

    monkeypatch.setattr(PreemptionSignals, "stop", lambda self, step: step == 1)
    with pytest.raises(InterruptedRun):
        ask(60)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="other questions than the run began with"):
        ask(61)
    assert ask(60)[-1]["step"] == 3


def test_stopped_at_its_last_step_a_stage_is_whole(start, tmp_path, monkeypatch):
    monkeypatch.setattr(PreemptionSignals, "stop", lambda self, step: step == 1)
    with pytest.raises(InterruptedRun):
        start(tmp_path, steps=1, minibatches=1, eval_samples=0)
    assert "time in RL steps" in json.loads((tmp_path / "summary.json").read_text())


@pytest.mark.parametrize(
    ("rl", "task", "field"),
    [
        ({}, {"function": "nowhere:reward"}, "task.reward_function"),
        ({}, {"name": "reasoning_gim:x"}, "task.name"),
        ({"max_prompt_tokens": 2}, {}, "rl.max_prompt_tokens"),
        ({"eval_prompts": 10**5}, {"options": ("least=1", "most=1")}, "task.name"),
        ({"rows": 12}, {}, "rl.micro_batch_size"),
    ],
)
def test_what_cannot_run_is_said_before_compiling(start, tmp_path, capsys, rl, task, field):
    with pytest.raises(ConfigError) as error:
        start(tmp_path, task=task, **rl)
    assert error.value.field == field
    assert "step 0" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"group_size": 1, "steps": 1}, "rl.group_size"),
        ({"minibatches": 3}, "rl.minibatches"),
        ({"packed_length": 100}, "rl.packed_length"),
        ({"overlong_buffer": 5000}, "rl.overlong_buffer"),
        ({"temperature": 0.0}, "rl.temperature"),
    ],
)
def test_settings_that_make_no_sense(changes, field):
    with pytest.raises(ConfigError) as error:
        RLConfig(**changes)
    assert error.value.field == field


def test_a_template_has_a_place_for_the_question():
    with pytest.raises(ConfigError, match=r"task\.template"):
        TaskConfig(template="Question: ")


def test_a_model_comes_from_somewhere(recipe, tmp_path):
    settings = dataclasses.replace(recipe, run_dir=str(tmp_path), mesh=MeshConfig())
    with pytest.raises(ConfigError, match="init_from"):
        train_rl(settings, open_run_directory(settings), Console(enabled=False))
