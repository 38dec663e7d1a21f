"""What pretraining, SFT and DPO share: batches of packed sequences and the compiled training step."""

import abc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.stages import Wrapped

from mla_moe.data import Batch, Batches, PreferenceDataset, SFTDataset, SkipMalformed, process_rows, stream_count
from mla_moe.nn.abstract_model import Arrays
from mla_moe.nn.model_costs import train_flops_per_token
from mla_moe.parallel.accelerators import peak_flops
from mla_moe.parallel.mesh import BATCH_SPEC
from mla_moe.text.isolated import text_worker
from mla_moe.training.console import bytes_
from mla_moe.training.profiling import write_program
from mla_moe.training.run_context import put_batch
from mla_moe.training.step import TrainState, make_eval_step, make_train_step
from mla_moe.training.trainer import Trainer


class NextTokenTrainer(Trainer[TrainState, Batch]):
    """A stage that trains on batches of packed sequences: by next-token cross-entropy, unless a subclass has another
    loss (DPO). A subclass provides the dataset and the initial state."""

    features: ClassVar[tuple[str, ...]] = ("tokens", "targets", "segment_ids", "positions")
    """Arrays of a batch, each int32 [batch_size, sequence_length]."""
    _temporaries: Mapping[str, float] = {}  # known once the step is compiled

    @property
    @abc.abstractmethod
    def dataset(self) -> SkipMalformed | SFTDataset | PreferenceDataset:
        """The documents or the examples."""

    @property
    @abc.abstractmethod
    def data_files(self) -> tuple[str, Sequence[str]]:
        """The recipe field of the training files, and its patterns."""

    @abc.abstractmethod
    def open_stream(self, **options: int) -> grain.DatasetIterator[Batch]:
        """One of several streams of batches, with the options of `data.train_batches`."""

    @cached_property
    def position(self) -> Batches:
        """This process's packed sequences of each global batch: those on its devices."""
        recipe, (size, length) = self.context.recipe, self._abstract_batch.shape
        streams = stream_count(recipe.data.streams, size, len(self.dataset))
        options = {"batch_size": size // streams, "sequence_length": length, "seed": recipe.seed, "shards": streams}

        def open_stream(number: int) -> grain.DatasetIterator[Batch]:
            return self.open_stream(shard=number, **options)

        indices = self._abstract_batch.sharding.addressable_devices_indices_map((size, length))
        rows = process_rows(indices.values(), size)
        return Batches(open_stream, rows, size, streams, self.dataset.fingerprint, *self.data_files)

    def make_step(self) -> Wrapped:
        """The jitted step `(state, *constants, batch) -> (state, metrics)`, which donates the state."""
        context = self.context
        return make_train_step(context.abstract_model, self.tx, self.training, context.mesh, context.recipe.seed)

    @property
    def constants(self) -> tuple[Arrays, ...]:
        """Arrays that the step takes between the state and the batch."""
        return ()

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of a step per token."""
        frozen = bool(self.context.lora.rank)
        return train_flops_per_token(self.context.recipe.model, self.training.sequence_length, frozen=frozen)

    @property
    def eval_batch_size(self) -> int:
        """Packed sequences of a batch of an evaluation: those of a microbatch, or of one for each stage of a
        pipeline."""
        stages = self.context.mesh.shape["pipeline"]
        return self.training.batch_size // self.training.gradient_accumulation_steps * stages

    @cached_property
    def _nats_step(self) -> Callable[[TrainState, dict[str, jax.Array]], jax.Array]:
        return make_eval_step(self.context.abstract_model, self.training.loss_chunk, self.context.mesh)

    def nats(self, state: TrainState, batches: Sequence[Batch]) -> float:
        """The summed next-token cross-entropy of held-out batches."""
        put = (put_batch(batch, len(batch["tokens"]), self.context.mesh) for batch in batches)
        return sum(float(self._nats_step(state, batch)) for batch in put)

    def next_batch(self, state: TrainState, status: Callable[[str], None]) -> Batch:
        return next(self.position)

    def prepare(self) -> None:
        text_worker().end()  # it has encoded the examples: its tokenizer takes up to 0.3 GB
        self.position.prepare()  # reads the first batch in the background while the step compiles
        start, context = time.monotonic(), self.context
        batch = dict.fromkeys(self.features, self._abstract_batch)
        lowered = self.make_step().lower(self.abstract_state, *self.constants, batch)
        self._compiled_step = lowered.compile()
        if context.recipe.profile.hlo and jax.process_index() == 0:
            write_program(self.profile_directory, "train_step", lowered, self._compiled_step)
        memory = self._compiled_step.memory_analysis()
        self._temporaries = {"temporaries": memory.temp_size_in_bytes} if memory else {}
        temporaries = "".join(f", {bytes_(size)} of {name} per device" for name, size in self._temporaries.items())
        context.console.print(f"compiled in {time.monotonic() - start:.1f} s{temporaries}")
        self._flops_per_token = self.flops_per_token  # now, not in each step: counting them traces the model
        device = jax.devices()[0]
        # Of all devices: the denominator of MFU. Virtual CPU devices share one peak.
        self._peak_flops = (peak_flops(device) or 0.0) * (1 if device.platform == "cpu" else jax.device_count())

    def memory_per_device(self) -> dict[str, float]:
        return super().memory_per_device() | dict(self._temporaries)

    def close(self) -> None:
        self.position.close()

    def step(self, number: int, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        arrays = put_batch(self.batch_arrays(batch), self.training.batch_size, self.context.mesh)
        return self._compiled_step(state, *self.constants, arrays)

    def row(self, number: int, values: dict[str, Any], batch: Batch, seconds: float) -> dict[str, float]:
        tokens, load_LE = int(values.pop("tokens")), values.pop("load_LE")
        row = {"loss": values.pop("loss"), "lr": self.learning_rate(number), "tokens_per_s": tokens / seconds}
        if self._peak_flops:
            row["mfu"] = row["tokens_per_s"] * self._flops_per_token / self._peak_flops
        row |= values | {"step_seconds": seconds, "tokens": tokens} | self.epochs(batch["documents"])
        if load_LE.size:
            row["moe/load_max"] = float((load_LE.max(axis=1) / np.maximum(load_LE.mean(axis=1), 1e-9)).max())
            row["moe/dropped"] = values["dropped"]
        if not self.context.recipe.model.num_nextn_predict_layers:
            row.pop("mtp_loss", None)
        return {name: float(value) for name, value in row.items()}

    def epochs(self, documents: np.ndarray) -> dict[str, float]:
        """Metrics: how often each source has been passed, given the documents of each in this process's streams."""
        return {"data/epochs": documents.sum() / (len(self.dataset) * self.position.fraction)}

    def batch_arrays(self, batch: Batch) -> Mapping[str, np.ndarray]:
        return {name: batch[name] for name in self.features}

    @property
    def _abstract_batch(self) -> jax.ShapeDtypeStruct:
        """Shape, dtype and sharding of each of the `features`."""
        shape = self.training.batch_size, self.training.sequence_length
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(self.context.mesh, BATCH_SPEC))
