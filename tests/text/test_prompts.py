import dataclasses

import pytest

from mla_moe import ConfigError
from mla_moe.text.chat_tokenizer import load_chat_tokenizer
from mla_moe.text.prompts import render_prompt
from mla_moe.text.tokenizer import ByteTokenizer, HFTokenizer, train_bpe

TOKENIZER = ByteTokenizer()


@pytest.fixture
def language(tmp_path):
    return load_chat_tokenizer(tmp_path, TOKENIZER)


def test_r1_zero_is_the_paper_s_prompt(language):
    text = (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
        "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
        "User: 1+1?. Assistant:"
    )
    assert render_prompt("r1_zero", "1+1?", language) == [TOKENIZER.bos_id, *text.encode()]


def test_other_braces_stand_for_themselves(language):
    tokens = render_prompt("{0} {question} {x}", "{question} {y}", language)
    assert tokens == [TOKENIZER.bos_id, *b"{0} {question} {y} {x}"]


def test_special_tokens_of_the_template_are_special_and_those_of_the_question_are_text(tmp_path):
    train_bpe(["hello there, how are you? " * 4], 270, tmp_path / "tokenizer.json")
    tokenizer = HFTokenizer(tmp_path / "tokenizer.json")
    chat = load_chat_tokenizer(tmp_path, tokenizer)
    bos, eos, plain = tokenizer.bos_id, tokenizer.eos_id, tokenizer.encode
    assert render_prompt("<s>{question}</s>hello", "there", chat) == [bos, *plain("there"), eos, *plain("hello")]
    assert render_prompt("{question}</s>", "</s>", chat) == [bos, *plain("</s>"), eos]
    assert render_prompt("hello {question}", "there", chat) == [bos, *plain("hello there")]


def test_chat_is_the_tokenizer_s_own_template(language):
    asked = []
    speaks = dataclasses.replace(language, encode_chat=lambda messages: asked.append(messages) or [7, 8])
    assert render_prompt("chat", "1+1?", speaks) == [7, 8]
    assert asked == [[{"role": "user", "content": "1+1?"}]]
    with pytest.raises(ConfigError, match=r"task.template = 'chat': .*no chat template"):
        render_prompt("chat", "1+1?", language)
