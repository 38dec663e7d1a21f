"""Kill a run at random moments, resume it each time, and compare the result with a run that was never killed.

    python benchmarks/kills.py [--kills 50] [--seed 0]

The model is the quickstart's. The kinds of moments alternate: while a checkpoint is saved, during steps, while a
checkpoint is restored, and during the start. Exits with status 1 unless parameters, optimizer state, data position and
metrics are the same, and no checkpoint was lost.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mla_moe.config import CheckpointConfig, DataConfig, Recipe, SampleConfig, load_recipe
from mla_moe.training.metrics import read_rows

ROOT = Path(__file__).parents[1]
TIMING_METRICS = ("tokens_per_s", "step_seconds", "mfu")
MOMENTS = ("save", "steps", "restore", "start")


def recipe(run_dir: Path, steps: int) -> Recipe:
    quick = load_recipe(ROOT / "configs" / "quickstart.py")
    training = dataclasses.replace(quick.training, steps=steps, batch_size=4, sequence_length=64)
    return Recipe(
        run_dir=str(run_dir),
        model=quick.model,
        data=DataConfig(train=("arithmetic:train",), heldout=(), shuffle_buffer_size=64),
        optimizer=quick.optimizer,
        training=training,
        checkpoint=CheckpointConfig(every=3, max_to_keep=2),
        sample=SampleConfig(),
    )


class RunProcess:
    """One process of the run, and what it prints."""

    def __init__(self, run_dir: Path):
        command = [sys.executable, str(ROOT / "train.py"), str(run_dir.with_suffix(".json"))]
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        self.run_dir, self.output = run_dir, ""
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.output += line

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Wait until the condition is true. False if the process ended before."""
        while self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.002)
        return False

    @property
    def cpu_seconds(self) -> float:
        """CPU time so far: on a busy machine wall time says little about progress."""
        times = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        self.process.kill()
        self.wait()

    def wait(self) -> int:
        """The exit status."""
        status = self.process.wait()
        self._reader.join()
        return status

    @property
    def resumed_from(self) -> int | None:
        found = re.search(r"resumed from the checkpoint of step (\d+)", self.output)
        return int(found[1]) if found else None


def checkpoints(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "pretrain"


def newest(run_dir: Path) -> int:
    """Step of the newest complete checkpoint; 0 if there is none."""
    return max((int(path.name) for path in checkpoints(run_dir).glob("*") if path.name.isdigit()), default=0)


def has_incomplete(run_dir: Path) -> bool:
    return any(not path.name.isdigit() for path in checkpoints(run_dir).glob("*"))


def rows(run_dir: Path) -> list[dict]:
    return read_rows(run_dir / "metrics.jsonl")


def kill_at(moment: str, process: RunProcess, startup: float, draw: random.Random) -> bool:
    """Kill the process at that moment. False if it ended before."""

    def stepping() -> bool:
        return "compiled in" in process.output and len(rows(process.run_dir)) > newest(process.run_dir)

    reached = {
        "start": lambda: True,
        "restore": lambda: "tokenizer" in process.output,  # in the table that is printed before
        "steps": stepping,
        "save": lambda: stepping() and has_incomplete(process.run_dir),
    }
    if not process.wait_for(reached[moment]):
        return False
    longest = {"start": startup, "restore": 1.0, "steps": 1.0, "save": 0.3}
    until = process.cpu_seconds + draw.uniform(0, longest[moment])
    alive = process.wait_for(lambda: process.cpu_seconds > until)
    process.kill()
    return alive


def outcome(run_dir: Path) -> tuple[dict, list]:
    """Checksums and data position of the last checkpoint, and all metrics except timings."""
    step = checkpoints(run_dir) / str(newest(run_dir))
    position = {path.name: path.read_text() for path in (step / "data").glob("*.json")}
    metrics = [{name: value for name, value in row.items() if name not in TIMING_METRICS} for row in rows(run_dir)]
    return json.loads((step / "digests" / "metadata").read_text()) | position, metrics


def prepare(folder: Path, name: str, steps: int) -> Path:
    (folder / f"{name}.json").write_text(recipe(folder / name, steps).to_json())
    return folder / name


def run_without_kills(run_dir: Path) -> float:
    """CPU seconds until the first step was done."""
    process = RunProcess(run_dir)
    startup = process.cpu_seconds if process.wait_for(lambda: bool(rows(run_dir))) else 0.0
    if process.wait():
        raise SystemExit(process.output)
    return startup


def run_with_kills(
    run_dir: Path, count: int, startup: float, draw: random.Random
) -> dict[str, list[tuple[bool, bool, int]]]:
    """For each moment and kill: whether it left an incomplete checkpoint, whether a checkpoint was lost, and how many
    steps have to be repeated."""
    found = {moment: [] for moment in MOMENTS}
    for number in range(count):
        moment, saved, done = MOMENTS[number % len(MOMENTS)], newest(run_dir), len(rows(run_dir))
        process = RunProcess(run_dir)
        if not kill_at(moment, process, startup, draw):
            status = process.wait()
            raise SystemExit(f"the run ended before kill {number + 1}, with exit status {status}:\n{process.output}")
        lost = newest(run_dir) < saved or (process.resumed_from is not None and process.resumed_from < saved)
        repeated = max(len(rows(run_dir)), done) - newest(run_dir)
        found[moment].append((has_incomplete(run_dir), lost, repeated))
        print(f"{number + 1}: {moment}, {found[moment][-1]}, saved {newest(run_dir)}", file=sys.stderr, flush=True)
    process = RunProcess(run_dir)
    if process.wait():
        raise SystemExit(process.output)
    return found


def print_table(found: dict[str, list[tuple[bool, bool, int]]], same: bool) -> None:
    print("killed     kills  during a save  checkpoints lost  steps repeated, mean  most")
    for moment, kills in found.items():
        saves, lost, repeated = zip(*kills, strict=True) if kills else ((), (), (0,))
        mean = sum(repeated) / len(repeated)
        print(f"{moment:9} {len(kills):6} {sum(saves):14} {sum(lost):17} {mean:21.1f} {max(repeated):5}")
    print(f"the final state is {'the same, bit for bit' if same else 'NOT the same'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    steps = 12 + 3 * args.kills
    with tempfile.TemporaryDirectory() as folder:
        expected, killed = (prepare(Path(folder), name, steps) for name in ("expected", "killed"))
        startup = run_without_kills(expected)
        found = run_with_kills(killed, args.kills, startup, random.Random(args.seed))
        same = outcome(expected) == outcome(killed)
    print_table(found, same)
    return 0 if same and not any(lost for kills in found.values() for _, lost, _ in kills) else 1


if __name__ == "__main__":
    sys.exit(main())
