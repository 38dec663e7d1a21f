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
from mla_moe.rl.tasks import open_task
from mla_moe.rl.verifiers.pool import VerifierFailure

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
    assert parse_completion(completion) == (has_format, answer)


@hypothesis.given(PIECES)
def test_format_matches_its_definition(completion):
    """Each tag once, in order, only white space outside: implemented differently."""
    starts = [completion.find(tag) for tag in TAGS]
    strict = all(completion.count(tag) == 1 for tag in TAGS) and starts == sorted(starts)
    if strict:
        outside = completion[: starts[0]], completion[starts[1] + 8 : starts[2]], completion[starts[3] + 9 :]
        strict = not any(text.strip() for text in outside)
    has_format, answer = parse_completion(completion)
    assert has_format == (strict and answer is not None)


@hypothesis.given(st.text(), st.text(), st.sampled_from(["", " ", "\n\n"]))
def test_any_reasoning_and_answer_can_be_parsed(thought, answer, space):
    hypothesis.assume(not any(tag in text for tag in TAGS for text in (thought, answer)))
    found = parse_completion(f"{space}<think>{thought}</think>{space}<answer>{answer}</answer>{space}")
    assert found == (answer.strip() != "", answer.strip() or None)


@hypothesis.given(PIECES)
def test_answer_is_stripped_and_not_empty(completion):
    _, answer = parse_completion(completion)
    assert answer is None or (answer and answer == answer.strip() and f"{answer}" in completion)


def test_long_completions_are_parsed_fast():
    start = time.monotonic()
    for text in ("<answer>" * 20_000, "<answer> " + " a" * 50_000 + "</answer> x", "<think>" + " " * 100_000 + "x"):
        parse_completion(text)
    assert time.monotonic() - start < 2


VERIFIERS = """
import os, subprocess, sys, time

def measure(prompt, completion, example):
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
def verifiers(tmp_path_factory):
    path = tmp_path_factory.mktemp("verifiers") / "verifiers.py"
    path.write_text(VERIFIERS)
    return path


def settings(function=None, **fields):
    return TaskConfig(reward_function=function, **fields)


def make_reward(config, workers=2):
    return Reward(config, open_task(config), workers)


def reward_inputs(words, question="1+1", answer="2", prompt="?"):
    example = open_task(TaskConfig()).example("train", 0)._replace(question=question, answer=answer)
    example = example._replace(record={"extra": 0.5})
    return [RewardInput(prompt, f"<think>…</think><answer>{word}</answer> {word}", example) for word in words]


def test_built_in_components_start_no_process(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    task = settings(format_weight=0.5, accuracy_weight=2.0)
    example = open_task(task).example("test", 0)
    texts = ["<think>…</think><answer>{}</answer>", "<answer>{}</answer>", "<think>…</think><answer>{}1</answer>", "{}"]
    with make_reward(task) as reward:
        scores = reward([RewardInput("?", text.replace("{}", example.answer), example) for text in texts])
    assert reward.component_names == ("format", "accuracy")
    assert [score.total for score in scores] == [2.5, 2.0, 0.5, 0.0]
    assert [score.components for score in scores[:2]] == [{"format": 1, "accuracy": 1}, {"format": 0, "accuracy": 1}]
    assert not any(score.failures for score in scores)


def test_reward_function_is_a_further_component(verifiers, capfd):
    """It is called with prompt, completion and example; values stay in order with several workers."""
    with make_reward(settings(f"{verifiers}:measure", reward_function_weight=0.1)) as reward:
        assert reward.component_names == ("format", "accuracy", "measure")
        scores = reward(reward_inputs(range(30)))
        assert [score.components["measure"] for score in scores] == [1 + 3 + 0.5 + i for i in range(30)]
        assert scores[2].components["accuracy"] == 1
        assert scores[2].total == pytest.approx(1 + 0.1 * 6.5)
        assert reward([]) == []
    assert "not part" not in capfd.readouterr().out


def test_failures_cost_one_call_and_have_a_kind(verifiers):
    words = ["hang", "raise", "spin", "fine", "exit", "nan", "inf", "die", "text", "none", "killed", "fine"]
    kinds = ["hung", "raised", "hung", None, "raised", *["not_finite"] * 2, "died", *["not_finite"] * 2, "died", None]
    start = time.monotonic()
    with make_reward(settings(f"{verifiers}:fails", timeout=0.5), workers=3) as reward:
        scores = reward(reward_inputs(words))
        assert time.monotonic() - start < 20
        assert [[failure.kind for failure in score.failures] for score in scores] == [
            [kind] if kind else [] for kind in kinds
        ]
        assert [score.components["fails"] for score in scores] == [float(kind is None) for kind in kinds]
        assert all(math.isfinite(score.total) for score in scores)
        assert scores[1].failures == (VerifierFailure("raised", "KeyError: 'no such thing'"),)
        assert "exit code 7" in scores[7].failures[0].message
        assert "0.5 s" in scores[0].failures[0].message
        assert [score.components["fails"] for score in reward(reward_inputs(["fine"] * 6))] == [1.0] * 6


def test_calls_run_in_parallel(verifiers):
    with make_reward(settings(f"{verifiers}:sleeps"), workers=4) as reward:
        reward(reward_inputs(["warm"] * 4))
        start = time.monotonic()
        reward(reward_inputs(["x"] * 8))
        assert time.monotonic() - start < 8 * 0.4 - 0.5


def test_deleted_reward_function_does_not_end_the_run(tmp_path):
    path = tmp_path / "passing.py"
    path.write_text("import os\ndef die(prompt, completion, example): os._exit(1)\n")
    with make_reward(settings(f"{path}:die"), workers=2) as reward:
        path.unlink()
        scores = reward(reward_inputs("abcdef"))
    assert [score.failures[0].kind for score in scores] == ["died"] * 6
    assert "no worker could start: " in scores[-1].failures[0].message


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("{verifiers}", "write module:name or path.py:name"),
        ("{verifiers}:none", "AttributeError.*none"),
        ("{verifiers}:number", "number is not callable"),
        ("{verifiers}:batched", "too many positional arguments"),
        ("{verifiers}:later", "later is a coroutine"),
        ("{verifiers}:not a name", "write module:name"),
        ("{verifiers}:format", "format is taken"),
        ("/nowhere/verifiers.py:measure", "FileNotFoundError"),
        ("nowhere.at.all:measure", "No module named 'nowhere'"),
        ("{broken}:measure", "ZeroDivisionError"),
        ("{dying}:measure", "died, exit code 4"),
    ],
)
def test_invalid_reward_function_is_an_error_at_the_start(verifiers, tmp_path, function, message):
    broken, dying = tmp_path / "broken.py", tmp_path / "dying.py"
    broken.write_text("1 / 0")
    dying.write_text("import os; os._exit(4)")
    function = function.format(verifiers=verifiers, broken=broken, dying=dying)
    with pytest.raises(ConfigError, match=rf"(?s)^task.reward_function = .*{message}"):
        make_reward(settings(function))


def test_reward_function_from_a_module(verifiers, monkeypatch):
    monkeypatch.syspath_prepend(str(verifiers.parent))
    with make_reward(settings("verifiers:measure"), workers=1) as reward:
        assert reward(reward_inputs([1]))[0].components["measure"] == 5.5


@pytest.mark.parametrize("name", ["reasoning_gym:chain_sum", "file"])
def test_library_verifiers_run_in_worker_processes(name, tmp_path):
    pytest.importorskip("math_verify" if name == "file" else "reasoning_gym", reason="pip install 'mla_moe[rl]'")
    path = tmp_path / "halves.jsonl"
    path.write_text("".join(f'{{"question": "{i}?", "answer": "1/2"}}\n' for i in range(9)))
    task = settings(name=str(path) if name == "file" else name)
    opened_task = open_task(task)
    example = opened_task.example("train", 0)
    correct = "0.5" if name == "file" else example.answer
    texts = [f"<think>…</think><answer>{answer}</answer>" for answer in (correct, f"1{correct}")]
    with Reward(task, opened_task, workers=1) as reward:
        scores = reward([RewardInput("?", text, example) for text in texts])
    assert [score.components["accuracy"] == 1 for score in scores] == [True, False]
    assert not any(score.failures for score in scores)


PARENT = """
import os, signal, sys
from mla_moe.config import TaskConfig
from mla_moe.rl.rewards import Reward, RewardInput
from mla_moe.rl.tasks import open_task
signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes of a shell ignore it
config = TaskConfig(reward_function=sys.argv[1], timeout=float(sys.argv[3]))
task = open_task(config)
reward = Reward(config, task, workers=2)
print(*(worker._process.pid for worker in reward._verifiers._workers), flush=True)
if sys.argv[2] in ("spin", "interrupt"):
    reward([RewardInput("?", "so spin", task.example("train", 0))])
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # empty: a zombie
    except OSError:
        return False


