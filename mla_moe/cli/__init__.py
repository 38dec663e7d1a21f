"""The command `mla-moe`: train, evaluate and serve models, convert checkpoints, and plan, launch and report runs."""

import os
import re
import sys
from collections.abc import Sequence
from functools import partial

import tyro

from mla_moe.cli.convert import Convert
from mla_moe.cli.data import Data
from mla_moe.cli.errors import EXPECTED, print_any_text, report_error
from mla_moe.cli.eval import Eval
from mla_moe.cli.generate import Generate
from mla_moe.cli.inspect import Inspect
from mla_moe.cli.launch import Launch
from mla_moe.cli.plan import Plan
from mla_moe.cli.report import Report
from mla_moe.cli.serve import Serve
from mla_moe.cli.train import Train, reexecute_with_huge_pages
from mla_moe.cli.train import main as run_train
from mla_moe.config.flags import parse_flags

Command = Train | Eval | Generate | Serve | Convert | Inspect | Data | Plan | Report | Launch

RENAMED_FLAGS = {"--slots": "--max-num-seqs", "--capacity": "--max-model-len", "--int8-cache": "--int8-kv-cache"}
_FLAG = re.compile(r"--([a-zA-Z][\w.-]*(=.*)?)?|-h|-[\d.].*", re.DOTALL)  # and negative numbers


def main(args: Sequence[str] | None = None) -> int:
    """Run a command, by default of `sys.argv`. Returns the exit code: 2 for invalid input, 1 for another error."""
    if args is None:
        args = sys.argv[1:]
        if args[:1] == ["train"]:
            reexecute_with_huge_pages()
    if args and args[0] == "train":  # its fields come from the recipe, in `--help` too
        return run_train(args[1:], "mla-moe train")
    print_any_text()
    for flag in (arg.partition("=")[0].replace("_", "-") for arg in args):
        if flag in RENAMED_FLAGS:
            print(f"{flag}: renamed; use {RENAMED_FLAGS[flag]}", file=sys.stderr)
            return 2
    args = _join_dashed_values(args)
    parse = partial(tyro.cli, Command, prog="mla-moe", description=__doc__, args=args)
    try:
        command, flags = parse_flags(partial(parse, return_unknown_args=True))
        assert not isinstance(command, Train)
        if isinstance(command, Launch):
            return command.run(flags)
        if isinstance(command, Plan | Data):
            command.run(flags)
        elif flags:
            parse_flags(parse)  # prints an error for the unknown flags, and exits
        else:
            command.run()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail as well
        return 141
    except EXPECTED as error:
        return report_error(error)
    return 0


def _join_dashed_values(args: Sequence[str]) -> list[str]:
    """`--prompt -x` as `--prompt=-x`: the parser would take a value that begins with a dash for a flag."""
    joined: list[str] = []
    for arg in args:
        if arg.startswith("-") and not _FLAG.fullmatch(arg) and joined and re.fullmatch(r"--[\w-]+", joined[-1]):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return joined
