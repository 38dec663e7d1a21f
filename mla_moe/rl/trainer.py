"""The stage of reinforcement learning: ask, sample, judge, compare, learn, and ask again (DeepSeek-R1, section 2.2)."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mla_moe.checkpoint.manager import CheckpointManager
from mla_moe.config import Recipe, TaskConfig, require
from mla_moe.nn.abstract_model import Arrays
from mla_moe.nn.transformer import Transformer
from mla_moe.rl.evaluate import evaluate
from mla_moe.rl.group_sampling import sample_groups
from mla_moe.rl.learner import Learner
from mla_moe.rl.objectives import kl_coefficient
from mla_moe.rl.rewards import Reward
from mla_moe.rl.rollout import Rollout
from mla_moe.rl.tasks.task import open_task
from mla_moe.training.console import Console, duration
from mla_moe.training.initialization import loaded_state, model_before
from mla_moe.training.loss_monitor import LossMonitor
from mla_moe.training.metrics import MetricsWriter, NullWriter, read_rows, seconds_in_steps
from mla_moe.training.optimizer import learning_rate, make_optimizer
from mla_moe.training.run_context import InterruptedRun, RunContext
from mla_moe.training.run_directory import PreemptionSignals, add_summary
from mla_moe.training.step import TrainState, abstract_state

STAGE = "rl"


class RLState(NamedTuple):
    """A `TrainState`, and what the divergence is measured from."""

    step: jax.Array
    """Updates done."""
    params: Arrays
    biases: Arrays
    optimizer: optax.OptState
    reference: Arrays
    """Parameters of an earlier time; empty where the divergence weighs nothing."""

    @property
    def training(self) -> TrainState:
        return TrainState(self.step, self.params, self.biases, self.optimizer)


class PromptPosition:
    """How far the training questions have been asked."""

    def __init__(self, task: TaskConfig, fingerprint: int):
        """`fingerprint` tells the questions from others."""
        self._task, self._fingerprint, self.next = task, fingerprint, 0

    def states(self) -> Mapping[int, str]:
        return {0: json.dumps({"next": self.next, "questions": self._fingerprint})}

    def restore(self, read: Callable[[int], str]) -> None:
        """Raises `ConfigError` where the questions are others than the checkpoint's."""
        state = json.loads(read(0))
        fix = "holds other questions than the run began with; put them back, or begin another run"
        require(state["questions"] == self._fingerprint, "task.name", self._task.name, fix)
        self.next = state["next"]


def train_rl(recipe: Recipe, run_dir: Path, console: Console) -> None:
    """Learn to `recipe.rl.steps`, from the newest checkpoint if there is one, else from this run's pretraining or from
    `init_from`.

    Raises `ConfigError` before anything compiles, and `Interrupted` after a signal, when the state is saved.
    """
    setup = RunContext.of(recipe, run_dir, console)
    task = open_task(recipe.task)
    reward = Reward(recipe.task, task, tell=console.say)
    with reward, CheckpointManager(run_dir, STAGE, recipe.checkpoint) as checkpoints:
        rollout = Rollout(recipe.rl, recipe.task.template, task, reward, setup.language)
        asked = PromptPosition(recipe.task, task.fingerprint)
        stage, start = RLTrainer(setup, rollout), checkpoints.latest
        if start == recipe.rl.steps:
            console.say(f"{STAGE}: all {start} steps are done already")
            return
        rollout.questions("train", 0, 1)  # here, so that what is wrong with them is said before anything compiles
        rollout.questions(recipe.rl.eval_split, 0, recipe.rl.eval_prompts)
        console.startup_table(f"{recipe.run_dir}: {STAGE}", stage.describe())
        if start is None:
            state = stage.first_state()
        else:
            state, start = checkpoints.restore(stage.abstract_state(), asked, console.say), checkpoints.latest
            console.say(f"resumed from the checkpoint of step {start}")
        stage.train(state, asked, checkpoints, start)


