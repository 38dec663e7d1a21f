import contextlib
import json

import pytest

from mla_moe.config import ConfigError, DataConfig
from mla_moe.data import SFT_FEATURES, PromptCompletionDataset, PromptCompletionEncoding, sft_batches
from mla_moe.text.tokenizer import ByteTokenizer

BYTE = ByteTokenizer()


def coding(length):
    return PromptCompletionEncoding(
        prompt=lambda question: [BYTE.bos_id, *BYTE.encode(question).tolist()],
        completion=lambda text: BYTE.encode(text).tolist(),
        end=BYTE.eos_id,
        length=length,
    )


def write(path, *pairs):
    path.write_text("\n".join(json.dumps({"question": q, "completion": c}) for q, c in pairs))
    return [str(path)]


def test_a_pair_is_its_tokens_and_what_of_them_is_learned(tmp_path):
    pairs = PromptCompletionDataset(write(tmp_path / "p.jsonl", ("ab", "cd"), ("ab", "é")), "sft.data", coding(8), 0.0)
    assert {key: value.tolist() for key, value in pairs[0].items()} == {
        "tokens": [256, *b"abcd"],
        "targets": [*b"abcd", 257],
        "loss_mask": [0, 0, 1, 1, 1],
    }
    assert bytes(pairs[1]["targets"][pairs[1]["loss_mask"] == 1][:-1].tolist()).decode() == "é"
    assert (pairs.truncated, pairs.prompts_too_long, pairs.malformed) == (0, 0, [])


@pytest.mark.parametrize(("length", "cut", "too_long"), [(5, 0, 0), (4, 1, 0), (3, 1, 0), (2, 0, 1)])
def test_what_does_not_fit_is_cut_or_left_out(tmp_path, length, cut, too_long):
    pairs = PromptCompletionDataset(
        write(tmp_path / "p.jsonl", ("ab", "cd"), ("", "x")), "sft.data", coding(length), 0.0
    )
    assert (pairs.truncated, pairs.prompts_too_long, len(pairs)) == (cut, too_long, 2 - too_long)
    assert all(len(pair["tokens"]) <= length and pair["loss_mask"].any() for pair in pairs)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"question": "a"}',
        '{"question": "a", "completion": ""}',
        '{"question": "\\ud800", "completion": "b"}',
    ],
)
def test_broken_lines_are_named(tmp_path, line):
    (tmp_path / "p.jsonl").write_text('{"question": "a", "completion": "b"}\n\n' + line)
    pairs = PromptCompletionDataset([str(tmp_path / "p.jsonl")], "sft.data", coding(8), 0.5)
    assert len(pairs) == 1
    assert pairs.malformed[0].startswith(f"{tmp_path}/p.jsonl, line 3: ")
    with pytest.raises(ConfigError, match=r"1 of 2 lines are malformed, the first at .*line 3"):
        PromptCompletionDataset([str(tmp_path / "p.jsonl")], "sft.data", coding(8), 0.4)


def test_a_stream_resumes_exactly(tmp_path):
    texts = [(f"{i}", "x" * (i % 5 + 1)) for i in range(40)]
    pairs = PromptCompletionDataset(write(tmp_path / "p.jsonl", *texts), "sft.data", coding(16), 0.0)
    size = {"batch_size": 2, "sequence_length": 16, "seed": 0}
    with contextlib.closing(sft_batches(DataConfig(shuffle_buffer_size=4, prefetch=2), pairs, **size)) as stream:
        for _ in range(3):
            next(stream)
        state, after = stream.get_state(), [next(stream) for _ in range(4)]
        stream.set_state(state)
        for a, b in zip(after, (next(stream) for _ in range(4)), strict=True):
            assert set(a) == set(SFT_FEATURES)
            assert all((a[key] == b[key]).all() for key in a)
