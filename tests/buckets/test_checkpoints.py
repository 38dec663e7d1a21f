"""Checkpoints of runs in buckets, and the other files: saves that fail, damage, faults of the server, two holders."""

import contextlib
import dataclasses
import json
import os
import random
import re
import socket
import time
from typing import NamedTuple

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mla_moe import ConfigError
from mla_moe.checkpoint import lease
from mla_moe.checkpoint.bucket_run import COMMIT, close_run, mirror_of, open_run
from mla_moe.checkpoint.lease import Lease
from mla_moe.checkpoint.manager import CheckpointManager
from mla_moe.cli.errors import report_error
from mla_moe.config import CheckpointConfig, MeshConfig
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.parallel.mesh import make_mesh
from mla_moe.training.run_directory import open_run_directory
from tests.checkpoint.position import Position


def steps_there(fs):
    return sorted(path.rpartition("/")[2] for path in fs.ls("bucket/run/checkpoints/pretrain", detail=False))


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


def test_a_save_that_does_not_finish_is_removed(bucket, states, failing_commit):
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


EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"


def test_a_bucket_that_cannot_be_read_damages_no_checkpoint(s3, states, monkeypatch):
    """Neither metadata nor chunks. For an expired token S3 has the status of an invalid request."""
    url, fs, faults = s3
    save(url, states)
    serve = faults.app
    for status, body in (("400 Bad Request", EXPIRED), ("403 Forbidden", b"")):
        for refused in (r"/\.zarray$", r"/[\d.]+$"):

            def refusing(environ, start_response, status=status, body=body, refused=refused):
                path = environ["PATH_INFO"]
                if environ["REQUEST_METHOD"] != "GET" or not re.search(f"/pretrain/2/state/.*{refused}", path):
                    return serve(environ, start_response)
                start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
                return [body]

            monkeypatch.setattr(faults, "app", refusing)
            with pytest.raises(ConnectionError, match=f"{url}/run/checkpoints/pretrain/2: cannot be read"):
                restore(url, states)
            assert steps_there(fs) == ["1", "2"]


@pytest.mark.parametrize("damage", [b"{", None])
def test_metadata_that_are_damaged_quarantine_a_step(s3, states, damage):
    url, fs, _ = s3
    save(url, states)
    metadata = "bucket/run/checkpoints/pretrain/2/state/params.embed/.zarray"
    fs.rm_file(metadata) if damage is None else fs.pipe_file(metadata, damage)
    assert restore(url, states)[1] == 1
    assert steps_there(fs) == ["1", "2.damaged"]


def test_a_bucket_that_is_down_at_the_start_is_no_invalid_input(s3, recipe, monkeypatch, capsys):
    """Launchers start the run again after status 1, not after 2."""
    url, fs, faults = s3
    monkeypatch.setattr(type(fs), "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for endpoint, error in (
            (os.environ["AWS_ENDPOINT_URL"], "OSError"),
            (f"http://127.0.0.1:{closed.getsockname()[1]}", "EndpointConnectionError"),
        ):
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            faults.statuses = [503] * 20
            fsspec.filesystem("s3").clear_instance_cache()
            with pytest.raises(ConnectionError) as caught:
                open_run_directory(dataclasses.replace(recipe, run_dir=f"{url}/run"))
            assert report_error(caught.value) == 1
            assert f"error: run_dir = 's3://bucket/run': {error}: " in capsys.readouterr().err
    monkeypatch.undo()
    fsspec.filesystem("s3").clear_instance_cache()


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
    monkeypatch.setattr(lease, "WAIT", 600.0)  # which it does not wait: the holder writes
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
