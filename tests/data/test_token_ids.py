"""Data that are token ids already: in records and in flat files, with the losses and bits per byte of their text."""

import json
import math

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mla_moe import ConfigError
from mla_moe.config import DataConfig
from mla_moe.data import TokenFormat, bits_per_byte, eval_text, gzip_bits_per_byte, open_documents, train_batches
from mla_moe.data.packing import document_ids, window_lengths
from mla_moe.text.tokenizer import ByteTokenizer, load_tokenizer

BYTE = ByteTokenizer()
TEXTS = ["first", "zwei — ü", "", "a much longer document than the others", "e"]
IDS = [BYTE.encode(text).tolist() for text in TEXTS]
FORMAT = TokenFormat(258, BYTE.bos_id, BYTE.eos_id, "uint16")


def flat(ids, last=True):
    """All documents, each before an eos, the last one perhaps without."""
    joined = [token for document in ids for token in (*document, BYTE.eos_id)]
    return joined if last else joined[:-1]


def write(path, ids, dtype="uint16", key="input_ids", last=True):
    if path.suffix == ".npy":
        np.save(path, np.array(flat(ids, last), dtype))
    elif path.suffix == ".bin":
        np.array(flat(ids, last), f"<{np.dtype(dtype).str[1:]}").tofile(path)
    elif path.suffix == ".parquet":
        column = pyarrow.array(ids, pyarrow.list_(pyarrow.from_numpy_dtype(dtype)))
        pyarrow.parquet.write_table(pyarrow.table({key: column}), path, row_group_size=2)
    else:
        rows = [{key: document} for document in ids]
        lines = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
        path.write_text(lines)
    return path


def opened(*paths, tokens=FORMAT, **options):
    patterns = list(map(str, paths))
    return open_documents(patterns, field="data.train", text_field="text", tokens=tokens, **options)


@pytest.mark.parametrize(
    ("name", "dtype", "key", "last"),
    [
        ("a.jsonl", "int32", "input_ids", True),
        ("a.json", "int32", "tokens", True),
        ("a.parquet", "int64", "tokens", True),
        ("a.parquet", "uint16", "text", True),
        ("a.npy", "uint16", "", True),
        ("a.npy", "int64", "", False),
        ("a.bin", "uint16", "", True),
        ("a.bin", "uint32", "", False),
    ],
)
def test_every_format_has_the_documents(tmp_path, name, dtype, key, last):
    path = write(tmp_path / name, IDS, dtype, key, last)
    source = opened(path, tokens=FORMAT._replace(dtype=dtype))
    assert [document.tolist() for document in source] == IDS
    assert all(document.dtype == np.int32 for document in source)
    assert (source.empty, source.malformed) == (1, 0)
    expected = [document_ids(text, BYTE)[1:].tolist() for text in TEXTS]  # without bos
    assert [document_ids(document, BYTE).tolist() for document in source] == expected
    assert document_ids(np.array([*IDS[0], BYTE.eos_id]), BYTE).tolist() == expected[0]  # eos is not doubled


def test_token_ids_with_bos_train_and_evaluate_as_their_text(tmp_path):
    """The same batches, bytes and gzip, beside text in one run."""
    ids = [[BYTE.bos_id, *document] for document in IDS if document]
    source = opened(write(tmp_path / "a.npy", ids))
    texts = [text for text in TEXTS if text]
    data = DataConfig(shuffle_buffer_size=4, prefetch=2)
    streams = [
        train_batches(data, documents, BYTE, batch_size=2, sequence_length=8, seed=0) for documents in (texts, source)
    ]
    for _ in range(3):
        of_text, of_ids = (next(stream) for stream in streams)
        for name, values in of_text.items():
            np.testing.assert_array_equal(of_ids[name], values)
    for stream in streams:
        stream.close()
    found, expected = (eval_text(d, BYTE, batch_size=2, sequence_length=8) for d in (list(source), texts))
    assert (found.size, found.lost) == (expected.size, 0)
    assert bits_per_byte(3.0, [found]) == bits_per_byte(3.0, [expected])
    assert gzip_bits_per_byte(source, BYTE) == gzip_bits_per_byte(texts, BYTE)
    assert list(window_lengths(source, BYTE, 8)) == list(window_lengths(texts, BYTE, 8))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.npy"])
def test_documents_of_bos_and_eos_alone_are_empty(tmp_path, name):
    """They are skipped and counted, as texts without a character are."""
    alone = [[BYTE.bos_id]] if name == "a.npy" else [[BYTE.bos_id, BYTE.eos_id], [BYTE.bos_id], [BYTE.eos_id]]
    source = opened(write(tmp_path / name, [[BYTE.bos_id, 65], *alone, [66]]))
    assert [document.tolist() for document in source] == [[BYTE.bos_id, 65], *[[]] * len(alone), [66]]
    assert source.empty == len(alone)
    assert sorted(window_lengths(source, BYTE, 8)) == [1, 2]


