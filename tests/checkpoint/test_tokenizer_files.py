"""What goes with the weights: a run's own tokenizer under the name that others know, and its ids."""

import dataclasses
import json

import pytest
from flax import nnx

from mla_moe import ConfigError, Transformer
from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.pretrained import load_pretrained, save_pretrained
from mla_moe.checkpoint.tokenizer_files import tokenizer_file
from mla_moe.cli import main
from mla_moe.text.tokenizer import train_bpe


@pytest.fixture(scope="module")
def plain(cfg, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "hf"
    small = dataclasses.replace(cfg, vocab_size=300, num_nextn_predict_layers=0)
    save_pretrained(Transformer(small, rngs=nnx.Rngs(0)), path)
    return path


@pytest.fixture
def toks(tmp_path):
    """Two tokenizers, of which no tokenizer_config.json speaks."""
    path = tmp_path / "toks"
    train_bpe(["hello there, how are you? " * 4 + "ein paar Wörter, 日本語"], 280, path / "my-bpe.json")
    (path / "tokenizer_config.json").unlink()
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def run(plain, tmp_path):
    """A run of bytes; its metrics and its recipe are no part of a model."""
    convert(plain, tmp_path / "run" / "checkpoints" / "pretrain" / "1", to="orbax")
    (tmp_path / "run" / "checkpoints" / "pretrain" / "1" / "config.json").unlink()
    (tmp_path / "run" / "summary.json").write_text("{}")
    speaks(tmp_path / "run", "byte")
    return tmp_path / "run"


def speaks(run, tokenizer):
    (run / "recipe.json").write_text(json.dumps({"data": {"tokenizer": str(tokenizer)}}))


def save_like(run, out):
    save_pretrained(load_pretrained(run), out, like=run)


@pytest.mark.parametrize("name", ["my-bpe.json", "tokenizer-280.json"])
@pytest.mark.parametrize("export", [convert, save_like])
def test_the_recipes_own_file_is_carried_as_tokenizer_json(run, toks, tmp_path, export, name):
    (toks / "my-bpe.json").rename(toks / name)
    speaks(run, toks / name)
    export(run, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (toks / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)


@pytest.mark.parametrize("export", [convert, save_like])
def test_bytes_have_their_ids_and_no_file(run, tmp_path, export):
    (run / "tokenizer.json").write_text("{}")
    export(run, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, 257)


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer.model", "vocab.json", "tokenizer_config.json"])
def test_a_tokenizer_of_another_kind_is_not_replaced_by_bytes(plain, tmp_path, capsys, name):
    convert(plain, tmp_path / "hf")
    assert tokenizer_file(tmp_path / "hf") is None
    (tmp_path / "hf" / name).write_text("{}")
    assert main(["generate", str(tmp_path / "hf"), "--prompt", "hello"]) == 2
    assert "only tokenizer.json is read; write one with AutoTokenizer" in capsys.readouterr().err


def test_what_cannot_be_followed_says_so(plain, tmp_path):
    model = load_pretrained(plain)
    with pytest.raises(ConfigError, match="no such directory"):
        save_pretrained(model, tmp_path / "out", like=tmp_path / "nowhere")
    speaks(tmp_path, "byte")
    for action in (load_pretrained, lambda path: save_pretrained(model, tmp_path / "out", like=path)):
        with pytest.raises(ConfigError, match="is a run without a checkpoint yet"):
            action(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.json"]
