"""The training loop that all stages share: restore or initialize, step, log, evaluate, save, and stop on a signal.

A stage (pretraining, SFT, rejection sampling, RL) is a subclass of `Trainer` that provides batches and a step.
"""

import abc
import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import jax
import numpy as np
import optax

from mla_moe.checkpoint.base_reference import BaseReference
from mla_moe.checkpoint.bucket_run import synchronize
from mla_moe.checkpoint.data_position import DataPosition, FixedPosition
from mla_moe.checkpoint.local_checkpoints import LocalCheckpoints
from mla_moe.checkpoint.manager import CheckpointManager
from mla_moe.config import OptimizerConfig, TrainingConfig, require
from mla_moe.parallel.sharding import bytes_per_device
from mla_moe.training.checkpoint_schedule import CheckpointSchedule
from mla_moe.training.console import Progress
from mla_moe.training.errors import InterruptedRun, LossSpikeError, TrainingHaltedError
from mla_moe.training.loss_monitor import LossMonitor
from mla_moe.training.metrics import MetricsWriter, NullWriter, read_rows, seconds_in_steps
from mla_moe.training.optimizer import learning_rate, make_optimizer
from mla_moe.training.preemption import PreemptionSignals
from mla_moe.training.profiling import StepTracer, explain_out_of_memory
from mla_moe.training.run_context import RunContext
from mla_moe.training.run_directory import later_stage_has_checkpoint, rewind
from mla_moe.training.step import TrainState, abstract_state
from mla_moe.training.trackers import Trackers
from mla_moe.training.watchdog import Watchdog

MAX_REWINDS = 3
"""Rewinds to the same checkpoint after loss spikes, before the run halts."""

State = TypeVar("State", bound=NamedTuple)
BatchT = TypeVar("BatchT")
Writer = MetricsWriter | NullWriter
"""`NullWriter` in all processes but the first."""


