"""What answers come to: shares of greedy ones, and of several samples to a question."""

import pytest

from mla_moe.data.arithmetic import problem
from mla_moe.inference.request import Completion, Request
from mla_moe.rl.evaluate import Evaluation
from mla_moe.rl.rewards import Score
from mla_moe.rl.verifiers.pool import VerifierFailure
from mla_moe.rl.rollout import Prompt, ScoredCompletion
from mla_moe.rl.tasks.task import Example


def answers(given, right="7", failures=()):
    """To one question; None is an answer of the wrong form."""
    question, _ = problem("test", 0)
    asked = Prompt(Example(question, right, {}), [1, 2])

    def one(text):
        score = Score(0.0, {"accuracy": float(text == right), "format": float(text is not None)}, failures)
        written = "It is 7." if text is None else f"<think>1</think><answer>{text}</answer>"
        return ScoredCompletion(
            asked, Completion(Request([1, 2], 9), [3] * len(written), [0.0] * len(written)), written, score
        )

    return [one(text) for text in given]


def test_shares_of_several_samples():
    sampled = [answers(given) for given in (["1", "7", "7"], ["7", "1", "1"], [None, None, "7"], [None, None, None])]
    found = Evaluation(answers(["7", "1"]), answers(["7", None]), sampled).metrics()
    assert found["eval/accuracy"] == found["eval/forced_accuracy"] == 0.5
    assert found["eval/format_rate"] == 1
    assert found["eval/pass@1"] == pytest.approx(4 / 12)
    assert found["eval/pass@3"] == 3 / 4
    assert found["eval/majority@3"] == 2 / 4
    assert found["eval/sampled_format_rate"] == pytest.approx(7 / 12)
    assert found["eval/greedy_length"] == len("<think>1</think><answer>7</answer>")
    assert not any(name.startswith("eval/verifier/") for name in found)


def test_of_answers_as_common_the_first_counts_and_failures_are_counted():
    late = (VerifierFailure("hung", "it took too long"),)
    found = Evaluation(answers("7"), answers("7"), [answers(["7", "1"], failures=late), answers(["1", "7"])]).metrics()
    assert found["eval/majority@2"] == 0.5
    assert found["eval/verifier/hung"] == 2


def test_without_samples_there_is_nothing_to_say_of_them():
    assert not any("@" in name for name in Evaluation(answers("7"), answers("1"), []).metrics())
