"""Lines of files, of which no more than one record is in memory."""

import io

import pytest

from mla_moe.data.lines import Lines, bounded_lines
from mla_moe.data.malformed_records import MalformedRecordError


@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("long", [b"x" * 9, b"x" * 17, b"x" * 3_000_000, b" " * 40])
def test_of_a_long_line_only_the_beginning_is_read(long, end):
    text = b"12345\n1234567\n\n" + long + b"\nlast" + end
    found = list(bounded_lines(io.BytesIO(text), 8))
    assert found == [(0, b"12345\n"), (6, b"1234567\n"), (14, b"\n"), (15, long[:9]), (16 + len(long), b"last" + end)]


def test_a_long_line_is_malformed_and_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"short\n\n" + b"x" * 99 + b"\nthen" + b"\n" * 99)
    lines = Lines([str(path)], "sft.data", 32)
    assert (len(lines), lines[0], lines[2]) == (3, b"short\n", b"then\n")
    with pytest.raises(MalformedRecordError, match=r"sft.data = '.*a.jsonl, line 3': is longer than data.max_record_"):
        lines[1]
