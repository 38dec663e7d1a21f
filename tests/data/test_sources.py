import json
import os
import pickle
import re
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from mla_moe.config import ConfigError, DataConfig
from mla_moe.data import open_documents

DOCUMENTS = ["first", "zwei — ürsprünglich\r\n", "三\n\n三", "", "fifth"]


def opened(*patterns, text_field="text", **options):
    return open_documents([str(p) for p in patterns], field="data.train", text_field=text_field, **options)


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


def write_json(path, documents):
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([{"text": text} for text in documents]).encode())
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
        write_json(folder / "d.json", documents),
        write_jsonl(folder / "e.ndjson", documents),
    ]


@pytest.mark.parametrize("kind", range(6), ids=["text", "jsonl", "parquet", "arrayrecord", "json", "ndjson"])
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
    assert len(source) == 6 * len(documents)
    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(source.__getitem__, range(len(source)))) == sorted(documents * 6)


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


def test_a_file_that_is_listed_twice_counts_once_which_is_logged(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", ".hidden.txt", "._a.txt", ".DS_Store"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link.txt").symlink_to("a.txt")
    source = opened("a.txt", "./a.txt", f"{tmp_path}/*", "cpython:heldout", "a.txt", "cpython:heldout")
    assert list(source)[:2] == ["a.txt", "b.txt"]
    assert {name: len(found) for name, found in source.ranges.items()} == {
        "a.txt": 1, f"{tmp_path}/*": 1, "cpython:heldout": len(source) - 2
    }  # fmt: skip
    assert source.files == {f"{tmp_path}/a.txt", f"{tmp_path}/b.txt", "cpython:heldout"}
    assert [r.message for r in caplog.records] == [
        "data.train: 5 files are listed twice and count once, ./a.txt among them"
    ]


def test_empty_documents_are_counted(tmp_path):
    source = opened(write_jsonl(tmp_path / "a.jsonl", ["", "text", "", " "]))
    assert source.empty == 1  # up to the first text, which opening it reads
    assert [*source, *source] == ["", "text", "", " "] * 2
    assert source.empty == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "one object,\\n on two lines"}', None),
        ('{"body": "x"}', "record 1': needs an object with text under 'text'"),
        ('[{"text": "x"}, 3]', "record 2': needs an object"),
        ('{"text": "x"}\n{"text": "y"}', "is not JSON: Extra data.*; the suffix of JSON lines is .jsonl"),
    ],
)
def test_a_json_file_is_its_records(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    if message is None:
        assert list(opened(path)) == ["one object,\n on two lines"]
    else:
        assert re.search(message, str(refused(path)))


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


@pytest.mark.parametrize("size", [1023, 1024, 1027, 1028, 2047, 2048, 2051, 2052, 5000])
@pytest.mark.parametrize("letters", ["a", "aß", "日本", "a😀"])
def test_a_long_text_is_read_in_windows_of_whole_characters(tmp_path, size, letters, caplog):
    text = (letters * size)[:size]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    windows = list(opened(tmp_path / "a.txt", max_record_bytes=1024))
    assert "".join(windows) == text
    assert all(windows)
    assert all(len(window.encode()) <= 1024 + 3 for window in windows)
    assert ("1 files are longer than data.max_record_bytes and read in windows" in caplog.text) == (len(windows) > 1)


def test_windows_are_other_data_and_no_limit_is_what_there_was_before(tmp_path):
    """A checkpoint of before there was a limit resumes on text without windows, and otherwise with a higher limit."""
    short, long = write_text(tmp_path / "short", ["a", "b"]), write_text(tmp_path / "long", ["a", "wörd " * 900_000])
    limits = {most: opened(long, max_record_bytes=most) for most in (4 << 20, 1 << 23, 1 << 38)}
    assert len(limits[4 << 20]) == 3
    assert limits[1 << 23].fingerprint == limits[1 << 38].fingerprint != limits[4 << 20].fingerprint
    assert opened(short, max_record_bytes=1024).fingerprint == opened(short, max_record_bytes=1 << 38).fingerprint
    assert limits[1 << 38].fingerprint == zlib.crc32(repr([1, 5_400_000]).encode())


def test_windows_number_documents_after_and_before_them(tmp_path):
    for name, size in (("a", 10), ("b", 2500), ("c", 0), ("d", 7)):
        (tmp_path / f"{name}.txt").write_text(name * size)
    source = opened(tmp_path / "*.txt", max_record_bytes=1024)
    assert [(text[:1], len(text)) for text in source] == [
        ("a", 10),
        ("b", 1024),
        ("b", 1024),
        ("b", 452),
        ("", 0),
        ("d", 7),
    ]
    assert source.ranges == {str(tmp_path / "*.txt"): range(6)}
    (tmp_path / "b.txt").write_bytes(b"b" * 1500 + b"\xff" + b"b" * 999)
    with pytest.raises(ConfigError, match=r"b.txt, byte 1024': is not UTF-8 text .*at byte 476"):
        opened(tmp_path / "*.txt", max_record_bytes=1024)[2]


@pytest.mark.parametrize("kind", range(1, 6), ids=["jsonl", "parquet", "arrayrecord", "json", "ndjson"])
def test_a_record_above_the_limit_is_malformed(tmp_path, kind):
    path = write_all(tmp_path, ["short", "x" * 3000, "also short"])[kind]
    source = opened(path, max_record_bytes=1024, max_malformed_fraction=0.5)
    assert list(source) == ["short", "", "also short"]
    assert source.malformed == 1
    with pytest.raises(ConfigError, match=r"is longer than data.max_record_bytes = 1,024"):
        list(opened(path, max_record_bytes=1024))


def test_files_that_are_read_at_once_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("mla_moe.data.sources.MAX_JSON_FILE_BYTES", 1000)
    monkeypatch.setattr("mla_moe.data.sources.MAX_ROW_GROUP_BYTES", 1000)
    documents = [f"{i} " * 99 for i in range(9)]
    assert "read at once; write it as JSON lines" in refused(write_json(tmp_path / "a.json", documents)).message
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path)
    assert "write it with row_group_size=1000" in refused(path).message


