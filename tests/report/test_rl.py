"""A stage of reinforcement learning on its page."""

import re

import numpy as np
import pytest

from mla_moe.report.page import write_report
from mla_moe.training.metrics import MetricsWriter

STEPS, QUESTIONS = 12, 20
ATTACK = '<img src=x onerror="x"></pre><b>$x$'
PANELS = [
    "Reward",
    "Accuracy and format rate",
    "Completion length in tokens",
    "Completion length by prompt length",
    "Accuracy, held-out and sampled",
    "KL from the reference policy",
    "Entropy",
    "Fraction of tokens clipped",
    "Difference of log-probabilities, sampler and trainer",
    "Seconds per step (the first, with compilation: 50)",
    "Expert load, before and after",
    "Step 1",
    "Step 12",
    "Loss",
    "Learning rate",
    "Expert load",
    "Layer 0",
    "Layer 1",
]


def answer(step, number, kind, correct, length):
    return {
        "step": step,
        "kind": kind,
        "prompt": f"{ATTACK} {number:02}" + "+1" * (number % 4),
        "answer": f"{number} & {ATTACK}",
        "completion": f"{ATTACK} {step}",
        "length": length,
        "reward": 1.0,
        "format": float(correct),
        "accuracy": float(correct),
    }


def evaluation(accuracy, length):
    names = ("accuracy", "forced_accuracy", "format_rate", "pass@1", "pass@4", "majority@4", "sampled_format_rate")
    return {f"eval/{name}": accuracy for name in names} | {"eval/greedy_length": 9.0, "eval/response_length": length}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    with MetricsWriter(run_dir, None, "rl") as writer:
        writer.write(0, evaluation(0.25, 10.0))
        for step in range(1, STEPS + 1):
            writer.write(
                step,
                {"reward": step / 9, f"reward/_{ATTACK}": 0.5, "accuracy": step / 12, "format_rate": 0.5, "lr": 1e-3}
                | {
                    "response_length": 9.0 + step,
                    "kl": 0.1,
                    "entropy": 0.2,
                    "clip_ratio/low": 0.01,
                    "clip_ratio/high": 0.02,
                }
                | {
                    "sampler_logprob_diff": 1e-7 * (step - 1),
                    "sampler_logprob_diff_max": 1e-4,
                    "loss": 0.0,
                    "truncated": float(step == 3),
                }
                | {"step_seconds": 50.0 if step == 1 else 9.0, "sample_seconds": 4.0, "prompts_too_long": 0.0}
                | ({"verifier/hung": 2.0} if step == 5 else {}),
            )
            writer.write_load(step, np.arange(1, 9).reshape(2, 4) + step)
        writer.write(STEPS, evaluation(0.75, 25.0) | {"eval/verifier/hung": 1.0})
        for step, correct, longer in (
            (0, lambda n: n in (0, 1), 0),
            (6, lambda n: False, 1),
            (STEPS, lambda n: n > 0, 5),
        ):
            writer.append_samples(
                answer(step, n, kind, correct(n), 10 + longer * (n % 4))
                for n in range(QUESTIONS)
                for kind in ("greedy", "forced")
            )
    return write_report(run_dir).read_text()


def captions(page):
    return re.findall(r"<figcaption>(.*?)</figcaption>", page)


def headlines(page):
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)<small>(.*?)</small>", page)
    return {name: (re.sub("<.*?>", "", figure), note) for name, figure, note in found}


def test_every_panel_is_there(page):
    assert captions(page) == PANELS
    for label in (
        f"reward/_{ATTACK}".replace("<", "&lt;").replace(">", "&gt;"),
        "accuracy, prefilled with &lt;think&gt;",
        "held-out, sampled",
        "after, prefilled",
        "pass@1",
        "pass@4",
        "majority@4",
        "below",
        "largest",
        "sampling",
    ):
        assert f">{label}</text>" in page


def test_headlines_say_before_and_after_and_what_went_wrong(page):
    assert headlines(page) == {
        "Accuracy": ("25.0 &rarr; 75.0%", "held-out, greedy"),
        "Accuracy, prefilled": ("25.0 &rarr; 75.0%", "with &lt;think&gt;; held-out, greedy"),
        "Format rate": ("25.0 &rarr; 75.0%", "held-out, greedy"),
        "Completion length": ("10 &rarr; 25", "tokens, sampled, 2.50&times; as long"),
        "Verifier timed out": ("3", "completions with reward 0"),
        "Truncated": ("8.33%", "of the completions, at max_new_tokens"),
        "Wall time": ("2:29", "in training steps"),
    }


def test_the_same_prompts_are_side_by_side(page):
    """The first and the last evaluation; those between are not shown."""
    assert (
        "Of 20 prompts, 2 were answered correctly before and 19 after: 18 became correct, 1 became incorrect." in page
    )
    assert "The first 16:" in page
    assert "<th>Before, step 0</th><th>After, step 12</th>" in page
    table = page[page.index('<table class="completions">') :]
    rows = re.findall(r"<tr><td>(.*?)</tr>", table[: table.index("</table>")], re.S)
    assert len(rows) == 16
    marks = [re.findall(r'<b class="(\w+)">&#\d+; (\w+)</b> <small>(.*?)</small>', row) for row in rows]
    no = ", wrong format"
    assert marks[0] == [("correct", "correct", "10 tokens"), ("incorrect", "incorrect", f"10 tokens{no}")]
    assert marks[1] == [("correct", "correct", "10 tokens"), ("correct", "correct", "15 tokens")]
    assert marks[2] == [("incorrect", "incorrect", f"10 tokens{no}"), ("correct", "correct", "20 tokens")]
    whole = re.findall(r"&lt;/pre&gt;&lt;b&gt;\$x\$ ?(.*?)</pre>", rows[1])
    assert whole == ["01+1", "", "0", "12"], "prompt, correct answer, before, after"


def test_nothing_a_model_wrote_becomes_markup(page):
    assert "<img" not in page
    assert "onerror=&quot;x&quot;" in page
    assert "<h2>Samples</h2>" not in page


def test_what_a_stage_does_not_have_is_left_out(tmp_path):
    with MetricsWriter(tmp_path, None, "rl") as writer:
        writer.write(1, {"reward": 1.0, "kl": 0.0, "sampler_logprob_diff": 0.0, "step_seconds": 3.0})
        writer.append_samples([answer(0, 1, "greedy", True, 5)])
    page = write_report(tmp_path).read_text()
    assert captions(page) == ["Reward", "Difference of log-probabilities, sampler and trainer"]
    assert list(headlines(page)) == ["Wall time"]
    assert "<table" not in page


def test_many_lengths_of_questions_are_put_into_groups(tmp_path):
    with MetricsWriter(tmp_path, None, "rl") as writer:
        writer.write(1, {"reward": 1.0})
        for step in (0, 1):
            writer.append_samples(answer(step, 0, "greedy", True, n) | {"prompt": "x" * n} for n in range(1, 101))
    page = write_report(tmp_path).read_text()
    assert "Completion length by prompt length" in captions(page)
    assert page.count("<use") < 60, "a mark for each group, not for each question"
