"""Several processes as one: the same losses, and checkpoints that any number of them goes on from."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from mla_moe import ConfigError
from mla_moe.checkpoint.safetensors_reader import SafetensorsReader
from mla_moe.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    RLConfig,
    SampleConfig,
    ScheduleConfig,
    TaskConfig,
    TrainingConfig,
)
from mla_moe.parallel.distributed import in_cluster, initialize
from mla_moe.training.metrics import read_rows

TIMINGS = ("tokens_per_s", "step_seconds", "sample_seconds", "mfu")


@pytest.fixture(scope="module")
def recipe(cfg, tmp_path_factory):
    """A recipe on disk, for eight devices."""
    folder = tmp_path_factory.mktemp("recipe")
    random = np.random.default_rng(0)
    for i in range(12):
        words = random.choice(["ab", "cde", "fgh", "ij"], random.integers(100, 400))
        (folder / f"{i}.txt").write_text(" ".join(words))
    recipe = Recipe(
        run_dir="",
        model=dataclasses.replace(cfg, num_hidden_layers=2, vocab_size=258),
        data=DataConfig(
            train=(f"{folder}/1*.txt", f"{folder}/[2-9].txt"), heldout=(f"{folder}/0.txt",), shuffle_buffer_size=8
        ),
        optimizer=OptimizerConfig("adamw", ScheduleConfig(peak_lr=5e-3, warmup_fraction=0.0)),
        mesh=MeshConfig(data=2, expert=4),
        training=TrainingConfig(steps=4, batch_size=8, sequence_length=32, loss_chunk=32),
        task=TaskConfig(template="{question}=", options=("least=1", "most=2")),
        rl=RLConfig(
            steps=2,
            prompts_per_step=4,
            group_size=4,
            minibatches=2,
            max_prompt_tokens=16,
            max_new_tokens=8,
            kl_coef=0.01,
            micro_batch_size=8,
            max_num_seqs=8,
            eval_prompts=4,
            eval_samples=2,
            optimizer=OptimizerConfig("adamw", ScheduleConfig(peak_lr=5e-3, warmup_fraction=0.0)),
        ),
        checkpoint=CheckpointConfig(every=2, max_to_keep=4),
        sample=SampleConfig(prompts=("ab",), max_new_tokens=2),
    )
    path = folder / "recipe.json"
    path.write_text(recipe.to_json())
    return path


def begin(pytestconfig, recipe, run_dir, processes, devices, *flags, script=None):
    """Start `train.py RECIPE --run-dir DIR`, or `script RECIPE DIR`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(pytestconfig.rootpath),
    }  # fmt: skip
    command = [sys.executable, str(script), str(recipe), str(run_dir)]
    if script is None:
        train_py = str(pytestconfig.rootpath / "train.py")
        command = [sys.executable, train_py, str(recipe), "--run-dir", str(run_dir), *flags]
    return [
        subprocess.Popen(
            command + (_join(port, processes, number) if processes > 1 else []),
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(processes)
    ]  # fmt: skip


def _join(port, processes, number):
    values = {"coordinator": f"localhost:{port}", "processes": processes, "process": number}
    return [part for name, value in values.items() for part in (f"--distributed.{name}", str(value))]


def train(*args, **more):
    started = begin(*args, **more)
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(outputs)
    return outputs


def rows(run_dir):
    """Stage by stage: one that is gone through again comes last in the file."""
    found = sorted(read_rows(run_dir / "metrics.jsonl"), key=lambda row: row["stage"])
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in found]


def assert_same_rows(a, b):
    a, b = rows(a), rows(b)
    assert [sorted(row) for row in a] == [sorted(row) for row in b]
    for ours, theirs in zip(a, b, strict=True):
        rel = 2e-3 if ours["stage"] == "rl" else 2e-5  # Adam makes whole steps of gradients that are hardly there
        for name, value in ours.items():
            assert value == (value if isinstance(value, str) else pytest.approx(theirs[name], rel=rel, abs=1e-5)), name


@pytest.fixture(scope="module")
def runs(pytestconfig, recipe, tmp_path_factory):
    """A run of two processes with four devices each, and one of a process with eight."""
    folder = tmp_path_factory.mktemp("runs")
    outputs = train(pytestconfig, recipe, folder / "two", 2, 4)
    train(pytestconfig, recipe, folder / "one", 1, 8)
    return folder, outputs


@pytest.mark.slow
def test_two_processes_learn_what_one_does_and_only_the_first_talks(runs):
    folder, (first, second) = runs
    assert_same_rows(folder / "two", folder / "one")
    assert "held-out bits per byte" in first
    assert "held-out" not in second
    assert (folder / "two" / "report.html").exists()
    assert [row["step"] for row in rows(folder / "two") if "reward" in row] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "processes", "devices"), [("two", 1, 1), ("one", 2, 4)])
