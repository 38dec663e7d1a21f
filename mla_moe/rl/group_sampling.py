"""The groups of a step: several scored completions per prompt, with dynamic sampling for DAPO."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from mla_moe.config import RLConfig
from mla_moe.rl.objectives import is_informative, overlong_penalty
from mla_moe.rl.rollout import Rollout, ScoredCompletion
from mla_moe.rl.teacher_endpoint import TopTokens


@dataclasses.dataclass(frozen=True)
class GroupBatch:
    completions: Sequence[Sequence[ScoredCompletion]]
    """One group per prompt."""
    reward_GS: np.ndarray
    """Float [groups, completions per group]: score plus overlong penalty."""
    next_prompt: int
    """Number of the first training prompt of the next step."""
    filtered: int
    """DAPO: groups that dynamic sampling dropped, because all their completions have the same accuracy (with
    `task.accuracy_weight` 0: the same reward). GRPO, Dr. GRPO, GSPO: groups of one reward, which are in the batch with
    advantages of 0. Distillation has none."""
    uniform: Mapping[str, int]
    """All sampled groups without a signal, by cause: all_truncated, all_correct, all_wrong or equal_rewards."""
    prompts_too_long: int
    """Prompts skipped because of `rl.max_prompt_tokens`."""
    teacher_logprobs: Sequence[Sequence[Sequence[float]]] | None = None
    """The teacher's, of each token of each completion, if the teacher of distillation is behind an endpoint."""
    teacher_top: Sequence[Sequence[TopTokens]] | None = None
    """In place of `teacher_logprobs`, with `rl.teacher_top_k`."""
    sample_seconds: float = math.nan
    """Duration of the rollout, if measured."""

    def metrics(self) -> dict[str, float]:
        """Metrics of the step. Lengths are in tokens; the components of the reward are unweighted."""
        completions = [completion for group in self.completions for completion in group]
        values: dict[str, list[float]] = {}  # a reward function may not apply to every completion
        for completion in completions:
            for name, value in completion.score.components.items():
                values.setdefault(name, []).append(value)
        components = {name: _mean(found) for name, found in values.items()}
        failures = collections.Counter(failure.kind for c in completions for failure in c.score.failures)
        return {
            "reward": float(self.reward_GS.mean()),
            "reward_std": float(self.reward_GS.std(axis=1).mean()),
            "accuracy": components.pop("accuracy"),
            "format_rate": components.pop("format"),
            **{f"reward/{name}": value for name, value in components.items()},
            "response_length": _mean(completion.length for completion in completions),
            "truncated": _mean(completion.truncated for completion in completions),
            "filtered_groups": self.filtered,
            **{f"no_signal/{cause}": count for cause, count in self.uniform.items()},
            "prompts_too_long": self.prompts_too_long,
            **{f"verifier/{kind}": count for kind, count in failures.items()},
        }

    @property
    def has_signal(self) -> bool:
        """Whether the step can change the policy by more than the KL: some group has different rewards."""
        return bool((self.reward_GS != self.reward_GS[:, :1]).any())


def sample_groups(rollout: Rollout, rl: RLConfig, seed: int, start: int, progress: Callable[[str], None]) -> GroupBatch:
    """Sample the groups of a step, from training prompt number `start` on.

    DAPO's dynamic sampling (arXiv 2503.14476, section 3.2) filters groups whose completions all have the same accuracy
    (with `task.accuracy_weight` 0: the same reward) and samples further prompts instead. There are at most
    `rl.max_resample_rounds` rounds, the first included. Then filtered groups fill the batch.
    """
    kept: list[list[ScoredCompletion]] = []
    uniform: list[list[ScoredCompletion]] = []
    too_long_before = rollout.prompts_too_long
    for _ in range(rl.max_resample_rounds if rl.objective == "dapo" else 1):
        prompts, after = rollout.prompts("train", start, rl.prompts_per_step - len(kept))
        first = start * rl.group_size
        groups = rollout.generate(prompts, rl.group_size, seed=seed, first_index=first, progress=progress)
        start = after
        for group in groups:
            keep = rl.objective != "dapo" or is_informative([rollout.reward.filter_metric(c.score) for c in group])
            (kept if keep else uniform).append(group)
        if len(kept) == rl.prompts_per_step:
            break
    missing, too_long = rl.prompts_per_step - len(kept), rollout.prompts_too_long - too_long_before
    chosen = [*kept, *uniform[:missing]]
    reward_GS = np.array([_rewards(group, rl) for group in chosen])
    if rl.objective not in ("dapo", "distillation"):
        uniform = [group for group, reward_S in zip(chosen, reward_GS, strict=True) if not is_informative(reward_S)]
    filtered = len(uniform) - missing
    verified = rollout.reward.has_accuracy
    causes = collections.Counter(_cause(group) if verified else "equal_rewards" for group in uniform)
    return GroupBatch(chosen, reward_GS, start, filtered, causes, too_long)


def _rewards(group: Sequence[ScoredCompletion], rl: RLConfig) -> list[float]:
    limits = rl.max_new_tokens, rl.overlong_buffer
    return [completion.score.total + overlong_penalty(completion.length, *limits) for completion in group]


def _cause(group: Sequence[ScoredCompletion]) -> str:
    """Why a group has no signal."""
    correct = {completion.score.components["accuracy"] for completion in group}
    if all(completion.truncated for completion in group):
        return "all_truncated"
    return {(1.0,): "all_correct", (0.0,): "all_wrong"}.get(tuple(correct), "equal_rewards")


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
