"""The pretraining stage: text in, a model and its curves out."""

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mla_moe import data
from mla_moe.counting import (
    cache_bytes_per_token,
    multi_head_cache_bytes_per_token,
    peak_flops,
    train_flops_per_token,
)
from mla_moe.inference.generate import generate
from mla_moe.recipe import Recipe
from mla_moe.sharding import BATCH
from mla_moe.training.begin import first_state
from mla_moe.training.checkpoint import Checkpoints
from mla_moe.training.console import Console, Progress, bytes_, duration, si
from mla_moe.training.metrics import MetricsWriter, Silence
from mla_moe.training.optimizer import learning_rate, make_optimizer
from mla_moe.training.run import Signals, add_summary
from mla_moe.training.setup import Interrupted, Setup, training_text
from mla_moe.training.step import TrainState, abstract_state, make_eval_step, make_step

STAGE = "pretrain"


def pretrain(recipe: Recipe, run_dir: Path, console: Console) -> None:
    """Train to `recipe.training.steps`, from the newest checkpoint if there is one.

    Raises `ConfigError` before anything compiles, and `Interrupted` after a signal, when the state is saved.
    """
    setup = Setup.of(recipe, run_dir, console)
    stage, mesh = Stage(setup), setup.mesh
    batches = _open_batches(setup)
    with contextlib.closing(batches), Checkpoints(run_dir, STAGE, recipe.checkpoint) as checkpoints:
        start = checkpoints.latest
        if start == recipe.training.steps and (run_dir / "summary.json").exists():
            console.say(f"{STAGE}: all {start} steps are done already")
            return
        console.startup_table(recipe.run_dir, stage.describe())
        if start is None:
            state = first_state(recipe, setup.skeleton, stage.optimizer, mesh, batches)
            start = int(state.step) or None
            if recipe.init_from:
                console.say(f"started from {recipe.init_from}" + (f", step {start}" if start else ""))
        else:
            state = checkpoints.restore(abstract_state(setup.skeleton, stage.optimizer, mesh), batches)
            console.say(f"resumed from the checkpoint of step {start}")
        stage.train(state, batches, checkpoints, start)


