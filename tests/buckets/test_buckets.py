"""Data, tokenizers and checkpoints in buckets: read, written, converted; faults of the server; errors in one line."""

import json
import os
import signal
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from mla_moe import ConfigError, ModelConfig, load_pretrained, save_pretrained
from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.remote import RemoteCheckpoint
from mla_moe.cli import main
from mla_moe.config import DataConfig
from mla_moe.data import open_documents
from mla_moe.nn.abstract_model import model_arrays
from mla_moe.text.tokenizer import load_tokenizer, train_bpe

GOLDEN = Path(__file__).parents[1] / "golden"


def names(fs, folder):
    return {path.rpartition("/")[2] for path in fs.find(folder)}


def require_equal(path):
    expected = model_arrays(load_pretrained(GOLDEN / "v3"))
    for name, array in model_arrays(load_pretrained(path)).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_text_is_copied_once_and_again_when_it_changes(bucket, tmp_path):
    url, fs, _ = bucket
    for name in ("a", "b", "old/c", ".hidden"):
        fs.pipe(f"bucket/texts/{name}.jsonl", json.dumps({"text": name}).encode() + b"\n")

    def read(pattern):
        return list(open_documents([f"{url}/{pattern}"], field="data.train", text_field="text"))

    assert read("texts/*.jsonl") == ["a", "b"]
    assert read("texts/**/*.jsonl") == ["a", "b", "old/c"]
    copies = [path for path in (tmp_path / "cache").rglob("*.jsonl")]
    assert len(copies) == 3
    before = {path: path.stat().st_mtime_ns for path in copies}
    assert read("texts/a.jsonl") == ["a"]
    assert {path: path.stat().st_mtime_ns for path in copies} == before
    for path in copies:  # as a crash of the host may leave them
        path.write_bytes(b"")
    assert read("texts/*.jsonl") == ["a", "b"]
    fs.pipe("bucket/texts/a.jsonl", b'{"text": "A"}\n')
    assert read("texts/a.jsonl") == ["A"]


def test_an_object_that_changes_while_it_is_copied_is_named(bucket, tmp_path, monkeypatch):
    url, fs, _ = bucket
    fs.pipe("bucket/a.jsonl", b'{"text": "a"}\n')
    get_file = type(fs).get_file

    def changing(self, *args, **kwargs):
        get_file(self, *args, **kwargs)
        fs.pipe("bucket/a.jsonl", b'{"text": "b"}\n')

    monkeypatch.setattr(type(fs), "get_file", changing, raising=False)
    fsspec.filesystem(url[:2]).clear_instance_cache()  # an instance keeps the methods that it was created with
    with pytest.raises(ConfigError, match=r"data.train = '.*a.jsonl.': changed while it was downloaded; start again"):
        open_documents([f"{url}/*.jsonl"], field="data.train", text_field="text")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_checkpoint_is_written_and_read(bucket, tmp_path):
    url, fs, _ = bucket
    convert(GOLDEN / "v3", f"{url}/models/v3", max_shard_bytes=20_000)
    assert {"config.json", "model.safetensors.index.json"} < names(fs, "bucket/models/v3")
    require_equal(f"{url}/models/v3")
    assert ModelConfig.from_hf(f"{url}/models/v3") == ModelConfig.from_hf(GOLDEN / "v3")
    with pytest.raises(ConfigError, match="exists already"):
        save_pretrained(load_pretrained(GOLDEN / "v3"), f"{url}/models/v3")
    with pytest.raises(ConfigError, match="convert with --to hf"):
        convert(GOLDEN / "v3", f"{url}/models/orbax", to="orbax")


