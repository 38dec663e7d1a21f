"""Rejection sampling: a model answers training questions, and what it got right is learned (DeepSeek-R1, section
2.3.3)."""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

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
from mla_moe.training.run import add_summary, write_atomically
from mla_moe.training.setup import Setup
from mla_moe.training.sft import FineTuning
from mla_moe.training.step import TrainState

STAGE = "rejection"
FILE = "rejection.jsonl"
AT_ONCE = 256
"""Questions whose answers are in memory at one time."""


def learn_from_the_best(recipe: Recipe, run_dir: Path, console: Console) -> None:
    """Sample with the newest model of the run, keep the best answers in `rejection.jsonl`, and fine-tune on them to
    `recipe.rejection.steps`. The file is written once, whole; with it there, a second start goes on to fine-tuning.

    Raises `ConfigError` where no answer is right, and what fine-tuning raises.
    """
    setup, path = Setup.of(recipe, run_dir, console), run_dir / FILE
    start = model_before("sft" if recipe.rejection.start == "base" else STAGE, recipe, run_dir)
    if not path.exists():
        pairs = _sample(setup)
        if jax.process_index() == 0:
            write_atomically(path, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
        multihost_utils.sync_global_devices(FILE)  # the others read it too
    Relearning(STAGE, setup, recipe.rejection.steps, (str(path),), start, prompt_of).run()


class Relearning(FineTuning):
    """Fine-tuning after which the model answers held-out questions, as after reinforcement learning."""

    def evaluate(self, state: TrainState) -> dict[str, float]:
        recipe = self.setup.recipe
        task, rl = open_task(recipe.task), recipe.rl
        with Reward(recipe.task, task) as reward:
            rollout = Rollout(rl, recipe.task.template, task, reward, self.setup.language)
            rollout.load_weights(self.setup.skeleton.merge(state.params | state.biases))
            scores = evaluate(rollout, rl.eval_split, rl.eval_prompts, rl.eval_samples, recipe.seed + 1).metrics()
        right, form = scores["eval/accuracy"], scores["eval/format_rate"]
        self.setup.console.say(f"held-out questions: {right:.1%} right, {form:.1%} in form")
        return scores


def _sample(setup: Setup) -> list[dict[str, str]]:
    """The pairs that are worth learning, question by question."""
    recipe, wanted = setup.recipe, setup.recipe.rejection
    rl = dataclasses.replace(recipe.rl, routing_replay=False)
    source = open_source(model_before(STAGE, recipe, setup.run_dir))
    model = setup.skeleton.merge(read_arrays(source, setup.skeleton, setup.mesh))
    task = open_task(recipe.task)
    right: dict[str, list[Answer]] = {}
    sampled, number, done = 0, 0, 0
    with Reward(recipe.task, task) as reward, setup.console.progress(STAGE, wanted.questions) as progress:
        rollout = Rollout(rl, recipe.task.template, task, reward, setup.language)
        rollout.load_weights(model)
        while done < wanted.questions:
            first = number * wanted.samples
            questions, number = rollout.questions("train", number, min(AT_ONCE, wanted.questions - done))
            for answers in rollout.answers(
                questions, wanted.samples, seed=recipe.seed, first=first, progress=progress.note
            ):
                sampled += len(answers)
                asked = answers[0].question.example.question  # may have been asked before
                right.setdefault(asked, []).extend(answer for answer in answers if _is_best(answer))
            done += len(questions)
            progress.update(done, {})
    chosen = {asked: choose(answers, wanted, f"{recipe.seed} {asked}") for asked, answers in right.items()}
    pairs = [{"question": asked, "completion": text} for asked, texts in chosen.items() for text in texts]
    fix = f"none of {sampled} answers is right and in form; ask more, or a better model"
    require(len(pairs) > 0, "rejection.questions", wanted.questions, fix)
    good, solved = sum(map(len, right.values())), sum(map(bool, right.values()))
    text = f"{len(pairs):,} kept of {good:,} right ones among {sampled:,}"
    setup.console.say(f"answers: {text}; {solved:,} of {len(right):,} questions have one")
    if jax.process_index() == 0:
        add_summary(setup.run_dir, {"sampled answers": text})
    return pairs


def _is_best(answer: Answer) -> bool:
    return answer.score.parts["format"] == 1 and answer.score.parts["accuracy"] == 1


def choose(answers: Sequence[Answer], wanted: Rejection, seed: str) -> list[str]:
    """At most `keep` different texts, the shortest or any, the same for the same seed."""
    texts = {answer.text: answer.length for answer in answers}
    order = list(texts)
    if wanted.prefer == "shortest":
        order.sort(key=lambda text: texts[text])
    else:
        random.Random(seed).shuffle(order)
    return order[: wanted.keep]
