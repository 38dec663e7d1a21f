"""Verifiers and reward functions as users write them, right and wrong. `test_rewards.py` copies and calls them."""

import os
import subprocess
import sys
import time


def measure(prompt, completion, example):
    assert "jax" not in sys.modules
    print("not part of the output")
    word = completion.rpartition(" ")[2]
    return len(prompt) + len(example.question) + example.record["extra"] + float(word)


def fails(prompt, completion, example):
    word = completion.rpartition(" ")[2]
    if word == "raise":
        raise KeyError("no such thing")
    if word == "exit":
        sys.exit(3)
    if word == "hang":
        time.sleep(60)
    if word == "spin":
        while True:
            pass
    if word == "nan":
        return float("nan")
    if word == "inf":
        return -float("inf")
    if word == "text":
        return "1.0"
    if word == "none":
        return None
    if word == "die":
        os._exit(7)
    if word == "killed":
        os.kill(os.getpid(), 9)
    return os.getpid() > 0


def leaves(prompt, completion, example):
    code = "import time; time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    with open(completion.rpartition(" ")[2], "w") as file:
        file.write(str(child.pid))
    time.sleep(60)


def forks(prompt, completion, example):
    """Both processes return, with different values."""
    return -1.0 if os.fork() == 0 else float(completion.rpartition(" ")[2])


def odd(text):
    return 1.0


def positional(text, response, ex, **options):
    return len(response) + 0 * len(ex.question)


def sleeps(prompt, completion, example):
    time.sleep(0.4)
    return 1


number = 3

# As in TRL's documentation of GRPOTrainer: longer completions, their characters, a reference, several tasks, async


def longer(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def characters(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def reference(completions, ground_truth, **kwargs):
    import re

    matches = [re.search(r"\\boxed\{(.*?)\}", completion) for completion in completions]
    contents = [match.group(1) if match else "" for match in matches]
    return [1.0 if c == gt else 0.0 for c, gt in zip(contents, ground_truth)]  # noqa: B905


def only_math(prompts, completions, task, **kwargs):
    return [(1.0 if "4" in c else -1.0) if t == "math" else None for p, c, t in zip(prompts, completions, task)]  # noqa: B905


async def later(prompts, completions, **kwargs):
    import asyncio

    await asyncio.sleep(0.01)
    return [1.0 if completion else 0.0 for completion in completions]


def conversation(completions, **kwargs):
    import re

    pattern = r"^<think>.*?</think><answer>.*?</answer>$"
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(pattern, content) else 0.0 for content in contents]


# Other forms


async def single_later(prompt, completion, example):
    return len(completion)


def parts(prompt, completion, example):
    return {"short": -len(completion), "polite": 0.5}


def batched_parts(completions):
    return {"size": [len(c) for c in completions], "rank": sorted(range(len(completions)))}


def too_few(completions, **kwargs):
    return [1.0]


def one_is_wrong(completions, **kwargs):
    return [1.0, float("nan"), "3"][: len(completions)]


def wants_solution(completions, solution):
    return [0.0 for _ in completions]
