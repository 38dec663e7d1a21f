"""Pretraining: next-token prediction on text, with held-out evaluation and sampled continuations at the end."""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
from jax import Array

from mla_moe.checkpoint.manager import DataPosition
from mla_moe.config import Recipe, require
from mla_moe.data import Batch, SkipMalformed, gzip_bits_per_byte, heldout_batches, train_batches
from mla_moe.inference.generate import generate
from mla_moe.nn.model_costs import kv_cache_bytes_per_token, mha_kv_cache_bytes_per_token, train_flops_per_token
from mla_moe.training.console import Console, bytes_, duration, si
from mla_moe.training.initialization import initial_state
from mla_moe.training.next_token import NextTokenTrainer
from mla_moe.training.run_context import RunContext, open_split
from mla_moe.training.run_directory import add_summary
from mla_moe.training.step import TrainState, make_eval_step
from mla_moe.training.trainer import StepMetrics, Writer


def pretrain(recipe: Recipe, run_dir: Path, console: Console) -> None:
    """Train to `recipe.training.steps`, from the newest checkpoint if there is one. Raises as `Trainer.train` does."""
    PretrainTrainer(RunContext.create(recipe, run_dir, console)).train()


class PretrainTrainer(NextTokenTrainer):
    def __init__(self, context: RunContext):
        super().__init__("pretrain", context, context.recipe.training, context.recipe.optimizer)
        self._dataset = open_split(context.recipe, "train")

    @property
    def dataset(self) -> SkipMalformed:
        return self._dataset

    def initial_state(self, position: DataPosition) -> tuple[TrainState, int | None]:
        context, init_from = self.context, self.context.recipe.init_from
        state = initial_state(context.recipe, context.abstract_model, self.tx, context.mesh, position)
        step = int(state.step) or None
        if init_from:
            context.console.print(f"started from {init_from}" + (f", step {step}" if step else ""))
        return state, step

    def open_stream(self, **options: int) -> grain.DatasetIterator[Batch]:
        return train_batches(self.context.recipe.data, self.dataset, self.context.tokenizer, **options)

    @cached_property
    def _heldout(self) -> tuple[list[Batch], int, float] | None:
        """Held-out batches, their size in bytes, and the bits per byte of gzip -9 for the same text."""
        if not self.context.recipe.data.heldout:
            return None
        text = open_split(self.context.recipe, "heldout")
        micro_batch_size = self.training.batch_size // self.training.gradient_accumulation_steps
        batches, size = heldout_batches(
            text, self.context.tokenizer, batch_size=micro_batch_size, sequence_length=self.training.sequence_length
        )
        return batches, size, gzip_bits_per_byte(text)

    def describe(self) -> list[tuple[str, str]]:
        cfg, training = self.context.recipe.model, self.training
        item = jnp.dtype(self.context.abstract_model.precision.compute).itemsize
        mla, mha = kv_cache_bytes_per_token(cfg, item), mha_kv_cache_bytes_per_token(cfg, item)
        flops = train_flops_per_token(cfg, training.sequence_length)
        heldout, sample = self._heldout, self.context.recipe.sample
        room = cfg.max_position_embeddings - max(map(len, self._prompts), default=0)
        fix = f"after the longest of sample.prompts the model has {room} positions"
        require(
            not sample.prompts or sample.max_new_tokens <= room, "sample.max_new_tokens", sample.max_new_tokens, fix
        )
        text = f"{bytes_(heldout[1])}; gzip -9 needs {heldout[2]:.3f} bits per byte" if heldout else "none"
        tokens = f"{training.batch_size * training.sequence_length:,} in {training.batch_size} packed sequences"
        return [
            ("KV cache per token", f"{bytes_(mla)}; multi-head attention {bytes_(mha)} ({mha / mla:.1f} x)"),
            ("FLOPs per token", f"{si(flops)} to train on {training.sequence_length} tokens"),
            ("tokens per step", tokens),
            ("held-out text", text),
        ]

    @cached_property
    def _eval_step(self) -> Callable[[TrainState, dict[str, Array]], Array]:
        return make_eval_step(self.context.abstract_model, self.training.loss_chunk, self.context.mesh)

    def evaluate(self, number: int, state: TrainState, writer: Writer) -> dict[str, float]:
        """Loss and bits per byte of the held-out text, and the bits per byte of gzip -9."""
        if self._heldout is None:
            return {}
        batches, size, gzip_bits = self._heldout
        nats = sum(float(self._eval_step(state, self.context.put(batch, len(batch["tokens"])))) for batch in batches)
        tokens = sum(int((batch["segment_ids"] != 0).sum()) for batch in batches)
        bits = nats / math.log(2) / size
        return {"eval/loss": nats / tokens, "eval/bits_per_byte": bits, "eval/gzip_bits_per_byte": gzip_bits}

    def finish(self, state: TrainState, scores: Mapping[str, float], metrics: StepMetrics, writer: Writer) -> None:
        """Sample continuations of `sample.prompts`, and write a summary for the report and the console."""
        samples = self._sample(state)
        writer.append_samples({"step": self.training.steps, **sample} for sample in samples)
        rows = {"steps": f"{self.training.steps}", "train loss": f"{metrics.loss:.3f} nats per token"}
        if scores:
            bits, gzip_bits = scores["eval/bits_per_byte"], scores["eval/gzip_bits_per_byte"]
            rows |= {"held-out bits per byte": f"{bits:.3f}", "gzip -9 of the same files": f"{gzip_bits:.3f}"}
        if self.dataset.malformed:
            rows |= {"malformed records": f"{self.dataset.malformed} skipped"}
        rows |= {"max load ratio, last tenth": f"{metrics.max_load_ratio_last_tenth:.2f}"}
        rows |= {"time in steps": duration(self.seconds)}
        if jax.process_index() == 0:
            add_summary(self.context.run_dir, rows)
        self.context.console.result_table("result", list(rows.items()))
        for sample in samples:
            self.context.console.print(f"\n--- {sample['prompt']!r}\n{sample['prompt']}{sample['completion']}")

    @property
    def _prompts(self) -> list[list[int]]:
        tokenizer = self.context.tokenizer
        return [[tokenizer.bos_id, *tokenizer.encode(prompt).tolist()] for prompt in self.context.recipe.sample.prompts]

    def _sample(self, state: TrainState) -> list[dict[str, str]]:
        sample, tokenizer = self.context.recipe.sample, self.context.tokenizer
        if not sample.prompts:
            return []
        completions = generate(
            self.context.abstract_model.merge(state.params | state.biases),
            self._prompts,
            max_new_tokens=sample.max_new_tokens,
            temperature=sample.temperature,
            seed=self.context.recipe.seed,
            eos_id=tokenizer.eos_id,
        )
        pairs = zip(sample.prompts, completions, strict=True)
        return [{"prompt": prompt, "completion": tokenizer.decode(tokens)} for prompt, tokens in pairs]
