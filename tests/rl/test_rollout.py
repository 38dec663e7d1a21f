"""Requests to the engine, and scores of its completions, with a fake engine that runs no model."""

import itertools

import pytest
from flax import nnx

from mla_moe import ConfigError, Transformer
from mla_moe.config import RLConfig, TaskConfig
from mla_moe.inference.request import Completion
from mla_moe.rl.group_sampling import sample_groups
from mla_moe.rl.rewards import Reward
from mla_moe.rl.rollout import MAX_SKIPPED_RATIO, Rollout
from mla_moe.rl.tasks import open_task
from mla_moe.text.chat_tokenizer import load_chat_tokenizer
from mla_moe.text.tokenizer import ByteTokenizer

SETTINGS = TaskConfig(template="{question}=", options=("least=1", "most=2"))
COMPLETION = "1</think><answer>2</answer>"


class Engine:
    """Returns the same completion for all requests, one per step."""

    def __init__(self, model, **_):
        self.requests, self.waiting = [], []

    def submit(self, request):
        self.requests.append(request)
        self.waiting.append(Completion(request))
        return self.waiting[-1]

    @property
    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        done = self.waiting.pop()
        done.append_tokens(list(COMPLETION.encode()), [0.0] * len(COMPLETION))
        done.finish_reason = done.finish_reason or "stop"


@pytest.fixture
def make(cfg, monkeypatch, tmp_path):
    monkeypatch.setattr("mla_moe.rl.rollout.Engine", Engine)

    def make(**settings):
        task = open_task(SETTINGS)
        rl = RLConfig(max_new_tokens=40, temperature=0.7, **settings)
        reward = Reward(SETTINGS, task)
        rollout = Rollout(rl, SETTINGS.template, task, reward, load_chat_tokenizer(tmp_path, ByteTokenizer()))
        rollout.load_weights(Transformer(cfg, rngs=nnx.Rngs(0)))
        return rollout

    return make


def text_of(tokens):
    return ByteTokenizer().decode(tokens)


@pytest.mark.parametrize("prefill", [False, True])
def test_requests_and_scores(make, prefill):
    rollout = make()
    prompts, number = rollout.prompts("train", 5, 3)
    assert number == 8
    reports = []
    groups = rollout.generate(prompts, 2, seed=9, first_index=4, prefill_think=prefill, progress=reports.append)
    assert [[completion.prompt for completion in group] for group in groups] == [[p, p] for p in prompts]
    requests = rollout._engine.requests
    think = "<think>" if prefill else ""
    texts = [f"{p.example.question}={think}" for p in prompts for _ in range(2)]
    assert [text_of(request.prompt) for request in requests] == texts
    assert all(request.prompt.count(256) == 1 for request in requests), "one bos"
    assert [(r.sample_index, r.seed, r.temperature) for r in requests] == [(4 + i, 9, 0.7) for i in range(6)]
    for completion in (completion for group in groups for completion in group):
        assert completion.text == think + COMPLETION
        assert completion.length == len(COMPLETION)
        assert not completion.truncated
        assert completion.score.components["format"] == float(prefill)
        assert completion.score.components["accuracy"] == float(prefill and completion.prompt.example.answer == "2")
    assert reports[-1] == "6 of 6 completions"
    assert len(reports) == 6


def test_prompt_that_ends_with_think_is_not_prefilled_again(make):
    rollout = make()
    rollout._template = "{question}=<think>\n"
    prompts, _ = rollout.prompts("train", 0, 1)
    ((completion,),) = rollout.generate(prompts, seed=0, prefill_think=True)
    assert text_of(rollout._engine.requests[0].prompt).count("<think>") == 1
    assert completion.text == COMPLETION
    assert completion.score.components["format"] == 1


def test_temperature_can_be_overridden_and_the_default_is_no_prefill(make):
    rollout = make()
    rollout.generate(rollout.prompts("train", 0, 1)[0], seed=0, temperature=0.0)
    assert rollout._engine.requests[0].temperature == 0
    assert text_of(rollout._engine.requests[0].prompt).endswith("=")


def test_long_prompts_are_skipped_and_counted(make):
    """With bos, the equals sign and `<think>` there is room for three characters: one operation, not two."""
    rollout = make(max_prompt_tokens=12)
    prompts, number = rollout.prompts("train", 0, 10)
    assert {len(prompt.example.question) for prompt in prompts} == {3}
    assert rollout.prompts_too_long == number - 10 > 0
    prompts, end = rollout.prompts("train", number, 10)
    assert len(prompts) == 10
    assert rollout.prompts_too_long == end - 20


def test_too_many_long_prompts_are_an_error(make, monkeypatch):
    rollout = make(max_prompt_tokens=11)
    numbers, example = [], rollout.task.example

    def record(split, number):
        numbers.append(number)
        return example(split, number)

    monkeypatch.setattr(rollout.task, "example", record)
    with pytest.raises(ConfigError, match=r"rl.max_prompt_tokens = 11: most prompts are longer, up to \d\d+ tokens"):
        rollout.prompts("train", 0, 2)
    assert numbers == list(range(2 * MAX_SKIPPED_RATIO))


class GroupEngine(Engine):
    """Completes prompts in turn with the answers of `answers`; None is cut off at the longest length."""

    answers = itertools.cycle([None])

    def step(self):
        done = self.waiting.pop(0)
        answer = next(self.answers)
        text = "x" * 40 if answer is None else f"1</think><answer>{answer}</answer>"
        done.append_tokens(list(text.encode()), [0.0] * len(text))
        done.finish_reason = "length" if answer is None else "stop"


@pytest.mark.parametrize("objective", ["grpo", "dapo"])
def test_groups_without_a_signal_are_counted_by_cause(make, monkeypatch, objective):
    rollout = make(objective=objective, prompts_per_step=4, group_size=2, max_resample_rounds=1)
    correct = [prompt.example.answer for prompt in rollout.prompts("train", 0, 4)[0]]
    replies = [None, None, correct[1], correct[1], "no", "no", correct[3], "no"]
    monkeypatch.setattr(GroupEngine, "answers", itertools.cycle(replies))
    rollout._engine.__class__ = GroupEngine
    batch = sample_groups(rollout, rollout._rl, 0, 0, lambda text: None)
    metrics = batch.metrics()
    causes = {cause: metrics[f"no_signal/{cause}"] for cause in ("all_truncated", "all_correct", "all_wrong")}
    assert causes == {"all_truncated": 1, "all_correct": 1, "all_wrong": 1}
    assert metrics["filtered_groups"] == (0 if objective == "dapo" else 3), "the batch has no other groups than these"
    assert batch.has_signal
    monkeypatch.setattr(GroupEngine, "answers", itertools.cycle(["no"]))
    batch = sample_groups(rollout, rollout._rl, 0, 0, lambda text: None)
    assert not batch.has_signal
    assert batch.uniform == {"all_wrong": 4}


def test_prompts_of_a_held_out_split_end_with_it(make, monkeypatch):
    rollout = make()
    monkeypatch.setattr(rollout.task, "count", lambda split: None if split == "train" else 3, raising=False)
    prompts, after = rollout.prompts("test", 0, 8)
    assert (len(prompts), after) == (3, 3)
    monkeypatch.setattr(rollout.task, "count", lambda split: 0)
    with pytest.raises(ConfigError, match=r"^task.name = 'test': has no test question"):
        rollout.prompts("test", 0, 8)
