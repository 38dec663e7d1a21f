"""Several processes train as one: the same losses, and checkpoints from which any number of processes resumes."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_moe import ConfigError, ModelConfig
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
)  # fmt: skip
from mla_moe.parallel.distributed import in_cluster, initialize
from mla_moe.training.metrics import read_rows

TIMINGS = ("tokens_per_s", "step_seconds", "sample_seconds", "mfu")
ROOT = Path(__file__).parents[2]
Processes = list[subprocess.Popen[str]]


@pytest.fixture(scope="module")
def recipe(cfg: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file for eight devices."""
    folder = tmp_path_factory.mktemp("recipe")
    random = np.random.default_rng(0)
    for i in range(12):
        words = random.choice(["ab", "cde", "fgh", "ij"], random.integers(100, 400))
        (folder / f"{i}.txt").write_text(" ".join(words))
    optimizer = OptimizerConfig("adamw", ScheduleConfig(peak_lr=5e-3, warmup_fraction=0.0))
    recipe = Recipe(
        run_dir="",
        model=dataclasses.replace(cfg, num_hidden_layers=2, vocab_size=258),
        data=DataConfig(
            train=(f"{folder}/1*.txt", f"{folder}/[2-9].txt"), heldout=(f"{folder}/0.txt",), shuffle_buffer_size=8
        ),
        optimizer=optimizer,
        mesh=MeshConfig(data=2, expert=4),
        training=TrainingConfig(steps=4, batch_size=8, sequence_length=32, loss_chunk=32),
        task=TaskConfig(template="{question}=", options=("least=1", "most=2")),
        rl=RLConfig(
            steps=2, prompts_per_step=4, group_size=4, minibatches=2, max_prompt_tokens=16, max_new_tokens=8,
            kl_coef=0.01, micro_batch_size=8, max_num_seqs=8, eval_prompts=4, eval_samples=2, optimizer=optimizer,
        ),
        checkpoint=CheckpointConfig(every=2, max_to_keep=4),
        sample=SampleConfig(prompts=("ab",), max_new_tokens=2),
    )  # fmt: skip
    path = folder / "recipe.json"
    path.write_text(recipe.to_json())
    return path


def start(
    recipe: Path, run_dir: Path, processes: int, devices: int, *flags: str, script: Path | None = None
) -> Processes:
    """Start `train.py RECIPE --run-dir DIR`, or `script RECIPE DIR`, in processes with so many devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, str(script), str(recipe), str(run_dir)]
    if script is None:
        command = [sys.executable, str(ROOT / "train.py"), str(recipe), "--run-dir", str(run_dir), *flags]
    return [
        subprocess.Popen(
            command + (distributed_flags(f"localhost:{port}", processes, process) if processes > 1 else []),
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in range(processes)
    ]  # fmt: skip


def distributed_flags(coordinator: str, processes: int, process: int) -> list[str]:
    values = {"coordinator": coordinator, "processes": processes, "process": process}
    return [f"--distributed.{name}={value}" for name, value in values.items()]


def run(
    recipe: Path, run_dir: Path, processes: int, devices: int, *flags: str, script: Path | None = None
) -> list[str]:
    """The output of each process."""
    started = start(recipe, run_dir, processes, devices, *flags, script=script)
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(outputs)
    return outputs


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Rows without timings and without epochs, which the first process counts of its own documents, by stage: those of
    a stage that is trained again come last in the file."""
    found = sorted(read_rows(run_dir / "metrics.jsonl"), key=lambda row: row["stage"])
    return [{k: v for k, v in row.items() if k not in TIMINGS and "data/epochs" not in k} for row in found]


