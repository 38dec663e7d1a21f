"""How good a model is at held-out questions: greedy, opened with `<think>`, and by several samples."""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mla_moe.data.arithmetic import Split
from mla_moe.rl.rewards import BUILT_IN_PARTS, parse_completion
from mla_moe.rl.rollout import Rollout, ScoredCompletion


class Evaluation(NamedTuple):
    """Answers to the same questions."""

    greedy: Sequence[ScoredCompletion]
    forced: Sequence[ScoredCompletion]
    """Greedy too, with `<think>` put into the model's mouth."""
    sampled: Sequence[Sequence[ScoredCompletion]]
    """Several to each question, at the recipe's temperature; may be none."""

    def metrics(self) -> dict[str, float]:
        """A row of `metrics.jsonl`. `pass@1` is the share of right samples, `pass@k` that of questions with a right one
        among k, `majority@k` that of questions whose commonest answer is right. Lengths are in tokens. `verifier/KIND`
        counts answers that could not be judged."""
        metrics = {
            "eval/accuracy": _mean(_right(a) for a in self.greedy),
            "eval/forced_accuracy": _mean(_right(a) for a in self.forced),
            "eval/format_rate": _mean(a.score.parts["format"] for a in self.greedy),
            "eval/greedy_length": _mean(a.length for a in self.greedy),
        }
        samples = [answer for answers in self.sampled for answer in answers]
        answers = [*self.greedy, *self.forced, *samples]
        failed = collections.Counter(failure.kind for answer in answers for failure in answer.score.failures)
        metrics |= {f"eval/verifier/{kind}": float(count) for kind, count in failed.items()}
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
            | {
                part if part in BUILT_IN_PARTS else f"reward/{part}": value
                for part, value in answer.score.parts.items()
            }
            for kind, answers in (("greedy", self.greedy), ("forced", self.forced))
            for answer in answers
        ]


def evaluate(
    rollout: Rollout,
    split: Split,
    questions: int,
    samples: int,
    seed: int,
    note: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Ask the first `questions` of a held-out split, and `note` how far it is."""
    asked, _ = rollout.questions(split, 0, questions)

    def answers(kind: str, **how: Any) -> list[list[ScoredCompletion]]:
        return rollout.answers(asked, seed=seed, progress=lambda text: note(f"{kind}: {text}"), **how)

    greedy, forced = (
        [one for (one,) in answers(kind, temperature=0.0, opened=kind != "greedy")] for kind in ("greedy", "opened")
    )
    return Evaluation(greedy, forced, answers("sampled", each=samples) if samples else [])


_TABLE = (
    ("right answers", "eval/accuracy", ".1%"),
    ("  opened with <think>", "eval/forced_accuracy", ".1%"),
    ("right form", "eval/format_rate", ".1%"),
    ("tokens of an answer", "eval/greedy_length", ".1f"),
    ("sampled: right answers", "eval/pass@1", ".1%"),
    ("  right form", "eval/sampled_format_rate", ".1%"),
    ("  tokens of an answer", "eval/response_length", ".1f"),
)
_SEVERAL = {"eval/pass@": "a right one among", "eval/majority@": "right majority of"}


def table(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """`Evaluation.metrics` and what else was counted, for people: names and figures."""
    known = [(name, f"{metrics[key]:{form}}") for name, key, form in _TABLE if key in metrics]
    several = [
        (f"  {name} {key.removeprefix(prefix)}", f"{value:.1%}")
        for prefix, name in _SEVERAL.items()
        for key, value in metrics.items()
        if key.startswith(prefix) and not key.endswith("@1")
    ]
    failed = {key: value for key, value in metrics.items() if key.startswith("eval/verifier/")}
    failures = [(f"judges: {key.removeprefix('eval/verifier/')}", f"{value:g}") for key, value in failed.items()]
    too_long = metrics.get("prompts_too_long", 0)
    return [*known, *several, *failures, *([("prompts too long", f"{too_long:g}")] if too_long else [])]


def _right(answer: ScoredCompletion) -> float:
    return float(answer.score.parts["accuracy"] == 1)


def _majority(answers: Sequence[ScoredCompletion]) -> float:
    """Whether the commonest answer is right; of several that are as common, the first."""
    given = {answer: parse_completion(answer.text)[1] for answer in answers}
    counts = collections.Counter(text for text in given.values() if text is not None)
    if not counts:
        return 0.0
    commonest = counts.most_common(1)[0][0]
    return next(_right(answer) for answer, text in given.items() if text == commonest)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
