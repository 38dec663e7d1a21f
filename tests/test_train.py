"""The command as people type it: bad input ends with one line and exit code 2, before anything compiles."""

import signal
import subprocess
import sys
import time

import pytest


def train(root, *args):
    command = [sys.executable, "train.py", *args]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["configs/nothing.py"], "no such file"),
        ([], "name a recipe first"),
        (["configs/quickstart.py", "--training.stepz", "3"], "--training.steps"),
        (["configs/quickstart.py", "--training.steps", "many"], "training.steps"),
        (["configs/quickstart.py", "--training.batch-size", "0"], "training.batch_size"),
        (["configs/quickstart.py", "--model.num-experts-per-tok", "99"], "num_experts_per_tok = 99: choose at most"),
        (["configs/quickstart.py", "--data.train", "nowhere/*.txt"], "data.train"),
    ],
)
def test_bad_input_is_one_clear_error(args, said, request, tmp_path):
    extra = ["--run-dir", str(tmp_path / "run")] if len(args) > 1 else []
    done = train(request.config.rootpath, *args, *extra)
    assert done.returncode == 2, done.stderr
    assert said.replace("_", "-") in (done.stdout + done.stderr).replace("_", "-")
    assert "Traceback" not in done.stderr


@pytest.fixture
def heeding_interrupts():
    """A shell in the background ignores them, and what is begun there inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupted_while_it_compiles_is_one_line(request, tmp_path, heeding_interrupts):
    command = [sys.executable, "train.py", "configs/quickstart.py", "--run-dir", str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=request.config.rootpath, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (tmp_path / "run" / "recipe.json").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "interrupted; the same command goes on" in said
    assert "Traceback" not in said


def test_help_lists_fields_with_their_docs(request):
    done = train(request.config.rootpath, "configs/quickstart.py", "--help")
    assert done.returncode == 0
    for flag in (
        "--training.steps",
        "--mesh.fsdp",
        "--checkpoint.every",
        "--data.tokenizer",
        "--optimizer.schedule.peak_lr",
    ):
        assert flag in done.stdout
    assert "router bias" in done.stdout
