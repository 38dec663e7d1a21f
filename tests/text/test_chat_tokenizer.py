import json
import os
import sys

import pytest
from flax import nnx

from mla_moe import ConfigError, Transformer, save_pretrained
from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.tokenizer_files import tokenizer_file
from mla_moe.cli import main
from mla_moe.inference.engine import Engine
from mla_moe.inference.request import CONTEXT_TOKENS, IncrementalDetokenizer, Request
from mla_moe.text.chat_tokenizer import load_chat_tokenizer
from mla_moe.text.tokenizer import HFTokenizer, train_bpe

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, cfg):
    """A random model with a tokenizer and a chat template."""
    import dataclasses

    path = tmp_path_factory.mktemp("checkpoint") / "model"
    wide = dataclasses.replace(cfg, vocab_size=300)
    save_pretrained(Transformer(wide, rngs=nnx.Rngs(0)), path)
    train_bpe(["hello there, how are you? " * 4 + "ein paar Wörter, 日本語"], 280, path / "tokenizer.json")
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_text_is_emitted_once_it_is_final():
    """A character of three bytes, and a stop string that nearly came before."""
    text = "日 abc abd!".encode()
    stream = IncrementalDetokenizer(lambda ids: bytes(ids).decode(errors="replace"), stop=("abd",))
    seen = []
    for byte in text:
        done = stream.add([byte])
        seen.append(stream.text)
        if done:
            break
    assert seen == ["", "", "日", "日 ", "日 ", "日 ", "日 abc", "日 abc ", "日 abc ", "日 abc ", "日 abc "]
    stream = IncrementalDetokenizer(lambda ids: bytes(ids).decode(errors="replace"), stop=("abd",))
    assert not stream.add(list(b"so ab"), end=True)
    assert stream.text == "so ab"


@pytest.mark.parametrize(("context", "text"), [([], "a b"), ([2], " a b"), ([3], "a b")])
def test_the_space_before_the_first_word_is_kept_after_a_prompt(context, text):
    """By tokenizers that strip it from the start of a text. A prompt that ends within a character gives no context."""
    pieces = [" a", " b", " prompt", "\ufffd"]
    stream = IncrementalDetokenizer(lambda ids: "".join(pieces[i] for i in ids).removeprefix(" "), context=context)
    assert not stream.add([0])
    assert not stream.add([1], end=True)
    assert stream.text == text


def test_the_last_bytes_of_a_prompt_may_be_one_character():
    """日 in three tokens: enough of the prompt is decoded to see that the character is complete."""
    assert CONTEXT_TOKENS >= 4, "the longest character has four bytes"
    pieces = [bytes([byte]) for byte in "日".encode()] + [b" a"]
    decode = lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace").removeprefix(" ")  # noqa: E731
    stream = IncrementalDetokenizer(decode, context=[0, 1, 2][-CONTEXT_TOKENS:])
    assert not stream.add([3], end=True)
    assert stream.text == " a"


def test_conversations_are_rendered_by_the_template(checkpoint):
    pytest.importorskip("jinja2")
    tokenizer = HFTokenizer(checkpoint / "tokenizer.json")
    language = load_chat_tokenizer(checkpoint, tokenizer)
    tokens = language.encode_chat([{"role": "user", "content": "hello"}])
    assert tokens[0] == tokenizer.bos_id
    assert tokenizer.decode(tokens) == "<user>hello<assistant>"
    assert main(["generate", str(checkpoint), "--prompt", "hello", "--max-new-tokens", "8", "--chat"]) == 0
    assert language.encode("<s>").count(tokenizer.bos_id) == 1
    hello = tokenizer.encode("hello").tolist()
    assert language.encode_raw("hello</s>") == [tokenizer.bos_id, *hello, tokenizer.eos_id]
    assert language.encode_raw("<s>hello") == language.encode_raw("hello") == [tokenizer.bos_id, *hello]
    assert language.stop_ids == (tokenizer.eos_id,)
    with pytest.raises(ConfigError, match="no tools"):
        language.encode_chat([{"role": "tool", "content": "x"}])


def test_a_byte_order_mark_is_no_text(checkpoint, tmp_path):
    pytest.importorskip("jinja2")
    files = {name: (checkpoint / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    for name, content in (files | {"chat_template.jinja": TEMPLATE.encode()}).items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    tokenizer = HFTokenizer(tmp_path / "tokenizer.json")
    tokens = load_chat_tokenizer(tmp_path, tokenizer).encode_chat([{"role": "user", "content": "hello"}])
    assert tokenizer.decode(tokens) == "<user>hello<assistant>"


def test_conversations_ignore_truncation_and_padding_of_the_file(checkpoint, tmp_path):
    """And of several templates the default one is taken."""
    pytest.importorskip("jinja2")
    messages = [{"role": "user", "content": "hello " * 9}]
    wanted = load_chat_tokenizer(checkpoint, HFTokenizer(checkpoint / "tokenizer.json")).encode_chat(messages)
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    filled = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"truncation": cut, "padding": filled}))
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": TEMPLATE}]
    config = json.loads((checkpoint / "tokenizer_config.json").read_text()) | {"chat_template": templates}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    language = load_chat_tokenizer(tmp_path, HFTokenizer(tmp_path / "tokenizer.json"))
    assert language.encode_chat(messages) == wanted


