"""Invalid flags, recipes, paths and run directories: one line that names field, value and fix, no traceback."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mla_moe.cli import main
from mla_moe.cli.errors import report_error
from mla_moe.config import Recipe
from mla_moe.training.metrics import MetricsWriter

GOLDEN = Path(__file__).parents[1] / "golden"
COMMANDS = {
    "eval": ["none", "--task", "arithmetic"],
    "generate": ["none", "--prompt", "a"],
    "inspect": ["tiny"],
    "plan": ["none.py", "--topology", "cpu"],
}
INTEGERS = {
    "eval": ["prompts", "samples", "max_prompt_tokens", "max_new_tokens", "max_num_seqs", "seed"],
    "generate": ["max_new_tokens", "top_k", "seed"],
    "inspect": ["length"],
    "plan": ["slices", "batch", "context"],
}
NUMBERS = {"eval": ["temperature"], "generate": ["temperature", "top_p", "min_p"]}
MAY_BE_ZERO = {"samples", "seed", "top_k", "temperature", "min_p", "top_p"}


def refused(capsys, *arguments):
    """The error of a command, which must be one line."""
    assert main([str(argument) for argument in arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]{5,2600}\n", error), error[:3000]
    return error


@pytest.mark.parametrize("command", COMMANDS)
def test_every_numeric_flag_has_a_range(command, capsys):
    for name in [*INTEGERS[command], *NUMBERS.get(command, [])]:
        values = ["-1", "1000000000000"] + ["0"] * (name not in MAY_BE_ZERO)
        for value in values + ["nan", "inf", "-inf"] * (name in NUMBERS.get(command, [])):
            flag = f"--{name.replace('_', '-')}={value}"
            error = refused(capsys, command, *COMMANDS[command], flag)
            assert re.match(rf"error: {name} = \S+: must be between [\d,.]+ and [\d,.]+\n", error), flag


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("training.batch-size", "1000000000000"),
        ("rl.kl-coef", "nan"),
        ("rl.temperature", "inf"),
        ("task.format-weight", "inf"),
        ("data.max-record-bytes", "0"),
        ("data.tokenizer", "bpe:²"),
        ("sample.temperature", "nan"),
        ("run-dir", "a/" * 3000),
        ("init-from", "\udcff"),
    ],
)
def test_every_numeric_field_of_a_recipe_has_a_range(flag, value, tmp_path, capsys):
    (tmp_path / "recipe.json").write_text(Recipe(run_dir=str(tmp_path / "run")).to_json())
    error = refused(capsys, "train", tmp_path / "recipe.json", f"--{flag}={value}")
    assert flag.rpartition(".")[2].replace("-", "_") in error
    assert not (tmp_path / "run").exists()


def test_what_is_no_number_or_no_flag_is_one_line(tmp_path, capsys):
    (tmp_path / "recipe.json").write_text(Recipe(run_dir="x").to_json())
    train = ["train", str(tmp_path / "recipe.json")]
    for arguments, message in (
        ([*train, "--seed=nan"], "Error parsing --seed: invalid literal for int() with base 10: 'nan'; "),
        ([*train, "--training.steps", "1e12"], "Error parsing --training.steps: "),
        ([*train, "--seed=" + "9" * 5000], "Error parsing --seed: Exceeds the limit"),
        ([*train, "--training.remat=foo"], "'foo' for argument '--training.remat'"),
        ([*train, "--nope=3"], "Unrecognized options: --nope=3"),
        (["inspect", "tiny", "--length", "inf"], "Error parsing --length: "),
        (["inspect", "tiny", "--size", "3"], "--size"),
        (["inspect"], "Missing from mla-moe inspect"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        main([*train, "--help"])
    assert stop.value.code == 0
    assert "--training.steps INT" in capsys.readouterr().out


RECIPES = {
    "binary": (bytes(range(256)) * 4, "SyntaxError"),
    "html": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "line 1: SyntaxError"),
    "null": (b"recipe = 1\0", "null bytes"),
    "syntax": (b"\nrecipe = Recipe(\n", "line 2: SyntaxError"),
    "raises": (b"\n\nrecipe = 1 / 0\n", "line 3: ZeroDivisionError: division by zero"),
    "many lines": (b"raise ValueError('a\\nb' * 9999)", "line 1: ValueError: a b"),
    "exits": (b"import sys\nsys.exit(0)", "line 2: SystemExit: 0"),
    "deep": (b"recipe = " + b"(" * 9999, "Error"),
    "other": (b"recipe = 3", "must bind `recipe"),
    "unknown field": (b"from mla_moe.config import Recipe\nrecipe = Recipe(run_dir='x', stepz=3)", "stepz"),
    "recursive": (b"def f(): f()\nf()", "RecursionError"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_no_recipe(name, tmp_path, capsys):
    content, message = RECIPES[name]
    (tmp_path / "a.py").write_bytes(content)
    assert message in refused(capsys, "train", tmp_path / "a.py")
    (tmp_path / "a.json").write_bytes(content)
    assert f"(in {tmp_path}/a.json)" in refused(capsys, "train", tmp_path / "a.json")


def test_paths_that_are_no_recipe(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.py")
    os.mkfifo(tmp_path / "pipe.json")
    with (tmp_path / "sparse.json").open("wb") as file:
        file.truncate(5 << 30)
    for path, message in (
        (tmp_path, "is not a file"),
        (tmp_path / "pipe.py", "is not a file"),
        (tmp_path / "pipe.json", "is not a file"),
        (tmp_path / "sparse.json", "is larger than 16 MB"),
        (tmp_path / "none.py", "no such file"),
        ("/dev/zero", "is not a file"),
        ("a" * 256, "is too long for a file"),
        ("a/" * 9999, "is too long for a file"),
        ("\udcff.py", "bytes that are not UTF-8"),
    ):
        assert message in refused(capsys, "train", path)
        assert message in refused(capsys, "plan", path, "--topology", "cpu")


@pytest.mark.parametrize("command", ["convert", "generate", "eval", "report", "inspect"])
def test_overlong_paths(command, tmp_path, capsys):
    rest = {"convert": [tmp_path / "out"], "generate": ["--prompt", "a"], "eval": ["--task", "arithmetic"]}
    for path in ("a" * 256, "a/" * 9999):
        assert "is too long for a file" in refused(capsys, command, path, *rest.get(command, []))
    if command == "convert":
        assert "path = '/" in refused(capsys, "convert", GOLDEN / "v3", tmp_path / ("a" * 256))


def test_the_destination_of_a_conversion_is_outside_its_source(tmp_path, capsys):
    assert "is inside" in refused(capsys, "convert", GOLDEN / "v3", GOLDEN / "v3" / "sub")
    assert not (GOLDEN / "v3" / "sub").exists()


JSON = {
    "binary": bytes(range(256)),
    "other program's": b'{"epoch": 1, "val_loss": 3}\n' * 2,
    "types": b'{"step": "1", "stage": 3, "loss": [1], "load": "x", "prompt": 3}\n',
    "huge": b'{"step": 1'
    + b"0" * 400
    + b', "stage": "rl", "loss": 1, "load": [[1]], "prompt": "", "completion": ""}\n',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("name", ["metrics.jsonl", "expert_load.jsonl", "samples.jsonl", "recipe.json", "summary.json"])
def test_foreign_files_in_a_run_directory(name, tmp_path, capsys):
    recipe = Recipe(run_dir=str(tmp_path))
    for kind, content in JSON.items():
        with MetricsWriter(tmp_path, None, "pretrain") as writer:
            writer.write(1, {"loss": 1.0})
        (tmp_path / "recipe.json").write_text(recipe.to_json())
        (tmp_path / name).write_bytes(content)
        assert name in refused(capsys, "report", tmp_path), kind
        if kind == "other program's" and name not in ("expert_load.jsonl", "samples.jsonl"):
            (tmp_path.parent / "again.json").write_text(recipe.to_json())
            assert name in refused(capsys, "train", tmp_path.parent / "again.json"), kind
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert name in refused(capsys, "report", tmp_path)


def test_text_that_the_terminal_lacks_is_printed_as_an_escape(tmp_path, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, "ascii"))
    assert main(["report", str(tmp_path / "日本\udcff")]) == 2
    sys.stderr.flush()
    assert rb"\u65e5\u672c" in written.getvalue()


def test_what_the_system_refuses_is_one_line(capsys):
    for error, code, text in (
        (
            OSError(27, "File too large"),
            1,
            "error: File too large; the system limits the size of a file: raise",
        ),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: '/x': Permission denied; check its owner and its"),
        (OSError("of our own"), 1, "error: of our own\n"),
        (MemoryError(), 1, "error: out of memory: "),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nlines"), 1, "error: out of memory: "),
    ):
        assert report_error(error) == code
        found = capsys.readouterr().err
        assert found.startswith(text)
        assert found.count("\n") == 1
    with pytest.raises(jax.errors.JaxRuntimeError):
        report_error(jax.errors.JaxRuntimeError("INTERNAL: a bug"))


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [1, 8, 64])
def test_a_limit_on_the_size_of_files_is_one_line(kilobytes, tmp_path):
    """In the first file of the run, in the compilation cache, or in a checkpoint."""
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i}.txt").write_text(f"ab cde fgh {i} " * 40)
    (tmp_path / "recipe.py").write_text(f"""
from mla_moe.config import *
recipe = Recipe(
    run_dir="{tmp_path}/run", checkpoint=CheckpointConfig(every=2),
    model=ModelConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=12, max_position_embeddings=128,
    ),
    data=DataConfig(train=("{tmp_path}/text/*.txt",), heldout=(), shuffle_buffer_size=8, prefetch=2),
    training=TrainingConfig(steps=6, batch_size=8, sequence_length=32, loss_chunk=32),
)
""")
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")}
    train = [sys.executable, str(GOLDEN.parents[1] / "train.py"), str(tmp_path / "recipe.py")]
    limited = ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "bash", *train]
    process = subprocess.run(limited, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 1
    lines = [line for line in process.stderr.splitlines() if "compilation cache" not in line]
    assert len(lines) == 1, process.stderr[:5000]
    assert re.match(r"error: .*(File too large|ulimit -f)", lines[0])
    assert process.stderr.count("compilation cache") <= 1
