import contextlib
import json

import pytest

from mla_moe.config import ConfigError, DataConfig
from mla_moe.data import SFT_FEATURES, ChatEncoding, ChatRecords, SFTDataset, sft_batches, sft_eval_batches
from mla_moe.text.tokenizer import ByteTokenizer

BYTE = ByteTokenizer()


def render(conversations):
    """Of each conversation one sequence, `role:content|` for each message."""
    found = []
    for messages, trained, tools in conversations:
        ids, ranges = [BYTE.bos_id, *str(tools or "").encode()], []
        for index, message in enumerate(messages):
            said = f"{message['content'] or message['tool_calls'][0]['function']['name']}|".encode()
            ids += message["role"][0].encode() + b":" + said
            ranges += [(len(ids) - len(said), len(ids))] if index in trained else []
        found.append([(ids, ranges)] if len(ids) < 200 else "is too long for the template")
    return found


def coding(chat=False):
    return ChatEncoding(
        prompt=lambda question: [BYTE.bos_id, *BYTE.encode(question).tolist()],
        completion=lambda text: BYTE.encode(text).tolist(),
        end=BYTE.eos_id,
        conversations=render,
        chat=chat,
    )


def dataset(path, length, malformed=0.0, truncation="cut", **options):
    options = {"chat": options.pop("chat", False)}, options
    return SFTDataset(
        ChatRecords([str(path)], "sft.data", coding(**options[0]), malformed, **options[1]), length, truncation
    )


def write(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def pairs(path, *texts):
    return write(path, *({"question": q, "completion": c} for q, c in texts))


def trained(example):
    """Text of the targets, in which what is trained on stands in «»."""
    shown, inside = "", 0
    for target, mask in zip(example["targets"].tolist(), example["loss_mask"].tolist(), strict=True):
        shown += "" if mask == inside else "«" if mask else "»"
        shown, inside = shown + (chr(target) if target < 256 else "$"), mask
    return shown + "»" * inside


def test_a_pair_is_its_tokens_and_what_of_them_is_learned(tmp_path):
    found = dataset(pairs(tmp_path / "p.jsonl", ("ab", "cd"), ("ab", "é")), 8)
    assert {key: value.tolist() for key, value in found[0].items()} == {
        "tokens": [256, *b"abcd"],
        "targets": [*b"abcd", 257],
        "loss_mask": [0, 0, 1, 1, 1],
    }
    assert bytes(found[1]["targets"][found[1]["loss_mask"] == 1][:-1].tolist()).decode() == "é"
    assert (found.truncated, found.prompts_too_long, found.malformed) == (0, 0, [])
    assert (found.total_tokens, found.trained_tokens) == (10, 6)
    assert found.prompt_and_completion(0) == ([256, *b"ab"], [*b"cd", 257])


@pytest.mark.parametrize(("length", "cut", "too_long"), [(5, 0, 0), (4, 1, 0), (3, 1, 0), (2, 0, 1)])
def test_what_does_not_fit_is_cut_or_left_out(tmp_path, length, cut, too_long):
    path = pairs(tmp_path / "p.jsonl", ("ab", "cd"), ("", "x"))
    found = dataset(path, length)
    assert (found.truncated, found.prompts_too_long, len(found)) == (cut, too_long, 2 - too_long)
    assert all(len(pair["tokens"]) <= length and pair["loss_mask"].any() for pair in found)
    skipped = dataset(path, length, truncation="skip")
    assert (skipped.truncated, skipped.prompts_too_long, len(skipped)) == (cut, too_long, 2 - too_long - cut)


CALL = {"name": "add", "arguments": {}}
MESSAGES = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


@pytest.mark.parametrize(
    ("record", "name", "shown"),
    [
        ({"messages": MESSAGES}, "messages", "u:a|a:«b|»u:c|a:«d|»"),
        ({"messages": [MESSAGES[1], *MESSAGES[:2]], "id": 3}, "messages", "a:b|u:a|a:«b|»"),
        ({"messages": [*MESSAGES[:1], MESSAGES[1] | {"weight": 0}, *MESSAGES[2:]]}, "messages", "u:a|a:b|u:c|a:«d|»"),
        ({"conversations": MESSAGES[:3], "tools": "[1]"}, "sharegpt", "[1]u:a|a:«b|»"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": json.dumps(CALL)},
                    {"from": "observation", "value": "c"},
                    {"from": "gpt", "value": "d"},
                ],
                "system": "s",
            },
            "sharegpt",
            "s:s|u:a|a:«add|»t:c|a:«d|»",
        ),
        ({"prompt": MESSAGES[:3], "completion": MESSAGES[3:]}, "prompt_completion", "u:a|a:b|u:c|a:«d|»"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion", "a«b$»"),
        ({"instruction": "a", "input": "b", "output": "c"}, "alpaca", "u:a\n\nb|a:«c|»"),
        ({"instruction": "a", "input": None, "output": "c", "system": "s"}, "alpaca", "s:s|u:a|a:«c|»"),
    ],
)
def test_formats_are_recognised(tmp_path, record, name, shown):
    found = dataset(write(tmp_path / "p.jsonl", record), 64, chat=True)
    assert (dict(found.formats), trained(found[0])) == ({name: 1}, shown)


