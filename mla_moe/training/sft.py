"""Supervised fine-tuning: a model learns what follows given prompts."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import grain
import jax

from mla_moe import data
from mla_moe.inference.language import Language
from mla_moe.recipe import Recipe
from mla_moe.training.begin import loaded_state, model_before
from mla_moe.training.checkpoint import Place
from mla_moe.training.console import Console, duration
from mla_moe.training.loop import Stage
from mla_moe.training.meter import Meter
from mla_moe.training.run import add_summary
from mla_moe.training.setup import Setup
from mla_moe.training.step import TrainState

Prompt = Callable[[str, str, Language], Sequence[int]]
"""`prompt(template, question, language)`: the tokens that put a question to the model."""


def fine_tune(recipe: Recipe, run_dir: Path, console: Console, prompt: Prompt) -> None:
    """Train on `recipe.sft.data` to `recipe.sft.steps`, from the newest checkpoint if there is one, else from this
    run's pretraining or from `init_from`.

    Raises `ConfigError` before anything compiles, and `Interrupted` after a signal, when the state is saved.
    """
    start = model_before("sft", recipe, run_dir)
    FineTuning("sft", Setup.of(recipe, run_dir, console), recipe.sft.steps, recipe.sft.data, start, prompt).run()


class FineTuning(Stage):
    """`steps` on the pairs that `patterns` match, beginning with the checkpoint at `start`."""

    fields = data.PAIR_FIELDS

    def __init__(self, name: str, setup: Setup, steps: int, patterns: Sequence[str], start: Path, prompt: Prompt):
        sft = setup.recipe.sft
        super().__init__(name, setup, sft.training(setup.recipe.training, steps), sft.optimizer)
        self._patterns, self._start, self._prompt = patterns, start, prompt

    @cached_property
    def _pairs(self) -> data.Pairs:
        language, template = self.setup.language, self.setup.recipe.task.template
        coding = data.Coding(
            prompt=lambda question: self._prompt(template, question, language),
            completion=lambda text: language.encode(text)[1:],  # without bos
            end=language.stop_ids[0],
            length=self.training.sequence_length,
        )
        return data.Pairs(self._patterns, f"{self.name}.data", coding, self.setup.recipe.sft.malformed)

    def first_state(self, place: Place) -> TrainState:
        setup = self.setup
        setup.console.say(f"started from {self._start}")
        return loaded_state(self._start, setup.recipe, setup.skeleton, self.tx, setup.mesh)

    def stream(self, *, batch_size: int, shard: int, shards: int) -> grain.DatasetIterator[data.Batch]:
        recipe = self.setup.recipe
        size = {"batch_size": batch_size, "sequence_length": self.training.sequence_length}
        return data.pair_batches(recipe.data, self._pairs, **size, seed=recipe.seed, shard=shard, shards=shards)

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

    def finish(self, state: TrainState, scores: Mapping[str, float], meter: Meter, writer) -> None:
        """A summary for the report and the terminal."""
        rows = {
            f"{self.name} steps": f"{self.training.steps} on {len(self._pairs):,} pairs",
            f"{self.name} loss": f"{meter.loss:.3f} nats a token of the completions",
            f"time in {self.name} steps": duration(self.seconds),
        }
        if jax.process_index() == 0:
            add_summary(self.setup.run_dir, rows)
        self.setup.console.result_table("fine-tuned", list(rows.items()))
