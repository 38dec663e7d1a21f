"""Supervised fine-tuning (SFT): next-token training on the completions of prompts."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import grain
import jax

from mla_moe.checkpoint.manager import DataPosition
from mla_moe.config import Recipe
from mla_moe.data import SFT_FEATURES, Batch, PromptCompletionDataset, PromptCompletionEncoding, sft_batches
from mla_moe.text.prompts import render_prompt
from mla_moe.training.console import Console, duration
from mla_moe.training.initialization import starting_checkpoint, state_from_checkpoint
from mla_moe.training.next_token import NextTokenTrainer
from mla_moe.training.run_context import RunContext
from mla_moe.training.run_directory import add_summary
from mla_moe.training.step import TrainState
from mla_moe.training.trainer import StepMetrics, Writer


def train_sft(recipe: Recipe, run_dir: Path, console: Console) -> None:
    """Train on `recipe.sft.data` to `recipe.sft.steps`, from the newest checkpoint if there is one, else from this
    run's pretraining or from `init_from`. Raises as `Trainer.train` does."""
    start = starting_checkpoint("sft", recipe, run_dir)
    context = RunContext.create(recipe, run_dir, console)
    SFTTrainer("sft", context, recipe.sft.steps, recipe.sft.data, start).train()


class SFTTrainer(NextTokenTrainer):
    """`steps` on the prompt-completion examples in the files that `patterns` match, from the checkpoint `start`."""

    features = SFT_FEATURES

    def __init__(self, name: str, context: RunContext, steps: int, patterns: Sequence[str], start: Path):
        sft = context.recipe.sft
        super().__init__(name, context, sft.training(context.recipe.training, steps), sft.optimizer)
        self._patterns, self._start = patterns, start

    @cached_property
    def dataset(self) -> PromptCompletionDataset:
        tokenizer, template = self.context.chat_tokenizer, self.context.recipe.task.template
        encoding = PromptCompletionEncoding(
            prompt=lambda question: render_prompt(template, question, tokenizer),
            completion=lambda text: tokenizer.encode(text)[1:],  # without bos
            end=tokenizer.stop_ids[0],
            length=self.training.sequence_length,
        )
        limit = self.context.recipe.sft.max_malformed_fraction
        return PromptCompletionDataset(self._patterns, f"{self.name}.data", encoding, limit)

    def initial_state(self, position: DataPosition) -> tuple[TrainState, int | None]:
        context = self.context
        context.console.print(f"started from {self._start}")
        state = state_from_checkpoint(self._start, context.recipe, context.abstract_model, self.tx, context.mesh)
        return state, None

    def open_stream(self, **options: int) -> grain.DatasetIterator[Batch]:
        return sft_batches(self.context.recipe.data, self.dataset, **options)

    def describe(self) -> list[tuple[str, str]]:
        examples, training, log = self.dataset, self.training, self.context.console.print
        if examples.malformed:
            log(f"{len(examples.malformed)} malformed lines are skipped, the first at {examples.malformed[0]}")
        if examples.prompts_too_long:
            log(f"{examples.prompts_too_long} examples are skipped: prompts fill {training.sequence_length} tokens")
        if examples.truncated:
            log(f"{examples.truncated} completions are truncated at {training.sequence_length} tokens")
        size = f"{training.batch_size * training.sequence_length:,} in {training.batch_size} packed sequences"
        return [("examples", f"{len(examples):,}"), ("tokens per step", f"{size}, prompts and padding included")]

    def finish(self, state: TrainState, scores: Mapping[str, float], metrics: StepMetrics, writer: Writer) -> None:
        """Write a summary for the report and the console."""
        rows = {
            f"{self.name} steps": f"{self.training.steps} on {len(self.dataset):,} examples",
            f"{self.name} loss": f"{metrics.loss:.3f} nats per token of the completions",
            f"time in {self.name} steps": duration(self.seconds),
        }
        if jax.process_index() == 0:
            add_summary(self.context.run_dir, rows)
        self.context.console.result_table("fine-tuned", list(rows.items()))
