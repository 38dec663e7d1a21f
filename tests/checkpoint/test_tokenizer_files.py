"""Files beside the weights: a run's tokenizer, copied as `tokenizer.json`, and its special token ids."""

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
def hf_directory(cfg, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "hf"
    small = dataclasses.replace(cfg, vocab_size=300, num_nextn_predict_layers=0)
    save_pretrained(Transformer(small, rngs=nnx.Rngs(0)), path)
    return path


@pytest.fixture
def toks(tmp_path):
    """Two tokenizers without a tokenizer_config.json."""
    path = tmp_path / "toks"
    train_bpe(["hello there, how are you? " * 4 + "ein paar Wörter, 日本語"], 280, path / "my-bpe.json")
    (path / "tokenizer_config.json").unlink()
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def run(hf_directory, tmp_path):
    """A run with byte tokens. Its summary and recipe are not copied with a model."""
    convert(hf_directory, tmp_path / "run" / "checkpoints" / "pretrain" / "1", to="orbax")
    (tmp_path / "run" / "checkpoints" / "pretrain" / "1" / "config.json").unlink()
    (tmp_path / "run" / "summary.json").write_text("{}")
    set_tokenizer(tmp_path / "run", "byte")
    return tmp_path / "run"


def set_tokenizer(run, tokenizer):
    (run / "recipe.json").write_text(json.dumps({"data": {"tokenizer": str(tokenizer)}}))


def save_like(run, out):
    save_pretrained(load_pretrained(run), out, like=run)


@pytest.mark.parametrize("name", ["my-bpe.json", "tokenizer-280.json"])
@pytest.mark.parametrize("export", [convert, save_like])
def test_the_tokenizer_of_the_recipe_is_copied_as_tokenizer_json(run, toks, tmp_path, export, name):
    (toks / "my-bpe.json").rename(toks / name)
    set_tokenizer(run, toks / name)
    export(run, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (toks / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)


def test_a_tokenizer_as_large_as_training_takes_is_copied(run, toks, tmp_path):
    with (toks / "my-bpe.json").open("a") as file:
        file.write(" " * ((33 << 20) - file.tell()))
    set_tokenizer(run, toks / "my-bpe.json")
    convert(run, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").stat().st_size == 33 << 20


def test_of_the_folder_of_a_tokenizer_only_its_own_files_are_copied(run, toks, tmp_path):
    own = {"tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja"}
    others = {"tokenizer_secret.json", "tokenizers.md", "vocab.txt", "vocabulary.py", "merges.txt", "LICENSE", "a.json"}
    for name in own | others:
        (toks / name).write_text("{}")
    set_tokenizer(run, toks / "my-bpe.json")
    convert(run, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    } | own


def test_a_file_that_is_no_tokenizer_is_not_copied_as_one(run, tmp_path):
    (tmp_path / "account.json").write_text('{"password": "secret"}')
    set_tokenizer(run, tmp_path / "account.json")
    with pytest.raises(ConfigError, match=r"account.json': is not a tokenizer.json"):
        convert(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("export", [convert, save_like])
def test_byte_tokens_have_ids_and_no_tokenizer_file(run, tmp_path, export):
    (run / "tokenizer.json").write_text("{}")
    export(run, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, 257)


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer.model", "vocab.json", "tokenizer_config.json"])
def test_an_unsupported_tokenizer_is_an_error_and_not_replaced_by_bytes(hf_directory, tmp_path, capsys, name):
    convert(hf_directory, tmp_path / "hf")
    assert tokenizer_file(tmp_path / "hf") is None
    (tmp_path / "hf" / name).write_text("{}")
    assert main(["generate", str(tmp_path / "hf"), "--prompt", "hello"]) == 2
    assert "only tokenizer.json is read; write one with AutoTokenizer" in capsys.readouterr().err


def test_missing_directories_and_checkpoints_are_errors(hf_directory, tmp_path):
    model = load_pretrained(hf_directory)
    with pytest.raises(ConfigError, match="no such directory"):
        save_pretrained(model, tmp_path / "out", like=tmp_path / "nowhere")
    set_tokenizer(tmp_path, "byte")
    for action in (load_pretrained, lambda path: save_pretrained(model, tmp_path / "out", like=path)):
        with pytest.raises(ConfigError, match="is a run without a checkpoint yet"):
            action(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.json"]