def _open_batches(setup: Setup) -> data.Batches:
    """The training batches, of which this process reads the rows that its devices hold."""
    recipe, text = setup.recipe, training_text(setup.recipe)
    rows, length = recipe.training.batch_size, recipe.training.sequence_length
    streams = data.stream_count(recipe.data.streams, rows)
    place = NamedSharding(setup.mesh, BATCH).addressable_devices_indices_map((rows, length))

    def stream(number: int) -> grain.DatasetIterator[data.Batch]:
        size = {"batch_size": rows // streams, "sequence_length": length, "shard": number, "shards": streams}
        return data.train_batches(recipe.data, text, setup.tokenizer, **size, seed=recipe.seed)

    return data.Batches(stream, data.rows_of(place.values(), rows), rows, streams)


@dataclass(frozen=True)
class Stage:
    """What the parts of the stage share."""

    setup: Setup

    @cached_property
    def optimizer(self):
        return make_optimizer(self.setup.recipe.optimizer, self.setup.recipe.training.steps, self.setup.skeleton)

    @cached_property
    def heldout(self) -> tuple[list[data.Batch], int, float] | None:
        """Batches, bytes, and what gzip makes of them."""
        patterns = self.setup.recipe.data.heldout
        if not patterns:
            return None
        text = data.open_sources(patterns, field="data.heldout", text_field=self.setup.recipe.data.text_field)
        training = self.setup.recipe.training
        rows = training.batch_size // training.accumulation
        batches, size = data.heldout_batches(
            text, self.setup.tokenizer, batch_size=rows, sequence_length=training.sequence_length
        )
        return batches, size, data.gzip_bits_per_byte(text)

    def describe(self) -> list[tuple[str, str]]:
        """The start-up table."""
        setup, training = self.setup, self.setup.recipe.training
        item = jnp.dtype(setup.skeleton.precision.compute).itemsize
        latent = cache_bytes_per_token(setup.recipe.model, item)
        multi_head = multi_head_cache_bytes_per_token(setup.recipe.model, item)
        heldout = self.heldout  # here, so that files that are missing are missed before anything compiles
        text = f"{bytes_(heldout[1])}; gzip -9 needs {heldout[2]:.3f} bits a byte" if heldout else "none"
        return [
            *setup.describe(abstract_state(setup.skeleton, self.optimizer, setup.mesh)),
            ("KV cache a token", f"{bytes_(latent)}; multi-head {bytes_(multi_head)} ({multi_head / latent:.1f} x)"),
            ("FLOPs a token", f"{si(self._flops_per_token)} to train on {training.sequence_length} tokens"),
            ("tokens a step", f"{training.batch_size * training.sequence_length:,} in {training.batch_size} rows"),
            ("held-out text", text),
        ]

    def train(self, state: TrainState, batches: data.Batches, checkpoints: Checkpoints, start: int | None):
        """Step to the end. Figures of a step are fetched after the next one is under way, so the device never waits."""
        training = self.setup.recipe.training
        first, last = start or 0, training.steps
        step = self._compile(state)
        with (
            Signals() as signals,
            MetricsWriter(self.setup.run_dir, start, STAGE) if jax.process_index() == 0 else Silence() as writer,
            self.setup.console.progress(STAGE, last, first) as progress,
        ):
            meter = _Meter(self, writer, progress)
            for number in range(first + 1, last + 1):
                state, metrics = step(state, self.setup.put(next(batches), training.batch_size, batches.rows.start))
                meter.record(number, metrics)
                is_last = number == last
                if is_last or (training.eval_every and number % training.eval_every == 0):
                    meter.flush()
                    scores = self._evaluate(state)
                    writer.write(number, scores)
                    meter.restart()
                if is_last:
                    self._finish(state, writer, scores, meter)
                if is_last or number % self.setup.recipe.checkpoint.every == 0 or signals.stop(number):
                    meter.flush()
                    checkpoints.save(number, state, batches, self.setup.skeleton)
                    meter.restart()
                if signals.stop(number) and not is_last:
                    raise Interrupted(f"stopped at step {number} by {signals.name}; state saved")

    def _compile(self, state: TrainState):
        training = self.setup.recipe.training
        shape, place = (training.batch_size, training.sequence_length), NamedSharding(self.setup.mesh, BATCH)
        fields = ("tokens", "targets", "segment_ids", "positions")
        batch = dict.fromkeys(fields, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place))
        began = time.monotonic()
        step = make_step(self.setup.skeleton, self.optimizer, training, self.setup.mesh).lower(state, batch).compile()
        memory = step.memory_analysis()
        temporaries = f", {bytes_(memory.temp_size_in_bytes)} of temporaries a device" if memory else ""
        self.setup.console.say(f"compiled in {time.monotonic() - began:.1f} s{temporaries}")
        return step

    @cached_property
    def _eval_step(self):
        return make_eval_step(self.setup.skeleton, self.setup.recipe.training.loss_chunk, self.setup.mesh)

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        """Loss and bits per byte of all held-out text, and what gzip -9 needs for it."""
        if self.heldout is None:
            return {}
        batches, size, gzip_bits = self.heldout
        nats = sum(float(self._eval_step(state, self.setup.put(batch, len(batch["tokens"])))) for batch in batches)
        tokens = sum(int((batch["segment_ids"] != 0).sum()) for batch in batches)
        bits = nats / math.log(2) / size
        return {"eval/loss": nats / tokens, "eval/bits_per_byte": bits, "eval/gzip_bits_per_byte": gzip_bits}

    def _finish(self, state: TrainState, writer, scores: Mapping[str, float], meter: "_Meter") -> None:
        """Sampled text, and a summary for the report and the terminal."""
        samples = self._sample(state)
        writer.append_samples({"step": self.setup.recipe.training.steps, **sample} for sample in samples)
        rows = {"steps": f"{self.setup.recipe.training.steps}", "train loss": f"{meter.loss:.3f} nats a token"}
        if scores:
            bits, gzip_bits = scores["eval/bits_per_byte"], scores["eval/gzip_bits_per_byte"]
            rows |= {"held-out bits per byte": f"{bits:.3f}", "gzip -9 of the same files": f"{gzip_bits:.3f}"}
        rows |= {"busiest expert / mean, last tenth": f"{meter.load_last_tenth:.2f}"}
        rows |= {"time in steps": duration(meter.seconds)}
        if jax.process_index() == 0:
            add_summary(self.setup.run_dir, rows)
        self.setup.console.result_table("result", list(rows.items()))
        for sample in samples:
            self.setup.console.say(f"\n--- {sample['prompt']!r}\n{sample['prompt']}{sample['completion']}")

    def _sample(self, state: TrainState) -> list[dict[str, str]]:
        wanted = self.setup.recipe.sample
        if not wanted.prompts:
            return []
        model = self.setup.skeleton.merge(state.params | state.biases)
        new = generate(
            model,
            [[self.setup.tokenizer.bos_id, *self.setup.tokenizer.encode(prompt).tolist()] for prompt in wanted.prompts],
            max_new_tokens=wanted.max_new_tokens,
            temperature=wanted.temperature,
            seed=self.setup.recipe.seed,
            eos_id=self.setup.tokenizer.eos_id,
        )
        pairs = zip(wanted.prompts, new, strict=True)
        return [{"prompt": prompt, "completion": self.setup.tokenizer.decode(tokens)} for prompt, tokens in pairs]

    @cached_property
    def _flops_per_token(self) -> float:
        return train_flops_per_token(self.setup.recipe.model, self.setup.recipe.training.sequence_length)


