import json

import pytest

from mla_moe import ConfigError
from mla_moe.config import TaskConfig
from mla_moe.data.arithmetic import problem, split_of
from mla_moe.rl.tasks import open_task

for library in ("reasoning_gym", "math_verify"):
    pytest.importorskip(library, reason="pip install 'mla_moe[rl]'")

SPLITS = ("train", "validation", "test")


def task(name="arithmetic", *options):
    return open_task(TaskConfig(name=name, options=options))


def lines(tmp_path, records):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return str(path)


@pytest.fixture
def numbers(tmp_path):
    """A file of 300 questions, each twice, and an empty line."""
    records = [{"question": f"What is {i} + {i}?", "answer": 2 * i, "level": i % 3} for i in range(300)]
    return lines(tmp_path, [*records, "", *records])


@pytest.mark.parametrize("name", ["arithmetic", "reasoning_gym:chain_sum", "reasoning_gym:gsm_symbolic", "file"])
def test_splits_do_not_overlap(name, numbers):
    name = numbers if name == "file" else name
    opened, again = task(name), task(name)
    for split in SPLITS:
        examples = [opened.example(split, number) for number in range(15)]
        assert {split_of(example.question) for example in examples} == {split}
        if split != "train":
            assert len({example.question for example in examples}) == 15
        assert [again.example(split, number) for number in reversed(range(15))] == examples[::-1]
        assert all(opened.score(example, example.answer) == 1 for example in examples)
        assert all(opened.score(example, f"{example.answer}1") < 1 for example in examples)


def test_arithmetic_has_the_requested_number_of_operations():
    question, answer, record = task("arithmetic", "least=2", "most=2").example("train", 0)
    assert sum(question.count(sign) for sign in "+-*") == 2
    assert record == {"question": question, "answer": answer}


def test_exhausted_heldout_examples_are_an_error_with_their_count(numbers):
    few = task("arithmetic", "least=1", "most=1")
    count = len({problem("test", number, 1, 1) for number in range(3000)})
    assert 10 < count < 50
    found = [few.example("test", number).question for number in range(count)]
    assert len(set(found)) == count
    with pytest.raises(ConfigError, match=rf"has {count} different test questions; use no more"):
        few.example("test", count)
    assert few.count("test") is None

    opened = task(numbers)
    count = opened.count("validation")
    assert count == sum(split_of(f"What is {i} + {i}?") == "validation" for i in range(300))
    with pytest.raises(ConfigError, match=f"has {count} different validation questions"):
        opened.example("validation", count)
    assert sum(map(opened.count, SPLITS)) == 300


def test_each_epoch_of_a_file_is_shuffled_differently(numbers):
    opened = task(numbers)
    count = opened.count("train")
    epochs = [[opened.example("train", epoch * count + i).question for i in range(count)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(epochs[0])) == count
    assert epochs[0] != epochs[1] != epochs[2]


def test_file_keeps_the_full_record(numbers):
    example = task(numbers).example("train", 0)
    number = int(example.question.split()[2])
    assert example.answer == str(2 * number)
    assert example.record == {"question": example.question, "answer": 2 * number, "level": number % 3}


@pytest.mark.parametrize(
    ("gold", "answer", "accuracy"),
    [
        ("42", "42.0", 1),
        (0.00007, "0.00007", 1),
        (0.00007, r"7 \times 10^{-5}", 1),
        (0.00007, "7e-5", 1),
        (1e-05, "e-5", 0),
        (1e22, "10^{22}", 1),
        ("1000", "1e3", 1),
        ("1/2", r"$\frac{1}{2}$", 1),
        (r"\frac{1}{2}", "0.5", 1),
        ("x+y", "y + x", 1),
        ("x^2 - 1", "(x-1)(x+1)", 1),
        ("1,000", "1000", 1),
        ("(1, 2)", "(1,2)", 1),
        ("42", "the answer is 42", 1),
        ("Paris", " Paris ", 1),
        ("Paris", "Pairs", 0),
        ("Paris", "42", 0),
        ("42", "41", 0),
        ("42", "41, 42", 0),
        ("(1, 2)", "2", 0),
        ("42", "{{", 0),
        ("42", "", 0),
    ],
)
def test_answers_are_compared_by_math_verify(tmp_path, gold, answer, accuracy):
    records = [{"question": f"{i}?", "answer": gold} for i in range(20)]
    opened = task(lines(tmp_path, records))
    assert opened.score(opened.example("train", 0), answer) == accuracy


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "?"}', "'answer'"),
        ('{"question": ["?"], "answer": "1"}', "'question'"),
        ('{"question": " ", "answer": "1"}', "'question'"),
        (r'{"question": "\ud800", "answer": "1"}', "surrogate"),
        ("[1]", "object"),
        ('{"question": "?", "answer": NaN}', "'answer'"),
        ('{"question": "?", ', "not JSON"),
    ],
)
def test_malformed_line_is_an_error_with_its_number(tmp_path, line, message):
    path = lines(tmp_path, ['{"question": "?", "answer": "1"}', "", line])
    with pytest.raises(ConfigError, match=rf"^task.name = '.*questions.jsonl:3': .*{message}"):
        task(path)


