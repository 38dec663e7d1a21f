"""Rejection sampling: sample completions of training prompts, and fine-tune on the correct ones (DeepSeek-R1, section
2.3.3)."""

import dataclasses
import json
import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from mla_moe.checkpoint.bucket_run import synchronize
from mla_moe.config import Recipe, RejectionConfig, require
from mla_moe.rl.evaluate import evaluate
from mla_moe.rl.rollout import ScoredCompletion, open_rollout
from mla_moe.rl.teacher import Teacher
from mla_moe.training.console import Console
from mla_moe.training.errors import InterruptedRun
from mla_moe.training.initialization import starting_arrays, starting_checkpoint
from mla_moe.training.metrics import read_rows
from mla_moe.training.preemption import PreemptionSignals
from mla_moe.training.run_context import RunContext
from mla_moe.training.run_directory import add_summary, write_atomically
from mla_moe.training.sft import SFTTrainer
from mla_moe.training.step import TrainState
from mla_moe.training.trainer import Writer

STAGE = "rejection"
FILE = "rejection.jsonl"
PARTIAL_FILE = "rejection.parts.jsonl"
PROMPTS_PER_CHUNK = 256
"""Prompts whose completions are in memory at one time."""


def train_rejection(recipe: Recipe, run_dir: Path, console: Console) -> None:
    """Sample with the newest model of the run or with `rejection.sampler`, keep correct completions in
    `rejection.jsonl`, and fine-tune on them to `recipe.rejection.steps`.

    The file is written once, when all prompts are sampled; a restart then continues with fine-tuning. Until then each
    chunk of prompts is saved in `rejection.parts.jsonl`, and a restart resumes after the last one. Raises `ConfigError`
    if no completion is correct, `InterruptedRun` after a signal, and what `Trainer.train` raises.
    """
    context, path = RunContext.create(recipe, run_dir, console, recipe.lora), run_dir / FILE
    start = starting_checkpoint("sft" if recipe.rejection.start == "base" else STAGE, recipe, run_dir)
    if not path.exists():
        examples = _select(context, _sample(context))
        if jax.process_index() == 0:
            write_atomically(path, map(_line, examples))
            (run_dir / PARTIAL_FILE).unlink()
        synchronize(run_dir, FILE)  # other processes read it too
    RejectionTrainer(STAGE, context, recipe.rejection.steps, (str(path),), start).train()


class RejectionTrainer(SFTTrainer):
    """SFT that is evaluated on held-out prompts, as RL is."""

    def evaluate(self, number: int, state: TrainState, writer: Writer) -> dict[str, float]:
        context, rl = self.context, self.context.recipe.rl
        with open_rollout(context, rl) as rollout:
            rollout.load_weights(context.abstract_model.merge(state.arrays))
            seed = context.recipe.seed + 1
            scores = evaluate(rollout, rl.eval_split, rl.eval_prompts, rl.eval_samples, seed).metrics()
        accuracy, format_rate = scores["eval/accuracy"], scores["eval/format_rate"]
        context.console.print(f"held-out prompts: {accuracy:.1%} correct answers, {format_rate:.1%} correct format")
        return scores


