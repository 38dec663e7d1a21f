"""What is submitted to clusters, executed with stand-ins for their commands; and a rehearsal with processes."""

import dataclasses
import http.server
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest
import yaml

from mla_moe import ConfigError, ModelConfig
from mla_moe.cli import main
from mla_moe.config import CheckpointConfig, DataConfig, MeshConfig, Recipe, TrainingConfig
from mla_moe.launch.job import find_hosts, job_name
from mla_moe.launch.local import devices_per_process
from mla_moe.parallel.distributed import initialize
from mla_moe.training.metrics import read_rows

FLAGS = ["--mesh.fsdp", "8", "--run-dir", "/shared/it's a run", "--data.text-field", "$(COORDINATOR) $$"]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(Recipe(run_dir="x", mesh=MeshConfig(data=-1)).to_json())
    return path


@pytest.fixture
def launch(recipe, capsys):
    def printed(target, *arguments):
        assert main(["launch", target, str(recipe), *FLAGS, *arguments, "--print"]) == 0
        return capsys.readouterr().out

    return printed


@pytest.fixture
def execute(tmp_path):
    """Run a script with stand-ins for `mla-moe` and other commands, which print a line per argument."""
    folder = tmp_path / "mla_moe" / ".venv" / "bin"
    folder.mkdir(parents=True)

    def run(script, variables, **stand_ins):
        for name, text in {"mla-moe": 'printf "%s\\n" "$@"', **stand_ins}.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(0o755)
        environment = {"PATH": f"{folder}:{os.environ['PATH']}"} | variables
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines()

    return run


def distributed(arguments, monkeypatch):
    """Coordinator, number of processes and number of this one that JAX gets; and the arguments that are left."""
    got = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: got.append((args, kwargs)))
    left = initialize(arguments)
    return got[0], left


def by_kubernetes(text, variables):
    """What a container gets of an element of `command`: $$ is $, and $(NAME) a variable, if it is set."""
    return re.sub(r"\$(\$|\((\w+)\))", lambda m: "$" if m[1] == "$" else variables.get(m[2], m[0]), text)


@pytest.mark.parametrize("count", [1, 4])
def test_a_job_set_of_hosts_with_gpus(launch, execute, recipe, monkeypatch, count):
    spec = yaml.safe_load(launch("gke", "--topology", f"h100:{count}x8", "--image", "a/b:1"))["spec"]
    (hosts,) = spec["replicatedJobs"]
    job = hosts["template"]["spec"]
    assert (hosts["replicas"], job["completions"], job["parallelism"]) == (1, count, count)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    (coordinator,) = container["env"]
    shell, option, command = container["command"]
    variables = {coordinator["name"]: coordinator["value"], "JOB_COMPLETION_INDEX": f"{count - 1}"}
    status, arguments = execute(shlex.join([shell, option, by_kubernetes(command, variables)]), variables)
    assert (status, arguments[0]) == (0, "train")
    (got, _), left = distributed(arguments[1:], monkeypatch)
    assert got == ("it-s-a-run-hosts-0-0.it-s-a-run:8476", count, count - 1)
    assert left == [str(recipe), *FLAGS]


def test_a_job_set_of_tpu_slices(launch):
    flags = "--topology", "v5p:2x2x4", "--slices", "2", "--image", "a/b:1"
    job_set = yaml.safe_load(launch("gke", *flags))
    (hosts,) = job_set["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    assert (hosts["replicas"], job["completions"]) == (2, 4)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2x4"
    assert "distributed" not in pod["containers"][0]["command"][2], "JAX reads GKE's variables"
    assert "alpha.jobset.sigs.k8s.io/exclusive-topology" in job_set["metadata"]["annotations"]


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (2, False), (1, True), (137, True)])
def test_a_batch_script_queues_itself_again(launch, execute, recipe, status, requeued):
    script = launch("slurm", "--topology", "h100:2x8")
    assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --requeue"} <= set(script.splitlines())
    srun = f'shift; printf "%s\\n" "$@"; exit {status}'
    returned, lines = execute(script, {"SLURM_JOB_ID": "7"}, srun=srun, scontrol='echo "$@"')
    assert returned == status
    assert lines == [".venv/bin/mla-moe", "train", str(recipe), *FLAGS, *["requeue 7"] * requeued]


def test_one_task_per_host_uses_all_its_gpus(monkeypatch):
    def devices():
        return distributed([], monkeypatch)[0][1]["local_device_ids"]

    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    for name, value in {**step, "SLURM_LOCALID": "0", "SLURM_GPUS_ON_NODE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x2)")
    assert devices() == list(range(8))
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "8(x2)")
    assert devices() is None, "JAX gives each task its own"


METADATA = {"worker-network-endpoints": "w0:0:10.0.0.2,w1:1:10.0.0.3,w2:2:10.0.0.4", "agent-worker-number": "1"}


