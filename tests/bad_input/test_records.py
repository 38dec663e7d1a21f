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
from mla_moe.data import ChatEncoding, ChatRecords, PreferenceDataset, SFTDataset, open_documents
from mla_moe.rl.tasks import open_task
from mla_moe.text.chat_tokenizer import load_chat_tokenizer
from mla_moe.text.tokenizer import HFTokenizer, train_bpe
from mla_moe.training.metrics import MetricsWriter, read_rows
from mla_moe.training.run_directory import read_summary

from .json_values import VALUES, changed

FIELDS = st.sampled_from(["text", "question", "completion", "answer"])
USER, ASSISTANT = {"role": "user", "content": "a few"}, {"role": "assistant", "content": "words", "weight": 1}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": [1]}'}}
CHATS = [
    {"messages": [USER, ASSISTANT, USER, ASSISTANT | {"reasoning_content": "few"}]},
    {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, USER | {"role": "tool"}, ASSISTANT]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c", "tools": "[1]"},
    {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT | {"content": [{"type": "text", "text": "a"}]}]},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": [USER], "completion": [ASSISTANT]},
    {"instruction": "a", "input": "b", "output": "c", "system": "d"},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content if m.content is string else m.content | tojson }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}{{ c.function.arguments | tojson }}]{% endfor %}</s>"
    "{% endfor %}{{ tools or '' }}{% if add_generation_prompt %}<assistant>{% endif %}"
)
LINES = st.binary(max_size=60) | st.dictionaries(FIELDS, VALUES).map(lambda value: json.dumps(value).encode())
DEEP = st.integers(1, 10**5).map(lambda depth: b"[" * depth)
FILES = st.lists(LINES | DEEP, max_size=5).map(b"\n".join)
ROWS = {
    "metrics.jsonl": {"step": 1, "stage": "rl", "loss": 0.5, "eval/accuracy": None},
    "expert_load.jsonl": {"step": 1, "stage": "rl", "load": [[0.5, 1.5], [1.0, 1.0]]},
    "samples.jsonl": {
        "step": 1, "stage": "rl", "kind": "greedy", "prompt": "1+1", "completion": "2", "answer": "2",
        "length": 3, "accuracy": 1.0,
    },
    "summary.json": {"time in RL steps": "1:00"},
}  # fmt: skip


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

    def render(conversations):
        texts = ["".join(str(m["content"]) for m in one.messages).encode() for one in conversations]
        return [[([1, *text], [(1, len(text) + 1)])] if text else "empty" for text in texts]

    coding = ChatEncoding(lambda q: [1, *q.encode()], lambda text: list(text.encode()), 0, render, True)
    with contextlib.suppress(ConfigError):
        pairs = SFTDataset(ChatRecords([str(path)], "sft.data", coding, 1.0), 16)
        assert all(0 < len(pair["tokens"]) <= 16 for pair in pairs)


@pytest.fixture(scope="module")
def chat(folder):
    """How chats are encoded with a tokenizer and a template of another's making."""
    train_bpe(["a few words to learn from"] * 9, 260, folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    chat = load_chat_tokenizer(folder, HFTokenizer(folder / "tokenizer.json"))
    return ChatEncoding(chat.encode, chat.encode, chat.stop_ids[0], chat.encode_training, True)


@given(
    st.lists(
        st.sampled_from(CHATS).flatmap(changed).map(lambda value: json.dumps(value).encode())
        | st.integers(1, 2000).map(lambda d: b'{"messages":[{"role":"user","content":' + b"[" * d + b"]" * d + b"}]}"),
        min_size=1, max_size=2,
    )
)  # fmt: skip
def test_any_chat_data(folder, chat, lines):
    """Every record is used or counted, and what is trained on lies within its sequence."""
    path = folder / "chats.jsonl"
    path.write_bytes(b"\n".join([*lines, *(json.dumps(good).encode() for good in CHATS[:1])]))
    records = ChatRecords([str(path)], "sft.data", chat, 1.0)
    found = list(records)
    assert len(found) + len(records.malformed) == len(lines) + 1
    assert found, "the last is good"
    for sides in found:
        assert len(sides) in (1, 2)
        for ids, ranges in (sequence for sequences in sides for sequence in sequences):
            assert all(type(token) is int for token in ids)
            assert all(0 < start < end <= len(ids) for start, end in ranges)
    with contextlib.suppress(ConfigError):
        assert len(PreferenceDataset(ChatRecords([str(path)], "dpo.data", chat, 1.0), 64)) > 0


@given(FILES)
def test_any_questions(folder, content):
    path = folder / "questions.jsonl"
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        open_task(TaskConfig(name=str(path)))


@given(st.sampled_from(sorted(ROWS)), st.data())
def test_any_file_of_a_run(folder, name, data):
    """Rows that are read have the types that the report and a resumed run need; what is written can be read again."""
    row = ROWS[name]
    lines = st.lists(changed(row).map(lambda value: json.dumps(value).encode()) | LINES, max_size=3).map(b"\n".join)
    (folder / name).write_bytes(data.draw(lines | DEEP | st.just(json.dumps(row).encode())))
    with contextlib.suppress(ConfigError):
        if name == "summary.json":
            assert all(isinstance(value, str) for value in read_summary(folder).values())
            return
        rows = read_rows(folder / name)
        assert all(type(row["step"]) is int and isinstance(row["stage"], str) for row in rows)
        with MetricsWriter(folder, 10**9, "rl") as writer:
            writer.write(2, {"loss": 1.0})
        assert read_rows(folder / name)[: len(rows)] == rows
    for file in folder.glob("*.jsonl"):
        file.unlink()


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
