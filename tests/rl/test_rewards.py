import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

import mla_moe
from mla_moe import ConfigError
from mla_moe.config import TaskConfig
from mla_moe.rl.rewards import Reward, RewardInput, parse_completion
from mla_moe.rl.tasks.task import open_task
from mla_moe.rl.verifiers.pool import VerifierFailure

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
PIECES = st.lists(st.sampled_from([*TAGS, " ", "\n", "5", "x<", ">"]), max_size=9).map("".join)


@pytest.mark.parametrize(
    ("completion", "form", "answer"),
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
def test_form_and_answer(completion, form, answer):
    assert parse_completion(completion) == (form, answer)


@hypothesis.given(PIECES)
def test_the_form_is_as_strict_as_its_words(completion):
    """Each tag once, in order, white space around: said another way."""
    places = [completion.find(tag) for tag in TAGS]
    strict = all(completion.count(tag) == 1 for tag in TAGS) and places == sorted(places)
    if strict:
        outside = completion[: places[0]], completion[places[1] + 8 : places[2]], completion[places[3] + 9 :]
        strict = not any(text.strip() for text in outside)
    form, answer = parse_completion(completion)
    assert form == (strict and answer is not None)


@hypothesis.given(st.text(), st.text(), st.sampled_from(["", " ", "\n\n"]))
def test_any_thought_and_answer_can_be_given(thought, answer, space):
    hypothesis.assume(not any(tag in text for tag in TAGS for text in (thought, answer)))
    found = parse_completion(f"{space}<think>{thought}</think>{space}<answer>{answer}</answer>{space}")
    assert found == (answer.strip() != "", answer.strip() or None)


@hypothesis.given(PIECES)
def test_an_answer_is_stripped_and_not_empty(completion):
    _, answer = parse_completion(completion)
    assert answer is None or (answer and answer == answer.strip() and f"{answer}" in completion)


def test_a_long_completion_takes_no_time():
    start = time.monotonic()
    for text in ("<answer>" * 20_000, "<answer> " + " a" * 50_000 + "</answer> x", "<think>" + " " * 100_000 + "x"):
        parse_completion(text)
    assert time.monotonic() - start < 2


JUDGES = """
import os, subprocess, sys, time

def worth(prompt, completion, example):
    assert "jax" not in sys.modules
    print("not part of the output")
    word = completion.rpartition(" ")[2]
    return len(prompt) + len(example.question) + example.record["extra"] + float(word)

def fails(prompt, completion, example):
    word = completion.rpartition(" ")[2]
    if word == "raise": raise KeyError("no such thing")
    if word == "exit": sys.exit(3)
    if word == "hang": time.sleep(60)
    if word == "spin":
        while True: pass
    if word == "nan": return float("nan")
    if word == "inf": return -float("inf")
    if word == "text": return "1.0"
    if word == "none": return None
    if word == "die": os._exit(7)
    if word == "killed": os.kill(os.getpid(), 9)
    return os.getpid() > 0

def leaves(prompt, completion, example):
    code = "import time; time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    with open(completion.rpartition(" ")[2], "w") as file:
        file.write(str(child.pid))
    time.sleep(60)

def batched(prompts, completions):
    return [1.0 for _ in completions]

async def later(prompt, completion, example):
    return 1.0

def sleeps(prompt, completion, example):
    time.sleep(0.4)
    return 1

number = 3
"""


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    path = tmp_path_factory.mktemp("judges") / "judges.py"
    path.write_text(JUDGES)
    return path


def settings(function=None, **fields):
    return TaskConfig(reward_function=function, **fields)


def reward(settings, workers=2):
    return Reward(settings, open_task(settings), workers)


def completions(words, question="1+1", answer="2", prompt="?"):
    example = open_task(TaskConfig()).example("train", 0)._replace(question=question, answer=answer)
    example = example._replace(record={"extra": 0.5})
    return [RewardInput(prompt, f"<think>…</think><answer>{word}</answer> {word}", example) for word in words]


def test_built_in_checks_start_no_process(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    task = settings(format=0.5, accuracy=2.0)
    example = open_task(task).example("test", 0)
    texts = ["<think>…</think><answer>{}</answer>", "<answer>{}</answer>", "<think>…</think><answer>{}1</answer>", "{}"]
    with reward(task) as judge:
        scores = judge([RewardInput("?", text.replace("{}", example.answer), example) for text in texts])
    assert judge.names == ("format", "accuracy")
    assert [score.total for score in scores] == [2.5, 2.0, 0.5, 0.0]
    assert [score.parts for score in scores[:2]] == [{"format": 1, "accuracy": 1}, {"format": 0, "accuracy": 1}]
    assert not any(score.failures for score in scores)


def test_a_function_of_the_user_is_one_more_part(judges, capfd):
    """It sees prompt, completion and example; values stay in order over the workers."""
    with reward(settings(f"{judges}:worth", reward_function_weight=0.1)) as judge:
        assert judge.names == ("format", "accuracy", "worth")
        scores = judge(completions(range(30)))
        assert [score.parts["worth"] for score in scores] == [1 + 3 + 0.5 + i for i in range(30)]
        assert scores[2].parts["accuracy"] == 1
        assert scores[2].total == pytest.approx(1 + 0.1 * 6.5)
        assert judge([]) == []
    assert "not part" not in capfd.readouterr().out


def test_failures_are_contained_and_named(judges):
    words = ["hang", "raise", "spin", "fine", "exit", "nan", "inf", "die", "text", "none", "killed", "fine"]
    kinds = ["hung", "raised", "hung", None, "raised", *["not_finite"] * 2, "died", *["not_finite"] * 2, "died", None]
    start = time.monotonic()
    with reward(settings(f"{judges}:fails", timeout=0.5), workers=3) as judge:
        scores = judge(completions(words))
        assert time.monotonic() - start < 20
        assert [[failure.kind for failure in score.failures] for score in scores] == [
            [kind] if kind else [] for kind in kinds
        ]
        assert [score.parts["fails"] for score in scores] == [float(kind is None) for kind in kinds]
        assert all(math.isfinite(score.total) for score in scores)
        assert scores[1].failures == (VerifierFailure("raised", "KeyError: 'no such thing'"),)
        assert "exit code 7" in scores[7].failures[0].text
        assert "0.5 s" in scores[0].failures[0].text
        assert [score.parts["fails"] for score in judge(completions(["fine"] * 6))] == [1.0] * 6


def test_many_are_judged_at_a_time(judges):
    with reward(settings(f"{judges}:sleeps"), workers=4) as judge:
        judge(completions(["warm"] * 4))
        start = time.monotonic()
        judge(completions(["x"] * 8))
        assert time.monotonic() - start < 8 * 0.4 - 0.5


def test_a_function_that_vanishes_does_not_end_the_run(tmp_path):
    path = tmp_path / "passing.py"
    path.write_text("import os\ndef die(prompt, completion, example): os._exit(1)\n")
    with reward(settings(f"{path}:die"), workers=2) as judge:
        path.unlink()
        scores = judge(completions("abcdef"))
    assert [score.failures[0].kind for score in scores] == ["died"] * 6
    assert "no worker could start: " in scores[-1].failures[0].text


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("{judges}", "write module:name or path.py:name"),
        ("{judges}:none", "AttributeError.*none"),
        ("{judges}:number", "number is not callable"),
        ("{judges}:batched", "too many positional arguments"),
        ("{judges}:later", "later is a coroutine"),
        ("{judges}:not a name", "write module:name"),
        ("{judges}:format", "format is taken"),
        ("/nowhere/judges.py:worth", "FileNotFoundError"),
        ("nowhere.at.all:worth", "No module named 'nowhere'"),
        ("{broken}:worth", "ZeroDivisionError"),
        ("{dying}:worth", "died, exit code 4"),
    ],
)
def test_a_function_that_cannot_be_had_is_an_error_before_the_start(judges, tmp_path, function, message):
    broken, dying = tmp_path / "broken.py", tmp_path / "dying.py"
    broken.write_text("1 / 0")
    dying.write_text("import os; os._exit(4)")
    function = function.format(judges=judges, broken=broken, dying=dying)
    with pytest.raises(ConfigError, match=rf"(?s)^task.reward_function = .*{message}"):
        reward(settings(function))


