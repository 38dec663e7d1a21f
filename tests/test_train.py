"""`train.py` and `mla-moe train`: invalid input gives one line and exit code 2 before compilation."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mla_moe.cli.train import main

TRAIN_PY = (sys.executable, "train.py")
MLA_MOE_TRAIN = (str(Path(sys.executable).with_name("mla-moe")), "train")


def train(root, *args, command=TRAIN_PY):
    return subprocess.run([*command, *args], cwd=root, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("args", "message"),
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
def test_invalid_input_is_one_clear_error(args, message, request, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(request.config.rootpath)
    try:
        code = main([*args, *(["--run-dir", str(tmp_path / "run")] if len(args) > 1 else [])])
    except SystemExit as end:  # of the flags' parser
        code = end.code
    output = "".join(capsys.readouterr())
    assert code == 2, output
    assert message.replace("_", "-") in output.replace("_", "-")
    assert "Traceback" not in output


def test_the_exit_code_is_that_of_the_process(request):
    done = train(request.config.rootpath, "configs/nothing.py")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


@pytest.mark.slow
def test_an_interrupt_during_compilation_is_one_line(request, tmp_path, interruptible):
    command = [sys.executable, "train.py", "configs/quickstart.py", "--run-dir", str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=request.config.rootpath, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (tmp_path / "run" / "recipe.json").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            _, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "interrupted; the same command resumes" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("command", [TRAIN_PY, MLA_MOE_TRAIN], ids=["train.py", "mla-moe train"])
def test_help_lists_fields_with_their_docs(command, request):
    done = train(request.config.rootpath, "configs/quickstart.py", "--help", command=command)
    assert done.returncode == 0
    for flag in (
        "--training.steps",
        "--mesh.fsdp",
        "--checkpoint.every",
        "--data.tokenizer",
        "--optimizer.schedule.peak-lr",
    ):
        assert flag in done.stdout
    assert "router bias" in done.stdout
