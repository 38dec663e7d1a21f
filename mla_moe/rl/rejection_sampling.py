"""Rejection sampling: a model answers training questions, and what it got right is learned (DeepSeek-R1, section
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

from mla_moe.checkpoint.pretrained import read_arrays
from mla_moe.checkpoint.source import open_any_checkpoint
from mla_moe.config import Recipe, RejectionConfig, require
from mla_moe.rl.evaluate import evaluate
from mla_moe.rl.rewards import Reward
from mla_moe.rl.rollout import Rollout, ScoredCompletion
from mla_moe.rl.tasks.task import open_task
from mla_moe.text.prompts import render_prompt
from mla_moe.training.console import Console
from mla_moe.training.initialization import model_before
from mla_moe.training.metrics import read_rows
from mla_moe.training.run_context import InterruptedRun, RunContext
from mla_moe.training.run_directory import PreemptionSignals, add_summary, write_atomically
from mla_moe.training.sft import SFTTrainer
from mla_moe.training.step import TrainState

STAGE = "rejection"
FILE = "rejection.jsonl"
PARTIAL_FILE = "rejection.parts.jsonl"
AT_ONCE = 256
"""Questions whose answers are in memory at one time."""


def train_rejection(recipe: Recipe, run_dir: Path, console: Console) -> None:
    """Sample with the newest model of the run, keep the best answers in `rejection.jsonl`, and fine-tune on them to
    `recipe.rejection.steps`. The file is written once, whole; with it there, a second start goes on to fine-tuning.
    Until then every part of the questions leaves its right answers, and a second start goes on behind them.

    Raises `ConfigError` where no answer is right, `Interrupted` after a signal, and what fine-tuning raises.
    """
    setup, path = RunContext.of(recipe, run_dir, console), run_dir / FILE
    start = model_before("sft" if recipe.rejection.start == "base" else STAGE, recipe, run_dir)
    if not path.exists():
        pairs = _best(setup, _sample(setup))
        if jax.process_index() == 0:
            write_atomically(path, "".join(map(_line, pairs)))
            (run_dir / PARTIAL_FILE).unlink()
        multihost_utils.sync_global_devices(FILE)  # the others read it too
    RejectionTrainer(STAGE, setup, recipe.rejection.steps, (str(path),), start, render_prompt).run()


class RejectionTrainer(SFTTrainer):
    """Fine-tuning after which the model answers held-out questions, as after reinforcement learning."""

    def evaluate(self, state: TrainState) -> dict[str, float]:
        recipe = self.setup.recipe
        task, rl = open_task(recipe.task), recipe.rl
        with Reward(recipe.task, task, tell=self.setup.console.say) as reward:
            rollout = Rollout(rl, recipe.task.template, task, reward, self.setup.language)
            rollout.load_weights(self.setup.abstract_model.merge(state.params | state.biases))
            scores = evaluate(rollout, rl.eval_split, rl.eval_prompts, rl.eval_samples, recipe.seed + 1).metrics()
        right, form = scores["eval/accuracy"], scores["eval/format_rate"]
        self.setup.console.say(f"held-out questions: {right:.1%} right, {form:.1%} in form")
        return scores


@dataclasses.dataclass
class RejectionSamples:
    """What came of a part of the questions, or of all."""

    questions: int
    answers: int
    next: int
    """The number of the next training question."""
    right: dict[str, dict[str, int]]
    """Right answers in form to each question that was asked, and their tokens."""

    def add(self, part: "RejectionSamples") -> None:
        self.questions += part.questions
        self.answers += part.answers
        self.next = part.next
        for asked, texts in part.right.items():  # which may have been asked before
            self.right[asked] = self.right.get(asked, {}) | texts


def _sample(setup: RunContext) -> RejectionSamples:
    """The answers to all questions, those among them that an earlier start got with the same settings."""
    recipe, wanted, parts = setup.recipe, setup.recipe.rejection, setup.run_dir / PARTIAL_FILE
    rl = dataclasses.replace(recipe.rl, routing_replay=False)
    source = open_any_checkpoint(model_before(STAGE, recipe, setup.run_dir))
    model = setup.abstract_model.merge(read_arrays(source, setup.abstract_model, setup.mesh))
    task = open_task(recipe.task)
    settings = [task.fingerprint, recipe.seed, wanted.samples, *map(dataclasses.asdict, (recipe.task, rl))]
    key = zlib.crc32(json.dumps(settings).encode())
    whole, rows = RejectionSamples(0, 0, 0, {}), [row for row in read_rows(parts) if row["key"] == key]
    for row in rows:
        whole.add(RejectionSamples(row["questions"], row["answers"], row["next"], row["right"]))
    multihost_utils.sync_global_devices(PARTIAL_FILE)  # all have read
    if jax.process_index() == 0:  # what was asked otherwise, and a line that a kill cut short
        write_atomically(parts, "".join(map(_line, rows)))
    with (
        PreemptionSignals() as signals,
        Reward(recipe.task, task, tell=setup.console.say) as reward,
        setup.console.progress(STAGE, wanted.prompts, whole.questions) as progress,
    ):
        rollout = Rollout(rl, recipe.task.template, task, reward, setup.language)
        rollout.load_weights(model)
        while whole.questions < wanted.prompts:
            first, count = whole.next * wanted.samples, min(AT_ONCE, wanted.prompts - whole.questions)
            questions, number = rollout.questions("train", whole.next, count)
            groups = rollout.answers(questions, wanted.samples, seed=recipe.seed, first=first, progress=progress.note)
            part = RejectionSamples(len(questions), sum(map(len, groups)), number, {})
            for answers in groups:
                best = {answer.text: answer.length for answer in answers if _is_best(answer)}
                asked = answers[0].question.example.question
                part.right[asked] = part.right.get(asked, {}) | best
            if jax.process_index() == 0:
                with parts.open("a", encoding="utf-8") as file:
                    file.write(_line({"key": key} | dataclasses.asdict(part)))
            whole.add(part)
            progress.update(whole.questions, {})
            if signals.stop(whole.questions):
                what = f"stopped after {whole.questions} of {wanted.prompts} questions by {signals.name}"
                raise InterruptedRun(f"{what}; answers saved")
    return whole


def _best(setup: RunContext, sampled: RejectionSamples) -> list[dict[str, str]]:
    """The pairs that are worth learning, question by question."""
    wanted, right = setup.recipe.rejection, sampled.right
    chosen = {asked: choose(texts, wanted, f"{setup.recipe.seed} {asked}") for asked, texts in right.items()}
    pairs = [{"question": asked, "completion": text} for asked, texts in chosen.items() for text in texts]
    fix = f"none of {sampled.answers} answers is right and in form; ask more, or a better model"
    require(len(pairs) > 0, "rejection.prompts", wanted.prompts, fix)
    good, solved = sum(map(len, right.values())), sum(map(bool, right.values()))
    text = f"{len(pairs):,} kept of {good:,} different right ones among {sampled.answers:,}"
    setup.console.say(f"answers: {text}; {solved:,} of {len(right):,} questions have one")
    if jax.process_index() == 0:
        add_summary(setup.run_dir, {"sampled answers": text})
    return pairs


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _is_best(answer: ScoredCompletion) -> bool:
    return answer.score.parts["format"] == 1 and answer.score.parts["accuracy"] == 1


def choose(texts: Mapping[str, int], wanted: RejectionConfig, seed: str) -> list[str]:
    """At most `keep` of different texts, whose tokens are given: the shortest or any, the same for the same seed."""
    order = list(texts)
    if wanted.prefer == "shortest":
        order.sort(key=lambda text: texts[text])
    else:
        random.Random(seed).shuffle(order)
    return order[: wanted.keep]