def test_what_is_no_regular_file_is_no_text(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "folder.jsonl").mkdir()
    assert "matches no file" in refused(tmp_path / "*").message
    assert "matches no file" in refused("/dev/zero").message
    assert "is a directory" in refused(tmp_path / "folder.jsonl").message
    for name in ("a\0b", "a" * 256, "\udcff"):
        with pytest.raises(ConfigError, match=r"data\.train"):
            DataConfig(train=(name,))


@pytest.mark.slow
def test_huge_files_take_little_memory(tmp_path):
    """A sparse text of 5 GB, JSON lines that are one line of 5 GB, and a line of 200 MB among others."""
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
    for name, offset, size in (("a.txt", 0, 5 << 30), ("a.jsonl", 18, 5 << 30), ("b.jsonl", 0, 200 << 20)):
        with (tmp_path / name).open("r+b" if offset else "wb") as file:
            file.truncate(offset + size)
    with (tmp_path / "b.jsonl").open("ab") as file:
        file.write(b'\n{"text": "last"}\n')
    code = """
import resource, sys
from mla_moe.data import open_documents
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before, texts = peak(), open_documents(sys.argv[1:], field="data.train", text_field="text", max_malformed_fraction=0.9)
print(len(texts), [len(texts[i]) for i in (0, 300, 1279, 1280, 1281, 1282, 1283)], texts.malformed, peak() - before)
"""
    names = [str(tmp_path / name) for name in ("a.txt", "a.jsonl", "b.jsonl")]
    found = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    count, *lengths = re.findall(r"\d+", found.stdout)
    assert [int(count), *map(int, lengths[:-1])] == [1284, 4 << 20, 4 << 20, 4 << 20, 5, 0, 0, 4, 2]
    assert int(lengths[-1]) < 200, "MB"
