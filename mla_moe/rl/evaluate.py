"""How good a model is at held-out questions: greedy, opened with `<think>`, and by several samples."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mla_moe.rl.rollout import Answer


class Evaluation(NamedTuple):
    """Answers to each of the same questions."""

    greedy: Sequence[Answer]
    forced: Sequence[Answer]
    """Greedy too, with `<think>` put into the model's mouth."""
    sampled: Sequence[Sequence[Answer]]
    """Several for each question, at the recipe's temperature."""

    def metrics(self) -> dict[str, float]:
        """Rows of `metrics.jsonl`. `pass@k` is the share of questions with a right answer among k samples (for smaller
        k expected over all choices of k, arXiv 2107.03374), `majority@k` that of questions whose commonest answer is
        right."""
        out = {
            "eval/accuracy": _mean(a.scores.values["accuracy"] for a in self.greedy),
            "eval/forced_accuracy": _mean(a.scores.values["accuracy"] for a in self.forced),
            "eval/format_rate": _mean(a.scores.values["format"] for a in self.greedy),
            "eval/greedy_length": _mean(len(a.completion.tokens) for a in self.greedy),
        }
        if not (k := len(self.sampled[0])):
            return out
        right_QK = np.array([[a.scores.values["accuracy"] for a in answers] for answers in self.sampled]) == 1
        everything = [a for answers in self.sampled for a in answers]
        return out | {
            "eval/pass@1": float(right_QK.mean()),
            f"eval/pass@{k}": float(right_QK.any(axis=1).mean()),
            f"eval/majority@{k}": _mean(_majority(answers) for answers in self.sampled),
            "eval/sampled_format_rate": _mean(a.scores.values["format"] for a in everything),
            "eval/response_length": _mean(len(a.completion.tokens) for a in everything),
        }


def _majority(answers: Sequence[Answer]) -> float:
    """Whether the commonest of the given answers is right; the first of several that are as common."""
    given = [a for a in answers if a.given is not None]
    if not given:
        return 0.0
    commonest, _ = collections.Counter(a.given for a in given).most_common(1)[0]
    return next(float(a.scores.values["accuracy"]) for a in given if a.given == commonest)


def _mean(values) -> float:
    return float(np.mean(list(values)))


def rows(step: int, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Rows of `samples.jsonl`: the greedy answers, which the report puts side by side before and after."""
    return [
        {
            "step": step,
            "kind": "greedy",
            "prompt": a.question.example.question,
            "answer": a.question.example.answer,
            "completion": a.text,
            "length": len(a.completion.tokens),
            "reward": a.reward,
            **a.scores.values,
        }
        for a in evaluation.greedy
    ]
