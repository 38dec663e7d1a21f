"""The way through a stage that trains on batches: restore or begin, step, measure, save, and stop when asked to."""

import abc
import contextlib
import time
from collections import Counter
from collections.abc import Mapping
from functools import cached_property

import grain
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from mla_moe.checkpoint.manager import CheckpointManager, DataPosition, FixedPosition
from mla_moe.config import OptimizerConfig, TrainingConfig
from mla_moe.data import Batch, Batches, process_rows, stream_count
from mla_moe.parallel.mesh import BATCH_SPEC
from mla_moe.training.console import bytes_
from mla_moe.training.loss_monitor import LossMonitor, LossSpikeError, TrainingHaltedError
from mla_moe.training.metrics import MetricsWriter, NullWriter, read_rows, seconds_in_steps
from mla_moe.training.optimizer import learning_rate, make_optimizer
from mla_moe.training.run_context import InterruptedRun, RunContext
from mla_moe.training.run_directory import PreemptionSignals
from mla_moe.training.step import TrainState, abstract_state, make_train_step
from mla_moe.training.step_metrics import StepMetrics

MAX_REWINDS = 3
"""Times that a stage goes back to one checkpoint."""


class Trainer(abc.ABC):
    """What every such stage has. A kind of stage says where it begins, what it reads, how it is measured, and what it
    leaves behind."""

    fields: tuple[str, ...] = ("tokens", "targets", "segment_ids", "positions")
    """Arrays of a batch."""

    def __init__(self, name: str, setup: RunContext, training: TrainingConfig, optimizer: OptimizerConfig):
        """`name` is that of its rows and checkpoints. `training` and `optimizer` are the numbers it trains with."""
        self.name, self.setup, self.training, self._optimizer = name, setup, training, optimizer

    @abc.abstractmethod
    def first_state(self, place: DataPosition) -> TrainState:
        """Where there is no checkpoint yet. May move the data to their place."""

    @abc.abstractmethod
    def stream(self, *, batch_size: int, shard: int, shards: int) -> grain.DatasetIterator[Batch]:
        """One of `shards` streams of the batches, `batch_size` rows each."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> int:
        """Tells the files that are read from others."""

    @property
    @abc.abstractmethod
    def documents(self) -> int:
        """How many documents, or pairs, there are."""

    @abc.abstractmethod
    def describe(self) -> list[tuple[str, str]]:
        """The start-up table's own rows. What is missing is missed here, before anything compiles."""

    @abc.abstractmethod
    def finish(self, state: TrainState, scores: Mapping[str, float], meter: StepMetrics, writer) -> None:
        """What is left at the end, given the last evaluation's scores."""

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Rows of `metrics.jsonl`, at the end and every `eval_every` steps."""
        return {}

    @property
    def seconds(self) -> float:
        """What the steps took, of earlier starts too."""
        rows = read_rows(self.setup.run_dir / "metrics.jsonl", self.name)
        return seconds_in_steps(rows, self.training.log_every)

    @cached_property
    def tx(self) -> optax.GradientTransformation:
        return make_optimizer(self._optimizer, self.training.steps, self.setup.abstract_model)

    @cached_property
    def abstract_state(self) -> TrainState:
        return abstract_state(self.setup.abstract_model, self.tx, self.setup.mesh)

    def run(self) -> None:
        """Train to the last step, from the newest checkpoint if there is one.

        Raises `ConfigError` before anything compiles, `Interrupted` after a signal, when the state is saved, and
        `Halted` when there is nothing to learn that way.
        """
        setup, say = self.setup, self.setup.console.say
        with CheckpointManager(setup.run_dir, self.name, setup.recipe.checkpoint) as checkpoints:
            start = checkpoints.latest
            if start == self.training.steps:
                say(f"{self.name}: all {start} steps are done already")
                return
            with contextlib.closing(self._open_batches()) as batches:
                rows = self.describe()
                setup.console.startup_table(
                    f"{setup.recipe.run_dir}: {self.name}", [*setup.describe(self.abstract_state), *rows]
                )
                state, start = self._begin(checkpoints, batches)
                batches.prepare()  # while the step compiles
                rewound, returns = 0, Counter()
                while True:
                    try:
                        return self._train(state, batches, checkpoints, start, rewound)
                    except LossSpikeError as spike:
                        say(f"{spike}: back to the newest checkpoint, leaving out the batches since")
                        state, start = self._begin(checkpoints, FixedPosition())
                        rewound = spike.step - (start or 0)
                        returns[start] += 1
                        if returns[start] > MAX_REWINDS:
                            raise TrainingHaltedError(
                                f"{spike}, again after {MAX_REWINDS} returns to step {start or 0}"
                            ) from None

    def _begin(self, checkpoints: CheckpointManager, place: DataPosition) -> tuple[TrainState, int | None]:
        """The state of the newest checkpoint, and its step; or that of a start."""
        if checkpoints.latest is None:
            state = self.first_state(place)
            return state, int(state.step) or None
        state = checkpoints.restore(self.abstract_state, place, self.setup.console.say)
        self.setup.console.say(f"resumed from the checkpoint of step {checkpoints.latest}")
        return state, checkpoints.latest

    def _open_batches(self) -> Batches:
        """Of which this process reads the rows that its devices hold."""
        rows, length = self.training.batch_size, self.training.sequence_length
        streams = stream_count(self.setup.recipe.data.streams, rows, self.documents)
        place = NamedSharding(self.setup.mesh, BATCH_SPEC).addressable_devices_indices_map((rows, length))

        def stream(number: int) -> grain.DatasetIterator[Batch]:
            return self.stream(batch_size=rows // streams, shard=number, shards=streams)

        return Batches(stream, process_rows(place.values(), rows), rows, streams, self.fingerprint)

    def _train(
        self, state: TrainState, batches: Batches, checkpoints: CheckpointManager, start: int | None, rewound: int
    ) -> None:
        """Step to the end. Figures of a step are fetched after the next one is under way, so the device never waits."""
        setup, training = self.setup, self.training
        first, last = start or 0, training.steps
        step = self._step
        rate = learning_rate(self._optimizer.schedule, last)
        with (
            PreemptionSignals() as signals,
            MetricsWriter(setup.run_dir, start, self.name) if jax.process_index() == 0 else NullWriter() as writer,
            setup.console.progress(self.name, last, first) as progress,
        ):
            if rewound:
                writer.write(first + 1, {"rewound": rewound})
            guard = LossMonitor(training, setup.run_dir, self.name, start)
            meter = StepMetrics(setup.recipe.model, training, rate, writer, progress, guard)
            for number in range(first + 1, last + 1):
                batch = next(batches)
                state, metrics = step(state, setup.put(batch, training.batch_size, batches.rows.start))
                meter.record(number, metrics, batch)
                is_last = number == last
                if is_last or (training.eval_every and number % training.eval_every == 0):
                    meter.flush()
                    scores = self.evaluate(state)
                    if scores:
                        writer.write(number, scores)
                    meter.restart()
                if is_last:
                    self.finish(state, scores, meter, writer)
                if is_last or number % setup.recipe.checkpoint.every == 0 or signals.stop(number):
                    meter.flush()
                    checkpoints.save(number, state, batches, setup.abstract_model)
                    meter.restart()
                if signals.stop(number):
                    raise InterruptedRun(f"stopped at step {number} by {signals.name}; state saved")

    @cached_property
    def _step(self):
        shape = self.training.batch_size, self.training.sequence_length
        place = NamedSharding(self.setup.mesh, BATCH_SPEC)
        batch = dict.fromkeys(self.fields, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place))
        began = time.monotonic()
        step = make_train_step(self.setup.abstract_model, self.tx, self.training, self.setup.mesh).lower(
            self.abstract_state, batch
        )
        step = step.compile()
        memory = step.memory_analysis()
        temporaries = f", {bytes_(memory.temp_size_in_bytes)} of temporaries a device" if memory else ""
        self.setup.console.say(f"compiled in {time.monotonic() - began:.1f} s{temporaries}")
        return step