def test_a_checkpoint_is_streamed_between_buckets(bucket, tmp_path, monkeypatch):
    url, _, _ = bucket
    save_pretrained(load_pretrained(GOLDEN / "v3"), f"{url}/a", max_shard_bytes=8_000)
    held, fetch = [], RemoteCheckpoint.fetch

    def counted(remote, header):
        path = fetch(remote, header)
        held.append(len(list(path.parent.iterdir())))
        return path

    monkeypatch.setattr(RemoteCheckpoint, "fetch", counted)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    convert(f"{url}/a", f"{url}/b")
    assert max(held) == 3
    assert not list(tmp_path.glob("*mla_moe*"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    require_equal(f"{url}/b")


def test_a_tokenizer_of_a_bucket(bucket, tmp_path):
    url, fs, _ = bucket
    train_bpe(["some text for a tokenizer, with words and 123 numbers"] * 20, 260, tmp_path / "tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        fs.put_file(str(tmp_path / name), f"bucket/model/{name}")
    for spec in (f"{url}/model", f"{url}/model/tokenizer.json"):
        tokenizer = load_tokenizer(DataConfig(tokenizer=spec).tokenizer, tmp_path, ())
        assert tokenizer.vocab_size == 260
        assert Path(tokenizer.name).with_name("tokenizer_config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "field", "message"),
    [
        (["generate", "{}/none", "--prompt", "a"], "checkpoint", "no such object or bucket"),
        (["generate", "{}/empty", "--prompt", "a"], "checkpoint", "holds no .safetensors file"),
        (["inspect", "{}/empty"], "model", "has no file config.json"),
        (["convert", "{}/empty", "out"], "checkpoint", "holds no .safetensors file"),
        (["convert", "{}/none", "out"], "checkpoint", "no such object or bucket"),
    ],
)
def test_errors_are_one_line(bucket, capsys, tmp_path, monkeypatch, arguments, field, message):
    url, fs, _ = bucket
    monkeypatch.chdir(tmp_path)
    fs.pipe("bucket/empty/notes.txt", b"nothing")
    assert main([argument.format(url) for argument in arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {field} = '{url}/")
    assert message in error
    assert not [path.name for path in tmp_path.iterdir() if path.name != "cache"]


def test_data_that_no_object_matches(bucket):
    url, _, _ = bucket
    with pytest.raises(ConfigError, match=r"data.train = .*matches no object"):
        open_documents([f"{url}/none/*.jsonl"], field="data.train", text_field="text")


def test_answers_of_503_are_tried_again(s3):
    url, _, faults = s3
    faults.statuses = [503, 503]
    save_pretrained(load_pretrained(GOLDEN / "v3"), f"{url}/v3")
    faults.statuses = [503, 503]
    require_equal(f"{url}/v3")
    assert not faults.statuses


def test_nothing_is_left_of_an_upload_that_fails(s3, monkeypatch):
    url, fs, _ = s3
    put_file, calls = type(fs)._put_file, []

    async def failing(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise ConnectionError("the connection was cut")
        return await put_file(self, *args, **kwargs)

    monkeypatch.setattr(type(fs), "_put_file", failing)
    fsspec.filesystem("s3").clear_instance_cache()  # an instance keeps the methods that it was created with
    with pytest.raises(
        ConnectionError, match=r"path = 's3://bucket/v3': ConnectionError: the connection was cut; check"
    ):
        convert(GOLDEN / "v3", f"{url}/v3", max_shard_bytes=20_000)
    assert not names(fs, "bucket/v3")


def test_nothing_is_left_of_an_upload_that_is_interrupted(s3, monkeypatch, interruptible):
    """The client's own thread goes on with an upload when the main thread is interrupted."""
    url, fs, faults = s3
    serve, puts = faults.app, []

    def interrupting(environ, start_response):
        if environ["REQUEST_METHOD"] == "PUT":
            puts.append(environ["PATH_INFO"])
            if len(puts) == 3:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)
        return serve(environ, start_response)

    monkeypatch.setattr(faults, "app", interrupting)
    with pytest.raises(KeyboardInterrupt):
        convert(GOLDEN / "v3", f"{url}/v3", max_shard_bytes=8_000)
    time.sleep(1)
    assert not names(fs, "bucket/v3")
    assert len(puts) == 3


def test_a_wrong_key_is_one_line(s3, s3_server, monkeypatch):
    url, _, faults = s3
    faults.statuses = [403] * 20
    with pytest.raises(ConfigError, match=r"checkpoint = 's3://bucket/v3': PermissionError: .*your credentials"):
        load_pretrained(f"{url}/v3")
