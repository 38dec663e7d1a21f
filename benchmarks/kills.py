"""Kill a run at random moments, start it again each time, and hold what becomes of it against the run never killed.

    python benchmarks/kills.py [--kills 50] [--seed 0]

The model is the quickstart's. Moments take turns: while a process starts, while it restores, during steps, and when a
checkpoint is being written. Exits with 1 unless parameters, optimizer, place in the data and curves are the same.
"""

import argparse
import collections
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

from mla_moe import recipe as recipes
from mla_moe.recipe import Checkpoint, Data, Recipe, Sample
from mla_moe.training.metrics import read_rows

ROOT = Path(__file__).parents[1]
TIMES = ("tokens_per_s", "step_seconds", "mfu")
MOMENTS = ("start", "restore", "steps", "save")


def recipe(run_dir: Path, steps: int) -> Recipe:
    quick = recipes.load(ROOT / "configs" / "quickstart.py")
    training = dataclasses.replace(quick.training, steps=steps, batch_size=4, sequence_length=64)
    return Recipe(
        run_dir=str(run_dir),
        model=quick.model,
        data=Data(train=("arithmetic:train",), heldout=(), shuffle_window=64),
        optimizer=quick.optimizer,
        training=training,
        checkpoint=Checkpoint(every=3, keep=2),
        sample=Sample(),
    )


class Life:
    """A process of the run, from its start to its end."""

    def __init__(self, run_dir: Path):
        command = [sys.executable, str(ROOT / "train.py"), str(run_dir.with_suffix(".json"))]
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        self.began, self.run_dir, self.said = time.monotonic(), run_dir, ""
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
    longest = {"start": startup, "restore": 1.0, "steps": 1.0, "save": 0.5}
    time.sleep(draw.uniform(0, longest[moment]))
    alive = life.process.poll() is None
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, steps = random.Random(args.seed), 12 + 3 * args.kills
    kills, half, lost = collections.Counter(), collections.Counter(), collections.Counter()
    again = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        whole, killed = (prepare(Path(temporary), name, steps) for name in ("whole", "killed"))
        life = Life(whole)
        life.wait_for(lambda: rows(whole))
        startup = time.monotonic() - life.began
        if life.end():
            print(life.said)
            return 1
        while kills.total() < args.kills:
            moment, saved, done = MOMENTS[kills.total() % len(MOMENTS)], newest(killed), len(rows(killed))
            life = Life(killed)
            if not kill_at(moment, life, startup, draw):
                print(f"the run ended before it was killed {args.kills} times, with {life.end()}:\n{life.said}")
                return 1
            kills[moment] += 1
            half[moment] += half_written(killed)
            lost[moment] += (life.resumed_from is not None and life.resumed_from < saved) or newest(killed) < saved
            again[moment].append(max(len(rows(killed)), done) - newest(killed))
            print(f"{kills.total()}: {moment}, saved {newest(killed)}", file=sys.stderr, flush=True)
        life = Life(killed)
        code = life.end()
        same = code == 0 and outcome(whole) == outcome(killed)
    print("killed     kills  amid a save  checkpoints lost  steps done again, mean  most")
    for moment in MOMENTS:
        redone = again[moment] or [0]
        mean = sum(redone) / len(redone)
        print(f"{moment:9} {kills[moment]:6} {half[moment]:12} {lost[moment]:17} {mean:23.1f} {max(redone):5}")
    print(f"{steps} steps; the end is {'the same, bit for bit' if same else f'NOT the same: {life.said}'}")
    return 0 if same and not lost.total() else 1


if __name__ == "__main__":
    sys.exit(main())
