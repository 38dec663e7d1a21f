"""Seconds from the quickstart's command to the first row of `metrics.jsonl`, without and with the compilation cache.

    python benchmarks/first_step.py [--runs 3]

A row is written while the next step runs. Each run starts with an empty cache and is repeated with the filled one.
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
        seconds = time.perf_counter() - start
        run.kill()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    times: dict[str, list[float]] = {"cold": [], "cached": []}
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory() as folder:
            for name, measured in times.items():
                measured.append(seconds_to_first_row(Path(folder, name), Path(folder, "cache")))
    print(f"{'':10}{'median, s':>12}{'all':>8}")
    for name, measured in times.items():
        print(f"{name:10}{median(measured):12.1f}   {', '.join(f'{t:.1f}' for t in measured)}")


if __name__ == "__main__":
    main()
