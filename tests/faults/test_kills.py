"""Kill −9 of a real run, with the script of `benchmarks/README.md`."""

import os
import subprocess
import sys

import pytest


@pytest.mark.thorough
def test_killed_run_ends_with_the_same_results(pytestconfig):
    script = pytestconfig.rootpath / "benchmarks" / "kills.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "12"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pytestconfig.rootpath)},
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same, bit for bit" in done.stdout
