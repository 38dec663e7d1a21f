"""URLs: what is read from where, without a request."""

import sys

import pytest

from mla_moe import ConfigError
from mla_moe.config.storage import cache_folder, is_bucket, is_url, require_path


@pytest.mark.parametrize(("url", "module", "extra"), [("s3://b/x", "s3fs", "s3"), ("gs://b/x", "gcsfs", "gcs")])
def test_a_missing_extra_is_named(url, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"^a.b = '{url}': needs {module}: pip install 'mla_moe\[{extra}\]'$"):
        require_path("a.b", url)


@pytest.mark.parametrize("path", ["https://host/x", "ftp://host/x", "gcs://b/x", "file:///x", "s3n://b/x"])
def test_other_urls_are_refused_by_name(path):
    assert not is_url(path)
    with pytest.raises(ConfigError, match=rf"^a.b = '{path}': is a URL; only files of this host and hf://, s3:// and"):
        require_path("a.b", path)


def test_a_path_that_lost_a_slash_is_the_same_url():
    assert is_bucket("s3:/b/x")
    assert is_url("hf:/org/model")
    assert not is_url("s3")
    assert not is_url("./s3:/b")


def test_another_version_of_an_object_is_another_copy(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = {"name": "b/a", "size": 1, "ETag": '"1"'}
    folders = [cache_folder({"a": first | change}) for change in ({}, {"ETag": '"2"'}, {"size": 2}, {"name": "c/a"})]
    assert len(set(folders)) == 4
    assert folders[0] == cache_folder({"other name": dict(first)})
