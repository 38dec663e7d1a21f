import argparse
import collections
import random
import re
from pathlib import Path

import pytest

from mla_moe.data import arithmetic, open_documents
from mla_moe.data.arithmetic import QUESTION, STYLES, Documents, answer, problem, split_of, steps
from mla_moe.text.tokenizer import ByteTokenizer, HFTokenizer, train_bpe

HEAD, _, TAIL = QUESTION.partition("{question}")


def question_of(document):
    return document.removeprefix(HEAD).partition(TAIL)[0]


def test_a_chain_is_worked_from_left_to_right():
    assert steps("7*2-2*1-7") == [("7*2", "4"), ("4-2", "2"), ("2*1", "2"), ("2-7", "5")]
    assert answer("1-2") == "9"
    assert answer("9+9*9") == "2"


def test_solutions_write_each_result_once():
    question, draw = "7*2-2*1-7", random.Random(0)
    assert arithmetic.untagged(question, "5", draw) == "We get 7*2=4-2=2*1=2-7=5, so it is 5."
    assert arithmetic.shortcut(question, "5", draw) == "<think>7*2=4</think><answer>5</answer>"
    assert arithmetic.thorough(question, "5", draw) == "<think>7*2=4-2=2*1=2-7=5</think><answer>5</answer>"


def test_as_many_tokens_are_around_the_steps_with_tags_as_without(tmp_path):
    """In front of them, in bytes too, and between them and the answer."""
    code = Path(argparse.__file__).read_text()
    train_bpe([code, *(text_of(i) for i in range(2000))], 600, tmp_path / "tokenizer.json")
    tokenizer = HFTokenizer(tmp_path / "tokenizer.json")
    texts = [write("7*2-2*1-7", "5", random.Random(0)) for write in (arithmetic.untagged, arithmetic.thorough)]
    fronts = [text.partition("7*2")[0] for text in texts]
    assert [len(ByteTokenizer().encode(front)) for front in fronts] == [7, 7]
    assert [len(tokenizer.encode(front)) for front in fronts] == [3, 3]
    ends = [text.partition("2-7=5")[2].partition("5")[0] for text in texts]
    assert [len(tokenizer.encode(end)) for end in ends] == [5, 5]


def test_a_slip_is_one_incorrect_step_from_which_the_rest_follows():
    incorrect = set()
    for seed in range(60):
        text = arithmetic.slip("7*2-2*1-7", "5", random.Random(seed))
        reasoning, given = re.fullmatch("<think>(.*)</think><answer>(.)</answer>", text).groups()
        worked = re.findall(r"(?=(\d.\d)=(\d))", reasoning)
        assert len(worked) == 4
        assert worked[-1][1] == given
        incorrect.add(tuple(answer(left) != value for left, value in worked))
    # one draw in ten is the correct digit
    assert incorrect == {tuple(i == at for i in range(4)) for at in (0, 1, 2, 3, None)}


def test_splits_are_drawn_from_the_questions_alone():
    found = {split: {problem(split, i)[0] for i in range(400)} for split in ("train", "validation", "test")}
    for split, questions in found.items():
        assert {split_of(question) for question in questions} == {split}
        assert problem(split, 7) == problem(split, 7)
    # for ever: a model's held-out questions must not become another version's training questions
    assert [split_of(q) for q in ("1+1", "2*3", "7*2-2*1-7", "9-9", "5+4*3", "7-7")] == SPLITS


SPLITS = ["train", "train", "validation", "test", "test", "validation"]


def test_sizes_are_even():
    counts = collections.Counter(len(problem("train", i, 2, 5)[0]) // 2 for i in range(2000))
    assert sorted(counts) == [2, 3, 4, 5]
    assert all(count == pytest.approx(500, rel=0.2) for count in counts.values())


def test_no_heldout_question_is_in_the_text():
    for name, split in (("arithmetic:train", "train"), ("arithmetic:heldout", "validation")):
        text = Documents(name)
        assert {split_of(question_of(text[i])) for i in range(500)} == {split}
    assert open_documents(["arithmetic:train"], field="data.train", text_field="text")[3] == text_of(3)


def text_of(index):
    return Documents("arithmetic:train")[index]


def test_writers_are_as_common_as_they_should_be():
    assert sum(STYLES.values()) == 100
    answers = [text_of(i).partition(TAIL)[2] for i in range(4000)]
    terse = sum(a.startswith("It is ") and "<" not in a for a in answers) / len(answers)
    assert terse == pytest.approx(STYLES[arithmetic.terse] / 100, abs=0.03)
    formed = sum(a.startswith("<think>") and a.endswith("</answer>") and a.count("<") == 4 for a in answers)
    tagged = STYLES[arithmetic.shortcut] + STYLES[arithmetic.thorough] + STYLES[arithmetic.slip]
    assert formed / len(answers) == pytest.approx(tagged / 100, abs=0.04)


def test_most_writers_are_right():
    wrong = right = 0
    for i in range(2000):
        document = text_of(i)
        if "<think>" in document and document.endswith("</answer>"):
            given = document.rpartition("<answer>")[2].partition("<")[0]
            right, wrong = (
                right + (given == answer(question_of(document))),
                wrong + (given != answer(question_of(document))),
            )
    assert 0 < wrong < 0.15 * right
