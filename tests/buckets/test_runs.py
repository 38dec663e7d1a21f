"""Runs in buckets: the same numbers as on a disk after kills, damage and faults of the server."""

import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mla_moe import ConfigError
from mla_moe.checkpoint import lease
from mla_moe.checkpoint.bucket_run import COMMIT, Mirror, close_run, mirror_of, open_run, read_run
from mla_moe.checkpoint.files import CheckpointSaveError
from mla_moe.checkpoint.lease import Lease
from mla_moe.checkpoint.manager import CheckpointManager
from mla_moe.cli import main
from mla_moe.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    SampleConfig,
    ScheduleConfig,
    TrainingConfig,
)
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.parallel.mesh import make_mesh
from mla_moe.training.console import Console
from mla_moe.training.metrics import read_rows
from mla_moe.training.pretrain import pretrain
from mla_moe.training.run_directory import open_run_directory

TIMING = {"tokens_per_s", "step_seconds", "mfu"}
STEPS = 6


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    monkeypatch.setattr("mla_moe.training.run_context.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))


@pytest.fixture(scope="module")
def recipe(cfg, tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for i in range(16):
        (folder / f"{i}.txt").write_text(" ".join(draw.choice(["ab", "cde", "fgh", "ij"], 60)))
    return Recipe(
        run_dir="",
        model=dataclasses.replace(cfg, num_hidden_layers=2, vocab_size=258, num_nextn_predict_layers=0),
        data=DataConfig(train=(f"{folder}/*.txt",), heldout=(), shuffle_buffer_size=8, prefetch=2),
        optimizer=OptimizerConfig("adamw", ScheduleConfig(peak_lr=5e-3, warmup_fraction=0.0)),
        mesh=MeshConfig(),
        training=TrainingConfig(steps=STEPS, batch_size=8, sequence_length=32, loss_chunk=32),
        checkpoint=CheckpointConfig(every=2, max_to_keep=3),
        sample=SampleConfig(),
    )


def train(recipe, run_dir):
    """The run's directory after training in this process: of a bucket the mirror."""
    recipe = dataclasses.replace(recipe, run_dir=str(run_dir))
    directory = open_run_directory(recipe)
    try:
        pretrain(recipe, directory, Console(enabled=False))
    finally:
        close_run(directory)
    return directory


@pytest.fixture(scope="module")
def expected(recipe, tmp_path_factory):
    """The outcome of a run on a disk without a fault."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mla_moe.training.run_context.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
        return outcome(train(recipe, tmp_path_factory.mktemp("local") / "run"))


def outcome(run_dir, step=STEPS):
    """Checksums of all arrays, the data position and the metrics but timings."""
    directory = run_dir / "checkpoints" / "pretrain" / str(step)
    digests = json.loads((directory / "digests" / "metadata").read_text())
    position = {path.name: path.read_text() for path in (directory / "data").glob("*.json")}
    rows = [{k: v for k, v in row.items() if k not in TIMING} for row in read_rows(run_dir / "metrics.jsonl")]
    return digests, position, rows


def outcome_there(url, step=STEPS):
    return outcome(read_run(url, "run_dir", metrics=True), step)


def steps_there(fs):
    return sorted(path.rpartition("/")[2] for path in fs.ls("bucket/run/checkpoints/pretrain", detail=False))


@contextlib.contextmanager
def failing_commit(step):
    """The save of this step fails when everything but its last object is written."""
    upload_file = Mirror.upload_file

    def failing(mirror, path):
        if path.name == COMMIT and path.parent.name == str(step):
            raise ConnectionError("the network is down")
        upload_file(mirror, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mirror, "upload_file", failing)
        problem = "/run/checkpoints/pretrain: a checkpoint could not be saved .the network is down.; check the"
        with pytest.raises(CheckpointSaveError, match=problem):
            yield


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_is_used_from_the_bucket(bucket, recipe, expected, capsys):
    url, fs, _ = bucket
    with failing_commit(4):
        train(recipe, f"{url}/run")
    assert steps_there(fs) == ["2", "4"]
    rows = outcome_there(f"{url}/run", 2)[2]
    assert rows == expected[2][: len(rows)]
    assert len(rows) >= 2, "rows up to a checkpoint are there before it is"
    train(recipe, f"{url}/run")
    assert steps_there(fs) == ["2", "4", "6"]
    assert outcome_there(f"{url}/run") == expected
    assert not fs.exists("bucket/run/.lock")

    assert main(["report", f"{url}/run"]) == 0
    assert fs.exists("bucket/run/report.html")
    assert main(["convert", f"{url}/run", f"{url}/hf"]) == 0
    capsys.readouterr()
    texts = []
    for path in (f"{url}/run/checkpoints/pretrain/6", f"{url}/hf"):
        assert main(["generate", path, "--prompt", "ab", "--max-new-tokens", "4"]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1


class Position:
    """A data position that is a number."""

    def __init__(self, number=0):
        self.number = number

    def states(self):
        return {0: str(self.number)}

    def restore(self, read):
        self.number = int(read(0))


class State(NamedTuple):
    params: dict
    optimizer: list
    step: jax.Array


@pytest.fixture(scope="module")
def states(recipe):
    """The model, two small states as if they were its, and the abstract state to restore into; sharded over devices."""
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    sharded, replicated = (NamedSharding(mesh, spec) for spec in (PartitionSpec(("fsdp",)), PartitionSpec()))

    def state(seed):
        draw = np.random.default_rng(seed)
        weights = {"embed": draw.normal(size=(8, 6)), "layers/up": draw.normal(size=(4, 5, 2))}
        params = {name: jax.device_put(x.astype(np.float32), sharded) for name, x in weights.items()}
        params["scale"] = jax.device_put(jnp.asarray(draw.normal(size=3), jnp.bfloat16), replicated)
        moments = [{"mu": {name: x + 1 for name, x in params.items()}}, ()]
        return State(params, moments, jax.device_put(np.int32(seed), replicated))

    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
    return AbstractModel(recipe.model), [state(1), state(2)], abstract


@contextlib.contextmanager
def opened(url):
    directory = open_run(f"{url}/run")
    try:
        with CheckpointManager(directory, "pretrain", CheckpointConfig(every=1, max_to_keep=2)) as checkpoints:
            yield checkpoints
    finally:
        close_run(directory)


def save(url, states):
    model, pair, _ = states
    with opened(url) as checkpoints:
        for step, state in enumerate(pair, 1):
            checkpoints.save(step, state, Position(step), model)


def restore(url, states):
    """What is restored: the state, the position in the data, and the logged lines."""
    position, logged = Position(), []
    with opened(url) as checkpoints:
        state = checkpoints.restore(states[2], position, logged.append)
    return state, position.number, logged


def test_a_save_that_does_not_finish_is_removed(bucket, states):
    url, fs, _ = bucket
    with failing_commit(2):
        save(url, states)
    assert steps_there(fs) == ["1", "2"]
    assert restore(url, states)[1] == 1
    assert steps_there(fs) == ["1"]


def test_a_damaged_checkpoint_is_quarantined_in_the_bucket(bucket, states):
    url, fs, _ = bucket
    save(url, states)
    chunks = [path for path in fs.find("bucket/run/checkpoints/pretrain/2/state/params.embed") if path[-1].isdigit()]
    content = bytearray(fs.cat_file(chunks[0]))
    content[len(content) // 2] ^= 1
    fs.pipe_file(chunks[0], bytes(content))
    for name in ("params.embed is damaged", None):  # the next time nothing is damaged
        state, position, logged = restore(url, states)
        assert position == 1
        jax.tree.map(np.testing.assert_array_equal, state, states[1][0])
        assert bool(logged) == bool(name)
        assert steps_there(fs) == ["1", "2.damaged"]
    save(url, states)
    assert steps_there(fs) == ["1", "2", "2.damaged"]
    assert restore(url, states)[1] == 2


def test_orbax_restores_a_step_that_is_copied_from_the_bucket(s3, states, tmp_path):
    url, fs, _ = s3
    save(url, states)
    fs.get("bucket/run/checkpoints/pretrain/2", str(tmp_path / "2"), recursive=True)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = ocp.args.Composite(state=ocp.args.StandardRestore(states[2]._asdict()))
        found = checkpointer.restore(tmp_path / "2", items)["state"]
    jax.tree.map(np.testing.assert_array_equal, found, states[1][1]._asdict())


@pytest.mark.slow
def test_faults_of_the_server_are_outlasted(s3, states):
    """Errors, a gateway's timeouts and cut connections, in uploads and in reading."""
    url, _, faults = s3
    serve, draw, injected = faults.app, random.Random(0), []

    def faulty(environ, start_response):
        if draw.random() < 0.1:
            injected.append(fault := draw.choice([503, 504, 500, faults.CUT]))
            faults.statuses.append(fault)
        return serve(environ, start_response)

    faults.app, faults.on = faulty, {"PUT", "GET"}
    try:
        save(url, states)
        state, position, logged = restore(url, states)
    finally:
        faults.app = serve
    assert {503, 504, faults.CUT} <= set(injected)
    assert position == 2
    assert not logged
    jax.tree.map(np.testing.assert_array_equal, state, states[1][1])


def test_a_bucket_that_cannot_be_read_damages_no_checkpoint(s3, states, monkeypatch):
    url, fs, _ = s3
    save(url, states)

    def refused(*_args, **_options):
        raise ValueError("UNAVAILABLE: connection refused")

    with monkeypatch.context() as patch:
        patch.setattr("tensorstore.open", refused)
        with pytest.raises(ConnectionError, match=f"{url}/run/checkpoints/pretrain/2: cannot be read"):
            restore(url, states)
    assert steps_there(fs) == ["1", "2"]


@pytest.fixture
def quick_lease(monkeypatch):
    monkeypatch.setattr(lease, "INTERVAL", 0.2)
    monkeypatch.setattr(lease, "WAIT", 0.8)


def test_two_processes_do_not_train_in_one_run(s3, recipe, quick_lease, monkeypatch):
    url, fs, _ = s3
    first, second = (Lease(fs, "bucket/run/.lock", f"{url}/run") for _ in range(2))
    first.acquire()
    with pytest.raises(ConfigError, match=r"run_dir = 's3://bucket/run': another process trains there"):
        open_run_directory(dataclasses.replace(recipe, run_dir=f"{url}/run"))
    monkeypatch.setattr(first, "_write", lambda number: None)  # as if it were stopped, or its host lost
    second.acquire()
    with pytest.raises(ConfigError, match="another process has taken over"):
        first.require_held()
    second.require_held()
    first.release()
    assert fs.exists("bucket/run/.lock")
    second.release()
    assert not fs.exists("bucket/run/.lock")


def test_only_a_process_of_the_same_container_is_known_to_be_dead(s3, quick_lease, monkeypatch):
    """In another one its number says nothing."""
    url, fs, _ = s3
    dead = {**lease._this_process(), "pid": 2**22 + 1}  # above the largest number of Linux
    assert lease._is_dead(dead)
    assert not lease._is_dead(dead | {"pid_namespace": "pid:[1]"})
    fs.pipe_file("bucket/run/.lock", json.dumps(dead | {"pid_namespace": "pid:[1]"}).encode())
    held = Lease(fs, "bucket/run/.lock", f"{url}/run")
    monkeypatch.setattr(time, "sleep", lambda _: fs.pipe_file("bucket/run/.lock", b'{"number": 1}'))
    with pytest.raises(ConfigError, match="another process trains there"):
        held.acquire()


def test_an_outage_at_the_end_does_not_hide_the_error_of_a_run(s3, quick_lease, caplog, monkeypatch):
    """Nor does it count as invalid input, after which no launcher starts the run again."""
    url, _, _ = s3

    def refused(*_args, **_options):
        raise RuntimeError("no connection")

    for failed in (True, False):
        directory = open_run(f"{url}/run")
        with monkeypatch.context() as patch, contextlib.ExitStack() as at_end:
            for name in ("cat_file", "put_file", "rm_file"):
                patch.setattr(mirror_of(directory)._fs, name, refused)
            if not failed:
                at_end.enter_context(pytest.raises(ConnectionError, match="no connection"))
            close_run(directory, failed=failed)
        assert "no connection" in caplog.text


def test_large_files_are_uploaded_when_they_have_grown(s3):
    """A new one at once: what it replaces may be removed."""
    url, fs, _ = s3
    directory = open_run(f"{url}/run")
    mirror, path = mirror_of(directory), directory / "rejection.parts.jsonl"
    (directory / "checkpoints" / "sft").mkdir(parents=True)
    for name in ("checkpoints/sft/not", "metrics.jsonl.tmp", ".lock"):
        (directory / name).write_text("x")
    for size, there in ((100, 100), (124, 100), (125, 125)):
        path.write_bytes(bytes(size))
        mirror.upload(10)
        assert fs.info(f"bucket/run/{path.name}")["size"] == there
    path.rename(directory / "rejection.jsonl")
    mirror.upload(10)
    assert mirror.names(directory) == {".lock", "rejection.jsonl"}
    close_run(directory)


def test_a_step_that_is_moved_is_never_incomplete_in_both_places(s3, monkeypatch):
    """A kill while it is moved leaves the step; the next move replaces what is there."""
    url, fs, _ = s3
    directory = open_run(f"{url}/run")
    mirror = mirror_of(directory)
    for name in ("a", COMMIT):
        fs.pipe_file(f"bucket/run/1/{name}", b"new")
    fs.pipe_file("bucket/run/1.damaged/old", b"of a move that was killed")
    with monkeypatch.context() as patch:
        patch.setattr(mirror._fs, "copy", lambda *_: 1 / 0)
        with pytest.raises(ConnectionError):
            mirror.move("bucket/run/1", "bucket/run/1.damaged")
    assert fs.exists(f"bucket/run/1/{COMMIT}")
    mirror.move("bucket/run/1", "bucket/run/1.damaged")
    assert sorted(fs.find("bucket/run/1.damaged")) == [f"bucket/run/1.damaged/{COMMIT}", "bucket/run/1.damaged/a"]
    assert not fs.exists("bucket/run/1")
    close_run(directory)


def wait_for(process, text):
    """Its output up to a line with this text, or to its end."""
    output = ""
    for line in process.stdout:
        output += line
        if text in line:
            break
    return output


def test_several_processes_are_refused(s3, recipe, monkeypatch):
    url, _, _ = s3
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="run_dir = 's3://bucket/run': several processes cannot save in a bucket yet"):
        open_run_directory(dataclasses.replace(recipe, run_dir=f"{url}/run"))


def start(recipe, run_dir, tmp_path):
    """A process that trains."""
    path = tmp_path / "recipe.json"
    path.write_text(dataclasses.replace(recipe, run_dir=run_dir).to_json())
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    }
    command = [sys.executable, "-m", "mla_moe", "train", str(path)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill(process):
    process.kill()
    process.stdout.close()
    process.wait()


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_ends_with_the_same_numbers(bucket, recipe, tmp_path):
    """At random times: at the start, during steps and saves, which take turns every few milliseconds."""
    url, fs, _ = bucket
    training = dataclasses.replace(recipe.training, steps=240)
    recipe = dataclasses.replace(recipe, training=training, checkpoint=CheckpointConfig(every=5, max_to_keep=2))
    for run_dir in (str(tmp_path / "run"), f"{url}/run"):
        draw = random.Random(0)
        for number in range(10 if run_dir.startswith(url) else 0):
            process = start(recipe, run_dir, tmp_path)
            output = wait_for(process, "compiled in" if number % 3 else "mesh")
            time.sleep(draw.uniform(0, 2))
            assert process.poll() is None, output + process.stdout.read()
            kill(process)
            assert fs.exists("bucket/run/.lock")  # of a dead process of this host, which is known at once
        process = start(recipe, run_dir, tmp_path)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    assert "resumed from the checkpoint of step" in output
    assert outcome_there(f"{url}/run", 240) == outcome(tmp_path / "run", 240)
    assert main(["convert", f"{url}/run", f"{url}/hf"]) == 0
    assert main(["generate", f"{url}/hf", "--prompt", "ab", "--max-new-tokens", "4"]) == 0
