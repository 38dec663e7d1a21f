"""The pretraining stage: text in, a model and its curves out."""

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import grain
import jax
import jax.numpy as jnp

from mla_moe.checkpoint.manager import DataPosition
from mla_moe.config import Recipe, require
from mla_moe.data import Batch, gzip_bits_per_byte, heldout_batches, train_batches
from mla_moe.inference.generate import generate
from mla_moe.nn.model_costs import kv_cache_bytes_per_token, mha_kv_cache_bytes_per_token, train_flops_per_token
from mla_moe.training.console import Console, bytes_, duration, si
from mla_moe.training.initialization import first_state
from mla_moe.training.run_context import RunContext, open_documents_of
from mla_moe.training.run_directory import add_summary
from mla_moe.training.step import TrainState, make_eval_step
from mla_moe.training.step_metrics import StepMetrics
from mla_moe.training.trainer import Trainer


def pretrain(recipe: Recipe, run_dir: Path, console: Console) -> None:
    """Train to `recipe.training.steps`, from the newest checkpoint if there is one.

    Raises `ConfigError` before anything compiles, and `Interrupted` after a signal, when the state is saved.
    """
    PretrainTrainer(RunContext.of(recipe, run_dir, console)).run()


class PretrainTrainer(Trainer):
    def __init__(self, setup: RunContext):
        super().__init__("pretrain", setup, setup.recipe.training, setup.recipe.optimizer)
        self._text = open_documents_of(setup.recipe, "train")

    def first_state(self, place: DataPosition) -> TrainState:
        setup = self.setup
        state = first_state(setup.recipe, setup.abstract_model, self.tx, setup.mesh, place)
        if setup.recipe.init_from:
            step = int(state.step)
            setup.console.say(f"started from {setup.recipe.init_from}" + (f", step {step}" if step else ""))
        return state

    def stream(self, *, batch_size: int, shard: int, shards: int) -> grain.DatasetIterator[Batch]:
        recipe = self.setup.recipe
        size = {"batch_size": batch_size, "sequence_length": self.training.sequence_length}
        return train_batches(
            recipe.data, self._text, self.setup.tokenizer, **size, seed=recipe.seed, shard=shard, shards=shards
        )

    @property
    def fingerprint(self) -> int:
        return self._text.fingerprint

    @property
    def documents(self) -> int:
        return len(self._text)

    @cached_property
    def _heldout(self) -> tuple[list[Batch], int, float] | None:
        """Batches, bytes, and what gzip makes of them."""
        patterns = self.setup.recipe.data.heldout
        if not patterns:
            return None
        text = open_documents_of(self.setup.recipe, "heldout")
        rows, length = (
            self.training.batch_size // self.training.gradient_accumulation_steps,
            self.training.sequence_length,
        )
        batches, size = heldout_batches(text, self.setup.tokenizer, batch_size=rows, sequence_length=length)
        return batches, size, gzip_bits_per_byte(text)

    def describe(self) -> list[tuple[str, str]]:
        cfg, training = self.setup.recipe.model, self.training
        item = jnp.dtype(self.setup.abstract_model.precision.compute).itemsize
        latent, multi_head = kv_cache_bytes_per_token(cfg, item), mha_kv_cache_bytes_per_token(cfg, item)
        flops = train_flops_per_token(cfg, training.sequence_length)
        heldout, wanted = self._heldout, self.setup.recipe.sample
        room = cfg.max_position_embeddings - max(map(len, self._prompts), default=0)
        fix = f"behind the longest of sample.prompts the model has {room} positions"
        require(
            not wanted.prompts or wanted.max_new_tokens <= room, "sample.max_new_tokens", wanted.max_new_tokens, fix
        )
        text = f"{bytes_(heldout[1])}; gzip -9 needs {heldout[2]:.3f} bits a byte" if heldout else "none"
        return [
            ("KV cache a token", f"{bytes_(latent)}; multi-head {bytes_(multi_head)} ({multi_head / latent:.1f} x)"),
            ("FLOPs a token", f"{si(flops)} to train on {training.sequence_length} tokens"),
            ("tokens a step", f"{training.batch_size * training.sequence_length:,} in {training.batch_size} rows"),
            ("held-out text", text),
        ]

    @cached_property
    def _eval_step(self):
        return make_eval_step(self.setup.abstract_model, self.training.loss_chunk, self.setup.mesh)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Loss and bits per byte of all held-out text, and what gzip -9 needs for it."""
        if self._heldout is None:
            return {}
        batches, size, gzip_bits = self._heldout
        nats = sum(float(self._eval_step(state, self.setup.put(batch, len(batch["tokens"])))) for batch in batches)
        tokens = sum(int((batch["segment_ids"] != 0).sum()) for batch in batches)
        bits = nats / math.log(2) / size
        return {"eval/loss": nats / tokens, "eval/bits_per_byte": bits, "eval/gzip_bits_per_byte": gzip_bits}

    def finish(self, state: TrainState, scores: Mapping[str, float], meter: StepMetrics, writer) -> None:
        """Sampled text, and a summary for the report and the terminal."""
        samples = self._sample(state)
        writer.append_samples({"step": self.training.steps, **sample} for sample in samples)
        rows = {"steps": f"{self.training.steps}", "train loss": f"{meter.loss:.3f} nats a token"}
        if scores:
            bits, gzip_bits = scores["eval/bits_per_byte"], scores["eval/gzip_bits_per_byte"]
            rows |= {"held-out bits per byte": f"{bits:.3f}", "gzip -9 of the same files": f"{gzip_bits:.3f}"}
        if self._text.malformed:
            rows |= {"malformed records": f"{self._text.malformed} left out"}
        rows |= {"busiest expert / mean, last tenth": f"{meter.load_last_tenth:.2f}"}
        rows |= {"time in steps": duration(self.seconds)}
        if jax.process_index() == 0:
            add_summary(self.setup.run_dir, rows)
        self.setup.console.result_table("result", list(rows.items()))
        for sample in samples:
            self.setup.console.say(f"\n--- {sample['prompt']!r}\n{sample['prompt']}{sample['completion']}")

    @property
    def _prompts(self) -> list[list[int]]:
        tokenizer = self.setup.tokenizer
        return [[tokenizer.bos_id, *tokenizer.encode(prompt).tolist()] for prompt in self.setup.recipe.sample.prompts]

    def _sample(self, state: TrainState) -> list[dict[str, str]]:
        wanted = self.setup.recipe.sample
        if not wanted.prompts:
            return []
        model = self.setup.abstract_model.merge(state.params | state.biases)
        new = generate(
            model,
            self._prompts,
            max_new_tokens=wanted.max_new_tokens,
            temperature=wanted.temperature,
            seed=self.setup.recipe.seed,
            eos_id=self.setup.tokenizer.eos_id,
        )
        pairs = zip(wanted.prompts, new, strict=True)
        return [{"prompt": prompt, "completion": self.setup.tokenizer.decode(tokens)} for prompt, tokens in pairs]
