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

from mla_moe.config import require
from mla_moe.interop.pretrained import read_arrays
from mla_moe.interop.source import open_source
from mla_moe.recipe import Recipe, Rejection
from mla_moe.rl.evaluate import evaluate
from mla_moe.rl.prompts import prompt_of
from mla_moe.rl.rewards import Reward
from mla_moe.rl.rollout import Answer, Rollout
from mla_moe.rl.tasks import open_task
from mla_moe.training.begin import model_before
from mla_moe.training.console import Console
from mla_moe.training.metrics import read_rows
from mla_moe.training.run import Signals, add_summary, write_atomically
from mla_moe.training.setup import Interrupted, Setup
from mla_moe.training.sft import FineTuning
from mla_moe.training.step import TrainState

STAGE = "rejection"
FILE = "rejection.jsonl"
PARTS = "rejection.parts.jsonl"
AT_ONCE = 256
"""Questions whose answers are in memory at one time."""


def learn_from_the_best(recipe: Recipe, run_dir: Path, console: Console) -> None:
    """Sample with the newest model of the run, keep the best answers in `rejection.jsonl`, and fine-tune on them to
    `recipe.rejection.steps`. The file is written once, whole; with it there, a second start goes on to fine-tuning.
    Until then every part of the questions leaves its right answers, and a second start goes on behind them.

    Raises `ConfigError` where no answer is right, `Interrupted` after a signal, and what fine-tuning raises.
    """
    setup, path = Setup.of(recipe, run_dir, console), run_dir / FILE
    start = model_before("sft" if recipe.rejection.start == "base" else STAGE, recipe, run_dir)
    if not path.exists():
        pairs = _best(setup, _sample(setup))
        if jax.process_index() == 0:
            write_atomically(path, "".join(map(_line, pairs)))
            (run_dir / PARTS).unlink()
        multihost_utils.sync_global_devices(FILE)  # the others read it too
    Relearning(STAGE, setup, recipe.rejection.steps, (str(path),), start, prompt_of).run()


class Relearning(FineTuning):
    """Fine-tuning after which the model answers held-out questions, as after reinforcement learning."""

    def evaluate(self, state: TrainState) -> dict[str, float]:
        recipe = self.setup.recipe
        task, rl = open_task(recipe.task), recipe.rl
        with Reward(recipe.task, task, tell=self.setup.console.say) as reward:
            rollout = Rollout(rl, recipe.task.template, task, reward, self.setup.language)
            rollout.load_weights(self.setup.skeleton.merge(state.params | state.biases))
            scores = evaluate(rollout, rl.eval_split, rl.eval_prompts, rl.eval_samples, recipe.seed + 1).metrics()
        right, form = scores["eval/accuracy"], scores["eval/format_rate"]
        self.setup.console.say(f"held-out questions: {right:.1%} right, {form:.1%} in form")
        return scores


@dataclasses.dataclass
class Sampled:
    """What came of a part of the questions, or of all."""

    questions: int
    answers: int
    next: int
    """The number of the next training question."""
    right: dict[str, dict[str, int]]
    """Right answers in form to each question that was asked, and their tokens."""

    def add(self, part: "Sampled") -> None:
        self.questions += part.questions
        self.answers += part.answers
        self.next = part.next
        for asked, texts in part.right.items():  # which may have been asked before
            self.right[asked] = self.right.get(asked, {}) | texts


def _sample(setup: Setup) -> Sampled:
    """The answers to all questions, those among them that an earlier start got with the same settings."""
    recipe, wanted, parts = setup.recipe, setup.recipe.rejection, setup.run_dir / PARTS
    rl = dataclasses.replace(recipe.rl, routing_replay=False)
    source = open_source(model_before(STAGE, recipe, setup.run_dir))
    model = setup.skeleton.merge(read_arrays(source, setup.skeleton, setup.mesh))
    task = open_task(recipe.task)
    settings = [task.fingerprint, recipe.seed, wanted.samples, *map(dataclasses.asdict, (recipe.task, rl))]
    key = zlib.crc32(json.dumps(settings).encode())
    whole, rows = Sampled(0, 0, 0, {}), [row for row in read_rows(parts) if row["key"] == key]
    for row in rows:
        whole.add(Sampled(row["questions"], row["answers"], row["next"], row["right"]))
    multihost_utils.sync_global_devices(PARTS)  # all have read
    if jax.process_index() == 0:  # what was asked otherwise, and a line that a kill cut short
        write_atomically(parts, "".join(map(_line, rows)))
    with (
        Signals() as signals,
        Reward(recipe.task, task, tell=setup.console.say) as reward,
        setup.console.progress(STAGE, wanted.questions, whole.questions) as progress,
    ):
        rollout = Rollout(rl, recipe.task.template, task, reward, setup.language)
        rollout.load_weights(model)
        while whole.questions < wanted.questions:
            first, count = whole.next * wanted.samples, min(AT_ONCE, wanted.questions - whole.questions)
            questions, number = rollout.questions("train", whole.next, count)
            groups = rollout.answers(questions, wanted.samples, seed=recipe.seed, first=first, progress=progress.note)
            part = Sampled(len(questions), sum(map(len, groups)), number, {})
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
                what = f"stopped after {whole.questions} of {wanted.questions} questions by {signals.name}"
                raise Interrupted(f"{what}; answers saved")
    return whole


def _best(setup: Setup, sampled: Sampled) -> list[dict[str, str]]:
    """The pairs that are worth learning, question by question."""
    wanted, right = setup.recipe.rejection, sampled.right
    chosen = {asked: choose(texts, wanted, f"{setup.recipe.seed} {asked}") for asked, texts in right.items()}
    pairs = [{"question": asked, "completion": text} for asked, texts in chosen.items() for text in texts]
    fix = f"none of {sampled.answers} answers is right and in form; ask more, or a better model"
    require(len(pairs) > 0, "rejection.questions", wanted.questions, fix)
    good, solved = sum(map(len, right.values())), sum(map(bool, right.values()))
    text = f"{len(pairs):,} kept of {good:,} different right ones among {sampled.answers:,}"
    setup.console.say(f"answers: {text}; {solved:,} of {len(right):,} questions have one")
    if jax.process_index() == 0:
        add_summary(setup.run_dir, {"sampled answers": text})
    return pairs


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _is_best(answer: Answer) -> bool:
    return answer.score.parts["format"] == 1 and answer.score.parts["accuracy"] == 1


def choose(texts: Mapping[str, int], wanted: Rejection, seed: str) -> list[str]:
    """At most `keep` of different texts, whose tokens are given: the shortest or any, the same for the same seed."""
    order = list(texts)
    if wanted.prefer == "shortest":
        order.sort(key=lambda text: texts[text])
    else:
        random.Random(seed).shuffle(order)
    return order[: wanted.keep]
