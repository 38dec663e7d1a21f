"""Pretraining: next-token prediction on text, with held-out evaluation and sampled continuations at the end."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mla_moe.checkpoint.data_position import DataPosition
from mla_moe.config import Recipe, require
from mla_moe.config.files import read_json_object
from mla_moe.data import (
    Batch,
    Document,
    EvalText,
    SkipMalformed,
    bits_per_byte,
    eval_text,
    gzip_bits_per_byte,
    sample_documents,
    train_batches,
)
from mla_moe.data.packing import packed_sequences_per_epoch, window_lengths
from mla_moe.inference.generate import generate
from mla_moe.nn.model_costs import kv_cache_bytes_per_token, mha_kv_cache_bytes_per_token, train_flops_per_token
from mla_moe.text.round_trip import lost_fraction
from mla_moe.training.console import Console, bytes_, duration, si
from mla_moe.training.initialization import initial_state
from mla_moe.training.metrics import write_atomically
from mla_moe.training.next_token import NextTokenTrainer
from mla_moe.training.run_context import RunContext, open_split
from mla_moe.training.step import TrainState
from mla_moe.training.trainer import StepMetrics, Writer

_HELDOUT_BYTES = 2 << 30


def pretrain(recipe: Recipe, run_dir: Path, console: Console) -> None:
    """Train to `recipe.training.steps`, or for `epochs`, from the newest checkpoint if there is one. Raises as
    `Trainer.train` does."""
    PretrainTrainer(RunContext.create(recipe, run_dir, console)).train()


class PretrainTrainer(NextTokenTrainer):
    def __init__(self, context: RunContext):
        self._dataset, training = open_split(context.recipe, "train", context.tokenizer), context.recipe.training
        if training.epochs is not None:
            training = dataclasses.replace(training, steps=self._steps(context, training.epochs), epochs=None)
        super().__init__("pretrain", context, training, context.recipe.optimizer)
        self._repeated: set[str] = set()

    def _steps(self, context: RunContext, epochs: float) -> int:
        """The steps of so many epochs. They are stored in the run's directory: counting takes a pass over the text."""
        path, training = context.run_dir / "steps_of_epochs.json", context.recipe.training
        data, tokenizer = context.recipe.data, context.tokenizer
        of = {
            "batch_size": training.batch_size,
            "sequence_length": training.sequence_length,
            "tokenizer": data.tokenizer,
            "init_from": context.recipe.init_from,  # of which `bpe:SIZE` takes the tokenizer
            "text_field": data.text_field,
            "token_dtype": data.token_dtype,
        }
        counted = {"epochs": epochs, "data": self._dataset.fingerprint, **of}
        known = read_json_object(path, "run_dir") if path.exists() else {}
        if type(known.get("steps")) is int and known.items() >= counted.items():
            return known["steps"]
        context.console.print(f"tokenizing {bytes_(self._dataset.nbytes)} of text to count the steps of its epochs")
        lengths = window_lengths(self._dataset, tokenizer, training.sequence_length)
        require(len(lengths) > 0, "data.tokenizer", tokenizer.name, "loses all of the text; choose another")
        per_epoch = packed_sequences_per_epoch(lengths, training.sequence_length)
        steps = max(1, round(epochs * per_epoch / training.batch_size))
        multihost_utils.sync_global_devices("steps are counted")  # all have looked for the file
        if jax.process_index() == 0:
            write_atomically(path, json.dumps(counted | {"steps": steps}) + "\n")
        return steps

    @property
    def dataset(self) -> SkipMalformed:
        return self._dataset

    @property
    def data_files(self) -> tuple[str, Sequence[str]]:
        return "data.train", self.context.recipe.data.train

    def initial_state(self, position: DataPosition) -> tuple[TrainState, int | None]:
        context, init_from = self.context, self.context.recipe.init_from
        state = initial_state(context, self.tx, self.training.steps, position)
        step = int(state.step) or None
        if init_from:
            context.console.print(f"started from {init_from}" + (f", step {step}" if step else ""))
        return state, step

    def open_stream(self, **options: int) -> grain.DatasetIterator[Batch]:
        data, dataset = self.context.recipe.data, self.dataset
        return train_batches(data, dataset, self.context.tokenizer, ranges=dataset.ranges, **options)

    def epochs(self, documents: np.ndarray) -> dict[str, float]:
        ranges = self.dataset.ranges
        sizes = {name: self.dataset.with_text(found) * self.position.fraction for name, found in ranges.items()}
        passed = {name: count / sizes[name] for name, count in zip(ranges, documents, strict=True) if sizes[name]}
        if repeated := [name for name in passed if passed[name] > 1 and name not in self._repeated]:
            self._repeated.update(repeated)
            names = ", ".join(repeated)
            self.context.console.print(f"data.train: all documents of {names} have been read; now they repeat")
        return {f"data/epochs/{name}": count for name, count in passed.items()}

    @cached_property
    def _train_samples(self) -> dict[str, list[Document]]:
        """A sample of the training text of each source."""
        samples = {name: sample_documents(self.dataset, found) for name, found in self.dataset.ranges.items()}
        return {name: texts for name, texts in samples.items() if texts}

    @cached_property
    def _heldout(self) -> tuple[dict[str, EvalText], float]:
        """The held-out text of each source, and the bits per byte of gzip -9 for all of it."""
        if not self.context.recipe.data.heldout:
            return {}, math.nan
        text = open_split(self.context.recipe, "heldout", self.context.tokenizer)
        note = f"has {bytes_(text.nbytes)}, all of which is in memory and evaluated each time; name smaller files"
        require(text.nbytes <= _HELDOUT_BYTES, "data.heldout", self.context.recipe.data.heldout, note)
        if text.nbytes > _HELDOUT_BYTES // 16:
            self.context.console.print(f"data.heldout {note}")
        if both := sorted(text.files & self.dataset.files):
            note = f"data.heldout: {len(both)} of its files are training text too, {both[0]} among them"
            self.context.console.print(f"{note}; a loss on them says nothing about other text")
        sources = {name: [text[index] for index in found] for name, found in text.ranges.items()}
        batches = {name: self._batches(documents) for name, documents in sources.items() if any(map(len, documents))}
        return batches, gzip_bits_per_byte(text, self.context.tokenizer)

    @cached_property
    def _eval_texts(self) -> dict[str, EvalText]:
        """By source: the held-out text, and with several sources the samples of the training text, so that the losses
        of the same kind of text can be compared. The training loss is that of the mixture."""
        several = len(self.dataset.ranges) > 1 or len(self._heldout[0]) > 1
        samples = self._train_samples if several else {}
        return {name: self._batches(documents) for name, documents in samples.items()} | self._heldout[0]

    def _batches(self, documents: Sequence[Document]) -> EvalText:
        size, length = self.eval_batch_size, self.training.sequence_length
        return eval_text(documents, self.context.tokenizer, batch_size=size, sequence_length=length)

    def describe(self) -> list[tuple[str, str]]:
        cfg, training = self.context.recipe.model, self.training
        item = jnp.dtype(self.context.abstract_model.precision.compute).itemsize
        mla, mha = kv_cache_bytes_per_token(cfg, item), mha_kv_cache_bytes_per_token(cfg, item)
        flops = train_flops_per_token(cfg, training.sequence_length)
        (heldout, gzip_bits), sample = self._heldout, self.context.recipe.sample
        room = cfg.max_position_embeddings - max(map(len, self._prompts), default=0)
        fits = not sample.prompts or sample.max_new_tokens <= room
        fix = f"after the longest of sample.prompts the model has {room} positions"
        require(fits, "sample.max_new_tokens", sample.max_new_tokens, fix)
        size = bytes_(sum(text.size or 0 for text in heldout.values()))
        text = f"{size}; gzip -9 needs {gzip_bits:.3f} bits per byte" if heldout else "none"
        text = "token ids; their bytes are not known" if math.isnan(gzip_bits) and heldout else text
        limit, samples = self.context.recipe.data.max_lost_bytes_fraction, self._train_samples.items()
        texts = {name: [text for text in found if isinstance(text, str)] for name, found in samples}
        lost = [lost_fraction(self.context.tokenizer, found, name, limit) for name, found in texts.items()]
        ids = ", ".join(name for name, found in samples if len(texts[name]) < len(found))
        eos = f"{ids}; eos is {self.context.tokenizer.eos_id}"
        tokens = f"{training.batch_size * training.sequence_length:,} in {training.batch_size} packed sequences"
        return [
            ("KV cache per token", f"{bytes_(mla)}; multi-head attention {bytes_(mha)} ({mha / mla:.1f} x)"),
            ("FLOPs per token", f"{si(flops)} to train on {training.sequence_length} tokens"),
            ("tokens per step", tokens),
            ("held-out text", text),
            *([("token ids in", eos)] if ids else []),
            ("lost by the tokenizer", f"{max(lost, default=0):.2%} of the bytes of a sample"),
        ]

    def evaluate(self, number: int, state: TrainState, writer: Writer) -> dict[str, float]:
        """Loss and bits per byte of the held-out text, and the bits per byte of gzip -9; with several sources, the loss
        of each, and with several held-out ones the bits per byte of each."""
        (heldout, gzip_bits), texts = self._heldout, self._eval_texts
        nats = {name: self.nats(state, text.batches) for name, text in texts.items()}
        tokens = {name: sum(int((b["segment_ids"] != 0).sum()) for b in text.batches) for name, text in texts.items()}
        scores = {f"eval/loss/{name}": nats[name] / tokens[name] for name in texts if len(texts) > 1}
        if not heldout:
            return scores
        total = sum(nats[name] for name in heldout)
        if any(text.size is None for text in heldout.values()):
            return {"eval/loss": total / sum(tokens[name] for name in heldout), **scores}
        if len(heldout) > 1:
            each = {name: bits_per_byte(nats[name], [text]) for name, text in heldout.items()}
            scores |= {f"eval/bits_per_byte/{name}": bits for name, bits in each.items()}
        return {
            "eval/loss": total / sum(tokens[name] for name in heldout),
            "eval/bits_per_byte": bits_per_byte(total, heldout.values()),
            "eval/gzip_bits_per_byte": gzip_bits,
            **scores,
        }

    def finish(self, state: TrainState, scores: Mapping[str, float], metrics: StepMetrics, writer: Writer) -> None:
        """Sample continuations of `sample.prompts`, and write a summary for the report and the console."""
        samples = self._sample(state)
        writer.append_samples({"step": self.training.steps, **sample} for sample in samples)
        rows = {"steps": f"{self.training.steps}", "train loss": f"{metrics.loss:.3f} nats per token"}
        if "eval/bits_per_byte" in scores:
            bits, gzip_bits = scores["eval/bits_per_byte"], scores["eval/gzip_bits_per_byte"]
            rows |= {"held-out bits per byte": f"{bits:.3f}", "gzip -9 of the same files": f"{gzip_bits:.3f}"}
        if self.dataset.malformed:
            rows |= {"malformed records": f"{self.dataset.malformed} skipped"}
        if self.dataset.empty:
            rows |= {"empty documents": f"{self.dataset.empty} skipped"}
        rows["max load ratio, last tenth"] = f"{metrics.max_load_ratio_last_tenth:.2f}"
        rows["time in steps"] = duration(self.seconds)
        self.context.write_result("result", rows)
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
            self.context.abstract_model.merge(state.arrays),
            self._prompts,
            max_new_tokens=sample.max_new_tokens,
            temperature=sample.temperature,
            seed=self.context.recipe.seed,
            eos_id=tokenizer.eos_id,
        )
        pairs = zip(sample.prompts, completions, strict=True)
        return [{"prompt": prompt, "completion": tokenizer.decode(tokens)} for prompt, tokens in pairs]