def test_formats_can_be_named_and_files_be_of_any_kind(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    rows = [
        {"instruction": "a", "output": "b", "messages": MESSAGES},
        {"instruction": "é", "output": "b", "messages": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    (tmp_path / "p.json").write_text(json.dumps(rows))
    for name in ("p.parquet", "p.json"):
        assert dict(dataset(tmp_path / name, 64).formats) == {"messages": 1, "alpaca": 1}
        named = dataset(tmp_path / name, 64, format="alpaca")
        assert [trained(one) for one in named] == ["a«b$»", "Ã©«b$»"]
        with pytest.raises(ConfigError, match=r"1 of 2 lines are malformed, the first at .*needs a list of messages"):
            dataset(tmp_path / name, 64, format="messages")
        with pytest.raises(ConfigError, match=r"1 of 2 lines are malformed.*is longer than data.max_record_bytes = 40"):
            dataset(tmp_path / name, 64, max_record_bytes=40)
    parquet.write_table(pyarrow.table({"question": [b"a"], "completion": ["b"]}), tmp_path / "bytes.parquet")
    with pytest.raises(ConfigError, match="has the keys completion; the known ones are"):
        dataset(tmp_path / "bytes.parquet", 64)
    dates = pyarrow.array([10**8], pyarrow.int32()).cast(pyarrow.date32())  # in the year 275,760
    parquet.write_table(pyarrow.table({"prompt": ["a"], "completion": ["b"], "when": dates}), tmp_path / "d.parquet")
    with pytest.raises(ConfigError, match="cannot be read as Parquet: date value out of range"):
        dataset(tmp_path / "d.parquet", 64)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "Expecting"),
        ("[]", "is not a JSON object"),
        ('{"question": "a"}', "has the keys question; the known ones are: messages; conversations"),
        ('{"question": "a", "completion": ""}', "needs text under 'completion'"),
        ('{"question": "\\ud800", "completion": "b"}', "lone surrogate"),
        ('{"messages": []}', "needs a list of messages under 'messages'"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no message of an assistant after one of a user"),
        (json.dumps({"chosen": MESSAGES[:2], "rejected": MESSAGES[:2]}), "'chosen' and 'rejected' are the same"),
        (
            json.dumps({"chosen": MESSAGES[:2], "rejected": [MESSAGES[0], MESSAGES[1] | {"name": "b"}]}),
            "'chosen' and 'rejected' are the same tokens",
        ),
        ('{"instruction": "a", "input": {"b": 1}, "output": "c"}', "needs text under 'input'"),
        ('{"instruction": "a", "system": ["b"], "output": "c"}', "needs text under 'system'"),
        ('{"instruction": "a", "system": "b", "output": "c"}', "a 'system' message, which needs a chat template"),
        (json.dumps({"messages": [MESSAGES[0], {"role": "assistant"}]}), "neither content nor tool_calls"),
        (json.dumps({"messages": MESSAGES[:1] * 90 + MESSAGES[1:2]}), "is too long for the template"),
        ('{"conversations": [{"from": "me", "value": "a"}]}', "as 'from' one of human, user"),
        ('{"conversations": [{"from": ["human"], "value": "a"}]}', "as 'from' one of human, user"),
        ('{"a": ' * 2000, ""),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, why):
    (tmp_path / "p.jsonl").write_text('{"question": "a", "completion": "b"}\n\n' + line)
    found = dataset(tmp_path / "p.jsonl", 8, malformed=0.5)
    assert len(found) == 1
    assert found.malformed[0].startswith(f"{tmp_path}/p.jsonl, line 3: ")
    assert why in found.malformed[0]
    with pytest.raises(ConfigError, match=r"1 of 2 lines are malformed, the first at .*line 3"):
        dataset(tmp_path / "p.jsonl", 8, malformed=0.4)


def test_a_stream_resumes_exactly(tmp_path):
    found = dataset(pairs(tmp_path / "p.jsonl", *((f"{i}", "x" * (i % 5 + 1)) for i in range(40))), 16)
    size = {"batch_size": 2, "sequence_length": 16, "seed": 0}
    with contextlib.closing(sft_batches(DataConfig(shuffle_buffer_size=4, prefetch=2), found, **size)) as stream:
        for _ in range(3):
            next(stream)
        state, after = stream.get_state(), [next(stream) for _ in range(4)]
        stream.set_state(state)
        for a, b in zip(after, (next(stream) for _ in range(4)), strict=True):
            assert set(a) == {*SFT_FEATURES, "documents"}
            assert all((a[key] == b[key]).all() for key in a)
    batches = sft_eval_batches(found, batch_size=8, sequence_length=16)
    assert sum(int(batch["loss_mask"].sum()) for batch in batches) == found.trained_tokens
    assert {batch["tokens"].shape for batch in batches} == {(8, 16)}


def test_steps_of_an_epoch_are_those_of_the_packed_data(tmp_path):
    """Examples of 0.6 sequences, of which no two fit into one, and short ones, of which a few epochs fill the bins."""
    long = dataset(pairs(tmp_path / "long.jsonl", *((f"{i:03}", "x" * 58) for i in range(200))), 100)
    assert (long.steps(1.0, 2, 100), long.steps(2.5, 2, 100)) == (100, 250)
    short = dataset(pairs(tmp_path / "short.jsonl", *((f"{i:03}", "x" * 16) for i in range(10))), 100)
    assert (short.steps(1.0, 1, 100), short.steps(10.0, 1, 100)) == (2, 20)
