"""Kill −9, for real: the script that `benchmarks/README.md` has 50 kills of."""

import os
import subprocess
import sys

import pytest


@pytest.mark.thorough
def test_a_run_that_is_killed_becomes_what_it_would_have_been(pytestconfig):
    script = pytestconfig.rootpath / "benchmarks" / "kills.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "12"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pytestconfig.rootpath)},
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same, bit for bit" in done.stdout