def all_end(pids, seconds):
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(("end", "timeout"), [("kill", 60), ("interrupt", 60), ("spin", 1.5)])
@pytest.mark.slow
def test_workers_end_with_the_parent(verifiers, end, timeout):
    """If it is killed, and if it is interrupted or killed while a verifier hangs."""
    command = [sys.executable, "-c", PARENT, f"{verifiers}:fails", end, str(timeout)]
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
    assert all_end(pids, 5)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_child_processes_of_a_hanging_verifier_end_with_it(verifiers, tmp_path):
    """Also in a process session of their own, which tools that run code use."""
    with make_reward(settings(f"{verifiers}:leaves", timeout=3.0), workers=1) as reward:
        (score,) = reward(reward_inputs([tmp_path / "pid"]))
    assert score.failures[0].kind == "hung"
    assert all_end([int((tmp_path / "pid").read_text())], 5)


def test_format_of_a_prompt_prefilled_with_think():
    """As by DeepSeek-R1's chat template."""
    task = settings()
    example = open_task(task).example("test", 0)
    text = f"…</think><answer>{example.answer}</answer>"
    with make_reward(task) as reward:
        prefilled, plain = reward([RewardInput(prompt, text, example) for prompt in ("Q: <think>\n", "Q:")])
    assert prefilled.components == {"format": 1, "accuracy": 1}
    assert plain.components == {"format": 0, "accuracy": 1}


@pytest.mark.parametrize(("accuracy", "metric"), [(1.0, 0.0), (0.0, 5.5)])
def test_filter_metric_is_accuracy_or_the_total_without_its_weight(verifiers, accuracy, metric):
    with make_reward(
        settings(f"{verifiers}:measure", format_weight=0.0, accuracy_weight=accuracy), workers=1
    ) as reward:
        (score,) = reward(reward_inputs([1]))
        assert reward.filter_metric(score) == metric