def test_a_module_is_imported_as_the_run_would(judges, monkeypatch):
    monkeypatch.syspath_prepend(str(judges.parent))
    with reward(settings("judges:worth"), workers=1) as judge:
        assert judge(completions([1]))[0].parts["worth"] == 5.5


@pytest.mark.parametrize("name", ["reasoning_gym:chain_sum", "file"])
def test_verifiers_of_libraries_work_in_their_processes(name, tmp_path):
    pytest.importorskip("math_verify" if name == "file" else "reasoning_gym", reason="pip install 'mla_moe[rl]'")
    path = tmp_path / "halves.jsonl"
    path.write_text("".join(f'{{"question": "{i}?", "answer": "1/2"}}\n' for i in range(9)))
    task = settings(name=str(path) if name == "file" else name)
    opened = open_task(task)
    example = opened.example("train", 0)
    right = "0.5" if name == "file" else example.answer
    texts = [f"<think>…</think><answer>{answer}</answer>" for answer in (right, f"1{right}")]
    with Reward(task, opened, workers=1) as judge:
        scores = judge([RewardInput("?", text, example) for text in texts])
    assert [score.parts["accuracy"] == 1 for score in scores] == [True, False]
    assert not any(score.failures for score in scores)


PARENT = """
import os, signal, sys
from mla_moe import recipe
from mla_moe.rl.rewards import Completion, Reward
from mla_moe.rl.tasks import open_task
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
task = recipe.Task(function=sys.argv[1], timeout=float(sys.argv[3]))
opened = open_task(task)
judge = Reward(task, opened, workers=2)
print(*(worker._process.pid for worker in judge._judges._workers), flush=True)
if sys.argv[2] in ("spin", "interrupt"):
    judge([Completion("?", "so spin", opened.example("train", 0))])
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # empty: ended, and not yet waited for
    except OSError:
        return False


def gone(pids, seconds):
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(("end", "timeout"), [("kill", 60), ("interrupt", 60), ("spin", 1.5)])
def test_no_process_is_left_behind(judges, end, timeout):
    """When the parent is killed, and when it is interrupted or killed while a judge hangs."""
    command = [sys.executable, "-c", PARENT, f"{judges}:fails", end, str(timeout)]
    environment = os.environ | {"PYTHONPATH": str(Path(mla_moe.__file__).parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        if end in ("spin", "interrupt"):
            time.sleep(0.5)
            assert all(map(alive, pids))
            parent.send_signal(signal.SIGKILL if end == "spin" else signal.SIGINT)
        parent.wait(20)
    assert gone(pids, 5)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_what_a_hanging_judge_has_started_ends_with_it(judges, tmp_path):
    """In a session of its own too, as tools that run code begin it."""
    with reward(settings(f"{judges}:leaves", timeout=3.0), workers=1) as judge:
        (score,) = judge(completions([tmp_path / "pid"]))
    assert score.failures[0].kind == "hung"
    assert gone([int((tmp_path / "pid").read_text())], 5)


def test_a_prompt_may_have_opened_the_thought():
    """As DeepSeek-R1's chat template does."""
    task = settings()
    example = open_task(task).example("test", 0)
    text = f"…</think><answer>{example.answer}</answer>"
    with reward(task) as judge:
        opened, not_opened = judge([RewardInput(prompt, text, example) for prompt in ("Q: <think>\n", "Q:")])
    assert opened.parts == {"format": 1, "accuracy": 1}
    assert not_opened.parts == {"format": 0, "accuracy": 1}


@pytest.mark.parametrize(("accuracy", "measure"), [(1.0, 0.0), (0.0, 5.5)])
def test_dapo_compares_what_was_right_or_else_all_that_was_earned(judges, accuracy, measure):
    with reward(settings(f"{judges}:worth", format=0.0, accuracy=accuracy), workers=1) as judge:
        (score,) = judge(completions([1]))
        assert judge.measure(score) == measure
