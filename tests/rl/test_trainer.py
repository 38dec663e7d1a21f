import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

import mla_moe
from mla_moe import ConfigError
from mla_moe.checkpoint.reader import open_checkpoint
from mla_moe.config import LoRAConfig, MeshConfig, OptimizerConfig, RLConfig, ScheduleConfig, TaskConfig
from mla_moe.parallel.mesh import make_mesh
from mla_moe.rl.trainer import RLTrainer, train_rl
from mla_moe.training.console import Console
from mla_moe.training.errors import InterruptedRun, TrainingHaltedError
from mla_moe.training.metrics import read_rows
from mla_moe.training.optimizer import learning_rate
from mla_moe.training.preemption import PreemptionSignals
from mla_moe.training.run_directory import open_run_directory

TIMES = ("tokens_per_s", "sample_seconds", "step_seconds")
REWARD = '''
def short(prompt, completion, example):
    """Higher for fewer letters: an untrained model can improve."""
    assert prompt.endswith("=") and example.question in prompt
    return -len(completion) / 8


def fails(prompt, completion, example):
    raise ValueError("no")
'''


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARD)
    return str(path)


@pytest.fixture
def start(recipe, base, rewards):
    def start(run_dir, task=None, **rl):
        task = (
            {"reward_functions": (f"{rewards}:short",), "format_weight": 0.0, "accuracy_weight": 0.0}
            if task is None
            else task
        )
        settings = dataclasses.replace(
            recipe,
            run_dir=str(run_dir),
            init_from=base,
            task=dataclasses.replace(recipe.task, **task),
            rl=dataclasses.replace(recipe.rl, **rl),
        )
        train_rl(settings, open_run_directory(settings), Console(enabled=True))
        return rows(run_dir)

    return start


def rows(run_dir):
    found = read_rows(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in found]


