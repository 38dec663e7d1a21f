"""Metrics of an evaluation: greedy completions, and pass@k and majority@k of sampled ones. And which completions are
penalized, or kept by rejection sampling."""

import pytest

from mla_moe.config import RLConfig
from mla_moe.data.arithmetic import problem
from mla_moe.inference.request import Completion, Request
from mla_moe.rl import group_sampling, rejection_sampling
from mla_moe.rl.evaluate import Evaluation
from mla_moe.rl.rewards import Score
from mla_moe.rl.rollout import Prompt, ScoredCompletion
from mla_moe.rl.verifiers.pool import VerifierFailure
from mla_moe.rl.verifiers.worker import Example


def completions(answers, correct="7", failures=()):
    """Of one prompt; None is a completion in the wrong format."""
    question, _ = problem("test", 0)
    prompt = Prompt(Example(question, correct, {}), [1, 2])

    def scored(answer):
        score = Score(0.0, {"accuracy": float(answer == correct), "format": float(answer is not None)}, failures)
        text = "It is 7." if answer is None else f"<think>1</think><answer>{answer}</answer>"
        tokens, logprobs = [3] * len(text), [0.0] * len(text)
        return ScoredCompletion(prompt, Completion(Request([1, 2], 9), tokens, logprobs), text, score)

    return [scored(answer) for answer in answers]


def test_metrics_of_greedy_and_sampled_completions():
    groups = (["1", "7", "7"], ["7", "1", "1"], [None, None, "7"], [None, None, None])
    sampled = [completions(group) for group in groups]
    votes = [[{"1": 0, "7": 1, None: None}[answer] for answer in group] for group in groups]
    found = Evaluation(completions(["7", "1"]), completions(["7", None]), sampled, votes).metrics()
    assert found["eval/accuracy"] == found["eval/forced_accuracy"] == 0.5
    assert found["eval/format_rate"] == 1
    assert found["eval/pass@1"] == pytest.approx(4 / 12)
    assert found["eval/pass@3"] == 3 / 4
    assert found["eval/majority@3"] == 2 / 4
    assert found["eval/sampled_format_rate"] == pytest.approx(7 / 12)
    assert found["eval/greedy_length"] == len("<think>1</think><answer>7</answer>")
    assert not any(name.startswith("eval/verifier/") for name in found)


def test_majority_takes_the_first_in_a_tie_and_verifier_failures_are_counted():
    sampled = [
        completions(["7", "1"], failures=(VerifierFailure("hung", "it took too long"),)),
        completions(["1", "7"]),
    ]
    found = Evaluation(completions("7"), completions("7"), sampled, [[0, 1], [0, 1]]).metrics()
    assert found["eval/majority@2"] == 0.5
    assert found["eval/verifier/hung"] == 2


def test_no_pass_at_k_without_sampled_completions():
    assert not any("@" in name for name in Evaluation(completions("7"), completions("1"), [], []).metrics())


def test_equal_answers_vote_together():
    """Gold 1/2: three spellings of it outvote two of another answer."""
    sampled = [completions(["1/2", "0.5", r"\frac{1}{2}", "3", "3"], correct="1/2")]
    assert Evaluation(completions("7"), completions("7"), sampled, [[0, 0, 0, 3, 3]]).metrics()["eval/majority@5"] == 1
    assert Evaluation(completions("7"), completions("7"), sampled, [[0, 1, 2, 3, 3]]).metrics()["eval/majority@5"] == 0


def test_the_overlong_penalty_lowers_the_reward():
    """By the fraction of the buffer that a completion of 34 of at most 40 tokens uses."""
    group = completions(["7", None])
    assert [completion.length for completion in group] == [34, 8]
    rl = RLConfig(max_new_tokens=40, overlong_buffer=20)
    assert group_sampling._rewards(group, rl) == pytest.approx([-0.7, 0.0])


def test_rejection_sampling_keeps_correct_answers_in_the_correct_format():
    kept = [rejection_sampling._is_correct(completion) for completion in completions(["7", "1", None])]
    assert kept == [True, False, False]
    (without_tags,) = completions([None], correct=None)
    assert without_tags.score.components == {"accuracy": 1, "format": 0}
    assert not rejection_sampling._is_correct(without_tags)