def test_options_are_passed_to_the_library():
    opened = task("reasoning_gym:chain_sum", "min_terms=7", "max_terms=7", "allow_negation=true", "seed=3")
    example = opened.example("train", 5)
    assert example.record["metadata"]["difficulty"]["num_terms"] == (7, 7)
    assert example != task("reasoning_gym:chain_sum", "min_terms=7", "max_terms=7").example("train", 5)
    opened = task("reasoning_gym:basic_arithmetic", 'operators=["*"]', "format_style=simple", "max_terms=2")
    assert "*" in opened.example("test", 0).question
    opened = task("reasoning_gym:spell_backward", "max_word_len=4")
    assert len(opened.example("validation", 2).answer) <= 4


def test_random_access_to_training_examples():
    """At any number, also beyond one dataset of the library."""
    opened = task("reasoning_gym:chain_sum")
    numbers = *range(4), *range(512, 516), 10**6, 10**9, 10**9 + 1
    assert len({opened.example("train", number).question for number in numbers}) == len(numbers)


def test_hash_dependent_tasks_need_a_fixed_hash_seed(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ConfigError, match=r"ransom_note'.*PYTHONHASHSEED=0"):
        task("reasoning_gym:ransom_note")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert task("reasoning_gym:ransom_note").example("train", 0).answer in ("True", "False")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("arithmetics", (), "task.name = 'arithmetics': .*arithmetic"),
        ("chain_sum", (), "task.name = 'chain_sum': did you mean reasoning_gym:chain_sum"),
        ("qqq", (), "task.name = 'qqq': use arithmetic, reasoning_gym:NAME or"),
        ("reasoning_gym:chain_some", (), "task.name = .*chain_some': .*chain_sum"),
        ("reasoning_gym:composite", (), "task.options = .*rejects"),
        ("reasoning_gym:chain_sum", ("min_term=2",), "task.options = 'min_term=2': .*min_terms"),
        ("reasoning_gym:chain_sum", ("size=2",), "task.options = 'size=2'"),
        ("reasoning_gym:chain_sum", ("min_terms=two",), "task.options = 'min_terms=two': .*int"),
        ("reasoning_gym:chain_sum", ("allow_negation=2",), "task.options = 'allow_negation=2': .*bool"),
        ("reasoning_gym:chain_sum", ("min_terms=9", "max_terms=2"), "task.options = .*rejects them: max_terms"),
        ("arithmetic", ("most=x",), "task.options = 'most=x'"),
        ("arithmetic", ("many=1",), "task.options = 'many=1': .*least and most"),
        ("arithmetic", ("least=3", "most=2"), "task.options = "),
        ("none.jsonl", (), "task.name = 'none.jsonl': no such file"),
    ],
)
def test_invalid_tasks_and_options_are_errors(name, options, message):
    with pytest.raises(ConfigError, match=message):
        task(name, *options)


def test_missing_library_is_an_error(monkeypatch, numbers):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym.factory", None)
    with pytest.raises(ConfigError, match=r"mla_moe\[rl\]"):
        task("reasoning_gym:chain_sum")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"mla_moe\[rl\]"):
        task(numbers)