class Trainer(abc.ABC, Generic[State, BatchT]):
    """One stage of a run. `train` is the loop; the other methods are what a stage provides."""

    metrics_one_step_late: ClassVar[bool] = True
    """Fetch the metrics of a step after the next step is dispatched, so that the device does not wait for the host."""
    evaluates_first: bool = False
    """Also evaluate before the first step, as step 0."""

    start: str | Path
    """The checkpoint that the stage starts from; of stages that can train adapters of its model."""
    updates_per_step: int = 1
    """Optimizer updates per step. A stage with others sets them before `super().__init__()`, which reads them."""

    def __init__(self, name: str, context: RunContext, training: TrainingConfig, optimizer: OptimizerConfig):
        """`name` is the stage's name in metrics and checkpoints. `training` gives steps, logging and evaluation."""
        self.name, self.context, self.training, self._optimizer = name, context, training, optimizer
        self._base: BaseReference | None = None
        self._local: LocalCheckpoints | None = None
        self.expert_load_every = max(1, training.steps // 200)
        """Steps between rows of `expert_load.jsonl`: a heat map of at most 400 rows for the whole run."""
        self.profile_directory = context.run_dir / "profile" / name
        self._schedule = learning_rate(optimizer.schedule, training.steps * self.updates_per_step)

    @cached_property
    def abstract_state(self) -> Any:
        """Shapes, dtypes and shardings of the state, into which a checkpoint is restored: by default a `TrainState`."""
        return self.abstract_train_state

    @abc.abstractmethod
    def initial_state(self, position: DataPosition) -> tuple[State, int | None]:
        """The state if the stage has no checkpoint, and its step if it resumes that of another run, whose `position`
        in the data is then restored too."""

    @property
    @abc.abstractmethod
    def position(self) -> DataPosition:
        """The position in the data, which checkpoints store. The first access opens the data."""

    @abc.abstractmethod
    def next_batch(self, state: State, status: Callable[[str], None]) -> BatchT:
        """The batch of the next step. `status` displays progress within a long step."""

    @abc.abstractmethod
    def step(self, number: int, state: State, batch: BatchT) -> tuple[State, dict[str, Any]]:
        """Step `number`, counted from 1. Donates the state. The metrics include `load_LE`, tokens per expert, which is
        empty for a dense model."""

    @abc.abstractmethod
    def row(self, number: int, values: dict[str, Any], batch: BatchT, seconds: float) -> dict[str, float]:
        """A row of `metrics.jsonl` from the metrics of a step, fetched to the host, and the step's duration."""

    @abc.abstractmethod
    def batch_arrays(self, batch: BatchT) -> Mapping[str, np.ndarray]:
        """The arrays to save of a batch whose update was not finite."""

    @abc.abstractmethod
    def describe(self) -> list[tuple[str, str]]:
        """The stage's rows of the start-up table. Raises `ConfigError` for missing data, before anything compiles."""

    @abc.abstractmethod
    def finish(self, state: State, scores: Mapping[str, float], metrics: "StepMetrics", writer: Writer) -> None:
        """Write the results, given the scores of the last evaluation."""

    def evaluate(self, number: int, state: State, writer: Writer) -> dict[str, float]:
        """Scores after step `number`, for a row of `metrics.jsonl`: every `eval_every` steps and at the end."""
        return {}

    def prepare(self) -> None:
        """Compile the step. Called once, after the state is restored."""

    def close(self) -> None:
        """Close the data."""

    def memory_per_device(self) -> dict[str, float]:
        """Bytes of a device that the stage needs, as far as they are known, by the names of `mla-moe plan`."""
        parts = self.abstract_state._asdict()
        named = {"parameters": [parts.pop("params"), parts.pop("biases")]} | parts
        return {name: size for name, part in named.items() if (size := bytes_per_device(part)) and name != "step"}

    @cached_property
    def tx(self) -> optax.GradientTransformation:
        updates = self.training.steps * self.updates_per_step
        return make_optimizer(self._optimizer, updates, self.context.abstract_model)

    @cached_property
    def abstract_train_state(self) -> TrainState:
        return abstract_state(self.context.abstract_model, self.tx, self.context.mesh)

    def learning_rate(self, number: int) -> float:
        """The learning rate of the last update of a step."""
        return float(np.asarray(self._schedule(number * self.updates_per_step - 1)))

    @property
    def seconds(self) -> float:
        """Duration of all steps of the stage, those before a restart included."""
        rows = read_rows(self.context.run_dir / "metrics.jsonl", self.name)
        return seconds_in_steps(rows, self.training.log_every)

    def train(self) -> None:
        """Train to the last step, from the newest checkpoint if there is one.

        After a loss spike it rewinds to the newest checkpoint and skips the batches since. Raises `ConfigError` before
        anything compiles, `InterruptedRun` after a signal, when the state is saved, `TrainingHaltedError` for repeated
        non-finite updates or loss spikes and where the memory of a device does not suffice, and `CheckpointSaveError`.
        """
        context, log = self.context, self.context.console.print
        recipe_path = context.run_dir / "recipe.json"
        with (
            explain_out_of_memory(self.profile_directory, recipe_path, self.memory_per_device),
            CheckpointManager(context.run_dir, self.name, context.recipe.checkpoint) as checkpoints,
        ):
            is_needed = not later_stage_has_checkpoint(context.run_dir, self.name)
            if is_needed and context.recipe.resume_step is not None:
                rewind(checkpoints, context.run_dir, context.recipe.resume_step, log)
            done, section = checkpoints.latest or 0, "training" if self.name == "pretrain" else self.name
            fix = f"{done} are done; set at least as many, or resume from an earlier checkpoint with --resume-step"
            require(done <= self.training.steps or not is_needed, f"{section}.steps", self.training.steps, fix)
            if checkpoints.latest == self.training.steps and is_needed:  # restored to see that it is not damaged
                checkpoints.restore(self.abstract_state, FixedPosition(), log)
            if checkpoints.latest == self.training.steps:
                log(f"{self.name}: all {self.training.steps} steps are done already")
                return
            if context.recipe.checkpoint.local_dir is not None:
                self._local = LocalCheckpoints(context.run_dir, self.name, context.recipe, self.abstract_state)
            position = self.position
            with contextlib.closing(self), self._local or contextlib.nullcontext():
                rows = self.describe()
                title = f"{context.recipe.run_dir}: {self.name}"
                context.console.startup_table(title, [*context.describe(self.abstract_train_state), *rows])
                state, start = self._restore(checkpoints, position)
                self.prepare()
                rewound, rewinds = 0, Counter()
                while True:
                    try:
                        return self._train(state, checkpoints, start, rewound)
                    except LossSpikeError as spike:
                        log(f"{spike}: rewinding to the newest checkpoint and skipping the batches since")
                        synchronize(context.run_dir, "rewinding")  # all read the losses before it
                        if self._local:  # its copies may be from after the spike began
                            self._local.remove()
                        state, start = self._restore(checkpoints, FixedPosition())
                        rewound = spike.step - (start or 0)
                        rewinds[start] += 1
                        if rewinds[start] > MAX_REWINDS:
                            message = f"{spike}, again after {MAX_REWINDS} rewinds to step {start or 0}"
                            raise TrainingHaltedError(message) from None

    def _restore(self, checkpoints: CheckpointManager, position: DataPosition) -> tuple[State, int | None]:
        """The state of the newest checkpoint, or the initial state, and its step; None at the start of a stage."""
        abstract, step, log = self.abstract_state, checkpoints.latest, self.context.console.print
        if self._local and (found := self._local.restore(abstract, position, step or 0, log)):
            state, step, self._base = found
            log(f"resumed from the emergency checkpoint of step {step}")
            return self._with_base(state), step
        if step is None:
            initial: tuple[Any, int | None] = self.initial_state(position)
            state, start = initial
            if abstract.frozen:  # with LoRA
                self._base = BaseReference.create(self.start, state.frozen)
            return state, start
        state = checkpoints.restore(abstract, position, log)
        if abstract.frozen:
            self._base = checkpoints.base
        log(f"resumed from the checkpoint of step {checkpoints.latest}")
        return self._with_base(state), checkpoints.latest

    def _with_base(self, state: Any) -> Any:
        """The state with the frozen parameters of its base, if it has one."""
        if self._base is None:
            return state
        context = self.context
        return state._replace(frozen=self._base.load(context.run_dir, context.abstract_model, context.mesh))

    def _writer(self, start: int | None) -> Writer:
        if jax.process_index():
            return NullWriter()
        recipe, run_dir = self.context.recipe, self.context.run_dir
        return MetricsWriter(run_dir, start, self.name, Trackers(recipe, run_dir))

    def _train(self, state: State, checkpoints: CheckpointManager, start: int | None, rewound: int) -> None:
        """The steps after `start`."""
        context, training = self.context, self.training
        first, last = start or 0, training.steps
        stacks = f"stacks_{self.name}.{jax.process_index()}.txt"
        with (
            PreemptionSignals() as signals,
            self._writer(start) as writer,
            context.console.progress(self.name, last, first) as progress,
            StepTracer(context.recipe.profile, self.profile_directory, context.console.print) as tracer,
            Watchdog(training.max_step_minutes, context.run_dir / stacks) as watchdog,
        ):
            if rewound:
                writer.write(first + 1, {"rewound": rewound})
            if start is None and self.evaluates_first:
                watchdog.progress(f"the evaluation before step 1 of {self.name}")
                writer.write(0, self.evaluate(0, state, writer))
            monitor = LossMonitor(training, context.run_dir, self.name, start)
            metrics = StepMetrics(self, writer, progress, monitor)
            schedule = CheckpointSchedule(context.recipe.checkpoint, first)
            for number in range(first + 1, last + 1):
                watchdog.progress(f"step {number} of {self.name}")
                with tracer.step(number):
                    batch = self.next_batch(state, progress.status)
                    state, values = self.step(number, state, batch)
                metrics.record(number, values, batch)
                if not self.metrics_one_step_late:
                    metrics.flush()
                tracer.stop_after(number, metrics.flush)
                is_last = number == last
                if is_last or (training.eval_every and number % training.eval_every == 0):
                    metrics.flush()
                    watchdog.progress(f"the evaluation after step {number} of {self.name}")
                    scores = self.evaluate(number, state, writer)
                    if scores:
                        writer.write(number, scores)
                    metrics.restart_clock()
                if is_last:
                    self.finish(state, scores, metrics, writer)
                is_due, is_stopped = schedule.is_due(number), signals.stop(number)
                if self._local and self._local.is_due(number) and not (is_last or is_due or is_stopped):
                    metrics.flush()
                    watchdog.progress(f"the emergency checkpoint of step {number} of {self.name}")
                    self._local.save(number, state, self.position, self._base)
                    metrics.restart_clock()
                if is_last or is_due or is_stopped:
                    metrics.flush()
                    watchdog.progress(f"the checkpoint of step {number} of {self.name}")
                    checkpoints.save(number, state, self.position, context.abstract_model, self._base)
                    schedule.saved(number)
                    metrics.restart_clock()
                    is_stopped = signals.stop(number)  # also by a signal during the save
                if is_last or is_stopped:  # nothing else runs beside this save: wait here, where the watchdog sees it
                    checkpoints.wait_until_saved()
                if is_last and self._local:
                    self._local.remove()
                if is_stopped:
                    raise InterruptedRun(f"stopped at step {number} by {signals.name}; state saved")


class StepMetrics:
    """Logs each step's metrics, one step late: `record` logs the step before, `flush` the newest."""

    def __init__(self, trainer: "Trainer[Any, Any]", writer: Writer, progress: Progress, monitor: LossMonitor):
        self._trainer, self._writer, self._progress, self._monitor = trainer, writer, progress, monitor
        self._pending: tuple[int, dict[str, Any], Any] | None = None
        self._max_load_ratios: list[float] = []
        self.loss = math.nan
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start to time the next step now, after an evaluation or a save."""
        self._since = time.monotonic()

    def record(self, number: int, metrics: dict[str, Any], batch: Any) -> None:
        self.flush()
        self._pending = number, metrics, batch

    def flush(self) -> None:
        """Fetch the pending metrics, which waits for their step, and log them. Raises as `LossMonitor.check` does."""
        if self._pending is None:
            return
        number, metrics, batch = self._pending
        self._pending = None
        trainer, training = self._trainer, self._trainer.training
        values = dict(zip(metrics, jax.device_get(list(metrics.values())), strict=True))  # keeps the order of keys
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        load_LE = values["load_LE"]
        row = trainer.row(number, values, batch, seconds)
        self.loss = row["loss"]
        if "moe/load_max" in row:
            self._max_load_ratios.append(row["moe/load_max"])
        if number % training.log_every == 0 or number == training.steps:
            self._writer.write(number, row)
        if load_LE.size and number % trainer.expert_load_every == 0:
            self._writer.write_load(number, load_LE)
        self._progress.update(number, row)
        self._monitor.check(number, row, lambda: trainer.batch_arrays(batch))

    @property
    def max_load_ratio_last_tenth(self) -> float:
        """Mean max load ratio over the last tenth of the steps."""
        tail = self._max_load_ratios[-max(self._trainer.training.steps // 10, 1) :]
        return float(np.mean(tail)) if tail else math.nan