@dataclass(frozen=True)
class RLTrainer:
    """What the parts of the stage share."""

    setup: RunContext
    rollout: Rollout

    @cached_property
    def learner(self) -> Learner:
        rl = self.setup.recipe.rl
        tx = make_optimizer(rl.optimizer, rl.steps * rl.minibatches, self.setup.abstract_model)
        return Learner(self.setup, tx)

    def describe(self) -> list[tuple[str, str]]:
        """The start-up table."""
        task, rl = self.setup.recipe.task, self.setup.recipe.rl
        divergence = f"{kl_coefficient(rl):g} x divergence" if kl_coefficient(rl) else "no divergence"
        return [
            *self.setup.describe(abstract_state(self.setup.abstract_model, self.learner.tx, self.setup.mesh)),
            ("task", " ".join((task.name, *task.options))),
            ("objective", f"{rl.objective}, {divergence}, {rl.minibatches} updates a step"),
            (
                "answers a step",
                f"{rl.prompts_per_step * rl.group_size}: {rl.group_size} to each of {rl.prompts_per_step} questions",
            ),
        ]

    def abstract_state(self) -> RLState:
        state = abstract_state(self.setup.abstract_model, self.learner.tx, self.setup.mesh)
        return RLState(*state, reference=state.params if kl_coefficient(self.setup.recipe.rl) else {})

    def first_state(self) -> RLState:
        setup, recipe = self.setup, self.setup.recipe
        path = model_before(STAGE, recipe, setup.run_dir)
        state = loaded_state(path, recipe, setup.abstract_model, self.learner.tx, setup.mesh)
        setup.console.say(f"started from {path}")
        return RLState(*state, reference=_copy(state.params) if kl_coefficient(recipe.rl) else {})

    def model(self, state: RLState) -> Transformer:
        return self.setup.abstract_model.merge(state.params | state.biases)

    def train(self, state: RLState, asked: PromptPosition, checkpoints: CheckpointManager, start: int | None) -> None:
        """Step to the end."""
        setup, rl = self.setup, self.setup.recipe.rl
        first, last = start or 0, rl.steps
        rate = learning_rate(rl.optimizer.schedule, rl.steps * rl.minibatches)
        with (
            PreemptionSignals() as signals,
            MetricsWriter(setup.run_dir, start, STAGE) if jax.process_index() == 0 else NullWriter() as writer,
            setup.console.progress(STAGE, last, first) as progress,
        ):
            if start is None:
                self._evaluate(0, state, writer)
            training = replace(
                setup.recipe.training, loss_spike_threshold=None
            )  # a loss of advantages has no level to leap from
            guard = LossMonitor(training, setup.run_dir, STAGE, None)
            for number in range(first + 1, last + 1):
                began = time.monotonic()
                self.rollout.load_weights(self.model(state))
                groups = sample_groups(self.rollout, rl, setup.recipe.seed, asked.next, progress.note)
                asked.next = groups.next_question
                self.rollout.drop_weights()
                sampled = time.monotonic()
                updated, learned = self.learner.learn(state.training, state.reference, groups)
                state = RLState(*updated, reference=state.reference)
                if kl_coefficient(rl) and rl.ref_sync_steps and number % rl.ref_sync_steps == 0:
                    state = state._replace(reference=_copy(state.params))
                step_seconds = time.monotonic() - began
                row = groups.metrics() | learned.metrics | {
                    "lr": float(np.asarray(rate(number * rl.minibatches - 1))),
                    "tokens_per_s": groups.tokens / step_seconds,
                    "sample_seconds": sampled - began,
                    "step_seconds": step_seconds,
                }  # fmt: skip
                writer.write(number, row)
                if learned.load_LE.size:
                    writer.write_load(number, learned.load_LE)
                progress.update(number, row)
                guard.see(number, row, partial(self.learner.rows, groups))
                is_last = number == last
                if is_last or (rl.eval_every and number % rl.eval_every == 0):
                    self._evaluate(number, state, writer)
                if is_last or number % setup.recipe.checkpoint.every == 0 or signals.stop(number):
                    checkpoints.save(number, state, asked, setup.abstract_model)
                if is_last:
                    self._finish()
                if signals.stop(number):
                    raise InterruptedRun(f"stopped at step {number} by {signals.name}; state saved")

    def _evaluate(self, number: int, state: RLState, writer) -> None:
        rl = self.setup.recipe.rl
        self.rollout.load_weights(self.model(state))
        found = evaluate(self.rollout, rl.eval_split, rl.eval_prompts, rl.eval_samples, self.setup.recipe.seed + 1)
        metrics = found.metrics()
        writer.write(number, metrics)
        writer.append_samples(found.rows(number))
        texts = (f"{name.strip()} {metrics[key]:{form}}" for name, key, form in _SHOWN if key in metrics)
        self.setup.console.say(f"step {number}: {', '.join(texts)}")

    def _finish(self) -> None:
        """A summary for the report and the terminal: held-out questions before and after."""
        if jax.process_index() > 0:
            return
        rows = read_rows(self.setup.run_dir / "metrics.jsonl", STAGE)
        found = [row for row in rows if _SHOWN[0][1] in row]
        first, last = found[0], found[-1]
        table = {name: f"{first[key]:{form}} -> {last[key]:{form}}" for name, key, form in _SHOWN if key in first}
        table |= {"time in RL steps": duration(seconds_in_steps(rows, 1))}
        add_summary(self.setup.run_dir, table)
        self.setup.console.result_table("held-out questions, before and after", list(table.items()))


_SHOWN = (
    ("right answers", "eval/accuracy", ".1%"),
    ("  opened with <think>", "eval/forced_accuracy", ".1%"),
    ("right form", "eval/format_rate", ".1%"),
    ("tokens of a sampled answer", "eval/response_length", ".1f"),
)


@jax.jit
def _copy(params: Arrays) -> Arrays:
    return jax.tree.map(jnp.copy, params)
