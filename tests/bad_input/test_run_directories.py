"""Run directories with the files of another program, or damaged ones: read, or refused by name."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_moe import ConfigError
from mla_moe.checkpoint.orbax_layout import find_step
from mla_moe.config import load_recipe
from mla_moe.report import drawing, page, panels, rl
from mla_moe.training.run_directory import add_summary, open_run_directory

from .json_values import VALUES, changed

METRICS = {
    "format_version": 3, "stage": "rl", "step": 1, "loss": 2.5, "lr": 1e-3, "accuracy": 0.5, "format_rate": 1.0,
    "response_length": 30.0, "eval/accuracy": 0.5, "eval/loss": 2.0, "step_seconds": 1.0, "time": 1.0,
}  # fmt: skip
SAMPLES = {
    "stage": "rl",
    "step": 1,
    "kind": "greedy",
    "prompt": "1+1",
    "completion": "2",
    "answer": "2",
    "length": 3,
    "accuracy": 1.0,
}
LOADS = {"stage": "pretrain", "step": 1, "load": [[0.5, 0.5]]}
LINES = {"metrics.jsonl": METRICS, "samples.jsonl": SAMPLES, "expert_load.jsonl": LOADS}


@pytest.fixture(scope="module", autouse=True)
def _drawn_once():
    """Most changes leave most curves as they are. Drawing takes longer than all the rest: equal ones are drawn once."""
    draw, drawn = drawing.draw_curves, {}

    def draw_once(stage, title, lines, scale="linear"):
        key = title, lines, scale, *(values.tobytes() for line in lines for values in stage.series(line.key))
        if len(drawn) == 500:  # 15 MB: what grows is to be the package
            drawn.clear()
        if key not in drawn:
            drawn[key] = draw(stage, title, lines, scale)
        return drawn[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (drawing, panels, rl):
            patch.setattr(module, "draw_curves", draw_once)
        yield


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "good"
    folder.mkdir()
    recipe = load_recipe(Path(__file__).parents[2] / "configs" / "quickstart.py")
    (folder / "recipe.json").write_text(recipe.to_json())
    (folder / "summary.json").write_text(json.dumps({"parameters": "2 M"}))
    for name, row in LINES.items():
        (folder / name).write_text("".join(json.dumps(row | {"step": step}) + "\n" for step in (1, 2)))
    return folder, recipe


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@st.composite
def contents(draw, good: bytes, row):
    """A file with changed rows, other JSON, or bytes."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(st.binary(max_size=60))
    if kind == 1:
        return good[: draw(st.integers(0, len(good)))]
    rows = draw(st.lists(changed(row) | VALUES, min_size=1, max_size=3))
    return "\n".join(map(json.dumps, rows)).encode(errors="replace")


@given(st.data())
def test_any_run_directory(good, data):
    """Resuming reads it; so do the commands that take a run, and the report."""
    good, recipe = good
    folder = good.with_name("changed")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    for name in data.draw(st.lists(st.sampled_from([*LINES, "recipe.json", "summary.json"]), min_size=1, max_size=2)):
        before = (good / name).read_bytes()
        row = LINES.get(name) or json.loads(before)
        (folder / name).write_bytes(data.draw(contents(before, row)))
    step = data.draw(st.sampled_from(["", "1", "x", "-1", "9" * 30]))
    (folder / "checkpoints" / "rl" / step).mkdir(parents=True)
    before, written = files(folder), {".lock", "report.html"}
    with contextlib.suppress(ConfigError):
        find_step(folder)
    with contextlib.suppress(ConfigError):
        load_recipe(folder / "recipe.json")
    with contextlib.suppress(ConfigError):
        open_run_directory(dataclasses.replace(recipe, run_dir=str(folder)))
        written.add("recipe.json")
    with contextlib.suppress(ConfigError):
        add_summary(folder, {"steps": "2"})
        written.add("summary.json")
    with contextlib.suppress(ConfigError):
        assert page.write_report(folder).stat().st_size > 1000
    assert {name: content for name, content in files(folder).items() if name not in written} == {
        name: content for name, content in before.items() if name not in written
    }  # what is refused is not lost
