"""How the answer of a completion is found."""

import json
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from mla_moe import ConfigError
from mla_moe.config import TaskConfig
from mla_moe.rl.answers import ParsedAnswer, has_format, parse_answer
from mla_moe.rl.rewards import Reward, RewardInput
from mla_moe.rl.tasks import open_task


def parse_tags(completion):
    """Whether the format is correct, and the answer."""
    return (
        has_format(completion, "answer_tags"),
        parse_answer(completion, "answer_tags").text,
    )


TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
PIECES = st.lists(st.sampled_from([*TAGS, " ", "\n", "5", "x<", ">"]), max_size=9).map("".join)


@pytest.mark.parametrize(
    ("completion", "has_format", "answer"),
    [
        ("<think>1+1=2</think><answer>2</answer>", True, "2"),
        (" \n<think>\n1\n</think>\n <answer> 2\n</answer>\n", True, "2"),
        ("<think></think><answer>2</answer>", True, "2"),
        ("<think>1</think><answer> </answer>", False, None),
        ("<think>1</think>so <answer>2</answer>", False, "2"),
        ("<think>1</think><answer>2</answer>.", False, "2"),
        ("well <think>1</think><answer>2</answer>", False, "2"),
        ("<think>1<answer>2</answer>", False, "2"),
        ("<answer>2</answer><think>1</think>", False, "2"),
        ("<think>1<answer>2</answer></think>", False, "2"),
        ("<think>1<think>2</think><answer>2</answer>", False, "2"),
        ("<think>1</think><answer>2</answer><answer>3</answer>", False, "3"),
        ("<think>1</think><answer>2</answer>3</answer>", False, "2"),
        ("<think>1</think><answer><answer>2</answer>", False, "2"),
        ("<think>1</think><answer>2", False, None),
        ("<think>1</think>2", False, None),
        ("<Think>1</Think><answer>2</answer>", False, "2"),
        ("", False, None),
    ],
)
def test_format_and_answer(completion, has_format, answer):
    assert parse_tags(completion) == (has_format, answer)


@hypothesis.given(PIECES)
def test_format_matches_its_definition(completion):
    """Each tag once, in order, only white space outside: implemented differently."""
    starts = [completion.find(tag) for tag in TAGS]
    strict = all(completion.count(tag) == 1 for tag in TAGS) and starts == sorted(starts)
    if strict:
        outside = completion[: starts[0]], completion[starts[1] + 8 : starts[2]], completion[starts[3] + 9 :]
        strict = not any(text.strip() for text in outside)
    has_format, answer = parse_tags(completion)
    assert has_format == (strict and answer is not None)


@hypothesis.given(st.text(), st.text(), st.sampled_from(["", " ", "\n\n"]))
def test_any_reasoning_and_answer_can_be_parsed(thought, answer, space):
    hypothesis.assume(not any(tag in text for tag in TAGS for text in (thought, answer)))
    found = parse_tags(f"{space}<think>{thought}</think>{space}<answer>{answer}</answer>{space}")
    assert found == (answer.strip() != "", answer.strip() or None)


@hypothesis.given(PIECES)
def test_answer_is_stripped_and_not_empty(completion):
    _, answer = parse_tags(completion)
    assert answer is None or (answer and answer == answer.strip() and f"{answer}" in completion)


def test_long_completions_with_tags_are_parsed_fast():
    start = time.monotonic()
    for text in ("<answer>" * 20_000, "<answer> " + " a" * 50_000 + "</answer> x", "<think>" + " " * 100_000 + "x"):
        parse_tags(text)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("answer_format", "completion", "answer"),
    [
        ("boxed", r"so \boxed{\frac{1}{2}} or \boxed{ \frac{1}{\sqrt{3}} }.", r"\frac{1}{\sqrt{3}}"),
        ("boxed", r"\boxed{1} and \boxed{2", "1"),
        ("boxed", r"the answer is 2", None),
        ("boxed", r"<think>\boxed{1}</think> no", None),
        ("boxed", r"<think>\boxed{1}", None),
        ("last_number", "2+3 = 5, so 1,234.5 apples.", "1,234.5"),
        ("last_number", "from 3 to -7", "-7"),
        ("last_number", "5-3 is 2 and 5-3", "3"),
        ("last_number", "it costs $12.50 (50%)", "50%"),
        ("last_number", "about 1/2.", "1/2"),
        ("last_number", "none", None),
        ("last_number", "<think>7</think>8", "8"),
        ("choice", "The answer is (C).", "C"),
        ("choice", "Answer: **B**", "B"),
        ("choice", "A long story.\nD", "D"),
        ("choice", r"\boxed{B}", "B"),
        ("choice", "I can't say", None),
        ("regex:RESULT=(\\d+)", "RESULT=1 RESULT=22", "22"),
        ("regex:\\d+$", "1\n22", "22"),
        ("answer_tags", "<answer>1</answer> \\boxed{2}", "1"),
    ],
)
def test_answer_of_each_format(answer_format, completion, answer):
    assert parse_answer(completion, answer_format) == ParsedAnswer(answer, answer_format if answer else "none")


@pytest.mark.parametrize(
    ("completion", "correct"),
    [
        (r"<think>1</think> \boxed{2}", True),
        (r"so \boxed{2}", True),
        (r"<think>1</think> 2", False),
        (r"x <think>1</think> \boxed{2}", False),
        (r"<think>1</think></think> \boxed{2}", False),
        (r"<think>\boxed{2}", False),
    ],
)
def test_format_without_answer_tags(completion, correct):
    assert has_format(completion, "boxed") == correct


