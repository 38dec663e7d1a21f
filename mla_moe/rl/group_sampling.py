"""The groups of a step: several scored completions per prompt, with dynamic sampling for DAPO."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mla_moe.config import RLConfig
from mla_moe.rl.objectives import is_informative, overlong_penalty
from mla_moe.rl.rollout import Rollout, ScoredCompletion


@dataclasses.dataclass(frozen=True)
class GroupBatch:
    completions: Sequence[Sequence[ScoredCompletion]]
    """One group per prompt."""
    reward_GS: np.ndarray
    """Float [groups, completions per group]: score plus overlong penalty."""
    next_prompt: int
    """Number of the first training prompt of the next step."""
    filtered: int
    """Groups that dynamic sampling dropped because all their completions had the same reward."""
    prompts_too_long: int
    """Prompts skipped because of `rl.max_prompt_tokens`."""

    @property
    def tokens(self) -> int:
        return sum(completion.length for group in self.completions for completion in group)

    def metrics(self) -> dict[str, float]:
        """Metrics of the step. Lengths are in tokens; the components of the reward are unweighted."""
        completions = [completion for group in self.completions for completion in group]
        names = completions[0].score.components
        components = {name: _mean(completion.score.components[name] for completion in completions) for name in names}
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
            "prompts_too_long": self.prompts_too_long,
            **{f"verifier/{kind}": count for kind, count in failures.items()},
        }


def sample_groups(
    rollout: Rollout, rl: RLConfig, seed: int, start: int, progress: Callable[[str], None] = lambda text: None
) -> GroupBatch:
    """Sample the groups of a step, from training prompt number `start` on.

    DAPO's dynamic sampling (arXiv 2503.14476, section 3.2) filters groups without a difference in reward and samples
    further prompts instead, in at most `rl.max_resample_rounds` rounds. Then filtered groups fill the batch.
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
    missing = rl.prompts_per_step - len(kept)
    chosen = [*kept, *uniform[:missing]]
    reward_GS = np.array([[_reward(completion, rl) for completion in group] for group in chosen])
    return GroupBatch(chosen, reward_GS, start, len(uniform) - missing, rollout.prompts_too_long - too_long_before)


def _reward(completion: ScoredCompletion, rl: RLConfig) -> float:
    return completion.score.total + overlong_penalty(completion.length, rl.max_new_tokens, rl.overlong_buffer)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
