"""What the engine is asked, and what becomes of what it answers: with an engine that runs no model."""

import pytest
from flax import nnx

from mla_moe import ConfigError, Transformer
from mla_moe.config import RLConfig, TaskConfig
from mla_moe.inference.request import Completion
from mla_moe.rl import rewards
from mla_moe.rl.rollout import MAX_SKIPPED_RATIO, Rollout
from mla_moe.rl.tasks.task import open_task
from mla_moe.text.chat_tokenizer import load_chat_tokenizer
from mla_moe.text.tokenizer import ByteTokenizer

SETTINGS = TaskConfig(template="{question}=", options=("least=1", "most=2"))
ANSWER = "1</think><answer>2</answer>"


class Engine:
    """Answers all alike, one request a step."""

    def __init__(self, model, **_):
        self.asked, self.waiting = [], []

    def submit(self, request):
        self.asked.append(request)
        self.waiting.append(Completion(request))
        return self.waiting[-1]

    @property
    def busy(self):
        return bool(self.waiting)

    def step(self):
        done = self.waiting.pop()
        done.take(list(ANSWER.encode()), [0.0] * len(ANSWER))
        done.finish = done.finish or "stop"


@pytest.fixture
def make(cfg, monkeypatch, tmp_path):
    monkeypatch.setattr("mla_moe.rl.rollout.Engine", Engine)

    def make(**settings):
        task = open_task(SETTINGS)
        rl = RLConfig(max_new_tokens=40, temperature=0.7, **settings)
        reward = rewards.Reward(SETTINGS, task)
        rollout = Rollout(rl, SETTINGS.template, task, reward, load_chat_tokenizer(tmp_path, ByteTokenizer()))
        rollout.load_weights(Transformer(cfg, rngs=nnx.Rngs(0)))
        return rollout

    return make


def text_of(tokens):
    return ByteTokenizer().decode(tokens)


@pytest.mark.parametrize("opened", [False, True])
def test_what_is_asked_and_judged(make, opened):
    rollout = make()
    questions, number = rollout.questions("train", 5, 3)
    assert number == 8
    said = []
    answers = rollout.answers(questions, 2, seed=9, first=4, opened=opened, progress=said.append)
    assert [[answer.question for answer in group] for group in answers] == [[q, q] for q in questions]
    asked = rollout._engine.asked
    opening = "<think>" if opened else ""
    assert [text_of(request.prompt) for request in asked] == [
        f"{q.example.question}={opening}" for q in questions for _ in range(2)
    ]
    assert all(request.prompt.count(256) == 1 for request in asked), "bos, once"
    assert [(r.number, r.seed, r.temperature) for r in asked] == [(4 + i, 9, 0.7) for i in range(6)]
    for group in answers:
        for answer in group:
            assert answer.text == opening + ANSWER
            assert answer.length == len(ANSWER)
            assert not answer.truncated
            assert answer.score.parts["format"] == float(opened)
            assert answer.score.parts["accuracy"] == float(opened and answer.question.example.answer == "2")
    assert said[-1] == "6 of 6 answers"
    assert len(said) == 6


def test_a_prompt_that_opens_the_thought_is_not_opened_again(make):
    rollout = make()
    rollout._template = "{question}=<think>\n"
    questions, _ = rollout.questions("train", 0, 1)
    ((answer,),) = rollout.answers(questions, seed=0, opened=True)
    assert text_of(rollout._engine.asked[0].prompt).count("<think>") == 1
    assert answer.text == ANSWER
    assert answer.score.parts["format"] == 1


def test_a_temperature_may_be_asked_for_and_nothing_is_opened_unasked(make):
    rollout = make()
    rollout.answers(rollout.questions("train", 0, 1)[0], seed=0, temperature=0.0)
    assert rollout._engine.asked[0].temperature == 0
    assert text_of(rollout._engine.asked[0].prompt).endswith("=")


def test_long_questions_are_passed_over_and_counted(make):
    """With bos, the equals sign and `<think>` there is room for three characters: one operation, not two."""
    rollout = make(max_prompt_tokens=12)
    questions, number = rollout.questions("train", 0, 10)
    assert {len(question.example.question) for question in questions} == {3}
    assert rollout.too_long == number - 10 > 0
    again, end = rollout.questions("train", number, 10)
    assert len(again) == 10
    assert rollout.too_long == end - 20


def test_there_is_an_end_to_passing_over(make, monkeypatch):
    rollout = make(max_prompt_tokens=11)
    numbers, example = [], rollout._task.example

    def note(split, number):
        numbers.append(number)
        return example(split, number)

    monkeypatch.setattr(rollout._task, "example", note)
    with pytest.raises(ConfigError, match=r"rl.max_prompt_tokens = 11: most prompts are longer"):
        rollout.questions("train", 0, 2)
    assert numbers == list(range(2 * MAX_SKIPPED_RATIO))
