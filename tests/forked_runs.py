"""Runs of several processes that train together, as forks of one that has imported everything."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from mla_moe.config import DataConfig, OptimizerConfig, Recipe, ScheduleConfig, TrainingConfig
from mla_moe.training.metrics import read_rows

TIMING = {"tokens_per_s", "step_seconds", "mfu"}


def outcome(run_dir, step):
    """Checksums of all arrays, the data position and the metrics but timings."""
    directory = run_dir / "checkpoints" / "pretrain" / str(step)
    digests = json.loads((directory / "digests" / "metadata").read_text())
    position = {path.name: path.read_text() for path in (directory / "data").glob("*.json")}
    rows = [{k: v for k, v in row.items() if k not in TIMING} for row in read_rows(run_dir / "metrics.jsonl")]
    return digests, position, rows


def small_recipe(cfg, folder, steps, **fields):
    """Pretraining of one layer on sixteen files of random words, which it writes to `folder`."""
    draw = np.random.default_rng(0)
    for i in range(16):
        (folder / f"{i}.txt").write_text(" ".join(draw.choice(["ab", "cde", "fgh", "ij"], 60)))
    one_layer = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    return Recipe(
        run_dir="",
        model=dataclasses.replace(cfg, vocab_size=258, q_lora_rank=None, **one_layer),
        data=DataConfig(train=(f"{folder}/*.txt",), heldout=(), shuffle_buffer_size=8, prefetch=2),
        optimizer=OptimizerConfig("adamw", ScheduleConfig(peak_lr=5e-3, warmup_fraction=0.0)),
        training=TrainingConfig(steps=steps, batch_size=8, sequence_length=32, loss_chunk=32),
        **fields,
    )


FORK = """
import importlib, json, os, signal, sys
import mla_moe.report.page
from mla_moe.cli.train import main
from mla_moe.rl import preflight, rejection_sampling, trainer
from mla_moe.training import dpo, pretrain, sft
for module in sys.argv[1:]:
    importlib.import_module(module)
for line in sys.stdin:
    processes, (environment, patch, commands) = [], json.loads(line)
    for log, arguments in commands:
        if not (process := os.fork()):
            signal.alarm(900)  # ends one that hangs
            os.environ |= environment
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            sys.stdout.reconfigure(line_buffering=True)
            exec(patch)
            sys.exit(main(arguments))
        processes.append(process)
    print(*processes, flush=True)
    print(*(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes), flush=True)
"""
"""Processes that have imported everything, which takes longer than such a small run."""


class Runs:
    """Starts processes that train together, as forks of one, in the environment of the test."""

    def __init__(self, folder, *modules):
        """`modules` are imported besides those of the package."""
        environment = os.environ | {
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # of gRPC, which the emulator has not
            "FSSPEC_GS_TOKEN": "anon",
            "TMPDIR": str(folder),
        }
        self._folder, pipe = folder, subprocess.PIPE
        command = [sys.executable, "-c", FORK, *modules]
        self._forks = subprocess.Popen(
            command, env=environment, stdin=pipe, stdout=pipe, text=True, start_new_session=True
        )

    def start(self, recipe, run_dir, *flags, patch=""):
        """Start a process for each of `flags`, by default one, which first executes `patch`. Returns their numbers."""
        path = self._folder / "recipe.json"
        path.write_text(dataclasses.replace(recipe, run_dir=str(run_dir)).to_json())
        self._logs = [self._folder / f"{number}.log" for number, _ in enumerate(flags or [()])]
        commands = [(str(log), [str(path), *own]) for log, own in zip(self._logs, flags or [()], strict=True)]
        self._forks.stdin.write(json.dumps((dict(os.environ), patch, commands)) + "\n")
        self._forks.stdin.flush()
        return [int(number) for number in self._forks.stdout.readline().split()]

    def wait(self):
        """The exit codes, that of a signal negative; and what the processes have printed."""
        codes = [int(code) for code in self._forks.stdout.readline().split()]
        return codes, "\n".join(log.read_text() for log in self._logs)

    def close(self):
        os.killpg(self._forks.pid, signal.SIGKILL)
        with self._forks:
            pass


def of_processes(count):
    """The flags of processes that find each other on loopback."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--distributed.coordinator=localhost:{port}", f"--distributed.processes={count}"
    return [[*flags, f"--distributed.process={process}", "--distributed.timeout=10"] for process in range(count)]