def _sample(context: RunContext) -> list[dict[str, Any]]:
    """Completions of all prompts, including those that an earlier start saved with the same settings.

    Each row of `rejection.parts.jsonl` has as `correct` a question with its distinct correct completions in the correct
    format and their lengths in tokens. The last row of a chunk also has the numbers of the chunk's `prompts` and
    `completions`, and of the `next` training prompt.
    """
    recipe, rejection, path = context.recipe, context.recipe.rejection, context.run_dir / PARTIAL_FILE
    rl, seed, samples = dataclasses.replace(recipe.rl, routing_replay=False), recipe.seed, rejection.samples
    if rejection.sampler is not None:
        teacher = Teacher(rejection.sampler, "rejection.sampler", context)
        model = teacher.model.merge(teacher.load())
    else:
        start = starting_checkpoint(STAGE, recipe, context.run_dir)
        model = context.abstract_model.merge(starting_arrays(start, context))
    with open_rollout(context, rl) as rollout:
        sections = map(dataclasses.asdict, (recipe.task, rl))
        key = zlib.crc32(json.dumps([rollout.task.fingerprint, seed, samples, rejection.sampler, *sections]).encode())
        rows = [row for row in read_rows(path) if row.get("key") == key]
        while rows and "next" not in rows[-1]:  # of a chunk that a kill left incomplete
            rows.pop()
        multihost_utils.sync_global_devices(PARTIAL_FILE)  # all processes have read the file
        if jax.process_index() == 0:  # drop rows with other settings, and a last line that was cut short by a kill
            write_atomically(path, map(_line, rows))
        done, number = sum(row.get("prompts", 0) for row in rows), rows[-1]["next"] if rows else 0
        rollout.load_weights(model)
        with PreemptionSignals() as signals, context.console.progress(STAGE, rejection.prompts, done) as progress:
            while done < rejection.prompts:
                first, count = number * samples, min(PROMPTS_PER_CHUNK, rejection.prompts - done)
                prompts, number = rollout.prompts("train", number, count)
                groups = rollout.generate(prompts, samples, seed=seed, first_index=first, progress=progress.status)
                counts = {"prompts": len(prompts), "completions": sum(map(len, groups)), "next": number}
                correct = [{one.text: one.length for one in group if _is_correct(one)} for group in groups]
                questions = (prompt.example.question for prompt in prompts)
                found = _merge(zip(questions, correct, strict=True))
                chunk = [{"key": key, "correct": {question: texts}} for question, texts in found.items()]
                chunk[-1] |= counts
                rows += chunk
                if jax.process_index() == 0:
                    with path.open("a", encoding="utf-8") as file:
                        file.writelines(map(_line, chunk))
                done += len(prompts)
                progress.update(done, {})
                if signals.stop(done):
                    stopped = f"stopped after {done} of {rejection.prompts} prompts by {signals.name}"
                    raise InterruptedRun(f"{stopped}; completions saved")
    return rows


def _merge(found: Iterable[tuple[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Completions by question, which may occur several times."""
    merged: dict[str, dict[str, int]] = {}
    for question, texts in found:
        merged[question] = merged.get(question, {}) | texts
    return merged


def _select(context: RunContext, rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """SFT examples from the correct completions, question by question."""
    rejection, seed = context.recipe.rejection, context.recipe.seed
    correct = _merge(item for row in rows for item in row["correct"].items())
    completions = sum(row.get("completions", 0) for row in rows)
    chosen = {question: choose(texts, rejection, f"{seed} {question}") for question, texts in correct.items()}
    examples = [{"question": question, "completion": text} for question, texts in chosen.items() for text in texts]
    fix = f"none of {completions} completions is correct and in the correct format; sample more, or train longer"
    require(len(examples) > 0, "rejection.prompts", rejection.prompts, fix)
    distinct, solved = sum(map(len, correct.values())), sum(map(bool, correct.values()))
    text = f"{len(examples):,} kept of {distinct:,} distinct correct ones among {completions:,}"
    context.console.print(f"completions: {text}; {solved:,} of {len(correct):,} prompts have one")
    if jax.process_index() == 0:
        add_summary(context.run_dir, {"sampled completions": text})
    return examples


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _is_correct(completion: ScoredCompletion) -> bool:
    return completion.score.components["format"] == 1 and completion.score.components["accuracy"] == 1


def choose(texts: Mapping[str, int], rejection: RejectionConfig, seed: str) -> list[str]:
    """At most `keep` of distinct texts, given with their lengths in tokens: the shortest, or random ones by `seed`."""
    order = list(texts)
    if rejection.prefer == "shortest":
        order.sort(key=lambda text: texts[text])
    else:
        random.Random(seed).shuffle(order)
    return order[: rejection.keep]