@pytest.fixture(scope="module")
def finished_run(recipe, base, rewards, tmp_path_factory):
    """The directory of an uninterrupted run on eight devices."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    task = dataclasses.replace(
        recipe.task, reward_functions=(f"{rewards}:short",), format_weight=0.0, accuracy_weight=0.0
    )
    settings = dataclasses.replace(recipe, run_dir=str(run_dir), init_from=base, task=task)
    train_rl(settings, open_run_directory(settings), Console(enabled=True))
    return run_dir


def test_run_writes_its_documented_files(finished_run, recipe):
    found = read_rows(finished_run / "metrics.jsonl")
    steps = [row for row in found if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    documented = {"reward", "accuracy", "format_rate", "reward/short", "response_length", "kl", "entropy", "loss", "lr"}
    documented |= {
        "clip_ratio/low",
        "clip_ratio/high",
        "sampler_logprob_diff",
        "grad_norm",
        "moe/load_max",
        "moe/dropped",
        *TIMES,
    }
    assert all(documented <= set(row) for row in steps)
    assert {row["stage"] for row in found} == {"rl"}
    evals = [row for row in found if "eval/accuracy" in row]
    assert [row["step"] for row in evals] == [0, 2, 3]
    documented = {"accuracy", "forced_accuracy", "format_rate", "response_length", "pass@1", "pass@2", "majority@2"}
    assert all({f"eval/{name}" for name in documented} <= set(row) for row in evals)
    assert len(read_rows(finished_run / "expert_load.jsonl")) == 3
    samples = read_rows(finished_run / "samples.jsonl")
    assert len(samples) == 3 * 2 * recipe.rl.eval_prompts
    assert {sample["kind"] for sample in samples} == {"greedy", "forced"}
    assert all(sample["completion"].startswith("<think>") == (sample["kind"] == "forced") for sample in samples)
    assert sorted(path.name for path in (finished_run / "checkpoints" / "rl").iterdir()) == ["2", "3"]
    summary = json.loads((finished_run / "summary.json").read_text())
    first, last = (f"{row['eval/response_length']:.1f}" for row in (evals[0], evals[-1]))
    assert summary["tokens of a sampled completion"] == f"{first} -> {last}"
    rate = learning_rate(recipe.rl.optimizer.schedule, 6)
    assert [row["lr"] for row in steps] == pytest.approx([float(rate(update)) for update in (1, 3, 5)])
    # Sampler and trainer compute the same log-probabilities, with the same experts.
    assert all(row["sampler_logprob_diff_max"] < 1e-4 for row in steps)
    assert all(row["kl"] > 1e-5 for row in steps)
    assert steps[0]["reward"] == pytest.approx(steps[0]["reward/short"])


@pytest.mark.slow
def test_reward_increases(finished_run, start, tmp_path):
    found = [
        row["reward"]
        for row in start(tmp_path, steps=10, prompts_per_step=8, kl_coef=0.0, eval_samples=0)
        if "reward" in row
    ]
    assert np.mean(found[-2:]) > found[0] + 0.1


@pytest.mark.thorough
def test_non_finite_updates_halt_the_run_and_save_the_batch(recipe, base, tmp_path):
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
        assert {"tokens", "advantage_BT", "completion_BT"} <= set(rows)


def test_newest_checkpoint_is_loaded(finished_run):
    model = mla_moe.load_pretrained(finished_run)
    again = mla_moe.load_pretrained(finished_run / "checkpoints/rl/3")
    np.testing.assert_array_equal(model.head[...], again.head[...])


@pytest.mark.slow
def test_interrupted_run_resumes_with_the_same_rows(finished_run, start, tmp_path, monkeypatch):
    model = RLTrainer.model

    def stop(self, state):
        if int(state.step) == 2:  # updates; this is before the second step
            os.kill(os.getpid(), signal.SIGTERM)
        return model(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(RLTrainer, "model", stop)
        with pytest.raises(InterruptedRun, match="stopped at step 2"):
            start(tmp_path)
    assert start(tmp_path) == rows(finished_run)
    assert read_rows(tmp_path / "samples.jsonl") == read_rows(finished_run / "samples.jsonl")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    start(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_one_device_and_eight_have_the_same_metrics(finished_run, start, tmp_path, monkeypatch):
    monkeypatch.setattr("mla_moe.training.run_context.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    for one, eight in zip(start(tmp_path), rows(finished_run), strict=True):
        assert one.keys() == eight.keys()
        for name in ("reward", "response_length", "loss", "grad_norm", "kl", "entropy", "eval/accuracy"):
            if name in one:
                assert one[name] == pytest.approx(eight[name], rel=1e-3, abs=1e-5), (one["step"], name)


# test_objectives.py tests their formulas; only dapo samples again (dynamic sampling).
@pytest.mark.slow
@pytest.mark.parametrize("name", ["dapo", *(pytest.param(n, marks=pytest.mark.thorough) for n in ("dr_grpo", "gspo"))])
def test_other_objectives_run(start, rewards, tmp_path, name):
    task = {"reward_functions": (f"{rewards}:short",), "format_weight": 0.0, "accuracy_weight": float(name == "dapo")}
    rl = {
        "steps": 1,
        "objective": name,
        "minibatches": 1,
        "eval_samples": 0,
        "overlong_buffer": 4,
        "routing_replay": False,
    }
    found = start(tmp_path, task, **rl)
    step = next(row for row in found if "reward" in row)
    assert np.isfinite(step["loss"])
    assert step["reward"] <= step["reward/short"], "the reward includes the overlong penalty"
    assert step["kl"] == pytest.approx(0, abs=1e-6), "before the first update the policy is the reference policy"
    if name == "dapo":
        assert step["filtered_groups"] == 7 * 4, "no completion is correct: one of eight rounds is kept"


@pytest.mark.slow
@pytest.mark.slow
def test_adapters_alone_are_trained_and_saved(recipe, base, rewards, tmp_path, monkeypatch):
    """With a KL to the starting policy, which at B = 0 is 0. The frozen model is not in the checkpoint."""
    monkeypatch.setattr("mla_moe.training.run_context.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    task = {"reward_functions": (f"{rewards}:short",), "format_weight": 0.0, "accuracy_weight": 0.0}
    settings = dataclasses.replace(
        recipe, run_dir=str(tmp_path / "run"), init_from=base, task=dataclasses.replace(recipe.task, **task),
        lora=LoRAConfig(rank=4, targets=("attention", "experts")), rl=dataclasses.replace(recipe.rl, steps=2),
    )  # fmt: skip
    train_rl(settings, open_run_directory(settings), Console(enabled=False))
    steps = [row for row in rows(tmp_path / "run") if "kl" in row]
    assert steps[0]["kl"] < steps[1]["kl"]
    assert steps[0]["grad_norm"] > 0
    source = open_checkpoint(tmp_path / "run")
    assert all("/lora/" in path or path.endswith("/router/bias") for path in source.paths)
    assert np.abs(source.array("moe_layers/moe/lora/down/b")).max() > 0


def test_errors_of_a_reward_function_are_counted_and_printed_once(start, rewards, tmp_path, capsys):
    found = start(tmp_path, task={"reward_functions": (f"{rewards}:fails",)}, steps=1, eval_samples=0)
    step = next(row for row in found if "reward" in row)
    assert step["verifier/raised"] == 16
    assert step["reward/fails"] == 0
    assert capsys.readouterr().out.count("task.reward_functions fails raised: ValueError: no") == 1
    samples = read_rows(tmp_path / "samples.jsonl")
    assert all({"format", "accuracy", "reward/fails"} <= row.keys() for row in samples)


def test_resume_with_other_prompts_is_an_error(start, tmp_path, monkeypatch):
    pytest.importorskip("math_verify", reason="pip install 'mla_moe[rl]'")
    questions = tmp_path / "questions.jsonl"

    def train_on(count):
        lines = (json.dumps({"question": f"{i}+{i}", "answer": 2 * i}) for i in range(count))
        questions.write_text("\n".join(lines))
        return start(tmp_path / "run", {"name": str(questions), "options": ()}, eval_prompts=2, eval_samples=0)

    monkeypatch.setattr(PreemptionSignals, "stop", lambda self, step: step == 1)
    with pytest.raises(InterruptedRun):
        train_on(60)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="has other prompts than at the start of the run"):
        train_on(61)
    assert train_on(60)[-1]["step"] == 3


@pytest.mark.slow
def test_run_interrupted_at_its_last_step_is_complete(start, tmp_path, monkeypatch):
    monkeypatch.setattr(PreemptionSignals, "stop", lambda self, step: step == 1)
    with pytest.raises(InterruptedRun):
        start(tmp_path, steps=1, minibatches=1, eval_samples=0)
    assert "time in RL steps" in json.loads((tmp_path / "summary.json").read_text())


@pytest.mark.parametrize(
    ("rl", "task", "field"),
    [
        ({}, {"reward_functions": ("nowhere:reward",)}, "task.reward_functions"),
        ({}, {"name": "reasoning_gim:x"}, "task.name"),
        ({"max_prompt_tokens": 2}, {}, "rl.max_prompt_tokens"),
        ({"eval_prompts": 10**5}, {"options": ("least=1", "most=1")}, "task.name"),
        ({"micro_batch_size": 12}, {}, "rl.micro_batch_size"),
    ],
)
def test_invalid_recipe_is_an_error_before_compiling(start, tmp_path, capsys, rl, task, field):
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
def test_invalid_values_name_their_field(changes, field):
    with pytest.raises(ConfigError) as error:
        RLConfig(**changes)
    assert error.value.field == field


def test_template_without_question_is_an_error():
    with pytest.raises(ConfigError, match=r"task\.template"):
        TaskConfig(template="Question: ")


def test_run_without_a_starting_checkpoint_is_an_error(recipe, tmp_path):
    settings = dataclasses.replace(recipe, run_dir=str(tmp_path), mesh=MeshConfig())
    with pytest.raises(ConfigError, match="init_from"):
        train_rl(settings, open_run_directory(settings), Console(enabled=False))
