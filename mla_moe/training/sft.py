"""Supervised fine-tuning (SFT): next-token training on what the assistant writes in conversations and completions."""

import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import grain

from mla_moe.checkpoint.data_position import DataPosition
from mla_moe.config import Recipe
from mla_moe.data import (
    SFT_FEATURES,
    Batch,
    ChatEncoding,
    ChatRecords,
    PreferenceDataset,
    SFTDataset,
    sft_batches,
    sft_eval_batches,
)
from mla_moe.inference.generate import complete
from mla_moe.inference.request import Request
from mla_moe.text.chat_tokenizer import ChatTokenizer
from mla_moe.text.prompts import render_prompt
from mla_moe.text.round_trip import lost_fraction
from mla_moe.training.console import Console, duration
from mla_moe.training.initialization import starting_checkpoint, state_from_checkpoint
from mla_moe.training.next_token import NextTokenTrainer
from mla_moe.training.run_context import RunContext
from mla_moe.training.step import TrainState
from mla_moe.training.trainer import StepMetrics, Writer


def train_sft(recipe: Recipe, run_dir: Path, console: Console) -> None:
    """Train on `recipe.sft.data` to `recipe.sft.steps`, from the newest checkpoint if there is one, else from this
    run's pretraining or from `init_from`. Raises as `Trainer.train` does."""
    start = starting_checkpoint("sft", recipe, run_dir)
    context = RunContext.create(recipe, run_dir, console, recipe.lora)
    SFTTrainer("sft", context, recipe.sft.steps, recipe.sft.data, start).train()


def chat_encoding(recipe: Recipe, tokenizer: ChatTokenizer) -> ChatEncoding:
    """How the recipe's chat data are tokenized."""
    template = recipe.task.template
    return ChatEncoding(
        prompt=lambda question: render_prompt(template, question, tokenizer),
        completion=lambda text: tokenizer.encode(text)[1:],  # without bos
        end=tokenizer.stop_ids[0],
        conversations=tokenizer.encode_training,
        chat=template == "chat",
    )


def open_sft_data(
    recipe: Recipe, tokenizer: ChatTokenizer, patterns: Sequence[str], field: str, format: str | None = None
) -> SFTDataset:
    """The examples in the files that `patterns` match, by default of the format `sft.format`; `field` is the recipe
    field that errors name."""
    sft, most = recipe.sft, recipe.data.max_record_bytes
    encoding = chat_encoding(recipe, tokenizer)
    records = ChatRecords(patterns, field, encoding, sft.max_malformed_fraction, format or sft.format, most)
    return SFTDataset(records, sft.sequence_length, sft.truncation)


