import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mla_moe
from mla_moe import ConfigError
from mla_moe.config import TaskConfig
from mla_moe.rl.rewards import Reward, RewardInput
from mla_moe.rl.tasks import open_task
from mla_moe.rl.verifiers.pool import VerifierFailure
from mla_moe.workers.process import WorkerProcess


@pytest.fixture(scope="module")
def verifiers(tmp_path_factory):
    path = tmp_path_factory.mktemp("verifiers") / "verifiers.py"
    path.write_text(Path(__file__).with_name("user_verifiers.py").read_text())
    return path


def settings(*functions, **fields):
    return TaskConfig(reward_functions=functions, **fields)


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
    assert [score.total for score in scores] == [2.5, 2.0, 0.5, 0.0]
    assert [score.components for score in scores[:2]] == [{"format": 1, "accuracy": 1}, {"format": 0, "accuracy": 1}]
    assert not any(score.failures for score in scores)


def test_reward_function_is_a_further_component(verifiers, capfd):
    """It is called with prompt, completion and example; values stay in order with several workers."""
    with make_reward(settings(f"{verifiers}:measure", reward_weights=(0.1,))) as reward:
        scores = reward(reward_inputs(range(30)))
        assert list(scores[0].components) == ["format", "accuracy", "measure"]
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


def test_a_reward_that_forks_does_not_shift_the_others(verifiers):
    with make_reward(settings(f"{verifiers}:forks", f"{verifiers}:measure"), workers=2) as reward:
        scores = reward(reward_inputs(range(20)))
    assert [score.components["forks"] for score in scores] == list(range(20))
    assert [score.components["measure"] for score in scores] == [1 + 3 + 0.5 + i for i in range(20)]


@pytest.mark.parametrize(
    "sent",
    [
        None, 1.0, "1", [], [[]] * 2, [["value", {"": 1.0}]], [["value", {"": 1}], ["value", {"": "1"}]],
        [["value", {"": math.nan}], ["value", {"a": math.inf, "b": 1.0}]], [["value", 1.0], ["value", [1.0]]],
        [["not_finite", 3], ["other", ""]], [["value", {"": True}], ["value", {"": None}]], {"a": 1}, [{}, {}],
        [["value", {"": 1e16}], ["value", {"": -1e300}]],
    ],
)  # fmt: skip
def test_what_a_worker_sends_is_checked(verifiers, sent, monkeypatch):
    """Whatever it is: each completion has a finite reward, or a failure that says what came."""
    with make_reward(settings(f"{verifiers}:longer"), workers=1) as reward:
        monkeypatch.setattr(type(reward._verifiers), "__call__", lambda pool, calls: [sent for _ in calls])
        scores = reward(group("a", "b"))
    assert [score.failures[0].kind for score in scores] == ["not_finite"] * 2
    assert all(math.isfinite(score.total) and score.components["longer"] == 0 for score in scores)
    assert all(score.failures[0].message.startswith("returned ") for score in scores)


def test_calls_run_in_parallel(verifiers):
    with make_reward(settings(f"{verifiers}:sleeps"), workers=4) as reward:
        reward(reward_inputs(["warm"] * 4))
        start = time.monotonic()
        reward(reward_inputs(["x"] * 8))
        assert time.monotonic() - start < 8 * 0.4 - 0.5


def test_a_deleted_reward_function_ends_the_run_once_all_workers_have_ended(tmp_path):
    path = tmp_path / "passing.py"
    path.write_text("import os\ndef die(prompt, completion, example): os._exit(1)\n")
    with make_reward(settings(f"{path}:die"), workers=2) as reward:
        path.unlink()
        for _ in range(2):
            with pytest.raises(
                ConfigError, match=r"^task.reward_functions = .*passing.py:die.* cannot be loaded: FileNot"
            ):
                reward(reward_inputs("abcdef"))


