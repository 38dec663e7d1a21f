"""Evaluation on held-out prompts: greedy, greedy prefilled with `<think>`, and sampled (pass@k, majority@k)."""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mla_moe.data.arithmetic import Split
from mla_moe.rl.rewards import BUILT_IN_COMPONENTS
from mla_moe.rl.rollout import Rollout, ScoredCompletion


class Evaluation(NamedTuple):
    """Completions of the same prompts."""

    greedy: Sequence[ScoredCompletion]
    prefilled: Sequence[ScoredCompletion]
    """Greedy, prefilled with `<think>`. Its metrics and samples are called `forced`."""
    sampled: Sequence[Sequence[ScoredCompletion]]
    """k completions per prompt at the recipe's temperature; may be empty."""
    votes: Sequence[Sequence[int | None]]
    """Numbers of the answers of `sampled`: equal answers of a prompt have the same one; None without an answer
    (`Reward.votes`)."""

    def metrics(self) -> dict[str, float]:
        """Metrics of the evaluation. `pass@1` is the fraction of sampled completions that are correct, `pass@k` that of
        prompts with a correct completion among k, `majority@k` that of prompts whose most frequent answer is correct;
        equal answers vote together. Lengths are in tokens. `verifier/KIND` counts failed verifier calls."""
        metrics = {
            "eval/accuracy": _mean(map(_correct, self.greedy)),
            "eval/forced_accuracy": _mean(map(_correct, self.prefilled)),
            "eval/format_rate": _mean(c.score.components["format"] for c in self.greedy),
            "eval/greedy_length": _mean(c.length for c in self.greedy),
        }
        samples = [completion for group in self.sampled for completion in group]
        completions = [*self.greedy, *self.prefilled, *samples]
        failures = collections.Counter(failure.kind for c in completions for failure in c.score.failures)
        metrics |= {f"eval/verifier/{kind}": float(count) for kind, count in failures.items()}
        if samples:
            k = len(self.sampled[0])
            metrics |= {
                "eval/pass@1": _mean(map(_correct, samples)),
                f"eval/pass@{k}": _mean(any(map(_correct, group)) for group in self.sampled),
                f"eval/majority@{k}": _mean(map(_majority_correct, self.sampled, self.votes)),
                "eval/sampled_format_rate": _mean(c.score.components["format"] for c in samples),
                "eval/response_length": _mean(c.length for c in samples),
            }
        return metrics

    def found_by(self) -> dict[str, int]:
        """Number of greedy completions by the format in which their answer was found (`rl.answers.parse_answer`)."""
        return dict(collections.Counter(completion.score.answer.found_by for completion in self.greedy).most_common())

    def sample_rows(self, step: int) -> list[dict[str, Any]]:
        """Rows of `samples.jsonl`: the greedy completions, without and with the prefill."""
        return [
            {
                "step": step,
                "kind": kind,
                "prompt": completion.prompt.example.question,
                "answer": completion.prompt.example.answer,
                "completion": completion.text,
                "length": completion.length,
                "reward": completion.score.total,
            }
            | {
                name if name in BUILT_IN_COMPONENTS else f"reward/{name}": value
                for name, value in completion.score.components.items()
            }
            for kind, completions in (("greedy", self.greedy), ("forced", self.prefilled))
            for completion in completions
        ]


def evaluate(
    rollout: Rollout,
    split: Split,
    num_prompts: int,
    num_samples: int,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Evaluate on the first `num_prompts` of a held-out split, with `num_samples` sampled completions per prompt."""
    prompts, _ = rollout.prompts(split, 0, num_prompts)

    def generate(kind: str, count: int, temperature: float | None = None) -> list[list[ScoredCompletion]]:
        def log(text: str) -> None:
            progress(f"{kind}: {text}")

        prefill = kind == "prefilled"
        return rollout.generate(prompts, count, seed=seed, temperature=temperature, prefill_think=prefill, progress=log)

    greedy, prefilled = ([one for (one,) in generate(kind, 1, 0.0)] for kind in ("greedy", "prefilled"))
    sampled = generate("sampled", num_samples) if num_samples else []
    return Evaluation(greedy, prefilled, sampled, rollout.votes(sampled))


_LABELS = (
    ("correct (greedy)", "eval/accuracy", ".1%"),
    ("  prefilled with <think>", "eval/forced_accuracy", ".1%"),
    ("  correct format", "eval/format_rate", ".1%"),
    ("  tokens per completion", "eval/greedy_length", ".1f"),
    ("correct (sampled, pass@1)", "eval/pass@1", ".1%"),
    ("  correct format", "eval/sampled_format_rate", ".1%"),
    ("  tokens per completion", "eval/response_length", ".1f"),
)
_AT_K = {"eval/pass@": "correct in any of", "eval/majority@": "correct majority of"}


def table(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Labels and formatted values of `Evaluation.metrics` and of `prompts_too_long`, for the terminal."""
    known = [(label, f"{metrics[key]:{form}}") for label, key, form in _LABELS if key in metrics]
    at_k = [
        (f"  {label} {key.removeprefix(prefix)} ({key.removeprefix('eval/')})", f"{value:.1%}")
        for prefix, label in _AT_K.items()
        for key, value in metrics.items()
        if key.startswith(prefix) and not key.endswith("@1")
    ]
    failed = {key: value for key, value in metrics.items() if key.startswith("eval/verifier/")}
    failures = [(f"verifier: {key.removeprefix('eval/verifier/')}", f"{value:g}") for key, value in failed.items()]
    too_long = metrics.get("prompts_too_long", 0)
    return [
        *known,
        *at_k,
        *failures,
        *([("prompts too long", f"{too_long:g}")] if too_long else []),
    ]


def _correct(completion: ScoredCompletion) -> float:
    return float(completion.score.components["accuracy"] == 1)


def _majority_correct(completions: Sequence[ScoredCompletion], votes: Sequence[int | None]) -> float:
    """Whether the most frequent answer is correct; in a tie, the one that comes first."""
    counts = collections.Counter(vote for vote in votes if vote is not None)
    return _correct(completions[votes.index(counts.most_common(1)[0][0])]) if counts else 0.0


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