def assert_same_metrics(run_dir: Path, other_dir: Path) -> None:
    rows, other_rows = metrics(run_dir), metrics(other_dir)
    assert [sorted(row) for row in rows] == [sorted(row) for row in other_rows]
    for row, other in zip(rows, other_rows, strict=True):
        rel = 2e-3 if row["stage"] == "rl" else 2e-5  # Adam turns tiny gradients into steps of full size
        for name, value in row.items():
            assert value == (value if isinstance(value, str) else pytest.approx(other[name], rel=rel, abs=1e-5)), name


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of two processes with four devices each and its outputs, and a run of one process with eight devices."""
    folder = tmp_path_factory.mktemp("runs")
    outputs = run(recipe, folder / "two", 2, 4)
    run(recipe, folder / "one", 1, 8)
    return folder, outputs


@pytest.mark.slow
def test_two_processes_train_as_one_and_only_the_first_logs(runs: tuple[Path, list[str]]) -> None:
    folder, (first, second) = runs
    assert_same_metrics(folder / "two", folder / "one")
    assert "held-out bits per byte" in first
    assert "held-out" not in second
    assert (folder / "two" / "report.html").exists()
    assert [row["step"] for row in metrics(folder / "two") if "reward" in row] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "processes", "devices"), [("two", 1, 1), pytest.param("one", 2, 4, marks=pytest.mark.thorough)]
)
def test_another_number_of_processes_resumes_from_a_checkpoint(
    recipe: Path, runs: tuple[Path, list[str]], tmp_path: Path, source: str, processes: int, devices: int
) -> None:
    folder, _ = runs
    shutil.copytree(folder / source, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "pretrain" / "4")
    mesh = ("--mesh.data", "1", "--mesh.expert", "1") if devices == 1 else ()
    outputs = run(recipe, tmp_path / "run", processes, devices, *mesh)
    assert "resumed from the checkpoint of step 2" in outputs[0]
    assert_same_metrics(tmp_path / "run", folder / "one")


LONG_RUN = "--training.steps", "100000", "--mesh.data", "2", "--mesh.expert", "1"


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(recipe: Path, tmp_path: Path) -> None:
    started = start(recipe, tmp_path / "run", 2, 1, *LONG_RUN)
    wait_for_metrics(tmp_path / "run", started)
    started[1].send_signal(signal.SIGTERM)
    first, second = (process.communicate(timeout=120)[0] for process in started)
    assert [process.returncode for process in started] == [130, 130], first + second
    saved = [int(step.name) for step in (tmp_path / "run" / "checkpoints" / "pretrain").iterdir()]
    assert max(saved) == read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert f"stopped at step {max(saved)} by SIGTERM" in first


FAILURES = [
    pytest.param(1, signal.SIGKILL, id="killed"),
    pytest.param(0, signal.SIGKILL, id="coordinator killed", marks=pytest.mark.thorough),
    pytest.param(1, signal.SIGSTOP, id="no heartbeat", marks=pytest.mark.thorough),
]


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "sent"), FAILURES)
def test_all_processes_exit_when_one_is_lost(recipe: Path, tmp_path: Path, lost: int, sent: signal.Signals) -> None:
    started = start(recipe, tmp_path / "run", 2, 1, *LONG_RUN, "--distributed.timeout", "30")
    wait_for_metrics(tmp_path / "run", started)
    started[lost].send_signal(sent)
    began, other = time.monotonic(), started[1 - lost]
    output = other.communicate(timeout=120)[0]
    assert time.monotonic() - began < 90  # the timeout of 30 s, and the time until a busy machine notices it
    assert other.returncode not in (0, 130)
    assert "If another process is the cause" in output or "another task died" in output
    started[lost].kill()
    started[lost].communicate()


def wait_for_metrics(run_dir: Path, started: Processes) -> None:
    deadline = time.monotonic() + 120
    while len(read_rows(run_dir / "metrics.jsonl")) < 3:
        assert time.monotonic() < deadline
        assert [process.poll() for process in started] == [None, None]
        time.sleep(0.5)


LOAD_AND_SAVE = """
import sys
from mla_moe.parallel.distributed import initialize
source, target = initialize(sys.argv[1:])
from mla_moe import load_pretrained, save_pretrained
from mla_moe.config import MeshConfig
from mla_moe.parallel.mesh import make_mesh
model = load_pretrained(source, mesh=make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2)))
assert not model.moe_layers.moe.gate_up[...].is_fully_addressable
save_pretrained(model, target, like=source)
"""


@pytest.mark.slow
def test_two_processes_load_and_save_a_model(tmp_path: Path) -> None:
    golden = ROOT / "tests" / "golden" / "v3"
    script = tmp_path / "load_and_save.py"
    script.write_text(LOAD_AND_SAVE)
    run(golden, tmp_path / "out", 2, 4, script=script)
    before, after = (SafetensorsReader(directory) for directory in (golden, tmp_path / "out"))
    assert before.stored.keys() == after.stored.keys()
    for name in before.stored:
        assert before[name].tobytes() == after[name].tobytes(), name


def test_a_cluster_is_recognised_by_its_environment() -> None:
    assert not in_cluster({})
    assert not in_cluster({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"})
    assert in_cluster({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_STEP_NODELIST": "node[01-16]"})
    assert not in_cluster({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}), (
        "in a batch script or a shell, not started by srun"
    )
    assert in_cluster({"TPU_WORKER_HOSTNAMES": "t1v-0,t1v-1"})
    assert in_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"})
    step = {"SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}
    assert not in_cluster(step), "a step of one task in a job of four"
    assert in_cluster(step | {"SLURM_STEP_NUM_TASKS": "2"})
    assert not in_cluster({"WORLD_SIZE": "8"})


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "4"}


INCOMPLETE = [
    (SLURM, ["'SLURM_NTASKS': '4'", "SLURM_PROCID"]),
    (SLURM | {"SLURM_PROCID": "5", "SLURM_LOCALID": "0"}, ["'SLURM_PROCID': '5'", "process_id=5, num_processes=4"]),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}, ["package kubernetes"]),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, ["OMPI_MCA_orte_hnp_uri"]),
    ({"TPU_WORKER_HOSTNAMES": "t1v-0,t1v-1"}, ["t1v-1"]),
]
INITIALIZE = """
import json, os, sys
from mla_moe import ConfigError
from mla_moe.parallel.distributed import initialize
for environment in json.loads(sys.argv[1]):
    os.environ.update(environment)
    try:
        initialize([])
    except ConfigError as error:
        print(error)
    for name in environment:
        del os.environ[name]
