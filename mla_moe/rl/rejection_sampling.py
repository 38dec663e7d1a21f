"""Rejection sampling: sample completions of training prompts, and fine-tune on the correct ones (DeepSeek-R1, section
2.3.3)."""

import dataclasses
import json
import random
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from mla_moe.checkpoint.reader import load_arrays, open_checkpoint
from mla_moe.config import Recipe, RejectionConfig, require
from mla_moe.rl.evaluate import evaluate
from mla_moe.rl.rewards import Reward
from mla_moe.rl.rollout import Rollout, ScoredCompletion
from mla_moe.rl.tasks import open_task
from mla_moe.training.console import Console
from mla_moe.training.initialization import starting_checkpoint
from mla_moe.training.metrics import read_rows
from mla_moe.training.preemption import InterruptedRun, PreemptionSignals
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
    """Sample with the newest model of the run, keep correct completions in `rejection.jsonl`, and fine-tune on them to
    `recipe.rejection.steps`.

    The file is written once, when all prompts are sampled; a restart then continues with fine-tuning. Until then each
    chunk of prompts is saved in `rejection.parts.jsonl`, and a restart resumes after the last one. Raises `ConfigError`
    if no completion is correct, `InterruptedRun` after a signal, and what `Trainer.train` raises.
    """
    context, path = RunContext.create(recipe, run_dir, console), run_dir / FILE
    start = starting_checkpoint("sft" if recipe.rejection.start == "base" else STAGE, recipe, run_dir)
    if not path.exists():
        examples = _select(context, _sample(context))
        if jax.process_index() == 0:
            write_atomically(path, "".join(map(_line, examples)))
            (run_dir / PARTIAL_FILE).unlink()
        multihost_utils.sync_global_devices(FILE)  # other processes read it too
    RejectionTrainer(STAGE, context, recipe.rejection.steps, (str(path),), start).train()


class RejectionTrainer(SFTTrainer):
    """SFT that is evaluated on held-out prompts, as RL is."""

    def evaluate(self, number: int, state: TrainState, writer: Writer) -> dict[str, float]:
        context, recipe = self.context, self.context.recipe
        task, rl = open_task(recipe.task), recipe.rl
        with Reward(recipe.task, task, log=context.console.print) as reward:
            rollout = Rollout(rl, recipe.task.template, task, reward, context.chat_tokenizer)
            rollout.load_weights(context.abstract_model.merge(state.params | state.biases))
            scores = evaluate(rollout, rl.eval_split, rl.eval_prompts, rl.eval_samples, recipe.seed + 1).metrics()
        accuracy, form = scores["eval/accuracy"], scores["eval/format_rate"]
        context.console.print(f"held-out prompts: {accuracy:.1%} correct answers, {form:.1%} correct format")
        return scores


@dataclasses.dataclass
class RejectionSamples:
    """Completions of a chunk of prompts, or of all."""

    prompts: int
    completions: int
    next: int
    """Number of the next training prompt."""
    correct: dict[str, dict[str, int]]
    """For each question its distinct correct completions in the correct format, with their lengths in tokens."""

    def add(self, chunk: "RejectionSamples") -> None:
        self.prompts += chunk.prompts
        self.completions += chunk.completions
        self.next = chunk.next
        for question, texts in chunk.correct.items():  # an earlier chunk may have the same question
            self.correct[question] = self.correct.get(question, {}) | texts


def _sample(context: RunContext) -> RejectionSamples:
    """Completions of all prompts, including those that an earlier start saved with the same settings."""
    recipe, rejection, path = context.recipe, context.recipe.rejection, context.run_dir / PARTIAL_FILE
    rl = dataclasses.replace(recipe.rl, routing_replay=False)
    source = open_checkpoint(starting_checkpoint(STAGE, recipe, context.run_dir))
    model = context.abstract_model.merge(load_arrays(source, context.abstract_model, context.mesh))
    task = open_task(recipe.task)
    settings = [task.fingerprint, recipe.seed, rejection.samples, *map(dataclasses.asdict, (recipe.task, rl))]
    key = zlib.crc32(json.dumps(settings).encode())
    rows = [row for row in read_rows(path) if row["key"] == key]
    samples = RejectionSamples(0, 0, 0, {})
    for row in rows:
        samples.add(RejectionSamples(**{name: value for name, value in row.items() if name != "key"}))
    multihost_utils.sync_global_devices(PARTIAL_FILE)  # all processes have read the file
    if jax.process_index() == 0:  # drop rows with other settings, and a last line that was cut short by a kill
        write_atomically(path, "".join(map(_line, rows)))
    with (
        PreemptionSignals() as signals,
        Reward(recipe.task, task, log=context.console.print) as reward,
        context.console.progress(STAGE, rejection.prompts, samples.prompts) as progress,
    ):
        rollout = Rollout(rl, recipe.task.template, task, reward, context.chat_tokenizer)
        rollout.load_weights(model)
        while samples.prompts < rejection.prompts:
            count, first = min(PROMPTS_PER_CHUNK, rejection.prompts - samples.prompts), samples.next * rejection.samples
            prompts, next_prompt = rollout.prompts("train", samples.next, count)
            groups = rollout.generate(
                prompts, rejection.samples, seed=recipe.seed, first_index=first, progress=progress.status
            )
            chunk = RejectionSamples(len(prompts), sum(map(len, groups)), next_prompt, {})
            for group in groups:
                correct = {completion.text: completion.length for completion in group if _is_correct(completion)}
                question = group[0].prompt.example.question
                chunk.correct[question] = chunk.correct.get(question, {}) | correct
            if jax.process_index() == 0:
                with path.open("a", encoding="utf-8") as file:
                    file.write(_line({"key": key} | dataclasses.asdict(chunk)))
            samples.add(chunk)
            progress.update(samples.prompts, {})
            if signals.stop(samples.prompts):
                done = f"stopped after {samples.prompts} of {rejection.prompts} prompts by {signals.name}"
                raise InterruptedRun(f"{done}; completions saved")
    return samples


def _select(context: RunContext, samples: RejectionSamples) -> list[dict[str, str]]:
    """SFT examples from the correct completions, question by question."""
    rejection, correct, seed = context.recipe.rejection, samples.correct, context.recipe.seed
    chosen = {question: choose(texts, rejection, f"{seed} {question}") for question, texts in correct.items()}
    examples = [{"question": question, "completion": text} for question, texts in chosen.items() for text in texts]
    fix = (
        f"none of {samples.completions} completions is correct and in the correct format; sample more, or train longer"
    )
    require(len(examples) > 0, "rejection.prompts", rejection.prompts, fix)
    distinct, solved = sum(map(len, correct.values())), sum(map(bool, correct.values()))
    text = f"{len(examples):,} kept of {distinct:,} distinct correct ones among {samples.completions:,}"
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
