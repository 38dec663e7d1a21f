"""Kill a run at random moments, start it again each time, and hold what becomes of it against the run never killed.

    python benchmarks/kills.py [--kills 50] [--seed 0]

The model is the quickstart's. Moments take turns: while a checkpoint is being written, during steps, while a process
restores, and while it starts. Exits with 1 unless parameters, optimizer, place in the data and curves are the same.
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
from pathlib import Path

from mla_moe.config import CheckpointConfig, DataConfig, Recipe, SampleConfig, load_recipe
from mla_moe.training.metrics import read_rows

ROOT = Path(__file__).parents[1]
TIMES = ("tokens_per_s", "step_seconds", "mfu")
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


class Life:
    """A process of the run, from its start to its end."""

    def __init__(self, run_dir: Path):
        command = [sys.executable, str(ROOT / "train.py"), str(run_dir.with_suffix(".json"))]
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        self.run_dir, self.said = run_dir, ""
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.said += line

    def wait_for(self, happened) -> bool:
        """Whether that came before the end."""
        while self.process.poll() is None:
            if happened():
                return True
            time.sleep(0.002)
        return False

    @property
    def cpu_seconds(self) -> float:
        """What it has computed so far: on a busy machine a second says little."""
        times = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        self.process.kill()
        self.end()

    def end(self) -> int:
        code = self.process.wait()
        self._reader.join()
        return code

    @property
    def resumed_from(self) -> int | None:
        found = re.search(r"resumed from the checkpoint of step (\d+)", self.said)
        return int(found[1]) if found else None


def stage(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "pretrain"


def newest(run_dir: Path) -> int:
    """The newest checkpoint that is whole; 0 where there is none."""
    return max((int(path.name) for path in stage(run_dir).glob("*") if path.name.isdigit()), default=0)


def half_written(run_dir: Path) -> bool:
    return any(not path.name.isdigit() for path in stage(run_dir).glob("*"))


def rows(run_dir: Path) -> list[dict]:
    return read_rows(run_dir / "metrics.jsonl")


def kill_at(moment: str, life: Life, startup: float, draw: random.Random) -> bool:
    """Whether the process lived to that moment, and was killed then."""

    def stepping() -> bool:
        return "compiled in" in life.said and len(rows(life.run_dir)) > newest(life.run_dir)

    happened = {
        "start": lambda: True,
        "restore": lambda: "tokenizer" in life.said,  # the table that is shown before
        "steps": stepping,
        "save": lambda: stepping() and half_written(life.run_dir),
    }
    if not life.wait_for(happened[moment]):
        return False
    longest = {"start": startup, "restore": 1.0, "steps": 1.0, "save": 0.3}
    until = life.cpu_seconds + draw.uniform(0, longest[moment])
    alive = life.wait_for(lambda: life.cpu_seconds > until)
    life.kill()
    return alive


def outcome(run_dir: Path) -> tuple[dict, list]:
    """All that a run has learned: digests of its last arrays, and its curves without the times."""
    step = stage(run_dir) / str(newest(run_dir))
    place = {path.name: path.read_text() for path in (step / "data").glob("*.json")}
    curve = [{name: value for name, value in row.items() if name not in TIMES} for row in rows(run_dir)]
    return json.loads((step / "digests" / "metadata").read_text()) | place, curve


def prepare(folder: Path, name: str, steps: int) -> Path:
    (folder / f"{name}.json").write_text(recipe(folder / name, steps).to_json())
    return folder / name


def run_whole(run_dir: Path) -> float:
    """Without a kill. CPU seconds until the first step was done."""
    life = Life(run_dir)
    startup = life.cpu_seconds if life.wait_for(lambda: rows(run_dir)) else 0.0
    if life.end():
        raise SystemExit(life.said)
    return startup


def run_killed(
    run_dir: Path, count: int, startup: float, draw: random.Random
) -> dict[str, list[tuple[bool, bool, int]]]:
    """With `count` kills: for each moment, whether each came amid a save, whether a checkpoint was lost, and how many
    steps are to be done again."""
    found = {moment: [] for moment in MOMENTS}
    for number in range(count):
        moment, saved, done = MOMENTS[number % len(MOMENTS)], newest(run_dir), len(rows(run_dir))
        life = Life(run_dir)
        if not kill_at(moment, life, startup, draw):
            raise SystemExit(f"the run ended before kill {number + 1}, with {life.end()}:\n{life.said}")
        lost = newest(run_dir) < saved or (life.resumed_from is not None and life.resumed_from < saved)
        again = max(len(rows(run_dir)), done) - newest(run_dir)
        found[moment].append((half_written(run_dir), lost, again))
        print(f"{number + 1}: {moment}, {found[moment][-1]}, saved {newest(run_dir)}", file=sys.stderr, flush=True)
    life = Life(run_dir)
    if life.end():
        raise SystemExit(life.said)
    return found


def show(found: dict[str, list[tuple[bool, bool, int]]], same: bool) -> None:
    print("killed     kills  amid a save  checkpoints lost  steps done again, mean  most")
    for moment, kills in found.items():
        half, lost, again = zip(*kills, strict=True) if kills else ((), (), (0,))
        print(f"{moment:9} {len(kills):6} {sum(half):12} {sum(lost):17} {sum(again) / len(again):23.1f} {max(again):5}")
    print(f"the end is {'the same, bit for bit' if same else 'NOT the same'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    steps = 12 + 3 * args.kills
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = (prepare(Path(folder), name, steps) for name in ("whole", "killed"))
        startup = run_whole(whole)
        found = run_killed(killed, args.kills, startup, random.Random(args.seed))
        same = outcome(whole) == outcome(killed)
    show(found, same)
    return 0 if same and not any(lost for kills in found.values() for _, lost, _ in kills) else 1


if __name__ == "__main__":
    sys.exit(main())
