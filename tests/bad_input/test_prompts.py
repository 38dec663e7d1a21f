"""Any text, conversation and completion: nothing in it is executed, and in a report it stays text."""

import contextlib
import json
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_moe import ConfigError
from mla_moe.inference.openai_api import parse_messages
from mla_moe.inference.request import IncrementalDetokenizer, Request
from mla_moe.report.completions import pre
from mla_moe.text.chat_tokenizer import load_chat_tokenizer
from mla_moe.text.tokenizer import HFTokenizer, train_bpe

from .json_values import VALUES

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content.strip() }}</s>{% endfor %}<assistant>"
TEXT = st.text(st.characters(exclude_categories=[]), max_size=60) | st.sampled_from(
    ["</s>", "{{ 7 * 7 }}", "{% raw %}"]
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=3) | VALUES


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["a few words to learn from"] * 9, 260, folder / "tokenizer.json")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return load_chat_tokenizer(folder, HFTokenizer(folder / "tokenizer.json"))


@given(TEXT)
def test_any_prompt(tokenizer, text):
    with contextlib.suppress(ConfigError):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens[1:]) == text
        assert tokenizer.stop_ids[0] not in tokens


@given(MESSAGES)
def test_any_conversation(tokenizer, messages):
    with contextlib.suppress(ConfigError):
        tokens = tokenizer.encode_chat(parse_messages(messages, 1000))
        assert "49" not in tokenizer.decode(tokens) or "49" in str(messages)  # templates in a message are not evaluated


@given(st.lists(st.integers(0, 255), max_size=40), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_any_tokens_and_stop_strings(ids, stops):
    def decode(ids):
        return bytes(ids).decode(errors="replace")

    detokenizer = IncrementalDetokenizer(decode, tuple(stops))
    for i, token in enumerate(ids):
        if detokenizer.add([token], end=i == len(ids) - 1):
            break
    text = decode(ids)
    found = [i for i in map(text.find, stops) if i >= 0]
    assert detokenizer.text == text[: min(found)] if found else detokenizer.text in (text, "")


@given(TEXT)
def test_any_completion_stays_text_in_a_report(text):
    tags, found = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.handle_data = found.append
    parser.feed(pre(text))
    parser.close()
    assert tags == ["pre"]
    assert "".join(found) == "\n" + text


def test_special_tokens_in_a_text_are_encoded_as_text(tokenizer):
    assert Request(tokenizer.encode("</s>"), 1).prompt[1:] != [tokenizer.stop_ids[0]]
