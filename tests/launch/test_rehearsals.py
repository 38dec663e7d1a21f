"""Rehearsals: what each launcher renders trains with two and four processes, which find each other by stand-ins for
what the cluster tells them: the variables of a Slurm step, the index of a Job, and the metadata server of TPU VMs."""

import contextlib
import http.server
import os
import shlex
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest
import yaml

from mla_moe import ModelConfig
from mla_moe.cli import main
from mla_moe.config import CheckpointConfig, DataConfig, MeshConfig, Recipe, TrainingConfig
from mla_moe.launch.job import COORDINATOR_PORT
from mla_moe.training.metrics import read_rows

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.thorough), 4])]


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 400)
    model = ModelConfig(
        vocab_size=258, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=32, first_k_dense_replace=1,
    )  # fmt: skip
    recipe = Recipe(
        run_dir=str(tmp_path / "run"), model=model, mesh=MeshConfig(data=-1),
        data=DataConfig(train=(str(tmp_path / "text.txt"),), heldout=(), shuffle_buffer_size=2, max_record_bytes=1024),
        training=TrainingConfig(steps=2, batch_size=4, sequence_length=16),
        checkpoint=CheckpointConfig(every=2),
    )  # fmt: skip
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    return tmp_path / "recipe.json"


@pytest.fixture
def launch(recipe, capsys):
    def printed(target, *arguments):
        assert main(["launch", target, str(recipe), *arguments, "--print"]) == 0
        return capsys.readouterr().out

    return printed


@pytest.fixture
def start(tmp_path, pytestconfig):
    """Start a script with `mla-moe` in its path and in `.venv/bin`, and stand-ins for other commands."""
    folder, started = tmp_path / "mla_moe" / ".venv" / "bin", []
    folder.mkdir(parents=True)
    (tmp_path / ".venv").symlink_to(folder.parent)

    def begin(script, variables, **stand_ins):
        for name, text in {"mla-moe": f'exec {sys.executable} -m mla_moe "$@"', **stand_ins}.items():
            if not started:  # another process may be executing them
                (folder / name).write_text(f"#!/bin/bash\n{text}\n")
                (folder / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHONPATH": str(pytestconfig.rootpath),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
            **variables,
        }
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def require_trained(processes, tmp_path: Path):
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert sum(output.count("report:") for output in outputs) == 1, "the first process alone reports"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_slurm_step(launch, start, tmp_path, count):
    script = launch("slurm", "--topology", f"h100:{count}x1")
    step = f"""
for task in $(seq 0 {count - 1}); do
  SLURM_PROCID=$task SLURM_LOCALID=0 "${{@:2}}" &
  tasks+=($!)
done
for task in "${{tasks[@]}}"; do wait $task || exit 1; done"""
    variables = {
        "SLURM_JOB_ID": str(free_port()), "SLURM_NTASKS": str(count), "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": f"1(x{count})", "SLURM_GPUS_ON_NODE": "1",
        "SLURM_STEP_NUM_NODES": str(count),
    }  # fmt: skip
    require_trained([start(script, variables, srun=step, scontrol="exit 1")], tmp_path)


def test_the_indices_of_a_job(launch, start, tmp_path, count):
    job_set = yaml.safe_load(launch("gke", "--topology", f"h100:{count}x1", "--image", "a/b:1"))
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    (coordinator,) = container["env"]
    assert coordinator["value"].endswith(f":{COORDINATOR_PORT}")
    address = f"localhost:{free_port()}"  # in place of the name that the cluster's DNS has for the first pod
    command = shlex.join(container["command"]).replace("$$", "$")
    assert job["completions"] == count
    variables = {coordinator["name"]: address, "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    indices = [variables | {"JOB_COMPLETION_INDEX": str(index)} for index in range(count)]
    require_trained([start(command, each) for each in indices], tmp_path)


@pytest.fixture
def metadata_server(count):
    """The metadata server of all hosts of a slice: its address, then /NUMBER of the host."""
    hosts = ",".join(f"w{number}:{number}:127.0.0.1" for number in range(count))

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            number, *_, attribute = self.path.strip("/").split("/")
            self.send_response(200 if self.headers["Metadata-Flavor"] == "Google" else 403)
            self.end_headers()
            self.wfile.write({"worker-network-endpoints": hosts, "agent-worker-number": number}[attribute].encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_metadata_server_of_tpu_vms(launch, start, metadata_server, tmp_path, count):
    submitted = launch("tpu-vm", "--topology", f"v5p:2x2x{count}", "--zone", "here")
    remote = shlex.split(submitted)[-1].removeprefix("--command=")
    assert f":{COORDINATOR_PORT}" in remote
    remote = remote.replace(f":{COORDINATOR_PORT}", f":{free_port()}")  # of the first host, which others may use here
    variables = [{"GCE_METADATA_IP": f"{metadata_server}/{number}"} for number in range(count)]
    require_trained([start(remote, each) for each in variables], tmp_path)