"""
USAGE = r"^distributed = \{.*give --distributed\.coordinator HOST:PORT --dis"


def test_a_cluster_that_jax_cannot_join_is_one_line() -> None:
    """In a process without devices: where JAX has used some, it refuses before it looks for a cluster."""
    command = [sys.executable, "-c", INITIALIZE, json.dumps([environment for environment, _ in INCOMPLETE])]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout
    for message, (_, named) in zip(output.splitlines(), INCOMPLETE, strict=True):
        assert re.match(USAGE, message)
        assert "must be called before" not in message
        assert all(text in message for text in named), message


STEP_OF_ONE = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
TORCHRUN, PMI = {"WORLD_SIZE": "2", "RANK": "0"}, {"PMI_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "hint"),
    [
        (PMI, "processes: only Open MPI"),
        (STEP_OF_ONE | PMI, "processes: only Open MPI"),
        (TORCHRUN, "processes: torchrun"),
        (STEP_OF_ONE | TORCHRUN, "processes: torchrun"),
        (SLURM | TORCHRUN, "processes: torchrun"),  # two processes, but four tasks
    ],
)
def test_processes_of_a_launcher_that_jax_does_not_know_are_an_error_before_jax_is_asked(
    environment: dict[str, str], hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jax.distributed.initialize", lambda *_, **__: pytest.fail("JAX is asked"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=USAGE) as error:
        initialize([])
    assert hint in str(error.value)


def test_explicit_processes_that_cannot_join_are_told_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("deadline\nexceeded")

    monkeypatch.setattr("jax.distributed.initialize", fail)
    fix = "check that all processes have the same coordinator and count, and can reach it"
    with pytest.raises(ConfigError, match=rf"'processes': 2.*\(deadline exceeded\); {fix}$"):
        initialize(distributed_flags("localhost:1", 2, 0))


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        (SLURM | {"SLURM_STEP_NUM_TASKS": "2"}, 2),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "2"} | TORCHRUN | PMI, 2),  # as many: srun sets PMI_SIZE itself
        ({"SLURM_NTASKS": "4", "TPU_WORKER_HOSTNAMES": "t1v-0,t1v-1"}, None),  # an allocation, but not a step
        (STEP_OF_ONE | {"OMPI_COMM_WORLD_SIZE": "2"} | PMI, None),
    ],
)
def test_the_number_of_processes_is_that_of_the_slurm_step(
    environment: dict[str, str], processes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[Any] = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *args, **_: joined.append(args))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    initialize([])
    assert joined == [(None, processes, None)]


def test_distributed_flags_are_given_all_or_none() -> None:
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
def test_an_invalid_distributed_flag_is_an_error(coordinator: str, processes: int, process: int, field: str) -> None:
    with pytest.raises(ConfigError) as error:
        initialize(distributed_flags(coordinator, processes, process))
    assert error.value.field == f"distributed.{field}"
