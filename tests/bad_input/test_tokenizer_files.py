"""Files beside the weights: special tokens, generation configs, tokenizers and templates: used, or refused by name."""

import contextlib
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_moe import ConfigError
from mla_moe.text import isolated
from mla_moe.text.chat_tokenizer import load_chat_tokenizer
from mla_moe.text.tokenizer import HFTokenizer, train_bpe

from .json_values import VALUES, changed

GENERATION = {"bos_token_id": 0, "eos_token_id": [1, 3], "temperature": 0.6, "do_sample": True}
SPECIAL = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "unk_token": "<s>"}
IDS = st.sampled_from([0, 1, -5, 2**40, 10**30, True, 1.0, "1", "</s>", [1, "a"], [[1]], [None], {}, [], float("nan")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with a small tokenizer, and the text of its `tokenizer.json`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["a few words to learn from"] * 9, 260, folder / "tokenizer.json")
    return folder, json.loads((folder / "tokenizer.json").read_text())


def use(folder):
    """Whatever is read can be used: its stop tokens are ids of the tokenizer, and it encodes any text."""
    tokenizer = HFTokenizer(folder / "tokenizer.json")
    chat = load_chat_tokenizer(folder, tokenizer)
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in chat.stop_ids)
    tokens = tokenizer.encode("few words <s> 日")
    assert isinstance(tokenizer.decode(tokens), str)
    assert all(isinstance(tokenizer.token_bytes(int(token)), bytes) for token in tokens[:4])


@given(changed(GENERATION) | st.builds(lambda ids: GENERATION | {"eos_token_id": ids}, IDS) | VALUES, st.booleans())
def test_any_generation_config(folder, value, of_model):
    path = folder[0] / ("config.json" if of_model else "generation_config.json")
    path.write_text(json.dumps(value))
    try:
        with contextlib.suppress(ConfigError):
            use(folder[0])
    finally:
        path.unlink()


@given(changed(SPECIAL) | VALUES, st.sampled_from(["tokenizer_config.json", "special_tokens_map.json"]))
def test_any_special_tokens(folder, value, name):
    path = folder[0] / name
    before = path.read_text() if path.exists() else None
    path.write_text(json.dumps(value))
    try:
        with contextlib.suppress(ConfigError):
            use(folder[0])
    finally:
        path.unlink() if before is None else path.write_text(before)


@given(st.data())
def test_any_tokenizer(folder, data):
    """Of another's making: a JSON object with changes, or bytes that are none."""
    path = folder[0] / "tokenizer.json"
    good = folder[1]
    if data.draw(st.integers(0, 9)):
        path.write_text(json.dumps(data.draw(changed(good))))
    else:
        path.write_bytes(data.draw(st.binary(max_size=200)))
    try:
        with contextlib.suppress(ConfigError):
            use(folder[0])
    finally:
        path.write_text(json.dumps(good))


PIECES = [
    "{% for m in messages %}",
    "{{ m.content }}",
    "{% endfor %}",
    "{% if m.role == 'user' %}",
    "{% endif %}",
    "{{ bos_token }}",
    "{% set x = messages[0] %}",
    "{{ x }}",
    "{{ 'a' * 10**9 }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% for i in range(99999) %}",
    "{% macro f() %}",
    "{{ f() }}",
    "{% endmacro %}",
    "{{ raise_exception('no') }}",
    "{{",
    "%}",
    "{% include 'config.json' %}",
    "{{ messages.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ 1 / 0 }}",
    "{{ messages|tojson }}",
    "{{ messages|map('length')|list }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% break %}",
    "text",
]


@given(template=st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=8).map("".join))
def test_any_template(folder, template):
    """A limit of half a second: some of these would never end."""
    path = folder[0] / "chat_template.jinja"
    path.write_text(template, encoding="utf-8", errors="replace")
    chat = load_chat_tokenizer(folder[0], HFTokenizer(folder[0] / "tokenizer.json"))
    start = time.monotonic()
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ConfigError):
        patch.setattr(isolated, "SECONDS", 0.5)
        assert all(type(token) is int for token in chat.encode_chat([{"role": "user", "content": "few words"}]))
    assert time.monotonic() - start < 10
    path.unlink()
