import collections
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_moe.data import bits_per_byte, eval_text, gzip_bits_per_byte, sample_documents
from mla_moe.text.tokenizer import ByteTokenizer

from .test_packing import FIELDS, expected_windows, windows_of

BYTE = ByteTokenizer()
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1, max_size=30).filter(any)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(TEXTS, st.integers(1, 24), st.integers(1, 5))
def test_packing_loses_and_adds_nothing(documents, length, batch_size):
    batches, size, lost = eval_text(documents, BYTE, batch_size=batch_size, sequence_length=length)
    found = [window for batch in batches for window in windows_of(batch)]
    expected = [window for text in documents for window in expected_windows(text, length)]
    assert collections.Counter(found) == collections.Counter(expected)
    assert (size, lost) == (len("".join(documents).encode()), 0)
    assert all(
        batch[f].shape == (batch_size, length) and batch[f].dtype == np.int32 for batch in batches for f in FIELDS
    )
    assert all(batch["segment_ids"].any() for batch in batches)


def test_gzip_compresses_the_concatenated_text():
    rows = [f"row {i % 10}: the same words in every row\n" for i in range(100)]
    assert {len(row) for row in rows} == {35}
    done = subprocess.run(["gzip", "-9"], input="".join(rows).encode(), capture_output=True, check=True)
    assert gzip_bits_per_byte(rows, BYTE) == 8 * len(done.stdout) / 3500 < 1
    assert gzip_bits_per_byte(rows[:1], BYTE) > 11  # the header alone has 18 bytes
    assert gzip_bits_per_byte(["a" * 10_000], BYTE) < 0.1


def test_a_sample_is_of_bounded_size_and_without_empty_documents():
    documents = ["", *(chr(97 + i % 26) * (1 + i % 20_000) for i in range(3000))]
    texts = sample_documents(documents, range(len(documents)))
    assert texts == sample_documents(documents, range(len(documents)))
    assert sum(map(len, texts)) == 100_000
    assert all(0 < len(text) <= 4096 for text in texts)
    assert sorted(sample_documents(documents, range(4))) == ["a", "bb", "ccc"]
    assert set("".join(sample_documents(documents, range(1, 2500, 26)))) == {"a"}


def test_text_of_which_no_token_is_left_is_an_error():
    with pytest.raises(ValueError, match=r"data\.tokenizer = 'byte': loses all"):
        eval_text(["", ""], BYTE, batch_size=1, sequence_length=8)


def test_bits_per_byte_of_several_texts_is_that_of_their_concatenation():
    short, long = (eval_text([text], BYTE, batch_size=1, sequence_length=8) for text in ("ab", "abcdef"))
    assert bits_per_byte(2 * np.log(2), [short]) == pytest.approx(1.0)
    assert bits_per_byte(2 * np.log(2), [short, long._replace(lost=1)]) == pytest.approx((2 + 8) / 8)
