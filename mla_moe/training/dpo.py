"""The DPO stage: preference optimization on pairs of a chosen and a rejected completion, after SFT and before RL."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import grain
import jax
from jax.stages import Wrapped

from mla_moe.checkpoint.data_position import DataPosition
from mla_moe.config import Recipe
from mla_moe.data import (
    SFT_FEATURES,
    Batch,
    ChatRecords,
    PreferenceDataset,
    preference_batches,
    preference_eval_batches,
)
from mla_moe.nn.abstract_model import Arrays
from mla_moe.text.chat_tokenizer import ChatTokenizer
from mla_moe.text.round_trip import lost_fraction
from mla_moe.training.console import Console, duration
from mla_moe.training.initialization import starting_arrays, starting_checkpoint, state_from_checkpoint
from mla_moe.training.next_token import NextTokenTrainer
from mla_moe.training.preferences import (
    PreferenceSums,
    make_preference_eval_step,
    make_preference_step,
    preference_metrics,
)
from mla_moe.training.run_context import RunContext, put_batch
from mla_moe.training.sft import chat_encoding, formats, skipped_examples
from mla_moe.training.step import TrainState
from mla_moe.training.trainer import StepMetrics, Writer


def train_dpo(recipe: Recipe, run_dir: Path, console: Console) -> None:
    """Train on the pairs of `recipe.dpo.data`, from the newest checkpoint if there is one, else from the last earlier
    stage of this run or from `init_from`, which is the reference policy in either case. Raises as `Trainer.train`
    does."""
    start = starting_checkpoint("dpo", recipe, run_dir)
    DPOTrainer(RunContext.create(recipe, run_dir, console, recipe.lora), start).train()


def open_preferences(
    recipe: Recipe, tokenizer: ChatTokenizer, patterns: Sequence[str], field: str
) -> PreferenceDataset:
    """The pairs in the files that `patterns` match; `field` is the recipe field that errors name."""
    dpo, most = recipe.dpo, recipe.data.max_record_bytes
    encoding = chat_encoding(recipe, tokenizer)
    records = ChatRecords(patterns, field, encoding, dpo.max_malformed_fraction, "preference", most)
    return PreferenceDataset(records, dpo.sequence_length)


class DPOTrainer(NextTokenTrainer):
    """Steps on the pairs of `dpo.data` from the checkpoint `start`, whose model is the reference policy too."""

    features = SFT_FEATURES

    def __init__(self, context: RunContext, start: str | Path):
        self.name, self.context, self.start, dpo = "dpo", context, start, context.recipe.dpo
        steps = dpo.steps or self.dataset.steps(dpo.epochs or 1, dpo.batch_size, dpo.sequence_length)
        super().__init__("dpo", context, dpo.training(context.recipe.training, steps), dpo.optimizer)
        self.evaluates_first = bool(dpo.heldout)

    @cached_property
    def dataset(self) -> PreferenceDataset:
        field, patterns = self.data_files
        return self._open(patterns, field)

    @property
    def data_files(self) -> tuple[str, Sequence[str]]:
        return "dpo.data", self.context.recipe.dpo.data

    @cached_property
    def heldout(self) -> PreferenceDataset | None:
        patterns = self.context.recipe.dpo.heldout
        return self._open(patterns, "dpo.heldout") if patterns else None

    def _open(self, patterns: Sequence[str], field: str) -> PreferenceDataset:
        return open_preferences(self.context.recipe, self.context.chat_tokenizer, patterns, field)

    @cached_property
    def _reference(self) -> Arrays:
        return starting_arrays(self.start, self.context, trained_only=True)

    @property
    def constants(self) -> tuple[Arrays, ...]:
        return (self._reference,)

    def make_step(self) -> Wrapped:
        context = self.context
        return make_preference_step(context.abstract_model, self.tx, self.training, context.recipe.dpo, context.mesh)

    @property
    def flops_per_token(self) -> float:
        """With the forward pass of the reference: a third of forward and backward pass, with LoRA half of it."""
        return super().flops_per_token * (3 / 2 if self.context.lora.rank else 4 / 3)

    def memory_per_device(self) -> dict[str, float]:
        """With the reference policy: the same arrays as the policy, with LoRA all but the adapters once for both."""
        memory = super().memory_per_device()
        return memory | {"reference": memory["parameters"]}

    def initial_state(self, position: DataPosition) -> tuple[TrainState, int | None]:
        self.context.console.print(f"started from {self.start}")
        return state_from_checkpoint(self.start, self.context, self.tx), None

    def open_stream(self, **options: int) -> grain.DatasetIterator[Batch]:
        return preference_batches(self.context.recipe.data, self.dataset, **options)

    def describe(self) -> list[tuple[str, str]]:
        pairs, training, dpo = self.dataset, self.training, self.context.recipe.dpo
        for line in skipped_examples(pairs, training.sequence_length // 2, "cut"):
            self.context.console.print(line)
        limit = self.context.recipe.data.max_lost_bytes_fraction
        lost = lost_fraction(self.context.tokenizer, pairs.sample(), "dpo.data", limit)
        epochs = training.steps / pairs.steps(1.0, 1, training.sequence_length) * training.batch_size
        rows = [
            ("pairs", f"{len(pairs):,}, of {formats(pairs)}"),
            ("loss", f"{dpo.loss}, β = {dpo.beta}; reference policy: {self.start}"),
            ("steps", f"{training.steps:,}, {epochs:.2g} epochs"),
            ("lost by the tokenizer", f"{lost:.2%} of the bytes of a sample"),
        ]
        if self.heldout is not None:
            rows.append(("held-out pairs", f"{len(self.heldout):,}"))
        return rows

    @cached_property
    def _eval_step(self) -> Callable[[TrainState, Arrays, dict[str, jax.Array]], PreferenceSums]:
        context = self.context
        return make_preference_eval_step(context.abstract_model, self.training, context.recipe.dpo, context.mesh)

    @cached_property
    def _eval_batches(self) -> list[Batch]:
        assert self.heldout is not None
        size, length = self.eval_batch_size, self.training.sequence_length
        return preference_eval_batches(self.heldout, batch_size=size, sequence_length=length)

    def evaluate(self, number: int, state: TrainState, writer: Writer) -> dict[str, float]:
        """Loss, rewards and accuracy of the held-out pairs."""
        if self.heldout is None:
            return {}
        put = (put_batch(batch, len(batch["tokens"]), self.context.mesh) for batch in self._eval_batches)
        sums = [jax.device_get(self._eval_step(state, self._reference, batch)) for batch in put]
        metrics = preference_metrics(jax.tree.map(lambda *x: sum(x), *sums))
        return {f"eval/{name}": float(value) for name, value in metrics.items() if name != "pairs"}

    def finish(self, state: TrainState, scores: Mapping[str, float], metrics: StepMetrics, writer: Writer) -> None:
        """Write a summary for the report and the console."""
        rows = {
            "dpo steps": f"{self.training.steps} on {len(self.dataset):,} pairs",
            "dpo loss": f"{metrics.loss:.3f}",
            "time in dpo steps": duration(self.seconds),
        }
        if scores:
            accuracy = f"preference accuracy {scores['eval/rewards/accuracies']:.1%} on held-out pairs"
            rows["dpo held-out loss"] = f"{scores['eval/loss']:.3f}; {accuracy}"
        self.context.write_result("preference optimization", rows)