class MetadataServer(http.server.BaseHTTPRequestHandler):
    """The metadata server of the second of three TPU hosts."""

    def do_GET(self):
        self.send_response(200 if self.headers["Metadata-Flavor"] == "Google" else 403)
        self.end_headers()
        self.wfile.write(METADATA[self.path.rpartition("/")[2]].encode())

    def log_message(self, *_):
        pass


def test_tpu_vms_find_each_other_and_train_again(launch, execute, recipe, monkeypatch):
    script = launch("tpu-vm", "--topology", "v5p:2x2x2", "--zone", "here")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    remote = shlex.split(script)[-1].removeprefix("--command=")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), MetadataServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    variables = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
    train = 'printf "%s\\n" "$@"; if [ -e again ]; then exit 0; fi; touch again; exit 1'
    status, arguments = execute(remote, variables, **{"mla-moe": train, "sleep": "true"})
    server.shutdown()
    server.server_close()
    once = arguments[: len(arguments) // 2]
    assert (status, arguments) == (0, once * 2)
    (got, _), left = distributed(once[1:], monkeypatch)
    assert got == ("10.0.0.2:8476", 3, 1)
    assert left == [str(recipe), *FLAGS]


def test_a_slice_that_is_lost_is_not_waited_for(launch, execute):
    script = launch("tpu-vm", "--topology", "v5p:2x2x2", "--zone", "here")
    assert execute(script, {}, gcloud="echo SUSPENDED", sleep="echo waits; false") == (1, ["SUSPENDED"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["gke", "--topology", "h100:1x8"], "image = ''"),
        (["gke", "--topology", "v5p:3x3x3", "--image", "x"], "topology = 'v5p:3x3x3': a slice has one host, or hosts"),
        (["gke", "--image", "x"], "topology = None: name the devices"),
        (["slurm", "--topology", "h100:3x3"], "mesh = .*must multiply to the number of devices, 9"),
        (["slurm", "--topology", "v6e:2x4"], "topology = 'v6e:2x4': is a TPU; slurm launches GPUs only"),
        (["tpu-vm", "--topology", "v7x:2x2x1"], "topology = 'v7x:2x2x1': has no TPU VMs"),
        (["local", "--processes", "3"], "processes = 3|mesh = "),
        (["slurm", "--topology", "h100:1x8", "--name", "A_b"], "name = 'A_b'"),
    ],
)
def test_what_cannot_be_launched_is_named(arguments, error, tmp_path, capsys):
    path = tmp_path / "recipe.json"
    path.write_text(Recipe(run_dir="x", mesh=MeshConfig(data=1, fsdp=8)).to_json())
    assert main(["launch", arguments[0], str(path), *arguments[1:], "--print"]) == 2
    assert re.match(f"error: {error}", capsys.readouterr().err)


def test_several_processes_are_launched_with_a_run_in_a_bucket(tmp_path, capsys):
    pytest.importorskip("s3fs")
    recipe = Recipe(run_dir="s3://b/run", mesh=MeshConfig(data=1, fsdp=8))
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert main(["launch", "local", str(tmp_path / "recipe.json"), "--processes", "2", "--print"]) == 0
    assert "--distributed.processes=2" in capsys.readouterr().out


def test_devices_and_names():
    assert find_hosts("v7x:2x2x4", 1, MeshConfig(data=-1)).devices == 32, "a chip is two devices"
    assert find_hosts("v5e:1x1", 1, MeshConfig(data=1)).count == 1
    assert devices_per_process(MeshConfig(data=-1, expert=4), 2) == 2
    assert devices_per_process(MeshConfig(data=-1), 4) == 1
    with pytest.raises(ConfigError, match="processes = 3: must divide the 8 devices"):
        devices_per_process(MeshConfig(data=2, expert=4), 3)
    assert job_name(None, Recipe(run_dir="runs/2nd_Try.")) == "run-2nd-try"


@pytest.mark.slow
def test_a_rehearsal_trains_and_saves_by_time_in_all_processes(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    model = ModelConfig(
        vocab_size=258, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=32,
        first_k_dense_replace=1,
    )  # fmt: skip
    recipe = Recipe(
        run_dir=str(tmp_path / "run"), model=model, mesh=MeshConfig(data=2),
        data=DataConfig(train=(str(tmp_path / "text.txt"),) , heldout=(), shuffle_buffer_size=2, max_record_bytes=1024),
        training=TrainingConfig(steps=4, batch_size=2, sequence_length=16),
        checkpoint=CheckpointConfig(every=100, every_minutes=1e-9, max_to_keep=9),
    )  # fmt: skip
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    command = [sys.executable, "-m", "mla_moe", "launch", "local", str(tmp_path / "recipe.json"), "--processes", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "run/checkpoints/pretrain").iterdir()) == ["1", "2", "3", "4"]
    assert "mesh" in done.stdout
    assert dataclasses.asdict(recipe)["run_dir"] in done.stdout
