"""A step's answers, several to each question, and what they were worth."""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from mla_moe.config import RLConfig
from mla_moe.rl.objectives import is_informative, overlong_penalty
from mla_moe.rl.rollout import Rollout, ScoredCompletion


@dataclasses.dataclass(frozen=True)
class GroupBatch:
    answers: Sequence[Sequence[ScoredCompletion]]
    reward_GS: np.ndarray
    """Float [questions, answers]: the score, less the penalty for length."""
    next_question: int
    left_out: int
    """Groups that were sampled and not used, because their answers were all alike: right, or wrong."""
    too_long: int
    """Questions passed over for the length of their prompt."""

    @property
    def tokens(self) -> int:
        return sum(answer.length for group in self.answers for answer in group)

    def metrics(self) -> dict[str, float]:
        """What a row of `metrics.jsonl` says of them. Lengths are in tokens; parts of the reward are unweighted."""
        answers = [answer for group in self.answers for answer in group]
        parts = {name: _mean(answer.score.parts[name] for answer in answers) for name in answers[0].score.parts}
        failed = collections.Counter(failure.kind for answer in answers for failure in answer.score.failures)
        return {
            "reward": float(self.reward_GS.mean()),
            "reward_std": float(self.reward_GS.std(axis=1).mean()),
            "accuracy": parts.pop("accuracy"),
            "format_rate": parts.pop("format"),
            **{f"reward/{name}": value for name, value in parts.items()},
            "response_length": _mean(answer.length for answer in answers),
            "truncated": _mean(answer.truncated for answer in answers),
            "filtered_groups": self.left_out,
            "prompts_too_long": self.too_long,
            **{f"verifier/{kind}": count for kind, count in failed.items()},
        }


def sample_groups(
    rollout: Rollout, rl: RLConfig, seed: int, question: int, note: Callable[[str], None] = lambda text: None
) -> GroupBatch:
    """The answers of a step, from training question number `question` on. DAPO asks on until every group can tell
    something (arXiv 2503.14476, section 3.2), within `rl.max_resample_rounds` rounds."""
    kept: list[list[ScoredCompletion]] = []
    idle: list[list[ScoredCompletion]] = []
    before = rollout.too_long
    for _ in range(rl.max_resample_rounds if rl.objective == "dapo" else 1):
        questions, after = rollout.questions("train", question, rl.prompts_per_step - len(kept))
        groups = rollout.answers(questions, rl.group_size, seed=seed, first=question * rl.group_size, progress=note)
        question = after
        for group in groups:
            useful = rl.objective != "dapo" or is_informative([rollout.measure(answer) for answer in group])
            (kept if useful else idle).append(group)
        if len(kept) == rl.prompts_per_step:
            break
    missing = rl.prompts_per_step - len(kept)
    chosen = [*kept, *idle[:missing]]
    reward_GS = np.array([[_reward(answer, rl) for answer in group] for group in chosen])
    return GroupBatch(chosen, reward_GS, question, len(idle) - missing, rollout.too_long - before)


def _reward(answer: ScoredCompletion, rl: RLConfig) -> float:
    return answer.score.total + overlong_penalty(answer.length, rl.max_new_tokens, rl.overlong_buffer)


def _mean(values) -> float:
    return float(np.mean(list(values)))