MIXED = [  # reference, answer of a chat model, whether a person counts it as correct
    ("8", "8", True),
    ("8", "2+6 is 8.", True),
    ("8", "The answer is 8.", True),
    ("8", "The answer is **8**.", True),
    ("8", "2 + 6 = 9", False),
    ("8", "Answer:\n8", True),
    ("8", "**Answer:**\n\n8", True),
    ("8", "The answer is\n$$8$$", True),
    ("8", "She has 8 apples. That answers the question.", True),
    ("8", "<think>2+6=8</think>8", True),
    ("8", "<think>2+6=8</think><answer>8</answer>", True),
    ("8", "<think>2+6=8", False),
    ("8", r"Adding gives $2+6=8$, so \boxed{8}.", True),
    ("8", r"\boxed{9} because 8 is too small", False),
    ("8", "I don't know.", False),
    ("8", "", False),
    ("72", "She sold 48 + 24 = 72 clips.\n#### 72", True),
    ("72", "She sold 48 + 24 = 72 clips.\n#### 48", False),
    ("72", "She sold 48 in April and 24 in May, which is 72 in all.", True),
    ("72", "It's 72, i.e. 48 and 24", False),
    ("1234", "The total is 1,234.", True),
    ("1234", "The total is 1,243.", False),
    ("18", "Janet makes $18 every day.", True),
    ("18", "Janet makes $18.00", True),
    ("18", "Janet makes 18 dollars", True),
    ("18", "Janet makes $18.50", False),
    ("-5", "x = -5", True),
    ("-5", "x = 5", False),
    ("0.5", "The probability is 1/2.", True),
    ("0.5", "The probability is 50%.", True),
    ("0.5", r"\boxed{\frac{1}{2}}", True),
    ("0.5", "The probability is 1/3.", False),
    (r"\frac{1}{2}", r"The answer is $\frac{1}{2}$.", True),
    (r"\frac{1}{2}", r"Therefore $x = \frac{2}{4}$.", True),
    (r"\frac{1}{2}", r"Therefore $x = \frac{2}{3}$.", False),
    (r"2\sqrt{3}", r"The final answer is \boxed{2\sqrt{3}}.", True),
    (r"2\sqrt{3}", r"The final answer is \boxed{\sqrt{12}}.", True),
    (r"2\sqrt{3}", r"The final answer is \boxed{3\sqrt{2}}.", False),
    ("x^2+2x+1", r"We get $(x+1)^2$", True),
    ("x^2+2x+1", r"We get $(x-1)^2$", False),
    ("B", "The answer is (B).", True),
    ("B", "B", True),
    ("B", "**B**", True),
    ("B", "Answer: B) Paris", True),
    ("B", "The answer is C.", False),
    ("B", r"\boxed{B}", True),
    ("C", "<think>A? No.</think>The correct option is C.", True),
    ("C", "<think>C</think>The correct option is A.", False),
    ("Paris", "Paris", True),
    ("Paris", "The answer is Paris.", True),
    ("Paris", "London", False),
    ("(3, 4)", r"The point is $(3,4)$.", True),
    ("(3, 4)", r"The point is $(4,3)$.", False),
    ("2, 3", r"The solutions are \boxed{3, 2}", True),
    ("2, 3", r"The solution is \boxed{2}", False),
]


@pytest.mark.parametrize("answer_format", ["boxed", "choice", "last_number", "auto"])
def test_long_completions_are_parsed_fast(answer_format):
    start = time.monotonic()
    for text in (r"\boxed{" * 16_000, r"\( a " * 16_000, "answer x" + "*" * 16_000 + "y", "1," * 16_000, "$" * 16_000):
        parse_answer(text, answer_format)
        has_format(text, answer_format)
    assert time.monotonic() - start < 3


def test_auto_agrees_with_a_count_by_hand(tmp_path):
    pytest.importorskip("math_verify", reason="pip install 'mla_moe[rl]'")
    path = tmp_path / "mixed.jsonl"
    lines = [json.dumps({"question": str(i), "answer": reference}) for i, (reference, _, _) in enumerate(MIXED)]
    path.write_text("\n".join(lines))
    config = TaskConfig(name=str(path), answer_format="auto", timeout=30.0)
    task = open_task(config)
    examples = {int(one.question): one for one in (task.example("all", number) for number in range(len(MIXED)))}
    with Reward(config, task) as reward:
        scores = reward([RewardInput("?", text, examples[i]) for i, (_, text, _) in enumerate(MIXED)])
    wrong = [
        (*row, score.answer)
        for row, score in zip(MIXED, scores, strict=True)
        if (score.components["accuracy"] == 1) != row[2]
    ]
    assert not wrong
    assert sum(score.components["accuracy"] for score in scores) == sum(correct for _, _, correct in MIXED)


def test_answer_format_is_checked():
    with pytest.raises(ConfigError, match=r"^task\.answer_format = 'tags': answer_tags, boxed, .* or regex:PATTERN"):
        TaskConfig(answer_format="tags")
    with pytest.raises(ConfigError, match=r"^task\.answer_format = 'regex:\(': is not a regular expression"):
        TaskConfig(answer_format="regex:(")
