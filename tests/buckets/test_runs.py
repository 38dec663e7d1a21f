"""Runs in buckets: the same numbers as on a disk after a save that fails and after kills."""

import dataclasses
import itertools
import os
import random
import re
import signal

import jax
import pytest

from mla_moe.checkpoint.bucket_run import COMMIT, close_run, read_run
from mla_moe.cli import main
from mla_moe.config import CheckpointConfig, MeshConfig
from mla_moe.parallel.mesh import make_mesh
from mla_moe.training.console import Console
from mla_moe.training.pretrain import pretrain
from mla_moe.training.run_directory import open_run_directory
from tests.forked_runs import Runs, of_processes, outcome


def outcome_there(url, step):
    return outcome(read_run(url, "run_dir", metrics=True), step)


def train(recipe, run_dir):
    """Train in this process, on one device. Returns the run's directory: of a bucket the mirror."""
    recipe = dataclasses.replace(recipe, run_dir=str(run_dir))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mla_moe.training.run_context.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
        directory = open_run_directory(recipe)
        try:
            pretrain(recipe, directory, Console(enabled=False))
        finally:
            close_run(directory)
    return directory


def require_usable(url, tmp_path, capsys, step):
    """A run in a bucket becomes a model in Hugging Face's layout there, which writes what the run's own step writes."""
    assert main(["convert", f"{url}/run", f"{url}/hf"]) == 0
    capsys.readouterr()
    texts = []
    for path in (f"{url}/run/checkpoints/pretrain/{step}", f"{url}/hf"):
        assert main(["generate", path, "--prompt", "ab", "--max-new-tokens", "4"]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_is_used_from_the_bucket(bucket, recipe, tmp_path, failing_commit, capsys):
    (url, fs, _), steps = bucket, recipe.training.steps
    expected = outcome(train(recipe, tmp_path / "run"), steps)
    with failing_commit(4):
        train(recipe, f"{url}/run")
    assert not fs.exists(f"bucket/run/checkpoints/pretrain/4/{COMMIT}")
    rows = outcome_there(f"{url}/run", 2)[2]
    assert rows == expected[2][: len(rows)]
    assert len(rows) >= 2, "rows up to a checkpoint are there before it is"
    train(recipe, f"{url}/run")
    assert outcome_there(f"{url}/run", steps) == expected
    assert not fs.exists("bucket/run/.lock")
    assert main(["report", f"{url}/run"]) == 0
    assert fs.exists("bucket/run/report.html")
    require_usable(url, tmp_path, capsys, steps)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    for package in ("s3fs", "gcsfs"):
        pytest.importorskip(package)
    started = Runs(tmp_path_factory.mktemp("runs"), "s3fs", "gcsfs")
    yield started
    started.close()


KILLS = 10


@pytest.fixture(scope="module")
def long_recipe(recipe):
    training = dataclasses.replace(recipe.training, steps=12)
    return dataclasses.replace(recipe, training=training, checkpoint=CheckpointConfig(every=2, max_to_keep=2))


@pytest.fixture(scope="module")
def of_one_process(long_recipe, runs, tmp_path_factory):
    """The outcome of the same run on a disk without a fault."""
    runs.start(long_recipe, directory := tmp_path_factory.mktemp("one") / "run")
    assert runs.wait()[0] == [0]
    return outcome(directory, long_recipe.training.steps)


@pytest.mark.slow
@pytest.mark.thorough
def test_a_run_that_is_killed_ten_times_ends_with_the_same_numbers(
    bucket, long_recipe, of_one_process, runs, tmp_path, capsys
):
    """Kills are at random requests of a process, so that they are at the same places on every machine: while it starts,
    and in saves and removals of checkpoints, beside which it trains."""
    (url, fs, server), steps, draw = bucket, long_recipe.training.steps, random.Random(0)
    incomplete = 0
    for _ in range(KILLS):
        counted, last = itertools.count(1), draw.randrange(1, 450)
        process = []

        def kill_at(method, path, counted=counted, last=last, process=process):
            if next(counted) == last:
                os.kill(process[0], signal.SIGKILL)

        process += runs.start(long_recipe, f"{url}/run")
        server.watch = kill_at
        codes, output = runs.wait()
        assert codes == [-signal.SIGKILL], output
        there = fs.ls("bucket/run/checkpoints/pretrain", detail=False) if fs.exists("bucket/run/checkpoints") else []
        incomplete += any(not fs.exists(f"{step}/{COMMIT}") for step in there)
    runs.start(long_recipe, f"{url}/run")
    codes, output = runs.wait()
    assert codes == [0], output
    assert re.search("resumed from the checkpoint of step [1-9]", output)
    assert incomplete >= 2, "some kills are in saves"
    assert outcome_there(f"{url}/run", steps) == of_one_process
    require_usable(url, tmp_path, capsys, steps)


@pytest.fixture(scope="module")
def sharded_recipe(recipe):
    training = dataclasses.replace(recipe.training, steps=4)
    return dataclasses.replace(recipe, training=training, mesh=MeshConfig(data=1, fsdp=2))


@pytest.fixture(scope="module")
def of_two_processes(sharded_recipe, runs, tmp_path_factory):
    """The outcome of the same run on a disk without a fault."""
    runs.start(sharded_recipe, directory := tmp_path_factory.mktemp("two") / "run", *of_processes(2))
    codes, output = runs.wait()
    assert codes == [0, 0], output
    return outcome(directory, 4)


@pytest.mark.slow
def test_several_processes_train_in_a_bucket(bucket, sharded_recipe, of_two_processes, runs):
    """The second one is killed while it writes its shards of a step, which is not there then, although the first one
    has written all of its own. The same processes, and another number of them, resume from the step before."""
    (url, fs, server), recipe = bucket, sharded_recipe
    second_shard, processes = re.compile(r"pretrain/4/state/[^/&]+/[0.]*1[0.]*(&|$)"), []

    def kill_second(method, path):
        if method in ("PUT", "POST") and second_shard.search(path) and len(processes) > 1:
            os.kill(processes.pop(), signal.SIGKILL)

    server.watch = kill_second
    processes += runs.start(recipe, f"{url}/run", *of_processes(2))
    codes, output = runs.wait()
    assert codes[1] == -signal.SIGKILL, output
    assert codes[0] != 0
    assert not fs.exists(f"bucket/run/checkpoints/pretrain/4/{COMMIT}")
    assert fs.exists(f"bucket/run/checkpoints/pretrain/2/{COMMIT}")
    fs.copy("bucket/run", "bucket/other", recursive=True)

    runs.start(recipe, f"{url}/run", *of_processes(2))
    codes, output = runs.wait()
    assert codes == [0, 0], output
    assert "resumed from the checkpoint of step 2" in output
    assert outcome_there(f"{url}/run", 4) == of_two_processes
    assert not fs.exists("bucket/run/.lock")

    runs.start(dataclasses.replace(recipe, mesh=MeshConfig(data=1)), f"{url}/other")
    codes, output = runs.wait()
    assert codes == [0], output
    assert "resumed from the checkpoint of step 2" in output
    _, position, rows = outcome_there(f"{url}/other", 4)
    assert position == of_two_processes[1]
    for row, other in zip(rows, of_two_processes[2], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=2e-5)