def test_a_checkpoint_is_continued_by_another_number_of_processes(
    pytestconfig, recipe, runs, tmp_path, source, processes, devices
):
    folder, _ = runs
    shutil.copytree(folder / source, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "pretrain" / "4")
    mesh = ("--mesh.data", "1", "--mesh.expert", "1") if devices == 1 else ()
    outputs = train(pytestconfig, recipe, tmp_path / "run", processes, devices, *mesh)
    assert "resumed from the checkpoint of step 2" in outputs[0]
    assert_same_rows(tmp_path / "run", folder / "one")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(pytestconfig, recipe, tmp_path):
    started = begin(
        pytestconfig,
        recipe,
        tmp_path / "run",
        2,
        1,
        "--training.steps",
        "100000",
        "--mesh.data",
        "2",
        "--mesh.expert",
        "1",
    )
    wait_for_rows(tmp_path / "run", started)
    started[1].send_signal(signal.SIGTERM)
    first, second = (process.communicate(timeout=120)[0] for process in started)
    assert [process.returncode for process in started] == [130, 130], first + second
    saved = [int(step.name) for step in (tmp_path / "run" / "checkpoints" / "pretrain").iterdir()]
    assert max(saved) == read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert f"stopped at step {max(saved)} by SIGTERM" in first


LOST = [
    pytest.param(1, signal.SIGKILL, id="killed"),
    pytest.param(0, signal.SIGKILL, id="the first", marks=pytest.mark.thorough),
    pytest.param(1, signal.SIGSTOP, id="silent", marks=pytest.mark.thorough),
]


@pytest.mark.slow
@pytest.mark.parametrize(("which", "how"), LOST)
def test_the_others_end_when_one_is_lost(pytestconfig, recipe, tmp_path, which, how):
    flags = ("--training.steps", "100000", "--mesh.data", "2", "--mesh.expert", "1", "--distributed.timeout", "30")
    started = begin(pytestconfig, recipe, tmp_path / "run", 2, 1, *flags)
    wait_for_rows(tmp_path / "run", started)
    started[which].send_signal(how)
    began, other = time.monotonic(), started[1 - which]
    output = other.communicate(timeout=120)[0]
    assert time.monotonic() - began < 90  # the silence of 30 s, and on a busy machine the time to notice it
    assert other.returncode not in (0, 130)
    assert "If another process is the cause" in output or "another task died" in output
    started[which].kill()
    started[which].communicate()


def wait_for_rows(run_dir, started):
    deadline = time.monotonic() + 120
    while len(read_rows(run_dir / "metrics.jsonl")) < 3:
        assert time.monotonic() < deadline
        assert [process.poll() for process in started] == [None, None]
        time.sleep(0.5)


MOVE = """
import sys
from mla_moe.training.distributed import initialize
source, target = initialize(sys.argv[1:])
from mla_moe.interop import load_pretrained, save_pretrained
from mla_moe.recipe import Mesh
from mla_moe.sharding import make_mesh
model = load_pretrained(source, mesh=make_mesh(Mesh(data=1, fsdp=2, expert=2, tensor=2)))
assert not model.moe_layers.moe.gate_up[...].is_fully_addressable
save_pretrained(model, target, like=source)
"""


@pytest.mark.slow
def test_a_model_is_loaded_and_saved_by_two_processes(pytestconfig, tmp_path):
    golden = pytestconfig.rootpath / "tests" / "golden" / "v3"
    script = tmp_path / "move.py"
    script.write_text(MOVE)
    train(pytestconfig, golden, tmp_path / "out", 2, 4, script=script)
    before, after = (SafetensorsReader(directory) for directory in (golden, tmp_path / "out"))
    assert before.stored.keys() == after.stored.keys()
    for name in before.stored:
        assert before[name].tobytes() == after[name].tobytes(), name


def test_a_cluster_is_recognised():
    assert not in_cluster({})
    assert not in_cluster({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"})
    assert in_cluster({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_STEP_NODELIST": "node[01-16]"})
    assert not in_cluster({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}), "a batch script, or a shell: not srun's"
    assert in_cluster({"TPU_WORKER_HOSTNAMES": "t1v-0,t1v-1"})
    assert in_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"})


def test_flags_about_processes_are_complete_or_absent():
    assert initialize(["recipe.json", "--seed", "1"]) == ["recipe.json", "--seed", "1"]
    with pytest.raises(ConfigError, match=r"distributed\.process = None"):
        initialize(["--distributed.coordinator", "localhost:1", "--distributed.processes", "2"])


@pytest.mark.parametrize(
    ("coordinator", "processes", "process", "field"),
    [
        ("localhost", 2, 0, "coordinator"),
        ("localhost:port", 2, 0, "coordinator"),
        ("localhost:1", 0, 0, "processes"),
        ("localhost:1", 1, 5, "process"),
        ("localhost:1", 2, -1, "process"),
    ],
)
def test_flags_about_processes_make_sense(coordinator, processes, process, field):
    values = {"coordinator": coordinator, "processes": processes, "process": process}
    with pytest.raises(ConfigError) as error:
        initialize([f"--distributed.{flag}={value}" for flag, value in values.items()])
    assert error.value.field == f"distributed.{field}"