class _Meter:
    """Turns steps into rows, a step late."""

    LOAD_ROWS = 200  # of the heat map over a whole run

    def __init__(self, stage: Stage, writer, progress: Progress):
        recipe = stage.setup.recipe
        self._recipe, self._writer, self._progress = recipe, writer, progress
        self._rate = learning_rate(recipe.optimizer.schedule, recipe.training.steps)
        self._flops = stage._flops_per_token
        peak = peak_flops(jax.devices()[0])
        self._peak = peak and peak * (1 if jax.devices()[0].platform == "cpu" else jax.device_count())
        self._load_every = max(1, recipe.training.steps // self.LOAD_ROWS)
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._loads: list[float] = []
        self.seconds, self.loss = 0.0, math.nan
        self.restart()

    def restart(self) -> None:
        """Begin to time the next step now: what came before was no step."""
        self._since = time.monotonic()

    def record(self, number: int, metrics: dict[str, jax.Array]) -> None:
        self.flush()
        self._pending = number, metrics

    def flush(self) -> None:
        """Fetch what is pending, which waits for its step to end, and write it."""
        if self._pending is None:
            return
        number, metrics = self._pending
        self._pending = None
        values: dict[str, Any] = jax.device_get(metrics)
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        self.seconds += seconds
        load, tokens = values.pop("load_LE"), int(values.pop("tokens"))
        rate = float(np.asarray(self._rate(number - 1)))
        row: dict[str, Any] = {"loss": values.pop("loss"), "lr": rate, "tokens_per_s": tokens / seconds}
        if self._peak:
            row["mfu"] = row["tokens_per_s"] * self._flops / self._peak
        row |= values | {"step_seconds": seconds, "tokens": tokens}
        if load.size:
            row["moe/load_max"] = float((load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-9)).max())
            row["moe/dropped"] = values.pop("dropped")
            self._loads.append(row["moe/load_max"])
        if not self._recipe.model.num_nextn_predict_layers:
            del row["mtp_loss"]
        row = {name: float(value) for name, value in row.items()}
        self.loss = row["loss"]
        if number % self._recipe.training.log_every == 0 or number == self._recipe.training.steps:
            self._writer.write(number, row)
        if load.size and number % self._load_every == 0:
            self._writer.write_load(number, load)
        self._progress.update(number, row)

    @property
    def load_last_tenth(self) -> float:
        tail = self._loads[-max(self._recipe.training.steps // 10, 1) :]
        return float(np.mean(tail)) if tail else math.nan
