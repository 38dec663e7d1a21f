"""Supervised fine-tuning: a model learns what follows given prompts."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import grain
import jax

from mla_moe.checkpoint.manager import DataPosition
from mla_moe.config import Recipe
from mla_moe.data import SFT_FEATURES, Batch, PromptCompletionDataset, PromptCompletionEncoding, sft_batches
from mla_moe.text.chat_tokenizer import ChatTokenizer
from mla_moe.training.console import Console, duration
from mla_moe.training.initialization import loaded_state, model_before
from mla_moe.training.run_context import RunContext
from mla_moe.training.run_directory import add_summary
from mla_moe.training.step import TrainState
from mla_moe.training.step_metrics import StepMetrics
from mla_moe.training.trainer import Trainer

Prompt = Callable[[str, str, ChatTokenizer], Sequence[int]]
"""`prompt(template, question, language)`: the tokens that put a question to the model."""


def train_sft(recipe: Recipe, run_dir: Path, console: Console, prompt: Prompt) -> None:
    """Train on `recipe.sft.data` to `recipe.sft.steps`, from the newest checkpoint if there is one, else from this
    run's pretraining or from `init_from`.

    Raises `ConfigError` before anything compiles, and `Interrupted` after a signal, when the state is saved.
    """
    start = model_before("sft", recipe, run_dir)
    SFTTrainer("sft", RunContext.of(recipe, run_dir, console), recipe.sft.steps, recipe.sft.data, start, prompt).run()


class SFTTrainer(Trainer):
    """`steps` on the pairs that `patterns` match, beginning with the checkpoint at `start`."""

    fields = SFT_FEATURES

    def __init__(self, name: str, setup: RunContext, steps: int, patterns: Sequence[str], start: Path, prompt: Prompt):
        sft = setup.recipe.sft
        super().__init__(name, setup, sft.training(setup.recipe.training, steps), sft.optimizer)
        self._patterns, self._start, self._prompt = patterns, start, prompt

    @cached_property
    def _pairs(self) -> PromptCompletionDataset:
        language, template = self.setup.language, self.setup.recipe.task.template
        coding = PromptCompletionEncoding(
            prompt=lambda question: self._prompt(template, question, language),
            completion=lambda text: language.encode(text)[1:],  # without bos
            end=language.stop_ids[0],
            length=self.training.sequence_length,
        )
        return PromptCompletionDataset(
            self._patterns, f"{self.name}.data", coding, self.setup.recipe.sft.max_malformed_fraction
        )

    def first_state(self, place: DataPosition) -> TrainState:
        setup = self.setup
        setup.console.say(f"started from {self._start}")
        return loaded_state(self._start, setup.recipe, setup.abstract_model, self.tx, setup.mesh)

    def stream(self, *, batch_size: int, shard: int, shards: int) -> grain.DatasetIterator[Batch]:
        recipe = self.setup.recipe
        size = {"batch_size": batch_size, "sequence_length": self.training.sequence_length}
        return sft_batches(recipe.data, self._pairs, **size, seed=recipe.seed, shard=shard, shards=shards)

    @property
    def fingerprint(self) -> int:
        return self._pairs.fingerprint

    @property
    def documents(self) -> int:
        return len(self._pairs)

    def describe(self) -> list[tuple[str, str]]:
        pairs, training, say = self._pairs, self.training, self.setup.console.say
        if pairs.malformed:
            say(f"{len(pairs.malformed)} broken lines are left out, the first at {pairs.malformed[0]}")
        if pairs.too_long:
            say(f"{pairs.too_long} pairs are left out: their prompt fills {training.sequence_length} tokens")
        if pairs.cut:
            say(f"{pairs.cut} completions are cut at {training.sequence_length} tokens")
        size = f"{training.batch_size * training.sequence_length:,} in {training.batch_size} rows"
        return [("pairs", f"{len(pairs):,}"), ("tokens a step", f"{size}, prompts and padding included")]

    def finish(self, state: TrainState, scores: Mapping[str, float], meter: StepMetrics, writer) -> None:
        """A summary for the report and the terminal."""
        rows = {
            f"{self.name} steps": f"{self.training.steps} on {len(self._pairs):,} pairs",
            f"{self.name} loss": f"{meter.loss:.3f} nats a token of the completions",
            f"time in {self.name} steps": duration(self.seconds),
        }
        if jax.process_index() == 0:
            add_summary(self.setup.run_dir, rows)
        self.setup.console.result_table("fine-tuned", list(rows.items()))
