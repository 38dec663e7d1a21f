"""Next-token training, which pretraining and SFT share: batches of packed sequences and the compiled training step."""

import abc
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.stages import Compiled

from mla_moe.data import Batch, Batches, PromptCompletionDataset, SkipMalformed, process_rows, stream_count
from mla_moe.nn.model_costs import train_flops_per_token
from mla_moe.parallel.accelerators import peak_flops
from mla_moe.parallel.mesh import BATCH_SPEC
from mla_moe.training.console import bytes_
from mla_moe.training.step import TrainState, make_train_step
from mla_moe.training.trainer import Trainer


class NextTokenTrainer(Trainer[TrainState, Batch]):
    """A stage that minimizes next-token cross-entropy. A subclass provides the dataset and the initial state."""

    features: ClassVar[tuple[str, ...]] = ("tokens", "targets", "segment_ids", "positions")
    """Arrays of a batch, each int32 [batch_size, sequence_length]."""

    @property
    @abc.abstractmethod
    def dataset(self) -> SkipMalformed | PromptCompletionDataset:
        """The documents or the prompt-completion examples."""

    @abc.abstractmethod
    def open_stream(self, **options: int) -> grain.DatasetIterator[Batch]:
        """One of several streams of batches, with the options of `data.train_batches`."""

    @property
    def abstract_state(self) -> TrainState:
        return self.abstract_train_state

    @cached_property
    def position(self) -> Batches:
        """This process's packed sequences of each global batch: those on its devices."""
        (size, length), seed = self._batch_shape, self.context.recipe.seed
        streams = stream_count(self.context.recipe.data.streams, size, len(self.dataset))
        options = {"batch_size": size // streams, "sequence_length": length, "seed": seed, "shards": streams}

        def open_stream(number: int) -> grain.DatasetIterator[Batch]:
            return self.open_stream(shard=number, **options)

        indices = self._batch_sharding.addressable_devices_indices_map(self._batch_shape)
        return Batches(open_stream, process_rows(indices.values(), size), size, streams, self.dataset.fingerprint)

    def next_batch(self, state: TrainState, status: Callable[[str], None]) -> Batch:
        return next(self.position)

    def prepare(self) -> None:
        self.position.prepare()  # reads the first batch in the background while the step compiles
        _ = self._compiled_step, self._peak_flops, self._flops_per_token

    def close(self) -> None:
        self.position.close()

    def step(self, number: int, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        return self._compiled_step(state, self.context.put(batch, self.training.batch_size, self.position.rows.start))

    def row(
        self, number: int, values: dict[str, Any], load_LE: np.ndarray, batch: Batch, seconds: float
    ) -> dict[str, float]:
        tokens = int(values.pop("tokens"))
        row = {"loss": values.pop("loss"), "lr": self.learning_rate(number), "tokens_per_s": tokens / seconds}
        if self._peak_flops:
            row["mfu"] = row["tokens_per_s"] * self._flops_per_token / self._peak_flops
        row |= values | {"step_seconds": seconds, "tokens": tokens}
        if load_LE.size:
            row["moe/load_max"] = float((load_LE.max(axis=1) / np.maximum(load_LE.mean(axis=1), 1e-9)).max())
            row["moe/dropped"] = values["dropped"]
        if not self.context.recipe.model.num_nextn_predict_layers:
            del row["mtp_loss"]
        return {name: float(value) for name, value in row.items()}

    def batch_arrays(self, batch: Batch) -> Mapping[str, np.ndarray]:
        return batch

    @property
    def _batch_shape(self) -> tuple[int, int]:
        return self.training.batch_size, self.training.sequence_length

    @property
    def _batch_sharding(self) -> NamedSharding:
        return NamedSharding(self.context.mesh, BATCH_SPEC)

    @cached_property
    def _compiled_step(self) -> Compiled:
        abstract = jax.ShapeDtypeStruct(self._batch_shape, jnp.int32, sharding=self._batch_sharding)
        start = time.monotonic()
        step = make_train_step(self.context.abstract_model, self.tx, self.training, self.context.mesh)
        compiled = step.lower(self.abstract_state, dict.fromkeys(self.features, abstract)).compile()
        memory = compiled.memory_analysis()
        temporaries = f", {bytes_(memory.temp_size_in_bytes)} of temporaries per device" if memory else ""
        self.context.console.print(f"compiled in {time.monotonic() - start:.1f} s{temporaries}")
        return compiled

    @cached_property
    def _flops_per_token(self) -> float:
        """Cached, because counting parameters traces the model's construction."""
        return train_flops_per_token(self.context.recipe.model, self.training.sequence_length)

    @cached_property
    def _peak_flops(self) -> float | None:
        """Peak FLOP/s of all devices, the denominator of MFU. Virtual CPU devices share one peak."""
        device = jax.devices()[0]
        peak = peak_flops(device)
        return peak and peak * (1 if device.platform == "cpu" else jax.device_count())