class SFTTrainer(NextTokenTrainer):
    """`steps` on the examples in the files that `patterns` match, from the checkpoint `start`. With 0 steps there are
    as many as `sft.epochs` takes."""

    features = SFT_FEATURES

    def __init__(self, name: str, context: RunContext, steps: int, patterns: Sequence[str], start: str | Path):
        sft = context.recipe.sft
        self.name, self.context, self._patterns, self.start = name, context, patterns, start
        steps = steps or self.dataset.steps(sft.epochs or 1, sft.batch_size, sft.sequence_length)
        super().__init__(name, context, sft.training(context.recipe.training, steps), sft.optimizer)
        self.evaluates_first = name == "sft" and bool(sft.heldout)

    @cached_property
    def dataset(self) -> SFTDataset:
        field, patterns = self.data_files
        return self._open(patterns, field)

    @property
    def data_files(self) -> tuple[str, Sequence[str]]:
        return f"{self.name}.data", self._patterns

    @cached_property
    def heldout(self) -> SFTDataset | None:
        patterns = self.context.recipe.sft.heldout
        return self._open(patterns, "sft.heldout") if patterns else None

    def _open(self, patterns: Sequence[str], field: str) -> SFTDataset:
        # Rejection sampling writes its own file, whatever the format of `sft.data`.
        format = "question_completion" if field == "rejection.data" else None
        return open_sft_data(self.context.recipe, self.context.chat_tokenizer, patterns, field, format)

    def initial_state(self, position: DataPosition) -> tuple[TrainState, int | None]:
        self.context.console.print(f"started from {self.start}")
        return state_from_checkpoint(self.start, self.context, self.tx), None

    def open_stream(self, **options: int) -> grain.DatasetIterator[Batch]:
        return sft_batches(self.context.recipe.data, self.dataset, **options)

    def describe(self) -> list[tuple[str, str]]:
        examples, training, sft = self.dataset, self.training, self.context.recipe.sft
        for line in skipped_examples(examples, training.sequence_length, sft.truncation):
            self.context.console.print(line)
        limit = self.context.recipe.data.max_lost_bytes_fraction
        lost = lost_fraction(self.context.tokenizer, examples.sample(), f"{self.name}.data", limit)
        size = training.batch_size * training.sequence_length
        epochs = training.steps / examples.steps(1.0, 1, training.sequence_length) * training.batch_size
        rows = [
            ("examples", f"{len(examples):,}, of {formats(examples)}"),
            ("tokens", f"{examples.total_tokens:,}, {examples.trained_tokens:,} of them with a loss"),
            ("tokens per step", f"{size:,} in {training.batch_size} packed sequences, prompts and padding included"),
            ("steps", f"{training.steps:,}, {epochs:.2g} epochs"),
            ("lost by the tokenizer", f"{lost:.2%} of the bytes of a sample"),
        ]
        if self.heldout is not None:
            rows.append(("held-out examples", f"{len(self.heldout):,}, of {formats(self.heldout)}"))
        return rows

    @cached_property
    def _eval_batches(self) -> list[Batch]:
        assert self.heldout is not None
        size, length = self.eval_batch_size, self.training.sequence_length
        return sft_eval_batches(self.heldout, batch_size=size, sequence_length=length)

    def evaluate(self, number: int, state: TrainState, writer: Writer) -> dict[str, float]:
        """Loss of the held-out examples, over the tokens that are trained on, and completions of some of them."""
        if self.heldout is None:
            return {}
        nats = self.nats(state, self._eval_batches)
        writer.append_samples({"step": number, **sample} for sample in self._sample(state))
        return {"eval/loss": nats / self.heldout.trained_tokens}

    def _sample(self, state: TrainState) -> list[dict[str, str]]:
        """The beginning of the completions of held-out prompts, and what they should be."""
        heldout, recipe, tokenizer = self.heldout, self.context.recipe, self.context.chat_tokenizer
        assert heldout is not None
        limit, new = recipe.model.max_position_embeddings, recipe.sample.max_new_tokens
        pairs = (heldout.prompt_and_completion(index) for index in range(len(heldout)))
        chosen = list(itertools.islice((pair for pair in pairs if len(pair[0]) < limit), recipe.sft.eval_samples))
        if not chosen:
            return []
        model = self.context.abstract_model.merge(state.arrays)
        requests = [Request(p, min(new, limit - len(p)), 0.0, stop_ids=tokenizer.stop_ids) for p, _ in chosen]
        completions = complete(model, requests)
        return [
            {
                "prompt": tokenizer.decode(prompt),
                "completion": tokenizer.decode(completion.tokens),
                "expected": tokenizer.decode(expected),
            }
            for (prompt, expected), completion in zip(chosen, completions, strict=True)
        ]

    def finish(self, state: TrainState, scores: Mapping[str, float], metrics: StepMetrics, writer: Writer) -> None:
        """Write a summary for the report and the console."""
        rows = {
            f"{self.name} steps": f"{self.training.steps} on {len(self.dataset):,} examples",
            f"{self.name} loss": f"{metrics.loss:.3f} nats per token of the completions",
            f"time in {self.name} steps": duration(self.seconds),
        }
        if "eval/loss" in scores:
            rows[f"{self.name} held-out loss"] = f"{scores['eval/loss']:.3f} nats per token of the completions"
        self.context.write_result("fine-tuned", rows)


def formats(examples: SFTDataset | PreferenceDataset) -> str:
    """The formats of the records, with their numbers."""
    return ", ".join(f"{count:,} records of the format {name}" for name, count in examples.formats.most_common())


def skipped_examples(examples: SFTDataset | PreferenceDataset, length: int, truncation: str) -> list[str]:
    """Lines that say what is skipped and truncated, and why."""
    lines = []
    if examples.malformed:
        lines.append(f"{len(examples.malformed)} malformed lines are skipped, the first at {examples.malformed[0]}")
    if examples.prompts_too_long:
        lines.append(f"{examples.prompts_too_long} examples are skipped: prompts fill {length} tokens")
    if examples.truncated:
        done = "completions are truncated at" if truncation == "cut" else "examples are skipped, longer than"
        lines.append(f"{examples.truncated} {done} {length} tokens")
    return lines