def test_a_worker_that_cannot_start_takes_no_calls_from_the_others(verifiers, tmp_path, caplog):
    with make_reward(settings(f"{verifiers}:measure"), workers=2) as reward:
        reward._verifiers._workers[1].end()
        broken = reward._verifiers._workers[1] = WorkerProcess(tmp_path / "nowhere.py", [], max_reply_bytes=1000)
        end = time.monotonic() + 60
        while "cannot start" not in caplog.text and time.monotonic() < end:
            assert not any(score.failures for score in reward(reward_inputs(range(3))))
        assert not broken.busy
        assert not any(score.failures for score in reward(reward_inputs(range(30))))
    assert [record.getMessage().partition(": ")[::2] for record in caplog.records] == [
        (
            "a worker process for rewards cannot start",
            f"FileNotFoundError: [Errno 2] No such file or directory: '{tmp_path}/nowhere.py'",
        )
    ]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("{verifiers}", "write module:name or path.py:name"),
        ("{verifiers}:none", "AttributeError.*none"),
        ("{verifiers}:number", "number is not callable"),
        ("{verifiers}:odd", "the parameters of odd must be .prompt, completion, example., or .prompts, completions"),
        ("{verifiers}:not a name", "write module:name"),
        ("{verifiers}:format", "format is taken"),
        ("/nowhere/verifiers.py:measure", "FileNotFoundError"),
        ("nowhere.at.all:measure", "No module named 'nowhere'"),
        ("{broken}:measure", "ZeroDivisionError"),
        ("{dying}:measure", "died, exit code 4"),
        ("{verifiers}:measure {dying}:other", "dying.py:other.*died, exit code 4"),
    ],
)
def test_invalid_reward_function_is_an_error_at_the_start(verifiers, tmp_path, function, message):
    broken, dying = tmp_path / "broken.py", tmp_path / "dying.py"
    broken.write_text("1 / 0")
    dying.write_text("import os; os._exit(4)")
    function = function.format(verifiers=verifiers, broken=broken, dying=dying)
    with pytest.raises(ConfigError, match=rf"(?s)^task.reward_functions = .*{message}"):
        make_reward(settings(*function.split(" ")) if ".py:other" in function else settings(function))


@pytest.mark.parametrize("name", ["re", "random"])
def test_reward_file_may_have_the_name_of_a_module(name, tmp_path):
    path = tmp_path / f"{name}.py"
    (tmp_path / "service.py").write_text("import re\n")  # beside it, and imported by it
    path.write_text(
        f"import {name}, service\ndef f(prompt, completion, example): return bool({name}.__doc__ and service.re.X)\n"
    )
    with make_reward(settings(f"{path}:f"), workers=1) as reward:
        assert reward(reward_inputs([1]))[0].components["f"] == 1


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
config = TaskConfig(reward_functions=(sys.argv[1],), timeout=float(sys.argv[3]))
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


def group(*texts, ids=None, **columns):
    """The completions of one prompt."""
    (base,) = reward_inputs(["x"])
    example = base.example._replace(record=columns)
    return [RewardInput("?", text, example, tuple(range(len(text)))) for text in texts]


def test_reward_functions_as_users_of_trl_write_them(verifiers):
    names = ["longer", "characters", "reference", "only_math", "later"]
    functions = [f"{verifiers}:{name}" for name in names]
    weights = (0.0, 0.0, 1.0, 10.0, 0.5)
    with make_reward(settings(*functions, reward_weights=weights, format_weight=0.0, accuracy_weight=0.0)) as reward:
        first = group("is \\boxed{4}", "", ground_truth="4", task="math")
        second = group("is \\boxed{5}", ground_truth="4", task="code")
        scores = reward([*first, *second])
    parts = [{name: value for name, value in score.components.items() if name in names} for score in scores]
    assert parts == [
        {"longer": 12, "characters": 12, "reference": 1, "only_math": 1, "later": 1},
        {"longer": 0, "characters": 0, "reference": 0, "only_math": -1, "later": 0},
        {"longer": 12, "characters": 12, "reference": 0, "later": 1},  # None: it does not apply
    ]
    assert [score.total for score in scores] == [1 + 10 + 0.5, -10, 0.5]
    assert not any(score.failures for score in scores)


