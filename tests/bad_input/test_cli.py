"""Command lines of any values: a command runs, or ends with status 2 and one line that names the field."""

import contextlib
import dataclasses
import io
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_moe import cli
from mla_moe.config import MeshConfig, Recipe

COMMANDS = {
    command.__name__.lower(): command
    for command in (
        cli.Eval, cli.Generate, cli.Serve, cli.Convert, cli.Inspect, cli.Plan, cli.Report, cli.Data, cli.Launch,
    )
}  # fmt: skip
TARGETS = [["gke", "--image=a"], ["slurm"], ["tpu-vm", "--zone=a"], ["local"]]
NUMBERS = st.sampled_from(["nan", "-1", "0", "1", "inf", "-inf", "1e400", str(10**12), str(10**400), "1.5", "", "0x1"])
PATHS = st.sampled_from(
    ["", ".", "/dev/null", "/dev/zero", "a" * 300, "a/" * 3000, "no/such", "ftp://host/x", "~", "\ud800"]
)
TEXTS = st.text(st.characters(exclude_characters="\0"), max_size=20) | PATHS | NUMBERS


def flags(command):
    """The flags of a command, and whether each takes a number."""
    hints = typing.get_type_hints(command)
    kinds = {name: {hint, *typing.get_args(hint)} for name, hint in hints.items()}
    names = [field.name for field in dataclasses.fields(command) if field.name != "print"]  # it must not submit
    return {name: bool({int, float} & kinds[name]) for name in names}


FLAGS = {name: flags(command) for name, command in COMMANDS.items()}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    path.write_text(Recipe(run_dir="x", mesh=MeshConfig(data=-1)).to_json())
    return str(path)


@given(st.data())
def test_any_command_line(recipe, data):
    name = data.draw(st.sampled_from(sorted(COMMANDS)))
    if name in ("data", "launch"):
        first, *rest = data.draw(st.sampled_from(TARGETS)) if name == "launch" else ["preview"]
        devices = data.draw(st.sampled_from(["h100:1x8", "v6e:4x4", "v5p:4x4x8"]))
        given = [f"--topology={devices}", "--print"] if name == "launch" else []
        arguments = [name, first, data.draw(PATHS | st.just(recipe)), *rest, *given]
    else:
        arguments = [name, data.draw(PATHS)]
    for flag in data.draw(st.lists(st.sampled_from(sorted(FLAGS[name])), max_size=3, unique=True)):
        arguments.append(f"--{flag.replace('_', '-')}={data.draw(NUMBERS if FLAGS[name][flag] else TEXTS)}")
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
        try:
            status = cli.main(arguments)
        except SystemExit as error:  # of the parser
            status = error.code
    assert status in (0, 1, 2)
    assert "Traceback" not in errors.getvalue()
    assert status == 0 or errors.getvalue().strip()
