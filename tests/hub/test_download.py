"""Models, tokenizers and data of the Hub: what is downloaded, the cache, offline, and errors in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from starlette.responses import Response

import mla_moe
from mla_moe import ConfigError, ModelConfig, load_pretrained
from mla_moe.checkpoint.reader import read_model_config
from mla_moe.cli import main
from mla_moe.config.hub import download_files
from mla_moe.data import open_documents
from mla_moe.nn.abstract_model import model_arrays
from mla_moe.text.tokenizer import load_tokenizer, train_bpe

GOLDEN = Path(__file__).parents[1] / "golden"


def model_files(tmp_path, *, shards=1):
    """A repository's files: the weights in shards, a tokenizer, and files that no reader of this package needs."""
    source = GOLDEN / "v3"
    names = {"README.md": b"# a model\n", "modeling.py": b"raise SystemExit('code was executed')\n"}
    names |= {"pytorch_model.bin": b"0" * 1000, "original/consolidated.safetensors": b"1" * 1000}
    names |= {"config.json": (source / "config.json").read_bytes()}
    tensors = sorted(load_file(source / "model.safetensors").items())
    weight_map = {}
    for number in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(tensors[number::shards])
        save_file(part, tmp_path / "shard")
        names[name] = (tmp_path / "shard").read_bytes()
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        names["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return names


def tokenizer_files(tmp_path):
    train_bpe(["some text for a tokenizer, with words and 123 numbers"] * 20, 260, tmp_path / "tokenizer.json")
    return {name: (tmp_path / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}


def test_load_pretrained_downloads_what_it_needs_once(hub, tmp_path, offline):
    hub.add("models/org/tiny", model_files(tmp_path, shards=3))
    model = load_pretrained("org/tiny")
    expected = model_arrays(load_pretrained(GOLDEN / "v3"))
    for path, array in model_arrays(model).items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    needed = ["README.md", "config.json", *shards, "model.safetensors.index.json", "modeling.py"]
    assert hub.downloads() == needed
    load_pretrained("hf://org/tiny")
    assert hub.downloads() == needed
    offline()
    del hub.repos["models/org/tiny"]
    asked = len(hub.requests)
    load_pretrained("hf://org/tiny@main")
    assert len(hub.requests) == asked


def test_a_revision_is_a_branch_or_a_commit(hub, tmp_path):
    files = model_files(tmp_path)
    first = hub.add("models/org/tiny", files)
    config = json.loads(files["config.json"])
    hub.add("models/org/tiny", files | {"config.json": json.dumps(config | {"vocab_size": 1 << 16}).encode()})
    hub.add("models/org/tiny", files, branch="v1")
    for revision in ("@v1", f"@{first}"):
        assert ModelConfig.from_hf(f"hf://org/tiny{revision}").vocab_size == config["vocab_size"]
    assert ModelConfig.from_hf("org/tiny").vocab_size == 1 << 16
    assert read_model_config(Path("hf://org/tiny")).vocab_size == 1 << 16
    assert "model.safetensors" not in hub.downloads()


def test_a_local_directory_has_priority_over_a_name_of_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "tiny").symlink_to(GOLDEN / "v3")
    load_pretrained("org/tiny")
    assert not hub.requests


def test_a_download_that_is_cut_resumes(hub, tmp_path):
    hub.add("models/org/tiny", model_files(tmp_path))
    hub.cut = {"model.safetensors"}
    load_pretrained("org/tiny")
    assert hub.downloads().count("model.safetensors") == 2


def test_tokenizer_and_text_of_the_hub(hub, tmp_path, offline):
    files = tokenizer_files(tmp_path)
    hub.add("models/org/tiny", files | {"weights.bin": b"0"})
    assert load_tokenizer("hf://org/tiny", tmp_path, ()).vocab_size == 260
    assert load_tokenizer("hf://org/tiny/tokenizer.json", tmp_path, ()).vocab_size == 260
    texts = {f"data/{name}.jsonl": json.dumps({"text": name}).encode() + b"\n" for name in ("a", "b", "old/c")}
    hub.add("datasets/org/texts", texts | {"data/notes.md": b"no data", "deep/data/d.jsonl": b"{}"})
    for _ in ("online", "offline"):
        read = {"hf://datasets/org/texts/data/*.jsonl": ["a", "b"]}
        read |= {"hf://datasets/org/texts@main/data/**/*.jsonl": ["a", "b", "old/c"]}
        for pattern, found in read.items():
            assert list(open_documents([pattern], field="data.train", text_field="text")) == found
        offline()
    names = ["a.jsonl", "b.jsonl", "c.jsonl", "tokenizer.json", "tokenizer_config.json"]
    assert hub.downloads() == names


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hf://org/none", "no such repository, or a private one"),
        ("hf://org/gated", "is gated: accept its terms"),
        ("hf://org/private", "no such repository, or a private one"),
        ("hf://org/tiny@v9", "has no such revision"),
        ("hf://org", "id must be 'namespace/name'"),
        ("hf://spaces/org/tiny", "is a space"),
        ("hf://datasets/org/tiny", "names no model"),
        ("hf://org/tiny/config.json", "names no model"),
        ("hf://org/broken", "responded with status 503; try again later"),
    ],
)
def test_errors_of_the_hub_are_one_line(hub, tmp_path, capsys, url, message):
    hub.add("models/org/tiny", {"config.json": b"{}"})
    hub.add("models/org/gated", {"config.json": b"{}"}, gated=True)
    hub.add("models/org/private", {"config.json": b"{}"}, private=True)
    hub.fail["org/broken"] = 503
    assert main(["generate", url, "--prompt", "a"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: checkpoint = '{url}': ")
    assert message in error


def test_an_empty_cache_offline_names_the_way_out(hub, tmp_path, offline, monkeypatch):
    hub.add("models/org/tiny", model_files(tmp_path, shards=2))
    offline()
    with pytest.raises(ConfigError, match="is not in the cache as a whole, and HF_HUB_OFFLINE forbids requests"):
        load_pretrained("org/tiny")


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://name:password@127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"and http://127.0.0.1:1 cannot be reached; check the connection, or HF_E"):
        load_pretrained("org/tiny")


@pytest.mark.parametrize("body", [b"<html>log in</html>", b"{}", b"[]"])
def test_a_response_that_is_not_of_the_hub_is_one_line(hub, monkeypatch, body):
    monkeypatch.setattr(hub, "_open", lambda request: Response(body))
    with pytest.raises(ConfigError, match="is a Hub, not a page of a network to log in"):
        load_pretrained("org/tiny")


def test_a_name_of_a_repository_cannot_leave_the_cache(hub, tmp_path):
    hub.add("datasets/org/texts", {"data/../../../../../../../escaped.jsonl": b"{}"})
    with pytest.raises(ConfigError, match=r"data.train = .*'\.\.' path segment"):
        download_files("hf://datasets/org/texts/data/**/*.jsonl", "data.train")
    assert not list(tmp_path.rglob("escaped.jsonl"))


def test_data_that_no_file_matches(hub):
    hub.add("datasets/org/texts", {"a.jsonl": b"{}"})
    with pytest.raises(ConfigError, match="matches no file of the repository"):
        download_files("hf://datasets/org/texts/*.parquet", "data.train")
    with pytest.raises(ConfigError, match="is a repository; write"):
        download_files("hf://datasets/org/texts", "data.train")
    with pytest.raises(ConfigError, match=r"has \.\. in its path"):
        download_files("hf://datasets/org/texts/../../secret", "data.train")


def test_a_name_that_is_neither_here_nor_on_the_hub(hub):
    with pytest.raises(ConfigError, match="no such repository"):
        mla_moe.load_pretrained("org/none")
