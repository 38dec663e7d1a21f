"""Checkpoints that are committed to the Hub: all of one or nothing, in one commit."""

import json
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest

from mla_moe import ConfigError, ModelConfig, load_pretrained, save_pretrained
from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.remote import RemoteCheckpoint
from mla_moe.cli import main
from mla_moe.nn.abstract_model import model_arrays

# The LFS upload of huggingface_hub 2.4 calls httpx2 in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def _token(hub, monkeypatch, tmp_path):
    """A token, and a folder for temporary files in which nothing may be left."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    yield
    assert not list((tmp_path / "temporary").iterdir())


def files(hub, name, branch="main"):
    repo = hub.repos[f"models/{name}"]
    return repo.commits[repo.branches[branch]]


def test_convert_commits_shard_by_shard(hub, tmp_path, capsys):
    convert(GOLDEN / "v3", "hf://org/mine", max_shard_bytes=20_000)
    assert hub.repos["models/org/mine"].private
    (index,) = (json.loads(c) for name, c in files(hub, "org/mine").items() if name.endswith(".index.json"))
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert {*shards, "config.json", ".gitattributes", "model.safetensors.index.json"} == files(hub, "org/mine").keys()
    uploads = [number for number, (_, path) in enumerate(hub.requests) if path.startswith("/lfs/")]
    commits = [number for number, (_, path) in enumerate(hub.requests) if "/commit/" in path]
    assert len(uploads) == len(shards)
    assert len(commits) == 1
    assert max(uploads) < commits[0]
    expected = model_arrays(load_pretrained(GOLDEN / "v3"))
    for path, array in model_arrays(load_pretrained("hf://org/mine")).items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)

    assert main(["convert", "hf://org/mine", "hf://org/mine", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == "hf://org/mine: written\n"
    assert files(hub, "org/mine").keys() == {"model.safetensors", "config.json", ".gitattributes"}
    assert len(hub.repos["models/org/mine"].commits) == 3


def test_save_pretrained_commits_to_a_branch(hub):
    for _ in range(2):
        save_pretrained(load_pretrained(GOLDEN / "v3"), "hf://org/mine@second")
    assert files(hub, "org/mine").keys() == {".gitattributes"}
    assert "model.safetensors" in files(hub, "org/mine", "second")
    assert ModelConfig.from_hf("hf://org/mine@second") == load_pretrained(GOLDEN / "v3").cfg


@pytest.mark.parametrize("part", ["/lfs/", "/preupload/", "/commit/"])
def test_nothing_is_committed_when_a_request_fails(hub, part):
    hub.fail[part] = 403
    with pytest.raises(ConfigError, match=r"path = 'hf://org/mine': .*403"):
        convert(GOLDEN / "v3", "hf://org/mine")
    assert files(hub, "org/mine").keys() == {".gitattributes"}


def test_no_commit_over_another_one_since(hub, monkeypatch):
    """Of two pushes at once one is refused: the first removes no weights of the second, so readers would mix both."""
    create = huggingface_hub.HfApi.create_commit

    def after_another(*args, **kwargs):
        hub.add("models/org/mine", {"model.safetensors": b"of another push"})
        return create(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", after_another)
    with pytest.raises(ConfigError, match=r"path = 'hf://org/mine': .*responded with status 412"):
        convert(GOLDEN / "v3", "hf://org/mine", max_shard_bytes=20_000)
    assert files(hub, "org/mine") == {"model.safetensors": b"of another push"}


def test_the_signature_of_an_upload_is_not_shown(hub):
    hub.fail["/lfs/"] = 403
    hub.query = "?X-Amz-Signature=secret"
    with pytest.raises(ConfigError, match=r"/lfs/\w+. .*nothing is committed") as error:
        convert(GOLDEN / "v3", "hf://org/mine")
    assert "secret" not in str(error.value)


def test_without_a_token_and_offline(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(ConfigError, match=r"responded with status 401; log in with `hf auth login`"):
        convert(GOLDEN / "v3", "hf://org/mine")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE forbids requests"):
        convert(GOLDEN / "v3", "hf://org/mine")
    assert not hub.repos


def test_what_cannot_be_committed_is_refused_before_any_request(hub):
    for url, to in (("hf://org/mine", "orbax"), ("hf://datasets/org/mine", "hf"), ("hf://org/mine/folder", "hf")):
        with pytest.raises(ConfigError, match="path = 'hf://"):
            convert(GOLDEN / "v3", url, to=to)
    assert not hub.requests


def test_a_checkpoint_is_streamed_file_by_file(hub, tmp_path, monkeypatch):
    """From the Hub to a directory: no more than three files of it are on this host, and few are downloaded twice. The
    order of tensors is not that of layers."""
    convert(GOLDEN / "v3", "hf://org/mine", max_shard_bytes=8_000)
    held, fetch = [], RemoteCheckpoint.fetch

    def counted(remote, header):
        path = fetch(remote, header)
        held.append(len(list(path.parent.iterdir())))
        return path

    monkeypatch.setattr(RemoteCheckpoint, "fetch", counted)
    for to in ("hf", "orbax"):
        hub.requests.clear()
        convert("hf://org/mine", tmp_path / to, to=to)
        fetched = [name for name in hub.downloads() if name.endswith(".safetensors")]
        assert len(set(fetched)) > 5
        # One request for the header, one for the file; of the embedding and the head, which come first, one more.
        assert len(fetched) <= 2 * len(set(fetched)) + 4
    assert max(held) == 3
    expected = model_arrays(load_pretrained(GOLDEN / "v3"))
    for to in ("hf", "orbax"):
        for path, array in model_arrays(load_pretrained(tmp_path / to)).items():
            np.testing.assert_array_equal(array, expected[path], err_msg=path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    assert not list((tmp_path / "hub-cache").rglob("*.safetensors"))


def test_adapters_of_the_hub_are_merged_into_their_base_there(hub, tmp_path):
    adapter = GOLDEN / "lora" / "trained"
    files = {file.name: file.read_bytes() for file in adapter.iterdir()}
    config = json.loads(files["adapter_config.json"])
    base = (adapter / config["base_model_name_or_path"]).resolve()
    config["base_model_name_or_path"] = "org/base"
    hub.add("models/org/base", {file.name: file.read_bytes() for file in base.iterdir()})
    hub.add("models/org/adapter", files | {"adapter_config.json": json.dumps(config).encode()})
    convert("hf://org/adapter", "hf://org/merged", merge_adapter=True)
    convert(adapter, tmp_path / "merged", merge_adapter=True)
    expected = model_arrays(load_pretrained(tmp_path / "merged"))
    for path, array in model_arrays(load_pretrained("hf://org/merged")).items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)
