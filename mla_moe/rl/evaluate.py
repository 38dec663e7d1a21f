"""How good a model is at held-out questions: greedy, opened with `<think>`, and by several samples."""

import collections
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mla_moe.data.arithmetic import Split
from mla_moe.rl.rewards import parse
from mla_moe.rl.rollout import Answer, Rollout


class Evaluation(NamedTuple):
    """Answers to the same questions."""

    greedy: Sequence[Answer]
    forced: Sequence[Answer]
    """Greedy too, with `<think>` put into the model's mouth."""
    sampled: Sequence[Sequence[Answer]]
    """Several to each question, at the recipe's temperature; may be none."""

    def metrics(self) -> dict[str, float]:
        """A row of `metrics.jsonl`. `pass@1` is the share of right samples, `pass@k` that of questions with a right one
        among k, `majority@k` that of questions whose commonest answer is right. Lengths are in tokens."""
        metrics = {
            "eval/accuracy": _mean(_right(a) for a in self.greedy),
            "eval/forced_accuracy": _mean(_right(a) for a in self.forced),
            "eval/format_rate": _mean(a.score.parts["format"] for a in self.greedy),
            "eval/greedy_length": _mean(a.length for a in self.greedy),
        }
        samples = [answer for answers in self.sampled for answer in answers]
        if samples:
            k = len(self.sampled[0])
            metrics |= {
                "eval/pass@1": _mean(map(_right, samples)),
                f"eval/pass@{k}": _mean(any(map(_right, answers)) for answers in self.sampled),
                f"eval/majority@{k}": _mean(map(_majority, self.sampled)),
                "eval/sampled_format_rate": _mean(a.score.parts["format"] for a in samples),
                "eval/response_length": _mean(a.length for a in samples),
            }
        return metrics

    def rows(self, step: int) -> list[dict[str, Any]]:
        """Rows of `samples.jsonl`: greedy answers, free and opened."""
        return [
            {
                "step": step,
                "kind": kind,
                "prompt": answer.question.example.question,
                "answer": answer.question.example.answer,
                "completion": answer.text,
                "length": answer.length,
                "reward": answer.score.total,
            }
            | answer.score.parts
            for kind, answers in (("greedy", self.greedy), ("forced", self.forced))
            for answer in answers
        ]


def evaluate(rollout: Rollout, split: Split, questions: int, samples: int, seed: int) -> Evaluation:
    """Ask the first `questions` of a held-out split."""
    asked, _ = rollout.questions(split, 0, questions)
    (greedy, forced) = (
        [answers[0] for answers in rollout.answers(asked, seed=seed, temperature=0.0, opened=opened)]
        for opened in (False, True)
    )
    sampled = rollout.answers(asked, samples, seed=seed) if samples else []
    return Evaluation(greedy, forced, sampled)


def _right(answer: Answer) -> float:
    return float(answer.score.parts["accuracy"] == 1)


def _majority(answers: Sequence[Answer]) -> float:
    """Whether the commonest answer is right; of several that are as common, the first."""
    given = {answer: parse(answer.text)[1] for answer in answers}
    counts = collections.Counter(text for text in given.values() if text is not None)
    if not counts:
        return 0.0
    commonest = counts.most_common(1)[0][0]
    return next(_right(answer) for answer, text in given.items() if text == commonest)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