def test_a_directory_without_a_template_is_an_error(checkpoint, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    language = load_chat_tokenizer(tmp_path, HFTokenizer(checkpoint / "tokenizer.json"))
    assert language.stop_ids == (3, 4)
    with pytest.raises(ConfigError, match="no chat template"):
        language.encode_chat([{"role": "user", "content": "hello"}])


def test_names_in_special_tokens_map_reach_the_template(checkpoint, tmp_path):
    pytest.importorskip("jinja2")
    (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    language = load_chat_tokenizer(tmp_path, HFTokenizer(tmp_path / "tokenizer.json"))
    wanted = load_chat_tokenizer(checkpoint, HFTokenizer(checkpoint / "tokenizer.json"))
    messages = [{"role": "user", "content": "hello"}]
    assert language.encode_chat(messages) == wanted.encode_chat(messages)


STOPS = {
    "the model's list": ({"config.json": {"eos_token_id": [1, 7]}}, (1, 7)),
    "both": ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": [3, 1]}}, (3, 1)),
    "null": ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": None}}, (7,)),
    "neither": ({"config.json": {}, "generation_config.json": {"temperature": 0.6}}, (1,)),
}  # fmt: skip


@pytest.mark.parametrize("case", STOPS)
def test_stop_tokens_are_those_of_generation_config_then_config(checkpoint, tmp_path, case):
    files, stops = STOPS[case]
    for name, contents in files.items():
        (tmp_path / name).write_text(json.dumps(contents))
    assert load_chat_tokenizer(tmp_path, HFTokenizer(checkpoint / "tokenizer.json")).stop_ids == stops


@pytest.mark.parametrize("stops", ["1", [[1]], [None], {"a": 1}, ["1"], [], True, 1.5, -1, 280, 2**40, [1] * 9])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_other_forms_of_stop_tokens_are_errors(checkpoint, tmp_path, name, stops):
    (tmp_path / name).write_text(json.dumps({"eos_token_id": stops}))
    with pytest.raises(ConfigError) as caught:
        load_chat_tokenizer(tmp_path, HFTokenizer(checkpoint / "tokenizer.json"))
    assert (caught.value.field, caught.value.value) == ("eos_token_id", stops)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stops", [("1",), ([1],), (None,), (-1,), (2**31,), (1,) * 9])
def test_requests_take_token_ids_alone_as_stop_tokens(stops):
    """Another type would end decoding in its slot, and never the request."""
    with pytest.raises(ConfigError, match="stop_ids"):
        Request([1], 1, stop_ids=stops)


@pytest.mark.slow
def test_generate_prints_a_completion(checkpoint, capsys):
    command = ["generate", str(checkpoint), "--prompt", "hello", "--max-new-tokens", "8"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert "tokens in" in err
    assert main([*command, "--speculative"]) == 0
    again, err = capsys.readouterr()
    assert again == out
    assert "draft tokens: acceptance rate" in err
    assert main([*command, "--temperature", "-1"]) == 2
    assert "temperature" in capsys.readouterr().err
    assert main([*command, "--max-new-tokens", "200"]) == 2
    assert "max_new_tokens = 200" in capsys.readouterr().err


@pytest.mark.slow
def test_generate_ends_quietly_on_a_closed_pipe(checkpoint, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["generate", str(checkpoint), "--prompt", "hello", "--max-new-tokens", "8"]) == 141
    monkeypatch.undo()
    monkeypatch.setattr(Engine, "step", interrupted)
    assert main(["generate", str(checkpoint), "--prompt", "hello", "--max-new-tokens", "8"]) == 130
    assert capsys.readouterr().err == ""


def test_serve_defaults_to_max_position_embeddings(checkpoint, monkeypatch, capsys):
    server = pytest.importorskip("mla_moe.inference.openai_server")
    seen = []
    monkeypatch.setattr(server, "application", lambda engine, *_, **__: seen.append(engine.max_model_len))
    monkeypatch.setattr(server, "serve", lambda *_: None)
    assert main(["serve", str(checkpoint)]) == 0
    assert seen == [128]
    assert main(["serve", str(checkpoint), "--max-model-len", "129"]) == 2
    assert main(["serve", str(checkpoint), "--port", "99999"]) == 2
    err = capsys.readouterr().err
    assert "max_model_len = 129" in err
    assert "port = 99999" in err


@pytest.mark.parametrize("named_by", ["training", "path", "nothing"])
@pytest.mark.slow
def test_generate_uses_the_tokenizer_of_the_run(checkpoint, tmp_path, capsys, named_by):
    """The run, its stage and its step, whether the tokenizer was trained with it or lies elsewhere."""
    step = tmp_path / "checkpoints" / "pretrain" / "4"
    step.parent.mkdir(parents=True)
    convert(checkpoint, step, to="orbax")
    home = tmp_path / "elsewhere" if named_by == "path" else tmp_path
    home.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (step / name).rename(home / name)
    file = home / "tokenizer.json"
    spec = {"training": "bpe:280", "path": str(file), "nothing": "byte"}[named_by]
    (tmp_path / "recipe.json").write_text(json.dumps({"data": {"tokenizer": spec}}))
    for path in (tmp_path, step.parent, step):
        assert tokenizer_file(path) == (None if named_by == "nothing" else file)

    command = ["--prompt", "hello", "--max-new-tokens", "4"]
    assert main(["generate", str(checkpoint), *command]) == 0
    wanted = capsys.readouterr().out
    assert main(["generate", str(tmp_path), *command]) == 0
    assert (capsys.readouterr().out == wanted) == (named_by != "nothing")
    if named_by == "path":
        file.unlink()
        assert main(["generate", str(step), *command]) == 2
        assert "no such file" in capsys.readouterr().err
