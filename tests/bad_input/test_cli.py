"""Command lines of any values: a command runs, or ends with status 2 and one line that names the field."""

import contextlib
import dataclasses
import io
import typing

from hypothesis import given
from hypothesis import strategies as st

from mla_moe import cli

COMMANDS = {
    command.__name__.lower(): command
    for command in (cli.Eval, cli.Generate, cli.Serve, cli.Convert, cli.Inspect, cli.Plan, cli.Report)
}
NUMBERS = st.sampled_from(["nan", "-1", "0", "1", "inf", "-inf", "1e400", str(10**12), str(10**400), "1.5", "", "0x1"])
PATHS = st.sampled_from(
    ["", ".", "/dev/null", "/dev/zero", "a" * 300, "a/" * 3000, "no/such", "ftp://host/x", "~", "\ud800"]
)
TEXTS = st.text(st.characters(exclude_characters="\0"), max_size=20) | PATHS | NUMBERS


def flags(command):
    """The flags of a command, and whether each takes a number."""
    hints = typing.get_type_hints(command)
    kinds = {name: {hint, *typing.get_args(hint)} for name, hint in hints.items()}
    return {field.name: bool({int, float} & kinds[field.name]) for field in dataclasses.fields(command)}


FLAGS = {name: flags(command) for name, command in COMMANDS.items()}


@given(st.data())
def test_any_command_line(data):
    name = data.draw(st.sampled_from(sorted(COMMANDS)))
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
