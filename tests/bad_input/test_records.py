"""Data records: a document, an empty one that is counted, or an error that names file and place."""

import contextlib
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_moe import ConfigError
from mla_moe.config import TaskConfig
from mla_moe.data import PromptCompletionDataset, PromptCompletionEncoding, open_documents
from mla_moe.rl.tasks import open_task

from .json_values import VALUES

FIELDS = st.sampled_from(["text", "question", "completion", "answer"])
LINES = st.binary(max_size=60) | st.dictionaries(FIELDS, VALUES).map(lambda value: json.dumps(value).encode())
DEEP = st.integers(1, 10**5).map(lambda depth: b"[" * depth)
FILES = st.lists(LINES | DEEP, max_size=5).map(b"\n".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


def opened(path, malformed):
    return open_documents([str(path)], field="data.train", text_field="text", max_malformed_fraction=malformed)


@given(FILES, st.sampled_from(["jsonl", "txt"]))
def test_any_file_of_text_or_lines(folder, content, kind):
    path = folder / f"a.{kind}"
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        texts = list(opened(path, 1.0))
        assert all(isinstance(text, str) and text.encode() is not None for text in texts)
        assert any(texts)
    with contextlib.suppress(ConfigError):
        assert list(opened(path, 0.0)) == texts  # nothing was left out


@given(FILES)
def test_any_pairs(folder, content):
    path = folder / "pairs.jsonl"
    path.write_bytes(content)
    coding = PromptCompletionEncoding(lambda q: [1, *q.encode()], lambda text: list(text.encode()), 0, 16)
    with contextlib.suppress(ConfigError):
        pairs = PromptCompletionDataset([str(path)], "sft.data", coding, 1.0)
        assert all(0 < len(pair["tokens"]) <= 16 for pair in pairs)


@given(FILES)
def test_any_questions(folder, content):
    path = folder / "questions.jsonl"
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        open_task(TaskConfig(name=str(path)))


@pytest.fixture(scope="module")
def parquet(folder):
    path = folder / "good.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["ab", "cde"] * 9}), path, row_group_size=6)
    return path.read_bytes()


@given(st.data())
def test_any_parquet(folder, parquet, data):
    raw = bytearray(parquet)
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / "a.parquet").write_bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])
    with contextlib.suppress(ConfigError):
        assert all(isinstance(text, str) for text in opened(folder / "a.parquet", 1.0))
