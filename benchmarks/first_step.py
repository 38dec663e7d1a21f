"""Seconds from the quickstart's command to the first row of its curves, without and with the compilation cache.

    python benchmarks/first_step.py [--turns 3]

A row is written when the step after it is under way. Each turn begins with an empty cache; then the same again.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]


def seconds_to_first_row(run_dir: Path, cache: Path) -> float:
    command = [sys.executable, "train.py", "configs/quickstart.py", "--run-dir", str(run_dir)]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    rows, start = run_dir / "metrics.jsonl", time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as run:
        while not (rows.exists() and rows.stat().st_size):
            if run.poll() is not None:
                sys.exit(f"the run ended before its first row, with {run.returncode}")
            time.sleep(0.02)
        taken = time.perf_counter() - start
        run.kill()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    times: dict[str, list[float]] = {"cold": [], "cached": []}
    for _ in range(args.turns):
        with tempfile.TemporaryDirectory() as folder:
            for name, taken in times.items():
                taken.append(seconds_to_first_row(Path(folder, name), Path(folder, "cache")))
    print(f"{'':10}{'median, s':>12}{'all':>8}")
    for name, taken in times.items():
        print(f"{name:10}{median(taken):12.1f}   {', '.join(f'{t:.1f}' for t in taken)}")


if __name__ == "__main__":
    main()