def test_held_out_ids_without_bytes_have_a_loss_and_no_bits_per_byte(tmp_path):
    unused = [np.array([65]), np.array([BYTE.bos_id, BYTE.bos_id, 66])[:2]]
    text = eval_text(unused[:1], BYTE, batch_size=1, sequence_length=8)
    assert len(text.batches) == 1
    assert text.size is None
    assert math.isnan(bits_per_byte(1.0, [text]))
    assert math.isnan(gzip_bits_per_byte(unused[1:], BYTE))


def test_only_predicted_bytes_count_and_none_without_a_tokenizer():
    """Nothing predicts the first id of a document without bos. With `ids:EOS` there is a loss, but no bits per byte."""
    documents = [np.array(ids, np.int32) for ids in IDS if ids]
    found = eval_text(documents, BYTE, batch_size=2, sequence_length=8)
    assert found.size == sum(len(ids) - 1 for ids in IDS if ids)
    unknown = load_tokenizer(f"ids:{BYTE.eos_id}", "", ())
    without = eval_text(documents, unknown, batch_size=2, sequence_length=8)
    np.testing.assert_array_equal(without.batches[0]["targets"], found.batches[0]["targets"])
    assert without.size is None
    assert math.isnan(bits_per_byte(3.0, [without]))
    assert math.isnan(gzip_bits_per_byte(documents, unknown))
    with pytest.raises(ConfigError, match=r"^data.tokenizer = 'ids:257': has token ids only"):
        document_ids("text", unknown)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.npy", "a.bin"])
def test_an_id_outside_the_vocabulary_ends_the_run(tmp_path, name):
    path = write(tmp_path / name, [*IDS, [1, 258, 3]])
    with pytest.raises(ConfigError, match=r"^data.train = .*has token id 258, outside model.vocab_size = 258"):
        list(opened(path))


@pytest.mark.parametrize("ids", [[1, -2], [1, None], [1, 2.5], ["a"], [[1], [2]], [[1], 2], [True], [10**30]])
def test_a_list_of_anything_else_is_malformed(tmp_path, ids):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"tokens": row}) for row in (IDS[0], ids)))
    with pytest.raises(ConfigError, match=r"line 2.*(list of token ids|has token id -2)"):
        list(opened(path))


def test_flat_files_of_another_type_are_refused(tmp_path):
    wide = write(tmp_path / "wide.bin", IDS * 2, "uint32")
    with pytest.raises(ConfigError, match=r"^data.token_dtype = 'uint16': every second id of .*wide.bin is 0"):
        opened(wide)
    narrow = write(tmp_path / "narrow.bin", IDS * 2)
    with pytest.raises(ConfigError, match=r"narrow.bin': has token id \d{7,}.*data.token_dtype"):
        opened(narrow, tokens=FORMAT._replace(dtype="uint32"))
    (tmp_path / "odd.bin").write_bytes(b"123")
    with pytest.raises(ConfigError, match=r"odd.bin': has 3 bytes, no multiple of 2"):
        opened(tmp_path / "odd.bin")
    np.save(tmp_path / "float.npy", np.ones(3))
    with pytest.raises(ConfigError, match=r"float.npy': has float64 of shape \(3,\)"):
        opened(tmp_path / "float.npy")
    (tmp_path / "text.npy").write_text("no array")
    with (tmp_path / "zip.npy").open("wb") as file:
        np.savez(file, a=np.ones(3, int))
    for name in ("text.npy", "zip.npy"):
        with pytest.raises(ConfigError, match=f"{name}': cannot be read as .npy"):
            opened(tmp_path / name)
    with pytest.raises(ConfigError, match=r"^data.tokenizer = .*has token ids, and bpe:SIZE is trained on text"):
        opened(tmp_path / "narrow.bin", tokens=None)


def test_long_documents_are_read_in_parts(tmp_path, caplog):
    path = write(tmp_path / "a.npy", [list(range(200)) * 10, [5]])
    parts = [document.tolist() for document in opened(path, max_record_bytes=1024)]
    assert list(map(len, parts)) == [512, 512, 512, 464, 1]
    assert np.concatenate(parts[:4]).tolist() == list(range(200)) * 10
    assert "1 documents of token ids are longer than data.max_record_bytes" in caplog.text
    assert opened(path).fingerprint != opened(path, max_record_bytes=1024).fingerprint


def test_tokenizers_by_id_are_checked():
    for wrong in ("ids:", "ids:-1", "ids:x"):
        with pytest.raises(ConfigError, match=r"^data.tokenizer = .*ids:EOS with"):
            DataConfig(tokenizer=wrong)