def test_completions_are_messages_with_the_chat_template(verifiers):
    with make_reward(settings(f"{verifiers}:conversation", template="chat"), workers=1) as reward:
        scores = reward(group("<think>1</think><answer>2</answer>", "2"))
    assert [score.components["conversation"] for score in scores] == [1, 0]


def test_reward_functions_may_be_async_and_have_parts(verifiers):
    functions = [f"{verifiers}:{name}" for name in ("single_later", "parts", "batched_parts", "positional")]
    with make_reward(settings(*functions, reward_weights=(1.0, 2.0, 0.0, 0.0), accuracy_weight=0.0)) as reward:
        scores = reward(group("ab", "abc"))
    assert scores[1].components == {
        "format": 0, "accuracy": 0, "single_later": 3, "parts/short": -3, "parts/polite": 0.5,
        "batched_parts/size": 3, "batched_parts/rank": 1, "positional": 3,
    }  # fmt: skip
    assert [score.total for score in scores] == [2 + 2 * (-2 + 0.5), 3 + 2 * (-3 + 0.5)]


def test_wrong_values_of_a_batched_function_are_failures(verifiers):
    with make_reward(settings(f"{verifiers}:too_few", f"{verifiers}:one_is_wrong")) as reward:
        scores = reward(group("a", "b", "c"))
    assert [len(score.failures) for score in scores] == [1, 2, 2]
    assert "returned [1.0] for 3 completions" in scores[0].failures[0].message
    assert [score.components["one_is_wrong"] for score in scores] == [1, 0, 0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wants_solution", "missing a required argument: 'solution'; the columns are question, answer"),
        ("too_few", None),
        ("fails", None),
        ("measure", "raised on sample completions: KeyError: 'extra'"),
    ],
)
def test_functions_are_tried_on_samples_before_anything_compiles(verifiers, name, message):
    config = settings(f"{verifiers}:{name}")
    with make_reward(config, workers=1) as reward:
        examples = [open_task(config).example("train", number) for number in range(2)]
        if message is None:
            reward.check(examples)
        else:
            with pytest.raises(ConfigError, match=f"(?s)^task.reward_functions = .*:{name}.*{message}"):
                reward.check(examples)


def test_reward_weights_fit_the_functions():
    with pytest.raises(ConfigError, match=r"^task.reward_weights = \(1.0,\): give one for each of 2"):
        TaskConfig(reward_functions=("a:b", "a:c"), reward_weights=(1.0,))
    with pytest.raises(ConfigError, match=r"^task.reward_functions = 'a:b': b is taken"):
        make_reward(settings("x:b", "a:b"))


def test_equal_answers_vote_together(tmp_path):
    pytest.importorskip("math_verify", reason="pip install 'mla_moe[rl]'")
    path = tmp_path / "task.jsonl"
    path.write_text('{"question": "?", "answer": "1/2"}\n')
    config = settings(name=str(path))
    task = open_task(config)
    example = task.example("all", 0)
    words = ["1/2", "0.5", r"\\frac{1}{2}", "3", "3", None]
    texts = ["" if word is None else f"<answer>{word}</answer>" for word in words]
    with Reward(config, task, workers=1) as reward:
        scores = reward([RewardInput("?", text, example) for text in texts])
        assert [score.components["accuracy"] for score in scores] == [1, 1, 1, 0, 0, 0]
        assert reward.votes([scores, scores[3:]], [example, example]) == [[0, 0, 0, 3, 3, None], [0, 0, None]]
    with make_reward(settings()) as reward:  # texts, without a judge of mathematics
        assert reward.votes([scores], [example]) == [[0, 1, 2, 3, 3, None]]
