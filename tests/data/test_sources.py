import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from mla_moe.config import ConfigError
from mla_moe.data import open_documents

DOCUMENTS = ["first", "zwei — ürsprünglich\r\n", "三\n\n三", "", "fifth"]


def opened(*patterns, text_field="text"):
    return open_documents([str(p) for p in patterns], field="data.train", text_field=text_field)


def refused(*patterns, text_field="text"):
    with pytest.raises(ConfigError) as caught:
        list(opened(*patterns, text_field=text_field))
    return caught.value


def write_text(folder, documents):
    folder.mkdir()
    for i, text in enumerate(documents):
        (folder / f"{i}.md").write_bytes(text.encode())
    return folder / "*.md"


def write_jsonl(path, documents):
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(documents)]
    path.write_text("\n\n".join(lines), encoding="utf-8")  # a blank line between, none at the end
    return path


def write_parquet(path, documents):
    table = pyarrow.table({"id": range(len(documents)), "text": pyarrow.array(documents, pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


def write_arrayrecord(path, documents):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for text in documents:
        writer.write(text.encode())
    writer.close()
    return path


def write_all(folder, documents):
    return [
        write_text(folder / "files", documents),
        write_jsonl(folder / "a.jsonl", documents),
        write_parquet(folder / "b.parquet", documents),
        write_arrayrecord(folder / "c.arrayrecord", documents),
    ]


@pytest.mark.parametrize("kind", range(4), ids=["text", "jsonl", "parquet", "arrayrecord"])
def test_every_format_gives_the_documents_back(tmp_path, kind):
    source = opened(write_all(tmp_path, DOCUMENTS)[kind])
    assert len(source) == len(DOCUMENTS)
    assert list(source) == DOCUMENTS
    assert [source[i] for i in (4, 0, 3, 1)] == [DOCUMENTS[i] for i in (4, 0, 3, 1)]
    with pytest.raises(IndexError):
        source[len(DOCUMENTS)]


def test_formats_mix_and_threads_read_them_at_once(tmp_path):
    documents = [f"document {i} " * (i % 7 + 1) for i in range(60)]
    source = opened(*write_all(tmp_path, documents))
    assert len(source) == 4 * len(documents)
    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(source.__getitem__, range(len(source)))) == sorted(documents * 4)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_several_files_of_a_format_are_one_source(tmp_path, kind):
    write = {"jsonl": write_jsonl, "parquet": write_parquet}[kind]
    for name, part in (("b", DOCUMENTS[2:]), ("a", DOCUMENTS[:2])):
        write(tmp_path / f"{name}.{kind}", part)
    assert list(opened(tmp_path / f"*.{kind}")) == DOCUMENTS


def test_paths_are_sorted_descended_and_counted_once(tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.py", "sub/deep/c.rst", "[x].txt"):
        (tmp_path / name).write_text(name)
    assert list(opened(tmp_path / "**" / "*")) == ["[x].txt", "a.py", "b.txt", "sub/deep/c.rst"]
    assert list(opened(tmp_path / "b.txt", tmp_path / "*.txt")) == ["b.txt", "[x].txt"]
    assert list(opened(tmp_path / "[x].txt")) == ["[x].txt"]


def test_a_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    assert list(opened("~/*.txt")) == ["at home"]


def test_text_and_json_sources_survive_pickling(tmp_path):
    source = opened(*write_all(tmp_path, DOCUMENTS)[:2])
    assert list(pickle.loads(pickle.dumps(source))) == DOCUMENTS * 2


def test_a_glob_without_matches_is_named(tmp_path):
    (tmp_path / "here.txt").write_text("text")
    error = refused(tmp_path / "here.txt", tmp_path / "*.absent")
    assert (error.field, error.value) == ("data.train", str(tmp_path / "*.absent"))


@pytest.mark.parametrize("documents", [["", ""], []])
def test_only_empty_documents_are_refused(tmp_path, documents):
    for pattern in write_all(tmp_path, documents):
        error = refused(pattern)
        assert error.field == "data.train"
        assert "empty" in error.message or "matches no file" in error.message


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    assert list(opened(tmp_path / "a.txt")) == ["text"]


def test_what_must_be_unpacked_or_named_file_by_file(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"a\.jsonl\.gz': is compressed; decompress it first"):
        opened(tmp_path / "a.jsonl.gz")
    with pytest.raises(ConfigError, match=r"is a directory; write .*/\*\*/\*"):
        opened(tmp_path)


def test_other_encodings_are_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    error = refused(tmp_path / "latin.txt")
    assert error.value == str(tmp_path / "latin.txt")
    assert "not UTF-8" in error.message


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "cut', "not JSON"),
        ('{"body": "x"}', "'text'"),
        ('{"text": 3}', "'text'"),
        ("[]", "'text'"),
        ('{"text": "\\ud83d"}', "surrogate"),
    ],
)
def test_a_broken_line_is_named_by_file_and_number(tmp_path, line, complaint):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    error = refused(path)
    assert error.value == f"{path}, line 3"
    assert complaint in error.message


def test_a_missing_or_numeric_column_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["x"])
    error = refused(path, text_field="body")
    assert error.field == "data.text_field"
    assert "id, text" in error.message
    assert "int64" in refused(path, text_field="id").message


def test_a_null_row_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["x", "y", "z", None])
    assert refused(path).value == f"{path}, row group 1, row 1"


@pytest.mark.parametrize("suffix", ["parquet", "arrayrecord"])
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_text("just text")
    error = refused(path)
    assert (error.field, error.value) == ("data.train", str(path))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", ["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'mla_moe[parquet]'" in refused(path).message
