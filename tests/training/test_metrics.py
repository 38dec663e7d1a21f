import json
import logging
import math
import struct
import tracemalloc

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from mla_moe.config import FORMAT_VERSION, ConfigError
from mla_moe.training.metrics import MetricsWriter, read_rows, seconds_in_steps


def write_steps(run_dir, resume_step, steps, stage="pretrain", loss=1.0):
    with MetricsWriter(run_dir, resume_step, stage) as writer:
        for step in steps:
            writer.write(step, {"loss": loss})
            writer.write_load(step, np.ones((1, 2)))
            writer.append_samples([{"step": step, "prompt": "def", "completion": " f"}])


def events(directory):
    """The events of all files in TensorBoard's record format: length, checksum, bytes, checksum."""
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]


def test_rows_are_flushed_to_disk_in_full_precision(tmp_path):
    with MetricsWriter(tmp_path / "run", None, "pretrain") as writer:
        writer.write(1, {"loss": np.float32(0.1), "moe/dropped": 3})
        rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    row = {
        "format_version": FORMAT_VERSION,
        "step": 1,
        "stage": "pretrain",
        "loss": float(np.float32(0.1)),
        "moe/dropped": 3.0,
    }
    assert rows == [row]


@pytest.mark.parametrize("name", ["metrics.jsonl", "expert_load.jsonl", "samples.jsonl"])
def test_resume_drops_rows_after_the_restored_step(tmp_path, name):
    write_steps(tmp_path, None, range(1, 8))
    write_steps(tmp_path, 4, range(5, 7))
    assert [row["step"] for row in read_rows(tmp_path / name)] == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.glob("*.tmp"))


def test_fresh_start_drops_all_rows_of_its_stage(tmp_path):
    write_steps(tmp_path, None, range(3), loss=1.0)
    write_steps(tmp_path, None, range(2), loss=2.0)
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [(0, 2.0), (1, 2.0)]


def test_other_stages_keep_their_rows(tmp_path):
    write_steps(tmp_path, None, [1, 2, 3])
    write_steps(tmp_path, None, [1, 2], stage="rl")
    write_steps(tmp_path, 1, [2], stage="rl")
    rows = [(row["stage"], row["step"]) for row in read_rows(tmp_path / "metrics.jsonl")]
    assert rows == [("pretrain", 1), ("pretrain", 2), ("pretrain", 3), ("rl", 1), ("rl", 2)]


@pytest.mark.parametrize("rest", [lambda line: line[:-9], lambda line: b"\0" * 4096, lambda line: line[:9] + b"\0" * 9])
def test_truncated_last_line_is_dropped_and_logged(tmp_path, caplog, rest):
    write_steps(tmp_path, None, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    *lines, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, rest(last)]))
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        write_steps(tmp_path, 3, [4])
    assert "metrics.jsonl:3" in caplog.text
    assert [row["step"] for row in read_rows(path)] == [1, 2, 4]


def test_dropping_rows_holds_a_small_part_of_the_file_in_memory(tmp_path):
    path = tmp_path / "samples.jsonl"
    line = json.dumps({"step": 1, "stage": "pretrain", "prompt": "x" * 1000, "completion": ""}) + "\n"
    path.write_text(line * 4000)
    tracemalloc.start()
    write_steps(tmp_path, 1, [])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.read_text() == line * 4000
    assert peak < path.stat().st_size / 4


def test_last_line_without_its_newline_is_kept(tmp_path):
    write_steps(tmp_path, None, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    write_steps(tmp_path, 2, [3])
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]


def test_malformed_line_inside_the_file_is_an_error_with_its_line_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "rl"}\n{"st\n{"step": 3, "stage": "rl"}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2"):
        read_rows(tmp_path / "metrics.jsonl")


def test_seconds_include_steps_before_restarts():
    def of(*steps):
        return seconds_in_steps([{"step": step, "step_seconds": 0.5} for step in steps] + [{"step": 4}], log_every=2)

    assert of(2, 4, 6) == 3.0
    assert of(42, 44) == 2.0, "a run that resumes another run's state does not count that run's steps"
    assert of(1, 3) == 1.5
    assert of() == 0


def test_missing_file_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_nan_is_null_and_counted(tmp_path):
    with MetricsWriter(tmp_path, None, "pretrain") as writer:
        writer.write(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 1e-3})
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=pytest.fail)
    assert row.pop("format_version") == FORMAT_VERSION
    assert row == {"step": 1, "stage": "pretrain", "loss": None, "grad_norm": None, "lr": 1e-3, "non_finite": 2}


def test_list_is_not_a_metric(tmp_path):
    with MetricsWriter(tmp_path, None, "pretrain") as writer, pytest.raises(TypeError):
        writer.write(1, {"load": [1.0, 2.0]})


def test_expert_load_is_relative_to_the_mean_of_its_layer(tmp_path):
    with MetricsWriter(tmp_path, None, "pretrain") as writer:
        writer.write_load(7, np.array([[10, 30, 20, 20], [0, 0, 0, 0]]))
    (row,) = read_rows(tmp_path / "expert_load.jsonl")
    assert row == {"step": 7, "stage": "pretrain", "load": [[0.5, 1.5, 1.0, 1.0], [0.0] * 4]}


def test_samples_keep_extra_keys(tmp_path):
    with MetricsWriter(tmp_path, None, "rl") as writer:
        writer.append_samples([{"step": 1, "prompt": "2 + 2", "completion": "é\n4", "reward": 1.0}])
    (row,) = read_rows(tmp_path / "samples.jsonl")
    assert row == {"step": 1, "stage": "rl", "prompt": "2 + 2", "completion": "é\n4", "reward": 1.0}


def test_tensorboard_holds_the_scalars_and_purges_at_the_resumed_step(tmp_path):
    write_steps(tmp_path, None, [1, 2, 3], loss=1.0)
    write_steps(tmp_path, 2, [3], loss=2.0)
    seen = list(events(tmp_path / "tensorboard" / "pretrain"))
    scalars = [(event.step, v.tag, v.simple_value) for event in seen for v in event.summary.value]
    assert scalars == [(1, "loss", 1.0), (2, "loss", 1.0), (3, "loss", 1.0), (3, "loss", 2.0)]
    starts = [event.step for event in seen if event.session_log.status == event.session_log.START]
    assert starts == [0, 3]
