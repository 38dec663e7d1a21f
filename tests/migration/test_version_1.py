"""Runs that were written in format version 1 resume, convert, evaluate, generate and report. `make.py` wrote them."""

import dataclasses
import json
import os
import platform
import tarfile
from pathlib import Path

import jax
import pytest

NEW = ("no_signal/", "data/epochs")
TIMES = ("tokens_per_s", "sample_seconds", "step_seconds", "mfu")


def environment() -> dict[str, str]:
    """What determines the floats of a program on CPU, beside its flags: the compiler and the processor."""
    flags = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    features = " ".join(sorted(flags.partition(":")[2].split()))
    return {"jax": jax.__version__, "machine": platform.machine(), "cores": str(os.cpu_count()), "features": features}


@pytest.fixture
def expected(tmp_path, monkeypatch):
    """Unpacks the runs into the working directory, to which the paths in their recipes are relative."""
    from mla_moe.parallel.mesh import make_mesh  # not above: `make.py` imports this module beside the old package

    with tarfile.open(Path(__file__).with_name("runs.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mla_moe.training.run_context.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    return json.loads(Path("expected.json").read_text())


def assert_same(actual, wanted, expected):
    """Numbers to a relative tolerance of 1e-3 or an absolute one of 1e-5, since versions, compilers and processors add
    in different orders. Text, which is sampled from them, in the environment in which version 1 ran."""
    if isinstance(wanted, dict):
        assert actual.keys() == wanted.keys()
        for key in wanted:
            assert_same(actual[key], wanted[key], expected)
    elif isinstance(wanted, float):
        assert actual == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    elif not isinstance(wanted, str) or environment() == expected["environment"]:
        assert actual == wanted


def rows(run, stage):
    from mla_moe.training.metrics import read_rows

    # Version 1 compressed each document alone, and counted groups without a signal only where it replaced them. It had
    # no router z-loss, and did not count epochs.
    without = (*TIMES, "eval/gzip_bits_per_byte", "filtered_groups", "router_z_loss")
    found = read_rows(Path(run, "metrics.jsonl"), stage)
    return [{k: v for k, v in row.items() if k not in without and not k.startswith(NEW)} for row in found]


def resume(run, *stages):
    from mla_moe.config import load_recipe
    from mla_moe.rl.trainer import train_rl
    from mla_moe.training.console import Console
    from mla_moe.training.pretrain import pretrain
    from mla_moe.training.run_directory import open_run_directory

    recipe = dataclasses.replace(load_recipe(f"{run}/recipe.json"), run_dir=run)
    for stage in stages:
        {"pretrain": pretrain, "rl": train_rl}[stage](recipe, open_run_directory(recipe), Console(enabled=True))


def assert_resumed(run, stage, expected):
    """The rows are those of the run that did not stop, with the new rows behind the old ones in one file."""
    wanted, found = rows("finished", stage), rows(run, stage)
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for actual, other in zip(found, wanted, strict=True):
        assert_same(actual, other, expected)
    raw = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    versions = [row.get("format_version") for row in raw]
    assert versions == sorted(versions, key=lambda version: version or 1)
    assert set(versions) == {None, 3}
    assert json.loads(Path(run, "recipe.json").read_text())["format_version"] == 3
    last = wanted[-1]["step"]
    metadata = json.loads(Path(run, "checkpoints", stage, str(last), "_CHECKPOINT_METADATA").read_text())
    assert metadata["custom_metadata"] == {"format_version": 3}


@pytest.mark.slow
def test_pretraining_resumes_with_the_same_losses(expected, capsys):
    resume("pretrain_half", "pretrain")
    assert "resumed from the checkpoint of step 2" in capsys.readouterr().out
    assert_resumed("pretrain_half", "pretrain", expected)


@pytest.mark.slow
def test_rl_resumes_with_the_same_losses(expected, capsys):
    from mla_moe.report.page import write_report
    from mla_moe.training.metrics import read_rows

    resume("rl_half", "pretrain", "rl")
    out = capsys.readouterr().out
    assert "pretrain: all 4 steps are done already" in out
    assert "resumed from the checkpoint of step 1" in out
    assert_resumed("rl_half", "rl", expected)
    assert any("verifier/raised" in row for row in rows("finished", "rl"))
    for actual, wanted in zip(*(read_rows(Path(run, "samples.jsonl")) for run in ("rl_half", "finished")), strict=True):
        assert_same(actual, wanted, expected)
    assert "Reinforcement learning" in write_report(Path("rl_half")).read_text()


def test_finished_run_converts_evaluates_generates_and_reports(expected, capsys):
    from mla_moe.cli import main

    before = Path("finished/metrics.jsonl").read_bytes()
    resume("finished", "pretrain", "rl")
    assert "rl: all 2 steps are done already" in capsys.readouterr().out
    assert Path("finished/metrics.jsonl").read_bytes() == before
    assert main(["convert", "finished", "hf"]) == 0
    assert {"config.json", "model.safetensors"} <= {path.name for path in Path("hf").iterdir()}
    assert main(["report", "finished"]) == 0
    assert "Reinforcement learning" in Path("finished/report.html").read_text()
    capsys.readouterr()
    assert main(["eval", "finished", "--prompts", "4", "--samples", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert_same({key: printed[key] for key in expected["eval"]}, expected["eval"], expected)
    for checkpoint in ("finished", "hf"):
        assert main(["generate", checkpoint, "--prompt", "ab", "--max-new-tokens", "8"]) == 0
        assert_same(capsys.readouterr().out, expected["generate"], expected)


def test_checkpoint_of_a_newer_version_is_one_line(expected, capsys):
    from mla_moe.cli import main

    path = Path("finished/checkpoints/rl/2/_CHECKPOINT_METADATA")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": {"format_version": 4}}))
    assert main(["generate", "finished", "--prompt", "ab"]) == 2
    line = r"error: finished/checkpoints/rl/2/_CHECKPOINT_METADATA.format_version = 4: written by a newer mla_moe"
    assert capsys.readouterr().err.startswith(line)
